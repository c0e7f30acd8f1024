"""Calls with one key over several processes, in generated schedules: at most one is bought.

Processes die, clients leave, fal refuses calls or loses responses, and the store has outages and
loses replies. A failing schedule is printed with its seed; `SCHEDULE_SEED=<seed>` plays only that
one.
"""

import asyncio
import os
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any, Self, TypeVar
from uuid import uuid4

import pytest
from aiohttp import web
from multidict import CIMultiDict, CIMultiDictProxy

from falproxy.circuit_breaker import CircuitBreaker
from falproxy.errors import ProxyError
from falproxy.fal.target import Target
from falproxy.middleware.idempotency import keep_idempotent, record_sending
from falproxy.proxy.call import CALL, Call
from falproxy.proxy.local_responses import LocalDocument, submit_response
from falproxy.proxy.upstream import UpstreamUnreachable, connection_lost, timed_out
from falproxy.spool import Spool
from falproxy.stores.idempotency import BeginReply, IdempotencyStore, IdempotencyStoreError
from falproxy.stores.idempotency.keyed_calls import STORE_COOLDOWN, KeyedCalls
from falproxy.stores.idempotency.sqlite import SqliteIdempotencyStore
from tests.support.virtual_time import run_in_virtual_time

SCHEDULES, CHUNK = 500, 100
ONLY = os.environ.get("SCHEDULE_SEED")
CHUNKS = [0] if ONLY else [*range(0, SCHEDULES, CHUNK)]
LEASE = 4.0
# How fal treats a POST. After the first group it has bought nothing, for certain.
REFUSED = ("unreachable", "busy", "refused")
MAYBE_BOUGHT = ("lost", "slow", "gateway", "fault")
FATES = (*REFUSED, *MAYBE_BOUGHT, "accepted", "accepted", "accepted", "accepted")
ERRORS: dict[str, Exception] = {
    "fault": RuntimeError("a fault of the proxy"),
    "refused": ProxyError(402, "budget_exceeded", "No."),
    "lost": connection_lost(is_repeatable=False),
    "slow": timed_out(is_repeatable=False),
}
STATUSES = {"busy": 429, "gateway": 502}
AGAIN = {409, 429, 502, 503}  # statuses after which a client tries again with its key
T = TypeVar("T")
Outage = tuple[float, float]  # start and end


class FaultyStore:
    """The store as one process sees it, with delays, outages and lost replies."""

    def __init__(self, store: IdempotencyStore, random: Random, outages: Sequence[Outage]) -> None:
        self._store = store
        self._random = random
        self._outages = outages
        self.is_dead = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        return None

    async def _run(self, operation: Callable[[], Awaitable[T]]) -> T:
        await asyncio.sleep(self._random.uniform(0, 0.01))
        now = asyncio.get_running_loop().time()
        is_away = any(start <= now < end for start, end in self._outages)
        if self.is_dead:
            await asyncio.Event().wait()
        if not is_away:
            result = await operation()
            await asyncio.sleep(self._random.uniform(0, 0.01))
            return result
        if self._random.random() < 0.3:
            await operation()  # only the reply is lost
        raise IdempotencyStoreError("away")

    async def begin(self, key: str, digest: str, token: str, lease: float) -> BeginReply:
        return await self._run(lambda: self._store.begin(key, digest, token, lease))

    async def mark_sent(self, key: str, token: str, lease: float) -> bool:
        return await self._run(lambda: self._store.mark_sent(key, token, lease))

    async def renew(
        self, calls: Sequence[tuple[str, str]], lease: float
    ) -> Sequence[tuple[str, str]]:
        return await self._run(lambda: self._store.renew(calls, lease))

    async def finish(self, key: str, token: str, outcome: bytes | None) -> bool:
        return await self._run(lambda: self._store.finish(key, token, outcome))

    async def release(self, key: str, token: str) -> bool:
        return await self._run(lambda: self._store.release(key, token))


