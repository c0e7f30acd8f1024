"""A fake of fal that runs jobs, and calls through the proxy's result cache."""

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
SOON = 5.0  # seconds in which whatever is waited for has happened
# RFC 9211: one member, its name a token, parameters of the kinds that the RFC gives them.
CACHE_STATUS = re.compile(
    r"falproxy(?P<params>(?:; (?:hit|stored|collapsed|ttl=-?\d+|detail=[a-z][a-z_-]*"
    r"|fwd=(?:bypass|method|uri-miss|vary-miss|miss|request|stale|partial)))+)"
)


def picture(number: int) -> web.Response:
    """A model's answer, no two alike, in a layout that nobody would write again by chance."""
    url = f"https://v3.fal.media/files/b/{number}/out.jpg"
    document = {"images": [{"url": url}], "seed": number, "has_nsfw_concepts": [False]}
    return web.json_response(text=json.dumps(document, indent=3))


@dataclass(slots=True)
class Job:
    """A request in the played queue. over: it has ended."""

    number: int
    over: asyncio.Event
    is_cancelled: bool = False


class PlayedFal:
    """fal's direct calls and its queue, before a fake that notes what it is asked.

    output: how the model answers the nth call that is paid. refusal: what every POST is answered
    with, before it is taken. asked, paid, jobs, cancels: what happened.
    """

    def __init__(self, fake: FakeFal) -> None:
        self.fake = fake
        self.output: Callable[[int], web.Response] = picture
        self.refusal: Callable[[], web.Response] | None = None
        self.jobs: dict[str, Job] = {}
        self.cancels: list[str] = []
        self.posts = self.paid = self.left = 0
        self.taking = asyncio.Event()
        self.taking.set()
        self._held: list[asyncio.Event] | None = None
        fake.answer = self.answer

    def hold(self) -> None:
        """From now on what is paid does not end."""
        self._held = []

    def release(self) -> None:
        for over in self._held or ():
            over.set()
        self._held = None

    @property
    def keys(self) -> list[str | None]:
        return [seen.header("authorization") for seen in self.fake.seen]

    async def answer(self, request: web.Request) -> web.StreamResponse:
        if request.method == "POST":
            return await self._take(request)
        words = request.path.strip("/").split("/")
        at = words.index("requests")
        job = self.jobs.get(words[at + 1])
        if job is None:
            return web.json_response({"status": "NOT_FOUND"}, status=404)
        return await self._tell(request, words[at + 1], job, "/".join(words[at + 2 :]))

    async def _take(self, request: web.Request) -> web.StreamResponse:
        self.posts += 1
        await self.taking.wait()
        if self.refusal is not None:
            return self.refusal()
        self.paid += 1
        job = Job(self.paid, asyncio.Event())
        if self._held is None:
            job.over.set()
        else:
            self._held.append(job.over)
        request_id = str(uuid4())
        if request.host == "queue.fal.run":
            self.jobs[request_id] = job
            document = {"status": "IN_QUEUE", "request_id": request_id, "queue_position": 0}
            return said(document | urls(request_id), request_id)
        try:
            await job.over.wait()
        except asyncio.CancelledError:
            self.left += 1
            raise
        return self._output(job, request_id)

    async def _tell(
        self, request: web.Request, request_id: str, job: Job, verb: str
    ) -> web.StreamResponse:
        if verb == "cancel":
            is_put = request.method == "PUT"
            return self._cancel(request_id, job) if is_put else web.Response(status=405)
        if verb == "status":
            document = self._status(request, request_id, job)
            return said(document, request_id, 200 if job.over.is_set() else 202)
        if verb == "status/stream":
            return await self._stream(request, request_id, job)
        if not job.over.is_set():
            return said({"detail": "Request is still in progress"}, request_id, 400)
        return self._output(job, request_id)

    def _cancel(self, request_id: str, job: Job) -> web.Response:
        self.cancels.append(request_id)
        if job.over.is_set():
            return said({"status": "ALREADY_COMPLETED"}, request_id, 400)
        job.is_cancelled = True
        job.over.set()
        return said({"status": "CANCELLATION_REQUESTED"}, request_id, 202)

    def _status(self, request: web.Request, request_id: str, job: Job) -> dict[str, object]:
        logs = [{"message": "50%", "timestamp": "now"}] if "logs" in request.query else None
        document: dict[str, object] = {"request_id": request_id, "logs": logs, **urls(request_id)}
        if not job.over.is_set():
            return document | {"status": "IN_PROGRESS"}
        document |= {"status": "COMPLETED", "metrics": {"inference_time": 0.1}}
        if self._output(job, request_id).status != 200:
            document |= {"error": "it failed", "error_type": "client_cancelled"}
        return document

    async def _stream(self, request: web.Request, request_id: str, job: Job) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        is_last = False
        while not is_last:
            is_last = job.over.is_set()
            document = json.dumps(self._status(request, request_id, job)).encode()
            await response.write(b"data: " + document + b"\n\n")
            await job.over.wait()
        return response

    def _output(self, job: Job, request_id: str) -> web.Response:
        response = self.output(job.number)
        if job.is_cancelled:
            document = {"detail": "Request was cancelled.", "error_type": "client_cancelled"}
            response = web.json_response(document, status=499)
        response.headers["x-fal-request-id"] = request_id
        return response


