"""Single-flight through the proxy: one of equal calls is paid, despite disconnects and cancels."""

import asyncio
import json
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import pytest
from aiohttp import ClientResponse, web
from aiohttp.pytest_plugin import AiohttpClient

from falproxy.stores.cache.result_cache import RESULT_CACHE
from falproxy.stores.cache.virtual_requests import new_virtual_id
from tests.support.fake_fal import WireFal, read_head
from tests.support.fake_queue import (
    APP,
    CAT,
    DOG,
    RUN,
    SUBMIT,
    FakeQueue,
    cache_status,
    image_result,
    is_hit,
    read_events,
    request_about,
    run,
    send,
    submit,
    submitted_id,
    upload_to,
    uuid_version,
    wait_result,
    wait_until_cached,
)
from tests.support.gateway import Gateway, MakeGateway
from tests.support.offline_fal import offline_fal, png
from tests.support.waiting import wait_until

TIMEOUT = 30.0  # seconds; of `wait_until`

pytestmark = pytest.mark.usefixtures("fal_outlives_the_proxy")

N = 8
Call = Callable[[Gateway], Coroutine[Any, Any, ClientResponse]]


async def final_response(gateway: Gateway, response: ClientResponse) -> ClientResponse:
    """Return the response of a run, or the result of a submit."""
    document = await response.json()
    return await wait_result(gateway, response) if "request_id" in document else response


async def wait_until_joined(
    calls: Sequence["asyncio.Future[ClientResponse]"], *gateways: Gateway
) -> None:
    """Wait until each of these calls has ended or waits for a call in flight, no others wait, and
    the stores know it."""
    caches = [gateway.client.app[RESULT_CACHE] for gateway in gateways]

    def have_joined() -> bool:
        waiters = sum(cache.single_flight.waiter_count for cache in caches)
        is_busy = any(cache.breaker.is_busy for cache in caches)
        return waiters == sum(not call.done() for call in calls) and not is_busy

    for _ in range(3):  # a request that has just begun to wait has not called the store yet
        await wait_until(have_joined, seconds=TIMEOUT)
        await asyncio.sleep(0.005)


# --- Equal calls ---


@pytest.mark.parametrize(
    "calls",
    [
        pytest.param([run] * N, id="runs"),
        pytest.param([submit] * N, id="submits"),
        pytest.param([run, submit] * (N // 2), id="runs and submits"),
    ],
)
async def test_concurrent_equal_calls_are_one_job(
    calls: list[Call],
    store_settings: dict[str, object],
    make_gateway: MakeGateway,
    queue: FakeQueue,
) -> None:
    gateway = await make_gateway(queue.fake.origin, **store_settings)
    queue.hold()
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(call(gateway)) for call in calls]
        await wait_until(lambda: queue.paid, seconds=TIMEOUT)
        await wait_until_joined(tasks, gateway)
        queue.release()
    results = [await final_response(gateway, task.result()) for task in tasks]
    assert {result.status for result in results} == {200}
    assert {await result.read() for result in results} == {image_result(1).body}
    assert queue.paid == 1
    ids = {result.headers["x-fal-request-id"] for result in results}
    assert len(ids) == N
    assert sorted(uuid_version(request_id) or 0 for request_id in ids) == [4] + [8] * (N - 1)


async def test_equal_calls_of_two_processes_are_one_job(
    store_settings: dict[str, object], make_gateway: MakeGateway, queue: FakeQueue
) -> None:
    gateways = [await make_gateway(queue.fake.origin, **store_settings) for _ in range(2)]
    queue.hold()
    async with asyncio.TaskGroup() as group:
        tasks = [
            (gateway, group.create_task(call(gateway)))
            for call in (submit, run, submit)
            for gateway in gateways
        ]
        await wait_until(lambda: queue.paid, seconds=TIMEOUT)
        await wait_until_joined([task for _, task in tasks], *gateways)
        queue.release()
    for gateway, task in tasks:
        assert await (await final_response(gateway, task.result())).read() == image_result(1).body
    assert queue.paid == 1


async def test_different_calls_do_not_wait_for_each_other(
    gateway: Gateway, queue: FakeQueue
) -> None:
    queue.hold()
    slow = asyncio.ensure_future(run(gateway))
    await wait_until(lambda: queue.paid == 1, seconds=TIMEOUT)
    held, queue._held = queue._held, None
    assert (await run(gateway, DOG)).status == 200
    queue._held = held
    queue.release()
    assert (await slow).status == 200


async def test_followers_have_a_collapsed_cache_status(gateway: Gateway, queue: FakeQueue) -> None:
    queue.hold()
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(run(gateway)) for _ in range(3)]
        await wait_until(lambda: queue.paid, seconds=TIMEOUT)
        await wait_until_joined(tasks, gateway)
        queue.release()
    statuses = [cache_status(task.result()) for task in tasks]
    assert sorted(statuses, key=sorted) == sorted(
        [{"fwd": "miss", "stored": ""}, *[{"fwd": "miss", "collapsed": ""}] * 2], key=sorted
    )


