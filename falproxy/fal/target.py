"""Parses and checks `x-fal-target-url`, and derives the operation from the target."""

import re
from collections.abc import Collection
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property, lru_cache
from urllib.parse import unquote, unquote_to_bytes

from falproxy.errors import ProxyError

FAL_HOSTS = ("fal.run", "*.fal.run", "fal.ai", "*.fal.ai")
QUEUE_HOST = "queue.fal.run"
RUN_HOST = "fal.run"
LIVE_HOST = "wma.fal.run"  # signalling of live video

# Visible ASCII except for the characters that RFC 3986 excludes from URLs, and "#": a fragment is
# never sent and would hide the text after it.
URL_TEXT = re.compile(r"[!$-;=@-\[\]_a-z~]+")
# In a query, clients leave some of those characters as they are (WHATWG URL §1.3, query
# percent-encode set).
QUERY_TEXT = re.compile(r"[!\"$-~]*")
URL_PARTS = re.compile(r"(?P<scheme>[^:/]+)://(?P<authority>[^/]*)(?P<path>/.*)?")
LABEL = r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?"
HOST = re.compile(rf"{LABEL}(?:\.{LABEL})+")
BROKEN_ESCAPE = re.compile(r"%(?![0-9A-Fa-f]{2})")
# Characters that a decoded path segment must not contain: a server that decodes once more, or
# strips `;parameters`, would see another path than we do.
AMBIGUOUS_SEGMENT = re.compile(rb"[\x00-\x1f\x7f/\\;?#%]")
# Escapes of characters that need none: fal decodes them, so they could hide words from our checks.
NEEDLESS_ESCAPE = re.compile(r"%(?:2[dDeE]|3[0-9]|[46][1-9a-fA-F]|[57][0-9aA]|5[fF]|7[eE])")
REQUESTS = "requests"
# Entries of the cache of parsed targets, and characters of the longest target in it.
CACHE_SIZE, CACHED_LENGTH_MAX = 4096, 512
REQUEST_PATH = re.compile(r"/(?P<app>[^/]+(?:/[^/]+)+?)/requests/(?P<id>[^/]+)(?P<verb>/.*)?")


class Operation(StrEnum):
    """The operation that a target stands for, in fal-client's terms."""

    RUN = "run"
    STREAM = "stream"
    SUBMIT = "submit"
    STATUS = "status"
    STATUS_STREAM = "status_stream"
    RESULT = "result"
    CANCEL = "cancel"
    ICE = "ice"
    SESSION = "session"
    HEARTBEAT = "heartbeat"
    OTHER = "other"


# Operations that run a model, which costs money.
MODEL_CALLS = (Operation.RUN, Operation.STREAM, Operation.SUBMIT)
# Paths of the host of live video, decoded, without a trailing slash.
LIVE_PATHS = {
    "/ice": Operation.ICE,
    "/session": Operation.SESSION,
    "/session/heartbeat": Operation.HEARTBEAT,
}
# Calls of live video that name an endpoint.
LIVE_MODEL_CALLS = (Operation.ICE, Operation.SESSION)
REQUEST_OPERATIONS = {
    "": Operation.RESULT,
    "/response": Operation.RESULT,
    "/status": Operation.STATUS,
    "/status/stream": Operation.STATUS_STREAM,
    "/cancel": Operation.CANCEL,
}


