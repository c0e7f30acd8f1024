"""The storages that must fulfil the contract, and files to store."""

import asyncio
import hashlib
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from aiohttp import ClientSession, web
from aiohttp.test_utils import TestServer
from tenacity import wait_none

from falproxy.dialects import default_error, handle_errors
from falproxy.spool import Spool
from falproxy.stores.files import FileSource, Storage, StoredFile
from falproxy.stores.files.disk import LOCK, DiskStorage
from falproxy.stores.files.serve import PATH, file_handler
from falproxy.stores.files.supabase import StorageTimeouts, SupabaseStorage
from tests.support.fake_supabase.apart import fake_apart

PIECE = 2**16


@dataclass(frozen=True, slots=True)
class StorageUnderTest:
    """A storage under test.

    read: Returns the bytes and the type of a URL, read without credentials.
    names: Returns the names of all files, complete or not.
    stop, resume: make the storage unavailable, and available again.
    hidden: texts that no error may contain.
    """

    storage: Storage
    read: Callable[[str], Awaitable[tuple[bytes, str]]]
    names: Callable[[], Awaitable[list[str]]]
    stop: Callable[[], Awaitable[None]]
    resume: Callable[[], Awaitable[None]]
    hidden: tuple[str, ...]


def file_server(storage: DiskStorage) -> web.Application:
    app = web.Application(middlewares=[handle_errors(default_error)])
    app.router.add_get(PATH, file_handler(storage))
    return app


def files_in(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and path.name != LOCK]


@asynccontextmanager
async def open_disk(folder: Path) -> AsyncIterator[StorageUnderTest]:
    stored, away = folder / "kept", folder / "away"
    storage = DiskStorage(stored, lambda: str(server.make_url("/")))

    async def read(url: str) -> tuple[bytes, str]:
        async with session.get(url, raise_for_status=True) as response:
            return await response.read(), response.headers["Content-Type"]

    async def names() -> list[str]:
        return [path.name for path in files_in(stored)]

    async def stop() -> None:
        if stored.exists():
            stored.rename(away)
        stored.write_text("a file where a folder should be")

    async def resume() -> None:
        stored.unlink()
        if away.exists():
            away.rename(stored)

    async with TestServer(file_server(storage)) as server, ClientSession() as session, storage:
        yield StorageUnderTest(
            storage, read, names, stop, resume, (str(folder), str(server.make_url("/")))
        )


@asynccontextmanager
async def open_supabase(folder: Path) -> AsyncIterator[StorageUnderTest]:
    """Run the fake in a separate process, since the test measures memory and the event loop."""
    bucket = "kept"

    async def read(url: str) -> tuple[bytes, str]:
        async with session.get(url, raise_for_status=True) as response:
            return await response.read(), response.headers["Content-Type"]

    async def names() -> list[str]:
        url = f"{fake.url}/storage/v1/object/list/{bucket}"
        requested, key = {"prefix": "", "limit": 1000}, {"Authorization": f"Bearer {fake.key}"}
        async with session.post(
            url, json=requested, headers=key, raise_for_status=True
        ) as response:
            return [row["name"] for row in await response.json()]

    async with fake_apart() as fake, ClientSession() as session:
        timeouts = StorageTimeouts(backoff=wait_none())
        async with SupabaseStorage(fake.url, fake.key, bucket=bucket, timeouts=timeouts) as storage:
            yield StorageUnderTest(
                storage, read, names, fake.stop, fake.start, (fake.url, fake.key)
            )


STORAGES: dict[str, Callable[[Path], AbstractAsyncContextManager[StorageUnderTest]]] = {
    "disk": open_disk,
    "supabase": open_supabase,
}


# Files to store


def body(size: int, first: bytes = b"") -> bytes:
    """Return bytes that differ between offsets."""
    return (first + bytes(range(251)) * (size // 251 + 1))[:size]


def file_of(content: bytes, extension: str = "png", content_type: str = "image/png") -> StoredFile:
    name = f"{hashlib.sha256(content).hexdigest()}.{extension}"
    return StoredFile(name, content_type, Spool(content))


async def large_file(size: int) -> StoredFile:
    """Return a video in a temporary file."""
    spool, digest = Spool(), hashlib.sha256()

    def fill() -> None:
        for number in range(size // PIECE):
            chunk = number.to_bytes(8, "big") * (PIECE // 8)
            digest.update(chunk)
            spool.append([chunk])

    await asyncio.to_thread(fill)
    return StoredFile(f"{digest.hexdigest()}.mp4", "video/mp4", spool)


class InterruptedSource:
    """A source that yields the first half of some bytes, then calls `end`, which may raise, block
    or return."""

    def __init__(self, content: bytes, end: Callable[[], None]) -> None:
        self.size = len(content)
        self._content = content[: len(content) // 2]
        self._end = end

    def read(self, start: int, length: int) -> bytes:
        chunk = self._content[start : start + length]
        if not chunk:
            self._end()
        return chunk

    async def chunks(self) -> AsyncIterator[bytes]:
        for start in range(0, len(self._content), PIECE):
            yield self._content[start : start + PIECE]
        await asyncio.to_thread(self._end)


def raise_os_error() -> None:
    raise OSError(5, "Input/output error")


def end_early() -> None:
    """End the source early."""


class Gate:
    """An end of a source that blocks until the gate is opened. reached: set while it blocks."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self.opened = threading.Event()

    def __call__(self) -> None:
        self.reached.set()
        self.opened.wait(10)


def with_content(file: StoredFile, content: FileSource) -> StoredFile:
    return StoredFile(file.name, file.content_type, content)
