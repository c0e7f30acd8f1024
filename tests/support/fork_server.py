"""A process that has imported falproxy, and forks for each command of a test.

A fork takes a tenth of the CPU time of a new interpreter, which is most of what many tests need. It
runs the same code, with its own environment, directory and file descriptors.
"""

import asyncio
import atexit
import gc
import importlib
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from io import FileIO
from typing import Any, NamedTuple

from tests.support.paths import ROOT

REQUEST_MAX = 100_000  # bytes
START_TIMEOUT = 30.0  # seconds
PIPES = 4  # stdin, stdout, stderr, exit code
# Modules that falproxy imports on first use, by the arguments and variables that lead to it. The
# server imports them once, before it forks.
SANDBOX = ("falproxy.sandbox.server",)
IMPORTS: Mapping[str, tuple[str, ...]] = {
    "--sandbox": SANDBOX,
    "DATABASE_URL": ("asyncpg",),
    "FALPROXY_SANDBOX": SANDBOX,
    "REDIS_URL": ("falproxy.stores.cache.redis", "falproxy.stores.idempotency.redis"),
    "SUPABASE_URL": ("falproxy.middleware.rehost", "falproxy.stores.files.supabase"),
    "sandbox": SANDBOX,
    "serve": ("uvloop",),
}


@dataclass(slots=True, eq=False)
class ForkedProcess:
    """A running command, with those methods of `asyncio.subprocess.Process` that tests use.

    stdin: None if the command has no input.
    """

    pid: int
    stdin: FileIO | None
    stdout: asyncio.StreamReader
    stderr: asyncio.StreamReader
    _transports: tuple[asyncio.ReadTransport, ...]
    returncode: int | None = None
    _ended: asyncio.Event = field(default_factory=asyncio.Event)

    def watch(self, pipe: int) -> None:
        """Set `returncode` when it arrives in the pipe."""
        loop = asyncio.get_running_loop()

        def on_readable() -> None:
            loop.remove_reader(pipe)
            self.returncode = int(os.read(pipe, 16) or -signal.SIGKILL)
            os.close(pipe)
            self._ended.set()

        loop.add_reader(pipe, on_readable)

    def close(self) -> None:
        """Close the pipes of a process whose output is not read to its end."""
        self._close_stdin()
        for transport in self._transports:
            transport.close()

    async def wait(self) -> int:
        await self._ended.wait()
        assert self.returncode is not None
        return self.returncode

    def _close_stdin(self) -> None:
        if self.stdin is not None:
            self.stdin.close()

    async def communicate(self) -> tuple[bytes, bytes]:
        self._close_stdin()
        out, err, _ = await asyncio.gather(self.stdout.read(), self.stderr.read(), self.wait())
        return out, err

    def send_signal(self, number: int) -> None:
        if self.returncode is not None:
            raise ProcessLookupError
        os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class ForkServer:
    """The client of the server process, which is started with the first command."""

    def __init__(self) -> None:
        self._connection: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None

    def _connect(self) -> socket.socket:
        if self._connection is None:
            self._connection, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            self._connection.settimeout(START_TIMEOUT)
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.support.fork_server", str(theirs.fileno())],
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
            )
            theirs.close()
            atexit.register(self.close)
        return self._connection

    async def start(
        self,
        arguments: tuple[str, ...],
        env: Mapping[str, str],
        cwd: str,
        code: str | None = None,
        *,
        has_input: bool = False,
    ) -> ForkedProcess:
        """Start `falproxy` with the arguments.

        code: Python that runs in place of its command.
        has_input: whether the process has a pipe as stdin, which is empty otherwise.
        """
        stdin, writer = os.pipe()
        pipes = [os.pipe() for _ in range(PIPES - 1)]
        given = [stdin, *(write for _, write in pipes)]
        request = json.dumps({"arguments": arguments, "env": dict(env), "cwd": cwd, "code": code})
        connection = self._connect()
        try:
            socket.send_fds(connection, [request.encode()], given)
        finally:
            for descriptor in given:
                os.close(descriptor)
        file = os.fdopen(writer, "wb", 0)
        if not has_input:
            file.close()
        pid = int(connection.recv(16))
        (stdout, _), (stderr, _), (exit_code, _) = pipes
        out, out_transport = await open_reader(stdout)
        err, err_transport = await open_reader(stderr)
        transports = (out_transport, err_transport)
        process = ForkedProcess(pid, file if has_input else None, out, err, transports)
        process.watch(exit_code)
        return process

    def close(self) -> None:
        if self._connection is not None and self._process is not None:
            self._connection.close()
            self._process.wait()


