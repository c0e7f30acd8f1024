"""Files on this machine's disk. `storage.files` serves them.

A file is written beside those that are kept, and gets its name when all of it is on the disk:
what has a name is whole, whatever happens to the process or the machine.
"""

import asyncio
import errno
import fcntl
import hashlib
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Self
from uuid import uuid4
from weakref import WeakValueDictionary

from falproxy.concurrency import run_in_daemon_thread
from falproxy.media.content_type import CONTENT_TYPES
from falproxy.stores.files import FileSource, Storage, StorageError, StoredFile

NAME = re.compile(rf"(?P<digest>[0-9a-f]{{64}})\.(?P<extension>{'|'.join(CONTENT_TYPES)})")
INCOMING = "incoming"  # where files are that have no name yet
LOCK = "lock"
CHUNK = 256 * 2**10
DAY = 86400.0
# Seconds after which nobody writes to a file any more that has no name yet.
ABANDONED_AFTER = 3600.0
SHUTDOWN_TIMEOUT = 0.5  # seconds that a disk has at the end, after all that was waited for
DISK_FULL_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
PROBE_CONTENT = b"falproxy"


class DiskStorage(Storage):
    """A folder, made at first need. base_url: what the files' paths are put behind, such as
    `https://proxy.example.com`. Any number of processes may share the folder."""

    def __init__(self, folder: Path, base_url: Callable[[], str]) -> None:
        self._folder = folder
        self._base_url = base_url
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._pending_writes: set[asyncio.Future[None]] = set()

    async def __aenter__(self) -> Self:
        with map_os_errors():
            await asyncio.to_thread(delete_abandoned, self._folder, time.time())
        return self

    async def __aexit__(self, *error: object) -> None:
        if self._pending_writes:
            await asyncio.wait(self._pending_writes, timeout=SHUTDOWN_TIMEOUT)

    async def put(self, file: StoredFile) -> str:
        turn = self._locks.setdefault(file.name, asyncio.Lock())
        with map_os_errors():
            async with turn:  # who comes second finds it there
                await self._write_file(file)
        return f"{self._base_url().rstrip('/')}/files/{file.name}"

    async def check(self) -> None:
        with map_os_errors():
            await asyncio.to_thread(probe, self._folder)

    def size(self, name: str) -> int | None:
        """None: there is no such file. Blocks. Raises: OSError."""
        path = path_of(self._folder, name)
        with suppress(FileNotFoundError, NotADirectoryError):
            if path is not None:
                found = path.stat()
                if found.st_mtime < time.time() - DAY:
                    os.utime(path)  # somebody needs it
                return found.st_size
        return None

    def read(self, name: str, start: int, length: int) -> bytes:
        """What there is of a file's bytes. Blocks. Raises: OSError."""
        path = path_of(self._folder, name)
        if path is None:
            return b""
        with path.open("rb", buffering=0) as file:
            return os.pread(file.fileno(), length, start)

    async def _write_file(self, file: StoredFile) -> None:
        """A thread cannot be cancelled: when nobody waits for it any more, it is told, and puts
        away what it has written."""
        given_up = threading.Event()
        work = asyncio.ensure_future(
            run_in_daemon_thread(partial(write_file, self._folder, file, given_up))
        )
        self._pending_writes.add(work)
        work.add_done_callback(self._pending_writes.discard)
        try:
            await asyncio.shield(work)
        except asyncio.CancelledError:
            given_up.set()
            raise


@contextmanager
def map_os_errors() -> Iterator[None]:
    """What the system says about a file as a StorageError, without the file's path."""
    try:
        yield
    except OSError as error:
        if error.errno in DISK_FULL_ERRNOS:
            raise StorageError("The disk has no room for the file.") from error
        raise StorageError(f"The disk cannot be used: {error.strerror or 'no reason'}.") from error


def path_of(folder: Path, name: str) -> Path | None:
    """Files are spread over folders, since most systems are slow with many files in one."""
    return folder / name[:2] / name[2:4] / name if NAME.fullmatch(name) else None


def write_file(folder: Path, file: StoredFile, cancelled: threading.Event) -> None:
    """Returns when the file is there for good.

    Raises: StorageError, OSError.
    """
    path = path_of(folder, file.name)
    if path is None:
        raise StorageError("The file's name does not tell its content.")
    make_folders(folder, folder / INCOMING, path.parent.parent, path.parent)
    if not refresh_mtime(folder, path, file.content.size):
        with temporary_file(folder) as (written, descriptor):
            write_content(descriptor, file.content, file.name.partition(".")[0], cancelled)
            with locked(folder, fcntl.LOCK_SH):
                written.replace(path)
    for changed in (path.parent, path.parent.parent, folder):
        fsync_dir(changed)


