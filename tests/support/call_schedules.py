"""Generated schedules of equal calls over several processes, and the rules that hold in each."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random

from falproxy.errors import ProxyError
from falproxy.stores.cache import CacheStore
from tests.support.simulated_processes import (
    FATES,
    JOB_FATES,
    ClientCall,
    ClientEnding,
    Process,
    Send,
    SimulatedFal,
    SimulatedStore,
    document_of,
    ending_of,
    expected_ending,
)

RECOVERY = 1.5  # seconds until a process has noticed the end of an outage
LONG_OUTAGE = 2.0  # lease is 4; a shorter one must not cause a second call
DEADLINE = 120.0


@dataclass(frozen=True, slots=True)
class Arrival:
    """at, leaves_after: in units of time."""

    at: float
    process: int
    kind: str
    leaves_after: float | None


@dataclass(frozen=True, slots=True)
class Outage:
    """process: None for all."""

    start: float
    end: float
    process: int | None
    is_error: bool


@dataclass(frozen=True, slots=True)
class Schedule:
    """fates: how the first, second, ... POST ends, and after how long.

    kill: a process and the time of its death.
    """

    seed: int
    processes: int
    arrivals: list[Arrival]
    fates: list[tuple[str, float]]
    kill: tuple[int, float] | None
    outages: list[Outage]

    @property
    def is_quiet(self) -> bool:
        return self.kill is None and not self.outages


def generate(seed: int, *, has_outages: bool = True, kill_share: float = 0.2) -> Schedule:
    random = Random(seed)
    processes = random.choice((2, 2, 3))
    spread = random.choice((0.01, 0.3, 1.5, 5.0))
    arrivals = [
        Arrival(
            round(random.uniform(0, spread), 3),
            random.randrange(processes),
            random.choice(("run", "submit")),
            round(random.uniform(0.01, 2.0), 3) if random.random() < 0.12 else None,
        )
        for _ in range(random.randrange(2, 9))
    ]
    fates = [
        (random.choice(FATES + JOB_FATES), round(random.choice((0.02, 0.3, 1.0, 2.0, 6.0)), 3))
        for _ in range(8)
    ]
    kill = None
    if random.random() < kill_share:
        kill = random.randrange(processes), round(random.uniform(0, 2.0), 3)
    outages = []
    if has_outages and random.random() < 0.3:
        for _ in range(random.randrange(1, 3)):
            start = round(random.uniform(0, 4.0), 3)
            length = round(random.choice((random.uniform(0.05, 0.5), random.uniform(5, 8))), 3)
            victim = random.choice((None, random.randrange(processes)))
            outages.append(Outage(start, start + length, victim, random.random() < 0.5))
    arrivals.sort(key=lambda arrival: arrival.at)
    return Schedule(seed, processes, arrivals, fates, kill, outages)


@dataclass
class Play:
    """One run of a schedule.

    stores: one for each process.
    scale: seconds of one unit of time.
    slack: seconds in which the end of a call may not be known yet.
    lookup_time: seconds until the store has the first lookup of a call; a call whose first lookup
        comes after the end of another one has not waited for that.
    """

    schedule: Schedule
    stores: Sequence[CacheStore]
    prompt: str
    lease: float
    scale: float = 1.0
    slack: float = 0.05
    lookup_time: float = 0.01
    calls: list[ClientCall] = field(default_factory=list)
    processes: list[Process] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.random = Random(self.schedule.seed + 1)
        self.fal = SimulatedFal(self.schedule.fates, self.scale)
        self.tasks: dict[asyncio.Task[None], ClientCall] = {}
        self.started = 0.0

    @property
    def now(self) -> float:
        return asyncio.get_running_loop().time()

    async def run(self) -> list[str]:
        """Return what went wrong."""
        self.started = self.now
        for number in range(self.schedule.processes):
            store = SimulatedStore(self.stores[number], lambda: self.random.uniform(0, 0.004))
            store.outages = [
                (self.started + o.start * self.scale, self.started + o.end * self.scale, o.is_error)
                for o in self.schedule.outages
                if o.process in (None, number)
            ]
            process = Process(number, store, self.fal, self.lease, self.prompt)
            await process.result_cache.breaker.__aenter__()
            self.processes.append(process)
        try:
            await self._run()
        finally:
            for process in self.processes:
                await process.result_cache.close(0.0)
                await process.result_cache.breaker.__aexit__(None, None, None)
        return self.faults

    async def _run(self) -> None:
        work = [self._arrive(arrival) for arrival in self.schedule.arrivals]
        async with asyncio.TaskGroup() as group:
            for arriving in work:
                group.create_task(arriving)
            if self.schedule.kill is not None:
                group.create_task(self._kill(*self.schedule.kill))
        await self._check_end()

    async def _arrive(self, arrival: Arrival) -> None:
        await asyncio.sleep(self.started + arrival.at * self.scale - self.now)
        process = self.processes[arrival.process]
        if process.died_at is not None:
            return
        await self._start(process, arrival.kind, arrival.leaves_after)

    async def _start(self, process: Process, kind: str, leaves_after: float | None) -> ClientCall:
        client_call = ClientCall(kind, self.now, process)
        self.calls.append(client_call)
        task = asyncio.get_running_loop().create_task(self._call(client_call))
        self.tasks[task] = client_call
        timeout = DEADLINE * self.scale if leaves_after is None else leaves_after * self.scale
        await asyncio.wait([task], timeout=timeout)
        if not task.done() and leaves_after is None:
            self.faults.append(f"a {kind} did not end: {process.result_cache}")
        task.cancel()
        await asyncio.wait([task])
        del self.tasks[task]
        if not task.cancelled() and task.exception() is not None:
            self.faults.append(f"a {kind} failed with {task.exception()!r}")
        return client_call

    async def _call(self, client_call: ClientCall) -> None:
        try:
            found = await client_call.process.call(client_call)
            document = await document_of(found) if found.content_type != "text/html" else {}
            client_call.ending = ending_of(found.status, found.headers)
            if found.status == 200 and client_call.kind == "submit" and "request_id" in document:
                client_call.ending = None
                client_call.ending = await self._follow(document["request_id"])
        except ProxyError as error:
            client_call.ending = ending_of(error.status, error.headers)
        client_call.ended_at = self.now

    async def _follow(self, request_id: str) -> ClientEnding:
        """Poll a request at all living processes, as behind a load balancer."""
        while True:
            living = [process for process in self.processes if process.died_at is None]
            process = self.random.choice(living)
            try:
                status = await process.get(request_id, "/status")
                document = await document_of(status)
                if document["status"] == "COMPLETED":
                    result = await process.get(request_id)
                    return ending_of(result.status, result.headers)
            except ProxyError as error:
                if error.code not in ("cache_unavailable", "request_not_found"):
                    raise
            await asyncio.sleep(0.2 * self.scale)

    async def _kill(self, number: int, at: float) -> None:
        await asyncio.sleep(self.started + at * self.scale - self.now)
        process = self.processes[number]
        killing = asyncio.ensure_future(process.kill())
        for task, client_call in tuple(self.tasks.items()):
            if client_call.process is process and client_call.ending is None:
                client_call.ended_at = self.now
                task.cancel()
        await killing

    async def _check_end(self) -> None:
        """Check the calls, and that a later call is sent again, or gets a result."""
        living = [process for process in self.processes if process.died_at is None]
        flights = [process.result_cache.single_flight for process in living]
        try:
            async with asyncio.timeout(DEADLINE * self.scale):
                while any(flight._tasks for flight in flights) or any(
                    process.result_cache.breaker.is_open for process in living
                ):
                    await asyncio.sleep(0.1 * self.scale)
        except TimeoutError:
            self.faults.append("shared calls did not end")
            return
        if self.schedule.outages:
            end = max(outage.end for outage in self.schedule.outages)
            await asyncio.sleep(max(0.0, self.started + end * self.scale - self.now) + RECOVERY)
        self.faults += [*self._unjustified_sends(), *self._wrong_endings()]
        has_result = any(send.fate == "result" and not send.is_cancelled for send in self.fal.sends)
        before = len(self.fal.sends)
        late = await self._start(self.random.choice(living), "run", None)
        # A job whose leader died may still be in progress: the call then follows it.
        has_died = self.schedule.kill is not None
        if len(self.fal.sends) - before != 1 and not has_result and not has_died:
            self.faults.append(f"a later call was sent {len(self.fal.sends) - before} times")
        if late.ending is None:
            self.faults.append("a later call has no response")

    # The rules

    def _unjustified_sends(self) -> list[str]:
        """A call is sent although another one is in progress only after the death of its leader, or
        if an outage kept the two from knowing each other."""
        sends = self.fal.sends
        return [
            f"send {later} is not justified beside send {earlier}"
            for later in range(len(sends))
            for earlier in range(later)
            if not self._is_justified(sends[earlier], sends[later])
        ]

    def _is_justified(self, earlier: Send, later: Send) -> bool:
        looked_up_at = later.call.arrived_at + self.lookup_time
        if earlier.ended_at is not None and looked_up_at >= earlier.ended_at:
            return True
        if earlier.is_cancelled or self._died_with(earlier):
            return True
        return any(self._had_no_store(send) for send in (earlier, later)) or any(
            self._had_long_outage(send.process, earlier.at, later.at) for send in (earlier, later)
        )

    def _died_with(self, send: Send) -> bool:
        """Return whether the leader died before the store had its job or its end."""
        process = send.process
        if process.died_at is None or send.job_id in process.store.recorded_jobs:
            return False
        return not any(at >= send.at for at in process.store.finished_at)

    def _had_no_store(self, send: Send) -> bool:
        """Return whether the call was sent without the store, because its first lookup failed."""
        arrived = send.call.arrived_at
        lookups = [at for at in send.process.store.acquired_at if at > arrived]
        until = min([*lookups, send.at])
        return any(
            start <= until and arrived <= end + RECOVERY
            for start, end, _ in send.process.store.outages
        )

    def _had_long_outage(self, process: Process, start: float, end: float) -> bool:
        return any(
            until - since > LONG_OUTAGE and since <= end and start <= until + RECOVERY
            for since, until, _ in process.store.outages
        )

    def _wrong_endings(self) -> list[str]:
        wrong = []
        for number, call in enumerate(self.calls):
            if call.ending is None:
                continue
            own = [send for send in self.fal.sends if send.call is call]
            shared = own or [send for send in self.fal.sends if self._overlaps(call, send)]
            allowed = {expected_ending(send.fate) for send in shared}
            if any(send.is_cancelled for send in shared):
                allowed.add(ending_of(499, {}))
            if any(send.fate == "result" for send in self.fal.sends):
                allowed.add(ending_of(200, {}))  # a cached result
            is_lost = not self.schedule.is_quiet and call.kind == "submit"
            if call.ending not in allowed and not (is_lost and call.ending[0] in (500, 503)):
                wrong.append(f"call {number} ended with {call.ending}, not with {allowed}")
        return wrong

    def _overlaps(self, call: ClientCall, send: Send) -> bool:
        """Return whether the call waited for the one that was sent."""
        # A submit has an id at once if it joins a run, whose end may not be known here yet.
        slack = self.slack + (1.2 if call.kind == "submit" else 0.0)
        ended_at = send.ended_at
        if not self.schedule.is_quiet:
            ended_at = None  # the end may be known late
        return send.call.arrived_at <= call.ended_at and (
            ended_at is None or call.arrived_at <= ended_at + slack
        )

    def report(self) -> str:
        """Describe the schedule and what happened."""
        schedule, start = self.schedule, self.started
        lines = [f"seed {schedule.seed}: {schedule.processes} processes, kill {schedule.kill}"]
        lines += [f"  {outage}" for outage in schedule.outages]
        for number, call in enumerate(self.calls):
            lines.append(
                f"  call {number}: {call.kind} at {call.process} from {call.arrived_at - start:.3f}"
                f" to {call.ended_at - start:.3f}: {call.ending}"
            )
        for number, send in enumerate(self.fal.sends):
            end = "never" if send.ended_at is None else f"{send.ended_at - start:.3f}"
            lines.append(
                f"  send {number}: {send.fate!r} by call {self.calls.index(send.call)} at"
                f" {send.process} from {send.at - start:.3f} to {end}"
                f"{', cancelled' * send.is_cancelled}"
            )
        return "\n".join([*lines, *(f"  FAULT {fault}" for fault in self.faults)])