# --- A submit that joins a run ---


@pytest.fixture
async def joined(
    gateway: Gateway, queue: FakeQueue
) -> tuple[str, "asyncio.Future[ClientResponse]"]:
    """The id of a submit that joined a run, and the run."""
    queue.hold()
    running = asyncio.ensure_future(run(gateway))
    await wait_until(lambda: queue.paid == 1, seconds=TIMEOUT)
    request_id = await submitted_id(await submit(gateway))
    assert uuid_version(request_id) == 8
    return request_id, running


Joined = tuple[str, "asyncio.Future[ClientResponse]"]


async def test_a_submit_that_joins_a_run_waits_for_it(
    joined: Joined, gateway: Gateway, queue: FakeQueue
) -> None:
    request_id, running = joined
    status = await request_about(gateway, request_id, "/status?logs=1")
    document = await status.json()
    root = f"https://queue.fal.run/{APP}/requests/{request_id}"
    assert status.status == 202
    assert document == {
        "status": "IN_PROGRESS",
        "request_id": request_id,
        "logs": [],
        "status_url": f"{root}/status",
        "response_url": root,
        "cancel_url": f"{root}/cancel",
    }
    assert (await request_about(gateway, request_id)).status == 400
    stream = await gateway.call(f"{root}/status/stream", "GET")
    async with asyncio.timeout(TIMEOUT):
        first = await stream.content.readuntil(b"\n\n")
        queue.release()
        events = (first + await stream.content.read()).decode().split("\n\n")
    statuses = [json.loads(event.removeprefix("data: ")) for event in events if event]
    assert [event["status"] for event in statuses] == ["IN_PROGRESS", "COMPLETED"]
    assert statuses[-1] == await (await request_about(gateway, request_id, "/status")).json()
    assert await (await request_about(gateway, request_id)).read() == await (await running).read()
    assert (await request_about(gateway, request_id, "/cancel", "PUT")).status == 400
    assert queue.paid == 1


@pytest.mark.parametrize("status", [422, 500])
async def test_the_failure_of_a_run_is_the_result_of_its_virtual_ids(
    status: int, joined: Joined, gateway: Gateway, queue: FakeQueue
) -> None:
    request_id, running = joined
    body = {"detail": [{"msg": "no", "type": "content_policy_violation"}]}
    queue.output = lambda number: web.json_response(body, status=status)
    queue.release()
    statuses = await read_events(await request_about(gateway, request_id, "/status/stream"))
    assert statuses[-1]["status"] == "COMPLETED"
    assert statuses[-1]["error"]
    assert statuses[-1]["error_type"]
    result = await request_about(gateway, request_id)
    assert (result.status, await result.json()) == (status, body)
    assert (await running).status == status
    queue.output = image_result
    assert not is_hit(await run(gateway))


