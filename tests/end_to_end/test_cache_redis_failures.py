"""Real processes with a Redis server that stops, freezes, is slow or read-only."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from datetime import datetime
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any

import pytest
from aiohttp import ClientSession
from aiohttp.pytest_plugin import AiohttpServer
from redis.asyncio import Redis

from falproxy.stores.cache.virtual_requests import is_virtual_id
from tests.support.cache_processes import (
    Fal,
    ProxyResponse,
    call,
    folder,
    image_document,
    open_client,
    open_fal,
    request_url,
    serving,
)
from tests.support.cli_process import CliProcess
from tests.support.key_search import CANARY
from tests.support.ports import free_port
from tests.support.redis_server import PROCESSES, RedisServer, redis_server
from tests.support.tcp_forwarder import TcpForwarder

# A model whose images the sandbox renders quickly.
MODEL, APP = "fal-ai/flux/dev", "fal-ai/flux"
SUBMIT, RUN = f"https://queue.fal.run/{MODEL}", f"https://fal.run/{MODEL}"
CONCURRENT_CALLS = 100
MEDIAN_MAX = 1.5  # seconds of these calls
SLOWEST_MAX = 4.0  # seconds, on a busy machine
LAG_SECONDS = 0.2  # delay of the replies of a slow server
FAULT_SECONDS = 2.5
DETECTION_SECONDS = 1.0  # after which a fault delays a call by ADDED_MAX at most
ADDED_MAX = 0.05  # seconds
WINDOW = 0.5  # seconds of each median
RECOVERY_TIMEOUT = 5.0  # seconds until a working server is used again
# What the first probes write.
CONTENT = "falproxy:probe:content"


def body(prompt: str) -> dict[str, object]:
    return {"prompt": prompt, "image_size": {"width": 64, "height": 64}}


@asynccontextmanager
async def stopped(server: RedisServer, relay: TcpForwarder) -> AsyncIterator[None]:
    server.kill()
    yield
    server.start()


@asynccontextmanager
async def frozen(server: RedisServer, relay: TcpForwarder) -> AsyncIterator[None]:
    server.freeze()
    yield
    server.thaw()


@asynccontextmanager
async def slow(server: RedisServer, relay: TcpForwarder) -> AsyncIterator[None]:
    relay.reply_delay = LAG_SECONDS
    yield
    relay.reply_delay = 0.0


@asynccontextmanager
async def read_only(server: RedisServer, relay: TcpForwarder) -> AsyncIterator[None]:
    async with Redis.from_url(server.url) as redis:
        await redis.replicaof("127.0.0.1", free_port())
        yield
        await redis.replicaof("NO", "ONE")


Fault = Callable[[RedisServer, TcpForwarder], AbstractAsyncContextManager[None]]
FAULTS = pytest.mark.parametrize("fault", [stopped, frozen, slow, read_only])


@dataclass(frozen=True, slots=True)
class Pair:
    """Two calls of one kind, through a proxy with the cache and through one without it.

    at: seconds since the begin of the fault.
    added: additional seconds of the first one.
    """

    at: float
    how: str
    added: float


@dataclass(slots=True)
class World:
    """Two proxies that share a Redis server, and one without the cache."""

    fal: Fal
    session: ClientSession
    first: CliProcess
    second: CliProcess
    uncached: CliProcess
    numbers: "count[int]" = field(default_factory=count)

    async def submit(self, proxy: CliProcess, prompt: str) -> ProxyResponse:
        return await call(self.session, proxy.origin, SUBMIT, body(prompt))

    async def run(self, proxy: CliProcess, prompt: str) -> ProxyResponse:
        return await call(self.session, proxy.origin, RUN, body(prompt))

    async def request_about(
        self, proxy: CliProcess, request_id: str, suffix: str = ""
    ) -> ProxyResponse:
        return await call(self.session, proxy.origin, request_url(request_id, APP) + suffix)

    async def image_document(self, proxy: CliProcess, request_id: str) -> Any:
        async with asyncio.timeout(10):
            return await image_document(self.session, proxy.origin, request_id, APP)

    async def wait_for_hit(self, proxy: CliProcess, prompt: str) -> float:
        """Wait until a call is a hit, and return the seconds."""
        started = time.monotonic()
        async with asyncio.timeout(RECOVERY_TIMEOUT):
            while not (await self.run(proxy, prompt)).is_hit:
                await asyncio.sleep(0.02)
        return time.monotonic() - started

    async def pair(self, started_at: float) -> Pair:
        """Make one pair of calls. Runs and submits alternate, and the order of the proxies does."""
        number = next(self.numbers)
        how = "run" if number % 2 else "submit"
        at = time.monotonic() - started_at
        proxies = [self.first, self.uncached] if number % 4 < 2 else [self.uncached, self.first]
        seconds = {proxy.origin: await self.time_miss(proxy, how) for proxy in proxies}
        return Pair(at, how, seconds[self.first.origin] - seconds[self.uncached.origin])

    async def time_miss(self, proxy: CliProcess, how: str) -> float:
        """Make a call that is not cached, and return its seconds."""
        prompt = f"image {next(self.numbers)}"
        started = time.perf_counter()
        response = await (self.run if how == "run" else self.submit)(proxy, prompt)
        seconds = time.perf_counter() - started
        assert response.status == 200, response
        assert not response.is_hit
        if how == "run":
            assert response.document["prompt"] == prompt
        else:
            assert response.document["request_id"] in self.fal.accepted
        return seconds


@asynccontextmanager
async def serving_all(
    fal: Fal, session: ClientSession, url: str, tmp_path: Path
) -> AsyncIterator[World]:
    common = {
        "FAL_KEY": CANARY,
        "FALPROXY_UPSTREAM_ORIGIN": fal.origin,
        "FALPROXY_CACHE_ENDPOINTS": MODEL,
    }
    envs = [{"REDIS_URL": url}, {"REDIS_URL": url}, {"FALPROXY_CACHE": "off"}]
    async with AsyncExitStack() as stack:
        contexts = (
            serving(FALPROXY_DATA_DIR=folder(tmp_path, f"machine-{number}"), **common, **env)
            for number, env in enumerate(envs)
        )
        proxies = await asyncio.gather(*map(stack.enter_async_context, contexts))
        first, second, uncached = proxies
        yield World(fal, session, first, second, uncached)
        assert [line for proxy in proxies for line in proxy.log if line["level"] == "error"] == []


@pytest.fixture
async def fal(aiohttp_server: AiohttpServer) -> Fal:
    return await open_fal(aiohttp_server)


@pytest.fixture
async def client() -> AsyncIterator[ClientSession]:
    async with open_client() as session:
        yield session


@pytest.fixture
def server() -> Iterator[RedisServer]:
    with redis_server() as running:
        yield running


@pytest.fixture
async def relay(server: RedisServer) -> AsyncIterator[TcpForwarder]:
    async with TcpForwarder(server.port).running() as relay:
        yield relay


MILLISECOND = 0.001


def log_delay(proxy: CliProcess, text: str, since: float) -> float | None:
    """Return the seconds from a time until a proxy logged a text. Log lines have the time in
    milliseconds."""
    for line in proxy.log:
        at = datetime.fromisoformat(str(line["time"])).timestamp()
        if text in str(line["message"]) and at > since - MILLISECOND:
            return max(0.0, at - since)
    return None


def medians(pairs: list[Pair]) -> dict[float, float]:
    """Return the median of the added seconds in each window, by the start of the window."""
    windows: dict[float, list[float]] = {}
    for pair in pairs:
        windows.setdefault(pair.at // WINDOW * WINDOW, []).append(pair.added)
    return {start: round(median(added), 4) for start, added in sorted(windows.items())}


async def until_probed(server: RedisServer) -> None:
    """Wait until the proxies have probed the server once, which takes several round trips when it
    is empty."""
    async with asyncio.timeout(RECOVERY_TIMEOUT), Redis.from_url(server.url) as redis:
        while await redis.zcard(PROCESSES) < 2 or not await redis.exists(CONTENT):
            await asyncio.sleep(0.02)


@pytest.mark.timed
@FAULTS
async def test_a_fault_delays_calls_by_almost_nothing(
    fal: Fal,
    client: ClientSession,
    server: RedisServer,
    relay: TcpForwarder,
    tmp_path: Path,
    fault: Fault,
) -> None:
    url = relay.url if fault is slow else server.url
    async with serving_all(fal, client, url, tmp_path) as world:
        await world.run(world.first, "cached before")
        proxies = (world.first, world.second)
        for proxy in proxies:
            await world.wait_for_hit(proxy, "cached before")
        await until_probed(server)
        async with fault(server, relay):
            clock, started_at, pairs = time.time(), time.monotonic(), []
            while time.monotonic() - started_at < FAULT_SECONDS:
                pairs.append(await world.pair(started_at))
            detected = [log_delay(proxy, "is bypassed", clock) for proxy in proxies]
        recovered = [await world.wait_for_hit(proxy, "cached before") for proxy in proxies]
        late = [pair for pair in pairs if pair.at >= DETECTION_SECONDS]
        # The second proxy had no calls in the meantime.
        print(
            f"{fault.__name__}: detected after {detected}, hits again after {recovered};"
            f" added by second {medians(pairs)},"
            f" at most {max(pair.added for pair in late):.3f} after the first"
        )
        assert detected[0] is not None
        assert detected[0] < 1.5 * DETECTION_SECONDS
        for how in ("run", "submit"):
            assert median(pair.added for pair in late if pair.how == how) < ADDED_MAX
        assert max(medians(late).values()) < ADDED_MAX


@pytest.mark.timed
async def test_concurrent_calls_wait_for_a_frozen_server_together(
    fal: Fal, client: ClientSession, server: RedisServer, tmp_path: Path
) -> None:
    async with serving_all(fal, client, server.url, tmp_path) as world:
        await world.run(world.first, "cached before")
        await world.wait_for_hit(world.first, "cached before")
        server.freeze()
        calls = (world.time_miss(world.first, "submit") for _ in range(CONCURRENT_CALLS))
        seconds = sorted(await asyncio.gather(*calls))
        print(f"{seconds[0]:.3f} to {seconds[-1]:.3f} s, {sum(s > 1.5 for s in seconds)} above 1.5")
        assert median(seconds) < MEDIAN_MAX
        assert seconds[-1] < SLOWEST_MAX


@pytest.mark.timed
async def test_a_waiting_call_is_released_when_the_breaker_opens(
    fal: Fal, client: ClientSession, server: RedisServer, tmp_path: Path
) -> None:
    async with serving_all(fal, client, server.url, tmp_path) as world:
        await world.wait_for_hit(world.first, "cached before")
        server.freeze()
        await asyncio.sleep(DETECTION_SECONDS)  # the probe fails a quarter of a second later
        seconds = await world.time_miss(world.first, "submit")
        print(f"started {DETECTION_SECONDS} s after the fault: {seconds:.3f} s")
        assert seconds < 0.5


@pytest.mark.timed
@FAULTS
async def test_ids_survive_a_fault(
    fal: Fal,
    client: ClientSession,
    server: RedisServer,
    relay: TcpForwarder,
    tmp_path: Path,
    fault: Fault,
) -> None:
    url = relay.url if fault is slow else server.url
    async with serving_all(fal, client, url, tmp_path) as world:
        first, second = world.first, world.second
        expected = (await world.run(first, "cached before")).document
        await world.wait_for_hit(first, "cached before")
        hit = (await world.submit(first, "cached before")).document["request_id"]
        leader, follower = [
            (await world.submit(first, "!delay 0.3 shared")).document["request_id"] for _ in "12"
        ]
        assert [is_virtual_id(request_id) for request_id in (hit, leader, follower)] == [
            True,
            False,
            True,
        ]
        shared = await world.image_document(second, leader)
        async with fault(server, relay):
            for request_id, document in ((hit, expected), (leader, shared), (follower, shared)):
                assert await world.image_document(first, request_id) == document
                await assert_found_or_unavailable(world, second, request_id, document)
            await asyncio.sleep(DETECTION_SECONDS)
            for request_id, document in ((hit, expected), (leader, shared), (follower, shared)):
                started = time.monotonic()
                assert await world.image_document(first, request_id) == document
                await assert_found_or_unavailable(world, second, request_id, document)
                assert time.monotonic() - started < 0.5
        await world.wait_for_hit(first, "cached after")
        again = (await world.submit(first, "cached after")).document["request_id"]
        assert (await world.image_document(second, again))["prompt"] == "cached after"


async def assert_found_or_unavailable(
    world: World, proxy: CliProcess, request_id: str, document: Any
) -> None:
    """A process that cannot look up an id responds with 503, otherwise with the document."""
    for suffix in ("/status", ""):
        response = await world.request_about(proxy, request_id, suffix)
        assert response.status in (200, 503), response
        if response.status == 503:
            assert is_virtual_id(request_id)
            assert response.headers["Retry-After"] == "1"
        elif suffix == "":
            assert response.document == document


@pytest.mark.parametrize("fault", [stopped, frozen])
async def test_equal_calls_are_one_job_again_after_a_fault(
    fal: Fal,
    client: ClientSession,
    server: RedisServer,
    relay: TcpForwarder,
    tmp_path: Path,
    fault: Fault,
) -> None:
    async with serving_all(fal, client, server.url, tmp_path) as world:
        async with fault(server, relay):
            await world.run(world.first, "without a store")
            await asyncio.sleep(DETECTION_SECONDS + 0.3)
            assert world.fal.sandbox.jobs == 1
        for proxy in (world.first, world.second):
            await world.wait_for_hit(proxy, "with a store")
        before = world.fal.sandbox.jobs
        calls = (
            world.run(proxy, "!delay 0.3 at once")
            for proxy in (world.first, world.second)
            for _ in range(5)
        )
        started = time.monotonic()
        documents = [response.document for response in await asyncio.gather(*calls)]
        assert time.monotonic() - started < 2.0  # a notification may be lost, followers also poll
        assert documents == documents[:1] * 10
        assert world.fal.sandbox.jobs == before + 1


@pytest.mark.timed
@pytest.mark.parametrize("fault", [stopped, frozen])
async def test_a_proxy_starts_without_its_server_and_uses_it_later(
    fal: Fal,
    client: ClientSession,
    server: RedisServer,
    relay: TcpForwarder,
    tmp_path: Path,
    fault: Fault,
) -> None:
    async with AsyncExitStack() as stack:
        async with fault(server, relay):
            started = time.monotonic()
            world = await stack.enter_async_context(serving_all(fal, client, server.url, tmp_path))
            start = time.monotonic() - started
            await world.time_miss(world.first, "run")
            await asyncio.sleep(DETECTION_SECONDS)
            seconds = [await world.time_miss(world.first, how) for how in ("run", "submit") * 5]
        recovered = await world.wait_for_hit(world.first, "an image")
        await world.wait_for_hit(world.second, "an image")
        print(f"{fault.__name__}: started in {start:.2f} s, hits after {recovered:.2f} s")
        assert start < 3.0
        assert median(seconds) < ADDED_MAX


async def test_polls_of_fal_s_own_ids_do_not_read_the_store(
    fal: Fal, client: ClientSession, server: RedisServer, tmp_path: Path
) -> None:
    async with serving_all(fal, client, server.url, tmp_path) as world:
        ids = [
            (await world.submit(world.first, "!delay 0.2 a job")).document["request_id"],
            (await world.submit(world.uncached, "another job")).document["request_id"],
        ]
        assert not any(map(is_virtual_id, ids))
        await world.wait_for_hit(world.second, "!delay 0.2 a job")  # its leader has finished
        commands: list[str] = []
        async with Redis.from_url(server.url) as redis, redis.monitor() as monitor:

            async def listen() -> None:
                async for command in monitor.listen():
                    commands.append(command["command"])

            task = asyncio.ensure_future(listen())
            for request_id in ids * 25:
                for proxy in (world.first, world.second):
                    for suffix in ("/status", "/status?logs=1"):
                        response = await world.request_about(proxy, request_id, suffix)
                        assert response.document["request_id"] == request_id
            await asyncio.sleep(0.3)
            assert any("falproxy:probe" in command for command in commands)
            # Checks of the server and of its connections.
            others = ("falproxy:probe", "TIME", "PING")
            assert [each for each in commands if not any(name in each for name in others)] == []
            await world.submit(world.first, "something else")
            await asyncio.sleep(0.1)
            assert any("falproxy:probe" not in command for command in commands)
            task.cancel()
            await asyncio.wait([task])
