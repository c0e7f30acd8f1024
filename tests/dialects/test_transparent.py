"""The transparent dialect: accepted and refused requests. Refused ones are not sent to fal."""

import asyncio
import gzip
import json
import re

import pytest
from aiohttp import ClientSession, web

from falproxy import __version__
from falproxy.dialects import transparent
from falproxy.dialects.transparent import BODY_IDLE_TIMEOUT
from falproxy.proxy.upstream import UPSTREAM
from tests.support.fake_fal import FakeFal
from tests.support.fal_urls import FAL_URLS, NOT_FAL
from tests.support.gateway import SHARED, Gateway, MakeGateway
from tests.support.key_search import CANARY
from tests.support.urls import PROXY, REQUEST, RUN, SUBMIT

pytestmark = [pytest.mark.both_transports, pytest.mark.asgi_servers]

HEX_ID = re.compile(r"[0-9a-f]{32}")


async def refusal_of(response: object) -> tuple[int, str]:
    """Return status and code of an error whose body has all fields of the dialect."""
    body = await response.json()  # type: ignore[attr-defined]
    assert set(body) == {"message", "detail", "type", "request_id"}
    assert body["message"] == body["detail"]
    assert body["request_id"] == response.headers["X-Request-ID"]  # type: ignore[attr-defined]
    return response.status, body["type"]  # type: ignore[attr-defined]


@SHARED
@pytest.mark.parametrize("method", ["HEAD", "OPTIONS", "DELETE", "PATCH", "TRACE"])
async def test_another_method_is_a_405(
    shared_gateway: Gateway, shared_fal: FakeFal, method: str
) -> None:
    response = await shared_gateway.call(RUN, method)
    assert response.status == 405
    assert response.headers["Allow"] == "GET, POST"
    if method != "HEAD":
        assert await refusal_of(response) == (405, "method_not_allowed")
    assert shared_fal.seen == []


@SHARED
@pytest.mark.parametrize(
    "target",
    [
        pytest.param(RUN, id="a run"),
        pytest.param(SUBMIT, id="a submit"),
        pytest.param(REQUEST, id="a result"),
        pytest.param(f"{REQUEST}/status", id="a status"),
        pytest.param(f"{REQUEST}/cancel/x", id="below a cancel"),
        pytest.param(REQUEST.replace("queue.", "") + "/cancel", id="a cancel on the run host"),
        pytest.param("https://rest.fal.ai/storage/upload/cancel", id="another host"),
        pytest.param("https://evil.tld/a/b/requests/1/cancel", id="a host that is not fal's"),
        pytest.param(None, id="no target"),
    ],
)
async def test_put_is_for_cancelling_only(
    shared_gateway: Gateway, shared_fal: FakeFal, target: str | None
) -> None:
    response = await shared_gateway.call(target, "PUT")
    assert await refusal_of(response) == (405, "method_not_allowed")
    assert shared_fal.seen == []


async def test_a_cancel_by_put_reaches_fal(gateway: Gateway, fal: FakeFal) -> None:
    headers = [("Content-Type", "application/json")]  # the JS client sends it without a body
    response = await gateway.call(f"{REQUEST}/cancel", "PUT", headers=headers)
    assert response.status == 200
    assert [(seen.method, seen.body) for seen in fal.seen] == [("PUT", b"")]
    assert fal.seen[0].target.endswith("/cancel")


async def test_the_method_is_checked_before_the_target(gateway: Gateway, fal: FakeFal) -> None:
    assert (await gateway.call(None, "DELETE")).status == 405
    assert fal.seen == []


@SHARED
@pytest.mark.parametrize("headers", [[], [("x-fal-target-url", "")], [("x-fal-target-url", " ")]])
async def test_a_missing_or_empty_target_is_a_400(
    shared_gateway: Gateway, shared_fal: FakeFal, headers: list[tuple[str, str]]
) -> None:
    response = await shared_gateway.call(None, headers=headers)
    assert await refusal_of(response) == (400, "target_missing")
    assert shared_fal.seen == []


