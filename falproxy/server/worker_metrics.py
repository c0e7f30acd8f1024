"""The numbers of the other worker processes, each from a Unix socket of its own."""

import asyncio
import json
import logging
import os
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

from aiohttp import web

from falproxy.errors import SettingsError
from falproxy.metrics import METRICS, WORKER_SNAPSHOTS, Snapshot

logger = logging.getLogger(__name__)

SNAPSHOT_TIMEOUT = 1.0  # seconds; who has not told its numbers by then is left out
SOCKET_PATTERN = "*.sock"


def socket_path(folder: Path, pid: int) -> Path:
    return folder / f"{pid}.sock"


def list_sockets(folder: Path) -> list[Path]:
    return [*folder.glob(SOCKET_PATTERN)]


def share_metrics(app: web.Application, folder: Path) -> None:
    """Has an application tell its numbers to the other processes of a folder, and know theirs.
    folder: nobody else can get into it."""
    own = socket_path(folder, os.getpid())

    async def ask_all() -> Sequence[Snapshot]:
        others = [path for path in list_sockets(folder) if path != own]
        answers = await asyncio.gather(*map(fetch_snapshot, others))
        return [answer for answer in answers if answer is not None]

    async def tell(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(json.dumps(app[METRICS].snapshot()).encode())
        writer.close()

    async def context(app: web.Application) -> AsyncIterator[None]:
        try:
            server = await asyncio.start_unix_server(tell, own)
        except OSError as error:
            raise SettingsError(
                f"Workers cannot share their numbers below {folder}: {error}."
            ) from error
        yield
        server.close()
        own.unlink(missing_ok=True)

    app[WORKER_SNAPSHOTS] = ask_all
    app.cleanup_ctx.append(context)


async def fetch_snapshot(path: Path) -> Snapshot | None:
    """The numbers of one process. None: it is about to end, or too busy to say."""
    try:
        async with asyncio.timeout(SNAPSHOT_TIMEOUT):
            reader, writer = await asyncio.open_unix_connection(path)
            try:
                told: Snapshot = json.loads(await reader.read())
            finally:
                writer.close()
    except (OSError, ValueError, TimeoutError) as error:
        logger.warning("A worker's numbers are left out: %s", type(error).__name__)
        return None
    return told
