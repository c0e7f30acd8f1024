"""What every storage does, whatever it is made of."""

import asyncio
import gc
import time
import tracemalloc
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path

import pytest

from falproxy.stores.files import StorageError
from tests.support.storages import (
    STORAGES,
    Gate,
    InterruptedSource,
    StorageUnderTest,
    body,
    end_early,
    file_of,
    large_file,
    raise_os_error,
    with_content,
)

pytestmark = pytest.mark.takes(seconds=0.5)

PNG = body(300_000, b"\x89PNG\r\n\x1a\n")
HTML = b"<!doctype html><script>alert(1)</script>"
LARGE = 100 * 2**20
DAY = 86400.0


@pytest.fixture(params=STORAGES)
async def tried(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[StorageUnderTest]:
    async with STORAGES[request.param](tmp_path) as storage:
        yield storage


async def until_there_is_nothing(tried: StorageUnderTest) -> None:
    """Wait until the work for a cancelled caller has deleted its temporary files."""
    async with asyncio.timeout(5):
        while await tried.names():
            await asyncio.sleep(0.01)


@pytest.mark.parametrize(
    "size",
    [
        pytest.param(0, id="nothing"),
        pytest.param(1, id="a byte"),
        pytest.param(2**16 - 1, id="a byte less than a piece"),
        pytest.param(2**16, id="a piece"),
        pytest.param(2**16 + 1, id="a byte more than a piece"),
        pytest.param(2**20, id="a whole number of pieces"),
        pytest.param(2**20 + 17, id="and some"),
    ],
)
async def test_a_file_is_read_from_its_url_without_credentials(
    tried: StorageUnderTest, size: int
) -> None:
    content = body(size)
    url = await tried.storage.put(file_of(content))
    assert await tried.read(url) == (content, "image/png")


@pytest.mark.parametrize(
    ("extension", "content_type"),
    [
        pytest.param("jpg", "image/jpeg", id="image"),
        pytest.param("mp4", "video/mp4", id="video"),
        pytest.param("mp3", "audio/mpeg", id="sound"),
        pytest.param("glb", "model/gltf-binary", id="model"),
        pytest.param("bin", "application/octet-stream", id="unknown bytes"),
    ],
)
async def test_a_file_keeps_its_type(
    tried: StorageUnderTest, extension: str, content_type: str
) -> None:
    file = file_of(PNG, extension, content_type)
    url = await tried.storage.put(file)
    assert await tried.read(url) == (PNG, content_type)
    assert file.name in url


async def test_executable_types_are_bytes(tried: StorageUnderTest) -> None:
    url = await tried.storage.put(file_of(HTML, "bin", "application/octet-stream"))
    assert await tried.read(url) == (HTML, "application/octet-stream")


async def test_a_file_that_is_put_twice_is_one(tried: StorageUnderTest) -> None:
    first = await tried.storage.put(file_of(PNG))
    names = await tried.names()
    second = await tried.storage.put(file_of(PNG))
    assert first.partition("?")[0] == second.partition("?")[0]
    assert await tried.names() == names == [file_of(PNG).name]
    assert await tried.read(second) == (PNG, "image/png")


async def test_fifty_concurrent_puts_make_one_file(tried: StorageUnderTest) -> None:
    urls = await asyncio.gather(*(tried.storage.put(file_of(PNG)) for _ in range(50)))
    assert len({url.partition("?")[0] for url in urls}) == 1
    assert await tried.names() == [file_of(PNG).name]
    assert await tried.read(urls[-1]) == (PNG, "image/png")


async def test_many_files_are_put_at_once(tried: StorageUnderTest) -> None:
    contents = [body(100_000 + each) for each in range(30)]
    urls = await asyncio.gather(*(tried.storage.put(file_of(each)) for each in contents))
    assert [(await tried.read(url))[0] for url in urls] == contents
    assert len(await tried.names()) == 30


async def test_memory_stays_flat(tried: StorageUnderTest) -> None:
    file = await large_file(LARGE)
    await tried.storage.put(file_of(PNG))  # whatever is made once is made
    gc.collect()
    tracemalloc.start()
    try:
        await tried.storage.put(file)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 8 * 2**20
    assert file.name in await tried.names()


@pytest.mark.slow
@pytest.mark.timed
async def test_the_event_loop_is_not_blocked(tried: StorageUnderTest) -> None:
    worst = []
    for extra in range(3):  # of a machine that has other things to do, the best of three
        file = await large_file(LARGE + extra * 2**20)
        worst.append(await longest_pause(tried.storage.put(file)))
        if worst[-1] < 0.05:
            return
    pytest.fail(f"the loop stood still for {worst} s")


async def longest_pause(work: Coroutine[object, object, object]) -> float:
    """Return the longest delay of the event loop during the work, in seconds."""
    loop = asyncio.get_running_loop()
    working = loop.create_task(work)
    worst = 0.0
    while not working.done():
        before = loop.time()
        await asyncio.sleep(0.001)
        worst = max(worst, loop.time() - before - 0.001)
    await working
    return worst


@pytest.mark.parametrize(
    "end",
    [pytest.param(raise_os_error, id="it breaks"), pytest.param(end_early, id="it is too short")],
)
async def test_a_source_that_ends_in_the_middle_leaves_nothing(
    tried: StorageUnderTest, end: Callable[[], None]
) -> None:
    file = file_of(PNG)
    with pytest.raises(StorageError):
        await tried.storage.put(with_content(file, InterruptedSource(PNG, end)))
    await until_there_is_nothing(tried)
    assert await tried.read(await tried.storage.put(file)) == (PNG, "image/png")


async def test_a_put_that_is_cancelled_leaves_nothing(tried: StorageUnderTest) -> None:
    file, gate = file_of(PNG), Gate()
    async with asyncio.TaskGroup() as group:
        putting = group.create_task(
            tried.storage.put(with_content(file, InterruptedSource(PNG, gate)))
        )
        assert await asyncio.to_thread(gate.reached.wait, 5)
        putting.cancel()
    gate.opened.set()
    await until_there_is_nothing(tried)
    assert await tried.read(await tried.storage.put(file)) == (PNG, "image/png")


async def test_a_cancelled_put_does_not_affect_other_puts(tried: StorageUnderTest) -> None:
    file, gate = file_of(PNG), Gate()
    async with asyncio.TaskGroup() as group:
        cancelled = group.create_task(
            tried.storage.put(with_content(file, InterruptedSource(PNG, gate)))
        )
        assert await asyncio.to_thread(gate.reached.wait, 5)
        staying = group.create_task(tried.storage.put(file))
        await asyncio.sleep(0)
        cancelled.cancel()
        gate.opened.set()
    assert await tried.read(staying.result()) == (PNG, "image/png")


async def test_a_check_leaves_nothing(tried: StorageUnderTest) -> None:
    await tried.storage.check()
    assert await tried.names() == []
    await tried.storage.put(file_of(PNG))
    await tried.storage.check()
    assert await tried.names() == [file_of(PNG).name]


async def test_a_storage_that_is_down_is_an_error_and_recovers(tried: StorageUnderTest) -> None:
    stored = await tried.storage.put(file_of(HTML, "bin", "application/octet-stream"))
    await tried.stop()
    with pytest.raises(StorageError) as checked:
        await tried.storage.check()
    with pytest.raises(StorageError) as put:
        await tried.storage.put(file_of(PNG))
    for error in (checked.value, put.value):
        assert str(error).endswith(".")
        assert not any(hidden in str(error) for hidden in tried.hidden)
    await tried.resume()
    await tried.storage.check()
    assert await tried.read(await tried.storage.put(file_of(PNG))) == (PNG, "image/png")
    assert (await tried.read(stored))[0] == HTML


# Garbage collection, at a time at which nothing has been used for long


async def garbage(tried: StorageUnderTest, days: float, *, delete: bool) -> dict[str, int]:
    """Collect the files that are unused for 30 days, after some days. Return sizes by name."""
    now = time.time() + days * DAY
    files = tried.storage.collect_garbage(30 * DAY, now, delete=delete)
    return {file.name: file.size async for file in files}


async def test_unused_files_are_listed_and_stay(tried: StorageUnderTest) -> None:
    first, second = file_of(body(1000)), file_of(PNG)
    url = await tried.storage.put(first)
    await tried.storage.put(second)
    sizes = {first.name: 1000, second.name: 300_000}
    assert await garbage(tried, 31, delete=False) == sizes
    assert sorted(await tried.names()) == sorted(sizes)
    assert await tried.read(url) == (body(1000), "image/png")


async def test_unused_files_are_deleted_and_can_be_stored_again(tried: StorageUnderTest) -> None:
    file = file_of(PNG)
    await tried.storage.put(file)
    assert await garbage(tried, 31, delete=True) == {file.name: 300_000}
    assert await tried.names() == []
    assert await garbage(tried, 31, delete=True) == {}
    assert await tried.read(await tried.storage.put(file)) == (PNG, "image/png")


async def test_files_in_use_stay(tried: StorageUnderTest) -> None:
    await tried.storage.put(file_of(PNG))
    assert await garbage(tried, 29, delete=True) == {}
    assert await tried.names() == [file_of(PNG).name]


async def test_an_empty_storage_has_no_garbage(tried: StorageUnderTest) -> None:
    assert await garbage(tried, 31, delete=True) == {}


@pytest.mark.parametrize("delete", [False, True])
async def test_there_may_be_many_unused_files(tried: StorageUnderTest, delete: bool) -> None:
    files = [file_of(body(100 + each)) for each in range(250)]
    for some in (files[start : start + 50] for start in range(0, 250, 50)):
        await asyncio.gather(*(tried.storage.put(file) for file in some))
    assert sorted(await garbage(tried, 31, delete=delete)) == sorted(file.name for file in files)
    assert len(await tried.names()) == (0 if delete else 250)


async def test_garbage_of_a_storage_that_is_down_is_an_error(tried: StorageUnderTest) -> None:
    await tried.storage.put(file_of(PNG))
    await tried.stop()
    with pytest.raises(StorageError) as caught:
        await garbage(tried, 31, delete=True)
    assert not any(hidden in str(caught.value) for hidden in tried.hidden)
    await tried.resume()
    assert await tried.names() == [file_of(PNG).name]
