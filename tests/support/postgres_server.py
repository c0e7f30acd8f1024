"""A real PostgreSQL on a free port of this machine, in a folder of its own, as nobody's root."""

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import pytest

from tests.support.redis_server import free_port

START_SECONDS = 20.0
DEBIAN = Path("/usr/lib/postgresql")
# PostgreSQL does not run as root. Debian's package makes this user.
USER = "postgres"
# Nothing of it outlives a test: what is written need not reach a disk.
QUICK = ("fsync=off", "full_page_writes=off", "shared_buffers=16MB", "unix_socket_directories=")


def programs() -> Path:
    """The folder of the server's binaries. Skips the test where there is none; under CI that is a
    failure."""
    debian = sorted(DEBIAN.glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    found = shutil.which("initdb")
    for initdb in (*debian[-1:], *([Path(found)] if found else [])):
        return initdb.parent
    no = "there is no PostgreSQL server here (Debian's package postgresql)"
    if os.environ.get("CI") == "true":
        pytest.fail(no)
    pytest.skip(no)


class PostgresServer:
    """A server process of one's own, which lets everybody in."""

    def __init__(self) -> None:
        self.port = free_port()
        self._programs = programs()
        self._folder = Path(tempfile.mkdtemp(prefix="postgres-"))
        self._user = USER if os.geteuid() == 0 else None
        if self._user is not None:
            shutil.chown(self._folder, self._user)
        self._process: subprocess.Popen[bytes] | None = None
        self._names = (f"schema_{n}" for n in count())

    @property
    def url(self) -> str:
        return f"postgresql://{USER}@127.0.0.1:{self.port}/postgres"

    def fresh(self) -> str:
        """The URL of a part of it where nothing is."""
        name = next(self._names)
        self.sql(f"CREATE SCHEMA {name}")
        return f"{self.url}?search_path={name}"

    def sql(self, statement: str) -> str:
        words = [str(self._programs / "psql"), "-qAt", "-c", statement, self.url]
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()

    def create(self) -> None:
        self._run("initdb", "--no-sync", "--auth=trust", "--encoding=UTF8", "--locale=C",
                  "--username", USER, "-D", str(self._folder / "data"))  # fmt: skip

    def start(self) -> None:
        """Ready to be asked when it returns."""
        options = [f"-c{each}" for each in QUICK]
        self._process = self._spawn("postgres", "-D", str(self._folder / "data"), "-h", "127.0.0.1",
                                    "-p", str(self.port), *options)  # fmt: skip
        until = time.monotonic() + START_SECONDS
        ready = [str(self._programs / "pg_isready"), "-q", "-h", "127.0.0.1", "-p", str(self.port)]
        while subprocess.run(ready, check=False).returncode != 0:
            if self._process.poll() is not None or time.monotonic() > until:
                pytest.fail((self._folder / "log").read_text() or "no PostgreSQL started")
            time.sleep(0.02)

    def stop(self, how: signal.Signals = signal.SIGINT) -> None:
        """Its end, the polite way; clients lose their connections."""
        if self._process is not None:
            self._process.send_signal(how)
            self._process.wait()
            self._process = None

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Meanwhile it takes connections and answers nothing."""
        self._signal_all(signal.SIGSTOP)
        try:
            yield
        finally:
            self._signal_all(signal.SIGCONT)

    def close(self) -> None:
        self.stop(signal.SIGQUIT)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _signal_all(self, number: signal.Signals) -> None:
        """Tells the server, and the processes in which it serves its connections."""
        assert self._process is not None
        pid = self._process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        for each in (pid, *map(int, children)):
            os.kill(each, number)

    def _run(self, program: str, *words: str) -> None:
        if self._spawn(program, *words).wait() != 0:
            pytest.fail((self._folder / "log").read_text() or f"{program} failed")

    def _spawn(self, program: str, *words: str) -> subprocess.Popen[bytes]:
        with (self._folder / "log").open("ab") as log:
            return subprocess.Popen(
                [str(self._programs / program), *words],
                stdout=log, stderr=log, cwd=self._folder, user=self._user,
                group=self._user, extra_groups=[] if self._user else None,
            )  # fmt: skip


@contextmanager
def postgres_server() -> Iterator[PostgresServer]:
    """A server that runs as long as the context."""
    server = PostgresServer()
    try:
        server.create()
        server.start()
        yield server
    finally:
        server.close()
