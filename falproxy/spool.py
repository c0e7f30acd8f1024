"""Spools: bodies that are held until they are checked, in memory or in temporary files."""

import asyncio
import os
import sys
import weakref
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from errno import EACCES, EMFILE, ENFILE, ENOENT, EPERM, EROFS
from functools import cache
from hashlib import sha256
from tempfile import TemporaryFile
from threading import Thread

from falproxy.errors import TemporaryError

MEMORY_MAX = 256 * 2**10  # bytes of a body that is held in memory
CHUNKS_MAX = 512  # chunks that are written with one call; the system accepts 1024
CHUNK_SIZE = 64 * 2**10  # bytes that are read at once; fits into a processor's cache
# Flag for reads that do not wait for the disk. Some systems lack it.
NOWAIT: int | None = getattr(os, "RWF_NOWAIT", None)
MEMORY_QUOTA = 256 * 2**20  # bytes of spools that are in memory, since they cannot be on disk
# Errors of a folder for temporary files that is missing, or may not be written to.
NOT_WRITABLE = (ENOENT, EACCES, EPERM, EROFS)
SPARE_FILES, SPARE_MAX = 16, 16 * 2**20  # files kept for reuse, and bytes of the largest


class SpoolQuota:
    """The disk space of all spools together, and their temporary files.

    Creating and deleting a file costs more than writing its bytes. Files are therefore reused while
    other spools are open, and all are deleted with the last spool.

    size: bytes for all spools.
    """

    def __init__(self, size: int) -> None:
        self._remaining = size if is_on_disk() else min(size, MEMORY_QUOTA)
        # Used from several threads without a lock, hence only by atomic operations.
        self._used_files: set[int] = set()
        self._spare_files: list[int] = []

    def __repr__(self) -> str:
        return f"<SpoolQuota {self._remaining} bytes left, {len(self._used_files)} files>"

    def reserve(self, count: int) -> None:
        """Take `count` bytes from the quota. Raises: ProxyError 503 `busy`."""
        if count > self._remaining:
            message = "The proxy holds as many large bodies as it can; try again soon."
            raise TemporaryError(503, "busy", message, {"Retry-After": "5"})
        self._remaining -= count

    def release(self, reserved: list[int]) -> None:
        """Return reserved bytes to the quota. A list, which may grow until the finalizer runs."""
        self._remaining += sum(reserved)

    def open_file(self) -> int:
        """Return the descriptor of a file, at its start. The file may contain bytes of an earlier
        body. Blocks. Raises: OSError."""
        try:
            descriptor = self._spare_files.pop()
            os.lseek(descriptor, 0, os.SEEK_SET)
        except IndexError:
            descriptor = create_file()
        self._used_files.add(descriptor)
        return descriptor

    def recycle(self, descriptor: int) -> None:
        """Keep the file of a deleted spool for reuse, or close it."""
        is_small = os.fstat(descriptor).st_size <= SPARE_MAX
        self._used_files.discard(descriptor)
        if self._used_files and is_small and len(self._spare_files) < SPARE_FILES:
            self._spare_files.append(descriptor)
        else:
            close_in_thread(descriptor)
        with suppress(IndexError):  # no file is left
            while not self._used_files:
                close_in_thread(self._spare_files.pop())


