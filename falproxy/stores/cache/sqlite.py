"""Cache store of one machine: SQLite files that all its workers share."""

import asyncio
import json
import logging
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Self

from falproxy.concurrency import cancel_tasks
from falproxy.stores.cache import (
    GRACE_PERIOD,
    JOB_RETENTION,
    OUTCOME_RETENTION,
    OWNER_RETENTION,
    VIRTUAL_ID_RETENTION,
    AcquireRequest,
    CachedResult,
    Job,
    Lookup,
    RejectedResultError,
    RequestOwner,
    SharedCallRecord,
    SharedFailure,
    SharedOutcome,
    StoreError,
    StoreStats,
    VirtualRequest,
)
from falproxy.stores.cache.sqlite_owners import OWNERS_FILE, SqliteOwnerStore
from falproxy.stores.cache.sqlite_schema import CacheDatabase, ChangeLog
from falproxy.stores.cache.sqlite_statements import (
    DELETE_OLD_OUTCOMES,
    INSERT_HEADERS,
    INSERT_HOLDER,
    INSERT_OUTCOME,
    INSERT_RESULT,
    INSERT_VIRTUAL_REQUEST,
    SELECT_FLIGHT,
    SELECT_FRESH_RESULT,
    SELECT_LAST_OUTCOME,
    SELECT_LEAST_RECENTLY_USED,
    SELECT_OUTCOME,
    SELECT_RESULT,
    SELECT_RESULT_BATCH,
    SELECT_STATS,
    SELECT_VIRTUAL_REQUEST,
    UPSERT_FLIGHT,
)
from falproxy.stores.cache.watchers import Watchers

logger = logging.getLogger(__name__)

# All times are seconds.
POLL_INTERVAL = 0.03
RETRY_INTERVAL = 1.0  # between polls of a file that cannot be read
TOUCH_INTERVAL = 60.0  # between two updates of a result's time of last use
JOBLESS_RETENTION = 60.0  # of a shared call without a job, after its lease
OUTCOMES_MAX = 1000


