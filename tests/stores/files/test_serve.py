"""`/files/`: the responses for stored files, and for other paths."""

import asyncio
import errno
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from aiohttp import ClientPayloadError, web
from aiohttp.pytest_plugin import AiohttpClient
from aiohttp.test_utils import TestClient

from falproxy.media.content_type import sniff_content_type
from falproxy.stores.files.disk import DiskStorage, find_file
from falproxy.stores.files.serve import NO_STORE, SECURITY_HEADERS
from tests.support.storages import body, file_of, file_server, files_in, large_file

PNG = body(300_000, b"\x89PNG\r\n\x1a\n")
NAME = file_of(PNG).name
TAG = f'"{NAME.partition(".")[0]}"'
SIZE = len(PNG)

Client = TestClient[web.Request, web.Application]


@pytest.fixture
async def storage(tmp_path: Path) -> AsyncIterator[DiskStorage]:
    async with DiskStorage(tmp_path / "files", str) as storage:
        await storage.put(file_of(PNG))
        yield storage


@pytest.fixture
async def client(storage: DiskStorage, aiohttp_client: AiohttpClient) -> Client:
    return await aiohttp_client(file_server(storage))


async def test_a_file_is_served_as_immutable_and_public(client: Client) -> None:
    response = await client.get(f"/files/{NAME}")
    assert response.status == 200
    assert await response.read() == PNG
    headers = {name.lower(): value for name, value in response.headers.items()}
    assert {name: headers[name] for name in headers.keys() - {"date", "server"}} == {
        "accept-ranges": "bytes",
        "access-control-allow-origin": "*",
        "access-control-expose-headers": "Accept-Ranges, Content-Range, ETag",
        "cache-control": "public, max-age=31536000, immutable",
        "content-length": str(SIZE),
        "content-security-policy": "default-src 'none'; sandbox",
        "content-type": "image/png",
        "cross-origin-resource-policy": "cross-origin",
        "etag": TAG,
        "x-content-type-options": "nosniff",
    }


@pytest.mark.parametrize("part", [0, 1, 2], ids=["the first folder", "the second", "the file"])
async def test_symbolic_links_are_not_followed(
    client: Client, storage: DiskStorage, tmp_path: Path, part: int
) -> None:
    path = tmp_path / "files" / NAME[:2] / NAME[2:4] / NAME
    moved = [path.parent.parent, path.parent, path][part]
    moved.rename(tmp_path / "elsewhere")
    moved.symlink_to(tmp_path / "elsewhere")
    response = await client.get(f"/files/{NAME}")
    assert response.status == 404
    assert storage.size(NAME) is None
    with pytest.raises((FileNotFoundError, NotADirectoryError)):
        storage.read(NAME, 0, 10)
    assert find_file(tmp_path / "files", f"http://a/files/{NAME}") is None


async def test_a_link_to_the_whole_folder_is_followed(
    storage: DiskStorage, tmp_path: Path, aiohttp_client: AiohttpClient
) -> None:
    """An operator may store the files on another disk."""
    (tmp_path / "files").rename(tmp_path / "disk")
    (tmp_path / "files").symlink_to(tmp_path / "disk")
    client = await aiohttp_client(file_server(storage))
    assert await (await client.get(f"/files/{NAME}")).read() == PNG


async def test_a_stored_file_replaces_a_symbolic_link(
    client: Client, storage: DiskStorage, tmp_path: Path
) -> None:
    path = tmp_path / "files" / NAME[:2] / NAME[2:4] / NAME
    secret = tmp_path / "secret"
    secret.write_bytes(b"x" * SIZE)
    path.unlink()
    path.symlink_to(secret)
    await storage.put(file_of(PNG))
    assert await (await client.get(f"/files/{NAME}")).read() == PNG
    assert secret.read_bytes() == b"x" * SIZE


async def test_a_named_pipe_is_not_read(client: Client, tmp_path: Path) -> None:
    path = tmp_path / "files" / NAME[:2] / NAME[2:4] / NAME
    path.unlink()
    os.mkfifo(path)
    assert (await client.get(f"/files/{NAME}")).status == 404