async def test_a_flagged_image_is_not_an_error(
    joined: Joined, gateway: Gateway, queue: FakeQueue
) -> None:
    """It is not cached, but shared by the calls that waited for it."""
    request_id, running = joined
    body = {"images": [], "has_nsfw_concepts": [True]}
    queue.output = lambda number: web.json_response(body)
    queue.release()
    statuses = await read_events(await request_about(gateway, request_id, "/status/stream"))
    assert statuses[-1]["status"] == "COMPLETED"
    assert "error" not in statuses[-1]
    result = await request_about(gateway, request_id)
    assert (result.status, await result.json()) == (200, body)
    await running


async def test_polls_around_the_end_of_a_run_are_consistent(
    gateway: Gateway, queue: FakeQueue
) -> None:
    """They get the run in progress, or its outcome, and nothing else."""
    queue.output = lambda number: web.json_response({"detail": "no"}, status=500)

    async def poll(request_id: str) -> list[tuple[int, int]]:
        seen: list[tuple[int, int]] = []
        while not seen or seen[-1][0] == 202:
            status = await request_about(gateway, request_id, "/status")
            seen.append((status.status, (await request_about(gateway, request_id)).status))
        return seen

    for number in range(8):
        queue.hold()
        async with asyncio.TaskGroup() as group:
            group.create_task(run(gateway))
            await wait_until(lambda paid=number + 1: queue.paid == paid, seconds=TIMEOUT)  # type: ignore[misc]
            request_id = await submitted_id(await submit(gateway))
            polls = [group.create_task(poll(request_id)) for _ in range(4)]
            await asyncio.sleep(0.01)
            queue.release()
        for task in polls:
            assert {*task.result()} <= {(202, 400), (202, 500), (200, 500)}


async def test_a_cancelled_virtual_id_does_not_end_the_run(
    joined: Joined, gateway: Gateway, queue: FakeQueue
) -> None:
    request_id, running = joined
    response = await request_about(gateway, request_id, "/cancel", "PUT")
    assert (response.status, await response.json()) == (202, {"status": "CANCELLATION_REQUESTED"})
    await assert_cancelled(gateway, request_id)
    queue.release()
    assert (await running).status == 200
    await assert_cancelled(gateway, request_id)
    assert queue.cancels == []


# --- Failures are shared, but not cached ---

HTML = "<html><center><h1>502 Bad Gateway</h1></center><hr><center>nginx</center></html>"


def refusal(status: int, **headers: str) -> Callable[[], web.Response]:
    fields = {name.replace("_", "-"): value for name, value in headers.items()}
    return lambda: web.json_response({"detail": f"no {status}"}, status=status, headers=fields)


REFUSALS = [
    *(pytest.param(refusal(status), id=str(status)) for status in (401, 403, 404, 422, 429, 500)),
    pytest.param(lambda: web.Response(status=502, text=HTML, content_type="text/html"), id="html"),
]


@pytest.mark.parametrize("target", [RUN, SUBMIT], ids=["run", "submit"])
@pytest.mark.parametrize("refuse", REFUSALS)
async def test_all_waiting_calls_get_fal_s_refusal(
    refuse: Callable[[], web.Response], target: str, gateway: Gateway, queue: FakeQueue
) -> None:
    queue.refusal = refuse
    queue.accepting.clear()
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(send(gateway, target, CAT)) for _ in range(4)]
        await wait_until(lambda: queue.posts, seconds=TIMEOUT)
        await wait_until_joined(tasks, gateway)
        queue.accepting.set()
    expected = refuse()
    for task in tasks:
        response = task.result()
        assert response.status == expected.status
        assert await response.read() == expected.body
        assert response.headers["Content-Type"] == expected.headers["Content-Type"]
        assert cache_status(response)["fwd"] == "miss"
    assert queue.posts == 1
    assert (await send(gateway, target, CAT)).status == expected.status
    assert queue.posts == 2