@dataclass
class CountingFal:
    """fates: of the first, second, ... POST, with the seconds that each takes.

    bought: ids of the jobs that were accepted.
    """

    fates: list[tuple[str, float]]
    bought: list[str] = field(default_factory=list)
    maybe_bought: int = 0
    posts: int = 0

    async def post(self) -> web.StreamResponse:
        fate, seconds = self.fates[self.posts % len(self.fates)]
        self.posts += 1
        if fate == "unreachable":
            raise UpstreamUnreachable
        self.maybe_bought += fate in MAYBE_BOUGHT
        request_id = str(uuid4())
        if fate == "accepted":
            self.bought.append(request_id)
        await asyncio.sleep(seconds)
        if fate in ERRORS:
            raise ERRORS[fate]
        if fate in STATUSES:
            return LocalDocument(body=b"{}", status=STATUSES[fate])
        return submit_response("fal-ai/flux", request_id)


class FakeRequest(dict[Any, Any]):
    """The part of `web.Request` that the middleware uses."""

    def __init__(self, app: web.Application, key: str) -> None:
        super().__init__()
        self.app = app
        self.headers = CIMultiDictProxy(CIMultiDict({"Idempotency-Key": key}))
        self.match_info = type("MatchInfo", (), {})()
        body = Spool(b"{}")
        target = Target("queue.fal.run", "/fal-ai/flux", "")
        self[CALL] = Call("POST", target, self.headers, body=body.chunks(), length=body.size)


class Node:
    """One process."""

    def __init__(self, store: FaultyStore, fal: CountingFal, random: Random) -> None:
        self.store = store
        self.fal = fal
        self.random = random
        self.calls = KeyedCalls(store, lease=LEASE)
        clock = asyncio.get_running_loop().time
        self.calls._breaker = CircuitBreaker(STORE_COOLDOWN, clock)
        self.is_dead = False
        self.app = web.Application()

    async def call(self, key: str, handler: Any = None) -> web.StreamResponse:
        request: Any = FakeRequest(self.app, key)
        handle = keep_idempotent(self.calls, pass_on)
        return await handle(request, handler or self._check_then_send)

    async def _check_then_send(self, request: web.Request) -> web.StreamResponse:
        await asyncio.sleep(self.random.choice((0.0, 0.0, 0.5, 6.0)))  # such as the image check

        async def post(request: web.Request) -> web.StreamResponse:
            if self.is_dead:
                await asyncio.Event().wait()
            return await self.fal.post()

        return await record_sending()(request, post)

    async def kill(self) -> None:
        self.is_dead = self.store.is_dead = True
        for task in (*self.calls._loops, *self.calls._tasks):
            task.cancel()


@web.middleware
async def pass_on(request: web.Request, handler: Any) -> web.StreamResponse:
    response: web.StreamResponse = await handler(request)
    return response


