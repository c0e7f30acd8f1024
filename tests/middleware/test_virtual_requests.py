"""Virtual requests: status, stream, result and cancel have the form of fal's."""

import asyncio
import json
import re
import time
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from aiohttp import ClientResponse
from redis import Redis

from falproxy.stores.cache.sqlite import SqliteStore
from falproxy.stores.cache.virtual_requests import new_virtual_id
from tests.support.fake_queue import (
    APP,
    CAT,
    DOG,
    KONTEXT,
    FakeQueue,
    cache_status,
    image_result,
    is_hit,
    read_events,
    request_about,
    run,
    submit,
    submitted_id,
    uuid_version,
    wait_result,
    wait_until_cached,
)
from tests.support.gateway import Gateway, MakeGateway
from tests.support.key_search import CANARY
from tests.support.redis_server import RedisServer, redis_server
from tests.support.waiting import wait_until

TIMEOUT = 30.0  # seconds; of `wait_until`

pytestmark = pytest.mark.usefixtures("fal_outlives_the_proxy")

SUFFIXES = [("", "GET"), ("/response", "GET"), ("/status", "GET"), ("/status?logs=1", "GET"),
         ("/status/stream", "GET"), ("/cancel", "PUT")]  # fmt: skip


# --- Hits ---


async def test_a_hit_has_the_submit_response_of_fal(gateway: Gateway) -> None:
    await run(gateway)
    response = await submit(gateway)
    document = await response.json()
    request_id = document.pop("request_id")
    root = f"https://queue.fal.run/{APP}/requests/{request_id}"
    assert uuid_version(request_id) == 8
    assert response.headers.getall("x-fal-request-id") == [request_id]
    assert document == {
        "status": "IN_QUEUE",
        "queue_position": 0,
        "response_url": root,
        "status_url": f"{root}/status",
        "cancel_url": f"{root}/cancel",
    }
    assert is_hit(response)


async def test_requests_about_a_hit_do_not_reach_fal(gateway: Gateway, queue: FakeQueue) -> None:
    await run(gateway)
    requests = len(queue.fake.seen)
    request_id = await submitted_id(await submit(gateway))
    for suffix, method in SUFFIXES:
        assert (await request_about(gateway, request_id, suffix, method)).status in (200, 400)
    assert len(queue.fake.seen) == requests


@pytest.fixture
async def hit(gateway: Gateway) -> str:
    """The id of a submit with a cached result."""
    await run(gateway)
    return await submitted_id(await submit(gateway))


@pytest.mark.parametrize(
    ("query", "logs"), [("", None), ("?logs=1", []), ("?logs=true", []), ("?logs=0", None)]
)
async def test_a_hit_is_completed_at_once(
    query: str, logs: object, gateway: Gateway, hit: str
) -> None:
    response = await request_about(gateway, hit, f"/status{query}")
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
    response = await request_about(gateway, hit, f"/status/stream{query}")
    status = await request_about(gateway, hit, f"/status{query}")
    assert response.status == 200
    assert await read_events(response) == [await status.json()]


@pytest.mark.parametrize("alias", ["", "/response"])
async def test_the_result_of_a_hit_is_the_document_byte_for_byte(
    alias: str, gateway: Gateway, hit: str
) -> None:
    for _ in range(2):
        response = await request_about(gateway, hit, alias)
        assert response.status == 200
        assert response.content_type == "application/json"
        assert await response.read() == image_result(1).body
        assert is_hit(response)
        assert response.headers["x-fal-request-id"] == hit


async def test_a_hit_cannot_be_cancelled(gateway: Gateway, hit: str) -> None:
    response = await request_about(gateway, hit, "/cancel", "PUT")
    assert response.status == 400
    assert await response.json() == {"status": "ALREADY_COMPLETED"}
    assert await (await request_about(gateway, hit)).read() == image_result(1).body


async def test_a_hit_keeps_its_result_after_the_expiry(
    make_gateway: MakeGateway, queue: FakeQueue
) -> None:
    gateway = await make_gateway(queue.fake.origin, cache_ttl=0.3)
    await run(gateway)
    request_id = await submitted_id(await submit(gateway))
    await asyncio.sleep(0.35)
    await run(gateway)
    assert queue.paid == 2
    assert await (await request_about(gateway, request_id)).read() == image_result(1).body


