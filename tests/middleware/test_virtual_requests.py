"""Request ids that the cache hands out: status, stream, result and cancel in fal's own shapes."""

import asyncio
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from aiohttp import ClientResponse
from aiohttp.pytest_plugin import AiohttpServer
from redis import Redis

from falproxy.stores.cache.sqlite import SqliteStore
from falproxy.stores.cache.virtual_ids import new_virtual_id
from tests.support.cached_calls import (
    APP,
    CAT,
    DOG,
    KONTEXT,
    SOON,
    PlayedFal,
    ask,
    cache_status,
    events,
    id_of,
    is_hit,
    outcome,
    picture,
    run,
    submit,
    until,
    until_kept,
    version_of,
)
from tests.support.fake_fal import FakeFal
from tests.support.gateway import Gateway, MakeGateway
from tests.support.key_search import CANARY
from tests.support.redis_server import RedisServer, redis_server

VERBS = [("", "GET"), ("/response", "GET"), ("/status", "GET"), ("/status?logs=1", "GET"),
         ("/status/stream", "GET"), ("/cancel", "PUT")]  # fmt: skip


@pytest.fixture(scope="module")
def redis() -> Iterator[RedisServer]:
    with redis_server() as running:
        yield running


@pytest.fixture(params=["sqlite", "redis"])
def store(request: pytest.FixtureRequest) -> dict[str, object]:
    """The settings that choose a store."""
    if request.param == "sqlite":
        return {}
    url = request.getfixturevalue("redis").url
    with Redis.from_url(url) as client:
        client.flushall()
    return {"redis_url": url}


@pytest.fixture(autouse=True)
def fal_outlives_the_proxy(aiohttp_server: AiohttpServer) -> None:
    """What is asked for first is closed last."""


@pytest.fixture
def played(fal: FakeFal) -> Iterator[PlayedFal]:
    played = PlayedFal(fal)
    yield played
    played.release()


@pytest.fixture
async def gateway(make_gateway: MakeGateway, played: PlayedFal) -> Gateway:
    return await make_gateway(played.fake.origin)


# --- Hits ---


async def test_a_hit_is_submitted_like_any_other_call(gateway: Gateway) -> None:
    await run(gateway)
    response = await submit(gateway)
    document = await response.json()
    request_id = document.pop("request_id")
    root = f"https://queue.fal.run/{APP}/requests/{request_id}"
    assert version_of(request_id) == 8
    assert response.headers.getall("x-fal-request-id") == [request_id]
    assert document == {
        "status": "IN_QUEUE",
        "queue_position": 0,
        "response_url": root,
        "status_url": f"{root}/status",
        "cancel_url": f"{root}/cancel",
    }
    assert is_hit(response)


async def test_nothing_that_is_asked_of_a_hit_reaches_fal(
    gateway: Gateway, played: PlayedFal
) -> None:
    await run(gateway)
    asked = len(played.fake.seen)
    request_id = await id_of(await submit(gateway))
    for verb, method in VERBS:
        assert (await ask(gateway, request_id, verb, method)).status in (200, 400)
    assert len(played.fake.seen) == asked


@pytest.fixture
async def hit(gateway: Gateway) -> str:
    """The id of a submit whose result was kept."""
    await run(gateway)
    return await id_of(await submit(gateway))


@pytest.mark.parametrize(
    ("query", "logs"), [("", None), ("?logs=1", []), ("?logs=true", []), ("?logs=0", None)]
)
async def test_a_hit_is_completed_at_once(
    query: str, logs: object, gateway: Gateway, hit: str
) -> None:
    response = await ask(gateway, hit, f"/status{query}")
    document = await response.json()
    root = f"https://queue.fal.run/{APP}/requests/{hit}"
    assert response.status == 200
    assert document == {
        "status": "COMPLETED",
        "request_id": hit,
        "response_url": root,
        "status_url": f"{root}/status",
        "cancel_url": f"{root}/cancel",
        "logs": logs,
        "metrics": {"inference_time": None},
    }
    assert is_hit(response)
    assert response.headers["x-fal-request-id"] == hit


