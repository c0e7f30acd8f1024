"""`/api/usage` and `/metrics`: reports from the ledger and the metrics, with access control."""

import json
import logging
import time
from collections.abc import Callable, Coroutine, Hashable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple

from aiohttp import hdrs, web
from cachetools import TLRUCache

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
from falproxy.shared_tasks import SharedTasks
from falproxy.stores.keys.known_keys import MANAGED_KEY_METHOD, KnownKeys
from falproxy.stores.ledger import Ledger, LedgerError
from falproxy.stores.ledger.reports import (
    Json,
    Page,
    TableBy,
    TimeRange,
    check_series_length,
    format_time,
    latest_calls,
    parse_group_by,
    parse_page,
    parse_time_range,
    start_rows,
    usage_summary,
    usage_table,
)

logger = logging.getLogger(__name__)

DEFAULT_SINCE = "24h"
QUANTILES = {"p50": 0.5, "p95": 0.95, "p99": 0.99}
JWT_PREFIX, KEY_PREFIX, HOOK_PREFIX = "jwt", "key", "hook"
# A report is cached for TTL_MIN seconds, or TTL_FACTOR times the seconds of its computation if that
# is longer. Hence it takes at most a twentieth of a processor, however often it is requested.
TTL_MIN = 1.0
TTL_FACTOR = 20
CACHE_MAX_BYTES = 16 * 2**20  # of all reports
REPORT_MIN_BYTES = 2**16  # so that the bound on bytes is one on the number of reports as well
NO_STORE_HEADERS = {hdrs.CACHE_CONTROL: "no-store"}


@dataclass(frozen=True, slots=True)
class Visibility:
    """Access to usage reports.

    auth_required: False gives every caller access to all reports.
    admins: callers with access to all reports (FALPROXY_ADMINS).
    key_names: names of the access keys.
    known_keys: keys that are made at run time. They have no access to the reports of all callers,
        whatever their names are.
    """

    auth_required: bool
    admins: tuple[str, ...]
    key_names: frozenset[str]
    known_keys: KnownKeys | None = None

    def can_see_all(self, request: web.Request) -> bool:
        """Return whether the caller has access to all reports. FALPROXY_ADMINS lists the subjects
        of tokens as `jwt:sub`, so that they cannot be confused with names of access keys."""
        if not self.auth_required:
            return True
        prefix, _, name = request[OWNER].partition(":")
        if prefix == JWT_PREFIX:
            return request[OWNER] in self.admins
        return prefix in (KEY_PREFIX, HOOK_PREFIX) and name in self.admins

    def require_admin(self, request: web.Request) -> None:
        """Raises: ProxyError 403 `not_an_admin`."""
        if not self.can_see_all(request):
            raise ProxyError(
                403,
                "not_an_admin",
                "Only the callers in FALPROXY_ADMINS have access to the numbers of all callers.",
            )

    def visible_principal(self, request: web.Request) -> str | None:
        """Return the principal whose calls the caller may see; None for all.

        Raises: ProxyError 403 `name_taken`, the ledger has calls of another caller of this name.
        """
        if self.can_see_all(request):
            return None
        principal = request[PRINCIPAL]
        prefix = request[OWNER].partition(":")[0]
        is_managed = self.known_keys is not None and principal in self.known_keys.names
        if (principal in self.key_names and prefix != KEY_PREFIX) or (
            is_managed and prefix not in (KEY_PREFIX, MANAGED_KEY_METHOD)
        ):
            message = "An access key has your name, so the ledger mixes your calls with its own."
            raise ProxyError(403, "name_taken", message)
        return principal


class CachedReport(NamedTuple):
    body: bytes
    expires_at: float


class TtlCache:
    """Cached reports. Concurrent requests for the same report share its computation."""

    def __init__(self) -> None:
        self._reports: TLRUCache[Hashable, CachedReport] = TLRUCache(
            CACHE_MAX_BYTES,
            lambda _key, report, _now: report.expires_at,
            getsizeof=lambda report: REPORT_MIN_BYTES + len(report.body),
        )
        self._tasks = SharedTasks[Hashable, bytes]()

    def __repr__(self) -> str:
        return f"<TtlCache {len(self._reports)} reports, {self._tasks}>"

    async def get(
        self, cache_key: Hashable, compute: Callable[[], Coroutine[object, object, bytes]]
    ) -> bytes:
        """Return the cached report, or compute it. Raises: the exception of `compute`."""
        report: CachedReport | None = self._reports.get(cache_key)
        if report is not None:
            return report.body
        return await self._tasks.run(cache_key, lambda: self._compute(cache_key, compute))

    async def _compute(
        self, cache_key: Hashable, compute: Callable[[], Coroutine[object, object, bytes]]
    ) -> bytes:
        started = time.monotonic()
        body = await compute()
        now = time.monotonic()
        ttl = max(TTL_MIN, TTL_FACTOR * (now - started))
        with suppress(ValueError):  # larger than the whole cache
            self._reports[cache_key] = CachedReport(body, now + ttl)
        return body