# --- Through the base URLs ---

BASE_URL = "/api/fal/queue"


async def base_url_request(
    gateway: Gateway, url: str, method: str = "GET", **body: Any
) -> ClientResponse:
    async with asyncio.timeout(TIMEOUT):
        response = await gateway.client.request(method, url, **body)
        await response.read()
    return response


def urls_in(document: dict[str, Any]) -> list[str]:
    return [document[name] for name in ("status_url", "response_url", "cancel_url")]


@pytest.mark.parametrize("kind", ["hit", "shared job", "pending run"])
async def test_queue_urls_point_to_the_base_url(
    kind: str, gateway: Gateway, queue: FakeQueue
) -> None:
    """In every document that contains them, because clients follow them unchanged."""
    async with asyncio.TaskGroup() as group:
        if kind != "hit":
            queue.hold()
        if kind == "shared job":
            await submit(gateway)
        else:
            group.create_task(run(gateway))
        await wait_until(lambda: queue.paid == 1, seconds=TIMEOUT)
        if kind == "hit":
            await wait_until_cached(gateway)
        response = await base_url_request(gateway, f"{BASE_URL}/{KONTEXT}", "POST", json=CAT)
        document = await response.json()
        assert uuid_version(document["request_id"]) == 8
        root = f"{gateway.origin}{BASE_URL}/{APP}/requests/{document['request_id']}"
        expected = [f"{root}/status", root, f"{root}/cancel"]
        assert urls_in(document) == expected
        status = await base_url_request(gateway, urls_in(document)[0].removeprefix(gateway.origin))
        assert urls_in(await status.json()) == expected
        stream = gateway.client.request("GET", f"{BASE_URL}/{APP}/requests/"
                                        f"{document['request_id']}/status/stream")  # fmt: skip
        queue.release()
        statuses = await read_events(await stream)
    assert [urls_in(event) for event in statuses] == [expected] * len(statuses)
    assert statuses[-1]["status"] == "COMPLETED"
    for url in (root, f"{root}/response"):
        result = await base_url_request(gateway, url.removeprefix(gateway.origin))
        assert await result.read() == image_result(1).body
    assert queue.paid == 1


async def test_runs_through_the_base_url_share_results(gateway: Gateway, queue: FakeQueue) -> None:
    await run(gateway)
    response = await base_url_request(gateway, f"/api/fal/run/{KONTEXT}", "POST", json=CAT)
    assert is_hit(response)
    assert queue.paid == 1


# --- Shared jobs ---


async def submit_twice(gateway: Gateway, **headers: str) -> list[str]:
    """Return the ids of two equal submits: fal's own, and a virtual one."""
    ids = [await submitted_id(await submit(gateway, CAT, **headers)) for _ in range(2)]
    assert [uuid_version(request_id) for request_id in ids] == [4, 8]
    return ids


async def test_a_shared_job_is_reported_under_the_virtual_id(
    gateway: Gateway, queue: FakeQueue
) -> None:
    queue.hold()
    fal_id, virtual_id = await submit_twice(gateway)
    for suffix, logs in (("", None), ("?logs=1", [{"message": "50%", "timestamp": "now"}])):
        response = await request_about(gateway, virtual_id, f"/status{suffix}")
        assert response.status == 202
        assert response.headers["x-fal-request-id"] == virtual_id
        document = await response.json()
        assert document["status"] == "IN_PROGRESS"
        assert document["request_id"] == virtual_id
        assert all(virtual_id in url for url in urls_in(document))
        assert document["logs"] == logs
        assert fal_id not in await response.text()
    stream = asyncio.ensure_future(request_about(gateway, virtual_id, "/status/stream"))
    await asyncio.sleep(0.05)
    queue.release()
    statuses = await read_events(await stream)
    assert [event["status"] for event in statuses] == ["IN_PROGRESS", "COMPLETED"]
    assert fal_id not in await (await stream).text()
    for request_id in (fal_id, virtual_id):
        result = await request_about(gateway, request_id)
        assert await result.read() == image_result(1).body
        assert result.headers["x-fal-request-id"] == request_id