def refresh_mtime(folder: Path, path: Path, size: int) -> bool:
    """Whether the file is there, which is used from now on as if it were new. A file of another
    size is what is left of one that something else than us has cut."""
    with locked(folder, fcntl.LOCK_SH):
        try:
            os.utime(path)
        except FileNotFoundError:
            return False
        return path.stat().st_size == size


def write_content(
    descriptor: int, content: FileSource, digest: str, cancelled: threading.Event
) -> None:
    """Raises: StorageError, these are not the bytes that the digest tells, or nobody wants them
    any more; OSError."""
    written = hashlib.sha256()
    for chunk in read_chunks(content):
        if cancelled.is_set():
            raise StorageError("Nobody waits for the file any more.")
        written.update(chunk)
        rest = memoryview(chunk)
        while rest:
            rest = rest[os.write(descriptor, rest) :]
    if written.hexdigest() != digest:
        raise StorageError("The file's bytes are not those that its name tells.")
    os.fsync(descriptor)
    if cancelled.is_set():
        raise StorageError("Nobody waits for the file any more.")


def read_chunks(content: FileSource) -> Iterator[bytes]:
    at = 0
    while chunk := content.read(at, CHUNK):
        at += len(chunk)
        yield chunk


@contextmanager
def temporary_file(folder: Path) -> Iterator[tuple[Path, int]]:
    """A new file and its descriptor. It is gone in the end, if it was not given a name."""
    path = folder / INCOMING / uuid4().hex
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        yield path, descriptor
    finally:
        os.close(descriptor)
        path.unlink(missing_ok=True)


@contextmanager
def locked(folder: Path, operation: int) -> Iterator[None]:
    """Between looking at a file's age and deleting it nobody may come to rely on it."""
    descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, operation)
        yield
    finally:
        os.close(descriptor)


def make_folders(*folders: Path) -> None:
    """Outermost first."""
    folders[0].parent.mkdir(parents=True, exist_ok=True)
    for folder in folders:
        folder.mkdir(mode=0o700, exist_ok=True)


def fsync_dir(folder: Path) -> None:
    """The names in a folder outlive the machine from now on."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def probe(folder: Path) -> None:
    """Raises: OSError, StorageError."""
    make_folders(folder, folder / INCOMING)
    with temporary_file(folder) as (_, descriptor):
        os.write(descriptor, PROBE_CONTENT)
        os.fsync(descriptor)
        if os.pread(descriptor, len(PROBE_CONTENT), 0) != PROBE_CONTENT:
            raise StorageError("The disk does not give back what is written to it.")


def delete_abandoned(folder: Path, now: float) -> None:
    """Deletes what processes left behind that were killed while they wrote."""
    with suppress(FileNotFoundError, NotADirectoryError):
        for path in (folder / INCOMING).iterdir():
            with suppress(FileNotFoundError):  # another process sweeps as well
                if path.stat().st_mtime < now - ABANDONED_AFTER:
                    path.unlink()


def find_file(folder: Path, url: str) -> Path | None:
    """Where a kept file is that the end of a URL names, if there is one. Blocks."""
    path = path_of(folder, url.rpartition("/files/")[2])
    return path if path is not None and path.is_file() else None


@dataclass(frozen=True, slots=True)
class UnusedFile:
    """A file that was not put for long. used_at: seconds since 1970."""

    name: str
    size: int
    used_at: float


def collect_garbage(
    folder: Path, older_than: float, now: float, *, delete: bool
) -> Iterator[UnusedFile]:
    """The files that were last put more than `older_than` seconds ago; each is deleted before it
    is given, if at all. Blocks. What is no kept file is left alone.

    Raises: StorageError.
    """
    with map_os_errors():
        for path in sorted(folder.glob("[0-9a-f][0-9a-f]/[0-9a-f][0-9a-f]/*")):
            if path_of(folder, path.name) == path and (
                unused := collect_file(folder, path, now - older_than, delete=delete)
            ):
                yield unused


def collect_file(folder: Path, path: Path, before: float, *, delete: bool) -> UnusedFile | None:
    """None: it was put since then, or is gone."""
    with locked(folder, fcntl.LOCK_EX), suppress(FileNotFoundError):
        found = path.stat()
        if found.st_mtime < before:
            if delete:
                path.unlink()
            return UnusedFile(path.name, found.st_size, found.st_mtime)
    return None
