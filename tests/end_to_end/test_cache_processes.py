"""Results over several real processes: equal calls are one job, whoever of them stops or dies."""

import asyncio
import json
import signal
import sqlite3
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, closing
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import pytest
from aiohttp import ClientError, ClientSession
from aiohttp.pytest_plugin import AiohttpServer
from redis.asyncio import Redis

from falproxy.stores.cache.virtual_ids import is_virtual_id
from tests.support.cache_processes import (
    POLL,
    Answer,
    Fal,
    NoPicture,
    call,
    folder,
    open_client,
    open_fal,
    picture,
    request_url,
    serving,
    until,
)
from tests.support.cli_process import Process
from tests.support.key_search import CANARY
from tests.support.redis_server import RedisServer, redis_server

MODEL = "fal-ai/flux-pro/kontext/text-to-image"
RUN, SUBMIT = f"https://fal.run/{MODEL}", f"https://queue.fal.run/{MODEL}"
POLLED_AT_ONCE = 40
ENDS = 20.0  # seconds within which every client has its picture, or an error

# Rounds of a process that is killed, by the store that the others share.
ROUNDS = {"redis": 8, "sqlite": 3}
SEED = 5
# How long a leader that says nothing is believed is no setting. Rounds wait for it often.
LEASE = 1.0
WITH_SHORT_LEASE = f"""
from falproxy.stores.cache import single_flight
assert (single_flight.LEASE_SECONDS, single_flight.RENEW_INTERVAL) == (10.0, 2.5)
single_flight.LEASE_SECONDS, single_flight.RENEW_INTERVAL = {LEASE}, {LEASE / 4}
from falproxy.cli.main import main
raise SystemExit(main())
"""


Knows = Callable[[str, set[str]], Awaitable[bool]]


@dataclass(slots=True)
class World:
    """Proxies that share a store, and somebody who calls them.

    envs: of each process. knows: whether the store has one of these jobs, or a result of the
    prompt. code: what is run instead of `-m falproxy`.
    """

    fal: Fal
    session: ClientSession
    envs: list[dict[str, str]]
    knows: Knows
    code: str | None = None
    proxies: list[Process] = field(default_factory=list)
    stack: AsyncExitStack = field(default_factory=AsyncExitStack)

    async def open(self) -> None:
        starts = (self.start(number) for number in range(len(self.envs)))
        self.proxies = list(await asyncio.gather(*starts))

    async def start(self, number: int) -> Process:
        env = {"FAL_KEY": CANARY, "FALPROXY_UPSTREAM_ORIGIN": self.fal.origin}
        context = serving(self.code, **env, **self.envs[number])
        return await self.stack.enter_async_context(context)

    async def restart(self, number: int) -> None:
        self.proxies[number] = await self.start(number)

    async def submit(self, number: int, body: object) -> Answer:
        answer = await call(self.session, self.proxies[number].origin, SUBMIT, body)
        assert answer.status == 200, answer
        return answer

    async def run(self, number: int, body: object) -> Answer:
        answer = await call(self.session, self.proxies[number].origin, RUN, body)
        assert answer.status == 200, answer
        return answer

    async def picture(self, number: int, request_id: str) -> Any:
        async with asyncio.timeout(ENDS):
            return await picture(self.session, self.proxies[number].origin, request_id)

    def failures(self) -> list[dict[str, object]]:
        """What the proxies call their own mistakes."""
        return [line for proxy in self.proxies for line in proxy.log if line["level"] == "error"]


@pytest.fixture
async def fal(aiohttp_server: AiohttpServer) -> Fal:
    return await open_fal(aiohttp_server)


@pytest.fixture
async def client() -> AsyncIterator[ClientSession]:
    async with open_client() as session:
        yield session


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    with redis_server() as running:
        yield running


