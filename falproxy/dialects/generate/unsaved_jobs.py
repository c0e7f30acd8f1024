"""Jobs that could not be written to the ledger: they are held in memory and written later."""

import asyncio
from contextlib import suppress

from cachetools import LRUCache

from falproxy.background import Background
from falproxy.stores.ledger import JobRow, Jobs, Lease, LedgerError

MAX_BYTES = 16 * 2**20
ENTRY_BYTES = 2048  # of one job, without its images
IMAGE_BYTES = 1024
WRITE_INTERVAL = 0.25  # seconds between two attempts
# Seconds in which other processes write such jobs once the ledger can be written.
SETTLE_SECONDS = 2 * WRITE_INTERVAL


class UnsavedJobs:
    """The latest state of jobs whose write failed.

    lease: of the jobs that this process follows.
    """

    def __init__(self, jobs: Jobs, lease: Lease, background: Background) -> None:
        self._jobs = jobs
        self._lease = lease
        self._background = background
        self._rows: LRUCache[str, JobRow] = LRUCache(MAX_BYTES, size_in_memory)
        self._is_writing = False

    def __repr__(self) -> str:
        return f"<UnsavedJobs {len(self._rows)}>"

    def hold(self, row: JobRow) -> None:
        """Write a job as soon as the ledger can be written."""
        with suppress(ValueError):  # larger than the whole cache
            self._rows[row.id] = row
        if not self._is_writing:
            self._is_writing = True
            self._background.spawn(self._write_later())

    def get(self, job_id: str, owner: str) -> JobRow | None:
        row = self._rows.get(job_id)
        return row if row is not None and row.owner == owner else None

    def update(self, row: JobRow) -> None:
        """Replace the state of a job that is not written yet."""
        if row.id in self._rows:
            self._rows[row.id] = row

    async def _write_later(self) -> None:
        try:
            while self._rows:
                await asyncio.sleep(WRITE_INTERVAL)
                with suppress(LedgerError):
                    for row in [*self._rows.values()]:
                        await self._write(row)
        finally:
            self._is_writing = False

    async def _write(self, row: JobRow) -> None:
        """Write one job. Raises: LedgerError."""
        await self._jobs.add_job(row, self._lease)
        await self._jobs.save_job(row)
        if self._rows.get(row.id) is row:
            del self._rows[row.id]


def size_in_memory(row: JobRow) -> int:
    details = 2 * len(repr(row.details))
    return ENTRY_BYTES + IMAGE_BYTES * len(row.images) + len(row.owner) + details
