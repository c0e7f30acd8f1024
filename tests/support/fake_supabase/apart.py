"""The fake in a separate process, with its own event loop and memory."""

import asyncio
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from tests.support.paths import ROOT


@dataclass(frozen=True, slots=True)
class Apart:
    url: str
    key: str
    process: Process

    async def start(self) -> None:
        await self._send_command(b"start\n")

    async def stop(self) -> None:
        await self._send_command(b"stop\n")

    async def _send_command(self, command: bytes) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(command)
        assert await self.process.stdout.readline() == command


@asynccontextmanager
async def fake_apart() -> AsyncIterator[Apart]:
    arguments = (sys.executable, "-m", "tests.support.fake_supabase")
    process = await asyncio.create_subprocess_exec(*arguments, cwd=ROOT, stdin=PIPE, stdout=PIPE)
    try:
        assert process.stdout is not None
        url, key = (await process.stdout.readline()).decode().split()
        yield Apart(url, key, process)
    finally:
        await process.communicate(b"")  # it ends when its input ends
