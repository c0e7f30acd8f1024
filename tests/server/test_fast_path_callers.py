"""The fast path for callers with tokens, with keys made at run time, and with hooks: it ends with
their credential, and is never another caller's."""

import asyncio
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from aiohttp.typedefs import Handler

import falproxy
from falproxy import Identity
from falproxy.app.pipeline import authorization
from falproxy.limit_settings import NO_CALLER_LIMITS, parse_rate
from falproxy.middleware import tokens
from falproxy.stores.keys import Expiry, KeyChange, NewKey
from falproxy.stores.keys.known_keys import KNOWN_KEYS
from falproxy.stores.keys.sql_keys import choose_key_store
from tests.support.fake_fal import FakeFal
from tests.support.key_search import CANARY
from tests.support.polled_proxy import (
    SECRET,
    MakeProxy,
    PolledProxy,
    bearer,
    token_of,
)
from tests.support.polling_client import poll_request, submit_request

pytestmark = pytest.mark.both_event_loops


@pytest.fixture
async def proxy(make_proxy: MakeProxy) -> PolledProxy:
    return await make_proxy(jwt_secret=SECRET)


# Tokens


@pytest.mark.parametrize(
    "header", ["Authorization: Bearer {}", "authorization: bearer {}", "x-falproxy-key: {}"]
)
async def test_equal_polls_with_a_token_take_the_fast_path(
    proxy: PolledProxy, fal: FakeFal, header: str
) -> None:
    poll = await proxy.poll_of(header.format(token_of("ann")))
    client = await proxy.client()
    responses = [await client.request(poll) for _ in range(12)]
    assert proxy.hits == 11
    assert {*responses} == {(200, b'{"status": "IN_PROGRESS"}')}
    assert {seen.header("authorization") for seen in fal.seen} == {f"Key {CANARY}"}


async def test_a_long_token_with_the_headers_of_a_browser_takes_the_fast_path(
    proxy: PolledProxy,
) -> None:
    token = token_of("ann", user_metadata={"about": "x" * 600})
    poll = await proxy.poll_of(bearer(token), f"X-Headers-Of-A-Browser: {'x' * 900}")
    client = await proxy.client()
    for _ in range(3):
        assert await client.status(poll) == 200
    assert proxy.hits == 2


async def test_polls_on_the_fast_path_are_logged_with_the_subject(
    proxy: PolledProxy, caplog: pytest.LogCaptureFixture
) -> None:
    poll = await proxy.poll_of(bearer(token_of("user-7")))
    client = await proxy.client()
    caplog.clear()
    for _ in range(3):
        await client.status(poll)
    fields = [vars(record)["fields"] for record in caplog.records if "fields" in vars(record)]
    assert [each["principal"] for each in fields] == ["user-7"] * 3


async def test_a_token_that_expires_on_an_open_connection_is_refused(
    proxy: PolledProxy, fal: FakeFal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokens, "LEEWAY", 0)
    expires_at = int(time.time()) + 2
    poll = await proxy.poll_of(bearer(token_of("ann", exp=expires_at)))
    client = await proxy.client()
    accepted_at = 0.0
    while True:
        sent_at = time.time()
        if await client.status(poll) == 401:
            break
        accepted_at = sent_at
        await asyncio.sleep(0.01)
    assert accepted_at < expires_at <= time.time()
    assert proxy.hits > 1
    seen = len(fal.seen)
    for connection in (client, await proxy.client()):
        assert await connection.status(poll) == 401
    assert len(fal.seen) == seen


async def test_in_the_leeway_a_token_is_verified_for_every_poll(proxy: PolledProxy) -> None:
    poll = await proxy.poll_of(bearer(token_of("ann", exp=time.time() - 3)))
    client = await proxy.client()
    for _ in range(5):
        assert await client.status(poll) == 200
    assert proxy.hits == 0


@dataclass(slots=True)
class Clocks:
    """The clocks of tokens, beside the true time.

    set_by: seconds that the system's clock is ahead.
    passed: seconds that the monotonic clock is ahead.
    """

    set_by: float = 0.0
    passed: float = 0.0

    def time(self) -> float:
        return time.time() + self.set_by

    def monotonic(self) -> float:
        return time.monotonic() + self.passed


