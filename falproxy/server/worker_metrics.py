"""Metrics across worker processes: each one serves its own on a Unix socket to the others."""

import asyncio
import json
import logging
import os
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from pathlib import Path

from aiohttp import web

from falproxy.errors import SettingsError
from falproxy.metrics import METRICS, WORKER_SNAPSHOTS, Snapshot

logger = logging.getLogger(__name__)

SNAPSHOT_TIMEOUT = 1.0  # seconds, after which a worker is left out
SOCKET_PATTERN = "*.sock"


def socket_path(folder: Path, pid: int) -> Path:
    return folder / f"{pid}.sock"


def list_sockets(folder: Path) -> list[Path]:
    return [*folder.glob(SOCKET_PATTERN)]


def share_metrics(app: web.Application, folder: Path) -> None:
    """Serve the metrics of this process to the other workers, and let the application fetch theirs.

    folder: holds the sockets; only the workers' user may have access.
    """
    local_socket = socket_path(folder, os.getpid())

    async def fetch_others() -> Sequence[Snapshot]:
        others = [path for path in list_sockets(folder) if path != local_socket]
        snapshots = await asyncio.gather(*map(fetch_snapshot, others))
        return [snapshot for snapshot in snapshots if snapshot is not None]

    async def send_snapshot(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(json.dumps(app[METRICS].snapshot()).encode())
        writer.close()

    async def worker_metrics_context(app: web.Application) -> AsyncIterator[None]:
        try:
            server = await asyncio.start_unix_server(send_snapshot, local_socket)
        except OSError as error:
            raise SettingsError(
                f"Workers cannot share their numbers below {folder}: {error}."
            ) from error
        created = local_socket.stat().st_ctime_ns
        yield
        server.close()
        with suppress(FileNotFoundError):  # it may be that of an application that replaced this one
            if local_socket.stat().st_ctime_ns == created:
                local_socket.unlink()

    app[WORKER_SNAPSHOTS] = fetch_others
    app.cleanup_ctx.append(worker_metrics_context)


async def fetch_snapshot(path: Path) -> Snapshot | None:
    """Return the metrics of one worker, None if it is stopping or did not respond in time."""
    try:
        async with asyncio.timeout(SNAPSHOT_TIMEOUT):
            reader, writer = await asyncio.open_unix_connection(path)
            try:
                snapshot: Snapshot = json.loads(await reader.read())
            finally:
                writer.close()
    except (OSError, ValueError, TimeoutError) as error:
        logger.warning("A worker's metrics are left out: %s", type(error).__name__)
        return None
    return snapshot
