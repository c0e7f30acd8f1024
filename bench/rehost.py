"""Cost of re-hosting outputs: milliseconds added to a run, and memory for a large video.

Run it with `make bench`. It exits with 1 when a bound is exceeded. It uses real falproxy processes
on loopback; the servers for fal and Supabase are processes as well and share the machine.
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

from cache import LISTENS, START_SECONDS, ClientConnection, request
from memory import Proxy

ROOT = Path(__file__).parent.parent
SIZES = {100_000: "100 KB", 1_000_000: "1 MB"}
VIDEO = 100 * 2**20 - 1
CONCURRENCIES = (1, 4)
ROUNDS, WARM_UP = 200, 20
NEW, KNOWN = "new", "known"
BOUNDS = {NEW: 100, KNOWN: 15}  # added ms at p99
MEMORY_BOUND = 16  # MiB
OFF = "left with fal"


@asynccontextmanager
async def helper_process(module: str) -> AsyncIterator[str]:
    """Context manager: start a program of the tests and return its first line of output. It exits
    when its input is closed."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", module, cwd=ROOT, stdin=PIPE, stdout=PIPE
    )
    try:
        assert process.stdout is not None
        yield (await process.stdout.readline()).decode().strip()
    finally:
        await process.communicate(b"")


@asynccontextmanager
async def serving(**env: str) -> AsyncIterator[Proxy]:
    """Context manager: start falproxy, with its log in a file, since a pipe would fill up."""
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
    """Return a call whose result names a file of this size, a different one for each number."""
    return request("POST", f"fal.run/fal-ai/made/{number}/{size}", b"{}")


async def timed(connection: ClientConnection, call: bytes, *, is_stored: bool) -> float:
    """Send a call and return its milliseconds."""
    started = time.perf_counter()
    head, _ = await connection.request(call)
    milliseconds = (time.perf_counter() - started) * 1e3
    assert (b"stored; count=1" in head) is is_stored, head
    return milliseconds


async def added(proxies: dict[str, Proxy], size: int) -> AsyncIterator[tuple[str, list[float]]]:
    """Yield the times of a call without re-hosting, and the time that each storage adds for a new
    and for a known file, measured alternately."""
    connections = {name: await ClientConnection.open(proxy.port) for name, proxy in proxies.items()}
    names = list(connections)
    times: dict[tuple[str, bool], list[float]] = {}
    for number in range(WARM_UP + ROUNDS):
        for name in names:
            for is_known in (False, True):
                milliseconds = await timed(
                    connections[name], run(number, size), is_stored=name != OFF
                )
                if number >= WARM_UP:
                    times.setdefault((name, is_known), []).append(milliseconds)
        names.reverse()
    without = times[OFF, True]
    yield f"run that names {SIZES[size]}, {OFF}", without
    for name in connections:
        for is_known in (False, True):
            if name != OFF:
                pairs = zip(times[name, is_known], without, strict=True)
                kind = KNOWN if is_known else NEW
                yield (
                    f"added by {name}, {SIZES[size]}, {kind}",
                    [milliseconds - base for milliseconds, base in pairs],
                )


async def memory_growth(proxy: Proxy, numbers: list[int]) -> float:
    """Return the MiB by which the peak exceeds the memory before the calls."""
    connections = [await ClientConnection.open(proxy.port) for _ in numbers]
    proxy.reset_peak()
    before = proxy.memory("VmRSS")
    calls = (run(number, VIDEO) for number in numbers)
    await asyncio.gather(*map(ClientConnection.request, connections, calls))
    return proxy.memory("VmHWM") - before


async def main() -> int:
    is_exceeded = False
    async with AsyncExitStack() as stack:
        origin = await stack.enter_async_context(helper_process("tests.support.rehost_process"))
        supabase = await stack.enter_async_context(helper_process("tests.support.fake_supabase"))
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
            async for title, times in added(proxies, size):
                slow = quantiles(times, n=100)[-1]
                bound = next((BOUNDS[word] for word in BOUNDS if title.endswith(word)), None)
                is_exceeded |= bound is not None and slow > bound
                sys.stdout.write(
                    f"| {title} | {median(times):.2f} | {slow:.2f} | {bound or ''} |\n"
                )
        file_numbers = count()
        sys.stdout.write("\n| what | MiB of RSS | bound |\n|---|--:|--:|\n")
        for name in ("disk", "Supabase"):
            for videos in CONCURRENCIES:
                batch = [next(file_numbers) for _ in range(videos)]
                measured = await memory_growth(proxies[name], batch)
                is_exceeded |= measured > MEMORY_BOUND
                title = f"{videos} x 100 MB at once, {name}"
                sys.stdout.write(f"| {title} | {measured:.1f} | {MEMORY_BOUND} |\n")
    return int(is_exceeded)


if __name__ == "__main__":
    raise SystemExit(asyncio.run(main()))
