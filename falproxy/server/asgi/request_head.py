"""Writes the head of an ASGI request in HTTP/1.1.

ASGI servers and middleware may pass on what cannot be part of an HTTP/1.1 message, such as a line
break in a header of HTTP/2. Everything is checked here, so that a head is always one head.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any
from urllib.parse import quote, unquote

from falproxy.parse_digits import parse_digits

Scope = Mapping[str, Any]
RawHeaders = Iterable[tuple[bytes, bytes]]

TOKEN = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # RFC 9110, section 5.6.2
TARGET = re.compile(rb"/[\x21-\x7e\x80-\xff]*")
VALUE = re.compile(rb"[^\r\n\0]*")
# Characters of a path that need no escape (RFC 3986, section 3.3).
PATH_SAFE = "/-._~!$&'()*+,;=:@"
# Headers of the connection to the ASGI server. `Expect` is the ASGI server's to respond to.
CONNECTION_HEADERS = frozenset({
    b"connection", b"content-length", b"expect", b"keep-alive", b"proxy-connection",
    b"transfer-encoding", b"upgrade",
})  # fmt: skip
# Values of `Connection` that are no names of headers.
CONNECTION_OPTIONS = frozenset({b"", b"close", b"keep-alive", b"upgrade"})


class InvalidRequestError(ValueError):
    """The request cannot be written as an HTTP/1.1 message, or not without ambiguity."""


def has_unknown_length(scope: Scope) -> bool:
    """Return whether only the messages of the request show how long its body is."""
    headers = values_of(scope["headers"], b"transfer-encoding", b"content-length")
    if headers[b"transfer-encoding"]:
        return True
    return not headers[b"content-length"] and not scope.get("http_version", "1.1").startswith("1")


def content_length(scope: Scope) -> int | None:
    """Return the request's Content-Length, None if it has none. Raises: InvalidRequestError, it is
    no number, or the end of the body is ambiguous (RFC 9112, sections 6.1 and 6.3)."""
    headers = values_of(scope["headers"], b"transfer-encoding", b"content-length")
    values, codings = headers[b"content-length"], headers[b"transfer-encoding"]
    if codings and (values or scope.get("http_version") == "1.0"):
        raise InvalidRequestError("Transfer-Encoding")
    if not values:
        return None
    length = parse_digits(values[0])
    if length is None or len(values) > 1:
        raise InvalidRequestError("Content-Length")
    return length


def values_of(headers: RawHeaders, *names: bytes) -> dict[bytes, list[bytes]]:
    found: dict[bytes, list[bytes]] = {name: [] for name in names}
    for name, value in headers:
        if (lower := name.lower()) in found:
            found[lower].append(value.strip(b" \t"))
    return found


def serialize_request(scope: Scope, path: bytes, framing: RawHeaders) -> bytes:
    """Return the head of a request, as that of a connection with this one request.

    path: as returned by `split_path`.
    framing: the headers that show where the body ends.

    Raises: InvalidRequestError.
    """
    query = scope.get("query_string", b"")
    method, target = scope["method"].encode(), path + (b"?" + query if query else b"")
    if not (TOKEN.fullmatch(method) and TARGET.fullmatch(target)):
        raise InvalidRequestError("method or target")
    headers = [header for header in scope["headers"] if header[0].lower() not in CONNECTION_HEADERS]
    if scope.get("http_version") == "1.0" and not values_of(headers, b"host")[b"host"]:
        headers.append((b"host", b"localhost"))  # HTTP/1.1 requires one
    lines = [b"%s %s HTTP/1.1" % (method, target)]
    for name, value in (*headers, *framing, (b"connection", connection_options(scope))):
        if not (TOKEN.fullmatch(name) and VALUE.fullmatch(value)):
            raise InvalidRequestError("header")
        lines.append(b"%s: %s" % (name, value))
    return b"\r\n".join((*lines, b"", b""))


def connection_options(scope: Scope) -> bytes:
    """Return the value of `Connection`: the connection ends after the response. Headers that the
    client named there are not for fal."""
    values = values_of(scope["headers"], b"connection")[b"connection"]
    options = (option.strip(b" \t") for value in values for option in value.split(b","))
    names = (option for option in options if option.lower() not in CONNECTION_OPTIONS)
    return b", ".join((b"close", *names))


def split_path(scope: Scope, prefix: str) -> tuple[str, bytes] | None:
    """Return the path below which the proxy is found, and the rest of the request's path, both
    percent-encoded. None if the path is not below `prefix`.

    By the ASGI specification, `path` and `raw_path` begin with `root_path`. A framework that is
    itself configured with the path of a reverse proxy (`FastAPI(root_path=...)`) adds that path to
    `root_path` only, so that the request's path begins with an end of it.
    """
    raw = scope.get("raw_path") or quote(scope["path"], safe=PATH_SAFE).encode()
    root: str = scope.get("root_path", "").rstrip("/")
    for start in (0, *(match.start() for match in re.finditer("(?<=.)/", root))):
        if (rest := remove_prefix(raw, root[start:])) is not None:
            raw = rest
            break
    inner = remove_prefix(raw, prefix)
    return None if inner is None else (quote(root + prefix, safe=PATH_SAFE), inner)


def remove_prefix(raw: bytes, prefix: str) -> bytes | None:
    """Return what follows a path's decoded prefix, None if the path is not below it."""
    if not prefix:
        return raw
    ends = (match.start() for match in re.finditer(rb"/|\Z", raw))
    depth = prefix.count("/")
    for count, end in enumerate(ends):
        if count > depth:
            break
        if unquote(raw[:end].decode("utf-8", "surrogateescape")) == prefix:
            return raw[end:]
    return None
