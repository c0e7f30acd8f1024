"""`/api/usage` and `/metrics`: what the ledger and the metrics tell, to those who may know."""

import asyncio
import json
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass

from aiohttp import hdrs, web

from falproxy.errors import ProxyError
from falproxy.metrics import (
    OWN_BOUNDS,
    UPSTREAM_BOUNDS,
    WORKER_SNAPSHOTS,
    HistogramData,
    Metrics,
    Snapshot,
    merge_histograms,
    merge_snapshots,
    quantile,
)
from falproxy.proxy.call import OWNER, PRINCIPAL
from falproxy.stores.ledger import GroupBy, Ledger, LedgerError
from falproxy.stores.ledger.reports import (
    Json,
    TimeRange,
    check_series_length,
    format_time,
    latest_calls,
    parse_group_by,
    parse_time_range,
    usage_summary,
    usage_table,
)

logger = logging.getLogger(__name__)

DEFAULT_SINCE = "24h"
QUANTILES = {"p50": 0.5, "p95": 0.95, "p99": 0.99}
JWT_PREFIX, KEY_PREFIX, HOOK_PREFIX = "jwt", "key", "hook"
# An answer is given again for so long, and for so many times the seconds that it took: whoever
# watches, and however much there is to add up, it is never more than a twentieth of a processor.
TTL_MIN = 1.0
TTL_FACTOR = 20
CACHE_SIZE = 100
NO_STORE_HEADERS = {hdrs.CACHE_CONTROL: "no-store"}


@dataclass(frozen=True, slots=True)
class Visibility:
    """Who may know what. admins: who know all, by FALPROXY_ADMINS. holders: the names of access
    keys. is_locked: whether callers say who they are; where they do not, all know all."""

    auth_required: bool
    admins: tuple[str, ...]
    key_names: frozenset[str]

    def can_see_all(self, request: web.Request) -> bool:
        """A name in a token is not taken for that of a key: it is `jwt:` and its `sub`."""
        if not self.auth_required:
            return True
        way, _, name = request[OWNER].partition(":")
        if way == JWT_PREFIX:
            return request[OWNER] in self.admins
        return way in (KEY_PREFIX, HOOK_PREFIX) and name in self.admins

    def require_admin(self, request: web.Request) -> None:
        """Raises: ProxyError 403 `not_an_admin`."""
        if not self.can_see_all(request):
            raise ProxyError(
                403,
                "not_an_admin",
                "Everybody's numbers are for those whom FALPROXY_ADMINS names.",
            )

    def visible_principal(self, request: web.Request) -> str | None:
        """Whose calls a caller may know of; None for everybody's. Raises: ProxyError 403
        `name_taken`, the ledger has the calls of another one by that name."""
        if self.can_see_all(request):
            return None
        principal = request[PRINCIPAL]
        if principal in self.key_names and request[OWNER] != f"{KEY_PREFIX}:{principal}":
            raise ProxyError(
                403, "name_taken", "An access key has your name, so your calls are not told apart."
            )
        return principal


class TtlCache:
    """Answers that are given again for a while. Those who ask at the same time get the same."""

    def __init__(self) -> None:
        self._entries: dict[object, tuple[float, asyncio.Future[bytes]]] = {}

    async def get(self, cache_key: object, compute: Callable[[], Awaitable[bytes]]) -> bytes:
        now = time.monotonic()
        self._entries = {key: kept for key, kept in self._entries.items() if kept[0] > now}
        if cache_key in self._entries:
            return await asyncio.shield(self._entries[cache_key][1])
        if len(self._entries) >= CACHE_SIZE:
            return await compute()
        making = asyncio.ensure_future(self._compute(cache_key, compute))
        self._entries[cache_key] = (float("inf"), making)
        return await asyncio.shield(making)

    async def _compute(self, cache_key: object, compute: Callable[[], Awaitable[bytes]]) -> bytes:
        started = time.monotonic()
        lasts = 0.0
        try:
            made = await compute()
            lasts = max(TTL_MIN, TTL_FACTOR * (time.monotonic() - started))
            return made
        finally:
            _, making = self._entries[cache_key]
            self._entries[cache_key] = (time.monotonic() + lasts, making)


