"""The falproxy command as a process."""

import asyncio
import json
import os
import re
import signal
import sys
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from tests.support.key_search import LEAKS

LISTENS = re.compile(r"(?:listens on|plays fal\.ai on) (http://\S+?)[ .](?=\D)")


@dataclass(slots=True)
class Process:
    """A falproxy that runs. origin: where it listens; log: its JSON lines so far."""

    process: asyncio.subprocess.Process
    origin: str = ""
    log: list[dict[str, object]] = field(default_factory=list)

    async def read_log(self) -> None:
        assert self.process.stderr is not None
        async for line in self.process.stderr:
            LEAKS.look(line.decode(), "log of a process")
            self.log.append(json.loads(line))
            if match := LISTENS.search(str(self.log[-1]["message"])):
                self.origin = match[1]

    async def end(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        async with asyncio.timeout(10):
            return await self.process.wait()


def command(*arguments: str, **env: str) -> Coroutine[object, object, asyncio.subprocess.Process]:
    clean = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    return asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "falproxy", *arguments),
        env=clean | env,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        cwd=env.get("CWD"),
    )


async def refused(*arguments: str, **env: str) -> str:
    """What a start that must fail says: one sentence, with exit code 2 and no traceback."""
    process = await command(*arguments, **env)
    async with asyncio.timeout(10):
        out, err = await process.communicate()
    assert (process.returncode, out) == (2, b"")
    text = err.decode()
    assert text.startswith("falproxy: ")
    assert text.count("\n") == 1
    return text


@asynccontextmanager
async def running(*arguments: str, **env: str) -> AsyncIterator[Process]:
    running = Process(await command(*arguments, "--port", "0", **env))
    reading = asyncio.ensure_future(running.read_log())
    try:
        async with asyncio.timeout(10):
            while not running.origin:
                assert running.process.returncode is None, running.log
                await asyncio.sleep(0.01)
        yield running
    finally:
        if running.process.returncode is None:
            running.process.kill()
            await running.process.wait()
        await reading