async def test_head_is_get_without_the_body(client: Client) -> None:
    full, head = await client.get(f"/files/{NAME}"), await client.head(f"/files/{NAME}")
    assert head.status == 200
    assert await head.read() == b""
    assert dict(head.headers) | {"Date": ""} == dict(full.headers) | {"Date": ""}
    assert (await get_raw(client, f"/files/{NAME}", "HEAD"))[2] == ""


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"<!doctype html><script>alert(1)</script>", id="HTML"),
        pytest.param(b'<svg xmlns="http://www.w3.org/2000/svg" onload="alert(1)"/>', id="SVG"),
        pytest.param(b"\n<html>\x89PNG\r\n\x1a\n", id="HTML with an image's signature in it"),
        pytest.param(b"%PDF-1.7", id="PDF"),
        pytest.param(b"alert(1)", id="JavaScript"),
    ],
)
async def test_executable_types_are_served_as_bytes(
    client: Client, storage: DiskStorage, content: bytes
) -> None:
    url = await storage.put(file_of(content, *sniff_content_type(content)))
    response = await client.get(url)
    assert await response.read() == content
    assert response.headers["Content-Type"] == "application/octet-stream"
    assert SECURITY_HEADERS.items() <= dict(response.headers).items()


@pytest.mark.parametrize(
    ("content", "content_type"),
    [
        pytest.param(b"\0\0\0\x20ftypisom", "video/mp4", id="a video"),
        pytest.param(b"ID3\x04", "audio/mpeg", id="a sound"),
    ],
)
@pytest.mark.parametrize("headers", [{}, {"Range": "bytes=0-1"}], ids=["whole", "a part"])
async def test_media_can_be_opened_in_a_browser(
    client: Client,
    storage: DiskStorage,
    content: bytes,
    content_type: str,
    headers: dict[str, str],
) -> None:
    url = await storage.put(file_of(content, *sniff_content_type(content)))
    response = await client.get(url, headers=headers)
    assert response.headers["Content-Type"] == content_type
    policy = response.headers["Content-Security-Policy"]
    assert policy == "default-src 'none'; media-src 'self'; sandbox"


# Ranges


@pytest.mark.parametrize(
    ("range_header", "start", "stop"),
    [
        pytest.param("bytes=0-99", 0, 100, id="the start"),
        pytest.param("bytes=100-199", 100, 200, id="the middle"),
        pytest.param("bytes=0-0", 0, 1, id="the first byte"),
        pytest.param("bytes=100-", 100, SIZE, id="all from there"),
        pytest.param("bytes=0-", 0, SIZE, id="all, as players request it"),
        pytest.param("bytes=-100", SIZE - 100, SIZE, id="the end"),
        pytest.param(f"bytes={SIZE - 1}-", SIZE - 1, SIZE, id="the last byte"),
        pytest.param(f"bytes=5-{SIZE + 100}", 5, SIZE, id="beyond the end"),
        pytest.param(f"bytes=-{SIZE + 100}", 0, SIZE, id="an end longer than the file"),
        pytest.param("bytes=5-999999999999999999", 5, SIZE, id="far beyond the end"),
        pytest.param("BYTES=0-99", 0, 100, id="in capitals"),
    ],
)
async def test_a_range_is_served(client: Client, range_header: str, start: int, stop: int) -> None:
    response = await client.get(f"/files/{NAME}", headers={"Range": range_header})
    assert response.status == 206
    assert response.headers["Content-Range"] == f"bytes {start}-{stop - 1}/{SIZE}"
    assert response.headers["Content-Length"] == str(stop - start)
    assert response.headers["ETag"] == TAG
    assert await response.read() == PNG[start:stop]


@pytest.mark.parametrize(
    "range_header",
    [
        pytest.param("bytes=0-1,5-6", id="two parts"),
        pytest.param("bytes=9-5", id="backwards"),
        pytest.param("bytes=-", id="no number"),
        pytest.param("bytes=a-b", id="no numbers"),
        pytest.param("bytes=+1-5", id="a sign"),
        pytest.param("bytes=\u0661-\u0665", id="other digits"),
        pytest.param("lines=0-5", id="another unit"),
        pytest.param("", id="nothing"),
        pytest.param(f"bytes={'9' * 5000}-", id="a number too long to parse"),
    ],
)
async def test_other_ranges_get_the_whole_file(client: Client, range_header: str) -> None:
    response = await client.get(f"/files/{NAME}", headers={"Range": range_header})
    assert response.status == 200
    assert "Content-Range" not in response.headers
    assert await response.read() == PNG