@pytest.mark.parametrize("query", ["", "?logs=1"])
async def test_the_stream_of_a_hit_is_one_event(query: str, gateway: Gateway, hit: str) -> None:
    response = await ask(gateway, hit, f"/status/stream{query}")
    status = await ask(gateway, hit, f"/status{query}")
    assert response.status == 200
    assert await events(response) == [await status.json()]


@pytest.mark.parametrize("alias", ["", "/response"])
async def test_the_result_of_a_hit_is_the_document_byte_for_byte(
    alias: str, gateway: Gateway, hit: str
) -> None:
    for _ in range(2):
        response = await ask(gateway, hit, alias)
        assert response.status == 200
        assert response.content_type == "application/json"
        assert await response.read() == picture(1).body
        assert is_hit(response)
        assert response.headers["x-fal-request-id"] == hit


async def test_it_is_too_late_to_cancel_a_hit(gateway: Gateway, hit: str) -> None:
    response = await ask(gateway, hit, "/cancel", "PUT")
    assert response.status == 400
    assert await response.json() == {"status": "ALREADY_COMPLETED"}
    assert await (await ask(gateway, hit)).read() == picture(1).body


async def test_a_hit_keeps_the_result_that_it_was_promised(
    make_gateway: MakeGateway, played: PlayedFal
) -> None:
    gateway = await make_gateway(played.fake.origin, cache_ttl=0.3)
    await run(gateway)
    request_id = await id_of(await submit(gateway))
    await asyncio.sleep(0.35)
    await run(gateway)
    assert played.paid == 2
    assert await (await ask(gateway, request_id)).read() == picture(1).body


# --- Through the mounts ---

MOUNT = "/api/fal/queue"


async def mounted(gateway: Gateway, url: str, method: str = "GET", **body: Any) -> ClientResponse:
    async with asyncio.timeout(SOON):
        response = await gateway.client.request(method, url, **body)
        await response.read()
    return response


def urls_of(document: dict[str, Any]) -> list[str]:
    return [document[name] for name in ("status_url", "response_url", "cancel_url")]


@pytest.mark.parametrize("kind", ["a hit", "a shared job", "a wait for a run"])
async def test_the_mount_s_addresses_lead_back_to_the_mount(
    kind: str, gateway: Gateway, played: PlayedFal
) -> None:
    """Those that clients follow as they stand, in every document that has them."""
    async with asyncio.TaskGroup() as group:
        if kind != "a hit":
            played.hold()
        if kind == "a shared job":
            await submit(gateway)
        else:
            group.create_task(run(gateway))
        await until(lambda: played.paid == 1)
        if kind == "a hit":
            await until_kept(gateway)
        response = await mounted(gateway, f"{MOUNT}/{KONTEXT}", "POST", json=CAT)
        document = await response.json()
        assert version_of(document["request_id"]) == 8
        root = f"{gateway.origin}{MOUNT}/{APP}/requests/{document['request_id']}"
        own = [f"{root}/status", root, f"{root}/cancel"]
        assert urls_of(document) == own
        status = await mounted(gateway, urls_of(document)[0].removeprefix(gateway.origin))
        assert urls_of(await status.json()) == own
        stream = gateway.client.request("GET", f"{MOUNT}/{APP}/requests/"
                                        f"{document['request_id']}/status/stream")  # fmt: skip
        played.release()
        told = await events(await stream)
    assert [urls_of(event) for event in told] == [own] * len(told)
    assert told[-1]["status"] == "COMPLETED"
    for address in (root, f"{root}/response"):
        result = await mounted(gateway, address.removeprefix(gateway.origin))
        assert await result.read() == picture(1).body
    assert played.paid == 1


async def test_runs_through_the_mount_share_their_results(
    gateway: Gateway, played: PlayedFal
) -> None:
    await run(gateway)
    response = await mounted(gateway, f"/api/fal/run/{KONTEXT}", "POST", json=CAT)
    assert is_hit(response)
    assert played.paid == 1


# --- Ids that are shared with fal's ---


async def share(gateway: Gateway, **headers: str) -> list[str]:
    """The ids of two equal submits: fal's own, and ours."""
    ids = [await id_of(await submit(gateway, CAT, **headers)) for _ in range(2)]
    assert [version_of(request_id) for request_id in ids] == [4, 8]
    return ids