@dataclass
class Play:
    """One schedule. outcomes: what clients got, and would not try again."""

    seed: int
    folder: Path
    outcomes: list[str] = field(default_factory=list)

    async def run(self) -> list[str]:
        """Return what went wrong."""
        random = Random(self.seed)
        clock = asyncio.get_running_loop().time
        async with SqliteIdempotencyStore(
            self.folder / f"{self.seed}.sqlite", clock=clock
        ) as store:
            choices = (0.01, 0.3, 1.0, 6.0, 20.0)
            fal = CountingFal([(random.choice(FATES), random.choice(choices)) for _ in range(6)])
            nodes = []
            for _ in range(random.choice((1, 2, 3))):
                outages = []
                if random.random() < 0.4:
                    start = random.uniform(0, 8)
                    outages.append((start, start + random.choice((0.1, 1.0, 7.0))))
                nodes.append(Node(FaultyStore(store, random, outages), fal, random))
            spread = random.choice((0.01, 1.0, 10.0))
            clients = [self._client(nodes, random, spread) for _ in range(random.randrange(1, 7))]
            kill = self._kill(nodes, random) if random.random() < 0.4 else asyncio.sleep(0)
            await asyncio.gather(kill, *clients)
            last = await self._last_result(nodes)
            for node in nodes:
                await node.calls.close(0.0)
                if not node.is_dead:
                    await node.calls.__aexit__(None, None, None)
        return self._faults(fal, nodes, last)

    async def _kill(self, nodes: list[Node], random: Random) -> None:
        await asyncio.sleep(random.choice((random.uniform(0, 0.1), random.uniform(0, 10))))
        nodes[0].is_dead = True
        await nodes[0].kill()

    async def _client(self, nodes: list[Node], random: Random, spread: float) -> None:
        await asyncio.sleep(random.uniform(0, spread))
        leaves_after = random.uniform(0.01, 3.0) if random.random() < 0.3 else None
        for _ in range(random.choice((1, 2, 6))):
            living = [node for node in nodes if not node.is_dead]
            if not living:
                return
            status = await self._attempt(random.choice(living), leaves_after)
            if status is not None and status not in AGAIN:
                return
            await asyncio.sleep(random.uniform(0, 2))

    async def _attempt(self, node: Node, leaves_after: float | None) -> int | None:
        task = asyncio.ensure_future(node.call("k"))
        loop = asyncio.get_running_loop()
        leaves_at = None if leaves_after is None else loop.time() + leaves_after
        while not task.done():
            await asyncio.wait([task], timeout=0.2)
            if node.is_dead or (leaves_at is not None and loop.time() > leaves_at):
                task.cancel()
                await asyncio.wait([task])
                return None
        return await self._outcome(task)

    async def _outcome(self, task: "asyncio.Task[web.StreamResponse]") -> int:
        try:
            response = task.result()
        except RuntimeError:
            return 500
        except ProxyError as error:
            if error.status not in AGAIN:
                self.outcomes.append(f"{error.status} {error.code}")
            return error.status
        if response.status == 200:
            self.outcomes.append(response.headers["x-fal-request-id"])
        return response.status

    async def _last_result(self, nodes: list[Node]) -> str:
        """Return what a client gets when everything has ended, and the store works."""
        living = [node for node in nodes if not node.is_dead]
        await asyncio.sleep(60)
        if not living:
            return ""
        posts = living[-1].fal.posts
        try:
            response = await living[-1].call("k")
        except ProxyError as error:
            return f"{error.status} {error.code}"
        except RuntimeError:
            return "500"
        is_new = living[-1].fal.posts > posts
        request_id = response.headers.get("x-fal-request-id", f"{response.status}")
        return request_id if not is_new else f"new {request_id}"

    def _faults(self, fal: CountingFal, nodes: list[Node], last: str) -> list[str]:
        faults = []
        bought = len(fal.bought) + fal.maybe_bought
        if bought > 1:
            faults.append(f"{len(fal.bought)} jobs, and {fal.maybe_bought} that may be some")
        ids = {outcome for outcome in self.outcomes if " " not in outcome}
        if not ids <= {*fal.bought}:
            faults.append(f"results {ids} for jobs {fal.bought}")
        is_quiet = not any(node.is_dead for node in nodes)
        is_temporary = last.startswith(("503 ", "409 "))
        if last and is_temporary:
            faults.append(f"the last result is {last}")
        if ids and last and is_quiet and last not in ids:
            faults.append(f"results {ids}, then {last}")
        return faults


def play(seed: int, folder: Path) -> None:
    faults = run_in_virtual_time(Play(seed, folder).run())
    assert not faults, f"seed {seed}: {faults}"


@pytest.mark.slow(seconds=4)
@pytest.mark.parametrize("first_seed", CHUNKS)
def test_in_any_schedule_at_most_one_call_is_bought(first_seed: int, tmp_path: Path) -> None:
    for seed in [int(ONLY)] if ONLY else range(first_seed, first_seed + CHUNK):
        play(seed, tmp_path)


