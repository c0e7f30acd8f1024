"""`/api/usage/calls`, `/api/usage/performance` and `/api/usage/state`: what an operator asks in an
incident."""

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Hashable, Mapping
from dataclasses import replace
from typing import NamedTuple

from aiohttp import hdrs, web

from falproxy.errors import ProxyError
from falproxy.metrics import WORKER_SNAPSHOTS, Metrics, Snapshot, merge_snapshots
from falproxy.stores.ledger import Ledger, LedgerError
from falproxy.stores.ledger.call_list import CallQuery, ListedCall, list_calls
from falproxy.stores.ledger.call_reports import (
    FILTERS,
    call_page_json,
    calls_csv,
    csv_head,
    parse_call_query,
    performance_json,
)
from falproxy.stores.ledger.performance import count_unfinished_jobs, read_performance
from falproxy.stores.ledger.reports import (
    Json,
    TimeRange,
    format_time,
    parse_number,
    parse_time_range,
)
from falproxy.web.usage import DEFAULT_SINCE, NO_STORE_HEADERS, TtlCache, Visibility

logger = logging.getLogger(__name__)

PAGE_CALLS, PAGE_CALLS_MAX = 50, 500
EXPORT_CALLS_MAX = 100_000
CSV_TYPE = "text/csv"
CSV_NAME = 'attachment; filename="falproxy-calls.csv"'
PARAMETERS = ("since", "until", "limit", "after", *FILTERS)


class RunningJobs(NamedTuple):
    """Numbers of jobs that were submitted in the hour before, and are not known to have ended; None
    if the ledger is unavailable.

    before: at the time that lies the length of the period before now.
    """

    now: int | None
    before: int | None


class CallHandlers:
    """budgets: of callers, users and all together, as in the settings; None without one."""

    def __init__(
        self,
        ledger: Ledger,
        metrics: Metrics,
        visibility: Visibility,
        budgets: Mapping[str, str | None],
    ) -> None:
        self._ledger = ledger
        self._budgets = budgets
        self._metrics = metrics
        self._visibility = visibility
        self._cache = TtlCache()
        self._export_slot = asyncio.Semaphore(1)

    async def get_calls(self, request: web.Request) -> web.StreamResponse:
        """Handler for GET of `/api/usage/calls`. Raises: ProxyError 400, 403, 503."""
        caller = self._visibility.visible_principal(request)
        format_name = request.query.get("format", "json")
        if format_name not in ("json", "csv"):
            raise ProxyError(400, "query_invalid", "The query's format must be json or csv.")
        time_range, query, limit = parse_query(request, caller)
        if format_name == "csv":
            return await self._export(request, query)
        cache_key = ("calls", caller, *(request.query.get(name) for name in PARAMETERS))

        async def compute() -> bytes:
            calls, after = await list_calls(self._ledger, query, limit)
            return json.dumps(call_page_json(time_range, calls, after)).encode()

        return await self._respond(cache_key, compute)

    async def get_performance(self, request: web.Request) -> web.StreamResponse:
        """Handler for GET of `/api/usage/performance`. Raises: ProxyError 400, 403, 503."""
        caller = self._visibility.visible_principal(request)
        parse_range(request)
        cache_key = (caller, request.query.get("since"), request.query.get("until"))

        async def compute() -> bytes:
            period = parse_range(request)
            found = await read_performance(self._ledger, period.since, period.until, caller)
            return json.dumps(performance_json(found)).encode()

        return await self._respond(cache_key, compute)

    async def get_state(self, request: web.Request) -> web.StreamResponse:
        """Handler for GET of `/api/usage/state`. Raises: ProxyError 400, 403."""
        self._visibility.require_admin(request)
        other_workers = request.app.get(WORKER_SNAPSHOTS)
        period = parse_range(request)
        others = await other_workers() if other_workers is not None else ()
        snapshot = merge_snapshots([self._metrics.snapshot(), *others])
        running_jobs = await self._running_jobs(round(period.until - period.since))
        document = state_json(snapshot, 1 + len(others), running_jobs)
        document["budgets"] = self._budgets
        return json_response(json.dumps(document).encode())

    async def _running_jobs(self, seconds: int) -> RunningJobs:
        """Return the numbers of running jobs now, and this many seconds ago."""

        async def compute() -> bytes:
            now = time.time()
            times = (now, now - seconds)
            counts = [await count_unfinished_jobs(self._ledger, at) for at in times]
            return json.dumps(counts).encode()

        try:
            return RunningJobs(*json.loads(await self._cache.get(("jobs", seconds), compute)))
        except LedgerError as error:
            logger.info("The ledger was not read: %s", error)
            return RunningJobs(None, None)

    async def _respond(
        self, cache_key: Hashable, compute: Callable[[], Coroutine[object, object, bytes]]
    ) -> web.Response:
        try:
            return json_response(await self._cache.get(cache_key, compute))
        except LedgerError as error:
            raise ledger_away(error) from error

    async def _export(self, request: web.Request, query: CallQuery) -> web.StreamResponse:
        """Send the calls as CSV, at most EXPORT_CALLS_MAX. One export of a process runs at once."""
        async with self._export_slot:
            pages = self._read_pages(query)
            try:
                first: list[ListedCall] = await anext(pages, [])
            except LedgerError as error:
                raise ledger_away(error) from error
            headers = {**NO_STORE_HEADERS, hdrs.CONTENT_DISPOSITION: CSV_NAME}
            response = web.StreamResponse(headers=headers)
            response.content_type, response.charset = CSV_TYPE, "utf-8"
            await response.prepare(request)
            await response.write((csv_head() + calls_csv(first)).encode())
            async for calls in pages:
                await response.write(calls_csv(calls).encode())
            await response.write_eof()
            return response

    async def _read_pages(self, query: CallQuery) -> AsyncIterator[list[ListedCall]]:
        count = 0
        while count < EXPORT_CALLS_MAX:
            limit = min(PAGE_CALLS_MAX, EXPORT_CALLS_MAX - count)
            calls, after = await list_calls(self._ledger, query, limit)
            count += len(calls)
            yield calls
            if after is None:
                break
            query = replace(query, after=after)


