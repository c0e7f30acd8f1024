"""The image check of images within the body: refusals, and the calls that reach fal."""

import asyncio
import base64
import gc
import gzip
import json
import os
import sys
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from urllib.parse import quote

import pytest

from falproxy.fal.image_formats import Format
from tests.support.fake_fal import FakeFal, WireFal
from tests.support.gateway import SHARED, Gateway, MakeGateway
from tests.support.image_hosts import (
    KONTEXT,
    NOT_AN_IMAGE,
    PNG,
    image_refusal,
    uri,
)
from tests.support.image_samples import IMAGES, NON_IMAGES, ftyp, png_header
from tests.support.open_files import open_files, until_open_files_are
from tests.support.urls import REQUEST, RUN, SUBMIT
from tests.support.waiting import wait_until

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


@pytest.fixture
async def gateway(make_gateway: MakeGateway, fal: FakeFal) -> Gateway:
    """A proxy in front of `fal`, instead of the folder's proxy in front of a queue."""
    return await make_gateway(fal.origin)


# Refusals


@SHARED
@pytest.mark.parametrize("target", CALLS)
async def test_a_call_with_an_invalid_image_is_refused(
    shared_gateway: Gateway, shared_fal: FakeFal, target: str
) -> None:
    response = await shared_gateway.call(target, json={"image_url": uri(NOT_AN_IMAGE)})
    entry = await image_refusal(response)
    assert entry["type"] == "unsupported_image_format"
    assert "a PDF document" in str(entry["msg"])
    assert entry["ctx"] == {
        "supported_formats": [".jpg", ".jpeg", ".png", ".webp", ".gif", ".avif"]
    }
    assert shared_fal.seen == []


BASE64 = base64.b64encode(PNG).decode()
ESCAPED = quote(PNG)


@SHARED
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
    shared_gateway: Gateway, shared_fal: FakeFal, target: str, value: str
) -> None:
    await shared_gateway.forget_results()
    response = await shared_gateway.call(target, json={"image_url": value})
    assert response.status == 200, await response.text()
    assert json.loads(shared_fal.seen[0].body) == {"image_url": value}


@pytest.mark.parametrize("path", ["run/fal-ai/flux/dev", "queue/fal-ai/flux-pro/kontext"])
async def test_calls_of_base_url_routes_are_checked(
    gateway: Gateway, fal: FakeFal, path: str
) -> None:
    body = {"image_url": uri(NOT_AN_IMAGE)}
    entry = await image_refusal(await gateway.client.post(f"/api/fal/{path}", json=body))
    assert entry["loc"] == ["body", "image_url"]
    assert fal.seen == []


@SHARED
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
    shared_gateway: Gateway,
    shared_fal: FakeFal,
    target: str,
    body: dict[str, object],
    loc: list[object],
) -> None:
    text = json.dumps(body).replace('"?"', json.dumps(uri(NOT_AN_IMAGE)))
    entry = await image_refusal(await shared_gateway.call(target, data=text.encode(), headers=JSON))
    assert entry["loc"] == ["body", *loc]
    assert shared_fal.seen == []


@SHARED
@pytest.mark.parametrize(("content", "words"), [row for row in NON_IMAGES if row.values[0] != b""])
async def test_a_hostile_file_is_refused_and_named(
    shared_gateway: Gateway, shared_fal: FakeFal, content: bytes, words: str
) -> None:
    entry = await image_refusal(await shared_gateway.call(RUN, json={"image_url": uri(content)}))
    assert f"the bytes are {words}. " in str(entry["msg"])
    assert shared_fal.seen == []


@SHARED
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
async def test_unusual_spellings_are_checked(
    shared_gateway: Gateway, shared_fal: FakeFal, value: str
) -> None:
    body = b'{"image_\\u0075rl": %s}' % value.encode()
    entry = await image_refusal(await shared_gateway.call(RUN, data=body, headers=JSON))
    assert "a PDF document" in str(entry["msg"])
    assert shared_fal.seen == []


@SHARED
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
    shared_gateway: Gateway, shared_fal: FakeFal, size: tuple[int, int], status: int
) -> None:
    response = await shared_gateway.call(RUN, json={"image_url": uri(png_header(*size))})
    assert response.status == status
    assert len(shared_fal.seen) == (status == 200)
    if status == 422:
        entry = await image_refusal(response)
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


@SHARED
@pytest.mark.parametrize(("content", "known"), IMAGES)
async def test_a_real_image_is_accepted(
    shared_gateway: Gateway, shared_fal: FakeFal, content: bytes, known: Format
) -> None:
    response = await shared_gateway.call(RUN, json={"image_url": uri(content, "text/html")})
    assert response.status == 200, f"a {known}, whatever its declared type"
    assert len(shared_fal.seen) == 1


@SHARED
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
    shared_gateway: Gateway, shared_fal: FakeFal, target: str, body: object
) -> None:
    response = await shared_gateway.call(target, json=body)
    assert response.status == 200
    assert [json.loads(seen.body) for seen in shared_fal.seen] == [body]


@SHARED
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
    shared_gateway: Gateway, shared_fal: FakeFal, target: str, method: str
) -> None:
    body = {"image_url": uri(NOT_AN_IMAGE)}
    response = await shared_gateway.call(target, method, json=body)
    assert response.status == 200
    assert [json.loads(seen.body) for seen in shared_fal.seen] == [body]


# Bodies


@SHARED
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
    shared_gateway: Gateway, shared_fal: FakeFal, target: str, is_chunked: bool, body: bytes
) -> None:
    headers = JSON if is_chunked else [*JSON, ("Content-Length", str(len(body)))]
    await shared_gateway.forget_results()
    response = await shared_gateway.call(target, data=in_pieces(body), headers=headers)
    assert response.status == 200
    (seen,) = shared_fal.seen
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


async def settled_open_files() -> int:
    """Return the number of open files once it is stable. Garbage is collected once only, since that
    takes long in a process with many tests."""
    seen = [open_files()]
    async with asyncio.timeout(30):
        while len(seen) < 10 or len({*seen[-10:]}) > 1:
            await asyncio.sleep(0.03)
            seen.append(len(os.listdir("/dev/fd")))
    return seen[-1]


@pytest.mark.parametrize("sent", [100, 2_000_000], ids=["a little", "much"])
async def test_a_client_that_disconnects_within_its_body_leaves_no_open_file(
    gateway: Gateway, fal: FakeFal, sent: int
) -> None:
    for _ in range(2):  # opens all files; the second call releases those of the first
        await (await gateway.call(RUN, data=call_of_size(1000), headers=JSON)).read()
    fal.seen.clear()
    before = await settled_open_files()
    _, writer = await asyncio.open_connection("127.0.0.1", gateway.client.port)
    writer.write(
        b"POST /api/fal/proxy HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Content-Length: 5000000\r\nx-fal-target-url: " + KONTEXT.encode() + b"\r\n\r\n"
    )
    writer.write(call_of_size(5_000_000)[:sent])
    await writer.drain()
    await asyncio.sleep(0.1)
    if sent > 1_000_000:
        assert bodies_on_disk() > 0
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
        await wait_until(lambda: bodies_on_disk() <= before, seconds=5)  # a thread closes the file
    finally:
        gc.enable()


# Memory and time


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