async def test_a_shared_job_is_told_of_under_the_own_id(
    gateway: Gateway, played: PlayedFal
) -> None:
    played.hold()
    fal_id, own_id = await share(gateway)
    for verb, logs in (("", None), ("?logs=1", [{"message": "50%", "timestamp": "now"}])):
        response = await ask(gateway, own_id, f"/status{verb}")
        assert response.status == 202
        assert response.headers["x-fal-request-id"] == own_id
        document = await response.json()
        assert document["status"] == "IN_PROGRESS"
        assert document["request_id"] == own_id
        assert all(own_id in url for url in urls_of(document))
        assert document["logs"] == logs
        assert fal_id not in await response.text()
    stream = asyncio.ensure_future(ask(gateway, own_id, "/status/stream"))
    await asyncio.sleep(0.05)
    played.release()
    told = await events(await stream)
    assert [event["status"] for event in told] == ["IN_PROGRESS", "COMPLETED"]
    assert fal_id not in await (await stream).text()
    for request_id in (fal_id, own_id):
        result = await ask(gateway, request_id)
        assert await result.read() == picture(1).body
        assert result.headers["x-fal-request-id"] == request_id


async def test_a_result_that_is_not_there_yet_is_a_400(gateway: Gateway, played: PlayedFal) -> None:
    played.hold()
    for request_id in await share(gateway):
        response = await ask(gateway, request_id)
        assert response.status == 400
        assert await response.json() == {"detail": "Request is still in progress"}


async def test_the_follower_of_a_job_says_that_it_is_one(
    gateway: Gateway, played: PlayedFal
) -> None:
    played.hold()
    assert cache_status(await submit(gateway)) == {"fwd": "miss"}
    assert cache_status(await submit(gateway)) == {"fwd": "miss", "collapsed": ""}


async def test_a_result_that_is_fetched_late_is_no_new_one(
    gateway: Gateway, played: PlayedFal, tmp_path: Path
) -> None:
    """An id is known for a day, and its result may be gone long before."""
    request_id = await id_of(await submit(gateway))
    await until_kept(gateway)
    async with SqliteStore(tmp_path / "results.sqlite", max_size=2**30) as store:
        assert await store.clear() == 1
    await asyncio.sleep(1.1)
    result = await ask(gateway, request_id)
    assert await result.read() == picture(1).body
    hit = await run(gateway)
    assert not is_hit(hit) or int(hit.headers["Age"]) >= 1


# --- Whose an id is ---


@pytest.mark.parametrize(
    "request_id",
    [
        pytest.param(new_virtual_id(), id="of ours"),
        pytest.param("00000000-0000-8000-8000-000000000000", id="the least"),
        pytest.param("ffffffff-ffff-8fff-bfff-ffffffffffff", id="the greatest"),
    ],
)
async def test_an_unknown_id_of_ours_is_nobody_s(
    request_id: str, store: dict[str, object], make_gateway: MakeGateway, played: PlayedFal
) -> None:
    gateway = await make_gateway(played.fake.origin, **store)
    for verb, method in VERBS:
        response = await ask(gateway, request_id, verb, method)
        assert response.status == 404
    assert played.fake.seen == []


@pytest.mark.parametrize(
    "request_id",
    [
        pytest.param(str(uuid4()), id="version 4"),
        pytest.param("not-a-uuid", id="no UUID"),
        pytest.param("00000000-0000-8000-0000-000000000000", id="another variant"),
    ],
)
async def test_an_id_of_fal_s_is_fal_s_to_know(
    request_id: str, gateway: Gateway, played: PlayedFal
) -> None:
    for verb, method in VERBS:
        response = await ask(gateway, request_id, verb, method)
        assert (response.status, await response.json()) == (404, {"status": "NOT_FOUND"})
    assert len(played.fake.seen) == len(VERBS)


ANN, BOB = "Key ann-secret", "Key bob-secret"
KEYS = (("ann", "ann-secret"), ("bob", "bob-secret"))


