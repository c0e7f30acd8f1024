"""Single-flight through the proxy: of equal calls one is paid, whoever leaves, cancels or dies."""

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import pytest
from aiohttp import ClientResponse, web
from aiohttp.pytest_plugin import AiohttpClient, AiohttpServer
from redis import Redis

from falproxy.stores.cache.virtual_ids import new_virtual_id
from tests.support.cached_calls import (
    APP,
    CAT,
    DOG,
    RUN,
    SUBMIT,
    PlayedFal,
    ask,
    cache_status,
    events,
    id_of,
    is_hit,
    outcome,
    picture,
    run,
    send,
    submit,
    until,
    until_kept,
    upload_to,
    version_of,
)
from tests.support.fake_fal import FakeFal, WireFal, read_head
from tests.support.gateway import Gateway, MakeGateway
from tests.support.offline_fal import offline_fal, png
from tests.support.redis_server import RedisServer, redis_server

N = 8
Call = Callable[[Gateway], Coroutine[Any, Any, ClientResponse]]


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


async def ended(gateway: Gateway, response: ClientResponse) -> ClientResponse:
    """A run's own answer, or the result of a submit."""
    document = await response.json()
    return await outcome(gateway, response) if "request_id" in document else response


async def settle() -> None:
    """Time for what is on its way to arrive where it waits."""
    await asyncio.sleep(0.1)


# --- One job for all ---


@pytest.mark.parametrize(
    "calls",
    [
        pytest.param([run] * N, id="runs"),
        pytest.param([submit] * N, id="submits"),
        pytest.param([run, submit] * (N // 2), id="runs and submits"),
    ],
)
async def test_equal_calls_at_once_are_one_job(
    calls: list[Call], store: dict[str, object], make_gateway: MakeGateway, played: PlayedFal
) -> None:
    gateway = await make_gateway(played.fake.origin, **store)
    played.hold()
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(call(gateway)) for call in calls]
        await until(lambda: played.paid)
        await settle()
        played.release()
    results = [await ended(gateway, task.result()) for task in tasks]
    assert {result.status for result in results} == {200}
    assert {await result.read() for result in results} == {picture(1).body}
    assert played.paid == 1
    ids = {result.headers["x-fal-request-id"] for result in results}
    assert len(ids) == N
    assert sorted(version_of(found) or 0 for found in ids) == [4] + [8] * (N - 1)


async def test_the_calls_of_two_processes_are_one_job(
    store: dict[str, object], make_gateway: MakeGateway, played: PlayedFal
) -> None:
    gateways = [await make_gateway(played.fake.origin, **store) for _ in range(2)]
    played.hold()
    async with asyncio.TaskGroup() as group:
        tasks = [
            (gateway, group.create_task(call(gateway)))
            for call in (submit, run, submit)
            for gateway in gateways
        ]
        await until(lambda: played.paid)
        await settle()
        played.release()
    for gateway, task in tasks:
        assert await (await ended(gateway, task.result())).read() == picture(1).body
    assert played.paid == 1


async def test_calls_that_differ_do_not_wait_for_each_other(
    gateway: Gateway, played: PlayedFal
) -> None:
    played.hold()
    slow = asyncio.ensure_future(run(gateway))
    await until(lambda: played.paid == 1)
    held, played._held = played._held, None
    assert (await run(gateway, DOG)).status == 200
    played._held = held
    played.release()
    assert (await slow).status == 200


async def test_followers_say_that_they_are(gateway: Gateway, played: PlayedFal) -> None:
    played.hold()
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(run(gateway)) for _ in range(3)]
        await until(lambda: played.paid)
        await settle()
        played.release()
    told = [cache_status(task.result()) for task in tasks]
    assert sorted(told, key=len) == sorted(
        [{"fwd": "miss", "stored": ""}, *[{"fwd": "miss", "collapsed": ""}] * 2], key=len
    )


# --- A submit that meets a run ---


