"""A fal that counts paid calls by their prompts, and can be slow or lose its responses."""

import asyncio
import hashlib
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from random import Random
from uuid import uuid4

from aiohttp import web

from tests.support.ports import free_port

PNG = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\1\0\0\0\1\0\x08\2\0\0\0"
FILE_MIN, FILE_MAX = 2_000, 60_000  # bytes
WORK_SECONDS = (0.02, 0.6)  # of a job, the shortest and the longest
LONG_WORK_SECONDS = 4.0
LONG_SHARE = 0.08  # of the jobs that take so long
LOST_SHARE = 0.4  # of responses to POSTs, while they are lost


def image_of(prompt: str) -> bytes:
    """Return the image that the model makes of a prompt: each prompt has its own."""
    digest = hashlib.sha256(prompt.encode()).digest()
    size = FILE_MIN + int.from_bytes(digest[:4], "big") % (FILE_MAX - FILE_MIN)
    return PNG + (digest * (size // len(digest)))


@dataclass(slots=True)
class Job:
    """A paid job. ends_at: by the clock of the event loop."""

    prompt: str
    ends_at: float


class CountingFal:
    """fal's direct calls, queue and files.

    paid: number of paid calls by prompt.
    jobs: the queued ones, by request id.
    delay: seconds by which each response is later.
    loses_responses: the connection ends in place of some responses to a POST, which was accepted.
    is_refusing: it responds as fal's ingress that has no backend.
    """

    def __init__(self, seed: int) -> None:
        self.origin = ""
        self.paid: Counter[str] = Counter()
        self.jobs: dict[str, Job] = {}
        self.delay = 0.0
        self.loses_responses = self.is_refusing = False
        self.lost: set[str] = set()  # prompts whose response was lost
        self._random = Random(seed)
        self._port = free_port()

    @asynccontextmanager
    async def running(self) -> AsyncIterator["CountingFal"]:
        runner = web.AppRunner(self._app(), access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", self._port).start()
        self.origin = f"http://127.0.0.1:{self._port}"
        try:
            yield self
        finally:
            await runner.cleanup()

    def _app(self) -> web.Application:
        app = web.Application(client_max_size=2**24)
        app.router.add_get("/files/{prompt:.*}", self._file)
        app.router.add_get("/{app:.*}/requests/{request_id}/status", self._status)
        app.router.add_get("/{app:.*}/requests/{request_id}", self._result)
        app.router.add_post("/{endpoint:.*}", self._accept)
        return app

    async def _file(self, request: web.Request) -> web.Response:
        return web.Response(body=image_of(request.match_info["prompt"]), content_type="image/png")

    async def _accept(self, request: web.Request) -> web.StreamResponse:
        prompt = str((await request.json())["prompt"])
        if self.is_refusing:
            return web.Response(status=503, text="<center>nginx</center>")
        self.paid[prompt] += 1
        request_id = str(uuid4())
        loop = asyncio.get_running_loop()
        seconds = self._random.uniform(*WORK_SECONDS)
        if self._random.random() < LONG_SHARE:
            seconds = LONG_WORK_SECONDS
        is_queued = request.host == "queue.fal.run"
        if is_queued:
            self.jobs[request_id] = Job(prompt, loop.time() + seconds)
        is_lost = self.loses_responses and self._random.random() < LOST_SHARE
        await asyncio.sleep(self.delay + (0.0 if is_queued else seconds))
        if is_lost and request.transport is not None:
            self.lost.add(prompt)
            request.transport.abort()
        if not is_queued:
            return self._respond(self._document(prompt), request_id)
        root = f"https://queue.fal.run/{request.match_info['endpoint']}/requests/{request_id}"
        return self._respond(
            {
                "status": "IN_QUEUE",
                "request_id": request_id,
                "queue_position": 0,
                "status_url": f"{root}/status",
                "response_url": root,
                "cancel_url": f"{root}/cancel",
            },
            request_id,
        )

    async def _status(self, request: web.Request) -> web.Response:
        await asyncio.sleep(self.delay)
        request_id = request.match_info["request_id"]
        job = self.jobs.get(request_id)
        if job is None:
            return web.json_response({"status": "NOT_FOUND"}, status=404)
        is_done = job.ends_at <= asyncio.get_running_loop().time()
        document = {"status": "COMPLETED" if is_done else "IN_PROGRESS", "request_id": request_id}
        return self._respond(document, request_id, 200 if is_done else 202)

    async def _result(self, request: web.Request) -> web.Response:
        await asyncio.sleep(self.delay)
        request_id = request.match_info["request_id"]
        job = self.jobs.get(request_id)
        if job is None:
            return web.json_response({"status": "NOT_FOUND"}, status=404)
        if job.ends_at > asyncio.get_running_loop().time():
            return self._respond({"detail": "Request is still in progress"}, request_id, 400)
        return self._respond(self._document(job.prompt), request_id)

    def _document(self, prompt: str) -> dict[str, object]:
        image = {"url": f"{self.origin}/files/{prompt}", "content_type": "image/png"}
        return {"images": [image], "prompt": prompt, "seed": 1}

    def _respond(
        self, document: Mapping[str, object], request_id: str, status: int = 200
    ) -> web.Response:
        headers = {"x-fal-request-id": request_id}
        return web.json_response(document, status=status, headers=headers)
