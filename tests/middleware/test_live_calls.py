"""Live video through the proxy: what passes, which endpoints, and who owns a session."""

import asyncio
import json
from typing import Any

import pytest
from aiohttp import ClientResponse, web

from tests.support.fake_fal import FakeFal, WireFal, read_head
from tests.support.fake_live import (
    DIRECTOR,
    HEARTBEAT,
    HOST,
    ICE,
    SESSION,
    FakeLive,
    beat,
    open_session,
    opened_session,
)
from tests.support.gateway import Gateway, MakeGateway
from tests.support.key_search import CANARY

KEYS = (("ann", "s3cret-ann"), ("bob", "s3cret-bob"))
ANN, BOB = ("x-falproxy-key", "s3cret-ann"), ("x-falproxy-key", "s3cret-bob")
NO_TARGETS = {"allowed_targets": ()}
JSON = ("content-type", "application/json")
WORLD = "fal-ai/lingbot-world-2"
# Bodies as no library writes them: they must arrive as they were sent.
BODIES = {
    ICE: f' {{"app_id":\t"{DIRECTOR}"}}\n'.encode(),
    SESSION: f'{{ "type":"offer","app_id" : "{DIRECTOR}","sdp":"caf\\u00e9 \xe9\\r\\n"}}'.encode(),
    HEARTBEAT: b'{"session_id":  "live-1", "more": [1.0, 1e2]}',
}


@pytest.fixture
def live(fal: FakeFal, monkeypatch: pytest.MonkeyPatch) -> FakeLive:
    return FakeLive(fal, monkeypatch)


async def post(
    gateway: Gateway, target: str, body: Any, *headers: tuple[str, str]
) -> ClientResponse:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    response = await gateway.call(target, data=data, headers=[JSON, *headers])
    await response.read()
    return response


async def refused(response: ClientResponse, status: int, code: str) -> None:
    document = await response.json()
    assert (response.status, document["type"]) == (status, code), document


# --- Transparency ---


@pytest.mark.both_transports
@pytest.mark.parametrize("slash", ["", "/"], ids=["plain", "with a last slash"])
async def test_fal_receives_the_three_calls_byte_for_byte(
    make_gateway: MakeGateway, live: FakeLive, slash: str
) -> None:
    gateway = await make_gateway(live.fake.origin, **NO_TARGETS)
    sent = ("user-agent", "a browser"), ("x-fal-note", "kept"), ("authorization", "Bearer mine")
    for target, body in BODIES.items():
        response = await post(gateway, target + slash, body, *sent)
        assert response.status == 200
    assert [seen.body for seen in live.fake.seen] == [*BODIES.values()]
    paths = [f"/ice{slash}", f"/session{slash}", f"/session/heartbeat{slash}"]
    assert live.paths == paths
    assert len(live.fake.seen) == 3
    for seen in live.calls:
        assert seen.method == "POST"
        assert seen.header("authorization") == f"Key {CANARY}"
        assert seen.header("content-type") == "application/json"
        assert seen.header("content-length") == str(len(seen.body))
        assert seen.header("transfer-encoding") is None
        assert (seen.header("user-agent"), seen.header("x-fal-note")) == ("a browser", "kept")


async def test_the_responses_are_fal_s(make_gateway: MakeGateway, fal: FakeFal) -> None:
    async def respond(request: web.Request) -> web.StreamResponse:
        headers = {"Content-Type": "application/json", "x-fal-note": "kept"}
        body = b'{ "session_id" : "live-1",\n"alive": true, "ice_servers": [ ] }\n'
        return web.Response(body=body, headers=headers)

    fal.respond = respond
    gateway = await make_gateway(fal.origin, access_keys=KEYS, **NO_TARGETS)
    for target, body in BODIES.items():
        response = await post(gateway, target, body, ANN)
        assert await response.read() == (
            b'{ "session_id" : "live-1",\n"alive": true, "ice_servers": [ ] }\n'
        )
        assert response.headers["x-fal-note"] == "kept"


async def test_an_error_of_fal_passes_unchanged(make_gateway: MakeGateway, live: FakeLive) -> None:
    gateway = await make_gateway(live.fake.origin, **NO_TARGETS)
    response = await post(gateway, SESSION, {"sdp": "v=0"})
    assert (response.status, response.content_type) == (422, "text/plain")
    assert await response.text() == "app_id is missing"