@SHARED
@pytest.mark.parametrize("second", [RUN, SUBMIT, ""])
async def test_a_target_sent_twice_is_a_400(
    shared_gateway: Gateway, shared_fal: FakeFal, second: str
) -> None:
    headers = [("x-fal-target-url", second)]
    response = await shared_gateway.call(RUN, headers=headers)
    assert await refusal_of(response) == (400, "target_ambiguous")
    assert shared_fal.seen == []


@pytest.mark.parametrize(
    ("method", "url", "has_key"),
    [
        ("GET", "https://fal.ai/api/openapi/queue/openapi.json?endpoint_id=fal-ai/flux", False),
        ("GET", "https://rest.fal.ai/.well-known/jwks.json", False),
        ("GET", "https://api.fal.ai/v1/models?limit=5", False),
        ("GET", "https://api.fal.ai/v1/models/pricing?endpoint_id=fal-ai/flux", True),
        ("POST", "https://api.fal.ai/v1/models", True),
        ("GET", "https://fal.run/v1/models", True),
        ("GET", f"{REQUEST}/status", True),
    ],
)
async def test_public_documents_are_requested_without_the_key(
    make_gateway: MakeGateway, fal: FakeFal, method: str, url: str, has_key: bool
) -> None:
    for keys in ((), ("one:a", "two:b")):
        gateway = await make_gateway(fal.origin, ai_keys=keys)
        assert (await gateway.call(url, method)).status == 200
        headers = {name for name, _ in fal.seen[-1].headers}
        assert ("authorization" in headers) is has_key


@SHARED
@pytest.mark.parametrize("url", NOT_FAL)
async def test_a_target_that_is_not_fal_is_a_412(
    shared_gateway: Gateway, shared_fal: FakeFal, shared_session: ClientSession, url: str
) -> None:
    response = await raw_post(shared_gateway, url.encode("utf-8", "surrogateescape"))
    status = int(response.split()[1])
    if "\r\n" in url:
        assert status == 200, "the second line is another header field"
        assert shared_fal.seen.pop().header("x-evil") is None
    elif any(character in url for character in "\x00\x01\x7f\r\n"):
        assert status == 400, "the server refuses these characters in headers"
    elif url != url.strip():
        assert status == 200, "white space around the value is not part of it"
        shared_fal.seen.clear()
    else:
        assert status == 412
        assert json.loads(response.partition(b"\r\n\r\n")[2])["type"] == "target_not_fal"
    assert shared_fal.seen == []


async def raw_post(gateway: Gateway, target: bytes) -> bytes:
    """Send a request that client libraries refuse to send. Return the bytes of the response."""
    return await gateway.send_raw(
        b"POST /api/fal/proxy HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
        b"Content-Type: application/json\r\nContent-Length: 2\r\n"
        b"x-fal-target-url: " + target + b"\r\n\r\n{}",
    )


@SHARED
@pytest.mark.parametrize(("url", "host", "path", "query"), FAL_URLS)
async def test_a_target_reaches_fal_byte_for_byte(
    shared_gateway: Gateway, shared_fal: FakeFal, url: str, host: str, path: str, query: str
) -> None:
    assert (await shared_gateway.call(url, "GET")).status == 200
    assert [seen.target for seen in shared_fal.seen] == [path + query]
    assert shared_fal.seen[0].header("host") == host


@SHARED
@pytest.mark.parametrize(
    "content_type",
    ["text/plain", "multipart/form-data; boundary=x", "application/jsonp", "application/json5", ""],
)
@pytest.mark.parametrize("target", [RUN, SUBMIT, "https://rest.fal.ai/tokens/"])
async def test_a_body_that_is_not_json_is_a_415(
    shared_gateway: Gateway, shared_fal: FakeFal, content_type: str, target: str
) -> None:
    headers = [("Content-Type", content_type)] if content_type else []
    skip = [] if content_type else ["Content-Type"]
    response = await shared_gateway.call(
        target, headers=headers, data=b"{}", skip_auto_headers=skip
    )
    assert await refusal_of(response) == (415, "unsupported_media_type")
    assert shared_fal.seen == []


