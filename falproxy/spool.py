"""Bodies that are held until they are checked, in flat memory."""

import asyncio
import os
import sys
import weakref
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from errno import EMFILE, ENFILE
from hashlib import sha256
from tempfile import TemporaryFile
from threading import Thread

from falproxy.errors import ProxyError

MEMORY_MAX = 256 * 2**10
CHUNKS_MAX = 512  # that are written at once; the system takes 1024
CHUNK_SIZE = (
    64 * 2**10
)  # bytes that are handed out at once: small enough for a processor's own memory
# Says that a read is not to wait for the disk. Not every system knows it.
NOWAIT: int | None = getattr(os, "RWF_NOWAIT", None)
SPARE_FILES, SPARE_MAX = 16, 16 * 2**20  # files that are used again, and bytes of the largest


class SpoolQuota:
    """What all held bodies together may take of the disk, and the files that they are in.

    A new file costs more than the bytes in it: the system finds it a place and pages, and takes
    all of that back in the end. So the file of a body that is gone is the next body's, for as long
    as others are held; with the last one all are gone.
    """

    def __init__(self, size: int) -> None:
        self._remaining = size
        # Used from all threads, hence only in steps that are one for the interpreter.
        self._used_files: set[int] = set()
        self._spare_files: list[int] = []

    def reserve(self, count: int) -> None:
        """Raises: ProxyError 503 `busy`."""
        if count > self._remaining:
            message = "The proxy holds as many large bodies as it can; try again soon."
            raise ProxyError(503, "busy", message, {"Retry-After": "5"})
        self._remaining -= count

    def release(self, reserved: list[int]) -> None:
        count = sum(reserved)
        self._remaining += count

    def open_file(self) -> int:
        """The descriptor of a file to be written from its start. It may have bytes in it that were
        another body's. Blocks. Raises: OSError."""
        try:
            descriptor = self._spare_files.pop()
            os.lseek(descriptor, 0, os.SEEK_SET)
        except IndexError:
            # Python's file object would warn that nobody closes it by hand.
            with TemporaryFile(buffering=0) as file:
                descriptor = os.dup(file.fileno())
        self._used_files.add(descriptor)
        return descriptor

    def recycle(self, descriptor: int) -> None:
        """Nobody reads it any more."""
        is_small = os.fstat(descriptor).st_size <= SPARE_MAX
        self._used_files.discard(descriptor)
        if self._used_files and is_small and len(self._spare_files) < SPARE_FILES:
            self._spare_files.append(descriptor)
        else:
            close_in_thread(descriptor)
        with suppress(IndexError):  # there are none left
            while not self._used_files:
                close_in_thread(self._spare_files.pop())


class Spool:
    """A request's body that is held: in memory while it is small, beyond that in an unnamed
    temporary file, which is given back with the last one who refers to the spool."""

    def __init__(self, content: bytes = b"", quota: SpoolQuota | None = None) -> None:
        self.size = len(content)
        self._content = content
        self._quota = quota or SpoolQuota(sys.maxsize)
        self._file: int | None = None

    @property
    def is_small(self) -> bool:
        """Whether reading it cannot block."""
        return self._file is None

    def read(self, start: int, length: int) -> bytes:
        """What there is of these bytes. Any number of threads may read at once."""
        if self._file is None:
            return self._content[start : start + length]
        # Behind its end there may be bytes of another body.
        return os.pread(self._file, max(0, min(length, self.size - start)), start)

    def digest(self) -> str:
        """SHA-256 in hexadecimal. Blocks."""
        digest = sha256()
        for start in range(0, self.size, MEMORY_MAX):
            digest.update(self.read(start, MEMORY_MAX))
        return digest.hexdigest()

    async def chunks(self) -> AsyncIterator[bytes]:
        """All of it, as often and by as many as like."""
        buffer = memoryview(bytearray(0 if self.is_small else CHUNK_SIZE))
        start = 0
        while start < self.size and (chunk := await self._read_next(start, buffer)):
            start += len(chunk)
            yield chunk

    async def _read_next(self, start: int, buffer: memoryview) -> bytes:
        """A thread waits for the disk. What the system has in its memory, as it mostly does so
        soon, is not worth one."""
        if self._file is None:
            return self.read(start, MEMORY_MAX)
        with suppress(OSError):  # the disk has it, or this kind of file cannot tell
            if NOWAIT is not None:
                count = os.preadv(self._file, [buffer[: self.size - start]], start, NOWAIT)
                return bytes(buffer[:count])
        return await asyncio.to_thread(self.read, start, MEMORY_MAX)

    def append(self, chunks: Sequence[bytes]) -> None:
        """Writes to the file. A thread in here refers to the spool, so that the file stays open
        when the one who waits for the thread is cancelled.

        chunks: at most CHUNKS_MAX. Raises: OSError.
        """
        if self._file is None:
            self._file = self._quota.open_file()
            weakref.finalize(self, self._quota.recycle, self._file)
        size = sum(map(len, chunks))
        written = os.writev(self._file, chunks)
        if written < size:  # the disk has no more room, or a signal came
            rest = memoryview(b"".join(chunks))[written:]
            while rest:
                rest = rest[os.write(self._file, rest) :]
        self.size += size


def close_in_thread(descriptor: int) -> None:
    """Gives the disk back what an unnamed file had. For a large one that takes a moment, in which
    the event loop, where the last reference may go, should not stand still."""
    try:
        Thread(target=os.close, args=(descriptor,), daemon=True).start()
    except RuntimeError:  # no more threads, or the interpreter ends
        os.close(descriptor)


async def spool_body(chunks: AsyncIterator[bytes], quota: SpoolQuota | None = None) -> Spool:
    """The body once all of it is there. room: None for as much as the disk has.

    Raises: ProxyError 503 `busy`, `disk_full` or `too_many_files`, and what the iterator raises.
    """
    quota = quota or SpoolQuota(sys.maxsize)
    spool = Spool(quota=quota)
    taken: list[int] = []
    weakref.finalize(spool, quota.release, taken)
    waiting: list[bytes] = []
    size = 0
    async for chunk in chunks:
        waiting.append(chunk)
        size += len(chunk)
        if size > MEMORY_MAX:
            quota.reserve(size)
            taken.append(size)
            await append_in_thread(spool, waiting)
            waiting, size = [], 0
        elif len(waiting) == CHUNKS_MAX:
            waiting = [b"".join(waiting)]
    if spool.is_small:
        return Spool(b"".join(waiting))
    if waiting:
        await append_in_thread(spool, waiting)
    return spool


async def append_in_thread(spool: Spool, chunks: Sequence[bytes]) -> None:
    try:
        await asyncio.to_thread(spool.append, chunks)
    except OSError as error:
        message = "The proxy has no room to hold the request's body."
        code = "too_many_files" if error.errno in (EMFILE, ENFILE) else "disk_full"
        raise ProxyError(503, code, message) from error
