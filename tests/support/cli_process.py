"""The falproxy command as a process."""

import asyncio
import json
import os
import re
import signal
import sys
from collections.abc import AsyncIterator, Coroutine
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field

from tests.support.fork_server import FORK_SERVER, ForkedProcess
from tests.support.key_search import LEAKS
from tests.support.paths import ROOT
from tests.support.ports import free_port
from tests.support.waiting import SOON

LISTENS = re.compile(r"(?:listens on|imitates fal\.ai on) (http://\S+?)[ .](?=\D)")


@dataclass(slots=True)
class CliProcess:
    """A running process of falproxy.

    origin: URL it listens on, without a path; empty before it does.
    log: JSON log lines so far.
    """

    process: asyncio.subprocess.Process | ForkedProcess
    origin: str = ""
    log: list[dict[str, object]] = field(default_factory=list)

    async def read_log(self) -> None:
        assert self.process.stderr is not None
        async for line in self.process.stderr:
            LEAKS.search(line.decode(), "log of a process")
            self.log.append(json.loads(line))
            if match := LISTENS.search(str(self.log[-1]["message"])):
                self.origin = match[1]

    async def end_reading(self, reading: asyncio.Future[None]) -> None:
        """Wait until the log has been read, and close the pipes."""
        await reading
        if isinstance(self.process, ForkedProcess):
            self.process.close()

    async def stop(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        async with asyncio.timeout(10):
            return await self.process.wait()


def start_command(
    *arguments: str, code: str | None = None, **env: str
) -> Coroutine[object, object, ForkedProcess]:
    """Start `falproxy` with the arguments. CWD: its directory. code: Python that runs in place of
    its command."""
    return FORK_SERVER.start(arguments, base_environment() | env, env.get("CWD", os.getcwd()), code)


def start_module(name: str) -> Coroutine[object, object, ForkedProcess]:
    """Start a module as `python -m` does. The process has a pipe as stdin."""
    code = f"import runpy; runpy.run_module({name!r}, run_name='__main__')"
    return FORK_SERVER.start((), os.environ, str(ROOT), code, has_input=True)


def base_environment() -> dict[str, str]:
    """Return the variables of a process that stops without delay, unless a test sets one."""
    names = ("PATH", "HOME", "TMPDIR")
    own = {name: os.environ[name] for name in names if name in os.environ}
    return own | {"FALPROXY_STOP_DELAY": "0"}


def start_interpreter(
    *arguments: str, **env: str
) -> Coroutine[object, object, asyncio.subprocess.Process]:
    """Start `falproxy` as a shell does."""
    return asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "falproxy", *arguments),
        env=base_environment() | env,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        cwd=env.get("CWD"),
    )


async def run_refused(*arguments: str, **env: str) -> str:
    """Return the error message of a start that must fail with one sentence and exit code 2."""
    process = await start_command(*arguments, **env)
    async with asyncio.timeout(10):
        out, err = await process.communicate()
    assert (process.returncode, out) == (2, b"")
    text = err.decode()
    assert text.startswith("falproxy: ")
    assert text.count("\n") == 1
    return text


def run_command(*arguments: str, **env: str) -> AbstractAsyncContextManager[CliProcess]:
    """Context: a server on a port that no other server gets when this one has stopped."""
    return run_server(start_command(*arguments, "--port", str(free_port()), **env))


def run_interpreter(*arguments: str, **env: str) -> AbstractAsyncContextManager[CliProcess]:
    """Context: a server on a free port, in a new interpreter."""
    return run_server(start_interpreter(*arguments, "--port", "0", **env))


@asynccontextmanager
async def run_server(
    start: Coroutine[object, object, asyncio.subprocess.Process | ForkedProcess],
) -> AsyncIterator[CliProcess]:
    process = CliProcess(await start)
    reading = asyncio.ensure_future(process.read_log())
    try:
        async with asyncio.timeout(SOON):
            while not process.origin:
                assert process.process.returncode is None, process.log
                await asyncio.sleep(0.01)
        yield process
    finally:
        if process.process.returncode is None:
            process.process.kill()
            await process.process.wait()
        await process.end_reading(reading)
