"""The disk backend. `falproxy.stores.files.serve` serves its files.

A file is written to a temporary name in the same folder tree and renamed once all of its bytes are
on the disk. A file under its final name is therefore complete, even after a crash.
"""

import asyncio
import errno
import fcntl
import hashlib
import os
import stat
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Self
from uuid import uuid4
from weakref import WeakValueDictionary

from falproxy.concurrency import run_in_daemon_thread
from falproxy.settings import Settings
from falproxy.storage_backends import FILES_FOLDER, FILES_PATH
from falproxy.stores.files import (
    FILE_CHUNK,
    FILE_NAME,
    LOCAL_ORIGIN,
    FileSource,
    LocalFiles,
    Storage,
    StorageError,
    StoredFile,
    UnusedFile,
)
from falproxy.stores.private_files import make_private_folder, open_below

INCOMING = "incoming"  # folder of files that are being written
LOCK = "lock"
DAY = 86400.0
ABANDONED_AFTER = 3600.0  # seconds since the last write after which a temporary file is deleted
SHUTDOWN_TIMEOUT = 0.5  # seconds to wait for pending writes when the storage is closed
DISK_FULL_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
PROBE_CONTENT = b"falproxy"


class DiskStorage(Storage):
    """A folder that is created on first use. Several processes may share it.

    base_url: Returns the URL that the files' paths are appended to, such as
        `https://proxy.example.com`.
    """

    def __init__(self, folder: Path, base_url: Callable[[], str]) -> None:
        self._folder = folder
        self._base_url = base_url
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._pending_writes: set[asyncio.Future[None]] = set()

    def __repr__(self) -> str:
        return f"<DiskStorage {self._folder}, {len(self._pending_writes)} pending writes>"

    @property
    def local_files(self) -> LocalFiles:
        return self

    async def __aenter__(self) -> Self:
        with map_os_errors():
            await asyncio.to_thread(delete_abandoned, self._folder, time.time())
        return self

    async def __aexit__(self, *error: object) -> None:
        if self._pending_writes:
            await asyncio.wait(self._pending_writes, timeout=SHUTDOWN_TIMEOUT)

    async def put(self, file: StoredFile) -> str:
        lock = self._locks.setdefault(file.name, asyncio.Lock())
        with map_os_errors():
            async with lock:  # a second caller then finds the file
                await self._write_file(file)
        return f"{self._base_url().rstrip('/')}{FILES_PATH}{file.name}"

    async def check(self) -> None:
        with map_os_errors():
            await asyncio.to_thread(probe, self._folder)

    async def collect_garbage(
        self, older_than: float, now: float, *, delete: bool
    ) -> AsyncIterator[UnusedFile]:
        files = collect_garbage(self._folder, older_than, now, delete=delete)
        while (file := await asyncio.to_thread(next, files, None)) is not None:
            yield file

    def size(self, name: str) -> int | None:
        try:
            with open_stored(self._folder, name) as file:
                found = os.fstat(file)
                if found.st_mtime < time.time() - DAY:
                    with suppress(OSError):  # the disk may be read-only now
                        os.utime(file)  # the garbage collection must see that the file is in use
                return found.st_size
        except (FileNotFoundError, NotADirectoryError):
            return None

    def read(self, name: str, start: int, length: int) -> bytes:
        if not FILE_NAME.fullmatch(name):
            return b""
        with open_stored(self._folder, name) as file:
            return os.pread(file, length, start)

    async def _write_file(self, file: StoredFile) -> None:
        """Write a file in a thread. If the caller is cancelled, the thread, which cannot be
        cancelled, is signalled to stop and to delete its temporary file."""
        cancelled = threading.Event()
        work = asyncio.ensure_future(
            run_in_daemon_thread(partial(write_file, self._folder, file, cancelled))
        )
        self._pending_writes.add(work)
        work.add_done_callback(self._pending_writes.discard)
        try:
            await asyncio.shield(work)
        except asyncio.CancelledError:
            cancelled.set()
            raise


def create_storage(settings: Settings) -> DiskStorage:
    return DiskStorage(settings.data_dir / FILES_FOLDER, lambda: LOCAL_ORIGIN)


@contextmanager
def map_os_errors() -> Iterator[None]:
    """Raise a StorageError for an OSError, without the path of the file."""
    try:
        yield
    except OSError as error:
        if error.errno in DISK_FULL_ERRNOS:
            raise StorageError("The disk has no room for the file.") from error
        raise StorageError(f"The disk cannot be used: {error.strerror or 'no reason'}.") from error


def path_of(folder: Path, name: str) -> Path | None:
    """Return the path of a file, or None if the name is not a valid one. Two levels of folders keep
    each of them small, since many file systems are slow with large ones."""
    return folder / name[:2] / name[2:4] / name if FILE_NAME.fullmatch(name) else None


@contextmanager
def open_stored(folder: Path, name: str) -> Iterator[int]:
    """Context: the descriptor of a stored file. Symbolic links below the folder are not followed:
    they lead to files that were never stored.

    Raises: FileNotFoundError, NotADirectoryError, OSError.
    """
    if not FILE_NAME.fullmatch(name):
        raise FileNotFoundError(name)
    try:
        with open_below(folder, name[:2], name[2:4], name) as descriptor:
            yield descriptor
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise FileNotFoundError(name) from error
        raise


