"""The image check in complete requests: refusals, fetched images, and the calls that reach fal.

Some loopback addresses count as public: the fetcher is configured with them.
"""

import asyncio
import base64
import gc
import gzip
import json
import os
import sys
import time
import tracemalloc
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from urllib.parse import quote

import pytest
from aiohttp import ClientResponse
from aiohttp.pytest_plugin import AiohttpServer

from falproxy.fal.image_formats import Format
from falproxy.media.fetch import Fetcher, FetchTimeouts
from falproxy.sandbox import Sandbox
from falproxy.sandbox import create_app as create_sandbox
from tests.support.fake_fal import FakeFal, WireFal
from tests.support.fake_hosts import NAME, PRIVATE, redirect, reply
from tests.support.gateway import Gateway, MakeGateway
from tests.support.image_hosts import KONTEXT, NOT_AN_IMAGE, PNG, Internet, open_internet, uri
from tests.support.image_samples import IMAGES, NON_IMAGES, PIXELS, ftyp, png_header
from tests.support.open_files import open_files, until_open_files_are
from tests.support.urls import REQUEST, RUN, SUBMIT

pytestmark = pytest.mark.both_transports

KONTEXT_SUBMIT = "https://queue.fal.run/fal-ai/flux-pro/kontext/max"
CALLS = [
    pytest.param(RUN, id="a run"),
    pytest.param(SUBMIT, id="a submit"),
    pytest.param(f"{RUN}/stream", id="a stream"),
    pytest.param("https://fal.run/another-owner/app/deep/path", id="a run of another owner's app"),
    pytest.param(KONTEXT, id="a run that may be reused"),
    pytest.param(KONTEXT_SUBMIT, id="a submit that may be reused"),
    pytest.param(f"{KONTEXT_SUBMIT}?fal_webhook=https://a.example", id="a webhook"),
]
JSON = [("Content-Type", "application/json")]