@pytest.fixture
async def met(gateway: Gateway, played: PlayedFal) -> tuple[str, "asyncio.Future[ClientResponse]"]:
    """The id of a submit that met a run, and the run."""
    played.hold()
    running = asyncio.ensure_future(run(gateway))
    await until(lambda: played.paid == 1)
    request_id = await id_of(await submit(gateway))
    assert version_of(request_id) == 8
    return request_id, running


Met = tuple[str, "asyncio.Future[ClientResponse]"]


async def test_a_submit_that_meets_a_run_waits_for_it(
    met: Met, gateway: Gateway, played: PlayedFal
) -> None:
    request_id, running = met
    status = await ask(gateway, request_id, "/status?logs=1")
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
    assert (await ask(gateway, request_id)).status == 400
    stream = asyncio.ensure_future(ask(gateway, request_id, "/status/stream"))
    await settle()
    played.release()
    told = await events(await stream)
    assert [event["status"] for event in told] == ["IN_PROGRESS", "COMPLETED"]
    assert told[-1] == await (await ask(gateway, request_id, "/status")).json()
    assert await (await ask(gateway, request_id)).read() == await (await running).read()
    assert (await ask(gateway, request_id, "/cancel", "PUT")).status == 400
    assert played.paid == 1


@pytest.mark.parametrize("status", [422, 500])
async def test_who_waited_for_a_run_hears_how_it_failed(
    status: int, met: Met, gateway: Gateway, played: PlayedFal
) -> None:
    request_id, running = met
    body = {"detail": [{"msg": "no", "type": "content_policy_violation"}]}
    played.output = lambda number: web.json_response(body, status=status)
    played.release()
    told = await events(await ask(gateway, request_id, "/status/stream"))
    assert told[-1]["status"] == "COMPLETED"
    assert told[-1]["error"]
    assert told[-1]["error_type"]
    result = await ask(gateway, request_id)
    assert (result.status, await result.json()) == (status, body)
    assert (await running).status == status
    played.output = picture
    assert not is_hit(await run(gateway))


async def test_a_flagged_picture_is_no_error(met: Met, gateway: Gateway, played: PlayedFal) -> None:
    """It is not kept, but who waited for it has got a result."""
    request_id, running = met
    body = {"images": [], "has_nsfw_concepts": [True]}
    played.output = lambda number: web.json_response(body)
    played.release()
    told = await events(await ask(gateway, request_id, "/status/stream"))
    assert told[-1]["status"] == "COMPLETED"
    assert "error" not in told[-1]
    result = await ask(gateway, request_id)
    assert (result.status, await result.json()) == (200, body)
    await running


async def test_the_end_of_a_run_is_seen_at_every_moment(
    gateway: Gateway, played: PlayedFal
) -> None:
    """Polls around the very end see the run go on, or its true end, and nothing between."""
    played.output = lambda number: web.json_response({"detail": "no"}, status=500)

    async def poll(request_id: str) -> list[tuple[int, int]]:
        found: list[tuple[int, int]] = []
        while not found or found[-1][0] == 202:
            status = await ask(gateway, request_id, "/status")
            found.append((status.status, (await ask(gateway, request_id)).status))
        return found

    for number in range(8):
        played.hold()
        async with asyncio.TaskGroup() as group:
            group.create_task(run(gateway))
            await until(lambda paid=number + 1: played.paid == paid)  # type: ignore[misc]
            request_id = await id_of(await submit(gateway))
            polls = [group.create_task(poll(request_id)) for _ in range(4)]
            await asyncio.sleep(0.01)
            played.release()
        for task in polls:
            assert {*task.result()} <= {(202, 400), (202, 500), (200, 500)}


async def test_a_cancelled_wait_is_over_and_the_run_goes_on(
    met: Met, gateway: Gateway, played: PlayedFal
) -> None:
    request_id, running = met
    response = await ask(gateway, request_id, "/cancel", "PUT")
    assert (response.status, await response.json()) == (202, {"status": "CANCELLATION_REQUESTED"})
    await is_cancelled(gateway, request_id)
    played.release()
    assert (await running).status == 200
    await is_cancelled(gateway, request_id)
    assert played.cancels == []


