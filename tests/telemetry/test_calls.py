"""Spans of calls and of requests to fal, as a collector receives them."""

import asyncio
import json
from ipaddress import ip_network

import pytest
from aiohttp import web

from tests.support.fake_fal import FakeFal, respond_as_queue
from tests.support.gateway import MakeGateway
from tests.support.otlp_collector import CLIENT, SERVER, Collector
from tests.support.urls import REQUEST, RUN, SUBMIT
from tests.support.waiting import wait_until

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACEPARENT = f"00-{TRACE}-{PARENT}-01"
KEYS = (("ann", "ann-s3cret-of-ann"),)


async def test_a_call_has_a_span_and_one_for_its_request_to_fal(
    make_gateway: MakeGateway, fal: FakeFal, collector: Collector
) -> None:
    fal.respond = respond_as_queue
    gateway = await make_gateway(fal.origin, endpoint=collector.origin, access_keys=KEYS)
    headers = [("x-falproxy-key", KEYS[0][1]), ("x-falproxy-user", "eve")]
    response = await gateway.call(SUBMIT, json={"prompt": "a fox"}, headers=headers)
    assert response.status == 200
    server, client = await collector.trace(2)
    assert (server.kind, server.name, server.parent_id) == (SERVER, "POST /api/fal/proxy", "")
    assert (client.kind, client.name) == (CLIENT, "POST queue.fal.run")
    assert (client.trace_id, client.parent_id) == (server.trace_id, server.span_id)
    assert server.start <= client.start < client.end <= server.end
    assert server.attributes == {
        "http.request.method": "POST",
        "http.route": "/api/fal/proxy",
        "url.scheme": "http",
        "client.address": "127.0.0.1",
        "http.response.status_code": 200,
        "falproxy.request_id": response.headers["X-Request-ID"],
        "falproxy.principal": "ann",
        "user.id": "eve",
        "falproxy.operation": "submit",
        "gen_ai.request.model": "fal-ai/flux/dev",
        "gen_ai.provider.name": "fal",
        "gen_ai.operation.name": "generate_content",
    }
    assert client.attributes == {
        "http.request.method": "POST",
        "server.address": "queue.fal.run",
        "http.response.status_code": 200,
        "falproxy.operation": "submit",
        "gen_ai.request.model": "fal-ai/flux/dev",
        "gen_ai.provider.name": "fal",
    }
    assert not server.has_error
    assert not client.has_error


async def test_the_trace_of_the_client_is_passed_on_to_fal(
    make_gateway: MakeGateway, fal: FakeFal, collector: Collector
) -> None:
    gateway = await make_gateway(fal.origin, endpoint=collector.origin)
    headers = [("traceparent", TRACEPARENT), ("tracestate", "a=b"), ("baggage", "x=y")]
    await (await gateway.call(RUN, json={}, headers=headers)).read()
    server, client = await collector.trace(2)
    assert (server.trace_id, server.parent_id, client.trace_id) == (TRACE, PARENT, TRACE)
    assert fal.seen[0].header("traceparent") == f"00-{TRACE}-{client.span_id}-01"
    assert fal.seen[0].header("tracestate") == "a=b"
    assert fal.seen[0].header("baggage") is None


@pytest.mark.parametrize(
    "headers",
    [
        pytest.param([("traceparent", "00-x")], id="malformed"),
        pytest.param([("traceparent", f"00-{'0' * 32}-{PARENT}-01")], id="zeros"),
        pytest.param([("traceparent", TRACEPARENT)] * 2, id="twice"),
        pytest.param([("tracestate", "a=b")], id="state alone"),
    ],
)
async def test_a_trace_that_is_not_valid_is_not_continued(
    make_gateway: MakeGateway, fal: FakeFal, collector: Collector, headers: list[tuple[str, str]]
) -> None:
    gateway = await make_gateway(fal.origin, endpoint=collector.origin)
    assert (await gateway.call(RUN, json={}, headers=headers)).status == 200
    server, client = await collector.trace(2)
    assert server.parent_id == ""
    assert server.trace_id != TRACE
    (passed_on,) = fal.seen[0].all("traceparent")
    assert passed_on.startswith(f"00-{server.trace_id}-{client.span_id}-")


