"""Memory of slow readers and large uploads: RSS of a real falproxy process, in MiB.

Run it with `make bench`. It exits with 1 when a bound is exceeded.
"""

import asyncio
import os
import re
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

MIB = 2**20
CHUNK = bytes(64 * 1024)
RESPONSE = 200 * MIB
UPLOAD = 50 * MIB
READERS = 10
UPLOADS = 16
LISTENS = re.compile(rb"listens on http://127\.0\.0\.1:(\d+)")
TARGET = b"x-fal-target-url: https://fal.run/fal-ai/flux/dev\r\n"


async def serve_fal(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Respond to GET with 200 MiB, and to POST with the length of the body."""
    try:
        head = await reader.readuntil(b"\r\n\r\n")
        if head.startswith(b"GET"):
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % RESPONSE)
            for _ in range(RESPONSE // len(CHUNK)):
                writer.write(CHUNK)
                await writer.drain()
        else:
            count = 0
            while count < UPLOAD:
                count += len(await reader.read(MIB))
            body = b"%d" % count
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
            await writer.drain()
    except (asyncio.IncompleteReadError, ConnectionError):
        pass  # a connection without a request, or that of a slow reader was aborted
    finally:
        writer.close()


class Proxy:
    """A falproxy process."""

    def __init__(self, process: asyncio.subprocess.Process, port: int) -> None:
        self.process = process
        self.port = port

    @classmethod
    async def start(cls, fal_port: int) -> "Proxy":
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "falproxy", "serve", "--port", "0"),
            stderr=asyncio.subprocess.PIPE,
            env={
                "PATH": os.environ["PATH"],
                "FAL_KEY": "id:secret",
                "FALPROXY_UPSTREAM_ORIGIN": f"http://127.0.0.1:{fal_port}",
            },
        )
        assert process.stderr is not None
        async for line in process.stderr:
            if match := LISTENS.search(line):
                return cls(process, int(match[1]))
        raise RuntimeError("falproxy did not start")

    def memory(self, name: str) -> float:
        """Return `VmRSS`, or `VmHWM`, the peak since `reset_peak`, in MiB."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        match = re.search(rf"{name}:\s+(\d+) kB", status)
        assert match is not None
        return int(match[1]) / 1024

    def reset_peak(self) -> None:
        Path(f"/proc/{self.process.pid}/clear_refs").write_text("5")


async def request_without_reading(proxy: Proxy) -> asyncio.StreamWriter:
    _, writer = await asyncio.open_connection("127.0.0.1", proxy.port, limit=1)
    writer.transport.pause_reading()  # type: ignore[attr-defined]
    writer.write(b"GET /api/fal/proxy HTTP/1.1\r\nHost: localhost\r\n" + TARGET + b"\r\n")
    return writer


async def upload(proxy: Proxy) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
    writer.write(
        b"POST /api/fal/proxy HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Connection: close\r\nContent-Length: %d\r\n%s\r\n" % (UPLOAD, TARGET)
    )
    for _ in range(UPLOAD // len(CHUNK)):
        writer.write(CHUNK)
        await writer.drain()
    response = await reader.read()
    assert response.endswith(b"%d" % UPLOAD), response
    writer.close()


async def slow_readers(proxy: Proxy) -> None:
    writers = [await request_without_reading(proxy) for _ in range(READERS)]
    await asyncio.sleep(3)  # much longer than it takes to fill all buffers
    for writer in writers:
        writer.transport.abort()


async def large_uploads(proxy: Proxy) -> None:
    await asyncio.gather(*(upload(proxy) for _ in range(UPLOADS)))


async def cost(proxy: Proxy, work: Callable[[Proxy], Awaitable[None]]) -> float:
    """Return the MiB by which the peak of the proxy exceeds its memory before."""
    proxy.reset_peak()
    before = proxy.memory("VmRSS")
    await work(proxy)
    return proxy.memory("VmHWM") - before


async def main() -> int:
    fal = await asyncio.start_server(serve_fal, "127.0.0.1", 0, limit=MIB)
    proxy = await Proxy.start(fal.sockets[0].getsockname()[1])
    try:
        idle = proxy.memory("VmRSS")
        readers = await cost(proxy, slow_readers) / READERS
        uploads = await cost(proxy, large_uploads)
    finally:
        proxy.process.terminate()
        await proxy.process.wait()
    rows = (
        ("idle", idle, None),
        (f"a client that never reads its 200 MiB (of {READERS})", readers, 4),
        (f"{UPLOADS} uploads of 50 MiB at once", uploads, 64),
    )
    sys.stdout.write("| what | MiB of RSS | bound |\n|---|--:|--:|\n")
    for title, measured, bound in rows:
        sys.stdout.write(f"| {title} | {measured:.1f} | {bound or ''} |\n")
    return int(any(bound is not None and measured > bound for _, measured, bound in rows))


if __name__ == "__main__":
    raise SystemExit(asyncio.run(main()))
