"""A fake of fal's queue and direct calls that counts paid calls, and calls through the proxy."""

import asyncio
import io
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from uuid import UUID, uuid4

from aiohttp import ClientResponse, web

from tests.support.fake_fal import FakeFal
from tests.support.gateway import Gateway

KONTEXT = "fal-ai/flux-pro/kontext"
APP = "fal-ai/flux-pro"
RUN = f"https://fal.run/{KONTEXT}"
SUBMIT = f"https://queue.fal.run/{KONTEXT}"
CAT = {"prompt": "a cat"}
DOG = {"prompt": "a dog"}

# RFC 9211: one member with a token as its name, and the parameters of the RFC.
CACHE_STATUS = re.compile(
    r"falproxy(?P<params>(?:; (?:hit|stored|collapsed|ttl=-?\d+|detail=[a-z][a-z_-]*"
    r"|fwd=(?:bypass|method|uri-miss|vary-miss|miss|request|stale|partial)))+)"
)


def image_result(number: int) -> web.Response:
    """Return the nth response of the model, with a layout that no serializer would reproduce."""
    url = f"https://v3.fal.media/files/b/{number}/out.jpg"
    document = {"images": [{"url": url}], "seed": number, "has_nsfw_concepts": [False]}
    return web.json_response(text=json.dumps(document, indent=3))


@dataclass(slots=True)
class FakeJob:
    """A request in the queue. done: set when it has ended."""

    number: int
    done: asyncio.Event
    is_cancelled: bool = False


class FakeQueue:
    """fal's direct calls and its queue, on top of a fake that records requests.

    output: the response of the model to the nth paid call.
    refusal: the response to each POST in place of a paid call.
    accepting: a POST waits while it is not set.
    posts, paid, disconnects: counts of POSTs, paid calls, and direct calls whose client left.
    jobs: the requests in the queue, by id.
    cancels: ids of the cancelled requests.
    """

    def __init__(self, fake: FakeFal) -> None:
        self.fake = fake
        self.output: Callable[[int], web.Response] = image_result
        self.refusal: Callable[[], web.Response] | None = None
        self.jobs: dict[str, FakeJob] = {}
        self.cancels: list[str] = []
        self.posts = self.paid = self.disconnects = 0
        self.accepting = asyncio.Event()
        self.accepting.set()
        self._held: list[asyncio.Event] | None = None
        fake.respond = self.respond

    def hold(self) -> None:
        """Let no further paid call end until `release`."""
        self._held = []

    def release(self) -> None:
        for done in self._held or ():
            done.set()
        self._held = None

    @property
    def keys(self) -> list[str | None]:
        return [seen.header("authorization") for seen in self.fake.seen]

    async def respond(self, request: web.Request) -> web.StreamResponse:
        if request.method == "POST":
            return await self._accept(request)
        if request.path == "/v1/models/pricing":
            return web.json_response({"error": {"type": "not_found"}}, status=404)
        parts = request.path.strip("/").split("/")
        at = parts.index("requests")
        job = self.jobs.get(parts[at + 1])
        if job is None:
            return web.json_response({"status": "NOT_FOUND"}, status=404)
        return await self._respond(request, parts[at + 1], job, "/".join(parts[at + 2 :]))

    async def _accept(self, request: web.Request) -> web.StreamResponse:
        self.posts += 1
        await self.accepting.wait()
        if self.refusal is not None:
            return self.refusal()
        self.paid += 1
        job = FakeJob(self.paid, asyncio.Event())
        if self._held is None:
            job.done.set()
        else:
            self._held.append(job.done)
        request_id = str(uuid4())
        if request.host == "queue.fal.run":
            self.jobs[request_id] = job
            document = {"status": "IN_QUEUE", "request_id": request_id, "queue_position": 0}
            return fal_response(document | queue_urls(request_id), request_id)
        try:
            await job.done.wait()
        except asyncio.CancelledError:
            self.disconnects += 1
            raise
        return self._output(job, request_id)

    async def _respond(
        self, request: web.Request, request_id: str, job: FakeJob, suffix: str
    ) -> web.StreamResponse:
        if suffix == "cancel":
            is_put = request.method == "PUT"
            return self._cancel(request_id, job) if is_put else web.Response(status=405)
        if suffix == "status":
            document = self._status(request, request_id, job)
            return fal_response(document, request_id, 200 if job.done.is_set() else 202)
        if suffix == "status/stream":
            return await self._stream(request, request_id, job)
        if not job.done.is_set():
            return fal_response({"detail": "Request is still in progress"}, request_id, 400)
        return self._output(job, request_id)

    def _cancel(self, request_id: str, job: FakeJob) -> web.Response:
        self.cancels.append(request_id)
        if job.done.is_set():
            return fal_response({"status": "ALREADY_COMPLETED"}, request_id, 400)
        job.is_cancelled = True
        job.done.set()
        return fal_response({"status": "CANCELLATION_REQUESTED"}, request_id, 202)

    def _status(self, request: web.Request, request_id: str, job: FakeJob) -> dict[str, object]:
        logs = [{"message": "50%", "timestamp": "now"}] if "logs" in request.query else None
        document: dict[str, object] = {
            "request_id": request_id,
            "logs": logs,
            **queue_urls(request_id),
        }
        if not job.done.is_set():
            return document | {"status": "IN_PROGRESS"}
        document |= {"status": "COMPLETED", "metrics": {"inference_time": 0.1}}
        if self._output(job, request_id).status != 200:
            document |= {"error": "it failed", "error_type": "client_cancelled"}
        return document

    async def _stream(
        self, request: web.Request, request_id: str, job: FakeJob
    ) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        is_last = False
        while not is_last:
            is_last = job.done.is_set()
            document = json.dumps(self._status(request, request_id, job)).encode()
            await response.write(b"data: " + document + b"\n\n")
            await job.done.wait()
        return response

    def _output(self, job: FakeJob, request_id: str) -> web.Response:
        response = self.output(job.number)
        if job.is_cancelled:
            document = {"detail": "Request was cancelled.", "error_type": "client_cancelled"}
            response = web.json_response(document, status=499)
        response.headers["x-fal-request-id"] = request_id
        return response


