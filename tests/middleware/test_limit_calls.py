"""Limits of model calls in the pipeline: what counts, what is refused, and how reservations end."""

import asyncio
import json
import sqlite3
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from aiohttp import ClientResponse, web

from falproxy.middleware.limiter import JOB_TIMEOUT, LEASE
from falproxy.server.fast_path.protocol import ROUTE_CACHE
from falproxy.stores.limits import Limit
from tests.support.fake_fal import FakeFal
from tests.support.fake_queue import (
    CAT,
    DOG,
    FakeQueue,
    image_result,
    submitted_id,
    wait_until_cached,
)
from tests.support.fake_queue import RUN as CACHED_RUN
from tests.support.fake_queue import SUBMIT as CACHED_SUBMIT
from tests.support.gateway import Gateway, MakeGateway
from tests.support.limits import (
    HOUR,
    LONG,
    PRICE,
    RUN,
    SUBMIT,
    limiter_of,
    open_reservations,
    running,
    spent,
    sweep_after,
)
from tests.support.waiting import SOON, wait_until

ME = "principal:address:127.0.0.1"
KEYS = (("ann", "s3cret-ann"), ("bob", "s3cret-bob"))
ANN, BOB = ("x-falproxy-key", "s3cret-ann"), ("x-falproxy-key", "s3cret-bob")
OF_ANN, OF_BOB = "principal:key%3Aann", "principal:key%3Abob"
CACHED_PRICE = 40_000
JOB = "https://queue.fal.run/fal-ai/flux-pro/requests/{}"


@pytest.fixture
def queue(fal: FakeFal) -> FakeQueue:
    return FakeQueue(fal)


Open = Callable[..., Awaitable[Gateway]]


@pytest.fixture
def make(make_gateway: MakeGateway, fal: FakeFal, queue: FakeQueue) -> Open:
    async def open_gateway(**settings: Any) -> Gateway:
        return await make_gateway(fal.origin, **settings)

    return open_gateway


def app_of(gateway: Gateway) -> web.Application:
    return gateway.client.server.app  # type: ignore[attr-defined, no-any-return]


async def post(
    gateway: Gateway, target: str, body: object = CAT, *headers: tuple[str, str]
) -> ClientResponse:
    response = await gateway.call(target, json=body, headers=headers)
    await response.read()
    return response


async def get(
    gateway: Gateway, target: str, *headers: tuple[str, str], method: str = "GET"
) -> ClientResponse:
    response = await gateway.call(target, method, headers=headers)
    await response.read()
    return response


async def refused(response: ClientResponse, status: int, code: str) -> str:
    document = await response.json()
    assert (response.status, document["type"]) == (status, code), document
    return str(document["detail"])


def with_units(units: str) -> Callable[[int], web.Response]:
    def output(number: int) -> web.Response:
        response = image_result(number)
        response.headers["X-Fal-Billable-Units"] = units
        return response

    return output


# --- What counts ---


@pytest.mark.parametrize(
    "call",
    [
        pytest.param(lambda gateway: post(gateway, RUN), id="a run"),
        pytest.param(lambda gateway: post(gateway, f"{RUN}/stream"), id="a stream"),
        pytest.param(lambda gateway: post(gateway, SUBMIT), id="a submit"),
        pytest.param(lambda gateway: get(gateway, f"{RUN}?prompt=cat"), id="a run by GET"),
        pytest.param(lambda gateway: post(gateway, f"{SUBMIT}?fal_webhook=https://a.b"), id="hook"),
        pytest.param(lambda gateway: post(gateway, CACHED_RUN), id="a cached run"),
        pytest.param(lambda gateway: post(gateway, CACHED_SUBMIT), id="a cached submit"),
    ],
)
async def test_every_model_call_counts_as_a_request(
    make: Open, queue: FakeQueue, call: Callable[[Gateway], Awaitable[ClientResponse]]
) -> None:
    queue.fake.respond = respond_to_all(queue)
    gateway = await make(rate=(3, HOUR))
    statuses = [(await call(gateway)).status for _ in range(5)]
    assert statuses == [200, 200, 200, 429, 429]
    assert len([seen for seen in queue.fake.seen if "requests" not in seen.target]) <= 3


