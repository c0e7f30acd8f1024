"""Wall and CPU time of the dashboard's queries on a ledger with a million calls.

Run it with `make bench`. `DATABASE_URL` uses that PostgreSQL, in which the calls are left, instead
of an SQLite file. Arguments: the number of calls, 1,000,000 by default.
"""

import asyncio
import os
import random
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from statistics import median
from uuid import UUID

from falproxy.ids import IdGenerator, time_ordered_id
from falproxy.stores.ledger import CallRecord, Ledger, Outcome
from falproxy.stores.ledger.call_list import CallQuery, list_calls
from falproxy.stores.ledger.performance import count_unfinished_jobs, read_performance
from falproxy.stores.ledger.writer import choose_ledger

DAY = 86400.0
CALLS = 1_000_000  # of a day
BATCH = 5000
ROUNDS = 5
FAILED = 0.06  # share of the calls
Query = Callable[[], Awaitable[object]]


async def fill(ledger: Ledger, calls: int, now: float) -> None:
    source, ids = random.Random(1), IdGenerator()
    rows: list[CallRecord | Outcome] = []
    for number in range(calls):
        rows += call_rows(source, ids, now - DAY + DAY * number / calls)
        if len(rows) >= BATCH:
            await ledger.write(rows)
            rows = []
    await ledger.write(rows)


def call_rows(source: random.Random, ids: IdGenerator, at: float) -> list[CallRecord | Outcome]:
    is_job, has_failed = source.random() < 0.7, source.random() < FAILED
    request_id, seconds = str(UUID(int=source.getrandbits(128))), source.lognormvariate(1, 0.6)
    status = source.choice([422, 429, 500, 503]) if has_failed else 200
    record = CallRecord(
        id=time_ordered_id(ids.next_id(), at),
        at=at,
        route="/api/fal/proxy",
        status=200 if is_job else status,
        principal=source.choice([None, *(f"key-{number}" for number in range(8))]),
        user_id=f"user-{source.randrange(200)}",
        operation="submit" if is_job else "run",
        endpoint=f"fal-ai/model-{source.randrange(12)}",
        request_id=request_id,
        cache=source.choice([None, "hit", "miss"]),
        seconds=0.15 if is_job else seconds,
        upstream_seconds=0.148 if is_job else seconds - 0.002,
        estimated=25_000,
        proxy_request_id=str(UUID(int=source.getrandbits(128))),
        error_type=None if is_job or not has_failed else "internal_error",
    )
    if not is_job:
        return [record]
    outcome = Outcome(
        request_id=request_id,
        status=status,
        error_type="internal_error" if has_failed else None,
        settled=25_000,
        ended_at=at + seconds + 0.5,
        run_seconds=seconds,
    )
    return [record, outcome]


def queries(ledger: Ledger, now: float) -> dict[str, Query]:
    day = now - DAY
    filters = {
        "calls": CallQuery(since=day),
        "calls of one caller": CallQuery(since=day, caller="key-3"),
        "calls, failed": CallQuery(since=day, state="failed"),
        "calls, a user without any": CallQuery(since=day, user="nobody-at-all"),
        "calls, slow ones": CallQuery(since=day, min_seconds=60),
    }
    return {
        "performance, an hour": lambda: read_performance(ledger, now - 3600, now, None),
        "performance, a day": lambda: read_performance(ledger, day, now, None),
        "performance of one caller": lambda: read_performance(ledger, day, now, "key-3"),
        "unfinished jobs": lambda: count_unfinished_jobs(ledger, now),
        **{
            name: lambda query=query: list_calls(ledger, query, 50)  # type: ignore[misc]
            for name, query in filters.items()
        },
    }


async def measure(query: Query) -> tuple[float, float]:
    """Return the medians of the wall and the CPU time of this process, in milliseconds."""
    walls, cpus = [], []
    for _ in range(ROUNDS):
        wall, cpu = time.perf_counter(), time.process_time()
        await query()
        walls.append(time.perf_counter() - wall)
        cpus.append(time.process_time() - cpu)
    return median(walls) * 1000, median(cpus) * 1000


async def main(calls: int) -> None:
    now = time.time()
    with tempfile.TemporaryDirectory() as folder:
        async with choose_ledger(os.environ.get("DATABASE_URL"), Path(folder)) as ledger:
            started = time.perf_counter()
            await fill(ledger, calls, now)
            print(f"{calls} calls written in {time.perf_counter() - started:.0f} s")
            print(f"{'query':28} {'wall ms':>8} {'CPU ms':>8}")
            for name, query in queries(ledger, now).items():
                wall, cpu = await measure(query)
                print(f"{name:28} {wall:8.0f} {cpu:8.0f}", flush=True)


asyncio.run(main(int(sys.argv[1]) if len(sys.argv) > 1 else CALLS))
