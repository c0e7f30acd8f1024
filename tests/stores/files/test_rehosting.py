"""Files on their way from fal into a storage: each once, in bounded time, whatever fails."""

import asyncio
import gzip
import hashlib
import json
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from tenacity import wait_none

from falproxy.errors import ProxyError
from falproxy.fal.file_urls import find_links
from falproxy.media.fetch import Fetcher, FetchFailed, FetchRefused, FetchTooLarge
from falproxy.spool import MEMORY_MAX
from falproxy.stores.files import LOCAL_ORIGIN, Storage, StorageError, StoredFile
from falproxy.stores.files.disk import DiskStorage
from falproxy.stores.files.rehosting import (
    LINKS_MAX,
    MAX_CONCURRENCY,
    QUEUE_MAX,
    SHORT_WAIT_TIMEOUT,
    SIZE_MAX,
    URL_CACHE_TTL,
    WAIT_TIMEOUT,
    Rehoster,
    RehostStatus,
    Rewritten,
    status_header,
)
from falproxy.stores.files.supabase import StorageTimeouts, SupabaseStorage
from tests.support.fake_hosts import (
    NAME,
    PRIVATE,
    PUBLIC,
    UNUSED,
    Host,
    Names,
    World,
    redirect,
    reply,
)
from tests.support.fake_supabase import FakeSupabase
from tests.support.fake_supabase import faults as supabase_faults
from tests.support.rehosting import (
    PNG,
    Cdn,
    FaultyDiskStorage,
    LoopClock,
    RequestGate,
    Serve,
    announce_length,
    fetcher_of,
    hang_forever,
    name_of,
    png,
    respond_with,
)
from tests.support.storages import file_of, files_in
from tests.support.waiting import wait_until

TIMEOUT = 5.0  # seconds; of `wait_until`

BUCKET = "fal_images"
FAST = StorageTimeouts(backoff=wait_none())
HERE = "https://proxy.example"


def document_of(*urls: str) -> bytes:
    return json.dumps({"images": [{"url": url} for url in urls], "seed": 1}).encode()


def urls_in(document: bytes) -> list[str]:
    return [link.url for link in find_links(document)]


@pytest.fixture
async def storage(tmp_path: Path) -> AsyncIterator[FaultyDiskStorage]:
    async with FaultyDiskStorage(tmp_path / "kept", lambda: LOCAL_ORIGIN) as storage:
        yield storage
        storage.gate.opened.set()


@pytest.fixture
def names(tmp_path: Path) -> Callable[[], list[str]]:
    """Return the names of all files in the storage, complete or not."""
    return lambda: sorted(path.name for path in files_in(tmp_path / "kept"))


@pytest.fixture
async def outputs(storage: Storage, fetcher: Fetcher) -> AsyncIterator[Rehoster]:
    async with opened(Rehoster(storage, fetcher)) as outputs:
        yield outputs


@asynccontextmanager
async def opened(outputs: Rehoster) -> AsyncIterator[Rehoster]:
    try:
        yield outputs
    finally:
        await outputs.close(0)


@pytest.fixture
async def supabase() -> AsyncIterator[FakeSupabase]:
    async with FakeSupabase() as running:
        yield running


def supabase_of(fake: FakeSupabase, **given: object) -> SupabaseStorage:
    settings = {"bucket": BUCKET, "timeouts": FAST} | given
    return SupabaseStorage(fake.url, fake.service_key, **settings)  # type: ignore[arg-type]


# The header with the statuses


@pytest.mark.parametrize(
    ("statuses", "expected"),
    [
        pytest.param([], "", id="no files"),
        pytest.param([RehostStatus.STORED], "stored; count=1", id="one"),
        pytest.param([RehostStatus.STORED] * 12, "stored; count=12", id="twelve"),
        pytest.param([RehostStatus.FAILED] * 2, "failed", id="failed"),
        pytest.param([RehostStatus.PENDING], "pending", id="running"),
        pytest.param([RehostStatus.TOO_LARGE], "too-large", id="too large"),
        pytest.param(
            [
                RehostStatus.STORED,
                RehostStatus.TOO_LARGE,
                RehostStatus.PENDING,
                RehostStatus.FAILED,
                RehostStatus.STORED,
            ],
            "failed, pending, too-large, stored; count=2",
            id="the worst first",
        ),
    ],
)
def test_the_header_lists_the_statuses(statuses: Iterable[RehostStatus], expected: str) -> None:
    assert status_header(Counter(statuses)) == expected


# Each file once


@pytest.mark.parametrize("place", ["disk", "supabase"])
async def test_fifty_concurrent_requests_fetch_and_store_once(
    place: str, cdn: Cdn, fetcher: Fetcher, tmp_path: Path, supabase: FakeSupabase
) -> None:
    url = cdn.put("/a.png", png())
    stored: Storage = DiskStorage(tmp_path, lambda: LOCAL_ORIGIN)
    if place == "supabase":
        stored = supabase_of(supabase)
    async with stored, opened(Rehoster(stored, fetcher)) as outputs:
        responses = await asyncio.gather(*(outputs.rewrite(document_of(url)) for _ in range(50)))
    assert {response.statuses[RehostStatus.STORED] for response in responses} == {1}
    assert len({response.document for response in responses}) == 1
    assert cdn.request_counts == {"/a.png": 1}
    if place == "disk":
        assert urls_in(responses[0].document) == [f"{LOCAL_ORIGIN}/files/{name_of(png())}"]
        assert [path.name for path in files_in(tmp_path)] == [name_of(png())]
    else:
        (url,) = urls_in(responses[0].document)
        assert url == f"{supabase.url}/storage/v1/object/public/{BUCKET}/{name_of(png())}"
        assert supabase.objects(BUCKET)[name_of(png())].content == png()
        assert supabase.count("POST", f"/object/{BUCKET}/") == 1


