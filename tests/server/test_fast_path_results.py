"""The fast path for results of jobs: the ledger and the response are as on the normal path."""

import asyncio
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from falproxy.limit_settings import NO_CALLER_LIMITS, CallerLimits
from falproxy.metrics import METRICS
from falproxy.stores.keys import Expiry, KeyChange, NewKey
from falproxy.stores.keys.known_keys import KNOWN_KEYS
from falproxy.stores.keys.sql_keys import choose_key_store
from falproxy.stores.ledger.writer import LEDGER_WRITER
from tests.support.fake_fal import FakeFal, respond_as_queue
from tests.support.limits import open_reservations
from tests.support.polled_proxy import MakeProxy, PolledProxy, new_id
from tests.support.polling_client import PollingClient, poll_request, submit_request
from tests.support.sandbox_proxy import select_rows
from tests.support.urls import PROXY
from tests.support.waiting import SOON, wait_until

pytestmark = pytest.mark.both_event_loops

RESULT = {"images": [{"url": "https://v3.fal.media/files/a/b.png"}], "seed": 7}
KEYS = (("ann", "a-key-of-16-chars"), ("bob", "another-key-of-16"))
ANN, BOB = (f"x-falproxy-key: {secret}" for _, secret in KEYS)


def result_request(request_id: str, *lines: str, app: str = "fal-ai/flux") -> bytes:
    poll = poll_request(request_id, *lines).replace(b"/status\r\n", b"\r\n")
    return poll.replace(b"/fal-ai/flux/", f"/{app}/".encode())


def respond_with(
    document: object = RESULT, status: int = 200, units: str = ""
) -> Callable[[web.Request], Any]:
    """Return a fal whose jobs have ended with this result."""
    billed = {"x-fal-billable-units": units} if units else {}

    async def respond(request: web.Request) -> web.StreamResponse:
        request_id = request.path.partition("/requests/")[2]
        if not request_id or "/" in request_id:
            response = await respond_as_queue(request)
            assert isinstance(response, web.Response)
            assert isinstance(response.body, bytes)
            response.headers["x-fal-request-id"] = json.loads(response.body)["request_id"]
            return response
        headers = {"x-fal-request-id": request_id, **billed}
        return web.json_response(document, status=status, headers=headers)

    return respond


async def outcomes(proxy: PolledProxy, data_dir: Path) -> dict[str, dict[str, Any]]:
    """Return the written outcomes by request id."""
    writer = proxy.server.app[LEDGER_WRITER]
    await wait_until(lambda: not writer.pending_rows)
    rows = select_rows(data_dir, "SELECT * FROM falproxy_outcomes")
    return {row["request_id"]: row for row in rows}


async def test_results_of_other_jobs_take_the_fast_path(
    make_proxy: MakeProxy, fal: FakeFal, tmp_path: Path
) -> None:
    proxy = await make_proxy()
    fal.respond = respond_with(units="2")
    client = await proxy.client()
    ids = [await proxy.submit() for _ in range(4)]
    await proxy.until_fal_is_idle()
    hits = proxy.hits
    for request_id in ids:
        status, body = await client.request(result_request(request_id))
        assert (status, json.loads(body)) == (200, RESULT)
    assert proxy.hits == hits + 3
    written = await outcomes(proxy, tmp_path)
    assert {*written} == {*ids}
    varying = ("request_id", "at", "call_at", "ended_at")
    first, *others = [
        {name: value for name, value in written[each].items() if name not in varying}
        for each in ids
    ]
    assert (first["status"], first["units"]) == (200, "2")
    assert all(row == first for row in others)
    assert proxy.server.app[METRICS].in_progress == 0