def respond_to_all(queue: FakeQueue) -> Any:
    """Return a handler that treats a run by GET like one by POST."""

    async def respond(request: web.Request) -> web.StreamResponse:
        if request.method == "GET" and "requests" not in request.path:
            return await queue._accept(request)
        return await queue.respond(request)

    return respond


async def test_requests_about_jobs_and_uploads_do_not_count(make: Open, queue: FakeQueue) -> None:
    gateway = await make(rate=(1, HOUR), concurrency=1)
    request_id = await submitted_id(await post(gateway, SUBMIT))
    target = JOB.format(request_id)
    for _ in range(3):
        assert (await get(gateway, f"{target}/status")).status == 200
        assert (await get(gateway, f"{target}/status/stream")).status == 200
        assert (await get(gateway, target)).status == 200
        assert (await get(gateway, f"{target}/cancel", method="PUT")).status == 400
    queue.fake.respond = hello
    upload = "https://rest.fal.ai/storage/upload/initiate"
    for _ in range(3):
        assert (await post(gateway, upload, {})).status == 200
    await refused(await post(gateway, SUBMIT), 429, "rate_limited")


async def hello(request: web.Request) -> web.Response:
    return web.json_response({})


async def test_a_repeated_submit_is_limited_and_polls_keep_the_fast_path(
    make: Open, queue: FakeQueue
) -> None:
    """The same connection and the same head each time."""
    gateway = await make(rate=(4, HOUR))
    responses = [await post(gateway, SUBMIT) for _ in range(6)]
    assert [response.status for response in responses] == [200] * 4 + [429] * 2
    route_cache = app_of(gateway)[ROUTE_CACHE]
    assert route_cache.hits == 0
    target = f"{JOB.format(await submitted_id(responses[0]))}/status"
    for _ in range(5):
        assert (await get(gateway, target)).status == 200
    assert route_cache.hits > 0


async def test_callers_and_their_users_are_limited_apart(make: Open) -> None:
    gateway = await make(access_keys=KEYS, rate=(2, HOUR))
    assert [(await post(gateway, RUN, CAT, ANN)).status for _ in range(3)] == [200, 200, 429]
    assert [(await post(gateway, RUN, CAT, BOB)).status for _ in range(3)] == [200, 200, 429]


async def test_a_hit_counts_as_a_request_and_costs_nothing(make: Open, queue: FakeQueue) -> None:
    queue.output = with_units("1")
    gateway = await make(rate=(3, HOUR), budget=(CACHED_PRICE, LONG), concurrency=1)
    for _ in range(3):
        assert (await post(gateway, CACHED_RUN)).status == 200
    assert await spent(app_of(gateway), ME) == CACHED_PRICE
    await refused(await post(gateway, CACHED_RUN), 429, "rate_limited")
    assert queue.paid == 1


# --- Concurrency ---


async def test_jobs_count_as_under_way_until_their_result_is_read(
    make: Open, queue: FakeQueue
) -> None:
    gateway = await make(concurrency=2)
    queue.hold()
    ids = [await submitted_id(await post(gateway, SUBMIT, {"prompt": str(n)})) for n in range(2)]
    response = await post(gateway, SUBMIT)
    assert "2" in await refused(response, 429, "concurrency_limited")
    assert response.headers["Retry-After"] == "1"
    assert queue.posts == 2
    queue.release()
    await refused(await post(gateway, SUBMIT), 429, "concurrency_limited")
    assert (await get(gateway, JOB.format(ids[0]))).status == 200
    assert (await post(gateway, SUBMIT)).status == 200
    await refused(await post(gateway, RUN), 429, "concurrency_limited")


async def test_runs_one_after_the_other_never_meet_a_limit_of_one(make: Open) -> None:
    gateway = await make(concurrency=1)
    for number in range(20):
        assert (await post(gateway, RUN, {"prompt": str(number)})).status == 200