def call_of_size(size: int) -> bytes:
    """Return the JSON of a call, with an image that makes it about this size."""
    frame = json.dumps({"prompt": "a cat", "image_url": uri(png_header(64, 48))}).encode()[:-2]
    return frame + b"A" * ((size - len(frame) - 2) // 4 * 4) + b'"}'


async def in_pieces(content: bytes, size: int = 2**16) -> AsyncIterator[bytes]:
    for start in range(0, len(content), size):
        yield content[start : start + size]


async def refusal(response: ClientResponse) -> dict[str, object]:
    """Return the only entry of `detail` in a 422."""
    body = await response.json()
    assert response.status == 422, body
    assert set(body) == {"message", "detail", "type", "request_id"}
    (entry,) = body["detail"]
    assert (entry["msg"], entry["type"]) == (body["message"], body["type"])
    assert entry["url"] == f"https://docs.fal.ai/errors/#{entry['type']}"
    return dict(entry)


@pytest.fixture
async def gateway(make_gateway: MakeGateway, fal: FakeFal) -> Gateway:
    """A proxy in front of `fal`, instead of the folder's proxy in front of a queue."""
    return await make_gateway(fal.origin)


@pytest.fixture
async def internet() -> AsyncIterator[Internet]:
    async with open_internet() as opened:
        yield opened


@pytest.fixture
async def online(internet: Internet, make_gateway: MakeGateway, fal: FakeFal) -> Gateway:
    """A proxy between these servers and `fal`."""
    return await make_gateway(fal.origin, fetcher=internet.fetcher())


# Refusals


@pytest.mark.parametrize("target", CALLS)
async def test_a_call_with_an_invalid_image_is_refused(
    gateway: Gateway, fal: FakeFal, target: str
) -> None:
    response = await gateway.call(target, json={"image_url": uri(NOT_AN_IMAGE)})
    entry = await refusal(response)
    assert entry["type"] == "unsupported_image_format"
    assert "a PDF document" in str(entry["msg"])
    assert entry["ctx"] == {
        "supported_formats": [".jpg", ".jpeg", ".png", ".webp", ".gif", ".avif"]
    }
    assert fal.seen == []


BASE64 = base64.b64encode(PNG).decode()
ESCAPED = quote(PNG)


@pytest.mark.parametrize("target", [RUN, KONTEXT])
@pytest.mark.parametrize(
    "value",
    [
        pytest.param(f"DATA:image/png;BASE64,{BASE64}", id="capitals"),
        pytest.param(f"data:image/png;  base64,{BASE64}", id="spaces before the flag"),
        pytest.param(f"data:image/png;base64 ,{BASE64}", id="a space after the flag"),
        pytest.param(f"data:image/png;a=b;c=d;base64,{BASE64}", id="parameters"),
        pytest.param(f"data:;base64,{BASE64.rstrip('=')}", id="no padding"),
        pytest.param(f"data:;base64,{quote(BASE64, safe='')}", id="escapes in base64"),
        pytest.param(f"data:;base64,%0A%20{BASE64}%20", id="escaped white space"),
        pytest.param(f"data:;base64,\n {BASE64}\n", id="white space"),
        pytest.param(f"data:;base64,{BASE64}#x", id="a fragment"),
        pytest.param(f"data:image/png,{ESCAPED}", id="no base64"),
        pytest.param(f"data:,{ESCAPED}#x", id="no base64, with a fragment"),
        pytest.param(f"data:image/png,\n{ESCAPED}", id="no base64, after a line end"),
        pytest.param(f"data:image/png,%\n8{ESCAPED[2:]}", id="a line end in an escape"),
        pytest.param(f"da\nta:image/png,{ESCAPED}", id="a line end in the scheme"),
        pytest.param(f" data:;base64,{BASE64}", id="a space before the scheme"),
    ],
)
async def test_a_data_uri_that_browsers_can_read_reaches_fal(
    gateway: Gateway, fal: FakeFal, target: str, value: str
) -> None:
    response = await gateway.call(target, json={"image_url": value})
    assert response.status == 200, await response.text()
    assert json.loads(fal.seen[0].body) == {"image_url": value}


@pytest.mark.parametrize("path", ["run/fal-ai/flux/dev", "queue/fal-ai/flux-pro/kontext"])
async def test_calls_of_base_url_routes_are_checked(
    gateway: Gateway, fal: FakeFal, path: str
) -> None:
    body = {"image_url": uri(NOT_AN_IMAGE)}
    entry = await refusal(await gateway.client.post(f"/api/fal/{path}", json=body))
    assert entry["loc"] == ["body", "image_url"]
    assert fal.seen == []


@pytest.mark.parametrize(
    ("body", "loc"),
    [
        pytest.param({"image_url": "?"}, ["image_url"], id="by itself"),
        pytest.param({"image_url": {"url": "?"}}, ["image_url", "url"], id="as an object"),
        pytest.param({"image_urls": [uri(PNG), "?"]}, ["image_urls", 1], id="in a list"),
        pytest.param({"images": [{"url": "?"}]}, ["images", 0, "url"], id="in a list of objects"),
        pytest.param({"mask_url": "?"}, ["mask_url"], id="a mask"),
        pytest.param({"image": "?"}, ["image"], id="a short name"),
        pytest.param({"control_image_url": "?"}, ["control_image_url"], id="a long name"),
        pytest.param(
            {"input": {"steps": [{"image_url": "?"}]}},
            ["input", "steps", 0, "image_url"],
            id="deep inside",
        ),
        pytest.param(
            {"image_url": uri(PNG), "prompt": "x" * 99_999, "mask_url": "?"},
            ["mask_url"],
            id="after a long prompt",
        ),
    ],
)
@pytest.mark.parametrize("target", [RUN, KONTEXT])
async def test_a_refusal_has_the_location_of_the_image(
    gateway: Gateway, fal: FakeFal, target: str, body: dict[str, object], loc: list[object]
) -> None:
    text = json.dumps(body).replace('"?"', json.dumps(uri(NOT_AN_IMAGE)))
    entry = await refusal(await gateway.call(target, data=text.encode(), headers=JSON))
    assert entry["loc"] == ["body", *loc]
    assert fal.seen == []


@pytest.mark.parametrize(("content", "words"), [row for row in NON_IMAGES if row.values[0] != b""])
async def test_a_hostile_file_is_refused_and_named(
    gateway: Gateway, fal: FakeFal, content: bytes, words: str
) -> None:
    entry = await refusal(await gateway.call(RUN, json={"image_url": uri(content)}))
    assert f"the bytes are {words}. " in str(entry["msg"])
    assert fal.seen == []


@pytest.mark.parametrize(
    "value",
    [
        pytest.param('"DATA:image/png;base64,JVBERi0xLjc="', id="capitals"),
        pytest.param('"\\u0064ata\\u003aimage/png;base64,JVBERi0xLjc="', id="escapes of JSON"),
        pytest.param('"data:image/png;base64,JVBE\\nRi0x Ljc"', id="white space, no padding"),
        pytest.param('"data:image/png,%25PDF-1.7"', id="escapes of URLs"),
        pytest.param('"data:;BASE64,JVBERi0xLjc="', id="no type"),
    ],
)
async def test_unusual_spellings_are_checked(gateway: Gateway, fal: FakeFal, value: str) -> None:
    body = b'{"image_\\u0075rl": %s}' % value.encode()
    entry = await refusal(await gateway.call(RUN, data=body, headers=JSON))
    assert "a PDF document" in str(entry["msg"])
    assert fal.seen == []


@pytest.mark.parametrize(
    ("size", "status"),
    [
        pytest.param((10_000, 5_000), 200, id="50 megapixels"),
        pytest.param((10_001, 5_000), 422, id="a column more"),
        pytest.param((16_384, 16_384), 422, id="a bomb"),
        pytest.param((1, 2**31), 422, id="one column"),
    ],
)
async def test_50_megapixels_are_accepted(
    gateway: Gateway, fal: FakeFal, size: tuple[int, int], status: int
) -> None:
    response = await gateway.call(RUN, json={"image_url": uri(png_header(*size))})
    assert response.status == status
    assert len(fal.seen) == (status == 200)
    if status == 422:
        entry = await refusal(response)
        assert entry["type"] == "image_too_large"
        assert (entry["ctx"]["width"], entry["ctx"]["height"]) == size  # type: ignore[index]


@pytest.mark.parametrize(
    ("formats", "content", "status"),
    [
        pytest.param(None, ftyp(b"heic"), 422, id="HEIC, by default"),
        pytest.param((Format.HEIC,), ftyp(b"heic"), 200, id="HEIC, accepted"),
        pytest.param((Format.HEIC,), PNG, 422, id="PNG, not accepted"),
    ],
)
async def test_the_accepted_formats_are_a_setting(
    make_gateway: MakeGateway,
    fal: FakeFal,
    formats: tuple[Format, ...] | None,
    content: bytes,
    status: int,
) -> None:
    gateway = await make_gateway(fal.origin, **({"image_formats": formats} if formats else {}))
    response = await gateway.call(RUN, json={"image_url": uri(content)})
    assert response.status == status
    assert len(fal.seen) == (status == 200)


# Accepted images


@pytest.mark.parametrize(("content", "known"), IMAGES)
async def test_a_real_image_is_accepted(
    gateway: Gateway, fal: FakeFal, content: bytes, known: Format
) -> None:
    response = await gateway.call(RUN, json={"image_url": uri(content, "text/html")})
    assert response.status == 200, f"a {known}, whatever its declared type"
    assert len(fal.seen) == 1


@pytest.mark.parametrize(
    "body",
    [
        pytest.param({"image_url": ""}, id="an empty string"),
        pytest.param({"image_url": "data:,"}, id="empty data"),
        pytest.param({"image_url": "data:image/png;base64,"}, id="empty base64"),
        pytest.param({"image_url": None}, id="null"),
        pytest.param({"image_url": 7}, id="a number"),
        pytest.param({"image_urls": []}, id="no images"),
        pytest.param({"image_url": "cat.png"}, id="a file's name"),
        pytest.param({"image_url": "file:///etc/passwd"}, id="a scheme that fal does not read"),
        pytest.param({"prompt": uri(NOT_AN_IMAGE)}, id="a prompt"),
        pytest.param({"loras": [{"path": uri(NOT_AN_IMAGE)}]}, id="another file"),
        pytest.param({"audio_url": uri(NOT_AN_IMAGE)}, id="a sound"),
        pytest.param([{"image_url": uri(NOT_AN_IMAGE)}], id="no object"),
        pytest.param({}, id="empty"),
    ],
)
@pytest.mark.parametrize("target", [RUN, KONTEXT])
async def test_inputs_without_an_image_are_forwarded(
    gateway: Gateway, fal: FakeFal, target: str, body: object
) -> None:
    response = await gateway.call(target, json=body)
    assert response.status == 200
    assert [json.loads(seen.body) for seen in fal.seen] == [body]


@pytest.mark.parametrize(
    ("target", "method"),
    [
        pytest.param("https://rest.fal.ai/storage/upload/initiate", "POST", id="an upload"),
        pytest.param("https://rest.fal.ai/anything", "POST", id="another service"),
        pytest.param(f"{REQUEST}/cancel", "PUT", id="a cancel"),
        pytest.param(f"{REQUEST}/cancel", "POST", id="a cancel by POST"),
    ],
)
async def test_other_calls_are_not_checked(
    gateway: Gateway, fal: FakeFal, target: str, method: str
) -> None:
    body = {"image_url": uri(NOT_AN_IMAGE)}
    response = await gateway.call(target, method, json=body)
    assert response.status == 200
    assert [json.loads(seen.body) for seen in fal.seen] == [body]


# Bodies


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b"[1,2]", id="5 bytes"),
        pytest.param(b'\n{ "b" :1.0,"a":"\\u00e4\\/" ,"seed":12345678901234567890}\n', id="odd"),
        pytest.param(call_of_size(300_000), id="300 kB"),
        pytest.param(call_of_size(30_000_000), id="30 MB"),
        pytest.param(b'{"image_url": "data:image/png;base64,JVBE', id="cut"),
        pytest.param(b"not json", id="no JSON"),
        pytest.param(
            b'{"image_url": "%s", "image_url": ""}' % uri(NOT_AN_IMAGE).encode(), id="twice"
        ),
        pytest.param(b'{"image_url": NaN}', id="NaN"),
        pytest.param(b'\xef\xbb\xbf{"prompt": "x"}', id="a byte order mark"),
        pytest.param('{"image_url": "x"}'.encode("utf-16"), id="UTF-16"),
        pytest.param(b"\xff\xfe\x00", id="bytes"),
        pytest.param(b"[" * 200_000, id="nested without end"),
        pytest.param(b'{"a":' * 5000 + b"1" + b"}" * 5000, id="nested deep"),
    ],
)
@pytest.mark.parametrize("is_chunked", [False, True], ids=["with its length", "chunked"])
@pytest.mark.parametrize("target", [RUN, KONTEXT])
async def test_a_body_reaches_fal_byte_for_byte(
    gateway: Gateway, fal: FakeFal, target: str, is_chunked: bool, body: bytes
) -> None:
    headers = JSON if is_chunked else [*JSON, ("Content-Length", str(len(body)))]
    response = await gateway.call(target, data=in_pieces(body), headers=headers)
    assert response.status == 200
    (seen,) = fal.seen
    assert seen.body == body
    assert seen.header("content-length") == str(len(body))


