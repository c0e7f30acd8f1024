"""`/api/usage/calls`, `/api/usage/performance` and `/api/usage/state` over HTTP."""

import asyncio
import csv
import io
import time
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from falproxy.metrics import METRICS
from falproxy.stores.ledger import CallRecord, Outcome
from falproxy.stores.ledger.sqlite import sqlite_ledger
from falproxy.windows import WINDOWS
from tests.support.fake_fal import FakeFal
from tests.support.gateway import Gateway, MakeGateway
from tests.support.sandbox_proxy import SandboxProxy, open_sandbox_proxy

CALLS, PERFORMANCE, STATE = (f"/api/usage/{name}" for name in ("calls", "performance", "state"))
KEYS = (("ann", "s3cret-ann"), ("bob", "s3cret-bob"))
DEV = "fal-ai/flux/dev"


def record(number: int, **columns: Any) -> CallRecord:
    defaults: dict[str, Any] = {"status": 200, "endpoint": DEV, "operation": "run"}
    at = time.time() - 100 + number
    return CallRecord(id=f"c{number}", at=at, route="/api/fal/proxy", **(defaults | columns))


ROWS: tuple[CallRecord | Outcome, ...] = (
    record(1, principal="ann", user_id="=cmd()", seconds=2.0, upstream_seconds=1.9),
    record(2, principal="bob", user_id="ada", status=429, error="rate_limited"),
    record(3, principal="bob", operation="submit", request_id="r3", proxy_request_id="own"),
    Outcome(request_id="r3", status=503, error_type="runner_connection_error", run_seconds=0.5),
)


async def open_gateway(
    make_gateway: MakeGateway, fal: FakeFal, data_dir: Path, **settings: Any
) -> Gateway:
    async with sqlite_ledger(data_dir / "ledger.sqlite") as ledger:
        await ledger.write(ROWS)
    return await make_gateway(fal.origin, **settings)


async def get(gateway: Gateway, path: str, key: str | None = None, **query: str) -> tuple[int, Any]:
    headers = {"Accept-Encoding": "identity"}
    headers |= {} if key is None else {"x-falproxy-key": key}
    async with gateway.client.get(path, params=query, headers=headers) as response:
        assert response.status != 200 or response.headers["Cache-Control"] == "no-store"
        return response.status, await response.json()


async def test_calls_have_their_ids_costs_and_times(
    make_gateway: MakeGateway, fal: FakeFal, tmp_path: Path
) -> None:
    gateway = await open_gateway(make_gateway, fal, tmp_path)
    status, page = await get(gateway, CALLS)
    assert status == 200
    assert [call["id"] for call in page["calls"]] == ["c3", "c2", "c1"]
    assert page["next"] is None
    job, refused, run = page["calls"]
    assert (job["status"], job["error"]) == (503, "runner_connection_error")
    assert (job["request_id"], job["proxy_request_id"]) == ("r3", "own")
    assert job["run_seconds"] == 0.5
    assert (refused["error"], refused["user"], refused["total_seconds"]) == (
        "rate_limited", "ada", 0.0,
    )  # fmt: skip
    assert (run["total_seconds"], run["run_seconds"]) == (2.0, 1.9)
    assert fal.seen == []


async def test_pages_are_continued_by_a_cursor(
    make_gateway: MakeGateway, fal: FakeFal, tmp_path: Path
) -> None:
    gateway = await open_gateway(make_gateway, fal, tmp_path)
    _, first = await get(gateway, CALLS, limit="2")
    _, second = await get(gateway, CALLS, limit="2", after=first["next"])
    assert [call["id"] for page in (first, second) for call in page["calls"]] == ["c3", "c2", "c1"]
    assert second["next"] is None


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        pytest.param({"status": "failed"}, ["c3", "c2"], id="state"),
        pytest.param({"status": "5xx"}, ["c3"], id="class of statuses"),
        pytest.param({"status": "429", "user": "ada"}, ["c2"], id="status and user"),
        pytest.param({"min_seconds": "1.5", "status": "ok"}, ["c1"], id="seconds"),
        pytest.param({"request_id": "own"}, ["c3"], id="request id"),
        pytest.param({"user": ""}, ["c3", "c2", "c1"], id="an empty filter is none"),
    ],
)
async def test_filters_of_the_query(
    make_gateway: MakeGateway,
    fal: FakeFal,
    tmp_path: Path,
    query: dict[str, str],
    expected: list[str],
) -> None:
    gateway = await open_gateway(make_gateway, fal, tmp_path)
    _, page = await get(gateway, CALLS, **query)
    assert [call["id"] for call in page["calls"]] == expected


