"""Which header fields go up to fal and which come back down."""

from collections.abc import Iterable
from functools import lru_cache

from multidict import CIMultiDict, CIMultiDictProxy, istr

from falproxy.version import __version__

# RFC 9110 §7.6.1, with the fields that older peers still send for one connection only.
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
    "x-fal-target-url",  # ours to read
    "x-fal-cdn-token", "x-app-fal-can-disable-filter",  # fal's own apps speak so to each other
    "x-fal-client-proxy",  # ours to say
})  # fmt: skip

# `alt-svc` and `access-control-*` speak for fal's origin, not ours; the token is a credential of
# fal's own apps.
RESPONSE_DENIED = frozenset({"alt-svc", "x-fal-cdn-token"})
RESPONSE_DENIED_PREFIX = "access-control-"

CLIENT_PROXY = f"falproxy/{__version__}"

CONNECTION = "connection"
CONNECTION_OPTIONS = (
    "keep-alive",
    "close",
)  # what it says most of the time: no name of another header
# How many names are remembered, with what becomes of them.
NAME_CACHE_SIZE = 256

RawHeaders = Iterable[tuple[bytes, bytes]]


def request_headers(headers: CIMultiDictProxy[str], authorization: str) -> CIMultiDict[str]:
    """The client's headers as fal may see them, then our key: it is put in after cleaning, so
    that no `Connection` line of the client can take it out again.

    Names are in lower case: aiohttp's client keeps one of two lines whose names differ in case.
    """
    hop_by_hop = connection_header_names(headers.getall(CONNECTION, ()))
    up = CIMultiDict(
        [
            (lower, value)
            for name, value in headers.items()
            if (lower := request_header_name(name)) is not None and lower not in hop_by_hop
        ]
    )
    up["authorization"] = authorization
    up["x-fal-client-proxy"] = CLIENT_PROXY
    return up


@lru_cache(NAME_CACHE_SIZE)
def request_header_name(name: str) -> istr | None:
    """A header's name as fal sees it, None for one that fal does not see."""
    lower = name.lower()
    return istr(lower) if is_request_header_allowed(lower) else None


def is_request_header_allowed(name: str) -> bool:
    return name in REQUEST_ALLOWED or (
        name.startswith(REQUEST_ALLOWED_PREFIXES) and name not in REQUEST_DENIED
    )


def response_headers(raw_headers: RawHeaders) -> CIMultiDict[str]:
    """fal's headers as the client may see them: in their order, repeats included."""
    down = CIMultiDict(
        [
            (name, decode_value(value))
            for raw_name, value in raw_headers
            if (name := response_header_name(raw_name)) is not None
        ]
    )
    for named in connection_header_names(down.popall(CONNECTION, ())):
        down.popall(named, None)
    return down


@lru_cache(NAME_CACHE_SIZE)
def response_header_name(raw_name: bytes) -> istr | None:
    """A header's name as the client sees it, None for one that the client does not see.
    `Connection` is still there: it names others."""
    name = decode_value(raw_name)
    lower = name.lower()
    is_hidden = lower in RESPONSE_DENIED or lower.startswith(RESPONSE_DENIED_PREFIX)
    is_dropped = is_hidden or (lower in HOP_BY_HOP and lower != CONNECTION)
    return None if is_dropped else istr(name)


def connection_header_names(values: Iterable[str]) -> frozenset[str]:
    """The field names that `Connection` lines declare hop-by-hop, in lower case."""
    return frozenset(
        name.strip().lower()
        for value in values
        if value not in CONNECTION_OPTIONS
        for name in value.split(",")
        if name.strip()
    )


def decode_value(raw: bytes) -> str:
    """A header field as aiohttp will write it: in UTF-8, or it would lose what is not."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return raw.decode("latin-1")