async def test_a_call_without_a_body_is_forwarded(gateway: Gateway, fal: FakeFal) -> None:
    assert (await gateway.call(KONTEXT)).status == 200
    assert [seen.body for seen in fal.seen] == [b""]


@pytest.mark.parametrize("target", [RUN, KONTEXT])
async def test_an_encoded_body_is_forwarded_unchecked(
    gateway: Gateway, fal: FakeFal, target: str
) -> None:
    body = gzip.compress(json.dumps({"image_url": uri(NOT_AN_IMAGE)}).encode())
    headers = [*JSON, ("Content-Encoding", "gzip")]
    response = await gateway.call(target, data=body, headers=headers)
    assert response.status == 200
    (seen,) = fal.seen
    assert (seen.body, seen.header("content-encoding")) == (body, "gzip")


@pytest.mark.parametrize("limit", [1000, 400_000], ids=["in memory", "in a file"])
@pytest.mark.parametrize("more", [0, 1], ids=["as many", "one more"])
@pytest.mark.parametrize("target", [RUN, KONTEXT])
async def test_the_limit_of_a_chunked_body_is_exact(
    make_gateway: MakeGateway, fal: FakeFal, target: str, limit: int, more: int
) -> None:
    gateway = await make_gateway(fal.origin, max_body=limit)
    body = b'{"prompt": "' + b"x" * (limit + more - 14) + b'"}'
    response = await gateway.call(target, data=in_pieces(body, 999), headers=JSON)
    assert response.status == (413 if more else 200)
    assert [len(seen.body) for seen in fal.seen] == [limit][more:]


