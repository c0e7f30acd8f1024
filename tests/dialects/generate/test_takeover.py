"""Takeover of jobs whose lease has expired, by a proxy that gets other requests of the API."""

import asyncio
import sqlite3
import time
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from falproxy.dialects.generate.takeover import FOLLOWED_MAX
from falproxy.stores.ledger import JobRow, Lease
from falproxy.stores.ledger.writer import LEDGER_WRITER
from tests.support.fake_fal import FakeFal
from tests.support.sandbox_proxy import ASYNC, SandboxProxy, open_sandbox_proxy
from tests.support.waiting import wait_until

ENDPOINT, APP = "fal-ai/flux/dev", "fal-ai/flux"
EXPIRED = Lease("dead", 0.0)
QUICK, ENDLESS = "!delay 0 a heron", "!delay 60 a heron"
KEYS = (("ann", "secret-of-ann"), ("ben", "secret-of-ben"))
ANN, BEN = {"x-falproxy-key": "secret-of-ann"}, {"x-falproxy-key": "secret-of-ben"}


@pytest.fixture
async def proxy(tmp_path: Path) -> AsyncIterator[SandboxProxy]:
    async with open_sandbox_proxy(tmp_path) as opened:
        yield opened


async def submit(proxy: SandboxProxy, prompt: str, headers: dict[str, str] | None = None) -> str:
    """Submit a job to fal without the API. Return fal's id."""
    body = {"prompt": prompt, "image_size": {"width": 64, "height": 48}}
    target = f"https://queue.fal.run/{ENDPOINT}"
    reply = await proxy.call_target(target, body, headers=headers or {})
    assert reply.status == 200, reply
    return str(reply.document["request_id"])


async def add_job(
    proxy: SandboxProxy, request_id: str | None, lease: Lease = EXPIRED, owner: str = ""
) -> None:
    row = JobRow(
        owner=owner,
        model="flux-dev",
        endpoint=ENDPOINT,
        app=APP if request_id else "",
        request_id=request_id,
        status="running" if request_id else "queued",
    )
    await proxy.app[LEDGER_WRITER].ledger.add_job(row, lease)


async def use_api(proxy: SandboxProxy, headers: dict[str, str] | None = None) -> None:
    assert (await proxy.job("unknown", headers)).status == 404


def statuses(proxy: SandboxProxy) -> dict[str, Any]:
    """The status of each job by fal's id."""
    return {row["request_id"]: row["status"] for row in proxy.jobs()}


def polls(proxy: SandboxProxy, request_id: str) -> int:
    return sum(request_id in seen.path for seen in proxy.model_requests)


async def test_a_job_with_an_expired_lease_is_followed_to_its_result(proxy: SandboxProxy) -> None:
    request_id = await submit(proxy, QUICK)
    await add_job(proxy, request_id)
    await use_api(proxy)
    await wait_until(lambda: statuses(proxy) == {request_id: "completed"})
    (row,) = proxy.jobs()
    assert row["settled"] == 25_000
    assert row["follower"] != EXPIRED.owner
    assert (proxy.submits, proxy.sandbox.jobs) == (1, 1)
    (record,) = await proxy.records()
    assert record.settled == 25_000


async def test_a_failed_job_is_recorded_with_its_error(proxy: SandboxProxy) -> None:
    request_id = await submit(proxy, "!delay 0 !error 422 content_policy_violation")
    await add_job(proxy, request_id)
    await use_api(proxy)
    await wait_until(lambda: statuses(proxy) == {request_id: "failed"})
    assert proxy.jobs()[0]["error"] == "content_policy_violation"


async def test_outputs_are_stored_under_the_url_of_the_first_request(tmp_path: Path) -> None:
    async with open_sandbox_proxy(tmp_path, rehost="disk") as proxy:
        request_id = await submit(proxy, QUICK)
        await add_job(proxy, request_id)
        await use_api(proxy)
        await wait_until(lambda: statuses(proxy) == {request_id: "completed"})
        assert f'"{proxy.origin}/files/' in proxy.jobs()[0]["images"]


async def test_a_job_that_fal_never_accepted_is_failed_and_not_submitted(
    proxy: SandboxProxy,
) -> None:
    await add_job(proxy, None)
    with closing(sqlite3.connect(proxy.data_dir / "ledger.sqlite")) as file, file:
        file.execute("UPDATE falproxy_jobs SET created_at = created_at - 301000")
    await use_api(proxy)
    await wait_until(lambda: statuses(proxy) == {None: "failed"})
    assert proxy.jobs()[0]["error"] == "job_lost"
    assert proxy.sandbox.seen == []


