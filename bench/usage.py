"""Seconds for the reports of `/api/usage` over a large ledger, in SQLite or in PostgreSQL.

Run it with `make bench`, or `python bench/usage.py [--url postgresql://…] [records]`. The server's
tables are replaced. The sums of all periods are computed first, as after an upgrade.
"""

import argparse
import asyncio
import sys
import tempfile
import time
from pathlib import Path

from falproxy.stores.ledger import UsageQuery
from falproxy.stores.ledger.reports import TimeRange, latest_calls, usage_summary, usage_table
from falproxy.stores.ledger.sql_ledger import SqlLedger
from falproxy.stores.ledger.statements import TABLES
from falproxy.stores.ledger.writer import choose_database

DAYS = (1, 7, 40, 400)
GROUPINGS = ("endpoint", "principal", "user", "day", "hour")
BATCH = 50_000
# One record in two has an outcome. 20 endpoints, 10 principals, 1000 users of each of them.
NUMBERS = "WITH RECURSIVE n(i) AS (SELECT {first} UNION ALL SELECT i + 1 FROM n WHERE i < {last})"
RECORDS = """
    INSERT INTO falproxy_entries (id, at, route, status, principal, user_id, operation, endpoint,
        request_id, cache, seconds, upstream_seconds, estimated)
    {numbers}
    SELECT 'id-' || i, {end} - ({count} - CAST(i AS BIGINT)) * {step},
        CASE WHEN i % 3 = 0 THEN 'kontext' ELSE 'proxy' END,
        200, 'principal' || (i % 10), 'user' || (CAST(i AS BIGINT) * 7919 % 1000), 'run',
        'fal-ai/model' || (i * 31 % 20), 'request-' || i,
        CASE WHEN i % 5 = 0 THEN 'hit' ELSE 'miss' END, 2.5, 2.4, 25000
    FROM n
"""
OUTCOMES = """
    INSERT INTO falproxy_outcomes (request_id, at, status, settled) {numbers}
    SELECT 'request-' || i, {end}, 200, 30000 FROM n WHERE i % 2 = 0
"""


async def fill(ledger: SqlLedger, count: int, end: int, days: int) -> None:
    await ledger.probe()
    connection = await ledger._database._factory.connect()  # its statements have no time limit
    step = days * 86_400_000 // count
    for first in range(1, count, BATCH):
        numbers = NUMBERS.format(first=first, last=min(count, first + BATCH - 1))
        for statement in (RECORDS, OUTCOMES):
            await connection.fetch(
                statement.format(numbers=numbers, end=end, count=count, step=step)
            )
    await connection.fetch("ANALYZE")  # as the server does after some time
    await connection.close()


async def compute_sums(ledger: SqlLedger) -> tuple[int, float]:
    """Return the number of periods, and the longest time of a transaction."""
    total, longest, limit = 0, 0.0, 1
    while True:
        started = time.perf_counter()
        count = await ledger.sum_periods(time.time(), limit)
        seconds = time.perf_counter() - started
        if not count:
            return total, longest
        total, longest = total + count, max(longest, seconds)
        limit = min(limit * 2, 200) if seconds < 0.1 else limit // 2 or 1


async def report(ledger: SqlLedger, time_range: TimeRange, by: str | None) -> None:
    if by is None:
        await usage_summary(ledger, time_range, None)
        await latest_calls(ledger, time_range, None)
    else:
        await usage_table(ledger, time_range, by, None)  # type: ignore[arg-type]


async def measure(ledger: SqlLedger, days: float, now: float) -> None:
    time_range = TimeRange(now - days * 86400, now)
    columns = []
    for by in (*GROUPINGS, None):
        if by == "hour" and days > 40:
            continue
        times = []
        for _ in range(3):
            started = time.perf_counter()
            await report(ledger, time_range, by)
            times.append(time.perf_counter() - started)
        columns.append(f"{by or 'summary'} {sorted(times)[1] * 1000:.0f}")
    write(f"{days:g} days, ms: {', '.join(columns)}")


async def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("records", nargs="?", type=int, default=1_000_000)
    parser.add_argument("--url")
    parser.add_argument("--days", type=int, default=400)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        database = choose_database(options.url, Path(folder))
        ledger, now = SqlLedger(database), time.time()
        if options.url:
            for table in TABLES:
                await (connection := await database._factory.connect()).fetch(
                    f"DROP TABLE IF EXISTS {table} CASCADE"
                )
                await connection.close()
        async with ledger:
            await fill(ledger, options.records, round(now * 1000), options.days)
            started = time.perf_counter()
            ((_, totals),) = await ledger.totals(UsageQuery())
            write(f"totals of all {totals.calls} records: {time.perf_counter() - started:.2f} s")
            started = time.perf_counter()
            count, longest = await compute_sums(ledger)
            seconds = time.perf_counter() - started
            await database.execute("ANALYZE")  # as a server does in the background
            write(f"sums of {count} periods: {seconds:.1f} s, at most {longest:.2f} s at once")
            for days in (*DAYS, 30.37):
                if days <= options.days:
                    await measure(ledger, days, now)
    return 0


def write(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    raise SystemExit(asyncio.run(main()))