@pytest.mark.parametrize(
    ("name", "value"),
    [
        pytest.param(
            "X-Fal-Request-Timeout-Type", "user", id="start timeout, not repeated by clients"
        ),
        pytest.param("X-Fal-Error-Type", "request_timeout", id="exception of the Python client"),
        pytest.param("X-Fal-Retryable", "false", id="not retryable"),
        pytest.param("X-Fal-Needs-Retry", "1", id="needs a retry"),
        pytest.param("Retry-After", "7", id="delay of the retry"),
    ],
)
async def test_the_retry_headers_of_a_refusal_are_shared(
    name: str, value: str, gateway: Gateway, queue: FakeQueue
) -> None:
    queue.refusal = refusal(504, **{name: value})
    queue.accepting.clear()
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(run(gateway)) for _ in range(3)]
        await wait_until(lambda: queue.posts, seconds=TIMEOUT)
        await wait_until_joined(tasks, gateway)
        queue.accepting.set()
    assert [task.result().headers.get(name) for task in tasks] == [value] * 3


@pytest.mark.parametrize("target", [RUN, SUBMIT], ids=["run", "submit"])
async def test_a_call_with_a_lost_connection_is_not_repeated(
    target: str, make_gateway: MakeGateway, wire: WireFal
) -> None:
    may_break = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_head(reader)
        await may_break.wait()

    wire.serve = serve
    gateway = await make_gateway(wire.origin)
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(send(gateway, target, CAT)) for _ in range(4)]
        await wait_until(lambda: wire.connections, seconds=TIMEOUT)
        await wait_until_joined(tasks, gateway)
        may_break.set()
    for task in tasks:
        response = task.result()
        assert response.status == 504
        assert response.headers["x-fal-request-timeout-type"] == "user"
        assert (await response.json())["type"] == "upstream_broken"
    assert wire.connections == 1
    await send(gateway, target, CAT)
    assert wire.connections == 2


async def test_calls_with_a_document_too_large_to_share_are_sent_separately(
    make_gateway: MakeGateway, queue: FakeQueue
) -> None:
    gateway = await make_gateway(queue.fake.origin, cache_max_entry=1000)
    queue.output = lambda number: web.json_response({"number": number, "text": "x" * 300_000})
    queue.hold()
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(run(gateway)) for _ in range(3)]
        await wait_until(lambda: queue.paid, seconds=TIMEOUT)
        await wait_until_joined(tasks, gateway)
        queue.release()
    documents = [await task.result().json() for task in tasks]
    assert sorted(document["number"] for document in documents) == [1, 2, 3]
    assert {len(document["text"]) for document in documents} == {300_000}
    assert sum("stored" in cache_status(task.result()) for task in tasks) == 0


async def test_a_flagged_run_is_shared_by_waiting_calls(gateway: Gateway, queue: FakeQueue) -> None:
    queue.output = lambda number: web.json_response({"n": number, "has_nsfw_concepts": [True]})
    queue.hold()
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(run(gateway)) for _ in range(3)]
        await wait_until(lambda: queue.paid, seconds=TIMEOUT)
        await wait_until_joined(tasks, gateway)
        queue.release()
    assert [(await task.result().json())["n"] for task in tasks] == [1, 1, 1]
    assert (await (await run(gateway)).json())["n"] == 2


@pytest.mark.parametrize("call", [run, submit])
async def test_a_failed_job_is_not_cached(
    call: Call, store_settings: dict[str, object], make_gateway: MakeGateway, queue: FakeQueue
) -> None:
    gateway = await make_gateway(queue.fake.origin, **store_settings)
    body = {"detail": [{"msg": "no", "type": "content_policy_violation"}]}
    queue.output = lambda number: web.json_response(body, status=422)
    queue.hold()
    first = await submit(gateway)
    async with asyncio.TaskGroup() as group:
        second = group.create_task(call(gateway))
        await wait_until_joined([second], gateway)
        queue.release()
    for response in (first, second.result()):
        result = response if response.status == 422 else await wait_result(gateway, response)
        assert (result.status, await result.json()) == (422, body)
    status = await (await request_about(gateway, await submitted_id(first), "/status")).json()
    assert status["error"]
    assert queue.paid == 1
    queue.output = image_result
    await wait_until_paid_again(gateway, queue)


async def wait_until_paid_again(gateway: Gateway, queue: FakeQueue) -> None:
    """Wait until a call is sent again: the proxy awaits a job in the background."""
    async with asyncio.timeout(3):
        while (await run(gateway)).status != 200:
            await asyncio.sleep(0.02)
    assert queue.paid == 2