@pytest.mark.parametrize(
    ("path", "query"),
    [
        (CALLS, {"status": "bad"}),
        (CALLS, {"status": "0xx"}),
        (CALLS, {"min_seconds": "-1"}),
        (CALLS, {"min_seconds": "nan"}),
        (CALLS, {"min_cost": "1e9"}),
        (CALLS, {"limit": "501"}),
        (CALLS, {"after": "yesterday"}),
        (CALLS, {"endpoint": "x" * 201}),
        (CALLS, {"format": "xml"}),
        (CALLS, {"since": "yesterday"}),
        (PERFORMANCE, {"since": "401d"}),
        (PERFORMANCE, {"since": "1d", "until": "2d"}),
    ],
)
async def test_an_invalid_query_is_refused(
    make_gateway: MakeGateway, fal: FakeFal, path: str, query: dict[str, str]
) -> None:
    status, document = await get(await make_gateway(fal.origin), path, **query)
    assert (status, document["error"]["code"]) == (400, "query_invalid")
    name = next(iter(query))
    assert document["error"]["message"].startswith(f"The query's {name} must")


async def test_a_caller_has_its_own_calls_only(
    make_gateway: MakeGateway, fal: FakeFal, tmp_path: Path
) -> None:
    gateway = await open_gateway(make_gateway, fal, tmp_path, access_keys=KEYS, admins=("ann",))
    for query in ({}, {"principal": "ann"}, {"format": "csv"}):
        response = await gateway.client.get(
            CALLS,
            params=query,
            headers={"x-falproxy-key": "s3cret-bob", "Accept-Encoding": "identity"},
        )
        text = await response.text()
        assert "cmd()" not in text
        assert "c1" not in text
    _, page = await get(gateway, CALLS, "s3cret-ann")
    assert len(page["calls"]) == 3
    _, own = await get(gateway, PERFORMANCE, "s3cret-bob")
    _, every = await get(gateway, PERFORMANCE, "s3cret-ann")
    assert (own["durations"]["calls"], every["durations"]["calls"]) == (1, 2)
    assert {row["status"] for row in own["failures"]} == {429, 503}
    assert (await get(gateway, STATE, "s3cret-ann"))[0] == 200
    status, document = await get(gateway, STATE, "s3cret-bob")
    assert (status, document["error"]["code"]) == (403, "not_an_admin")


@pytest.mark.parametrize("path", [CALLS, PERFORMANCE, STATE])
async def test_a_locked_proxy_requires_a_key(
    make_gateway: MakeGateway, fal: FakeFal, path: str
) -> None:
    gateway = await make_gateway(fal.origin, access_keys=KEYS)
    async with gateway.client.get(path) as response:
        assert response.status == 401


async def test_calls_are_exported_as_csv(
    make_gateway: MakeGateway, fal: FakeFal, tmp_path: Path
) -> None:
    gateway = await open_gateway(make_gateway, fal, tmp_path)
    async with gateway.client.get(CALLS, params={"format": "csv"}) as response:
        assert response.content_type == "text/csv"
        assert "falproxy-calls.csv" in response.headers["Content-Disposition"]
        rows = list(csv.DictReader(io.StringIO(await response.text())))
    assert [row["endpoint"] for row in rows] == [DEV] * 3
    assert rows[0]["request_id"] == "r3"
    assert rows[2]["user"] == "'=cmd()"  # a spreadsheet would calculate it


async def test_the_performance_has_failures_of_each_interval(
    make_gateway: MakeGateway, fal: FakeFal, tmp_path: Path
) -> None:
    gateway = await open_gateway(make_gateway, fal, tmp_path)
    _, document = await get(gateway, PERFORMANCE, since="1h")
    assert document["step"] == 60
    assert not document["is_sample"]
    counted: dict[str, int] = {}
    for interval in document["series"]:
        for status, number in interval["failures"].items():
            counted[status] = counted.get(status, 0) + number
    assert counted == {"429": 1, "503": 1}
    assert {(row["status"], row["error"], row["calls"]) for row in document["failures"]} == {
        (429, "rate_limited", 1),
        (503, "runner_connection_error", 1),
    }


async def test_the_state_has_dependencies_and_when_they_failed(
    make_gateway: MakeGateway, fal: FakeFal
) -> None:
    gateway = await make_gateway(fal.origin)
    _, before = await get(gateway, STATE)
    assert before["workers"] == 1
    assert (before["running_jobs"], before["running_jobs_before"]) == (0, 0)
    states = {each["name"]: each for each in before["dependencies"]}
    assert states["fal"] == {"name": "fal", "is_up": True, "since": None, "error": None}
    assert states["ledger"]["is_up"]
    gateway.client.app[METRICS].record_error("upstream_unreachable")
    _, after = await get(gateway, STATE)
    (fal_state,) = (each for each in after["dependencies"] if each["name"] == "fal")
    assert not fal_state["is_up"]
    assert fal_state["error"] == "upstream_unreachable"
    assert fal_state["since"] is not None


async def test_the_state_has_the_budgets_of_the_settings(
    make_gateway: MakeGateway, fal: FakeFal
) -> None:
    _, without = await get(await make_gateway(fal.origin), STATE)
    assert without["budgets"] == {"principal": None, "user": None, "total": None}
    limits = {"budget": (5_000_000, WINDOWS["day"]), "user_budget": (500_000, WINDOWS["month"])}
    _, document = await get(await make_gateway(fal.origin, **limits), STATE)
    budgets = {"principal": "5.00/day", "user": "0.50/month", "total": None}
    assert document["budgets"] == budgets