@pytest.mark.parametrize(
    ("set_by", "passed", "expected"),
    [
        pytest.param(0, 30, 200, id="half a minute passes"),
        pytest.param(30, 30, 200, id="half a minute by both clocks"),
        pytest.param(-3600, 90, 401, id="the clock is set back meanwhile"),
        pytest.param(-90, 90, 401, id="the clock stands still"),
    ],
)
async def test_a_clock_that_is_set_back_does_not_extend_a_token(
    proxy: PolledProxy, monkeypatch: pytest.MonkeyPatch, set_by: float, passed: float, expected: int
) -> None:
    clocks = Clocks()
    monkeypatch.setattr(tokens, "time", clocks)
    poll = await proxy.poll_of(bearer(token_of("ann")))
    client = await proxy.client()
    for _ in range(3):
        assert await client.status(poll) == 200
    assert proxy.hits == 2
    clocks.set_by, clocks.passed = set_by, passed
    for connection in (client, client, await proxy.client()):
        assert await connection.status(poll) == expected


async def test_a_response_behind_the_end_of_a_token_does_not_reach_the_caller(
    proxy: PolledProxy, fal: FakeFal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """fal's response needs the normal path, which refuses the token meanwhile: the connection to
    fal, in the middle of that response, is closed."""
    clocks = Clocks()
    monkeypatch.setattr(tokens, "time", clocks)
    poll = await proxy.poll_of(bearer(token_of("ann")))
    client = await proxy.client()
    for _ in range(2):
        assert await client.status(poll) == 200
    left = asyncio.Event()

    async def respond_slowly(request: web.Request) -> web.StreamResponse:
        clocks.passed = 90
        response = web.StreamResponse()
        await response.prepare(request)
        try:
            while True:
                await response.write(b"of ann" * 10_000)
        finally:
            left.set()

    fal.respond = respond_slowly
    status, body = await client.request(poll)
    assert (status, b"of ann" in body, proxy.hits) == (401, False, 2)
    async with asyncio.timeout(5):
        await left.wait()


async def test_a_clock_that_is_set_forward_ends_the_fast_path_of_a_token(
    proxy: PolledProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    clocks = Clocks()
    monkeypatch.setattr(tokens, "time", clocks)
    poll = await proxy.poll_of(bearer(token_of("ann")))
    client = await proxy.client()
    for _ in range(3):
        await client.status(poll)
    clocks.set_by = 61
    hits = proxy.hits
    for _ in range(3):
        await client.status(poll)  # PyJWT has the true clock
    assert proxy.hits == hits


async def test_a_token_that_is_not_valid_yet_takes_the_fast_path_once_it_is(
    proxy: PolledProxy, fal: FakeFal
) -> None:
    request_id = await proxy.submit(bearer(token_of("ann")))
    early = token_of("ann", nbf=time.time() + tokens.LEEWAY + 1)
    poll = poll_request(request_id, bearer(early))
    client = await proxy.client()
    seen = len(fal.seen)
    assert await client.status(poll) == 401
    assert len(fal.seen) == seen
    await client.seconds_until(200, poll)
    hits = proxy.hits
    assert await client.status(poll) == 200
    assert proxy.hits == hits + 1


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"aud": "anon"}, id="for another audience"),
        pytest.param({"secret": f"{SECRET}x"}, id="signed with another secret"),
        pytest.param({"nbf": time.time() + 3600}, id="not valid yet"),
        pytest.param({"exp": time.time() - 60}, id="expired"),
    ],
)
async def test_an_invalid_token_never_takes_the_fast_path(
    proxy: PolledProxy, fal: FakeFal, changes: dict[str, Any]
) -> None:
    request_id = await proxy.submit(bearer(token_of("ann")))
    good = poll_request(request_id, bearer(token_of("ann")))
    bad = poll_request(request_id, bearer(token_of("ann", **changes)))
    client = await proxy.client()
    for _ in range(3):
        assert await client.status(good) == 200
        assert await client.status(bad) == 401
    assert proxy.hits == 2
    assert len(fal.seen) == 4


