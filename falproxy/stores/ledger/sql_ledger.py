"""The ledger over a SQL database."""

from collections.abc import Sequence
from typing import Self

from falproxy.stores.ledger import (
    CLAIM_BATCH_SIZE,
    CallRecord,
    GroupBy,
    Interval,
    JobQuery,
    JobRow,
    Lease,
    Outcome,
    ProcessStart,
    Totals,
    UsageQuery,
    UserTotals,
)
from falproxy.stores.ledger.database import DbConnection, LedgerDatabase
from falproxy.stores.ledger.rows import (
    Row,
    clean_text,
    job_from_row,
    job_query_to_row,
    job_to_row,
    job_update_row,
    lease_to_row,
    outcome_to_row,
    query_to_row,
    record_from_row,
    record_to_row,
    summaries_from_rows,
    to_ms,
    totals_from_row,
    user_totals_from_row,
)
from falproxy.stores.ledger.statements import (
    ADD_JOB,
    ADD_OUTCOME,
    ADD_RECORD,
    ADD_START,
    CLAIM_JOBS,
    COUNT_OLD_JOBS,
    COUNT_OLD_RECORDS,
    DELETE_BATCH_SIZE,
    DELETE_JOB,
    DELETE_JOBS,
    DELETE_QUERIES,
    GET_JOB,
    LIST_JOBS,
    PROBE,
    RENEW_JOBS,
    SAVE_JOB,
    SELECT_LATEST,
)
from falproxy.stores.ledger.totals_queries import (
    HAS_OPEN_PERIODS,
    SELECT_OPEN_PERIODS,
    SUM_STATEMENTS,
    SUMMARY_QUERIES,
    TOTALS_QUERIES,
    USER_TOTALS_QUERY,
)


class SqlLedger:
    def __init__(self, database: LedgerDatabase) -> None:
        self._database = database

    def __repr__(self) -> str:
        return f"<SqlLedger {self._database}>"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._database.close()

    async def probe(self) -> None:
        await self._database.execute(PROBE)

    async def write(self, rows: Sequence[CallRecord | Outcome]) -> None:
        records = [record_to_row(row) for row in rows if isinstance(row, CallRecord)]
        outcomes = [outcome_to_row(row) for row in rows if isinstance(row, Outcome)]
        inserts = ((ADD_RECORD, records), (ADD_OUTCOME, outcomes))
        await self._database.run_transaction([insert for insert in inserts if insert[1]])

    async def totals(
        self, query: UsageQuery, by: GroupBy | None = None
    ) -> list[tuple[str, Totals]]:
        rows = await self._database.read(TOTALS_QUERIES[by], query_to_row(query))
        if not rows and by is None:
            return [("", Totals())]
        return [totals_from_row(row, by) for row in rows]

    async def totals_by_user(self, query: UsageQuery) -> list[UserTotals]:
        rows = await self._database.read(USER_TOTALS_QUERY, query_to_row(query))
        return [user_totals_from_row(row) for row in rows]

    async def summarize(
        self, query: UsageQuery, interval: Interval
    ) -> dict[GroupBy, list[tuple[str, Totals]]]:
        rows = await self._database.read(SUMMARY_QUERIES[interval], query_to_row(query))
        return summaries_from_rows(rows, interval)

    async def read(self, statement: str, row: Row = ()) -> list[Row]:
        return await self._database.read(statement, row)

    async def sum_periods(self, until: float, limit: int) -> int:
        async def sum_open_periods(connection: DbConnection) -> int:
            await connection.fetch(connection.begin_statement)
            ((is_locked,),) = await connection.fetch(connection.lock_sums_query)
            total = 0
            for length, statements in SUM_STATEMENTS.items():
                numbers: list[Row] = []
                if is_locked:
                    row = (to_ms(until), limit - total)
                    numbers = await connection.fetch(SELECT_OPEN_PERIODS[length], row)
                for statement in statements:
                    await connection.execute_many(statement, numbers)
                total += len(numbers)
            await connection.fetch("COMMIT")
            return total

        if not await self._database.execute(HAS_OPEN_PERIODS, (to_ms(until),)):
            return 0
        return await self._database.write(sum_open_periods)

    async def latest(self, query: UsageQuery) -> list[CallRecord]:
        rows = await self._database.read(SELECT_LATEST, query_to_row(query))
        return [record_from_row(row) for row in rows]

    async def add_start(self, start: ProcessStart) -> None:
        texts = map(clean_text, (start.version, start.host))
        await self._database.execute(ADD_START, (start.id, to_ms(start.at), *texts))

    async def delete_before(self, before: float) -> int:
        records, *_ = [
            await self._delete_batches(statement, to_ms(before)) for statement in DELETE_QUERIES
        ]
        return records

    async def delete_jobs_before(self, before: float) -> int:
        return await self._delete_batches(DELETE_JOBS, to_ms(before))

    async def count_before(self, before: float) -> int:
        ((count,),) = await self._database.read(COUNT_OLD_RECORDS, (to_ms(before),))
        return int(count)

    async def count_jobs_before(self, before: float) -> int:
        ((count,),) = await self._database.read(COUNT_OLD_JOBS, (to_ms(before),))
        return int(count)

    async def _delete_batches(self, statement: str, before: int) -> int:
        total = 0
        while count := len(await self._database.execute(statement, (before,))):
            total += count
            if count < DELETE_BATCH_SIZE:
                break
        return total

    async def add_job(self, job: JobRow, lease: Lease) -> JobRow:
        (row,) = await self._database.execute(ADD_JOB, job_to_row(job, lease))
        return job_from_row(row)

    async def save_job(self, job: JobRow) -> JobRow | None:
        rows = await self._database.execute(SAVE_JOB, job_update_row(job))
        return job_from_row(rows[0]) if rows else None

    async def get_job(self, job_id: str, owner: str) -> JobRow | None:
        rows = await self._database.execute(GET_JOB, (job_id, owner))
        return job_from_row(rows[0]) if rows else None

    async def list_jobs(self, query: JobQuery) -> list[JobRow]:
        statement = LIST_JOBS[query.is_ascending]
        return [
            job_from_row(row)
            for row in await self._database.execute(statement, job_query_to_row(query))
        ]

    async def delete_job(self, job_id: str, owner: str) -> bool:
        return bool(await self._database.execute(DELETE_JOB, (job_id, owner)))

    async def claim_jobs(self, lease: Lease, limit: int = CLAIM_BATCH_SIZE) -> list[JobRow]:
        row = lease_to_row(lease)
        await self._database.execute(RENEW_JOBS, row)
        claimed = await self._database.execute(CLAIM_JOBS, (*row, limit, lease.api))
        return sorted(map(job_from_row, claimed), key=lambda job: job.created_at)
