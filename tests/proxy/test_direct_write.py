"""Responses written directly equal those written by aiohttp."""

import re
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from aiohttp import web
from aiohttp.pytest_plugin import AiohttpClient

from falproxy import create_app
from falproxy.dialects.transparent import HEADER_COUNT_MAX, NotMemoizable, bodiless_call
from falproxy.proxy.headers import serialize_head
from tests.support.fake_fal import WireFal
from tests.support.gateway import Gateway
from tests.support.key_search import CANARY
from tests.support.settings import make_settings
from tests.support.urls import PROXY, REQUEST

DATE = b"Date: Sat, 21 Nov 2026 12:00:00 GMT\r\n"
LENGTH = b"Content-Length: 2\r\n"
USUAL = [(b"Date", b"now"), (b"Content-Length", b"2")]
# The parts that differ between two equal responses.
OWN = re.compile(
    rb"(?i)(x-request-id: [0-9a-f]{32}|falproxy;dur=[0-9.]+, fal;dur=[0-9.]+|\r\ndate: [^\r]+)"
)
StartGateway = Callable[..., Awaitable[Gateway]]


@pytest.fixture
def make(aiohttp_client: AiohttpClient, wire: WireFal, tmp_path: Path) -> StartGateway:
    async def start(*, embedded: bool, **options: object) -> Gateway:
        app = create_app(
            make_settings(
                fal_key=CANARY,
                upstream_origin=wire.origin,
                data_dir=tmp_path / str(embedded),
                allowed_origins=("https://app.example",),
                **options,
            )
        )
        if embedded:  # a signal handler of the application must see all responses
            app.on_response_prepare.append(no_op_signal)
        client = await aiohttp_client(app)
        return Gateway(client, f"http://127.0.0.1:{client.port}")

    return start


async def no_op_signal(request: web.BaseRequest, response: web.StreamResponse) -> None:
    """A signal handler of an application."""


def request(*lines: str, version: str = "1.1") -> bytes:
    head = [f"GET {PROXY} HTTP/{version}", "Host: localhost", f"x-fal-target-url: {REQUEST}/status"]
    return "\r\n".join([*head, *lines, "", ""]).encode()


@pytest.mark.parametrize(
    "lines", [(), ("Origin: https://app.example",)], ids=["without an origin", "with an origin"]
)
@pytest.mark.parametrize(
    "head",
    [
        pytest.param(DATE + LENGTH + b"Content-Type: application/json\r\n", id="a usual response"),
        pytest.param(DATE + LENGTH, id="no content type"),
        pytest.param(LENGTH, id="no date"),
        pytest.param(DATE + b"content-length: 2\r\nserver: uvicorn\r\n", id="in lower case"),
        pytest.param(
            DATE + LENGTH + b"Set-Cookie: a=1\r\nSet-Cookie: b=2\r\n", id="repeated headers"
        ),
        pytest.param(DATE + LENGTH + b"X-Request-ID: fal-s-own\r\n", id="fal's own id"),
        pytest.param(DATE + LENGTH + b"Server-Timing: gpu;dur=1\r\n", id="fal's own timing"),
        pytest.param(DATE + LENGTH + b"Connection: x-a\r\nX-A: 1\r\n", id="hop by hop by name"),
        pytest.param(
            DATE + LENGTH + b"Connection: keep-alive\r\nKeep-Alive: 5\r\n", id="keep-alive"
        ),
        pytest.param(
            DATE + LENGTH + b"Alt-Svc: h3\r\nAccess-Control-Allow-Origin: *\r\n",
            id="headers that are not relayed",
        ),
        pytest.param(DATE + LENGTH + b"Vary: Accept\r\n", id="a Vary header"),
        pytest.param(DATE + LENGTH + b"X-Name: caf\xc3\xa9\r\n", id="a value in UTF-8"),
    ],
)
async def test_head_and_body_are_the_same_with_and_without_direct_write(
    make: StartGateway, wire: WireFal, head: bytes, lines: tuple[str, ...]
) -> None:
    wire.send(b"HTTP/1.1 202 Accepted\r\n" + head + b"\r\n{}")
    seen = []
    for embedded in (False, True):
        gateway = await make(embedded=embedded)
        both = await gateway.send_raw(request(*lines) + request(*lines, "Connection: close"))
        first = both[: both.index(b"{}") + 2]  # without the second response
        seen.append(sorted(OWN.sub(b"", first).split(b"\r\n")))
    assert seen[0] == seen[1]


async def test_direct_responses_follow_one_another_on_a_connection(
    make: StartGateway, wire: WireFal
) -> None:
    wire.send(b"HTTP/1.1 200 OK\r\n" + DATE + LENGTH + b"\r\nok")
    for embedded in (False, True):
        gateway = await make(embedded=embedded)
        responses = await gateway.send_raw(request() * 3 + request("Connection: close"))
        assert responses.count(b"HTTP/1.1 200 OK\r\n") == responses.count(b"\r\n\r\nok") == 4


async def test_no_direct_write_inside_an_embedding_application(
    aiohttp_client: AiohttpClient, wire: WireFal, tmp_path: Path
) -> None:
    async def sign(request: web.BaseRequest, response: web.StreamResponse) -> None:
        response.headers["Strict-Transport-Security"] = "max-age=1"

    wire.send(b"HTTP/1.1 200 OK\r\n" + DATE + LENGTH + b"\r\nok")
    settings = make_settings(fal_key=CANARY, upstream_origin=wire.origin, data_dir=tmp_path)
    outer = web.Application()
    outer.on_response_prepare.append(sign)
    outer.add_subapp("/ai", create_app(settings))
    client = await aiohttp_client(outer)
    headers = {"x-fal-target-url": f"{REQUEST}/status"}
    response = await client.get(f"/ai{PROXY}", headers=headers)
    assert (response.status, await response.read()) == (200, b"ok")
    assert response.headers["Strict-Transport-Security"] == "max-age=1"


@pytest.mark.parametrize(
    "headers",
    [
        pytest.param([(b"Date", b"now")], id="no length"),
        pytest.param([(b"Content-Length", b"2")], id="no date"),
        pytest.param([*USUAL, (b"content-length", b"2")], id="a length twice"),
        pytest.param([*USUAL, (b"X", b"a\nb")], id="a line feed"),
        pytest.param([*USUAL, (b"X", b"a\x00b")], id="a NUL"),
        pytest.param([*USUAL, (b"Connection", b"X")], id="Connection names a header"),
    ],
)
def test_an_unusual_head_is_not_serialized(headers: list[tuple[bytes, bytes]]) -> None:
    assert serialize_head(200, "OK", headers, ()) is None
    assert serialize_head(200, "OK", USUAL, ()) is not None


def test_the_caches_of_requests_are_bounded() -> None:
    target = (b"x-fal-target-url", f"{REQUEST}/status".encode())
    assert bodiless_call("GET", (target,)) is bodiless_call("GET", (target,))
    many = tuple((b"x-%d" % number, b"") for number in range(HEADER_COUNT_MAX))
    with pytest.raises(NotMemoizable):
        bodiless_call("GET", (target, *many))
    with pytest.raises(NotMemoizable):
        bodiless_call("GET", (target, (b"x-fal-a", b"a" * 4096)))
