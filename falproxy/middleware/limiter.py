"""The limiter: admits calls by the limits store, and makes sure that every reservation ends.

A reservation is settled by the process that made it, or by any other one that reads the result. The
reservations that no process ends are claimed when they are due: fal is asked about their jobs.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Literal, Self, TypeVar

from aiohttp import web

from falproxy.circuit_breaker import CircuitBreaker
from falproxy.errors import CallerRefusal, TemporaryError
from falproxy.ids import IdGenerator
from falproxy.state_log import StateLog
from falproxy.stores.limits import (
    Admission,
    Limit,
    LimitsError,
    LimitsStore,
    LimitState,
    Reservation,
    ReserveRequest,
)

logger = logging.getLogger(__name__)

# All times are seconds.
LEASE = 60.0  # of a call whose process is alive; it is renewed
RENEW_INTERVAL = 20.0
SWEEP_INTERVAL = 5.0
SWEEP_BATCH_SIZE, SWEEP_BATCHES_MAX = 20, 10
CLAIM_LEASE = 60.0  # for the process that asks fal about a job
# Time between two questions about a job: a quarter of its age, within these bounds.
ASK_INTERVAL_MIN, ASK_INTERVAL_MAX = 10.0, 300.0
CANCELLED_JOB_CHECK = 2.0
JOB_TIMEOUT = 4 * 3600.0  # age after which a job that fal still runs counts as spent
STORE_COOLDOWN = 1.0  # until a store that failed is asked again
CLOSE_TIMEOUT = 2.0  # for ends that are being written at shutdown
PENDING_MAX = 10_000  # ends that could not be written yet
RETRY_AFTER = {"Retry-After": "2"}

T = TypeVar("T")

OnError = Literal["default", "allow", "refuse"]


@dataclass(frozen=True, slots=True)
class JobState:
    """The state of a job at fal.

    state: `unknown` if there was no response; `gone` if fal does not have the job any more.
    cost: micro-USD of a job that has ended; None if it is not known.
    """

    state: Literal["running", "ended", "unknown", "gone"]
    cost: int | None = None


AskFal = Callable[[Reservation], Awaitable[JobState]]
Cost = Callable[[Reservation], int | None]
# An operation of the store that ends a reservation, or links it to its job.
WriteEnd = Callable[[LimitsStore], Coroutine[object, object, bool]]


class CallReservation:
    """The reservation of one call of this process. One of its methods ends it here; later ones do
    nothing."""

    __slots__ = ("_limiter", "amount", "is_open", "token")

    def __init__(self, limiter: "Limiter", token: str, amount: int) -> None:
        self._limiter = limiter
        self.token = token
        self.amount = amount
        self.is_open = True

    def __repr__(self) -> str:
        return f"<CallReservation {self.token}, {'open' if self.is_open else 'ended'}>"

    async def settle(self, cost: int | None) -> None:
        """End it with the actual cost in micro-USD; None keeps what was reserved."""
        if self._end():
            await self._limiter.settle(self.token, self.amount if cost is None else cost)

    async def release(self) -> None:
        """End it: the call cost nothing."""
        await self.settle(0)

    async def attach(self, request_id: str, details: str, lease: float = ASK_INTERVAL_MIN) -> None:
        """Hand it over to the process that reads the result of the job.

        lease: seconds until it is due, unless it is renewed.
        """
        if self._end():
            await self._limiter.attach(self.token, request_id, details, lease)

    def _end(self) -> bool:
        was_open, self.is_open = self.is_open, False
        self._limiter.running.discard(self.token)
        return was_open


class Limiter:
    """Admits calls. It is a context: within it, reservations of running calls are renewed, and
    those that are due are ended.

    on_error: what happens to calls when the store fails: `default` refuses those with a budget.
    ask: asks fal about a job.
    has_limits: returns whether anything is limited. As long as nothing ever was, no job has a
        reservation, and the store is not asked for it.
    """

    def __init__(
        self,
        store: LimitsStore,
        ask: AskFal,
        on_error: OnError = "default",
        has_limits: Callable[[], bool] = lambda: True,
    ) -> None:
        self._store = store
        self._ids = IdGenerator()
        self._has_limits = has_limits
        self._is_used = False
        self._ask = ask
        self._on_error = on_error
        self._breaker = CircuitBreaker(STORE_COOLDOWN)
        self._state_log = StateLog(logger)
        self._pending: dict[str, WriteEnd] = {}  # by token: ends that the store has not got
        self.running: set[str] = set()  # tokens of calls that this process waits for
        self._tasks: list[asyncio.Task[None]] = []
        self._ends: set[asyncio.Task[None]] = set()  # being written

    def __repr__(self) -> str:
        return f"<Limiter {self._store!r}, {len(self.running)} calls, {len(self._pending)} pending>"

    async def __aenter__(self) -> Self:
        await self._store.__aenter__()
        loops = (
            self._repeat(RENEW_INTERVAL, self._renew),
            self._repeat(SWEEP_INTERVAL, self.sweep),
        )
        self._tasks = [asyncio.get_running_loop().create_task(loop) for loop in loops]
        return self

    async def __aexit__(self, *error: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._ends:
            await asyncio.wait(self._ends, timeout=CLOSE_TIMEOUT)
        with suppress(LimitsError):
            await self._write_pending()
        await self._store.__aexit__(*error)

    @property
    def is_used(self) -> bool:
        """True once anything was limited."""
        self._is_used = self._is_used or self._has_limits()
        return self._is_used

    def spawn(self, end: Coroutine[object, object, None]) -> asyncio.Task[None]:
        """Write the end of a reservation, even if the caller leaves meanwhile."""
        task = asyncio.get_running_loop().create_task(end)
        self._ends.add(task)
        task.add_done_callback(self._ends.discard)
        return task

    async def admit(self, limits: Sequence[Limit], amount: int) -> Admission | None:
        """Count a call that has nothing to settle: only rates. None if the store is away and the
        call may pass. Raises: ProxyError 503."""
        admission, _ = await self.reserve(limits, amount)
        return admission

    async def reserve(
        self, limits: Sequence[Limit], amount: int
    ) -> tuple[Admission | None, CallReservation | None]:
        """Reserve a call's part of its limits. No admission if the store is away and the call may
        pass; no reservation if nothing has to be ended.

        Raises: ProxyError 503, the store is away.
        """
        self._is_used = True  # even if a key loses its limits before the next sweep
        token = self._ids.next_id()
        request = ReserveRequest(token, limits, amount, LEASE)
        try:
            admission = await self._call_store(self._store.reserve(request))
        except LimitsError as error:  # the reply may have been lost
            self._keep_pending(token, partial(settle, token=token, cost=0))
            if self._allows_on_error(limits):
                return None, None
            raise LimitsUnavailable from error
        except asyncio.CancelledError:
            self._keep_pending(token, partial(settle, token=token, cost=0))
            raise
        needs_end = any(limit.kind != "rate" for limit in limits)
        if admission.refused is not None or not needs_end:
            return admission, None
        self.running.add(token)
        return admission, CallReservation(self, token, amount)

    async def count(self, limits: Sequence[Limit]) -> tuple[LimitState, ...]:
        """Return the counts of the limits. Raises: ProxyError 503, the store is away."""
        try:
            return await self._call_store(self._store.count(limits))
        except LimitsError as error:
            raise LimitsUnavailable from error

    async def settle(self, token: str, cost: int) -> None:
        """End a reservation. If the store is away, it is ended later."""
        await self._write_end(token, partial(settle, token=token, cost=cost))

    async def attach(
        self, token: str, request_id: str, details: str, lease: float = ASK_INTERVAL_MIN
    ) -> None:
        """Store the job of a reservation. If the store is away, it is stored later."""

        async def attach(store: LimitsStore) -> bool:
            return await store.attach(token, request_id, details, lease)

        await self._write_end(token, attach)

    async def find(self, request_id: str) -> Reservation | None:
        """Return the open reservation of a job. Raises: LimitsError."""
        return await self._call_store(self._store.find(request_id))

    async def settle_job(self, request_id: str, cost: Cost) -> None:
        """End the reservation of a job whose result was read.

        cost: returns the actual cost in micro-USD; None keeps what was reserved.
        """
        if not self.is_used:
            return
        with suppress(LimitsError):  # the sweep ends it later
            reservation = await self._call_store(self._store.find(request_id))
            if reservation is not None:
                actual = cost(reservation)
                await self.settle(
                    reservation.token, reservation.amount if actual is None else actual
                )

    async def check_job_soon(self, request_id: str, mark: Callable[[str], str]) -> None:
        """Ask fal about a job shortly, since it was cancelled.

        mark: returns the details of a job that was cancelled.
        """
        if not self.is_used:
            return
        with suppress(LimitsError):
            found = await self._call_store(self._store.find(request_id))
            if found is not None:
                details = mark(found.details)
                attach = self._store.attach(found.token, request_id, details, CANCELLED_JOB_CHECK)
                await self._call_store(attach)

    async def sweep(self) -> None:
        """Write the ends that the store has not got, and end reservations that are due."""
        if not self.is_used:
            return
        await self._write_pending()
        for _ in range(SWEEP_BATCHES_MAX):
            due = await self._call_store(self._store.claim_due(SWEEP_BATCH_SIZE, CLAIM_LEASE))
            await asyncio.gather(*map(self._end_due, due))
            if len(due) < SWEEP_BATCH_SIZE:
                return

    async def _end_due(self, reservation: Reservation) -> None:
        if reservation.token in self.running:  # its renewal is late
            await self._call_store(self._store.renew(reservation.token, LEASE))
            return
        if reservation.request_id is None:
            # Its process has ended, and fal may have accepted the call.
            logger.warning("A call without an outcome counts as spent")
            await self._call_store(self._store.settle(reservation.token, reservation.amount))
            return
        job = await self._ask(reservation)
        if job.state == "ended":
            cost = reservation.amount if job.cost is None else job.cost
            await self._call_store(self._store.settle(reservation.token, cost))
        elif job.state == "gone" or reservation.age > JOB_TIMEOUT:
            logger.warning("A job whose cost cannot be read counts as spent")
            await self._call_store(self._store.settle(reservation.token, reservation.amount))
        else:
            interval = min(max(reservation.age / 4, ASK_INTERVAL_MIN), ASK_INTERVAL_MAX)
            await self._call_store(self._store.renew(reservation.token, interval))

    async def _renew(self) -> None:
        for token in tuple(self.running):
            await self._call_store(self._store.renew(token, LEASE))

    async def _write_end(self, token: str, write: WriteEnd) -> None:
        try:
            await self._call_store(write(self._store))
        except (LimitsError, asyncio.CancelledError) as error:
            self._keep_pending(token, write)
            if isinstance(error, asyncio.CancelledError):
                raise

    async def _write_pending(self) -> None:
        for token, write in tuple(self._pending.items()):
            await self._call_store(write(self._store))
            if self._pending.get(token) is write:
                del self._pending[token]

    def _keep_pending(self, token: str, write: WriteEnd) -> None:
        if len(self._pending) < PENDING_MAX:
            self._pending[token] = write
        else:  # it counts as spent when it is due
            logger.warning("Too many ends of reservations are waiting for the store")

    def _allows_on_error(self, limits: Sequence[Limit]) -> bool:
        if self._on_error == "default":
            return all(limit.kind != "budget" for limit in limits)
        return self._on_error == "allow"

    @property
    def is_store_up(self) -> bool:
        return self._breaker.is_closed

    async def _call_store(self, operation: Coroutine[object, object, T]) -> T:
        """Return the result of an operation of the store, which is skipped for a moment after it
        failed. Raises: LimitsError."""
        if not self._breaker.allow_request():
            operation.close()
            raise LimitsError("the store is being skipped")
        try:
            result = await operation
        except LimitsError as error:
            if self._breaker.is_closed:
                self._state_log.warning("Limits cannot be checked now: %s", error)
            self._breaker.trip()
            raise
        if not self._breaker.is_closed:
            self._state_log.warning("Limits can be checked again")
            self._breaker.reset()
        return result

    async def _repeat(self, interval: float, work: Callable[[], Awaitable[None]]) -> None:
        while True:
            await asyncio.sleep(interval)
            try:
                await work()
            except LimitsError as error:
                logger.info("Limits cannot be written now: %s", error)
            except Exception:
                logger.exception("The limiter failed inside the proxy")


class LimitsUnavailable(CallerRefusal, TemporaryError):
    """The limits of a call cannot be checked now."""

    def __init__(self, message: str = "The limits cannot be checked now. Try again.") -> None:
        super().__init__(503, "limits_unavailable", message, RETRY_AFTER)


def settle(store: LimitsStore, *, token: str, cost: int) -> Coroutine[object, object, bool]:
    return store.settle(token, cost)


LIMITER = web.AppKey("falproxy.limiter", Limiter)


def limiter_context(limiter: Limiter) -> Callable[[web.Application], AsyncIterator[None]]:
    """Cleanup context: the limits store is open exactly as long as the application."""

    async def limiter_context(app: web.Application) -> AsyncIterator[None]:
        app[LIMITER] = limiter
        async with limiter:
            yield

    return limiter_context
