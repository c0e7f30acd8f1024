"""A fal in a separate process, whose results name files of any size. Its CPU time and memory are
not counted in the test's process."""

import asyncio
import hashlib
import json
import re
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

from tests.support.cli_process import start_module

PIECE = 2**16
PNG = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\1\0\0\0\1\0\x08\2\0\0\0"
MP4 = b"\0\0\0\x18ftypisom\0\0\2\0isommp41"
VIDEO_MIN = 8 * 2**20  # bytes; larger files are videos
FILE = re.compile(rb"GET /made/(\d+)/(\d+) ")
RUN = re.compile(rb"POST /fal-ai/made/(\d+)/(\d+) ")
RESULT = re.compile(rb"GET /\S+/requests/([0-9a-f]{8})-0000-4000-8000-([0-9a-f]{12}) ")
LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)\r\n", re.IGNORECASE)


def run_url(number: int, size: int) -> str:
    """Return the target of a direct call whose result names one file."""
    return f"https://fal.run/fal-ai/made/{number}/{size}"


def result_url(number: int, size: int) -> str:
    """Return the target of the result of a queued request, which names one file."""
    return f"https://queue.fal.run/fal-ai/made/requests/{number:08x}-0000-4000-8000-{size:012x}"


def pieces(number: int, size: int) -> Iterator[bytes]:
    """Iterate over the bytes of a file."""
    first = MP4 if size >= VIDEO_MIN else PNG
    chunk = number.to_bytes(8, "big") * (PIECE // 8)
    yield (first + chunk[len(first) :])[:size]
    for start in range(PIECE, size, PIECE):
        yield chunk[: size - start]


def name_of(number: int, size: int) -> str:
    """Return the name under which a file is stored."""
    digest = hashlib.sha256()
    for chunk in pieces(number, size):
        digest.update(chunk)
    return f"{digest.hexdigest()}.{'mp4' if size >= VIDEO_MIN else 'png'}"


@asynccontextmanager
async def fal_apart() -> AsyncIterator[str]:
    """Start the process and yield its origin."""
    process = await start_module("tests.support.rehost_process")
    try:
        yield (await process.stdout.readline()).decode().strip()
    finally:
        await process.communicate()  # the end of its input stops it


async def respond(head: bytes, writer: asyncio.StreamWriter, origin: str) -> None:
    if match := FILE.match(head):
        number, size = map(int, match.groups())
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size)
        for chunk in pieces(number, size):
            writer.write(chunk)
            await writer.drain()
        return
    if match := RUN.match(head):
        number, size = map(int, match.groups())
    elif match := RESULT.match(head):
        number, size = (int(text, 16) for text in match.groups())
    else:
        writer.write(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
        return
    body = json.dumps({"file": {"url": f"{origin}/made/{number}/{size}"}, "seed": 1}).encode()
    writer.write(
        b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s"
        % (len(body), body)
    )
    await writer.drain()


async def main() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                if match := LENGTH.search(head):
                    await reader.readexactly(int(match[1]))
                await respond(head, writer, origin)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # the client has read enough
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    origin = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    sys.stdout.write(f"{origin}\n")
    sys.stdout.flush()
    await asyncio.to_thread(sys.stdin.read)


if __name__ == "__main__":
    asyncio.run(main())