async def test_the_cost_of_a_cancelled_job_of_another_process_is_read(tmp_path: Path) -> None:
    async with open_sandbox_proxy(tmp_path, speed=1, cache=False) as proxy:
        request_id = await submit(proxy, ENDLESS)
        await add_job(proxy, request_id, Lease("other", 60.0))
        reply = await proxy.request("DELETE", f"/api/images/jobs/{proxy.jobs()[0]['id']}")
        assert (reply.status, reply.document["status"]) == (200, "failed"), reply
        assert await proxy.wait_settled() == [0]
        assert proxy.jobs()[0]["error"] == "cancelled"


async def test_a_job_with_a_valid_lease_is_left_to_its_process(proxy: SandboxProxy) -> None:
    leased, expired = await submit(proxy, QUICK), await submit(proxy, QUICK)
    await add_job(proxy, leased, Lease("alive", 30.0))
    await add_job(proxy, expired)
    await use_api(proxy)
    await wait_until(lambda: statuses(proxy)[expired] == "completed")
    assert statuses(proxy)[leased] == "running"
    assert polls(proxy, leased) == 0


async def test_without_a_request_of_the_api_nothing_is_taken_over(proxy: SandboxProxy) -> None:
    await add_job(proxy, await submit(proxy, QUICK))
    await submit(proxy, QUICK)
    assert {row["follower"] for row in proxy.jobs()} == {EXPIRED.owner}


async def test_a_job_is_polled_with_the_access_of_its_owner(tmp_path: Path) -> None:
    async with open_sandbox_proxy(tmp_path, access_keys=KEYS) as proxy:
        request_id = await submit(proxy, QUICK, ANN)
        await add_job(proxy, request_id, owner="key:ann")
        await use_api(proxy, BEN)
        await wait_until(lambda: statuses(proxy) == {request_id: "completed"})


async def test_a_job_that_its_owner_may_not_poll_is_given_up(tmp_path: Path) -> None:
    async with open_sandbox_proxy(tmp_path, access_keys=KEYS) as proxy:
        foreign, own = await submit(proxy, QUICK, BEN), await submit(proxy, QUICK, ANN)
        await add_job(proxy, foreign, owner="key:ann")
        await add_job(proxy, own, owner="key:ann")
        await use_api(proxy, BEN)
        await wait_until(lambda: statuses(proxy)[own] == "completed")
        assert statuses(proxy)[foreign] == "running"
        assert polls(proxy, foreign) == 0


async def test_the_number_of_followed_jobs_is_bounded(tmp_path: Path) -> None:
    async with open_sandbox_proxy(tmp_path, speed=1) as proxy:
        request_id = await submit(proxy, ENDLESS)
        for _ in range(FOLLOWED_MAX + 5):
            await add_job(proxy, request_id)
        await use_api(proxy)
        await wait_until(lambda: polls(proxy, request_id) >= FOLLOWED_MAX)
        followers = [row["follower"] for row in proxy.jobs()]
        assert followers.count(EXPIRED.owner) == 5
        assert proxy.submits == 1


@pytest.mark.slow(seconds=6)
async def test_a_job_whose_result_could_not_be_fetched_is_followed(
    tmp_path: Path, fal: FakeFal, caplog: pytest.LogCaptureFixture
) -> None:
    available = asyncio.Event()

    async def respond(request: web.Request) -> web.StreamResponse:
        if request.method == "POST":
            return web.json_response({"request_id": "1", "status": "IN_QUEUE"})
        if not available.is_set():
            return web.Response(body=b"not gzip", headers={"Content-Encoding": "gzip"})
        if request.path.endswith("/status"):
            return web.json_response({"status": "COMPLETED"})
        return web.json_response({"images": [{"url": "https://a.example/b.png"}]})

    fal.respond = respond
    async with open_sandbox_proxy(tmp_path, upstream_origin=fal.origin) as proxy:
        await proxy.generate("flux-dev", {"prompt": QUICK}, ASYNC)
        await wait_until(lambda: "could not be fetched" in caplog.text)
        available.set()
        await wait_until(lambda: statuses(proxy) == {"1": "completed"})
        assert [seen.method for seen in fal.seen].count("POST") == 1


@pytest.mark.timed
async def test_followed_jobs_do_not_delay_the_shutdown(tmp_path: Path) -> None:
    async with open_sandbox_proxy(tmp_path, speed=1) as proxy:
        request_id = await submit(proxy, ENDLESS)
        await add_job(proxy, request_id)
        await use_api(proxy)
        await wait_until(lambda: polls(proxy, request_id) > 0)
        started = time.monotonic()
    assert time.monotonic() - started < 5
    assert statuses(proxy) == {request_id: "running"}
    assert proxy.cancels == []
