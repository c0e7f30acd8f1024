"""The fake in a separate process, with its own event loop and memory."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from tests.support.cli_process import start_module
from tests.support.fork_server import ForkedProcess


@dataclass(frozen=True, slots=True)
class Apart:
    url: str
    key: str
    process: ForkedProcess

    async def start(self) -> None:
        await self._send_command(b"start\n")

    async def stop(self) -> None:
        await self._send_command(b"stop\n")

    async def _send_command(self, command: bytes) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(command)
        assert await self.process.stdout.readline() == command


@asynccontextmanager
async def fake_apart() -> AsyncIterator[Apart]:
    process = await start_module("tests.support.fake_supabase")
    try:
        url, key = (await process.stdout.readline()).decode().split()
        yield Apart(url, key, process)
    finally:
        await process.communicate()  # it ends when its input ends
