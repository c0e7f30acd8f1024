"""The writer: batches, unavailable and slow ledgers, shutdown, and its application context."""

import asyncio
import logging
import sqlite3
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

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
from falproxy.stores.ledger.statements import MIGRATIONS
from falproxy.stores.ledger.writer import (
    BATCH_SIZE,
    FLUSH_INTERVAL,
    LEDGER_WRITER,
    LedgerWriter,
    choose_ledger,
    ledger_context,
)
from tests.support.key_search import CANARY
from tests.support.ports import free_port
from tests.support.waiting import SOON, wait_until

ALL = UsageQuery(limit=100_000)
DAY = 86400.0


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "data" / "ledger.sqlite"


@asynccontextmanager
async def running(
    ledger: Ledger, grace_period: float = 5.0, **options: Any
) -> AsyncIterator[LedgerWriter]:
    """A writer that is open within the context."""
    writer = LedgerWriter(ledger, **options)
    async with ledger:
        await writer.open()
        yield writer
        await writer.close(grace_period)


def record(n: int = 0, **columns: object) -> CallRecord:
    return CallRecord(at=1e9 + n, route="proxy", status=200, **columns)  # type: ignore[arg-type]


async def count(ledger: Ledger) -> int:
    ((_, totals),) = await ledger.totals(ALL)
    return totals.calls


def block(file: Path) -> None:
    """Make the ledger unavailable with a folder in place of its file."""
    file.mkdir(parents=True)


@pytest.mark.timed
async def test_a_record_is_written_after_the_flush_interval(file: Path) -> None:
    async with running(sqlite_ledger(file)) as writer:
        writer.enqueue(record())
        writer.enqueue(Outcome(request_id="r", status=200))
        assert writer.pending_rows == 2
        started = time.monotonic()
        await wait_until(lambda: not writer.pending_rows)
        assert FLUSH_INTERVAL - 0.05 <= time.monotonic() - started < FLUSH_INTERVAL + 1
        assert await count(writer.ledger) == 1


@pytest.mark.timed
async def test_a_full_batch_is_written_at_once(file: Path) -> None:
    async with running(sqlite_ledger(file)) as writer:
        for n in range(4 * BATCH_SIZE):
            writer.enqueue(record(n))
        started = time.monotonic()
        await wait_until(lambda: not writer.pending_rows)
        assert time.monotonic() - started < FLUSH_INTERVAL
        assert await count(writer.ledger) == 4 * BATCH_SIZE


async def test_queued_rows_are_written_at_shutdown(file: Path) -> None:
    async with running(sqlite_ledger(file)) as writer:
        for n in range(2 * BATCH_SIZE + 1):
            writer.enqueue(record(n))
    async with sqlite_ledger(file) as ledger:
        assert await count(ledger) == 2 * BATCH_SIZE + 1


@pytest.mark.timed
async def test_a_writer_without_rows_closes_at_once(file: Path) -> None:
    started = time.monotonic()
    async with running(sqlite_ledger(file)):
        pass
    assert time.monotonic() - started < FLUSH_INTERVAL


