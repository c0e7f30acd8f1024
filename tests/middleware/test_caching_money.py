"""Rare cases in which a job could be paid for twice, lost, or left running without a client."""

import asyncio
import os
from pathlib import Path

import pytest
from aiohttp import web

from falproxy.stores.cache import AcquireRequest
from falproxy.stores.cache import Job as FalJob
from falproxy.stores.cache.sqlite import SqliteStore
from tests.support.fake_queue import (
    APP,
    CAT,
    FakeQueue,
    request_about,
    run,
    submit,
    submitted_id,
    uuid_version,
)
from tests.support.gateway import Gateway, MakeGateway
from tests.support.waiting import wait_until

pytestmark = pytest.mark.usefixtures("fal_outlives_the_proxy")


def refused(status: int, **headers: str) -> web.Response:
    return web.json_response({"detail": "no"}, status=status, headers=headers)


async def test_the_body_of_a_queued_job_is_freed(gateway: Gateway, queue: FakeQueue) -> None:
    """A job may take hours, and a large body is an open file."""
    queue.hold()

    def open_files() -> int:
        links = [os.readlink(entry) for entry in Path("/proc/self/fd").iterdir() if entry.exists()]
        return sum("deleted" in link for link in links)

    before = open_files()
    for number in range(5):
        await submit(gateway, CAT | {"notes": f"{number} {'x' * 300_000}"})
    await wait_until(lambda: open_files() <= before, seconds=30)


@pytest.mark.parametrize("status", [200, 422], ids=["flagged image", "failure"])
async def test_waiting_calls_do_not_repeat_a_job_without_a_storable_result(
    status: int, make_gateway: MakeGateway, queue: FakeQueue
) -> None:
    """In any process: fal still has the response of the job."""
    document = {"has_nsfw_concepts": [True]} if status == 200 else {"detail": []}
    queue.output = lambda number: web.json_response(document, status=status)
    one, *others = [await make_gateway(queue.fake.origin) for _ in range(3)]
    queue.hold()
    await submit(one)
    waiting = [asyncio.ensure_future(run(gateway)) for gateway in others]
    await asyncio.sleep(0.3)
    queue.release()
    assert [(await call).status for call in waiting] == [status] * 2
    assert queue.paid == 1


@pytest.mark.slow(seconds=3)
@pytest.mark.parametrize("status", [401, 403, 404])
async def test_a_lost_job_does_not_block_new_calls(
    status: int, make_gateway: MakeGateway, queue: FakeQueue, tmp_path: Path
) -> None:
    """A job is lost, for example, after a restart with another fal key."""
    respond = queue.fake.respond

    async def respond_without_job(request: web.Request) -> web.StreamResponse:
        return refused(status) if "lost" in request.path else await respond(request)

    gateway = await make_gateway(queue.fake.origin)
    queue.hold()
    await submit(gateway)
    async with SqliteStore(tmp_path / "results.sqlite", max_size=2**30) as store:
        key = await only_key(store)
        flight = (await store.get(key)).shared_call
        assert flight is not None
        await store.finish(key, flight.owner_token, None)
        await store.acquire(key, AcquireRequest("dead", 0.0, is_run=False))
        await store.record_job(key, "dead", FalJob("lost", APP))
    queue.fake.respond = respond_without_job
    calling = asyncio.ensure_future(run(await make_gateway(queue.fake.origin)))
    await wait_until(lambda: queue.posts >= 2, seconds=20)
    queue.release()
    assert (await calling).status == 200


async def only_key(store: SqliteStore) -> str:
    def find(file: object) -> str:
        return str(file.execute("SELECT key FROM flights").fetchone()[0])  # type: ignore[attr-defined]

    return await store._database.run(find)


async def test_the_start_timeout_of_one_call_does_not_end_another(
    gateway: Gateway, queue: FakeQueue
) -> None:
    late = refused(504, **{"X-Fal-Request-Timeout-Type": "user"})
    queue.refusal = lambda: late
    queue.accepting.clear()
    short_call = asyncio.ensure_future(run(gateway, CAT, X_Fal_Request_Timeout="1.5"))
    await wait_until(lambda: queue.posts == 1, seconds=30)
    long_call = asyncio.ensure_future(run(gateway))
    await asyncio.sleep(0.1)
    queue.accepting.set()
    assert (await short_call).status == 504
    queue.refusal = None
    assert (await long_call).status in (200, 504)
    assert (await run(gateway)).status == 200


async def test_a_client_that_left_and_submits_again_can_cancel(
    gateway: Gateway, queue: FakeQueue
) -> None:
    """fal's own id reached no client: it must not keep the job from being cancelled."""
    queue.hold()
    queue.accepting.clear()
    first = asyncio.ensure_future(submit(gateway))
    await wait_until(lambda: queue.posts == 1, seconds=30)
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    await asyncio.sleep(0.1)
    again = asyncio.ensure_future(submit(gateway))
    await asyncio.sleep(0.1)
    queue.accepting.set()
    request_id = await submitted_id(await again)
    assert uuid_version(request_id) == 8
    response = await request_about(gateway, request_id, "/cancel", "PUT")
    assert response.status == 202
    assert len(queue.cancels) == 1


@pytest.mark.parametrize("value", ["0", "False", "no", "off"])
async def test_a_call_that_turns_off_storage_at_fal_is_not_cached(
    value: str, gateway: Gateway, queue: FakeQueue
) -> None:
    for number in (1, 2):
        response = await run(gateway, CAT, X_Fal_Store_IO=value)
        assert response.headers["Cache-Status"] == "falproxy; fwd=bypass; detail=store-io"
        assert queue.paid == number