class TestRecordedTimes:
    """What the list has about calls that were sent through the proxy."""

    async def test_a_job_has_the_time_until_a_poll_has_shown_its_end(self, tmp_path: Path) -> None:
        async with open_sandbox_proxy(tmp_path) as proxy:
            started = time.perf_counter()
            request_id = await submit(proxy, {"prompt": "!delay 0.3 a heron"})
            await poll(proxy, request_id)
            elapsed = time.perf_counter() - started
            await asyncio.sleep(0.4)  # the client fetches the result later
            await fetch(proxy, request_id)
            call = await single_call(proxy)
        assert 0.3 <= call["total_seconds"] <= elapsed + 0.1
        assert call["run_seconds"] > 0
        parts = call["run_seconds"] + call["queue_seconds"] + call["own_seconds"]
        assert parts == pytest.approx(call["total_seconds"], abs=0.002)

    async def test_without_a_poll_it_has_the_time_until_its_result(self, tmp_path: Path) -> None:
        async with open_sandbox_proxy(tmp_path) as proxy:
            started = time.perf_counter()
            request_id = await submit(proxy, {"prompt": "!delay 0.1 a heron"})
            while (await fetch(proxy, request_id)) != 200:
                await asyncio.sleep(0.02)
            elapsed = time.perf_counter() - started
            call = await single_call(proxy)
        assert 0.1 <= call["total_seconds"] <= elapsed + 0.1
        assert call["run_seconds"] is None

    @pytest.mark.parametrize(
        ("fault", "error"),
        [
            pytest.param("422 content_policy_violation", "content_policy_violation", id="a list"),
            pytest.param("503 runner_connection_error", "runner_connection_error", id="a header"),
            pytest.param("504 startup_timeout", "startup_timeout", id="a timeout"),
        ],
    )
    @pytest.mark.parametrize("is_queued", [True, False], ids=["job", "run"])
    async def test_the_type_of_an_error_of_fal_is_recorded(
        self, tmp_path: Path, fault: str, error: str, is_queued: bool
    ) -> None:
        body = {"prompt": f"!error {fault}"}
        async with open_sandbox_proxy(tmp_path) as proxy:
            if is_queued:
                request_id = await submit(proxy, body)
                await poll(proxy, request_id)
                await fetch(proxy, request_id)
            else:
                await proxy.call_target(f"https://fal.run/{DEV}", body)
            call = await single_call(proxy)
        assert (call["status"], call["error"]) == (int(fault[:3]), error)

    @pytest.mark.parametrize("is_compressed", [True, False], ids=["compressed", "plain"])
    @pytest.mark.parametrize("connection", ["keep-alive", "close"])
    async def test_the_type_is_read_from_each_kind_of_response(
        self, tmp_path: Path, fal: FakeFal, connection: str, is_compressed: bool
    ) -> None:
        async def respond(request: web.Request) -> web.Response:
            detail = [{"loc": ["body"], "msg": "m", "type": "image_too_small"}]
            headers = {"x-fal-request-id": "1"}
            response = web.json_response({"detail": detail}, status=422, headers=headers)
            if is_compressed:
                response.enable_compression(web.ContentCoding.gzip)
            return response

        fal.respond = respond
        async with open_sandbox_proxy(tmp_path, upstream_origin=fal.origin) as proxy:
            headers = {"Connection": connection}
            reply = await proxy.call_target(
                f"https://fal.run/{DEV}", {"prompt": "x"}, headers=headers
            )
            assert reply.document["detail"][0]["type"] == "image_too_small"
            assert (await single_call(proxy))["error"] == "image_too_small"

    async def test_a_text_that_is_no_type_is_not_recorded(
        self, tmp_path: Path, fal: FakeFal
    ) -> None:
        async def respond(request: web.Request) -> web.Response:
            headers = {"x-fal-request-id": "1"}
            body = {"detail": "d", "error_type": "the prompt 'canary' is bad"}
            return web.json_response(body, status=422, headers=headers)

        fal.respond = respond
        async with open_sandbox_proxy(tmp_path, upstream_origin=fal.origin) as proxy:
            await proxy.call_target(f"https://fal.run/{DEV}", {"prompt": "x"})
            assert (await single_call(proxy))["error"] is None


async def submit(proxy: SandboxProxy, body: object) -> str:
    reply = await proxy.call_target(f"https://queue.fal.run/{DEV}", body)
    return str(reply.document["request_id"])


async def poll(proxy: SandboxProxy, request_id: str) -> None:
    url = f"https://queue.fal.run/fal-ai/flux/requests/{request_id}/status"
    while (await proxy.call_target(url)).document["status"] != "COMPLETED":
        await asyncio.sleep(0.02)


async def fetch(proxy: SandboxProxy, request_id: str) -> int:
    url = f"https://queue.fal.run/fal-ai/flux/requests/{request_id}"
    return (await proxy.call_target(url)).status


async def single_call(proxy: SandboxProxy) -> Any:
    """Return the only call, once the ledger has everything about it."""
    await proxy.records()
    reply = await proxy.request("GET", f"{CALLS}?since=1h")
    (call,) = reply.document["calls"]
    return call