async def test_the_fallback_of_an_app_passes(make_gateway: MakeGateway, live: FakeLive) -> None:
    gateway = await make_gateway(live.fake.origin, **NO_TARGETS)
    response = await post(gateway, f"https://fal.run/{DIRECTOR}/ice", b"{}")
    assert (response.status, "ice_servers" in await response.json()) == (200, True)
    (seen,) = live.fake.seen
    assert (seen.header("host"), seen.target, seen.body) == ("fal.run", f"/{DIRECTOR}/ice", b"{}")


@pytest.mark.parametrize("fast_path", [True, False])
async def test_a_heartbeat_is_checked_each_time(
    make_gateway: MakeGateway, live: FakeLive, fast_path: bool
) -> None:
    gateway = await make_gateway(live.fake.origin, access_keys=KEYS, fast_path=fast_path)
    session = await opened_session(gateway, ANN)
    for _ in range(5):
        assert await beat(gateway, session, ANN)
    await refused(await post(gateway, HEARTBEAT, {"session_id": "other"}, ANN), 404,
                  "session_not_found")  # fmt: skip
    assert live.paths.count("/session/heartbeat") == 5


# --- A session is paid for: it is opened once ---


@pytest.mark.both_transports
@pytest.mark.parametrize(
    "reply",
    [
        pytest.param(b"", id="none"),
        pytest.param(b"HTTP/1.1 200 OK\r\ncontent-le", id="half a head"),
        pytest.param(
            b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 99\r\n\r\n{",
            id="half a body",
        ),
    ],
)
async def test_a_lost_response_to_a_session_is_a_504_and_one_session(
    make_gateway: MakeGateway, wire: WireFal, reply: bytes
) -> None:
    requests = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        requests.append(await read_head(reader))
        writer.write(reply)
        await writer.drain()

    wire.serve = serve
    gateway = await make_gateway(wire.origin, **NO_TARGETS)
    response = await open_session(gateway)
    await refused(response, 504, "upstream_broken")
    # fal's clients do not repeat a 504 with this header.
    assert response.headers["x-fal-request-timeout-type"] == "user"
    assert len(requests) == 1


async def test_a_session_that_takes_too_long_is_a_504_and_one_session(
    make_gateway: MakeGateway, live: FakeLive
) -> None:
    live.delay = asyncio.Event()
    gateway = await make_gateway(live.fake.origin, upstream_timeout=0.2)
    response = await open_session(gateway)
    await refused(response, 504, "upstream_timeout")
    assert response.headers["x-fal-request-timeout-type"] == "user"
    assert live.opened == 1


async def test_a_lost_connection_is_not_used_for_a_session_again(
    make_gateway: MakeGateway, wire: WireFal
) -> None:
    """A pooled connection that fal closes when the session arrives."""
    bodies: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_head(reader)
        writer.write(
            b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n{}"
        )
        await writer.drain()
        bodies.append(await read_head(reader))

    wire.serve = serve
    gateway = await make_gateway(wire.origin)
    assert (await post(gateway, ICE, {"app_id": DIRECTOR})).status == 200
    assert (await open_session(gateway)).status == 504
    assert len(bodies) == 1
    assert wire.connections == 1


async def test_with_an_idempotency_key_a_session_is_opened_once(
    make_gateway: MakeGateway, live: FakeLive
) -> None:
    gateway = await make_gateway(live.fake.origin, access_keys=KEYS)
    key = ("idempotency-key", "k-1")
    sessions = [await opened_session(gateway, ANN, key) for _ in range(3)]
    assert sessions == ["live-1"] * 3
    assert live.opened == 1
    assert await beat(gateway, "live-1", ANN)


# --- Policy ---

TARGETS = [
    pytest.param("POST", ICE, 200, id="servers"),
    pytest.param("POST", f"{ICE}/", 200, id="with a last slash"),
    pytest.param("POST", SESSION, 200, id="a session"),
    pytest.param("POST", HEARTBEAT, 200, id="a heartbeat"),
    pytest.param("POST", f"{HEARTBEAT}/", 200, id="a heartbeat with a last slash"),
    pytest.param("GET", ICE, 403, id="servers by GET"),
    pytest.param("GET", SESSION, 403, id="a session by GET"),
    pytest.param("GET", HEARTBEAT, 403, id="a heartbeat by GET"),
    pytest.param("PUT", SESSION, 405, id="a session by PUT"),
    pytest.param("POST", f"{SESSION}?app_id=a/b", 403, id="a query that names an app"),
    pytest.param("POST", f"{HEARTBEAT}?session_id=x", 403, id="a query that names a session"),
    pytest.param("POST", f"https://{HOST}/", 403, id="the root"),
    pytest.param("POST", f"https://{HOST}/sessions", 403, id="another path"),
    pytest.param("POST", f"{SESSION}/live-1", 403, id="below a session"),
    pytest.param("POST", f"{SESSION}/live-1/heartbeat", 403, id="a heartbeat by path"),
    pytest.param("POST", f"https://{HOST}/{DIRECTOR}", 403, id="a model"),
    pytest.param("POST", f"https://{HOST}/SESSION", 403, id="in capitals"),
    pytest.param("POST", f"https://{HOST}/%73ession", 412, id="in escapes"),
    pytest.param("POST", f"https://{HOST}//session", 412, id="a double slash"),
    pytest.param("POST", f"https://{HOST}/session//", 412, id="two last slashes"),
    pytest.param("POST", f"https://{HOST}/x/../session", 412, id="dot segments"),
    pytest.param("POST", f"https://{HOST}/session;x", 412, id="a parameter"),
    pytest.param("POST", "https://a.wma.fal.run/session", 403, id="a host below"),
    pytest.param("POST", "https://wma.fal.ai/session", 403, id="another domain of fal"),
]


@pytest.mark.parametrize(("method", "target", "status"), TARGETS)
async def test_the_three_calls_pass_and_nothing_else(
    make_gateway: MakeGateway, live: FakeLive, method: str, target: str, status: int
) -> None:
    gateway = await make_gateway(live.fake.origin, **NO_TARGETS)
    body = {"app_id": DIRECTOR, "session_id": "live-1"}
    options: dict[str, Any] = {} if method == "GET" else {"json": body}
    response = await gateway.call(target, method, **options)
    await response.read()
    assert response.status == status, await response.text()
    assert len(live.fake.seen) == (status == 200)


@pytest.mark.parametrize("targets", [(), ("**",), ("wma.fal.run/**", "wma.fal.run/session")])
@pytest.mark.parametrize("target", [ICE, SESSION, HEARTBEAT, f"https://{HOST}/other"])
async def test_live_video_can_be_turned_off(
    make_gateway: MakeGateway, live: FakeLive, target: str, targets: tuple[str, ...]
) -> None:
    gateway = await make_gateway(live.fake.origin, live=False, allowed_targets=targets)
    await refused(await post(gateway, target, BODIES.get(target, b"{}")), 403, "target_forbidden")
    assert live.fake.seen == []


APPS = [
    pytest.param(f'{{"app_id": "{DIRECTOR}"}}', 200, id="listed"),
    pytest.param('{"app_id": "fal-ai/live-one"}', 200, id="listed by a pattern"),
    pytest.param(f'{{"app_id": "{WORLD}"}}', 403, id="not listed"),
    pytest.param('{"app_id": "fal-ai/live-one/more"}', 403, id="below a pattern"),
    pytest.param('{"app_id": "MINIMAX/h3-max/director"}', 403, id="in capitals"),
    pytest.param(f'{{"app_id": "{DIRECTOR}/"}}', 403, id="with a last slash"),
    pytest.param("{}", 403, id="none"),
    pytest.param('{"app_id": null}', 403, id="null"),
    pytest.param(f'{{"app_id": ["{DIRECTOR}"]}}', 403, id="a list"),
    pytest.param(f'{{"app_id": "{DIRECTOR}", "app_id": "{WORLD}"}}', 403, id="twice"),
    pytest.param(f'{{"app_id": "{WORLD}", "app_id": "{DIRECTOR}"}}', 403, id="twice, listed last"),
    pytest.param(
        f'{{"app_id": "{DIRECTOR}", "app\\u005fid": "{WORLD}"}}', 403, id="again in an escape"
    ),
    pytest.param(f'{{"app\\u005fid": "{DIRECTOR}"}}', 403, id="in an escape"),
    pytest.param(f'{{"app_id": "{DIRECTOR}", "APP_ID": "{WORLD}"}}', 403, id="again in capitals"),
    pytest.param(f'{{"app_id": "{DIRECTOR}"', 400, id="cut off"),
    pytest.param(f'[{{"app_id": "{DIRECTOR}"}}]', 400, id="in a list"),
]


@pytest.mark.parametrize("targets", [(), ("**",)], ids=["plain", "with all targets"])
@pytest.mark.parametrize("target", [ICE, SESSION])
@pytest.mark.parametrize(("body", "status"), APPS)
async def test_only_listed_endpoints_are_called(
    make_gateway: MakeGateway,
    live: FakeLive,
    target: str,
    body: str,
    status: int,
    targets: tuple[str, ...],
) -> None:
    listed = (DIRECTOR, "fal-ai/live-*")
    gateway = await make_gateway(
        live.fake.origin, allowed_endpoints=listed, allowed_targets=targets
    )
    response = await post(gateway, target, body.encode())
    assert response.status == status, await response.text()
    assert [seen.body for seen in live.fake.seen] == [body.encode()] * (status == 200)


@pytest.mark.parametrize("target", [ICE, SESSION])
@pytest.mark.parametrize(
    ("body", "headers", "status"),
    [
        pytest.param(b'{"app_id": "a/b", "app_id": "a/b"}', [], 403, id="twice"),
        pytest.param(rb'{"app_id": "a/b", "app\u005fid": "a/b"}', [], 403, id="in an escape"),
        pytest.param(b"x", [], 400, id="no JSON"),
        pytest.param(b"\x1f\x8b\x08", [("content-encoding", "gzip")], 415, id="encoded"),
        pytest.param(
            b'{"app_id": "a/b", "x": "' + b"x" * 2**17 + b'"}', [], 413, id="a large body"
        ),
        pytest.param(b'{"app_id": "a/b"}', [("content-type", "text/plain")], 415, id="no type"),
    ],
)
async def test_an_ambiguous_body_is_refused_without_a_list_too(
    make_gateway: MakeGateway,
    live: FakeLive,
    target: str,
    body: bytes,
    headers: list[tuple[str, str]],
    status: int,
) -> None:
    gateway = await make_gateway(live.fake.origin, **NO_TARGETS)
    kind = [] if ("content-type", "text/plain") in headers else [JSON]
    response = await gateway.call(target, data=body, headers=[*kind, *headers])
    assert response.status == status, await response.text()
    assert live.fake.seen == []


@pytest.mark.parametrize("target", [ICE, SESSION, HEARTBEAT])
@pytest.mark.parametrize(
    ("parameters", "status"),
    [
        ("charset=utf-8", 200),
        ('Charset = "UTF-8"', 200),
        ("profile=x", 200),
        ("charset=utf-7", 415),
        ("charset=utf-16", 415),
        ("charset*=utf-8''utf-7", 415),
        ("charset=utf-8; charset=utf-7", 415),
        ('x=";charset=utf-7"', 415),
    ],
)
async def test_bodies_in_other_charsets_are_refused(
    make_gateway: MakeGateway, live: FakeLive, target: str, parameters: str, status: int
) -> None:
    gateway = await make_gateway(live.fake.origin, **NO_TARGETS)
    headers = [("content-type", f"application/json; {parameters}")]
    # In UTF-7, `+AGE-pp_id` is `app_id`.
    body = f'{{"app_id": "{DIRECTOR}", "session_id": "x", "+AGE-pp_id": "other/app"}}'
    response = await gateway.call(target, data=body.encode(), headers=headers)
    assert response.status == status, await response.text()
    assert len(live.fake.seen) == (status == 200)


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        pytest.param(f"{DIRECTOR}/ice", b"{}", 200, id="of a listed endpoint"),
        pytest.param(f"{DIRECTOR}/ice", b" { } ", 200, id="with white space"),
        pytest.param(f"{DIRECTOR}/ice", b'{"prompt": "x"}', 403, id="with an input"),
        pytest.param(f"{DIRECTOR}/ice/ice", b"{}", 403, id="twice"),
        pytest.param(f"{WORLD}/ice", b"{}", 403, id="of another endpoint"),
        pytest.param("listed/app/ice", b'{"prompt": "x"}', 200, id="a model of that name"),
    ],
)
async def test_the_fallback_is_for_listed_endpoints(
    make_gateway: MakeGateway, live: FakeLive, path: str, body: bytes, status: int
) -> None:
    listed = (DIRECTOR, "listed/app/ice")
    gateway = await make_gateway(live.fake.origin, allowed_endpoints=listed, **NO_TARGETS)
    response = await post(gateway, f"https://fal.run/{path}", body)
    assert response.status == status, await response.text()
    assert [seen.body for seen in live.fake.seen] == [body] * (status == 200)


