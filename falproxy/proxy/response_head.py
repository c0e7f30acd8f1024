"""An answer's head in bytes, from fal's own: what most answers need, and nothing is read for."""

from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple

from falproxy.proxy.headers import CONNECTION, NAME_CACHE_SIZE, RawHeaders, response_header_name

CONTENT_LENGTH = "content-length"
DATE = "date"
REQUIRED_HEADERS = {CONTENT_LENGTH, DATE}
NO_BODY_STATUSES = (204, 304)
# What `Connection` may say without naming other headers.
CONNECTION_OPTIONS = (b"keep-alive", b"close")
HEAD_END = b"\r\n\r\n"
# What no head may hold but at the ends of its lines.
FORBIDDEN_BYTES = bytes({*range(0x20), 0x7F} - {0x09, 0x0A, 0x0D})


class HeaderLine(NamedTuple):
    """What a raw name becomes: the beginning of its line, empty for one that is not sent. word:
    its name in lower case, where that matters for the rest of the head."""

    prefix: bytes
    name: str | None


@lru_cache(NAME_CACHE_SIZE)
def header_line(raw_name: bytes) -> HeaderLine:
    lower = raw_name.decode("latin-1").lower()
    name = None if lower == CONNECTION else response_header_name(raw_name)
    start = b"" if name is None else raw_name + b": "
    return HeaderLine(
        start, lower if lower in (CONNECTION, CONTENT_LENGTH, DATE, "x-request-id") else None
    )


@lru_cache(NAME_CACHE_SIZE)
def status_line(status: int, reason: str) -> bytes:
    return f"HTTP/1.1 {status} {reason}".encode("utf-8", "surrogateescape")


def serialize_head(
    status: int, reason: str, raw_headers: RawHeaders, extra_headers: Iterable[tuple[str, str]]
) -> bytes | None:
    """The head of an answer that is sent on as it is, with what is added to it. A name that fal
    says itself is not added. None for one that has more to it: no length, no date, one of
    them twice, or a `Connection` that names others.
    """
    lines = [status_line(status, reason)]
    words: dict[str | None, bytes] = {}
    for name, value in raw_headers:
        start, word = header_line(name)
        if word in words:
            return None
        if word is not None:
            words[word] = value
        if start:
            lines.append(start + value)
    if not words.keys() >= REQUIRED_HEADERS or status in NO_BODY_STATUSES:
        return None
    if words.get(CONNECTION, b"close").lower() not in CONNECTION_OPTIONS:
        return None
    lines += [
        f"{name}: {value}".encode() for name, value in extra_headers if name.lower() not in words
    ]
    head = b"\r\n".join(lines)
    return head + HEAD_END if is_well_formed(head, len(lines)) else None


def is_well_formed(head: bytes, line_count: int) -> bool:
    """Whether everybody reads so many lines in a head, and no character that none may hold."""
    is_odd = head.count(b"\n") != line_count - 1 or head.count(b"\r") != line_count - 1
    return not is_odd and len(head.translate(None, FORBIDDEN_BYTES)) == len(head)
