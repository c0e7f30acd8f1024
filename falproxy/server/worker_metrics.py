"""Metrics across worker processes: each one serves its own on a Unix socket to the others."""

import asyncio
import json
import logging
import os
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from pathlib import Path

from aiohttp import web

from falproxy.concurrency import cancel_tasks
from falproxy.errors import SettingsError
from falproxy.metrics import (
    METRICS,
    WORKER_SNAPSHOTS,
    Snapshot,
    counters_of,
    merge_snapshots,
)

logger = logging.getLogger(__name__)

SNAPSHOT_TIMEOUT = 1.0  # seconds, after which a worker is left out
SAVE_INTERVAL = 2.0  # seconds between two writes of the metrics that outlive a worker
ENDED_FILE = "ended.json"  # the counters of all workers that have ended
SOCKET_PATTERN = "*.sock"


def socket_path(folder: Path, pid: int) -> Path:
    return folder / f"{pid}.sock"


def list_sockets(folder: Path) -> list[Path]:
    return [*folder.glob(SOCKET_PATTERN)]


def saved_path(folder: Path, pid: int) -> Path:
    return folder / f"{pid}.json"


def save_snapshot(path: Path, snapshot: Snapshot) -> None:
    """Write metrics so that a reader finds them complete. A failure is not important."""
    temporary = path.with_suffix(".new")
    with suppress(OSError):
        temporary.write_text(json.dumps(snapshot))
        temporary.replace(path)


def read_counters(path: Path) -> Snapshot | None:
    """Return the counters of a process that has ended, or does not respond."""
    with suppress(OSError, ValueError):
        return counters_of(json.loads(path.read_text()))
    return None


def retire_worker(folder: Path, pid: int) -> None:
    """Add the counters of a worker that has ended to those of its predecessors: the sums over all
    workers must not decrease. Called by the supervisor only."""
    socket_path(folder, pid).unlink(missing_ok=True)
    ended, before = map(read_counters, (saved_path(folder, pid), folder / ENDED_FILE))
    if ended is not None:
        merged = ended if before is None else merge_snapshots([ended, before])
        save_snapshot(folder / ENDED_FILE, merged)
        saved_path(folder, pid).unlink(missing_ok=True)


def share_metrics(app: web.Application, folder: Path) -> None:
    """Serve the metrics of this process to the other workers, and let the application fetch theirs.

    folder: holds the sockets; only the workers' user may have access.
    """
    local_socket = socket_path(folder, os.getpid())

    async def fetch_others() -> Sequence[Snapshot]:
        others = [path for path in list_sockets(folder) if path != local_socket]
        snapshots = [
            snapshot or read_counters(path.with_suffix(".json"))
            for path, snapshot in zip(
                others, await asyncio.gather(*map(fetch_snapshot, others)), strict=True
            )
        ]
        snapshots.append(read_counters(folder / ENDED_FILE))
        return [snapshot for snapshot in snapshots if snapshot is not None]

    async def send_snapshot(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(json.dumps(app[METRICS].snapshot()).encode())
        writer.close()

    def save() -> None:
        save_snapshot(saved_path(folder, os.getpid()), app[METRICS].snapshot())

    async def save_repeatedly() -> None:
        while True:
            await asyncio.sleep(SAVE_INTERVAL)
            save()

    async def worker_metrics_context(app: web.Application) -> AsyncIterator[None]:
        try:
            server = await asyncio.start_unix_server(send_snapshot, local_socket)
        except OSError as error:
            raise SettingsError(
                f"Workers cannot share their numbers below {folder}: {error}."
            ) from error
        task = asyncio.get_running_loop().create_task(save_repeatedly())
        yield
        await cancel_tasks((task,))
        save()
        server.close()
        local_socket.unlink(missing_ok=True)

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
