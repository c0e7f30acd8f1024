"""The Supabase backend: misleading, missing and lost responses, keys, large files."""

import asyncio
import gc
import json
import logging
import os
import ssl
import time
import traceback
import tracemalloc
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from pathlib import Path

import httpx
import pytest
import trustme
from aiohttp import web
from tenacity import wait_none

from falproxy.spool import Spool, spool_body
from falproxy.stores.files import StorageError, StoredFile
from falproxy.stores.files.supabase import StorageTimeouts, SupabaseStorage
from tests.support.fake_supabase import FakeSupabase
from tests.support.fake_supabase.apart import fake_apart
from tests.support.fake_supabase.errors import DATABASE_BUSY, DATABASE_SLOW
from tests.support.fake_supabase.faults import (
    Fault,
    close_connection,
    delay,
    fail_with,
    hang,
    lose_response,
    respond,
)
from tests.support.key_search import SECRET
from tests.support.waiting import wait_until

BUCKET = "fal_images"
KEY = f"sb_secret_{SECRET}"  # looked for in all logs of the run
PACE = StorageTimeouts(backoff=wait_none())
LARGE = 100 * 2**20
MEBIBYTE = 2**20
DAY = 86400.0


def file_of(content: bytes, content_type: str = "image/png", suffix: str = "png") -> StoredFile:
    name = f"{sha256(content).hexdigest()}.{suffix}"
    return StoredFile(name, content_type, Spool(content))


