"""An answer's head in bytes, from fal's own: what most answers need, and nothing is read for."""

from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple

from falproxy.proxy.headers import CONNECTION, NAMES, RawHeaders, name_down

LENGTH = "content-length"
DATE = "date"
NEEDED = {LENGTH, DATE}
NO_BODY = (204, 304)
# What `Connection` may say without naming other headers.
ALONE = (b"keep-alive", b"close")
HEAD_END = b"\r\n\r\n"
# What no head may hold but at the ends of its lines.
FORBIDDEN = bytes({*range(0x20), 0x7F} - {0x09, 0x0A, 0x0D})


class Line(NamedTuple):
    """What a raw name becomes: the beginning of its line, empty for one that is not sent. word:
    its name in lower case, where that matters for the rest of the head."""

    start: bytes
    word: str | None


@lru_cache(NAMES)
def line_of(raw: bytes) -> Line:
    lower = raw.decode("latin-1").lower()
    name = None if lower == CONNECTION else name_down(raw)
    start = b"" if name is None else raw + b": "
    return Line(start, lower if lower in (CONNECTION, LENGTH, DATE, "x-request-id") else None)


@lru_cache(NAMES)
def status_line(status: int, reason: str) -> bytes:
    return f"HTTP/1.1 {status} {reason}".encode("utf-8", "surrogateescape")


def plain_head(
    status: int, reason: str, raw: RawHeaders, added: Iterable[tuple[str, str]]
) -> bytes | None:
    """The head of an answer that is sent on as it is, with what is added to it. A name that fal
    says itself is not added. None for one that has more to it: no length, no date, one of
    them twice, or a `Connection` that names others.
    """
    lines = [status_line(status, reason)]
    words: dict[str | None, bytes] = {}
    for name, value in raw:
        start, word = line_of(name)
        if word in words:
            return None
        if word is not None:
            words[word] = value
        if start:
            lines.append(start + value)
    if not words.keys() >= NEEDED or status in NO_BODY:
        return None
    if words.get(CONNECTION, b"close").lower() not in ALONE:
        return None
    lines += [f"{name}: {value}".encode() for name, value in added if name.lower() not in words]
    head = b"\r\n".join(lines)
    return head + HEAD_END if has_lines(head, len(lines)) else None


def has_lines(head: bytes, count: int) -> bool:
    """Whether everybody reads so many lines in a head, and no character that none may hold."""
    is_odd = head.count(b"\n") != count - 1 or head.count(b"\r") != count - 1
    return not is_odd and len(head.translate(None, FORBIDDEN)) == len(head)