@pytest.mark.parametrize("kind", ["a hit", "a shared job", "a wait for a run"])
async def test_an_id_is_nobody_else_s(
    kind: str, store: dict[str, object], make_gateway: MakeGateway, played: PlayedFal
) -> None:
    gateway = await make_gateway(played.fake.origin, access_keys=KEYS, **store)
    played.hold()
    async with asyncio.TaskGroup() as group:
        if kind == "a shared job":
            await submit(gateway, CAT, Authorization=BOB)
        else:
            running = group.create_task(run(gateway, CAT, Authorization=BOB))
            await until(lambda: played.paid == 1)
            if kind == "a hit":
                played.release()
                await running
        request_id = await id_of(await submit(gateway, CAT, Authorization=ANN))
        assert version_of(request_id) == 8
        asked = len(played.fake.seen)
        for verb, method in VERBS:
            stranger = await ask(gateway, request_id, verb, method, Authorization=BOB)
            assert stranger.status == 404
            unknown = await ask(gateway, new_virtual_id(), verb, method, Authorization=BOB)
            assert re.sub(r'"request_id": ".*?"', "", await stranger.text()) == re.sub(
                r'"request_id": ".*?"', "", await unknown.text()
            )
        assert len(played.fake.seen) == asked
        played.release()
    stream = await ask(gateway, request_id, "/status/stream", Authorization=ANN)
    assert (await events(stream))[-1]["status"] == "COMPLETED"
    result = await ask(gateway, request_id, Authorization=ANN)
    assert await result.read() == picture(1).body
    assert played.paid == 1


async def test_fal_s_id_of_a_shared_job_is_the_first_one_s(
    make_gateway: MakeGateway, played: PlayedFal
) -> None:
    gateway = await make_gateway(played.fake.origin, access_keys=KEYS)
    played.hold()
    fal_id = await id_of(await submit(gateway, CAT, Authorization=ANN))
    await submit(gateway, CAT, Authorization=BOB)
    for verb, method in VERBS:
        assert (await ask(gateway, fal_id, verb, method, Authorization=BOB)).status == 404
    assert played.cancels == []


async def test_ids_survive_a_restart(
    store: dict[str, object], make_gateway: MakeGateway, played: PlayedFal
) -> None:
    gateway = await make_gateway(played.fake.origin, **store)
    await run(gateway, DOG)
    hit = await id_of(await submit(gateway, DOG))
    played.hold()
    fal_id, own_id = await share(gateway)
    other_id = await id_of(await submit(gateway))
    assert (await ask(gateway, other_id, "/cancel", "PUT")).status == 202
    await gateway.client.close()
    played.release()
    gateway = await make_gateway(played.fake.origin, **store)
    for request_id, number in ((hit, 1), (fal_id, 2), (own_id, 2)):
        told = await events(await ask(gateway, request_id, "/status/stream"))
        assert told[-1]["status"] == "COMPLETED"
        assert "error" not in told[-1]
        assert await (await ask(gateway, request_id)).read() == picture(number).body
    cancelled = await (await ask(gateway, other_id, "/status")).json()
    assert cancelled["error_type"] == "client_cancelled"
    assert played.paid == 2
    assert played.cancels == []


@pytest.mark.parametrize("status", [200, 500])
async def test_an_id_that_waited_for_a_run_survives_a_restart(
    status: int, store: dict[str, object], make_gateway: MakeGateway, played: PlayedFal
) -> None:
    gateway = await make_gateway(played.fake.origin, **store)
    played.hold()
    played.output = lambda number: failing(picture(number), status)
    async with asyncio.TaskGroup() as group:
        group.create_task(run(gateway))
        await until(lambda: played.paid == 1)
        request_id = await id_of(await submit(gateway))
        played.release()
    await ask(gateway, request_id, "/status/stream")
    await gateway.client.close()
    gateway = await make_gateway(played.fake.origin, **store)
    result = await ask(gateway, request_id)
    assert (result.status, await result.read()) == (status, picture(1).body)
    assert played.paid == 1


def failing(response: Any, status: int) -> Any:
    response.set_status(status)
    return response