@dataclass(frozen=True)
class Target:
    """A checked fal URL.

    host: lower case.
    path: exactly as sent; starts with a slash.
    query: exactly as sent; empty, or starts with a question mark.
    is_ambiguous: other servers may read another path. It was allowed by its exact text.
    live_endpoint: the endpoint id of a call of live video, which only its body names.
    """

    host: str
    path: str
    query: str
    is_ambiguous: bool = False
    live_endpoint: str | None = None

    @cached_property
    def operation(self) -> Operation:
        """Return the operation that the URL stands for, regardless of the method."""
        if self.host == LIVE_HOST:
            return LIVE_PATHS.get(unquote(self.path).rstrip("/"), Operation.OTHER)
        if self.host == RUN_HOST:
            if self.live_endpoint is not None:
                return Operation.ICE
            return Operation.STREAM if self.path.endswith("/stream") else Operation.RUN
        if self.host != QUEUE_HOST:
            return Operation.OTHER
        if self._request is None:
            return Operation.SUBMIT
        return REQUEST_OPERATIONS.get(self._request["verb"] or "", Operation.OTHER)

    @cached_property
    def request_id(self) -> str | None:
        """Return the decoded id of the queued request in the URL, or None."""
        return unquote(self._request["id"]) if self._request else None

    @cached_property
    def endpoint(self) -> str | None:
        """Return the endpoint id, or None if the target is not a model. For a queued request it is
        the owner and alias only, since fal leaves out the sub-path."""
        if self.live_endpoint is not None or self.host not in (RUN_HOST, QUEUE_HOST):
            return self.live_endpoint
        if self._request is not None:
            return self._request["app"]
        return self.path.strip("/").removesuffix("/stream")

    @cached_property
    def _request(self) -> re.Match[str] | None:
        return REQUEST_PATH.fullmatch(self.path) if self.host == QUEUE_HOST else None


def parse_target(value: str, listed: Collection[str] = ()) -> Target:
    """Parse the value of the header. Results are cached, since clients poll the same target many
    times a second.

    listed: hosts with paths that are allowed as they stand, even if they are ambiguous.

    Raises: ProxyError 412 `target_not_fal`, not a valid https URL of fal, or an ambiguous one.
    """
    target = _parse_cached(value) if len(value) <= CACHED_LENGTH_MAX else _parse_uncached(value)
    if target.is_ambiguous and target.host + target.path not in listed:
        raise invalid_target("its path is not in plain form")
    return target


def _parse_uncached(value: str) -> Target:
    location, mark, query_text = value.partition("?")
    is_text = URL_TEXT.fullmatch(location) and not BROKEN_ESCAPE.search(location)
    match = URL_PARTS.fullmatch(location) if is_text and QUERY_TEXT.fullmatch(query_text) else None
    if match is None or match["scheme"].lower() != "https":
        raise invalid_target("it is not a valid https URL")
    path, query = match["path"] or "/", mark + query_text
    if has_token(query):
        raise invalid_target("it carries a token of its own")
    host = parse_host(match["authority"])
    if host == QUEUE_HOST and hides_request_id(path):
        raise invalid_target("its path names a request in an unusual form")
    return Target(host, path, query, is_ambiguous(path))


_parse_cached = lru_cache(CACHE_SIZE)(_parse_uncached)


def parse_host(authority: str) -> str:
    """Return the host of a URL's authority, in lower case. Raises: ProxyError 412."""
    host = authority.lower().removesuffix(":443")
    if not HOST.fullmatch(host) or not host_matches(host, FAL_HOSTS):
        raise invalid_target("its host is not fal's")
    return host


def host_matches(host: str, patterns: tuple[str, ...]) -> bool:
    """Return whether a lower-case host matches a pattern; `*.` stands for one or more labels."""
    return any(
        host.endswith(pattern[1:]) if pattern.startswith("*.") else host == pattern
        for pattern in patterns
    )


def is_ambiguous(path: str) -> bool:
    """Return whether a path changes when it is decoded or its dot segments are resolved."""
    segments = [unquote_to_bytes(segment) for segment in path[1:].split("/")]
    is_denormalized = NEEDLESS_ESCAPE.search(path) is not None or b"" in segments[:-1]
    return is_denormalized or any(
        segment in (b".", b"..") or AMBIGUOUS_SEGMENT.search(segment) for segment in segments
    )


def hides_request_id(path: str) -> bool:
    """Return whether a path contains `requests` in another form than
    `<owner>/<alias>.../requests/<id>`, such that servers may read different request ids from it."""
    matches = [segment for segment in path.lower().split("/") if segment == REQUESTS]
    return bool(matches) and (len(matches) > 1 or not REQUEST_PATH.fullmatch(path))


def has_token(query: str) -> bool:
    """Return whether a query has fal's token parameter, which fal would accept in place of our
    key."""
    names = (pair.partition("=")[0] for pair in re.split("[&;]", query[1:]))
    return any(unquote_to_bytes(name).lower() == b"fal_jwt_token" for name in names)


def invalid_target(reason: str) -> ProxyError:
    return ProxyError(412, "target_not_fal", f"The target must be a fal.ai URL: {reason}.")
