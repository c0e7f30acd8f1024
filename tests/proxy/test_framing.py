"""Requests that two servers may read differently are refused (request smuggling)."""

import pytest

from tests.support.fake_fal import FakeFal
from tests.support.gateway import SHARED, Gateway

pytestmark = [pytest.mark.both_event_loops, pytest.mark.both_transports]

POST = b"POST /api/fal/proxy HTTP/1.1\r\n"
HOST = b"Host: x\r\n"
REST = (
    b"Connection: close\r\nx-fal-target-url: https://fal.run/a/b\r\n"
    b"Content-Type: application/json\r\n"
)
HEAD = POST + HOST + REST
SIZED = b"Content-Length: 2\r\n\r\n{}"
CHUNKED = b"Transfer-Encoding: chunked\r\n\r\n"
CHUNKS = b"2\r\n{}\r\n0\r\n\r\n"


def with_length(value: bytes) -> bytes:
    return HEAD + b"Content-Length: " + value + b"\r\n\r\n{}"


def with_coding(value: bytes) -> bytes:
    return HEAD + b"Transfer-Encoding: " + value + b"\r\n\r\n" + CHUNKS


def with_field(line: bytes) -> bytes:
    return POST + HOST + line + b"\r\n" + REST + SIZED


AMBIGUOUS = [
    pytest.param(HEAD + b"Content-Length: 2\r\n" + CHUNKED + CHUNKS, id="length and chunked"),
    pytest.param(HEAD + b"Content-Length: 2\r\n" + SIZED, id="the length twice"),
    pytest.param(HEAD + b"Content-Length: 3\r\n" + SIZED, id="two lengths"),
    pytest.param(with_length(b"2, 2"), id="a list of lengths"),
    pytest.param(with_length(b"+2"), id="a signed length"),
    pytest.param(with_length(b"-1"), id="a negative length"),
    pytest.param(with_length(b"0_2"), id="a length with an underscore"),
    pytest.param(with_length(b"0x2"), id="a length in hexadecimal"),
    pytest.param(with_length("\u0662".encode()), id="a length in Arabic digits"),
    pytest.param(with_length(b""), id="an empty length"),
    pytest.param(with_coding(b"chunked123"), id="chunked with a tail"),
    pytest.param(with_coding(b"xchunked"), id="chunked with a head"),
    pytest.param(with_coding(b"chunked, chunked"), id="chunked twice"),
    pytest.param(with_coding(b"chunked, gzip"), id="chunked not last"),
    pytest.param(with_coding(b"gzip, chunked"), id="a coding that would be dropped"),
    pytest.param(with_coding(b"identity"), id="identity"),
    pytest.param(with_coding(b""), id="an empty coding"),
    pytest.param(HEAD + b"Transfer-Encoding: chunked\r\n" + CHUNKED + CHUNKS, id="two codings"),
    pytest.param((HEAD + SIZED).replace(b"\r\n", b"\n"), id="bare line feeds"),
    pytest.param(with_field(b"X-A: 1\nX-B: 2"), id="one bare line feed"),
    pytest.param(with_field(b"X-A : 1"), id="a space before the colon"),
    pytest.param(with_field(b" X-A: 1"), id="a space before the name"),
    pytest.param(with_field(b"X-A: 1\r\n 2"), id="a folded line"),
    pytest.param(with_field(b"X-A: 1\r2"), id="a lone carriage return"),
    pytest.param(with_field(b"X-A: 1\x002"), id="a NUL"),
    pytest.param(with_field(b": 2"), id="an empty name"),
    pytest.param(with_field(b"Host: y"), id="two hosts"),
    pytest.param(POST + REST + SIZED, id="no host"),
    pytest.param(with_field(b"X-A: 1\r\n" * 2000 + b"X-B: 2"), id="endless headers"),
    pytest.param(HEAD + CHUNKED + b"+2\r\n{}\r\n0\r\n\r\n", id="a signed chunk size"),
    pytest.param(HEAD + CHUNKED + b"0x2\r\n{}\r\n0\r\n\r\n", id="a chunk size with 0x"),
    pytest.param(HEAD + CHUNKED + b"0_2\r\n{}\r\n0\r\n\r\n", id="a chunk size with an underscore"),
    pytest.param(HEAD + CHUNKED + b"f" * 17 + b"\r\n{}\r\n0\r\n\r\n", id="a huge chunk size"),
    pytest.param(HEAD + CHUNKED + b"2;a\nb\r\n{}\r\n0\r\n\r\n", id="a line feed in an extension"),
    pytest.param(HEAD + CHUNKED + b"2\r\n{}XX0\r\n\r\n", id="a chunk that runs on"),
    pytest.param(HEAD + CHUNKED + b"2\r\n{}\r\n0\r\nbad\r\n\r\n", id="a bad trailer"),
    pytest.param(b"GET /api/fal/proxy\r\n\r\n", id="HTTP/0.9"),
    pytest.param(HEAD.replace(b"HTTP/1.1", b"http/1.1") + SIZED, id="the version in lower case"),
    pytest.param(HEAD.replace(b"POST", b"pOsT") + SIZED, id="the method in mixed case"),
    pytest.param(HEAD.replace(b"POST", b"GARBAGE") + SIZED, id="an unknown method"),
    pytest.param(HEAD.replace(b"proxy", b"proxy?" + b"a" * 70_000) + SIZED, id="an endless line"),
]


@SHARED
@pytest.mark.parametrize("request_bytes", AMBIGUOUS)
async def test_a_request_with_two_meanings_is_refused(
    shared_gateway: Gateway, shared_fal: FakeFal, request_bytes: bytes
) -> None:
    response = await shared_gateway.send_raw(request_bytes)
    assert response.split()[1] == b"400"
    assert shared_fal.seen == []


async def test_bytes_behind_a_declined_upgrade_are_a_request_of_their_own(
    gateway: Gateway, fal: FakeFal
) -> None:
    upgrade = b"Connection: upgrade\r\nUpgrade: websocket\r\nx-fal-target-url: https://fal.run/a/b"
    hidden = b"GET /health/live HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    response = await gateway.send_raw(
        b"GET /api/fal/proxy HTTP/1.1\r\nHost: x\r\n" + upgrade + b"\r\n\r\n" + hidden
    )
    assert response.count(b"HTTP/1.1 200") == 2
    assert [(seen.method, seen.header("upgrade"), seen.body) for seen in fal.seen] == [
        ("GET", None, b"")
    ]