@pytest.mark.parametrize("limit", [1, 3, 7])
async def test_exactly_as_many_runs_are_under_way_as_allowed(
    make: Open, queue: FakeQueue, limit: int
) -> None:
    gateway = await make(concurrency=limit)
    queue.hold()
    calls = [
        asyncio.ensure_future(post(gateway, RUN, {"prompt": str(number)})) for number in range(12)
    ]
    await wait_until(lambda: sum(call.done() for call in calls) == 12 - limit, seconds=30)
    queue.release()
    statuses = [(await call).status for call in calls]
    assert (statuses.count(200), statuses.count(429)) == (limit, 12 - limit)
    assert queue.posts == limit


async def test_a_stream_is_under_way_until_its_end(make: Open, fal: FakeFal) -> None:
    may_end = asyncio.Event()

    async def stream(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await response.write(b"data: {}\n\n")
        await may_end.wait()
        return response

    gateway = await make(concurrency=1)
    fal.respond = stream
    opened = await gateway.call(f"{RUN}/stream", json=CAT)
    assert await opened.content.readline() == b"data: {}\n"
    await refused(await post(gateway, f"{RUN}/stream"), 429, "concurrency_limited")
    may_end.set()
    await opened.read()
    await until_none_runs(gateway)
    left = await gateway.call(f"{RUN}/stream", json=CAT)
    await left.content.readline()
    left.close()
    await until_none_runs(gateway)


async def until_none_runs(gateway: Gateway) -> None:
    async with asyncio.timeout(SOON):
        while await running(app_of(gateway), ME):
            await asyncio.sleep(0.01)


# --- Budgets ---


async def test_a_budget_is_spent_to_the_last_call_that_it_covers(
    make: Open, queue: FakeQueue
) -> None:
    queue.output = with_units("1")
    gateway = await make(budget=(4 * PRICE - 1, LONG))
    statuses = [(await post(gateway, RUN, {"prompt": str(n)})).status for n in range(6)]
    assert statuses == [200, 200, 200, 402, 402, 402]
    assert (queue.paid, await spent(app_of(gateway), ME)) == (3, 3 * PRICE)


async def test_calls_at_once_never_exceed_a_budget(make: Open, queue: FakeQueue) -> None:
    gateway = await make(budget=(10 * PRICE, LONG))
    responses = await asyncio.gather(
        *(post(gateway, SUBMIT, {"prompt": str(number)}) for number in range(40))
    )
    statuses = [response.status for response in responses]
    assert (statuses.count(200), statuses.count(402)) == (10, 30)
    assert queue.paid == 10


async def test_a_refusal_names_the_budget_and_its_renewal(make: Open, queue: FakeQueue) -> None:
    gateway = await make(access_keys=KEYS, budget=(30_000, LONG), total_budget=(55_000, LONG))
    for header in (ANN, BOB):
        assert (await post(gateway, SUBMIT, CAT, header)).status == 200
    response = await post(gateway, SUBMIT, CAT, ANN)
    message = await refused(response, 402, "budget_exceeded")
    assert "of this caller ($0.03 per" in message
    assert "renewed at 2" in message
    assert int(response.headers["Retry-After"]) > 0
    await refused(await post(gateway, SUBMIT, {"num_images": 0.5}, ANN), 402, "budget_exceeded")
    assert queue.posts == 2


async def test_all_callers_together_have_a_budget(make: Open, queue: FakeQueue) -> None:
    gateway = await make(access_keys=KEYS, total_budget=(PRICE, LONG))
    assert (await post(gateway, SUBMIT, CAT, ANN)).status == 200
    response = await post(gateway, SUBMIT, CAT, BOB)
    assert "of all callers" in await refused(response, 402, "budget_exceeded")
    assert "RateLimit" not in response.headers, "the spending of others is not shown"


@pytest.mark.parametrize(
    ("inputs", "cost"),
    [
        pytest.param({}, PRICE, id="one image"),
        pytest.param({"num_images": 4}, 4 * PRICE, id="four images"),
        pytest.param({"image_size": {"width": 2048, "height": 1024}}, 2 * PRICE, id="large"),
        pytest.param({"prompt": "x" * 40_000, "num_images": 3}, 3 * PRICE, id="a long prompt"),
    ],
)
async def test_the_estimate_is_reserved_and_settled_to_the_units(
    make: Open, queue: FakeQueue, inputs: dict[str, object], cost: int
) -> None:
    queue.hold()
    queue.output = with_units("0.5")
    gateway = await make(budget=(20 * PRICE, LONG), concurrency=9)
    request_id = await submitted_id(await post(gateway, SUBMIT, CAT | inputs))
    app = app_of(gateway)
    assert (await spent(app, ME), await running(app, ME)) == (cost, 1)
    await get(gateway, JOB.format(request_id))
    assert await spent(app, ME) == cost, "the job is in progress"
    queue.release()
    for _ in range(2):
        await get(gateway, JOB.format(request_id))
        assert (await spent(app, ME), await running(app, ME)) == (PRICE // 2, 0)


async def test_inputs_in_the_query_of_a_run_by_get_are_counted(
    make: Open, queue: FakeQueue
) -> None:
    queue.fake.respond = respond_to_all(queue)
    gateway = await make(budget=(20 * PRICE, LONG))
    assert (await get(gateway, f"{RUN}?prompt=cat&num_images=3")).status == 200
    assert await spent(app_of(gateway), ME) == 3 * PRICE


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b'{"prompt": ', id="no JSON"),
        pytest.param(b"[1]", id="no object"),
        pytest.param(json.dumps({"num_images": 9, "x": [0] * 30_000}).encode(), id="too many"),
    ],
)
async def test_an_input_that_cannot_be_read_is_refused_under_a_budget(
    make: Open, queue: FakeQueue, body: bytes
) -> None:
    gateway = await make(budget=(20 * PRICE, LONG))
    headers = [("Content-Type", "application/json")]
    response = await gateway.call(SUBMIT, data=body, headers=headers)
    await refused(response, 400, "input_unreadable")
    response = await gateway.call(
        SUBMIT, data=b"x", headers=[*headers, ("Content-Encoding", "gzip")]
    )
    await refused(response, 400, "input_unreadable")
    assert queue.posts == 0