async def test_a_stored_file_is_not_fetched_again(
    outputs: Rehoster, cdn: Cdn, storage: FaultyDiskStorage
) -> None:
    url = cdn.put("/a.png", png())
    first = await outputs.rewrite(document_of(url))
    second = await outputs.rewrite(b'{"video": {"url": "%s"}}' % url.encode())
    assert urls_in(second.document) == urls_in(first.document)
    assert second.statuses == {RehostStatus.STORED: 1}
    assert (cdn.request_counts["/a.png"], len(storage.puts)) == (1, 1)


async def test_a_cached_url_expires_after_an_hour(
    storage: FaultyDiskStorage, fetcher: Fetcher, cdn: Cdn
) -> None:
    times = [0.0]
    url = cdn.put("/a.png", png())
    async with opened(Rehoster(storage, fetcher, clock=lambda: times[-1])) as outputs:
        for now in (0.0, URL_CACHE_TTL - 1, URL_CACHE_TTL, URL_CACHE_TTL * 2 - 1):
            times.append(now)
            assert (await outputs.rewrite(document_of(url))).statuses == {RehostStatus.STORED: 1}
    assert cdn.request_counts["/a.png"] == 2


async def test_equal_bytes_are_one_file(
    outputs: Rehoster, cdn: Cdn, names: Callable[[], list[str]]
) -> None:
    urls = [cdn.put("/a.png", png()), cdn.put("/b.jpg", png())]
    document, statuses = await outputs.rewrite(document_of(*urls))
    assert urls_in(document) == [f"{LOCAL_ORIGIN}/files/{name_of(png())}"] * 2
    assert statuses == {RehostStatus.STORED: 2}
    assert names() == [name_of(png())]


async def test_a_file_with_two_links_is_stored_once(outputs: Rehoster, cdn: Cdn) -> None:
    url = cdn.put("/a.png", png())
    document, statuses = await outputs.rewrite(document_of(url, url))
    assert urls_in(document) == [f"{LOCAL_ORIGIN}/files/{name_of(png())}"] * 2
    assert statuses == {RehostStatus.STORED: 1}
    assert cdn.request_counts["/a.png"] == 1


# Selection of files


async def test_a_document_without_files_is_the_same(
    outputs: Rehoster, cdn: Cdn, storage: FaultyDiskStorage
) -> None:
    document = b'{"image_url": "%s/a.png", "images": ["%s/b.png"]}' % ((cdn.origin.encode(),) * 2)
    rewritten = await outputs.rewrite(document)
    assert rewritten.document is document
    assert rewritten.statuses == {}
    assert (cdn.request_counts, storage.puts) == ({}, [])


@pytest.mark.parametrize(
    "url",
    [
        pytest.param("https://images.example/a.png", id="a third party's"),
        pytest.param("http://v3.fal.media/a.png", id="fal's, by http"),
        pytest.param("http://127.0.0.1:9/a.png", id="this machine's"),
        pytest.param(f"{LOCAL_ORIGIN}/files/{name_of(png())}", id="stored"),
        pytest.param("https:", id="no host"),
        pytest.param("https://\ud800", id="half a character"),
    ],
)
async def test_other_urls_are_not_fetched(outputs: Rehoster, url: str) -> None:
    document = document_of(url)
    assert await outputs.rewrite(document) == Rewritten(document, Counter())


async def test_stored_files_are_not_stored_again(
    cdn: Cdn, storage: FaultyDiskStorage, fetcher: Fetcher
) -> None:
    document = document_of(cdn.put("/files/a.png", png()))
    async with opened(
        Rehoster(storage, fetcher, rehosted_prefixes=(f"{cdn.origin}/files/",))
    ) as outputs:
        assert await outputs.rewrite(document) == Rewritten(document, Counter())
        beside = await outputs.rewrite(document_of(cdn.put("/filesystem/a.png", png())))
    assert beside.statuses == {RehostStatus.STORED: 1}
    assert "/files/a.png" not in cdn.request_counts


async def test_at_most_a_hundred_files_of_a_document_are_stored(
    outputs: Rehoster, cdn: Cdn
) -> None:
    urls = [cdn.put(f"/{number:03}.png", png(number)) for number in range(LINKS_MAX + 2)]
    document, statuses = await outputs.rewrite(document_of(*urls))
    assert statuses == {RehostStatus.STORED: LINKS_MAX, RehostStatus.FAILED: 2}
    assert urls_in(document)[LINKS_MAX:] == urls[LINKS_MAX:]
    assert len(cdn.request_counts) == LINKS_MAX
    again = await outputs.rewrite(document)
    assert again.statuses == {RehostStatus.STORED: 2}, "what is left of it is no more than may be"
    assert not {*urls_in(again.document)} & {*urls}


# Content types