async def test_several_tokens_on_one_connection_are_several_callers(
    proxy: PolledProxy, fal: FakeFal
) -> None:
    polls = {name: await proxy.poll_of(bearer(token_of(name))) for name in ("ann", "bob")}
    request_id = await proxy.submit(bearer(token_of("ann", exp=time.time() + 50)))
    of_ann = poll_request(request_id, bearer(token_of("ann", exp=time.time() + 40)))
    of_bob = poll_request(request_id, bearer(token_of("bob", exp=time.time() + 40)))
    client = await proxy.client()
    seen = len(fal.seen)
    for _ in range(4):
        for request, status in (
            (polls["ann"], 200), (of_bob, 404), (polls["bob"], 200), (of_ann, 200), (of_bob, 404),
        ):  # fmt: skip
            assert await client.status(request) == status
    assert proxy.hits == 9
    assert len(fal.seen) == seen + 12


async def test_pipelined_polls_are_authenticated_one_by_one(
    proxy: PolledProxy, fal: FakeFal
) -> None:
    poll = await proxy.poll_of(bearer(token_of("ann")))
    request_id = await proxy.submit(bearer(token_of("ann")))
    expired = poll_request(request_id, bearer(token_of("ann", exp=time.time() - 60)))
    client = await proxy.client()
    for _ in range(2):
        await client.status(poll)
    seen = len(fal.seen)
    client.write(poll + expired + poll + expired)
    assert [(await client.read())[0] for _ in range(4)] == [200, 401, 200, 401]
    client.write(poll)
    client.write(expired)
    client.write(poll)
    assert [(await client.read())[0] for _ in range(3)] == [200, 401, 200]
    assert len(fal.seen) == seen + 4


@pytest.mark.parametrize("at", [10, 200, -30, -2])
async def test_a_poll_in_two_pieces_is_authenticated(
    proxy: PolledProxy, fal: FakeFal, at: int
) -> None:
    lines = bearer(token_of("ann", exp=time.time() - 60))
    request_id = await proxy.submit(bearer(token_of("ann")))
    good = poll_request(request_id, bearer(token_of("ann")))
    client = await proxy.client()
    for _ in range(2):
        assert await client.status(good) == 200
    seen = len(fal.seen)
    for poll, status in ((good, 200), (poll_request(request_id, lines), 401)):
        client.write(poll[:at])
        await asyncio.sleep(0.05)
        client.write(poll[at:])
        assert (await client.read())[0] == status
    assert len(fal.seen) == seen + 1


