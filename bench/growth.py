"""Growth with open calls: memory of waiting runs and after their end, cost of a poll and of a hit.

Run it with `make bench`, or `python bench/growth.py [open calls]`. falproxy is one process; with
`--tls` it has TLS connections to fal. `bench/usage.py` measures the reports of a large ledger.
"""

import argparse
import asyncio
import os
import re
import ssl
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from proxy_process import start_proxy

RUN = b'{"prompt": "%d", "seed": 1}'
HEAD = (
    b"POST /api/fal/proxy HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    b"x-fal-target-url: https://fal.run/%s\r\nContent-Length: %d\r\n\r\n"
)
POLL = (
    b"GET /api/fal/proxy HTTP/1.1\r\nHost: localhost\r\n"
    b"x-fal-target-url: https://queue.fal.run/fal-ai/flux/requests/%d/status\r\n\r\n"
)
CACHED, WAITING = b"fal-ai/flux-pro/kontext", b"fal-ai/flux/dev"
RESULT = b'{"images": [], "seed": 1}'
STATUS = b'{"status": "IN_QUEUE", "queue_position": 3}'
POLLS = 1000
PAGE = os.sysconf("SC_PAGE_SIZE")
TICKS = os.sysconf("SC_CLK_TCK")


class Fal:
    """Responds to polls and to runs of a cached model, and to others after `finish`."""

    def __init__(self) -> None:
        self.may_end = asyncio.Event()
        self.waiting = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                if match := re.search(rb"(?i)content-length: (\d+)", head):
                    await reader.readexactly(int(match[1]))
                body = STATUS if head.startswith(b"GET") else RESULT
                if WAITING in head.split(b"\r\n", 1)[0] and head.startswith(b"POST"):
                    self.waiting += 1
                    await self.may_end.wait()
                writer.write(
                    b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
                    b"x-fal-request-id: r\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
                )
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()


class Client:
    """One connection of a client."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    @classmethod
    async def connect(cls, port: int) -> "Client":
        return cls(*await asyncio.open_connection("127.0.0.1", port, limit=2**16))

    def post(self, endpoint: bytes, number: int) -> None:
        body = RUN % number
        self.writer.write(HEAD % (endpoint, len(body)) + body)

    async def response(self) -> bytes:
        head = await self.reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200"), head
        match = re.search(rb"(?i)content-length: (\d+)", head)
        assert match is not None
        return await self.reader.readexactly(int(match[1]))


def rss_kb(pid: int) -> float:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE / 1024


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    # Finer than the ticks of `stat`, for the main thread.
    run = int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) / 1e9
    return max(run, (int(fields[11]) + int(fields[12])) / TICKS)


async def cost(pid: int, port: int, count: int, cached: bool) -> float:
    """Return the microseconds of CPU time of a poll, or of a hit."""
    client = await Client.connect(port)
    started = 0.0
    for number in range(-count // 4, count):
        if number == 0:
            started = cpu_seconds(pid)
        if cached:
            client.post(CACHED, 1)
        else:
            client.writer.write(POLL % (number % 1024))
        await client.response()
    used = cpu_seconds(pid) - started
    client.writer.close()
    return used / count * 1e6


def certificate(folder: Path) -> tuple[Path, Path]:
    key, cert = folder / "key.pem", folder / "cert.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256",
         "-nodes", "-keyout", key, "-out", cert, "-days", "2", "-subj", "/CN=localhost",
         "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"],
        check=True, capture_output=True,
    )  # fmt: skip
    return key, cert


async def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("calls", nargs="?", type=int, default=8000)
    parser.add_argument("--tls", action="store_true")
    parser.add_argument("--idle", type=int, default=60, help="seconds after the end of all calls")
    options = parser.parse_args()
    fal = Fal()
    with tempfile.TemporaryDirectory() as name:
        folder, context, environment = Path(name), None, dict[str, str]()
        if options.tls:
            key, cert = certificate(folder)
            context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
            context.load_cert_chain(cert, key)
            environment["SSL_CERT_FILE"] = str(cert)
        server = await asyncio.start_server(fal.serve, "127.0.0.1", 0, ssl=context, backlog=4096)
        scheme = "https" if options.tls else "http"
        fal_port = server.sockets[0].getsockname()[1]
        origin = f"{scheme}://127.0.0.1:{fal_port}"
        process, port = await start_proxy(folder, origin, **environment)
        try:
            await measure(fal, process.pid, port, options)
        finally:
            process.terminate()
            await process.wait()
    return 0


async def measure(fal: Fal, pid: int, port: int, options: argparse.Namespace) -> None:
    waiting = await open_runs(fal, port, 0, 10)
    few = [await cost(pid, port, POLLS, cached) for cached in (False, True)]
    before = rss_kb(pid)
    waiting += await open_runs(fal, port, 10, options.calls)
    await asyncio.sleep(3)
    each = (rss_kb(pid) - before) / (options.calls - 10)
    write(f"a waiting run: {each:.1f} KB")
    many = [await cost(pid, port, POLLS, cached) for cached in (False, True)]
    for name, low, high in zip(("poll", "hit"), few, many, strict=True):
        write(
            f"{name}: {low:.0f} µs with 10 open calls, {high:.0f} with {options.calls} "
            f"(x {high / low:.2f})"
        )
    write(f"{before / 1024:.0f} MB before, {rss_kb(pid) / 1024:.0f} with all calls")
    fal.may_end.set()
    for client in waiting:
        await client.response()
        client.writer.close()
    ended = time.monotonic()
    for seconds in [each for each in (3, 10, 30, 60) if each <= options.idle]:
        await asyncio.sleep(ended + seconds - time.monotonic())
        write(f"{seconds} s after their end: {rss_kb(pid) / 1024:.0f} MB")


async def open_runs(fal: Fal, port: int, first: int, last: int) -> list[Client]:
    """Return the clients of runs that wait at fal."""
    clients = []
    for number in range(first, last):
        client = await Client.connect(port)
        client.post(WAITING, number)
        clients.append(client)
        while fal.waiting < number - 100:
            await asyncio.sleep(0.001)
    while fal.waiting < last:
        await asyncio.sleep(0.05)
    return clients


def write(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    raise SystemExit(asyncio.run(main()))