async def test_a_pending_result_is_a_400(gateway: Gateway, queue: FakeQueue) -> None:
    queue.hold()
    for request_id in await submit_twice(gateway):
        response = await request_about(gateway, request_id)
        assert response.status == 400
        assert await response.json() == {"detail": "Request is still in progress"}


async def test_a_follower_has_a_collapsed_cache_status(gateway: Gateway, queue: FakeQueue) -> None:
    queue.hold()
    assert cache_status(await submit(gateway)) == {"fwd": "miss"}
    assert cache_status(await submit(gateway)) == {"fwd": "miss", "collapsed": ""}


async def test_a_result_that_is_fetched_late_is_not_cached_as_new(
    gateway: Gateway, queue: FakeQueue, tmp_path: Path
) -> None:
    """An id lives for a day, longer than its result may."""
    request_id = await submitted_id(await submit(gateway))
    await wait_until_cached(gateway)
    async with SqliteStore(tmp_path / "results.sqlite", max_size=2**30) as store:
        assert await store.clear() == 1
    await asyncio.sleep(1.1)
    result = await request_about(gateway, request_id)
    assert await result.read() == image_result(1).body
    hit = await run(gateway)
    assert not is_hit(hit) or int(hit.headers["Age"]) >= 1


# --- Owners of ids ---


@pytest.mark.slow(seconds=3)
@pytest.mark.parametrize(
    "request_id",
    [
        pytest.param(new_virtual_id(), id="random"),
        pytest.param("00000000-0000-8000-8000-000000000000", id="lowest"),
        pytest.param("ffffffff-ffff-8fff-bfff-ffffffffffff", id="highest"),
    ],
)
async def test_an_unknown_virtual_id_is_a_404(
    request_id: str, store_settings: dict[str, object], make_gateway: MakeGateway, queue: FakeQueue
) -> None:
    gateway = await make_gateway(queue.fake.origin, **store_settings)
    responses = await asyncio.gather(
        *(request_about(gateway, request_id, suffix, method) for suffix, method in SUFFIXES)
    )
    assert {response.status for response in responses} == {404}
    assert queue.fake.seen == []


@pytest.mark.parametrize(
    "request_id",
    [
        pytest.param(str(uuid4()), id="version 4"),
        pytest.param("not-a-uuid", id="not a UUID"),
        pytest.param("00000000-0000-8000-0000-000000000000", id="another variant"),
    ],
)
async def test_requests_about_other_ids_go_to_fal(
    request_id: str, gateway: Gateway, queue: FakeQueue
) -> None:
    for suffix, method in SUFFIXES:
        response = await request_about(gateway, request_id, suffix, method)
        assert (response.status, await response.json()) == (404, {"status": "NOT_FOUND"})
    assert len(queue.fake.seen) == len(SUFFIXES)


ANN, BOB = "Key ann-secret", "Key bob-secret"
KEYS = (("ann", "ann-secret"), ("bob", "bob-secret"))


@pytest.mark.slow(seconds=4)
@pytest.mark.parametrize("kind", ["hit", "shared job", "pending run"])
async def test_a_virtual_id_belongs_to_its_owner(
    kind: str, store_settings: dict[str, object], make_gateway: MakeGateway, queue: FakeQueue
) -> None:
    gateway = await make_gateway(queue.fake.origin, access_keys=KEYS, **store_settings)
    queue.hold()
    async with asyncio.TaskGroup() as group:
        if kind == "shared job":
            await submit(gateway, CAT, Authorization=BOB)
        else:
            running = group.create_task(run(gateway, CAT, Authorization=BOB))
            await wait_until(lambda: queue.paid == 1, seconds=TIMEOUT)
            if kind == "hit":
                queue.release()
                await running
        request_id = await submitted_id(await submit(gateway, CAT, Authorization=ANN))
        assert uuid_version(request_id) == 8
        requests = len(queue.fake.seen)
        for suffix, method in SUFFIXES:
            foreign, unknown = await asyncio.gather(
                *(
                    request_about(gateway, an_id, suffix, method, Authorization=BOB)
                    for an_id in (request_id, new_virtual_id())
                )
            )
            assert foreign.status == 404
            assert re.sub(r'"request_id": ".*?"', "", await foreign.text()) == re.sub(
                r'"request_id": ".*?"', "", await unknown.text()
            )
        assert len(queue.fake.seen) == requests
        queue.release()
    stream = await request_about(gateway, request_id, "/status/stream", Authorization=ANN)
    assert (await read_events(stream))[-1]["status"] == "COMPLETED"
    result = await request_about(gateway, request_id, Authorization=ANN)
    assert await result.read() == image_result(1).body
    assert queue.paid == 1