async def test_another_process_knows_the_ids(
    store: dict[str, object], make_gateway: MakeGateway, played: PlayedFal
) -> None:
    one, other = [await make_gateway(played.fake.origin, **store) for _ in range(2)]
    await run(one, DOG)
    hit = await id_of(await submit(one, DOG))
    assert await (await ask(other, hit)).read() == picture(1).body
    played.hold()
    async with asyncio.TaskGroup() as group:
        group.create_task(run(one))
        await until(lambda: played.paid == 2)
        waiting = await id_of(await submit(one))
        document = await (await ask(other, waiting, "/status")).json()
        assert document["status"] == "IN_PROGRESS"
        played.release()
    told = await events(await ask(other, waiting, "/status/stream"))
    assert told[-1]["status"] == "COMPLETED"
    assert await (await ask(other, waiting)).read() == picture(2).body


# --- What polls cost ---


def questions(redis: RedisServer) -> dict[str, int]:
    """How often each command was asked, but for the guard's own."""
    with Redis.from_url(redis.url) as client:
        stats: dict[str, dict[str, int]] = client.info("commandstats")
    ours = ("cmdstat_get", "cmdstat_evalsha", "cmdstat_eval", "cmdstat_hmget")
    return {name: found["calls"] for name, found in stats.items() if name in ours}


async def test_polls_for_fal_s_ids_never_ask_the_store(
    redis: RedisServer, make_gateway: MakeGateway, played: PlayedFal
) -> None:
    gateway = await make_gateway(played.fake.origin, redis_url=redis.url)
    played.hold()
    fal_id, _ = await share(gateway)
    stranger = str(uuid4())
    await asyncio.sleep(1.1)  # our own memory of the submit is no longer believed by itself
    before = questions(redis)
    for request_id in (fal_id, stranger):
        for verb in ("/status", "/status?logs=1", "/status"):
            assert (await ask(gateway, request_id, verb)).status in (202, 404)
    stream = asyncio.ensure_future(ask(gateway, fal_id, "/status/stream"))
    await until(lambda: played.fake.seen[-1].target.endswith("/stream"))
    assert questions(redis) == before
    played.release()
    await stream


# --- Several fal keys ---

AI_KEYS = ("one:a", "two:b", "three:c")


async def test_a_shared_job_is_asked_about_with_the_key_that_bought_it(
    make_gateway: MakeGateway, played: PlayedFal
) -> None:
    gateway = await make_gateway(played.fake.origin, ai_keys=AI_KEYS)
    for _ in range(2):
        await submit(gateway, {"prompt": str(uuid4())})  # so that the turn is not the first's
    played.hold()
    played.fake.seen.clear()
    fal_id, own_id = await share(gateway)
    for request_id in (own_id, fal_id, own_id):
        await ask(gateway, request_id, "/status")
    await ask(gateway, own_id)
    await ask(gateway, own_id, "/cancel", "PUT")
    played.release()
    await until_kept(gateway)
    about = [seen.header("authorization") for seen in played.fake.seen if fal_id in seen.target]
    (bought,) = [seen.header("authorization") for seen in played.fake.seen if seen.method == "POST"]
    assert len(about) >= 6
    assert {*about} == {bought}


async def test_the_key_of_a_shared_job_is_known_after_a_restart(
    make_gateway: MakeGateway, played: PlayedFal
) -> None:
    gateway = await make_gateway(played.fake.origin, ai_keys=AI_KEYS)
    played.hold()
    _, own_id = await share(gateway)
    (bought,) = {key for key, seen in zip(played.keys, played.fake.seen, strict=True)
                 if seen.method == "POST"}  # fmt: skip
    await gateway.client.close()
    played.fake.seen.clear()
    gateway = await make_gateway(played.fake.origin, ai_keys=AI_KEYS[::-1])
    for _ in range(4):
        assert (await ask(gateway, own_id, "/status")).status == 202
    assert {*played.keys} == {bought}
    played.release()


# --- A store that is away ---


@pytest.fixture
async def storeless(make_gateway: MakeGateway, played: PlayedFal, tmp_path: Path) -> Gateway:
    """A proxy whose folder is none."""
    folder = tmp_path / "folder"
    folder.touch()
    return await make_gateway(played.fake.origin, data_dir=folder)


async def test_calls_go_on_without_a_store(storeless: Gateway, played: PlayedFal) -> None:
    for number in (1, 2):
        response = await run(storeless)
        assert (response.status, await response.read()) == (200, picture(number).body)
        assert not is_hit(response)
    response = await submit(storeless)
    assert await (await outcome(storeless, response)).read() == picture(3).body