async def settled(count: Callable[[], int]) -> int:
    """Return a number once it is stable."""
    seen = [count()]
    async with asyncio.timeout(10):
        while len(seen) < 10 or len({*seen[-10:]}) > 1:
            await asyncio.sleep(0.03)
            seen.append(count())
    return seen[-1]


@pytest.mark.parametrize("sent", [100, 2_000_000], ids=["a little", "much"])
async def test_a_client_that_disconnects_within_its_body_leaves_no_open_file(
    gateway: Gateway, fal: FakeFal, sent: int
) -> None:
    for _ in range(2):  # opens all files; the second call releases those of the first
        await (await gateway.call(RUN, data=call_of_size(1000), headers=JSON)).read()
    fal.seen.clear()
    before = await settled(open_files)
    _, writer = await asyncio.open_connection("127.0.0.1", gateway.client.port)
    writer.write(
        b"POST /api/fal/proxy HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Content-Length: 5000000\r\nx-fal-target-url: " + KONTEXT.encode() + b"\r\n\r\n"
    )
    writer.write(call_of_size(5_000_000)[:sent])
    await writer.drain()
    await asyncio.sleep(0.1)
    if sent > 1_000_000:
        assert open_files() == before + 3, "two ends of a connection, and the file of the body"
    writer.close()
    await until_open_files_are(before)
    assert fal.seen == []


