"""Re-hosting in complete requests: results have the URLs of stored files."""

import asyncio
import base64
import gzip
import json
import logging
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from pathlib import Path

import httpx
import pytest
import trustme
from aiohttp import ClientPayloadError, ClientResponse, web
from aiohttp.pytest_plugin import AiohttpClient, AiohttpServer
from aiohttp.test_utils import TestClient

import falproxy
from falproxy.middleware.rehost import LARGE_DOCUMENTS_MAX, SMALL_DOCUMENT_MAX
from falproxy.proxy.forward import DOCUMENT_MAX, LINE_MAX
from falproxy.proxy.local_responses import FAL_REQUEST_ID
from falproxy.stores.files.rehosting import SIZE_MAX
from falproxy.stores.ledger import UsageQuery
from falproxy.stores.ledger.writer import LEDGER_WRITER
from tests.support.fake_fal import FakeFal
from tests.support.fake_queue import (
    CAT,
    KONTEXT,
    cache_status,
    is_hit,
    request_about,
    run,
    submit,
)
from tests.support.fake_queue import FakeQueue as PlayedFal
from tests.support.fake_queue import submitted_id as id_of
from tests.support.fake_queue import wait_result as outcome
from tests.support.fake_queue import wait_until_cached as until_kept
from tests.support.fake_supabase import FakeSupabase
from tests.support.fake_supabase import faults as supabase_faults
from tests.support.fake_supabase.errors import NO_POLICY
from tests.support.gateway import Gateway, MakeGateway
from tests.support.key_search import CANARY
from tests.support.offline_fal import png as real_png
from tests.support.ports import free_port
from tests.support.rehosting import (
    FalCdn,
    RequestGate,
    announce_length,
    name_of,
    open_fal_cdn,
    png,
)
from tests.support.settings import make_settings
from tests.support.storages import files_in
from tests.support.urls import PROXY
from tests.support.waiting import wait_until

TIMEOUT = 5.0  # seconds; of `wait_until`

DEV = "https://fal.run/fal-ai/flux/dev"
STREAM = f"{DEV}/stream"
ID = "7e2f0b8a-0001-4000-8000-000000000000"
JOB = f"https://queue.fal.run/fal-ai/flux/requests/{ID}"
REHOST = "x-falproxy-rehost"
# The placeholder for the proxy's own origin, which no response may contain.
STAND_IN = "falproxy.invalid"
PATH = "/files/b/zebra/out.png"
GZIP = {"Content-Encoding": "gzip"}
TAG = {"ETag": '"abc"'}

ROUTES = [
    pytest.param("POST", PROXY, DEV, id="a run"),
    pytest.param("GET", PROXY, JOB, id="a queued result"),
    pytest.param("GET", PROXY, f"{JOB}/response", id="its other path"),
    pytest.param("POST", PROXY, STREAM, id="a stream that is a document"),
    pytest.param("POST", "/api/fal/run/fal-ai/flux/dev", None, id="a run by its mount"),
    pytest.param("GET", f"/api/fal/queue/fal-ai/flux/requests/{ID}", None, id="a result by mount"),
]