@pytest.mark.parametrize(
    ("path", "content", "extension", "content_type"),
    [
        pytest.param("/a.png", png(), "png", "image/png", id="an image"),
        pytest.param("/a.png", b"\xff\xd8\xff\xe0 jpeg", "jpg", "image/jpeg", id="another one"),
        pytest.param("/a", b"GIF89a", "gif", "image/gif", id="no extension"),
        pytest.param("/a.html", png(), "png", "image/png", id="an image named like a page"),
        pytest.param("/a.mp4", b"\0\0\0\x18ftypmp42", "mp4", "video/mp4", id="a video"),
        pytest.param("/a.html", b"<html><script>", "bin", "application/octet-stream", id="a page"),
        pytest.param(
            "/a.png", b"<!doctype html><p>", "bin", "application/octet-stream", id="a hidden page"
        ),
        pytest.param(
            "/a.svg",
            b'<svg xmlns="http://www.w3.org/2000/svg"><script/></svg>',
            "bin",
            "application/octet-stream",
            id="a drawing",
        ),
        pytest.param("/a.pdf", b"%PDF-1.7", "bin", "application/octet-stream", id="a document"),
        pytest.param("/a.js", b"alert(1)", "bin", "application/octet-stream", id="a script"),
        pytest.param(
            "/a.html",
            b"GIF89a/*\0\0*/=1;<script>alert(1)</script>",
            "gif",
            "image/gif",
            id="an image and a script",
        ),
        pytest.param(
            "/a.html",
            b"\xff\xd8\xff\xfe\0\x20<html><script>alert(1)</script>",
            "jpg",
            "image/jpeg",
            id="an image and a page",
        ),
        pytest.param("/a.png", b"", "bin", "application/octet-stream", id="nothing"),
    ],
)
async def test_the_type_is_determined_from_the_bytes(
    cdn: Cdn,
    fetcher: Fetcher,
    supabase: FakeSupabase,
    path: str,
    content: bytes,
    extension: str,
    content_type: str,
) -> None:
    url = cdn.put(path, content)
    async with supabase_of(supabase) as kept, opened(Rehoster(kept, fetcher)) as outputs:
        document, statuses = await outputs.rewrite(document_of(url))
    name = name_of(content, extension)
    assert statuses == {RehostStatus.STORED: 1}
    assert urls_in(document)[0].endswith(f"/{name}")
    stored = supabase.objects(BUCKET)[name]
    assert (stored.content, stored.content_type) == (content, content_type)