async def test_the_target_is_checked_before_the_body(gateway: Gateway, fal: FakeFal) -> None:
    response = await gateway.call("https://evil.tld/", data=b"x")
    assert await refusal_of(response) == (412, "target_not_fal")
    assert fal.seen == []


@SHARED
@pytest.mark.parametrize(
    "content_type",
    ["application/json", "application/json; charset=utf-8", "Application/JSON;charset=UTF-8"],
)
async def test_a_json_content_type_may_have_parameters(
    shared_gateway: Gateway, shared_fal: FakeFal, content_type: str
) -> None:
    response = await shared_gateway.call(RUN, headers=[("Content-Type", content_type)], data=b"{}")
    assert response.status == 200
    assert shared_fal.seen[0].header("content-type") == content_type


@SHARED
@pytest.mark.parametrize("content_type", ["application/json", "text/plain", ""])
@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_an_empty_chunked_body_is_no_body(
    shared_gateway: Gateway, shared_fal: FakeFal, method: str, content_type: str
) -> None:
    lines = [
        f"{method} {PROXY} HTTP/1.1",
        "Host: x",
        "Connection: close",
        f"x-fal-target-url: {RUN}",
        "Transfer-Encoding: chunked",
        *([f"Content-Type: {content_type}"] if content_type else []),
    ]
    request = "\r\n".join([*lines, "", "0", "", ""]).encode()
    assert (await shared_gateway.send_raw(request)).startswith(b"HTTP/1.1 200 ")
    (seen,) = shared_fal.seen
    assert seen.body == b""
    assert seen.all("transfer-encoding") == []
    shared_fal.seen.clear()
    filled = request.replace(b"\r\n0\r\n", b"\r\n2\r\n{}\r\n0\r\n")
    expected = b"200" if content_type == "application/json" else b"415"
    expected = b"400" if method == "GET" else expected
    assert (await shared_gateway.send_raw(filled)).split()[1] == expected
    assert [each.body for each in shared_fal.seen] == ([b"{}"] if expected == b"200" else [])


@SHARED
@pytest.mark.parametrize("path", [PROXY, "/api/fal/run/a/b", "/kontext", "/api/images/generate"])
@pytest.mark.parametrize("line", ["", "Content-Length: 2\r\n", "Connection: keep-alive\r\n"])
async def test_a_transfer_coding_in_http_1_0_is_refused(
    shared_gateway: Gateway, shared_fal: FakeFal, path: str, line: str
) -> None:
    response = await shared_gateway.send_raw(
        f"POST {path} HTTP/1.0\r\nHost: x\r\nx-fal-target-url: {RUN}\r\n{line}"
        "Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
        "2\r\n{}\r\n0\r\n\r\n".encode()
    )
    assert response.split()[1] == b"400"
    assert response.count(b"HTTP/1.") == 1
    assert shared_fal.seen == []


async def test_a_path_in_an_unusual_spelling_passes_if_it_is_listed(
    make_gateway: MakeGateway, fal: FakeFal
) -> None:
    gateway = await make_gateway(fal.origin, allowed_targets=("rest.fal.ai/a%2Fb/../c",))
    for path, status in (("/a%2Fb/../c", 200), ("/a%2Fb/../d", 412), ("/a%2fb/../c", 412)):
        assert (await gateway.call(f"https://rest.fal.ai{path}", "GET")).status == status
    assert [seen.target for seen in fal.seen] == ["/a%2Fb/../c"]