async def large_file(size: int = LARGE) -> StoredFile:
    """Return a file that is not in memory."""

    async def chunks() -> AsyncIterator[bytes]:
        chunk = os.urandom(MEBIBYTE)
        for _ in range(size // MEBIBYTE):
            yield chunk

    return StoredFile(f"{os.urandom(32).hex()}.mp4", "video/mp4", await spool_body(chunks()))


IMAGE = file_of(b"\x89PNG an image")


@pytest.fixture
async def fake() -> AsyncIterator[FakeSupabase]:
    roles = {KEY: "service_role", "sb_publishable_x": "anon"}
    async with FakeSupabase(keys=roles) as running:
        yield running


@asynccontextmanager
async def storage_of(
    fake: FakeSupabase,
    key: str = KEY,
    pace: StorageTimeouts = PACE,
    signed_for: float | None = None,
) -> AsyncIterator[SupabaseStorage]:
    async with SupabaseStorage(fake.url, key, signed_url_ttl=signed_for, timeouts=pace) as opened:
        yield opened


@pytest.fixture
async def storage(fake: FakeSupabase) -> AsyncIterator[SupabaseStorage]:
    async with storage_of(fake) as opened:
        yield opened


@pytest.fixture
async def ready(fake: FakeSupabase, storage: SupabaseStorage) -> SupabaseStorage:
    """A storage that has created its bucket."""
    await storage.put(file_of(b"first"))
    fake.requests.clear()
    return storage


async def seen_at(url: str) -> httpx.Response:
    """Return the bytes and the headers of a URL, read without credentials."""
    async with httpx.AsyncClient(trust_env=False) as client:
        return await client.get(url)


def sent(fake: FakeSupabase, file: StoredFile = IMAGE) -> int:
    """Return the number of uploads of the file."""
    return fake.count("POST", f"/object/{BUCKET}/{file.name}")


# Stored files and their URLs


async def test_a_file_is_at_its_public_url(fake: FakeSupabase, storage: SupabaseStorage) -> None:
    url = await storage.put(IMAGE)
    assert url == f"{fake.url}/storage/v1/object/public/{BUCKET}/{IMAGE.name}"
    response = await seen_at(url)
    assert response.content == b"\x89PNG an image"
    assert response.headers["content-type"] == "image/png"
    assert response.headers["cache-control"] == "public, max-age=31536000, immutable"


async def test_an_existing_object_is_success(fake: FakeSupabase, storage: SupabaseStorage) -> None:
    first = await storage.put(IMAGE)
    made = fake.objects(BUCKET)[IMAGE.name]
    assert await storage.put(IMAGE) == first
    assert fake.objects(BUCKET)[IMAGE.name] is made
    assert sent(fake) == 2


async def test_an_empty_file_is_stored(fake: FakeSupabase, storage: SupabaseStorage) -> None:
    await storage.put(file_of(b""))
    assert fake.objects(BUCKET)[file_of(b"").name].content == b""


async def test_fifty_concurrent_puts_create_one_object(
    fake: FakeSupabase, storage: SupabaseStorage
) -> None:
    urls = await asyncio.gather(*(storage.put(IMAGE) for _ in range(50)))
    assert len({*urls}) == 1
    assert [*fake.objects(BUCKET)] == [IMAGE.name]


async def test_thirty_two_files_are_stored_at_once(
    fake: FakeSupabase, storage: SupabaseStorage
) -> None:
    files = [file_of(os.urandom(20_000)) for _ in range(32)]
    urls = await asyncio.gather(*(storage.put(file) for file in files))
    for file, url in zip(files, urls, strict=True):
        assert url.endswith(file.name)
        stored = fake.objects(BUCKET)[file.name].content
        assert stored == file.content.read(0, file.content.size)


async def test_consecutive_files_share_a_connection(
    fake: FakeSupabase, storage: SupabaseStorage
) -> None:
    for number in range(5):
        await storage.put(file_of(bytes([number])))
    assert len({one.connection for one in fake.requests}) == 1


# Keys and headers


@pytest.mark.parametrize("key_of", [
    pytest.param(lambda fake: KEY, id="an opaque one"),
    pytest.param(lambda fake: fake.service_key, id="a JWT"),
])  # fmt: skip
async def test_both_kinds_of_keys_work(
    fake: FakeSupabase, key_of: Callable[[FakeSupabase], str]
) -> None:
    key = key_of(fake)
    async with storage_of(fake, key, signed_for=60) as storage:
        await storage.put(IMAGE)
        await storage.check()
    requested = [one for one in fake.requests if not (one.method == "GET" and "/sign/" in one.path)]
    for one in requested:
        assert one.headers["apikey"] == key
        assert one.headers["authorization"] == f"Bearer {key}"


async def test_the_user_agent_is_not_a_browser_s(
    fake: FakeSupabase, ready: SupabaseStorage
) -> None:
    await ready.check()
    assert {one.headers["user-agent"].partition("/")[0] for one in fake.requests} == {"falproxy"}


async def test_the_check_reads_public_files_without_the_key(
    fake: FakeSupabase, storage: SupabaseStorage
) -> None:
    await storage.check()
    (read,) = [one for one in fake.requests if one.path.startswith("/object/public/")]
    assert not {"apikey", "authorization"} & {*read.headers}


@pytest.mark.parametrize(("url", "key", "more"), [
    pytest.param("x.supabase.co", KEY, {}, id="no scheme"),
    pytest.param("ftp://x.supabase.co", KEY, {}, id="not of the web"),
    pytest.param("https://u:p@x.supabase.co", KEY, {}, id="user info"),
    pytest.param("https://[x", KEY, {}, id="no URL"),
    pytest.param("https://x.supabase.co", "", {}, id="an empty key"),
    pytest.param("https://x.supabase.co", f"{KEY}\n", {}, id="a key with a line feed"),
    pytest.param("https://x.supabase.co", f"{KEY}é", {}, id="a key that is not ASCII"),
    pytest.param("https://x.supabase.co", KEY, {"bucket": "a/b"}, id="a bucket with a slash"),
    pytest.param("https://x.supabase.co", KEY, {"bucket": ".."}, id="the parent folder"),
    pytest.param("https://x.supabase.co", KEY, {"signed_url_ttl": 0.5}, id="half a second"),
])  # fmt: skip
def test_invalid_arguments_are_errors(url: str, key: str, more: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"^(not a|signed)") as caught:
        SupabaseStorage(url, key, **more)  # type: ignore[arg-type] # of any kind
    assert SECRET not in "".join(traceback.format_exception(caught.value))


async def failures(fake: FakeSupabase, key: str) -> list[StorageError]:
    """Return one error of each kind in which a key could appear."""
    kinds: tuple[Fault, ...] = (
        respond(401, {"message": f"bad key {key}", "error": key, "statusCode": "401"}),
        respond(502, f"<html>{key}</html>"),
        respond(200, f"<html>{key}</html>"),
        hang,
        close_connection,
    )
    found = []
    for fault in kinds:
        fake.clear_faults()
        fake.fail(fault, 3, path="/object/")
        async with storage_of(fake, key, replace(PACE, read=0.05)) as storage:
            with pytest.raises(StorageError) as caught:
                await storage.put(file_of(os.urandom(9)))
            assert SECRET not in repr(storage) + str(vars(storage)["_files"])
            found.append(caught.value)
    return found


async def test_the_key_is_in_no_error_log_or_repr(
    fake: FakeSupabase, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    for error in await failures(fake, KEY):
        printed = traceback.TracebackException.from_exception(error, capture_locals=True)
        # The locals of this file contain the key.
        shown = [line for line in printed.format() if __file__ not in line]
        assert SECRET not in "".join(shown) + str(error) + repr(error)
    assert SECRET not in caplog.text


# The bucket


@pytest.mark.parametrize("signed_for", [None, 60.0], ids=["public", "private"])
async def test_a_missing_bucket_is_created(fake: FakeSupabase, signed_for: float | None) -> None:
    async with storage_of(fake, signed_for=signed_for) as storage:
        await storage.put(IMAGE)
        await storage.put(file_of(b"second"))
    assert fake.buckets[BUCKET].is_public is (signed_for is None)
    assert (fake.count("GET", "/bucket"), fake.count("POST", "/bucket")) == (1, 1)


async def test_concurrent_first_puts_share_a_bucket(
    fake: FakeSupabase, storage: SupabaseStorage
) -> None:
    fake.fail(delay(0.05), 8, method="GET", path="/bucket")
    await asyncio.gather(*(storage.put(file_of(bytes([n]))) for n in range(8)))
    assert fake.count("POST", "/bucket") == 8
    assert len(fake.objects(BUCKET)) == 8


async def test_a_deleted_bucket_is_created_again(
    fake: FakeSupabase, ready: SupabaseStorage
) -> None:
    fake.buckets.clear()
    await ready.put(IMAGE)
    assert [*fake.objects(BUCKET)] == [IMAGE.name]
    assert sent(fake) == 2


async def test_a_bucket_is_created_although_the_response_is_lost(
    fake: FakeSupabase, storage: SupabaseStorage
) -> None:
    fake.fail(lose_response, method="POST", path="/bucket")
    await storage.put(IMAGE)
    assert fake.count("POST", "/bucket") == 2


async def test_a_private_bucket_has_no_public_urls(
    fake: FakeSupabase, storage: SupabaseStorage
) -> None:
    async with storage_of(fake, signed_for=60) as signing:
        await signing.put(IMAGE)
    with pytest.raises(StorageError, match="The bucket is private: make it public"):
        await storage.put(IMAGE)
    with pytest.raises(StorageError, match="The bucket is private"):
        await storage.check()


async def test_a_public_bucket_with_signed_urls_is_warned_about(
    fake: FakeSupabase, ready: SupabaseStorage, caplog: pytest.LogCaptureFixture
) -> None:
    async with storage_of(fake, signed_for=60) as signing:
        await signing.put(IMAGE)
    assert "the bucket is public" in caplog.text


# Signed URLs


async def test_a_signed_url_is_valid_until_it_expires(fake: FakeSupabase) -> None:
    async with storage_of(fake, signed_for=60) as storage:
        first = await storage.put(IMAGE)
        assert (await seen_at(first)).content == b"\x89PNG an image"
        fake.elapse(61)
        assert (await seen_at(first)).status_code == 400
        second = await storage.put(IMAGE)
        assert (await seen_at(second)).content == b"\x89PNG an image"
        assert (await seen_at(second.partition("?")[0])).status_code == 400


async def test_signing_is_retried_without_another_upload(fake: FakeSupabase) -> None:
    async with storage_of(fake, signed_for=60) as storage:
        fake.fail(respond(503, "<html>"), 2, path="/object/sign/")
        await storage.put(IMAGE)
    assert (sent(fake), fake.count("POST", "/object/sign/")) == (1, 3)


# Failures


LATER = [
    pytest.param(respond(500, "<html>"), "(status 500)", id="a page with 500"),
    pytest.param(respond(502, "<html>"), "(status 502)", id="a page of a gateway"),
    pytest.param(respond(503, {"message": "no"}), "(status 503)", id="JSON of a gateway"),
    pytest.param(respond(429, "<html>"), "(status 429)", id="a gateway's limit"),
    pytest.param(fail_with(DATABASE_BUSY), "(status 429)", id="too many connections"),
    pytest.param(fail_with(DATABASE_SLOW), "(status 544)", id="a slow database"),
    pytest.param(
        respond(400, {"statusCode": "500", "error": "x", "message": "x"}),
        "(status 500)",
        id="500 in the body only",
    ),
    pytest.param(hang, "did not respond in time", id="silence"),
    pytest.param(close_connection, "closed the connection", id="a cut connection"),
]


@pytest.mark.parametrize(("fault", "sentence"), LATER)
async def test_retryable_errors_are_tried_three_times(
    fake: FakeSupabase, ready: SupabaseStorage, fault: Fault, sentence: str
) -> None:
    ready._http.timeout = httpx.Timeout(0.1)
    fake.fail(fault, 2, path="/object/")
    await ready.put(IMAGE)
    assert sent(fake) == 3
    other = file_of(b"other")
    fake.fail(fault, 3, path="/object/")
    with pytest.raises(StorageError) as caught:
        await ready.put(other)
    assert sentence in str(caught.value)
    assert sent(fake, other) == 3
    await ready.put(other)


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        pytest.param(
            respond(401, {"message": "Invalid API key"}),
            "does not accept the key",
            id="a gateway without such a key",
        ),
        pytest.param(respond(403, "<html>"), "does not accept the key", id="a page with 403"),
        pytest.param(
            respond(402, {"message": "restricted"}), "over its quota", id="over the quota"
        ),
        pytest.param(respond(404, "<html>"), "URL is right", id="another web server"),
        pytest.param(respond(409, "<html>"), "(status 409)", id="409 without the storage's body"),
        pytest.param(respond(301, "<html>"), "(status 301)", id="a redirect"),
        pytest.param(respond(413, "<html>"), "too large for Supabase", id="a gateway's limit"),
        pytest.param(respond(200, "<html>"), "URL is right", id="a page with 200"),
        pytest.param(respond(200, {"hello": "there"}), "URL is right", id="other JSON"),
        pytest.param(
            respond(400, {"statusCode": "400", "error": "InvalidKey", "message": "Invalid key: x"}),
            "(status 400)",
            id="a key that is refused",
        ),
    ],
)
async def test_permanent_errors_are_not_retried(
    fake: FakeSupabase, ready: SupabaseStorage, fault: Fault, sentence: str
) -> None:
    fake.fail(fault, 1, path="/object/")
    with pytest.raises(StorageError) as caught:
        await ready.put(IMAGE)
    assert sentence in str(caught.value)
    assert sent(fake) == 1