@pytest.mark.parametrize(
    "range_header",
    [
        pytest.param(f"bytes={SIZE}-", id="after the end"),
        pytest.param(f"bytes={SIZE}-{SIZE + 5}", id="between after the end and more"),
        pytest.param("bytes=-0", id="the last no bytes"),
    ],
)
async def test_a_range_beyond_the_file_is_a_416(client: Client, range_header: str) -> None:
    response = await client.get(f"/files/{NAME}", headers={"Range": range_header})
    assert response.status == 416
    assert response.headers["Content-Range"] == f"bytes */{SIZE}"
    assert (await response.json())["error"]["code"] == "range_not_satisfiable"
    assert (SECURITY_HEADERS | NO_STORE).items() <= dict(response.headers).items()


async def test_an_empty_file_has_no_ranges(client: Client, storage: DiskStorage) -> None:
    url = await storage.put(file_of(b""))
    assert (await client.get(url, headers={"Range": "bytes=0-"})).status == 416
    whole = await client.get(url)
    assert (whole.status, whole.headers["Content-Length"]) == (200, "0")


async def test_head_ignores_ranges(client: Client) -> None:
    response = await client.head(f"/files/{NAME}", headers={"Range": "bytes=0-9"})
    assert (response.status, response.headers["Content-Length"]) == (200, str(SIZE))


@pytest.mark.parametrize(
    ("etag", "status"),
    [
        pytest.param(TAG, 206, id="the same file"),
        pytest.param('"other"', 200, id="another"),
        pytest.param(f"W/{TAG}", 200, id="nearly the same"),
        pytest.param("Sat, 21 Nov 2026 09:52:45 GMT", 200, id="of that time"),
    ],
)
async def test_another_etag_in_if_range_gets_the_whole_file(
    client: Client, etag: str, status: int
) -> None:
    headers = {"Range": "bytes=0-9", "If-Range": etag}
    response = await client.get(f"/files/{NAME}", headers=headers)
    assert response.status == status
    assert await response.read() == (PNG if status == 200 else PNG[:10])


@pytest.mark.parametrize(
    ("etag", "status"),
    [
        pytest.param(TAG, 304, id="the same"),
        pytest.param(f"W/{TAG}", 304, id="as caches that compress send it"),
        pytest.param(f'"other", {TAG}', 304, id="one of several"),
        pytest.param("*", 304, id="any"),
        pytest.param('"other"', 200, id="another"),
        pytest.param(TAG.strip('"'), 200, id="no tag"),
        pytest.param("", 200, id="nothing"),
    ],
)
@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_a_matching_etag_is_a_304(
    client: Client, method: str, etag: str, status: int
) -> None:
    headers = {"If-None-Match": etag, "Range": "bytes=5-9999999"}
    response = await client.request(method, f"/files/{NAME}", headers=headers)
    assert (response.status == 304) is (status == 304)
    if status == 304:
        assert await response.read() == b""
        assert response.headers["ETag"] == TAG
        assert "immutable" in response.headers["Cache-Control"]
        assert "Content-Length" not in response.headers
        assert SECURITY_HEADERS.items() <= dict(response.headers).items()


# Other paths