async def test_rows_are_written_when_an_unavailable_ledger_recovers(
    file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    block(file)
    async with running(sqlite_ledger(file)) as writer:
        assert writer.is_down
        for n in range(3000):
            writer.enqueue(record(n))
        await asyncio.sleep(1.5)
        assert writer.is_down
        assert writer.pending_rows == 3000
        file.rmdir()
        await wait_until(lambda: not (writer.pending_rows or writer.is_down))
        assert await count(writer.ledger) == 3000
    warnings = [line.message for line in caplog.records if line.levelno == logging.WARNING]
    assert len(warnings) == 2
    assert "Ledger records are delayed" in warnings[0]
    assert "written again" in warnings[1]


async def test_a_full_queue_drops_the_oldest_rows(
    file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    block(file)
    async with running(sqlite_ledger(file), queue_max=100) as writer:
        for n in range(150):
            writer.enqueue(record(n))
        assert (writer.pending_rows, writer.dropped) == (100, 50)
        file.rmdir()
        await wait_until(lambda: not writer.pending_rows)
        written = [row.at - 1e9 for row in await writer.ledger.latest(ALL)]
        assert written == list(range(149, 49, -1))
    assert "50 rows were dropped" in caplog.text


async def test_waiting_rows_are_bounded_in_bytes(file: Path) -> None:
    block(file)
    async with running(sqlite_ledger(file), queue_max=100) as writer:
        for n in range(50):
            long = "a" * 30_000
            writer.enqueue(replace(record(n), principal=long, endpoint=long, user_id=long))
        await wait_until(lambda: writer.is_down)
        rows = [*writer._queue, *writer._batch]
        assert len(rows) == 50
        assert max(len(repr(row)) for row in rows) < 3000
        file.rmdir()
        await wait_until(lambda: not writer.pending_rows)


async def test_a_slow_ledger_is_logged_once(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with running(sqlite_ledger(file), queue_max=BATCH_SIZE) as writer:
        for _ in range(3):
            for n in range(BATCH_SIZE + 100):
                writer.enqueue(record(n))
            await wait_until(lambda: not writer.pending_rows)
        assert writer.dropped == 300
    assert caplog.text.count("too slow") == 1


async def test_an_invalid_row_is_dropped_alone(
    file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with running(sqlite_ledger(file)) as writer:
        for n in range(5):
            writer.enqueue(record(n))
            writer.enqueue(record(n, settled=2**80))
    async with sqlite_ledger(file) as ledger:
        assert await count(ledger) == 5
    assert writer.dropped == 5
    assert caplog.text.count("does not fit") == 1


@pytest.mark.timed
async def test_the_shutdown_does_not_exceed_its_grace_period(
    file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    started = time.monotonic()
    async with running(sqlite_ledger(file), grace_period=0.3) as writer:
        other = sqlite3.connect(file, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        writer.enqueue(record())
    assert time.monotonic() - started < BUSY_TIMEOUT + 2
    assert "1 rows of the ledger were not written" in caplog.text
    other.close()


async def test_rows_are_written_when_another_process_releases_its_lock(file: Path) -> None:
    async with running(sqlite_ledger(file)) as writer:
        other = sqlite3.connect(file, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        writer.enqueue(record())
        await wait_until(lambda: writer.is_down)
        assert await count(writer.ledger) == 0  # readers are not blocked
        other.execute("ROLLBACK")
        other.close()
        await wait_until(lambda: not writer.pending_rows)
        assert await count(writer.ledger) == 1


async def test_rows_are_written_after_the_disk_was_full(file: Path) -> None:
    async with running(sqlite_ledger(file)) as writer:
        await writer.ledger.write([record()])
        await writer.ledger._database.execute("PRAGMA max_page_count = 1")  # type: ignore[attr-defined]
        for n in range(2000):
            writer.enqueue(record(n, endpoint="x" * 400))
        await wait_until(lambda: writer.is_down)
        await wait_until(lambda: not writer.pending_rows)  # the next connection has no limit
        assert await count(writer.ledger) == 2001


@pytest.mark.timed
async def test_enqueue_takes_microseconds(file: Path) -> None:
    records = [record(n) for n in range(10_000)]
    async with running(sqlite_ledger(file)) as writer:
        started = time.perf_counter()
        for row in records:
            writer.enqueue(row)
        enqueue_seconds = (time.perf_counter() - started) / len(records)
        started = time.perf_counter()
        created = [record(n) for n in range(10_000)]
        create_seconds = (time.perf_counter() - started) / len(created)
        started = time.perf_counter()
        await wait_until(lambda: not writer.pending_rows)
        print(f"enqueue {enqueue_seconds * 1e6:.2f} µs, create {create_seconds * 1e6:.2f} µs,"
              f" 10000 written in {time.perf_counter() - started:.2f} s")  # fmt: skip
    assert enqueue_seconds < 20e-6


@pytest.mark.timed
async def test_writes_do_not_block_the_event_loop(file: Path) -> None:
    async with running(sqlite_ledger(file)) as writer:
        worst = 0.0
        for n in range(20_000):
            writer.enqueue(record(n))
        while writer.pending_rows:
            started = time.perf_counter()
            await asyncio.sleep(0)
            worst = max(worst, time.perf_counter() - started)
        print(f"the loop was blocked for {worst * 1e3:.1f} ms at most")
    assert worst < 0.2


async def test_records_older_than_the_retention_are_deleted(file: Path) -> None:
    async with sqlite_ledger(file) as ledger:
        await ledger.write([CallRecord(at=time.time() - 3 * DAY, route="proxy", status=200)])
    writer = LedgerWriter(sqlite_ledger(file), retention=2 * DAY)
    async with writer.ledger:
        await writer.open()
        writer.enqueue(CallRecord(at=time.time() - 1 * DAY, route="proxy", status=200))
        await wait_until(lambda: not writer.pending_rows)
        await writer.close(5)
        assert await count(writer.ledger) == 1


async def test_the_ledger_is_open_while_the_application_runs(file: Path) -> None:
    app = web.Application()
    app.cleanup_ctx.append(ledger_context(LedgerWriter(sqlite_ledger(file)), 5.0))

    async def handler(request: web.Request) -> web.Response:
        request.app[LEDGER_WRITER].enqueue(record())
        return web.Response()

    app.router.add_get("/", handler)
    async with TestClient(TestServer(app)) as client:
        for _ in range(3):
            assert (await client.get("/")).status == 200
    async with sqlite_ledger(file) as ledger:
        assert await count(ledger) == 3


async def test_a_ledger_of_a_newer_falproxy_prevents_the_start(file: Path) -> None:
    async with sqlite_ledger(file) as ledger:
        await ledger.probe()
    with sqlite3.connect(file) as newer:
        newer.execute(f"UPDATE falproxy_ledger SET version = {len(MIGRATIONS) + 1}")
    newer.close()
    app = web.Application()
    app.cleanup_ctx.append(ledger_context(LedgerWriter(sqlite_ledger(file)), 5.0))
    with pytest.raises(SettingsError, match="newer falproxy"):
        await TestServer(app).start_server()


async def test_a_file_that_is_no_database_is_unavailable_and_stays_unchanged(file: Path) -> None:
    file.parent.mkdir()
    file.write_text("Dear diary, " * 1000)
    async with running(sqlite_ledger(file), grace_period=0.2) as writer:
        assert writer.is_down
        with pytest.raises(LedgerError, match="not a database"):
            await writer.ledger.latest(ALL)
    assert file.read_text() == "Dear diary, " * 1000


async def test_rows_do_not_appear_in_the_log(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    async with running(sqlite_ledger(file)) as writer:
        writer.enqueue(record(user_id="private-user"))
        job = JobRow(owner="ann", model="m", endpoint="e", images=(FalImage("https://a/secret"),))
        await writer.ledger.add_job(job, Lease("b", 1.0))
    assert "private-user" not in caplog.text
    assert "secret" not in caplog.text


async def test_the_default_ledger_is_a_file_that_only_its_owner_can_read(
    tmp_path: Path,
) -> None:
    async with choose_ledger(None, tmp_path / "data") as ledger:
        await ledger.write([record()])
        files = list((tmp_path / "data").iterdir())
        assert {path.name for path in files} >= {"ledger.sqlite", "ledger.sqlite-wal"}
        assert {path.stat().st_mode & 0o777 for path in files} == {0o600}


@pytest.mark.parametrize(
    "url", ["mysql://user:{}@host/db", "{}", "postgres:{}", "postgresql://a b:{}@host"]
)
def test_an_invalid_database_url_is_rejected(tmp_path: Path, url: str) -> None:
    with pytest.raises(SettingsError, match="DATABASE_URL must be a URL like") as error:
        choose_ledger(url.format(CANARY), tmp_path)
    assert CANARY not in str(error.value)


async def test_messages_about_an_unreachable_server_do_not_contain_its_password(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    password = CANARY.partition(":")[2]
    url = f"postgresql://ann:{password}@127.0.0.1:{free_port()}/db"
    async with running(choose_ledger(url, tmp_path), grace_period=0.1) as writer:
        writer.enqueue(record())
        with pytest.raises(LedgerError) as error:
            await writer.ledger.get_job("id", "ann")
        assert password not in str(error.value)
        assert writer.is_down
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


def test_asyncpg_is_only_required_for_a_database_url() -> None:
    command = [sys.executable, "-c", WITHOUT_ASYNCPG]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
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
        async with TestServer(create_app(Settings.from_env(env))), asyncio.timeout(SOON):
            while await count(ledger) != 1:
                await asyncio.sleep(0.01)
