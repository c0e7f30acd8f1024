"""Ten thousand equal submits at once over three falproxy processes with one Redis: one job at fal.

Run it with `make bench`, or `python bench/equal_submits.py [submits]`. It prints the number of jobs
and the seconds until the last client has its request id, and exits with 1 for more than one job.
"""

import argparse
import asyncio
import re
import sys
import tempfile
import time
from pathlib import Path

from proxy_process import start_proxy

sys.path.append(str(Path(__file__).parents[1]))
from tests.support.redis_server import redis_server

NODES = 3
BODY = b'{"prompt": "a lighthouse", "seed": 7}'
SUBMIT = (
    b"POST /api/fal/proxy HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    b"x-fal-target-url: https://queue.fal.run/fal-ai/flux-pro/kontext\r\n"
    b"Connection: close\r\nContent-Length: %d\r\n\r\n%s" % (len(BODY), BODY)
)
STATUS = b'{"status": "IN_QUEUE", "queue_position": 3, "request_id": "r1"}'


class Fal:
    def __init__(self) -> None:
        self.jobs = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                if match := re.search(rb"(?i)content-length: (\d+)", head):
                    await reader.readexactly(int(match[1]))
                self.jobs += head.startswith(b"POST")
                await asyncio.sleep(0.1)
                writer.write(
                    b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
                    b"x-fal-request-id: r1\r\nContent-Length: %d\r\n\r\n%s" % (len(STATUS), STATUS)
                )
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()


async def submit(port: int, start: asyncio.Event, slots: asyncio.Semaphore) -> bytes:
    async with slots:  # the queue of a listening socket is short
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**16)
    await start.wait()
    writer.write(SUBMIT)
    response = await reader.read()
    writer.close()
    assert response.startswith(b"HTTP/1.1 200"), response[:500]
    return response


async def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("submits", nargs="?", type=int, default=10_000)
    submits = parser.parse_args().submits
    fal, start, slots = Fal(), asyncio.Event(), asyncio.Semaphore(100)
    server = await asyncio.start_server(fal.serve, "127.0.0.1", 0)
    fal_port = server.sockets[0].getsockname()[1]
    with tempfile.TemporaryDirectory() as name, redis_server() as redis:
        folder = Path(name)
        nodes = []
        for number in range(NODES):
            (node := folder / str(number)).mkdir()
            origin = f"http://127.0.0.1:{fal_port}"
            nodes.append(await start_proxy(node, origin, REDIS_URL=redis.url))
        try:
            tasks = [
                asyncio.create_task(submit(nodes[number % NODES][1], start, slots))
                for number in range(submits)
            ]
            await asyncio.sleep(0.5 + submits / 1000)
            started = time.monotonic()
            start.set()
            await asyncio.gather(*tasks)
            seconds = time.monotonic() - started
        finally:
            for process, _ in nodes:
                process.terminate()
                await process.wait()
    sys.stdout.write(f"{submits} equal submits: {fal.jobs} job, {seconds:.1f} s\n")
    return int(fal.jobs != 1)


if __name__ == "__main__":
    raise SystemExit(asyncio.run(main()))
