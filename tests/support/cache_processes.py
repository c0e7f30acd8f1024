"""Processes of falproxy that share a result cache."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aiohttp import ClientSession, TCPConnector, web
from aiohttp.pytest_plugin import AiohttpServer
from aiohttp.typedefs import Handler
from multidict import CIMultiDictProxy

from falproxy.sandbox import Sandbox, create_app
from tests.support.cli_process import CliProcess, start_command
from tests.support.key_search import leak_trace
from tests.support.urls import PROXY
from tests.support.waiting import wait_until

APP = "fal-ai/flux-pro"
POLL_INTERVAL = 0.05  # seconds between two polls of one client


class Fal:
    """A sandbox on loopback.

    accepted: ids of the accepted jobs.
    submitted: set at the response to a submit or a direct call.
    delivered: set at the response with the result of a job.
    posts: number of POSTs so far.
    may_respond: a POST waits while it is not set.
    loses_responses: the connection ends in place of each response to a POST.
    """

    def __init__(self, speed: float = 100.0) -> None:
        self.sandbox = Sandbox(speed=speed)
        self.origin = ""
        self.accepted: list[str] = []
        self.submitted, self.delivered = asyncio.Event(), asyncio.Event()
        self.posts = 0
        self.may_respond = asyncio.Event()
        self.may_respond.set()
        self.loses_responses = False

    @web.middleware
    async def hold_posts(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.method == "POST":
            self.posts += 1
            await self.may_respond.wait()
        return await handler(request)

    async def on_response(self, request: web.Request, response: web.StreamResponse) -> None:
        if self.loses_responses and request.method == "POST" and request.transport is not None:
            request.transport.abort()
        if response.status != 200:
            return
        if request.method == "POST":
            self.submitted.set()
            if request.host == "queue.fal.run":
                self.accepted.append(response.headers["x-fal-request-id"])
        elif not request.path.endswith(("/status", "/status/stream")):
            self.delivered.set()

    def jobs(self, prompt: str) -> set[str]:
        """The ids of the jobs that were accepted with this prompt."""
        jobs = ((request_id, self.sandbox.queue.get(request_id)) for request_id in self.accepted)
        return {request_id for request_id, job in jobs if job and job.prompt == prompt}

    def paid(self, prompt: str) -> int:
        inputs = (paid.input for paid in self.sandbox.paid)
        return sum(isinstance(value, dict) and value["prompt"] == prompt for value in inputs)

    @property
    def is_idle(self) -> bool:
        jobs = (self.sandbox.queue.get(request_id) for request_id in self.accepted)
        return all(job is None or job.response is not None for job in jobs)


@dataclass(frozen=True, slots=True)
class ProxyResponse:
    status: int
    document: Any
    headers: CIMultiDictProxy[str]

    @property
    def is_hit(self) -> bool:
        return "hit" in self.headers.get("Cache-Status", "")


async def call(
    session: ClientSession, origin: str, target: str, body: object = None, method: str = ""
) -> ProxyResponse:
    """Make a call through the header route of a proxy: a POST if there is a body."""
    method = method or ("GET" if body is None else "POST")
    headers = {"x-fal-target-url": target}
    async with session.request(method, origin + PROXY, json=body, headers=headers) as response:
        return ProxyResponse(response.status, await response.json(), response.headers)


class RequestFailed(Exception):
    """A request ended with an error. The argument is its type."""


def request_url(request_id: str, app: str = APP) -> str:
    return f"https://queue.fal.run/{app}/requests/{request_id}"


async def image_document(
    session: ClientSession, origin: str, request_id: str, app: str = APP
) -> Any:
    """Return the result of a submitted request, by polling."""
    root = request_url(request_id, app)
    while True:
        status = await call(session, origin, f"{root}/status")
        if status.status != 503:
            assert status.status in (200, 202), status
            assert status.document["request_id"] == request_id
            if status.document["status"] == "COMPLETED":
                break
        await asyncio.sleep(POLL_INTERVAL)
    if "error" in status.document:
        raise RequestFailed(status.document["error_type"])
    result = await call(session, origin, root)
    assert result.status == 200, result
    return result.document


@asynccontextmanager
async def serving(code: str | None = None, **env: str) -> AsyncIterator[CliProcess]:
    """Context: a process of `falproxy serve`. code: Python that runs in place of the package."""
    arguments = ("serve", "--port", "0")
    process = await start_command(*arguments, code=code, CWD=env["FALPROXY_DATA_DIR"], **env)
    served = CliProcess(process)
    reading = asyncio.ensure_future(served.read_log())
    try:
        await wait_until(lambda: served.origin != "" or process.returncode is not None, seconds=20)
        assert process.returncode is None, served.log
        yield served
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        await served.end_reading(reading)


async def open_fal(make_server: AiohttpServer) -> Fal:
    fal = Fal()
    app = create_app(fal.sandbox)
    app.on_response_prepare.append(fal.on_response)
    app.middlewares.append(fal.hold_posts)
    server = await make_server(app)
    fal.origin = fal.sandbox.public_url = f"http://127.0.0.1:{server.port}"
    return fal


def open_client() -> ClientSession:
    """Open a session without a limit of connections."""
    return ClientSession(connector=TCPConnector(limit=0), trace_configs=[leak_trace()])


def folder(parent: Path, name: str) -> str:
    path = parent / name
    path.mkdir()
    return str(path)
