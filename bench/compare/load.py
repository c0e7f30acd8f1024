"""Load for a while: wrk for small calls, connections of our own for large bodies."""

import asyncio
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

from compare.calls import PROXY_PATH, Call
from compare.connection import BrokenError, Connection
from compare.contestants import Started
from compare.process import PARTS
from compare.upstream import Upstream

CONNECTIONS = 64
AT_ONCE = 16
LEAD_SECONDS = 0.5  # until a slice's connections stand and everybody is warm
SCRIPT = Path(__file__).parent / "wrk.lua"


@dataclass(frozen=True, slots=True)
class Sample:
    """What one contestant did in one slice. cpu, wall: seconds. peak: MiB."""

    requests: int
    cpu: float
    wall: float
    peak: float

    @property
    def rate(self) -> float:
        """Requests per CPU second."""
        return self.requests / self.cpu


async def wrk_slice(it: Started, call: Call, upstream: Upstream, seconds: int) -> Sample:
    """Counted in the middle of wrk's run by the upstream, so that as many calls are on their way
    at the end as there were at the start. A submit counts twice there: its server asks itself.

    Raises: BrokenError, there was an answer that is not 200, or is too short.
    """
    process = await asyncio.create_subprocess_exec(
        *("taskset", "-c", ",".join(map(str, PARTS["load"]))),
        *("wrk", "-t1", f"-c{CONNECTIONS}", f"-d{seconds + 1}s", "--timeout", "30s"),
        *("-s", str(SCRIPT)),
        f"http://127.0.0.1:{it.port}",
        stdout=asyncio.subprocess.PIPE,
        env={
            "PATH": os.environ["PATH"],
            "BENCH_METHOD": call.method,
            "BENCH_PATH": PROXY_PATH,
            "BENCH_BODY": call.body.decode(),
            "BENCH_JOBS": " ".join(call.jobs),
            "BENCH_HEADERS": "".join(
                f"{name}: {value}\n" for name, value in call.headers().items()
            ),
        },
    )
    await asyncio.sleep(LEAD_SECONDS)
    requests, cpu, started = await upstream.count(), it.tree.cpu(), time.monotonic()
    await asyncio.sleep(seconds)
    requests = await upstream.count() - requests
    cpu, wall = it.tree.cpu() - cpu, time.monotonic() - started
    output, _ = await process.communicate()
    check(json.loads(output.splitlines()[-1]), call)
    per_call = 2 if call.method == "POST" else 1
    return Sample(requests // per_call, cpu, wall, it.tree.peak())


def check(said: dict[str, int], call: Call) -> None:
    if said["status"] or said["broken"] or not said["requests"]:
        raise BrokenError(f"wrk had {said['status']} bad statuses, {said['broken']} errors")
    if call.length and said["bytes"] < said["requests"] * call.length:
        raise BrokenError("answers were too short")


async def transfers_slice(it: Started, call: Call, seconds: int) -> Sample:
    """Large bodies, AT_ONCE at a time. What was begun is finished, and counted.

    Raises: BrokenError, there was an answer that is not 200, or has another length.
    """
    connections = [await Connection.open(it.port) for _ in range(AT_ONCE)]
    request = call.wire(it.port)
    until = time.monotonic() + seconds

    async def work(connection: Connection) -> int:
        count = 0
        while time.monotonic() < until:
            answer = await connection.ask(request)
            if answer.status != 200 or answer.length != call.length:
                raise BrokenError(f"status {answer.status}, {answer.length} bytes")
            count += 1
        return count

    cpu, started = it.tree.cpu(), time.monotonic()
    try:
        requests = sum(await asyncio.gather(*map(work, connections)))
    finally:
        for connection in connections:
            connection.close()
    cpu, wall = it.tree.cpu() - cpu, time.monotonic() - started
    return Sample(requests, cpu, wall, it.tree.peak())