# --- Ownership ---


async def test_heartbeats_are_for_the_caller_that_opened_the_session(
    make_gateway: MakeGateway, live: FakeLive
) -> None:
    gateway = await make_gateway(live.fake.origin, access_keys=KEYS, **NO_TARGETS)
    of_ann, of_bob = await opened_session(gateway, ANN), await opened_session(gateway, BOB)
    assert await beat(gateway, of_ann, ANN)
    assert await beat(gateway, of_bob, BOB)
    sent = len(live.fake.seen)
    for body in ({"session_id": of_ann}, {"session_id": "never"}, {}, {"session_id": ["live-1"]}):
        response = await post(gateway, HEARTBEAT, body, BOB)
        await refused(response, 404, "session_not_found")
    twice = f'{{"session_id": "{of_bob}", "session_id": "{of_ann}"}}'.encode()
    await refused(await post(gateway, HEARTBEAT, twice, BOB), 403, "target_forbidden")
    escaped = f'{{"session_id": "{of_bob}", "session\\u005fid": "{of_ann}"}}'.encode()
    await refused(await post(gateway, HEARTBEAT, escaped, BOB), 403, "target_forbidden")
    await refused(await post(gateway, HEARTBEAT, {"session_id": of_ann}), 401, "unauthenticated")
    assert len(live.fake.seen) == sent


