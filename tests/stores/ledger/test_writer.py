"""Calls are written down later and together; a ledger that is away, slow or full costs nothing."""

import asyncio
import logging
import sqlite3
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer

from falproxy import Settings, create_app
from falproxy.errors import SettingsError
from falproxy.fal.results import FalImage
from falproxy.stores.ledger import (
    CallRecord,
    JobRow,
    Lease,
    Ledger,
    LedgerError,
    Outcome,
    UsageQuery,
)
from falproxy.stores.ledger.sqlite import BUSY_TIMEOUT, sqlite_ledger
from falproxy.stores.ledger.writer import (
    BATCH_SIZE,
    FLUSH_INTERVAL,
    LEDGER_WRITER,
    LedgerWriter,
    choose_ledger,
    ledger_context,
)
from tests.support.key_search import CANARY
from tests.support.redis_server import free_port

ALL = UsageQuery(limit=100_000)
DAY = 86400.0


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "data" / "ledger.sqlite"


@asynccontextmanager
async def running(
    ledger: Ledger, patience: float = 5.0, **options: int
) -> AsyncIterator[LedgerWriter]:
    """A book that is open as long as the context."""
    book = LedgerWriter(ledger, **options)
    async with ledger:
        await book.open()
        yield book
        await book.close(patience)


def entry(n: int = 0, **given: object) -> CallRecord:
    return CallRecord(at=1e9 + n, route="proxy", status=200, **given)  # type: ignore[arg-type]


async def count(ledger: Ledger) -> int:
    ((_, totals),) = await ledger.totals(ALL)
    return totals.calls


async def until(is_so: Callable[[], bool], seconds: float = 10.0) -> None:
    async with asyncio.timeout(seconds):
        while not is_so():
            await asyncio.sleep(0.01)


def block(file: Path) -> None:
    """No database can be where a folder is."""
    file.mkdir(parents=True)


@pytest.mark.timed
async def test_what_is_recorded_is_written_soon(file: Path) -> None:
    async with running(sqlite_ledger(file)) as book:
        book.enqueue(entry())
        book.enqueue(Outcome(request_id="r", status=200))
        assert book.pending_rows == 2
        started = time.monotonic()
        await until(lambda: not book.pending_rows)
        assert FLUSH_INTERVAL - 0.05 <= time.monotonic() - started < FLUSH_INTERVAL + 1
        assert await count(book.ledger) == 1


@pytest.mark.timed
async def test_many_do_not_wait_for_more(file: Path) -> None:
    async with running(sqlite_ledger(file)) as book:
        for n in range(4 * BATCH_SIZE):
            book.enqueue(entry(n))
        started = time.monotonic()
        await until(lambda: not book.pending_rows)
        assert time.monotonic() - started < FLUSH_INTERVAL
        assert await count(book.ledger) == 4 * BATCH_SIZE


async def test_what_is_left_is_written_at_the_end(file: Path) -> None:
    async with running(sqlite_ledger(file)) as book:
        for n in range(2 * BATCH_SIZE + 1):
            book.enqueue(entry(n))
    async with sqlite_ledger(file) as ledger:
        assert await count(ledger) == 2 * BATCH_SIZE + 1


@pytest.mark.timed
async def test_a_book_that_nothing_was_recorded_in_ends_at_once(file: Path) -> None:
    started = time.monotonic()
    async with running(sqlite_ledger(file)):
        pass
    assert time.monotonic() - started < FLUSH_INTERVAL


