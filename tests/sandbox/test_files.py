"""The offline CDN: downloads from any origin, and the uploads of both fal clients."""

import hashlib
import io
import threading
import time
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime
from urllib.parse import urlsplit

import fal_client
import pytest
from aiohttp import web
from aiohttp.pytest_plugin import AiohttpClient
from fal_client.client import AsyncMultipartUpload

from falproxy.sandbox import Sandbox, cdn, create_app, create_cdn
from falproxy.sandbox.files import FileStore
from tests.support.offline_fal import (
    DEV,
    KEY,
    KONTEXT,
    SMALL,
    OfflineFal,
    offline_fal,
    png,
    result_image,
)

REST = "/rest.fal.ai/storage"


@pytest.fixture
async def fal(aiohttp_client: AiohttpClient) -> OfflineFal:
    return await offline_fal(aiohttp_client)


async def initiate(fal: OfflineFal, operation: str = "initiate") -> tuple[str, str]:
    """Initiate an upload and return its upload URL and file URL."""
    url = f"{REST}/upload/{operation}?storage_type=fal-cdn-v3"
    body = {"content_type": "image/png", "file_name": "my cat.png"}
    response = await fal.client.post(url, json=body, headers=KEY)
    assert response.status == 200
    document = await response.json()
    return document["upload_url"], document["file_url"]


async def upload(fal: OfflineFal, content: bytes, content_type: str = "image/png") -> str:
    """Upload a file as the JavaScript client does and return its URL."""
    upload_url, file_url = await initiate(fal)
    headers = {"Content-Type": content_type}
    response = await fal.client.session.put(upload_url, data=content, headers=headers)
    assert response.status == 200
    return file_url


async def token_headers(fal: OfflineFal) -> dict[str, str]:
    """Return the Authorization of an upload by the Python client."""
    url = f"{REST}/auth/token?storage_type=fal-cdn-v3"
    document = await (await fal.client.post(url, json={}, headers=KEY)).json()
    return {"Authorization": f"{document['token_type']} {document['token']}"}


async def test_an_uploaded_file_can_be_downloaded(fal: OfflineFal) -> None:
    response = await fal.client.session.get(await upload(fal, png()))
    assert response.headers["Content-Type"] == "image/png"
    assert response.headers["X-Content-Type-Options"] == "nosniff"
    assert await response.read() == png()


async def test_a_file_url_ends_in_the_name_made_safe_for_urls(fal: OfflineFal) -> None:
    _, file_url = await initiate(fal)
    assert file_url.startswith(f"{fal.sandbox.public_url}/files/b/")
    assert file_url.endswith("/my_cat.png")


async def test_the_content_type_of_the_put_takes_precedence(fal: OfflineFal) -> None:
    url = await upload(fal, b"hello", "text/plain")
    async with fal.client.session.get(url) as response:
        assert response.headers["Content-Type"] == "text/plain"


@pytest.mark.parametrize("host", ["v3.fal.media", "v3b.fal.media", "fal.media"])
async def test_the_cdn_hosts_serve_the_files_too(fal: OfflineFal, host: str) -> None:
    path = urlsplit(await upload(fal, png())).path
    for spelling in (path, path.replace("/files/b/", "/files/")):
        response = await fal.client.get(spelling, headers={"Host": host})
        assert (response.status, await response.read()) == (200, png())


async def test_a_head_request_returns_the_size(fal: OfflineFal) -> None:
    response = await fal.client.session.head(await upload(fal, png()))
    assert response.headers["Content-Length"] == str(len(png()))
    assert await response.read() == b""


async def test_a_range_of_a_file_can_be_requested(fal: OfflineFal) -> None:
    url = await upload(fal, b"0123456789", "text/plain")
    response = await fal.client.session.get(url, headers={"Range": "bytes=2-4"})
    assert response.status == 206
    assert response.headers["Content-Range"] == "bytes 2-4/10"
    assert await response.read() == b"234"


async def test_every_origin_may_download_and_upload(fal: OfflineFal) -> None:
    upload_url, _ = await initiate(fal)
    headers = {
        "Origin": "https://app.example",
        "Access-Control-Request-Method": "PUT",
        "Access-Control-Request-Headers": "content-type",
    }
    preflight = await fal.client.session.options(upload_url, headers=headers)
    assert preflight.status == 200
    assert preflight.headers["Access-Control-Allow-Origin"] == "https://app.example"
    assert "PUT" in preflight.headers["Access-Control-Allow-Methods"]
    url = await upload(fal, png())
    async with fal.client.session.get(url, headers={"Origin": "https://x"}) as download:
        assert download.headers["Access-Control-Allow-Origin"] == "https://x"


async def test_uploaded_html_is_served_with_a_sandbox_policy(fal: OfflineFal) -> None:
    url = await upload(fal, b"<script>1</script>", "text/html")
    async with fal.client.session.get(url) as response:
        assert "sandbox" in response.headers["Content-Security-Policy"]


