"""A Redis that stops, freezes, slows down or refuses while real processes serve calls with it."""

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

from falproxy.stores.cache.virtual_ids import is_virtual_id
from tests.support.cache_processes import (
    Answer,
    Fal,
    call,
    folder,
    open_client,
    open_fal,
    picture,
    request_url,
    serving,
)
from tests.support.cli_process import Process
from tests.support.key_search import CANARY
from tests.support.redis_server import RedisServer, free_port, redis_server

# A model whose pictures cost the sandbox next to nothing.
MODEL, APP = "fal-ai/flux/dev", "fal-ai/flux"
SUBMIT, RUN = f"https://queue.fal.run/{MODEL}", f"https://fal.run/{MODEL}"
AT_ONCE = 100
WAITED_MAX = 1.5  # seconds that most of them may take, all in all
SLOWEST_MAX = 4.0  # and the slowest, on a machine that is busy with other things
LAG = 0.2  # seconds by which a slow server's replies come late
FAULT_SECONDS = 2.5
NOTICED = 1.0  # seconds after which a fault costs a call no more than ADDED_MAX
ADDED_MAX = 0.05
WINDOW = 0.5  # seconds over which what is added is told as a median
BACK = 5.0  # seconds after which a server that is well again is used


def body(prompt: str) -> dict[str, object]:
    return {"prompt": prompt, "image_size": {"width": 64, "height": 64}}


