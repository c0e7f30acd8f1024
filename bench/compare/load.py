"""A slice of load: by wrk for small calls, by own connections for large bodies."""

import asyncio
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

from compare.calls import ANY_JOB, ENDPOINT, HEADERS, PROXY_PATH, Call, small_result_url
from compare.candidates import Started
from compare.connection import BadResponseError, Connection
from compare.process import PARTS
from compare.upstream import Upstream

CONNECTIONS = 64
CONCURRENCY = 16
LEAD_SECONDS = 0.5  # to open the connections of a slice and warm up
SCRIPT = Path(__file__).parent / "wrk.lua"


@dataclass(frozen=True, slots=True)
class Sample:
    """The result of one candidate in one slice.

    cpu, wall: seconds.
    peak: MiB.
    """

    requests: int
    cpu: float
    wall: float
    peak: float

    @property
    def rate(self) -> float:
        """Requests per CPU second."""
        return self.requests / self.cpu


async def wrk_slice(it: Started, call: Call, upstream: Upstream, seconds: int) -> Sample:
    """Run wrk. The upstream counts the requests in the middle of its run, so that as many calls are
    in progress at the end as at the start.

    Raises: BadResponseError, a response is not 200, or is too short.
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
            "BENCH_PLAN": call.plan,
            "BENCH_BODY": call.body.decode(),
            "BENCH_TARGET": call.target.replace(call.jobs[0], ANY_JOB),
            "BENCH_SUBMIT": f"https://queue.fal.run/{ENDPOINT}",
            "BENCH_RESULT": small_result_url(ANY_JOB),
            "BENCH_JOBS": " ".join(call.jobs),
            "BENCH_HEADERS": "".join(
                f"{name}: {value}\n" for name, value in {**HEADERS, **dict(call.extra)}.items()
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
    return Sample(int(requests / call.counted), cpu, wall, it.tree.peak())


def check(summary: dict[str, int], call: Call) -> None:
    if summary["status"] or summary["broken"] or not summary["requests"]:
        raise BadResponseError(
            f"wrk had {summary['status']} bad statuses, {summary['broken']} errors"
        )
    if (
        call.length
        and call.plan != "mixed"
        and summary["bytes"] < summary["requests"] * call.length
    ):
        raise BadResponseError("responses were too short")


async def transfers_slice(it: Started, call: Call, seconds: int) -> Sample:
    """Send large bodies, CONCURRENCY at a time. Calls in progress at the end are completed and
    counted.

    Raises: BadResponseError, a response is not 200, or has another length.
    """
    connections = [await Connection.open(it.port) for _ in range(CONCURRENCY)]
    request = call.wire(it.port)
    deadline = time.monotonic() + seconds

    async def work(connection: Connection) -> int:
        count = 0
        while time.monotonic() < deadline:
            response = await connection.request(request)
            if response.status != 200 or response.length != call.length:
                raise BadResponseError(f"status {response.status}, {response.length} bytes")
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
