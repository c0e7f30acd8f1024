"""Idempotency-Key: a repeated call gets the response of the first one, and fal one call."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from aiohttp import ClientError, ClientResponse, web

from falproxy.middleware import idempotency
from tests.support.fake_fal import FakeFal
from tests.support.fake_queue import (
    CAT,
    DOG,
    RUN,
    SUBMIT,
    FakeQueue,
    request_about,
    send,
    submitted_id,
)
from tests.support.gateway import Gateway, MakeGateway
from tests.support.redis_server import redis_server
from tests.support.usage import now
from tests.support.waiting import wait_until

TIMEOUT = 30.0  # seconds; of `wait_until`

pytestmark = pytest.mark.usefixtures("fal_outlives_the_proxy")

OTHER_RUN = "https://fal.run/fal-ai/flux/dev"
STREAM = "https://fal.run/fal-ai/flux/dev/stream"
TARGETS = [RUN, SUBMIT]
REPLAYED = "Idempotency-Replayed"
Open = Callable[..., Awaitable[Gateway]]


@pytest.fixture(params=["with the cache", "without"])
def cache_settings(request: pytest.FixtureRequest) -> dict[str, object]:
    return {"cache": request.param == "with the cache"}


@pytest.fixture
def open_gateway(
    make_gateway: MakeGateway,
    queue: FakeQueue,
    store_settings: dict[str, object],
    cache_settings: dict[str, object],
) -> Open:
    """Opens proxies that share a store."""

    async def open_one(**options: object) -> Gateway:
        return await make_gateway(queue.fake.origin, **store_settings, **(cache_settings | options))

    return open_one


@pytest.fixture
async def gateway(open_gateway: Open) -> Gateway:
    return await open_gateway()


@pytest.fixture
async def plain(make_gateway: MakeGateway, queue: FakeQueue) -> Gateway:
    """A proxy without the result cache."""
    return await make_gateway(queue.fake.origin, cache=False)


async def keyed(
    gateway: Gateway, target: str, key: str = "k", body: object = CAT, **headers: str
) -> ClientResponse:
    return await send(gateway, target, body, Idempotency_Key=key, **headers)


async def code_of(response: ClientResponse) -> str:
    return str((await response.json())["type"])


def is_replayed(response: ClientResponse) -> bool:
    assert response.headers.getall(REPLAYED, []) in ([], ["true"])
    return REPLAYED in response.headers


# --- One call ---


@pytest.mark.parametrize("target", TARGETS)
async def test_a_repeated_call_gets_the_same_response(
    open_gateway: Open, queue: FakeQueue, target: str
) -> None:
    gateway, other = await open_gateway(), await open_gateway()
    first = await keyed(gateway, target)
    assert first.status == 200
    assert not is_replayed(first)
    for again in (gateway, other):
        repeated = await keyed(again, target)
        assert is_replayed(repeated)
        assert (repeated.status, await repeated.read()) == (200, await first.read())
        for name in ("Content-Type", "x-fal-request-id"):
            assert repeated.headers.getall(name) == first.headers.getall(name)
        assert len(repeated.headers.getall("Content-Length")) == 1
    assert queue.posts == queue.paid == 1


async def test_a_repeated_submit_leads_to_the_same_result(
    open_gateway: Open, queue: FakeQueue
) -> None:
    gateway, other = await open_gateway(), await open_gateway()
    ids = [await submitted_id(await keyed(each, SUBMIT)) for each in (gateway, other, gateway)]
    assert len({*ids}) == 1
    results = [await request_about(each, ids[0]) for each in (gateway, other)]
    assert len({await result.text() for result in results}) == 1
    assert queue.paid == 1


@pytest.mark.parametrize("target", TARGETS)
async def test_calls_at_once_share_the_first_one(
    open_gateway: Open, queue: FakeQueue, target: str
) -> None:
    gateway, other = await open_gateway(), await open_gateway()
    queue.hold()
    tasks = [
        asyncio.ensure_future(keyed((gateway, other)[number % 2], target)) for number in range(10)
    ]
    await wait_until(lambda: queue.posts, seconds=TIMEOUT)
    await asyncio.sleep(0.1)  # the others wait now
    queue.release()
    responses = await asyncio.gather(*tasks)
    assert [response.status for response in responses] == [200] * 10
    assert len({await response.read() for response in responses}) == 1
    assert sum(not is_replayed(response) for response in responses) == 1
    assert queue.posts == queue.paid == 1


@pytest.mark.parametrize("target", TARGETS)
async def test_other_keys_and_no_key_are_other_calls(
    plain: Gateway, queue: FakeQueue, target: str
) -> None:
    await keyed(plain, target, "a")
    await keyed(plain, target, "b")
    for _ in range(2):
        assert not is_replayed(await send(plain, target, CAT))
    assert queue.paid == 4


@pytest.mark.parametrize(
    ("target", "body"), [(RUN, DOG), (SUBMIT, CAT), (OTHER_RUN, CAT), (RUN + "?a=b", CAT)]
)
async def test_another_call_with_the_key_is_refused(
    open_gateway: Open, queue: FakeQueue, target: str, body: object
) -> None:
    gateway, other = await open_gateway(), await open_gateway()
    queue.hold()
    running = asyncio.ensure_future(keyed(gateway, RUN))
    await wait_until(lambda: queue.posts, seconds=TIMEOUT)
    refusals = [await keyed(each, target, body=body) for each in (gateway, other)]
    queue.release()
    first = await running
    refusals += [await keyed(each, target, body=body) for each in (gateway, other)]
    for refused in refusals:
        assert (refused.status, await code_of(refused)) == (422, "idempotency_key_reused")
        assert not is_replayed(refused)
    assert await (await keyed(gateway, RUN)).read() == await first.read()
    assert queue.posts == 1


async def test_a_run_by_get_has_a_key_too(plain: Gateway, fal: FakeFal, queue: FakeQueue) -> None:
    async def respond(request: web.Request) -> web.StreamResponse:
        return web.json_response({"number": len(fal.seen)})

    fal.respond = respond
    headers = [("Idempotency-Key", "k")]
    texts = [
        await (await plain.call(f"{RUN}?prompt=a", "GET", headers=headers)).text() for _ in range(2)
    ]
    assert len({*texts}) == len(fal.seen) == 1
    refused = await plain.call(RUN, "POST", json=CAT, headers=headers)
    assert refused.status == 422


async def test_a_large_body_is_compared_to_its_end(plain: Gateway, queue: FakeQueue) -> None:
    body = {"prompt": "x" * 900_000, "seed": 1}
    first = await keyed(plain, RUN, body=body)
    assert await (await keyed(plain, RUN, body=body)).read() == await first.read()
    assert (await keyed(plain, RUN, body=body | {"seed": 2})).status == 422
    assert [len(seen.body) > 900_000 for seen in queue.fake.seen] == [True]


async def test_the_key_is_not_sent_to_fal(plain: Gateway, queue: FakeQueue) -> None:
    for target in TARGETS:
        await keyed(plain, target, f"key-{target}")
    assert [seen.header("idempotency-key") for seen in queue.fake.seen] == [None, None]


async def test_polls_with_the_header_are_not_stored(plain: Gateway, queue: FakeQueue) -> None:
    request_id = await submitted_id(await keyed(plain, SUBMIT))
    headers = {"Idempotency-Key": "k"}
    for suffix in ("/status", "", "/status"):
        assert (await request_about(plain, request_id, suffix, **headers)).status == 200
    assert len(queue.fake.seen) == 4


# --- Keys ---


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("k", '"k"'),
        ('"a b"', "a b"),
        (r'"a\"b\\c"', 'a"b\\c'),
        ("x" * 255, f'"{"x" * 255}"'),
        ("!~a=b;c", '"!~a=b;c"'),
    ],
)
async def test_a_key_may_have_quotation_marks(
    plain: Gateway, queue: FakeQueue, one: str, other: str
) -> None:
    assert (await keyed(plain, RUN, one)).status == 200
    assert is_replayed(await keyed(plain, RUN, other))
    assert queue.posts == 1


@pytest.mark.parametrize(
    "key",
    ["", " ", '""', "x" * 256, f'"{"x" * 256}"', '"', '"a', r'"a\"', r'"a\b"', "a\tb", "ключ",
     '"a\tb"', '"a";p=1'],
)  # fmt: skip
@pytest.mark.parametrize("target", TARGETS)
async def test_a_malformed_key_is_refused(
    plain: Gateway, queue: FakeQueue, target: str, key: str
) -> None:
    refused = await keyed(plain, target, key)
    assert (refused.status, await code_of(refused)) == (400, "idempotency_key_invalid")
    assert queue.fake.seen == []


@pytest.mark.parametrize("byte", [b"\x01", b"\x7f", b"\xff", b"\xc3\xa9"])
async def test_bytes_that_are_not_printable_are_refused(
    plain: Gateway, queue: FakeQueue, byte: bytes
) -> None:
    body = json.dumps(CAT).encode()
    received = await plain.send_raw(
        b"POST /api/fal/proxy HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"x-fal-target-url: " + RUN.encode() + b"\r\nIdempotency-Key: a" + byte + b"b\r\n"
        b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    )
    assert received.split(b" ", 2)[1] == b"400"
    assert queue.fake.seen == []


async def test_two_keys_are_refused(plain: Gateway, queue: FakeQueue) -> None:
    headers = [("Idempotency-Key", "a"), ("Idempotency-Key", "a")]
    refused = await plain.call(RUN, json=CAT, headers=headers)
    assert await code_of(refused) == "idempotency_key_invalid"
    assert queue.fake.seen == []


async def test_callers_have_keys_of_their_own(open_gateway: Open, queue: FakeQueue) -> None:
    keys = {"secret-of-web": "web", "secret-of-app": "app"}
    gateway = await open_gateway(access_keys=tuple((name, s) for s, name in keys.items()))
    for secret in keys:
        assert not is_replayed(await keyed(gateway, RUN, x_falproxy_key=secret))
        assert (await keyed(gateway, RUN, body=DOG, x_falproxy_key=secret)).status == 422
        assert is_replayed(await keyed(gateway, RUN, x_falproxy_key=secret))


# --- Outcomes ---


@pytest.mark.parametrize("target", TARGETS)
async def test_a_lost_response_stays_lost(
    open_gateway: Open, queue: FakeQueue, target: str
) -> None:
    gateway, other = await open_gateway(), await open_gateway()

    async def lose(request: web.Request) -> web.StreamResponse:
        queue.posts += 1
        assert request.transport is not None
        request.transport.abort()
        return web.Response()

    respond, queue.fake.respond = queue.fake.respond, lose
    first = await keyed(gateway, target)
    queue.fake.respond = respond
    for again in (gateway, other):
        repeated = await keyed(again, target)
        assert repeated.status == first.status == 504
        assert await code_of(repeated) == await code_of(first) == "upstream_broken"
        for name in ("x-fal-request-timeout-type", "Retry-After"):
            assert repeated.headers.get(name) == first.headers.get(name)
    assert queue.posts == 1


@pytest.mark.parametrize("status", [500, 502, 504, 422, 400])
@pytest.mark.parametrize("target", TARGETS)
async def test_an_error_of_fal_is_repeated(
    open_gateway: Open, queue: FakeQueue, target: str, status: int
) -> None:
    gateway = await open_gateway()
    queue.refusal = lambda: web.json_response({"detail": "no"}, status=status)
    first = await keyed(gateway, target)
    queue.refusal = None
    repeated = await keyed(gateway, target)
    assert repeated.status == first.status == status
    assert await repeated.json() == await first.json() == {"detail": "no"}
    assert queue.posts == 1


@pytest.mark.parametrize("status", [401, 402, 403, 404, 429, 503])
@pytest.mark.parametrize("target", TARGETS)
async def test_a_refusal_of_fal_gives_the_key_back(
    open_gateway: Open, queue: FakeQueue, target: str, status: int
) -> None:
    gateway = await open_gateway()
    queue.refusal = lambda: web.json_response({"detail": "no"}, status=status)
    assert (await keyed(gateway, target)).status == status
    queue.refusal = None
    second = await keyed(gateway, target)
    assert second.status == 200
    assert not is_replayed(second)
    assert queue.paid == 1
    assert is_replayed(await keyed(gateway, target))


async def test_a_503_of_the_model_itself_is_repeated(plain: Gateway, queue: FakeQueue) -> None:
    headers = {"x-fal-request-id": "1", "x-fal-error-type": "runner_connection_error"}
    queue.refusal = lambda: web.json_response({}, status=503, headers=headers)
    first = await keyed(plain, RUN)
    queue.refusal = None
    repeated = await keyed(plain, RUN)
    assert repeated.status == first.status == 503
    assert queue.posts == 1


async def test_a_call_that_could_not_be_sent_gives_the_key_back(
    make_gateway: MakeGateway, queue: FakeQueue, store_settings: dict[str, object]
) -> None:
    away = await make_gateway("http://127.0.0.1:1", **store_settings)
    gateway = await make_gateway(queue.fake.origin, **store_settings)
    for target in TARGETS:
        refused = await keyed(away, target, target)
        assert (refused.status, await code_of(refused)) == (502, "upstream_unreachable")
        assert (await keyed(gateway, target, target)).status == 200


async def test_a_refused_input_gives_the_key_back(plain: Gateway, queue: FakeQueue) -> None:
    refused = await keyed(plain, RUN, body={"image_url": "data:image/png;base64,AAAA"})
    assert refused.status == 422
    assert queue.posts == 0
    assert (await keyed(plain, RUN)).status == 200


async def test_a_response_that_is_too_large_is_not_bought_again(
    plain: Gateway, queue: FakeQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(idempotency, "RESPONSE_MAX", 100)
    queue.output = lambda number: web.json_response({"image": "x" * 100})
    assert len(await (await keyed(plain, RUN)).read()) > 100
    for _ in range(2):
        repeated = await keyed(plain, RUN)
        assert (repeated.status, await code_of(repeated)) == (410, "idempotency_response_dropped")
    assert (await keyed(plain, RUN, body=DOG)).status == 422
    assert queue.posts == 1


async def test_a_call_that_waits_too_long_may_try_again(
    plain: Gateway, queue: FakeQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue.hold()
    first = asyncio.ensure_future(keyed(plain, RUN))
    await wait_until(lambda: queue.posts, seconds=TIMEOUT)
    monkeypatch.setattr(idempotency, "WAIT_TIMEOUT", 0.1)
    waited = await keyed(plain, RUN)
    assert (waited.status, await code_of(waited)) == (409, "idempotency_in_progress")
    assert int(waited.headers["Retry-After"]) > 0
    queue.release()
    assert (await first).status == 200
    assert is_replayed(await keyed(plain, RUN))
    assert queue.posts == 1


# --- Clients that leave ---


@pytest.mark.parametrize("target", TARGETS)
async def test_a_sent_call_goes_on_without_its_client(
    open_gateway: Open, queue: FakeQueue, target: str
) -> None:
    gateway, other = await open_gateway(), await open_gateway()
    queue.hold()
    queue.accepting.clear()
    first = asyncio.ensure_future(keyed(gateway, target))
    await wait_until(lambda: queue.posts, seconds=TIMEOUT)
    first.cancel()
    await asyncio.wait([first])
    again = [asyncio.ensure_future(keyed(each, target)) for each in (gateway, other)]
    await asyncio.sleep(0.1)
    queue.accepting.set()
    queue.release()
    responses = await asyncio.gather(*again)
    assert [response.status for response in responses] == [200, 200]
    assert all(map(is_replayed, responses))
    assert len({await response.read() for response in responses}) == 1
    assert queue.posts == queue.paid == 1
    assert queue.disconnects == 0
    assert queue.cancels == []


async def test_a_run_with_a_time_limit_is_cancelled_and_not_sent_again(
    plain: Gateway, queue: FakeQueue
) -> None:
    queue.hold()
    limit = {"x_fal_request_timeout": "30"}
    first = asyncio.ensure_future(keyed(plain, RUN, **limit))
    await wait_until(lambda: queue.posts, seconds=TIMEOUT)
    first.cancel()
    await asyncio.wait([first])
    await wait_until(lambda: queue.disconnects, seconds=TIMEOUT)
    repeated = await keyed(plain, RUN, **limit)
    assert (repeated.status, await code_of(repeated)) == (504, "outcome_unknown")
    assert queue.posts == 1


# --- Streams ---


async def open_stream(gateway: Gateway, key: str = "k") -> ClientResponse:
    headers = [("Idempotency-Key", key), ("Accept", "text/event-stream")]
    return await gateway.call(STREAM, json=CAT, headers=headers)


async def test_a_stream_arrives_at_once_and_is_replayed(
    open_gateway: Open, queue: FakeQueue
) -> None:
    gateway, other = await open_gateway(), await open_gateway()
    go_on = asyncio.Event()
    posts = []

    async def respond(request: web.Request) -> web.StreamResponse:
        posts.append(request.path)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for number in range(30):
            await response.write(b'data: {"n": %d}\n\n' % number)
            if number == 2:
                await go_on.wait()
        return response

    queue.fake.respond = respond
    first = await open_stream(gateway)
    assert first.content_type == "text/event-stream"
    assert await first.content.readuntil(b'"n": 2}\n\n')
    joined = asyncio.ensure_future(open_stream(other))
    await asyncio.sleep(0.1)
    go_on.set()
    rest = await first.content.read()
    responses = [await joined, await open_stream(gateway), await open_stream(other)]
    for response in responses:
        assert response.content_type == "text/event-stream"
        assert is_replayed(response)
        text = await response.read()
        assert text.endswith(rest)
        assert text.count(b"data: ") == 30
    assert len(posts) == 1


async def test_a_stream_goes_on_without_its_client(open_gateway: Open, queue: FakeQueue) -> None:
    gateway = await open_gateway()
    go_on = asyncio.Event()
    posts = []

    async def respond(request: web.Request) -> web.StreamResponse:
        posts.append(request.path)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for number in range(200):
            await response.write(b'data: {"n": %d}\n\n' % number)
            if number == 2:
                await go_on.wait()
        return response

    queue.fake.respond = respond
    first = await open_stream(gateway)
    assert await first.content.readuntil(b'"n": 2}\n\n')
    first.close()
    await asyncio.sleep(0.1)
    go_on.set()
    again = await open_stream(gateway)
    assert (await again.read()).count(b"data: ") == 200
    assert len(posts) == 1


async def test_a_stream_that_breaks_off_is_not_bought_again(
    plain: Gateway, queue: FakeQueue
) -> None:
    posts = []

    async def respond(request: web.Request) -> web.StreamResponse:
        posts.append(request.path)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await response.write(b"data: 1\n\n")
        assert request.transport is not None
        request.transport.abort()
        return response

    queue.fake.respond = respond
    with pytest.raises(ClientError):
        await (await open_stream(plain)).read()
    for _ in range(2):
        repeated = await open_stream(plain)
        assert (repeated.status, await code_of(repeated)) == (504, "upstream_broken")
    assert len(posts) == 1


# --- The store ---


async def test_without_the_store_a_call_with_a_key_is_refused(
    make_gateway: MakeGateway, queue: FakeQueue
) -> None:
    with redis_server() as server:
        gateway = await make_gateway(queue.fake.origin, redis_url=server.url)
        first = await keyed(gateway, RUN, "before")
        server.kill()
        for target in TARGETS:
            refused = await keyed(gateway, target)
            assert (refused.status, await code_of(refused)) == (503, "idempotency_unavailable")
            assert int(refused.headers["Retry-After"]) > 0
        assert queue.posts == 1
        assert (await send(gateway, RUN, DOG)).status == 200, "without a key it is sent"
        server.start()
        await wait_for_store(gateway)
        assert first.status == 200


async def wait_for_store(gateway: Gateway) -> None:
    async with asyncio.timeout(20):
        while (await keyed(gateway, RUN, "again")).status != 200:
            await asyncio.sleep(0.05)


@pytest.mark.parametrize("target", TARGETS)
async def test_an_outcome_is_recorded_when_the_store_is_back(
    make_gateway: MakeGateway, queue: FakeQueue, target: str
) -> None:
    with redis_server() as server:
        options = {"redis_url": server.url, "cache": False}
        gateway, other = [await make_gateway(queue.fake.origin, **options) for _ in range(2)]
        queue.hold()
        queue.accepting.clear()
        running = asyncio.ensure_future(keyed(gateway, target))
        await wait_until(lambda: queue.posts, seconds=TIMEOUT)
        server.freeze()
        queue.accepting.set()
        queue.release()
        first = await running
        assert first.status == 200
        assert is_replayed(await keyed(gateway, target)), "from the memory of this process"
        server.thaw()
        async with asyncio.timeout(20):
            while (repeated := await keyed(other, target)).status == 503:
                await asyncio.sleep(0.05)
        assert await repeated.read() == await first.read()
        assert queue.posts == 1


async def test_a_file_that_cannot_be_written_refuses_calls_with_a_key(
    make_gateway: MakeGateway, queue: FakeQueue, tmp_path: Path
) -> None:
    (tmp_path / "idempotency.sqlite").mkdir()
    gateway = await make_gateway(queue.fake.origin)
    assert (await keyed(gateway, RUN)).status == 503
    assert (await send(gateway, RUN, CAT)).status == 200
    assert queue.posts == 1


async def test_a_restart_keeps_keys(
    make_gateway: MakeGateway, queue: FakeQueue, tmp_path: Path
) -> None:
    gateway = await make_gateway(queue.fake.origin, cache=False)
    first = await (await keyed(gateway, RUN)).read()
    await gateway.client.close()
    again = await make_gateway(queue.fake.origin, cache=False)
    assert await (await keyed(again, RUN)).read() == first
    assert queue.posts == 1


# --- Ledger, metrics, fast path ---


async def test_a_replayed_call_is_free_in_the_ledger(plain: Gateway, queue: FakeQueue) -> None:
    for _ in range(3):
        await keyed(plain, SUBMIT)

    async def totals() -> Any:
        options: Any = {
            "params": {"since": "1h", "by": "route", "until": now()},
            "headers": {"Accept-Encoding": "identity"},
        }
        return (await (await plain.client.get("/api/usage", **options)).json())["totals"]

    async with asyncio.timeout(20):
        while (last := await totals())["calls"] < 3:
            await asyncio.sleep(0.05)
    assert (last["calls"], last["hits"], last["errors"]) == (3, 0, 0)


async def test_calls_with_a_key_do_not_take_the_fast_path(plain: Gateway, queue: FakeQueue) -> None:
    bodies = [{"prompt": "a"}, {"prompt": "b"}]
    for body in bodies * 2:
        await send(plain, SUBMIT, body)
    ids = [await submitted_id(await keyed(plain, SUBMIT)) for _ in range(5)]
    assert len({*ids}) == 1
    assert queue.posts == 5


async def test_a_redirect_gives_the_key_back(plain: Gateway, queue: FakeQueue) -> None:
    headers = {"Location": OTHER_RUN}
    queue.refusal = lambda: web.Response(status=307, headers=headers)
    options: dict[str, Any] = {"json": CAT, "headers": [("Idempotency-Key", "k")]}
    redirected = await plain.call(RUN, allow_redirects=False, **options)
    assert redirected.status == 307
    queue.refusal = None
    assert (await keyed(plain, OTHER_RUN)).status == 200