@pytest.mark.parametrize(
    ("key_of", "sentence"),
    [
        pytest.param(lambda fake: "sb_secret_unknown", "does not accept the key", id="unknown"),
        pytest.param(
            lambda fake: fake.token(role="service_role", exp=1),
            "does not accept the key",
            id="expired",
        ),
        pytest.param(
            lambda fake: "sb_publishable_x",
            "cannot be created: create it by hand. The Supabase key has no right",
            id="publishable",
        ),
    ],
)
async def test_a_wrong_key_and_a_missing_permission_have_different_messages(
    fake: FakeSupabase, key_of: Callable[[FakeSupabase], str], sentence: str
) -> None:
    async with storage_of(fake, key_of(fake)) as storage:
        for operation in (storage.check(), storage.put(IMAGE)):
            with pytest.raises(StorageError) as caught:
                await operation
            assert sentence in str(caught.value)


@pytest.mark.parametrize(
    ("limits", "sentence"),
    [
        pytest.param({"size_max": 5}, "too large for Supabase: raise the limit", id="too large"),
        pytest.param(
            {"types": ["image/webp"]}, "does not allow files of this type", id="of another type"
        ),
    ],
)
async def test_limits_of_the_bucket_have_messages(
    fake: FakeSupabase, ready: SupabaseStorage, limits: dict[str, object], sentence: str
) -> None:
    for name, value in limits.items():
        setattr(fake.buckets[BUCKET], name, value)
    with pytest.raises(StorageError, match=sentence):
        await ready.put(IMAGE)
    assert sent(fake) == 1