# --- Clients that leave ---


async def disconnect(
    call: "asyncio.Future[ClientResponse]",
    gateway: Gateway,
    *others: "asyncio.Future[ClientResponse]",
) -> None:
    """Close the connection of a client, and wait until the proxy has noticed.

    others: the calls that still wait.
    """
    call.cancel()
    await asyncio.wait([call])
    await wait_until_joined(others, gateway)


@pytest.mark.parametrize("call", [run, submit])
async def test_a_follower_gets_the_result_of_a_run_whose_leader_left(
    call: Call, gateway: Gateway, queue: FakeQueue
) -> None:
    queue.hold()
    leader = asyncio.ensure_future(run(gateway))
    await wait_until(lambda: queue.paid == 1, seconds=TIMEOUT)
    follower = asyncio.ensure_future(call(gateway))
    await wait_until_joined([leader, follower], gateway)
    await disconnect(leader, gateway, follower)
    assert queue.disconnects == 0
    queue.release()
    assert await (await final_response(gateway, await follower)).read() == image_result(1).body
    assert queue.paid == 1


@pytest.mark.parametrize("call", [run, submit])
async def test_a_follower_gets_the_result_of_a_submit_whose_leader_left(
    call: Call, gateway: Gateway, queue: FakeQueue
) -> None:
    queue.accepting.clear()
    leader = asyncio.ensure_future(submit(gateway))
    await wait_until(lambda: queue.posts == 1, seconds=TIMEOUT)
    follower = asyncio.ensure_future(call(gateway))
    await wait_until_joined([leader, follower], gateway)
    await disconnect(leader, gateway, follower)
    queue.accepting.set()
    assert await (await final_response(gateway, await follower)).read() == image_result(1).body
    assert queue.paid == 1


async def test_a_run_gets_the_result_of_a_submit_that_is_not_polled(
    gateway: Gateway, queue: FakeQueue
) -> None:
    queue.hold()
    await submit(gateway)
    follower = asyncio.ensure_future(run(gateway))
    await wait_until_joined([follower], gateway)
    queue.release()
    assert await (await follower).read() == image_result(1).body
    assert queue.paid == 1


@pytest.mark.parametrize("call", [run, submit])
async def test_a_paid_call_is_finished_and_cached_without_its_client(
    call: Call, gateway: Gateway, queue: FakeQueue
) -> None:
    queue.hold()
    leader = asyncio.ensure_future(call(gateway))
    await wait_until(lambda: queue.paid == 1, seconds=TIMEOUT)
    await disconnect(leader, gateway)
    assert queue.disconnects == 0
    queue.release()
    await wait_until_cached(gateway)
    assert await (await run(gateway)).read() == image_result(1).body
    assert queue.paid == 1


async def test_a_client_that_repeats_its_call_joins_the_run(
    gateway: Gateway, queue: FakeQueue
) -> None:
    queue.hold()
    await disconnect_running(gateway, queue)
    repeated = asyncio.ensure_future(run(gateway))
    await wait_until_joined([repeated], gateway)
    queue.release()
    assert await (await repeated).read() == image_result(1).body
    assert queue.paid == 1


async def disconnect_running(gateway: Gateway, queue: FakeQueue) -> None:
    leader = asyncio.ensure_future(run(gateway))
    await wait_until(lambda: queue.paid == 1, seconds=TIMEOUT)
    await disconnect(leader, gateway)


async def test_a_bypassing_call_ends_with_its_client(gateway: Gateway, queue: FakeQueue) -> None:
    queue.hold()
    call = asyncio.ensure_future(run(gateway, CAT, Cache_Control="no-store"))
    await wait_until(lambda: queue.paid == 1, seconds=TIMEOUT)
    await disconnect(call, gateway)
    await wait_until(lambda: queue.disconnects == 1, seconds=TIMEOUT)