async def test_fal_s_id_of_a_shared_job_belongs_to_its_submitter(
    make_gateway: MakeGateway, queue: FakeQueue
) -> None:
    gateway = await make_gateway(queue.fake.origin, access_keys=KEYS)
    queue.hold()
    fal_id = await submitted_id(await submit(gateway, CAT, Authorization=ANN))
    await submit(gateway, CAT, Authorization=BOB)
    for suffix, method in SUFFIXES:
        assert (
            await request_about(gateway, fal_id, suffix, method, Authorization=BOB)
        ).status == 404
    assert queue.cancels == []


async def test_ids_survive_a_restart(
    store_settings: dict[str, object], make_gateway: MakeGateway, queue: FakeQueue
) -> None:
    gateway = await make_gateway(queue.fake.origin, **store_settings)
    await run(gateway, DOG)
    hit = await submitted_id(await submit(gateway, DOG))
    queue.hold()
    fal_id, virtual_id = await submit_twice(gateway)
    other_id = await submitted_id(await submit(gateway))
    assert (await request_about(gateway, other_id, "/cancel", "PUT")).status == 202
    await gateway.client.close()
    queue.release()
    gateway = await make_gateway(queue.fake.origin, **store_settings)
    for request_id, number in ((hit, 1), (fal_id, 2), (virtual_id, 2)):
        statuses = await read_events(await request_about(gateway, request_id, "/status/stream"))
        assert statuses[-1]["status"] == "COMPLETED"
        assert "error" not in statuses[-1]
        assert await (await request_about(gateway, request_id)).read() == image_result(number).body
    cancelled = await (await request_about(gateway, other_id, "/status")).json()
    assert cancelled["error_type"] == "client_cancelled"
    assert queue.paid == 2
    assert queue.cancels == []


@pytest.mark.parametrize("status", [200, 500])
async def test_an_id_that_waited_for_a_run_survives_a_restart(
    status: int, store_settings: dict[str, object], make_gateway: MakeGateway, queue: FakeQueue
) -> None:
    gateway = await make_gateway(queue.fake.origin, **store_settings)
    queue.hold()
    queue.output = lambda number: failing(image_result(number), status)
    async with asyncio.TaskGroup() as group:
        group.create_task(run(gateway))
        await wait_until(lambda: queue.paid == 1, seconds=TIMEOUT)
        request_id = await submitted_id(await submit(gateway))
        queue.release()
    await request_about(gateway, request_id, "/status/stream")
    await gateway.client.close()
    gateway = await make_gateway(queue.fake.origin, **store_settings)
    result = await request_about(gateway, request_id)
    assert (result.status, await result.read()) == (status, image_result(1).body)
    assert queue.paid == 1


def failing(response: Any, status: int) -> Any:
    response.set_status(status)
    return response


async def test_ids_are_valid_in_every_process(
    store_settings: dict[str, object], make_gateway: MakeGateway, queue: FakeQueue
) -> None:
    one, other = [await make_gateway(queue.fake.origin, **store_settings) for _ in range(2)]
    await run(one, DOG)
    hit = await submitted_id(await submit(one, DOG))
    assert await (await request_about(other, hit)).read() == image_result(1).body
    queue.hold()
    async with asyncio.TaskGroup() as group:
        group.create_task(run(one))
        await wait_until(lambda: queue.paid == 2, seconds=TIMEOUT)
        waiting = await submitted_id(await submit(one))
        document = await (await request_about(other, waiting, "/status")).json()
        assert document["status"] == "IN_PROGRESS"
        queue.release()
    statuses = await read_events(await request_about(other, waiting, "/status/stream"))
    assert statuses[-1]["status"] == "COMPLETED"
    assert await (await request_about(other, waiting)).read() == image_result(2).body


# --- Reads of the store ---