@pytest.mark.parametrize(
    "path",
    [
        pytest.param("", id="the list of all"),
        pytest.param(NAME[:2], id="a folder"),
        pytest.param(f"{NAME[:2]}/{NAME[2:4]}/{NAME}", id="the path on the disk"),
        pytest.param(f"{NAME}/", id="below a file"),
        pytest.param(f"x/../{NAME}", id="up and down again"),
        pytest.param(NAME.upper(), id="in capitals"),
        pytest.param(NAME.partition(".")[0], id="no extension"),
        pytest.param(NAME.replace(".png", ".html"), id="an executable type"),
        pytest.param(NAME.replace(".png", ".jpg"), id="another extension"),
        pytest.param(NAME + ".gz", id="compressed"),
        pytest.param(NAME + "%00", id="a NUL"),
        pytest.param(NAME + "%0a", id="a line's end"),
        pytest.param("lock", id="the lock file"),
        pytest.param("incoming/half", id="an incomplete file"),
        pytest.param("incoming%2fhalf", id="an incomplete file, quoted"),
        pytest.param("..%2fsecret", id="up, quoted"),
        pytest.param("%2e%2e/secret", id="up, in dots quoted"),
        pytest.param("..%5csecret", id="up, with a back-slash"),
        pytest.param("../secret", id="up"),
        pytest.param("%2fetc%2fpasswd", id="from the root"),
        pytest.param("/etc/passwd", id="from the root after two slashes"),
        pytest.param("..%252fsecret", id="up, quoted twice"),
        pytest.param(f"{'a' * 64}.png", id="a missing object"),
    ],
)
async def test_other_paths_are_a_404(client: Client, tmp_path: Path, path: str) -> None:
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "files" / "incoming" / "half").write_text("secret")
    status, headers, content = await get_raw(client, f"/files/{path}")
    assert status == 404
    assert "secret" not in content
    assert '{"error": {"code": "' in content
    if ".." not in path:  # aiohttp does not call the handler for those
        assert '"file_not_found"' in content
        assert all(
            f"{name}: {value}" in headers for name, value in (SECURITY_HEADERS | NO_STORE).items()
        )


async def get_raw(client: Client, target: str, method: str = "GET") -> tuple[int, str, str]:
    """Return status, headers and body for a raw path; a client library would normalize it."""
    reader, writer = await asyncio.open_connection("127.0.0.1", client.port)
    writer.write(f"{method} {target} HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n".encode())
    async with asyncio.timeout(5):
        head, _, content = (await reader.read()).decode("latin-1").partition("\r\n\r\n")
    writer.close()
    return int(head.split()[1]), head, content


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH"])
async def test_other_methods_are_refused(client: Client, tmp_path: Path, method: str) -> None:
    response = await client.request(method, f"/files/{NAME}", data=b"others")
    assert response.status == 405
    assert [path.read_bytes() for path in files_in(tmp_path)] == [PNG]


async def test_a_404_is_not_cacheable(client: Client, storage: DiskStorage) -> None:
    file = file_of(b"later")
    missing = await client.get(f"/files/{file.name}")
    assert (missing.status, missing.headers["Cache-Control"]) == (404, "no-store")
    await storage.put(file)
    assert (await client.get(f"/files/{file.name}")).status == 200


async def test_head_of_a_missing_file_is_a_404(client: Client) -> None:
    assert (await client.head(f"/files/{'a' * 64}.png")).status == 404


# Concurrent changes


@pytest.mark.parametrize("change", ["truncate", "delete"])
async def test_a_truncated_file_closes_the_connection(
    client: Client, storage: DiskStorage, tmp_path: Path, change: str
) -> None:
    file = await large_file(50 * 2**20)
    response = await client.get(await storage.put(file))
    path = next(tmp_path.rglob(file.name))
    if change == "delete":
        path.unlink()
    else:
        os.truncate(path, 2**20)
    with pytest.raises(ClientPayloadError):
        await response.read()


async def test_a_disconnected_client_leaves_no_open_file(
    client: Client, storage: DiskStorage
) -> None:
    url = await storage.put(await large_file(50 * 2**20))
    response = await client.get(url)
    await response.content.readexactly(1000)
    response.close()
    assert await (await client.get(f"/files/{NAME}")).read() == PNG


async def test_concurrent_reads_get_the_same_bytes(client: Client) -> None:
    async def read() -> bytes:
        return await (await client.get(f"/files/{NAME}")).read()

    assert await asyncio.gather(*(read() for _ in range(50))) == [PNG] * 50


class UnreadableStorage(DiskStorage):
    """A storage on a disk that has failed."""

    def size(self, name: str) -> int | None:
        raise OSError(errno.EIO, "an error with a path")


async def test_a_file_that_cannot_be_read_is_a_503_and_not_a_404(
    aiohttp_client: AiohttpClient, tmp_path: Path
) -> None:
    async with UnreadableStorage(tmp_path / "files", str) as storage:
        client = await aiohttp_client(file_server(storage))
        response = await client.get(f"/files/{NAME}")
        assert (response.status, response.headers["Retry-After"]) == (503, "5")
        assert response.headers["Cache-Control"] == "no-store"
        assert str(tmp_path) not in await response.text()
