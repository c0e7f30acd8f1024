"""Limits that hold over several processes, on one file and on one Redis."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest
from aiohttp import ClientSession
from aiohttp.pytest_plugin import AiohttpServer

from tests.support.cache_processes import (
    Fal,
    ProxyResponse,
    call,
    folder,
    open_client,
    open_fal,
    request_url,
    serving,
)
from tests.support.cli_process import CliProcess
from tests.support.key_search import CANARY
from tests.support.redis_server import RedisServer, redis_server
from tests.support.waiting import wait_until

MODEL, APP = "fal-ai/flux/dev", "fal-ai/flux"
SUBMIT, RUN = f"https://queue.fal.run/{MODEL}", f"https://fal.run/{MODEL}"
CALLS, BUDGET_CALLS = 200, 40  # $1 covers 40 calls at $0.025
NODES = 3
RECOVERY_TIMEOUT = 10.0  # seconds

pytestmark = pytest.mark.slow(seconds=4)


@pytest.fixture
async def fal(aiohttp_server: AiohttpServer) -> Fal:
    return await open_fal(aiohttp_server)


@pytest.fixture
async def session() -> AsyncIterator[ClientSession]:
    async with open_client() as client:
        yield client


@pytest.fixture
def redis() -> Iterator[RedisServer]:
    with redis_server() as server:
        yield server


def environment(fal: Fal, data_dir: str, **env: str) -> dict[str, str]:
    return {
        "FAL_KEY": CANARY,
        "FALPROXY_UPSTREAM_ORIGIN": fal.origin,
        "FALPROXY_DATA_DIR": data_dir,
        **env,
    }


@asynccontextmanager
async def nodes(fal: Fal, parent: Path, **env: str) -> AsyncIterator[list[CliProcess]]:
    """Context: processes with a data directory each."""
    async with AsyncExitStack() as stack:
        starting = [
            stack.enter_async_context(
                serving(**environment(fal, folder(parent, str(number)), **env))
            )
            for number in range(NODES)
        ]
        yield [await start for start in starting]


def body(number: int) -> dict[str, object]:
    return {"prompt": f"!delay 60 number {number}"}


async def submit_all(session: ClientSession, origins: list[str]) -> list[ProxyResponse]:
    """Submit CALLS jobs at once."""
    return await asyncio.gather(
        *(
            call(session, origins[number % len(origins)], SUBMIT, body(number))
            for number in range(CALLS)
        )
    )


def check_budget(fal: Fal, responses: list[ProxyResponse]) -> None:
    statuses = Counter(response.status for response in responses)
    assert statuses == {200: BUDGET_CALLS, 402: CALLS - BUDGET_CALLS}
    assert len(fal.accepted) == fal.posts == BUDGET_CALLS
    refused = next(response for response in responses if response.status == 402)
    assert refused.document["type"] == "budget_exceeded"


async def test_submits_at_once_over_three_processes_and_redis_never_overspend(
    fal: Fal, session: ClientSession, redis: RedisServer, tmp_path: Path
) -> None:
    async with nodes(fal, tmp_path, REDIS_URL=redis.url, FALPROXY_BUDGET="1/7000d") as processes:
        responses = await submit_all(session, [process.origin for process in processes])
    check_budget(fal, responses)


async def test_submits_at_once_over_two_workers_and_a_file_never_overspend(
    fal: Fal, session: ClientSession, tmp_path: Path
) -> None:
    env = environment(fal, folder(tmp_path, "data"), FALPROXY_BUDGET="1/7000d")
    async with serving(**env, FALPROXY_WORKERS="2") as process:
        responses = await submit_all(session, [process.origin])
    check_budget(fal, responses)


async def test_a_job_of_a_killed_process_is_settled_by_another(
    fal: Fal, session: ClientSession, redis: RedisServer, tmp_path: Path
) -> None:
    """Also a job that fails: its money can be spent again."""
    env = {"REDIS_URL": redis.url, "FALPROXY_BUDGET": "0.025/7000d"}
    async with nodes(fal, tmp_path, **env) as processes:
        failing = {"prompt": "!error 422 content_policy_violation"}
        assert (await call(session, processes[0].origin, SUBMIT, failing)).status == 200
        refused = await call(session, processes[1].origin, SUBMIT, body(1))
        assert refused.status == 402
        processes[0].process.kill()
        async with asyncio.timeout(30):
            while (await call(session, processes[1].origin, SUBMIT, body(1))).status == 402:
                await asyncio.sleep(0.2)
    assert len(fal.accepted) == 2


async def test_a_result_at_another_node_frees_its_place(
    fal: Fal, session: ClientSession, redis: RedisServer, tmp_path: Path
) -> None:
    env = {"REDIS_URL": redis.url, "FALPROXY_CONCURRENCY": "1", "FALPROXY_RATE_LIMIT": "3/hour"}
    async with nodes(fal, tmp_path, **env) as processes:
        first, second, third = (process.origin for process in processes)
        submitted = await call(session, first, SUBMIT, {"prompt": "!delay 0 one"})
        assert (await call(session, second, SUBMIT, body(2))).status == 429
        target = request_url(submitted.document["request_id"], APP)
        await wait_until(lambda: fal.is_idle, seconds=20)
        assert (await call(session, third, target)).status == 200
        assert (await call(session, second, SUBMIT, body(3))).status == 200
        response = await call(session, first, SUBMIT, body(4))
        assert (response.status, response.document["type"]) == (429, "rate_limited")


@pytest.mark.parametrize(
    ("on_error", "budget_status", "rate_status"), [("default", 503, 200), ("allow", 200, 200)]
)
async def test_without_redis_budgets_refuse_and_rates_pass(
    fal: Fal,
    session: ClientSession,
    redis: RedisServer,
    tmp_path: Path,
    on_error: str,
    budget_status: int,
    rate_status: int,
) -> None:
    env = {"REDIS_URL": redis.url, "FALPROXY_LIMITS_ON_ERROR": on_error}
    budget = environment(fal, folder(tmp_path, "a"), FALPROXY_BUDGET="1/7000d", **env)
    rate = environment(fal, folder(tmp_path, "b"), FALPROXY_RATE_LIMIT="1000/hour", **env)
    async with serving(**budget) as with_budget, serving(**rate) as with_rate:
        for process in (with_budget, with_rate):
            assert (await call(session, process.origin, SUBMIT, body(0))).status == 200
        redis.kill()
        for number in range(5):
            for process, status in ((with_budget, budget_status), (with_rate, rate_status)):
                response = await call(session, process.origin, SUBMIT, body(number))
                assert response.status == status
                if status == 503:
                    assert response.document["type"] == "limits_unavailable"
                    assert "Retry-After" in response.headers
        redis.start()
        for process in (with_budget, with_rate):
            await works_again(session, process.origin)


async def test_redis_away_can_refuse_all(
    fal: Fal, session: ClientSession, redis: RedisServer, tmp_path: Path
) -> None:
    env = environment(
        fal,
        folder(tmp_path, "data"),
        REDIS_URL=redis.url,
        FALPROXY_LIMITS_ON_ERROR="refuse",
        FALPROXY_RATE_LIMIT="1000/hour",
    )
    async with serving(**env) as process:
        redis.kill()
        assert (await call(session, process.origin, SUBMIT, body(0))).status == 503
        redis.start()
        await works_again(session, process.origin)


async def works_again(session: ClientSession, origin: str) -> None:
    """Wait until calls are counted again."""
    async with asyncio.timeout(RECOVERY_TIMEOUT):
        while "RateLimit" not in (await call(session, origin, SUBMIT, body(9))).headers:
            await asyncio.sleep(0.1)


async def test_a_frozen_redis_delays_few_calls(
    fal: Fal, session: ClientSession, redis: RedisServer, tmp_path: Path
) -> None:
    env = environment(
        fal, folder(tmp_path, "data"), REDIS_URL=redis.url, FALPROXY_RATE_LIMIT="1000/hour"
    )
    async with serving(**env) as process:
        assert (await call(session, process.origin, RUN, {"prompt": "!delay 0 a"})).status == 200
        redis.freeze()
        try:
            started = asyncio.get_running_loop().time()
            for _ in range(10):
                assert (await call(session, process.origin, SUBMIT, body(1))).status == 200
            assert asyncio.get_running_loop().time() - started < 12.0
        finally:
            redis.thaw()
        await works_again(session, process.origin)
