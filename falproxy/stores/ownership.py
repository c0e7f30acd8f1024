"""Who submitted a request, and with which fal key: remembered across restarts."""

import asyncio
import logging
import sqlite3
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar, TypeVarTuple

from aiohttp import web

from falproxy.errors import ProxyError
from falproxy.stores.cache import Job, StoreError, VirtualRequest
from falproxy.stores.cache.circuit_breaker import StoreBreaker
from falproxy.stores.sqlite_open import run_schema

logger = logging.getLogger(__name__)

Args = TypeVarTuple("Args")
ReturnT = TypeVar("ReturnT")

# fal keeps what belongs to a request for 30 days.
RETENTION_SECONDS = 30 * 86400
CACHE_SIZE = 50_000
BUSY_TIMEOUT = 0.5  # that another worker may hold the file
RETRY_INTERVAL = 10.0  # that a file is left alone which could not be used
SCHEMA = """
    PRAGMA journal_mode = WAL;
    PRAGMA synchronous = NORMAL;
    CREATE TABLE IF NOT EXISTS submissions (
        request_id TEXT PRIMARY KEY, owner TEXT NOT NULL, key_mark TEXT NOT NULL,
        submitted_at REAL NOT NULL
    ) WITHOUT ROWID;
    CREATE INDEX IF NOT EXISTS submissions_by_age ON submissions (submitted_at);
"""


@dataclass(frozen=True, slots=True)
class RequestOwner:
    """owner: whose it is, empty where nobody has a name. key_mark: of the fal key."""

    owner: str
    key_mark: str


class LocalOwnership:
    """Submissions by request id, in memory and in an SQLite file that all workers share.

    A file that cannot be used is logged and done without: what this process handed out it knows.
    """

    def __init__(self, file: Path, clock: Callable[[], float] = time.time) -> None:
        self._file = file
        self._clock = clock
        self._recent: OrderedDict[str, RequestOwner] = OrderedDict()
        self._executor = ThreadPoolExecutor(1, "submissions")
        self._connection: sqlite3.Connection | None = None
        self._retry_at = 0.0

    async def open(self) -> None:
        await self._run(self._connect)

    async def close(self) -> None:
        await self._run(self._close)
        self._executor.shutdown()

    async def add(self, request_id: str, request_owner: RequestOwner) -> None:
        """Remembers a submission before its client hears of it, so that a crash loses none.

        The first word stands: nobody takes a request over by having its id in an answer.
        """
        if await self.get(request_id) is not None:
            return
        cache_owner(self._recent, request_id, request_owner)
        await self._run(self._insert, request_id, request_owner)

    async def get(self, request_id: str) -> RequestOwner | None:
        """From memory as a rule: a poll reads the file once at most."""
        found = self._recent.get(request_id)
        if found is None:
            found = await self._run(self._select, request_id)
            if found is not None:
                cache_owner(self._recent, request_id, found)
        return found

    async def _run(self, work: Callable[[*Args], ReturnT], *args: *Args) -> ReturnT | None:
        if self._clock() < self._retry_at and work != self._close:
            return None
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self._executor, work, *args)
        except (sqlite3.Error, OSError, ValueError) as error:
            self._retry_at = self._clock() + RETRY_INTERVAL
            logger.warning("%s cannot be used (%s): requests are forgotten at a restart",
                           self._file, error)  # fmt: skip
            return None

    def _open_database(self) -> sqlite3.Connection:
        self._file.parent.mkdir(parents=True, exist_ok=True)
        database = sqlite3.connect(self._file, timeout=BUSY_TIMEOUT, isolation_level=None)
        run_schema(database, SCHEMA, BUSY_TIMEOUT)
        oldest = self._clock() - RETENTION_SECONDS
        database.execute("DELETE FROM submissions WHERE submitted_at < ?", (oldest,))
        return database

    def _close(self) -> None:
        if self._connection is not None:
            self._connection.close()

    def _connect(self) -> sqlite3.Connection:
        """The file, opened now if it could not be before."""
        if self._connection is None:
            self._connection = self._open_database()
        return self._connection

    def _insert(self, request_id: str, request_owner: RequestOwner) -> None:
        row = (request_id, request_owner.owner, request_owner.key_mark, self._clock())
        self._connect().execute("INSERT OR IGNORE INTO submissions VALUES (?, ?, ?, ?)", row)

    def _select(self, request_id: str) -> RequestOwner | None:
        query = "SELECT owner, key_mark FROM submissions WHERE request_id = ?"
        row = self._connect().execute(query, (request_id,)).fetchone()
        return None if row is None else RequestOwner(*row)


class SharedOwnership:
    """Submissions by request id, in memory and in the store that several machines share. They
    are kept beside its claims, under names that no request id has."""

    def __init__(self, breaker: StoreBreaker) -> None:
        self._breaker = breaker
        self._recent: OrderedDict[str, RequestOwner] = OrderedDict()
        self._unwritten: dict[str, RequestOwner] = {}
        breaker.on_recovered.append(self._write_pending)

    async def add(self, request_id: str, request_owner: RequestOwner) -> None:
        """As in Submissions: the first word stands."""
        try:
            if await self.get(request_id) is not None:
                return
        except ProxyError:
            pass  # nobody can say otherwise
        cache_owner(self._recent, request_id, request_owner)
        await self._write(request_id, request_owner)

    async def _write(self, request_id: str, request_owner: RequestOwner) -> None:
        """Tells the store now, or when it is back. Until then this process alone knows it."""
        claim = VirtualRequest(
            "", request_owner.owner, "", Job(request_id, "", request_owner.key_mark)
        )
        put = self._breaker.store.put_virtual_request(
            ownership_key(request_id), claim, RETENTION_SECONDS
        )
        try:
            await self._breaker.call(put)
        except StoreError:
            if len(self._unwritten) < CACHE_SIZE:
                self._unwritten[request_id] = request_owner

    async def _write_pending(self) -> None:
        waiting, self._unwritten = self._unwritten, {}
        for request_id, submission in waiting.items():
            await self._write(request_id, submission)

    async def get(self, request_id: str) -> RequestOwner | None:
        """Raises: ProxyError 503, the store cannot say, and this process does not know."""
        found = self._recent.get(request_id)
        if found is not None:
            return found
        try:
            claim = await self._breaker.call(
                self._breaker.store.get_virtual_request(ownership_key(request_id))
            )
        except StoreError as error:
            message = "The request cannot be looked up now."
            raise ProxyError(503, "store_unavailable", message, {"Retry-After": "1"}) from error
        if claim is None or claim.job is None:
            return None
        cache_owner(
            self._recent, request_id, found := RequestOwner(claim.owner, claim.job.key_mark)
        )
        return found


def cache_owner(
    recent: OrderedDict[str, RequestOwner], request_id: str, request_owner: RequestOwner
) -> None:
    """Keeps it in memory; what came first goes first."""
    recent[request_id] = request_owner
    if len(recent) > CACHE_SIZE:
        recent.popitem(last=False)


def ownership_key(request_id: str) -> str:
    return f"submission:{request_id}"


def ownership_context(
    ownership: LocalOwnership,
) -> Callable[[web.Application], AsyncIterator[None]]:
    """Cleanup context: the file is open exactly as long as the application."""

    async def context(app: web.Application) -> AsyncIterator[None]:
        await ownership.open()
        yield
        await ownership.close()

    return context