async def test_an_open_proxy_passes_heartbeats_of_unknown_sessions(
    make_gateway: MakeGateway, live: FakeLive
) -> None:
    gateway = await make_gateway(live.fake.origin, **NO_TARGETS)
    assert await beat(gateway, "opened-elsewhere")


async def test_with_a_list_of_endpoints_only_known_sessions_are_continued(
    make_gateway: MakeGateway, live: FakeLive
) -> None:
    gateway = await make_gateway(live.fake.origin, allowed_endpoints=(DIRECTOR,), **NO_TARGETS)
    assert await beat(gateway, await opened_session(gateway))
    unknown = await post(gateway, HEARTBEAT, {"session_id": "opened-elsewhere"})
    await refused(unknown, 404, "session_not_found")


@pytest.mark.parametrize("cache", [True, False])
async def test_a_session_outlives_the_process(
    make_gateway: MakeGateway, live: FakeLive, store_settings: dict[str, Any], cache: bool
) -> None:
    settings = {"access_keys": KEYS, "cache": cache} | store_settings
    first = await make_gateway(live.fake.origin, **settings)
    session = await opened_session(first, ANN)
    await first.client.close()
    second = await make_gateway(live.fake.origin, **settings)
    assert await beat(second, session, ANN)
    response = await post(second, HEARTBEAT, {"session_id": session}, BOB)
    await refused(response, 404, "session_not_found")