def command_counts(redis: RedisServer) -> dict[str, int]:
    """Return the number of each command, except those of probes."""
    with Redis.from_url(redis.url) as client:
        stats: dict[str, dict[str, int]] = client.info("commandstats")
    commands = ("cmdstat_get", "cmdstat_evalsha", "cmdstat_eval", "cmdstat_hmget")
    return {name: entry["calls"] for name, entry in stats.items() if name in commands}


# Timed: a store that a busy machine made slow is probed, and a probe is a read, too.
@pytest.mark.timed
async def test_polls_of_fal_s_ids_do_not_read_the_store(
    redis: RedisServer, make_gateway: MakeGateway, queue: FakeQueue
) -> None:
    gateway = await make_gateway(queue.fake.origin, redis_url=redis.url)
    queue.hold()
    fal_id, _ = await submit_twice(gateway)
    stranger = str(uuid4())
    await asyncio.sleep(1.1)  # more than LOCAL_TTL
    before = command_counts(redis)
    for request_id in (fal_id, stranger):
        for suffix in ("/status", "/status?logs=1", "/status"):
            assert (await request_about(gateway, request_id, suffix)).status in (202, 404)
    stream = asyncio.ensure_future(request_about(gateway, fal_id, "/status/stream"))
    await wait_until(lambda: queue.fake.seen[-1].target.endswith("/stream"), seconds=TIMEOUT)
    assert command_counts(redis) == before
    queue.release()
    await stream


# --- Several fal keys ---

AI_KEYS = ("one:a", "two:b", "three:c")


async def test_requests_about_a_shared_job_use_the_key_of_its_submit(
    make_gateway: MakeGateway, queue: FakeQueue
) -> None:
    gateway = await make_gateway(queue.fake.origin, ai_keys=AI_KEYS)
    for _ in range(2):
        await submit(gateway, {"prompt": str(uuid4())})  # so that another key is next
    queue.hold()
    queue.fake.seen.clear()
    fal_id, virtual_id = await submit_twice(gateway)
    for request_id in (virtual_id, fal_id, virtual_id):
        await request_about(gateway, request_id, "/status")
    await request_about(gateway, virtual_id)
    await request_about(gateway, virtual_id, "/cancel", "PUT")
    queue.release()
    await wait_until_cached(gateway)
    used = [seen.header("authorization") for seen in queue.fake.seen if fal_id in seen.target]
    (submit_key,) = [
        seen.header("authorization") for seen in queue.fake.seen if seen.method == "POST"
    ]
    assert len(used) >= 6
    assert {*used} == {submit_key}


async def test_the_key_of_a_shared_job_is_used_after_a_restart(
    make_gateway: MakeGateway, queue: FakeQueue
) -> None:
    gateway = await make_gateway(queue.fake.origin, ai_keys=AI_KEYS)
    queue.hold()
    _, virtual_id = await submit_twice(gateway)
    (submit_key,) = {key for key, seen in zip(queue.keys, queue.fake.seen, strict=True)
                 if seen.method == "POST"}  # fmt: skip
    await gateway.client.close()
    queue.fake.seen.clear()
    gateway = await make_gateway(queue.fake.origin, ai_keys=AI_KEYS[::-1])
    for _ in range(4):
        assert (await request_about(gateway, virtual_id, "/status")).status == 202
    assert {*queue.keys} == {submit_key}
    queue.release()


# --- A store that is down ---


@pytest.fixture
async def gateway_without_store(
    make_gateway: MakeGateway, queue: FakeQueue, tmp_path: Path
) -> Gateway:
    """A proxy with a file in place of its data directory."""
    folder = tmp_path / "folder"
    folder.touch()
    return await make_gateway(queue.fake.origin, data_dir=folder)


async def test_calls_are_sent_without_a_store(
    gateway_without_store: Gateway, queue: FakeQueue
) -> None:
    for number in (1, 2):
        response = await run(gateway_without_store)
        assert (response.status, await response.read()) == (200, image_result(number).body)
        assert not is_hit(response)
    response = await submit(gateway_without_store)
    assert await (await wait_result(gateway_without_store, response)).read() == image_result(3).body


async def test_a_result_that_is_not_stored_has_no_stored_parameter(
    gateway_without_store: Gateway, queue: FakeQueue
) -> None:
    assert cache_status(await run(gateway_without_store)) == {"fwd": "miss"}


