"""The fetcher, with a public and a private server on loopback.

Both listen on the same port: a request that reaches the private one was not refused.
"""

import asyncio
import gzip
import hashlib
import itertools
import logging
import ssl
import tracemalloc
from collections.abc import AsyncIterator, Coroutine
from contextlib import AsyncExitStack

import pytest
import trustme
from aiohttp import web
from tenacity import wait_none

from falproxy.media.fetch import (
    FETCHER,
    FetchedDigest,
    Fetcher,
    FetchFailed,
    FetchRefused,
    FetchTimeouts,
    FetchTooLarge,
    check_url,
    fetcher_context,
)
from falproxy.media.fetch.connector import MAX_CONNECTIONS, MAX_CONNECTIONS_PER_HOST
from falproxy.media.fetch.digest_cache import CACHE_BYTES, CACHE_SIZE, DigestCache
from falproxy.media.fetch.response import FRESHNESS_MAX, HEAD_MAX
from tests.support.fake_hosts import (
    IMAGE,
    NAME,
    PRIVATE,
    PUBLIC,
    UNUSED,
    Host,
    Names,
    Responder,
    World,
    open_hosts,
    redirect,
    reply,
)
from tests.support.waiting import wait_until

DIGEST = hashlib.sha256(IMAGE).hexdigest()
MAX = 1 << 20


@pytest.fixture
async def world() -> AsyncIterator[World]:
    public, private = Host(), Host()
    async with AsyncExitStack() as stack:
        stack.push_async_callback(public.close)
        port = await stack.enter_async_context(open_hosts(public, private))
        public.responses["/a.png"] = private.responses["/a.png"] = reply()
        yield World(public, private, port, Names({NAME: [[PUBLIC]]}))


@pytest.fixture
async def fetcher(world: World) -> AsyncIterator[Fetcher]:
    async with world.fetcher() as fetcher:
        yield fetcher


def header_lines(request: str) -> dict[str, str]:
    pairs = (line.partition(": ") for line in request.split("\r\n")[1:] if line)
    return {name.lower(): value for name, _, value in pairs}


# Reading


async def test_an_image_is_read_completely_for_its_digest(world: World, fetcher: Fetcher) -> None:
    fetched = await fetcher.fetch_digest(world.url("/a.png"), MAX)
    assert fetched == FetchedDigest(DIGEST, len(IMAGE), IMAGE, 0.0)


async def test_only_the_head_of_a_large_file_is_kept(world: World, fetcher: Fetcher) -> None:
    body = bytes(range(256)) * 2048
    world.public.responses["/large.png"] = reply(body=body)
    fetched = await fetcher.fetch_digest(world.url("/large.png"), MAX)
    assert fetched.head == body[:HEAD_MAX]
    assert (fetched.size, fetched.digest) == (len(body), hashlib.sha256(body).hexdigest())


async def test_an_empty_file_has_a_digest(world: World, fetcher: Fetcher) -> None:
    world.public.responses["/empty"] = reply(body=b"")
    fetched = await fetcher.fetch_digest(world.url("/empty"), MAX)
    assert (fetched.size, fetched.digest) == (0, hashlib.sha256().hexdigest())


async def test_a_request_has_our_user_agent_and_no_credentials(
    world: World, fetcher: Fetcher
) -> None:
    world.public.responses["/a.png"] = reply(Set_Cookie="a=b")
    for _ in range(2):
        await fetcher.fetch_digest(world.url("/a.png"), MAX)
    headers = header_lines(world.public.seen[1])
    assert headers.pop("user-agent").startswith("falproxy/")
    assert headers.pop("host") == f"{NAME}:{world.port}"
    headers.pop("connection", None)
    assert headers == {"accept": "image/*", "accept-encoding": "identity"}


async def test_a_url_is_sent_byte_for_byte(world: World, fetcher: Fetcher) -> None:
    path = "/%41/%2e%2e/a%2Fb.png?sig=a%2Bb+c%7E&x=[]"
    world.public.responses[path] = reply()
    await fetcher.fetch_digest(world.url(f"{path}#part"), MAX)
    assert world.public.seen[0].startswith(f"GET {path} HTTP/1.1")


async def test_letters_of_other_alphabets_are_escaped(world: World, fetcher: Fetcher) -> None:
    world.public.responses["/%C3%BC.png"] = reply()
    assert (await fetcher.fetch_digest(world.url("/ü.png"), MAX)).digest == DIGEST


async def test_proxies_of_the_environment_are_not_used(
    world: World, fetcher: Fetcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, f"http://{PRIVATE}:{world.port}")
    assert (await fetcher.fetch_digest(world.url("/a.png"), MAX)).digest == DIGEST
    assert world.private.connections == 0


# Refusals by the URL's text