# --- How calls end ---


def failure(status: int, **headers: str) -> Callable[[int], web.Response]:
    return lambda number: web.json_response({"detail": "no"}, status=status, headers=headers)


FAILURES = [
    pytest.param(failure(422), id="422"),
    pytest.param(failure(422, **{"X-Fal-Billable-Units": "0"}), id="422 with units"),
    pytest.param(failure(429), id="429"),
    pytest.param(failure(500), id="500"),
    pytest.param(failure(504, **{"X-Fal-Error-Type": "request_timeout"}), id="504"),
]


@pytest.mark.parametrize("output", FAILURES)
async def test_failed_runs_leave_the_budget_as_it_was(
    make: Open, queue: FakeQueue, output: Callable[[int], web.Response]
) -> None:
    queue.output = output
    gateway = await make(budget=(2 * PRICE, LONG), concurrency=2)
    for number in range(60):
        assert (await post(gateway, RUN, {"prompt": str(number)})).status >= 422
    app = app_of(gateway)
    assert (await spent(app, ME), await running(app, ME)) == (0, 0)
    assert queue.posts == 60


@pytest.mark.parametrize("output", FAILURES)
async def test_failed_jobs_leave_the_budget_as_it_was(
    make: Open, queue: FakeQueue, output: Callable[[int], web.Response]
) -> None:
    queue.output = output
    gateway = await make(budget=(2 * PRICE, LONG), concurrency=2)
    for number in range(5):
        request_id = await submitted_id(await post(gateway, SUBMIT, {"prompt": str(number)}))
        assert (await get(gateway, JOB.format(request_id))).status >= 422
    app = app_of(gateway)
    assert (await spent(app, ME), await running(app, ME)) == (0, 0)


async def test_a_failure_with_units_is_charged(make: Open, queue: FakeQueue) -> None:
    queue.output = failure(422, **{"X-Fal-Billable-Units": "2"})
    gateway = await make(budget=(9 * PRICE, LONG))
    await post(gateway, RUN)
    assert await spent(app_of(gateway), ME) == 2 * PRICE


