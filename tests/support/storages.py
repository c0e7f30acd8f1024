"""The storages of the contract tests, and files to store in them."""

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
class Tried:
    """A storage under test. read: what whoever has a URL gets, as bytes and type. names: of all
    that is there, whole or not. stop, resume: what it needs goes away, and comes back. hidden:
    what no error may tell."""

    storage: Storage
    read: Callable[[str], Awaitable[tuple[bytes, str]]]
    names: Callable[[], Awaitable[list[str]]]
    stop: Callable[[], Awaitable[None]]
    resume: Callable[[], Awaitable[None]]
    hidden: tuple[str, ...]


def served(storage: DiskStorage) -> web.Application:
    app = web.Application(middlewares=[handle_errors(default_error)])
    app.router.add_get(PATH, file_handler(storage))
    return app


def files_in(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and path.name != LOCK]


@asynccontextmanager
async def open_disk(folder: Path) -> AsyncIterator[Tried]:
    kept, away = folder / "kept", folder / "away"
    storage = DiskStorage(kept, lambda: str(server.make_url("/")))

    async def read(url: str) -> tuple[bytes, str]:
        async with session.get(url, raise_for_status=True) as answer:
            return await answer.read(), answer.headers["Content-Type"]

    async def names() -> list[str]:
        return [path.name for path in files_in(kept)]

    async def stop() -> None:
        if kept.exists():
            kept.rename(away)
        kept.write_text("a file where a folder should be")

    async def resume() -> None:
        kept.unlink()
        if away.exists():
            away.rename(kept)

    async with TestServer(served(storage)) as server, ClientSession() as session, storage:
        yield Tried(storage, read, names, stop, resume, (str(folder), str(server.make_url("/"))))


@asynccontextmanager
async def open_supabase(folder: Path) -> AsyncIterator[Tried]:
    """Apart from the test, whose memory and event loop are measured."""
    bucket = "kept"

    async def read(url: str) -> tuple[bytes, str]:
        async with session.get(url, raise_for_status=True) as answer:
            return await answer.read(), answer.headers["Content-Type"]

    async def names() -> list[str]:
        url = f"{fake.url}/storage/v1/object/list/{bucket}"
        asked, key = {"prefix": "", "limit": 1000}, {"Authorization": f"Bearer {fake.key}"}
        async with session.post(url, json=asked, headers=key, raise_for_status=True) as answer:
            return [row["name"] for row in await answer.json()]

    async with fake_apart() as fake, ClientSession() as session:
        pace = StorageTimeouts(connect=1, write=1, read=5, backoff=wait_none())
        async with SupabaseStorage(fake.url, fake.key, bucket=bucket, timeouts=pace) as storage:
            yield Tried(storage, read, names, fake.stop, fake.start, (fake.url, fake.key))


STORAGES: dict[str, Callable[[Path], AbstractAsyncContextManager[Tried]]] = {
    "disk": open_disk,
    "supabase": open_supabase,
}


# What is to be kept


def body(size: int, first: bytes = b"") -> bytes:
    """Bytes that differ at each position."""
    return (first + bytes(range(251)) * (size // 251 + 1))[:size]


def file_of(content: bytes, extension: str = "png", content_type: str = "image/png") -> StoredFile:
    name = f"{hashlib.sha256(content).hexdigest()}.{extension}"
    return StoredFile(name, content_type, Spool(content))


async def large_file(size: int) -> StoredFile:
    """A video that is spooled to the disk."""
    spool, digest = Spool(), hashlib.sha256()

    def fill() -> None:
        for number in range(size // PIECE):
            piece = number.to_bytes(8, "big") * (PIECE // 8)
            digest.update(piece)
            spool.append([piece])

    await asyncio.to_thread(fill)
    return StoredFile(f"{digest.hexdigest()}.mp4", "video/mp4", spool)


class Half:
    """The first half of some bytes, and then `end`, which may raise, wait, or return."""

    def __init__(self, content: bytes, end: Callable[[], None]) -> None:
        self.size = len(content)
        self._content = content[: len(content) // 2]
        self._end = end

    def read(self, start: int, length: int) -> bytes:
        piece = self._content[start : start + length]
        if not piece:
            self._end()
        return piece

    async def chunks(self) -> AsyncIterator[bytes]:
        for start in range(0, len(self._content), PIECE):
            yield self._content[start : start + PIECE]
        await asyncio.to_thread(self._end)


def breaks() -> None:
    raise OSError(5, "Input/output error")


def ends() -> None:
    """The source is shorter than its declared length."""


class Gate:
    """An end that does not come before it is opened. reached: somebody waits there."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self.opened = threading.Event()

    def __call__(self) -> None:
        self.reached.set()
        self.opened.wait(10)


def with_content(file: StoredFile, content: FileSource) -> StoredFile:
    return StoredFile(file.name, file.content_type, content)
