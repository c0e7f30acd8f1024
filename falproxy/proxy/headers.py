"""Header fields: which ones are sent to fal and to the client, and the response head as bytes."""

from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple

from multidict import CIMultiDict, CIMultiDictProxy, istr

from falproxy.version import __version__

# RFC 9110 §7.6.1, and fields that older peers still send for one connection only.
HOP_BY_HOP = frozenset({
    "connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "proxy-connection",
    "te", "trailer", "transfer-encoding", "upgrade",
})  # fmt: skip

REQUEST_ALLOWED = frozenset({
    "accept", "accept-encoding", "content-type", "content-encoding", "user-agent",
    "traceparent", "tracestate",
})  # fmt: skip
REQUEST_ALLOWED_PREFIXES = ("x-fal-", "x-app-fal-")
REQUEST_DENIED = frozenset({
    "x-fal-target-url",  # for this proxy
    "x-fal-cdn-token", "x-app-fal-can-disable-filter",  # between fal's own apps
    "x-fal-client-proxy",  # set by this proxy
})  # fmt: skip

# `alt-svc` and `access-control-*` are about fal's origin; the token is a credential of fal's apps.
RESPONSE_DENIED = frozenset({"alt-svc", "x-fal-cdn-token"})
RESPONSE_DENIED_PREFIX = "access-control-"

CLIENT_PROXY = f"falproxy/{__version__}"

CONNECTION = "connection"
CONTENT_LENGTH = "content-length"
DATE = "date"
# Values of `Connection` that name no other header.
CONNECTION_OPTIONS = ("keep-alive", "close")
CONNECTION_OPTIONS_RAW = tuple(option.encode() for option in CONNECTION_OPTIONS)
REQUIRED_HEADERS = {CONTENT_LENGTH, DATE}
UNIQUE_HEADERS = frozenset({CONNECTION, CONTENT_LENGTH, DATE, "x-request-id"})
NO_BODY_STATUSES = (204, 304)
HEAD_END = b"\r\n\r\n"
# Control characters that a head must not contain; CR and LF are checked apart.
FORBIDDEN_BYTES = bytes({*range(0x20), 0x7F} - {0x09, 0x0A, 0x0D})
NAME_CACHE_SIZE = 256

RawHeaders = Iterable[tuple[bytes, bytes]]


def request_headers(headers: CIMultiDictProxy[str], authorization: str | None) -> CIMultiDict[str]:
    """Return the client's headers as they are sent to fal, with fal's key.

    authorization: the header with the key; None for a public document.

    The key is added after filtering, so that a `Connection` header of the client cannot remove it.
    Names are in lower case: of two names that differ in case only, aiohttp's client keeps one.
    """
    hop_by_hop = connection_header_names(headers.getall(CONNECTION, ()))
    filtered = CIMultiDict(
        [
            (lower, value)
            for name, value in headers.items()
            if (lower := request_header_name(name)) is not None and lower not in hop_by_hop
        ]
    )
    if authorization is not None:
        filtered["authorization"] = authorization
    filtered["x-fal-client-proxy"] = CLIENT_PROXY
    return filtered


@lru_cache(NAME_CACHE_SIZE)
def request_header_name(name: str) -> istr | None:
    """Return the name of a request header as sent to fal, None for one that is not sent."""
    lower = name.lower()
    return istr(lower) if is_request_header_allowed(lower) else None


def is_request_header_allowed(name: str) -> bool:
    return name in REQUEST_ALLOWED or (
        name.startswith(REQUEST_ALLOWED_PREFIXES) and name not in REQUEST_DENIED
    )


def response_headers(raw_headers: RawHeaders) -> CIMultiDict[str]:
    """Return fal's headers as they are sent to the client: in order, repeated ones included."""
    filtered = CIMultiDict(
        [
            (name, decode_value(value))
            for raw_name, value in raw_headers
            if (name := response_header_name(raw_name)) is not None
        ]
    )
    for hop_by_hop in connection_header_names(filtered.popall(CONNECTION, ())):
        filtered.popall(hop_by_hop, None)
    return filtered


@lru_cache(NAME_CACHE_SIZE)
def response_header_name(raw_name: bytes) -> istr | None:
    """Return the name of a response header as sent to the client, None for one that is not sent.

    `Connection` is kept: the caller needs the names that it lists.
    """
    name = decode_value(raw_name)
    lower = name.lower()
    is_hidden = lower in RESPONSE_DENIED or lower.startswith(RESPONSE_DENIED_PREFIX)
    is_dropped = is_hidden or (lower in HOP_BY_HOP and lower != CONNECTION)
    return None if is_dropped else istr(name)


def connection_header_names(values: Iterable[str]) -> frozenset[str]:
    """Return the field names that `Connection` headers declare hop-by-hop, in lower case."""
    return frozenset(
        name.strip().lower()
        for value in values
        if value not in CONNECTION_OPTIONS
        for name in value.split(",")
        if name.strip()
    )


def decode_value(raw: bytes) -> str:
    """Decode a header field so that aiohttp can write it, in UTF-8: bytes of another encoding are
    read as Latin-1."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return raw.decode("latin-1")


class HeaderLine(NamedTuple):
    """The output for one raw header name.

    prefix: the beginning of the line, empty for a header that is not sent.
    name: in lower case, for a header of `UNIQUE_HEADERS`, else None.
    """

    prefix: bytes
    name: str | None


@lru_cache(NAME_CACHE_SIZE)
def header_line(raw_name: bytes) -> HeaderLine:
    lower = raw_name.decode("latin-1").lower()
    name = None if lower == CONNECTION else response_header_name(raw_name)
    prefix = b"" if name is None else raw_name + b": "
    return HeaderLine(prefix, lower if lower in UNIQUE_HEADERS else None)


@lru_cache(NAME_CACHE_SIZE)
def status_line(status: int, reason: str) -> bytes:
    return f"HTTP/1.1 {status} {reason}".encode("utf-8", "surrogateescape")


def serialize_head(
    status: int, reason: str, raw_headers: RawHeaders, extra_headers: Iterable[tuple[str, str]]
) -> bytes | None:
    """Return the head of a response whose body is relayed unchanged, as bytes.

    extra_headers: added unless fal sends the same unique header.

    None: the response needs the normal path. It has no length, no date, a unique header twice, no
    body, or a `Connection` header that names other headers.
    """
    lines = [status_line(status, reason)]
    unique: dict[str | None, bytes] = {}
    for raw_name, value in raw_headers:
        prefix, name = header_line(raw_name)
        if name in unique:
            return None
        if name is not None:
            unique[name] = value
        if prefix:
            lines.append(prefix + value)
    if not unique.keys() >= REQUIRED_HEADERS or status in NO_BODY_STATUSES:
        return None
    if unique.get(CONNECTION, b"close").lower() not in CONNECTION_OPTIONS_RAW:
        return None
    lines += [
        f"{name}: {value}".encode() for name, value in extra_headers if name.lower() not in unique
    ]
    head = b"\r\n".join(lines)
    return head + HEAD_END if is_well_formed(head, len(lines)) else None


def is_well_formed(head: bytes, line_count: int) -> bool:
    """Return whether a head has exactly this many lines and no control characters."""
    is_odd = head.count(b"\n") != line_count - 1 or head.count(b"\r") != line_count - 1
    return not is_odd and len(head.translate(None, FORBIDDEN_BYTES)) == len(head)