@pytest.mark.parametrize("target", [RUN, SUBMIT, CACHED_RUN, CACHED_SUBMIT])
@pytest.mark.parametrize("status", [400, 401, 403, 404, 422, 429, 500, 503])
async def test_a_call_that_fal_refuses_costs_nothing(
    make: Open, queue: FakeQueue, target: str, status: int
) -> None:
    queue.refusal = lambda: web.json_response({"detail": "no"}, status=status)
    gateway = await make(budget=(CACHED_PRICE, LONG), concurrency=1)
    for _ in range(3):
        assert (await post(gateway, target)).status == status
    app = app_of(gateway)
    assert (await spent(app, ME), await running(app, ME)) == (0, 0)


@pytest.mark.parametrize("target", [RUN, SUBMIT])
async def test_a_call_whose_response_is_lost_counts_as_spent(
    make: Open, queue: FakeQueue, target: str
) -> None:
    async def lose(request: web.Request) -> web.StreamResponse:
        await request.read()
        assert request.transport is not None
        request.transport.abort()
        return web.Response()

    queue.fake.respond = lose
    gateway = await make(budget=(PRICE, LONG), concurrency=1)
    assert (await post(gateway, target)).status == 504
    app = app_of(gateway)
    assert (await spent(app, ME), await running(app, ME)) == (PRICE, 0)
    await refused(await post(gateway, target), 402, "budget_exceeded")


async def test_an_unreachable_fal_costs_nothing(
    make_gateway: MakeGateway, unused_tcp_port: int
) -> None:
    origin = f"http://127.0.0.1:{unused_tcp_port}"
    gateway = await make_gateway(origin, budget=(PRICE, LONG), concurrency=1)
    for _ in range(2):
        assert (await post(gateway, SUBMIT)).status == 502
    assert await spent(app_of(gateway), ME) == 0


@pytest.mark.parametrize("target", [RUN, SUBMIT, CACHED_RUN, CACHED_SUBMIT])
async def test_a_client_that_leaves_leaves_no_open_reservation(
    make: Open, queue: FakeQueue, target: str
) -> None:
    gateway = await make(budget=(9 * CACHED_PRICE, LONG), concurrency=5)
    queue.hold()
    queue.accepting.clear()
    call = asyncio.ensure_future(gateway.call(target, json=CAT))
    await wait_until(lambda: queue.posts == 1, seconds=30)
    call.cancel()
    await asyncio.sleep(0)
    queue.accepting.set()
    queue.release()
    await until_none_runs(gateway)
    price = CACHED_PRICE if "kontext" in target else PRICE
    assert await spent(app_of(gateway), ME) == price
    assert await open_reservations(app_of(gateway)) == 0


async def test_a_job_whose_result_is_not_read_is_looked_up(make: Open, queue: FakeQueue) -> None:
    queue.output = with_units("0.5")
    gateway = await make(budget=(9 * PRICE, LONG), concurrency=9)
    app = app_of(gateway)
    hook = f"{SUBMIT}?fal_webhook=https://a.b/c"
    for target in (SUBMIT, hook):
        assert (await post(gateway, target)).status == 200
    queue.output = with_units("0.5")
    await sweep_after(app, 0.0)
    assert await spent(app, ME) == 2 * PRICE
    await sweep_after(app, 11.0)
    assert (await spent(app, ME), await running(app, ME)) == (PRICE, 0)


async def test_a_job_in_progress_keeps_its_reservation(make: Open, queue: FakeQueue) -> None:
    queue.hold()
    gateway = await make(budget=(9 * PRICE, LONG))
    app = app_of(gateway)
    request_id = await submitted_id(await post(gateway, SUBMIT))
    for _ in range(5):
        await sweep_after(app, 400.0)
    assert await spent(app, ME) == PRICE
    asked = [seen.target for seen in queue.fake.seen if request_id in seen.target]
    assert len(asked) == 5
    assert all(target.endswith("/status") for target in asked)
    await sweep_after(app, JOB_TIMEOUT)
    assert (await spent(app, ME), await open_reservations(app)) == (PRICE, 0)


async def test_a_job_that_is_cancelled_in_the_queue_costs_nothing(
    make: Open, queue: FakeQueue
) -> None:
    queue.hold()
    gateway = await make(budget=(PRICE, LONG), concurrency=1)
    app = app_of(gateway)
    request_id = await submitted_id(await post(gateway, SUBMIT))
    assert (await get(gateway, f"{JOB.format(request_id)}/cancel", method="PUT")).status == 202
    await sweep_after(app, 2.5)
    assert (await spent(app, ME), await running(app, ME)) == (0, 0)
    assert (await post(gateway, SUBMIT)).status == 200