@pytest.mark.parametrize("times", [1, 2])
async def test_a_lost_response_is_no_failure(
    fake: FakeSupabase, ready: SupabaseStorage, times: int
) -> None:
    fake.fail(lose_response, times, path="/object/")
    await ready.put(IMAGE)
    assert sent(fake) == times + 1
    assert fake.objects(BUCKET)[IMAGE.name].content == b"\x89PNG an image"


async def test_it_opens_while_supabase_is_down_and_recovers(fake: FakeSupabase) -> None:
    await fake.stop()
    async with storage_of(fake) as storage:
        for operation in (storage.put(IMAGE), storage.check()):
            with pytest.raises(StorageError, match="cannot be reached"):
                await operation
        await fake.start()
        assert (await seen_at(await storage.put(IMAGE))).status_code == 200
        await fake.stop()
        with pytest.raises(StorageError):
            await storage.put(file_of(b"other"))
        await fake.start()
        await storage.put(file_of(b"other"))


@pytest.mark.timed
async def test_all_attempts_together_have_a_time_out(fake: FakeSupabase) -> None:
    fake.fail(hang, 100)
    async with storage_of(fake, pace=replace(PACE, overall=0.1)) as storage:
        before = time.monotonic()
        with pytest.raises(StorageError, match="did not respond in time"):
            await storage.put(IMAGE)
    assert time.monotonic() - before < 0.9