async def test_a_middleware_that_looks_at_the_body_sees_every_request_of_a_token(
    make_proxy: MakeProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    bodies: list[bytes] = []

    @web.middleware
    async def read_body(request: web.Request, handler: Handler) -> web.StreamResponse:
        bodies.append(await request.read())
        return await handler(request)

    monkeypatch.setattr(
        "falproxy.app.authorization",
        lambda *args, **options: [*authorization(*args, **options), read_body],
    )
    proxy = await make_proxy(jwt_secret=SECRET)
    request_id = await proxy.submit("x-falproxy-key: " + token_of("ann"))
    poll = poll_request(request_id, bearer(token_of("ann")))
    client = await proxy.client()
    bodies.clear()
    for _ in range(12):
        assert await client.status(poll) == 200
    assert (len(bodies), proxy.hits) == (12, 0)


async def test_submits_with_a_token_are_owned(proxy: PolledProxy) -> None:
    """Equal submits with a token take the normal path, which records their owner."""
    client, ids = await proxy.client(), set()
    for _ in range(3):
        status, body = await client.request(submit_request(bearer(token_of("ann"))))
        assert status == 200
        ids.add(json.loads(body)["request_id"])
    assert proxy.hits == 0
    for request_id in ids:
        assert await client.status(poll_request(request_id, bearer(token_of("ann")))) == 200
        assert await client.status(poll_request(request_id, bearer(token_of("bob")))) == 404


async def test_rates_apply_to_callers_whose_polls_take_the_fast_path(make_proxy: MakeProxy) -> None:
    proxy = await make_proxy(jwt_secret=SECRET, rate=parse_rate("2/minute"))
    poll = await proxy.poll_of(bearer(token_of("ann")))
    client = await proxy.client()
    for _ in range(6):
        assert await client.status(poll) == 200
    assert proxy.hits == 5
    statuses = [await client.status(submit_request(bearer(token_of("ann")))) for _ in range(2)]
    assert statuses == [200, 429]
    assert await client.status(submit_request(bearer(token_of("bob")))) == 200


# Keys made at run time


async def test_a_changed_key_is_looked_up_again(make_proxy: MakeProxy, tmp_path: Path) -> None:
    async with choose_key_store(None, tmp_path) as store:
        proxy = await make_proxy(keys="on")
        change = KeyChange(expiry=Expiry(), limits=NO_CALLER_LIMITS, endpoints=("fal-ai/other",))
        made, secret = await store.create(NewKey(name="web", creator="cli"))
        poll = await proxy.poll_of(f"x-falproxy-key: {secret}")
        client = await proxy.client()
        for _ in range(3):
            assert await client.status(poll) == 200
        assert proxy.hits == 2
        await store.change(made.id, change)
        await proxy.server.app[KNOWN_KEYS].refresh()
        for _ in range(2):
            assert await client.status(poll) == 200  # the job was submitted before
        assert proxy.hits == 3
        submit = submit_request(f"x-falproxy-key: {secret}")
        assert await client.status(submit) == 403


# Hooks


@dataclass(slots=True)
class Hook:
    """Authenticates callers. identify: returns the caller of a request. asked: its calls."""

    identify: Callable[[web.Request], str | Identity | None]
    asked: int = 0

    async def __call__(self, request: web.Request) -> str | Identity | None:
        self.asked += 1
        return self.identify(request)


def name_of(request: web.Request) -> str | None:
    return request.headers.get("x-name")


def named_for(seconds: float) -> Callable[[web.Request], Identity | None]:
    def identify(request: web.Request) -> Identity | None:
        name = name_of(request)
        return None if name is None else Identity(name, valid_for=seconds)

    return identify


@pytest.mark.parametrize(
    ("identify", "hits"),
    [
        pytest.param(name_of, 0, id="a name"),
        pytest.param(named_for(0), 0, id="an identity without a time"),
        pytest.param(named_for(-1), 0, id="a time in the past"),
        pytest.param(named_for(float("nan")), 0, id="no number"),
        pytest.param(named_for(30), 11, id="a time"),
        pytest.param(named_for(float("inf")), 11, id="for ever"),
    ],
)
async def test_a_hook_is_called_for_each_request_unless_its_identity_has_a_time(
    make_proxy: MakeProxy, identify: Callable[[web.Request], str | Identity | None], hits: int
) -> None:
    hook = Hook(identify)
    proxy = await make_proxy(hook)
    poll = await proxy.poll_of("X-Name: ann")
    client = await proxy.client()
    hook.asked = 0
    for _ in range(12):
        assert await client.status(poll) == 200
    assert (proxy.hits, hook.asked) == (hits, 12 - hits)
    assert await client.status(poll.replace(b"ann", b"bob")) == 404
    assert await client.status(poll.replace(b"X-Name", b"X-Other")) == 401


async def test_an_identity_of_a_hook_ends_with_its_time(make_proxy: MakeProxy) -> None:
    hook = Hook(named_for(0.5))
    proxy = await make_proxy(hook)
    poll = await proxy.poll_of("X-Name: ann")
    client = await proxy.client()
    started = time.monotonic()
    assert await client.status(poll) == 200
    hook.identify = lambda request: None
    await client.seconds_until(401, poll)
    assert 0.4 < time.monotonic() - started < 5
    assert proxy.hits > 1


async def test_the_time_of_an_identity_begins_when_the_hook_is_called(
    make_proxy: MakeProxy,
) -> None:
    async def slow(request: web.Request) -> Identity:
        await asyncio.sleep(0.1)
        return Identity("ann", valid_for=0.05)

    proxy = await make_proxy(slow)
    poll = await proxy.poll_of()
    client = await proxy.client()
    for _ in range(3):
        assert await client.status(poll) == 200
    assert proxy.hits == 0


async def test_an_identity_of_a_hook_is_for_one_connection(make_proxy: MakeProxy) -> None:
    """A hook may look at the address or the certificate: an equal head may be another caller's."""
    names: dict[object, str] = {}

    def by_connection(request: web.Request) -> Identity:
        return Identity(names.setdefault(request.protocol, "ann"), valid_for=60)

    hook = Hook(by_connection)
    proxy = await make_proxy(hook)
    poll = await proxy.poll_of()
    of_ann, of_bob, again = [await proxy.client() for _ in range(3)]
    for _ in range(3):
        assert await of_ann.status(poll) == 200
    hook.identify = lambda request: Identity(names.setdefault(request.protocol, "bob"), 60)
    for _ in range(3):
        assert await of_bob.status(poll) == 404
        assert await of_ann.status(poll) == 200
    hook.identify = by_connection
    asked = hook.asked
    assert await again.status(poll) == 200
    assert hook.asked == asked + 1
    assert proxy.hits == 5


async def test_a_hook_that_names_other_callers_for_equal_heads_is_called_for_each(
    make_proxy: MakeProxy, fal: FakeFal
) -> None:
    hook = Hook(lambda request: "ann")
    proxy = await make_proxy(hook)
    poll = await proxy.poll_of()
    client = await proxy.client()
    seen = len(fal.seen)
    for number in range(6):
        hook.identify = lambda request, number=number: ("ann", "bob")[number % 2]  # type: ignore[misc]
        assert await client.status(poll) == (200, 404)[number % 2]
    assert len(fal.seen) == seen + 3


@pytest.mark.parametrize(
    ("later", "status"),
    [
        pytest.param(None, 401, id="no caller"),
        pytest.param("bob", 404, id="another caller"),
        pytest.param("ann", 200, id="the same, without a time"),
    ],
)
async def test_a_later_identity_of_a_hook_ends_the_earlier_one(
    make_proxy: MakeProxy, later: str | None, status: int
) -> None:
    """The normal path calls the hook again, such as for a request in two pieces or without an idle
    connection to fal."""
    hook = Hook(named_for(60))
    proxy = await make_proxy(hook)
    poll = await proxy.poll_of("X-Name: ann")
    client = await proxy.client()
    for _ in range(2):
        assert await client.status(poll) == 200
    assert proxy.hits == 1
    hook.identify = lambda request: later
    pool, proxy.routes._pool = proxy.routes._pool, None
    assert await client.status(poll) == status
    proxy.routes._pool = pool
    assert await client.status(poll) == status
    assert proxy.hits == 1


async def test_a_caller_with_a_key_or_token_is_on_the_fast_path_beside_a_hook(
    make_proxy: MakeProxy,
) -> None:
    hook = Hook(name_of)
    secret = "a-key-of-16-chars"
    proxy = await make_proxy(hook, access_keys=(("web", secret),), jwt_secret=SECRET)
    client = await proxy.client()
    for line in (f"x-falproxy-key: {secret}", bearer(token_of("ann"))):
        poll, hits = await proxy.poll_of(line), proxy.hits
        for _ in range(3):
            assert await client.status(poll) == 200
        assert proxy.hits == hits + 2
    assert hook.asked == 0


async def test_the_routes_of_connections_are_bounded(make_proxy: MakeProxy) -> None:
    proxy = await make_proxy(Hook(named_for(60)))
    proxy.routes.max_routes = 3
    poll = await proxy.poll_of("X-Name: ann")
    for _ in range(6):
        client = await proxy.client()
        for _ in range(2):
            assert await client.status(poll) == 200
    assert len(proxy.routes._routes) == 3
    assert proxy.hits == 6


def test_the_names_for_hooks_are_public() -> None:
    assert falproxy.Identity("ann") == Identity("ann", valid_for=0)
    assert falproxy.FastPathRunner.__name__ == "FastPathRunner"
    with pytest.raises(AttributeError):
        Identity("ann").name = "bob"  # type: ignore[misc]
