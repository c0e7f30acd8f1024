"""aiohttp's parser of answers, as far as it is used here.

It is not documented. `is_supported` tries it, and a test (test_exchange.py) fails loudly when a
release of aiohttp has changed it; the requests go another way then.
"""

import asyncio
from collections.abc import Iterator
from contextlib import suppress

from aiohttp.base_protocol import BaseProtocol
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.http_parser import HttpParser, HttpResponseParser, RawResponseMessage

from falproxy.proxy.transport import MAX_HEADER_FIELD, MAX_HEADERS, ConnectionLostError

C_PARSER = "aiohttp._http_parser"
SWITCHING_PROTOCOLS = 101
OK = 200
NO_BODY_STATUSES = (204, 304)
# Bytes of a body that wait to be read before its sender is slowed down: twice as many at most, so
# that one piece as the event loop reads it, of up to 256 KiB, does not do so yet.
READ_BUFFER_LIMIT = 2**17
HEAD_END = b"\r\n\r\n"


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
    """The end of the connection is that of a body which has no other."""
    with suppress(HttpProcessingError):  # there is more to come, which never will
        parser.feed_eof()


def is_informational(message: RawResponseMessage) -> bool:
    return message.code < OK and message.code != SWITCHING_PROTOCOLS


def response_size(message: RawResponseMessage, data: bytes) -> int | None:
    """How many bytes an answer has that begins in `data`: -1 when that cannot be told, None when
    it is chunked."""
    if message.chunked:
        return None
    head = data.find(HEAD_END)
    length = "0" if message.code in NO_BODY_STATUSES else message.headers.get("Content-Length", "")
    if head < 0 or not length.isdecimal():
        return -1
    return head + len(HEAD_END) + int(length)


def is_supported() -> bool:
    """Whether aiohttp still has what is needed here, in C and in its known shape."""
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
    """What must hold of the parser and of the bodies it makes."""
    protocol = BaseProtocol(loop)
    parser = protocol._parser = make_parser(protocol, loop)
    answer = b"HTTP/1.1 202 Yes\r\nX-A: 1\r\nContent-Length: 4\r\n\r\nab"
    [(message, body)], is_upgraded, _ = parser.feed_data(answer)
    yield (message.code, message.reason, is_upgraded) == (202, "Yes", False)
    yield message.raw_headers == ((b"X-A", b"1"), (b"Content-Length", b"4"))
    yield (message.should_close, message.chunked, body.is_eof()) == (False, False, False)
    yield response_size(message, answer) == len(answer) + 2
    messages, _, _ = parser.feed_data(b"cd")
    yield not messages and body.is_eof() and not body.at_eof()
    yield body.read_nowait() == b"abcd" and body.at_eof()
    answer = b"HTTP/1.1 103 Hint\r\n\r\nHTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    [(hint, _), (message, body)], _, _ = parser.feed_data(answer)
    yield is_informational(hint) and message.chunked
    parser.feed_data(b"1\r\nx\r\n0\r\n\r\n")
    yield body.is_eof() and body.read_nowait() == b"x"
    yield not protocol._reading_paused and protocol.transport is None