async def test_a_large_response_of_a_client_that_left_is_discarded(
    make_gateway: MakeGateway, queue: FakeQueue
) -> None:
    gateway = await make_gateway(queue.fake.origin, cache_max_entry=1000)
    queue.output = lambda number: web.json_response({"text": "x" * 30_000_000})
    queue.hold()
    await disconnect_running(gateway, queue)
    queue.release()
    await wait_until(
        lambda: not gateway.client.app[RESULT_CACHE].single_flight._tasks, seconds=TIMEOUT
    )
    queue.output = image_result
    assert await (await run(gateway)).read() == image_result(2).body


# --- Cancels ---


async def submit_twice(gateway: Gateway, body: object = CAT) -> tuple[str, str]:
    """Return the ids of two equal submits: fal's own, and a virtual one."""
    one, other = [await submitted_id(await submit(gateway, body)) for _ in range(2)]
    assert (uuid_version(one), uuid_version(other)) == (4, 8)
    return one, other


async def cancel(gateway: Gateway, request_id: str, **headers: str) -> None:
    response = await request_about(gateway, request_id, "/cancel", "PUT", **headers)
    assert response.status == 202
    assert await response.json() == {"status": "CANCELLATION_REQUESTED"}


async def assert_cancelled(gateway: Gateway, request_id: str) -> None:
    """Check that every request about an id shows that it is cancelled."""
    status = await request_about(gateway, request_id, "/status")
    document = await status.json()
    assert (status.status, document["status"]) == (200, "COMPLETED")
    assert document["error"]
    assert document["error_type"] == "client_cancelled"
    statuses = await read_events(await request_about(gateway, request_id, "/status/stream"))
    assert (statuses[-1]["status"], statuses[-1]["error_type"]) == ("COMPLETED", "client_cancelled")
    result = await request_about(gateway, request_id)
    assert result.status == 499
    assert (await result.json())["error_type"] == "client_cancelled"
    assert (await request_about(gateway, request_id, "/cancel", "PUT")).status == 400


@pytest.mark.parametrize("position", [0, 1], ids=["leader", "follower"])
async def test_one_of_two_cancels_does_not_cancel_the_job(
    position: int, store_settings: dict[str, object], make_gateway: MakeGateway, queue: FakeQueue
) -> None:
    gateway = await make_gateway(queue.fake.origin, **store_settings)
    queue.hold()
    ids = await submit_twice(gateway)
    await cancel(gateway, ids[position])
    assert queue.cancels == []
    await assert_cancelled(gateway, ids[position])
    queue.release()
    statuses = await read_events(await request_about(gateway, ids[1 - position], "/status/stream"))
    assert statuses[-1]["status"] == "COMPLETED"
    assert "error" not in statuses[-1]
    assert await (await request_about(gateway, ids[1 - position])).read() == image_result(1).body
    await assert_cancelled(gateway, ids[position])
    assert queue.cancels == []


@pytest.mark.parametrize("first", [0, 1], ids=["leader first", "follower first"])
async def test_the_last_cancel_cancels_the_job_at_fal(
    first: int, store_settings: dict[str, object], make_gateway: MakeGateway, queue: FakeQueue
) -> None:
    gateway = await make_gateway(queue.fake.origin, **store_settings)
    queue.hold()
    ids = await submit_twice(gateway)
    for position in (first, 1 - first):
        await cancel(gateway, ids[position])
    assert queue.cancels == [ids[0]]
    for request_id in ids:
        await assert_finally_cancelled(gateway, request_id)
    again = await submit_twice(gateway)
    assert queue.paid == 2
    queue.release()
    for request_id in again:
        await request_about(gateway, request_id, "/status/stream")
        assert await (await request_about(gateway, request_id)).read() == image_result(2).body


async def assert_finally_cancelled(gateway: Gateway, request_id: str) -> None:
    statuses = await read_events(await request_about(gateway, request_id, "/status/stream"))
    assert (statuses[-1]["status"], statuses[-1]["error_type"]) == ("COMPLETED", "client_cancelled")
    assert (await request_about(gateway, request_id)).status == 499