def write_file(folder: Path, file: StoredFile, cancelled: threading.Event) -> None:
    """Write a file durably, unless it exists.

    Raises: StorageError, OSError.
    """
    path = path_of(folder, file.name)
    if path is None:
        raise StorageError("The file's name does not match its content.")
    make_folders(folder, folder / INCOMING, path.parent.parent, path.parent)
    if not refresh_mtime(folder, path, file.content.size):
        with temporary_file(folder) as (temporary_path, descriptor):
            write_content(descriptor, file.content, file.name.partition(".")[0], cancelled)
            with locked(folder, fcntl.LOCK_SH):
                temporary_path.replace(path)
    for changed in (path.parent, path.parent.parent, folder):
        fsync_dir(changed)


def refresh_mtime(folder: Path, path: Path, size: int) -> bool:
    """Set the modification time of an existing file to now. Return whether it exists with the
    expected size; a file of another size was truncated by something outside falproxy, which also
    made a symbolic link of the name."""
    with locked(folder, fcntl.LOCK_SH):
        try:
            os.utime(path, follow_symlinks=False)
        except FileNotFoundError:
            return False
        found = path.lstat()
        return stat.S_ISREG(found.st_mode) and found.st_size == size


def write_content(
    descriptor: int, content: FileSource, digest: str, cancelled: threading.Event
) -> None:
    """Write all bytes and sync them to the disk.

    digest: expected SHA-256 in hexadecimal.
    Raises: StorageError, the bytes do not match the digest, or the write was cancelled; OSError.
    """
    checksum = hashlib.sha256()
    for chunk in read_chunks(content):
        if cancelled.is_set():
            raise StorageError("The write was cancelled.")
        checksum.update(chunk)
        remaining = memoryview(chunk)
        while remaining:
            remaining = remaining[os.write(descriptor, remaining) :]
    if checksum.hexdigest() != digest:
        raise StorageError("The file's bytes do not match its name.")
    os.fsync(descriptor)
    if cancelled.is_set():
        raise StorageError("The write was cancelled.")


def read_chunks(content: FileSource) -> Iterator[bytes]:
    offset = 0
    while chunk := content.read(offset, FILE_CHUNK):
        offset += len(chunk)
        yield chunk


@contextmanager
def temporary_file(folder: Path) -> Iterator[tuple[Path, int]]:
    """A new file and its descriptor. It is deleted at the end unless it was renamed."""
    path = folder / INCOMING / uuid4().hex
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        yield path, descriptor
    finally:
        os.close(descriptor)
        path.unlink(missing_ok=True)


@contextmanager
def locked(folder: Path, operation: int) -> Iterator[None]:
    """Hold a file lock. It keeps `collect_file` from deleting a file that `refresh_mtime` has just
    found."""
    descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, operation)
        yield
    finally:
        os.close(descriptor)


def make_folders(*folders: Path) -> None:
    """Create folders, the outermost first."""
    for folder in (folders[0].parent, *folders):
        make_private_folder(folder)


def fsync_dir(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def probe(folder: Path) -> None:
    """Write, sync and read back a temporary file. Raises: OSError, StorageError."""
    make_folders(folder, folder / INCOMING)
    with temporary_file(folder) as (_, descriptor):
        os.write(descriptor, PROBE_CONTENT)
        os.fsync(descriptor)
        if os.pread(descriptor, len(PROBE_CONTENT), 0) != PROBE_CONTENT:
            raise StorageError("The disk does not return the bytes that were written to it.")


def delete_abandoned(folder: Path, now: float) -> None:
    """Delete temporary files of processes that were killed during a write."""
    with suppress(FileNotFoundError, NotADirectoryError):
        for path in (folder / INCOMING).iterdir():
            with suppress(FileNotFoundError):  # another process deletes them as well
                if path.stat().st_mtime < now - ABANDONED_AFTER:
                    path.unlink()


def find_file(folder: Path, url: str) -> Path | None:
    """Return the path of the stored file that a URL ends with, or None. Blocks."""
    name = url.rpartition(FILES_PATH)[2]
    with suppress(OSError), open_stored(folder, name):
        return path_of(folder, name)
    return None


def collect_garbage(
    folder: Path, older_than: float, now: float, *, delete: bool
) -> Iterator[UnusedFile]:
    """Iterate over the files that were last used more than `older_than` seconds ago. With `delete`
    each is deleted before it is yielded. Other files in the folder are left alone. Blocks.

    Raises: StorageError.
    """
    with map_os_errors():
        if folder.exists() and not folder.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        for path in sorted(folder.glob("[0-9a-f][0-9a-f]/[0-9a-f][0-9a-f]/*")):
            if path_of(folder, path.name) == path and (
                unused := collect_file(folder, path, now - older_than, delete=delete)
            ):
                yield unused


def collect_file(folder: Path, path: Path, before: float, *, delete: bool) -> UnusedFile | None:
    """Return the file, deleted if asked for, or None if it was used since `before` or is gone."""
    with locked(folder, fcntl.LOCK_EX), suppress(FileNotFoundError):
        found = path.lstat()
        if found.st_mtime < before:
            if delete:
                path.unlink()
            return UnusedFile(path.name, found.st_size, found.st_mtime)
    return None