def bodies_on_disk() -> int:
    """Return the number of open unnamed files, including uncollected ones."""
    found = 0
    for number in os.listdir("/dev/fd"):
        with suppress(OSError):  # the descriptor of the listing itself
            found += os.readlink(f"/dev/fd/{number}").endswith("(deleted)")
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="needs links to the open files")
async def test_a_body_is_deleted_from_the_disk_with_its_call(
    gateway: Gateway, fal: FakeFal
) -> None:
    content = call_of_size(2_000_000)
    gc.collect()
    before = bodies_on_disk()
    gc.disable()
    try:
        for _ in range(3):  # on one connection, which stays open
            await (await gateway.call(RUN, data=in_pieces(content), headers=JSON)).read()
        assert len(fal.seen) == 3
        async with asyncio.timeout(5):  # a thread closes the file
            while bodies_on_disk() > before:
                await asyncio.sleep(0.01)
    finally:
        gc.enable()


# Checks of URLs


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1", "localhost", "LOCALHOST.", "a.localhost", "2130706433", "0x7f000001",
        "0177.0.0.1", "127.1", "127.0.0.1.", "127%2e0.0.1", "0.0.0.0", "[::1]", "[::]",
        "[::ffff:7f00:1]", "[::127.0.0.1]", "[64:ff9b::7f00:1]", "[2002:7f00:1::]", "10.0.0.1",
        "172.16.0.1", "192.168.0.1", "100.64.0.1", "169.254.169.254", "[fe80::1]", "[fd00::1]",
        "[fec0::1]", "224.0.0.1", "metadata", "metadata.google.internal", "printer.local",
        "db.internal", "database", "host.docker.internal", "router.lan",
    ],
)  # fmt: skip
@pytest.mark.parametrize("target", [RUN, KONTEXT])
async def test_a_private_url_is_refused_without_a_connection(
    make_gateway: MakeGateway, fal: FakeFal, internet: Internet, target: str, host: str
) -> None:
    fetcher = Fetcher(
        resolver=internet.names, ports=(internet.port,)
    )  # public addresses are the real ones
    gateway = await make_gateway(fal.origin, check_remote_images=True, fetcher=fetcher)
    response = await gateway.call(target, json={"image_url": internet.url(host=host)})
    entry = await refusal(response)
    assert entry["type"] == "image_load_error"
    assert entry["loc"] == ["body", "image_url"]
    assert str(entry["msg"]).endswith("not on the public internet.")
    assert internet.names.asked == []
    assert internet.private.connections == 0
    assert fal.seen == []