async def test_a_cancelled_job_that_fal_has_removed_costs_nothing(
    make: Open, queue: FakeQueue
) -> None:
    queue.hold()
    gateway = await make(budget=(2 * PRICE, LONG))
    app = app_of(gateway)
    ids = [await submitted_id(await post(gateway, SUBMIT)) for _ in range(2)]
    await get(gateway, f"{JOB.format(ids[0])}/cancel", method="PUT")
    queue.jobs.clear()
    await sweep_after(app, 60.0)
    assert await spent(app, ME) == PRICE, "the other one may have been charged"
    assert await open_reservations(app) == 0


async def test_a_call_of_a_process_that_died_counts_as_spent(make: Open, queue: FakeQueue) -> None:
    gateway = await make(budget=(9 * PRICE, LONG))
    app = app_of(gateway)
    limiter = limiter_of(app)
    _, reservation = await limiter.reserve([Limit("budget", ME, 9 * PRICE, LONG)], PRICE)
    assert reservation is not None
    limiter.running.clear()  # as after a restart
    await sweep_after(app, LEASE + 1)
    assert (await spent(app, ME), await open_reservations(app)) == (PRICE, 0)


# --- The result cache ---


@pytest.mark.parametrize("target", [CACHED_RUN, CACHED_SUBMIT])
async def test_equal_calls_at_once_cost_one(make: Open, queue: FakeQueue, target: str) -> None:
    queue.hold()
    queue.output = with_units("1")
    gateway = await make(budget=(CACHED_PRICE, LONG), concurrency=1)
    calls = [asyncio.ensure_future(post(gateway, target)) for _ in range(6)]
    await wait_until(lambda: queue.paid == 1, seconds=30)
    queue.release()
    assert [(await call).status for call in calls] == [200] * 6
    async with asyncio.timeout(SOON):
        while await running(app_of(gateway), ME):
            await asyncio.sleep(0.01)
    assert await spent(app_of(gateway), ME) == CACHED_PRICE


@pytest.mark.parametrize("first", [CACHED_RUN, CACHED_SUBMIT])
@pytest.mark.parametrize("second", [CACHED_RUN, CACHED_SUBMIT])
async def test_a_leader_s_refusal_is_not_shared_with_other_callers(
    make: Open, queue: FakeQueue, first: str, second: str
) -> None:
    """Ann's budget is used up; Bob's equal call arrives while hers is being refused."""
    gateway = await make(access_keys=KEYS, budget=(CACHED_PRICE, LONG))
    assert (await post(gateway, SUBMIT, DOG, ANN)).status == 200
    calls = []
    for _ in range(5):
        calls += [post(gateway, first, CAT, ANN), post(gateway, second, CAT, BOB)]
    responses = await asyncio.gather(*calls)
    assert {response.status for response in responses[1::2]} == {200}
    assert {response.status for response in responses[::2]} <= {200, 402}
    assert queue.paid == 2
    for response in responses[1::2]:
        if second == CACHED_SUBMIT:
            result = await get(gateway, JOB.format(await submitted_id(response)), BOB)
            assert result.status == 200
    assert await spent(app_of(gateway), OF_BOB) == CACHED_PRICE


async def test_a_shared_job_without_readers_is_settled(make: Open, queue: FakeQueue) -> None:
    queue.output = with_units("0.5")
    gateway = await make(budget=(9 * CACHED_PRICE, LONG))
    await post(gateway, CACHED_SUBMIT)
    await wait_until_cached(gateway)
    async with asyncio.timeout(SOON):
        while await spent(app_of(gateway), ME) != CACHED_PRICE // 2:
            await asyncio.sleep(0.01)


# --- Prices ---


async def test_a_call_of_unknown_price_is_refused_under_a_budget(
    make: Open, queue: FakeQueue
) -> None:
    gateway = await make(budget=(9 * PRICE, LONG))
    response = await post(gateway, "https://queue.fal.run/acme/unknown")
    assert "acme/unknown" in await refused(response, 402, "price_unknown")
    assert queue.posts == 0


