"""The fast path for heads that differ in the identifiers of load balancers, cookies and addresses
of clients only."""

import logging
import time
import tracemalloc
from collections.abc import Callable
from ipaddress import ip_network

import pytest
from aiohttp import web
from aiohttp.typedefs import Middleware

from falproxy import Identity, create_app
from falproxy.app.pipeline import authorization
from falproxy.middleware.guess_limit import BURST
from falproxy.proxy.head_only import any_request_id, head_only
from falproxy.server.fast_path import CALLER_TAGS, REQUEST_TAGS, Tags, split_poll, split_tags
from falproxy.server.fast_path.untagged_keys import KEYS_MAX, KEYS_MAX_BYTES, UntaggedKeys
from tests.support.fake_fal import FakeFal
from tests.support.gateway import FastPathTestServer
from tests.support.key_search import CANARY
from tests.support.polled_proxy import (
    SECRET,
    MakeProxy,
    bearer,
    new_id,
    recording,
    respond_with_path,
    token_of,
)
from tests.support.polling_client import PollingClient, poll_request, submit_request
from tests.support.settings import make_settings

pytestmark = pytest.mark.both_event_loops

NAMES = [name.decode() for name in REQUEST_TAGS + CALLER_TAGS]
KEYS = (("ann", "a-key-of-16-chars"),)
KINDS = pytest.mark.parametrize("kind", ["poll", "submit"])


def request_of(kind: str, *lines: str) -> bytes:
    return poll_request(new_id(), *lines) if kind == "poll" else submit_request(*lines)


@KINDS
@pytest.mark.parametrize("name", NAMES)
async def test_other_tags_take_the_fast_path(
    make_proxy: MakeProxy, fal: FakeFal, kind: str, name: str
) -> None:
    proxy = await make_proxy()
    client = await proxy.client()
    for written in (name, name.title(), name.upper(), name):
        assert await client.status(request_of(kind, f"{written}: {new_id()}")) == 200
    assert proxy.hits == 3
    assert not any(name == sent for seen in fal.seen for sent, _ in seen.headers)


@KINDS
async def test_a_head_without_tags_has_the_same_route(make_proxy: MakeProxy, kind: str) -> None:
    proxy = await make_proxy()
    client = await proxy.client()
    for lines in ([], ["CF-Ray: 1"], [], ["X-Request-ID: 2", "CF-Ray: 3"], ["X-Request-ID:4"]):
        assert await client.status(request_of(kind, *lines)) == 200
    assert proxy.hits == 4