async def test_a_large_file_is_stored_completely(
    outputs: Rehoster, cdn: Cdn, tmp_path: Path, names: Callable[[], list[str]]
) -> None:
    content = png() + bytes(range(256)) * (MEMORY_MAX // 64)
    await outputs.rewrite(document_of(cdn.put("/large.png", content)))
    assert names() == [name_of(content)]
    (path,) = files_in(tmp_path / "kept")
    assert path.read_bytes() == content


# Failures


def broken_off() -> Serve:
    return respond_with(200, b"short", Content_Length="1000")


@pytest.mark.parametrize(
    ("serve", "times"),
    [
        pytest.param(respond_with(404), 1, id="gone"),
        pytest.param(respond_with(403), 1, id="forbidden"),
        pytest.param(respond_with(500), 3, id="a failure"),
        pytest.param(hang_forever, 3, id="silence"),
        pytest.param(announce_length(1000), 3, id="silence after the head"),
        pytest.param(respond_with(302, Location="/other.png"), 1, id="somewhere else"),
        pytest.param(respond_with(206, png(), Content_Range="bytes 0-9/20"), 1, id="a part"),
        pytest.param(
            respond_with(200, gzip.compress(png()), Content_Encoding="gzip"), 1, id="compressed"
        ),
    ],
)
async def test_an_unreadable_file_keeps_fal_s_url(
    cdn: Cdn, storage: FaultyDiskStorage, serve: Serve, times: int
) -> None:
    bad, good = cdn.serve_at("/bad.png", serve), cdn.put("/good.png", png())
    cdn.put("/other.png", png(1))
    async with (
        fetcher_of(cdn.origin, idle=0.3 if times > 1 else 10) as fetcher,
        opened(Rehoster(storage, fetcher)) as outputs,
    ):
        document, statuses = await outputs.rewrite(document_of(bad, good))
    assert urls_in(document) == [bad, f"{LOCAL_ORIGIN}/files/{name_of(png())}"]
    assert statuses == {RehostStatus.FAILED: 1, RehostStatus.STORED: 1}
    assert cdn.request_counts == {"/bad.png": times, "/good.png": 1}


async def test_an_unreadable_file_is_tried_again_after_some_seconds(
    storage: FaultyDiskStorage, fetcher: Fetcher, cdn: Cdn
) -> None:
    now = [0.0]
    document = document_of(cdn.origin + "/a.png")
    async with opened(Rehoster(storage, fetcher, clock=lambda: now[0])) as outputs:
        for _ in range(3):  # requests in the meantime do not wait for it
            assert await outputs.rewrite(document) == Rewritten(
                document, Counter([RehostStatus.FAILED])
            )
        assert cdn.request_counts["/a.png"] == 1
        cdn.put("/a.png", png())
        now[0] += 6
        assert (await outputs.rewrite(document)).statuses == {RehostStatus.STORED: 1}
    assert cdn.request_counts["/a.png"] == 2


async def test_a_rejected_file_does_not_mark_the_storage_as_down(
    cdn: Cdn, fetcher: Fetcher, supabase: FakeSupabase
) -> None:
    document = document_of(cdn.put("/a.png", png()))
    too_large: dict[str, object] = {
        "statusCode": "413",
        "error": "Payload too large",
        "message": "too large",
    }
    supabase.fail(supabase_faults.respond(400, too_large), path="/object/fal_images/")
    async with supabase_of(supabase) as stored, opened(Rehoster(stored, fetcher)) as outputs:
        for _ in range(3):
            assert (await outputs.rewrite(document)).statuses == {RehostStatus.FAILED: 1}
            assert [outputs.try_now() for _ in range(3)] == [True, True, True]
    assert cdn.request_counts["/a.png"] == 1


async def test_a_storage_that_is_down_is_probed_at_intervals(
    storage: FaultyDiskStorage, fetcher: Fetcher, cdn: Cdn
) -> None:
    now = [0.0]
    storage.error = "No room."
    async with opened(Rehoster(storage, fetcher, clock=lambda: now[0])) as outputs:
        assert outputs.try_now()
        await outputs.rewrite(document_of(cdn.put("/a.png", png())))
        assert not outputs.try_now()
        now[0] += 6
        assert [outputs.try_now() for _ in range(3)] == [True, False, False]
        storage.error = None
        await outputs.rewrite(document_of(cdn.put("/b.png", png(1))))
        assert outputs.try_now()


async def test_a_failed_transfer_is_tried_again(
    outputs: Rehoster, cdn: Cdn, storage: FaultyDiskStorage
) -> None:
    document = document_of(cdn.put("/a.png", png()))
    storage.error = "No room."
    assert await outputs.rewrite(document) == Rewritten(document, Counter({RehostStatus.FAILED: 1}))
    storage.error = None
    assert (await outputs.rewrite(document)).statuses == {RehostStatus.STORED: 1}


async def test_a_project_is_used_again_after_it_was_unreachable(
    cdn: Cdn, fetcher: Fetcher, supabase: FakeSupabase
) -> None:
    document = document_of(cdn.put("/a.png", png()))
    async with supabase_of(supabase) as stored, opened(Rehoster(stored, fetcher)) as outputs:
        await supabase.stop()
        assert await outputs.rewrite(document) == Rewritten(
            document, Counter({RehostStatus.FAILED: 1})
        )
        await supabase.start()
        assert (await outputs.rewrite(document)).statuses == {RehostStatus.STORED: 1}
        supabase.fail(supabase_faults.respond(503, "<html>"), 2, path="/object/")
        other = document_of(cdn.put("/b.png", png(1)))
        assert (await outputs.rewrite(other)).statuses == {RehostStatus.STORED: 1}


async def test_no_failure_of_one_file_ends_the_others(
    fetcher: Fetcher, cdn: Cdn, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Faulty(DiskStorage):
        async def put(self, file: StoredFile) -> str:
            if file.name == name_of(png(1)):
                raise RuntimeError("our fault")
            return await super().put(file)

    urls = [cdn.put(f"/{number}.png", png(number)) for number in range(3)]
    async with (
        Faulty(tmp_path, lambda: LOCAL_ORIGIN) as stored,
        opened(Rehoster(stored, fetcher)) as outputs,
    ):
        document, statuses = await outputs.rewrite(document_of(*urls))
    assert statuses == {RehostStatus.STORED: 2, RehostStatus.FAILED: 1}
    assert urls_in(document)[1] == urls[1]
    (record,) = (record for record in caplog.records if record.levelno == logging.ERROR)
    assert "because of a bug" in record.message


async def test_a_file_that_is_too_large_stays_with_fal(
    outputs: Rehoster, cdn: Cdn, names: Callable[[], list[str]]
) -> None:
    large = cdn.serve_at("/large.mp4", announce_length(SIZE_MAX + 1))
    document = document_of(large, cdn.put("/a.png", png()))
    async with asyncio.timeout(2):
        for _ in range(2):
            shown, statuses = await outputs.rewrite(document)
            assert urls_in(shown)[0] == large
            assert statuses == {RehostStatus.TOO_LARGE: 1, RehostStatus.STORED: 1}
    assert cdn.request_counts["/large.mp4"] == 1, "it is not going to be smaller"
    assert names() == [name_of(png())]


async def test_no_log_line_contains_a_url(
    outputs: Rehoster, cdn: Cdn, storage: FaultyDiskStorage, caplog: pytest.LogCaptureFixture
) -> None:
    storage.error = "No room."
    urls = (
        cdn.put("/secret.png", png()),
        cdn.serve_at("/secret.mp4", announce_length(SIZE_MAX + 1)),
    )
    with caplog.at_level(logging.INFO):
        await outputs.rewrite(document_of(*urls, cdn.origin + "/secret"))
    ours = [record.message for record in caplog.records if record.name.startswith("falproxy")]
    assert len([line for line in ours if "output" in line]) == 3
    assert "secret" not in "".join(ours)


# Time


async def held(
    outputs: Rehoster, storage: FaultyDiskStorage, document: bytes
) -> asyncio.Task[Rewritten]:
    """A caller that waits for a file whose transfer hangs in the storage."""
    storage.gate.opened.clear()
    waiting = asyncio.ensure_future(outputs.rewrite(document))
    before = storage.gate.waiting
    await wait_until(lambda: storage.gate.waiting > before, seconds=TIMEOUT)
    return waiting


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


@pytest.mark.asyncio_loop
async def test_a_request_waits_for_a_file_until_the_time_out(
    outputs: Rehoster, cdn: Cdn, storage: FaultyDiskStorage
) -> None:
    document = document_of(cdn.put("/a.png", png()))
    with LoopClock().running() as clock:
        waiting = await held(outputs, storage, document)
        clock.elapse(WAIT_TIMEOUT - 5)
        await settle()
        assert not waiting.done()
        clock.elapse(6)
        assert await waiting == Rewritten(document, Counter({RehostStatus.PENDING: 1}))
        storage.gate.opened.set()
        await wait_until(lambda: not storage.gate.waiting, seconds=TIMEOUT)
        assert (await outputs.rewrite(document)).statuses == {RehostStatus.STORED: 1}
    assert (cdn.request_counts["/a.png"], len(storage.puts)) == (1, 1)


@pytest.mark.asyncio_loop
@pytest.mark.timed
@pytest.mark.parametrize("down", ["hangs", "fails"])
async def test_requests_wait_briefly_for_a_storage_that_is_down(
    outputs: Rehoster, cdn: Cdn, storage: FaultyDiskStorage, down: str
) -> None:
    documents = [document_of(cdn.put(f"/{number}.png", png(number))) for number in range(3)]
    with LoopClock().running() as clock:
        if down == "hangs":
            waiting = await held(outputs, storage, documents[0])
            clock.elapse(WAIT_TIMEOUT + 1)
            assert (await waiting).statuses == {RehostStatus.PENDING: 1}
        else:
            storage.error = "It is down."
            assert (await outputs.rewrite(documents[0])).statuses == {RehostStatus.FAILED: 1}
            storage.error = None
        storage.gate.opened.clear()
        for document in documents[:2]:
            started = time.perf_counter()
            assert (await outputs.rewrite(document)).statuses == {RehostStatus.PENDING: 1}
            assert 0.5 * SHORT_WAIT_TIMEOUT < time.perf_counter() - started < SHORT_WAIT_TIMEOUT + 3
        storage.gate.opened.set()
        for document in documents[:2]:
            assert (await outputs.rewrite(document)).statuses == {RehostStatus.STORED: 1}
        waiting = await held(outputs, storage, documents[2])
        clock.elapse(WAIT_TIMEOUT - 5)
        await settle()
        assert not waiting.done(), "it is back, and worth waiting for"
        storage.gate.opened.set()
        assert (await waiting).statuses == {RehostStatus.STORED: 1}


@pytest.mark.asyncio_loop
async def test_one_slow_file_does_not_shorten_the_wait_for_others(
    cdn: Cdn, storage: FaultyDiskStorage
) -> None:
    gate = RequestGate()
    slow, quick = cdn.serve_at("/slow.mp4", gate.serve), cdn.put("/quick.png", png(1))
    async with (
        fetcher_of(cdn.origin, idle=1000, overall=1000) as fetcher,
        opened(Rehoster(storage, fetcher)) as outputs,
    ):
        with LoopClock().running() as clock:
            waiting = asyncio.ensure_future(outputs.rewrite(document_of(slow)))
            await wait_until(lambda: gate.waiting, seconds=TIMEOUT)
            assert (await outputs.rewrite(document_of(quick))).statuses == {RehostStatus.STORED: 1}
            clock.elapse(WAIT_TIMEOUT + 1)
            assert (await waiting).statuses == {RehostStatus.PENDING: 1}
            waiting = await held(outputs, storage, document_of(cdn.put("/next.png", png(2))))
            clock.elapse(SHORT_WAIT_TIMEOUT + 1)
            await settle()
            assert not waiting.done()
            storage.gate.opened.set()
            assert (await waiting).statuses == {RehostStatus.STORED: 1}
            gate.opened.set()


async def test_a_file_is_stored_although_all_callers_were_cancelled(
    outputs: Rehoster, cdn: Cdn, storage: FaultyDiskStorage, names: Callable[[], list[str]]
) -> None:
    document = document_of(cdn.put("/a.png", png()))
    waiting = await held(outputs, storage, document)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    storage.gate.opened.set()
    await wait_until(lambda: names() == [name_of(png())], seconds=TIMEOUT)
    assert (await outputs.rewrite(document)).statuses == {RehostStatus.STORED: 1}
    assert (cdn.request_counts["/a.png"], len(storage.puts)) == (1, 1)


async def test_a_cancelled_caller_does_not_affect_the_others(
    outputs: Rehoster, cdn: Cdn, storage: FaultyDiskStorage
) -> None:
    document = document_of(cdn.put("/a.png", png()))
    cancelled = await held(outputs, storage, document)
    staying = asyncio.ensure_future(outputs.rewrite(document))
    await settle()
    cancelled.cancel()
    storage.gate.opened.set()
    assert (await staying).statuses == {RehostStatus.STORED: 1}
    assert cdn.request_counts["/a.png"] == 1


async def test_eight_transfers_run_at_once(
    outputs: Rehoster, cdn: Cdn, storage: FaultyDiskStorage
) -> None:
    urls = [cdn.put(f"/{number}.png", png(number)) for number in range(20)]
    waiting = await held(outputs, storage, document_of(*urls))
    await wait_until(lambda: storage.gate.waiting == MAX_CONCURRENCY, seconds=TIMEOUT)
    await asyncio.sleep(0.05)
    assert (storage.gate.waiting, len(cdn.request_counts)) == (MAX_CONCURRENCY, MAX_CONCURRENCY)
    storage.gate.opened.set()
    assert (await waiting).statuses == {RehostStatus.STORED: 20}


@pytest.mark.asyncio_loop
@pytest.mark.slow
@pytest.mark.timed
async def test_queued_transfers_are_limited(
    outputs: Rehoster, cdn: Cdn, storage: FaultyDiskStorage
) -> None:
    storage.gate.opened.clear()
    count = (MAX_CONCURRENCY + QUEUE_MAX) // LINKS_MAX + 1
    documents = [
        document_of(*(cdn.put(f"/{one}-{two}.png", png(two)) for two in range(LINKS_MAX)))
        for one in range(count)
    ]
    with LoopClock().running() as clock:
        requested = [asyncio.ensure_future(outputs.rewrite(document)) for document in documents]
        await wait_until(lambda: storage.gate.waiting == MAX_CONCURRENCY, seconds=TIMEOUT)
        clock.elapse(WAIT_TIMEOUT + 1)
        statuses = sum(
            (response.statuses for response in await asyncio.gather(*requested)),
            Counter[RehostStatus](),
        )
        over = count * LINKS_MAX - MAX_CONCURRENCY - QUEUE_MAX
        assert statuses == {
            RehostStatus.PENDING: MAX_CONCURRENCY + QUEUE_MAX,
            RehostStatus.FAILED: over,
        }
        assert len(cdn.request_counts) == MAX_CONCURRENCY


# Shutdown


async def test_running_transfers_complete_at_close(
    outputs: Rehoster, cdn: Cdn, storage: FaultyDiskStorage, names: Callable[[], list[str]]
) -> None:
    waiting = await held(outputs, storage, document_of(cdn.put("/a.png", png())))
    waiting.cancel()
    closing = asyncio.ensure_future(outputs.close(5))
    await settle()
    assert not closing.done()
    storage.gate.opened.set()
    await closing
    assert names() == [name_of(png())]


@pytest.mark.timed
async def test_close_waits_for_the_grace_period_at_most(
    outputs: Rehoster, cdn: Cdn, storage: FaultyDiskStorage, names: Callable[[], list[str]]
) -> None:
    waiting = await held(outputs, storage, document_of(cdn.put("/a.png", png())))
    started = time.perf_counter()
    await outputs.close(0.1)
    assert 0.1 <= time.perf_counter() - started < 2
    assert not storage.gate.waiting
    assert (await waiting).statuses == {RehostStatus.FAILED: 1}
    assert names() == []


async def test_close_is_immediate_without_transfers(outputs: Rehoster) -> None:
    async with asyncio.timeout(0.5):
        await outputs.close(60)


# Local and signed URLs


async def test_local_files_get_the_proxy_s_own_url(outputs: Rehoster) -> None:
    stored = f"/files/{name_of(png())}"
    others = [
        f"{LOCAL_ORIGIN}/files/a.png",
        f"{LOCAL_ORIGIN}{stored}/..",
        f"https://falproxy.invalid.example{stored}",
    ]
    document = document_of(f"{LOCAL_ORIGIN}{stored}", *others)
    assert urls_in(await outputs.localize(document, f"{HERE}/ai")) == [
        f"{HERE}/ai{stored}",
        *others,
    ]


async def test_a_document_without_local_urls_stays_unchanged(outputs: Rehoster) -> None:
    document = document_of("https://v3.fal.media/a.png", f"{HERE}/files/a.png")
    assert await outputs.localize(document, HERE) is document


@dataclass
class Time:
    """A clock for the storage and the fake."""

    fake: FakeSupabase
    now: float = 1000.0

    def elapse(self, seconds: float) -> None:
        self.now += seconds
        self.fake.elapse(seconds)


@dataclass(frozen=True)
class Signing:
    storage: SupabaseStorage
    outputs: Rehoster
    time: Time
    fake: FakeSupabase

    @property
    def signed(self) -> int:
        return self.fake.count("POST", "/object/sign/")


@pytest.fixture
async def signing(supabase: FakeSupabase, fetcher: Fetcher) -> AsyncIterator[Signing]:
    """Signed URLs with a lifetime of one minute."""
    clock = Time(supabase)
    storage = supabase_of(supabase, signed_url_ttl=60.0, clock=lambda: clock.now)
    async with (
        storage,
        opened(Rehoster(storage, fetcher, clock=lambda: clock.now)) as outputs,
    ):
        yield Signing(storage, outputs, clock, supabase)


async def status_at(url: str) -> int:
    async with httpx.AsyncClient(trust_env=False) as client:
        return (await client.get(url)).status_code


async def shown(signing: Signing, document: bytes) -> str:
    """Return the URL of the only file of a document."""
    (url,) = urls_in((await signing.outputs.rewrite(document)).document)
    return url


async def test_an_expiring_signed_url_is_renewed(signing: Signing, cdn: Cdn) -> None:
    document = document_of(cdn.put("/a.png", png()))
    first = await shown(signing, document)
    assert await shown(signing, document) == first
    assert signing.signed == 1
    for _ in range(3):
        signing.time.elapse(61)
        assert await status_at(first) == 400
        assert await status_at(await shown(signing, document)) == 200
    assert cdn.request_counts["/a.png"] == 1


async def test_a_signed_url_is_valid_for_half_of_its_lifetime_at_least(
    signing: Signing, cdn: Cdn
) -> None:
    document = document_of(cdn.put("/a.png", png()))
    for _ in range(10):
        signing.time.elapse(13)
        url = await shown(signing, document)
        signing.time.elapse(29)
        assert await status_at(url) == 200


async def test_a_url_that_cannot_be_renewed_stays(
    signing: Signing, cdn: Cdn, caplog: pytest.LogCaptureFixture
) -> None:
    document = document_of(cdn.put("/a.png", png()))
    first = await shown(signing, document)
    signing.time.elapse(61)
    signing.fake.fail(supabase_faults.respond(503, "<html>"), 3, path="/object/sign/")
    assert await shown(signing, document) == first
    assert "was not renewed" in caplog.text
    assert await status_at(await shown(signing, document)) == 200


async def test_a_source_url_of_a_stored_file_is_not_renewed(signing: Signing, cdn: Cdn) -> None:
    """A model may return the URL of an earlier output."""
    old = await shown(signing, document_of(cdn.put("/a.png", png())))
    signing.time.elapse(61)
    document = document_of(old)
    assert (await signing.outputs.rewrite(document)).document == document
    assert await signing.outputs.localize(document, HERE) is document


async def test_concurrent_renewals_of_a_url_sign_once(signing: Signing, cdn: Cdn) -> None:
    document = document_of(cdn.put("/a.png", png()))
    await shown(signing, document)
    signing.time.elapse(61)
    assert len({*await asyncio.gather(*(shown(signing, document) for _ in range(50)))}) == 1
    assert signing.signed == 2


async def test_a_renewed_url_is_cached(signing: Signing) -> None:
    url = await signing.storage.put(file_of(png()))
    assert not signing.storage.is_expiring(url)
    signing.time.elapse(31)
    assert signing.storage.is_expiring(url)
    renewed = await signing.storage.renew_url(url)
    assert renewed != url
    assert (
        await signing.storage.renew_url(url) == await signing.storage.renew_url(renewed) == renewed
    )
    assert (signing.storage.is_expiring(url), signing.storage.is_expiring(renewed)) == (True, False)
    assert signing.signed == 2


async def test_a_signed_url_of_another_process_is_renewed(signing: Signing) -> None:
    url = await signing.storage.put(file_of(png()))
    signing.time.elapse(61)
    async with supabase_of(signing.fake, signed_url_ttl=60.0) as other:
        assert other.is_expiring(url)
        renewed = await other.renew_url(url)
    assert await status_at(renewed) == 200


@pytest.mark.parametrize(
    "path",
    [
        pytest.param("public/fal_images/{name}", id="public"),
        pytest.param("sign/fal_images/{name}", id="without a signature"),
        pytest.param("sign/fal_images/a.png?token=x", id="another name"),
        pytest.param("sign/fal_images/x{name}?token=x", id="a name that ends so"),
        pytest.param("sign/fal_images?token=x/{name}?", id="a name in the query"),
        pytest.param("upload/sign/fal_images/{name}?token=x", id="another kind"),
    ],
)
async def test_other_urls_of_the_project_are_not_renewed(signing: Signing, path: str) -> None:
    url = f"{signing.fake.url}/storage/v1/object/{path.format(name=name_of(png()))}"
    assert not signing.storage.is_expiring(url)
    assert signing.fake.requests == []


@pytest.mark.parametrize("origin", ["https://x.supabase.co", "http://127.0.0.1:1"])
async def test_urls_of_other_projects_are_not_renewed(signing: Signing, origin: str) -> None:
    url = f"{origin}/storage/v1/object/sign/fal_images/{name_of(png())}?token=x"
    assert not signing.storage.is_expiring(url)
    assert not signing.storage.is_expiring(f"{signing.fake.url}.example{url}")
    alike = url.replace(origin, signing.fake.url.replace("127.0.0.1", "127.0.0.2"))
    assert not signing.storage.is_expiring(alike)
    assert signing.fake.requests == []


async def test_public_urls_are_not_renewed(supabase: FakeSupabase) -> None:
    async with supabase_of(supabase) as storage:
        url = await storage.put(file_of(png()))
        supabase.requests.clear()
        assert not storage.is_expiring(url)
        assert not storage.is_expiring(url.replace("public", "sign") + "?token=x")
    assert supabase.requests == []


async def test_a_deleted_file_gets_no_new_url(signing: Signing) -> None:
    url = await signing.storage.put(file_of(png()))
    signing.fake.objects(BUCKET).clear()
    signing.time.elapse(61)
    with pytest.raises(StorageError):
        await signing.storage.renew_url(url)


# Downloads


@pytest.fixture
async def world() -> AsyncIterator[World]:
    """A public server and a private one, and the names of the internet."""
    public, private = Host(), Host()
    async with AsyncExitStack() as stack:
        stack.push_async_callback(public.close)
        server = await stack.enter_async_context(
            await asyncio.start_server(public.serve, PUBLIC, 0)
        )
        port = server.sockets[0].getsockname()[1]
        await stack.enter_async_context(await asyncio.start_server(private.serve, PRIVATE, port))
        yield World(public, private, port, Names({NAME: [[PUBLIC]], "down.example": [[UNUSED]]}))


@pytest.fixture
async def outside(world: World) -> AsyncIterator[Fetcher]:
    async with world.fetcher(idle=0.2) as fetcher:
        yield fetcher


@pytest.mark.parametrize("size", [0, 1, MEMORY_MAX, MEMORY_MAX * 5])
async def test_a_download_has_the_bytes_and_their_digest(
    world: World, outside: Fetcher, size: int
) -> None:
    content = (png() + bytes(range(256)) * (size // 256 + 1))[:size]
    world.public.responses["/a"] = reply(body=content)
    download = await outside.download(world.url("/a"), SIZE_MAX)
    assert download.digest == hashlib.sha256(content).hexdigest()
    assert (download.content.size, download.content.read(0, size)) == (size, content)
    assert b"".join([chunk async for chunk in download.content.chunks()]) == content


async def test_a_download_accepts_any_type_uncompressed(world: World, outside: Fetcher) -> None:
    world.public.responses["/a"] = reply()
    await outside.download(world.url("/a"), SIZE_MAX)
    (seen,) = world.public.seen
    assert "\r\nAccept: */*\r\n" in seen
    assert "\r\nAccept-Encoding: identity\r\n" in seen
    assert "authorization" not in seen.lower()


async def test_downloads_are_not_cached(world: World, outside: Fetcher) -> None:
    world.public.responses["/a"] = reply(Cache_Control="max-age=60")
    for _ in range(2):
        await outside.download(world.url("/a"), SIZE_MAX)
    assert world.public.connections == 2


@pytest.mark.parametrize("has_length", [True, False], ids=["with length", "without length"])
async def test_a_download_has_an_exact_limit(
    world: World, outside: Fetcher, has_length: bool
) -> None:
    content = png() * 20_000
    whole = reply(body=content)
    world.public.responses["/a"] = whole if has_length else b"HTTP/1.1 200 OK\r\n\r\n" + content
    download = await outside.download(world.url("/a"), len(content))
    assert download.content.size == len(content)
    with pytest.raises(FetchTooLarge):
        await outside.download(world.url("/a"), len(content) - 1)
    assert world.public.connections == 2, "a file that is too large is not fetched again"


@pytest.mark.parametrize(
    ("response", "times"),
    [
        pytest.param(reply(500), 3, id="a failure"),
        pytest.param(reply(503), 3, id="busy"),
        pytest.param(reply(429), 3, id="too many requests"),
        pytest.param(reply(404), 1, id="gone"),
        pytest.param(reply(206, Content_Range="bytes 0-9/20"), 1, id="a part"),
        pytest.param(reply(Content_Length="100000"), 3, id="less than declared"),
        pytest.param(reply(body=gzip.compress(PNG), Content_Encoding="gzip"), 1, id="compressed"),
    ],
)
async def test_a_download_is_retried_after_retryable_errors(
    world: World, outside: Fetcher, response: bytes, times: int
) -> None:
    world.public.responses["/a"] = response
    with pytest.raises(FetchFailed):
        await outside.download(world.url("/a"), SIZE_MAX)
    assert world.public.connections == times


async def test_the_third_attempt_of_a_download_has_no_bytes_of_earlier_ones(
    world: World, outside: Fetcher
) -> None:
    cut = reply(body=b"cut", Content_Length="1000")
    world.public.responses["/a"] = [cut, reply(500), reply(body=png())]
    download = await outside.download(world.url("/a"), SIZE_MAX)
    assert download.content.read(0, 100) == png()
    assert download.digest == hashlib.sha256(png()).hexdigest()


async def test_a_download_follows_to_public_addresses_only(world: World, outside: Fetcher) -> None:
    world.public.responses["/a"] = reply()
    world.public.responses["/to"] = redirect("/a")
    world.public.responses["/inside"] = redirect(f"http://{PRIVATE}:{world.port}/a")
    world.private.responses["/a"] = reply()
    assert (await outside.download(world.url("/to"), SIZE_MAX)).content.size
    with pytest.raises(FetchRefused):
        await outside.download(world.url("/inside"), SIZE_MAX)
    with pytest.raises(FetchRefused):
        await outside.download(world.url("/a", PRIVATE), SIZE_MAX)
    assert world.private.connections == 0


async def test_a_download_from_a_trusted_url_follows_no_redirect(
    world: World, outside: Fetcher
) -> None:
    outside.trust(world.url("/files/", PRIVATE))
    world.private.responses["/files/a"] = reply()
    world.private.responses["/files/to"] = redirect(world.url("/a"))
    assert (await outside.download(world.url("/files/a", PRIVATE), SIZE_MAX)).content.size
    with pytest.raises(FetchFailed):
        await outside.download(world.url("/files/to", PRIVATE), SIZE_MAX)
    assert world.public.connections == 0


async def test_a_download_without_room_is_an_error(
    world: World, outside: Fetcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder for temporary files is missing."""
    monkeypatch.setattr("tempfile.tempdir", "/nowhere")
    world.public.responses["/a"] = reply(body=bytes(MEMORY_MAX * 2))
    with pytest.raises((ProxyError, FetchFailed)):
        await outside.download(world.url("/a"), SIZE_MAX)
