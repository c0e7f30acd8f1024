"""The image check of calls that name their images by URL: which URLs are fetched, and refusals.

Some loopback addresses count as public: the fetcher is configured with them.
"""

import asyncio
import tracemalloc
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import pytest
import pytest_asyncio
from aiohttp.pytest_plugin import AiohttpServer

from falproxy.media.fetch import Fetcher, FetchTimeouts
from falproxy.sandbox import Sandbox
from falproxy.sandbox import create_app as create_sandbox
from tests.support.fake_fal import FakeFal
from tests.support.fake_hosts import NAME, PRIVATE, redirect, reply
from tests.support.gateway import SHARED, Gateway, MakeGateway, open_gateway
from tests.support.image_hosts import (
    KONTEXT,
    NOT_AN_IMAGE,
    PNG,
    Internet,
    image_refusal,
    open_internet,
    uri,
)
from tests.support.image_samples import PIXELS, png_header
from tests.support.urls import RUN
from tests.support.waiting import wait_until

pytestmark = pytest.mark.both_transports

KONTEXT_SUBMIT = "https://queue.fal.run/fal-ai/flux-pro/kontext/max"


@pytest.fixture
async def internet() -> AsyncIterator[Internet]:
    async with open_internet() as opened:
        yield opened


# Proxies for tests that need none of their own, by FALPROXY_CHECK_REMOTE_IMAGES.


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def module_internet() -> AsyncIterator[Internet]:
    async with open_internet() as opened:
        yield opened


@pytest.fixture
def shared_internet(module_internet: Internet) -> Internet:
    module_internet.reset()
    return module_internet


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared_gateways(
    module_internet: Internet,
    module_fal: FakeFal,
    server_kind: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> AsyncIterator[dict[bool, Gateway]]:
    async with AsyncExitStack() as stack:
        yield {
            is_checked: await stack.enter_async_context(
                open_gateway(
                    module_fal.origin,
                    tmp_path_factory.mktemp("data"),
                    server_kind,
                    module_internet.fetcher(),
                    check_remote_images=is_checked,
                )
            )
            for is_checked in (False, True)
        }


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def careful_gateway(
    module_internet: Internet,
    module_fal: FakeFal,
    server_kind: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> AsyncIterator[Gateway]:
    """A proxy for which public addresses are the real ones."""
    fetcher = Fetcher(resolver=module_internet.names, ports=(module_internet.port,))
    data_dir = tmp_path_factory.mktemp("data")
    async with open_gateway(
        module_fal.origin, data_dir, server_kind, fetcher, check_remote_images=True
    ) as opened:
        yield opened


@pytest.fixture
async def online(internet: Internet, make_gateway: MakeGateway, fal: FakeFal) -> Gateway:
    """A proxy between these servers and `fal`."""
    return await make_gateway(fal.origin, fetcher=internet.fetcher())


# Checks of URLs


@SHARED
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
    careful_gateway: Gateway, shared_fal: FakeFal, shared_internet: Internet, target: str, host: str
) -> None:
    internet, fal = shared_internet, shared_fal
    response = await careful_gateway.call(target, json={"image_url": internet.url(host=host)})
    entry = await image_refusal(response)
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
    entry = await image_refusal(await online.call(KONTEXT, json={"image_urls": urls}))
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
    entry = await image_refusal(await gateway.call(KONTEXT, json={"image_url": uri(NOT_AN_IMAGE)}))
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
    entry = await image_refusal(await gateway.call(target, json=body))
    assert (entry["type"], entry["loc"]) == (kind, ["body", "mask_url"])
    assert words in str(entry["msg"]) or words in str(entry["ctx"])
    assert internet.private.connections == 0
    assert fal.seen == []


async def test_a_name_with_a_private_address_is_refused(
    online: Gateway, internet: Internet, fal: FakeFal
) -> None:
    internet.names.known["rebound.example"] = [[PRIVATE]]
    url = internet.url(host="rebound.example")
    entry = await image_refusal(await online.call(KONTEXT, json={"image_url": url}))
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
@SHARED
async def test_a_call_is_forwarded_if_the_host_does_not_respond(
    shared_internet: Internet,
    shared_gateways: dict[bool, Gateway],
    shared_fal: FakeFal,
    target: str,
    check_remote: bool,
    host: str,
    path: str,
) -> None:
    internet, fal = shared_internet, shared_fal
    internet.public.responses |= {
        "/broken.png": reply(500),
        "/silent.png": hang,
        "/zipped.png": reply(body=PNG, Content_Encoding="gzip"),
        "/short.png": reply(body=b"", Content_Length="99"),
    }
    gateway = shared_gateways[check_remote]
    await gateway.forget_results()
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


async def test_10_gb_behind_a_url_take_constant_memory(
    online: Gateway, internet: Internet, fal: FakeFal
) -> None:
    internet.public.responses["/endless.png"] = endless_image
    tracemalloc.start()
    try:
        response = await online.call(KONTEXT, json={"image_url": internet.url("/endless.png")})
        entry = await image_refusal(response)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (entry["type"], entry["ctx"]) == ("file_too_large", {"max_size": 100 * 2**20})
    assert peak < 8 * 2**20
    await wait_until(lambda: not internet.public.open_now, seconds=2)
    assert fal.seen == []
