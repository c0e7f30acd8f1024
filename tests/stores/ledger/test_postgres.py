"""How a PostgreSQL server executes the queries of reports."""

import re
from collections.abc import AsyncIterator, Iterator

import pytest

from falproxy.stores.ledger.performance import FAILURES_QUERIES, SAMPLE_QUERIES, SPANS
from falproxy.stores.ledger.postgres import postgres_ledger
from falproxy.stores.ledger.rows import Row
from falproxy.stores.ledger.sql_ledger import SqlLedger
from falproxy.stores.ledger.totals_queries import (
    SUMMARY_QUERIES,
    TOTALS_QUERIES,
    USER_TOTALS_QUERY,
)
from tests.support.postgres_server import PostgresServer, postgres_server

pytestmark = pytest.mark.slow

RECORDS = 40_000
MINUTE, HOUR = 60_000, 3_600_000
END = 500_000 * HOUR + HOUR // 2
START = END - RECORDS * MINUTE  # one record each minute
PLANNER_SETTINGS = ("enable_hashjoin", "enable_mergejoin", "enable_bitmapscan", "jit")
FILL = (
    f"""INSERT INTO falproxy_entries (id, at, route, status, principal, user_id, operation,
        endpoint, request_id, seconds, upstream_seconds, estimated)
        SELECT 'id-' || i, {START} + i * CAST({MINUTE} AS BIGINT), 'proxy',
            CASE WHEN i % 20 = 0 THEN 500 ELSE 200 END,
            'key-' || i % 8, 'user-' || i % 200, 'submit', 'fal-ai/model-' || i % 12,
            'request-' || i, 2.5, 2.4, 25000
        FROM generate_series(1, {RECORDS}) AS i""",
    f"""INSERT INTO falproxy_outcomes (request_id, at, status, settled, call_at)
        SELECT 'request-' || i, {END}, CASE WHEN i % 20 = 1 THEN 422 ELSE 200 END, 25000,
            CASE WHEN i % 20 = 1 THEN {START} + i * CAST({MINUTE} AS BIGINT) END
        FROM generate_series(1, {RECORDS}) AS i WHERE i % 20 <> 0""",
)
PERIOD = (END - 24 * HOUR - MINUTE, END)
PAGE = (1000, 0)
SAMPLED = tuple(
    n for span in range(SPANS) for n in (START + span * HOUR, START + (span + 1) * HOUR)
)
REPORTS: dict[str, tuple[str, Row]] = {
    **{f"totals by {by}": (TOTALS_QUERIES[by], (*PERIOD, None, *PAGE)) for by in TOTALS_QUERIES},
    "totals of users": (USER_TOTALS_QUERY, (*PERIOD, None, *PAGE)),
    "totals of one caller": (TOTALS_QUERIES["endpoint"], (*PERIOD, "key-3", *PAGE)),
    **{
        f"summary by {step}": (query, (*PERIOD, None, *PAGE))
        for step, query in SUMMARY_QUERIES.items()
    },
    "failures": (
        FAILURES_QUERIES[False],
        (PERIOD[0] - 24 * HOUR, END, PERIOD[0], HOUR, None, PERIOD[0]),
    ),
    "failures of one caller": (
        FAILURES_QUERIES[True],
        (PERIOD[0] - 24 * HOUR, END, PERIOD[0], HOUR, "key-3", PERIOD[0]),
    ),
    "durations": (SAMPLE_QUERIES[False], (None, *SAMPLED)),
    "durations of one caller": (SAMPLE_QUERIES[True], ("key-3", *SAMPLED)),
}


@pytest.fixture(scope="module")
def server() -> Iterator[PostgresServer]:
    with postgres_server() as running:
        yield running


@pytest.fixture(scope="module")
def url(server: PostgresServer) -> str:
    return server.fresh()


@pytest.fixture
async def ledger(url: str) -> AsyncIterator[SqlLedger]:
    async with postgres_ledger(url) as opened:
        yield opened


@pytest.fixture
async def full_ledger(ledger: SqlLedger, server: PostgresServer, url: str) -> SqlLedger:
    await ledger.probe()
    if not await ledger.read("SELECT 1 FROM falproxy_entries LIMIT 1"):
        schema = url.partition("=")[2]
        server.sql(f"SET search_path = {schema}; {'; '.join(FILL)}; ANALYZE")
        while await ledger.sum_periods(END / 1000, 1000):
            pass
        server.sql("ANALYZE")
    return ledger


@pytest.mark.parametrize("report", REPORTS)
async def test_reports_do_not_read_whole_tables(full_ledger: SqlLedger, report: str) -> None:
    query, row = REPORTS[report]
    plan = "\n".join(line for (line,) in await full_ledger.read(f"EXPLAIN {query}", row))
    assert "falproxy_entries" in plan
    assert not re.findall(r"Seq Scan on falproxy_(?:entries|outcomes|sums)|JIT:", plan)
    assert not re.findall(r"(?:Hash|Merge) \S*\s?Join", plan)


async def test_the_settings_of_a_report_end_with_it(ledger: SqlLedger) -> None:
    """A pooler gives the connection to other clients after a transaction."""
    current = ", ".join(f"current_setting('{name}')" for name in PLANNER_SETTINGS)
    assert await ledger.read(f"SELECT {current}") == [("off",) * len(PLANNER_SETTINGS)]
    reader = ledger._database._reader._connection
    assert reader is not None
    assert await reader.fetch(f"SELECT {current}") == [("on",) * len(PLANNER_SETTINGS)]
