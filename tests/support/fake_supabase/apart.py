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
        await self._say(b"start\n")

    async def stop(self) -> None:
        await self._say(b"stop\n")

    async def _say(self, word: bytes) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(word)
        assert await self.process.stdout.readline() == word


@asynccontextmanager
async def fake_apart() -> AsyncIterator[Apart]:
    words = (sys.executable, "-m", "tests.support.fake_supabase")
    process = await asyncio.create_subprocess_exec(*words, cwd=ROOT, stdin=PIPE, stdout=PIPE)
    try:
        assert process.stdout is not None
        url, key = (await process.stdout.readline()).decode().split()
        yield Apart(url, key, process)
    finally:
        await process.communicate(b"")  # its input ends, and it does