@KINDS
async def test_log_and_response_have_the_id_of_each_request(
    make_proxy: MakeProxy, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    proxy = await make_proxy()
    client = await proxy.client()
    values = ["first", "second", "has spaces", "x" * 129, "third", "fourth "]
    with caplog.at_level(logging.INFO, "falproxy.calls"):
        for value in values:
            assert await client.status(request_of(kind, f"X-Request-ID: {value}")) == 200
        assert (
            await client.status(request_of(kind, "X-Request-ID: one", "X-Request-ID: two")) == 200
        )
        assert await client.status(request_of(kind)) == 200
    fields = [vars(each)["fields"] for each in caplog.records if each.name == "falproxy.calls"]
    ids = [line["request_id"] for line in fields]
    assert [ids[at] for at in (0, 1, 4, 5, 6)] == ["first", "second", "third", "fourth", "one"]
    assert len({*ids}) == len(ids)
    assert not {*ids} & {"has spaces", "x" * 129, "two"}
    assert proxy.hits == len(ids) - 1


@pytest.mark.parametrize("declare", [head_only, any_request_id])
async def test_middleware_that_is_not_declared_sees_each(
    make_proxy: MakeProxy,
    monkeypatch: pytest.MonkeyPatch,
    declare: Callable[[Middleware], Middleware],
) -> None:
    seen: list[str] = []
    monkeypatch.setattr(
        "falproxy.app.authorization",
        lambda *args, **options: [*authorization(*args, **options), recording(seen, declare)],
    )
    proxy = await make_proxy()
    client = await proxy.client()
    ids = [new_id() for _ in range(12)]
    for request_id in ids:
        assert await client.status(submit_request(f"X-Request-ID: {request_id}")) == 200
    assert seen == (ids if declare is head_only else ids[:1])


async def test_middleware_of_the_application_sees_each(make_proxy: MakeProxy, fal: FakeFal) -> None:
    """It may read any header."""
    seen: list[str] = []
    settings = make_settings(fal_key=CANARY, upstream_origin=fal.origin)
    app = create_app(settings)
    app.middlewares.append(recording(seen, head_only))
    server = FastPathTestServer(app)
    await server.start_server()
    assert server.port is not None
    ids = [new_id() for _ in range(12)]
    async with PollingClient(server.port) as client:
        for request_id in ids:
            assert await client.status(submit_request(f"X-Request-ID: {request_id}")) == 200
    await server.close()
    assert seen == ids


HEAD = poll_request("7e2f0b8a-0001-4000-8000-000000000000", "Accept: x")


@pytest.mark.parametrize(
    "tag",
    [
        pytest.param(b"CF-Ray: 1\r\n continued", id="continued by the next line"),
        pytest.param(b"CF-Ray: 1\r\n\tcontinued", id="continued by a tab"),
        pytest.param(b"CF-Ray : 1", id="space in the name"),
        pytest.param(b" CF-Ray: 1", id="continues the line before"),
        pytest.param(b"CF-Ray: \x00", id="control character"),
        pytest.param(b"CF-Ray: \xff", id="not ASCII"),
        pytest.param(b"CF-Ray: " + b"1" * 4097, id="too long"),
        pytest.param(b"CF-Ray: 1\r2", id="CR alone"),
        pytest.param(b"CF-Ray: 1\n2", id="LF alone"),
        pytest.param(b"CF-Ray", id="no value"),
        pytest.param(b"X-CF-Ray: 1", id="another name"),
        pytest.param(b"CF-Ray-2: 1", id="a longer name"),
    ],
)
async def test_other_lines_are_no_tags(make_proxy: MakeProxy, tag: bytes) -> None:
    tagged = HEAD.replace(b"\r\nAccept", b"\r\n" + tag + b"\r\nAccept")
    assert split_tags(tagged) == (tagged, None)
    proxy = await make_proxy()
    client = await proxy.client()
    assert await client.status(HEAD) == 200
    await client.request(tagged)
    assert proxy.hits == 0


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(HEAD + b"X-Request-ID: 1\r\n\r\n", id="behind the head"),
        pytest.param(HEAD[:-2] + b"\r\nX-Request-ID: 1\r\nx", id="behind the head, no end"),
        pytest.param(HEAD[:-4] + b"\r\nX-Request-ID: 1", id="incomplete"),
        pytest.param(HEAD + HEAD.replace(b"Accept", b"CF-Ray"), id="two requests"),
        pytest.param(HEAD[:-2] + b"CF-Ray: 1\r\n" * 600 + b"\r\n", id="too large"),
    ],
)
def test_data_that_is_not_one_head_keeps_its_tags(data: bytes) -> None:
    assert split_tags(data) == (data, None)


async def test_split_and_pipelined_requests_with_tags_get_responses_in_order(
    make_proxy: MakeProxy, fal: FakeFal
) -> None:
    fal.respond = respond_with_path
    proxy = await make_proxy()
    client = await proxy.client()
    await client.status(HEAD)
    ids = [new_id() for _ in range(8)]
    data = b"".join(poll_request(each, f"X-Request-ID: {each}") for each in ids)
    for start in range(0, len(data), 97):
        client.write(data[start : start + 97])
    bodies = [(await client.read())[1].decode() for _ in ids]
    assert all(each in body for each, body in zip(ids, bodies, strict=True))


async def test_an_expired_token_is_refused_with_any_tag(make_proxy: MakeProxy) -> None:
    proxy = await make_proxy(jwt_secret=SECRET)
    client = await proxy.client()
    token = bearer(token_of("ann"))
    expired = bearer(token_of("ann", exp=1))
    for line, status in ((token, 200), (token, 200), (expired, 401), (token, 200)):
        poll = poll_request(await proxy.submit(token), line, f"X-Request-ID: {new_id()}")
        assert await client.status(poll) == status
    assert proxy.hits == 2


async def test_a_hook_that_refuses_is_obeyed_with_any_tag(make_proxy: MakeProxy) -> None:
    allowed = True

    async def authenticate(request: web.Request) -> Identity | None:
        return Identity("ann", valid_for=0.0) if allowed else None

    proxy = await make_proxy(authenticate)
    client = await proxy.client()
    assert await client.status(submit_request("X-Request-ID: 1")) == 200
    allowed = False
    assert await client.status(submit_request("X-Request-ID: 2")) == 401


