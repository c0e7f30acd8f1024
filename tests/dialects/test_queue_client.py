"""QueueClient: submits are not sent twice, jobs are polled, abandoned jobs are cancelled."""

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
from tests.support.waiting import wait_until

RESULT = {"images": [{"url": "https://a.example/b.png"}]}


@dataclass(slots=True)
class FakeQueue:
    """Handler that emulates fal's queue.

    failures: number of failed requests before the first success, by step.
    failure: status and headers of a failed request.
    polls: number of status polls until a job is completed.
    accepts: set while submits get a response.
    steps: the requests received, with the id of the job.
    result: status and document of a result.
    """

    failures: dict[str, int] = field(default_factory=dict)
    failure: tuple[int, dict[str, str]] = (429, {})
    polls: int = 1
    accepts: asyncio.Event = field(default_factory=asyncio.Event)
    steps: list[str] = field(default_factory=list)
    result: tuple[int, object] = (200, RESULT)
    _jobs: Iterator[int] = field(default_factory=lambda: iter(range(1, 100)))
    _polled: dict[str, int] = field(default_factory=dict)

    async def __call__(self, request: web.Request) -> web.StreamResponse:
        step, job = self._step(request)
        self.steps.append(f"{step} {job}".strip())
        if self.failures.get(step, 0) > 0:
            self.failures[step] -= 1
            status, headers = self.failure
            return web.json_response({"detail": "later"}, status=status, headers=headers)
        if step == "submit":
            await self.accepts.wait()
            return web.json_response({"request_id": f"{next(self._jobs)}", "status": "IN_QUEUE"})
        if step == "status":
            polled = self._polled[job] = self._polled.get(job, 0) + 1
            is_completed = polled >= self.polls
            return web.json_response({"status": "COMPLETED" if is_completed else "IN_PROGRESS"})
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
        return sum(each.split()[0] == step for each in self.steps)


@dataclass(frozen=True, slots=True)
class BlockingServer:
    """A server whose path submits calls and waits for their results.

    disconnected: set when a client has disconnected.
    """

    origin: str
    session: ClientSession
    disconnected: asyncio.Event

    async def post(self, count: int = 1, *, shared: bool = False) -> tuple[int, Any]:
        """Return status and document.

        count: number of calls.
        shared: the result cache may use the jobs for other requests.
        """
        url = f"{self.origin}/wait"
        async with self.session.post(url, json={"count": count, "shared": shared}) as response:
            return response.status, await response.json()

    async def disconnect_when(self, condition: Callable[[], object], **params: Any) -> None:
        """Send a request, and disconnect as soon as the condition holds."""
        posting = asyncio.ensure_future(self.post(**params))
        await wait_until(condition)
        posting.cancel()
        await asyncio.gather(posting, return_exceptions=True)


Work = Callable[[QueueClient, web.Request, Background], Awaitable[web.StreamResponse]]


@asynccontextmanager
async def open_server(
    origin: str,
    total: float = 5.0,
    wait: wait_base = wait_none(),  # noqa: B008 # it has no state
    work: Work | None = None,
    depth: int = 0,
) -> AsyncIterator[BlockingServer]:
    """Start a server.

    work: handles a request, instead of `submit_and_wait`.
    depth: number of applications around the one with the upstream.
    """
    background, disconnected = Background(), asyncio.Event()
    wait_policy = WaitPolicy(total=total, background=background, retry_wait=wait)

    async def serve(request: web.Request) -> web.StreamResponse:
        params = await request.json()

        async def handler(request: web.Request) -> web.StreamResponse:
            if params["shared"]:
                request[CACHE_OUTCOME] = "miss"
            return await forward(request)

        queue_client = QueueClient(request, handler, wait_policy)
        if work is not None:
            return await work(queue_client, request, background)
        calls = [
            submit_call("fal-ai/flux/dev", json.dumps({"index": index}).encode(), request.headers)
            for index in range(params["count"])
        ]
        try:
            responses = await queue_client.submit_and_wait(calls)
        except asyncio.CancelledError:
            disconnected.set()
            raise
        return web.json_response([[each.status, each.request_id] for each in responses])

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
        yield BlockingServer(f"http://127.0.0.1:{server.port}{prefix}", session, disconnected)


async def exchange_with(fal: FakeFal, head: bytes) -> bytes:
    """Send the bytes of a request, and return those of the response."""
    _, _, port = fal.origin.rpartition(":")
    reader, writer = await asyncio.open_connection("127.0.0.1", int(port))
    writer.write(head.replace(b"\r\n", b"\r\nConnection: close\r\n", 1))
    response = await reader.read()
    writer.close()
    return response