class UsageHandlers:
    """Handlers for what is known of the calls."""

    def __init__(self, ledger: Ledger, metrics: Metrics, visibility: Visibility) -> None:
        self._ledger = ledger
        self._metrics = metrics
        self._visibility = visibility
        self._cache = TtlCache()

    async def get_usage(self, request: web.Request) -> web.Response:
        """Handler for GET of `/api/usage`. Raises: ProxyError 400, 403, 503."""
        principal = self._visibility.visible_principal(request)
        words = tuple(request.query.get(name) for name in ("since", "until", "by"))
        parse_query(*words)

        async def answer() -> bytes:
            return json.dumps(await self._query(words, principal)).encode()

        try:
            told = await self._cache.get((words, principal), answer)
        except LedgerError as error:
            logger.info("The ledger was not read: %s", error)
            message = "The ledger cannot be read for now; calls go on."
            raise ProxyError(503, "ledger_away", message, {"Retry-After": "5"}) from error
        is_all = principal is None and words[-1] is None
        live = live_metrics(await merged_snapshot(request, self._metrics)) if is_all else None
        body = told if words[-1] else b'%b, "live": %b}' % (told[:-1], json.dumps(live).encode())
        response = web.Response(
            body=body, content_type="application/json", headers=NO_STORE_HEADERS
        )
        response.enable_compression()
        return response

    async def get_metrics(self, request: web.Request) -> web.Response:
        """Handler for GET of `/metrics`. Raises: ProxyError 403."""
        from falproxy.web.prometheus import render_metrics  # with Prometheus's own library

        self._visibility.require_admin(request)
        snapshot = await merged_snapshot(request, self._metrics)
        page, kind = render_metrics(snapshot, request.headers.get(hdrs.ACCEPT, ""))
        response = web.Response(body=page, headers={**NO_STORE_HEADERS, hdrs.CONTENT_TYPE: kind})
        response.enable_compression()
        return response

    async def _query(self, parameters: tuple[str | None, ...], principal: str | None) -> Json:
        span, by = parse_query(*parameters)
        if by is not None:
            return await usage_table(self._ledger, span, by, principal)
        shown = await usage_summary(self._ledger, span, principal)
        return {**shown, "latest": await latest_calls(self._ledger, span, principal)}


def parse_query(
    since: str | None, until: str | None, by: str | None
) -> tuple[TimeRange, GroupBy | None]:
    """Raises: ProxyError 400 `query_invalid`."""
    try:
        span = parse_time_range(since if since is not None else DEFAULT_SINCE, until, time.time())
        found = None if by is None else parse_group_by(by)
        check_series_length(span, found)
    except ValueError as error:
        raise ProxyError(400, "query_invalid", f"The query's {error}.") from error
    return span, found


def live_metrics(snapshot: Snapshot) -> Json:
    """What is known of now, and since the processes began: the ledger has no percentiles."""
    began = snapshot["process"].get("process_start_time_seconds")
    return {
        "since": None if began is None else format_time(began),
        "in_progress": snapshot["in_progress"],
        "requests": sum(snapshot["requests"].values()),
        "own_seconds": percentiles(snapshot["own_seconds"], OWN_BOUNDS),
        "upstream_seconds": percentiles(snapshot["upstream_seconds"], UPSTREAM_BOUNDS),
    }


def percentiles(timings: Mapping[str, HistogramData], bounds: Sequence[float]) -> list[Json]:
    """Percentiles by operation, and of all of them together, which has no name."""
    everything = merge_histograms(timings.values())
    named = [*sorted(timings.items()), *([("", everything)] if everything else [])]
    return [
        {
            "operation": operation,
            "count": sum(timing["counts"]),
            **{name: quantile(timing, bounds, share) for name, share in QUANTILES.items()},
        }
        for operation, timing in named
    ]


async def merged_snapshot(request: web.Request, metrics: Metrics) -> Snapshot:
    """The metrics of all processes that serve this address."""
    siblings = request.app.get(WORKER_SNAPSHOTS)
    others = await siblings() if siblings is not None else ()
    return merge_snapshots([metrics.snapshot(), *others])
