"""Limits in every dialect: exact counts, and refusals in the shape of each API."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest

from falproxy.windows import Window
from tests.support.limits import APP, HOUR, LONG, MODEL, PRICE, SUBMIT, open_reservations, running
from tests.support.openai_client import create_openai_client
from tests.support.sandbox_proxy import (
    ASYNC,
    Reply,
    SandboxProxy,
    data_uri,
    open_sandbox_proxy,
)
from tests.support.waiting import SOON, wait_until

ME = "principal:address:127.0.0.1"
ENDLESS, QUICK = "!delay 60 a heron", "!delay 0 a heron"
SMALL = {"image_size": {"width": 64, "height": 48}}
Open = Callable[..., AbstractAsyncContextManager[SandboxProxy]]


@pytest.fixture
def open_proxy(tmp_path: Path) -> Open:
    @asynccontextmanager
    async def opened(**settings: Any) -> AsyncIterator[SandboxProxy]:
        async with open_sandbox_proxy(tmp_path, cache=False, **settings) as proxy:
            yield proxy

    return opened


def code_and_message(reply: Reply) -> tuple[str, str]:
    return reply.document["error"]["code"], reply.document["error"]["message"]


def fal_code_and_message(reply: Reply) -> tuple[str, str]:
    assert reply.document["message"] == reply.document["detail"]
    return reply.document["type"], reply.document["detail"]


async def call_header_route(proxy: SandboxProxy, prompt: str) -> Reply:
    return await proxy.call_target(f"https://fal.run/{MODEL}", SMALL | {"prompt": prompt})


async def call_base_url(proxy: SandboxProxy, prompt: str) -> Reply:
    path = f"/api/fal/run/{MODEL}"
    return await proxy.request("POST", path, json=SMALL | {"prompt": prompt})


async def call_kontext(proxy: SandboxProxy, prompt: str) -> Reply:
    return await proxy.request(
        "POST", "/kontext/dev", json={"prompt": prompt, "image_data": data_uri()}
    )


async def call_openai(proxy: SandboxProxy, prompt: str) -> Reply:
    body = {"model": "flux-dev", "prompt": prompt, "size": "256x256"}
    return await proxy.request("POST", "/v1/images/generations", json=body)


async def call_generate(proxy: SandboxProxy, prompt: str) -> Reply:
    return await proxy.generate("flux-dev", {"prompt": prompt})


async def call_generate_later(proxy: SandboxProxy, prompt: str) -> Reply:
    return await proxy.generate("flux-dev", {"prompt": prompt}, headers=ASYNC)


@dataclass(frozen=True)
class Dialect:
    """A dialect's call of a model of known price, and the shape of its errors.

    codes: those of the errors of a rate, of concurrency and of a budget, with their statuses.
    """

    call: Callable[[SandboxProxy, str], Awaitable[Reply]]
    error: Callable[[Reply], tuple[str, str]]
    codes: tuple[tuple[int, str], ...] = (
        (429, "rate_limited"),
        (429, "concurrency_limited"),
        (402, "budget_exceeded"),
    )
    ok: int = 200


OPENAI_CODES = (
    (429, "rate_limit_exceeded"),
    (429, "rate_limit_exceeded"),
    (429, "insufficient_quota"),
)
DIALECTS = {
    "header route": Dialect(call_header_route, fal_code_and_message),
    "base URL": Dialect(call_base_url, fal_code_and_message),
    "kontext": Dialect(call_kontext, code_and_message),
    "openai": Dialect(call_openai, code_and_message, OPENAI_CODES),
    "generate": Dialect(call_generate, code_and_message),
    "generate later": Dialect(call_generate_later, code_and_message, ok=202),
}
each_dialect = pytest.mark.parametrize("dialect", DIALECTS.values(), ids=DIALECTS)


@each_dialect
async def test_a_rate_is_exact(open_proxy: Open, dialect: Dialect) -> None:
    async with open_proxy(rate=(3, HOUR)) as proxy:
        replies = [await dialect.call(proxy, QUICK) for _ in range(5)]
        assert [reply.status for reply in replies] == [dialect.ok] * 3 + [dialect.codes[0][0]] * 2
        assert proxy.submits == 3
        code, message = dialect.error(replies[-1])
        assert code == dialect.codes[0][1]
        seconds = int(replies[-1].headers["Retry-After"])
        assert 3500 < seconds <= 3660
        assert f"try again in {seconds} s" in message
        for number, reply in enumerate(replies):
            remaining = max(0, 2 - number)
            assert reply.headers["RateLimit"].startswith(f'"rate";r={remaining};t=')
            assert reply.headers["RateLimit-Policy"] == '"rate";q=3;w=3600'


@pytest.mark.slow(seconds=3)
@each_dialect
async def test_concurrency_is_exact(open_proxy: Open, dialect: Dialect) -> None:
    async with open_proxy(concurrency=2, wait=60.0) as proxy:
        calls = [
            asyncio.ensure_future(dialect.call(proxy, f"{ENDLESS} {number}")) for number in range(5)
        ]
        if dialect.ok == 200:
            await wait_until(lambda: sum(call.done() for call in calls) == 3)
        else:
            await wait_until(lambda: all(call.done() for call in calls))
        replies = [call.result() for call in calls if call.done()]
        refused = [reply for reply in replies if reply.status == dialect.codes[1][0]]
        assert len(refused) == 3
        assert {dialect.error(reply)[0] for reply in refused} == {dialect.codes[1][1]}
        assert {reply.headers["Retry-After"] for reply in refused} == {"1"}
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
        assert proxy.submits <= 2  # a run that is cancelled early does not reach the sandbox


@each_dialect
async def test_a_budget_is_exact(open_proxy: Open, dialect: Dialect) -> None:
    async with open_proxy(budget=(3 * PRICE, LONG), wait=60.0) as proxy:
        replies: list[Reply] = []
        while not replies or replies[-1].status == dialect.ok:
            replies.append(await dialect.call(proxy, f"{QUICK} {len(replies)}"))
        assert len(replies) == 4
        assert replies[-1].status == dialect.codes[2][0]
        code, message = dialect.error(replies[-1])
        assert code == dialect.codes[2][1]
        assert "The budget of this caller ($0.075 per" in message
        assert proxy.submits == 3


@pytest.mark.parametrize("name", [name for name in DIALECTS if name != "generate later"])
async def test_calls_one_after_the_other_have_a_place(open_proxy: Open, name: str) -> None:
    dialect = DIALECTS[name]
    async with open_proxy(concurrency=1) as proxy:
        for number in range(4):
            assert (await dialect.call(proxy, f"{QUICK} {number}")).status == 200
        assert await running(proxy.app, ME) == 0


@each_dialect
async def test_a_call_that_may_cost_too_much_is_refused(open_proxy: Open, dialect: Dialect) -> None:
    async with open_proxy(max_cost=PRICE - 1) as proxy:
        reply = await dialect.call(proxy, QUICK)
        assert reply.status == dialect.codes[2][0]
        assert "$0.025" in dialect.error(reply)[1]
        assert proxy.submits == 0


async def test_jobs_of_generate_are_settled_in_the_background(open_proxy: Open) -> None:
    async with open_proxy(budget=(9 * PRICE, LONG), concurrency=9) as proxy:
        reply = await call_generate_later(proxy, QUICK)
        assert reply.status == 202
        await proxy.wait_finished(reply.document["jobId"])

        async with asyncio.timeout(SOON):
            while await running(proxy.app, ME):
                await asyncio.sleep(0.01)
        assert await open_reservations(proxy.app) == 0


async def test_a_job_that_a_limit_refuses_is_not_queued(open_proxy: Open) -> None:
    async with open_proxy(rate=(1, HOUR)) as proxy:
        replies = [await call_generate_later(proxy, QUICK) for _ in range(2)]
        assert [reply.status for reply in replies] == [202, 429]
        assert [job["status"] for job in proxy.jobs()][1:] == ["failed"]


# --- Requests that need several calls: the sandbox's models make four images at most ---


async def call_for_images(proxy: SandboxProxy, n: int) -> Reply:
    body = {"model": "flux-dev", "prompt": QUICK, "size": "256x256", "n": n}
    return await proxy.request("POST", "/v1/images/generations", json=body)


@pytest.mark.parametrize(
    ("limits", "status"),
    [
        pytest.param({"budget": (10 * PRICE - 1, LONG)}, 429, id="a budget that covers a part"),
        pytest.param({"total_budget": (10 * PRICE - 1, LONG)}, 429, id="a budget of all callers"),
        pytest.param({"rate": (2, HOUR)}, 400, id="a rate that never admits all"),
    ],
)
async def test_no_call_is_sent_for_a_request_that_does_not_fit(
    open_proxy: Open, limits: dict[str, Any], status: int
) -> None:
    async with open_proxy(**limits) as proxy:
        reply = await call_for_images(proxy, 10)
        assert reply.status == status, reply.document
        assert proxy.submits == 0
        assert (await call_for_images(proxy, 4)).status == 200


async def test_a_rate_that_is_used_up_in_part_admits_all_calls_or_none(open_proxy: Open) -> None:
    async with open_proxy(rate=(4, HOUR)) as proxy:
        for n, status in ((8, 200), (10, 429), (8, 200), (1, 429)):
            assert (await call_for_images(proxy, n)).status == status
        assert proxy.submits == 4


async def test_all_calls_of_a_request_fit_exactly(open_proxy: Open) -> None:
    async with open_proxy(budget=(10 * PRICE, LONG), rate=(3, HOUR)) as proxy:
        reply = await call_for_images(proxy, 10)
        assert (reply.status, len(reply.document["data"])) == (200, 10)
        assert (await call_for_images(proxy, 1)).status == 429


@pytest.mark.parametrize("concurrency", [1, 2])
async def test_calls_of_a_request_wait_for_one_another(open_proxy: Open, concurrency: int) -> None:
    async with open_proxy(concurrency=concurrency, rate=(3, HOUR)) as proxy:
        reply = await call_for_images(proxy, 10)
        assert (reply.status, len(reply.document["data"])) == (200, 10)
        assert proxy.submits == 3
        assert await running(proxy.app, ME) == 0


# --- Real clients ---


async def test_openai_s_client_raises_its_errors_with_the_wait(open_proxy: Open) -> None:
    async with (
        open_proxy(rate=(1, HOUR)) as proxy,
        create_openai_client(proxy.origin) as client,
    ):
        raw = await client.images.with_raw_response.generate(
            model="flux-dev", prompt=QUICK, size="256x256"
        )
        assert raw.headers["x-ratelimit-limit-requests"] == "1"
        assert raw.headers["x-ratelimit-remaining-requests"] == "0"
        assert raw.headers["x-ratelimit-reset-requests"].endswith("s")
        with pytest.raises(openai.RateLimitError) as caught:
            await client.images.generate(model="flux-dev", prompt=QUICK)
        error = caught.value
        assert (error.code, error.type) == ("rate_limit_exceeded", "rate_limit_error")
        seconds = int(error.response.headers["Retry-After"])
        assert f"try again in {seconds} s" in error.message
        assert error.response.headers["x-ratelimit-remaining-requests"] == "0"
        posts = [seen for seen in proxy.sandbox.seen if seen.method == "POST"]
        assert len(posts) == 1


async def test_openai_s_client_waits_for_a_short_window(open_proxy: Open) -> None:
    async with (
        open_proxy(rate=(1, Window(2))) as proxy,
        create_openai_client(proxy.origin) as client,
    ):
        for _ in range(2):
            await client.images.generate(model="flux-dev", prompt=QUICK, size="256x256")
        assert proxy.submits == 2


async def test_openai_s_client_does_not_repeat_a_call_without_a_budget(open_proxy: Open) -> None:
    async with (
        open_proxy(budget=(PRICE - 1, LONG)) as proxy,
        create_openai_client(proxy.origin) as client,
    ):
        started = asyncio.get_running_loop().time()
        with pytest.raises(openai.RateLimitError) as caught:
            await client.images.generate(model="flux-dev", prompt=QUICK)
        assert asyncio.get_running_loop().time() - started < 0.5
        assert (caught.value.code, caught.value.type) == (
            "insufficient_quota",
            "insufficient_quota",
        )
        assert "It is renewed at" in caught.value.message


async def test_a_cancel_in_the_queue_gives_the_money_back(open_proxy: Open) -> None:
    """Without help: the proxy asks fal some seconds later."""
    async with open_proxy(budget=(PRICE, LONG), concurrency=1) as proxy:
        reply = await proxy.call_target(SUBMIT, {"prompt": ENDLESS})
        target = f"https://queue.fal.run/{APP}/requests/{reply.document['request_id']}/cancel"
        assert (await proxy.call_target(target, method="PUT")).status == 202
        assert (await proxy.call_target(SUBMIT, {"prompt": ENDLESS})).status in (402, 429)
        async with asyncio.timeout(15):
            while (await proxy.call_target(SUBMIT, {"prompt": ENDLESS})).status != 200:
                await asyncio.sleep(0.1)