@asynccontextmanager
async def on_redis(
    fal: Fal, session: ClientSession, server: RedisServer, tmp_path: Path, code: str | None = None
) -> AsyncIterator[World]:
    """Three machines: all that they share is a Redis."""

    async def knows(prompt: str, jobs: set[str]) -> bool:
        async for name in redis.scan_iter(match="falproxy:*:flight"):
            if await redis.hget(name, "id") in jobs:
                return True
        async for name in redis.scan_iter(match="falproxy:*:result"):
            if json.loads(await redis.hget(name, "body") or "{}").get("prompt") == prompt:
                return True
        return False

    names = [folder(tmp_path, f"machine-{number}") for number in range(3)]
    envs = [{"REDIS_URL": server.url, "FALPROXY_DATA_DIR": name} for name in names]
    world = World(fal, session, envs, knows, code)
    async with Redis.from_url(server.url, decode_responses=True) as redis, world.stack:
        await redis.flushall()
        await world.open()
        yield world
        assert world.failures() == []


@asynccontextmanager
async def on_sqlite(
    fal: Fal, session: ClientSession, tmp_path: Path, code: str | None = None
) -> AsyncIterator[World]:
    """Three processes of one machine: they share a folder."""
    shared = folder(tmp_path, "data")

    async def knows(prompt: str, jobs: set[str]) -> bool:
        with closing(sqlite3.connect(Path(shared) / "results.sqlite")) as file:
            ids = {row[0] for row in file.execute("SELECT job_id FROM flights")}
            bodies = [json.loads(row[0]) for row in file.execute("SELECT body FROM results")]
        return bool(ids & jobs) or any(body.get("prompt") == prompt for body in bodies)

    world = World(fal, session, [{"FALPROXY_DATA_DIR": shared}] * 3, knows, code)
    async with world.stack:
        await world.open()
        yield world
        assert world.failures() == []


MakeWorld = Callable[..., AbstractAsyncContextManager[World]]


@pytest.fixture
def on(
    request: pytest.FixtureRequest, fal: Fal, client: ClientSession, tmp_path: Path
) -> MakeWorld:
    """Three proxies that share the store of this name."""

    def make(store: str, code: str | None = None) -> AbstractAsyncContextManager[World]:
        if store == "sqlite":
            return on_sqlite(fal, client, tmp_path, code)
        return on_redis(fal, client, request.getfixturevalue("server"), tmp_path, code)

    return make


STORES = pytest.mark.parametrize("store", ["redis", "sqlite"])


@STORES
@pytest.mark.parametrize(
    ("submits", "runs"),
    [
        pytest.param(200, 0, id="submits"),
        pytest.param(0, 60, id="runs"),
        pytest.param(60, 60, id="both"),
    ],
)
async def test_equal_calls_at_once_over_three_processes_are_one_job(
    on: MakeWorld, store: str, submits: int, runs: int
) -> None:
    body = {"prompt": f"!delay 0.5 {submits} and {runs} at once"}
    turns = asyncio.Semaphore(POLLED_AT_ONCE)
    order = ["submit"] * submits + ["run"] * runs
    Random(SEED).shuffle(order)
    async with on(store) as world:

        async def ask(number: int, how: str) -> tuple[str, Any]:
            """The request id and the document."""
            if how == "run":
                answer = await world.run(number, body)
                return answer.headers["x-fal-request-id"], answer.document
            request_id = (await world.submit(number, body)).document["request_id"]
            async with turns:
                return request_id, await world.picture(number, request_id)

        async with asyncio.timeout(2 * ENDS):
            calls = (ask(position % 3, how) for position, how in enumerate(order))
            answers = await asyncio.gather(*calls)
        sandbox = world.fal.sandbox
        assert (sandbox.jobs, len(world.fal.accepted) <= 1) == (1, True)
        assert len({request_id for request_id, _ in answers}) == len(order)
        job = sandbox.queue.get(sandbox.paid[0].request_id)
        made: Any = answers[0][1] if job is None or job.response is None else job.response.body
        assert made["prompt"] == body["prompt"]
        assert all(document == made for _, document in answers)


