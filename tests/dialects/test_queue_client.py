"""The waiting engine: submits that are never sent twice, jobs that are waited for, and goodbyes."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from aiohttp import ClientSession, ClientTimeout, web
from aiohttp.test_utils import TestServer
from tenacity import wait_fixed, wait_none
from tenacity.wait import wait_base

from falproxy.background import Background, background_context
from falproxy.dialects import default_error, handle_errors
from falproxy.dialects.queue_client import QueueClient, QueuedJob, WaitPolicy, submit_call
from falproxy.fal.keys import KeyPool
from falproxy.proxy.call import CACHE_OUTCOME
from falproxy.proxy.forward import forward
from falproxy.proxy.upstream import connect_upstream
from tests.support.fake_fal import FakeFal, WireFal, read_head
from tests.support.key_search import CANARY
from tests.support.sandbox_proxy import until

RESULT = {"images": [{"url": "https://a.example/b.png"}]}


@dataclass(slots=True)
class Queue:
    """A queue of fal's. busy: how often it says something else before it answers well, by step.
    otherwise: what it says then, status and headers. polls: how often a job is asked about until
    it has ended. open: set while submits are answered. asked: steps, with the job's id."""

    busy: dict[str, int] = field(default_factory=dict)
    otherwise: tuple[int, dict[str, str]] = (429, {})
    polls: int = 1
    open: asyncio.Event = field(default_factory=asyncio.Event)
    asked: list[str] = field(default_factory=list)
    result: tuple[int, object] = (200, RESULT)
    _jobs: Iterator[int] = field(default_factory=lambda: iter(range(1, 100)))
    _polled: dict[str, int] = field(default_factory=dict)

    async def __call__(self, request: web.Request) -> web.StreamResponse:
        step, job = self._step(request)
        self.asked.append(f"{step} {job}".strip())
        if self.busy.get(step, 0) > 0:
            self.busy[step] -= 1
            status, headers = self.otherwise
            return web.json_response({"detail": "later"}, status=status, headers=headers)
        if step == "submit":
            await self.open.wait()
            return web.json_response({"request_id": f"{next(self._jobs)}", "status": "IN_QUEUE"})
        if step == "status":
            polled = self._polled[job] = self._polled.get(job, 0) + 1
            is_over = polled >= self.polls
            return web.json_response({"status": "COMPLETED" if is_over else "IN_PROGRESS"})
        if step == "cancel":
            return web.json_response({"status": "CANCELLATION_REQUESTED"}, status=202)
        status, document = self.result
        return web.json_response(document, status=status)

    def _step(self, request: web.Request) -> tuple[str, str]:
        _, _, rest = request.path.partition("/requests/")
        if not rest:
            return "submit", ""
        job, _, verb = rest.partition("/")
        return verb or "result", job

    def count(self, step: str) -> int:
        return sum(asked.split()[0] == step for asked in self.asked)


@dataclass(frozen=True, slots=True)
class World:
    """A path that has its calls made and waits for them. left: set once a client has left."""

    origin: str
    session: ClientSession
    left: asyncio.Event

    async def ask(self, count: int = 1, *, kept: bool = False) -> tuple[int, Any]:
        """Status and document. kept: whether results are kept for others."""
        url = f"{self.origin}/wait"
        asked = {"count": count, "kept": kept}
        async with self.session.post(url, json=asked) as response:
            return response.status, await response.json()

    async def leave(self, condition: Callable[[], object], **asked: Any) -> None:
        """Asks, and hangs up when that holds."""
        asking = asyncio.ensure_future(self.ask(**asked))
        await until(condition)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)


Work = Callable[[QueueClient, web.Request, Background], Awaitable[web.StreamResponse]]


@asynccontextmanager
async def open_world(
    origin: str,
    total: float = 5.0,
    wait: wait_base = wait_none(),  # noqa: B008 # it has no state
    work: Work | None = None,
    depth: int = 0,
) -> AsyncIterator[World]:
    """work: what is done instead of having calls made and waiting for all of them. depth: how
    many applications there are around the one that knows fal."""
    background, left = Background(), asyncio.Event()
    patience = WaitPolicy(total=total, background=background, retry_wait=wait)

    async def serve(request: web.Request) -> web.StreamResponse:
        asked = await request.json()

        async def way(request: web.Request) -> web.StreamResponse:
            if asked["kept"]:
                request[CACHE_OUTCOME] = "miss"
            return await forward(request)

        waiting = QueueClient(request, way, patience)
        if work is not None:
            return await work(waiting, request, background)
        calls = [
            submit_call("fal-ai/flux/dev", json.dumps({"place": place}).encode(), request.headers)
            for place in range(asked["count"])
        ]
        try:
            answers = await waiting.submit_and_wait(calls)
        except asyncio.CancelledError:
            left.set()
            raise
        return web.json_response([[each.status, each.request_id] for each in answers])

    options: Any = {"handler_args": {"handler_cancellation": True}}
    app = web.Application(middlewares=[handle_errors(default_error)], **options)
    key = KeyPool([CANARY], lambda: 0.0).next_key()
    app.cleanup_ctx.append(connect_upstream(key, origin=origin, timeouts=(1.0, 60.0)))
    app.cleanup_ctx.append(background_context(background, 5.0))
    app.router.add_post("/wait", serve)
    prefix = ""
    for level in range(depth):
        outer = web.Application(**options)
        outer.add_subapp(f"/{level}", app)
        app, prefix = outer, f"/{level}{prefix}"
    async with TestServer(app) as server, ClientSession(timeout=ClientTimeout(10)) as session:
        yield World(f"http://127.0.0.1:{server.port}{prefix}", session, left)


