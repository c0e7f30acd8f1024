"""The upstream in the role of fal: nginx for the queue, `compare.origin` for runs and streams."""

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Self

from compare.calls import small_result, status_document, submitted_document, write_result
from compare.namespace import QUEUE, RUN
from compare.process import running

COUNT_PORT = 8099
ANY_ID = "0" * 36
HERE = Path(__file__).parent
START_SECONDS = 10.0


def fill(template: Path, words: dict[str, object]) -> str:
    text = template.read_text()
    for name, value in words.items():
        text = text.replace(f"@{name}@", str(value))
    return text


class Upstream:
    """The running upstream."""

    def __init__(self) -> None:
        self._counted = 0

    async def count(self) -> int:
        """Return the number of requests to the queue so far, without those of this method."""
        reader, writer = await asyncio.open_connection(QUEUE, COUNT_PORT)
        writer.write(b"GET /count HTTP/1.0\r\n\r\n")
        text = (await reader.read()).decode()
        writer.close()
        self._counted += 1
        # "server accepts handled requests", then three numbers
        return int(text.partition("requests")[2].split()[2]) - self._counted

    @classmethod
    @asynccontextmanager
    async def running(cls, folder: Path) -> AsyncIterator[Self]:
        """Context manager: start both servers.

        folder: holds the certificates.
        """
        work = folder / "upstream"
        work.mkdir()
        write_result(work / "result.json")
        words = {
            "FOLDER": work,
            "CERTIFICATES": folder,
            "QUEUE": QUEUE,
            "COUNT_PORT": COUNT_PORT,
            "STATUS": status_document(ANY_ID).decode().replace(ANY_ID, "$polled"),
            "SUBMITTED": submitted_document(ANY_ID).decode().replace(ANY_ID, "$id"),
        }
        words["SMALL_RESULT"] = small_result().decode()
        config = work / "nginx.conf"
        config.write_text(fill(HERE / "upstream.conf", words))
        nginx = ("nginx", "-e", str(work / "error.log"), "-p", str(work), "-c", str(config))
        origin = (sys.executable, "-m", "compare.origin", RUN, str(folder))
        env = {"PATH": os.environ["PATH"], "PYTHONPATH": str(HERE.parent)}
        async with running(nginx, work, env, part="load"), running(origin, work, env, part="load"):
            for address in (QUEUE, RUN):
                await until_it_listens(address, 443, work / "log")
            yield cls()


async def until_it_listens(address: str, port: int, log: Path) -> None:
    try:
        async with asyncio.timeout(START_SECONDS):
            while True:
                try:
                    _, writer = await asyncio.open_connection(address, port)
                except OSError:
                    await asyncio.sleep(0.02)
                else:
                    writer.close()
                    return
    except TimeoutError:
        last_line = log.read_text().strip().splitlines()[-1:]
        raise RuntimeError(f"{address}:{port} does not listen: {''.join(last_line)}") from None