async def test_a_cancelled_put_leaves_nothing(fake: FakeSupabase, ready: SupabaseStorage) -> None:
    fake.fail(hang, path="/object/")
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(ready.put(await large_file(20 * MEBIBYTE)), 0.2)
    assert len(fake.objects(BUCKET)) == 1
    await ready.put(IMAGE)


async def test_an_unreadable_source_is_an_error(fake: FakeSupabase, ready: SupabaseStorage) -> None:
    class Lost(Spool):
        async def chunks(self) -> AsyncIterator[bytes]:
            yield b"x"
            raise OSError("/a/path")

    with pytest.raises(StorageError, match=r"^The file to be stored cannot be read\.$"):
        await ready.put(replace(IMAGE, content=Lost(b"x" * 100)))
    assert len(fake.objects(BUCKET)) == 1


# Early responses


async def early_responses(fake: FakeSupabase, storage: SupabaseStorage, file: StoredFile) -> str:
    """Send an early response in the middle of the upload."""
    fake.stops_reading = True
    before = time.monotonic()
    with pytest.raises(StorageError) as caught:
        await storage.put(file)
    assert time.monotonic() - before < 0.9, "ended by a time-out"
    return str(caught.value)


@pytest.mark.timed
async def test_an_existing_large_file_is_not_sent_completely(
    fake: FakeSupabase, ready: SupabaseStorage
) -> None:
    file = await large_file(30 * MEBIBYTE)
    url = await ready.put(file)
    fake.stops_reading = True
    before = time.monotonic()
    assert await asyncio.gather(*(ready.put(file) for _ in range(4))) == [url] * 4
    assert time.monotonic() - before < 0.9, "ended by a time-out"
    await ready.put(IMAGE)
    assert sent(fake, file) == 5
    *_, last = fake.requests
    assert last.connection not in {one.connection for one in fake.requests[1:-1]}


async def test_a_file_above_the_limit_is_rejected_before_it_is_sent_completely(
    fake: FakeSupabase, ready: SupabaseStorage
) -> None:
    file = await large_file(60 * MEBIBYTE)
    assert "too large for Supabase" in await early_responses(fake, ready, file)
    assert sent(fake, file) == 1


async def test_a_deleted_bucket_is_created_again_for_a_large_file(
    fake: FakeSupabase, ready: SupabaseStorage
) -> None:
    fake.stops_reading = True
    fake.buckets.clear()
    file = await large_file(30 * MEBIBYTE)
    await ready.put(file)
    assert len(fake.objects(BUCKET)[file.name].content) == 30 * MEBIBYTE