class PipeProtocol(asyncio.StreamReaderProtocol):
    """Lets the transport close itself at the end of the pipe, on each event loop."""

    def eof_received(self) -> bool:
        super().eof_received()
        return False


async def open_reader(pipe: int) -> tuple[asyncio.StreamReader, asyncio.ReadTransport]:
    reader = asyncio.StreamReader()
    file = os.fdopen(pipe, "rb", 0)  # closed at its end, by the event loop
    loop = asyncio.get_running_loop()
    transport, _ = await loop.connect_read_pipe(lambda: PipeProtocol(reader), file)
    return reader, transport


FORK_SERVER = ForkServer()


# The server process


class Command(NamedTuple):
    """code: Python that runs in place of falproxy's command, with the arguments in sys.argv."""

    arguments: tuple[str, ...]
    code: str | None


def serve(connection: socket.socket) -> Command | None:
    """Fork for each request. Return the command in a forked process, and None at the end."""
    exit_pipes: dict[int, int] = {}
    ended, wakeup = os.pipe()
    os.set_blocking(wakeup, False)
    signal.set_wakeup_fd(wakeup)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    with selectors.DefaultSelector() as selector:
        selector.register(connection, selectors.EVENT_READ)
        selector.register(ended, selectors.EVENT_READ)
        while True:
            ready = {key.fd for key, _ in selector.select()}
            if ended in ready:
                os.read(ended, 1024)
                report_ended(exit_pipes)
            if connection.fileno() not in ready:
                continue
            data, pipes, _, _ = socket.recv_fds(connection, REQUEST_MAX, PIPES)
            if not data:
                return None
            import_for(json.loads(data))
            if (pid := os.fork()) == 0:
                break
            *streams, exit_pipes[pid] = pipes
            for descriptor in streams:
                os.close(descriptor)
            connection.send(str(pid).encode())
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for descriptor in (ended, wakeup, *exit_pipes.values()):
        os.close(descriptor)
    connection.close()
    return take_over(json.loads(data), pipes)


def import_for(request: Mapping[str, Any]) -> None:
    """Import what falproxy's command will use, unless a package is missing."""
    if request["code"] is not None:
        return
    for word in sorted(IMPORTS.keys() & {*request["arguments"], *request["env"]}):
        with suppress(ImportError):
            for name in IMPORTS[word]:
                importlib.import_module(name)
    gc.freeze()


def report_ended(exit_pipes: dict[int, int]) -> None:
    while exit_pipes:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            return
        pipe = exit_pipes.pop(pid)
        os.write(pipe, str(os.waitstatus_to_exitcode(status)).encode())
        os.close(pipe)


def take_over(request: dict[str, object], pipes: Sequence[int]) -> Command:
    """Give this process what the request describes, and return the command."""
    *streams, exit_pipe = pipes
    for number, descriptor in enumerate(streams):
        os.dup2(descriptor, number)
    for descriptor in (*streams, exit_pipe):
        os.close(descriptor)
    os.environ.clear()
    env, arguments, code = request["env"], request["arguments"], request["code"]
    assert isinstance(env, dict)
    assert isinstance(arguments, list)
    os.environ.update(env)
    os.chdir(str(request["cwd"]))
    sys.argv = ["falproxy", *arguments]
    return Command(tuple(arguments), None if code is None else str(code))


def main() -> int:
    os.environ.setdefault("FROZENLIST_NO_EXTENSIONS", "1")  # as falproxy/__main__.py
    from falproxy.cli.main import main as run

    connection = socket.socket(fileno=int(sys.argv[1]))
    # Garbage collection in a forked process would search, and so copy, all that was imported here:
    # two thirds of the CPU time of a short command.
    gc.collect()
    gc.freeze()
    command = serve(connection)
    if command is not None and command.code is not None:
        exec(command.code, {"__name__": "__main__"})
        return 0
    return 0 if command is None else run(command.arguments)


if __name__ == "__main__":
    raise SystemExit(main())
