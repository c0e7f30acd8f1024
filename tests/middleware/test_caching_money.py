"""Odd moments in which a job could be bought twice, lost, or paid for by nobody's wish."""

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from aiohttp import web
from aiohttp.pytest_plugin import AiohttpServer

from falproxy.stores.cache import AcquireRequest
from falproxy.stores.cache import Job as FalJob
from falproxy.stores.cache.sqlite import SqliteStore
from tests.support.cached_calls import (
    APP,
    CAT,
    PlayedFal,
    ask,
    id_of,
    run,
    submit,
    until,
    version_of,
)
from tests.support.fake_fal import FakeFal
from tests.support.gateway import Gateway, MakeGateway


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


def refused(status: int, **headers: str) -> web.Response:
    return web.json_response({"detail": "no"}, status=status, headers=headers)


async def test_a_queued_job_does_not_hold_its_body(gateway: Gateway, played: PlayedFal) -> None:
    """It may wait for hours, and a large body is an open file."""
    played.hold()

    def open_files() -> int:
        links = [os.readlink(entry) for entry in Path("/proc/self/fd").iterdir() if entry.exists()]
        return sum("deleted" in link for link in links)

    before = open_files()
    for number in range(5):
        await submit(gateway, CAT | {"notes": f"{number} {'x' * 300_000}"})
    await until(lambda: open_files() <= before)


@pytest.mark.parametrize("status", [200, 422], ids=["a flagged picture", "a failure"])
async def test_what_is_not_kept_is_not_bought_again_by_those_who_waited(
    status: int, make_gateway: MakeGateway, played: PlayedFal
) -> None:
    """In whichever process: fal still has the job's answer."""
    document = {"has_nsfw_concepts": [True]} if status == 200 else {"detail": []}
    played.output = lambda number: web.json_response(document, status=status)
    one, *others = [await make_gateway(played.fake.origin) for _ in range(3)]
    played.hold()
    await submit(one)
    waiting = [asyncio.ensure_future(run(gateway)) for gateway in others]
    await asyncio.sleep(0.3)
    played.release()
    assert [(await call).status for call in waiting] == [status] * 2
    assert played.paid == 1


@pytest.mark.parametrize("status", [401, 403, 404])
async def test_a_job_that_cannot_be_had_any_more_does_not_stand_in_the_way(
    status: int, make_gateway: MakeGateway, played: PlayedFal, tmp_path: Path
) -> None:
    """As after a restart with another fal key."""
    answer = played.fake.answer

    async def without_the_job(request: web.Request) -> web.StreamResponse:
        return refused(status) if "lost" in request.path else await answer(request)

    gateway = await make_gateway(played.fake.origin)
    played.hold()
    await submit(gateway)
    async with SqliteStore(tmp_path / "results.sqlite", max_size=2**30) as store:
        key = await only_key(store)
        flight = (await store.get(key)).flight
        assert flight is not None
        await store.finish(key, flight.owner_token, None)
        await store.acquire(key, AcquireRequest("dead", 0.0, is_run=False))
        await store.record_job(key, "dead", FalJob("lost", APP))
    played.fake.answer = without_the_job
    calling = asyncio.ensure_future(run(await make_gateway(played.fake.origin)))
    async with asyncio.timeout(20):
        while played.posts < 2:
            await asyncio.sleep(0.05)
    played.release()
    assert (await calling).status == 200


async def only_key(store: SqliteStore) -> str:
    def find(file: object) -> str:
        return str(file.execute("SELECT key FROM flights").fetchone()[0])  # type: ignore[attr-defined]

    return await store._database.run(find)


async def test_a_caller_in_a_hurry_does_not_end_the_call_of_others(
    gateway: Gateway, played: PlayedFal
) -> None:
    """Its own time-out is no answer to those who did not set one."""
    late = refused(504, **{"X-Fal-Request-Timeout-Type": "user"})
    played.refusal = lambda: late
    played.taking.clear()
    hurried = asyncio.ensure_future(run(gateway, CAT, X_Fal_Request_Timeout="1.5"))
    await until(lambda: played.posts == 1)
    patient = asyncio.ensure_future(run(gateway))
    await asyncio.sleep(0.1)
    played.taking.set()
    assert (await hurried).status == 504
    played.refusal = None
    assert (await patient).status in (200, 504)
    assert (await run(gateway)).status == 200


async def test_who_asks_again_after_leaving_can_cancel(gateway: Gateway, played: PlayedFal) -> None:
    """Nobody ever heard fal's own id: it must not hold the job for ever."""
    played.hold()
    played.taking.clear()
    first = asyncio.ensure_future(submit(gateway))
    await until(lambda: played.posts == 1)
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    await asyncio.sleep(0.1)
    again = asyncio.ensure_future(submit(gateway))
    await asyncio.sleep(0.1)
    played.taking.set()
    request_id = await id_of(await again)
    assert version_of(request_id) == 8
    response = await ask(gateway, request_id, "/cancel", "PUT")
    assert response.status == 202
    assert len(played.cancels) == 1


@pytest.mark.parametrize("value", ["0", "False", "no", "off"])
async def test_what_fal_must_not_keep_is_not_kept_here(
    value: str, gateway: Gateway, played: PlayedFal
) -> None:
    for number in (1, 2):
        response = await run(gateway, CAT, X_Fal_Store_IO=value)
        assert response.headers["Cache-Status"] == "falproxy; fwd=bypass; detail=store-io"
        assert played.paid == number
