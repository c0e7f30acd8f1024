"""Budgets over several processes that are killed at any moment, in generated schedules: never more
is charged than the budget, and no reservation is left.

A failing schedule is printed with its seed; `SCHEDULE_SEED=<seed>` plays only that one.
"""

import asyncio
import os
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from falproxy.stores.limits.sqlite import TABLES, SqliteLimitsStore
from tests.support.limit_schedules import LimitPlay
from tests.support.virtual_time import run_in_virtual_time

pytestmark = pytest.mark.slow

SEED = os.environ.get("SCHEDULE_SEED")
SCHEDULES, CHUNK = 1000, 200
CHUNKS = [0] if SEED else [*range(0, SCHEDULES, CHUNK)]


@pytest.mark.parametrize("first_seed", CHUNKS)
def test_budgets_hold_and_reservations_end_although_processes_die(
    first_seed: int, tmp_path: Path
) -> None:
    seeds = [int(SEED)] if SEED else [*range(first_seed, first_seed + CHUNK)]
    totals: Counter[str] = Counter()

    async def play_all() -> list[str]:
        loop, started = asyncio.get_running_loop(), time.time()
        file, reports = tmp_path / "limits.sqlite", []
        async with SqliteLimitsStore(file, clock=lambda: started + loop.time()) as store:
            await store.count([])
            connection: Any = store._connection
            connection.execute("PRAGMA synchronous = OFF")  # the machine does not fail
            for seed in seeds:
                play = LimitPlay(seed, store)
                if await play.run():
                    reports.append(play.report())
                (rows,) = connection.execute("SELECT count(*) FROM reservations").fetchone()
                if rows:
                    reports.append(f"seed {seed}: {rows} reservations are left")
                totals.update(play.counts, kills=play.kills, charged=play.fal.committed)
                for table in TABLES:
                    connection.execute(f"DELETE FROM {table}")
                connection.commit()
        return reports

    reports = run_in_virtual_time(play_all())
    assert not reports, "\n".join(reports)
    if not SEED:
        assert totals["kills"] > CHUNK / 4
        assert totals["budget_exceeded"] > CHUNK / 4
        assert totals["concurrency_limited"] > CHUNK / 4