class TlsServer:
    """A TLS server with a response for each request."""

    def __init__(self) -> None:
        self.received = 0
        self.is_early = False

    async def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                await self.respond(head, reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # the storage closed the connection
        finally:
            writer.close()

    async def respond(
        self, head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        if head.startswith(b"GET"):
            body = (
                b'{"id":"b","name":"b","owner":"","public":true,"file_size_limit":null,'
                b'"allowed_mime_types":null,"created_at":"2026-01-01T00:00:00Z",'
                b'"updated_at":"2026-01-01T00:00:00Z"}'
            )
        else:
            body = b'{"Key":"b/k"}'
        if self.is_early and head.startswith(b"POST"):
            status = b"400"
            body = b'{"statusCode":"409","error":"Duplicate","message":"exists"}'
        else:
            status = b"200"
            lines = head.lower().split(b"\r\n")
            sizes = [line for line in lines if line.startswith(b"content-length:")]
            size = int(sizes[0].partition(b":")[2]) if sizes else 0
            while size:
                size -= (read := len(await reader.read(min(size, 2**20))))
                self.received += read
        writer.write(b"HTTP/1.1 %s X\r\nContent-Length: %d\r\n\r\n%s" % (status, len(body), body))
        await writer.drain()
        if self.is_early and status == b"400":
            await asyncio.sleep(2)


@pytest.mark.timed
async def test_early_responses_are_noticed_over_tls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    encryption = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("localhost").configure_cert(encryption)
    server = TlsServer()
    listener = await asyncio.start_server(server.accept, "127.0.0.1", 0, ssl=encryption)
    url = f"https://localhost:{listener.sockets[0].getsockname()[1]}"
    file = await large_file(30 * MEBIBYTE)
    async with SupabaseStorage(url, KEY, timeouts=PACE) as storage:
        await storage.put(file)
        assert server.received == 30 * MEBIBYTE
        server.is_early = True
        before = time.monotonic()
        await storage.put(file)
        assert time.monotonic() - before < 0.9
    listener.close()


# Memory and time


@pytest.fixture
async def apart() -> AsyncIterator[tuple[str, str]]:
    """The URL and the key of a fake in a separate process."""
    async with fake_apart() as running:
        yield running.url, running.key


@asynccontextmanager
async def longest_pause() -> AsyncIterator[Callable[[], float]]:
    """Return the longest pause between two turns of the event loop, in seconds."""
    pauses = [0.0]

    async def measure() -> None:
        last = time.perf_counter()
        while True:
            await asyncio.sleep(0.001)
            pauses.append((now := time.perf_counter()) - last)
            last = now

    async with asyncio.TaskGroup() as group:
        measuring = group.create_task(measure())
        yield lambda: max(pauses)
        measuring.cancel()


@pytest.mark.slow
async def test_a_large_file_needs_little_memory(apart: tuple[str, str]) -> None:
    file = await large_file()
    async with SupabaseStorage(*apart) as storage:
        await storage.put(IMAGE)
        gc.collect()
        tracemalloc.start()
        try:
            url = await storage.put(file)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert peak < 4 * MEBIBYTE
    async with httpx.AsyncClient(trust_env=False) as client:
        assert (await client.head(url)).headers["content-length"] == str(LARGE)


@pytest.mark.slow
@pytest.mark.timed
async def test_a_large_file_does_not_block_the_event_loop(apart: tuple[str, str]) -> None:
    """The best of three runs counts, since a busy machine causes pauses as well."""
    found: list[float] = []
    async with SupabaseStorage(*apart) as storage:
        await storage.put(IMAGE)
        while len(found) < 3 and min(found, default=1.0) > 0.02:
            file = await large_file()
            async with longest_pause() as pause:
                await storage.put(file)
                found.append(pause())
    assert min(found) < 0.02


# The check


async def test_a_check_leaves_nothing(fake: FakeSupabase, storage: SupabaseStorage) -> None:
    await storage.check()
    assert fake.objects(BUCKET) == {}
    (name,) = {one.path for one in fake.requests if one.path.startswith(f"/object/{BUCKET}/.")}
    assert name.startswith(f"/object/{BUCKET}/.falproxy/")


@pytest.mark.parametrize(
    ("fault", "method", "path", "sentence"),
    [
        pytest.param(
            respond(200, "<html>"),
            "GET",
            "/object/public/",
            "does not return the bytes",
            id="other bytes",
        ),
        pytest.param(
            respond(404, "<html>"), "GET", "/object/public/", "(status 404)", id="nothing to read"
        ),
        pytest.param(
            respond(200, "[]"), "DELETE", "/object/", "no right to delete", id="nothing is deleted"
        ),
        pytest.param(
            respond(403, "<html>"), "DELETE", "/object/", "does not accept", id="no right to delete"
        ),
    ],
)
async def test_a_failed_check_names_the_cause(
    fake: FakeSupabase,
    storage: SupabaseStorage,
    fault: Fault,
    method: str,
    path: str,
    sentence: str,
) -> None:
    fake.fail(fault, method=method, path=path)
    with pytest.raises(StorageError) as caught:
        await storage.check()
    assert sentence in str(caught.value)


async def test_a_check_is_retried(fake: FakeSupabase, storage: SupabaseStorage) -> None:
    steps: tuple[tuple[str, str], ...] = (
        ("GET", "/bucket"),
        ("POST", "/bucket"),
        ("POST", "/object/"),
        ("GET", "/object/public/"),
    )
    for method, path in steps:
        fake.fail(respond(503, "<html>"), 2, method=method, path=path)
    fake.fail(lose_response, method="DELETE", path="/object/")
    await storage.check()
    assert fake.objects(BUCKET) == {}


# Garbage collection


def age(fake: FakeSupabase, file: StoredFile, days: float) -> None:
    """Set the times of an object."""
    made = fake.objects(BUCKET)[file.name]
    made.created = made.updated = datetime.now(UTC) - timedelta(days=days)


def respond_text(text: str) -> Fault:
    """Respond with a text as JSON."""

    async def fault(request: web.Request, handler: object) -> web.StreamResponse:
        await request.read()
        return web.Response(text=text, content_type="application/json")

    return fault


async def collect(storage: SupabaseStorage, *, delete: bool = True) -> list[str]:
    files = storage.collect_garbage(30 * DAY, time.time(), delete=delete)
    return [file.name async for file in files]


def kept(fake: FakeSupabase) -> set[str]:
    return {*fake.objects(BUCKET)}


async def test_the_last_use_of_an_object_is_its_last_change(
    fake: FakeSupabase, storage: SupabaseStorage
) -> None:
    old, new = file_of(b"old"), file_of(b"new")
    for file, days in ((old, 31), (new, 29)):
        await storage.put(file)
        age(fake, file, days)
    (found,) = [each async for each in storage.collect_garbage(30 * DAY, time.time(), delete=True)]
    assert (found.name, found.size) == (old.name, 3)
    assert found.used_at == pytest.approx(time.time() - 31 * DAY, abs=60)
    assert kept(fake) == {new.name}


async def test_an_old_file_that_is_put_again_stays(
    fake: FakeSupabase, storage: SupabaseStorage
) -> None:
    await storage.put(IMAGE)
    age(fake, IMAGE, 31)
    url = f"{fake.url}/storage/v1/object/public/{BUCKET}/{IMAGE.name}"
    async with storage_of(fake) as other:  # of another process, or after a restart
        assert await other.put(IMAGE) == url
    assert await collect(storage) == []
    assert kept(fake) == {IMAGE.name}
    assert (await seen_at(url)).content == b"\x89PNG an image"


async def test_a_file_in_use_is_not_written_again_and_again(
    fake: FakeSupabase, ready: SupabaseStorage
) -> None:
    for _ in range(3):
        await ready.put(IMAGE)
        async with storage_of(fake) as other:
            await other.put(IMAGE)
    assert fake.count("PUT", "/object/") == 0
    age(fake, IMAGE, 31)
    for _ in range(3):
        async with storage_of(fake) as other:
            await other.put(IMAGE)
    assert fake.count("PUT", "/object/") == 1


async def test_other_objects_are_left_alone(fake: FakeSupabase, storage: SupabaseStorage) -> None:
    await storage.put(IMAGE)
    made = fake.objects(BUCKET)[IMAGE.name]
    foreign = ("notes.txt", "a/b.png", f"mine/{IMAGE.name}", "0" * 64, f"{'g' * 64}.png")
    for name in (*foreign, IMAGE.name):
        fake.objects(BUCKET)[name] = replace(made, updated=datetime(2020, 1, 1, tzinfo=UTC))
    assert await collect(storage) == [IMAGE.name]
    assert kept(fake) == {*foreign}


@pytest.mark.parametrize("delete", [False, True])
async def test_a_missing_bucket_has_no_unused_files(
    fake: FakeSupabase, storage: SupabaseStorage, delete: bool
) -> None:
    assert await collect(storage, delete=delete) == []
    assert fake.buckets == {}


async def test_a_key_that_may_not_delete_is_named(
    fake: FakeSupabase, ready: SupabaseStorage
) -> None:
    await ready.put(IMAGE)
    age(fake, IMAGE, 31)
    fake.fail(respond_text("[]"), 1, method="DELETE")
    with pytest.raises(StorageError, match="no right to delete"):
        await collect(ready)


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(lose_response, id="a lost response"),
        pytest.param(close_connection, id="a closed connection"),
        pytest.param(respond(502, "<html>bad gateway</html>"), id="a gateway"),
        pytest.param(fail_with(DATABASE_BUSY), id="a busy database"),
    ],
)
async def test_a_deletion_is_not_sent_twice(
    fake: FakeSupabase, ready: SupabaseStorage, fault: Fault
) -> None:
    """A file that was stored after the first one must not be lost."""
    await ready.put(IMAGE)
    age(fake, IMAGE, 31)
    fake.fail(fault, 1, method="DELETE")
    with pytest.raises(StorageError) as caught:
        await collect(ready)
    assert "canary" not in str(caught.value)
    names = [f"/object/{BUCKET}"]
    assert sum(each.method == "DELETE" and each.path in names for each in fake.requests) == 2
    await collect(ready)
    assert IMAGE.name not in kept(fake)
    assert not any("gc-" in name for name in kept(fake))