async def test_header_values_are_opaque_bytes(gateway: Gateway, fal: FakeFal) -> None:
    raw: list[bytes] = []

    async def respond(request: web.Request) -> web.StreamResponse:
        raw.extend(value for name, value in request.raw_headers if name.lower() == b"x-fal-note")
        return web.json_response({})

    fal.respond = respond
    values = [b"a\xf1o", b"\xff\xfe", "\u00e9".encode(), b"\xc3"]
    for body in (b"", b"{}"):
        raw.clear()
        lines = b"".join(b"x-fal-note: " + value + b"\r\n" for value in values)
        response = await gateway.send_raw(
            f"POST {PROXY} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n".encode()
            + lines
            + f"x-fal-target-url: {RUN}\r\nContent-Type: application/json\r\n".encode()
            + b"Content-Length: %d\r\n\r\n" % len(body)
            + body
        )
        assert response.startswith(b"HTTP/1.1 200 ")
        assert raw == values
        assert fal.seen[-1].body == body


@pytest.mark.parametrize("lines", [("identity", "gzip"), ("gzip", "identity"), ("identity, br",)])
async def test_a_body_with_a_coding_in_any_line_is_not_shared(
    make_gateway: MakeGateway, fal: FakeFal, lines: tuple[str, ...]
) -> None:
    gateway = await make_gateway(fal.origin)
    kontext = "https://fal.run/fal-ai/flux-pro/kontext"
    for _ in range(2):
        headers = [("Content-Type", "application/json")]
        headers += [("Content-Encoding", line) for line in lines]
        response = await gateway.call(kontext, data=b'{"prompt": "a"}', headers=headers)
        assert "fwd=bypass" in response.headers["Cache-Status"]
    assert [seen.all("content-encoding") for seen in fal.seen] == [list(lines)] * 2


async def test_a_get_with_a_content_type_and_no_body_is_fine(
    gateway: Gateway, fal: FakeFal
) -> None:
    headers = [("Content-Type", "application/json"), ("Accept", "application/json")]
    assert (await gateway.call(f"{REQUEST}/status", "GET", headers=headers)).status == 200
    assert fal.seen[0].header("content-length") is None


@SHARED
@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b"not json", id="not JSON"),
        pytest.param(b"[1, 2]", id="an array"),
        pytest.param(b'"text"', id="a string"),
        pytest.param(b'{"a": 1, "a": 2}', id="a key twice"),
        pytest.param(b'{"a": NaN}', id="NaN"),
        pytest.param(b"[" * 100_000, id="deep nesting"),
        pytest.param(gzip.compress(b"0" * 10_000_000), id="a gzip bomb without Content-Encoding"),
    ],
)
async def test_the_content_of_a_body_is_not_checked(
    shared_gateway: Gateway, shared_fal: FakeFal, body: bytes
) -> None:
    response = await shared_gateway.call(
        RUN, headers=[("Content-Type", "application/json")], data=body
    )
    assert response.status == 200
    assert shared_fal.seen[0].body == body


@SHARED
@pytest.mark.parametrize("coding", ["gzip", "deflate", "br", "zstd", "x-unknown"])
async def test_an_encoded_body_is_forwarded_unchanged(
    shared_gateway: Gateway, shared_fal: FakeFal, coding: str
) -> None:
    body = gzip.compress(b"0" * 1_000_000)  # not decoded, so the coding does not have to match
    headers = [("Content-Type", "application/json"), ("Content-Encoding", coding)]
    response = await shared_gateway.call(RUN, headers=headers, data=body)
    assert response.status == 200
    assert shared_fal.seen[0].body == body
    assert shared_fal.seen[0].header("content-encoding") == coding
    assert shared_fal.seen[0].header("content-length") == str(len(body))