@pytest.mark.parametrize(
    "url",
    [
        pytest.param("file:///etc/passwd", id="a file"),
        pytest.param("ftp://images.example/a.png", id="ftp"),
        pytest.param("gopher://images.example/", id="gopher"),
        pytest.param("javascript:alert(1)", id="a script"),
        pytest.param("data:image/png;base64,AAAA", id="a data URI"),
        pytest.param("ws://images.example/", id="a web socket"),
        pytest.param("//images.example/a.png", id="no scheme"),
        pytest.param("http:/images.example/a.png", id="one slash"),
        pytest.param("http:///a.png", id="no host"),
        pytest.param("http://", id="nothing but a scheme"),
        pytest.param("http://:80/", id="a port without a host"),
        pytest.param("", id="nothing"),
        pytest.param("http://user@images.example/", id="a user"),
        pytest.param("http://user:secret@images.example/", id="a password"),
        pytest.param("http://@images.example/", id="an empty user"),
        pytest.param("http://images.example:22/", id="port of ssh"),
        pytest.param("http://images.example:25/", id="port of mail"),
        pytest.param("http://images.example:6379/", id="port of Redis"),
        pytest.param("http://images.example:0/", id="port 0"),
        pytest.param("http://images.example:65536/", id="a port too large"),
        pytest.param("http://images.example:65616/", id="a port that is 80 in 16 bits"),
        pytest.param("http://images.example:8o/", id="a port that is no number"),
        pytest.param(" http://images.example/", id="a space before"),
        pytest.param("http://images.example/a b.png", id="a space inside"),
        pytest.param("http://images.example/\ta.png", id="a tab"),
        pytest.param("http://images.example/\r\nHost: a", id="a new line"),
        pytest.param("http://images.example/\x00", id="NUL"),
        pytest.param("http://images.example/\u2028", id="white space of Unicode"),
        pytest.param("http://images.example/\ud800", id="a lone surrogate"),
        pytest.param("http:\\\\images.example/", id="backslashes"),
        pytest.param("http://images.example\\@127.0.0.1/", id="a backslash before a user"),
        pytest.param("http://%65xample.example/", id="an escape in a name"),
        pytest.param("http://a..example/", id="an empty label"),
        pytest.param(f"http://{'a' * 64}.example/", id="a label too long"),
        pytest.param(f"http://{'a.' * 127}example/", id="a name too long"),
        pytest.param("http://xn--a.example/", id="broken IDNA"),
        pytest.param("http://[::1/", id="half a bracket"),
        pytest.param("http://[::1]evil.example/", id="letters after a bracket"),
        pytest.param("http://[1.2.3.4]/", id="IPv4 in brackets"),
    ],
)
def test_a_url_of_another_form_is_refused(url: str) -> None:
    with pytest.raises(FetchRefused):
        check_url(url)


@pytest.mark.parametrize(
    "host",
    [
        pytest.param("localhost", id="localhost"),
        pytest.param("LocalHost.", id="localhost, spelled otherwise"),
        pytest.param("metadata.google.internal", id="metadata by name"),
        pytest.param("169.254.169.254", id="metadata by address"),
        pytest.param("10.0.0.1", id="a private address"),
        pytest.param("2130706433", id="one number"),
        pytest.param("0x7f000001", id="one hexadecimal number"),
        pytest.param("0177.0.0.1", id="octal"),
        pytest.param("0x7f.0.0.1", id="hexadecimal"),
        pytest.param("127.1", id="short"),
        pytest.param("127.0.0.1.", id="a dot at the end"),
        pytest.param("127%2e0.0.1", id="an escaped dot"),
        pytest.param("%31%32%37.0.0.1", id="escaped digits"),
        pytest.param("１２７.０.０.１", id="full-width digits"),  # noqa: RUF001
        pytest.param("127。0。0。1", id="dots of IDNA"),
        pytest.param("[::1]", id="loopback in IPv6"),
        pytest.param("[::]", id="any in IPv6"),
        pytest.param("[::ffff:7f00:1]", id="mapped"),
        pytest.param("[::ffff:127.0.0.1]", id="mapped with dots"),
        pytest.param("[64:ff9b::a9fe:a9fe]", id="NAT64"),
        pytest.param("[2002:7f00:1::1]", id="6to4"),
        pytest.param("[fe80::1%25eth0]", id="a zone"),
        pytest.param("[fd00:ec2::254]", id="metadata in IPv6"),
        pytest.param("256.256.256.256", id="no address, and no name"),
    ],
)
def test_a_private_host_is_refused(host: str) -> None:
    with pytest.raises(FetchRefused, match="public internet") as refusal:
        check_url(f"http://{host}/a.png")
    assert host not in str(refusal.value)


@pytest.mark.parametrize(
    "url",
    [
        pytest.param("https://v3.fal.media/files/a/b.png", id="a file of fal's"),
        pytest.param("HTTPS://V3.FAL.MEDIA/a", id="capitals"),
        pytest.param("http://images.example", id="no path"),
        pytest.param("http://images.example./", id="a dot at the end"),
        pytest.param("http://images.example:443/", id="an accepted port"),
        pytest.param("http://a_b.images.example/", id="an underscore"),
        pytest.param("https://images.example/a@b?c=d@e", id="an at sign after the host"),
        pytest.param("http://8.8.8.8/a.png", id="a public address"),
        pytest.param("http://[2606:4700:4700::1111]/a.png", id="a public address in IPv6"),
        pytest.param("http://例え.jp/ü.png", id="another alphabet"),
    ],
)
def test_a_public_url_is_accepted(url: str) -> None:
    assert check_url(url).host


async def test_a_refused_url_is_neither_resolved_nor_connected_to(
    world: World, fetcher: Fetcher
) -> None:
    for host in ("localhost", "127.1", PRIVATE, "[::ffff:7f00:1]"):
        with pytest.raises(FetchRefused):
            await fetcher.fetch_digest(world.url("/a.png", host), MAX)
        with pytest.raises(FetchRefused):
            await fetcher.fetch_first_bytes(world.url("/a.png", host), 10)
    assert world.names.asked == []
    assert world.private.connections == 0