async def test_a_call_that_is_not_sampled_has_no_spans(
    make_gateway: MakeGateway, fal: FakeFal, collector: Collector
) -> None:
    gateway = await make_gateway(fal.origin, endpoint=collector.origin)
    headers = [("traceparent", TRACEPARENT.removesuffix("1") + "0")]
    await gateway.call(RUN, json={}, headers=headers)
    await gateway.call(RUN, json={})
    assert len(await collector.trace(2)) == 2
    passed_on = fal.seen[0].header("traceparent") or ""
    assert passed_on.startswith(f"00-{TRACE}-")
    assert passed_on.endswith("-00")


async def test_repeated_polls_are_traced_too(
    make_gateway: MakeGateway, fal: FakeFal, collector: Collector
) -> None:
    """The fast path would skip the spans: it is not used."""
    fal.respond = respond_as_queue
    gateway = await make_gateway(fal.origin, endpoint=collector.origin, fast_path=True)
    for _ in range(5):
        assert (await gateway.call(f"{REQUEST}/status", "GET")).status == 200
    await collector.trace(10)
    servers, clients = collector.of_kind(SERVER), collector.of_kind(CLIENT)
    assert {span.attributes["falproxy.operation"] for span in servers + clients} == {"status"}
    assert {span.attributes["gen_ai.response.id"] for span in servers} == {
        REQUEST.rpartition("/")[2]
    }
    assert {span.parent_id for span in clients} == {span.span_id for span in servers}
    assert len({span.trace_id for span in servers}) == 5
    assert len({seen.header("traceparent") for seen in fal.seen}) == 5


async def test_no_secret_is_exported(
    make_gateway: MakeGateway, fal: FakeFal, collector: Collector
) -> None:
    gateway = await make_gateway(fal.origin, endpoint=collector.origin, access_keys=KEYS)
    secrets = {
        "x-falproxy-key": KEYS[0][1],
        "user-agent": "s3cret-agent",
        "cookie": "a=s3cret-cookie",
        "x-other": "s3cret-header",
    }
    body = {"prompt": "s3cret-prompt", "image_url": "https://x.example/s3cret-image.png?s3cret=1"}
    target = f"{RUN}?token=s3cret-query"
    await gateway.call(target, json=body, headers=[*secrets.items()])
    await gateway.client.post("/kontext?token=s3cret-query", json=body, headers=secrets)
    wrong = [("x-falproxy-key", "s3cret-guess")]
    await gateway.call(target, json=body, headers=wrong)
    await gateway.client.request("PURGE", "/api/fal/proxy", headers=secrets)
    await gateway.call("https://evil.example/s3cret-target", json=body, headers=[*secrets.items()])
    await wait_until(lambda: len(collector.of_kind(SERVER)) >= 5)
    await wait_until(lambda: collector.points)
    exported = b"".join(collector.bodies).lower()
    assert b"s3cret" not in exported
    methods = {span.attributes["http.request.method"] for span in collector.of_kind(SERVER)}
    assert methods == {"POST", "_OTHER"}


@pytest.mark.parametrize(
    ("target", "headers", "status", "error"),
    [
        pytest.param(RUN, [], 401, "unauthenticated", id="refused caller"),
        pytest.param("https://evil.example/", KEYS, 412, "target_not_fal", id="refused target"),
    ],
)
async def test_a_refused_call_has_the_code_of_its_error(
    make_gateway: MakeGateway,
    fal: FakeFal,
    collector: Collector,
    target: str,
    headers: list[tuple[str, str]],
    status: int,
    error: str,
) -> None:
    gateway = await make_gateway(fal.origin, endpoint=collector.origin, access_keys=KEYS)
    fields = [("x-falproxy-key", secret) for _, secret in headers]
    assert (await gateway.call(target, json={}, headers=fields)).status == status
    (span,) = await collector.trace()
    assert span.attributes["http.response.status_code"] == status
    assert span.attributes["error.type"] == error
    assert not span.has_error  # it is the client's
    assert fal.seen == []


