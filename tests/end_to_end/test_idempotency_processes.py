"""Idempotency-Key over real processes, the first of which is killed: one job at fal."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any
from uuid import uuid4

import pytest
from aiohttp import ClientError, ClientSession
from aiohttp.pytest_plugin import AiohttpServer

from tests.support.cache_processes import Fal, folder, open_client, open_fal, serving
from tests.support.cli_process import CliProcess
from tests.support.key_search import CANARY
from tests.support.redis_server import RedisServer, redis_server
from tests.support.urls import PROXY
from tests.support.waiting import wait_until

MODEL = "fal-ai/flux-pro/kontext/text-to-image"
RUN, SUBMIT = f"https://fal.run/{MODEL}", f"https://queue.fal.run/{MODEL}"
SEED = int(os.environ.get("IDEMPOTENCY_SEED", "16"))
LEASE = 1.0  # it is not a setting, and shortened because each kill may have to wait for its end
WITH_SHORT_LEASE = f"""
from falproxy.stores.idempotency import keyed_calls
assert keyed_calls.LEASE == 15.0
keyed_calls.LEASE = {LEASE}
from falproxy.cli.main import main
raise SystemExit(main())
"""
ClientResult = tuple[int, Any]  # status and document


@dataclass(slots=True)
class World:
    """Two nodes with a shared store."""

    fal: Fal
    session: ClientSession
    nodes: list[CliProcess]

    async def post(self, node: int, target: str, prompt: str, key: str) -> ClientResult | None:
        """Return the result of a node; None if the connection to it was lost."""
        headers = {"x-fal-target-url": target, "Idempotency-Key": key}
        url = self.nodes[node].origin + PROXY
        try:
            async with self.session.post(url, json={"prompt": prompt}, headers=headers) as response:
                return response.status, await response.json()
        except (ClientError, OSError):
            return None

    async def kill_first(self) -> None:
        self.nodes[0].process.send_signal(signal.SIGKILL)
        await self.nodes[0].process.wait()


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    with redis_server() as running:
        yield running


@pytest.fixture(params=["redis", "redis without the cache", "sqlite"])
async def world(
    request: pytest.FixtureRequest, aiohttp_server: AiohttpServer, tmp_path: Path
) -> AsyncIterator[World]:
    fal = await open_fal(aiohttp_server)
    env = {"FAL_KEY": CANARY, "FALPROXY_UPSTREAM_ORIGIN": fal.origin}
    if request.param == "sqlite":
        shared = folder(tmp_path, "shared")
        folders = [shared, shared]
    else:
        env |= {"REDIS_URL": request.getfixturevalue("server").url}
        folders = [folder(tmp_path, name) for name in ("a", "b")]
    if request.param == "redis without the cache":
        env |= {"FALPROXY_CACHE": "0"}
    async with AsyncExitStack() as stack, open_client() as session:
        starts = (
            stack.enter_async_context(serving(WITH_SHORT_LEASE, **env, FALPROXY_DATA_DIR=data_dir))
            for data_dir in folders
        )
        yield World(fal, session, list(await asyncio.gather(*starts)))


@pytest.mark.slow
@pytest.mark.parametrize("target", [SUBMIT, RUN])
async def test_five_equal_calls_and_a_kill_after_the_outcome_is_stored(
    world: World, target: str
) -> None:
    prompt = key = str(uuid4())
    first = await world.post(0, target, prompt, key)
    others = [asyncio.ensure_future(world.post(n % 2, target, prompt, key)) for n in range(4)]
    await world.kill_first()
    results = [first, *await asyncio.gather(*others)]
    # Those whose connection was lost try again, at the other node.
    results = [each or await world.post(1, target, prompt, key) for each in results]
    assert results[0] is not None
    assert results[0][0] == 200
    assert results == [results[0]] * 5
    assert world.fal.posts == 1
    assert (await world.post(1, target, "another", key) or (0,))[0] == 422


@pytest.mark.slow
@pytest.mark.parametrize("target", [SUBMIT, RUN])
async def test_a_kill_before_the_outcome_is_known_is_an_unknown_outcome(
    world: World, target: str
) -> None:
    prompt = key = str(uuid4())
    world.fal.may_respond.clear()
    first = asyncio.ensure_future(world.post(0, target, prompt, key))
    await wait_until(lambda: world.fal.posts == 1, seconds=20)
    others = [asyncio.ensure_future(world.post(1, target, prompt, key)) for _ in range(4)]
    await world.kill_first()
    assert await first is None
    world.fal.may_respond.set()
    results = [*await asyncio.gather(*others), await world.post(1, target, prompt, key)]
    for result in results:
        assert result is not None
        assert (result[0], result[1]["type"]) == (504, "outcome_unknown")
    assert world.fal.posts == 1


@pytest.mark.slow
async def test_a_kill_at_any_moment_is_one_job(world: World) -> None:
    """Five equal submits over two nodes; the first node is killed some milliseconds later."""
    random = Random(SEED)
    prompt = key = str(uuid4())
    tasks = [
        asyncio.ensure_future(world.post(random.randrange(2) if n else 0, SUBMIT, prompt, key))
        for n in range(5)
    ]
    await asyncio.sleep(random.uniform(0, 0.05))
    await world.kill_first()
    results = [
        result or await world.post(1, SUBMIT, prompt, key)
        for result in await asyncio.gather(*tasks)
    ]
    last = await world.post(1, SUBMIT, prompt, key)
    outcomes = {
        result[1].get("request_id") if result and result[0] == 200 else result and result[0]
        for result in (*results, last)
    }
    assert len(outcomes) == 1, f"seed {SEED}: {results}"
    assert outcomes.isdisjoint({None, 503, 409}), f"seed {SEED}: {results}"
    assert world.fal.posts <= 1, f"seed {SEED}"