def parse_query(request: web.Request, caller: str | None) -> tuple[TimeRange, CallQuery, int]:
    """Raises: ProxyError 400 `query_invalid`."""
    time_range = parse_range(request)
    try:
        query = parse_call_query(request.query, time_range, caller)
        limit = parse_number("limit", request.query.get("limit"), PAGE_CALLS, 1, PAGE_CALLS_MAX)
    except ValueError as error:
        raise query_invalid(error) from error
    return time_range, query, limit


def parse_range(request: web.Request) -> TimeRange:
    """Raises: ProxyError 400 `query_invalid`."""
    since, until = request.query.get("since", DEFAULT_SINCE), request.query.get("until")
    try:
        return parse_time_range(since, until, time.time())
    except ValueError as error:
        raise query_invalid(error) from error


def query_invalid(error: ValueError) -> ProxyError:
    return ProxyError(400, "query_invalid", f"The query's {error}.")


def ledger_away(error: LedgerError) -> ProxyError:
    logger.info("The ledger was not read: %s", error)
    message = "The ledger cannot be read now; calls are not affected."
    return ProxyError(503, "ledger_away", message, {"Retry-After": "5"})


def json_response(body: bytes) -> web.Response:
    response = web.Response(body=body, content_type="application/json", headers=NO_STORE_HEADERS)
    response.enable_compression()
    return response


def state_json(snapshot: Snapshot, workers: int, running_jobs: RunningJobs) -> Json:
    """Return the states of the proxy and of the services and stores that it depends on.

    since: of a dependency: its last change; None since the start.
    """
    health, started_at = snapshot["health"], snapshot["process"].get("process_start_time_seconds")
    return {
        "version": snapshot["version"],
        "started_at": None if started_at is None else format_time(started_at),
        "workers": workers,
        "worker_restarts": health.get("worker_restarts", 0),
        "in_progress": snapshot["in_progress"],
        "connections": snapshot["connections"],
        "running_jobs": running_jobs.now,
        "running_jobs_before": running_jobs.before,
        "dependencies": [
            {
                "name": name,
                "is_up": bool(is_up),
                "since": format_change(snapshot["changes"].get(name)),
                "error": snapshot["last_errors"].get(name),
            }
            for name, is_up in snapshot["dependencies"].items()
        ],
        "backup_hosts": [
            {"host": host, "is_used": bool(is_used)}
            for host, is_used in snapshot["breakers"].items()
        ],
        "fal_keys": health.get("fal_keys", 0),
        "fal_keys_resting": health.get("fal_keys_resting", 0),
        "ledger_backlog_rows": health.get("ledger_backlog_rows", 0),
        "ledger_dropped_rows": health.get("ledger_dropped_rows", 0),
    }


def format_change(seconds: float | None) -> str | None:
    return None if seconds is None else format_time(seconds)