@pytest.mark.parametrize(
    "url",
    [
        pytest.param("https://a.example:22/a.png", id="port of ssh"),
        pytest.param("https://a.example:6379/a.png", id="port of Redis"),
        pytest.param("https://a.example:8443/a.png", id="a port like 443"),
        pytest.param("http://user:s3cret@a.example/a.png", id="a user"),
        pytest.param("http://a.example\\@127.0.0.1/", id="a backslash"),
        pytest.param("http://127.0.0.1\n/", id="a new line"),
        pytest.param("https://a.example/my photo.png", id="a space"),
        pytest.param("https://a.example/a.png ", id="a space at the end"),
        pytest.param("https://a.example/10.00\u202fAM.png", id="a space of macOS"),
        pytest.param("https://", id="no host"),
        pytest.param("http://a..example/a.png", id="an empty label"),
        pytest.param("http://a.example/" + "a" * 20_000, id="20 kB"),
    ],
)
@pytest.mark.parametrize("target", [RUN, KONTEXT])
async def test_a_url_of_another_form_is_forwarded_and_never_fetched(
    make_gateway: MakeGateway, fal: FakeFal, internet: Internet, target: str, url: str
) -> None:
    fetcher = Fetcher(resolver=internet.names)
    gateway = await make_gateway(fal.origin, check_remote_images=True, fetcher=fetcher)
    response = await gateway.call(target, json={"image_urls": [{"url": url}]})
    assert response.status == 200
    status = response.headers.get("Cache-Status")
    assert status == ("falproxy; fwd=bypass; detail=image" if target == KONTEXT else None)
    assert internet.names.asked == []
    assert len(fal.seen) == 1


async def test_a_call_with_too_many_urls_fetches_none(
    online: Gateway, internet: Internet, fal: FakeFal
) -> None:
    urls = [internet.url(f"/{number}.png") for number in range(33)]
    response = await online.call(KONTEXT, json={"image_urls": urls})
    assert response.headers["Cache-Status"] == "falproxy; fwd=bypass; detail=image"
    assert internet.public.connections == 0
    assert len(fal.seen) == 1


async def test_one_refused_url_among_many_fetches_none(
    online: Gateway, internet: Internet, fal: FakeFal
) -> None:
    urls = [internet.url(), internet.url(host="10.0.0.1")]
    entry = await refusal(await online.call(KONTEXT, json={"image_urls": urls}))
    assert entry["loc"] == ["body", "image_urls", 1]
    assert internet.public.connections == 0
    assert fal.seen == []


# Images behind URLs


@pytest.mark.parametrize(
    "target",
    [
        pytest.param(RUN, id="an endpoint that is not reused"),
        pytest.param(f"{KONTEXT}/stream", id="a stream"),
        pytest.param(f"{KONTEXT_SUBMIT}?fal_webhook=https://a.example", id="a webhook"),
    ],
)
async def test_an_image_is_not_fetched_without_need(
    online: Gateway, internet: Internet, fal: FakeFal, target: str
) -> None:
    response = await online.call(target, json={"image_url": internet.url()})
    assert response.status == 200
    assert (internet.public.connections, internet.names.asked) == (0, [])
    assert len(fal.seen) == 1


async def test_no_image_is_fetched_without_the_cache(
    internet: Internet, make_gateway: MakeGateway, fal: FakeFal
) -> None:
    gateway = await make_gateway(fal.origin, cache=False, fetcher=internet.fetcher())
    response = await gateway.call(KONTEXT, json={"image_url": internet.url()})
    assert response.status == 200
    assert "Cache-Status" not in response.headers
    assert internet.public.connections == 0
    entry = await refusal(await gateway.call(KONTEXT, json={"image_url": uri(NOT_AN_IMAGE)}))
    assert entry["type"] == "unsupported_image_format"


@pytest.mark.parametrize("target", [KONTEXT, KONTEXT_SUBMIT])
async def test_the_image_of_a_cacheable_call_is_fetched(
    online: Gateway, internet: Internet, fal: FakeFal, target: str
) -> None:
    response = await online.call(target, json={"image_url": internet.url()})
    assert response.headers["Cache-Status"].startswith("falproxy; fwd=miss")
    assert internet.public.connections == 1
    assert len(fal.seen) == 1