# --- Failures are shared, and not kept ---

PAGE = "<html><center><h1>502 Bad Gateway</h1></center><hr><center>nginx</center></html>"


def refusal(status: int, **headers: str) -> Callable[[], web.Response]:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return lambda: web.json_response({"detail": f"no {status}"}, status=status, headers=named)


REFUSALS = [
    *(pytest.param(refusal(status), id=str(status)) for status in (401, 403, 404, 422, 429, 500)),
    pytest.param(lambda: web.Response(status=502, text=PAGE, content_type="text/html"), id="html"),
]


@pytest.mark.parametrize("target", [RUN, SUBMIT], ids=["run", "submit"])
@pytest.mark.parametrize("refuse", REFUSALS)
async def test_all_who_wait_get_fal_s_refusal(
    refuse: Callable[[], web.Response], target: str, gateway: Gateway, played: PlayedFal
) -> None:
    played.refusal = refuse
    played.taking.clear()
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(send(gateway, target, CAT)) for _ in range(4)]
        await until(lambda: played.posts)
        await settle()
        played.taking.set()
    wanted = refuse()
    for task in tasks:
        response = task.result()
        assert response.status == wanted.status
        assert await response.read() == wanted.body
        assert response.headers["Content-Type"] == wanted.headers["Content-Type"]
        assert cache_status(response)["fwd"] == "miss"
    assert played.posts == 1
    assert (await send(gateway, target, CAT)).status == wanted.status
    assert played.posts == 2


@pytest.mark.parametrize(
    ("name", "value"),
    [
        pytest.param("X-Fal-Request-Timeout-Type", "user", id="the clients do not send it again"),
        pytest.param("X-Fal-Error-Type", "request_timeout", id="what the Python client raises"),
        pytest.param("X-Fal-Retryable", "false", id="whether it is worth it"),
        pytest.param("X-Fal-Needs-Retry", "1", id="that it should be sent again"),
        pytest.param("Retry-After", "7", id="when"),
    ],
)
async def test_what_a_refusal_says_of_retries_is_shared_as_well(
    name: str, value: str, gateway: Gateway, played: PlayedFal
) -> None:
    played.refusal = refusal(504, **{name: value})
    played.taking.clear()
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(run(gateway)) for _ in range(3)]
        await until(lambda: played.posts)
        await settle()
        played.taking.set()
    assert [task.result().headers.get(name) for task in tasks] == [value] * 3


@pytest.mark.parametrize("target", [RUN, SUBMIT], ids=["run", "submit"])
async def test_a_call_that_breaks_off_is_not_bought_again(
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
        await until(lambda: wire.connections)
        await settle()
        may_break.set()
    for task in tasks:
        response = task.result()
        assert response.status == 504
        assert response.headers["x-fal-request-timeout-type"] == "user"
        assert (await response.json())["type"] == "upstream_broken"
    assert wire.connections == 1
    await send(gateway, target, CAT)
    assert wire.connections == 2


async def test_a_document_too_large_to_share_is_everybody_s_own(
    make_gateway: MakeGateway, played: PlayedFal
) -> None:
    gateway = await make_gateway(played.fake.origin, cache_max_entry=1000)
    played.output = lambda number: web.json_response({"number": number, "text": "x" * 300_000})
    played.hold()
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(run(gateway)) for _ in range(3)]
        await until(lambda: played.paid)
        await settle()
        played.release()
    documents = [await task.result().json() for task in tasks]
    assert sorted(document["number"] for document in documents) == [1, 2, 3]
    assert {len(document["text"]) for document in documents} == {300_000}
    assert sum("stored" in cache_status(task.result()) for task in tasks) == 0


