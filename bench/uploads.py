"""CPU time of uploads with a real image in the body, of falproxy and of nginx, and memory of each.

Run it with `make bench`, or `python bench/uploads.py [MB …]`. The image is a PNG in a data URI,
which falproxy checks before fal gets the call; nginx forwards the bytes as they arrive. Plain HTTP.
"""

import argparse
import asyncio
import base64
import os
import re
import shutil
import struct
import sys
import tempfile
import zlib
from pathlib import Path
from statistics import median

from proxy_process import start_proxy

MIB = 2**20
TICKS = os.sysconf("SC_CLK_TCK")
AT_ONCE, ROUNDS = 16, 3
ROUND_BYTES = 512 * MIB  # enough for CPU time in steps of 10 ms
HEAD = (
    b"POST /api/fal/proxy HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    b"x-fal-target-url: https://fal.run/fal-ai/flux/dev/image-to-image\r\n"
    b"Content-Length: %d\r\n\r\n"
)
NGINX = """
daemon off; worker_processes 1; pid {folder}/pid; error_log {folder}/error.log;
events {{ worker_connections 512; }}
http {{
    access_log off; client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy;
    client_max_body_size 100m; client_body_buffer_size 256k; proxy_request_buffering off;
    upstream fal {{ server 127.0.0.1:{fal}; keepalive 32; }}
    server {{
        listen 127.0.0.1:{port};
        location / {{
            proxy_pass http://fal; proxy_http_version 1.1; proxy_set_header Connection "";
        }}
    }}
}}
"""


def png(size: int) -> bytes:
    """Return a PNG of about `size` bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    width, height = 1024, max(1, size // (3 * 1024))
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    rows = b"".join(b"\0" + os.urandom(3 * width) for _ in range(height))
    data = chunk(b"IDAT", zlib.compress(rows, 0))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + data + chunk(b"IEND", b"")


async def serve_fal(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            if match := re.search(rb"(?i)content-length: (\d+)", head):
                left = int(match[1])
                while left:
                    left -= len(await reader.read(min(left, MIB)))
            else:
                while await reader.readuntil(b"\r\n") != b"0\r\n":
                    await reader.readuntil(b"\r\n")
                await reader.readexactly(2)
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")
    except (asyncio.IncompleteReadError, ConnectionError):
        pass
    finally:
        writer.close()


def cpu_seconds(pid: int) -> float:
    """Return the CPU time of a process and its children, in steps of 10 ms."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return (int(fields[11]) + int(fields[12])) / TICKS + sum(map(cpu_seconds, map(int, children)))


def memory(pid: int, name: str) -> float:
    match = re.search(rf"{name}:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert match is not None
    return int(match[1]) / 1024


async def uploads(port: int, body: bytes, count: int) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    for _ in range(count):
        writer.write(HEAD % len(body))
        for start in range(0, len(body), 2**16):
            writer.write(body[start : start + 2**16])
            await writer.drain()
        head = await reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200"), head
        await reader.readexactly(2)
    writer.close()


async def cost(pid: int, port: int, body: bytes) -> float:
    """Return the milliseconds of CPU time of an upload."""
    await asyncio.gather(*(uploads(port, body, 1) for _ in range(AT_ONCE)))
    before, each = cpu_seconds(pid), ROUND_BYTES // len(body) // AT_ONCE
    await asyncio.gather(*(uploads(port, body, each) for _ in range(AT_ONCE)))
    return (cpu_seconds(pid) - before) / (each * AT_ONCE) * 1000


async def start_nginx(folder: Path, fal: int) -> tuple[asyncio.subprocess.Process, int]:
    probe = await asyncio.start_server(serve_fal, "127.0.0.1", 0)
    port = probe.sockets[0].getsockname()[1]
    probe.close()
    await probe.wait_closed()
    (folder / "conf").write_text(NGINX.format(folder=folder, fal=fal, port=port))
    process = await asyncio.create_subprocess_exec("nginx", "-c", folder / "conf", "-p", folder)
    await asyncio.sleep(1)
    return process, port


async def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("sizes", nargs="*", type=float, default=[0.5, 1.5, 8.0])
    sizes = parser.parse_args().sizes
    fal = await asyncio.start_server(serve_fal, "127.0.0.1", 0, limit=MIB)
    fal_port = fal.sockets[0].getsockname()[1]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        proxy, port = await start_proxy(folder, f"http://127.0.0.1:{fal_port}")
        peer = await start_nginx(folder, fal_port) if shutil.which("nginx") else None
        try:
            for size in sizes:
                await measure(size, (proxy.pid, port), peer and (peer[0].pid, peer[1]))
        finally:
            for process in (proxy, *(peer or ())[:1]):
                process.terminate()
                await process.wait()
    return 0


async def measure(size: float, proxy: tuple[int, int], peer: tuple[int, int] | None) -> None:
    image = base64.b64encode(png(int(size * MIB * 3 / 4))).decode()
    body = b'{"prompt": "a", "image_url": "data:image/png;base64,%s"}' % image.encode()
    pid = proxy[0]
    Path(f"/proc/{pid}/clear_refs").write_text("5")
    before = memory(pid, "VmRSS")
    own, theirs = [], []
    for _ in range(ROUNDS):
        own.append(await cost(*proxy, body))
        if peer is not None:
            theirs.append(await cost(*peer, body))
    peak = (memory(pid, "VmHWM") - before) / AT_ONCE
    line = f"{size:g} MB: {median(own):.2f} ms, at its peak {peak:.1f} MB each"
    if theirs:
        share = median(b / a for a, b in zip(own, theirs, strict=True))
        line += f"; nginx {median(theirs):.2f} ms, {share:.0%} of its bytes per CPU second"
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    raise SystemExit(asyncio.run(main()))
