"""Runs seeded schedules of faults, and counts what the clients see."""

import asyncio
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from random import Random

from aiohttp import ClientSession, ClientTimeout, TCPConnector

from tests.support.faults.calls import Clients, Tally
from tests.support.faults.cluster import Cluster, open_cluster
from tests.support.faults.injected import FAULTS, names
from tests.support.key_search import leak_trace

RATE = 25.0  # calls a second
CLIENTS_MAX = 20  # at the same time; fewer calls are made if the machine is slow
CALLS_OF_A_CLIENT = 1.9  # on average, since some kinds are equal calls
WINDOW_SECONDS = 5.0  # between the beginnings of two faults
PAIR_SHARE = 0.2  # of windows in which two faults come at once
PAIRS = "two of these at once"
FAULT_DELAY = 0.3  # seconds of a window before its fault
DOWNLOAD_TIMEOUT = 20.0
LOG_LINES_MAX = 60  # of a request that was not found


@dataclass(slots=True)
class Results:
    """The tallies by fault, and how often each was applied."""

    tallies: dict[str, Tally] = field(default_factory=dict)
    applied: Counter[str] = field(default_factory=Counter)
    is_disk_small: bool = False

    def tally(self, name: str) -> Tally:
        return self.tallies.setdefault(name, Tally())

    @property
    def calls(self) -> int:
        return sum(tally.calls for tally in self.tallies.values())

    @property
    def broken_promises(self) -> int:
        return sum(tally.broken_promises for tally in self.tallies.values())

    @property
    def notes(self) -> list[str]:
        return [f"{name}: {n}" for name, tally in self.tallies.items() for n in tally.notes]


@dataclass(frozen=True, slots=True)
class Plan:
    """A schedule on one cluster. faults: the names for each window, one or two."""

    seed: int
    uses_disk: bool
    faults: list[tuple[str, ...]]


def plan(seed: int, *, uses_disk: bool, windows: int) -> Plan:
    """Return a schedule in which all faults come before one is repeated."""
    random = Random(seed)
    faults: list[tuple[str, ...]] = []
    while len(faults) < windows:
        order = names(uses_disk=uses_disk)
        random.shuffle(order)
        faults += [(name,) for name in order]
    faults = faults[:windows]
    for position in range(windows):
        if random.random() < PAIR_SHARE:
            faults[position] += (random.choice(names(uses_disk=uses_disk)),)
    return Plan(seed, uses_disk, faults)


async def run_plan(plan: Plan, results: Results, log: Callable[[str], None]) -> None:
    random = Random(plan.seed)
    async with (
        open_cluster(plan.seed, uses_disk=plan.uses_disk) as cluster,
        ClientSession(
            connector=TCPConnector(limit=0),
            timeout=ClientTimeout(total=DOWNLOAD_TIMEOUT),
            trace_configs=[leak_trace()],
        ) as session,
    ):
        results.is_disk_small |= plan.uses_disk and cluster.has_small_disk
        clients = Clients(cluster, session, Random(plan.seed + 1))
        calls: set[asyncio.Task[None]] = set()
        for chosen in plan.faults:
            name = chosen[0] if len(set(chosen)) == 1 else PAIRS
            results.applied[name] += 1
            log(f"seed {plan.seed}: {' + '.join(chosen)}")
            await run_window(chosen, results.tally(name), clients, cluster, random, calls)
        await asyncio.gather(*calls)
        log(f"seed {plan.seed}: checks")
        await clients.check_at_the_end()
        results.tally("none").broken += cluster.broken_files()
        for request_id in dict.fromkeys(clients.lost_ids):
            for line in cluster.log_lines(request_id)[-LOG_LINES_MAX:]:
                log(line)
        for message in cluster.exceptions():
            log(f"seed {plan.seed}: {message}")


async def run_window(
    chosen: tuple[str, ...],
    tally: Tally,
    clients: Clients,
    cluster: Cluster,
    random: Random,
    calls: set[asyncio.Task[None]],
) -> None:
    """Make calls while faults begin, last and are repaired."""
    loop = asyncio.get_running_loop()
    ends_at = loop.time() + WINDOW_SECONDS
    faults = asyncio.ensure_future(apply(chosen, cluster, random))
    while loop.time() < ends_at or not faults.done():
        if len(calls) < CLIENTS_MAX:
            calls.add(asyncio.ensure_future(clients.call(tally)))
        await asyncio.sleep(random.expovariate(RATE / CALLS_OF_A_CLIENT))
        for call in [call for call in calls if call.done()]:
            calls.remove(call)
            await call
    await faults


async def apply(chosen: tuple[str, ...], cluster: Cluster, random: Random) -> None:
    """Apply faults and repair them. At the end no entry is in the memory of one process alone: if
    the next fault killed that process, it would be lost, which is not promised otherwise."""
    async with AsyncExitStack() as stack:
        await asyncio.sleep(FAULT_DELAY)
        for name in dict.fromkeys(chosen):
            await stack.enter_async_context(FAULTS[name](cluster, random))
    await cluster.until_written()


def as_markdown(results: Results) -> str:
    """Return the table of the report."""
    lines = [
        "| fault | times | calls | paid twice | results lost | files broken | wrong responses "
        "| endless waits | errors of calls |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    rows = [name for name in (*FAULTS, PAIRS) if name in results.tallies]
    for name in rows:
        tally = results.tallies[name]
        lines.append(row(name, results.applied[name], tally))
    lines.append(row("**all**", results.applied.total(), total(results.tallies)))
    return "\n".join(lines)


def row(name: str, times: int, tally: Tally) -> str:
    counts = (tally.doubles, tally.lost, tally.broken, tally.foreign, tally.hung)
    errors = ", ".join(f"{count} x {kind}" for kind, count in tally.errors.most_common())
    cells = (name, f"{times}", f"{tally.calls:,}", *map(str, counts), errors or "none")
    return f"| {' | '.join(cells)} |"


def total(tallies: Mapping[str, Tally]) -> Tally:
    all_calls = Tally()
    for tally in tallies.values():
        for name in ("calls", "doubles", "lost", "broken", "foreign", "hung", "extra"):
            setattr(all_calls, name, getattr(all_calls, name) + getattr(tally, name))
        all_calls.errors += tally.errors
        all_calls.repeated += tally.repeated
    return all_calls