class Spool:
    """A body in memory, or if it is larger than `MEMORY_MAX` in an unnamed temporary file. The file
    is released together with the last reference to the spool."""

    def __init__(self, content: bytes = b"", quota: SpoolQuota | None = None) -> None:
        self.size = len(content)
        self._content = content
        self._quota = quota or SpoolQuota(sys.maxsize)
        self._file: int | None = None

    def __repr__(self) -> str:
        return f"<Spool {self.size} bytes in {'memory' if self.is_small else 'a file'}>"

    @property
    def is_small(self) -> bool:
        """Return whether the body is in memory, so that reading it cannot block."""
        return self._file is None

    def read(self, start: int, length: int) -> bytes:
        """Return up to `length` bytes. Safe to call from several threads."""
        if self._file is None:
            return self._content[start : start + length]
        # Beyond the body's end the file may contain bytes of an earlier body.
        return os.pread(self._file, max(0, min(length, self.size - start)), start)

    def digest(self) -> str:
        """SHA-256 in hexadecimal. Blocks."""
        digest = sha256()
        for start in range(0, self.size, MEMORY_MAX):
            digest.update(self.read(start, MEMORY_MAX))
        return digest.hexdigest()

    async def chunks(self) -> AsyncIterator[bytes]:
        """Iterate over the body. Any number of iterations may run at the same time."""
        buffer = memoryview(bytearray(0 if self.is_small else CHUNK_SIZE))
        start = 0
        while start < self.size and (chunk := await self._read_next(start, buffer)):
            start += len(chunk)
            yield chunk

    async def _read_next(self, start: int, buffer: memoryview) -> bytes:
        """Read the next chunk: directly if the system's page cache has it, which is the usual case,
        otherwise in a thread."""
        if self._file is None:
            return self.read(start, MEMORY_MAX)
        with suppress(OSError):  # not in the page cache, or not supported for this file
            if NOWAIT is not None:
                count = os.preadv(self._file, [buffer[: self.size - start]], start, NOWAIT)
                return bytes(buffer[:count])
        return await asyncio.to_thread(self.read, start, MEMORY_MAX)

    def append(self, chunks: Sequence[bytes]) -> None:
        """Append at most CHUNKS_MAX chunks to the file. The running method refers to the spool, so
        that the file stays open if the caller of the thread is cancelled.

        Raises: OSError.
        """
        if self._file is None:
            self._file = self._quota.open_file()
            weakref.finalize(self, self._quota.recycle, self._file)
        size = sum(map(len, chunks))
        written = os.writev(self._file, chunks)
        if written < size:  # the disk is full, or a signal interrupted the call
            remaining = memoryview(b"".join(chunks))[written:]
            while remaining:
                remaining = remaining[os.write(self._file, remaining) :]
        self.size += size


def create_file() -> int:
    """Return the descriptor of an unnamed file: in the folder for temporary files, or in memory if
    that is not writable. Raises: OSError."""
    try:
        # Python's file object would warn that it is not closed explicitly.
        with TemporaryFile(buffering=0) as file:
            return os.dup(file.fileno())
    except OSError as error:
        can_use_memory = not is_on_disk() and hasattr(os, "memfd_create")
        if error.errno not in NOT_WRITABLE or not can_use_memory:
            raise
        return os.memfd_create("falproxy-body")


def has_temporary_folder() -> bool:
    """Return whether a folder for temporary files is writable."""
    try:
        with TemporaryFile():
            return True
    except OSError:
        return False


is_on_disk = cache(has_temporary_folder)  # decided once in a process


def close_in_thread(descriptor: int) -> None:
    """Close a file in a thread. Freeing the space of a large file takes time, and the event loop,
    which may drop the last reference, must not block."""
    try:
        Thread(target=os.close, args=(descriptor,), daemon=True).start()
    except RuntimeError:  # no thread can be started, such as at the end of the interpreter
        os.close(descriptor)


async def spool_body(chunks: AsyncIterator[bytes], quota: SpoolQuota | None = None) -> Spool:
    """Read a body completely.

    quota: shared by several spools; None for no limit.
    Raises: ProxyError 503 `busy`, `disk_full` or `too_many_files`; the iterator's exceptions.
    """
    quota = quota or SpoolQuota(sys.maxsize)
    spool = Spool(quota=quota)
    reserved: list[int] = []
    weakref.finalize(spool, quota.release, reserved)
    pending: list[bytes] = []
    size = 0
    async for chunk in chunks:
        pending.append(chunk)
        size += len(chunk)
        if size > MEMORY_MAX:
            quota.reserve(size)
            reserved.append(size)
            await append_in_thread(spool, pending)
            pending, size = [], 0
        elif len(pending) == CHUNKS_MAX:
            pending = [b"".join(pending)]
    if spool.is_small:
        return Spool(b"".join(pending))
    if pending:
        await append_in_thread(spool, pending)
    return spool


async def append_in_thread(spool: Spool, chunks: Sequence[bytes]) -> None:
    try:
        await asyncio.to_thread(spool.append, chunks)
    except OSError as error:
        message = "The proxy has no room to hold the request's body."
        code = "too_many_files" if error.errno in (EMFILE, ENFILE) else "disk_full"
        raise TemporaryError(503, code, message) from error
