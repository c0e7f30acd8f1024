"""Which calls may share a result, and which answers are kept."""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache

from multidict import MultiMapping

from falproxy.errors import ProxyError
from falproxy.fal.policy import MATCH_LENGTH_MAX, Globs, app_globs, normalized_path
from falproxy.fal.target import CACHE_SIZE, Operation, Target, parse_target

# Headers to fal that say how a call is made, and nothing about what comes back. Any other of fal's
# headers is taken to change the result.
FAL_HEADER_PREFIXES = ("x-fal-", "x-app-fal-")
IGNORED_HEADERS = frozenset({
    "x-fal-client-proxy", "x-fal-no-retry", "x-fal-queue-priority", "x-fal-request-timeout",
    "x-fal-retry-config", "x-fal-runner-hint", "x-fal-store-io", "x-fal-tags", "x-fal-target-url",
})  # fmt: skip
STORE_IO = "x-fal-store-io"
STORE_IO_ENABLED = ("1", "true", "yes")
CACHEABLE_OPERATIONS = (Operation.RUN, Operation.SUBMIT)
DIRECTIVE = re.compile(r"""([\w-]+)(?:=("?)(\d+)\2)?""")


@dataclass(frozen=True, slots=True)
class CacheControl:
    """What a request's `Cache-Control` asks for (RFC 9111 §5.2.1). max_age: seconds that a result
    may have been kept for; 0 asks for a new one. None: any age will do."""

    no_store: bool = False
    only_if_cached: bool = False
    max_age: float | None = None


def parse_cache_control(lines: Iterable[str]) -> CacheControl:
    found: dict[str, str] = {}
    for match in DIRECTIVE.finditer(",".join(lines).lower()):
        found.setdefault(match[1], match[3] or "")
    max_age = found.get("max-age", "")
    return CacheControl(
        no_store="no-store" in found,
        only_if_cached="only-if-cached" in found,
        max_age=0.0 if "no-cache" in found else float(max_age) if max_age else None,
    )


def vary_headers(headers: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    """Those of a call's headers that its result depends on."""
    return tuple(
        (name.lower(), value)
        for name, value in headers.items()
        if name.lower().startswith(FAL_HEADER_PREFIXES) and name.lower() not in IGNORED_HEADERS
    )


class CacheEligibility:
    """The endpoints whose results are reused. endpoints: patterns of their ids."""

    def __init__(self, endpoints: Iterable[str]) -> None:
        self._endpoints = Globs(endpoints)
        self._matches = lru_cache(CACHE_SIZE)(self._endpoints.match)
        self._apps = app_globs(self._endpoints)

    def is_cacheable(self, method: str, target: Target) -> bool:
        """Whether a call is one whose result could be reused."""
        if method != "POST" or target.operation not in CACHEABLE_OPERATIONS:
            return False
        path = normalized_path(target).strip("/")
        return len(path) <= MATCH_LENGTH_MAX and self._matches(path)

    def bypass_reason(self, target: Target, headers: MultiMapping[str]) -> str | None:
        """One word for why a call must be made for itself, None where nothing speaks against
        sharing its result."""
        if target.query:
            return "webhook" if "fal_webhook" in target.query else "query"
        if any(
            line.strip().lower() not in STORE_IO_ENABLED for line in headers.getall(STORE_IO, ())
        ):
            return "store-io"
        if parse_cache_control(headers.getall("cache-control", ())).no_store:
            return "no-store"
        return None

    def is_cacheable_app(self, target: Target) -> bool:
        """Whether a queued request may be of such a call: its URL only names the app."""
        return self._apps.match(target.endpoint or "")


def is_storable(status: int, body: bytes) -> bool:
    """Whether an answer is kept: a result of the model's, without an error, which the safety
    checker has let pass."""
    if status != 200:
        return False
    try:
        output = json.loads(body)
    except (ValueError, RecursionError):
        return False
    if not isinstance(output, dict) or output.get("error") or output.get("detail"):
        return False
    flags = output.get("has_nsfw_concepts")
    return not (any(flags) if isinstance(flags, list) else flags)


def parse_submit_response(body: bytes) -> tuple[str, str | None] | None:
    """The id of the request that fal's answer to a submit speaks of, and the app in its URLs."""
    try:
        answer = json.loads(body)
    except (ValueError, RecursionError):
        return None
    request_id = answer.get("request_id") if isinstance(answer, dict) else None
    if not isinstance(request_id, str):
        return None
    try:
        target = parse_target(str(answer.get("status_url")))
    except ProxyError:
        return request_id, None
    return request_id, target.endpoint if target.request_id == request_id else None