# Refusals at the connection


@pytest.mark.parametrize(
    "addresses",
    [
        pytest.param([PRIVATE], id="one"),
        pytest.param([PRIVATE, "10.0.0.1"], id="two"),
        pytest.param([PRIVATE, "::1"], id="one of each family"),
        pytest.param(["::ffff:127.0.0.1"], id="mapped"),
    ],
)
async def test_a_name_with_private_addresses_only_is_refused(
    world: World, fetcher: Fetcher, addresses: list[str]
) -> None:
    world.names.known[NAME] = [addresses]
    with pytest.raises(FetchRefused, match="public internet") as refusal:
        await fetcher.fetch_digest(world.url("/a.png"), MAX)
    assert NAME not in str(refusal.value)
    assert PRIVATE not in str(refusal.value)
    assert world.private.connections == 0
    assert len(world.names.asked) == 1, "a refusal is not retried"


@pytest.mark.parametrize(
    "addresses",
    [
        pytest.param([PRIVATE, PUBLIC], id="the private one first"),
        pytest.param([PUBLIC, PRIVATE], id="the public one first"),
        pytest.param(["::1", PUBLIC], id="the private one in IPv6"),
        pytest.param([PRIVATE, "10.0.0.1", "::1", PUBLIC], id="many private ones"),
        pytest.param([UNUSED, PRIVATE, PUBLIC], id="a public one that is down"),
    ],
)
async def test_a_name_with_both_kinds_leads_to_the_public_one(
    world: World, fetcher: Fetcher, addresses: list[str]
) -> None:
    world.names.known[NAME] = [addresses]
    assert (await fetcher.fetch_digest(world.url("/a.png"), MAX)).digest == DIGEST
    assert world.private.connections == 0


@pytest.mark.parametrize("addresses", [[UNUSED, PRIVATE], [PRIVATE, UNUSED]], ids=str)
async def test_a_public_address_that_is_down_is_no_refusal(
    world: World, fetcher: Fetcher, addresses: list[str]
) -> None:
    world.names.known[NAME] = [addresses]
    with pytest.raises(FetchFailed, match="could not be reached"):
        await fetcher.fetch_digest(world.url("/a.png"), MAX)
    assert len(world.names.asked) == 3
    assert world.private.connections == 0


async def test_a_name_that_changes_to_a_private_address_is_refused(
    world: World, fetcher: Fetcher
) -> None:
    world.names.known[NAME] = [[PUBLIC], [PRIVATE]]
    await fetcher.fetch_digest(world.url("/a.png"), MAX)
    with pytest.raises(FetchRefused):
        await fetcher.fetch_digest(world.url("/a.png"), MAX)
    assert world.private.connections == 0


async def test_a_name_that_changes_to_a_private_address_between_attempts_is_refused(
    world: World, fetcher: Fetcher
) -> None:
    world.names.known[NAME] = [[PUBLIC], [PRIVATE]]
    world.public.responses["/a.png"] = reply(503)
    with pytest.raises(FetchRefused):
        await fetcher.fetch_digest(world.url("/a.png"), MAX)
    assert (world.public.connections, world.private.connections) == (1, 0)


async def test_an_unknown_name_is_a_failure_and_no_refusal(world: World, fetcher: Fetcher) -> None:
    with pytest.raises(FetchFailed, match="not known") as failure:
        await fetcher.fetch_digest(world.url("/a.png", "unknown.example"), MAX)
    assert failure.value.__cause__ is None
    assert len(world.names.asked) == 1


async def test_names_are_resolved_by_the_system_by_default() -> None:
    async with Fetcher(timeouts=FetchTimeouts(backoff=wait_none(), overall=5.0)) as fetcher:
        with pytest.raises(FetchFailed):
            await fetcher.fetch_digest("http://no-such-host.fal-ai.example/", MAX)


# Redirects


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_a_redirect_is_followed(world: World, fetcher: Fetcher, status: int) -> None:
    world.public.responses["/from"] = redirect("a.png", status)
    assert (await fetcher.fetch_digest(world.url("/from"), MAX)).digest == DIGEST


@pytest.mark.parametrize(
    "location",
    [
        pytest.param("http://127.0.0.1:{port}/a.png", id="a private address"),
        pytest.param("//127.0.0.1:{port}/a.png", id="a private address without a scheme"),
        pytest.param("http://2130706433:{port}/a.png", id="one number"),
        pytest.param("http://0x7f.1:{port}/a.png", id="hexadecimal"),
        pytest.param("http://[::ffff:7f00:1]:{port}/a.png", id="mapped"),
        pytest.param("http://localhost:{port}/a.png", id="localhost"),
        pytest.param("http://inside.example:{port}/a.png", id="a name of a private address"),
        pytest.param(f"http://user@{NAME}:{{port}}/a.png", id="a user"),
        pytest.param(f"http://{NAME}:22/", id="another port"),
        pytest.param("file:///etc/passwd", id="a file"),
        pytest.param("http:\\\\127.0.0.1:{port}\\a.png", id="backslashes"),
        pytest.param("http://127.0.0.1\t:{port}/a.png", id="a tab"),
        pytest.param("http://[::1", id="half a bracket"),
    ],
)
async def test_a_redirect_to_a_private_address_is_refused(
    world: World, fetcher: Fetcher, location: str
) -> None:
    world.names.known["inside.example"] = [[PRIVATE]]
    world.public.responses["/from"] = redirect(location.format(port=world.port))
    with pytest.raises(FetchRefused):
        await fetcher.fetch_digest(world.url("/from"), MAX)
    with pytest.raises(FetchRefused):
        await fetcher.fetch_first_bytes(world.url("/from"), 10)
    assert world.private.connections == 0
    assert world.public.connections == 2