async def test_without_a_budget_the_price_does_not_matter(make: Open, queue: FakeQueue) -> None:
    gateway = await make(rate=(9, HOUR), concurrency=2, max_cost=1)
    assert (await post(gateway, "https://queue.fal.run/acme/unknown")).status == 200


async def test_a_price_can_be_set_for_calls_of_unknown_price(make: Open, queue: FakeQueue) -> None:
    gateway = await make(budget=(100_000, LONG), unknown_price=40_000)
    target = "https://fal.run/acme/unknown"
    assert [(await post(gateway, target)).status for _ in range(3)] == [200, 200, 402]
    assert await spent(app_of(gateway), ME) == 80_000


# --- Tokens, with which clients call fal directly ---


TOKEN_TARGETS = [
    "https://rest.fal.ai/tokens/",
    "https://rest.fal.ai/tokens",
    "https://rest.fal.ai/tokens/realtime",
    "https://rest.alpha.fal.ai/tokens/",
]


async def create_token(gateway: Gateway, target: str = TOKEN_TARGETS[0]) -> ClientResponse:
    return await post(gateway, target, {"allowed_apps": ["flux"], "token_expiration": 60})


@pytest.mark.parametrize("target", TOKEN_TARGETS)
@pytest.mark.parametrize("budget", ["budget", "total_budget"])
async def test_a_budget_is_not_left_by_a_token(
    make: Open, queue: FakeQueue, target: str, budget: str
) -> None:
    queue.fake.respond = hello
    gateway = await make(**{budget: (9 * PRICE, LONG)}, allowed_targets=("rest.fal.ai/**",))
    await refused(await create_token(gateway, target), 402, "price_unknown")
    assert queue.fake.seen == []


async def test_tokens_count_as_calls_of_unknown_price(make: Open, queue: FakeQueue) -> None:
    queue.fake.respond = hello
    gateway = await make(budget=(100_000, LONG), unknown_price=40_000, concurrency=1)
    assert [(await create_token(gateway)).status for _ in range(3)] == [200, 200, 402]
    assert (await spent(app_of(gateway), ME), await open_reservations(app_of(gateway))) == (
        80_000,
        0,
    )


async def test_a_token_that_is_not_created_costs_nothing(make: Open, queue: FakeQueue) -> None:
    async def fail(request: web.Request) -> web.Response:
        return web.json_response({}, status=500)

    queue.fake.respond = fail
    gateway = await make(budget=(100_000, LONG), unknown_price=40_000)
    assert [(await create_token(gateway)).status for _ in range(3)] == [500] * 3
    assert (await spent(app_of(gateway), ME), await open_reservations(app_of(gateway))) == (0, 0)


async def test_tokens_count_as_requests(make: Open, queue: FakeQueue) -> None:
    queue.fake.respond = hello
    gateway = await make(rate=(2, HOUR))
    assert [(await create_token(gateway)).status for _ in range(3)] == [200, 200, 429]


@pytest.mark.parametrize("settings", [{}, {"budget": (10**9, LONG)}])
async def test_a_single_call_may_not_cost_more_than_allowed(
    make: Open, queue: FakeQueue, settings: dict[str, Any]
) -> None:
    gateway = await make(max_cost=2 * PRICE, **settings)
    assert (await post(gateway, SUBMIT, {"num_images": 2})).status == 200
    for target in (SUBMIT, RUN):
        response = await post(gateway, target, {"num_images": 3})
        message = await refused(response, 402, "call_too_expensive")
        assert "$0.075" in message
        assert "$0.05" in message
    assert queue.posts == 1


# --- Responses ---


