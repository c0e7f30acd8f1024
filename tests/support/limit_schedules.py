"""Generated schedules of calls under a budget over several processes, some of which are killed, and
the rules that hold in each. They run in virtual time."""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass, field
from random import Random
from typing import Any, TypeVar
from uuid import uuid4

from aiohttp import web
from multidict import CIMultiDict, CIMultiDictProxy

from falproxy.errors import ProxyError
from falproxy.fal.keys import KeyPool
from falproxy.fal.queue_documents import parse_submit_response
from falproxy.fal.target import Operation, Target
from falproxy.limit_settings import LimitSettings
from falproxy.metrics import Metrics
from falproxy.middleware.call_limits import CALL_LIMITS, limits_of
from falproxy.middleware.image_inputs import INSPECTED_INPUT, NEEDS_INPUT, InspectedInput
from falproxy.middleware.job_costs import job_check
from falproxy.middleware.limit_calls import LimitPolicy, reserve_costs, settle_jobs
from falproxy.middleware.limiter import SWEEP_INTERVAL, Limiter
from falproxy.proxy.call import CALL, OWNER, Call
from falproxy.proxy.forward import RelayedResponse
from falproxy.proxy.upstream import UPSTREAM, UpstreamUnreachable, connection_lost
from falproxy.stores.limits import (
    Admission,
    Limit,
    LimitsError,
    LimitsStore,
    LimitState,
    Reservation,
    ReserveRequest,
)
from tests.support.limits import APP, LONG, MODEL, PRICE, price_book
from tests.support.simulated_processes import Response, SimulatedRequest, response

BUDGET, CONCURRENCY = 4 * PRICE, 3
SETTINGS = LimitSettings(budget=(BUDGET, LONG), concurrency=CONCURRENCY)
KEYS = KeyPool(["key"], lambda: 0.0)
LIMITS = (
    Limit("budget", "principal:web", BUDGET, LONG),
    Limit("concurrency", "principal:web", CONCURRENCY),
)
# Seconds after the last call in which all reservations end: leases, and questions about jobs.
SETTLE_SECONDS = 260.0
# How fal ends a POST. A call whose response is lost is charged.
FATES = ("result", "result", "result", "failure", "refusal", "lost", "unreachable")

T = TypeVar("T")


class Killed(Exception):
    """The process does not exist any more."""


@dataclass(slots=True)
class Charge:
    """A call that fal accepted. cost: micro-USD, 0 after a failure."""

    cost: int
    is_run: bool
    ends_at: float
    fails: bool


class ChargingFal:
    """fal, which accepts and charges calls."""

    def __init__(self, random: Random) -> None:
        self._random = random
        self.jobs: dict[str, Charge] = {}
        self.committed_max = 0
        self.has_lost = False

    @property
    def now(self) -> float:
        return asyncio.get_running_loop().time()

    @property
    def committed(self) -> int:
        """What was charged, or will be."""
        return sum(charge.cost for charge in self.jobs.values())

    async def post(self, call: Call) -> Response:
        random = self._random
        fate = random.choice(FATES)
        await asyncio.sleep(random.uniform(0.0, 0.5))
        if fate == "unreachable":
            raise UpstreamUnreachable
        if fate == "refusal":
            return response("POST", random.choice((422, 429, 500, 503)), {"detail": "no"})
        is_run = call.target.operation is not Operation.SUBMIT
        request_id, seconds = str(uuid4()), random.choice((0.1, 1.0, 8.0, 40.0))
        job = Charge(PRICE, is_run, self.now + seconds, fate == "failure")
        self.jobs[request_id] = job
        self.committed_max = max(self.committed_max, self.committed)
        await asyncio.sleep(seconds if is_run else random.uniform(0.0, 0.2))
        if fate == "lost":
            self.has_lost = True
            raise connection_lost(is_repeatable=False)
        if is_run:
            return self._result(request_id, job)
        url = f"https://queue.fal.run/{APP}/requests/{request_id}/status"
        return response("POST", 200, {"request_id": request_id, "status_url": url})

    async def send(self, call: Call) -> Response:
        """Respond to a request about a job."""
        request_id = call.target.request_id or ""
        headers = {"x-fal-request-id": request_id}
        job = self.jobs[request_id]
        is_ended = job.ends_at <= self.now
        await asyncio.sleep(self._random.uniform(0.0, 0.2))
        match call.target.operation:
            case Operation.STATUS:
                document = {"status": "COMPLETED" if is_ended else "IN_PROGRESS"}
                return response("GET", 200 if is_ended else 202, document, headers)
            case Operation.CANCEL if not is_ended:
                job.fails, job.ends_at, job.cost = True, self.now, 0
                return response("PUT", 202, {"status": "CANCELLATION_REQUESTED"}, headers)
            case Operation.CANCEL:
                return response("PUT", 400, {"status": "ALREADY_COMPLETED"}, headers)
            case _:
                pass
        if not is_ended:
            return response("GET", 400, {"detail": "in progress"}, headers)
        return self._result(request_id, job)

    def _result(self, request_id: str, job: Charge) -> Response:
        headers = {"x-fal-request-id": request_id}
        if job.fails:
            job.cost = 0
            return response("GET", 500, {"detail": "it failed"}, headers)
        return response("GET", 200, {}, headers | {"x-fal-billable-units": "1"})


