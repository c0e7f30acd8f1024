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
from falproxy.stores.cache import Claim, Job, StoreError
from falproxy.stores.cache.circuit_breaker import Guard
from falproxy.stores.sqlite_open import begin

logger = logging.getLogger(__name__)

Args = TypeVarTuple("Args")
Result = TypeVar("Result")

# fal keeps what belongs to a request for 30 days.
KEPT_SECONDS = 30 * 86400
REMEMBERED_MAX = 50_000
BUSY_SECONDS = 0.5  # that another worker may hold the file
SKIPPED_SECONDS = 10.0  # that a file is left alone which could not be used
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
class Submission:
    """owner: whose it is, empty where nobody has a name. key_mark: of the fal key."""

    owner: str
    key_mark: str


class Submissions:
    """Submissions by request id, in memory and in an SQLite file that all workers share.

    A file that cannot be used is logged and done without: what this process handed out it knows.
    """

    def __init__(self, file: Path, clock: Callable[[], float] = time.time) -> None:
        self._file = file
        self._clock = clock
        self._recent: OrderedDict[str, Submission] = OrderedDict()
        self._thread = ThreadPoolExecutor(1, "submissions")
        self._database: sqlite3.Connection | None = None
        self._usable_at = 0.0

    async def open(self) -> None:
        await self._in_thread(self._connected)

    async def close(self) -> None:
        await self._in_thread(self._close)
        self._thread.shutdown()

    async def add(self, request_id: str, submission: Submission) -> None:
        """Remembers a submission before its client hears of it, so that a crash loses none.

        The first word stands: nobody takes a request over by having its id in an answer.
        """
        if await self.get(request_id) is not None:
            return
        remember(self._recent, request_id, submission)
        await self._in_thread(self._insert, request_id, submission)

    async def get(self, request_id: str) -> Submission | None:
        """From memory as a rule: a poll reads the file once at most."""
        found = self._recent.get(request_id)
        if found is None:
            found = await self._in_thread(self._select, request_id)
            if found is not None:
                remember(self._recent, request_id, found)
        return found

    async def _in_thread(self, work: Callable[[*Args], Result], *args: *Args) -> Result | None:
        if self._clock() < self._usable_at and work != self._close:
            return None
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self._thread, work, *args)
        except (sqlite3.Error, OSError, ValueError) as error:
            self._usable_at = self._clock() + SKIPPED_SECONDS
            logger.warning("%s cannot be used (%s): requests are forgotten at a restart",
                           self._file, error)  # fmt: skip
            return None

    def _open(self) -> sqlite3.Connection:
        self._file.parent.mkdir(parents=True, exist_ok=True)
        database = sqlite3.connect(self._file, timeout=BUSY_SECONDS, isolation_level=None)
        begin(database, SCHEMA, BUSY_SECONDS)
        oldest = self._clock() - KEPT_SECONDS
        database.execute("DELETE FROM submissions WHERE submitted_at < ?", (oldest,))
        return database

    def _close(self) -> None:
        if self._database is not None:
            self._database.close()

    def _connected(self) -> sqlite3.Connection:
        """The file, opened now if it could not be before."""
        if self._database is None:
            self._database = self._open()
        return self._database

    def _insert(self, request_id: str, submission: Submission) -> None:
        row = (request_id, submission.owner, submission.key_mark, self._clock())
        self._connected().execute("INSERT OR IGNORE INTO submissions VALUES (?, ?, ?, ?)", row)

    def _select(self, request_id: str) -> Submission | None:
        query = "SELECT owner, key_mark FROM submissions WHERE request_id = ?"
        row = self._connected().execute(query, (request_id,)).fetchone()
        return None if row is None else Submission(*row)


class SharedSubmissions:
    """Submissions by request id, in memory and in the store that several machines share. They
    are kept beside its claims, under names that no request id has."""

    def __init__(self, guard: Guard) -> None:
        self._guard = guard
        self._recent: OrderedDict[str, Submission] = OrderedDict()
        self._unwritten: dict[str, Submission] = {}
        guard.on_back.append(self._catch_up)

    async def add(self, request_id: str, submission: Submission) -> None:
        """As in Submissions: the first word stands."""
        try:
            if await self.get(request_id) is not None:
                return
        except ProxyError:
            pass  # nobody can say otherwise
        remember(self._recent, request_id, submission)
        await self._write(request_id, submission)

    async def _write(self, request_id: str, submission: Submission) -> None:
        """Tells the store now, or when it is back. Until then this process alone knows it."""
        claim = Claim("", submission.owner, "", Job(request_id, "", submission.key_mark))
        put = self._guard.store.put_claim(name_of(request_id), claim, KEPT_SECONDS)
        try:
            await self._guard.ask(put)
        except StoreError:
            if len(self._unwritten) < REMEMBERED_MAX:
                self._unwritten[request_id] = submission

    async def _catch_up(self) -> None:
        waiting, self._unwritten = self._unwritten, {}
        for request_id, submission in waiting.items():
            await self._write(request_id, submission)

    async def get(self, request_id: str) -> Submission | None:
        """Raises: ProxyError 503, the store cannot say, and this process does not know."""
        found = self._recent.get(request_id)
        if found is not None:
            return found
        try:
            claim = await self._guard.ask(self._guard.store.get_claim(name_of(request_id)))
        except StoreError as error:
            message = "The request cannot be looked up now."
            raise ProxyError(503, "store_unavailable", message, {"Retry-After": "1"}) from error
        if claim is None or claim.job is None:
            return None
        remember(self._recent, request_id, found := Submission(claim.owner, claim.job.key_mark))
        return found


def remember(recent: OrderedDict[str, Submission], request_id: str, submission: Submission) -> None:
    """Keeps it in memory; what came first goes first."""
    recent[request_id] = submission
    if len(recent) > REMEMBERED_MAX:
        recent.popitem(last=False)


def name_of(request_id: str) -> str:
    return f"submission:{request_id}"


def keep_submissions(
    submissions: Submissions,
) -> Callable[[web.Application], AsyncIterator[None]]:
    """Cleanup context: the file is open exactly as long as the application."""

    async def context(app: web.Application) -> AsyncIterator[None]:
        await submissions.open()
        yield
        await submissions.close()

    return context
