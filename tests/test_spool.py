"""Spools: the bytes are read back, memory stays flat, and no file is left."""

import asyncio
import gc
import os
import resource
import tempfile
import tracemalloc
from collections.abc import AsyncIterator, Iterator
from errno import EAGAIN, EOPNOTSUPP
from pathlib import Path

import pytest

from falproxy.errors import ProxyError
from falproxy.spool import (
    CHUNK_SIZE,
    MEMORY_MAX,
    NOWAIT,
    SPARE_FILES,
    SPARE_MAX,
    Spool,
    SpoolQuota,
    spool_body,
)
from tests.support.open_files import open_files, until_open_files_are

LARGE = 3 * MEMORY_MAX + 17
ROOM = SpoolQuota(2**40)


def body(size: int) -> bytes:
    return bytes(range(251)) * (size // 251) + b"x" * (size % 251)


async def sent(content: bytes, chunk: int) -> AsyncIterator[bytes]:
    for start in range(0, len(content), chunk):
        yield content[start : start + chunk]


async def broken_off(content: bytes, error: Exception) -> AsyncIterator[bytes]:
    yield content
    raise error


async def received(spool: Spool) -> bytes:
    return b"".join([chunk async for chunk in spool.chunks()])


@pytest.fixture
async def files_before() -> int:
    await asyncio.to_thread(int)  # the loop has opened its own files
    return open_files()


@pytest.fixture
def small_files() -> Iterator[None]:
    """Limit files to 1 MiB, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    ("size", "chunk", "is_small"),
    [
        pytest.param(0, 1, True, id="nothing"),
        pytest.param(1, 1, True, id="a byte"),
        pytest.param(MEMORY_MAX, 2**16, True, id="all that memory may hold"),
        pytest.param(MEMORY_MAX + 1, 2**16, False, id="a byte more"),
        pytest.param(LARGE, 2**16, False, id="as aiohttp hands it out"),
        pytest.param(LARGE, 7, False, id="tiny chunks"),
        pytest.param(LARGE, LARGE, False, id="one chunk"),
        pytest.param(2 * (MEMORY_MAX + 1), MEMORY_MAX + 1, False, id="nothing left at the end"),
    ],
)
async def test_the_bytes_are_read_back(size: int, chunk: int, is_small: bool) -> None:
    content = body(size)
    spool = await spool_body(sent(content, chunk), ROOM)
    assert spool.size == size
    assert spool.is_small is is_small
    assert await received(spool) == content == await received(spool)
    assert spool.read(0, size) == content


@pytest.mark.parametrize("size", [1000, LARGE], ids=["small", "large"])
@pytest.mark.parametrize(
    ("start", "length"),
    [
        pytest.param(0, 10, id="the start"),
        pytest.param(500, 100, id="the middle"),
        pytest.param(990, 10, id="the end of the small one"),
        pytest.param(LARGE - 5, 100, id="more than there is"),
        pytest.param(LARGE + 5, 100, id="after the end"),
    ],
)
async def test_any_bytes_can_be_read(size: int, start: int, length: int) -> None:
    content = body(size)
    spool = await spool_body(sent(content, 2**16), ROOM)
    assert spool.read(start, length) == content[start : start + length]


async def test_chunks_are_of_one_size() -> None:
    spool = await spool_body(sent(body(LARGE), 1000), ROOM)
    sizes = [len(chunk) async for chunk in spool.chunks()]
    assert sizes == [CHUNK_SIZE] * (LARGE // CHUNK_SIZE) + [17]


@pytest.mark.parametrize(
    "reason",
    [
        pytest.param(EAGAIN, id="not in the page cache"),
        pytest.param(EOPNOTSUPP, id="the check is not supported for the file"),
    ],
)
async def test_bytes_outside_the_page_cache_are_read_in_a_thread(
    reason: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object) -> int:
        raise OSError(reason, "")

    monkeypatch.setattr(os, "preadv", refuse, raising=False)
    content = body(LARGE)
    spool = await spool_body(sent(content, 2**16), ROOM)
    assert await received(spool) == content


@pytest.mark.skipif(NOWAIT is None, reason="this system always waits")
async def test_a_partial_read_is_not_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    read = os.preadv

    def read_less(descriptor: int, buffers: list[memoryview], start: int, flags: int) -> int:
        return read(descriptor, [buffers[0][:1000]], start, flags)

    monkeypatch.setattr(os, "preadv", read_less)
    content = body(LARGE)
    spool = await spool_body(sent(content, 2**16), ROOM)
    assert await received(spool) == content


async def test_a_partial_write_is_completed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write = os.writev
    monkeypatch.setattr(os, "writev", lambda file, chunks: write(file, [chunks[0][:1000]]))
    content = body(LARGE)
    spool = await spool_body(sent(content, 2**16), ROOM)
    assert spool.size == LARGE
    assert await received(spool) == content


async def test_concurrent_reads_get_the_same_bytes() -> None:
    content = body(LARGE)
    spool = await spool_body(sent(content, 2**16), ROOM)
    threads = [asyncio.to_thread(spool.read, start, 1000) for start in range(8)]
    assert await asyncio.gather(*(received(spool) for _ in range(8))) == [content] * 8
    assert await asyncio.gather(*threads) == [content[start : start + 1000] for start in range(8)]


@pytest.mark.slow
async def test_the_file_is_open_as_long_as_the_spool_is_referenced(files_before: int) -> None:
    spool: Spool | None = await spool_body(sent(body(LARGE), 2**16), ROOM)
    assert open_files() == files_before + 1
    assert spool is not None
    chunks = spool.chunks()
    first = await anext(chunks)
    spool = None
    assert open_files() == files_before + 1
    rest = [chunk async for chunk in chunks]
    assert b"".join([first, *rest]) == body(LARGE)
    del chunks
    await until_open_files_are(files_before)


@pytest.mark.slow
async def test_a_file_is_reused_while_others_are_open(files_before: int) -> None:
    room = SpoolQuota(2**40)
    first = await spool_body(sent(b"a" * 2 * LARGE, 2**16), room)
    second = await spool_body(sent(b"b" * LARGE, 2**16), room)
    del first
    third = await spool_body(sent(body(LARGE), 2**16), room)
    assert open_files() == files_before + 2
    assert third.size == LARGE
    assert await received(third) == third.read(0, 2 * LARGE) == body(LARGE)
    assert third.read(LARGE - 1, 2) == body(LARGE)[-1:]
    assert third.read(LARGE, 1) == third.read(LARGE + 1, 1) == b"", "what the first one left there"
    assert await received(second) == b"b" * LARGE
    del second, third
    await until_open_files_are(files_before)


@pytest.mark.slow
async def test_a_very_large_file_is_not_reused(files_before: int) -> None:
    room = SpoolQuota(2**40)
    large = await spool_body(sent(body(SPARE_MAX + 1), 2**20), room)
    other = await spool_body(sent(body(LARGE), 2**16), room)
    del large
    await until_open_files_are(files_before + 1)
    assert await received(other) == body(LARGE)


@pytest.mark.slow
async def test_the_number_of_files_for_reuse_is_limited(files_before: int) -> None:
    room = SpoolQuota(2**40)
    held = [await spool_body(sent(body(LARGE), 2**16), room) for _ in range(SPARE_FILES + 3)]
    del held[1:]
    await until_open_files_are(files_before + 1 + SPARE_FILES)
    held.clear()
    await until_open_files_are(files_before)


async def test_the_file_has_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    spool = await spool_body(sent(body(LARGE), 2**16), ROOM)
    assert spool.size == LARGE
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("size", [1000, LARGE], ids=["small", "large"])
async def test_an_error_of_the_source_is_raised(size: int, files_before: int) -> None:
    with pytest.raises(OSError, match="gone"):
        await spool_body(broken_off(body(size), OSError("gone")), ROOM)
    await until_open_files_are(files_before)


@pytest.mark.slow
async def test_a_cancelled_spool_leaves_no_file(files_before: int) -> None:
    async def endless() -> AsyncIterator[bytes]:
        while True:
            yield body(MEMORY_MAX)

    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await spool_body(endless(), ROOM)
    await until_open_files_are(files_before)


@pytest.mark.slow
@pytest.mark.usefixtures("small_files")
async def test_a_full_disk_is_a_503(files_before: int) -> None:
    with pytest.raises(ProxyError) as caught:
        await spool_body(sent(body(2**21), 2**16), ROOM)
    assert (caught.value.status, caught.value.code) == (503, "disk_full")
    del caught
    await until_open_files_are(files_before)


async def test_a_missing_temporary_directory_is_a_503(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    with pytest.raises(ProxyError) as caught:
        await spool_body(sent(body(LARGE), 2**16), ROOM)
    assert (caught.value.status, caught.value.code) == (503, "disk_full")


async def test_memory_stays_flat() -> None:
    chunk = bytes(2**16)

    async def one() -> Spool:
        async def chunks() -> AsyncIterator[bytes]:
            for _ in range(2**8):
                yield chunk

        spool = await spool_body(chunks(), ROOM)
        async for _ in spool.chunks():
            pass
        return spool

    tracemalloc.start()
    spools = await asyncio.gather(*(one() for _ in range(16)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sum(spool.size for spool in spools) == 2**28
    assert peak < 24 * 2**20


@pytest.mark.slow
async def test_the_quota_limits_all_bodies_together() -> None:
    room = SpoolQuota(2 * LARGE)
    held = [await spool_body(sent(body(LARGE), 2**16), room) for _ in range(2)]
    with pytest.raises(ProxyError) as refusal:
        await spool_body(sent(body(LARGE), 2**16), room)
    assert (refusal.value.status, refusal.value.code) == (503, "busy")
    small = await spool_body(sent(b"small", 5), room)
    assert small.size == 5
    held.clear()
    async with asyncio.timeout(5):  # a thread may refer to the spool a moment longer
        while True:
            gc.collect()
            try:
                await spool_body(sent(body(LARGE), 2**16), room)
                break
            except ProxyError:
                await asyncio.sleep(0.01)


async def test_without_a_folder_for_temporary_files_a_body_is_in_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tempfile.tempdir", "/no/such/folder")
    monkeypatch.setattr("falproxy.spool.is_on_disk", lambda: False)

    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(20):
            yield bytes(2**16)

    spool = await spool_body(chunks())
    assert not spool.is_small
    assert spool.read(0, 2**21) == bytes(20 * 2**16)
