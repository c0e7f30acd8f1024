"""HTTP/1.1 framing: request heads as bytes, and aiohttp's response parser.

The parser is not documented by aiohttp. `is_supported` checks it at start-up, and a test
(test_transport.py) fails loudly when a release of aiohttp has changed it; the proxy then uses
aiohttp's client instead.
"""

import asyncio
from collections.abc import Iterator
from contextlib import suppress

from aiohttp.base_protocol import BaseProtocol
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.http_parser import HttpParser, HttpResponseParser, RawResponseMessage

from falproxy.proxy.headers import HEAD_END, NO_BODY_STATUSES, is_well_formed
from falproxy.proxy.transport import (
    MAX_HEADER_FIELD,
    MAX_HEADERS,
    ConnectionLostError,
    UpstreamRequest,
)

BODY_METHODS = ("POST", "PUT", "PATCH")
LAST_CHUNK = b"0\r\n\r\n"
# The end of a request head without a body, for a method that may have one.
EMPTY_BODY_END = b"content-length: 0\r\n\r\n"

C_PARSER = "aiohttp._http_parser"
SWITCHING_PROTOCOLS = 101
OK = 200
# Unread bytes of a body at which reading from the connection pauses, once they exceed twice as
# many. One read of the event loop is up to 256 KiB and must not cause a pause.
READ_BUFFER_LIMIT = 2**17


def serialize_request_head(request: UpstreamRequest) -> bytes:
    """Return the request line and the headers as bytes.

    Raises: ValueError, a header contains a control character.
    """
    lines = [f"{request.method} {request.path} HTTP/1.1"]
    lines += [f"{name}: {value}" for name, value in request.headers]
    if request.body is None:
        if request.method in BODY_METHODS:
            lines.append("content-length: 0")
    elif request.length is None:
        lines.append("transfer-encoding: chunked")
    else:
        lines.append(f"content-length: {request.length}")
    return encode_lines(lines)


def append_body(head: bytes, body: bytes) -> bytes:
    """Return a request with a body, from the head of a request without one."""
    return b"%bcontent-length: %d\r\n\r\n%b" % (head.removesuffix(EMPTY_BODY_END), len(body), body)


def encode_lines(lines: list[str]) -> bytes:
    """Return the lines of a head as bytes. Bytes that were not decodable are restored.

    Raises: ValueError, a line contains a control character, such as a line break.
    """
    head = "\r\n".join(lines).encode("utf-8", "surrogateescape")
    if not is_well_formed(head, len(lines)):
        raise ValueError("A header holds a control character.")
    return head + HEAD_END


def encode_chunk(data: bytes) -> bytes:
    """Return data in the chunked transfer coding. Empty data gives no chunk: it would end the
    body."""
    return b"%x\r\n%b\r\n" % (len(data), data) if data else b""


def make_parser(protocol: BaseProtocol, loop: asyncio.AbstractEventLoop) -> HttpResponseParser:
    return HttpResponseParser(
        protocol,
        loop,
        READ_BUFFER_LIMIT,
        payload_exception=ConnectionLostError,
        read_until_eof=True,
        auto_decompress=False,
        max_line_size=MAX_HEADER_FIELD,
        max_field_size=MAX_HEADER_FIELD,
        max_headers=MAX_HEADERS,
    )


def feed_connection_eof(parser: HttpParser[RawResponseMessage]) -> None:
    """Pass the end of the connection to the parser: it ends a body without length and chunks."""
    with suppress(HttpProcessingError):  # the body is incomplete, which the caller reports
        parser.feed_eof()


def is_informational(message: RawResponseMessage) -> bool:
    return message.code < OK and message.code != SWITCHING_PROTOCOLS


def response_size(message: RawResponseMessage, data: bytes) -> int | None:
    """Return the size in bytes of the response that begins in `data`, head and body together.

    -1: the size is unknown. None: the body is chunked.
    """
    if message.chunked:
        return None
    head = data.find(HEAD_END)
    length = "0" if message.code in NO_BODY_STATUSES else message.headers.get("Content-Length", "")
    if head < 0 or not length.isdecimal():
        return -1
    return head + len(HEAD_END) + int(length)


def is_supported() -> bool:
    """Return whether aiohttp has its C parser, and the parser passes the self checks."""
    if HttpResponseParser.__module__ != C_PARSER:
        return False
    loop = asyncio.new_event_loop()
    try:
        return all(self_checks(loop))
    except (HttpProcessingError, AttributeError, TypeError, ValueError):
        return False
    finally:
        loop.close()


def self_checks(loop: asyncio.AbstractEventLoop) -> Iterator[bool]:
    """Yield the result of each check of the parser and its payloads."""
    protocol = BaseProtocol(loop)
    parser = protocol._parser = make_parser(protocol, loop)
    data = b"HTTP/1.1 202 Yes\r\nX-A: 1\r\nContent-Length: 4\r\n\r\nab"
    [(message, payload)], is_upgraded, _ = parser.feed_data(data)
    yield (message.code, message.reason, is_upgraded) == (202, "Yes", False)
    yield message.raw_headers == ((b"X-A", b"1"), (b"Content-Length", b"4"))
    yield (message.should_close, message.chunked, payload.is_eof()) == (False, False, False)
    yield response_size(message, data) == len(data) + 2
    messages, _, _ = parser.feed_data(b"cd")
    yield not messages and payload.is_eof() and not payload.at_eof()
    yield payload.read_nowait() == b"abcd" and payload.at_eof()
    data = b"HTTP/1.1 103 Hint\r\n\r\nHTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    [(hint, _), (message, payload)], _, _ = parser.feed_data(data)
    yield is_informational(hint) and message.chunked
    parser.feed_data(b"1\r\nx\r\n0\r\n\r\n")
    yield payload.is_eof() and payload.read_nowait() == b"x"
    yield not protocol._reading_paused and protocol.transport is None