async def test_a_list_that_ignores_the_offset_ends(
    fake: FakeSupabase, ready: SupabaseStorage
) -> None:
    row = {"name": IMAGE.name, "id": "1", "updated_at": "2020-01-01T00:00:00Z", "metadata": {}}
    fake.fail(respond_text(json.dumps([row] * 100)), 10**6, path="/object/list")
    async with asyncio.timeout(5):
        assert len(await collect(ready, delete=False)) == 100


@pytest.mark.parametrize(
    "page",
    [
        pytest.param('{"a": 1}', id="an object"),
        pytest.param("[1]", id="numbers"),
        pytest.param("<html>", id="no JSON"),
    ],
)
async def test_a_list_that_cannot_be_read_is_an_error(
    fake: FakeSupabase, ready: SupabaseStorage, page: str
) -> None:
    fake.fail(respond_text(page), 1, path="/object/list")
    with pytest.raises(StorageError):
        await collect(ready, delete=False)


async def test_an_object_without_times_is_not_deleted(
    fake: FakeSupabase, ready: SupabaseStorage
) -> None:
    row = {"name": IMAGE.name, "id": "1", "updated_at": None, "created_at": "soon"}
    fake.fail(respond_text(json.dumps([row])), 1, path="/object/list")
    assert await collect(ready, delete=False) == []