async def test_a_hook_sees_each_cookie(make_proxy: MakeProxy) -> None:
    async def authenticate(request: web.Request) -> Identity | None:
        name = request.cookies.get("session")
        return Identity(name, valid_for=60.0) if name in ("ann", "bob") else None

    proxy = await make_proxy(authenticate)
    client = await proxy.client()
    statuses = {"ann": 200, "bob": 200, "eve": 401}
    for name in ("ann", "ann", "bob", "eve", "ann", "eve", "bob"):
        submit = submit_request(f"Cookie: session={name}")
        assert await client.status(submit) == statuses[name], name
    of_ann = await proxy.submit("Cookie: session=ann")
    for name, status in (("ann", 200), ("bob", 404), ("ann", 200), ("bob", 404), ("eve", 401)):
        poll = poll_request(of_ann, f"Cookie: session={name}")
        assert await client.status(poll) == status, name
    assert proxy.hits == 1, "the same head again"


async def test_the_log_has_the_address_of_each_client(
    make_proxy: MakeProxy, caplog: pytest.LogCaptureFixture
) -> None:
    proxy = await make_proxy(trusted_proxies=(ip_network("127.0.0.1"),))
    client = await proxy.client()
    with caplog.at_level(logging.INFO, "falproxy.calls"):
        for lines in (
            ["X-Forwarded-For: 198.51.100.1"],
            ["X-Forwarded-For: 198.51.100.2 "],
            [],
            ["X-Forwarded-For: 198.51.100.3", "X-Forwarded-For: 198.51.100.4"],
            ["X-Forwarded-For: 198.51.100.5, 127.0.0.1"],
        ):
            assert await client.status(poll_request(new_id(), *lines)) == 200
    fields = [vars(each)["fields"] for each in caplog.records if each.name == "falproxy.calls"]
    addresses = ["198.51.100.1", "198.51.100.2", "127.0.0.1", "198.51.100.4", "198.51.100.5"]
    assert [line["client"] for line in fields] == addresses
    assert proxy.hits == 4


async def test_a_key_is_not_used_from_an_address_that_guesses(make_proxy: MakeProxy) -> None:
    """A right guess gets the same response as a wrong one."""
    proxy = await make_proxy(access_keys=KEYS, trusted_proxies=(ip_network("127.0.0.1"),))
    client = await proxy.client()
    key, of_ann = f"x-falproxy-key: {KEYS[0][1]}", "X-Forwarded-For: 198.51.100.1"
    job = await proxy.submit(key, of_ann)
    for _ in range(2):
        assert await client.status(poll_request(job, key, of_ann)) == 200
    assert proxy.hits == 1
    guess, of_guesser = "x-falproxy-key: a-key-of-16-charz", "X-Forwarded-For: 198.51.100.2"
    for _ in range(BURST):
        assert await client.status(poll_request(job, guess, of_guesser)) == 401
    assert await client.status(poll_request(job, key, of_guesser)) == 429
    for _ in range(BURST):
        await client.status(poll_request(job, guess, of_ann))
    assert await client.status(poll_request(job, guess, of_ann)) == 429
    assert await client.status(poll_request(job, key, of_ann)) == 200, "it used the key before"
    hits = proxy.hits
    other = "X-Forwarded-For: 198.51.100.3"
    assert await client.status(poll_request(job, key, other)) == 200
    assert proxy.hits == hits + 1


COOKIE = "Cookie: session=1"


