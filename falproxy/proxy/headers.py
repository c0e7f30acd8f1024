"""Header fields: which ones are sent to fal and to the client, and the response head as bytes.

Values are opaque bytes (RFC 9110 §5.5). As text, bytes that are not UTF-8 are surrogates, as in
aiohttp, and are restored when the field is sent.
"""

import re
from collections.abc import Callable, Iterable
from http import HTTPStatus
from typing import Generic, NamedTuple, TypeVar

from multidict import CIMultiDict, CIMultiDictProxy, MultiMapping, istr

from falproxy.version import __version__

# RFC 9110 §7.6.1, and fields that older peers still send for one connection only.
HOP_BY_HOP = frozenset({
    "connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "proxy-connection",
    "te", "trailer", "transfer-encoding", "upgrade",
})  # fmt: skip

UTF8_CHARSETS = ("utf-8", "utf8", "us-ascii")

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

# Response headers that are not relayed, with the specification of each. fal sets them for its own
# origin, or for servers of its own; clients would apply them to the origin of the proxy.
RESPONSE_DENIED = {
    "x-fal-cdn-token": "a credential of fal's own apps",
    "alt-svc": "RFC 7838 §3, other servers for the origin",
    "set-cookie": "RFC 6265 §4.1",
    "set-cookie2": "RFC 2965 §3.2",
    "clear-site-data": "W3C Clear Site Data, deletes the origin's storage",
    "strict-transport-security": "RFC 6797 §6.1",
    "public-key-pins": "RFC 7469 §2.1",
    "public-key-pins-report-only": "RFC 7469 §2.1",
    "expect-ct": "RFC 9163 §2.1",
    "nel": "W3C Network Error Logging",
    "report-to": "W3C Reporting API, 2018 draft",
    "reporting-endpoints": "W3C Reporting API",
    "service-worker-allowed": "W3C Service Workers, scope of a worker",
    "refresh": "HTML §2.4.8, sends the page to another URL",
    "accept-ch": "RFC 8942 §3.1, client hints for the origin",
    "critical-ch": "W3C Client Hints Reliability",
    "origin-agent-cluster": "HTML §7.1.2",
    "set-login": "W3C Login Status API",
    "secure-session-registration": "W3C Device Bound Session Credentials",
    "secure-session-challenge": "W3C Device Bound Session Credentials",
    "use-as-dictionary": "RFC 9842 §2.1, for later requests to the origin",
    "timing-allow-origin": "W3C Resource Timing, origins that may read timings",
    "cdn-cache-control": "RFC 9213, for a CDN in front of the origin",
    "surrogate-control": "Edge Architecture Specification, for a CDN in front of the origin",
}
RESPONSE_DENIED_PREFIXES = {
    "access-control-": "Fetch §3.3, origins that may read the response",
    "x-accel-": "nginx, ngx_http_proxy_module: file to send, buffering, caching, rate",
    "x-sendfile": "Apache mod_xsendfile, lighttpd mod_fastcgi: file to send; X-Sendfile2",
    "x-lighttpd-": "lighttpd, file to send",
    "x-litespeed-": "LiteSpeed, file to send; entries of its cache to purge",
    "x-reproxy-": "Perlbal and nginx modules, file or URL to send",
}
NOSNIFF = ("X-Content-Type-Options", "nosniff")  # Fetch §3.6: the type is the one in the header
NOSNIFF_NAME, NOSNIFF_LINE = NOSNIFF[0].lower(), b"X-Content-Type-Options: nosniff"

CLIENT_PROXY = f"falproxy/{__version__}"

CONNECTION = "connection"
CONTENT_LENGTH = "content-length"
DATE = "date"
# Values of `Connection` that name no other header.
CONNECTION_OPTIONS = ("keep-alive", "close")
CONNECTION_OPTIONS_RAW = tuple(option.encode() for option in CONNECTION_OPTIONS)
REQUIRED_HEADERS = {CONTENT_LENGTH, DATE}
UNIQUE_HEADERS = frozenset({
    CONNECTION, CONTENT_LENGTH, DATE, "x-request-id", NOSNIFF_NAME,
})  # fmt: skip
NO_BODY_STATUSES = (204, 304)
HEAD_END = b"\r\n\r\n"
# Control characters that a head must not contain; CR and LF are checked apart.
FORBIDDEN_BYTES = bytes({*range(0x20), 0x7F} - {0x09, 0x0A, 0x0D})
SURROGATES = re.compile(r"[\udc80-\udcff]")
NAMES_MAX, NAME_LENGTH_MAX = 512, 64  # entries of a `NameCache`, and bytes of a name in it

RawHeaders = Iterable[tuple[bytes, bytes]]
N = TypeVar("N", str, bytes)
T = TypeVar("T")


class NameCache(dict[N, T], Generic[N, T]):
    """The results of a function of a header name or reason phrase. Long ones are not cached, and
    all are dropped when there are too many: others choose the names."""

    def __init__(self, compute: Callable[[N], T]) -> None:
        super().__init__()
        self._compute: Callable[[N], T] = compute

    def __missing__(self, name: N) -> T:
        result = self._compute(name)
        if len(name) <= NAME_LENGTH_MAX:
            if len(self) >= NAMES_MAX:
                self.clear()
            self[name] = result
        return result


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
            if (lower := REQUEST_NAMES[name]) is not None and lower not in hop_by_hop
        ]
    )
    if authorization is not None:
        filtered["authorization"] = authorization
    filtered["x-fal-client-proxy"] = CLIENT_PROXY
    return filtered


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
            if (name := RESPONSE_NAMES[raw_name]) is not None
        ]
    )
    for hop_by_hop in connection_header_names(filtered.popall(CONNECTION, ())):
        filtered.popall(hop_by_hop, None)
    return filtered