async def test_the_cost_is_in_the_header_and_counted_once(
    make_proxy: MakeProxy, fal: FakeFal
) -> None:
    proxy = await make_proxy()
    fal.respond = respond_with(units="2")
    client = await proxy.client()
    costs = []
    for _ in range(3):
        submit = submit_request().replace(b"fal-ai/flux", b"fal-ai/flux/dev")
        request_id = json.loads((await client.request(submit))[1])["request_id"]
        for _ in range(2):
            client.write(result_request(request_id))
            costs.append((await client.read_headers()).get("x-falproxy-cost"))
    assert len({*costs}) == 1
    assert costs[0] is not None
    spent = proxy.server.app[METRICS].snapshot()["spent"]
    assert sum(spent.values()) == pytest.approx(3 * float(costs[0]) * 1e6)


async def test_the_time_that_a_poll_has_shown_is_recorded(
    make_proxy: MakeProxy, fal: FakeFal, tmp_path: Path
) -> None:
    proxy = await make_proxy()
    fal.respond = respond_with()
    client = await proxy.client()
    ids = [await proxy.submit() for _ in range(3)]
    await client.request(result_request(new_id()))
    job_times = proxy.server.app[METRICS].job_times
    for request_id in ids:
        job_times.observe(request_id, b'{"metrics": {"inference_time": 1.5}}')
        assert await client.status(result_request(request_id)) == 200
    assert proxy.hits >= 3
    written = await outcomes(proxy, tmp_path)
    assert [written[each]["run_ms"] for each in ids] == [1500, 1500, 1500]
    assert not job_times._times


@pytest.mark.parametrize(
    ("document", "status"),
    [
        pytest.param({"detail": "Request is still in progress"}, 400, id="in progress"),
        pytest.param({"detail": [{"type": "content_policy_violation"}]}, 422, id="failed"),
        pytest.param({"images": [], "noise": "x" * 400_000}, 200, id="large"),
    ],
)
async def test_other_responses_go_on_on_the_normal_path(
    make_proxy: MakeProxy, fal: FakeFal, tmp_path: Path, document: object, status: int
) -> None:
    proxy = await make_proxy()
    client = await proxy.client()
    fal.respond = respond_with()
    first, second, third = [await proxy.submit() for _ in range(3)]
    assert await client.status(result_request(first)) == 200
    fal.respond = respond_with(document, status)
    received = await client.request(result_request(second))
    assert (received[0], json.loads(received[1])) == (status, document)
    assert sum(seen.target.endswith(second) for seen in fal.seen) == 1
    fal.respond = respond_with()
    assert await client.status(result_request(third)) == 200
    written = await outcomes(proxy, tmp_path)
    assert (second in written) == (status != 400)
    if status == 422:
        assert written[second]["error_type"] == "content_policy_violation"
    assert proxy.server.app[METRICS].in_progress == 0


@pytest.mark.parametrize(
    ("options", "app"),
    [
        pytest.param({}, "fal-ai/flux-pro", id="a model whose results are cached"),
        pytest.param({"rehost": "disk"}, "fal-ai/flux", id="outputs are stored"),
        pytest.param({"concurrency": 5}, "fal-ai/flux", id="limits are settled"),
    ],
)
async def test_results_that_are_processed_take_the_normal_path(
    make_proxy: MakeProxy, fal: FakeFal, options: dict[str, Any], app: str
) -> None:
    proxy = await make_proxy(**options)
    fal.respond = respond_with({"seed": 7})
    client = await proxy.client()
    for _ in range(3):
        assert await client.status(result_request(new_id(), app=app)) == 200
    assert proxy.hits == 0


async def test_a_result_is_for_the_owner_of_its_job_only(
    make_proxy: MakeProxy, fal: FakeFal
) -> None:
    proxy = await make_proxy(access_keys=KEYS)
    fal.respond = respond_with()
    client = await proxy.client()
    of_ann = [await proxy.submit(ANN) for _ in range(3)]
    await proxy.until_fal_is_idle()
    hits = proxy.hits
    assert [await client.status(result_request(each, ANN)) for each in of_ann] == [200, 200, 200]
    assert proxy.hits == hits + 2
    of_bob = await proxy.submit(BOB)
    assert await client.status(result_request(of_bob, BOB)) == 200
    assert await client.status(result_request(of_bob, ANN)) == 404
    assert await client.status(result_request(of_ann[0], BOB)) == 404
    assert await client.status(result_request(new_id(), ANN)) == 404


