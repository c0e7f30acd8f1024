"""The ledger in SQL, over any database that speaks it."""

from collections.abc import Sequence
from typing import Self

from falproxy.stores.ledger import (
    CLAIMED_AT_ONCE,
    By,
    Entry,
    JobRow,
    Lease,
    Outcome,
    Question,
    Step,
    Totals,
)
from falproxy.stores.ledger.database import Database
from falproxy.stores.ledger.rows import (
    entry_from_row,
    entry_to_row,
    job_changes,
    job_from_row,
    job_to_row,
    lease_to_row,
    outcome_to_row,
    overview_from_rows,
    question_to_row,
    totals_from_row,
)
from falproxy.stores.ledger.statements import (
    ADD_ENTRY,
    ADD_JOB,
    ADD_OUTCOME,
    CLAIM_JOBS,
    FORGET,
    FORGOTTEN_AT_ONCE,
    GET_JOB,
    LATEST,
    OVERVIEWS,
    PROBE,
    RENEW_JOBS,
    SAVE_JOB,
    TOTALS,
)


class SqlLedger:
    """A `Ledger` in a database."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._database.close()

    async def probe(self) -> None:
        await self._database.ask(PROBE)

    async def write(self, rows: Sequence[Entry | Outcome]) -> None:
        entries = [entry_to_row(row) for row in rows if isinstance(row, Entry)]
        outcomes = [outcome_to_row(row) for row in rows if isinstance(row, Outcome)]
        steps = ((ADD_ENTRY, entries), (ADD_OUTCOME, outcomes))
        await self._database.change([step for step in steps if step[1]])

    async def totals(self, question: Question, by: By | None = None) -> list[tuple[str, Totals]]:
        rows = await self._database.read(TOTALS[by], question_to_row(question))
        if not rows and by is None:
            return [("", Totals())]
        return [totals_from_row(row, by) for row in rows]

    async def overview(self, question: Question, step: Step) -> dict[By, list[tuple[str, Totals]]]:
        rows = await self._database.read(OVERVIEWS[step], question_to_row(question))
        return overview_from_rows(rows, step)

    async def latest(self, question: Question) -> list[Entry]:
        rows = await self._database.read(LATEST, question_to_row(question))
        return [entry_from_row(row) for row in rows]

    async def forget(self, before: float) -> int:
        gone = [await self._forget(statement, round(before * 1000)) for statement in FORGET]
        return gone[0]

    async def _forget(self, statement: str, before: int) -> int:
        count = 0
        while gone := len(await self._database.ask(statement, (before,))):
            count += gone
            if gone < FORGOTTEN_AT_ONCE:
                break
        return count

    async def add_job(self, job: JobRow, lease: Lease) -> JobRow:
        (row,) = await self._database.ask(ADD_JOB, job_to_row(job, lease))
        return job_from_row(row)

    async def save_job(self, job: JobRow) -> JobRow | None:
        rows = await self._database.ask(SAVE_JOB, job_changes(job))
        return job_from_row(rows[0]) if rows else None

    async def get_job(self, job_id: str, owner: str) -> JobRow | None:
        rows = await self._database.ask(GET_JOB, (job_id, owner))
        return job_from_row(rows[0]) if rows else None

    async def claim_jobs(self, lease: Lease, limit: int = CLAIMED_AT_ONCE) -> list[JobRow]:
        row = lease_to_row(lease)
        await self._database.ask(RENEW_JOBS, row)
        claimed = await self._database.ask(CLAIM_JOBS, (*row, limit))
        return sorted(map(job_from_row, claimed), key=lambda job: job.created_at)