async def test_a_flagged_run_is_shared_by_those_who_waited(
    gateway: Gateway, played: PlayedFal
) -> None:
    played.output = lambda number: web.json_response({"n": number, "has_nsfw_concepts": [True]})
    played.hold()
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(run(gateway)) for _ in range(3)]
        await until(lambda: played.paid)
        await settle()
        played.release()
    assert [(await task.result().json())["n"] for task in tasks] == [1, 1, 1]
    assert (await (await run(gateway)).json())["n"] == 2


@pytest.mark.parametrize("call", [run, submit])
async def test_a_job_that_fails_is_forgotten(
    call: Call, store: dict[str, object], make_gateway: MakeGateway, played: PlayedFal
) -> None:
    gateway = await make_gateway(played.fake.origin, **store)
    body = {"detail": [{"msg": "no", "type": "content_policy_violation"}]}
    played.output = lambda number: web.json_response(body, status=422)
    played.hold()
    first = await submit(gateway)
    async with asyncio.TaskGroup() as group:
        second = group.create_task(call(gateway))
        await settle()
        played.release()
    for response in (first, second.result()):
        result = response if response.status == 422 else await outcome(gateway, response)
        assert (result.status, await result.json()) == (422, body)
    status = await (await ask(gateway, await id_of(first), "/status")).json()
    assert status["error"]
    assert played.paid == 1
    played.output = picture
    await until_paid_anew(gateway, played)


async def until_paid_anew(gateway: Gateway, played: PlayedFal) -> None:
    """Until a call is sent again: the proxy follows a job a moment behind."""
    async with asyncio.timeout(3):
        while (await run(gateway)).status != 200:
            await asyncio.sleep(0.02)
    assert played.paid == 2


# --- Clients that leave ---


async def leave(call: "asyncio.Future[ClientResponse]") -> None:
    """The client hangs up, and the proxy has noticed."""
    call.cancel()
    await asyncio.wait([call])
    await settle()


@pytest.mark.parametrize("follower", [run, submit])
async def test_a_follower_survives_a_leader_that_leaves_a_run(
    follower: Call, gateway: Gateway, played: PlayedFal
) -> None:
    played.hold()
    leader = asyncio.ensure_future(run(gateway))
    await until(lambda: played.paid == 1)
    following = asyncio.ensure_future(follower(gateway))
    await settle()
    await leave(leader)
    assert played.left == 0
    played.release()
    assert await (await ended(gateway, await following)).read() == picture(1).body
    assert played.paid == 1


@pytest.mark.parametrize("follower", [run, submit])
async def test_a_follower_survives_a_leader_that_leaves_before_its_submit_is_taken(
    follower: Call, gateway: Gateway, played: PlayedFal
) -> None:
    played.taking.clear()
    leader = asyncio.ensure_future(submit(gateway))
    await until(lambda: played.posts == 1)
    following = asyncio.ensure_future(follower(gateway))
    await settle()
    await leave(leader)
    played.taking.set()
    assert await (await ended(gateway, await following)).read() == picture(1).body
    assert played.paid == 1


async def test_a_run_survives_a_leader_that_leaves_the_queue(
    gateway: Gateway, played: PlayedFal
) -> None:
    played.hold()
    await submit(gateway)  # and never asks again
    following = asyncio.ensure_future(run(gateway))
    await settle()
    played.release()
    assert await (await following).read() == picture(1).body
    assert played.paid == 1


@pytest.mark.parametrize("call", [run, submit])
async def test_what_a_client_paid_for_and_left_is_finished_and_kept(
    call: Call, gateway: Gateway, played: PlayedFal
) -> None:
    played.hold()
    leader = asyncio.ensure_future(call(gateway))
    await until(lambda: played.paid == 1)
    await leave(leader)
    assert played.left == 0
    played.release()
    await until_kept(gateway)
    assert await (await run(gateway)).read() == picture(1).body
    assert played.paid == 1


async def test_a_client_that_left_and_comes_back_finds_its_run(
    gateway: Gateway, played: PlayedFal
) -> None:
    played.hold()
    await leave_running(gateway, played)
    back = asyncio.ensure_future(run(gateway))
    await settle()
    played.release()
    assert await (await back).read() == picture(1).body
    assert played.paid == 1


