"""A real PostgreSQL server on a free port, with its own data directory, not run as root."""

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path

import pytest

from tests.support.ports import free_port

START_SECONDS = 20.0
DEBIAN = Path("/usr/lib/postgresql")
# PostgreSQL refuses to run as root. Debian's package creates this user.
USER = "postgres"
# The data is temporary, so writes need not reach the disk.
QUICK = ("fsync=off", "full_page_writes=off", "shared_buffers=16MB", "unix_socket_directories=")


def programs() -> Path:
    """Return the directory of the server's programs.

    Skips the test if PostgreSQL is not installed; with CI=true the test fails.
    """
    debian = sorted(DEBIAN.glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    in_path = shutil.which("initdb")
    for initdb in (*debian[-1:], *([Path(in_path)] if in_path else [])):
        return initdb.parent
    reason = "there is no PostgreSQL server here (Debian's package postgresql)"
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)


class PostgresServer:
    """A server process that accepts all connections without a password.

    has_tls: connections may be encrypted, with a certificate of the server's own.
    """

    def __init__(self, *, has_tls: bool = False) -> None:
        self.port = free_port()
        self._programs = programs()
        self._folder = Path(tempfile.mkdtemp(prefix="postgres-"))
        self._user = USER if os.geteuid() == 0 else None
        if self._user is not None:
            shutil.chown(self._folder, self._user)
        self._process: subprocess.Popen[bytes] | None = None
        self._names = (f"schema_{n}" for n in count())
        self._options = [*QUICK, *(["ssl=on"] if has_tls else [])]

    @property
    def url(self) -> str:
        return f"postgresql://{USER}@127.0.0.1:{self.port}/postgres"

    def fresh(self) -> str:
        """Create an empty schema and return its URL."""
        name = next(self._names)
        self.sql(f"CREATE SCHEMA {name}")
        return f"{self.url}?search_path={name}"

    def sql(self, statement: str) -> str:
        command = [str(self._programs / "psql"), "-qAt", "-c", statement, self.url]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    def create(self) -> None:
        self._run("initdb", "--no-sync", "--auth=trust", "--encoding=UTF8", "--locale=C",
                  "--username", USER, "-D", str(self._folder / "data"))  # fmt: skip
        if "ssl=on" in self._options:
            self._create_certificate()

    def start(self) -> None:
        """Start the server and wait until it accepts connections."""
        options = [f"-c{option}" for option in self._options]
        self._process = self._spawn("postgres", "-D", str(self._folder / "data"), "-h", "127.0.0.1",
                                    "-p", str(self.port), *options)  # fmt: skip
        deadline = time.monotonic() + START_SECONDS
        ready = [str(self._programs / "pg_isready"), "-q", "-h", "127.0.0.1", "-p", str(self.port)]
        while subprocess.run(ready, check=False).returncode != 0:
            if self._process.poll() is not None or time.monotonic() > deadline:
                pytest.fail((self._folder / "log").read_text() or "no PostgreSQL started")
            time.sleep(0.02)

    def stop(self, how: signal.Signals = signal.SIGINT) -> None:
        """Stop the server; clients lose their connections."""
        if self._process is not None:
            self._process.send_signal(how)
            self._process.wait()
            self._process = None

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Suspend the server: connections are accepted, but there are no responses."""
        self._signal_all(signal.SIGSTOP)
        try:
            yield
        finally:
            self._signal_all(signal.SIGCONT)

    def close(self) -> None:
        self.stop(signal.SIGQUIT)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _signal_all(self, number: signal.Signals) -> None:
        """Send a signal to the server and to the processes of its connections."""
        assert self._process is not None
        pid = self._process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        os.kill(pid, number)
        for process_id in map(int, children):
            with suppress(ProcessLookupError):  # its connection has just ended
                os.kill(process_id, number)

    def _create_certificate(self) -> None:
        key, certificate = (self._folder / "data" / f"server.{kind}" for kind in ("key", "crt"))
        options = ["-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=127.0.0.1"]
        command = ["openssl", "req", *options, "-keyout", str(key), "-out", str(certificate)]
        subprocess.run(command, capture_output=True, check=True)
        key.chmod(0o600)
        if self._user is not None:
            for path in (key, certificate):
                shutil.chown(path, self._user)

    def _run(self, program: str, *arguments: str) -> None:
        if self._spawn(program, *arguments).wait() != 0:
            pytest.fail((self._folder / "log").read_text() or f"{program} failed")

    def _spawn(self, program: str, *arguments: str) -> subprocess.Popen[bytes]:
        with (self._folder / "log").open("ab") as log:
            return subprocess.Popen(
                [str(self._programs / program), *arguments],
                stdout=log, stderr=log, cwd=self._folder, user=self._user,
                group=self._user, extra_groups=[] if self._user else None,
            )  # fmt: skip


@contextmanager
def postgres_server(*, has_tls: bool = False) -> Iterator[PostgresServer]:
    """Run a server inside the context."""
    server = PostgresServer(has_tls=has_tls)
    try:
        server.create()
        server.start()
        yield server
    finally:
        server.close()