# ---- A process that is killed


MOMENTS = ("any", "submitted", "told")
TAKES = 0.3  # seconds that a job of a round takes
CLIENTS = 8
SLACK = 1.0  # seconds, for a machine that is busy
SETTLED = 0.05  # seconds until the store has read what the dead had sent


@dataclass(slots=True)
class Round:
    """What became of one kill. was_spent: whether fal had taken a job by then, or finished a
    direct call. was_known: whether the store had heard of it. pictures: what the clients got."""

    number: int
    prompt: str
    moment: str
    how: str
    was_spent: bool = False
    was_known: bool = False
    slowest: float = 0.0
    pictures: list[Any] = field(default_factory=list)

    @property
    def most(self) -> int:
        """How many jobs may be paid at most: nobody can know of what was not written down."""
        return 2 if self.was_spent and not self.was_known else 1


async def insist(world: World, number: int, how: str, body: object) -> Any:
    """A client's picture. Its proxy may die: then it goes to the next one with the id it has, or
    calls again."""
    request_id = ""
    while True:
        origin = world.proxies[number].origin
        try:
            if how == "run":
                return (await world.run(number, body)).document
            if not request_id:
                request_id = (await world.submit(number, body)).document["request_id"]
            return await picture(world.session, origin, request_id)
        except ClientError:
            await asyncio.sleep(POLL)
            if world.proxies[number].process.returncode is not None:
                number = (number + 1) % 3


async def timed(journey: Awaitable[Any], result: Round) -> None:
    started = time.monotonic()
    try:
        async with asyncio.timeout(ENDS):
            result.pictures.append(await journey)
    except (TimeoutError, AssertionError, ClientError, NoPicture) as error:
        result.pictures.append(repr(error))
    result.slowest = max(result.slowest, time.monotonic() - started)


async def kill(world: World, victim: int, result: Round, chance: Random) -> None:
    """Kills a process at some moment, and finds out what was known of its job."""
    if result.moment == "any":
        await asyncio.sleep(chance.uniform(0.0, TAKES + 0.2))
    else:
        await (world.fal.submitted if result.moment == "submitted" else world.fal.told).wait()
        await asyncio.sleep(chance.uniform(0.0, 0.004))
    world.proxies[victim].process.kill()
    await world.proxies[victim].process.wait()
    await asyncio.sleep(SETTLED)
    jobs = world.fal.jobs(result.prompt)
    result.was_known = await world.knows(result.prompt, jobs)
    result.was_spent = bool(jobs) or world.fal.paid(result.prompt) > 0


async def play(world: World, number: int, chance: Random) -> Round:
    """Calls at random moments, and the death of the process that was called first."""
    prompt = f"!delay {TAKES} round {number}"
    result = Round(
        number, prompt, MOMENTS[number % 3], "submit" if chance.random() < 0.7 else "run"
    )
    if result.how == "run" and result.moment == "told":
        result.moment = "any"  # nobody asks for the result of a direct call
    victim = chance.randrange(3)
    world.fal.submitted.clear()
    world.fal.told.clear()

    async def come_later(delay: float, number: int) -> None:
        await asyncio.sleep(delay)
        how = "submit" if chance.random() < 0.7 else "run"
        await timed(insist(world, number, how, {"prompt": prompt}), result)

    async with asyncio.TaskGroup() as group:
        first = insist(world, victim, result.how, {"prompt": prompt})
        group.create_task(timed(first, result))
        for position in range(1, CLIENTS):
            group.create_task(come_later(chance.uniform(0.0, TAKES + 0.1), position % 3))
        await kill(world, victim, result, chance)
        group.create_task(world.restart(victim))
    return result