async def leave_running(gateway: Gateway, played: PlayedFal) -> None:
    leader = asyncio.ensure_future(run(gateway))
    await until(lambda: played.paid == 1)
    await leave(leader)


async def test_a_call_that_is_not_reusable_still_leaves_with_its_client(
    gateway: Gateway, played: PlayedFal
) -> None:
    played.hold()
    call = asyncio.ensure_future(run(gateway, CAT, Cache_Control="no-store"))
    await until(lambda: played.paid == 1)
    await leave(call)
    await until(lambda: played.left == 1)


async def test_an_answer_too_large_to_share_of_a_client_that_left_is_dropped(
    make_gateway: MakeGateway, played: PlayedFal
) -> None:
    gateway = await make_gateway(played.fake.origin, cache_max_entry=1000)
    played.output = lambda number: web.json_response({"text": "x" * 30_000_000})
    played.hold()
    await leave_running(gateway, played)
    played.release()
    await settle()
    played.output = picture
    assert await (await run(gateway)).read() == picture(2).body


# --- Cancels ---


async def share(gateway: Gateway, body: object = CAT) -> tuple[str, str]:
    """The ids of two equal submits: fal's own, and ours."""
    one, other = [await id_of(await submit(gateway, body)) for _ in range(2)]
    assert (version_of(one), version_of(other)) == (4, 8)
    return one, other


async def cancel(gateway: Gateway, request_id: str, **headers: str) -> None:
    response = await ask(gateway, request_id, "/cancel", "PUT", **headers)
    assert response.status == 202
    assert await response.json() == {"status": "CANCELLATION_REQUESTED"}


async def is_cancelled(gateway: Gateway, request_id: str) -> None:
    """Whether an id looks cancelled whatever is asked of it."""
    status = await ask(gateway, request_id, "/status")
    document = await status.json()
    assert (status.status, document["status"]) == (200, "COMPLETED")
    assert document["error"]
    assert document["error_type"] == "client_cancelled"
    told = await events(await ask(gateway, request_id, "/status/stream"))
    assert (told[-1]["status"], told[-1]["error_type"]) == ("COMPLETED", "client_cancelled")
    result = await ask(gateway, request_id)
    assert result.status == 499
    assert (await result.json())["error_type"] == "client_cancelled"
    assert (await ask(gateway, request_id, "/cancel", "PUT")).status == 400


@pytest.mark.parametrize("who", [0, 1], ids=["the leader", "the follower"])
async def test_one_of_two_cancels_for_himself_alone(
    who: int, store: dict[str, object], make_gateway: MakeGateway, played: PlayedFal
) -> None:
    gateway = await make_gateway(played.fake.origin, **store)
    played.hold()
    ids = await share(gateway)
    await cancel(gateway, ids[who])
    assert played.cancels == []
    await is_cancelled(gateway, ids[who])
    played.release()
    told = await events(await ask(gateway, ids[1 - who], "/status/stream"))
    assert told[-1]["status"] == "COMPLETED"
    assert "error" not in told[-1]
    assert await (await ask(gateway, ids[1 - who])).read() == picture(1).body
    await is_cancelled(gateway, ids[who])
    assert played.cancels == []


@pytest.mark.parametrize("first", [0, 1], ids=["the leader first", "the follower first"])
async def test_fal_hears_of_it_when_all_have_cancelled(
    first: int, store: dict[str, object], make_gateway: MakeGateway, played: PlayedFal
) -> None:
    gateway = await make_gateway(played.fake.origin, **store)
    played.hold()
    ids = await share(gateway)
    for who in (first, 1 - first):
        await cancel(gateway, ids[who])
    assert played.cancels == [ids[0]]
    for request_id in ids:
        await is_cancelled_at_last(gateway, request_id)
    again = await share(gateway)
    assert played.paid == 2
    played.release()
    for request_id in again:
        await ask(gateway, request_id, "/status/stream")
        assert await (await ask(gateway, request_id)).read() == picture(2).body


