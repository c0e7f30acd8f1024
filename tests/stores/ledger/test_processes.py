"""One ledger and several processes: concurrent writes, killed processes, server failures."""

import asyncio
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, closing
from pathlib import Path

import pytest

from falproxy.stores.ledger import (
    CallRecord,
    JobRow,
    Lease,
    Ledger,
    LedgerError,
    ProcessStart,
    UsageQuery,
)
from falproxy.stores.ledger.database import WRITE_TIMEOUT
from falproxy.stores.ledger.statements import LEDGER_SCHEMA
from falproxy.stores.ledger.writer import FLUSH_INTERVAL, LedgerWriter, choose_ledger
from tests.support.postgres_server import PostgresServer, postgres_server
from tests.support.waiting import wait_until

TIMEOUT = 20.0  # seconds; of `wait_until`

pytestmark = pytest.mark.slow

ALL = UsageQuery(limit=100_000)
PROCESSES, RECORDS_EACH = 4, 1000
KILLS = 2
LEASE = Lease("ann", 30.0)
# Writes up to `limit` records, and prints the number and time of each.
RECORD = """
import asyncio, sys, time
from pathlib import Path
from falproxy.stores.ledger import CallRecord
from falproxy.stores.ledger.writer import LedgerWriter, choose_ledger

async def main(url, folder, name, limit):
    writer = LedgerWriter(choose_ledger(url or None, Path(folder)))
    async with writer.ledger:
        await writer.open()
        for n in range(int(limit)):
            now = time.time()
            record = CallRecord(
                at=now, route="proxy", status=200, principal=name, endpoint=str(n)
            )
            writer.enqueue(record)
            print(f"{n} {now}", flush=True)
            if n % 10 == 0:
                await asyncio.sleep(0.001)
        await writer.close(20)
        assert writer.pending_rows == writer.dropped == 0

asyncio.run(main(*sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def server() -> Iterator[PostgresServer]:
    with postgres_server() as started:
        yield started


@pytest.fixture(params=["sqlite", "postgres"])
def location(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Path]:
    """URL (empty for SQLite) and folder of a new ledger."""
    is_file = request.param == "sqlite"
    return "" if is_file else request.getfixturevalue("server").fresh(), tmp_path / "data"


def ledger_at(location: tuple[str, Path]) -> Ledger:
    return choose_ledger(location[0] or None, location[1])


def start(location: tuple[str, Path], name: str, limit: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", RECORD, location[0], str(location[1]), name, str(limit)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


@asynccontextmanager
async def running(ledger: Ledger, grace_period: float = 10.0) -> AsyncIterator[LedgerWriter]:
    writer = LedgerWriter(ledger)
    async with ledger:
        await writer.open()
        yield writer
        await writer.close(grace_period)


def record(n: int = 0) -> CallRecord:
    return CallRecord(at=1e9 + n, route="proxy", status=200)


@pytest.mark.slow
async def test_several_processes_write_at_once(location: tuple[str, Path]) -> None:
    processes = [start(location, str(n), RECORDS_EACH) for n in range(PROCESSES)]
    assert [len(process.communicate(timeout=60)[0].splitlines()) for process in processes]
    assert [process.returncode for process in processes] == [0] * PROCESSES
    async with ledger_at(location) as ledger:
        groups = await ledger.totals(ALL, "principal")
    assert {name: totals.calls for name, totals in groups} == {
        str(n): RECORDS_EACH for n in range(PROCESSES)
    }


async def test_a_killed_process_loses_its_last_batch_only(
    location: tuple[str, Path],
) -> None:
    for n in range(KILLS):
        process = start(location, str(n), 10**9)
        assert process.stdout is not None
        recorded = [process.stdout.readline()]
        ends = time.monotonic() + 1.0 + 0.17 * n
        while time.monotonic() < ends:
            recorded.append(process.stdout.readline())
        process.send_signal(signal.SIGKILL)
        recorded += process.stdout.read().splitlines()
        process.stdout.close()
        process.wait()
        last = float(recorded[-1].split()[1])
        async with ledger_at(location) as ledger:
            await ledger.write([record()])
            written = await ledger.latest(UsageQuery(principal=str(n), limit=10**6))
        numbers = sorted(int(row.endpoint or "") for row in written)
        assert numbers == list(range(len(numbers))), "complete batches, in order"
        lost = last - max(row.at for row in written)
        print(f"{len(written)} of {len(recorded)} written, the last {lost:.2f} s are lost")
        assert lost < 2 * FLUSH_INTERVAL + 0.5
    if not location[0]:
        with closing(sqlite3.connect(location[1] / "ledger.sqlite")) as file:
            assert file.execute("PRAGMA integrity_check").fetchone() == ("ok",)


async def test_a_job_of_a_killed_process_is_taken_over(location: tuple[str, Path]) -> None:
    code = (
        "import asyncio, os, sys; from pathlib import Path\n"
        "from falproxy.stores.ledger import JobRow, Lease\n"
        "from falproxy.stores.ledger.writer import choose_ledger\n"
        "async def main():\n"
        "    async with choose_ledger(sys.argv[1] or None, Path(sys.argv[2])) as ledger:\n"
        "        job = JobRow(id='j', owner='ann', model='m', endpoint='e', request_id='r')\n"
        "        await ledger.add_job(job, Lease('gone', 0.0))\n"
        "        os.kill(os.getpid(), 9)\n"
        "asyncio.run(main())"
    )
    command = [sys.executable, "-c", code, location[0], str(location[1])]
    process = await asyncio.create_subprocess_exec(*command)
    assert await process.wait() == -signal.SIGKILL
    async with ledger_at(location) as ledger:
        (job,) = await ledger.claim_jobs(LEASE)
        assert (job.id, job.request_id) == ("j", "r")


async def test_no_rows_are_lost_when_the_server_restarts(
    tmp_path: Path, server: PostgresServer
) -> None:
    async with running(choose_ledger(server.fresh(), tmp_path)) as writer:
        writer.enqueue(record(0))
        await wait_until(lambda: not writer.pending_rows, seconds=TIMEOUT)
        server.stop()
        for n in range(1, 2001):
            writer.enqueue(record(n))
        await wait_until(lambda: writer.is_down, seconds=TIMEOUT)
        started = time.monotonic()
        for query in (writer.ledger.get_job("j", "ann"), writer.ledger.latest(ALL)):
            with pytest.raises(LedgerError):
                await query
        assert time.monotonic() - started < 1
        server.start()
        await wait_until(lambda: not writer.pending_rows, seconds=TIMEOUT)
        assert not writer.is_down
        times = [row.at for row in await writer.ledger.latest(ALL)]
        assert times == [1e9 + n for n in range(2000, -1, -1)]


async def test_rows_are_written_when_a_server_starts_after_the_writer(
    tmp_path: Path, server: PostgresServer
) -> None:
    ledger = choose_ledger(server.fresh(), tmp_path)
    server.stop()
    async with running(ledger) as writer:
        assert writer.is_down
        writer.enqueue(record())
        server.start()
        await wait_until(lambda: not writer.pending_rows, seconds=TIMEOUT)
        assert len(await writer.ledger.latest(ALL)) == 1


@pytest.mark.timed
async def test_a_frozen_server_does_not_delay_calls(tmp_path: Path, server: PostgresServer) -> None:
    async with running(choose_ledger(server.fresh(), tmp_path)) as writer:
        await writer.ledger.add_job(job := new_job(), LEASE)
        with server.frozen():
            query = asyncio.ensure_future(writer.ledger.get_job(job.id, "ann"))
            started, durations = time.monotonic(), []
            for n in range(10_000):
                before = time.perf_counter()
                writer.enqueue(record(n))
                if n % 10 == 0:
                    await asyncio.sleep(0)
                durations.append(time.perf_counter() - before)
            # Other processes and the garbage collector cause outliers.
            worst = sorted(durations)[-10]
            print(f"with a frozen server, enqueue and a turn of the loop took {worst * 1e3:.2f} ms")
            assert worst < 0.05
            with pytest.raises(LedgerError, match="in time"):
                await query
            assert time.monotonic() - started < WRITE_TIMEOUT + 2
            await wait_until(lambda: writer.is_down, seconds=TIMEOUT)
        await wait_until(lambda: not writer.pending_rows, seconds=TIMEOUT)
        assert len(await writer.ledger.latest(ALL)) == 10_000
        assert await writer.ledger.get_job(job.id, "ann") is not None


@pytest.mark.timed
async def test_the_shutdown_does_not_wait_for_a_frozen_server(
    tmp_path: Path, server: PostgresServer, caplog: pytest.LogCaptureFixture
) -> None:
    with ExitStack() as stack:
        async with running(choose_ledger(server.fresh(), tmp_path), grace_period=0.3) as writer:
            stack.enter_context(server.frozen())
            writer.enqueue(record())
            started = time.monotonic()
        assert time.monotonic() - started < 3
    assert "1 rows of the ledger were not written" in caplog.text


async def test_a_lost_confirmation_does_not_duplicate_rows(
    tmp_path: Path, server: PostgresServer
) -> None:
    relay = await asyncio.start_server(CommitDropper(server.port), "127.0.0.1", 0)
    port = relay.sockets[0].getsockname()[1]
    url = server.fresh().replace(str(server.port), str(port))
    async with relay, running(choose_ledger(url, tmp_path)) as writer:
        await writer.ledger.probe()
        CommitDropper.remaining = 1
        for n in range(100):
            writer.enqueue(record(n))
        await wait_until(lambda: writer.is_down, seconds=TIMEOUT)
        await wait_until(lambda: not writer.pending_rows, seconds=TIMEOUT)
        assert len(await writer.ledger.latest(ALL)) == 100
    assert CommitDropper.remaining == 0


ROWS_AFTER_A_RECORD = {
    "falproxy_outcomes": "0",
    "falproxy_open_periods": "3",
    "falproxy_sums": "0",
}


async def test_other_roles_of_the_database_see_no_rows(
    tmp_path: Path, server: PostgresServer
) -> None:
    url = server.fresh()
    async with choose_ledger(url, tmp_path) as ledger:
        await ledger.write([record()])
        await ledger.add_job(new_job(), LEASE)
        schema = url.rpartition("=")[2]
        as_anon = f"""
            BEGIN; CREATE ROLE anon; GRANT USAGE ON SCHEMA {schema} TO anon;
            GRANT ALL ON ALL TABLES IN SCHEMA {schema} TO anon; SET ROLE anon;
        """
        await ledger.add_start(ProcessStart("1.0", "a", 1.0))
        for table in LEDGER_SCHEMA.tables:
            count = f"SELECT count(*) FROM {schema}.{table}"
            assert server.sql(count) == ROWS_AFTER_A_RECORD.get(table, "1")
            assert server.sql(f"{as_anon} {count}; ROLLBACK") == "0"


class CommitDropper:
    """A proxy of a PostgreSQL server that closes connections instead of confirming a COMMIT.

    remaining: number of commits to drop.
    """

    remaining = 0

    def __init__(self, port: int) -> None:
        self._port = port

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        from_server, to_server = await asyncio.open_connection("127.0.0.1", self._port)

        async def relay_responses() -> None:
            while data := await from_server.read(65536):
                if b"COMMIT\0" in data and CommitDropper.remaining:
                    CommitDropper.remaining -= 1
                    break
                writer.write(data)
            writer.close()

        responses = asyncio.ensure_future(relay_responses())
        while data := await reader.read(65536):
            to_server.write(data)
        to_server.close()
        await responses


def new_job() -> JobRow:
    return JobRow(owner="ann", model="m", endpoint="e", request_id="r")