async def test_responses_report_what_is_left(make: Open, queue: FakeQueue) -> None:
    gateway = await make(
        rate=(2, HOUR), concurrency=3, budget=(100_000, LONG), allowed_origins=("https://a.b",)
    )
    response = await post(gateway, SUBMIT, CAT, ("Origin", "https://a.b"))
    policies = response.headers["RateLimit-Policy"].split(", ")
    assert policies == [
        '"rate";q=2;w=3600',
        '"concurrency";q=3;qu="concurrent-requests"',
        f'"budget";q=100000;w={LONG.seconds};qu="micro-usd"',
    ]
    states = response.headers["RateLimit"].split(", ")
    assert states[0].startswith('"rate";r=1;t=3')
    assert states[1] == '"concurrency";r=2'
    assert states[2].startswith('"budget";r=75000;t=')
    exposed = response.headers["Access-Control-Expose-Headers"].split(", ")
    assert {"ratelimit", "ratelimit-policy", "retry-after"} <= {*exposed}
    await post(gateway, SUBMIT)
    response = await post(gateway, SUBMIT)
    assert response.status == 429
    assert response.headers["RateLimit"].startswith('"rate";r=0;t=')
    assert 0 < int(response.headers["Retry-After"]) <= 3660
    poll = await get(gateway, f"{JOB.format('x')}/status")
    assert "RateLimit" not in poll.headers


async def test_a_proxy_without_limits_reports_none(make: Open) -> None:
    gateway = await make()
    response = await post(gateway, SUBMIT)
    assert not [name for name in response.headers if "ratelimit" in name.lower()]


async def test_refusals_and_used_budgets_are_in_the_metrics(
    make: Open, caplog: pytest.LogCaptureFixture
) -> None:
    gateway = await make(budget=(10 * PRICE, LONG), rate=(12, HOUR))
    for number in range(14):
        await post(gateway, SUBMIT, {"prompt": str(number)})
    async with gateway.client.get("/metrics", headers={"Accept-Encoding": "identity"}) as response:
        lines = (await response.text()).splitlines()
    assert 'falproxy_limited_total{limit="budget",scope="principal"} 2.0' in lines
    assert 'falproxy_limited_total{limit="rate",scope="principal"} 2.0' in lines
    assert 'falproxy_budget_used_ratio{scope="principal"} 1.0' in lines
    assert caplog.text.count("A budget is used up to 80 %") == 1


# --- The store is away ---


async def test_without_the_store_budgets_refuse_and_rates_pass(
    make: Open, queue: FakeQueue, tmp_path: Any
) -> None:
    (tmp_path / "limits.sqlite").mkdir()  # cannot be opened
    gateway = await make(budget=(PRICE, LONG), rate=(1, HOUR))
    for _ in range(3):
        response = await post(gateway, SUBMIT)
        await refused(response, 503, "limits_unavailable")
        assert int(response.headers["Retry-After"]) > 0
    assert queue.posts == 0
    (tmp_path / "limits.sqlite").rmdir()
    async with asyncio.timeout(SOON):
        while (await post(gateway, SUBMIT)).status == 503:
            await asyncio.sleep(0.05)
    assert queue.posts == 1


@pytest.mark.parametrize(
    ("on_error", "settings", "status"),
    [
        ("default", {"rate": (1, HOUR)}, 200),
        ("default", {"concurrency": 1}, 200),
        ("allow", {"budget": (PRICE, LONG), "rate": (1, HOUR)}, 200),
        ("refuse", {"rate": (1, HOUR)}, 503),
        ("refuse", {"concurrency": 1}, 503),
    ],
)
async def test_what_happens_without_the_store_can_be_set(
    make: Open, tmp_path: Any, on_error: str, settings: dict[str, Any], status: int
) -> None:
    (tmp_path / "limits.sqlite").mkdir()
    gateway = await make(on_error=on_error, **settings)
    for _ in range(3):
        assert (await post(gateway, SUBMIT)).status == status


async def test_a_caller_s_name_cannot_be_that_of_a_user(make: Open, tmp_path: Any) -> None:
    """Names of subjects are escaped, so that no two can be confused."""
    keys = (("ann", "a-secret"), ("ann:bob", "b-secret"))
    gateway = await make(access_keys=keys, rate=(5, HOUR))
    for _, secret in keys:
        await post(gateway, SUBMIT, CAT, ("x-falproxy-key", secret))
    with sqlite3.connect(tmp_path / "limits.sqlite") as file:
        names = {name for (name,) in file.execute("SELECT name FROM requests")}
    file.close()
    assert names == {
        "rate:3600:principal:key%3Aann",
        "rate:3600:principal:key%3Aann%3Abob",
    }
