"""`make soak`: mixed load for a long time, while the resources of all workers are measured."""

import argparse
import asyncio
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from random import Random
from statistics import mean

from aiohttp import ClientError, ClientSession, ClientTimeout, TCPConnector

from tests.support.faults.calls import Clients, Tally
from tests.support.faults.cluster import CALLERS, Cluster, access_key, open_cluster
from tests.support.faults.report import write_section
from tests.support.faults.suite import CALLS_OF_A_CLIENT, CLIENTS_MAX, DOWNLOAD_TIMEOUT

SAMPLE_INTERVAL = 15.0  # seconds
SETTLE_SECONDS = 12.0  # after the last call, until connections and tasks have ended
MIB = 2**20
# Growth of the mean of the last third over that of the second one that is still flat.
GROWTH_MAX = {"memory": 0.06, "descriptors": 0.15, "tasks": 0.25, "files": 0.15}
GROWTH_MIN = {"memory": 2.0, "descriptors": 6.0, "tasks": 10.0, "files": 4.0}


@dataclass(frozen=True, slots=True)
class Sample:
    """Sums over all workers. memory: private, in MiB. files: in the folder of all nodes."""

    seconds: float
    memory: float
    descriptors: int
    tasks: int
    files: int


async def measure(cluster: Cluster, session: ClientSession, started: float) -> Sample:
    pids = [pid for node in cluster.nodes for pid in node.worker_pids]
    tasks = [await count_tasks(session, node.origin) for node in cluster.nodes]
    return Sample(
        time.monotonic() - started,
        sum(map(private_memory, pids)) / MIB,
        sum(count_entries(Path(f"/proc/{pid}/fd")) for pid in pids),
        sum(tasks),
        sum(path.is_file() for path in cluster.data.rglob("*")),
    )


async def count_tasks(session: ClientSession, origin: str) -> int:
    headers = {"Authorization": f"Key {access_key(CALLERS[0])}"}
    async with session.get(f"{origin}/metrics", headers=headers) as response:
        text = await response.text()
    line = next(line for line in text.splitlines() if line.startswith("falproxy_tasks "))
    return int(float(line.split()[1]))


def private_memory(pid: int) -> int:
    """Return the bytes that a process alone uses."""
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    lines = [line.split() for line in rollup if line.startswith("Private_")]
    return 1024 * sum(int(parts[1]) for parts in lines)


def count_entries(folder: Path) -> int:
    return sum(1 for _ in folder.iterdir())


async def run(minutes: float, rate: float, seed: int) -> tuple[list[Sample], Tally]:
    """Return the samples, the last one after the load, and what happened to the calls."""
    random, tally = Random(seed), Tally()
    async with (
        open_cluster(seed, uses_disk=False) as cluster,
        ClientSession(
            connector=TCPConnector(limit=0), timeout=ClientTimeout(total=DOWNLOAD_TIMEOUT)
        ) as session,
    ):
        clients = Clients(cluster, session, random)
        started = time.monotonic()
        samples = [await measure(cluster, session, started)]
        calls: set[asyncio.Task[None]] = set()
        while time.monotonic() - started < 60 * minutes:
            if len(calls) < CLIENTS_MAX:
                call = asyncio.ensure_future(clients.call(tally))
                calls.add(call)
                call.add_done_callback(calls.discard)
            await asyncio.sleep(random.expovariate(rate / CALLS_OF_A_CLIENT))
            if time.monotonic() - started > len(samples) * SAMPLE_INTERVAL:
                with suppress(ClientError, TimeoutError):  # the machine is too busy for a sample
                    samples.append(await measure(cluster, session, started))
        await asyncio.gather(*calls)
        await asyncio.sleep(SETTLE_SECONDS)
        samples.append(await measure(cluster, session, started))
        await clients.check_at_the_end()
    return samples, tally


def growing(samples: list[Sample]) -> list[str]:
    """Return what grew from the second third to the last one."""
    third = len(samples) // 3
    found = []
    for name, limit in GROWTH_MAX.items():
        before, after = (
            average(name, part) for part in (samples[third : 2 * third], samples[2 * third :])
        )
        if after - before > max(limit * before, GROWTH_MIN[name]):
            found.append(f"{name} grew from {before:.1f} to {after:.1f}")
    return found


def average(name: str, samples: Iterable[Sample]) -> float:
    return mean(float(getattr(sample, name)) for sample in samples)


def as_markdown(samples: list[Sample]) -> str:
    lines = ["| minute | memory (MiB) | descriptors | tasks | files |", "|---|---|---|---|---|"]
    chosen = samples[:: max(1, len(samples) // 12)]
    if chosen[-1] is not samples[-1]:
        chosen.append(samples[-1])
    for each in chosen:
        lines.append(
            f"| {each.seconds / 60:.1f} | {each.memory:.0f} | {each.descriptors} | {each.tasks} "
            f"| {each.files} |"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="make soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--rate", type=float, default=5, help="calls in a second")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--write", action="store_true", help="write docs/reliability.md")
    options = parser.parse_args()
    samples, tally = asyncio.run(run(options.minutes, options.rate, options.seed))
    found = growing(samples)
    errors = ", ".join(f"{n} x {kind}" for kind, n in tally.errors.most_common()) or "none"
    text = (
        f"{tally.calls:,} calls in {options.minutes:g} minutes; errors of calls: {errors}; broken "
        f"promises: {tally.broken_promises}. The numbers are sums over six workers; the last row "
        f"is after the load.\n\n{as_markdown(samples)}\n\n"
        f"Growing: {'; '.join(found) or 'nothing'}.\n"
    )
    sys.stdout.write(text)
    for note in tally.notes:
        sys.stderr.write(f"{note}\n")
    if options.write:
        write_section("soak", text)
    return 1 if found or tally.broken_promises else 0


if __name__ == "__main__":
    raise SystemExit(main())