@pytest.mark.parametrize("path", ["/files/b/x/y.png", "/files/x/y.png", "/files/b/../../etc"])
async def test_an_unknown_file_is_a_404(fal: OfflineFal, path: str) -> None:
    assert (await fal.client.get(path)).status == 404


async def test_a_wrong_signature_is_refused(fal: OfflineFal) -> None:
    upload_url, file_url = await initiate(fal)
    url = upload_url.partition("?")[0]
    assert (await fal.client.session.put(f"{url}?signature=x", data=png())).status == 403
    assert (await fal.client.session.put(url, data=png())).status == 403
    assert (await fal.client.session.get(file_url)).status == 404


async def test_initiating_an_upload_requires_a_key(fal: OfflineFal) -> None:
    response = await fal.client.post(f"{REST}/upload/initiate", json={})
    assert response.status == 401


async def test_a_file_that_is_too_large_is_a_413(
    fal: OfflineFal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cdn, "UPLOAD_MAX", 1000)
    upload_url, _ = await initiate(fal)
    assert (await fal.client.session.put(upload_url, data=b"x" * 1001)).status == 413


async def test_the_javascript_client_uploads_in_parts(fal: OfflineFal) -> None:
    upload_url, file_url = await initiate(fal, "initiate-multipart")
    parts = urlsplit(upload_url)
    root = f"{parts.scheme}://{parts.netloc}{parts.path}"
    session, uploaded = fal.client.session, []
    for number, content in enumerate((b"one ", b"two ", b"three"), start=1):
        response = await session.put(f"{root}/{number}?{parts.query}", data=content)
        part = await response.json()
        assert part["partNumber"] == number
        assert response.headers["ETag"] == f'"{part["etag"]}"'
        assert part["etag"] == hashlib.md5(content, usedforsecurity=False).hexdigest()
        uploaded.append(part)
    response = await session.post(f"{root}/complete?{parts.query}", json={"parts": uploaded})
    assert response.status == 200
    assert await (await session.get(file_url)).read() == b"one two three"


async def test_parts_that_are_too_large_together_are_a_413(
    fal: OfflineFal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cdn, "UPLOAD_MAX", 1000)
    upload_url, _ = await initiate(fal, "initiate-multipart")
    for number in (1, 2):
        url = upload_url.replace("?", f"/{number}?")
        assert (await fal.client.session.put(url, data=b"x" * 600)).status == 200
    body = {"parts": [{"partNumber": 1}, {"partNumber": 2}]}
    url = upload_url.replace("?", "/complete?")
    assert (await fal.client.session.post(url, json=body)).status == 413


async def test_a_file_that_is_replaced_counts_once_towards_the_limit(store: FileStore) -> None:
    key = put(store, b"x" * 60)
    for _ in range(3):
        store.put(key, io.BytesIO(b"y" * 60), "text/plain")
    other = put(store, b"z" * 30)
    assert store.get(key) is not None
    assert store.get(other) is not None


@pytest.mark.parametrize(
    "body",
    [
        pytest.param({"parts": [{"partNumber": 7, "etag": "x"}]}, id="never uploaded"),
        pytest.param({"parts": [{}]}, id="part without a number"),
        pytest.param({"parts": 3}, id="not a list"),
    ],
)
async def test_invalid_parts_are_a_400(fal: OfflineFal, body: object) -> None:
    upload_url, _ = await initiate(fal, "initiate-multipart")
    url = upload_url.replace("?", "/complete?")
    assert (await fal.client.session.post(url, json=body)).status == 400


async def test_the_upload_token_includes_the_upload_url(fal: OfflineFal) -> None:
    response = await fal.client.post(f"{REST}/auth/token", json={}, headers=KEY)
    document = await response.json()
    assert set(document) == {"token", "token_type", "base_url", "expires_at"}
    assert document["base_url"] == fal.sandbox.public_url
    assert datetime.fromisoformat(document["expires_at"]) > datetime.now(UTC)


@pytest.mark.parametrize("path", ["/files/upload", "/files/upload/multipart"])
async def test_an_upload_without_a_token_is_refused(fal: OfflineFal, path: str) -> None:
    assert (await fal.client.post(path, data=b"x", headers=KEY)).status == 401


async def test_the_upload_host_accepts_a_token(fal: OfflineFal) -> None:
    headers = {
        **await token_headers(fal),
        "Host": "v3.fal.media",
        "Content-Type": "image/png",
        "X-Fal-File-Name": "../a b.png",
    }
    response = await fal.client.post("/files/upload", data=png(), headers=headers)
    url = (await response.json())["access_url"]
    assert url.endswith("/_a_b.png")
    assert await (await fal.client.session.get(url)).read() == png()