def said(document: dict[str, object], request_id: str, status: int = 200) -> web.Response:
    return web.json_response(document, status=status, headers={"x-fal-request-id": request_id})


def urls(request_id: str) -> dict[str, object]:
    root = f"https://queue.fal.run/{APP}/requests/{request_id}"
    return {"status_url": f"{root}/status", "response_url": root, "cancel_url": f"{root}/cancel"}


async def run(gateway: Gateway, body: object = CAT, **headers: str) -> ClientResponse:
    """A direct call that has ended."""
    return await send(gateway, RUN, body, **headers)


async def submit(gateway: Gateway, body: object = CAT, **headers: str) -> ClientResponse:
    return await send(gateway, SUBMIT, body, **headers)


async def send(gateway: Gateway, target: str, body: object, **headers: str) -> ClientResponse:
    named = [(name.replace("_", "-"), value) for name, value in headers.items()]
    async with asyncio.timeout(SOON):
        response = await gateway.call(target, json=body, headers=named)
        await response.read()
    return response


async def ask(
    gateway: Gateway, request_id: str, verb: str = "", method: str = "GET", **headers: str
) -> ClientResponse:
    """What is said of a request: nothing for its result, `/status`, `/cancel` and so on."""
    target = f"https://queue.fal.run/{APP}/requests/{request_id}{verb}"
    async with asyncio.timeout(SOON):
        response = await gateway.call(target, method, headers=list(headers.items()))
        await response.read()
    return response


async def id_of(response: ClientResponse) -> str:
    assert response.status == 200, await response.text()
    return str((await response.json())["request_id"])


async def events(response: ClientResponse) -> list[dict[str, Any]]:
    assert response.content_type == "text/event-stream"
    lines = (await response.text()).split("\n\n")
    return [json.loads(line.removeprefix("data: ")) for line in lines if line]


async def outcome(gateway: Gateway, response: ClientResponse, **headers: str) -> ClientResponse:
    """A submit's result, fetched as fal's clients do it when its status stream has ended."""
    request_id = await id_of(response)
    told = await events(await ask(gateway, request_id, "/status/stream", **headers))
    assert told[-1]["status"] == "COMPLETED"
    assert {event["request_id"] for event in told} == {request_id}
    return await ask(gateway, request_id, **headers)


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(SOON):
        while not condition():
            await asyncio.sleep(0.005)


def cache_status(response: ClientResponse) -> dict[str, str]:
    """The parameters of the answer's one Cache-Status; those that are only there are empty."""
    lines = response.headers.getall("Cache-Status", [])
    assert len(lines) == 1, lines
    match = CACHE_STATUS.fullmatch(lines[0])
    assert match is not None, lines[0]
    params = [param.partition("=") for param in match["params"][2:].split("; ")]
    found = {name: value for name, _, value in params}
    assert len(found) == len(params)
    # A cache either answers by itself or goes forward, and `stored` and `collapsed` are of the
    # latter (RFC 9211 §2).
    assert ("hit" in found) != ("fwd" in found) or found == {"detail": "not-cached"}
    assert "hit" not in found or not found.keys() & {"stored", "collapsed"}
    return found


def is_hit(response: ClientResponse) -> bool:
    """Whether it was kept, which it then says in all of its headers."""
    found = cache_status(response)
    assert ("hit" in found) == ("Age" in response.headers)
    if "hit" in found:
        assert 3590 <= int(found["ttl"]) <= 3600
        assert 0 <= int(response.headers["Age"]) <= 10
    return "hit" in found


def version_of(request_id: str) -> int | None:
    return UUID(request_id).version


async def until_kept(gateway: Gateway) -> None:
    """Until a result of CAT is kept: the proxy follows a job by itself, a moment behind."""

    async def is_kept() -> bool:
        return (await run(gateway, CAT, Cache_Control="only-if-cached")).status == 200

    async with asyncio.timeout(SOON):
        while not await is_kept():
            await asyncio.sleep(0.005)


def upload_to(sandbox: Any, content: bytes, name: str) -> str:
    key = sandbox.files.new_key(name)
    sandbox.files.put(key, io.BytesIO(content), "image/png")
    return str(sandbox.file_url(key))


def document(status: int = 200, **output: object) -> Callable[[int], web.Response]:
    return lambda number: web.json_response({"seed": number} | output, status=status)