def response_header_name(raw_name: bytes) -> istr | None:
    """Return the name of a response header as sent to the client, None for one that is not sent.

    `Connection` is kept: the caller needs the names that it lists.
    """
    name = decode_value(raw_name)
    lower = name.lower()
    is_hidden = lower in RESPONSE_DENIED or lower.startswith(tuple(RESPONSE_DENIED_PREFIXES))
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
    """Decode a header field. Bytes that are not UTF-8 become surrogates."""
    return raw.decode("utf-8", "surrogateescape")


def encode_value(text: str) -> bytes:
    """Return the bytes of a decoded header field."""
    return text.encode("utf-8", "surrogateescape")


def has_surrogates(text: str) -> bool:
    """Return whether a decoded header field had bytes that are not UTF-8."""
    return not text.isascii() and SURROGATES.search(text) is not None


def encode_lines(lines: Iterable[str]) -> bytes:
    """Return the lines of a head as bytes.

    Raises: ValueError, a line contains a control character, such as a line break.
    """
    encoded = [encode_value(line) for line in lines]
    head = b"\r\n".join(encoded)
    if not is_well_formed(head, len(encoded)):
        raise ValueError("A header holds a control character.")
    return head + HEAD_END


def clean_reason(raw: bytes) -> str:
    """Return a reason phrase, empty if it has control characters. Clients ignore it (RFC 9112
    §4)."""
    return decode_value(raw) if is_well_formed(raw, 1) else ""


def is_identity(headers: MultiMapping[str]) -> bool:
    """Return whether a body is not encoded, according to all `Content-Encoding` headers."""
    return all(
        coding.strip().lower() in ("", "identity")
        for line in headers.getall("content-encoding", ())
        for coding in line.split(",")
    )


def is_utf8(headers: MultiMapping[str]) -> bool:
    """Return whether no `Content-Type` header names another charset than UTF-8, as a server that
    reads it might."""
    return all(
        value.strip(" \t\"'").lower() in UTF8_CHARSETS
        for line in headers.getall("content-type", ())
        for name, _, value in (part.partition("=") for part in line.split(";")[1:])
        if name.strip().lower().startswith("charset")
    )


def sole_value(headers: MultiMapping[str], name: str) -> str | None:
    """Return the value of a header that is sent once. None if it is missing, or sent twice: other
    programs may then read the other one."""
    values = headers.getall(name, ())
    return values[0] if len(values) == 1 else None


class HeaderLine(NamedTuple):
    """The output for one raw header name.

    prefix: the beginning of the line, empty for a header that is not sent.
    name: in lower case, for a header of `UNIQUE_HEADERS`, else None.
    """

    prefix: bytes
    name: str | None


def header_line(raw_name: bytes) -> HeaderLine:
    lower = raw_name.decode("latin-1").lower()
    name = None if lower == CONNECTION else RESPONSE_NAMES[raw_name]
    prefix = b"" if name is None else raw_name + b": "
    return HeaderLine(prefix, lower if lower in UNIQUE_HEADERS else None)


def status_line(status: int, reason: str) -> bytes:
    return encode_value(f"HTTP/1.1 {status} {reason}")


STATUS_LINES = {
    (status.value, status.phrase): status_line(status, status.phrase) for status in HTTPStatus
}
REASONS = NameCache(clean_reason)
REQUEST_NAMES = NameCache(request_header_name)
RESPONSE_NAMES = NameCache(response_header_name)
HEADER_LINES = NameCache(header_line)


def serialize_head(
    status: int, reason: str, raw_headers: RawHeaders, extra_headers: Iterable[tuple[str, str]]
) -> bytes | None:
    """Return the head of a response whose body is relayed unchanged, as bytes, with NOSNIFF.

    extra_headers: added unless fal sends the same unique header.

    None: the response needs the normal path. It has no length, no date, a unique header twice, no
    body, or a `Connection` header that names other headers.
    """
    lines = [STATUS_LINES.get((status, reason)) or status_line(status, reason)]
    unique: dict[str | None, bytes] = {}
    for raw_name, value in raw_headers:
        prefix, name = HEADER_LINES[raw_name]
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
    if NOSNIFF_NAME not in unique:
        lines.append(NOSNIFF_LINE)
    lines += [
        f"{name}: {value}".encode() for name, value in extra_headers if name.lower() not in unique
    ]
    head = b"\r\n".join(lines)
    return head + HEAD_END if is_well_formed(head, len(lines)) else None


def replace_header(
    head: bytes, placeholder: tuple[str, str], headers: Iterable[tuple[str, str]]
) -> bytes:
    """Return a serialized head with headers of the proxy's own in place of a placeholder."""
    line = "\r\n{}: {}".format(*placeholder).encode()
    before, _, after = head.rpartition(line)
    return before + b"".join(f"\r\n{name}: {value}".encode() for name, value in headers) + after


def is_well_formed(head: bytes, line_count: int) -> bool:
    """Return whether a head has exactly this many lines and no control characters."""
    is_odd = head.count(b"\n") != line_count - 1 or head.count(b"\r") != line_count - 1
    return not is_odd and len(head.translate(None, FORBIDDEN_BYTES)) == len(head)