async def test_what_a_ledger_that_is_down_could_not_take_is_written_when_it_is_back(
    file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    block(file)
    async with running(sqlite_ledger(file)) as book:
        assert book.is_down
        for n in range(3000):
            book.enqueue(entry(n))
        await asyncio.sleep(1.5)
        assert book.is_down
        assert book.pending_rows == 3000
        file.rmdir()
        await until(lambda: not (book.pending_rows or book.is_down))
        assert await count(book.ledger) == 3000
    told = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert len(told) == 2
    assert "Ledger records are delayed" in told[0]
    assert "written again" in told[1]


async def test_with_too_many_waiting_the_oldest_go(
    file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    block(file)
    async with running(sqlite_ledger(file), queue_max=100) as book:
        for n in range(150):
            book.enqueue(entry(n))
        assert (book.pending_rows, book.dropped) == (100, 50)
        file.rmdir()
        await until(lambda: not book.pending_rows)
        written = [each.at - 1e9 for each in await book.ledger.latest(ALL)]
        assert written == list(range(149, 49, -1))
    assert "50 rows were dropped" in caplog.text


async def test_a_ledger_that_is_too_slow_is_told_of_once(
    file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with running(sqlite_ledger(file), queue_max=BATCH_SIZE) as book:
        for _ in range(3):
            for n in range(BATCH_SIZE + 100):
                book.enqueue(entry(n))
            await until(lambda: not book.pending_rows)
        assert book.dropped == 300
    assert caplog.text.count("too slow") == 1


async def test_a_row_that_does_not_fit_is_left_out(
    file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with running(sqlite_ledger(file)) as book:
        for n in range(5):
            book.enqueue(entry(n))
            book.enqueue(entry(n, settled=2**80))
    async with sqlite_ledger(file) as ledger:
        assert await count(ledger) == 5
    assert book.dropped == 5
    assert caplog.text.count("does not fit") == 1


@pytest.mark.timed
async def test_an_end_does_not_wait_longer_than_it_may(
    file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    started = time.monotonic()
    async with running(sqlite_ledger(file), patience=0.3) as book:
        other = sqlite3.connect(file, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        book.enqueue(entry())
    assert time.monotonic() - started < BUSY_TIMEOUT + 2
    assert "1 rows of the ledger were not written" in caplog.text
    other.close()


async def test_a_file_that_others_hold_is_written_when_they_let_go(file: Path) -> None:
    async with running(sqlite_ledger(file)) as book:
        other = sqlite3.connect(file, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        book.enqueue(entry())
        await until(lambda: book.is_down)
        assert await count(book.ledger) == 0  # who reads is not held up
        other.execute("ROLLBACK")
        other.close()
        await until(lambda: not book.pending_rows)
        assert await count(book.ledger) == 1


async def test_a_disk_that_is_full_costs_no_call(file: Path) -> None:
    async with running(sqlite_ledger(file)) as book:
        await book.ledger.write([entry()])
        await book.ledger._database.execute("PRAGMA max_page_count = 1")  # type: ignore[attr-defined]
        for n in range(2000):
            book.enqueue(entry(n, endpoint="x" * 400))
        await until(lambda: book.is_down)
        await until(lambda: not book.pending_rows)  # the next connection has no such bound
        assert await count(book.ledger) == 2001


@pytest.mark.timed
async def test_recording_costs_microseconds(file: Path) -> None:
    entries = [entry(n) for n in range(10_000)]
    async with running(sqlite_ledger(file)) as book:
        started = time.perf_counter()
        for each in entries:
            book.enqueue(each)
        each_took = (time.perf_counter() - started) / len(entries)
        started = time.perf_counter()
        made = [entry(n) for n in range(10_000)]
        each_made = (time.perf_counter() - started) / len(made)
        started = time.perf_counter()
        await until(lambda: not book.pending_rows)
        print(f"record {each_took * 1e6:.2f} µs, to make one {each_made * 1e6:.2f} µs,"
              f" 10000 written in {time.perf_counter() - started:.2f} s")  # fmt: skip
    assert each_took < 20e-6


async def test_a_loop_is_not_held_up_while_entries_are_written(file: Path) -> None:
    async with running(sqlite_ledger(file)) as book:
        worst = 0.0
        for n in range(20_000):
            book.enqueue(entry(n))
        while book.pending_rows:
            started = time.perf_counter()
            await asyncio.sleep(0)
            worst = max(worst, time.perf_counter() - started)
        print(f"the loop was held up for {worst * 1e3:.1f} ms at most")
    assert worst < 0.2


async def test_what_is_older_than_wanted_is_forgotten(file: Path) -> None:
    async with sqlite_ledger(file) as ledger:
        await ledger.write([CallRecord(at=time.time() - 3 * DAY, route="proxy", status=200)])
    book = LedgerWriter(sqlite_ledger(file), retention=2 * DAY)
    async with book.ledger:
        await book.open()
        book.enqueue(CallRecord(at=time.time() - 1 * DAY, route="proxy", status=200))
        await until(lambda: not book.pending_rows)
        await book.close(5)
        assert await count(book.ledger) == 1


async def test_an_application_has_its_ledger_as_long_as_it_runs(file: Path) -> None:
    app = web.Application()
    app.cleanup_ctx.append(ledger_context(LedgerWriter(sqlite_ledger(file)), 5.0))

    async def handler(request: web.Request) -> web.Response:
        request.app[LEDGER_WRITER].enqueue(entry())
        return web.Response()

    app.router.add_get("/", handler)
    async with TestClient(TestServer(app)) as client:
        for _ in range(3):
            assert (await client.get("/")).status == 200
    async with sqlite_ledger(file) as ledger:
        assert await count(ledger) == 3


async def test_a_newer_falproxy_s_ledger_stops_the_start(file: Path) -> None:
    async with sqlite_ledger(file) as ledger:
        await ledger.probe()
    with sqlite3.connect(file) as newer:
        newer.execute("UPDATE falproxy_ledger SET version = 7")
    newer.close()
    app = web.Application()
    app.cleanup_ctx.append(ledger_context(LedgerWriter(sqlite_ledger(file)), 5.0))
    with pytest.raises(SettingsError, match="newer falproxy"):
        await TestServer(app).start_server()


async def test_a_file_that_is_no_database_is_down_and_stays_as_it_is(file: Path) -> None:
    file.parent.mkdir()
    file.write_text("Dear diary, " * 1000)
    async with running(sqlite_ledger(file), patience=0.2) as book:
        assert book.is_down
        with pytest.raises(LedgerError, match="not a database"):
            await book.ledger.latest(ALL)
    assert file.read_text() == "Dear diary, " * 1000


async def test_what_is_written_is_in_no_log(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    async with running(sqlite_ledger(file)) as book:
        book.enqueue(entry(user_id="somebody"))
        job = JobRow(owner="ann", model="m", endpoint="e", images=(FalImage("https://a/secret"),))
        await book.ledger.add_job(job, Lease("b", 1.0))
    assert "somebody" not in caplog.text
    assert "secret" not in caplog.text


async def test_without_a_url_the_ledger_is_a_file_for_its_owner_s_eyes(tmp_path: Path) -> None:
    async with choose_ledger(None, tmp_path / "data") as ledger:
        await ledger.write([entry()])
        files = list((tmp_path / "data").iterdir())
        assert {each.name for each in files} >= {"ledger.sqlite", "ledger.sqlite-wal"}
        assert {each.stat().st_mode & 0o777 for each in files} == {0o600}


@pytest.mark.parametrize(
    "url", ["mysql://user:{}@host/db", "{}", "postgres:{}", "postgresql://a b:{}@host"]
)
def test_what_is_no_url_of_a_server_is_refused(tmp_path: Path, url: str) -> None:
    with pytest.raises(SettingsError, match="DATABASE_URL must be a URL like") as refusal:
        choose_ledger(url.format(CANARY), tmp_path)
    assert CANARY not in str(refusal.value)


async def test_a_server_that_is_away_is_told_of_without_its_password(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    password = CANARY.partition(":")[2]
    url = f"postgresql://ann:{password}@127.0.0.1:{free_port()}/db"
    async with running(choose_ledger(url, tmp_path), patience=0.1) as book:
        book.enqueue(entry())
        with pytest.raises(LedgerError) as failure:
            await book.ledger.get_job("id", "ann")
        assert password not in str(failure.value)
        assert book.is_down
    assert "Ledger records are delayed" in caplog.text
    assert password not in caplog.text


WITHOUT_ASYNCPG = """
import sys
from pathlib import Path
from falproxy.errors import SettingsError
from falproxy.stores.ledger.writer import choose_ledger
choose_ledger(None, Path("."))
assert "asyncpg" not in sys.modules
sys.modules["asyncpg"] = None
try:
    choose_ledger("postgresql://host/db", Path("."))
except SettingsError as error:
    print(error)
"""


def test_the_client_of_postgresql_is_needed_only_for_its_url() -> None:
    words = [sys.executable, "-c", WITHOUT_ASYNCPG]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert done.stdout == "DATABASE_URL needs asyncpg: pip install 'falproxy[postgres]'.\n"


async def test_an_application_deletes_records_older_than_its_setting(file: Path) -> None:
    age = 3 * DAY
    async with sqlite_ledger(file) as ledger:
        times = [time.time() - age, time.time() - age + 7200]
        await ledger.write([CallRecord(at=at, route="proxy", status=200) for at in times])
        env = {
            "FAL_KEY": CANARY,
            "FALPROXY_DATA_DIR": str(file.parent),
            "FALPROXY_LEDGER_RETENTION": f"{age / 3600 - 1:g}h",
        }
        async with TestServer(create_app(Settings.from_env(env))), asyncio.timeout(10):
            while await count(ledger) != 1:
                await asyncio.sleep(0.01)
