"""Rules of the result cache: cacheable calls, storable responses, and headers of the cache key."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache

from multidict import MultiMapping

from falproxy.fal.policy import MATCH_LENGTH_MAX, Globs, app_globs, normalized_path
from falproxy.fal.target import CACHE_SIZE, Operation, Target
from falproxy.json_object import parse_object

# Request headers of fal that change how a call is made, but not its result. All others with one of
# the prefixes are taken to change the result.
FAL_HEADER_PREFIXES = ("x-fal-", "x-app-fal-")
IGNORED_HEADERS = frozenset({
    "x-fal-client-proxy", "x-fal-no-retry", "x-fal-queue-priority", "x-fal-request-timeout",
    "x-fal-retry-config", "x-fal-runner-hint", "x-fal-store-io", "x-fal-tags", "x-fal-target-url",
})  # fmt: skip
STORE_IO = "x-fal-store-io"
STORE_IO_ENABLED = ("1", "true", "yes")
CACHEABLE_OPERATIONS = (Operation.RUN, Operation.SUBMIT)
MAX_AGE_MAX = 2.0**31
DIRECTIVE = re.compile(r"""([\w-]+)(?:=("?)(\d+)\2)?""")


@dataclass(frozen=True, slots=True)
class CacheControl:
    """Directives of a request's `Cache-Control` (RFC 9111 §5.2.1).

    max_age: maximum age of a result in seconds; 0 requests a new one, None accepts any age.
    """

    no_store: bool = False
    only_if_cached: bool = False
    max_age: float | None = None


def parse_cache_control(lines: Iterable[str]) -> CacheControl:
    directives: dict[str, str] = {}
    for match in DIRECTIVE.finditer(",".join(lines).lower()):
        directives.setdefault(match[1], match[3] or "")
    max_age = directives.get("max-age", "")
    return CacheControl(
        no_store="no-store" in directives,
        only_if_cached="only-if-cached" in directives,
        max_age=0.0 if "no-cache" in directives else parse_max_age(max_age),
    )


def parse_max_age(digits: str) -> float | None:
    """Return seconds, None for an empty string. Larger numbers count as MAX_AGE_MAX (RFC 9111
    §1.2.2)."""
    return min(float(digits), MAX_AGE_MAX) if digits else None


def vary_headers(headers: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    """Return the request headers that change the result of a call."""
    return tuple(
        (name.lower(), value)
        for name, value in headers.items()
        if name.lower().startswith(FAL_HEADER_PREFIXES) and name.lower() not in IGNORED_HEADERS
    )


class CacheEligibility:
    """Decides which calls use the cache. endpoints: glob patterns of endpoint ids."""

    def __init__(self, endpoints: Iterable[str]) -> None:
        self._endpoints = Globs(endpoints)
        self._matches = lru_cache(CACHE_SIZE)(self._endpoints.match)  # of paths up to 200 bytes
        self._apps = app_globs(self._endpoints)

    def is_cacheable(self, target: Target) -> bool:
        """Return whether the result of such a call can be reused at all."""
        if target.operation not in CACHEABLE_OPERATIONS:
            return False
        path = normalized_path(target).strip("/")
        return len(path) <= MATCH_LENGTH_MAX and self._matches(path)

    def bypass_reason(self, target: Target, headers: MultiMapping[str]) -> str | None:
        """Return a word for the reason why a call must not share its result, or None if it may."""
        if target.query:
            return "webhook" if "fal_webhook" in target.query else "query"
        return storing_refusal(headers)

    def is_cacheable_app(self, target: Target) -> bool:
        """Return whether a queued request may belong to a cacheable call. The URL of a queued
        request has the app only, without the rest of the endpoint id."""
        return self._apps.match(target.endpoint or "")


def storing_refusal(headers: MultiMapping[str]) -> str | None:
    """Return a word for the header by which a client forbids that its call is stored, or None."""
    if any(line.strip().lower() not in STORE_IO_ENABLED for line in headers.getall(STORE_IO, ())):
        return "store-io"
    if parse_cache_control(headers.getall("cache-control", ())).no_store:
        return "no-store"
    return None


def is_storable(status: int, body: bytes) -> bool:
    """Return whether a response is a result of the model, without an error, and not flagged by the
    safety checker."""
    if status != 200:
        return False
    output = parse_object(body)
    if output is None or output.get("error") or output.get("detail"):
        return False
    nsfw_flags = output.get("has_nsfw_concepts")
    return not (any(nsfw_flags) if isinstance(nsfw_flags, list) else nsfw_flags)