@pytest.mark.parametrize(("size", "status"), [(999, 200), (1000, 200), (1001, 413)])
@pytest.mark.parametrize("has_length", [True, False], ids=["with a length", "chunked"])
async def test_the_limit_of_a_body(
    make_gateway: MakeGateway, fal: FakeFal, size: int, status: int, has_length: bool
) -> None:
    gateway = await make_gateway(fal.origin, max_body=1000)

    async def chunks() -> object:
        for _ in range(size):
            yield b"x"

    response = await gateway.call(
        RUN,
        headers=[("Content-Type", "application/json")],
        data=b"x" * size if has_length else chunks(),
    )
    assert response.status == status
    if status == 413:
        assert await refusal_of(response) == (413, "body_too_large")
        assert [seen for seen in fal.seen if seen.body] == []
    else:
        assert len(fal.seen[0].body) == size


@SHARED
@pytest.mark.parametrize("size", [8_000, 16_000])
async def test_a_long_header_field_is_forwarded(
    shared_gateway: Gateway, shared_fal: FakeFal, size: int
) -> None:
    hint = "h" * size
    response = await shared_gateway.call(RUN, "GET", headers=[("x-fal-runner-hint", hint)])
    assert response.status == 200
    assert shared_fal.seen[0].header("x-fal-runner-hint") == hint


async def test_a_header_field_of_64_kb_is_refused(gateway: Gateway, fal: FakeFal) -> None:
    response = await gateway.call(RUN, "GET", headers=[("x-fal-runner-hint", "h" * 65536)])
    assert response.status == 400
    assert fal.seen == []


@pytest.mark.own_server
async def test_requests_with_large_headers_are_not_kept_in_memory(
    gateway: Gateway, fal: FakeFal
) -> None:
    app = gateway.client.app
    assert app is not None
    cached = app[UPSTREAM]._build_request_cached.cache_info
    for number in range(5):
        headers = [(f"x-fal-z{field}", "a" * 500) for field in range(20)]
        target = f"{REQUEST}/status?{number}"
        assert (await gateway.call(target, "GET", headers=headers)).status == 200
    assert cached().currsize == 0
    for _ in range(2):
        assert (await gateway.call(f"{REQUEST}/status", "GET")).status == 200
    assert cached().currsize == 1


@SHARED
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("Authorization", "Key client:secret"),
        ("Authorization", "Bearer client"),
        ("Cookie", "session=client"),
        ("X-Api-Key", "client"),
        ("X-Forwarded-For", "10.0.0.1"),
        ("Origin", "https://client.example"),
        ("Referer", "https://client.example/page"),
    ],
)
async def test_credentials_of_the_client_are_not_forwarded(
    shared_gateway: Gateway, shared_fal: FakeFal, name: str, value: str
) -> None:
    assert (await shared_gateway.call(RUN, json={}, headers=[(name, value)])).status == 200
    (seen,) = shared_fal.seen
    assert seen.header("authorization") == f"Key {CANARY}"
    assert value not in [text for _, text in seen.headers]


async def test_a_field_in_two_lines_is_forwarded_in_two_lines(
    gateway: Gateway, fal: FakeFal
) -> None:
    await gateway.send_raw(  # as fal's Java client requests a status stream
        b"GET /api/fal/proxy HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
        b"Accept: application/json\r\naccept: text/event-stream\r\n"
        b"x-fal-target-url: https://fal.run/a/b\r\n\r\n",
    )
    assert fal.seen[0].all("accept") == ["application/json", "text/event-stream"]


async def test_fal_gets_the_name_and_version_of_the_proxy(gateway: Gateway, fal: FakeFal) -> None:
    headers = [("x-fal-client-proxy", "another-proxy")]
    await gateway.call(RUN, json={}, headers=headers)
    assert fal.seen[0].header("x-fal-client-proxy") == f"falproxy/{__version__}"


async def test_missing_headers_of_a_client_are_not_added(gateway: Gateway, fal: FakeFal) -> None:
    skip = ["User-Agent", "Accept", "Accept-Encoding"]
    await gateway.call(RUN, "GET", skip_auto_headers=skip)
    assert {name for name, _ in fal.seen[0].headers} == {
        "host",
        "authorization",
        "x-fal-client-proxy",
    }