async def test_a_fal_that_cannot_be_reached_is_an_error_of_both_spans(
    make_gateway: MakeGateway, collector: Collector, unused_tcp_port: int
) -> None:
    gateway = await make_gateway(f"http://127.0.0.1:{unused_tcp_port}", endpoint=collector.origin)
    assert (await gateway.call(RUN, json={})).status == 502
    server, client = await collector.trace(2)
    assert server.attributes["error.type"] == "upstream_unreachable"
    assert client.attributes["error.type"] == "ConnectError"
    assert server.has_error
    assert client.has_error


@pytest.mark.parametrize("status", [422, 500])
async def test_errors_of_fal_are_errors_of_the_request(
    make_gateway: MakeGateway, fal: FakeFal, collector: Collector, status: int
) -> None:
    async def respond(request: web.Request) -> web.Response:
        return web.json_response({"detail": "s3cret"}, status=status)

    fal.respond = respond
    gateway = await make_gateway(fal.origin, endpoint=collector.origin)
    assert (await gateway.call(RUN, json={})).status == status
    server, client = await collector.trace(2)
    assert client.attributes["error.type"] == str(status)
    assert client.has_error
    assert server.has_error is (status >= 500)
    assert b"s3cret" not in b"".join(collector.bodies)


async def test_a_stream_is_traced_until_its_end(
    make_gateway: MakeGateway, fal: FakeFal, collector: Collector
) -> None:
    released = asyncio.Event()

    async def respond(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await response.write(b"data: 1\n\n")
        await released.wait()
        await response.write(b"data: 2\n\n")
        return response

    fal.respond = respond
    gateway = await make_gateway(fal.origin, endpoint=collector.origin)
    response = await gateway.call(f"{RUN}/stream", json={})
    await response.content.readuntil(b"\n\n")
    await asyncio.sleep(0.1)  # spans are exported after 20 ms
    assert collector.spans == []
    released.set()
    await response.read()
    server, client = await collector.trace(2)
    assert server.end - server.start > 100_000_000
    assert client.end - client.start > 100_000_000


async def test_a_client_that_leaves_ends_the_span(
    make_gateway: MakeGateway, fal: FakeFal, collector: Collector
) -> None:
    reached = asyncio.Event()

    async def respond(request: web.Request) -> web.StreamResponse:
        reached.set()
        await asyncio.sleep(30)
        return web.Response()

    fal.respond = respond
    gateway = await make_gateway(fal.origin, endpoint=collector.origin)
    call = asyncio.create_task(gateway.call(RUN, json={}))
    await reached.wait()
    call.cancel()
    server, client = await collector.trace(2)
    assert server.attributes["http.response.status_code"] == 499
    assert server.attributes["error.type"] == "client_left"
    assert client.attributes["error.type"] == "cancelled"


async def test_the_address_of_a_trusted_proxy_is_not_that_of_the_client(
    make_gateway: MakeGateway, fal: FakeFal, collector: Collector
) -> None:
    networks = (ip_network("127.0.0.1"),)
    gateway = await make_gateway(fal.origin, endpoint=collector.origin, trusted_proxies=networks)
    headers = [("X-Forwarded-For", "203.0.113.7"), ("X-Forwarded-Proto", "https")]
    await gateway.call(RUN, json={}, headers=headers)
    server, _ = await collector.trace(2)
    assert server.attributes["client.address"] == "203.0.113.7"
    assert server.attributes["url.scheme"] == "https"


async def test_long_names_are_cut(
    make_gateway: MakeGateway, fal: FakeFal, collector: Collector
) -> None:
    gateway = await make_gateway(fal.origin, endpoint=collector.origin)
    await gateway.call(f"https://fal.run/fal-ai/{'x' * 5000}", json={})
    server, client = await collector.trace(2)
    for span in (server, client):
        assert max(len(str(value)) for value in span.attributes.values()) <= 256
    assert len(json.dumps([span.name for span in collector.spans])) < 200