@pytest.fixture
async def python_client(
    fal: OfflineFal, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[fal_client.AsyncClient]:
    """Return the real fal_client, configured for the sandbox."""
    root = fal.sandbox.public_url
    monkeypatch.setattr("fal_client.client.REST_URL", f"{root}/rest.fal.ai")
    monkeypatch.setattr("fal_client.client.CDN_URL", f"{root}/v3.fal.media")
    monkeypatch.setattr("fal_client.client.RUN_URL_FORMAT", f"{root}/fal.run/")
    client = fal_client.AsyncClient(key="id:secret")
    yield client
    await (await client._client).aclose()


async def test_fal_client_uploads(fal: OfflineFal, python_client: fal_client.AsyncClient) -> None:
    url = await python_client.upload(png(), "image/png", file_name="cat.png")
    response = await fal.client.session.get(url)
    assert response.headers["Content-Type"] == "image/png"
    assert await response.read() == png()


async def test_fal_client_falls_back_to_the_storage_upload(
    fal: OfflineFal, python_client: fal_client.AsyncClient
) -> None:
    url = await python_client.upload(png(), "image/png", repository="fal")
    assert await (await fal.client.session.get(url)).read() == png()


async def test_fal_client_uploads_in_parts(
    fal: OfflineFal, python_client: fal_client.AsyncClient
) -> None:
    content = bytes(range(256)) * 40
    url = await AsyncMultipartUpload.save(
        client=await python_client._client,
        token_manager=await python_client._token_manager,
        file_name="big.bin",
        data=content,
        content_type="application/x-big",
        chunk_size=3000,
    )
    response = await fal.client.session.get(url)
    assert response.headers["Content-Type"] == "application/x-big"
    assert await response.read() == content


async def test_fal_client_edits_an_uploaded_image(
    fal: OfflineFal, python_client: fal_client.AsyncClient
) -> None:
    url = await python_client.upload(png(size=(600, 200)), "image/png")
    result = await python_client.run(KONTEXT, {"prompt": "x", "image_url": url})
    assert (result["images"][0]["width"], result["images"][0]["height"]) == (600, 200)


async def test_the_cdn_can_be_mounted_below_a_prefix(aiohttp_client: AiohttpClient) -> None:
    sandbox = Sandbox(speed=1000)
    outer = web.Application()
    outer.add_subapp("/sandbox", create_cdn(sandbox))
    front, back = await aiohttp_client(outer), await aiohttp_client(create_app(sandbox))
    sandbox.public_url = str(front.make_url("/sandbox"))
    fal = OfflineFal(sandbox, back)
    result = await fal.run(DEV, {"prompt": "x", "image_size": SMALL})
    assert (await result_image(fal, result)).size == (64, 64)
    assert await (await front.session.get(await upload(fal, png()))).read() == png()
    url = (await result.json())["images"][0]["url"]
    async with front.session.get(url) as response:
        assert response.headers["x-falproxy-sandbox"] == "1"


@pytest.mark.parametrize("path", ["/sandbox/fal.run/fal-ai/flux/dev", "/sandbox/sandbox/state"])
async def test_the_cdn_application_serves_nothing_else(
    aiohttp_client: AiohttpClient, path: str
) -> None:
    outer = web.Application()
    outer.add_subapp("/sandbox", create_cdn(Sandbox()))
    assert (await (await aiohttp_client(outer)).get(path, headers=KEY)).status == 404


@pytest.fixture
def store() -> Iterator[FileStore]:
    files = FileStore(total_max=100)
    files.open()
    yield files
    files.close()


def put(store: FileStore, content: bytes) -> str:
    key = store.new_key("x")
    store.put(key, io.BytesIO(content), "text/plain")
    return key


def test_the_oldest_files_are_removed_above_the_limit(store: FileStore) -> None:
    keys = [put(store, b"x" * 40) for _ in range(4)]
    assert [store.get(key) is not None for key in keys] == [False, False, True, True]


def test_the_last_close_removes_the_files(store: FileStore) -> None:
    store.open()
    file = store.get(put(store, b"x"))
    assert file is not None
    store.close()
    assert file.path.exists()
    store.close()
    assert not file.path.exists()
    store.open()


@pytest.mark.parametrize(
    ("name", "safe_name"),
    [
        pytest.param("cat.png", "cat.png", id="safe already"),
        pytest.param("../../etc/passwd", "_.._etc_passwd", id="a path"),
        pytest.param("käse.png", "k_se.png", id="not ASCII"),
        pytest.param("", "file", id="empty"),
        pytest.param("x" * 300, "x" * 100, id="too long"),
    ],
)
def test_names_are_made_safe(store: FileStore, name: str, safe_name: str) -> None:
    assert store.new_key(name).partition("/")[2] == safe_name


def test_a_thread_that_stores_files_does_not_keep_the_directory() -> None:
    store = FileStore()
    store.open()
    root = store._root()
    errors: list[Exception] = []

    def put_until_closed() -> None:
        try:
            while True:
                store.put(store.new_key("a.png"), io.BytesIO(b"x" * 1000), "image/png")
        except (OSError, RuntimeError) as error:
            errors.append(error)

    threads = [threading.Thread(target=put_until_closed) for _ in range(4)]
    for thread in threads:
        thread.start()
    while len(store._files) < 50:
        time.sleep(0.001)
    store.close()
    for thread in threads:
        thread.join(10)
    assert len(errors) == 4
    assert not list(root.parent.glob(f"{root.name}*"))
