"""A process and its descendants: start and end, CPU time, memory."""

import asyncio
import os
import re
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")
TICKS = os.sysconf("SC_CLK_TCK")
STOP_SECONDS = 3.0
MIB = 2**20
CORES = sorted(os.sched_getaffinity(0))
# The proxies run on the first core, load and upstream on the others.
PARTS = {"proxy": CORES[:1], "load": CORES[1:] or CORES, "pair": CORES[:2]}


@dataclass(frozen=True, slots=True)
class Tree:
    """A process and its descendants."""

    root: int

    def pids(self) -> list[int]:
        parents = {}
        for entry in PROC.iterdir():
            if entry.name.isdigit() and (fields := stat(int(entry.name))):
                parents[int(entry.name)] = int(fields[1])
        pids = [self.root]
        for pid in pids:
            pids.extend(child for child, parent in parents.items() if parent == pid)
        return pids

    def cpu(self) -> float:
        """Return seconds of user and system time, including ended children."""
        ticks = 0
        for pid in self.pids():
            if fields := stat(pid):
                ticks += sum(map(int, fields[11:15]))
        return ticks / TICKS

    def rss(self) -> float:
        """Return the current MiB. Shared memory is counted for each process."""
        return sum(memory(pid, "VmRSS") for pid in self.pids())

    def peak(self) -> float:
        """Return the highest MiB since `reset_peak`."""
        return sum(memory(pid, "VmHWM") for pid in self.pids())

    def reset_peak(self) -> None:
        for pid in self.pids():
            (PROC / str(pid) / "clear_refs").write_text("5")


def stat(pid: int) -> list[str]:
    """Return the fields after the name, which may contain spaces; empty for an ended process."""
    try:
        return (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []


def memory(pid: int, name: str) -> float:
    try:
        text = (PROC / str(pid) / "status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    match = re.search(rf"{name}:\s+(\d+) kB", text)
    return int(match[1]) * 1024 / MIB if match else 0.0


@asynccontextmanager
async def running(
    command: Sequence[str], folder: Path, env: Mapping[str, str], *, part: str
) -> AsyncIterator[Tree]:
    """Context manager: run a command on its part of the cores, with its output in `folder`/log."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "log").open("ab") as log:
        process = await asyncio.create_subprocess_exec(
            *("taskset", "-c", ",".join(map(str, PARTS[part])), *command),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd=folder,
            env=dict(env),
        )
    try:
        yield Tree(process.pid)
    finally:
        await end(process)


async def end(process: asyncio.subprocess.Process) -> None:
    if process.returncode is not None:
        return
    children = Tree(process.pid).pids()[1:]
    process.terminate()
    try:
        async with asyncio.timeout(STOP_SECONDS):
            await process.wait()
    except TimeoutError:
        for pid in (*children, process.pid):
            kill(pid)
        await process.wait()


def kill(pid: int) -> None:
    with suppress(ProcessLookupError):  # it has ended already
        os.kill(pid, 9)