async def test_other_methods_and_urls_take_the_normal_path(
    make_proxy: MakeProxy, fal: FakeFal
) -> None:
    proxy = await make_proxy()
    fal.respond = respond_with()
    client = await proxy.client()
    assert await client.status(result_request(new_id())) == 200
    for other in (
        result_request(new_id()).replace(b"GET", b"PUT"),
        result_request(new_id()).replace(b"/requests/", b"/requests/x/requests/"),
        submit_request(),
    ):
        await client.request(other)
    assert proxy.hits == 0
    async with asyncio.timeout(SOON):
        while not proxy.hits:  # the request for the price may have the idle connection
            assert await client.status(result_request(new_id())) == 200
    assert PROXY.encode() in result_request("x")


async def test_a_job_with_limits_of_a_user_is_settled_by_a_request_without_the_user(
    make_proxy: MakeProxy, fal: FakeFal
) -> None:
    proxy = await make_proxy(user_concurrency=5, access_keys=KEYS)
    fal.respond = respond_with()
    client = await proxy.client()
    ids = [await proxy.submit(ANN, "x-falproxy-user: una") for _ in range(3)]
    for request_id in ids:
        assert await client.status(result_request(request_id, ANN)) == 200
    assert await open_reservations(proxy.server.app) == 0


async def test_a_job_with_limits_is_settled_after_its_key_has_lost_them(
    make_proxy: MakeProxy, fal: FakeFal, tmp_path: Path
) -> None:
    async with choose_key_store(None, tmp_path) as store:
        proxy = await make_proxy(keys="on")
        fal.respond = respond_with()
        limits = CallerLimits(concurrency=5)
        made, secret = await store.create(NewKey(name="web", creator="cli", limits=limits))
        key = f"x-falproxy-key: {secret}"
        ids = [await proxy.submit(key) for _ in range(3)]
        change = KeyChange(expiry=Expiry(), limits=NO_CALLER_LIMITS, endpoints=())
        await store.change(made.id, change)
        await proxy.server.app[KNOWN_KEYS].refresh()
        client = await proxy.client()
        for request_id in ids:
            assert await client.status(result_request(request_id, key)) == 200
        assert await open_reservations(proxy.server.app) == 0


async def test_an_outcome_is_recorded_though_the_client_leaves_during_the_body(
    make_proxy: MakeProxy, fal: FakeFal, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "falproxy.calls")
    proxy = await make_proxy()
    fal.respond = respond_with(units="2")
    client = await proxy.client()
    first, second = [await proxy.submit() for _ in range(2)]
    await proxy.until_fal_is_idle()
    assert await client.status(result_request(first)) == 200
    is_sent = asyncio.Event()

    async def respond_slowly(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"x-fal-billable-units": "2"})
        response.content_length = 100
        await response.prepare(request)
        await response.write(b"x")
        is_sent.set()
        await asyncio.sleep(10)
        return response

    fal.respond = respond_slowly
    hits = proxy.hits
    async with PollingClient(proxy.server.port or 0) as leaving:
        leaving.write(result_request(second))
        await is_sent.wait()
        await asyncio.sleep(0.1)
    assert proxy.hits == hits + 1
    async with asyncio.timeout(SOON):
        while second not in await outcomes(proxy, tmp_path):
            await asyncio.sleep(0.01)
    written = (await outcomes(proxy, tmp_path))[second]
    assert (written["status"], written["units"]) == (200, "2")
    assert proxy.server.app[METRICS].in_progress == 0
    logged = [vars(each)["fields"] for each in caplog.records if each.name == "falproxy.calls"][-1]
    assert (logged["status"], logged["complete"]) == (200, False), "as on the normal path"
