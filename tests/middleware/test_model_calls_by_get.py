"""Calls of models by GET: fal takes them, with the input in the query, and they cost the same."""

import asyncio
import json
from collections.abc import AsyncIterator
from urllib.parse import quote
from uuid import uuid4

import pytest
from aiohttp import web

from falproxy.media.fetch import Fetcher
from falproxy.stores.ledger import CallRecord, UsageQuery
from falproxy.stores.ledger.writer import LEDGER_WRITER
from tests.support.fake_fal import FakeFal, WireFal, read_head
from tests.support.fake_hosts import reply
from tests.support.gateway import SHARED, Gateway, MakeGateway
from tests.support.image_hosts import KONTEXT, NOT_AN_IMAGE, PNG, open_internet, uri
from tests.support.urls import PROXY, REQUEST, RUN, SUBMIT
from tests.support.waiting import wait_until

ANN, BOB = {"x-falproxy-key": "ann-s3cret-of-ann"}, {"x-falproxy-key": "bob-s3cret-of-bob"}
KEYS = (("ann", ANN["x-falproxy-key"]), ("bob", BOB["x-falproxy-key"]))
TARGETS = [
    pytest.param(RUN, id="a run"),
    pytest.param(f"{RUN}/stream", id="a stream"),
    pytest.param(SUBMIT, id="a submit"),
    pytest.param(KONTEXT, id="a run that may be reused"),
]
BAD_IMAGE = quote(uri(NOT_AN_IMAGE), safe="")


@pytest.fixture
async def gateway(make_gateway: MakeGateway, fal: FakeFal) -> Gateway:
    """A proxy in front of `fal`, instead of the folder's proxy in front of a queue."""
    return await make_gateway(fal.origin)


async def records(gateway: Gateway) -> list[CallRecord]:
    writer = gateway.client.app[LEDGER_WRITER]
    await wait_until(lambda: not writer.pending_rows)
    return await writer.ledger.latest(UsageQuery())


async def serve_model(request: web.Request) -> web.StreamResponse:
    """Respond like fal, with a request id to a submit, and units to a run."""
    request_id = str(uuid4())
    headers = {"x-fal-request-id": request_id, "x-fal-billable-units": "2"}
    return web.json_response({"request_id": request_id}, headers=headers)


@pytest.mark.parametrize(
    ("target", "operation"),
    [
        (f"{RUN}?prompt=a+heron&seed=7", "run"),
        (RUN, "run"),
        (f"{RUN}/stream?prompt=x", "stream"),
        (f"{SUBMIT}?prompt=x", "submit"),
    ],
)
async def test_a_call_by_get_has_a_record_in_the_ledger(
    make_gateway: MakeGateway, fal: FakeFal, target: str, operation: str
) -> None:
    fal.respond = serve_model
    gateway = await make_gateway(fal.origin, access_keys=KEYS)
    assert (await gateway.call(target, "GET", headers=[*ANN.items()])).status == 200
    (record,) = await records(gateway)
    assert (record.operation, record.endpoint) == (operation, "fal-ai/flux/dev")
    assert (record.principal, record.status) == ("ann", 200)
    assert record.units == 2


async def test_a_refused_call_by_get_has_a_record(make_gateway: MakeGateway, fal: FakeFal) -> None:
    gateway = await make_gateway(fal.origin)
    await gateway.call(f"{RUN}?image_url={BAD_IMAGE}", "GET")
    (record,) = await records(gateway)
    assert (record.status, record.error) == (422, "unsupported_image_format")


async def test_a_post_to_a_request_is_a_model_call(gateway: Gateway, fal: FakeFal) -> None:
    """fal could take the whole path for an endpoint id."""
    await gateway.call(f"{REQUEST}/status", json={})
    assert len(await records(gateway)) == 1


async def test_polls_results_and_uploads_have_no_record(gateway: Gateway, fal: FakeFal) -> None:
    for target in (f"{REQUEST}/status", f"{REQUEST}/status/stream", REQUEST):
        await gateway.call(target, "GET")
    await gateway.call(f"{REQUEST}/cancel", "PUT")
    await gateway.call("https://rest.fal.ai/storage/upload/initiate", json={})
    assert await records(gateway) == []


async def test_a_request_submitted_by_get_belongs_to_its_caller(
    make_gateway: MakeGateway, fal: FakeFal
) -> None:
    fal.respond = serve_model
    gateway = await make_gateway(fal.origin, access_keys=KEYS)
    submitted = await gateway.call(f"{SUBMIT}?prompt=x", "GET", headers=[*ANN.items()])
    request_id = (await submitted.json())["request_id"]
    url = f"https://queue.fal.run/fal-ai/flux/requests/{request_id}/status"
    assert (await gateway.call(url, "GET", headers=[*ANN.items()])).status == 200
    assert (await gateway.call(url, "GET", headers=[*BOB.items()])).status == 404


