"""A node of a cluster: `falproxy serve` on a port that it keeps over restarts."""

import asyncio
import os
import signal
from contextlib import suppress
from pathlib import Path

from tests.support.cli_process import CliProcess, start_command
from tests.support.ports import free_port

START_TIMEOUT = STOP_TIMEOUT = 180.0  # seconds, on a busy machine


class ProxyNode:
    """A supervisor and its workers.

    env: of the next process.
    folder: its data directory, which restarts keep.
    logs: the JSON log lines of each process so far.
    """

    def __init__(self, folder: Path, workers: int, **env: str) -> None:
        self.port = free_port()
        self.folder = folder
        self.logs: list[list[dict[str, object]]] = []
        self._workers = workers
        self.env = env | {"FALPROXY_DATA_DIR": str(folder)}
        self._process: CliProcess | None = None
        self._reading: asyncio.Future[None] | None = None

    @property
    def origin(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.process.returncode is None

    @property
    def supervisor(self) -> int:
        """The id of the process that was started."""
        assert self._process is not None
        pid = self._process.process.pid
        assert pid is not None
        return pid

    @property
    def worker_pids(self) -> list[int]:
        """The ids of the workers; empty while they are replaced."""
        pid = self.supervisor
        try:
            children = Path(f"/proc/{pid}/task/{pid}/children").read_text()
        except OSError:
            return []
        return [*map(int, children.split())]

    async def start(self) -> None:
        """Start the processes, and wait until they accept calls."""
        arguments = ("serve", "--workers", str(self._workers), "--port", str(self.port))
        started = await start_command(*arguments, CWD=str(self.folder), **self.env)
        self._process = CliProcess(started)
        self.logs.append(self._process.log)
        self._reading = asyncio.ensure_future(self._process.read_log())
        async with asyncio.timeout(START_TIMEOUT):
            while not self._process.origin:
                assert self.is_running, self._process.log
                await asyncio.sleep(0.01)

    async def stop(self) -> int:
        """Let the processes finish their calls. Return the exit code."""
        assert self._process is not None
        self._process.process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(STOP_TIMEOUT):
            return await self._ended()

    async def kill(self) -> None:
        """End all processes of the node at once."""
        if not self.is_running:
            return
        for pid in (self.supervisor, *self.worker_pids):
            send_signal(pid, signal.SIGKILL)
        await self._ended()

    async def kill_supervisor(self) -> None:
        """End the supervisor alone: its workers notice, and finish their calls."""
        send_signal(self.supervisor, signal.SIGKILL)
        await self._ended()

    async def _ended(self) -> int:
        assert self._process is not None
        assert self._reading is not None
        code = await self._process.process.wait()
        await self._process.end_reading(self._reading)  # until the last worker has closed its end
        return code


def send_signal(pid: int, number: int) -> None:
    """Send a signal to a process that may have ended."""
    with suppress(ProcessLookupError):
        os.kill(pid, number)