@pytest.fixture
def queue(fal: FakeFal) -> FakeQueue:
    fake_queue = FakeQueue()
    fake_queue.accepts.set()
    fal.respond = fake_queue
    return fake_queue


class TestSubmits:
    async def test_of_several_calls_are_all_sent_before_a_result_is_awaited(
        self, fal: FakeFal, queue: FakeQueue
    ) -> None:
        queue.polls = 2
        async with open_server(fal.origin) as server:
            status, responses = await server.post(3)
        assert (status, responses) == (200, [[200, "1"], [200, "2"], [200, "3"]])
        assert queue.steps[:3] == ["submit"] * 3
        assert queue.steps[3] == "status 1"
        assert [json.loads(seen.body) for seen in fal.seen[:3]] == [
            {"index": 0}, {"index": 1}, {"index": 2},
        ]  # fmt: skip

    async def test_that_fal_may_have_accepted_are_not_repeated(self, wire: WireFal) -> None:
        async def read_and_disconnect(
            reader: asyncio.StreamReader, writer: asyncio.StreamWriter
        ) -> None:
            heads.append(await read_head(reader))

        heads: list[bytes] = []
        wire.serve = read_and_disconnect
        async with open_server(wire.origin) as server:
            status, document = await server.post()
            assert (status, document["error"]["code"]) == (504, "upstream_broken")
            await asyncio.sleep(0.05)
        assert len(heads) == wire.connections == 1

    @pytest.mark.parametrize("status", [500, 502, 503, 504])
    async def test_that_fail_at_fal_are_not_repeated(
        self, fal: FakeFal, queue: FakeQueue, status: int
    ) -> None:
        queue.failures, queue.failure = {"submit": 1}, (status, {})
        async with open_server(fal.origin) as server:
            assert await server.post() == (200, [[status, None]])
        assert queue.steps == ["submit"]

    async def test_over_the_concurrency_limit_are_repeated(
        self, fal: FakeFal, queue: FakeQueue
    ) -> None:
        queue.failures = {"submit": 2}
        async with open_server(fal.origin) as server:
            assert await server.post() == (200, [[200, "1"]])
        assert queue.count("submit") == 3
        assert len({seen.body for seen in fal.seen[:3]}) == 1

    async def test_fail_after_three_attempts(self, fal: FakeFal, queue: FakeQueue) -> None:
        queue.failures = {"submit": 9}
        async with open_server(fal.origin) as server:
            assert await server.post() == (200, [[429, None]])
        assert queue.steps == ["submit"] * 3

    async def test_that_were_not_sent_are_attempted_three_times(
        self, unused_tcp_port: int, caplog: pytest.LogCaptureFixture
    ) -> None:
        async with open_server(f"http://127.0.0.1:{unused_tcp_port}") as server:
            status, document = await server.post()
        assert (status, document["error"]["code"]) == (502, "upstream_unreachable")
        assert caplog.text.count("No response from queue.fal.run") == 3

    async def test_are_repeated_until_fal_is_reachable(
        self, fal: FakeFal, queue: FakeQueue, unused_tcp_port: int, caplog: pytest.LogCaptureFixture
    ) -> None:
        async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(await exchange_with(fal, await read_head(reader)))
            writer.close()

        origin = f"http://127.0.0.1:{unused_tcp_port}"
        async with open_server(origin, wait=wait_fixed(0.3)) as server:
            posting = asyncio.ensure_future(server.post())
            await wait_until(lambda: "No response from queue.fal.run" in caplog.text)
            relay_server = await asyncio.start_server(relay, "127.0.0.1", unused_tcp_port)
            assert await posting == (200, [[200, "1"]])
            relay_server.close()
        assert queue.steps == ["submit", "status 1", "result 1"]

    async def test_are_cancelled_if_a_later_one_is_refused(
        self, fal: FakeFal, queue: FakeQueue
    ) -> None:
        async def second_fails(request: web.Request) -> web.StreamResponse:
            if queue.count("submit") == 1 and request.method == "POST":
                queue.steps.append("submit")
                return web.json_response({"detail": "locked"}, status=403)
            return await queue(request)

        fal.respond = second_fails
        async with open_server(fal.origin) as server:
            assert await server.post(3) == (200, [[403, None]])
            await wait_until(lambda: queue.count("cancel"))
        assert queue.steps == ["submit", "submit", "cancel 1"]


