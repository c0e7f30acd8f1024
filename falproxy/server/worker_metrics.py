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
    Metrics,
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
    shared = SharedMetrics(app[METRICS], folder)
    app[WORKER_SNAPSHOTS] = shared.fetch_others
    app.cleanup_ctx.append(shared.cleanup_context)


class SharedMetrics:
    """The metrics of this process, for the other workers, and theirs for this one.

    folder: as for `share_metrics`.
    """

    def __init__(self, metrics: Metrics, folder: Path) -> None:
        self._metrics = metrics
        self._folder = folder
        self._socket = socket_path(folder, os.getpid())

    async def fetch_others(self) -> Sequence[Snapshot]:
        """Return the metrics of the other workers: the last saved ones of those that do not
        respond, and the counters of those that have ended."""
        others = [path for path in list_sockets(self._folder) if path != self._socket]
        snapshots = [
            snapshot or read_counters(path.with_suffix(".json"))
            for path, snapshot in zip(
                others, await asyncio.gather(*map(fetch_snapshot, others)), strict=True
            )
        ]
        snapshots.append(read_counters(self._folder / ENDED_FILE))
        return [snapshot for snapshot in snapshots if snapshot is not None]

    async def cleanup_context(self, app: web.Application) -> AsyncIterator[None]:
        """Serve and save the metrics while an application runs. Raises: SettingsError."""
        try:
            server = await asyncio.start_unix_server(self._send, self._socket)
        except OSError as error:
            raise SettingsError(
                f"Workers cannot share their numbers below {self._folder}: {error}."
            ) from error
        created = self._socket.stat().st_ctime_ns
        task = asyncio.get_running_loop().create_task(self._save_repeatedly())
        yield
        await cancel_tasks((task,))
        self._save()
        server.close()
        with suppress(FileNotFoundError):  # it may be that of an application that replaced this one
            if self._socket.stat().st_ctime_ns == created:
                self._socket.unlink()

    async def _send(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(json.dumps(self._metrics.snapshot()).encode())
        writer.close()

    async def _save_repeatedly(self) -> None:
        while True:
            await asyncio.sleep(SAVE_INTERVAL)
            self._save()

    def _save(self) -> None:
        save_snapshot(saved_path(self._folder, os.getpid()), self._metrics.snapshot())


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