class SqliteStore:
    """A `CacheStore` in a file, with the owners in a second file of the same folder. Changes by
    other processes are found by polling while there are watchers.

    max_size: maximum bytes of all documents; the least recently used are deleted.
    clock: seconds since 1970.
    owner_retention: seconds for which an owner is stored.
    """

    is_remote = False

    def __init__(
        self,
        file: Path,
        *,
        max_size: int,
        clock: Callable[[], float] = time.time,
        owner_retention: float = OWNER_RETENTION,
    ) -> None:
        self._database = CacheDatabase(file, clock)
        self._owners = SqliteOwnerStore(
            file.with_name(OWNERS_FILE), clock, retention=owner_retention
        )
        self._max_size = max_size
        self._clock = clock
        self._change_log = ChangeLog(self._database)
        self._watchers = Watchers()
        self._poll_task: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        return f"<SqliteStore {self._database!r}>"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        if self._poll_task is not None:
            await cancel_tasks([self._poll_task])
        await self._database.close()
        await self._owners.close()

    async def probe(self) -> None:
        await self._database.run(self._probe)

    async def get(self, key: str) -> Lookup:
        return await self._database.run(self._get, key)

    async def acquire(self, key: str, request: AcquireRequest) -> Lookup:
        return await self._database.run(self._acquire, key, request)

    async def record_job(self, key: str, owner_token: str, job: Job) -> bool:
        is_leader = await self._database.run(self._record_job, key, owner_token, job)
        return self._notify_if(key, is_leader)

    async def renew_lease(self, key: str, owner_token: str, lease: float) -> bool:
        is_leader = await self._database.run(self._renew_lease, key, owner_token, lease)
        return self._notify_if(key, is_leader) if lease == 0 else is_leader

    async def finish(
        self,
        key: str,
        owner_token: str,
        result: CachedResult | None,
        outcome: SharedOutcome | None = None,
    ) -> None:
        try:
            await self._database.run(self._finish, key, owner_token, result, outcome)
        except StoreError as error:
            if result is None:
                raise
            await self._database.run(self._finish, key, owner_token, None, outcome)
            raise RejectedResultError("the file did not store a result") from error
        finally:
            self._watchers.notify(key)

    async def put_virtual_request(
        self,
        request_id: str,
        virtual_request: VirtualRequest,
        retention: float = VIRTUAL_ID_RETENTION,
    ) -> None:
        await self._database.run(self._put_virtual_request, request_id, virtual_request, retention)

    async def get_virtual_request(self, request_id: str) -> VirtualRequest | None:
        return await self._database.run(self._get_virtual_request, request_id)

    async def put_owner(self, request_id: str, request_owner: RequestOwner) -> bool:
        return await self._owners.put_owner(request_id, request_owner)

    async def get_owner(self, request_id: str) -> RequestOwner | None:
        return await self._owners.get_owner(request_id)

    async def check_owners_writable(self) -> None:
        await self._owners.check_owners_writable()

    async def add_holder(self, key: str, job_id: str, holder: str) -> bool:
        return await self._database.run(self._add_holder, key, job_id, holder)

    async def remove_holder(self, key: str, job_id: str, holder: str) -> bool | None:
        is_last = await self._database.run(self._remove_holder, key, job_id, holder)
        self._notify_if(key, is_last is True)
        return is_last

    async def stats(self) -> StoreStats:
        return await self._database.run(self._stats)

    async def eviction_policy(self) -> str | None:
        return None

    async def clear(self) -> int:
        count = 0
        while cleared := await self._database.run(self._clear_batch):
            count += cleared
        return count

    @contextmanager
    def watch(self, key: str) -> Iterator[asyncio.Event]:
        with self._watchers.watch(key) as event:
            if self._poll_task is None or self._poll_task.done():
                # Started here, so that it precedes all further reads of the caller.
                start = self._database.run(self._change_log.read_new)
                self._poll_task = asyncio.get_running_loop().create_task(self._poll_changes(start))
            yield event

    async def _poll_changes(self, first_read: "asyncio.Future[set[str] | None]") -> None:
        """Notify watchers of the changes by other processes, as long as there are watchers."""
        with suppress(StoreError):  # the first successful read then notifies all watchers
            await first_read
        while self._watchers:
            await asyncio.sleep(POLL_INTERVAL)
            try:
                changed = await self._database.run(self._change_log.read_new)
            except StoreError as error:
                logger.debug("Changes of the result cache cannot be read: %s", error)
                await asyncio.sleep(RETRY_INTERVAL)
                continue
            self._watchers.notify_all(changed)

    def _notify_if(self, key: str, is_changed: bool) -> bool:
        if is_changed:
            self._watchers.notify(key)
        return is_changed

    # The methods below run in the file's thread.

    def _probe(self, connection: sqlite3.Connection) -> None:
        with self._database.write_transaction(connection):
            connection.execute("UPDATE total SET size = size")

    def _read_shared_call(
        self, connection: sqlite3.Connection, key: str, now: float
    ) -> SharedCallRecord | None:
        row = connection.execute(SELECT_FLIGHT, (key, now)).fetchone()
        if row is None:
            return None
        token, is_run, leads_until, *job_fields = row
        job = None if job_fields[0] is None else Job(*job_fields)
        return SharedCallRecord(token, bool(is_run), job, leads_until - now)

    def _read_last_outcome(self, connection: sqlite3.Connection, key: str, now: float) -> str:
        """Return the token of the leader whose outcome was recorded last, or an empty string."""
        row = connection.execute(SELECT_LAST_OUTCOME, (key, now)).fetchone()
        return "" if row is None else str(row[0])

    def _get(self, connection: sqlite3.Connection, key: str) -> Lookup:
        now = self._clock()
        row = connection.execute(
            f"{SELECT_RESULT} AND expires_at > ?", (key, now - GRACE_PERIOD)
        ).fetchone()
        return Lookup(
            row and CachedResult(*row),
            self._read_shared_call(connection, key, now),
            last_outcome=self._read_last_outcome(connection, key, now),
        )

    def _lookup(
        self, connection: sqlite3.Connection, key: str, request: AcquireRequest
    ) -> Lookup | None:
        """Return the outcome for which the caller has waited, the result, or the shared call of
        another leader. None if the caller becomes the leader."""
        now = self._clock()
        shared_call = self._read_shared_call(connection, key, now)
        has_leader = shared_call is not None and shared_call.lease_left > 0
        is_own = shared_call is not None and shared_call.owner_token == request.owner_token
        if has_leader and is_own:
            return None
        # After the shared call, because the reads may be in different transactions.
        row = connection.execute(SELECT_OUTCOME, (request.awaited_token, key)).fetchone()
        if row is not None:
            return Lookup(outcome=SharedOutcome(row[0], now - row[1]))
        row = connection.execute(SELECT_FRESH_RESULT, (key, request.min_stored_at, now)).fetchone()
        if row is not None:
            return Lookup(CachedResult(*row))
        last_outcome = self._read_last_outcome(connection, key, now)
        if has_leader:
            return Lookup(shared_call=shared_call, last_outcome=last_outcome)
        is_known = last_outcome in ("", request.awaited_token, request.known_outcome)
        if request.known_outcome is None or is_known:
            return None
        return Lookup(last_outcome=last_outcome)

    def _acquire(self, connection: sqlite3.Connection, key: str, request: AcquireRequest) -> Lookup:
        lookup = self._lookup(connection, key, request)
        if lookup is None:
            with self._database.write_transaction(connection) as now:
                lookup = self._lookup(connection, key, request) or self._start_shared_call(
                    connection, key, request, now
                )
        if lookup.result is not None:
            self._touch(connection, key)
        return lookup

    def _start_shared_call(
        self, connection: sqlite3.Connection, key: str, request: AcquireRequest, now: float
    ) -> Lookup:
        previous = self._read_shared_call(connection, key, now)
        if previous is None:
            connection.execute("DELETE FROM flights WHERE key = ?", (key,))
        job = None if previous is None else previous.job
        is_run = request.is_run and job is None
        retention = max(request.lease, JOB_RETENTION) if job else request.lease + JOBLESS_RETENTION
        row = (key, request.owner_token, is_run, now + request.lease, now + retention)
        connection.execute(UPSERT_FLIGHT, row)
        shared_call = SharedCallRecord(request.owner_token, is_run, job, request.lease)
        last_outcome = self._read_last_outcome(connection, key, now)
        return Lookup(shared_call=shared_call, is_leader=True, last_outcome=last_outcome)

    def _touch(self, connection: sqlite3.Connection, key: str) -> None:
        now = self._clock()
        stale = "SELECT 1 FROM results WHERE key = ? AND used_at < ?"
        if connection.execute(stale, (key, now - TOUCH_INTERVAL)).fetchone():
            with suppress(sqlite3.OperationalError):  # a read-only file still serves hits
                connection.execute("UPDATE results SET used_at = ? WHERE key = ?", (now, key))

    def _record_job(
        self, connection: sqlite3.Connection, key: str, owner_token: str, job: Job
    ) -> bool:
        with self._database.write_transaction(connection) as now:
            updated = connection.execute(
                "UPDATE flights SET is_run = 0, job_id = ?, job_app = ?, job_key_mark = ?,"
                " kept_until = ? WHERE key = ? AND token = ?",
                (job.request_id, job.app, job.key_mark, now + JOB_RETENTION, key, owner_token),
            )
            if updated.rowcount:
                connection.execute(INSERT_HOLDER, (key, job.request_id))
                self._change_log.append(connection, key)
        return updated.rowcount > 0

    def _renew_lease(
        self, connection: sqlite3.Connection, key: str, owner_token: str, lease: float
    ) -> bool:
        with self._database.write_transaction(connection) as now:
            updated = connection.execute(
                "UPDATE flights SET leads_until = :now + :lease, kept_until = :now + iif("
                "job_id IS NULL, :lease + :jobless, max(:lease, :job)) WHERE key = :key"
                " AND token = :token",
                {"now": now, "lease": lease, "jobless": JOBLESS_RETENTION, "job": JOB_RETENTION}
                | {"key": key, "token": owner_token},
            )
            if updated.rowcount and lease == 0:
                self._change_log.append(connection, key)
        return updated.rowcount > 0

    def _finish(
        self,
        connection: sqlite3.Connection,
        key: str,
        owner_token: str,
        result: CachedResult | None,
        outcome: SharedOutcome | None,
    ) -> None:
        with self._database.write_transaction(connection) as now:
            ended = connection.execute(
                "DELETE FROM flights WHERE key = ? AND token = ?", (key, owner_token)
            )
            if result is not None and len(result.body) <= self._max_size:
                self._insert_result(connection, key, result, now)
            elif outcome is not None and ended.rowcount:
                times = (now - outcome.age, now + OUTCOME_RETENTION)
                row = (owner_token, key, *times, outcome.content)
                connection.execute(INSERT_OUTCOME, row)
                connection.execute(DELETE_OLD_OUTCOMES, (OUTCOMES_MAX,))
            self._change_log.append(connection, key)

    def _insert_result(
        self, connection: sqlite3.Connection, key: str, result: CachedResult, now: float
    ) -> None:
        times = (result.stored_at, result.expires_at, now)
        row = (key, result.content_type, *times, len(result.body), result.body)
        connection.execute("DELETE FROM results WHERE key = ?", (key,))
        connection.execute(INSERT_RESULT, row)
        while connection.execute("SELECT size FROM total").fetchone()[0] > self._max_size:
            connection.execute(f"DELETE FROM results WHERE rowid = ({SELECT_LEAST_RECENTLY_USED})")

    def _put_virtual_request(
        self,
        connection: sqlite3.Connection,
        request_id: str,
        virtual_request: VirtualRequest,
        retention: float,
    ) -> None:
        key, owner, app = virtual_request.key, virtual_request.owner, virtual_request.app
        job, failure = virtual_request.job, virtual_request.failure
        row: tuple[object, ...] = (
            *(key, owner, app, virtual_request.is_cancelled),
            *((job.request_id, job.app, job.key_mark) if job else (None,) * 3),
            *((failure.status, failure.content_type, failure.body) if failure else (None,) * 3),
        )
        with self._database.write_transaction(connection) as now:
            connection.execute(
                INSERT_VIRTUAL_REQUEST,
                (request_id, now + retention, *row),
            )
            connection.execute("DELETE FROM claim_headers WHERE request_id = ?", (request_id,))
            if failure and failure.headers:
                headers = json.dumps(failure.headers)
                connection.execute(INSERT_HEADERS, (request_id, headers))

    def _get_virtual_request(
        self, connection: sqlite3.Connection, request_id: str
    ) -> VirtualRequest | None:
        row = connection.execute(SELECT_VIRTUAL_REQUEST, (request_id, self._clock())).fetchone()
        if row is None:
            return None
        key, owner, app, is_cancelled, *job_fields, headers, status, content_type, body = row
        job = None if job_fields[0] is None else Job(*job_fields)
        failure = None
        if status is not None:
            pairs = tuple((name, value) for name, value in json.loads(headers or "[]"))
            failure = SharedFailure(status, content_type, body, pairs)
        return VirtualRequest(key, owner, app, job, failure, bool(is_cancelled))

    def _add_holder(
        self, connection: sqlite3.Connection, key: str, job_id: str, holder: str
    ) -> bool:
        with self._database.write_transaction(connection) as now:
            query = "SELECT key, ? FROM flights WHERE key = ? AND job_id = ? AND kept_until > ?"
            parameters = (holder, key, job_id, now)
            connection.execute(f"INSERT OR IGNORE INTO holders {query}", parameters)
            return connection.execute(query, parameters).fetchone() is not None

    def _remove_holder(
        self, connection: sqlite3.Connection, key: str, job_id: str, holder: str
    ) -> bool | None:
        with self._database.write_transaction(connection):
            rows = "FROM flights WHERE key = ? AND job_id = ?"
            if connection.execute(f"SELECT 1 {rows}", (key, job_id)).fetchone() is None:
                return None
            connection.execute("DELETE FROM holders WHERE key = ? AND holder = ?", (key, holder))
            if connection.execute("SELECT 1 FROM holders WHERE key = ?", (key,)).fetchone():
                return False
            connection.execute(f"DELETE {rows}", (key, job_id))
            self._change_log.append(connection, key)
            return True

    def _stats(self, connection: sqlite3.Connection) -> StoreStats:
        now = self._clock()
        return StoreStats(*connection.execute(SELECT_STATS, (now, now)).fetchone())

    def _clear_batch(self, connection: sqlite3.Connection) -> int:
        with self._database.write_transaction(connection):
            # In batches, because other processes wait for the write lock.
            return connection.execute(
                f"DELETE FROM results WHERE rowid IN ({SELECT_RESULT_BATCH})"
            ).rowcount