class TestJobs:
    @pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
    @pytest.mark.parametrize("times", [1, 4])
    async def test_are_polled_on_after_a_failed_poll(
        self, fal: FakeFal, queue: FakeQueue, status: int, times: int
    ) -> None:
        queue.failures, queue.failure = {"status": times}, (status, {})
        async with open_server(fal.origin) as server:
            assert await server.post() == (200, [[200, "1"]])
        assert queue.count("status") == times + 1
        assert (queue.count("submit"), queue.count("result")) == (1, 1)

    @pytest.mark.parametrize("status", [401, 403, 404])
    async def test_whose_status_is_denied_get_the_response_to_the_result(
        self, fal: FakeFal, queue: FakeQueue, status: int
    ) -> None:
        headers = {"x-fal-request-id": "1"}
        queue.failures, queue.failure = {"status": 1, "result": 1}, (status, headers)
        async with open_server(fal.origin) as server:
            assert await server.post() == (200, [[status, "1"]])

    async def test_have_results_whose_fetch_is_repeated(
        self, fal: FakeFal, queue: FakeQueue
    ) -> None:
        queue.failures, queue.failure = {"result": 2}, (502, {})
        async with open_server(fal.origin) as server:
            assert await server.post() == (200, [[200, "1"]])
        assert queue.count("result") == 3

    async def test_that_failed_at_fal_are_not_fetched_again(
        self, fal: FakeFal, queue: FakeQueue
    ) -> None:
        queue.failures, queue.failure = {"result": 1}, (503, {"x-fal-request-id": "1"})
        async with open_server(fal.origin) as server:
            assert await server.post() == (200, [[503, "1"]])
        assert queue.count("result") == 1

    async def test_are_cancelled_if_another_one_fails(self, fal: FakeFal, queue: FakeQueue) -> None:
        queue.result = 422, {"detail": []}
        async with open_server(fal.origin) as server:
            assert await server.post(3) == (200, [[422, "1"]])
            await wait_until(lambda: queue.count("cancel") == 2)
        assert queue.steps[-2:] == ["cancel 2", "cancel 3"]

    async def test_that_take_too_long_are_cancelled(self, fal: FakeFal, queue: FakeQueue) -> None:
        queue.polls = 1000
        async with open_server(fal.origin, total=0.2) as server:
            status, document = await server.post(2)
            assert (status, document["error"]["code"]) == (504, "upstream_timeout")
            assert document["error"]["message"] == "fal.ai timed out after 0.2 s."
            await wait_until(lambda: queue.count("cancel") == 2)

    async def test_that_are_shared_go_on(self, fal: FakeFal, queue: FakeQueue) -> None:
        queue.polls = 1000
        async with open_server(fal.origin, total=0.2) as server:
            status, _ = await server.post(shared=True)
        assert (status, queue.count("cancel")) == (504, 0)


@pytest.mark.parametrize("depth", [0, 1, 2], ids=["alone", "nested", "nested deeply"])
class TestDisconnectedClients:
    async def test_have_their_jobs_cancelled(
        self, fal: FakeFal, queue: FakeQueue, depth: int
    ) -> None:
        queue.polls = 1000
        async with open_server(fal.origin, depth=depth) as server:
            await server.disconnect_when(lambda: queue.count("status"), count=2)
            await wait_until(lambda: queue.count("cancel") == 2)

    async def test_have_a_job_cancelled_whose_submit_is_in_progress(
        self, fal: FakeFal, queue: FakeQueue, depth: int
    ) -> None:
        queue.accepts.clear()
        async with open_server(fal.origin, depth=depth) as server:
            await server.disconnect_when(lambda: queue.count("submit"))
            await server.disconnected.wait()
            assert queue.steps == ["submit"]
            queue.accepts.set()
            await wait_until(lambda: queue.steps == ["submit", "cancel 1"])

    async def test_do_not_end_shared_jobs(self, fal: FakeFal, queue: FakeQueue, depth: int) -> None:
        queue.polls = 1000
        async with open_server(fal.origin, depth=depth) as server:
            await server.disconnect_when(lambda: queue.count("status"), shared=True)
            await server.disconnected.wait()
        assert queue.count("cancel") == 0


@pytest.mark.parametrize("depth", [0, 1, 2], ids=["alone", "nested", "nested deeply"])
async def test_a_job_is_polled_on_after_the_response(
    fal: FakeFal, queue: FakeQueue, depth: int
) -> None:
    queue.polls = 3
    statuses: list[int] = []

    async def work(
        queue_client: QueueClient, request: web.Request, background: Background
    ) -> web.StreamResponse:
        job = await queue_client.submit(submit_call("fal-ai/flux/dev", b"{}", request.headers))
        assert isinstance(job, QueuedJob)

        async def follow() -> None:
            queue_client.detach_from_request()
            statuses.append((await queue_client.wait_result(job)).status)

        background.spawn(follow())
        return web.json_response(job.request_id)

    async with open_server(fal.origin, work=work, depth=depth) as server:
        assert await server.post() == (200, "1")
        assert statuses == []
        await wait_until(lambda: statuses == [200])