class ProcessStore:
    """The limits store as one process reaches it: with a delay, and not after its death."""

    def __init__(self, store: LimitsStore, random: Random) -> None:
        self._store, self._random = store, random
        self.is_dead = False

    async def __aenter__(self) -> "ProcessStore":
        return self

    async def __aexit__(self, *error: object) -> None: ...

    async def _run(self, operation: Callable[[], Awaitable[T]]) -> T:
        await asyncio.sleep(self._random.uniform(0.0, 0.05))
        if self.is_dead:
            raise LimitsError("the process is dead")
        reply = await operation()
        await asyncio.sleep(self._random.uniform(0.0, 0.05))
        return reply

    async def reserve(self, request: ReserveRequest) -> Admission:
        return await self._run(lambda: self._store.reserve(request))

    async def attach(self, token: str, request_id: str, details: str, lease: float) -> bool:
        return await self._run(lambda: self._store.attach(token, request_id, details, lease))

    async def renew(self, token: str, lease: float) -> bool:
        return await self._run(lambda: self._store.renew(token, lease))

    async def find(self, request_id: str) -> Reservation | None:
        return await self._run(lambda: self._store.find(request_id))

    async def settle(self, token: str, amount: int) -> bool:
        return await self._run(lambda: self._store.settle(token, amount))

    async def release(self, token: str) -> bool:
        return await self._run(lambda: self._store.release(token))

    async def claim_due(self, limit: int, lease: float) -> list[Reservation]:
        return await self._run(lambda: self._store.claim_due(limit, lease))

    async def count(self, limits: Any) -> tuple[LimitState, ...]:
        return await self._run(lambda: self._store.count(limits))