@SHARED
@pytest.mark.parametrize("request_id", ["abc-123", "a" * 128, "00-4bf92f-01"])
async def test_the_request_id_of_a_client_is_returned(
    shared_gateway: Gateway, request_id: str
) -> None:
    response = await shared_gateway.call(None, headers=[("X-Request-ID", request_id)])
    assert response.headers["X-Request-ID"] == request_id


@SHARED
@pytest.mark.parametrize("request_id", ["", "a" * 129, "a b", 'a"b', "\x1b[31m"[1:], "{}"])
async def test_a_request_id_with_unsafe_characters_is_replaced(
    shared_gateway: Gateway, request_id: str
) -> None:
    response = await shared_gateway.call(None, headers=[("X-Request-ID", request_id)])
    assert HEX_ID.fullmatch(response.headers["X-Request-ID"])


async def test_a_response_has_server_timing(gateway: Gateway) -> None:
    response = await gateway.call(RUN, json={})
    timing = response.headers["Server-Timing"]
    assert re.fullmatch(r"falproxy;dur=\d+\.\d\d, fal;dur=\d+\.\d\d", timing)


async def test_an_unknown_path_is_a_404_with_a_code(gateway: Gateway) -> None:
    response = await gateway.client.get("/nothing/here")
    assert response.status == 404
    assert await response.json() == {"error": {"code": "not_found", "message": "Not Found."}}


async def test_a_known_path_with_the_wrong_method_is_a_405(gateway: Gateway) -> None:
    response = await gateway.client.post("/health/live")
    assert (response.status, response.headers["Allow"]) == (405, "GET,HEAD")
    assert (await response.json())["error"]["code"] == "method_not_allowed"


async def test_the_path_is_exact(gateway: Gateway, fal: FakeFal) -> None:
    response = await gateway.client.get(f"{PROXY}/x", headers={"x-fal-target-url": RUN})
    assert response.status == 404
    assert fal.seen == []


# The pace of a body


async def send_body_slowly(gateway: Gateway, path: str, content_type: str, count: int) -> bytes:
    """Send a body of 10 bytes every 50 ms, and return the response up to its first `}`."""
    port = int(gateway.origin.rpartition(":")[2])
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(
        f"POST {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nx-fal-target-url: {RUN}\r\n"
        f"Content-Type: {content_type}\r\nContent-Length: 1000000\r\n\r\n".encode()
    )
    reading = asyncio.ensure_future(reader.readuntil(b"}"))
    for _ in range(count):
        if reading.done():
            break
        writer.write(b'{"a": "bcd"'[:10])
        await asyncio.sleep(0.05)
    async with asyncio.timeout(20):
        response = await reading
    writer.close()
    return response


@pytest.mark.parametrize("path", [PROXY, "/api/fal/run/a/b", "/api/images/generate"])
async def test_a_body_that_arrives_slowly_for_long_is_a_408(
    gateway: Gateway, fal: FakeFal, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    monkeypatch.setattr(transparent, "BODY_PERIOD", 0.4)
    response = await send_body_slowly(gateway, path, "application/json", 200)
    assert response.split()[1] == b"408", response


async def test_a_body_that_stops_arriving_is_a_408(
    gateway: Gateway, fal: FakeFal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transparent, "BODY_IDLE_TIMEOUT", 0.3)
    response = await send_body_slowly(gateway, PROXY, "application/json", 3)
    assert response.split()[1] == b"408", response
    assert BODY_IDLE_TIMEOUT == 30


async def test_a_form_that_arrives_too_slowly_is_an_error(
    gateway: Gateway, fal: FakeFal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transparent, "BODY_IDLE_TIMEOUT", 0.6)
    content_type = "multipart/form-data; boundary=x"
    response = await send_body_slowly(gateway, "/v1/images/edits", content_type, 200)
    assert b"body_timeout" in response
    assert fal.seen == []