async def endless_image(writer: asyncio.StreamWriter) -> None:
    head = b"%x\r\n%s\r\n" % (len(PNG), PNG)
    writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + head)
    for _ in range(10 * 2**30 // 0x10000):
        writer.write(b"10000\r\n" + bytes(0x10000) + b"\r\n")
        await writer.drain()


async def test_only_the_first_bytes_are_fetched_for_other_calls(
    internet: Internet, make_gateway: MakeGateway, fal: FakeFal
) -> None:
    internet.public.responses["/endless.png"] = endless_image
    gateway = await make_gateway(fal.origin, check_remote_images=True, fetcher=internet.fetcher())
    response = await gateway.call(RUN, json={"image_url": internet.url("/endless.png")})
    assert response.status == 200
    (request,) = internet.public.seen
    assert "\r\nRange: bytes=0-" in request
    assert "Cache-Status" not in response.headers


@pytest.mark.parametrize(
    ("response", "kind", "words"),
    [
        pytest.param(
            reply(body=b"<html>no"), "unsupported_image_format", "an HTML page", id="HTML"
        ),
        pytest.param(
            reply(body=NOT_AN_IMAGE, Content_Type="image/png"),
            "unsupported_image_format",
            "a PDF document",
            id="a wrong declared type",
        ),
        pytest.param(reply(body=png_header(16384, 16384)), "image_too_large", "16384", id="a bomb"),
        pytest.param(
            redirect("http://10.0.0.1/a.png"),
            "image_load_error",
            "public internet",
            id="a redirect to a private address",
        ),
    ],
)
@pytest.mark.parametrize(
    ("target", "check_remote"),
    [pytest.param(KONTEXT, False, id="read"), pytest.param(RUN, True, id="first bytes")],
)
async def test_an_invalid_image_behind_a_url_is_refused(
    internet: Internet,
    make_gateway: MakeGateway,
    fal: FakeFal,
    target: str,
    check_remote: bool,
    response: bytes,
    kind: str,
    words: str,
) -> None:
    internet.public.responses["/b.png"] = response
    gateway = await make_gateway(
        fal.origin, check_remote_images=check_remote, fetcher=internet.fetcher()
    )
    body = {"image_url": uri(PNG), "mask_url": internet.url("/b.png")}
    entry = await refusal(await gateway.call(target, json=body))
    assert (entry["type"], entry["loc"]) == (kind, ["body", "mask_url"])
    assert words in str(entry["msg"]) or words in str(entry["ctx"])
    assert internet.private.connections == 0
    assert fal.seen == []


async def test_a_name_with_a_private_address_is_refused(
    online: Gateway, internet: Internet, fal: FakeFal
) -> None:
    internet.names.known["rebound.example"] = [[PRIVATE]]
    url = internet.url(host="rebound.example")
    entry = await refusal(await online.call(KONTEXT, json={"image_url": url}))
    assert entry["type"] == "image_load_error"
    assert internet.private.connections == 0
    assert fal.seen == []


async def hang(writer: asyncio.StreamWriter) -> None:
    await asyncio.sleep(60)


@pytest.mark.parametrize(
    ("host", "path"),
    [
        pytest.param(NAME, "/missing.png", id="404"),
        pytest.param(NAME, "/broken.png", id="500"),
        pytest.param(NAME, "/silent.png", id="silence"),
        pytest.param(NAME, "/zipped.png", id="compressed"),
        pytest.param(NAME, "/short.png", id="broken off"),
        pytest.param("unknown.example", "/a.png", id="an unknown name"),
    ],
)
@pytest.mark.parametrize("check_remote", [False, True])
@pytest.mark.parametrize("target", [KONTEXT, RUN])
async def test_a_call_is_forwarded_if_the_host_does_not_respond(
    internet: Internet,
    make_gateway: MakeGateway,
    fal: FakeFal,
    target: str,
    check_remote: bool,
    host: str,
    path: str,
) -> None:
    internet.public.responses |= {
        "/broken.png": reply(500),
        "/silent.png": hang,
        "/zipped.png": reply(body=PNG, Content_Encoding="gzip"),
        "/short.png": reply(body=b"", Content_Length="99"),
    }
    gateway = await make_gateway(
        fal.origin, check_remote_images=check_remote, fetcher=internet.fetcher()
    )
    response = await gateway.call(target, json={"image_url": internet.url(path, host)})
    assert response.status == 200
    assert len(fal.seen) == 1
    status = "falproxy; fwd=bypass; detail=image" if target == KONTEXT else None
    assert response.headers.get("Cache-Status") == status


async def trickle(writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n" + PNG)
    while True:
        writer.write(b"x")
        await writer.drain()
        await asyncio.sleep(0.01)


async def test_a_disconnected_client_cancels_the_fetch_of_its_image(
    internet: Internet, make_gateway: MakeGateway, fal: FakeFal
) -> None:
    internet.public.responses["/slow.png"] = trickle
    gateway = await make_gateway(fal.origin, fetcher=internet.fetcher(timeouts=FetchTimeouts()))
    body = {"image_url": internet.url("/slow.png")}
    call = asyncio.ensure_future(gateway.call(KONTEXT, json=body))
    async with asyncio.timeout(2):
        while not internet.public.open_now:
            await asyncio.sleep(0.01)
        call.cancel()
        while internet.public.open_now:
            await asyncio.sleep(0.01)
    assert internet.public.connections == 1
    assert fal.seen == []


async def test_files_of_the_upstream_are_fetched(
    make_gateway: MakeGateway, aiohttp_server: AiohttpServer
) -> None:
    """Files that clients upload to a sandbox have loopback URLs."""
    sandbox = Sandbox(speed=1000)
    server = await aiohttp_server(create_sandbox(sandbox))
    origin = sandbox.public_url = f"http://127.0.0.1:{server.port}"
    gateway = await make_gateway(origin)
    upload = {"file_name": "a.png", "content_type": "image/png"}
    initiate = "https://rest.fal.ai/storage/upload/initiate"
    urls = await (await gateway.call(initiate, json=upload)).json()
    async with gateway.client.session.put(urls["upload_url"], data=PIXELS) as stored:
        assert stored.status == 200
    assert urls["file_url"].startswith(origin)
    statuses = []
    for url in (urls["file_url"], uri(PIXELS)):
        response = await gateway.call(KONTEXT, json={"prompt": "a cat", "image_url": url})
        assert response.status == 200, await response.text()
        statuses.append(response.headers["Cache-Status"])
    assert statuses[0] == "falproxy; fwd=miss; stored"
    assert statuses[1].startswith("falproxy; hit"), "an upload equals the same data URI"


# Memory and time


async def test_10_gb_behind_a_url_take_constant_memory(
    online: Gateway, internet: Internet, fal: FakeFal
) -> None:
    internet.public.responses["/endless.png"] = endless_image
    tracemalloc.start()
    try:
        response = await online.call(KONTEXT, json={"image_url": internet.url("/endless.png")})
        entry = await refusal(response)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (entry["type"], entry["ctx"]) == ("file_too_large", {"max_size": 100 * 2**20})
    assert peak < 8 * 2**20
    async with asyncio.timeout(2):
        while internet.public.open_now:
            await asyncio.sleep(0)
    assert fal.seen == []


@pytest.mark.timed
@pytest.mark.parametrize("target", [RUN, KONTEXT])
async def test_50_mb_do_not_delay_other_calls(
    make_gateway: MakeGateway, wire: WireFal, target: str
) -> None:
    body = call_of_size(50 * 10**6)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        left = len(body)
        while left:
            left -= len(await reader.read(2**16))
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")

    wire.serve = serve
    gateway = await make_gateway(wire.origin)
    call = asyncio.ensure_future(gateway.call(target, data=in_pieces(body), headers=JSON))
    longest = 0.0
    while not call.done():
        started = time.perf_counter()
        await asyncio.sleep(0)
        longest = max(longest, time.perf_counter() - started)
    assert (await call).status == 200
    assert longest < 0.25, "seconds that the event loop was held"


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(
            b'{"\\u0069mage_url": "data:image/png;base64,aGVsbG8="}', id="an escaped name"
        ),
        pytest.param(b'{"mask": "data:,hello"}', id="a mask"),
    ],
)
async def test_images_of_small_bodies_are_found(
    gateway: Gateway, fal: FakeFal, body: bytes
) -> None:
    response = await gateway.call(RUN, data=body, headers=[("content-type", "application/json")])
    assert (response.status, fal.seen) == (422, [])