async def answer_of(fal: FakeFal, head: bytes) -> bytes:
    """What fal answers to a request's bytes, to its end."""
    _, _, port = fal.origin.rpartition(":")
    reader, writer = await asyncio.open_connection("127.0.0.1", int(port))
    writer.write(head.replace(b"\r\n", b"\r\nConnection: close\r\n", 1))
    answer = await reader.read()
    writer.close()
    return answer


@pytest.fixture
def queue(fal: FakeFal) -> Queue:
    made = Queue()
    made.open.set()
    fal.answer = made
    return made


class TestSubmits:
    async def test_of_several_calls_are_all_made_before_one_is_waited_for(
        self, fal: FakeFal, queue: Queue
    ) -> None:
        queue.polls = 2
        async with open_world(fal.origin) as world:
            status, answers = await world.ask(3)
        assert (status, answers) == (200, [[200, "1"], [200, "2"], [200, "3"]])
        assert queue.asked[:3] == ["submit"] * 3
        assert queue.asked[3] == "status 1"
        assert [json.loads(seen.body) for seen in fal.seen[:3]] == [
            {"place": 0}, {"place": 1}, {"place": 2},
        ]  # fmt: skip

    async def test_that_may_have_been_taken_are_never_made_again(self, wire: WireFal) -> None:
        async def take_and_hang_up(
            reader: asyncio.StreamReader, writer: asyncio.StreamWriter
        ) -> None:
            taken.append(await read_head(reader))

        taken: list[bytes] = []
        wire.serve = take_and_hang_up
        async with open_world(wire.origin) as world:
            status, document = await world.ask()
            assert (status, document["error"]["code"]) == (504, "upstream_broken")
            await asyncio.sleep(0.05)
        assert len(taken) == wire.connections == 1

    @pytest.mark.parametrize("status", [500, 502, 503, 504])
    async def test_that_fal_failed_at_are_never_made_again(
        self, fal: FakeFal, queue: Queue, status: int
    ) -> None:
        queue.busy, queue.otherwise = {"submit": 1}, (status, {})
        async with open_world(fal.origin) as world:
            assert await world.ask() == (200, [[status, None]])
        assert queue.asked == ["submit"]

    async def test_that_fal_has_no_room_for_are_made_again(
        self, fal: FakeFal, queue: Queue
    ) -> None:
        queue.busy = {"submit": 2}
        async with open_world(fal.origin) as world:
            assert await world.ask() == (200, [[200, "1"]])
        assert queue.count("submit") == 3
        assert len({seen.body for seen in fal.seen[:3]}) == 1

    async def test_are_given_up_after_three_attempts(self, fal: FakeFal, queue: Queue) -> None:
        queue.busy = {"submit": 9}
        async with open_world(fal.origin) as world:
            assert await world.ask() == (200, [[429, None]])
        assert queue.asked == ["submit"] * 3

    async def test_that_never_left_are_made_again_three_times(
        self, unused_tcp_port: int, caplog: pytest.LogCaptureFixture
    ) -> None:
        async with open_world(f"http://127.0.0.1:{unused_tcp_port}") as world:
            status, document = await world.ask()
        assert (status, document["error"]["code"]) == (502, "upstream_unreachable")
        assert caplog.text.count("No response from queue.fal.run") == 3

    async def test_wait_for_a_fal_that_comes_back(
        self, fal: FakeFal, queue: Queue, unused_tcp_port: int, caplog: pytest.LogCaptureFixture
    ) -> None:
        async def pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(await answer_of(fal, await read_head(reader)))
            writer.close()

        origin = f"http://127.0.0.1:{unused_tcp_port}"
        async with open_world(origin, wait=wait_fixed(0.3)) as world:
            asking = asyncio.ensure_future(world.ask())
            await until(lambda: "No response from queue.fal.run" in caplog.text)
            server = await asyncio.start_server(pass_on, "127.0.0.1", unused_tcp_port)
            assert await asking == (200, [[200, "1"]])
            server.close()
        assert queue.asked == ["submit", "status 1", "result 1"]

    async def test_of_which_one_is_refused_take_the_others_back(
        self, fal: FakeFal, queue: Queue
    ) -> None:
        async def second_fails(request: web.Request) -> web.StreamResponse:
            if queue.count("submit") == 1 and request.method == "POST":
                queue.asked.append("submit")
                return web.json_response({"detail": "locked"}, status=403)
            return await queue(request)

        fal.answer = second_fails
        async with open_world(fal.origin) as world:
            assert await world.ask(3) == (200, [[403, None]])
            await until(lambda: queue.count("cancel"))
        assert queue.asked == ["submit", "submit", "cancel 1"]