@STORES
async def test_a_killed_process_costs_no_client_its_picture(on: MakeWorld, store: str) -> None:
    chance = Random(SEED)
    async with on(store, WITH_SHORT_LEASE) as world:
        rounds = [await play(world, number, chance) for number in range(ROUNDS[store])]
        await asyncio.sleep(1.5 * LEASE)  # for whoever would still buy something
        await until(lambda: world.fal.is_idle)
        paid = {result.number: world.fal.paid(result.prompt) for result in rounds}
    print(summary(rounds, paid))
    assert [result for result in rounds if not are_right(result)] == []
    assert [result for result in rounds if not 1 <= paid[result.number] <= result.most] == []
    assert max(result.slowest for result in rounds) < 2 * (LEASE + TAKES) + SLACK


def are_right(result: Round) -> bool:
    """Whether every client got a picture of what it asked for, and all got one if one was paid."""
    texts = {json.dumps(document, sort_keys=True) for document in result.pictures}
    prompts = {document["prompt"] for document in result.pictures if isinstance(document, dict)}
    is_complete = len(result.pictures) == CLIENTS and len(texts) <= result.most
    return is_complete and prompts == {result.prompt} and all(text[0] == "{" for text in texts)


def summary(rounds: list[Round], paid: dict[int, int]) -> str:
    """For a person who runs more rounds."""
    lines = [f"{len(rounds)} rounds"]
    for moment in MOMENTS:
        some = [result for result in rounds if result.moment == moment]
        unknown = [result for result in some if result.was_spent and not result.was_known]
        twice = [result for result in some if paid[result.number] > 1]
        slowest = max((result.slowest for result in some), default=0.0)
        lines.append(
            f"{moment}: {len(some)} kills, {sum(r.was_spent for r in some)} after fal had taken it,"
            f" {len(unknown)} of these before it was recorded ({[r.how for r in unknown]}),"
            f" paid twice {[(r.how, r.was_known) for r in twice]}, slowest client {slowest:.2f} s"
        )
    for result in rounds:
        wrong = [picture for picture in result.pictures if isinstance(picture, str)]
        lines += [f"round {result.number}, {result.moment}, {result.how}: {wrong}"] * bool(wrong)
    return "\n".join(lines)


@pytest.mark.parametrize(
    "killed",
    [
        pytest.param((0,), id="that of the call"),
        pytest.param((0, 1), id="that of the call and that which gave the id"),
    ],
)
async def test_an_id_that_waits_for_a_direct_call_is_not_lost_with_its_process(
    on: MakeWorld, killed: tuple[int, ...]
) -> None:
    body = {"prompt": "!delay 0.4 a run that dies"}
    async with on("redis", WITH_SHORT_LEASE) as world:
        dying = asyncio.ensure_future(world.run(0, body))
        await asyncio.sleep(0.2)
        request_id = (await world.submit(1, body)).document["request_id"]
        waiting = asyncio.ensure_future(world.run(max(killed) + 1, body))
        await asyncio.sleep(0.1)
        for number in killed:
            world.proxies[number].process.kill()
        with pytest.raises(ClientError):
            await dying
        statuses: list[dict[str, Any]] = []
        async with asyncio.timeout(ENDS):
            while not statuses or statuses[-1]["status"] != "COMPLETED":
                answer = await call(
                    world.session, world.proxies[2].origin, f"{request_url(request_id)}/status"
                )
                statuses.append(answer.document)
        assert [status["error_type"] for status in statuses if "error" in status] == []
        made = (await waiting).document
        assert await world.picture(2, request_id) == made
        assert world.fal.sandbox.jobs == 1


# ---- A process that stops