async def test_a_single_holder_cancels_the_job(gateway: Gateway, queue: FakeQueue) -> None:
    queue.hold()
    request_id = await submitted_id(await submit(gateway))
    await cancel(gateway, request_id)
    assert queue.cancels == [request_id]


async def test_holders_in_two_processes_are_counted_together(
    store_settings: dict[str, object], make_gateway: MakeGateway, queue: FakeQueue
) -> None:
    one, other = [await make_gateway(queue.fake.origin, **store_settings) for _ in range(2)]
    queue.hold()
    fal_id = await submitted_id(await submit(one))
    virtual_ids = [await submitted_id(await submit(gateway)) for gateway in (one, other)]
    await cancel(other, fal_id)
    await cancel(other, virtual_ids[0])
    assert queue.cancels == []
    await cancel(one, virtual_ids[1])
    assert queue.cancels == [fal_id]
    assert uuid_version(await submitted_id(await submit(other))) == 4
    assert queue.paid == 2


async def test_a_waiting_run_holds_a_job(gateway: Gateway, queue: FakeQueue) -> None:
    queue.hold()
    request_id = await submitted_id(await submit(gateway))
    follower = asyncio.ensure_future(run(gateway))
    await wait_until_joined([follower], gateway)
    await cancel(gateway, request_id)
    assert queue.cancels == []
    queue.release()
    assert await (await follower).read() == image_result(1).body


async def test_a_run_whose_client_left_does_not_hold_a_job(
    store_settings: dict[str, object], make_gateway: MakeGateway, queue: FakeQueue
) -> None:
    gateway = await make_gateway(queue.fake.origin, **store_settings)
    queue.hold()
    request_id = await submitted_id(await submit(gateway))
    follower = asyncio.ensure_future(run(gateway))
    await wait_until_joined([follower], gateway)
    await disconnect(follower, gateway)
    await cancel(gateway, request_id)
    assert queue.cancels == [request_id]


async def test_only_put_cancels(gateway: Gateway, queue: FakeQueue) -> None:
    queue.hold()
    for request_id in await submit_twice(gateway):
        await request_about(gateway, request_id, "/cancel", "GET")
        document = await (await request_about(gateway, request_id, "/status")).json()
        assert document["status"] == "IN_PROGRESS"


@pytest.mark.parametrize("position", [0, 1], ids=["leader", "follower"])
async def test_a_completed_job_cannot_be_cancelled(
    position: int, store_settings: dict[str, object], make_gateway: MakeGateway, queue: FakeQueue
) -> None:
    gateway = await make_gateway(queue.fake.origin, **store_settings)
    queue.hold()
    ids = await submit_twice(gateway)
    queue.release()
    await wait_until_cached(gateway)
    response = await request_about(gateway, ids[position], "/cancel", "PUT")
    assert (response.status, await response.json()) == (400, {"status": "ALREADY_COMPLETED"})
    assert await (await request_about(gateway, ids[position])).read() == image_result(1).body


async def test_only_its_owner_can_cancel_a_request(
    make_gateway: MakeGateway, queue: FakeQueue
) -> None:
    keys = (("ann", "ann-secret"), ("bob", "bob-secret"))
    gateway = await make_gateway(queue.fake.origin, access_keys=keys)
    queue.hold()
    ids = [
        await submitted_id(await submit(gateway, CAT, Authorization=f"Key {name}-secret"))
        for name in ("ann", "bob")
    ]
    for request_id, other_caller in zip(
        (*ids, new_virtual_id()), ("bob", "ann", "ann"), strict=True
    ):
        response = await request_about(
            gateway, request_id, "/cancel", "PUT", Authorization=f"Key {other_caller}-secret"
        )
        assert response.status == 404
    assert queue.cancels == []
    await cancel(gateway, ids[0], Authorization="Key ann-secret")
    assert queue.cancels == []
    await cancel(gateway, ids[1], Authorization="Key bob-secret")
    assert queue.cancels == [ids[0]]


# --- Shutdown ---