class TestJobs:
    @pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
    @pytest.mark.parametrize("times", [1, 4])
    async def test_are_not_over_because_nobody_says_how_they_are(
        self, fal: FakeFal, queue: Queue, status: int, times: int
    ) -> None:
        queue.busy, queue.otherwise = {"status": times}, (status, {})
        async with open_world(fal.origin) as world:
            assert await world.ask() == (200, [[200, "1"]])
        assert queue.count("status") == times + 1
        assert (queue.count("submit"), queue.count("result")) == (1, 1)

    @pytest.mark.parametrize("status", [401, 403, 404])
    async def test_that_fal_does_not_tell_of_have_the_result_that_it_tells(
        self, fal: FakeFal, queue: Queue, status: int
    ) -> None:
        fal_s_word = {"x-fal-request-id": "1"}
        queue.busy, queue.otherwise = {"status": 1, "result": 1}, (status, fal_s_word)
        async with open_world(fal.origin) as world:
            assert await world.ask() == (200, [[status, "1"]])

    async def test_have_results_that_are_asked_for_again(self, fal: FakeFal, queue: Queue) -> None:
        queue.busy, queue.otherwise = {"result": 2}, (502, {})
        async with open_world(fal.origin) as world:
            assert await world.ask() == (200, [[200, "1"]])
        assert queue.count("result") == 3

    async def test_that_failed_by_fal_s_own_word_are_not_asked_again(
        self, fal: FakeFal, queue: Queue
    ) -> None:
        queue.busy, queue.otherwise = {"result": 1}, (503, {"x-fal-request-id": "1"})
        async with open_world(fal.origin) as world:
            assert await world.ask() == (200, [[503, "1"]])
        assert queue.count("result") == 1

    async def test_of_which_one_failed_are_cancelled(self, fal: FakeFal, queue: Queue) -> None:
        queue.result = 422, {"detail": []}
        async with open_world(fal.origin) as world:
            assert await world.ask(3) == (200, [[422, "1"]])
            await until(lambda: queue.count("cancel") == 2)
        assert queue.asked[-2:] == ["cancel 2", "cancel 3"]

    async def test_that_take_too_long_are_cancelled(self, fal: FakeFal, queue: Queue) -> None:
        queue.polls = 1000
        async with open_world(fal.origin, total=0.2) as world:
            status, document = await world.ask(2)
            assert (status, document["error"]["code"]) == (504, "upstream_timeout")
            assert document["error"]["message"] == "fal.ai timed out after 0.2 s."
            await until(lambda: queue.count("cancel") == 2)

    async def test_that_others_may_have_go_on(self, fal: FakeFal, queue: Queue) -> None:
        queue.polls = 1000
        async with open_world(fal.origin, total=0.2) as world:
            status, _ = await world.ask(kept=True)
        assert (status, queue.count("cancel")) == (504, 0)


@pytest.mark.parametrize("depth", [0, 1, 2], ids=["alone", "nested", "nested deeply"])
class TestClientsThatLeave:
    async def test_take_their_jobs_with_them(self, fal: FakeFal, queue: Queue, depth: int) -> None:
        queue.polls = 1000
        async with open_world(fal.origin, depth=depth) as world:
            await world.leave(lambda: queue.count("status"), count=2)
            await until(lambda: queue.count("cancel") == 2)

    async def test_take_a_job_with_them_that_fal_is_just_taking(
        self, fal: FakeFal, queue: Queue, depth: int
    ) -> None:
        queue.open.clear()
        async with open_world(fal.origin, depth=depth) as world:
            await world.leave(lambda: queue.count("submit"))
            await world.left.wait()
            assert queue.asked == ["submit"]
            queue.open.set()
            await until(lambda: queue.asked == ["submit", "cancel 1"])

    async def test_leave_what_others_may_have(self, fal: FakeFal, queue: Queue, depth: int) -> None:
        queue.polls = 1000
        async with open_world(fal.origin, depth=depth) as world:
            await world.leave(lambda: queue.count("status"), kept=True)
            await world.left.wait()
        assert queue.count("cancel") == 0


@pytest.mark.parametrize("depth", [0, 1, 2], ids=["alone", "nested", "nested deeply"])
async def test_a_job_is_followed_after_the_answer(fal: FakeFal, queue: Queue, depth: int) -> None:
    queue.polls = 3
    ended: list[int] = []

    async def work(
        waiting: QueueClient, request: web.Request, background: Background
    ) -> web.StreamResponse:
        ticket = await waiting.submit(submit_call("fal-ai/flux/dev", b"{}", request.headers))
        assert isinstance(ticket, QueuedJob)

        async def follow() -> None:
            waiting.detach_from_request()
            ended.append((await waiting.wait_result(ticket)).status)

        background.spawn(follow())
        return web.json_response(ticket.request_id)

    async with open_world(fal.origin, work=work, depth=depth) as world:
        assert await world.ask() == (200, "1")
        assert ended == []
        await until(lambda: ended == [200])