async def test_a_session_is_no_queued_request(make_gateway: MakeGateway, live: FakeLive) -> None:
    gateway = await make_gateway(live.fake.origin, access_keys=KEYS)
    session = await opened_session(gateway, ANN)
    for request_id in (session, f"live/{session}", f"live%2F{session}", f"live%252F{session}"):
        target = f"https://queue.fal.run/a/b/requests/{request_id}/status"
        assert (await gateway.call(target, "GET", headers=[ANN])).status in (404, 412)
    assert live.paths == ["/session"]
    assert len(live.fake.seen) == 1


async def test_heartbeats_use_the_key_of_their_session(
    make_gateway: MakeGateway, live: FakeLive
) -> None:
    keys = (CANARY, "second:" + CANARY, "third:" + CANARY)
    gateway = await make_gateway(live.fake.origin, ai_keys=keys)
    sessions = [await opened_session(gateway) for _ in range(3)]
    opened = [seen.header("authorization") for seen in live.calls]
    assert len({*opened}) == 3
    for session, key in [*zip(sessions, opened, strict=True)] * 2:
        assert await beat(gateway, session)
        assert live.calls[-1].header("authorization") == key


# --- Maximum duration ---


async def test_a_session_ends_after_its_maximum(make_gateway: MakeGateway, live: FakeLive) -> None:
    gateway = await make_gateway(live.fake.origin, live_max_seconds=60.0)
    session = await opened_session(gateway)
    assert await beat(gateway, session)
    live.clock.now += 59.0
    assert await beat(gateway, session)
    sent = len(live.calls)
    live.clock.now += 2.0
    for _ in range(3):
        assert not await beat(gateway, session)
    assert len(live.calls) == sent
    unknown = await post(gateway, HEARTBEAT, {"session_id": "opened-elsewhere"})
    await refused(unknown, 404, "session_not_found")
    assert await beat(gateway, await opened_session(gateway))
