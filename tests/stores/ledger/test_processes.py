"""One ledger and several processes: they write at once, one is killed, a server goes and comes."""

import asyncio
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, closing
from pathlib import Path

import pytest

from falproxy.stores.ledger import CallRecord, JobRow, Lease, Ledger, LedgerError, UsageQuery
from falproxy.stores.ledger.database import WRITE_TIMEOUT
from falproxy.stores.ledger.statements import TABLES
from falproxy.stores.ledger.writer import FLUSH_INTERVAL, LedgerWriter, choose_ledger
from tests.support.postgres_server import PostgresServer, postgres_server

pytestmark = pytest.mark.slow

ALL = UsageQuery(limit=100_000)
PROCESSES, EACH = 4, 1000
KILLS = 2
LEASE = Lease("ann", 30.0)
# Records for ever, or as many as it is told; says the time of what it has recorded.
RECORD = """
import asyncio, sys, time
from pathlib import Path
from falproxy.stores.ledger import CallRecord
from falproxy.stores.ledger.writer import LedgerWriter, choose_ledger

async def main(url, folder, name, most):
    writer = LedgerWriter(choose_ledger(url or None, Path(folder)))
    async with writer.ledger:
        await writer.open()
        for n in range(int(most)):
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
    with postgres_server() as running:
        yield running


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.slow)])
def where(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Path]:
    """URL and folder of a ledger where nothing is."""
    is_file = request.param == "sqlite"
    return "" if is_file else request.getfixturevalue("server").fresh(), tmp_path / "data"


def ledger_at(where: tuple[str, Path]) -> Ledger:
    return choose_ledger(where[0] or None, where[1])


def start(where: tuple[str, Path], name: str, most: int) -> subprocess.Popen[str]:
    words = [sys.executable, "-c", RECORD, where[0], str(where[1]), name, str(most)]
    return subprocess.Popen(words, stdout=subprocess.PIPE, text=True)


@asynccontextmanager
async def running(ledger: Ledger, patience: float = 10.0) -> AsyncIterator[LedgerWriter]:
    book = LedgerWriter(ledger)
    async with ledger:
        await book.open()
        yield book
        await book.close(patience)


async def until(is_so: Callable[[], bool], seconds: float = 20.0) -> None:
    async with asyncio.timeout(seconds):
        while not is_so():
            await asyncio.sleep(0.01)


def entry(n: int = 0) -> CallRecord:
    return CallRecord(at=1e9 + n, route="proxy", status=200)


@pytest.mark.slow
async def test_several_processes_write_at_once(where: tuple[str, Path]) -> None:
    processes = [start(where, str(n), EACH) for n in range(PROCESSES)]
    assert [len(each.communicate(timeout=60)[0].splitlines()) for each in processes]
    assert [each.returncode for each in processes] == [0] * PROCESSES
    async with ledger_at(where) as ledger:
        found = await ledger.totals(ALL, "principal")
    assert {name: totals.calls for name, totals in found} == {
        str(n): EACH for n in range(PROCESSES)
    }


async def test_a_killed_process_loses_what_it_recorded_last_and_breaks_nothing(
    where: tuple[str, Path],
) -> None:
    for n in range(KILLS):
        process = start(where, str(n), 10**9)
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
        async with ledger_at(where) as ledger:
            await ledger.write([entry()])
            written = await ledger.latest(UsageQuery(principal=str(n), limit=10**6))
        numbers = sorted(int(each.endpoint or "") for each in written)
        assert numbers == list(range(len(numbers))), "whole batches, one after the other"
        lost = last - max(each.at for each in written)
        print(f"{len(written)} of {len(recorded)} written, the last {lost:.2f} s are lost")
        assert lost < 2 * FLUSH_INTERVAL + 0.5
    if not where[0]:
        with closing(sqlite3.connect(where[1] / "ledger.sqlite")) as file:
            assert file.execute("PRAGMA integrity_check").fetchone() == ("ok",)


async def test_a_job_that_a_killed_process_had_added_is_there(where: tuple[str, Path]) -> None:
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
    words = [sys.executable, "-c", code, where[0], str(where[1])]
    process = await asyncio.create_subprocess_exec(*words)
    assert await process.wait() == -signal.SIGKILL
    async with ledger_at(where) as ledger:
        (job,) = await ledger.claim_jobs(LEASE)
        assert (job.id, job.request_id) == ("j", "r")


async def test_a_server_that_stops_and_starts_again_loses_nothing(
    tmp_path: Path, server: PostgresServer
) -> None:
    async with running(choose_ledger(server.fresh(), tmp_path)) as book:
        book.enqueue(entry(0))
        await until(lambda: not book.pending_rows)
        server.stop()
        for n in range(1, 2001):
            book.enqueue(entry(n))
        await until(lambda: book.is_down)
        started = time.monotonic()
        for ask in (book.ledger.get_job("j", "ann"), book.ledger.latest(ALL)):
            with pytest.raises(LedgerError):
                await ask
        assert time.monotonic() - started < 1
        server.start()
        await until(lambda: not book.pending_rows)
        assert not book.is_down
        ats = [each.at for each in await book.ledger.latest(ALL)]
        assert ats == [1e9 + n for n in range(2000, -1, -1)]


async def test_a_server_that_is_away_at_the_start_is_written_when_it_comes(
    tmp_path: Path, server: PostgresServer
) -> None:
    ledger = choose_ledger(server.fresh(), tmp_path)
    server.stop()
    async with running(ledger) as book:
        assert book.is_down
        book.enqueue(entry())
        server.start()
        await until(lambda: not book.pending_rows)
        assert len(await book.ledger.latest(ALL)) == 1


@pytest.mark.timed
async def test_a_frozen_server_does_not_delay_a_call(
    tmp_path: Path, server: PostgresServer
) -> None:
    async with running(choose_ledger(server.fresh(), tmp_path)) as book:
        await book.ledger.add_job(job := new_job(), LEASE)
        with server.frozen():
            asking = asyncio.ensure_future(book.ledger.get_job(job.id, "ann"))
            started, took = time.monotonic(), []
            for n in range(10_000):
                before = time.perf_counter()
                book.enqueue(entry(n))
                if n % 10 == 0:
                    await asyncio.sleep(0)
                took.append(time.perf_counter() - before)
            # The machine does other things as well, and so does Python's collector.
            worst = sorted(took)[-10]
            print(f"while it was frozen, record and a turn of the loop took {worst * 1e3:.2f} ms")
            assert worst < 0.05
            with pytest.raises(LedgerError, match="in time"):
                await asking
            assert time.monotonic() - started < WRITE_TIMEOUT + 2
            await until(lambda: book.is_down)
        await until(lambda: not book.pending_rows)
        assert len(await book.ledger.latest(ALL)) == 10_000
        assert await book.ledger.get_job(job.id, "ann") is not None


@pytest.mark.timed
async def test_an_end_does_not_wait_for_a_frozen_server(
    tmp_path: Path, server: PostgresServer, caplog: pytest.LogCaptureFixture
) -> None:
    with ExitStack() as stack:
        async with running(choose_ledger(server.fresh(), tmp_path), patience=0.3) as book:
            stack.enter_context(server.frozen())
            book.enqueue(entry())
            started = time.monotonic()
        assert time.monotonic() - started < 3
    assert "1 rows of the ledger were not written" in caplog.text


async def test_an_answer_that_got_lost_buys_no_second_row(
    tmp_path: Path, server: PostgresServer
) -> None:
    relay = await asyncio.start_server(Swallower(server.port), "127.0.0.1", 0)
    port = relay.sockets[0].getsockname()[1]
    url = server.fresh().replace(str(server.port), str(port))
    async with relay, running(choose_ledger(url, tmp_path)) as book:
        await book.ledger.probe()
        Swallower.left = 1
        for n in range(100):
            book.enqueue(entry(n))
        await until(lambda: book.is_down)
        await until(lambda: not book.pending_rows)
        assert len(await book.ledger.latest(ALL)) == 100
    assert Swallower.left == 0


async def test_others_in_the_same_database_see_nothing(
    tmp_path: Path, server: PostgresServer
) -> None:
    url = server.fresh()
    async with choose_ledger(url, tmp_path) as ledger:
        await ledger.write([entry()])
        await ledger.add_job(new_job(), LEASE)
        schema = url.rpartition("=")[2]
        everybody = f"""
            BEGIN; CREATE ROLE anon; GRANT USAGE ON SCHEMA {schema} TO anon;
            GRANT ALL ON ALL TABLES IN SCHEMA {schema} TO anon; SET ROLE anon;
        """
        for table in TABLES:
            count = f"SELECT count(*) FROM {schema}.{table}"
            assert server.sql(count) == ("0" if table == "falproxy_outcomes" else "1")
            assert server.sql(f"{everybody} {count}; ROLLBACK") == "0"


class Swallower:
    """Stands before a server, and hangs up where it says that something is written for good."""

    left = 0

    def __init__(self, port: int) -> None:
        self._port = port

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        from_server, to_server = await asyncio.open_connection("127.0.0.1", self._port)

        async def answer() -> None:
            while said := await from_server.read(65536):
                if b"COMMIT\0" in said and Swallower.left:
                    Swallower.left -= 1
                    break
                writer.write(said)
            writer.close()

        answering = asyncio.ensure_future(answer())
        while asked := await reader.read(65536):
            to_server.write(asked)
        to_server.close()
        await answering


def new_job() -> JobRow:
    return JobRow(owner="ann", model="m", endpoint="e", request_id="r")
