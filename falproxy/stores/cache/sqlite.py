"""The embedded store: one SQLite file that all workers of a machine share."""

import asyncio
import logging
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Self

from falproxy.stores.cache import (
    CLAIM_KEPT,
    GRACE,
    JOB_KEPT,
    Claim,
    Failure,
    Flight,
    Found,
    Job,
    Result,
    Stats,
    StoreError,
    UnfitError,
    Wish,
)
from falproxy.stores.cache.sqlite_schema import Changes, Database
from falproxy.stores.cache.sqlite_statements import (
    CLAIM,
    FLIGHT,
    FRESH,
    LEAD,
    OLDEST,
    RESULT,
    SOME,
    STATS,
)
from falproxy.stores.cache.watchers import Watchers

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.03
AWAY_SECONDS = 1.0  # between polls of a file that cannot be read
TOUCH_SECONDS = 60.0  # that a hit may be old until it is written down
JOBLESS_KEPT = 60.0  # that a leader who has no job yet is known after its lease


class SqliteStore:
    """A `Store` in a file. max_size: bytes of all documents; what was used least recently goes.

    What other processes change is noticed by looking, while somebody watches.
    """

    is_remote = False

    def __init__(
        self, file: Path, *, max_size: int, clock: Callable[[], float] = time.time
    ) -> None:
        self._database = Database(file, clock)
        self._max_size = max_size
        self._clock = clock
        self._changes = Changes(self._database)
        self._watchers = Watchers()
        self._looking: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        if self._looking is not None:
            self._looking.cancel()
            await asyncio.wait([self._looking])
        await self._database.close()

    async def probe(self) -> None:
        await self._database.ask(self._probe)

    async def get(self, key: str) -> Found:
        return await self._database.ask(self._get, key)

    async def acquire(self, key: str, wish: Wish) -> Found:
        return await self._database.ask(self._acquire, key, wish)

    async def accept(self, key: str, token: str, job: Job) -> bool:
        return self._told(key, await self._database.ask(self._accept, key, token, job))

    async def renew(self, key: str, token: str, lease: float) -> bool:
        leads = await self._database.ask(self._renew, key, token, lease)
        return self._told(key, leads) if lease == 0 else leads

    async def finish(self, key: str, token: str, result: Result | None) -> None:
        try:
            await self._database.ask(self._finish, key, token, result)
        except StoreError as error:
            if result is None:
                raise
            await self._database.ask(self._finish, key, token, None)
            raise UnfitError("the file did not take a result") from error
        finally:
            self._watchers.tell(key)

    async def put_claim(self, request_id: str, claim: Claim, kept: float = CLAIM_KEPT) -> None:
        await self._database.ask(self._put_claim, request_id, claim, kept)

    async def get_claim(self, request_id: str) -> Claim | None:
        return await self._database.ask(self._get_claim, request_id)

    async def join(self, key: str, job_id: str, holder: str) -> bool:
        return await self._database.ask(self._join, key, job_id, holder)

    async def leave(self, key: str, job_id: str, holder: str) -> bool | None:
        left = await self._database.ask(self._leave, key, job_id, holder)
        self._told(key, left is True)
        return left

    async def stats(self) -> Stats:
        return await self._database.ask(self._stats)

    async def clear(self) -> int:
        count = 0
        while cleared := await self._database.ask(self._clear):
            count += cleared
        return count

    @contextmanager
    def watch(self, key: str) -> Iterator[asyncio.Event]:
        with self._watchers.watch(key) as event:
            if self._looking is None or self._looking.done():
                # Asked now, so that whatever its caller reads next is younger.
                start = self._database.ask(self._changes.look)
                self._looking = asyncio.get_running_loop().create_task(self._look(start))
            yield event

    async def _look(self, start: "asyncio.Future[set[str] | None]") -> None:
        """Tells watchers what other processes changed, as long as there are any."""
        with suppress(StoreError):  # then the first look that succeeds tells all
            await start
        while self._watchers:
            await asyncio.sleep(POLL_SECONDS)
            try:
                changed = await self._database.ask(self._changes.look)
            except StoreError as error:
                logger.debug("no look at the store: %s", error)
                await asyncio.sleep(AWAY_SECONDS)
                continue
            self._watchers.tell_all(changed)

    def _told(self, key: str, is_changed: bool) -> bool:
        if is_changed:
            self._watchers.tell(key)
        return is_changed

    # From here on everything runs in the file's thread.

    def _probe(self, file: sqlite3.Connection) -> None:
        with self._database.writing(file):
            file.execute("UPDATE total SET size = size")

    def _flight(self, file: sqlite3.Connection, key: str, now: float) -> Flight | None:
        row = file.execute(FLIGHT, (key, now)).fetchone()
        if row is None:
            return None
        token, is_run, leads_until, *job = row
        return Flight(token, bool(is_run), None if job[0] is None else Job(*job), leads_until - now)

    def _get(self, file: sqlite3.Connection, key: str) -> Found:
        now = self._clock()
        row = file.execute(f"{RESULT} AND expires_at > ?", (key, now - GRACE)).fetchone()
        return Found(row and Result(*row), self._flight(file, key, now))

    def _found(self, file: sqlite3.Connection, key: str, wish: Wish) -> Found | None:
        """What there is for a call without a change; None: it may lead."""
        now = self._clock()
        flight = self._flight(file, key, now)
        leads = flight is not None and flight.lease_left > 0
        if flight is not None and leads and flight.token == wish.token:
            return None
        row = file.execute(FRESH, (key, wish.newer_than, now)).fetchone()
        if row is not None:
            return Found(Result(*row))
        return Found(flight=flight) if leads else None

    def _acquire(self, file: sqlite3.Connection, key: str, wish: Wish) -> Found:
        found = self._found(file, key, wish)
        if found is None:
            with self._database.writing(file) as now:
                found = self._found(file, key, wish) or self._lead(file, key, wish, now)
        if found.result is not None:
            self._touch(file, key)
        return found

    def _lead(self, file: sqlite3.Connection, key: str, wish: Wish, now: float) -> Found:
        old = self._flight(file, key, now)
        if old is None:
            file.execute("DELETE FROM flights WHERE key = ?", (key,))
        job = None if old is None else old.job
        is_run = wish.is_run and job is None
        kept = max(wish.lease, JOB_KEPT) if job else wish.lease + JOBLESS_KEPT
        file.execute(LEAD, (key, wish.token, is_run, now + wish.lease, now + kept))
        return Found(flight=Flight(wish.token, is_run, job, wish.lease), leads=True)

    def _touch(self, file: sqlite3.Connection, key: str) -> None:
        now = self._clock()
        stale = "SELECT 1 FROM results WHERE key = ? AND used_at < ?"
        if file.execute(stale, (key, now - TOUCH_SECONDS)).fetchone():
            with suppress(sqlite3.OperationalError):  # a hit, even where nothing can be written
                file.execute("UPDATE results SET used_at = ? WHERE key = ?", (now, key))

    def _accept(self, file: sqlite3.Connection, key: str, token: str, job: Job) -> bool:
        with self._database.writing(file) as now:
            updated = file.execute(
                "UPDATE flights SET is_run = 0, job_id = ?, job_app = ?, job_key_mark = ?,"
                " kept_until = ? WHERE key = ? AND token = ?",
                (job.request_id, job.app, job.key_mark, now + JOB_KEPT, key, token),
            )
            if updated.rowcount:
                file.execute("INSERT OR IGNORE INTO holders VALUES (?, ?)", (key, job.request_id))
                self._changes.tell(file, key)
        return updated.rowcount > 0

    def _renew(self, file: sqlite3.Connection, key: str, token: str, lease: float) -> bool:
        with self._database.writing(file) as now:
            updated = file.execute(
                "UPDATE flights SET leads_until = :now + :lease, kept_until = :now + iif("
                "job_id IS NULL, :lease + :jobless, max(:lease, :job)) WHERE key = :key"
                " AND token = :token",
                {"now": now, "lease": lease, "jobless": JOBLESS_KEPT, "job": JOB_KEPT}
                | {"key": key, "token": token},
            )
            if updated.rowcount and lease == 0:
                self._changes.tell(file, key)
        return updated.rowcount > 0

    def _finish(
        self, file: sqlite3.Connection, key: str, token: str, result: Result | None
    ) -> None:
        with self._database.writing(file) as now:
            file.execute("DELETE FROM flights WHERE key = ? AND token = ?", (key, token))
            if result is not None and len(result.body) <= self._max_size:
                self._keep(file, key, result, now)
            self._changes.tell(file, key)

    def _keep(self, file: sqlite3.Connection, key: str, result: Result, now: float) -> None:
        given = (result.content_type, result.stored_at, result.expires_at)
        file.execute("DELETE FROM results WHERE key = ?", (key,))
        file.execute(
            "INSERT INTO results VALUES (?, ?, ?, ?, ?, ?, ?)",
            (key, *given, now, len(result.body), result.body),
        )
        while file.execute("SELECT size FROM total").fetchone()[0] > self._max_size:
            file.execute(f"DELETE FROM results WHERE rowid = ({OLDEST})")

    def _put_claim(self, file: sqlite3.Connection, name: str, claim: Claim, kept: float) -> None:
        job, failure = claim.job, claim.failure
        row: tuple[object, ...] = (
            *(claim.key, claim.owner, claim.app, claim.is_cancelled),
            *((job.request_id, job.app, job.key_mark) if job else (None,) * 3),
            *((failure.status, failure.content_type, failure.body) if failure else (None,) * 3),
        )
        with self._database.writing(file) as now:
            file.execute(
                f"INSERT OR REPLACE INTO claims VALUES ({', '.join('?' * 12)})",
                (name, now + kept, *row),
            )

    def _get_claim(self, file: sqlite3.Connection, request_id: str) -> Claim | None:
        row = file.execute(CLAIM, (request_id, self._clock())).fetchone()
        if row is None:
            return None
        key, owner, app, is_cancelled, *rest = row
        job = None if rest[0] is None else Job(*rest[:3])
        failure = None if rest[3] is None else Failure(*rest[3:])
        return Claim(key, owner, app, job, failure, bool(is_cancelled))

    def _join(self, file: sqlite3.Connection, key: str, job_id: str, holder: str) -> bool:
        with self._database.writing(file) as now:
            job_flies = "SELECT key, ? FROM flights WHERE key = ? AND job_id = ? AND kept_until > ?"
            file.execute(f"INSERT OR IGNORE INTO holders {job_flies}", (holder, key, job_id, now))
            return file.execute(job_flies, (holder, key, job_id, now)).fetchone() is not None

    def _leave(self, file: sqlite3.Connection, key: str, job_id: str, holder: str) -> bool | None:
        with self._database.writing(file):
            flies = "FROM flights WHERE key = ? AND job_id = ?"
            if file.execute(f"SELECT 1 {flies}", (key, job_id)).fetchone() is None:
                return None
            file.execute("DELETE FROM holders WHERE key = ? AND holder = ?", (key, holder))
            if file.execute("SELECT 1 FROM holders WHERE key = ?", (key,)).fetchone():
                return False
            file.execute(f"DELETE {flies}", (key, job_id))
            self._changes.tell(file, key)
            return True

    def _stats(self, file: sqlite3.Connection) -> Stats:
        now = self._clock()
        return Stats(*file.execute(STATS, (now, now)).fetchone())

    def _clear(self, file: sqlite3.Connection) -> int:
        with self._database.writing(file):
            # Some at a time: others wait for the file.
            return file.execute(f"DELETE FROM results WHERE rowid IN ({SOME})").rowcount