class LimitedProcess:
    """One process of the proxy, with the middleware of the limits."""

    def __init__(self, store: LimitsStore, fal: ChargingFal, random: Random) -> None:
        self.store, self.fal = ProcessStore(store, random), fal
        self.app = web.Application()
        self.app[UPSTREAM] = fal  # type: ignore[misc]
        self.limiter = Limiter(self.store, job_check(self.app, KEYS))
        policy = LimitPolicy(self.limiter, price_book(), SETTINGS, Metrics())
        self._reserve, self._settle = reserve_costs(policy), settle_jobs(self.limiter)
        self.calls: set[asyncio.Task[Any]] = set()

    @property
    def is_alive(self) -> bool:
        return not self.store.is_dead

    async def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Return the result of the work of a request. Raises: Killed."""
        task = asyncio.get_running_loop().create_task(work)
        self.calls.add(task)
        try:
            return await task
        except asyncio.CancelledError:
            if self.is_alive:
                task.cancel()
                raise
            raise Killed from None
        finally:
            self.calls.discard(task)

    async def post(self, kind: str) -> web.StreamResponse:
        host = "fal.run" if kind == "run" else "queue.fal.run"
        request = self._request("POST", host, f"/{MODEL}")
        request[OWNER] = "web"
        request[CALL_LIMITS] = limits_of(request, SETTINGS)
        request[NEEDS_INPUT] = True
        request[INSPECTED_INPUT] = InspectedInput({"prompt": "cat"}, {}, {}, is_parsed=True)

        async def forward(request: web.Request) -> web.StreamResponse:
            return RelayedResponse(await self.fal.post(request[CALL]))

        return await self._reserve(request, forward)

    async def request_about(self, request_id: str, method: str, suffix: str) -> web.StreamResponse:
        async def forward(request: web.Request) -> web.StreamResponse:
            return RelayedResponse(await self.fal.send(request[CALL]))

        path = f"/{APP}/requests/{request_id}{suffix}"
        return await self._settle(self._request(method, "queue.fal.run", path), forward)

    def _request(self, method: str, host: str, path: str) -> web.Request:
        request: Any = SimulatedRequest(self.app)
        request[OWNER] = "web"
        request[CALL] = Call(method, Target(host, path, ""), CIMultiDictProxy(CIMultiDict[str]()))
        return request  # type: ignore[no-any-return]

    async def kill(self) -> None:
        """Stop all tasks; nothing of them reaches the store any more."""
        self.store.is_dead = True
        tasks = [*self.limiter._tasks, *self.calls, *self.limiter._ends]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@dataclass
class LimitPlay:
    """One run of a schedule. faults: what went wrong."""

    seed: int
    store: LimitsStore
    faults: list[str] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.random = Random(self.seed)
        self.fal = ChargingFal(self.random)
        self.processes: list[LimitedProcess] = []
        self.kills = 0
        self.has_left = False

    async def run(self) -> list[str]:
        random = self.random
        for _ in range(random.choice((2, 3))):
            process = LimitedProcess(self.store, self.fal, random)
            await process.limiter.__aenter__()
            self.processes.append(process)
        spread = random.choice((0.2, 3.0, 30.0))
        async with asyncio.TaskGroup() as group:
            for _ in range(random.randrange(4, 14)):
                group.create_task(self._client(random.uniform(0, spread)))
            for _ in range(random.choice((0, 1, 1, len(self.processes) - 1))):
                group.create_task(self._kill(random.uniform(0, spread + 1.0)))
        await self._settle()
        await self._check()
        for process in self._living():
            await process.limiter.__aexit__(None, None, None)
        return self.faults

    async def _settle(self) -> None:
        """Wait until all reservations have ended, and then for three more sweeps."""
        with suppress(TimeoutError):
            async with asyncio.timeout(SETTLE_SECONDS - 3 * SWEEP_INTERVAL):
                while await self._has_reservations():
                    await asyncio.sleep(SWEEP_INTERVAL)
        await asyncio.sleep(3 * SWEEP_INTERVAL)

    async def _has_reservations(self) -> bool:
        _, places = await self.store.count(LIMITS)
        return places.used > 0 or any(process.limiter.running for process in self._living())

    def _living(self) -> list[LimitedProcess]:
        return [process for process in self.processes if process.is_alive]

    async def _kill(self, at: float) -> None:
        await asyncio.sleep(at)
        living = self._living()
        if len(living) > 1:
            self.kills += 1
            await self.random.choice(living).kill()

    async def _client(self, at: float) -> None:
        random = self.random
        await asyncio.sleep(at)
        kind = random.choice(("run", "submit", "submit"))
        process = random.choice(self._living())
        try:
            leaves_after = random.uniform(0.0, 0.6) if random.random() < 0.15 else None
            async with asyncio.timeout(leaves_after):
                found = await process.run(process.post(kind))
            if kind == "submit" and isinstance(found, RelayedResponse) and found.status == 200:
                await self._follow(await job_id(found))
        except TimeoutError:
            self.has_left = True
        except ProxyError as error:
            self.counts[error.code] = self.counts.get(error.code, 0) + 1
        except Killed:
            pass

    async def _follow(self, request_id: str) -> None:
        """Read the result at any process, cancel the job, or do neither."""
        random = self.random
        action = random.choice(("read", "read", "cancel", "leave"))
        for _ in range(random.randrange(1, 4) if action != "leave" else 0):
            await asyncio.sleep(random.choice((0.05, 1.0, 20.0)))
            method, suffix = ("PUT", "/cancel") if action == "cancel" else ("GET", "")
            process = random.choice(self._living())
            await process.run(process.request_about(request_id, method, suffix))

    # The rules

    async def _check(self) -> None:
        budget, places = await self.store.count(LIMITS)
        if self.fal.committed_max > BUDGET:
            self.faults.append(f"{self.fal.committed_max} were committed of {BUDGET}")
        charged = self.fal.committed
        if not charged <= budget.used <= BUDGET:
            self.faults.append(f"{budget.used} count as spent, {charged} are charged")
        is_exact = not (self.kills or self.has_left or self.fal.has_lost)
        if is_exact and budget.used != charged:
            self.faults.append(f"{budget.used} count as spent, not {charged}")
        if places.used:
            self.faults.append(f"{places.used} calls count as under way")
        open_tokens = [process.limiter.running for process in self._living()]
        if any(open_tokens):
            self.faults.append("a process still waits for a call")

    def report(self) -> str:
        return "\n".join([f"seed {self.seed}, {self.kills} kills: {self.counts}", *self.faults])


async def job_id(found: RelayedResponse) -> str:
    submitted = parse_submit_response(await found.document() or b"")
    assert submitted is not None
    return submitted[0]