async def test_equal_calls_of_one_process_are_shared_without_a_store(
    gateway_without_store: Gateway, queue: FakeQueue
) -> None:
    queue.hold()
    async with asyncio.TaskGroup() as group:
        calls = [
            group.create_task(call(gateway_without_store)) for call in (run, run, submit, submit)
        ]
        await wait_until(
            lambda: queue.paid == 1 and sum(task.done() for task in calls) >= 1, seconds=TIMEOUT
        )
        await asyncio.sleep(0.1)
        queue.release()
    for task in calls[:2]:
        assert await task.result().read() == image_result(1).body
    for task in calls[2:]:
        assert (
            await (await wait_result(gateway_without_store, task.result())).read()
            == image_result(1).body
        )
    assert queue.paid == 1


@pytest.mark.parametrize("kind", ["shared job", "pending run"])
async def test_an_id_of_this_process_is_valid_without_a_store(
    kind: str, gateway_without_store: Gateway, queue: FakeQueue
) -> None:
    queue.hold()
    async with asyncio.TaskGroup() as group:
        if kind == "shared job":
            await submit(gateway_without_store)
        else:
            group.create_task(run(gateway_without_store))
        await wait_until(lambda: queue.paid == 1, seconds=TIMEOUT)
        request_id = await submitted_id(await submit(gateway_without_store))
        assert uuid_version(request_id) == 8
        await asyncio.sleep(1.1)
        response = await request_about(gateway_without_store, request_id, "/status")
        assert (response.status, (await response.json())["status"]) == (202, "IN_PROGRESS")
        queue.release()
    statuses = await read_events(
        await request_about(gateway_without_store, request_id, "/status/stream")
    )
    assert statuses[-1]["status"] == "COMPLETED"
    assert (
        await (await request_about(gateway_without_store, request_id)).read()
        == image_result(1).body
    )


async def test_an_id_of_another_process_is_a_503_without_a_store(
    gateway_without_store: Gateway, queue: FakeQueue
) -> None:
    """It may exist: after a 404 a client would abandon its paid job."""
    response = await request_about(gateway_without_store, new_virtual_id(), "/status")
    assert response.status == 503
    assert "Retry-After" in response.headers
    assert queue.fake.seen == []


@pytest.mark.timed
async def test_a_frozen_store_delays_one_call_only(
    make_gateway: MakeGateway, queue: FakeQueue
) -> None:
    with redis_server() as redis:
        gateway = await make_gateway(queue.fake.origin, redis_url=redis.url)
        await run(gateway)
        hit = await submitted_id(await submit(gateway))
        queue.hold()
        fal_id, virtual_id = await submit_twice_body(gateway, DOG)
        redis.freeze()
        try:
            started = time.monotonic()
            for _ in range(3):
                assert (await request_about(gateway, fal_id, "/status")).status == 202
            assert time.monotonic() - started < 0.5
            assert (await request_about(gateway, virtual_id, "/status")).status == 202
            assert await (await request_about(gateway, hit)).read() == image_result(1).body
            await run_until_sent(gateway, queue)
            started = time.monotonic()
            queue.release()
            for prompt in "abc":
                assert not is_hit(await run(gateway, {"prompt": prompt}))
            assert time.monotonic() - started < 0.5
        finally:
            redis.thaw()
        async with asyncio.timeout(TIMEOUT):
            while not is_hit(await run(gateway)):
                await asyncio.sleep(0.1)


async def submit_twice_body(gateway: Gateway, body: object) -> list[str]:
    return [await submitted_id(await submit(gateway, body)) for _ in range(2)]


async def run_until_sent(gateway: Gateway, queue: FakeQueue) -> None:
    """Make a call that opens the circuit breaker of the frozen store."""
    started = time.monotonic()
    paid = queue.paid
    call = asyncio.ensure_future(run(gateway, {"prompt": "slow"}))
    await wait_until(lambda: queue.paid == paid + 1, seconds=TIMEOUT)
    assert time.monotonic() - started < 2.0
    call.cancel()


async def test_no_response_contains_the_key(gateway: Gateway, hit: str) -> None:
    for suffix, method in SUFFIXES:
        response = await request_about(gateway, hit, suffix, method)
        assert CANARY not in json.dumps([*response.headers.items(), await response.text()])
