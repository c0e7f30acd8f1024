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
    SIBLINGS,
    UPSTREAM_BOUNDS,
    Metrics,
    Snapshot,
    Timing,
    add_up,
    merge,
    quantile,
)
from falproxy.proxy.call import OWNER, PRINCIPAL
from falproxy.stores.ledger import By, Ledger, LedgerError
from falproxy.stores.ledger.reports import (
    Json,
    Span,
    check_steps,
    latest,
    moment,
    overview,
    parse_by,
    parse_span,
    table,
)

logger = logging.getLogger(__name__)

SINCE = "24h"
SHARES = {"p50": 0.5, "p95": 0.95, "p99": 0.99}
BY_TOKEN, BY_KEY, BY_HOOK = "jwt", "key", "hook"
# An answer is given again for so long, and for so many times the seconds that it took: whoever
# watches, and however much there is to add up, it is never more than a twentieth of a processor.
KEPT_LEAST = 1.0
KEPT_TIMES = 20
KEPT_MAX = 100
UNSAVED = {hdrs.CACHE_CONTROL: "no-store"}


@dataclass(frozen=True, slots=True)
class Audience:
    """Who may know what. admins: who know all, by FALPROXY_ADMINS. holders: the names of access
    keys. is_locked: whether callers say who they are; where they do not, all know all."""

    is_locked: bool
    admins: tuple[str, ...]
    holders: frozenset[str]

    def knows_all(self, request: web.Request) -> bool:
        """A name in a token is not taken for that of a key: it is `jwt:` and its `sub`."""
        if not self.is_locked:
            return True
        way, _, name = request[OWNER].partition(":")
        if way == BY_TOKEN:
            return request[OWNER] in self.admins
        return way in (BY_KEY, BY_HOOK) and name in self.admins

    def check(self, request: web.Request) -> None:
        """Raises: ProxyError 403 `not_an_admin`."""
        if not self.knows_all(request):
            raise ProxyError(
                403,
                "not_an_admin",
                "Everybody's numbers are for those whom FALPROXY_ADMINS names.",
            )

    def known_to(self, request: web.Request) -> str | None:
        """Whose calls a caller may know of; None for everybody's. Raises: ProxyError 403
        `name_taken`, the ledger has the calls of another one by that name."""
        if self.knows_all(request):
            return None
        principal = request[PRINCIPAL]
        if principal in self.holders and request[OWNER] != f"{BY_KEY}:{principal}":
            raise ProxyError(
                403, "name_taken", "An access key has your name, so your calls are not told apart."
            )
        return principal


class Kept:
    """Answers that are given again for a while. Those who ask at the same time get the same."""

    def __init__(self) -> None:
        self._answers: dict[object, tuple[float, asyncio.Future[bytes]]] = {}

    async def get(self, question: object, answer: Callable[[], Awaitable[bytes]]) -> bytes:
        now = time.monotonic()
        self._answers = {key: kept for key, kept in self._answers.items() if kept[0] > now}
        if question in self._answers:
            return await asyncio.shield(self._answers[question][1])
        if len(self._answers) >= KEPT_MAX:
            return await answer()
        making = asyncio.ensure_future(self._make(question, answer))
        self._answers[question] = (float("inf"), making)
        return await asyncio.shield(making)

    async def _make(self, question: object, answer: Callable[[], Awaitable[bytes]]) -> bytes:
        started = time.monotonic()
        lasts = 0.0
        try:
            made = await answer()
            lasts = max(KEPT_LEAST, KEPT_TIMES * (time.monotonic() - started))
            return made
        finally:
            _, making = self._answers[question]
            self._answers[question] = (time.monotonic() + lasts, making)


class Usage:
    """Handlers for what is known of the calls."""

    def __init__(self, ledger: Ledger, metrics: Metrics, audience: Audience) -> None:
        self._ledger = ledger
        self._metrics = metrics
        self._audience = audience
        self._kept = Kept()

    async def tell(self, request: web.Request) -> web.Response:
        """Handler for GET of `/api/usage`. Raises: ProxyError 400, 403, 503."""
        principal = self._audience.known_to(request)
        words = tuple(request.query.get(name) for name in ("since", "until", "by"))
        read_query(*words)

        async def answer() -> bytes:
            return json.dumps(await self._ask(words, principal)).encode()

        try:
            told = await self._kept.get((words, principal), answer)
        except LedgerError as error:
            logger.info("The ledger was not read: %s", error)
            message = "The ledger cannot be read for now; calls go on."
            raise ProxyError(503, "ledger_away", message, {"Retry-After": "5"}) from error
        is_all = principal is None and words[-1] is None
        live = live_of(await numbers(request, self._metrics)) if is_all else None
        body = told if words[-1] else b'%b, "live": %b}' % (told[:-1], json.dumps(live).encode())
        response = web.Response(body=body, content_type="application/json", headers=UNSAVED)
        response.enable_compression()
        return response

    async def show_metrics(self, request: web.Request) -> web.Response:
        """Handler for GET of `/metrics`. Raises: ProxyError 403."""
        from falproxy.web.prometheus import write_metrics  # with Prometheus's own library

        self._audience.check(request)
        snapshot = await numbers(request, self._metrics)
        page, kind = write_metrics(snapshot, request.headers.get(hdrs.ACCEPT, ""))
        response = web.Response(body=page, headers={**UNSAVED, hdrs.CONTENT_TYPE: kind})
        response.enable_compression()
        return response

    async def _ask(self, words: tuple[str | None, ...], principal: str | None) -> Json:
        span, by = read_query(*words)
        if by is not None:
            return await table(self._ledger, span, by, principal)
        shown = await overview(self._ledger, span, principal)
        return {**shown, "latest": await latest(self._ledger, span, principal)}


def read_query(since: str | None, until: str | None, by: str | None) -> tuple[Span, By | None]:
    """Raises: ProxyError 400 `query_invalid`."""
    try:
        span = parse_span(since if since is not None else SINCE, until, time.time())
        found = None if by is None else parse_by(by)
        check_steps(span, found)
    except ValueError as error:
        raise ProxyError(400, "query_invalid", f"The query's {error}.") from error
    return span, found


def live_of(snapshot: Snapshot) -> Json:
    """What is known of now, and since the processes began: the ledger has no percentiles."""
    began = snapshot["process"].get("process_start_time_seconds")
    return {
        "since": None if began is None else moment(began),
        "in_progress": snapshot["in_progress"],
        "requests": sum(snapshot["requests"].values()),
        "own_seconds": spread(snapshot["own_seconds"], OWN_BOUNDS),
        "upstream_seconds": spread(snapshot["upstream_seconds"], UPSTREAM_BOUNDS),
    }


def spread(timings: Mapping[str, Timing], bounds: Sequence[float]) -> list[Json]:
    """Percentiles by operation, and of all of them together, which has no name."""
    everything = add_up(timings.values())
    named = [*sorted(timings.items()), *([("", everything)] if everything else [])]
    return [
        {
            "operation": operation,
            "count": sum(timing["counts"]),
            **{name: quantile(timing, bounds, share) for name, share in SHARES.items()},
        }
        for operation, timing in named
    ]


async def numbers(request: web.Request, metrics: Metrics) -> Snapshot:
    """The metrics of all processes that serve this address."""
    siblings = request.app.get(SIBLINGS)
    others = await siblings() if siblings is not None else ()
    return merge([metrics.snapshot(), *others])