@STORES
async def test_a_stopped_leader_s_job_is_followed_by_another(on: MakeWorld, store: str) -> None:
    body = {"prompt": "!delay 0.7 a job that outlives its process"}
    async with on(store) as world:
        first = await world.submit(0, body)
        second = await world.submit(1, body)
        started = time.monotonic()
        assert await world.proxies[0].end() == 0
        assert time.monotonic() - started < 0.7
        third = await world.submit(2, body)
        ids = [answer.document["request_id"] for answer in (first, second, third)]
        assert [is_virtual_id(request_id) for request_id in ids] == [False, True, True]
        pictures = [await world.picture(1 + number % 2, each) for number, each in enumerate(ids)]
        assert pictures[0] == pictures[1] == pictures[2]
        await until_kept(world, 2, body)
        assert (world.fal.sandbox.jobs, len(world.fal.accepted)) == (1, 1)


@STORES
async def test_a_stopped_leader_s_job_is_followed_by_who_asks_for_it_later(
    on: MakeWorld, store: str
) -> None:
    body = {"prompt": "!delay 0.7 a job that nobody else waits for"}
    async with on(store) as world:
        first = (await world.submit(0, body)).document["request_id"]
        assert await world.proxies[0].end() == 0
        later = await world.run(1, body)
        assert later.document == await world.picture(2, first)
        await until_kept(world, 2, body)
        assert (world.fal.sandbox.jobs, len(world.fal.accepted)) == (1, 1)


@STORES
async def test_a_stop_brings_a_direct_call_to_its_end_that_others_wait_for(
    on: MakeWorld, store: str
) -> None:
    body = {"prompt": "!delay 1 a run that its client left"}
    async with on(store) as world:
        leaving = asyncio.ensure_future(world.run(0, body))
        await asyncio.sleep(0.2)
        others = [asyncio.ensure_future(world.run(number, body)) for number in (1, 2)]
        await asyncio.sleep(0.2)
        leaving.cancel()
        await asyncio.sleep(0.1)
        assert await world.proxies[0].end() == 0
        answers = await asyncio.gather(*others)
        assert answers[0].document == answers[1].document
        assert [(seen.method, seen.status) for seen in world.fal.sandbox.seen] == [("POST", 200)]
        assert world.fal.sandbox.jobs == 1


async def until_kept(world: World, number: int, body: object) -> None:
    """Returns when the result is there for everybody, which is soon after its job's end."""
    async with asyncio.timeout(3.0):
        while not (await world.run(number, body)).is_hit:
            await asyncio.sleep(POLL)


# ---- What is kept on disk


async def test_a_result_survives_kill_and_restart(on: MakeWorld) -> None:
    body = {"prompt": "a picture to keep"}
    async with on("sqlite") as world:
        request_id = (await world.submit(0, body)).document["request_id"]
        made = await world.picture(0, request_id)
        await until_kept(world, 0, body)
        for proxy in world.proxies:
            await proxy.end(signal.SIGKILL)
        await world.restart(0)
        again = await world.run(0, body)
        assert (again.is_hit, again.document) == (True, made)
        hit = await world.submit(0, body)
        assert hit.is_hit
        assert await world.picture(0, hit.document["request_id"]) == made
        assert world.fal.sandbox.jobs == 1


async def test_an_id_for_a_kept_result_survives_kill_and_restart(on: MakeWorld) -> None:
    body = {"prompt": "a picture to ask for later"}
    async with on("sqlite") as world:
        made = (await world.run(0, body)).document
        request_id = (await world.submit(0, body)).document["request_id"]
        assert is_virtual_id(request_id)
        for proxy in world.proxies:
            await proxy.end(signal.SIGKILL)
        await world.restart(1)
        assert await world.picture(1, request_id) == made


async def test_what_one_process_keeps_the_others_have(on: MakeWorld) -> None:
    body = {"prompt": "a picture for three"}
    async with on("sqlite") as world:
        made = (await world.run(0, body)).document
        for number in (1, 2):
            answer = await world.run(number, body)
            assert (answer.is_hit, answer.document) == (True, made)
        request_id = (await world.submit(1, body)).document["request_id"]
        assert await world.picture(2, request_id) == made
        assert world.fal.sandbox.jobs == 1