class Lag:
    """Stands before a server, and delays what it says by some seconds."""

    def __init__(self, server: RedisServer) -> None:
        self._server = server
        self._ways: set[asyncio.Task[None]] = set()
        self.url = ""
        self.seconds = 0.0

    @asynccontextmanager
    async def running(self) -> AsyncIterator["Lag"]:
        listener = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.url = f"redis://127.0.0.1:{listener.sockets[0].getsockname()[1]}/0"
        try:
            yield self
        finally:
            listener.close()
            for way in self._ways:
                way.cancel()
            await asyncio.gather(*self._ways, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        answers, asked = await asyncio.open_connection("127.0.0.1", self._server.port)
        for way in (self._pass(reader, asked, False), self._pass(answers, writer, True)):
            self._ways.add(asyncio.ensure_future(way))

    async def _pass(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, is_late: bool
    ) -> None:
        try:
            while data := await reader.read(65536):
                if is_late and self.seconds:
                    await asyncio.sleep(self.seconds)
                writer.write(data)
        except OSError:
            pass  # one side is gone, and the other hears of it
        finally:
            writer.close()


@asynccontextmanager
async def stopped(server: RedisServer, lag: Lag) -> AsyncIterator[None]:
    server.kill()
    yield
    server.start()


@asynccontextmanager
async def frozen(server: RedisServer, lag: Lag) -> AsyncIterator[None]:
    server.freeze()
    yield
    server.thaw()


@asynccontextmanager
async def slow(server: RedisServer, lag: Lag) -> AsyncIterator[None]:
    lag.seconds = LAG
    yield
    lag.seconds = 0.0


@asynccontextmanager
async def read_only(server: RedisServer, lag: Lag) -> AsyncIterator[None]:
    async with Redis.from_url(server.url) as redis:
        await redis.replicaof("127.0.0.1", free_port())
        yield
        await redis.replicaof("NO", "ONE")


Fault = Callable[[RedisServer, Lag], AbstractAsyncContextManager[None]]
FAULTS = pytest.mark.parametrize("fault", [stopped, frozen, slow, read_only])


@dataclass(frozen=True, slots=True)
class Pair:
    """Two calls of one kind, through a proxy with results and through one without. at: seconds
    since the fault began. added: by how many seconds the first took longer."""

    at: float
    how: str
    added: float


@dataclass(slots=True)
class World:
    """Two proxies that share a Redis, and one that keeps no results."""

    fal: Fal
    session: ClientSession
    first: Process
    second: Process
    plain: Process
    numbers: "count[int]" = field(default_factory=count)

    async def submit(self, proxy: Process, prompt: str) -> Answer:
        return await call(self.session, proxy.origin, SUBMIT, body(prompt))

    async def run(self, proxy: Process, prompt: str) -> Answer:
        return await call(self.session, proxy.origin, RUN, body(prompt))

    async def ask(self, proxy: Process, request_id: str, verb: str = "") -> Answer:
        return await call(self.session, proxy.origin, request_url(request_id, APP) + verb)

    async def picture(self, proxy: Process, request_id: str) -> Any:
        async with asyncio.timeout(10):
            return await picture(self.session, proxy.origin, request_id, APP)

    async def until_hit(self, proxy: Process, prompt: str) -> float:
        """Seconds until a call is answered with what is kept."""
        started = time.monotonic()
        async with asyncio.timeout(BACK):
            while not (await self.run(proxy, prompt)).is_hit:
                await asyncio.sleep(0.02)
        return time.monotonic() - started

    async def pair(self, began: float) -> Pair:
        """Runs and submits take turns, and so do the proxies in coming first."""
        number = next(self.numbers)
        how = "run" if number % 2 else "submit"
        at = time.monotonic() - began
        proxies = [self.first, self.plain] if number % 4 < 2 else [self.plain, self.first]
        seconds = {proxy.origin: await self.fresh(proxy, how) for proxy in proxies}
        return Pair(at, how, seconds[self.first.origin] - seconds[self.plain.origin])

    async def fresh(self, proxy: Process, how: str) -> float:
        """Seconds of a call that nobody made before, and that fal must answer."""
        prompt = f"picture {next(self.numbers)}"
        started = time.perf_counter()
        answer = await (self.run if how == "run" else self.submit)(proxy, prompt)
        seconds = time.perf_counter() - started
        assert answer.status == 200, answer
        assert not answer.is_hit
        if how == "run":
            assert answer.document["prompt"] == prompt
        else:
            assert answer.document["request_id"] in self.fal.accepted
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
        first, second, plain = proxies
        yield World(fal, session, first, second, plain)
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
async def lag(server: RedisServer) -> AsyncIterator[Lag]:
    async with Lag(server).running() as lag:
        yield lag


MILLISECOND = 0.001


def told(proxy: Process, words: str, since: float) -> float | None:
    """Seconds from a time of the clock until a proxy logged these words. A line's time is that of
    the millisecond in which it was written."""
    for line in proxy.log:
        at = datetime.fromisoformat(str(line["time"])).timestamp()
        if words in str(line["message"]) and at > since - MILLISECOND:
            return max(0.0, at - since)
    return None


def medians(pairs: list[Pair]) -> dict[float, float]:
    """What was added, as a median, by the second at which a window begins."""
    windows: dict[float, list[float]] = {}
    for pair in pairs:
        windows.setdefault(pair.at // WINDOW * WINDOW, []).append(pair.added)
    return {start: round(median(added), 4) for start, added in sorted(windows.items())}


@pytest.mark.timed
@FAULTS
async def test_a_fault_costs_a_call_next_to_nothing(
    fal: Fal, client: ClientSession, server: RedisServer, lag: Lag, tmp_path: Path, fault: Fault
) -> None:
    url = lag.url if fault is slow else server.url
    async with serving_all(fal, client, url, tmp_path) as world:
        await world.run(world.first, "kept before")
        proxies = (world.first, world.second)
        for proxy in proxies:
            await world.until_hit(proxy, "kept before")
        async with fault(server, lag):
            clock, began, pairs = time.time(), time.monotonic(), []
            while time.monotonic() - began < FAULT_SECONDS:
                pairs.append(await world.pair(began))
            noticed = [told(proxy, "done without", clock) for proxy in proxies]
        back = [await world.until_hit(proxy, "kept before") for proxy in proxies]
        late = [pair for pair in pairs if pair.at >= NOTICED]
        # The second proxy had no calls meanwhile.
        print(
            f"{fault.__name__}: noticed after {noticed}, hits again after {back}; added by second"
            f" {medians(pairs)}, at most {max(pair.added for pair in late):.3f} after the first"
        )
        assert noticed[0] is not None
        assert noticed[0] < 1.1 * NOTICED
        for how in ("run", "submit"):
            assert median(pair.added for pair in late if pair.how == how) < ADDED_MAX
        assert max(medians(late).values()) < ADDED_MAX


@pytest.mark.timed
async def test_many_calls_at_once_wait_a_second_for_a_frozen_server(
    fal: Fal, client: ClientSession, server: RedisServer, tmp_path: Path
) -> None:
    async with serving_all(fal, client, server.url, tmp_path) as world:
        await world.run(world.first, "kept before")
        await world.until_hit(world.first, "kept before")
        server.freeze()
        calls = (world.fresh(world.first, "submit") for _ in range(AT_ONCE))
        seconds = sorted(await asyncio.gather(*calls))
        print(f"{seconds[0]:.3f} to {seconds[-1]:.3f} s, {sum(s > 1.5 for s in seconds)} above 1.5")
        assert median(seconds) < WAITED_MAX
        assert seconds[-1] < SLOWEST_MAX


@pytest.mark.timed
async def test_a_call_does_not_go_on_waiting_when_the_store_is_given_up(
    fal: Fal, client: ClientSession, server: RedisServer, tmp_path: Path
) -> None:
    async with serving_all(fal, client, server.url, tmp_path) as world:
        await world.until_hit(world.first, "kept before")
        server.freeze()
        await asyncio.sleep(NOTICED)  # the proxy itself notices a quarter of a second later
        seconds = await world.fresh(world.first, "submit")
        print(f"begun {NOTICED} s after the fault: {seconds:.3f} s")
        assert seconds < 0.5


@pytest.mark.timed
@FAULTS
async def test_ids_outlive_a_fault(
    fal: Fal, client: ClientSession, server: RedisServer, lag: Lag, tmp_path: Path, fault: Fault
) -> None:
    url = lag.url if fault is slow else server.url
    async with serving_all(fal, client, url, tmp_path) as world:
        first, second = world.first, world.second
        made = (await world.run(first, "kept before")).document
        await world.until_hit(first, "kept before")
        hit = (await world.submit(first, "kept before")).document["request_id"]
        leader, sharing = [
            (await world.submit(first, "!delay 0.3 shared")).document["request_id"] for _ in "12"
        ]
        assert [is_virtual_id(each) for each in (hit, leader, sharing)] == [True, False, True]
        shared = await world.picture(second, leader)
        async with fault(server, lag):
            for request_id, document in ((hit, made), (leader, shared), (sharing, shared)):
                assert await world.picture(first, request_id) == document
                await is_not_denied(world, second, request_id, document)
            await asyncio.sleep(NOTICED)
            for request_id, document in ((hit, made), (leader, shared), (sharing, shared)):
                started = time.monotonic()
                assert await world.picture(first, request_id) == document
                await is_not_denied(world, second, request_id, document)
                assert time.monotonic() - started < 0.5
        await world.until_hit(first, "kept after")
        again = (await world.submit(first, "kept after")).document["request_id"]
        assert (await world.picture(second, again))["prompt"] == "kept after"


async def is_not_denied(world: World, proxy: Process, request_id: str, document: Any) -> None:
    """A process that cannot look an id up says so; what it does know it answers."""
    for verb in ("/status", ""):
        answer = await world.ask(proxy, request_id, verb)
        assert answer.status in (200, 503), answer
        if answer.status == 503:
            assert is_virtual_id(request_id)
            assert answer.headers["Retry-After"] == "1"
        elif verb == "":
            assert answer.document == document


@pytest.mark.parametrize("fault", [stopped, frozen])
async def test_after_a_fault_equal_calls_are_one_job_again(
    fal: Fal, client: ClientSession, server: RedisServer, lag: Lag, tmp_path: Path, fault: Fault
) -> None:
    async with serving_all(fal, client, server.url, tmp_path) as world:
        async with fault(server, lag):
            await world.run(world.first, "without a store")
            await asyncio.sleep(NOTICED + 0.3)
            assert world.fal.sandbox.jobs == 1
        for proxy in (world.first, world.second):
            await world.until_hit(proxy, "with a store")
        before = world.fal.sandbox.jobs
        calls = (
            world.run(proxy, "!delay 0.3 at once")
            for proxy in (world.first, world.second)
            for _ in range(5)
        )
        started = time.monotonic()
        documents = [answer.document for answer in await asyncio.gather(*calls)]
        assert time.monotonic() - started < 2.0  # news may be late, then they look by themselves
        assert documents == documents[:1] * 10
        assert world.fal.sandbox.jobs == before + 1


@pytest.mark.timed
@pytest.mark.parametrize("fault", [stopped, frozen])
async def test_a_proxy_starts_without_its_server_and_uses_it_when_it_comes(
    fal: Fal, client: ClientSession, server: RedisServer, lag: Lag, tmp_path: Path, fault: Fault
) -> None:
    async with AsyncExitStack() as stack:
        async with fault(server, lag):
            started = time.monotonic()
            world = await stack.enter_async_context(serving_all(fal, client, server.url, tmp_path))
            start = time.monotonic() - started
            await world.fresh(world.first, "run")
            await asyncio.sleep(NOTICED)
            seconds = [await world.fresh(world.first, how) for how in ("run", "submit") * 5]
        back = await world.until_hit(world.first, "a picture")
        await world.until_hit(world.second, "a picture")
        print(f"{fault.__name__}: started in {start:.2f} s, hits after {back:.2f} s")
        assert start < 3.0
        assert median(seconds) < ADDED_MAX


async def test_polls_of_fal_s_own_ids_ask_the_store_nothing(
    fal: Fal, client: ClientSession, server: RedisServer, tmp_path: Path
) -> None:
    async with serving_all(fal, client, server.url, tmp_path) as world:
        ids = [
            (await world.submit(world.first, "!delay 0.2 a job")).document["request_id"],
            (await world.submit(world.plain, "a job of nobody's")).document["request_id"],
        ]
        assert not any(map(is_virtual_id, ids))
        await world.until_hit(world.second, "!delay 0.2 a job")  # its leader is done with it
        commands: list[str] = []
        async with Redis.from_url(server.url) as redis, redis.monitor() as monitor:

            async def listen() -> None:
                async for command in monitor.listen():
                    commands.append(command["command"])

            listening = asyncio.ensure_future(listen())
            for request_id in ids * 25:
                for proxy in (world.first, world.second):
                    for verb in ("/status", "/status?logs=1"):
                        answer = await world.ask(proxy, request_id, verb)
                        assert answer.document["request_id"] == request_id
            await asyncio.sleep(0.3)
            assert any("falproxy:probe" in command for command in commands)
            assert [command for command in commands if "falproxy:probe" not in command] == []
            await world.submit(world.first, "something else")
            await asyncio.sleep(0.1)
            assert any("falproxy:probe" not in command for command in commands)
            listening.cancel()
            await asyncio.wait([listening])