@pytest.fixture(autouse=True)
def fal_outlives_the_proxy(aiohttp_server: AiohttpServer) -> None:
    """The context that is entered first is closed last."""


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
async def cdn(authority: trustme.CA, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[FalCdn]:
    """`https://v3.fal.media`, with one image."""
    trust = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    authority.configure_trust(trust)
    monkeypatch.setattr("aiohttp.connector._SSL_CONTEXT_VERIFIED", trust)
    async with open_fal_cdn(authority) as cdn:
        cdn.put(PATH, png())
        yield cdn


@pytest.fixture
def played(fal: FakeFal) -> Iterator[PlayedFal]:
    played = PlayedFal(fal)
    played.output = lambda number: web.json_response(text=document_of(number))
    yield played
    played.release()


def document_of(number: int, path: str = PATH) -> str:
    """A model's result in an unusual layout, which must stay unchanged."""
    document = {"images": [{"url": f"https://v3.fal.media{path}", "width": 64}], "seed": number}
    return json.dumps(document, indent=3)


@pytest.fixture
def make(make_gateway: MakeGateway, fal: FakeFal, cdn: FalCdn) -> MakeGateway:
    """A proxy that stores files on the disk by default."""

    async def make(**given: object) -> Gateway:
        fetcher = cdn.fetcher(fal.origin)
        return await make_gateway(fal.origin, fetcher, **({"rehost": "disk"} | given))

    return make


@pytest.fixture
async def gateway(make: MakeGateway) -> Gateway:
    return await make()


def set_response(
    body: str | bytes,
    status: int = 200,
    content_type: str = "application/json",
    headers: Mapping[str, str] | None = None,
) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    """Set fal's response."""
    raw: bytes = body.encode() if isinstance(body, str) else body

    async def respond(request: web.Request) -> web.StreamResponse:
        named = {"Content-Type": content_type, **(headers or {})}
        return web.Response(body=raw, status=status, headers=named)

    return respond


async def send(
    gateway: Gateway, method: str, path: str, target: str | None, **headers: str
) -> ClientResponse:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    if target is not None:
        named["x-fal-target-url"] = target
    body: object = {} if method == "POST" else None
    async with asyncio.timeout(TIMEOUT):
        response = await gateway.client.request(method, path, json=body, headers=named)
        await response.read()
    return response


async def result_of(gateway: Gateway, **headers: str) -> ClientResponse:
    """Request a queued result."""
    return await send(gateway, "GET", PROXY, JOB, **headers)


async def url_in(response: ClientResponse) -> str:
    assert response.status == 200, await response.text()
    return str((await response.json())["images"][0]["url"])


def stored_url(gateway: Gateway, content: bytes = png(), extension: str = "png") -> str:
    return f"{gateway.origin}/files/{name_of(content, extension)}"


async def seen_at(gateway: Gateway, url: str) -> bytes:
    """Return the bytes and the type behind a URL."""
    async with gateway.client.session.get(url) as response:
        assert response.status == 200
        return await response.read()


class Disk:
    """The folder of a proxy's files, which can be made unusable."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.away = folder / "files", folder / "away"

    def fail(self) -> None:
        if self.folder.exists():
            self.folder.rename(self.away)
        self.folder.write_text("a file where a folder should be")

    def repair(self) -> None:
        self.folder.unlink()
        if self.away.exists():
            self.away.rename(self.folder)

    @property
    def names(self) -> list[str]:
        return sorted(path.name for path in files_in(self.folder))


@pytest.fixture
def disk(tmp_path: Path) -> Disk:
    return Disk(tmp_path)


# Documents


@pytest.mark.parametrize(("method", "path", "target"), ROUTES)
async def test_a_result_has_the_urls_of_stored_files(
    gateway: Gateway, fal: FakeFal, cdn: FalCdn, method: str, path: str, target: str | None
) -> None:
    url = cdn.origin + PATH
    body = (
        f'{{ "images":[ {{"url" : "{url}","type":"image/jpeg"}} ],\r\n\t'
        f'"seed": 12345678901234567890, "t": 1.0, "e": 1e5, "image_url": "{url}", '
        f'"urls": ["{url}"], "é\\u00e9": "\\/", "url": null }}\n'
    )
    fal.respond = set_response(body)
    response = await send(gateway, method, path, target)
    raw = await response.read()
    assert raw.decode() == body.replace(url, stored_url(gateway), 1)
    assert response.headers[REHOST] == "stored; count=1"
    assert response.headers["Content-Length"] == str(len(raw))
    assert response.headers["Content-Type"] == "application/json"
    assert await seen_at(gateway, stored_url(gateway)) == png()


@pytest.mark.parametrize("is_job", [False, True], ids=["a run", "a job"])
async def test_the_ledger_has_the_time_to_store_the_files(
    gateway: Gateway, fal: FakeFal, cdn: FalCdn, is_job: bool
) -> None:
    if is_job:
        fal.respond = set_response(f'{{"request_id": "{ID}"}}', headers={FAL_REQUEST_ID: ID})
        await send(gateway, "POST", PROXY, "https://queue.fal.run/fal-ai/flux/dev")
    fal.respond = set_response(document_of(1), headers={FAL_REQUEST_ID: ID})
    await (result_of(gateway) if is_job else send(gateway, "POST", PROXY, DEV))
    writer = gateway.client.app[LEDGER_WRITER]
    await wait_until(lambda: writer.pending_rows == 0, seconds=TIMEOUT)
    (record,) = await writer.ledger.latest(UsageQuery())
    assert record.stored_seconds is not None
    assert 0 < record.stored_seconds <= 5


MP4 = b"\0\0\0\x20ftypisom\0\0\x02\0isomiso2avc1mp41" + bytes(100)
MP3, WAV = b"ID3\x04" + bytes(100), b"RIFF\x64\0\0\0WAVEfmt " + bytes(100)


@pytest.mark.parametrize(
    ("template", "content", "extension", "content_type"),
    [
        pytest.param({"video": "FILE", "seed": 1}, MP4, "mp4", "video/mp4", id="a video"),
        pytest.param({"videos": ["FILE"]}, MP4, "mp4", "video/mp4", id="videos"),
        pytest.param({"audio": "FILE"}, MP3, "mp3", "audio/mpeg", id="speech"),
        pytest.param({"audio_file": "FILE"}, WAV, "wav", "audio/wav", id="a sound"),
        pytest.param({"audio_url": "FILE"}, WAV, "wav", "audio/wav", id="a sound by URL"),
        pytest.param(
            {"outputs": [{"clip": {"video": "FILE"}}]}, MP4, "mp4", "video/mp4", id="nested"
        ),
        pytest.param(
            {"video": "FILE", "thumbnail": "FILE", "video_id": "x"}, MP4, "mp4", "video/mp4",
            id="with further files",
        ),
    ],
)  # fmt: skip
async def test_videos_and_sounds_are_stored(
    gateway: Gateway,
    fal: FakeFal,
    cdn: FalCdn,
    template: object,
    content: bytes,
    extension: str,
    content_type: str,
) -> None:
    """The extension in fal's URL, and fal's type, may be wrong or missing."""
    source = cdn.put("/files/b/zebra/out", content)

    def document(url: str) -> str:
        file = json.dumps({"url": url, "content_type": "application/octet-stream"})
        return json.dumps(template).replace('"FILE"', file)

    fal.respond = set_response(document(source))
    response = await result_of(gateway)
    stored = stored_url(gateway, content, extension)
    assert await response.text() == document(stored)
    assert response.headers[REHOST] == "stored; count=1"
    async with gateway.client.session.get(stored, headers={"Range": "bytes=0-3"}) as part:
        assert (part.status, await part.read()) == (206, content[:4])
        assert part.headers["Content-Type"] == content_type


async def test_escaped_slashes_are_decoded(gateway: Gateway, fal: FakeFal, cdn: FalCdn) -> None:
    fal.respond = set_response(document_of(1).replace("/", r"\/"))
    assert await url_in(await result_of(gateway)) == stored_url(gateway)


@pytest.mark.parametrize(
    "host", ["https://v3.fal.media", "https://fal.media", "https://storage.googleapis.com"]
)
async def test_files_of_all_of_fal_s_hosts_are_stored(
    gateway: Gateway, fal: FakeFal, cdn: FalCdn, host: str
) -> None:
    url = host + cdn.put("/falserverless/a.png", png(1)).removeprefix(cdn.origin)
    fal.respond = set_response(json.dumps({"images": [{"url": url}]}))
    assert await url_in(await result_of(gateway)) == stored_url(gateway, png(1))


async def test_headers_of_the_original_bytes_are_dropped(gateway: Gateway, fal: FakeFal) -> None:
    of_the_bytes = {
        "ETag": '"abc"',
        "Digest": "sha-256=x",
        "Content-Digest": "sha-256=:x:",
        "Repr-Digest": "sha-256=:x:",
        "Content-MD5": "x",
        "Accept-Ranges": "bytes",
    }
    others = {"x-fal-request-id": ID, "Cache-Control": "no-store", "X-Other": "1"}
    fal.respond = set_response(document_of(1), headers=of_the_bytes | others)
    response = await result_of(gateway)
    assert not of_the_bytes.keys() & response.headers.keys()
    assert {name: response.headers[name] for name in others} == others
    fal.respond = set_response('{"seed": 1}', headers=of_the_bytes | others)
    response = await result_of(gateway)
    given = of_the_bytes | others
    assert {name: response.headers[name] for name in given} == given
    assert REHOST not in response.headers


async def test_a_result_is_requested_uncompressed(gateway: Gateway, fal: FakeFal) -> None:
    await result_of(gateway, Accept_Encoding="gzip, br")
    (seen,) = fal.seen
    assert seen.header("accept-encoding") == "identity"


@pytest.mark.parametrize(
    ("method", "target", "status", "content_type"),
    [
        pytest.param("GET", f"{JOB}/status", 200, "application/json", id="a status"),
        pytest.param(
            "GET", f"{JOB}/status", 202, "application/json", id="a status of a running request"
        ),
        pytest.param("GET", f"{JOB}/status/stream", 200, "text/event-stream", id="statuses"),
        pytest.param("PUT", f"{JOB}/cancel", 202, "application/json", id="a cancel"),
        pytest.param(
            "POST", "https://queue.fal.run/fal-ai/flux/dev", 200, "application/json", id="a submit"
        ),
        pytest.param("GET", "https://rest.fal.ai/x", 200, "application/json", id="no model"),
        pytest.param("POST", DEV, 422, "application/json", id="a refusal"),
        pytest.param("POST", DEV, 500, "application/json", id="a failure"),
        pytest.param("POST", DEV, 201, "application/json", id="another 2xx"),
        pytest.param("GET", JOB, 400, "application/json", id="no result yet"),
        pytest.param("POST", DEV, 200, "text/plain", id="a text"),
        pytest.param("POST", DEV, 200, "text/html", id="a page"),
        pytest.param("POST", DEV, 200, "image/png", id="an image"),
    ],
)
async def test_other_responses_stay_unchanged(
    gateway: Gateway,
    fal: FakeFal,
    cdn: FalCdn,
    method: str,
    target: str,
    status: int,
    content_type: str,
) -> None:
    fal.respond = set_response(document_of(1), status, content_type, headers=TAG)
    response = await send(gateway, method, PROXY, target)
    assert (response.status, await response.text()) == (status, document_of(1))
    assert response.headers["ETag"] == '"abc"'
    assert REHOST not in response.headers
    assert cdn.request_counts == {}


@pytest.mark.parametrize(
    ("method", "target"),
    [("GET", f"{JOB}/status"), ("GET", f"{JOB}/status/stream"), ("PUT", f"{JOB}/cancel")],
)
async def test_a_poll_reaches_fal_unchanged(
    gateway: Gateway, fal: FakeFal, method: str, target: str
) -> None:
    packed = gzip.compress(document_of(1).encode())
    fal.respond = set_response(packed, headers=GZIP)
    response = await send(gateway, method, PROXY, target, Accept_Encoding="gzip, br;q=0.5")
    (seen,) = fal.seen
    assert seen.header("accept-encoding") == "gzip, br;q=0.5"
    assert await response.read() == packed
    assert response.headers["Content-Encoding"] == "gzip"


async def test_nothing_is_stored_by_default(
    make: MakeGateway, fal: FakeFal, cdn: FalCdn, disk: Disk
) -> None:
    gateway = await make(rehost="off")
    fal.respond = set_response(document_of(1), headers=TAG)
    for method, path, target in (("POST", PROXY, DEV), ("GET", PROXY, JOB)):
        response = await send(gateway, method, path, target, Accept_Encoding="gzip")
        assert await response.text() == document_of(1)
        assert response.headers["ETag"] == '"abc"'
        assert REHOST not in response.headers
    assert {seen.header("accept-encoding") for seen in fal.seen} == {"gzip"}
    assert cdn.request_counts == {}
    assert not disk.folder.exists()
    assert (await gateway.client.get(f"/files/{name_of(png())}")).status == 404


# Statuses


@pytest.mark.parametrize(
    ("paths", "expected"),
    [
        pytest.param([], None, id="no files"),
        pytest.param([PATH], "stored; count=1", id="one"),
        pytest.param([PATH, "/b.png"], "stored; count=2", id="two"),
        pytest.param(["/gone.png"], "failed", id="one that cannot be read"),
        pytest.param(["/large.mp4"], "too-large", id="one that is too large"),
        pytest.param(
            [PATH, "/large.mp4", "/gone.png"],
            "failed, too-large, stored; count=1",
            id="some of each",
        ),
    ],
)
async def test_the_header_and_the_log_have_the_statuses(
    gateway: Gateway,
    fal: FakeFal,
    cdn: FalCdn,
    caplog: pytest.LogCaptureFixture,
    paths: list[str],
    expected: str | None,
) -> None:
    cdn.put("/b.png", png(2))
    cdn.serve_at("/large.mp4", announce_length(SIZE_MAX + 1))
    fal.respond = set_response(
        json.dumps({"images": [{"url": cdn.origin + path} for path in paths]})
    )
    with caplog.at_level(logging.INFO):
        response = await result_of(gateway)
    assert response.status == 200
    assert response.headers.get(REHOST) == expected
    (fields,) = (vars(record)["fields"] for record in caplog.records if record.msg == "call")
    assert fields["rehost"] == expected
    urls = [image["url"] for image in (await response.json())["images"]]
    for path, url in zip(paths, urls, strict=True):
        assert (url == cdn.origin + path) is (path in ("/gone.png", "/large.mp4"))


async def test_a_result_above_the_limit_stays_unchanged(
    gateway: Gateway, fal: FakeFal, cdn: FalCdn
) -> None:
    body = document_of(1) + " " * DOCUMENT_MAX
    fal.respond = set_response(body)
    response = await result_of(gateway)
    assert response.headers[REHOST] == "too-large"
    assert await response.text() == body
    assert cdn.request_counts == {}


async def test_a_compressed_result_stays_unchanged(
    gateway: Gateway, fal: FakeFal, cdn: FalCdn
) -> None:
    packed = gzip.compress(document_of(1).encode())
    fal.respond = set_response(packed, headers=GZIP)
    response = await result_of(gateway)
    assert response.headers[REHOST] == "failed"
    assert await response.read() == packed


async def test_identity_does_not_count_as_compression(gateway: Gateway, fal: FakeFal) -> None:
    fal.respond = set_response(document_of(1), headers={"Content-Encoding": "identity"})
    assert await url_in(await result_of(gateway)) == stored_url(gateway)


# A storage that is down


async def test_with_the_storage_down_a_result_keeps_fal_s_url(
    gateway: Gateway, fal: FakeFal, cdn: FalCdn, disk: Disk
) -> None:
    fal.respond = set_response(document_of(1), headers=TAG)
    disk.fail()
    response = await result_of(gateway)
    assert await response.text() == document_of(1)
    assert (response.headers[REHOST], response.headers["ETag"]) == ("failed", '"abc"')
    disk.repair()
    response = await result_of(gateway)
    assert await url_in(response) == stored_url(gateway)
    assert response.headers[REHOST] == "stored; count=1"
    assert disk.names == [name_of(png())]


@pytest.fixture
async def strict(make: MakeGateway) -> Gateway:
    return await make(rehost_on_error="error")


async def test_a_strict_proxy_sends_results_with_stored_files(
    strict: Gateway, fal: FakeFal, cdn: FalCdn
) -> None:
    fal.respond = set_response(document_of(1))
    assert await url_in(await result_of(strict)) == stored_url(strict)
    fal.respond = set_response('{"seed": 1}')
    assert (await result_of(strict)).status == 200
    cdn.serve_at("/large.mp4", announce_length(SIZE_MAX + 1))
    fal.respond = set_response(document_of(1, "/large.mp4"))
    response = await result_of(strict)
    assert (await url_in(response), response.headers[REHOST]) == (
        cdn.origin + "/large.mp4",
        "too-large",
    )


@pytest.mark.parametrize("target", [JOB, f"{JOB}/response"])
async def test_a_queued_result_that_cannot_be_stored_is_a_502_by_the_strict_policy(
    strict: Gateway, fal: FakeFal, cdn: FalCdn, disk: Disk, target: str
) -> None:
    fal.respond = set_response(document_of(1))
    disk.fail()
    response = await send(strict, "GET", PROXY, target)
    assert response.status == 502
    assert (await response.json())["type"] == "rehost_failed"
    assert response.headers[REHOST] == "failed"
    assert int(response.headers["Retry-After"]) > 0
    assert "fal.media" not in await response.text()
    disk.repair()
    assert await url_in(await send(strict, "GET", PROXY, target)) == stored_url(strict)


@pytest.mark.parametrize("target", [DEV, STREAM])
async def test_a_run_whose_result_is_lost_is_not_to_be_repeated(
    strict: Gateway, fal: FakeFal, disk: Disk, target: str
) -> None:
    fal.respond = set_response(document_of(1))
    disk.fail()
    response = await send(strict, "POST", PROXY, target)
    assert response.status == 504
    assert (await response.json())["type"] == "rehost_failed"
    assert response.headers["x-fal-request-timeout-type"] == "user"
    assert response.headers[REHOST] == "failed"
    assert "Retry-After" not in response.headers
    assert "fal.media" not in await response.text()


async def test_a_run_whose_result_is_cached_may_be_repeated(
    strict: Gateway, played: PlayedFal, disk: Disk
) -> None:
    disk.fail()
    for _ in range(2):
        response = await run(strict)
        assert response.status == 502
        assert (await response.json())["type"] == "rehost_failed"
        assert "x-fal-request-timeout-type" not in response.headers
        assert "Retry-After" in response.headers
    disk.repair()
    response = await run(strict)
    assert is_hit(response)
    assert await url_in(response) == stored_url(strict)
    assert played.paid == 1


async def test_a_run_that_is_not_cacheable_is_not_to_be_repeated(
    make: MakeGateway, played: PlayedFal, disk: Disk
) -> None:
    """The result of a flagged image is not shared, so that the same call is paid for again."""
    strict = await make(rehost_on_error="error")
    flagged = json.loads(document_of(1)) | {"has_nsfw_concepts": [True]}
    played.output = lambda number: web.json_response(flagged)
    disk.fail()
    response = await run(strict)
    assert (response.status, response.headers["x-fal-request-timeout-type"]) == (504, "user")


@pytest.mark.parametrize("cache_control", ["no-cache", "max-age=0"])
async def test_a_run_that_bypasses_the_cache_is_not_to_be_repeated(
    strict: Gateway, played: PlayedFal, disk: Disk, cache_control: str
) -> None:
    disk.fail()
    response = await run(strict, Cache_Control=cache_control)
    assert (response.status, response.headers["x-fal-request-timeout-type"]) == (504, "user")


async def test_a_run_that_is_cached_briefly_is_not_to_be_repeated(
    make: MakeGateway, played: PlayedFal, disk: Disk
) -> None:
    strict = await make(rehost_on_error="error", cache_ttl=5.0)
    disk.fail()
    response = await run(strict)
    assert (response.status, response.headers["x-fal-request-timeout-type"]) == (504, "user")


@pytest.mark.parametrize("target", [DEV, STREAM])
async def test_a_strict_proxy_refuses_direct_calls_while_the_storage_is_down(
    strict: Gateway, fal: FakeFal, disk: Disk, target: str
) -> None:
    fal.respond = set_response(document_of(1))
    disk.fail()
    assert (await send(strict, "POST", PROXY, target)).status == 504
    for _ in range(3):
        response = await send(strict, "POST", PROXY, target)
        assert response.status == 503
        assert (await response.json())["type"] == "storage_unavailable"
        assert "Retry-After" in response.headers
    assert len(fal.seen) == 1
    assert (await result_of(strict)).status == 502  # results that are paid for stay available
    disk.repair()
    assert (await result_of(strict)).status == 200
    assert (await send(strict, "POST", PROXY, target)).status == 200


async def test_large_results_are_held_within_the_quota(
    gateway: Gateway, fal: FakeFal, cdn: FalCdn
) -> None:
    """Clients that do not read their responses do not use more memory than the quota."""
    pad = "x" * (SMALL_DOCUMENT_MAX + 1)
    fal.respond = set_response(json.dumps({"pad": pad, "image": {"url": cdn.origin + PATH}}))
    waiting = []
    async with asyncio.timeout(10):
        for _ in range(LARGE_DOCUMENTS_MAX // DOCUMENT_MAX + 1):
            waiting.append(await gateway.client.get(PROXY, headers={"x-fal-target-url": JOB}))
    message = [response.headers[REHOST] for response in waiting]
    for response in waiting:
        await response.read()
    assert message[0] == "stored; count=1"
    assert {*message} <= {"stored; count=1", "too-large"}
    assert (await result_of(gateway)).headers[REHOST] == "stored; count=1"


async def test_a_compressed_result_is_refused_by_the_strict_policy(
    strict: Gateway, fal: FakeFal
) -> None:
    packed = gzip.compress(document_of(1).encode())
    fal.respond = set_response(packed, headers=GZIP)
    assert (await result_of(strict)).status == 502


async def test_a_refusal_of_fal_is_a_refusal_by_the_strict_policy_too(
    strict: Gateway, fal: FakeFal, disk: Disk
) -> None:
    disk.fail()
    fal.respond = set_response(document_of(1), 422)
    response = await result_of(strict)
    assert (response.status, await response.text()) == (422, document_of(1))


# Streams


class Events:
    """A stream of fal's whose chunks the test sends."""

    def __init__(self, fal: FakeFal) -> None:
        self.pieces: asyncio.Queue[bytes] = asyncio.Queue()
        fal.respond = self.respond

    async def respond(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(
            headers={"Content-Type": "text/event-stream; charset=utf-8", "ETag": '"abc"'}
        )
        await response.prepare(request)
        while chunk := await self.pieces.get():
            await response.write(chunk)
        return response

    def send(self, *pieces: bytes) -> None:
        for chunk in pieces:
            self.pieces.put_nowait(chunk)


@pytest.fixture
def stream(fal: FakeFal) -> Events:
    return Events(fal)


def event(*urls: str, **more: object) -> bytes:
    document = {"images": [{"url": url} for url in urls]} if urls else {}
    return b"data: " + json.dumps(document | more, indent=None).encode() + b"\n\n"


async def listen(
    gateway: Gateway, path: str = PROXY, target: str | None = STREAM
) -> ClientResponse:
    headers = {"x-fal-target-url": target} if target else {}
    return await gateway.client.post(path, json={}, headers=headers)


async def read(response: ClientResponse, size: int) -> bytes:
    async with asyncio.timeout(3):
        return await response.content.readexactly(size)


async def rest_of(response: ClientResponse) -> bytes:
    async with asyncio.timeout(TIMEOUT):
        return await response.read()


STREAMED = [
    pytest.param(PROXY, STREAM, id="by header"),
    pytest.param("/api/fal/run/fal-ai/flux/dev/stream", None, id="by mount"),
]


@pytest.mark.parametrize(("path", "target"), STREAMED)
async def test_events_are_relayed_as_they_arrive_with_urls_of_stored_files(
    gateway: Gateway, cdn: FalCdn, stream: Events, path: str, target: str | None
) -> None:
    first = b': hello\r\n\r\nevent: progress\ndata: {"step" : 1.0,"image_url":"%s"}\n\n'
    first %= (cdn.origin + PATH).encode()
    second, last = event(step=2, url="data:image/jpeg;base64,AAAA"), event(cdn.origin + PATH)
    stream.send(first)
    response = await listen(gateway, path, target)
    assert await read(response, len(first)) == first
    assert cdn.request_counts == {}
    stream.send(second)
    assert await read(response, len(second)) == second
    stream.send(last, b"")
    assert await rest_of(response) == event(stored_url(gateway))
    assert response.status == 200
    assert response.content_type == "text/event-stream"
    assert not {"ETag", "Content-Length"} & response.headers.keys()
    assert await seen_at(gateway, stored_url(gateway)) == png()


async def test_events_are_rewritten_with_any_chunk_borders(
    gateway: Gateway, cdn: FalCdn, stream: Events
) -> None:
    cdn.put("/b.png", png(2))
    text = event(n=1) + event(cdn.origin + PATH, n=2) + event(cdn.origin + "/b.png", n=3)
    stream.send(*(text[cut : cut + 7] for cut in range(0, len(text), 7)), b"")
    response = await listen(gateway)
    assert await rest_of(response) == (
        event(n=1) + event(stored_url(gateway), n=2) + event(stored_url(gateway, png(2)), n=3)
    )


async def test_several_events_in_one_chunk_are_rewritten(
    gateway: Gateway, cdn: FalCdn, stream: Events
) -> None:
    url = cdn.origin + PATH
    stream.send(event(n=1) + event(url, url, n=2) + event(n=3) + event(url, n=4), b"")
    stored = stored_url(gateway)
    assert await rest_of(await listen(gateway)) == (
        event(n=1) + event(stored, stored, n=2) + event(n=3) + event(stored, n=4)
    )
    assert cdn.request_counts[PATH] == 1


async def test_a_last_event_without_a_newline_is_rewritten(
    gateway: Gateway, cdn: FalCdn, stream: Events
) -> None:
    stream.send(event(cdn.origin + PATH).rstrip(b"\n"), b"")
    assert await rest_of(await listen(gateway)) == event(stored_url(gateway)).rstrip(b"\n")


async def test_a_slow_file_delays_its_own_event_only(
    gateway: Gateway, cdn: FalCdn, stream: Events
) -> None:
    gate = RequestGate()
    url = cdn.serve_at("/slow.png", gate.serve)
    stream.send(event(n=1))
    response = await listen(gateway)
    assert await read(response, len(event(n=1))) == event(n=1)
    stream.send(event(url), event(n=2), b"")
    await wait_until(lambda: gate.waiting, seconds=TIMEOUT)
    gate.opened.set()
    assert await rest_of(response) == event(stored_url(gateway)) + event(n=2)


async def test_a_slow_file_does_not_delay_earlier_events(
    gateway: Gateway, cdn: FalCdn, stream: Events
) -> None:
    gate = RequestGate()
    url = cdn.serve_at("/slow.png", gate.serve)
    stream.send(event(n=1) + event(url))
    try:
        response = await listen(gateway)
        await wait_until(lambda: gate.waiting, seconds=TIMEOUT)
        async with asyncio.timeout(1):
            assert await response.content.readexactly(len(event(n=1))) == event(n=1)
    finally:
        gate.opened.set()
        stream.send(b"")


async def test_a_line_above_the_limit_is_relayed_and_the_next_are_rewritten(
    gateway: Gateway, cdn: FalCdn, stream: Events
) -> None:
    long = event(image="data:image/png;base64," + "iVBORw0K" * (LINE_MAX // 4))
    stream.send(event(n=1) + long, event(cdn.origin + PATH), b"")
    response = await listen(gateway)
    assert await rest_of(response) == event(n=1) + long + event(stored_url(gateway))


async def test_a_line_above_the_limit_is_not_held(gateway: Gateway, stream: Events) -> None:
    start = b'data: {"image": "data:image/png;base64,' + b"iVBORw0K" * (LINE_MAX // 4)
    stream.send(start)
    response = await listen(gateway)
    assert await read(response, LINE_MAX) == start[:LINE_MAX]
    stream.send(b'"}\n\n', b"")
    assert await rest_of(response) == start[LINE_MAX:] + b'"}\n\n'


async def test_events_keep_fal_s_url_with_the_storage_down(
    gateway: Gateway, cdn: FalCdn, stream: Events, disk: Disk
) -> None:
    disk.fail()
    stream.send(event(n=1), event(cdn.origin + PATH), b"")
    assert await rest_of(await listen(gateway)) == event(n=1) + event(cdn.origin + PATH)


async def read_until_closed(response: ClientResponse) -> bytes:
    """Return the bytes received before the connection is closed."""
    got = b""
    try:
        async with asyncio.timeout(TIMEOUT):
            while chunk := await response.content.readany():
                got += chunk
    except (ClientPayloadError, ConnectionResetError):
        return got
    pytest.fail("the stream has an orderly end")


async def test_a_strict_stream_is_closed_before_an_event_with_fal_s_url(
    strict: Gateway, cdn: FalCdn, stream: Events, disk: Disk
) -> None:
    disk.fail()
    stream.send(event(n=1))
    response = await listen(strict)
    got = await read(response, len(event(n=1)))
    stream.send(event(cdn.origin + PATH), event(n=2), b"")
    got += await read_until_closed(response)
    assert got == event(n=1)


async def test_a_stream_of_empty_lines_takes_no_time(gateway: Gateway, fal: FakeFal) -> None:
    lines = b"\n" * 2**21
    fal.respond = set_response(lines, 200, "text/event-stream")
    async with asyncio.timeout(3):
        assert await rest_of(await listen(gateway)) == lines


async def test_a_strict_stream_with_all_files_stored_is_complete(
    strict: Gateway, cdn: FalCdn, stream: Events
) -> None:
    stream.send(event(n=1), event(cdn.origin + PATH), b"")
    assert await rest_of(await listen(strict)) == event(n=1) + event(stored_url(strict))


async def test_a_compressed_stream_stays_unchanged(
    gateway: Gateway, cdn: FalCdn, fal: FakeFal
) -> None:
    packed = gzip.compress(event(cdn.origin + PATH))
    fal.respond = set_response(packed, 200, "text/event-stream", headers=GZIP)
    response = await listen(gateway)
    assert await rest_of(response) == packed
    assert response.headers[REHOST] == "failed"


# Cached results


async def test_a_cached_result_has_the_url_of_the_stored_file_on_every_route(
    gateway: Gateway, played: PlayedFal, cdn: FalCdn
) -> None:
    expected = document_of(1).replace(cdn.origin + PATH, stored_url(gateway))
    first = await run(gateway)
    assert (await first.text(), first.headers[REHOST]) == (expected, "stored; count=1")
    await until_kept(gateway)
    hit = await run(gateway)
    assert is_hit(hit)
    assert await hit.text() == expected
    assert hit.headers["Content-Length"] == str(len(expected))
    request_id = await id_of(await submit(gateway))
    for verb in ("", "/response"):
        assert await (await request_about(gateway, request_id, verb)).text() == expected
    mounted = f"/api/fal/queue/{KONTEXT.rpartition('/')[0]}/requests/{request_id}"
    assert await (await gateway.client.get(mounted)).text() == expected
    assert (played.paid, cdn.request_counts[PATH]) == (1, 1)


async def test_a_result_is_cached_before_its_files_are_stored(
    make: MakeGateway, played: PlayedFal, cdn: FalCdn
) -> None:
    """The cache entry must not wait for the transfer: the process may die meanwhile."""
    gate = RequestGate()
    cdn.serve_at(PATH, gate.serve)
    first, second = await make(), await make()  # two processes, from the store's point of view
    running = asyncio.ensure_future(run(first))
    await wait_until(lambda: bool(gate.waiting), seconds=TIMEOUT)
    async with asyncio.timeout(TIMEOUT):
        while (await submit(second, Cache_Control="only-if-cached")).status != 200:
            await asyncio.sleep(0.02)
    assert not running.done()
    gate.opened.set()
    assert await url_in(await running) == stored_url(first)
    assert played.paid == 1


async def test_a_cached_result_outlives_the_file_at_fal(
    make: MakeGateway, played: PlayedFal, cdn: FalCdn
) -> None:
    first = await make()
    await run(first)
    await until_kept(first)
    await first.client.close()
    cdn.files.clear()
    second = await make()
    hit = await run(second)
    assert is_hit(hit)
    assert await url_in(hit) == stored_url(second)
    assert await seen_at(second, stored_url(second)) == png()
    assert (played.paid, cdn.request_counts[PATH]) == (1, 1)


async def test_calls_that_share_a_job_store_its_file_once(
    gateway: Gateway, played: PlayedFal, cdn: FalCdn, disk: Disk
) -> None:
    played.hold()
    async with asyncio.TaskGroup() as group:
        runs = [group.create_task(run(gateway)) for _ in range(5)]
        submits = [group.create_task(submit(gateway)) for _ in range(5)]
        await wait_until(lambda: played.paid, seconds=TIMEOUT)
        await asyncio.sleep(0.1)
        played.release()
    results = [task.result() for task in runs]
    results += [await outcome(gateway, task.result()) for task in submits]
    assert {await url_in(result) for result in results} == {stored_url(gateway)}
    assert (played.paid, cdn.request_counts[PATH]) == (1, 1)
    assert disk.names == [name_of(png())]


async def test_a_queued_job_s_result_is_reused_with_the_stored_file(
    gateway: Gateway, played: PlayedFal, cdn: FalCdn
) -> None:
    result = await outcome(gateway, await submit(gateway))
    assert await url_in(result) == stored_url(gateway)
    await until_kept(gateway)
    hit = await run(gateway)
    assert is_hit(hit)
    assert await url_in(hit) == stored_url(gateway)
    assert (played.paid, cdn.request_counts[PATH]) == (1, 1)


@pytest.mark.parametrize("how", ["run", "submit"])
async def test_a_file_that_failed_is_stored_when_its_cached_result_is_sent(
    gateway: Gateway, played: PlayedFal, cdn: FalCdn, disk: Disk, how: str
) -> None:
    disk.fail()
    first = await run(gateway)
    assert (await url_in(first), first.headers[REHOST]) == (cdn.origin + PATH, "failed")
    await until_kept(gateway)
    request_id = await id_of(await submit(gateway))
    assert await url_in(await request_about(gateway, request_id)) == cdn.origin + PATH
    disk.repair()
    if how == "run":
        response = await run(gateway)
        assert is_hit(response)
    else:
        response = await request_about(gateway, request_id)
    assert await url_in(response) == stored_url(gateway)
    assert response.headers[REHOST] == "stored; count=1"
    assert played.paid == 1


async def test_a_result_whose_leader_died_is_cached_with_its_stored_file(
    make: MakeGateway, played: PlayedFal, cdn: FalCdn
) -> None:
    first = await make()
    played.hold()
    fal_id = await id_of(await submit(first))
    await first.client.close()
    played.release()
    second = await make()
    assert await url_in(await request_about(second, fal_id)) == stored_url(second)
    hit = await run(second)
    assert is_hit(hit)
    assert await url_in(hit) == stored_url(second)
    assert (played.paid, cdn.request_counts[PATH]) == (1, 1)


async def test_no_client_s_host_is_in_another_client_s_response(
    gateway: Gateway, played: PlayedFal
) -> None:
    name = name_of(png())
    first = await run(gateway, Host="evil.example")
    assert await url_in(first) == f"http://evil.example/files/{name}"
    await until_kept(gateway)
    hit = await run(gateway, Host="good.example", X_Forwarded_Proto="https")
    assert is_hit(hit)
    assert await url_in(hit) == f"https://good.example/files/{name}"
    request_id = await id_of(await submit(gateway, Host="evil.example"))
    assert await url_in(await request_about(gateway, request_id)) == stored_url(gateway)


@pytest.mark.parametrize("content_type", ["text/plain", "text/json"])
async def test_no_response_contains_the_local_origin(
    gateway: Gateway, played: PlayedFal, content_type: str
) -> None:
    played.output = lambda number: web.Response(text=document_of(number), content_type=content_type)
    for _ in range(2):
        response = await run(gateway)
        assert STAND_IN not in await response.text()
    request_id = await id_of(await submit(gateway))
    assert STAND_IN not in await (await request_about(gateway, request_id)).text()


async def test_results_with_local_files_are_not_shared_with_other_proxies(
    make: MakeGateway, played: PlayedFal, cdn: FalCdn
) -> None:
    """Another proxy with the same store does not serve these URLs."""
    keeping = await make()
    await run(keeping)
    await until_kept(keeping)
    other = await make(rehost="off")
    assert await url_in(await run(other)) == cdn.origin + PATH
    assert played.paid == 2


# The disk backend


@pytest.mark.parametrize(
    ("headers", "base"),
    [
        pytest.param({"Host": "proxy.example:8443"}, "http://proxy.example:8443", id="by host"),
        pytest.param(
            {"Host": "proxy.example", "X-Forwarded-Proto": "https"},
            "https://proxy.example",
            id="behind a load balancer",
        ),
        pytest.param(
            {"Host": "proxy.example", "X-Forwarded-Proto": "javascript"},
            "http://proxy.example",
            id="a scheme that is none",
        ),
        pytest.param({"Host": '"evil'}, "http://localhost", id="a host that is none"),
    ],
)
async def test_stored_files_have_the_host_that_the_client_uses(
    gateway: Gateway, fal: FakeFal, stream: Events, headers: dict[str, str], base: str
) -> None:
    name = name_of(png())
    stream.send(event(f"https://v3.fal.media{PATH}"), b"")
    response = await gateway.call(STREAM, json={}, headers=[*headers.items()])
    assert await rest_of(response) == event(f"{base}/files/{name}")
    fal.respond = set_response(document_of(1))
    response = await gateway.call(JOB, "GET", headers=[*headers.items()])
    assert await url_in(response) == f"{base}/files/{name}"


async def test_the_public_url_overrides_the_client_s_host(make: MakeGateway, fal: FakeFal) -> None:
    fal.respond = set_response(document_of(1))
    gateway = await make(public_url="https://a.example/ai")
    response = await result_of(gateway, Host="evil.example", X_Forwarded_Proto="http")
    assert await url_in(response) == f"https://a.example/ai/files/{name_of(png())}"


Client = TestClient[web.Request, web.Application]


async def embedded(
    aiohttp_client: AiohttpClient, fal: FakeFal, folder: Path, prefix: str, nested: str
) -> Client:
    """The proxy in another application, which may be mounted below a prefix."""
    settings = make_settings(
        fal_key=CANARY, upstream_origin=fal.origin, rehost="disk", data_dir=folder
    )
    inner = web.Application(handler_args={"handler_cancellation": True})
    falproxy.setup(inner, settings, prefix=prefix)
    app = inner
    for path in nested.split():
        app = web.Application(handler_args={"handler_cancellation": True})
        app.add_subapp(path, inner)
        inner = app
    return await aiohttp_client(app)


@pytest.mark.parametrize(
    ("prefix", "nested", "at"),
    [
        pytest.param("", "", "", id="at the root"),
        pytest.param("/ai", "", "/ai", id="below a prefix"),
        pytest.param("/ai/", "", "/ai", id="a slash at the end"),
        pytest.param("", "/inner", "/inner", id="nested"),
        pytest.param("/ai", "/inner", "/inner/ai", id="nested with a prefix"),
        pytest.param("/ai", "/inner /outer", "/outer/inner/ai", id="nested twice"),
    ],
)
async def test_an_embedded_proxy_serves_its_files_below_its_prefix(
    aiohttp_client: AiohttpClient,
    fal: FakeFal,
    tmp_path: Path,
    prefix: str,
    nested: str,
    at: str,
) -> None:
    client = await embedded(aiohttp_client, fal, tmp_path, prefix, nested)
    ours = f"{fal.origin}/files/a.png"  # where the sandbox would have it

    async def respond(request: web.Request) -> web.StreamResponse:
        if request.path == "/files/a.png":
            return web.Response(body=png(), content_type="image/png")
        return web.json_response({"images": [{"url": ours}]})

    fal.respond = respond
    response = await client.post(at + PROXY, json={}, headers={"x-fal-target-url": DEV})
    url = await url_in(response)
    assert url == f"{str(client.make_url('/')).rstrip('/')}{at}/files/{name_of(png())}"
    file = await client.session.get(url)
    assert (file.status, await file.read()) == (200, png())


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"<html><script>alert(1)</script>", id="a page"),
        pytest.param(b'<svg xmlns="http://www.w3.org/2000/svg"/>', id="a drawing"),
        pytest.param(b"GIF89a/*<html>*/=1;alert(1)", id="an image and a script"),
    ],
)
async def test_executable_files_are_served_such_that_browsers_do_not_run_them(
    gateway: Gateway, fal: FakeFal, cdn: FalCdn, content: bytes
) -> None:
    cdn.put("/page.html", content)
    fal.respond = set_response(document_of(1, "/page.html"))
    url = await url_in(await result_of(gateway))
    async with gateway.client.session.get(url) as file:
        is_gif = content.startswith(b"GIF")
        assert file.headers["Content-Type"] == (
            "image/gif" if is_gif else "application/octet-stream"
        )
        assert file.headers["X-Content-Type-Options"] == "nosniff"
        assert file.headers["Content-Security-Policy"] == "default-src 'none'; sandbox"
        assert await file.read() == content


# Outputs as inputs


async def test_a_stored_file_is_a_valid_input(
    aiohttp_client: AiohttpClient, played: PlayedFal, fal: FakeFal, tmp_path: Path
) -> None:
    image, ours = real_png(), f"{fal.origin}/files/a.png"
    played.output = lambda number: web.json_response({"images": [{"url": ours}], "seed": number})
    respond_to_calls = fal.respond

    async def respond(request: web.Request) -> web.StreamResponse:
        if request.path == "/files/a.png":
            return web.Response(body=image, content_type="image/png")
        return await respond_to_calls(request)

    fal.respond = respond
    port = free_port()
    settings = make_settings(
        fal_key=CANARY,
        upstream_origin=fal.origin,
        rehost="disk",
        public_url=f"http://127.0.0.1:{port}",
        data_dir=tmp_path,
    )
    client = await aiohttp_client(falproxy.create_app(settings), server_kwargs={"port": port})
    gateway = Gateway(client, f"http://127.0.0.1:{port}")
    url = await url_in(await run(gateway))
    assert url == stored_url(gateway, image)
    made = await run(gateway, CAT | {"image_url": url})
    assert cache_status(made) == {"fwd": "miss", "stored": ""}, "its bytes were read"
    (_, sent) = (seen.body for seen in fal.seen if seen.method == "POST")
    assert json.loads(sent) == CAT | {"image_url": url}
    data = f"data:image/png;base64,{base64.b64encode(image).decode()}"
    again = await run(gateway, CAT | {"image_url": data})
    assert is_hit(again)
    assert await again.read() == await made.read()
    assert played.paid == 2


# The Supabase backend


@pytest.fixture
async def supabase() -> AsyncIterator[FakeSupabase]:
    async with FakeSupabase() as running:
        yield running


def project(fake: FakeSupabase, **given: object) -> dict[str, object]:
    settings = {"supabase_url": fake.url, "supabase_key": fake.service_key, "rehost": "auto"}
    return settings | given


async def response_at(url: str) -> httpx.Response:
    async with httpx.AsyncClient(trust_env=False) as client:
        return await client.get(url)


async def test_a_project_s_bucket_has_the_files(
    make: MakeGateway, played: PlayedFal, cdn: FalCdn, supabase: FakeSupabase
) -> None:
    gateway = await make(**project(supabase))
    expected = f"{supabase.url}/storage/v1/object/public/fal_images/{name_of(png())}"
    assert await url_in(await run(gateway)) == expected
    response = await response_at(expected)
    assert (response.content, response.headers["content-type"]) == (png(), "image/png")
    await until_kept(gateway)
    assert await url_in(await run(gateway, Host="other.example")) == expected
    assert (played.paid, len(supabase.objects("fal_images"))) == (1, 1)
    assert (await gateway.client.get(f"/files/{name_of(png())}")).status == 404


async def test_a_project_that_refuses_leaves_fal_s_url(
    make: MakeGateway, fal: FakeFal, cdn: FalCdn, supabase: FakeSupabase
) -> None:
    gateway = await make(**project(supabase))
    fal.respond = set_response(document_of(1))
    supabase.fail(supabase_faults.fail_with(NO_POLICY), method="POST", path="/object/fal_images/")
    response = await result_of(gateway)
    assert (await response.text(), response.headers[REHOST]) == (document_of(1), "failed")
    assert (await result_of(gateway)).headers[REHOST] == "stored; count=1"


async def test_a_cached_result_has_a_valid_signed_url(
    make: MakeGateway, played: PlayedFal, cdn: FalCdn, supabase: FakeSupabase
) -> None:
    gateway = await make(**project(supabase, supabase_signed_urls=4.0))
    first = await url_in(await run(gateway))
    assert "/object/sign/fal_images/" in first
    assert (await response_at(first)).content == png()
    await until_kept(gateway)
    await asyncio.sleep(2.05)  # more than half of its time
    supabase.elapse(5)
    assert (await response_at(first)).status_code == 400
    hit = await run(gateway)
    assert is_hit(hit)
    assert (await response_at(await url_in(hit))).content == png()


# Disconnects and shutdown


async def test_a_file_is_stored_although_the_client_disconnected(
    gateway: Gateway, fal: FakeFal, cdn: FalCdn, disk: Disk
) -> None:
    gate = RequestGate()
    cdn.serve_at("/slow.png", gate.serve)
    fal.respond = set_response(document_of(1, "/slow.png"))
    cancelled = asyncio.ensure_future(result_of(gateway))
    await wait_until(lambda: gate.waiting, seconds=TIMEOUT)
    cancelled.cancel()
    await asyncio.sleep(0.1)
    assert gate.waiting
    gate.opened.set()
    await wait_until(lambda: disk.names == [name_of(png())], seconds=TIMEOUT)
    assert await url_in(await result_of(gateway)) == stored_url(gateway)
    assert cdn.request_counts["/slow.png"] == 1


async def test_running_transfers_complete_before_the_proxy_ends(
    gateway: Gateway, fal: FakeFal, cdn: FalCdn, disk: Disk
) -> None:
    gate = RequestGate()
    cdn.serve_at("/slow.png", gate.serve)
    fal.respond = set_response(document_of(1, "/slow.png"))
    cancelled = asyncio.ensure_future(result_of(gateway))
    await wait_until(lambda: gate.waiting, seconds=TIMEOUT)
    cancelled.cancel()
    closing = asyncio.ensure_future(gateway.client.close())
    await asyncio.sleep(0.1)
    assert not closing.done()
    gate.opened.set()
    await closing
    assert disk.names == [name_of(png())]


async def test_the_proxy_starts_with_an_unusable_folder(
    make: MakeGateway, fal: FakeFal, disk: Disk
) -> None:
    disk.fail()
    gateway = await make()
    fal.respond = set_response(document_of(1))
    assert (await result_of(gateway)).headers[REHOST] == "failed"