async def is_cancelled_at_last(gateway: Gateway, request_id: str) -> None:
    told = await events(await ask(gateway, request_id, "/status/stream"))
    assert (told[-1]["status"], told[-1]["error_type"]) == ("COMPLETED", "client_cancelled")
    assert (await ask(gateway, request_id)).status == 499


async def test_the_only_one_cancels_the_job(gateway: Gateway, played: PlayedFal) -> None:
    played.hold()
    request_id = await id_of(await submit(gateway))
    await cancel(gateway, request_id)
    assert played.cancels == [request_id]


async def test_cancels_in_two_processes_are_counted_together(
    store: dict[str, object], make_gateway: MakeGateway, played: PlayedFal
) -> None:
    one, other = [await make_gateway(played.fake.origin, **store) for _ in range(2)]
    played.hold()
    fal_id = await id_of(await submit(one))
    own_ids = [await id_of(await submit(gateway)) for gateway in (one, other)]
    await cancel(other, fal_id)
    await cancel(other, own_ids[0])
    assert played.cancels == []
    await cancel(one, own_ids[1])
    assert played.cancels == [fal_id]
    assert version_of(await id_of(await submit(other))) == 4
    assert played.paid == 2


async def test_a_waiting_run_holds_a_job(gateway: Gateway, played: PlayedFal) -> None:
    played.hold()
    request_id = await id_of(await submit(gateway))
    following = asyncio.ensure_future(run(gateway))
    await settle()
    await cancel(gateway, request_id)
    assert played.cancels == []
    played.release()
    assert await (await following).read() == picture(1).body


async def test_a_run_that_left_holds_no_job(
    store: dict[str, object], make_gateway: MakeGateway, played: PlayedFal
) -> None:
    gateway = await make_gateway(played.fake.origin, **store)
    played.hold()
    request_id = await id_of(await submit(gateway))
    following = asyncio.ensure_future(run(gateway))
    await settle()
    await leave(following)
    await cancel(gateway, request_id)
    assert played.cancels == [request_id]


async def test_only_put_cancels(gateway: Gateway, played: PlayedFal) -> None:
    played.hold()
    for request_id in await share(gateway):
        await ask(gateway, request_id, "/cancel", "GET")
        document = await (await ask(gateway, request_id, "/status")).json()
        assert document["status"] == "IN_PROGRESS"


@pytest.mark.parametrize("who", [0, 1], ids=["the leader", "the follower"])
async def test_it_may_be_too_late_to_cancel(
    who: int, store: dict[str, object], make_gateway: MakeGateway, played: PlayedFal
) -> None:
    gateway = await make_gateway(played.fake.origin, **store)
    played.hold()
    ids = await share(gateway)
    played.release()
    await until_kept(gateway)
    response = await ask(gateway, ids[who], "/cancel", "PUT")
    assert (response.status, await response.json()) == (400, {"status": "ALREADY_COMPLETED"})
    assert await (await ask(gateway, ids[who])).read() == picture(1).body


async def test_nobody_cancels_another_s(make_gateway: MakeGateway, played: PlayedFal) -> None:
    keys = (("ann", "ann-secret"), ("bob", "bob-secret"))
    gateway = await make_gateway(played.fake.origin, access_keys=keys)
    played.hold()
    ids = [
        await id_of(await submit(gateway, CAT, Authorization=f"Key {name}-secret"))
        for name in ("ann", "bob")
    ]
    for request_id, stranger in zip((*ids, new_virtual_id()), ("bob", "ann", "ann"), strict=True):
        response = await ask(
            gateway, request_id, "/cancel", "PUT", Authorization=f"Key {stranger}-secret"
        )
        assert response.status == 404
    assert played.cancels == []
    await cancel(gateway, ids[0], Authorization="Key ann-secret")
    assert played.cancels == []
    await cancel(gateway, ids[1], Authorization="Key bob-secret")
    assert played.cancels == [ids[0]]


