"""`x-fal-target-url` read into a checked target, and what a target asks fal for."""

import re
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property, lru_cache
from urllib.parse import unquote, unquote_to_bytes

from falproxy.errors import ProxyError

FAL_HOSTS = ("fal.run", "*.fal.run", "fal.ai", "*.fal.ai")
QUEUE_HOST = "queue.fal.run"
RUN_HOST = "fal.run"

# Visible ASCII but for the characters that RFC 3986 keeps out of URLs. A fragment is never sent
# and would only hide what follows it, so "#" is out as well.
URL_TEXT = re.compile(r"[!$-;=?-\[\]_a-z~]+")
URL_PARTS = re.compile(
    r"(?P<scheme>[^:/?#]+)://(?P<authority>[^/?]*)(?P<path>/[^?]*)?(?P<query>\?.*)?"
)
LABEL = r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?"
HOST = re.compile(rf"{LABEL}(?:\.{LABEL})+")
BROKEN_ESCAPE = re.compile(r"%(?![0-9A-Fa-f]{2})")
# What a path segment must not hold once decoded: it would mean another path to somebody who
# decodes once more, or strips `;parameters`, than it does to us.
AMBIGUOUS_SEGMENT = re.compile(rb"[\x00-\x1f\x7f/\\;?#%]")
# Escapes of characters that need none: fal decodes them, and they would hide a word from us.
NEEDLESS_ESCAPE = re.compile(r"%(?:2[dDeE]|3[0-9]|[46][1-9a-fA-F]|[57][0-9aA]|5[fF]|7[eE])")
REQUESTS = "requests"
# How many targets are remembered, and how long they may be.
CACHE_SIZE, CACHED_LENGTH_MAX = 4096, 512
REQUEST_PATH = re.compile(r"/(?P<app>[^/]+(?:/[^/]+)+?)/requests/(?P<id>[^/]+)(?P<verb>/.*)?")


class Operation(StrEnum):
    """What a call asks of fal (fal-client's own words for it)."""

    RUN = "run"
    STREAM = "stream"
    SUBMIT = "submit"
    STATUS = "status"
    STATUS_STREAM = "status_stream"
    RESULT = "result"
    CANCEL = "cancel"
    OTHER = "other"


# What makes a job, which costs money.
MODEL_CALLS = (Operation.RUN, Operation.STREAM, Operation.SUBMIT)
REQUEST_OPERATIONS = {
    "": Operation.RESULT,
    "/response": Operation.RESULT,
    "/status": Operation.STATUS,
    "/status/stream": Operation.STATUS_STREAM,
    "/cancel": Operation.CANCEL,
}


@dataclass(frozen=True)
class Target:
    """A checked fal URL: `host` in lower case, `path` and `query` byte for byte as sent.

    path: starts with a slash. query: empty, or starts with a question mark.
    """

    host: str
    path: str
    query: str

    @cached_property
    def operation(self) -> Operation:
        """What the URL stands for, whatever the method."""
        if self.host == RUN_HOST:
            return Operation.STREAM if self.path.endswith("/stream") else Operation.RUN
        if self.host != QUEUE_HOST:
            return Operation.OTHER
        if self._request is None:
            return Operation.SUBMIT
        return REQUEST_OPERATIONS.get(self._request["verb"] or "", Operation.OTHER)

    @cached_property
    def request_id(self) -> str | None:
        """The id of the queued request that the URL names, decoded."""
        return unquote(self._request["id"]) if self._request else None

    @cached_property
    def endpoint(self) -> str | None:
        """The endpoint id; its owner and alias only where the URL names a request (fal drops
        the sub-path there). None where the target is no model."""
        if self.host not in (RUN_HOST, QUEUE_HOST):
            return None
        if self._request is not None:
            return self._request["app"]
        return self.path.strip("/").removesuffix("/stream")

    @cached_property
    def _request(self) -> re.Match[str] | None:
        return REQUEST_PATH.fullmatch(self.path) if self.host == QUEUE_HOST else None


def parse_target(value: str) -> Target:
    """The target that a header names. Clients poll the same one many times a second, so that what
    was found out about it is remembered.

    Raises: ProxyError 412 `target_not_fal`: not a valid https URL of fal, or one that would mean
    something else to whoever decodes it once more.
    """
    return _parse_cached(value) if len(value) <= CACHED_LENGTH_MAX else _parse_uncached(value)


def _parse_uncached(value: str) -> Target:
    is_text = URL_TEXT.fullmatch(value) and not BROKEN_ESCAPE.search(value)
    match = URL_PARTS.fullmatch(value) if is_text else None
    if match is None or match["scheme"].lower() != "https":
        raise invalid_target("it is not a valid https URL")
    path, query = match["path"] or "/", match["query"] or ""
    if is_ambiguous(path):
        raise invalid_target("its path is not in plain form")
    if has_token(query):
        raise invalid_target("it carries a token of its own")
    host = parse_host(match["authority"])
    if host == QUEUE_HOST and hides_request_id(path):
        raise invalid_target("its path names a request in an odd way")
    return Target(host, path, query)


_parse_cached = lru_cache(CACHE_SIZE)(_parse_uncached)


def parse_host(authority: str) -> str:
    """The host of a URL's authority, in lower case. Raises: ProxyError 412, as parse_target."""
    host = authority.lower().removesuffix(":443")
    if not HOST.fullmatch(host) or not host_matches(host, FAL_HOSTS):
        raise invalid_target("its host is not fal's")
    return host


def host_matches(host: str, patterns: tuple[str, ...]) -> bool:
    """Whether a lower-case host is one of the patterns; `*.` stands for one label or more."""
    return any(
        host.endswith(pattern[1:]) if pattern.startswith("*.") else host == pattern
        for pattern in patterns
    )


def is_ambiguous(path: str) -> bool:
    """Whether a path changes its meaning when it is decoded or its dot segments are resolved."""
    segments = [unquote_to_bytes(segment) for segment in path[1:].split("/")]
    is_odd = NEEDLESS_ESCAPE.search(path) is not None or b"" in segments[:-1]
    return is_odd or any(
        segment in (b".", b"..") or AMBIGUOUS_SEGMENT.search(segment) for segment in segments
    )


def hides_request_id(path: str) -> bool:
    """Whether a path speaks of queued requests other than as `<owner>/<alias>.../requests/<id>`:
    whose request it means must not depend on who reads it."""
    named = [segment for segment in path.lower().split("/") if segment == REQUESTS]
    return bool(named) and (len(named) > 1 or not REQUEST_PATH.fullmatch(path))


def has_token(query: str) -> bool:
    """Whether a query holds fal's token parameter, which would stand in for our key."""
    names = (pair.partition("=")[0] for pair in query[1:].split("&"))
    return any(unquote_to_bytes(name).lower() == b"fal_jwt_token" for name in names)


def invalid_target(reason: str) -> ProxyError:
    return ProxyError(412, "target_not_fal", f"The target must be a fal.ai URL: {reason}.")
