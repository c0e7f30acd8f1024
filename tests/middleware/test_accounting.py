"""Accounting: every model call on every route has one record, which contains no private data."""

import asyncio
import io
from collections.abc import AsyncIterator
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from aiohttp import FormData, web

from falproxy.middleware.accounting import record_cancellation
from falproxy.stores.ledger import CallRecord
from falproxy.stores.ledger.writer import LEDGER_WRITER, LedgerWriter
from tests.support.fake_fal import FakeFal
from tests.support.key_search import SECRET
from tests.support.sandbox_proxy import (
    ASYNC,
    PNG,
    Reply,
    SandboxProxy,
    data_uri,
    open_sandbox_proxy,
    select_rows,
)
from tests.support.urls import PROXY
from tests.support.waiting import wait_until

DEV, SCHNELL = "fal-ai/flux/dev", "fal-ai/flux/schnell"
KONTEXT, TEXT = "fal-ai/flux-pro/kontext", "fal-ai/flux-pro/kontext/text-to-image"
HERON = "!delay 0 a heron at dawn"
DRAW = {"prompt": HERON, "image_size": {"width": 64, "height": 48}}
SLOW = DRAW | {"prompt": "!delay 0.4 a heron at dawn"}
ENDLESS = DRAW | {"prompt": "!delay 60 a heron at dawn"}
ANN = {"x-falproxy-key": "s3cret-of-ann"}


@pytest.fixture
async def proxy(tmp_path: Path) -> AsyncIterator[SandboxProxy]:
    async with open_sandbox_proxy(tmp_path) as opened:
        yield opened


async def submit(proxy: SandboxProxy, endpoint: str, body: object) -> str:
    reply = await proxy.call_target(f"https://queue.fal.run/{endpoint}", body)
    assert reply.status == 200, reply
    return str(reply.document["request_id"])


async def get_request(
    proxy: SandboxProxy, request_id: str, verb: str = "", app: str = "fal-ai/flux"
) -> Reply:
    return await proxy.call_target(f"https://queue.fal.run/{app}/requests/{request_id}{verb}")


async def wait_completed(proxy: SandboxProxy, request_id: str, app: str = "fal-ai/flux") -> None:
    while (await get_request(proxy, request_id, "/status", app)).document["status"] != "COMPLETED":
        await asyncio.sleep(0.01)


async def fetch_result(proxy: SandboxProxy, request_id: str, app: str = "fal-ai/flux") -> Reply:
    """Wait until a job has ended, and return its result."""
    await wait_completed(proxy, request_id, app)
    return await get_request(proxy, request_id, "", app)


async def single_record(proxy: SandboxProxy) -> CallRecord:
    (record,) = await proxy.records()
    return record


def writer(proxy: SandboxProxy) -> LedgerWriter:
    return proxy.app[LEDGER_WRITER]


def outcomes(proxy: SandboxProxy) -> list[dict[str, Any]]:
    return select_rows(proxy.data_dir, "SELECT * FROM falproxy_outcomes")


def form(**fields: str) -> FormData:
    data = FormData(fields)
    data.add_field("image", PNG, filename="in.png", content_type="image/png")
    return data


@dataclass(frozen=True, slots=True)
class Example:
    """A request, and the expected fields of its record."""

    path: str
    body: Any
    route: str
    operation: str
    endpoint: str
    target: str | None = None
    user_id: str | None = None
    units: int | None = 1
    settled: int | None = 25_000
    estimated: int | None = 25_000
    cache: str | None = None


