"""What it costs that outputs are kept: milliseconds that it adds to a run of real falproxy
processes on loopback, and what a large video takes of their memory.

Run it with `make bench`. It exits with 1 when a bound is broken. fal and Supabase are processes as
well; all of them, and this one, share the machine.
"""

import asyncio
import os
import sys
import tempfile
import time
from asyncio.subprocess import DEVNULL, PIPE
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from itertools import count
from pathlib import Path
from statistics import median, quantiles

from cache import LISTENS, START_SECONDS, Line, request
from memory import Proxy

TESTS = Path(__file__).parent.parent / "tests"
SIZES = {100_000: "100 KB", 1_000_000: "1 MB"}
VIDEO = 100 * 2**20 - 1
AT_ONCE = (1, 4)
ROUNDS, WARM_UP = 200, 20
NEW, KNOWN = "new", "known"
BOUNDS = {NEW: 100, KNOWN: 15}  # ms that 99 of 100 stay below, of what is added
MEMORY_BOUND = 16  # MiB
OFF = "left with fal"


@asynccontextmanager
async def apart(*words: str) -> AsyncIterator[str]:
    """A program of the tests. Gives the line that it says first; it ends with its input."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, *words, cwd=TESTS, stdin=PIPE, stdout=PIPE
    )
    try:
        assert process.stdout is not None
        yield (await process.stdout.readline()).decode().strip()
    finally:
        await process.communicate(b"")


@asynccontextmanager
async def serving(**env: str) -> AsyncIterator[Proxy]:
    """Its log goes to a file: nobody reads a pipe meanwhile."""
    with tempfile.TemporaryDirectory(prefix="falproxy-bench-") as folder:
        log = Path(folder) / "log"
        with log.open("wb") as stderr:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "falproxy", "serve", "--port", "0"),
                stdout=DEVNULL,
                stderr=stderr,
                cwd=folder,
                env={"PATH": os.environ["PATH"], "FAL_KEY": "id:secret", **env},
            )
        try:
            async with asyncio.timeout(START_SECONDS):
                while not (match := LISTENS.search(log.read_text())):
                    assert process.returncode is None, log.read_text()
                    await asyncio.sleep(0.02)
            yield Proxy(process, int(match[1]))
        finally:
            process.terminate()
            await process.wait()


def run(number: int, size: int) -> bytes:
    """A call whose result names a file of that size, which no other number has."""
    return request("POST", f"fal.run/fal-ai/made/{number}/{size}", b"{}")


async def timed(line: Line, call: bytes, *, is_kept: bool) -> float:
    """Milliseconds."""
    started = time.perf_counter()
    head, _ = await line.ask(call)
    took = (time.perf_counter() - started) * 1e3
    assert (b"stored; count=1" in head) is is_kept, head
    return took


async def added(proxies: dict[str, Proxy], size: int) -> AsyncIterator[tuple[str, list[float]]]:
    """What a call takes where nothing is kept, and what each storage adds to that when the file is
    new and when it is known, measured in turns."""
    lines = {name: await Line.open(proxy.port) for name, proxy in proxies.items()}
    names = list(lines)
    times: dict[tuple[str, bool], list[float]] = {}
    for number in range(WARM_UP + ROUNDS):
        for name in names:
            for is_known in (False, True):
                took = await timed(lines[name], run(number, size), is_kept=name != OFF)
                if number >= WARM_UP:
                    times.setdefault((name, is_known), []).append(took)
        names.reverse()
    without = times[OFF, True]
    yield f"run that names {SIZES[size]}, {OFF}", without
    for name in lines:
        for is_known in (False, True):
            if name != OFF:
                pairs = zip(times[name, is_known], without, strict=True)
                how = KNOWN if is_known else NEW
                yield (
                    f"added by {name}, {SIZES[size]}, {how}",
                    [took - base for took, base in pairs],
                )


async def grown(proxy: Proxy, numbers: list[int]) -> float:
    """MiB by which the peak lies above what was held before videos were kept."""
    lines = [await Line.open(proxy.port) for _ in numbers]
    proxy.forget_peak()
    before = proxy.memory("VmRSS")
    calls = (run(number, VIDEO) for number in numbers)
    await asyncio.gather(*map(Line.ask, lines, calls))
    return proxy.memory("VmHWM") - before


async def main() -> int:
    is_broken = False
    async with AsyncExitStack() as stack:
        origin = await stack.enter_async_context(apart("rehost_process.py"))
        supabase = await stack.enter_async_context(apart("-m", "fake_supabase"))
        url, key = supabase.split()
        envs = {
            OFF: {"FALPROXY_REHOST": "off"},
            "disk": {"FALPROXY_REHOST": "disk"},
            "Supabase": {"SUPABASE_URL": url, "SUPABASE_KEY": key},
        }
        proxies = {
            name: await stack.enter_async_context(serving(FALPROXY_UPSTREAM_ORIGIN=origin, **env))
            for name, env in envs.items()
        }
        sys.stdout.write("| what | p50 ms | p99 ms | bound |\n|---|--:|--:|--:|\n")
        for size in SIZES:
            async for what, times in added(proxies, size):
                slow = quantiles(times, n=100)[-1]
                bound = next((BOUNDS[word] for word in BOUNDS if what.endswith(word)), None)
                is_broken |= bound is not None and slow > bound
                sys.stdout.write(f"| {what} | {median(times):.2f} | {slow:.2f} | {bound or ''} |\n")
        numbers = count()
        sys.stdout.write("\n| what | MiB of RSS | bound |\n|---|--:|--:|\n")
        for name in ("disk", "Supabase"):
            for videos in AT_ONCE:
                some = [next(numbers) for _ in range(videos)]
                measured = await grown(proxies[name], some)
                is_broken |= measured > MEMORY_BOUND
                what = f"{videos} x 100 MB at once, {name}"
                sys.stdout.write(f"| {what} | {measured:.1f} | {MEMORY_BOUND} |\n")
    return int(is_broken)


if __name__ == "__main__":
    raise SystemExit(asyncio.run(main()))
