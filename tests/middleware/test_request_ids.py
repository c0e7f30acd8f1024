"""The ids by which log lines, usage records and fal's own records can be joined."""

from typing import Any
from uuid import uuid4

import pytest
from aiohttp import web

from falproxy.stores.ledger import UsageQuery
from falproxy.stores.ledger.writer import LEDGER_WRITER, LedgerWriter
from tests.support.fake_fal import FakeFal
from tests.support.gateway import Gateway, MakeGateway
from tests.support.urls import RUN, SUBMIT

QUEUE = "https://queue.fal.run/fal-ai/flux/requests/"
REPEATS = 3  # of a request; all but the first may take the fast path


async def respond(request: web.Request) -> web.StreamResponse:
    request_id = str(uuid4())
    headers = {"x-fal-request-id": request_id}
    return web.json_response({"request_id": request_id, "status": "IN_QUEUE"}, headers=headers)


def log_lines(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    return [vars(record)["fields"] for record in caplog.records if "fields" in vars(record)]


@pytest.fixture
async def gateway(make_gateway: MakeGateway, fal: FakeFal) -> Gateway:
    fal.respond = respond
    return await make_gateway(fal.origin)


@pytest.mark.both_transports
@pytest.mark.parametrize("target", [RUN, SUBMIT])
async def test_a_call_can_be_joined(
    gateway: Gateway, caplog: pytest.LogCaptureFixture, target: str
) -> None:
    expected = {}
    for _ in range(REPEATS):
        response = await gateway.call(target, json={"prompt": "a heron"})
        fal_id = (await response.json())["request_id"]
        expected[response.headers["X-Request-ID"]] = fal_id
    assert {line["request_id"]: line["fal_request_id"] for line in log_lines(caplog)} == expected
    writer: LedgerWriter = gateway.client.app[LEDGER_WRITER]
    await writer.close(5.0)
    records = await writer.ledger.latest(UsageQuery())
    assert {record.proxy_request_id: record.request_id for record in records} == expected


@pytest.mark.both_transports
@pytest.mark.parametrize(
    ("suffix", "method"), [("/status", "GET"), ("", "GET"), ("/cancel", "PUT")]
)
async def test_a_request_about_a_job_names_the_job(
    gateway: Gateway, caplog: pytest.LogCaptureFixture, suffix: str, method: str
) -> None:
    fal_id = str(uuid4())
    for _ in range(REPEATS):
        await (await gateway.call(f"{QUEUE}{fal_id}{suffix}", method)).read()
    assert {line["fal_request_id"] for line in log_lines(caplog)} == {fal_id}


@pytest.mark.parametrize("request_id", ["a%22b", "a%0ab", "x" * 100])
async def test_an_id_that_could_forge_a_line_is_left_out(
    gateway: Gateway, caplog: pytest.LogCaptureFixture, request_id: str
) -> None:
    await (await gateway.call(f"{QUEUE}{request_id}/status", "GET")).read()
    assert all("fal_request_id" not in line for line in log_lines(caplog))


async def test_a_page_has_no_id_of_fal(gateway: Gateway, caplog: pytest.LogCaptureFixture) -> None:
    await gateway.client.get("/health/live")
    assert all("fal_request_id" not in line for line in log_lines(caplog))