class UsageParameters(NamedTuple):
    """The query of a request for usage, as it was sent."""

    since: str | None
    until: str | None
    by: str | None
    limit: str | None
    offset: str | None

    def parse(self) -> tuple[TimeRange, TableBy | None, Page]:
        """Raises: ProxyError 400 `query_invalid`."""
        since = DEFAULT_SINCE if self.since is None else self.since
        try:
            time_range = parse_time_range(since, self.until, time.time())
            group_by = None if self.by is None else parse_group_by(self.by)
            check_series_length(time_range, group_by)
            page = parse_page(self.limit, self.offset)
        except ValueError as error:
            raise ProxyError(400, "query_invalid", f"The query's {error}.") from error
        return time_range, group_by, page


class UsageHandlers:
    def __init__(self, ledger: Ledger, metrics: Metrics, visibility: Visibility) -> None:
        self._ledger = ledger
        self._metrics = metrics
        self._visibility = visibility
        self._cache = TtlCache()

    async def get_usage(self, request: web.Request) -> web.Response:
        """Handler for GET of `/api/usage`. Raises: ProxyError 400, 403, 503."""
        principal = self._visibility.visible_principal(request)
        parameters = UsageParameters(*map(request.query.get, UsageParameters._fields))
        page = parameters.parse()[2]

        async def compute_report() -> bytes:
            return json.dumps(await self._query(parameters, principal)).encode()

        try:
            body = await self._cache.get((*parameters[:3], page, principal), compute_report)
        except LedgerError as error:
            logger.info("The ledger was not read: %s", error)
            message = "The ledger cannot be read now; calls are not affected."
            raise ProxyError(503, "ledger_away", message, {"Retry-After": "5"}) from error
        if parameters.by is None:
            live = None
            if principal is None:
                live = live_metrics(await merged_snapshot(request, self._metrics))
            body = b'%b, "live": %b}' % (body[:-1], json.dumps(live).encode())
        response = web.Response(
            body=body, content_type="application/json", headers=NO_STORE_HEADERS
        )
        response.enable_compression()
        return response

    async def get_metrics(self, request: web.Request) -> web.Response:
        """Handler for GET of `/metrics`. Raises: ProxyError 403."""
        from falproxy.web.prometheus import render_metrics  # imports prometheus_client

        self._visibility.require_admin(request)
        snapshot = await merged_snapshot(request, self._metrics)
        body, content_type = render_metrics(snapshot, request.headers.get(hdrs.ACCEPT, ""))
        headers = {**NO_STORE_HEADERS, hdrs.CONTENT_TYPE: content_type}
        response = web.Response(body=body, headers=headers)
        response.enable_compression()
        return response

    async def _query(self, parameters: UsageParameters, principal: str | None) -> Json:
        time_range, group_by, page = parameters.parse()
        if group_by is not None:
            return await usage_table(self._ledger, time_range, group_by, principal, page)
        summary = await usage_summary(self._ledger, time_range, principal)
        latest = await latest_calls(self._ledger, time_range, principal)
        is_admin = principal is None
        starts = await start_rows(self._ledger, time_range) if is_admin else None
        return {**summary, "latest": latest, "starts": starts}


def live_metrics(snapshot: Snapshot) -> Json:
    """Return metrics that the ledger does not have: requests in progress, and percentiles since the
    start of the processes."""
    started_at = snapshot["process"].get("process_start_time_seconds")
    return {
        "since": None if started_at is None else format_time(started_at),
        "in_progress": snapshot["in_progress"],
        "requests": sum(snapshot["requests"].values()),
        "own_seconds": percentiles(snapshot["own_seconds"], OWN_BOUNDS),
        "upstream_seconds": percentiles(snapshot["upstream_seconds"], UPSTREAM_BOUNDS),
    }


def percentiles(timings: Mapping[str, HistogramData], bounds: Sequence[float]) -> list[Json]:
    """Return the percentiles of each operation, and those of all requests with an empty name."""
    merged = merge_histograms(timings.values())
    histograms = [*sorted(timings.items()), *([("", merged)] if merged else [])]
    return [
        {
            "operation": operation,
            "count": sum(histogram["counts"]),
            **{name: quantile(histogram, bounds, share) for name, share in QUANTILES.items()},
        }
        for operation, histogram in histograms
    ]


async def merged_snapshot(request: web.Request, metrics: Metrics) -> Snapshot:
    other_workers = request.app.get(WORKER_SNAPSHOTS)
    snapshots = await other_workers() if other_workers is not None else ()
    return merge_snapshots([metrics.snapshot(), *snapshots])