@pytest.mark.parametrize("call", [run, submit])
async def test_a_queued_job_is_taken_over(
    call: Call, store_settings: dict[str, object], make_gateway: MakeGateway, queue: FakeQueue
) -> None:
    first = await make_gateway(queue.fake.origin, **store_settings)
    queue.hold()
    fal_id = await submitted_id(await submit(first))
    await first.client.close()
    second = await make_gateway(queue.fake.origin, **store_settings)
    follower = asyncio.ensure_future(call(second))
    await wait_until_joined([follower], second)
    queue.release()
    assert await (await final_response(second, await follower)).read() == image_result(1).body
    assert list(queue.jobs) == [fal_id]
    assert queue.paid == 1
    await wait_until_cached(second)


async def test_a_paid_run_finishes_during_the_shutdown(
    store_settings: dict[str, object], make_gateway: MakeGateway, queue: FakeQueue
) -> None:
    first = await make_gateway(queue.fake.origin, drain=6.0, **store_settings)
    queue.hold()
    await disconnect_running(first, queue)
    closing = asyncio.ensure_future(first.client.close())
    await asyncio.wait([closing], timeout=0.1)
    assert not closing.done()
    assert queue.disconnects == 0
    queue.release()
    await closing
    second = await make_gateway(queue.fake.origin, **store_settings)
    response = await run(second)
    assert is_hit(response)
    assert await response.read() == image_result(1).body


async def test_a_long_run_does_not_block_the_shutdown(
    make_gateway: MakeGateway, queue: FakeQueue
) -> None:
    gateway = await make_gateway(queue.fake.origin, drain=0.4)
    queue.hold()
    await disconnect_running(gateway, queue)
    async with asyncio.timeout(2):
        await gateway.client.close()
    await wait_until(lambda: queue.disconnects == 1, seconds=TIMEOUT)


async def test_no_task_remains_after_the_shutdown(
    store_settings: dict[str, object], make_gateway: MakeGateway, queue: FakeQueue
) -> None:
    before = asyncio.all_tasks()
    gateway = await make_gateway(queue.fake.origin, drain=0.2, **store_settings)
    queue.hold()
    tasks = [asyncio.ensure_future(call(gateway, DOG)) for call in (run, run, submit)]
    await submit_twice(gateway)
    await wait_until_joined(tasks, gateway)
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    await wait_until_joined([], gateway)
    await gateway.client.close()
    queue.release()
    await wait_until(
        lambda: not {task for task in asyncio.all_tasks() - before if is_of_the_proxy(task)},
        seconds=TIMEOUT,
    )


def is_of_the_proxy(task: "asyncio.Task[Any]") -> bool:
    """Return whether the proxy started a task, and not a server or client of the test."""
    code = getattr(task.get_coro(), "cr_code", None)
    return code is not None and "falproxy/" in code.co_filename


# --- With the sandbox ---


async def test_equal_edits_of_one_image_are_one_job_in_the_sandbox(
    make_gateway: MakeGateway, aiohttp_client: AiohttpClient
) -> None:
    sandbox = (await offline_fal(aiohttp_client)).sandbox
    gateway = await make_gateway(sandbox.public_url)
    body = {"prompt": "!delay 0.4 winter", "image_url": upload_to(sandbox, png(), "a.png")}
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(call(gateway, body)) for call in [run, submit] * 3]
    results = [await final_response(gateway, task.result()) for task in tasks]
    assert {result.status for result in results} == {200}
    assert len({await result.read() for result in results}) == 1
    assert sandbox.jobs == 1


async def test_a_job_of_the_sandbox_is_taken_over(
    make_gateway: MakeGateway, aiohttp_client: AiohttpClient
) -> None:
    sandbox = (await offline_fal(aiohttp_client)).sandbox
    first = await make_gateway(sandbox.public_url)
    body = {"prompt": "!delay 0.5 winter", "image_url": upload_to(sandbox, png(), "a.png")}
    fal_id = await submitted_id(await submit(first, body))
    await first.client.close()
    second = await make_gateway(sandbox.public_url)
    result = await wait_result(second, await submit(second, body))
    assert result.status == 200
    assert await (await request_about(second, fal_id)).read() == await result.read()
    assert sandbox.jobs == 1