async def test_a_call_that_was_not_sent_ends_with_its_client(tmp_path: Path) -> None:
    async with SqliteIdempotencyStore(tmp_path / "file.sqlite") as store:
        fal, random = CountingFal([("accepted", 0.0)]), Random(1)
        nodes = [Node(FaultyStore(store, random, ()), fal, random) for _ in range(2)]
        checking = asyncio.Event()

        async def check_forever(request: web.Request) -> web.StreamResponse:
            checking.set()
            await asyncio.Event().wait()
            raise AssertionError

        request: Any = FakeRequest(nodes[0].app, "k")
        handle = keep_idempotent(nodes[0].calls, pass_on)
        first = asyncio.ensure_future(handle(request, check_forever))
        await checking.wait()
        first.cancel()
        await asyncio.wait([first])
        assert (await nodes[1].call("k")).status == 200
        assert fal.posts == 1
        for node in nodes:
            await node.calls.close(0.0)
            await node.calls.__aexit__(None, None, None)


async def empty(store: SqliteIdempotencyStore) -> None:
    """Delete all records, as if another Redis server without data had replaced the first."""
    await store._write(lambda connection, now: connection.execute("DELETE FROM records").rowcount)


@dataclass
class LossPlay:
    """A call of one process, and an equal one of another process; the records are lost at a time.

    checked, run: seconds until the call is sent, and then until fal has responded.
    lost_at, second_at: seconds after the start of the call.
    """

    folder: Path
    checked: float
    run: float
    lost_at: float
    second_at: float
    fate: str = "accepted"

    async def outcomes(self) -> tuple[list[str], CountingFal]:
        loop, random = asyncio.get_running_loop(), Random(1)
        async with SqliteIdempotencyStore(self.folder / "records.sqlite", clock=loop.time) as store:
            fal = CountingFal([(self.fate, self.run)])
            nodes = [Node(FaultyStore(store, random, ()), fal, random) for _ in range(2)]

            async def check_then_send(request: web.Request) -> web.StreamResponse:
                await asyncio.sleep(self.checked)
                return await record_sending()(request, lambda _: fal.post())

            first = asyncio.ensure_future(nodes[0].call("k", check_then_send))
            await asyncio.sleep(self.lost_at)
            await empty(store)
            await asyncio.sleep(self.second_at - self.lost_at)
            second = asyncio.ensure_future(nodes[1].call("k", check_then_send))
            responses = await asyncio.gather(first, second, return_exceptions=True)
            for node in nodes:
                await node.calls.close(0.0)
                await node.calls.__aexit__(None, None, None)
        return [self._outcome(response) for response in responses], fal

    def _outcome(self, response: web.StreamResponse | BaseException) -> str:
        if isinstance(response, BaseException):
            return getattr(response, "code", repr(response))
        return response.headers.get("x-fal-request-id", f"{response.status}")


AFTER_RENEWAL = LEASE / 4 + 0.5


@pytest.mark.parametrize(
    "times",
    [
        pytest.param((0.5, 0.5, 0.2, 0.8), id="before it is sent, repeated while it runs"),
        pytest.param((0.5, 0.5, 0.2, 2.0), id="before it is sent, repeated after its end"),
        pytest.param((9.0, 0.5, 0.2, AFTER_RENEWAL), id="before it is sent, repeated before that"),
        pytest.param((0.1, 9.0, 0.3, AFTER_RENEWAL), id="while it runs"),
        pytest.param((0.1, 0.5, 0.3, 2.0), id="just before its end"),
    ],
)
def test_records_that_the_store_has_lost_are_written_again(
    times: tuple[float, float, float, float], tmp_path: Path
) -> None:
    outcomes, fal = run_in_virtual_time(LossPlay(tmp_path, *times).outcomes())
    assert (outcomes, fal.posts) == (fal.bought * 2, 1)


@pytest.mark.parametrize("lost_at", [0.2, 0.9, 0.99, 1.0, 1.01, 1.09])
def test_a_released_record_is_not_written_again(lost_at: float, tmp_path: Path) -> None:
    """fal refuses the call at about the time of a renewal: its key can be used at once."""
    play = LossPlay(tmp_path, 0.5, 0.5, lost_at, 1.2, fate="busy")
    outcomes, fal = run_in_virtual_time(play.outcomes())
    assert (outcomes, fal.posts) == (["429", "429"], 2)
