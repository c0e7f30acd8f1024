"""The cost of a job whose submit has reserved a part of a budget: the data stored with
the reservation, and the question to fal about a job whose result was not read."""

import asyncio
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from dataclasses import fields as dataclass_fields
from decimal import Decimal
from typing import Self, cast

from aiohttp import web

from falproxy.fal.keys import KeyPool
from falproxy.fal.live import session_cost
from falproxy.fal.pricing import Price, Unit, cost_from_units, parse_decimal, parse_units
from falproxy.json_object import parse_object
from falproxy.middleware.job_ends import UNITS_HEADER
from falproxy.middleware.limiter import AskFal, JobState
from falproxy.proxy.queue_job import FAL_REQUEST_ID, JobFollower
from falproxy.proxy.upstream import UPSTREAM
from falproxy.stores.limits import Reservation

RESULT_MAX = 64 * 2**10  # bytes of a result that are read, whose headers have the cost
CHECK_CONCURRENCY = 20  # questions of a process at once


@dataclass(frozen=True, slots=True)
class LiveProgress:
    """How much of a session of live video its reservations cover. Lengths are seconds.

    started: length of the session when the reservation was made.
    seconds: length since then, at the last heartbeat.
    covered: length that is reserved.
    settled: micro-USD of further reservations that have ended.
    """

    started: float = 0.0
    seconds: float = 0.0
    covered: float = 0.0
    settled: int = 0


@dataclass(frozen=True, slots=True)
class JobDetails:
    """The data for the question to fal about a job, and for its cost.

    app: the path before `/requests/`.
    key_mark: fingerprint of the fal key; empty for the default one.
    price: None if it is unknown.
    is_cancelled: fal was asked to cancel the job.
    live: the progress of a session of live video; None for a job.
    """

    app: str = ""
    key_mark: str = ""
    price: Price | None = None
    is_cancelled: bool = False
    live: LiveProgress | None = None

    def serialize(self) -> str:
        fields = asdict(self)
        fields["price"] = None if self.price is None else [str(self.price.usd), self.price.unit]
        return json.dumps(fields)

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse the details that a process wrote, which may be of another version."""
        fields = parse_object(text.encode()) or {}
        return cls(
            str(fields.get("app", "")),
            str(fields.get("key_mark", "")),
            parse_price(fields.get("price")),
            fields.get("is_cancelled") is True,
            parse_progress(fields.get("live")),
        )

    def live_cost(self) -> int | None:
        """Return what the reservation of a session costs so far, in micro-USD; None if it is
        unknown."""
        live = self.live
        cost = None if live is None else session_cost(self.price, live.seconds)
        return None if live is None or cost is None else max(0, cost - live.settled)


def parse_progress(value: object) -> LiveProgress | None:
    if not isinstance(value, dict):
        return None
    known = {field.name for field in dataclass_fields(LiveProgress)}
    return LiveProgress(**{name: number for name, number in value.items() if name in known})


def parse_price(value: object) -> Price | None:
    if not isinstance(value, list) or len(value) != 2:
        return None
    usd: Decimal | None = parse_decimal(str(value[0]))
    return None if usd is None else Price(usd, cast(Unit, str(value[1])))


def actual_cost(price: Price | None, status: int, headers: Mapping[str, str]) -> int | None:
    """Return the cost of a call by fal's response, in micro-USD; None if it is unknown. A call that
    failed costs nothing, unless fal reports units."""
    cost = cost_from_units(price, parse_units(headers.get(UNITS_HEADER)))
    return 0 if cost is None and status >= web.HTTPBadRequest.status_code else cost


def mark_cancelled(details: str) -> str:
    return replace(JobDetails.parse(details), is_cancelled=True).serialize()


def job_check(app: web.Application, key_pool: KeyPool) -> AskFal:
    """Return a function that asks fal about the job of a reservation."""
    slots = asyncio.Semaphore(CHECK_CONCURRENCY)

    async def check_job(reservation: Reservation) -> JobState:
        details = JobDetails.parse(reservation.details)
        if details.live is not None:  # no heartbeats have arrived for a lease
            return JobState("ended", details.live_cost())
        follower = JobFollower(
            app[UPSTREAM],
            details.app,
            reservation.request_id or "",
            key_pool.find(details.key_mark),
            slots,
        )
        async with slots:
            return await read_state(follower, details)

    return check_job


async def read_state(follower: JobFollower, details: JobDetails) -> JobState:
    status = await follower.fetch_status()
    if status == web.HTTPNotFound.status_code:
        # A job that was cancelled in the queue is removed from it.
        return JobState("ended", 0) if details.is_cancelled else JobState("gone")
    if status != web.HTTPOk.status_code:
        return JobState("running" if status == web.HTTPAccepted.status_code else "unknown")
    result = await follower.fetch_result(RESULT_MAX)
    if result is None:
        return JobState("unknown")
    is_from_queue = FAL_REQUEST_ID in result.headers
    if result.status != web.HTTPOk.status_code and not is_from_queue:
        return JobState("unknown")
    return JobState("ended", actual_cost(details.price, result.status, result.headers))