async def test_what_cannot_be_stored_is_not_said_to_be(
    storeless: Gateway, played: PlayedFal
) -> None:
    assert cache_status(await run(storeless)) == {"fwd": "miss"}


async def test_equal_calls_of_one_process_are_one_without_a_store(
    storeless: Gateway, played: PlayedFal
) -> None:
    played.hold()
    async with asyncio.TaskGroup() as group:
        calls = [group.create_task(call(storeless)) for call in (run, run, submit, submit)]
        await until(lambda: played.paid == 1 and sum(task.done() for task in calls) >= 1)
        await asyncio.sleep(0.1)
        played.release()
    for task in calls[:2]:
        assert await task.result().read() == picture(1).body
    for task in calls[2:]:
        assert await (await outcome(storeless, task.result())).read() == picture(1).body
    assert played.paid == 1


@pytest.mark.parametrize("kind", ["a shared job", "a wait for a run"])
async def test_an_id_of_this_process_is_known_without_a_store(
    kind: str, storeless: Gateway, played: PlayedFal
) -> None:
    played.hold()
    async with asyncio.TaskGroup() as group:
        if kind == "a shared job":
            await submit(storeless)
        else:
            group.create_task(run(storeless))
        await until(lambda: played.paid == 1)
        request_id = await id_of(await submit(storeless))
        assert version_of(request_id) == 8
        await asyncio.sleep(1.1)
        response = await ask(storeless, request_id, "/status")
        assert (response.status, (await response.json())["status"]) == (202, "IN_PROGRESS")
        played.release()
    told = await events(await ask(storeless, request_id, "/status/stream"))
    assert told[-1]["status"] == "COMPLETED"
    assert await (await ask(storeless, request_id)).read() == picture(1).body


async def test_an_id_of_another_process_is_not_denied_without_a_store(
    storeless: Gateway, played: PlayedFal
) -> None:
    """It may well exist: a 404 would have a client give its paid job up."""
    response = await ask(storeless, new_virtual_id(), "/status")
    assert response.status == 503
    assert "Retry-After" in response.headers
    assert played.fake.seen == []


@pytest.mark.timed
async def test_a_frozen_store_holds_nobody_up_for_long(
    make_gateway: MakeGateway, played: PlayedFal
) -> None:
    with redis_server() as redis:
        gateway = await make_gateway(played.fake.origin, redis_url=redis.url)
        await run(gateway)
        hit = await id_of(await submit(gateway))
        played.hold()
        fal_id, own_id = await share_of(gateway, DOG)
        redis.freeze()
        try:
            started = time.monotonic()
            for _ in range(3):
                assert (await ask(gateway, fal_id, "/status")).status == 202
            assert time.monotonic() - started < 0.5
            assert (await ask(gateway, own_id, "/status")).status == 202
            assert await (await ask(gateway, hit)).read() == picture(1).body
            await run_slowly(gateway, played)
            started = time.monotonic()
            played.release()
            for prompt in "abc":
                assert not is_hit(await run(gateway, {"prompt": prompt}))
            assert time.monotonic() - started < 0.5
        finally:
            redis.thaw()
        async with asyncio.timeout(SOON):
            while not is_hit(await run(gateway)):
                await asyncio.sleep(0.1)


async def share_of(gateway: Gateway, body: object) -> list[str]:
    return [await id_of(await submit(gateway, body)) for _ in range(2)]


async def run_slowly(gateway: Gateway, played: PlayedFal) -> None:
    """A call that finds the store frozen, after which nobody waits for it any more."""
    started = time.monotonic()
    paid = played.paid
    call = asyncio.ensure_future(run(gateway, {"prompt": "slow"}))
    await until(lambda: played.paid == paid + 1)
    assert time.monotonic() - started < 2.0
    call.cancel()


async def test_no_answer_shows_the_key(gateway: Gateway, hit: str) -> None:
    for verb, method in VERBS:
        response = await ask(gateway, hit, verb, method)
        assert CANARY not in json.dumps([*response.headers.items(), await response.text()])