async def test_the_tags_of_a_browser_are_removed_once(
    make_proxy: MakeProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    removed: list[bytes] = []

    def split(head: bytes) -> tuple[bytes, Tags | None]:
        removed.append(head)
        return split_tags(head)

    proxy = await make_proxy()
    client = await proxy.client()
    monkeypatch.setattr("falproxy.server.fast_path.route_cache.split_tags", split)
    for kind in ("poll", "submit"):
        for _ in range(2):
            assert await client.status(request_of(kind, COOKIE)) == 200
        removed.clear()
        hits = proxy.hits
        for _ in range(5):
            assert await client.status(request_of(kind, COOKIE)) == 200
        assert removed == []
        assert proxy.hits == hits + 5


@pytest.mark.parametrize("line", ["Cookie: a=/requests/{}/status", "X-Forwarded-For: /requests/{}"])
async def test_an_id_in_a_tag_is_not_the_id_of_the_job(
    make_proxy: MakeProxy, fal: FakeFal, line: str
) -> None:
    """Neither if it is in front of that of the job, nor if it equals that."""
    proxy = await make_proxy()
    client = await proxy.client()
    job, other = new_id(), new_id()

    def poll(request_id: str, tag: str) -> bytes:
        lines = poll_request(request_id).split(b"\r\n")
        return b"\r\n".join([*lines[:2], line.format(tag).encode(), *lines[2:]])

    polls = [(job, job), (job, job), (job, other), (other, job), (other, other), (job, other)]
    for request_id, tag in polls:
        assert await client.status(poll(request_id, tag)) == 200
    polled = [seen.target.split("/")[-2] for seen in fal.seen]
    assert polled == [request_id for request_id, _ in polls]


async def test_a_head_with_its_id_twice_has_its_own_route_with_any_tag(
    make_proxy: MakeProxy, fal: FakeFal
) -> None:
    proxy = await make_proxy()
    client = await proxy.client()
    first, second = new_id(), new_id()
    for request_id in (first, first, second, first, second):
        poll = poll_request(request_id, f"x-fal-note: {request_id}", COOKIE)
        assert await client.status(poll) == 200
    assert proxy.hits == 3
    for seen in fal.seen:
        assert seen.header("x-fal-note") == seen.target.split("/")[-2]


async def test_the_memory_of_remembered_tags_is_bounded(make_proxy: MakeProxy) -> None:
    proxy = await make_proxy()
    client = await proxy.client()
    keys = proxy.routes._untagged
    for number in range(40):
        await client.status(poll_request(new_id(), f"Cookie: {number}{'x' * 3000}"))
    tags = Tags(None, (), is_of_caller=True)
    for number in range(2 * KEYS_MAX):
        keys.add(f"{number:2000}".encode(), b"x", tags)
        assert keys._size <= KEYS_MAX_BYTES + 10_000
        assert len(keys._keys) <= KEYS_MAX


def test_the_memory_of_many_short_addresses_is_counted() -> None:
    keys = UntaggedKeys()
    tracemalloc.start()
    try:
        for number in range(3_000):
            lines = f"Cookie: {number}\r\n" + "x-forwarded-for:12\r\n" * 250
            tagged = HEAD.replace(b"Accept: x\r\n", lines.encode())
            untagged, tags = split_tags(tagged)
            tagged_poll, poll = split_poll(tagged), split_poll(untagged)
            assert tags is not None
            assert tagged_poll is not None
            assert poll is not None
            keys.add(tagged_poll[1], poll[1], tags)
            if number % 100 == 0:
                assert tracemalloc.get_traced_memory()[0] < 1.1 * KEYS_MAX_BYTES
    finally:
        tracemalloc.stop()


@KINDS
@pytest.mark.parametrize(
    ("lines", "address"),
    [
        pytest.param(["X-Forwarded-For: 198.51.100.1\t"], "198.51.100.1", id="tab behind it"),
        pytest.param(
            ["X-Forwarded-For: 198.51.100.9,\t198.51.100.1"], "198.51.100.1", id="tab within it"
        ),
        pytest.param(
            ["X-Forwarded-For: \xe9, 198.51.100.1"], "198.51.100.1", id="other bytes in front"
        ),
        pytest.param(
            ["X-Forwarded-For: 198.51.100.1\t", "X-Forwarded-For: 127.0.0.1"],
            "198.51.100.1",
            id="one of two lines",
        ),
    ],
)
async def test_the_log_has_an_address_that_is_no_tag(
    make_proxy: MakeProxy,
    caplog: pytest.LogCaptureFixture,
    kind: str,
    lines: list[str],
    address: str,
) -> None:
    proxy = await make_proxy(trusted_proxies=(ip_network("127.0.0.1"),))
    client = await proxy.client()
    request = request_of(kind, *lines)
    with caplog.at_level(logging.INFO, "falproxy.calls"):
        for _ in range(3):
            assert await client.status(request) == 200
    fields = [vars(each)["fields"] for each in caplog.records if each.name == "falproxy.calls"]
    assert [line["client"] for line in fields] == [address] * 3


@KINDS
async def test_the_log_has_an_id_that_is_no_tag(
    make_proxy: MakeProxy, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    proxy = await make_proxy()
    client = await proxy.client()
    requests = [["X-Request-ID: not valid", "X-Request-ID: first\t"], ["X-Request-ID: first\t"]]
    with caplog.at_level(logging.INFO, "falproxy.calls"):
        for lines in requests * 2:
            assert await client.status(request_of(kind, *lines)) == 200
    fields = [vars(each)["fields"] for each in caplog.records if each.name == "falproxy.calls"]
    ids = [line["request_id"] for line in fields]
    assert [ids[1], ids[3]] == ["first"] * 2
    assert "first" not in (ids[0], ids[2])


@pytest.mark.parametrize("tag", ["", "CF-Ray: 1\r\n"])
@pytest.mark.parametrize("space", [" ", "\t"])
def test_a_head_of_spaces_takes_no_time(tag: str, space: str) -> None:
    """Anyone may send it: no credential is checked before."""
    line = f"{tag}Cookie:{space * 5_800}\xff".encode("latin-1")
    head = HEAD.replace(b"Accept: x", line)
    started = time.process_time()
    for _ in range(10):
        split_tags(head)
    assert time.process_time() - started < 0.1