def fal_response(document: dict[str, object], request_id: str, status: int = 200) -> web.Response:
    return web.json_response(document, status=status, headers={"x-fal-request-id": request_id})


def queue_urls(request_id: str) -> dict[str, object]:
    root = f"https://queue.fal.run/{APP}/requests/{request_id}"
    return {"status_url": f"{root}/status", "response_url": root, "cancel_url": f"{root}/cancel"}


async def run(gateway: Gateway, body: object = CAT, **headers: str) -> ClientResponse:
    """Make a direct call, and wait for its response."""
    return await send(gateway, RUN, body, **headers)


async def submit(gateway: Gateway, body: object = CAT, **headers: str) -> ClientResponse:
    return await send(gateway, SUBMIT, body, **headers)


async def send(gateway: Gateway, target: str, body: object, **headers: str) -> ClientResponse:
    fields = [(name.replace("_", "-"), value) for name, value in headers.items()]
    async with asyncio.timeout(30):
        response = await gateway.call(target, json=body, headers=fields)
        await response.read()
    return response


async def request_about(
    gateway: Gateway, request_id: str, suffix: str = "", method: str = "GET", **headers: str
) -> ClientResponse:
    """Send a request about a queued request.

    suffix: empty for the result, `/status`, `/cancel` and so on.
    """
    target = f"https://queue.fal.run/{APP}/requests/{request_id}{suffix}"
    async with asyncio.timeout(30):
        response = await gateway.call(target, method, headers=list(headers.items()))
        await response.read()
    return response


async def submitted_id(response: ClientResponse) -> str:
    assert response.status == 200, await response.text()
    return str((await response.json())["request_id"])


async def read_events(response: ClientResponse) -> list[dict[str, Any]]:
    assert response.content_type == "text/event-stream"
    lines = (await response.text()).split("\n\n")
    return [json.loads(line.removeprefix("data: ")) for line in lines if line]


async def wait_result(gateway: Gateway, response: ClientResponse, **headers: str) -> ClientResponse:
    """Return the result of a submit after the end of its status stream, as fal's clients do."""
    request_id = await submitted_id(response)
    statuses = await read_events(
        await request_about(gateway, request_id, "/status/stream", **headers)
    )
    assert statuses[-1]["status"] == "COMPLETED"
    assert {event["request_id"] for event in statuses} == {request_id}
    return await request_about(gateway, request_id, **headers)


def cache_status(response: ClientResponse) -> dict[str, str]:
    """Return the parameters of the only Cache-Status header; those without a value are empty."""
    lines = response.headers.getall("Cache-Status", [])
    assert len(lines) == 1, lines
    match = CACHE_STATUS.fullmatch(lines[0])
    assert match is not None, lines[0]
    fields = [field.partition("=") for field in match["params"][2:].split("; ")]
    params = {name: value for name, _, value in fields}
    assert len(params) == len(fields)
    # A cache either responds itself or forwards; `stored` and `collapsed` belong to the latter
    # (RFC 9211 §2).
    assert ("hit" in params) != ("fwd" in params) or params == {"detail": "not-cached"}
    assert "hit" not in params or not params.keys() & {"stored", "collapsed"}
    return params


def is_hit(response: ClientResponse) -> bool:
    """Return whether it is a cached result, after a check of all headers of one."""
    params = cache_status(response)
    assert ("hit" in params) == ("Age" in response.headers)
    if "hit" in params:
        assert 3590 <= int(params["ttl"]) <= 3600
        assert 0 <= int(response.headers["Age"]) <= 10
    return "hit" in params


def uuid_version(request_id: str) -> int | None:
    return UUID(request_id).version


async def wait_until_cached(gateway: Gateway) -> None:
    """Wait until the result of CAT is cached: the proxy awaits a job in the background."""

    async def is_cached() -> bool:
        return (await run(gateway, CAT, Cache_Control="only-if-cached")).status == 200

    async with asyncio.timeout(30):
        while not await is_cached():
            await asyncio.sleep(0.005)


def upload_to(sandbox: Any, content: bytes, name: str) -> str:
    key = sandbox.files.new_key(name)
    sandbox.files.put(key, io.BytesIO(content), "image/png")
    return str(sandbox.file_url(key))