OPENAI_BODY = {"model": DEV, "prompt": HERON, "size": "64x64"}
GENERATE = "/api/images/generate"
OPENAI = "/v1/images/generations"
TEMPLATE = "/api/templates/product-shot"
EXAMPLES = {
    "header, run": Example(PROXY, DRAW, PROXY, "run", DEV, f"https://fal.run/{DEV}"),
    "header, cached": Example(
        PROXY, {"prompt": HERON}, PROXY, "run", TEXT, f"https://fal.run/{TEXT}",
        settled=40_000, estimated=40_000, cache="miss",
    ),
    "header, submit": Example(
        PROXY, DRAW, PROXY, "submit", DEV, f"https://queue.fal.run/{DEV}", units=None, settled=None
    ),
    "header, stream": Example(
        PROXY, DRAW, PROXY, "stream", SCHNELL, f"https://fal.run/{SCHNELL}/stream",
        units=None, settled=None, estimated=3_000,
    ),
    "base URL, run": Example(f"/api/fal/run/{DEV}", DRAW, "/api/fal/run/{path}", "run", DEV),
    "base URL, submit": Example(
        f"/api/fal/queue/{DEV}", DRAW, "/api/fal/queue/{path}", "submit", DEV,
        units=None, settled=None,
    ),
    "base URL, stream": Example(
        f"/api/fal/run/{SCHNELL}/stream", DRAW, "/api/fal/run/{path}", "stream", SCHNELL,
        units=None, settled=None, estimated=3_000,
    ),
    "kontext": Example(
        "/kontext", {"prompt": HERON, "image_url": data_uri()}, "/kontext", "submit", KONTEXT,
        settled=40_000, estimated=40_000, cache="miss",
    ),
    "openai": Example(OPENAI, OPENAI_BODY | {"user": "ada"}, OPENAI, "submit", DEV, user_id="ada"),
    "openai, stream": Example(
        OPENAI, OPENAI_BODY | {"model": SCHNELL, "stream": True, "partial_images": 2, "n": 1},
        OPENAI, "stream", SCHNELL, units=None, settled=None, estimated=3_000,
    ),
    "openai, edit": Example(
        "/v1/images/edits", {"model": "kontext", "prompt": HERON, "user": "ada"},
        "/v1/images/edits", "submit", KONTEXT, user_id="ada", settled=40_000,
        estimated=40_000, cache="miss",
    ),
    "generate": Example(
        GENERATE, {"model": "flux-dev", "inputs": DRAW, "userId": "ada"}, GENERATE,
        "submit", DEV, user_id="ada",
    ),
    "template": Example(
        TEMPLATE, {"variables": {"product": HERON}, "userId": "ada"}, "/api/templates/{name}",
        "submit", DEV, user_id="ada",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", EXAMPLES)
async def test_a_call_is_recorded_on_every_route(tmp_path: Path, name: str) -> None:
    row = EXAMPLES[name]
    async with open_sandbox_proxy(tmp_path, access_keys=(("ann", ANN["x-falproxy-key"]),)) as proxy:
        target = {"x-fal-target-url": row.target} if row.target else {}
        headers = ANN | target
        sent = {"data": form(**row.body)} if "edits" in row.path else {"json": row.body}
        reply = await proxy.request("POST", row.path, headers=headers, **sent)
        assert reply.status == 200, reply
        record = await single_record(proxy)
        request_id = record.request_id
    assert (record.route, record.operation, record.endpoint) == (
        row.route, row.operation, row.endpoint,
    )  # fmt: skip
    assert (record.principal, record.user_id) == ("ann", row.user_id)
    assert (record.status, record.error, record.cache) == (200, None, row.cache)
    assert request_id
    assert record.units == (None if row.units is None else Decimal(row.units))
    assert (record.estimated, record.settled) == (row.estimated, row.settled)
    assert 0 < record.upstream_seconds <= record.seconds


async def test_records_of_an_open_proxy_have_no_principal(proxy: SandboxProxy) -> None:
    await proxy.call_target(f"https://fal.run/{DEV}", DRAW)
    record = await single_record(proxy)
    assert (record.principal, record.user_id) == (None, None)


async def test_every_model_call_of_a_request_has_a_record(proxy: SandboxProxy) -> None:
    await proxy.request("POST", OPENAI, json=OPENAI_BODY | {"n": 10})
    assert [(record.endpoint, record.units) for record in await proxy.records()] == [
        (DEV, Decimal(2)), (DEV, Decimal(4)), (DEV, Decimal(4)),
    ]  # fmt: skip


class TestQueuedJobs:
    async def test_are_settled_when_their_result_is_fetched(self, proxy: SandboxProxy) -> None:
        request_id = await submit(proxy, DEV, DRAW | {"num_images": 3})
        await fetch_result(proxy, request_id)
        record = await single_record(proxy)
        assert record.request_id == request_id
        assert (record.status, record.units, record.settled) == (200, Decimal(3), 75_000)

    async def test_are_settled_by_base_url_routes(self, proxy: SandboxProxy) -> None:
        reply = await proxy.request("POST", f"/api/fal/queue/{DEV}", json=DRAW)
        url = f"/api/fal/queue/fal-ai/flux/requests/{reply.document['request_id']}"
        while (await proxy.request("GET", f"{url}/status")).document["status"] != "COMPLETED":
            await asyncio.sleep(0.01)
        assert (await proxy.request("GET", url)).status == 200
        assert (await single_record(proxy)).settled == 25_000

    @pytest.mark.parametrize(
        ("error", "status"),
        [("422 content_policy_violation", 422), ("500", 500), ("400 downstream_service_error", 400),
         ("504 startup_timeout", 504)],
    )  # fmt: skip
    async def test_that_failed_cost_nothing(
        self, proxy: SandboxProxy, error: str, status: int
    ) -> None:
        request_id = await submit(proxy, DEV, {"prompt": f"!error {error}"})
        assert (await fetch_result(proxy, request_id)).status == status
        record = await single_record(proxy)
        assert (record.status, record.settled) == (status, 0)

    async def test_that_were_cancelled_have_status_499(self, proxy: SandboxProxy) -> None:
        request_id = await submit(proxy, DEV, ENDLESS)
        target = f"https://queue.fal.run/fal-ai/flux/requests/{request_id}/cancel"
        assert (await proxy.call_target(target, method="PUT")).status == 202
        record = await single_record(proxy)
        assert (record.status, record.error_type, record.settled) == (499, "client_cancelled", None)
        await fetch_result(proxy, request_id)
        record = await single_record(proxy)
        assert (record.status, record.settled) == (499, 0)

    async def test_that_end_before_they_are_cancelled_are_paid(self, proxy: SandboxProxy) -> None:
        request_id = await submit(proxy, DEV, DRAW)
        target = f"https://queue.fal.run/fal-ai/flux/requests/{request_id}"
        await wait_completed(proxy, request_id)
        assert (await proxy.call_target(f"{target}/cancel", method="PUT")).status == 400
        assert outcomes(proxy) == []

    async def test_that_complete_although_they_are_cancelled_have_their_result(
        self, proxy: SandboxProxy
    ) -> None:
        request_id = await submit(proxy, DEV, DRAW)
        record_cancellation(writer(proxy), request_id, 202)
        assert (await single_record(proxy)).status == 499
        await wait_completed(proxy, request_id)
        await fetch_result(proxy, request_id)
        record = await single_record(proxy)
        assert (record.status, record.error_type) == (200, None)
        assert record.settled == record.estimated

    async def test_that_leave_a_queue_cost_nothing(self, proxy: SandboxProxy) -> None:
        request_id = await submit(proxy, DEV, ENDLESS)
        record_cancellation(writer(proxy), request_id, 200)
        assert (await single_record(proxy)).settled == 0

    async def test_have_no_outcome_while_they_run(self, proxy: SandboxProxy) -> None:
        request_id = await submit(proxy, DEV, ENDLESS)
        before = await single_record(proxy)
        for verb in ("/status", "/status?logs=1", "", "/response"):
            assert (await get_request(proxy, request_id, verb)).status in (202, 400)
        assert await single_record(proxy) == before
        assert outcomes(proxy) == []

    @pytest.mark.parametrize(
        "error", ["429 at=result", "403 locked at=result", "401 at=result", "502 nginx at=result"]
    )
    async def test_have_no_outcome_if_the_result_request_is_rejected(
        self, proxy: SandboxProxy, error: str
    ) -> None:
        request_id = await submit(proxy, DEV, DRAW | {"prompt": f"!delay 0 !error {error} times=1"})
        assert (await fetch_result(proxy, request_id)).status >= 400
        assert (await single_record(proxy)).status == 200
        assert outcomes(proxy) == []
        assert (await get_request(proxy, request_id)).status == 200
        assert (await single_record(proxy)).settled == 25_000

    async def test_that_are_unknown_leave_no_outcome(self, proxy: SandboxProxy) -> None:
        for verb in ("", "/status"):
            assert (
                await get_request(proxy, "7e2f0b8a-0001-4000-8000-000000000000", verb)
            ).status == 404
        assert await proxy.records() == []
        assert outcomes(proxy) == []


class TestCachedResults:
    async def test_cost_nothing_and_save_their_price(self, proxy: SandboxProxy) -> None:
        body = {"prompt": HERON, "seed": 1}
        await proxy.call_target(f"https://fal.run/{TEXT}", body)
        await proxy.call_target(f"https://fal.run/{TEXT}", body)
        await fetch_result(proxy, await submit(proxy, TEXT, body), "fal-ai/flux-pro")
        await proxy.generate("kontext-text-to-image", body)
        *hits, miss = await proxy.records()
        assert (miss.cache, miss.estimated, miss.settled) == ("miss", 40_000, 40_000)
        assert [(hit.cache, hit.estimated, hit.settled) for hit in hits] == [("hit", 40_000, 0)] * 3
        assert len({record.request_id for record in [*hits, miss]}) == 4
        assert proxy.sandbox.jobs == 1

    async def test_that_are_shared_are_paid_by_one_call(self, proxy: SandboxProxy) -> None:
        body = {"prompt": SLOW["prompt"], "seed": 1}
        calls = (proxy.call_target(f"https://fal.run/{TEXT}", body) for _ in range(3))
        assert {reply.status for reply in await asyncio.gather(*calls)} == {200}
        records = await proxy.records()
        assert sorted((record.cache, record.settled) for record in records) == [
            ("collapsed", 0), ("collapsed", 0), ("miss", 40_000),
        ]  # fmt: skip

    async def test_that_are_shared_by_queued_calls_are_paid_by_one(
        self, proxy: SandboxProxy
    ) -> None:
        body = {"prompt": SLOW["prompt"], "seed": 1}
        ids = [await submit(proxy, TEXT, body) for _ in range(3)]
        for request_id in ids:
            assert (await fetch_result(proxy, request_id, "fal-ai/flux-pro")).status == 200
        records = await proxy.records()
        assert [(record.cache, record.settled) for record in records] == [
            ("collapsed", 0), ("collapsed", 0), ("miss", 40_000),
        ]  # fmt: skip

    async def test_are_not_made_from_errors(self, proxy: SandboxProxy) -> None:
        for _ in range(2):
            await proxy.call_target(f"https://fal.run/{TEXT}", {"prompt": "x", "num_images": 9})
        assert [
            (record.status, record.cache, record.settled) for record in await proxy.records()
        ] == [(422, "miss", 0)] * 2


class TestErrors:
    @pytest.mark.parametrize(
        ("path", "body", "code"),
        [
            pytest.param(f"/api/fal/run/{KONTEXT}", {"prompt": "x", "image_url": data_uri(b"%PDF")},
                         "unsupported_image_format", id="base URL"),
            pytest.param("/kontext", {"prompt": "x", "image_url": "http://127.0.0.1:9/a.png"},
                         "image_load_error", id="kontext"),
            pytest.param(GENERATE, {"model": "kontext",
                                    "inputs": {"prompt": "x", "image_url": data_uri(b"%PDF")}},
                         "unsupported_image_format", id="generate"),
        ],
    )  # fmt: skip
    async def test_a_rejected_image_is_recorded_with_its_code(
        self, proxy: SandboxProxy, path: str, body: object, code: str
    ) -> None:
        reply = await proxy.request("POST", path, json=body)
        assert 400 <= reply.status < 500
        record = await single_record(proxy)
        assert (record.status, record.error) == (422, code)
        assert (record.endpoint, record.request_id, record.settled) == (KONTEXT, None, 0)
        assert proxy.model_requests == []

    async def test_requests_that_call_no_model_are_not_recorded(self, tmp_path: Path) -> None:
        async with open_sandbox_proxy(tmp_path, allowed_endpoints=(DEV,)) as proxy:
            replies = [
                await proxy.call_target(f"https://fal.run/{SCHNELL}", DRAW),
                await proxy.call_target("https://example.com/", DRAW),
                await proxy.request("POST", GENERATE, json={"model": "dall-e"}),
                await proxy.request("GET", "/api/images/models"),
                await proxy.request("GET", "/v1/models"),
                await proxy.request("GET", "/health/live"),
            ]
            assert [reply.status for reply in replies] == [403, 412, 400, 200, 200, 200]
            assert await proxy.records() == []

    @pytest.mark.parametrize(
        ("error", "status", "settled"),
        [
            pytest.param("422 content_policy_violation", 422, 0, id="rejected input, with units"),
            pytest.param("500 unhandled", 500, 0, id="server error"),
            pytest.param("403 locked", 403, None, id="locked account"),
        ],
    )
    async def test_an_error_of_fal_is_recorded_with_its_status(
        self, proxy: SandboxProxy, error: str, status: int, settled: int | None
    ) -> None:
        await proxy.call_target(f"https://fal.run/{DEV}", {"prompt": f"!error {error}"})
        record = await single_record(proxy)
        assert (record.status, record.error, record.settled) == (status, None, settled)

    async def test_a_call_with_a_lost_response_has_an_unknown_price(
        self, tmp_path: Path, fal: FakeFal
    ) -> None:
        async def abort_connection(request: web.Request) -> web.StreamResponse:
            assert request.transport is not None
            request.transport.abort()
            return web.Response()

        fal.respond = abort_connection
        async with open_sandbox_proxy(tmp_path, upstream_origin=fal.origin) as proxy:
            assert (await proxy.call_target(f"https://fal.run/{DEV}", DRAW)).status == 504
            record = await single_record(proxy)
        assert (record.status, record.error) == (504, "upstream_broken")
        assert record.settled is None

    async def test_a_call_that_was_not_sent_costs_nothing(
        self, tmp_path: Path, unused_tcp_port: int
    ) -> None:
        closed_origin = f"http://127.0.0.1:{unused_tcp_port}"
        async with open_sandbox_proxy(tmp_path, upstream_origin=closed_origin) as proxy:
            assert (await proxy.call_target(f"https://fal.run/{DEV}", DRAW)).status == 502
            record = await single_record(proxy)
        assert (record.error, record.settled) == ("upstream_unreachable", 0)

    async def test_a_call_whose_client_disconnects_is_recorded(
        self, tmp_path: Path, fal: FakeFal
    ) -> None:
        async def never_respond(request: web.Request) -> web.StreamResponse:
            await asyncio.Event().wait()
            return web.Response()

        fal.respond = never_respond
        async with open_sandbox_proxy(tmp_path, upstream_origin=fal.origin) as proxy:
            call = asyncio.ensure_future(proxy.call_target(f"https://fal.run/{DEV}", DRAW))
            await wait_until(lambda: fal.seen)
            call.cancel()
            await asyncio.gather(call, return_exceptions=True)
            await wait_until(lambda: proxy.app[LEDGER_WRITER].pending_rows)
            record = await single_record(proxy)
        assert (record.status, record.error, record.settled) == (499, "client_left", None)


async def test_a_call_that_continues_without_its_client_is_settled(
    tmp_path: Path, fal: FakeFal
) -> None:
    released = asyncio.Event()

    async def respond(request: web.Request) -> web.StreamResponse:
        await released.wait()
        result = {"images": [{"url": "https://a.example/b.png"}]}
        headers = {"X-Fal-Billable-Units": "1", "x-fal-request-id": "1"}
        return web.json_response(result, headers=headers)

    fal.respond = respond
    async with open_sandbox_proxy(tmp_path, upstream_origin=fal.origin) as proxy:
        call = asyncio.ensure_future(proxy.call_target(f"https://fal.run/{TEXT}", DRAW))
        await wait_until(lambda: fal.seen)
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
        await wait_until(lambda: proxy.app[LEDGER_WRITER].pending_rows)
        released.set()
        # This call gets the result of the same job, or its cached copy.
        assert (await proxy.call_target(f"https://fal.run/{TEXT}", DRAW)).status == 200
        assert len(fal.seen) == 1
        assert sorted(record.settled or 0 for record in await proxy.records()) == [0, 40_000]


# Private data, none of which may appear in the ledger.
CANARIES = {
    "prompt": "canary-in-the-prompt",
    "url": "canary-in-a-url",
    "query": "canary-in-the-query",
    "header": "canary-in-a-header",
    "access": "canary-access-key",
    "fal key": SECRET,
    "input": "canary-in-an-input",
}


async def test_no_inputs_keys_or_headers_are_in_the_ledger(tmp_path: Path) -> None:
    keys = (("ann", CANARIES["access"]),)
    headers = {
        "Authorization": f"Bearer {CANARIES['access']}",
        "User-Agent": CANARIES["header"],
        "x-fal-runner-hint": CANARIES["header"],
    }
    async with open_sandbox_proxy(tmp_path, access_keys=keys) as proxy:
        key = proxy.sandbox.files.new_key(f"{CANARIES['url']}.png")
        proxy.sandbox.files.put(key, io.BytesIO(PNG), "image/png")
        url = proxy.sandbox.file_url(key)
        edit = {"prompt": f"!delay 0 {CANARIES['prompt']}", "image_url": url}
        bad = edit | {"prompt": f"!error 422 {CANARIES['prompt']}", "seed": CANARIES["input"]}
        for body in (edit, edit, bad):
            inputs = {"model": "kontext", "inputs": body}
            for more in ({}, ASYNC):
                await proxy.request("POST", GENERATE, json=inputs, headers=headers | more)
            await proxy.request("POST", "/kontext", json=body, headers=headers)
            await proxy.request("POST", f"/api/fal/run/{KONTEXT}", json=body, headers=headers)
            query = f"?fal_webhook=https://a.example/{CANARIES['query']}"
            await proxy.call_target(
                f"https://queue.fal.run/{KONTEXT}{query}", body, headers=headers
            )
        named = {"model": "kontext", "prompt": edit["prompt"]}
        await proxy.request("POST", "/v1/images/edits", data=form(**named), headers=headers)
        unreachable = {
            "prompt": CANARIES["prompt"],
            "image_url": f"http://127.0.0.1:9/{CANARIES['url']}",
        }
        inputs = {"model": "kontext", "inputs": unreachable}
        assert (await proxy.request("POST", GENERATE, json=inputs, headers=headers)).status == 422
        records = await proxy.records()
        assert len(records) >= 15
        assert {record.principal for record in records} == {"ann"}
        await wait_until(lambda: all(job["finished_at"] for job in proxy.jobs()))
        assert len(proxy.jobs()) == 7
    files = {path.name: path.read_bytes() for path in tmp_path.glob("ledger.sqlite*")}
    assert b"fal-ai/flux-pro/kontext" in files["ledger.sqlite"]
    for kind, canary in CANARIES.items():
        leaks = [name for name, content in files.items() if canary.encode() in content]
        assert leaks == [], kind