# --- The end of a process ---


@pytest.mark.parametrize("call", [run, submit])
async def test_a_queued_job_is_taken_over(
    call: Call, store: dict[str, object], make_gateway: MakeGateway, played: PlayedFal
) -> None:
    first = await make_gateway(played.fake.origin, **store)
    played.hold()
    fal_id = await id_of(await submit(first))
    await first.client.close()
    second = await make_gateway(played.fake.origin, **store)
    following = asyncio.ensure_future(call(second))
    await settle()
    played.release()
    assert await (await ended(second, await following)).read() == picture(1).body
    assert list(played.jobs) == [fal_id]
    assert played.paid == 1
    await until_kept(second)


async def test_a_paid_run_finishes_while_the_proxy_stops(
    store: dict[str, object], make_gateway: MakeGateway, played: PlayedFal
) -> None:
    first = await make_gateway(played.fake.origin, drain=6.0, **store)
    played.hold()
    await leave_running(first, played)
    closing = asyncio.ensure_future(first.client.close())
    await settle()
    assert not closing.done()
    assert played.left == 0
    played.release()
    await closing
    second = await make_gateway(played.fake.origin, **store)
    response = await run(second)
    assert is_hit(response)
    assert await response.read() == picture(1).body


async def test_a_run_that_takes_too_long_does_not_keep_the_proxy(
    make_gateway: MakeGateway, played: PlayedFal
) -> None:
    gateway = await make_gateway(played.fake.origin, drain=0.4)
    played.hold()
    await leave_running(gateway, played)
    async with asyncio.timeout(2):
        await gateway.client.close()
    await until(lambda: played.left == 1)


async def test_the_end_leaves_nothing_behind(
    store: dict[str, object], make_gateway: MakeGateway, played: PlayedFal
) -> None:
    before = asyncio.all_tasks()
    gateway = await make_gateway(played.fake.origin, drain=0.2, **store)
    played.hold()
    tasks = [asyncio.ensure_future(call(gateway, DOG)) for call in (run, run, submit)]
    await share(gateway)
    await settle()
    for task in tasks:
        await leave(task)
    await gateway.client.close()
    played.release()
    await until(lambda: not {task for task in asyncio.all_tasks() - before if is_ours(task)})


def is_ours(task: "asyncio.Task[Any]") -> bool:
    """Whether a task was started by the proxy, and not by a server or a client of the test's."""
    code = getattr(task.get_coro(), "cr_code", None)
    return code is not None and "falproxy/" in code.co_filename


# --- With the sandbox ---


async def test_equal_edits_of_one_picture_are_one_job_in_the_sandbox(
    make_gateway: MakeGateway, aiohttp_client: AiohttpClient
) -> None:
    sandbox = (await offline_fal(aiohttp_client)).sandbox
    gateway = await make_gateway(sandbox.public_url)
    body = {"prompt": "!delay 0.4 winter", "image_url": upload_to(sandbox, png(), "a.png")}
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(call(gateway, body)) for call in [run, submit] * 3]
    results = [await ended(gateway, task.result()) for task in tasks]
    assert {result.status for result in results} == {200}
    assert len({await result.read() for result in results}) == 1
    assert sandbox.jobs == 1


async def test_the_sandbox_s_job_is_taken_over(
    make_gateway: MakeGateway, aiohttp_client: AiohttpClient
) -> None:
    sandbox = (await offline_fal(aiohttp_client)).sandbox
    first = await make_gateway(sandbox.public_url)
    body = {"prompt": "!delay 0.5 winter", "image_url": upload_to(sandbox, png(), "a.png")}
    fal_id = await id_of(await submit(first, body))
    await first.client.close()
    second = await make_gateway(sandbox.public_url)
    result = await outcome(second, await submit(second, body))
    assert result.status == 200
    assert await (await ask(second, fal_id)).read() == await result.read()
    assert sandbox.jobs == 1