@SHARED
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("query", "loc"),
    [
        pytest.param(f"image_url={BAD_IMAGE}", ["image_url"], id="by itself"),
        pytest.param(f"a=b&mask_url={BAD_IMAGE}", ["mask_url"], id="a mask"),
        pytest.param(f"im%61ge_url={BAD_IMAGE}", ["image_url"], id="an escaped name"),
        pytest.param(f"image_urls=x&image_urls={BAD_IMAGE}", ["image_urls", 1], id="sent twice"),
        pytest.param(f"image_urls[0]={BAD_IMAGE}", ["image_urls"], id="with an index"),
        pytest.param(
            "image_urls=" + quote(json.dumps([uri(PNG), uri(NOT_AN_IMAGE)])),
            ["image_urls", 1],
            id="a JSON list",
        ),
        pytest.param(
            "input=" + quote(json.dumps({"image_url": uri(NOT_AN_IMAGE)})),
            ["input", "image_url"],
            id="in a JSON object",
        ),
        pytest.param("image_url=http%3A%2F%2F127.0.0.1%2Fa.png", ["image_url"], id="private"),
    ],
)
async def test_an_invalid_image_in_the_query_is_refused(
    shared_gateway: Gateway, shared_fal: FakeFal, target: str, query: str, loc: list[object]
) -> None:
    response = await shared_gateway.call(f"{target}?{query}", "GET")
    body = await response.json()
    assert response.status == 422, body
    assert body["detail"][0]["loc"] == ["query", *loc]
    assert shared_fal.seen == []


async def test_the_query_of_a_post_is_checked_too(gateway: Gateway, fal: FakeFal) -> None:
    response = await gateway.call(f"{RUN}?image_url={BAD_IMAGE}", json={})
    assert (response.status, fal.seen) == (422, [])


@pytest.mark.parametrize("target", TARGETS)
async def test_a_valid_image_in_the_query_reaches_fal(
    gateway: Gateway, fal: FakeFal, target: str
) -> None:
    target = f"{target}?image_url={quote(uri(PNG), safe='')}&image=&prompt=%5B1&n=%00"
    assert (await gateway.call(target, "GET")).status == 200
    assert [f"https://fal.run{seen.target}" for seen in fal.seen] == [target.replace("queue.", "")]


async def test_images_behind_urls_in_the_query_are_fetched_if_so_configured(
    make_gateway: MakeGateway, fal: FakeFal
) -> None:
    async with open_internet() as internet:
        fetcher: Fetcher = internet.fetcher()
        gateway = await make_gateway(fal.origin, fetcher=fetcher, check_remote_images=True)
        internet.public.responses["/a.pdf"] = reply(body=NOT_AN_IMAGE)
        query = quote(internet.url("/a.pdf"), safe="")
        response = await gateway.call(f"{RUN}?image_url={query}", "GET")
    assert (response.status, fal.seen) == (422, [])


async def test_a_call_by_get_bypasses_the_cache(gateway: Gateway, fal: FakeFal) -> None:
    for _ in range(2):
        response = await gateway.call(f"{KONTEXT}?prompt=x", "GET")
        assert response.headers["Cache-Status"].startswith("falproxy; fwd=bypass")
    assert len(fal.seen) == 2
    headers = [("Cache-Control", "only-if-cached")]
    assert (await gateway.call(f"{KONTEXT}?prompt=x", "GET", headers=headers)).status == 504
    assert len(fal.seen) == 2


@pytest.mark.parametrize("target", [RUN, SUBMIT, f"{REQUEST}/status", REQUEST])
@pytest.mark.parametrize("content_type", ["application/json", "text/plain"])
async def test_a_get_with_a_body_is_a_400(
    gateway: Gateway, fal: FakeFal, target: str, content_type: str
) -> None:
    headers = [("Content-Type", content_type)]
    for body in (b"{}", stream(b"{", b"}")):
        response = await gateway.call(target, "GET", data=body, headers=headers)
        assert (response.status, (await response.json())["type"]) == (400, "body_unexpected")
    response = await gateway.client.get("/api/fal/rest/x", data=b"{}")
    assert response.status == 400
    assert fal.seen == []


async def stream(*pieces: bytes) -> AsyncIterator[bytes]:
    for piece in pieces:
        yield piece


async def test_an_empty_body_of_a_get_is_no_body(gateway: Gateway, fal: FakeFal) -> None:
    request = (
        f"GET {PROXY} HTTP/1.1\r\nHost: localhost\r\nx-fal-target-url: {RUN}\r\n"
        "Connection: close\r\n{framing}\r\n\r\n{body}"
    )
    for framing, body in (("Content-Length: 0", ""), ("Transfer-Encoding: chunked", "0\r\n\r\n")):
        raw = request.replace("{framing}", framing).replace("{body}", body).encode()
        assert (await gateway.send_raw(raw)).startswith(b"HTTP/1.1 200 ")
    assert [seen.body for seen in fal.seen] == [b"", b""]


@pytest.mark.parametrize("target", [RUN, SUBMIT, f"{RUN}/stream"])
@pytest.mark.parametrize(
    "lost",
    [
        pytest.param(b"", id="no response"),
        pytest.param(
            b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n{",
            id="half a response",
        ),
    ],
)
async def test_a_lost_response_of_a_call_by_get_is_not_retried_by_clients(
    make_gateway: MakeGateway, wire: WireFal, target: str, lost: bytes
) -> None:
    """With a key or an owner the response of a submit is read before any of it is sent."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_head(reader)
        writer.write(lost)

    wire.serve = serve
    gateway = await make_gateway(wire.origin, access_keys=KEYS)
    headers = [*ANN.items()]
    if lost and target != SUBMIT:
        return  # relayed as it arrives
    response = await gateway.call(target, "GET", headers=headers)
    assert (response.status, response.headers["x-fal-request-timeout-type"]) == (504, "user")
    assert wire.connections == 1