async def test_a_put_and_a_deletion_at_the_same_time_lose_nothing(
    fake: FakeSupabase, storage: SupabaseStorage
) -> None:
    files = [file_of(b"%d" % number) for number in range(30)]
    for _ in range(3):
        for file in files:
            await storage.put(file)
            age(fake, file, 31)
        async with storage_of(fake) as other:
            await asyncio.gather(collect(storage), *(other.put(file) for file in files))
            assert {file.name for file in files} <= kept(fake)
        storage._fresh.clear()


@asynccontextmanager
async def slow_collection(
    fake: FakeSupabase, storage: SupabaseStorage
) -> AsyncIterator["asyncio.Task[list[str]]"]:
    """Context: a collection of IMAGE that waits for the deletion, and has ended behind it."""
    await storage.put(IMAGE)
    age(fake, IMAGE, 31)
    fake.fail(delay(0.5), 1, method="DELETE", path=f"/object/{BUCKET}")
    async with asyncio.TaskGroup() as group:
        collecting = group.create_task(collect(storage))
        await wait_until(lambda: fake.count("DELETE", "/object/"), seconds=5)
        yield collecting


async def test_a_file_that_is_listed_just_before_it_is_put_again_is_not_lost(
    fake: FakeSupabase, storage: SupabaseStorage
) -> None:
    async with storage_of(fake) as other, slow_collection(fake, storage) as collecting:
        await other.put(IMAGE)
    assert collecting.result() == [IMAGE.name]
    assert kept(fake) == {IMAGE.name}


async def test_only_one_collection_runs_at_a_time(
    fake: FakeSupabase, storage: SupabaseStorage
) -> None:
    async with storage_of(fake) as other, slow_collection(fake, storage) as collecting:
        with pytest.raises(StorageError, match="Another garbage collection is running"):
            await collect(other)
        await collect(other, delete=False)
    assert collecting.result() == [IMAGE.name]
    assert kept(fake) == set()


async def test_a_collection_that_was_killed_stops_nothing_for_long(
    fake: FakeSupabase, storage: SupabaseStorage
) -> None:
    await storage.put(IMAGE)
    made = fake.objects(BUCKET)[IMAGE.name]
    an_hour_ago = datetime.now(UTC) - timedelta(hours=1)
    fake.objects(BUCKET)[".falproxy/gc-1.png"] = replace(made, updated=an_hour_ago)
    age(fake, IMAGE, 31)
    assert await collect(storage) == [IMAGE.name]