async def test_three_redirects_are_followed(world: World, fetcher: Fetcher) -> None:
    for hop in range(3):
        world.public.responses[f"/{hop}"] = redirect(f"/{hop + 1}")
    world.public.responses["/3"] = reply()
    assert (await fetcher.fetch_digest(world.url("/0"), MAX)).digest == DIGEST


@pytest.mark.parametrize("step", [pytest.param(1, id="20 hops"), pytest.param(0, id="a loop")])
async def test_more_redirects_are_not_followed(world: World, fetcher: Fetcher, step: int) -> None:
    for hop in range(20):
        world.public.responses[f"/{hop}"] = redirect(f"/{hop + step}")
    with pytest.raises(FetchFailed, match="too many redirects"):
        await fetcher.fetch_digest(world.url("/0"), MAX)
    assert world.public.connections == 4


async def test_a_redirect_without_a_location_is_a_failure(world: World, fetcher: Fetcher) -> None:
    world.public.responses["/from"] = reply(302, b"")
    with pytest.raises(FetchFailed):
        await fetcher.fetch_digest(world.url("/from"), MAX)


# TLS


@pytest.fixture
async def tls(world: World) -> AsyncIterator[trustme.CA]:
    """A TLS server for NAME, with its CA certificate. /from redirects to plain http."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority = trustme.CA()
    authority.issue_cert(NAME).configure_cert(context)
    host = Host(responses={"/from": redirect(world.url("/a.png")), "/a.png": reply()})
    world.names.known[NAME] = [[UNUSED]]
    async with await asyncio.start_server(host.serve, UNUSED, world.port, ssl=context):
        yield authority


async def test_an_untrusted_certificate_is_a_failure(
    world: World, fetcher: Fetcher, tls: trustme.CA
) -> None:
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: None)
    with pytest.raises(FetchFailed, match="no valid certificate"):
        await fetcher.fetch_digest(f"https://{NAME}:{world.port}/a.png", MAX)


async def test_a_redirect_from_https_to_http_is_not_followed(
    world: World, fetcher: Fetcher, tls: trustme.CA, monkeypatch: pytest.MonkeyPatch
) -> None:
    trust = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    tls.configure_trust(trust)
    monkeypatch.setattr("aiohttp.connector._SSL_CONTEXT_VERIFIED", trust)
    assert (await fetcher.fetch_digest(f"https://{NAME}:{world.port}/a.png", MAX)).digest == DIGEST
    with pytest.raises(FetchFailed, match="from https to http"):
        await fetcher.fetch_digest(f"https://{NAME}:{world.port}/from", MAX)
    assert world.public.connections == 0


# Sizes


async def endless(writer: asyncio.StreamWriter) -> None:
    """Send 10 GB, unless the client closes the connection."""
    writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    chunk = b"10000\r\n" + bytes(0x10000) + b"\r\n"
    for _ in range(10 * 2**30 // 0x10000):
        writer.write(chunk)
        await writer.drain()


async def endless_without_length(writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
    chunk = bytes(0x10000)
    for _ in range(10 * 2**30 // 0x10000):
        writer.write(chunk)
        await writer.drain()


@pytest.mark.parametrize("responder", [endless, endless_without_length])
async def test_a_body_of_10_gb_is_abandoned_at_the_limit_in_constant_memory(
    world: World, fetcher: Fetcher, responder: Responder
) -> None:
    world.public.responses["/endless"] = responder
    tracemalloc.start()
    try:
        with pytest.raises(FetchTooLarge):
            await fetcher.fetch_digest(world.url("/endless"), 32 * MAX)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 4 * MAX
    assert world.public.connections == 1, "a response that is too large is not requested again"


async def test_reading_the_head_of_a_body_of_10_gb_closes_the_connection(
    world: World, fetcher: Fetcher
) -> None:
    world.public.responses["/endless"] = endless
    assert await fetcher.fetch_first_bytes(world.url("/endless"), 100_000) == bytes(100_000)
    await wait_until(lambda: not world.public.open_now, seconds=2)


async def test_a_content_length_above_the_limit_is_refused_at_once(
    world: World, fetcher: Fetcher
) -> None:
    async def promise(writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 10737418240\r\n\r\n")
        await asyncio.sleep(60)

    world.public.responses["/promise"] = promise
    async with asyncio.timeout(1):
        with pytest.raises(FetchTooLarge):
            await fetcher.fetch_digest(world.url("/promise"), MAX)


@pytest.mark.parametrize(
    ("size", "fits"),
    [
        pytest.param(len(IMAGE), True, id="as many as may be"),
        pytest.param(len(IMAGE) - 1, False, id="one too many"),
    ],
)
@pytest.mark.parametrize("has_length", [True, False], ids=["with length", "without length"])
async def test_the_limit_is_exact(
    world: World, fetcher: Fetcher, size: int, fits: bool, has_length: bool
) -> None:
    if not has_length:
        world.public.responses["/a.png"] = b"HTTP/1.1 200 OK\r\n\r\n" + IMAGE
    if fits:
        assert (await fetcher.fetch_digest(world.url("/a.png"), size)).size == size
    else:
        with pytest.raises(FetchTooLarge):
            await fetcher.fetch_digest(world.url("/a.png"), size)


async def test_a_content_length_that_is_too_small_is_a_failure(
    world: World, fetcher: Fetcher
) -> None:
    world.public.responses["/short"] = reply(body=IMAGE * 100, Content_Length="1024")
    with pytest.raises(FetchFailed, match="broke off"):
        await fetcher.fetch_digest(world.url("/short"), MAX)


async def test_a_content_length_that_is_too_large_is_a_failure(
    world: World, fetcher: Fetcher
) -> None:
    world.public.responses["/long"] = reply(Content_Length=str(len(IMAGE) + 1))
    with pytest.raises(FetchFailed, match="broke off"):
        await fetcher.fetch_digest(world.url("/long"), MAX)
    assert world.public.connections == 3


@pytest.mark.parametrize("coding", ["gzip", "GZIP", "deflate", "br", "identity, gzip"])
async def test_a_compressed_response_is_not_read(
    world: World, fetcher: Fetcher, coding: str
) -> None:
    world.public.responses["/a.gz"] = reply(body=gzip.compress(IMAGE), Content_Encoding=coding)
    with pytest.raises(FetchFailed, match="compressed"):
        await fetcher.fetch_digest(world.url("/a.gz"), MAX)
    with pytest.raises(FetchFailed, match="compressed"):
        await fetcher.fetch_first_bytes(world.url("/a.gz"), 10)
    assert world.public.connections == 2


async def test_identity_does_not_count_as_compression(world: World, fetcher: Fetcher) -> None:
    world.public.responses["/a.png"] = reply(Content_Encoding="identity")
    assert (await fetcher.fetch_digest(world.url("/a.png"), MAX)).digest == DIGEST


# First bytes


async def test_the_first_bytes_are_requested_as_a_range(world: World, fetcher: Fetcher) -> None:
    world.public.responses["/a.png"] = reply(206, IMAGE[:8], Content_Range="bytes 0-7/6008")
    assert await fetcher.fetch_first_bytes(world.url("/a.png"), 8) == IMAGE[:8]
    assert header_lines(world.public.seen[0])["range"] == "bytes=0-7"


async def test_the_first_bytes_are_read_from_a_host_without_ranges(
    world: World, fetcher: Fetcher
) -> None:
    assert await fetcher.fetch_first_bytes(world.url("/a.png"), 8) == IMAGE[:8]


async def test_the_first_bytes_of_a_short_file_are_all_of_it(
    world: World, fetcher: Fetcher
) -> None:
    assert await fetcher.fetch_first_bytes(world.url("/a.png"), MAX) == IMAGE


async def test_another_range_than_the_requested_is_a_failure(
    world: World, fetcher: Fetcher
) -> None:
    world.public.responses["/a.png"] = reply(206, IMAGE[8:], Content_Range="bytes 8-6007/6008")
    with pytest.raises(FetchFailed):
        await fetcher.fetch_first_bytes(world.url("/a.png"), 8)


async def test_a_partial_response_to_a_full_request_is_a_failure(
    world: World, fetcher: Fetcher
) -> None:
    world.public.responses["/a.png"] = reply(206, IMAGE[:8], Content_Range="bytes 0-7/6008")
    with pytest.raises(FetchFailed):
        await fetcher.fetch_digest(world.url("/a.png"), MAX)


# Attempts and time


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410, 416, 204, 304, 299])
async def test_a_permanent_error_is_not_retried(
    world: World, fetcher: Fetcher, status: int
) -> None:
    world.public.responses["/a.png"] = reply(status, b"")
    with pytest.raises(FetchFailed) as failure:
        await fetcher.fetch_digest(world.url("/a.png"), MAX)
    assert failure.value.status == status
    assert world.public.connections == 1


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
async def test_a_retryable_error_is_tried_three_times(
    world: World, fetcher: Fetcher, status: int
) -> None:
    world.public.responses["/a.png"] = reply(status, b"")
    with pytest.raises(FetchFailed) as failure:
        await fetcher.fetch_digest(world.url("/a.png"), MAX)
    assert failure.value.status == status
    assert world.public.connections == 3


async def test_the_third_attempt_may_succeed(world: World, fetcher: Fetcher) -> None:
    broken = reply(Content_Length="10000")
    world.public.responses["/a.png"] = [b"", broken, reply()]
    assert (await fetcher.fetch_digest(world.url("/a.png"), MAX)).digest == DIGEST
    assert world.public.connections == 3


@pytest.mark.parametrize(
    "response",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(b"nonsense\r\n\r\n", id="no HTTP"),
        pytest.param(b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n", id="no length"),
        pytest.param(b"HTTP/1.1 200 OK\r\nA: " + b"a" * 9000 + b"\r\n\r\n", id="a long line"),
        pytest.param(b"HTTP/1.1 101 Switching\r\nUpgrade: a\r\n\r\n", id="another protocol"),
        pytest.param(
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n", id="a broken chunk"
        ),
    ],
)
async def test_a_malformed_response_is_a_failure(
    world: World, fetcher: Fetcher, response: bytes
) -> None:
    world.public.responses["/a.png"] = response
    with pytest.raises(FetchFailed):
        await fetcher.fetch_digest(world.url("/a.png"), MAX)


async def silence(writer: asyncio.StreamWriter) -> None:
    await asyncio.sleep(60)


async def stall(writer: asyncio.StreamWriter) -> None:
    writer.write(reply(Content_Length="10000"))
    await asyncio.sleep(60)


async def trickle(writer: asyncio.StreamWriter) -> None:
    """Send single bytes with pauses below the idle time-out."""
    writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
    while True:
        writer.write(b".")
        await writer.drain()
        await asyncio.sleep(0.02)


@pytest.mark.parametrize(
    ("responder", "timeouts"),
    [
        pytest.param(silence, {"idle": 0.05}, id="no response"),
        pytest.param(stall, {"idle": 0.05}, id="an incomplete body"),
        pytest.param(trickle, {"idle": 0.05, "total": 0.1}, id="a byte now and then"),
        pytest.param(trickle, {"overall": 0.1}, id="one attempt takes all the time"),
    ],
)
async def test_time_outs_are_failures(
    world: World, responder: Responder, timeouts: dict[str, float]
) -> None:
    world.public.responses["/slow"] = responder
    async with world.fetcher(**timeouts) as fetcher, asyncio.timeout(2):
        with pytest.raises(FetchFailed, match="in time"):
            await fetcher.fetch_digest(world.url("/slow"), MAX)
        with pytest.raises(FetchFailed, match="in time"):
            await fetcher.fetch_first_bytes(world.url("/slow"), MAX)


async def test_all_attempts_together_have_a_time_out(world: World) -> None:
    world.public.responses["/slow"] = silence
    async with world.fetcher(total=0.08, overall=0.12) as fetcher:
        with pytest.raises(FetchFailed):
            await fetcher.fetch_digest(world.url("/slow"), MAX)
    assert world.public.connections == 2


async def test_concurrent_fetches_are_limited(world: World, fetcher: Fetcher) -> None:
    running: list[int] = []
    most = 0

    async def slow(writer: asyncio.StreamWriter) -> None:
        nonlocal most
        running.append(1)
        most = max(most, len(running))
        await asyncio.sleep(0.05)
        running.pop()
        writer.write(reply())

    paths = [f"/{number}" for number in range(MAX_CONNECTIONS * 2)]
    world.public.responses |= dict.fromkeys(paths, slow)
    fetched = await asyncio.gather(*(fetcher.fetch_digest(world.url(path), MAX) for path in paths))
    assert {result.digest for result in fetched} == {DIGEST}
    assert most == MAX_CONNECTIONS_PER_HOST


# Shared fetches


async def test_concurrent_fetches_of_a_url_are_shared(world: World, fetcher: Fetcher) -> None:
    fetches = (fetcher.fetch_digest(world.url("/a.png"), MAX) for _ in range(50))
    assert {result.digest for result in await asyncio.gather(*fetches)} == {DIGEST}
    assert world.public.connections == 1


async def test_a_failure_is_shared_and_not_cached(world: World, fetcher: Fetcher) -> None:
    world.public.responses["/a.png"] = reply(404)
    fetches = (fetcher.fetch_digest(world.url("/a.png"), MAX) for _ in range(5))
    failures = await asyncio.gather(*fetches, return_exceptions=True)
    assert [type(failure) for failure in failures] == [FetchFailed] * 5
    world.public.responses["/a.png"] = reply()
    assert (await fetcher.fetch_digest(world.url("/a.png"), MAX)).digest == DIGEST
    assert world.public.connections == 2


async def test_another_limit_is_another_fetch(world: World, fetcher: Fetcher) -> None:
    small, large = await asyncio.gather(
        fetcher.fetch_digest(world.url("/a.png"), 10),
        fetcher.fetch_digest(world.url("/a.png"), MAX),
        return_exceptions=True,
    )
    assert isinstance(small, FetchTooLarge)
    assert isinstance(large, FetchedDigest)


async def start(
    coroutine: Coroutine[object, object, FetchedDigest], host: Host
) -> asyncio.Task[FetchedDigest]:
    """Return the fetch as a task, after the host has received a request."""
    task = asyncio.create_task(coroutine)
    await wait_until(lambda: host.seen, seconds=2)
    return task


async def test_a_cancelled_caller_does_not_affect_the_others(
    world: World, fetcher: Fetcher
) -> None:
    is_released = asyncio.Event()

    async def wait(writer: asyncio.StreamWriter) -> None:
        await is_released.wait()
        writer.write(reply())

    world.public.responses["/a.png"] = wait
    first = await start(fetcher.fetch_digest(world.url("/a.png"), MAX), world.public)
    second = asyncio.create_task(fetcher.fetch_digest(world.url("/a.png"), MAX))
    await asyncio.sleep(0)
    first.cancel()
    await asyncio.sleep(0)
    is_released.set()
    assert (await second).digest == DIGEST
    assert first.cancelled()
    assert world.public.connections == 1


async def test_the_last_cancelled_caller_cancels_the_fetch(world: World, fetcher: Fetcher) -> None:
    world.public.responses["/endless"] = endless
    task = await start(fetcher.fetch_digest(world.url("/endless"), 2**40), world.public)
    task.cancel()
    await wait_until(lambda: not world.public.open_now, seconds=2)
    world.public.responses["/endless"] = reply()
    assert (await fetcher.fetch_digest(world.url("/endless"), 2**40)).digest == DIGEST


async def test_closing_a_fetcher_cancels_running_fetches(world: World) -> None:
    world.public.responses["/endless"] = endless
    async with world.fetcher() as fetcher:
        task = await start(fetcher.fetch_digest(world.url("/endless"), 2**40), world.public)
    await asyncio.wait([task])
    assert task.cancelled()


# The digest cache


@pytest.mark.parametrize(
    ("headers", "fresh_for"),
    [
        pytest.param({}, 0.0, id="by default"),
        pytest.param({"Cache_Control": "max-age=60"}, 60.0, id="a minute"),
        pytest.param({"Cache_Control": "public, MAX-AGE=60"}, 60.0, id="capitals"),
        pytest.param({"Cache_Control": 'max-age="60"'}, 60.0, id="quotes"),
        pytest.param({"Cache_Control": "max-age=60, max-age=10"}, 10.0, id="twice"),
        pytest.param({"Cache_Control": "max-age=31536000"}, FRESHNESS_MAX, id="a year"),
        pytest.param({"Cache_Control": "immutable"}, FRESHNESS_MAX, id="immutable"),
        pytest.param({"Cache_Control": "max-age=60, immutable"}, 60.0, id="immutable for a minute"),
        pytest.param({"Cache_Control": "max-age=0, immutable"}, 0.0, id="immutable for no time"),
        pytest.param({"Cache_Control": "max-age=60, must-revalidate"}, 60.0, id="then revalidated"),
        pytest.param({"Cache_Control": "max-age=0, must-revalidate"}, 0.0, id="always revalidated"),
        pytest.param({"Cache_Control": "max-age=60, no-store"}, 0.0, id="no-store"),
        pytest.param({"Cache_Control": "max-age=60, no-cache"}, 0.0, id="no-cache"),
        pytest.param({"Cache_Control": 'no-cache="a", max-age=60'}, 0.0, id="no-cache of a field"),
        pytest.param({"Cache_Control": "immutable, no-store"}, 0.0, id="immutable, no-store"),
        pytest.param({"Cache_Control": "max-age=-60"}, 0.0, id="a negative age"),
        pytest.param({"Cache_Control": "max-age=6e9"}, 0.0, id="no number"),
        pytest.param({"Cache_Control": "max-age=" + "9" * 400}, FRESHNESS_MAX, id="a huge number"),
        pytest.param({"Cache_Control": "s-maxage=60"}, 0.0, id="for shared caches only"),
        pytest.param({"Cache_Control": "max-age=60", "Age": "20"}, 40.0, id="some of it is over"),
        pytest.param({"Cache_Control": "max-age=60", "Age": "90"}, 0.0, id="all of it is over"),
    ],
)
async def test_a_digest_is_cached_as_long_as_its_host_allows(
    world: World, fetcher: Fetcher, headers: dict[str, str], fresh_for: float
) -> None:
    world.public.responses["/a.png"] = reply(200, IMAGE, **headers)
    fetched = await fetcher.fetch_digest(world.url("/a.png"), MAX)
    assert fetched.fresh_for == fresh_for
    await fetcher.fetch_digest(world.url("/a.png"), MAX)
    assert world.public.connections == (1 if fresh_for else 2)


async def test_an_expired_digest_is_fetched_again(world: World, fetcher: Fetcher) -> None:
    world.public.responses["/a.png"] = reply(Cache_Control="max-age=60")
    url = world.url("/a.png")
    await fetcher.fetch_digest(url, MAX)
    world.now += 59
    assert (await fetcher.fetch_digest(url, MAX)).fresh_for == 1.0
    world.now += 1
    assert (await fetcher.fetch_digest(url, MAX)).fresh_for == 60.0
    assert world.public.connections == 2


async def test_a_cached_digest_is_checked_against_the_limit(world: World, fetcher: Fetcher) -> None:
    world.public.responses["/a.png"] = reply(Cache_Control="max-age=60")
    await fetcher.fetch_digest(world.url("/a.png"), MAX)
    with pytest.raises(FetchTooLarge):
        await fetcher.fetch_digest(world.url("/a.png"), len(IMAGE) - 1)


async def test_a_redirect_that_may_change_is_not_cached(world: World, fetcher: Fetcher) -> None:
    world.public.responses["/a.png"] = reply(Cache_Control="max-age=60")
    world.public.responses["/random"] = redirect("/a.png")
    assert (await fetcher.fetch_digest(world.url("/random"), MAX)).fresh_for == 0.0


def entry(fresh_for: float, size: int = 0) -> FetchedDigest:
    return FetchedDigest("digest", size, bytes(size), fresh_for)


def test_the_least_recently_used_digest_is_dropped_first() -> None:
    digest_cache = DigestCache(lambda: 0.0)
    for number in range(CACHE_SIZE):
        digest_cache.put(str(number), entry(60.0))
    assert digest_cache.get("0")
    digest_cache.put("new", entry(60.0))
    assert digest_cache.get("0")
    assert digest_cache.get("1") is None


def test_the_bytes_of_cached_heads_are_limited() -> None:
    digest_cache = DigestCache(lambda: 0.0)
    count = CACHE_BYTES // HEAD_MAX
    for number in range(count + 1):
        digest_cache.put(str(number), entry(60.0, HEAD_MAX))
        digest_cache.put(str(number), entry(60.0, HEAD_MAX))
    assert digest_cache.get("0") is None
    assert digest_cache.get("1")


# Trusted URLs


@pytest.fixture
def ours(world: World, fetcher: Fetcher) -> Fetcher:
    """A fetcher that trusts the files of the private server."""
    fetcher.trust(world.url("/files/", PRIVATE))
    world.private.responses["/files/a.png"] = reply()
    return fetcher


@pytest.mark.parametrize("host", [PRIVATE, "localhost", "LOCALHOST", "[::1]"])
async def test_a_file_below_a_trusted_prefix_is_fetched(
    world: World, ours: Fetcher, host: str
) -> None:
    url = world.url("/files/a.png", host)
    assert ours.is_trusted(url)
    ours.check_url(url)
    assert (await ours.fetch_digest(url, MAX)).digest == DIGEST
    assert await ours.fetch_first_bytes(url, 8) == IMAGE[:8]
    assert world.private.connections == 2, "each name of the trusted host is accepted"
    assert world.names.asked == []


@pytest.mark.parametrize(
    "url",
    [
        pytest.param("http://127.0.0.1:{port}/a.png", id="beside the prefix"),
        pytest.param("http://127.0.0.1:{port}/filesystem", id="the same letters"),
        pytest.param("http://127.0.0.1:{port}/FILES/a.png", id="other letters"),
        pytest.param("http://127.0.0.1:{port}/files/../a.png", id="dot segments"),
        pytest.param("http://127.0.0.1:{port}/files/%2e%2e/a.png", id="escaped dots"),
        pytest.param("http://127.0.0.1:{port}/files/.%2E/a.png", id="one escaped dot"),
        pytest.param("http://127.0.0.1:{port}/files/..%2fa.png", id="an escaped slash"),
        pytest.param("http://127.0.0.1:{port}/files/%252e%252e/a.png", id="dots escaped twice"),
        pytest.param("http://127.0.0.1:{port}/files/..%5ca.png", id="an escaped backslash"),
        pytest.param("http://127.0.0.1:{port}/files/..\\a.png", id="a backslash"),
        pytest.param("http://127.0.0.1:{port}/files/..;/a.png", id="dots with a parameter"),
        pytest.param("http://127.0.0.1:{port}//files/a.png", id="two slashes"),
        pytest.param("http://127.0.0.1:1/files/a.png", id="another port"),
        pytest.param("https://127.0.0.1:{port}/files/a.png", id="another scheme"),
        pytest.param("http://127.0.0.2/files/a.png", id="another address of loopback"),
        pytest.param("http://2130706433:{port}/files/a.png", id="another spelling"),
        pytest.param("http://user@127.0.0.1:{port}/files/a.png", id="a user"),
        pytest.param("http://127.0.0.1:{port}@evil.example/files/a.png", id="a host behind it"),
        pytest.param("http://127.0.0.1.evil.example:22/files/a.png", id="a name that starts so"),
    ],
)
async def test_other_urls_are_not_trusted(world: World, ours: Fetcher, url: str) -> None:
    url = url.format(port=world.port)
    assert not ours.is_trusted(url)
    with pytest.raises(FetchRefused):
        await ours.fetch_digest(url, MAX)
    assert world.private.connections == 0


async def test_a_redirect_to_a_trusted_url_is_refused(world: World, ours: Fetcher) -> None:
    world.public.responses["/from"] = redirect(world.url("/files/a.png", PRIVATE))
    with pytest.raises(FetchRefused):
        await ours.fetch_digest(world.url("/from"), MAX)
    assert world.private.connections == 0


async def test_redirects_of_trusted_urls_are_not_followed(world: World, ours: Fetcher) -> None:
    world.private.responses["/files/from"] = redirect(world.url("/a.png"))
    with pytest.raises(FetchFailed):
        await ours.fetch_digest(world.url("/files/from", PRIVATE), MAX)
    assert world.public.connections == 0


def test_prefixes_can_be_trusted_from_the_start() -> None:
    fetcher = Fetcher(trusted=["http://localhost:8081"])
    assert fetcher.is_trusted("http://127.0.0.1:8081/files/a.png")
    assert not fetcher.is_trusted("http://127.0.0.1:8082/files/a.png")


# The application, and the log


async def test_a_fetcher_is_open_while_its_application_is(world: World) -> None:
    app = web.Application()
    app.cleanup_ctx.append(fetcher_context(world.fetcher()))
    runner = web.AppRunner(app)
    await runner.setup()
    assert (await app[FETCHER].fetch_digest(world.url("/a.png"), MAX)).digest == DIGEST
    await runner.cleanup()
    with pytest.raises(RuntimeError, match="closed"):
        await app[FETCHER].fetch_digest(world.url("/a.png"), MAX)


async def test_no_log_line_or_message_contains_a_url(
    world: World, fetcher: Fetcher, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    world.names.known["down.example"] = [[UNUSED]]
    world.public.responses["/broken"] = b"secret\r\n\r\n"
    messages = []
    for path, host in itertools.product(
        ("/secret?secret", "/broken"), (NAME, "down.example", "unknown.example", "localhost")
    ):
        with pytest.raises((FetchFailed, FetchRefused)) as failure:
            await fetcher.fetch_digest(world.url(path, host), MAX)
        assert failure.value.__suppress_context__ or failure.value.__context__ is None
        messages.append(str(failure.value))
    shown = caplog.text + "".join(messages)
    assert messages
    assert not [word for word in ("secret", "example", PUBLIC, UNUSED) if word in shown]
