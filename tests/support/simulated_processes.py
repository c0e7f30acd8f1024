"""Processes of the proxy that share a store, simulated in one event loop, and a fal that counts."""

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, TypeVar
from uuid import uuid4

from aiohttp import web
from multidict import CIMultiDict, CIMultiDictProxy

from falproxy.errors import ProxyError
from falproxy.fal.keys import KeyPool
from falproxy.fal.target import Operation, Target
from falproxy.middleware.cache_policy import CachePolicy
from falproxy.middleware.caching import CachedCall
from falproxy.middleware.image_inputs import InspectedInput
from falproxy.middleware.virtual_requests import serve_virtual_requests
from falproxy.proxy.call import CALL, Call
from falproxy.proxy.forward import RelayedResponse
from falproxy.proxy.local_responses import LocalDocument
from falproxy.proxy.upstream import UPSTREAM, UpstreamUnreachable, connection_lost, timed_out
from falproxy.stores.cache import (
    AcquireRequest,
    CachedResult,
    CacheStore,
    Job,
    Lookup,
    SharedOutcome,
    StoreContent,
    StoreError,
    VirtualRequest,
)
from falproxy.stores.cache.eligibility import CacheEligibility
from falproxy.stores.cache.result_cache import ResultCache

APP = "fal-ai/flux-pro"
ENDPOINT = f"{APP}/kontext"
HTML = b"<html><center><h1>502 Bad Gateway</h1></center><hr><center>nginx</center></html>"
ELIGIBILITY = CacheEligibility(["**"])
KEYS = KeyPool(["key"], lambda: 0.0)
# Longer than the virtual time of all schedules.
POLICY = CachePolicy(ttl=1e7, max_entry=2**20, is_private=False, upstream="fal")
# The headers by which clients decide whether they repeat a call.
RETRY_HEADERS = (
    "retry-after",
    "x-fal-request-timeout-type",
    "x-fal-retryable",
    "x-fal-needs-retry",
)

T = TypeVar("T")
ClientEnding = tuple[int, tuple[str | None, ...]]


@dataclass(slots=True)
class Response:
    """A complete `TransportResponse`."""

    method: str
    status: int
    body: bytes
    headers: CIMultiDictProxy[str]
    reason: str = ""
    is_consumed: bool = False

    @property
    def raw_headers(self) -> tuple[tuple[bytes, bytes], ...]:
        return tuple((name.encode(), value.encode()) for name, value in self.headers.items())

    @property
    def is_complete(self) -> bool:
        return True

    async def read(self) -> bytes:
        body, self.body, self.is_consumed = self.body, b"", True
        return body

    def drop_headers(self) -> None: ...

    def close(self) -> None:
        self.is_consumed = True


def response(
    method: str, status: int, body: object, headers: Mapping[str, str] | None = None
) -> Response:
    is_html = isinstance(body, bytes)
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    content_type = "text/html" if is_html else "application/json"
    fields = CIMultiDict({"Content-Type": content_type, **(headers or {})})
    return Response(method, status, content, CIMultiDictProxy(fields))


# How fal ends a call: status, body, and headers; `request id` adds fal's request id.
Ending = tuple[int, object, dict[str, str]]
ENDINGS: dict[str, Ending] = {
    "result": (200, {"images": [{"url": "https://v3.fal.media/a.png"}]}, {}),
    "flagged": (200, {"images": [], "has_nsfw_concepts": [True]}, {}),
    "422": (422, {"detail": [{"msg": "no", "type": "value_error"}]}, {"X-Fal-Retryable": "false"}),
    "429": (429, {"detail": "slow down"}, {"Retry-After": "7"}),
    "500": (500, {"detail": "it failed"}, {"X-Fal-Needs-Retry": "0"}),
    "504": (504, {"detail": "late"}, {"X-Fal-Request-Timeout-Type": "user"}),
    "404": (404, {"detail": "The model has no such file."}, {}),
}
HAS_NO_RESPONSE: dict[str, Callable[[], ProxyError]] = {
    "lost": lambda: connection_lost(is_repeatable=False),
    "timeout": lambda: timed_out(is_repeatable=False),
    "unreachable": UpstreamUnreachable,
}
FATES = (
    *("result", "result", "lost", "timeout", "unreachable", "gateway"),
    *("422", "429", "500", "504", "404", "flagged"),
)
JOB_FATES = ("job 422", "job 429", "job 500", "job 404", "job flagged")


@dataclass(slots=True, eq=False)
class Send:
    """A POST that reached fal.

    call: the client's call that caused it.
    ended_at: time at which the proxy knew the end: of the job, or of the call without one.
    """

    call: "ClientCall"
    process: "Process"
    fate: str
    at: float
    job_id: str = ""
    ended_at: float | None = None
    is_cancelled: bool = False


@dataclass(slots=True)
class SimulatedJob:
    send: Send
    is_ended: asyncio.Event
    ending: Ending


class SimulatedFal:
    """fal. Each POST ends in the way and after the seconds that come next in the schedule."""

    def __init__(self, fates: list[tuple[str, float]], scale: float) -> None:
        self._fates, self._scale = fates, scale
        self.sends: list[Send] = []
        self.jobs: dict[str, SimulatedJob] = {}

    async def post(self, process: "Process", client_call: "ClientCall", call: Call) -> Response:
        loop = asyncio.get_running_loop()
        fate, seconds = self._fates[min(len(self.sends), len(self._fates) - 1)]
        send = Send(client_call, process, fate, loop.time())
        self.sends.append(send)
        seconds *= self._scale
        if call.target.operation is Operation.SUBMIT and (fate == "result" or "job" in fate):
            await asyncio.sleep(seconds / 4)
            return self._accept(send, seconds)
        await asyncio.sleep(seconds)
        send.ended_at = loop.time()
        fate = fate.removeprefix("job ")
        if fate in HAS_NO_RESPONSE:
            raise HAS_NO_RESPONSE[fate]()
        if fate == "gateway":
            return response("POST", 502, HTML)
        status, body, headers = ENDINGS[fate]
        return response("POST", status, body, {**headers, "x-fal-request-id": str(uuid4())})

    def _accept(self, send: Send, seconds: float) -> Response:
        send.job_id = str(uuid4())
        job = SimulatedJob(send, asyncio.Event(), ENDINGS[send.fate.removeprefix("job ")])
        self.jobs[send.job_id] = job
        asyncio.get_running_loop().call_later(seconds, self._end, job)
        document = {"status": "IN_QUEUE", "request_id": send.job_id, "queue_position": 0}
        document["status_url"] = f"https://queue.fal.run/{APP}/requests/{send.job_id}/status"
        return response("POST", 200, document, {"x-fal-request-id": send.job_id})

    def _end(self, job: SimulatedJob) -> None:
        job.is_ended.set()

    async def send(self, call: Call) -> Response:
        """Respond to a request about a job."""
        job_id = call.target.request_id or ""
        job = self.jobs.get(job_id)
        headers = {"x-fal-request-id": job_id}
        operation = call.target.operation
        if job is None:
            return response(call.method, 404, {"status": "NOT_FOUND"})
        if operation is Operation.STATUS_STREAM:
            return response(call.method, 503, HTML)  # the status is polled instead
        if operation is Operation.CANCEL:
            job.send.is_cancelled, job.ending = True, (499, {"detail": "cancelled"}, {})
            self._end(job)
            return response(call.method, 202, {"status": "CANCELLATION_REQUESTED"}, headers)
        if operation is Operation.STATUS:
            is_ended = job.is_ended.is_set()
            document = {"status": "COMPLETED" if is_ended else "IN_PROGRESS", "request_id": job_id}
            return response(call.method, 200 if is_ended else 202, document, headers)
        if not job.is_ended.is_set():
            return response(call.method, 400, {"detail": "in progress"}, headers)
        job.send.ended_at = job.send.ended_at or asyncio.get_running_loop().time()
        status, body, own_headers = job.ending
        return response(call.method, status, body, {**own_headers, **headers})


class SimulatedStore:
    """A store as one process reaches it: with a delay, through outages, and not after its death.

    An operation that is cancelled during an outage is executed at its end nevertheless, as by a
    frozen server.
    """

    def __init__(self, store: CacheStore, delay: Callable[[], float]) -> None:
        self._store, self._delay = store, delay
        self.is_remote = store.is_remote
        self.outages: list[tuple[float, float, bool]] = []  # start, end, whether it raises errors
        self.is_dead = False
        self.acquired_at: list[float] = []  # times of successful operations
        self.finished_at: list[float] = []
        self.recorded_jobs: set[str] = set()
        self._late: set[asyncio.Task[Any]] = set()

    async def __aenter__(self) -> "SimulatedStore":
        return self

    async def __aexit__(self, *error: object) -> None:
        await asyncio.gather(*self._late, return_exceptions=True)

    async def _run(self, operation: Callable[[], Awaitable[T]]) -> T:
        task = asyncio.get_running_loop().create_task(self._execute(operation))
        self._late.add(task)
        task.add_done_callback(self._on_done)
        return await asyncio.shield(task)

    def _on_done(self, task: "asyncio.Task[Any]") -> None:
        self._late.discard(task)
        if not task.cancelled():
            task.exception()

    async def _execute(self, operation: Callable[[], Awaitable[T]]) -> T:
        loop = asyncio.get_running_loop()
        await asyncio.sleep(self._delay())
        for start, end, is_error in self.outages:
            if start <= loop.time() < end:
                if is_error:
                    raise StoreError("an outage")
                await asyncio.sleep(end - loop.time())
        if self.is_dead:
            raise StoreError("the process is dead")
        reply = await operation()
        await asyncio.sleep(self._delay())
        return reply

    async def probe(self) -> StoreContent | None:
        return await self._run(self._store.probe)

    async def get(self, key: str) -> Lookup:
        return await self._run(lambda: self._store.get(key))

    async def acquire(self, key: str, request: AcquireRequest) -> Lookup:
        lookup = await self._run(lambda: self._store.acquire(key, request))
        self.acquired_at.append(asyncio.get_running_loop().time())
        return lookup

    async def record_job(self, key: str, owner_token: str, job: Job) -> bool:
        async def record() -> bool:
            is_leader = await self._store.record_job(key, owner_token, job)
            self.recorded_jobs |= {job.request_id} if is_leader else set()
            return is_leader

        return await self._run(record)

    async def renew_lease(self, key: str, owner_token: str, lease: float) -> bool:
        return await self._run(lambda: self._store.renew_lease(key, owner_token, lease))

    async def finish(
        self,
        key: str,
        owner_token: str,
        result: CachedResult | None,
        outcome: SharedOutcome | None = None,
    ) -> None:
        async def finish() -> None:
            await self._store.finish(key, owner_token, result, outcome)
            self.finished_at.append(asyncio.get_running_loop().time())

        await self._run(finish)

    async def put_virtual_request(self, request_id: str, virtual_request: VirtualRequest) -> None:
        await self._run(lambda: self._store.put_virtual_request(request_id, virtual_request))

    async def get_virtual_request(self, request_id: str) -> VirtualRequest | None:
        return await self._run(lambda: self._store.get_virtual_request(request_id))

    async def add_holder(self, key: str, job_id: str, holder: str) -> bool:
        return await self._run(lambda: self._store.add_holder(key, job_id, holder))

    async def remove_holder(self, key: str, job_id: str, holder: str) -> bool | None:
        return await self._run(lambda: self._store.remove_holder(key, job_id, holder))

    def watch(self, key: str) -> AbstractContextManager[asyncio.Event]:
        return self._store.watch(key)


@dataclass(slots=True, eq=False)
class ClientCall:
    """A client's call, and how it ended for the client.

    ending: status and RETRY_HEADERS; None if the client left or its process died.
    """

    kind: str
    arrived_at: float
    process: "Process"
    ended_at: float = 0.0
    ending: ClientEnding | None = None


class SimulatedRequest(dict[Any, Any]):
    """The part of `web.Request` that the middleware of the result cache uses."""

    def __init__(self, app: web.Application) -> None:
        super().__init__()
        self.app = app


class Process:
    """One process of the proxy, with the middleware of the result cache."""

    def __init__(
        self, number: int, store: SimulatedStore, fal: SimulatedFal, lease: float, prompt: str
    ) -> None:
        self.number, self.store, self.fal = number, store, fal
        self.result_cache = ResultCache(store, lease)  # type: ignore[arg-type]
        self.result_cache.virtual_requests._clock = asyncio.get_running_loop().time
        self.died_at: float | None = None
        self.input = InspectedInput({"prompt": prompt}, {}, {})
        self.app = web.Application()
        self.app[UPSTREAM] = fal  # type: ignore[misc]
        self.about_requests = serve_virtual_requests(ELIGIBILITY, self.result_cache, KEYS, POLICY)

    def __repr__(self) -> str:
        return f"<Process {self.number}>"

    def request(self, method: str, path: str, host: str) -> web.Request:
        headers = CIMultiDictProxy(CIMultiDict[str]())
        request: Any = SimulatedRequest(self.app)
        request[CALL] = Call(method, Target(host, path, ""), headers)
        return request  # type: ignore[no-any-return]

    async def call(self, client_call: ClientCall) -> web.StreamResponse:
        host = "fal.run" if client_call.kind == "run" else "queue.fal.run"
        request = self.request("POST", f"/{ENDPOINT}", host)

        async def handler(request: web.Request) -> web.StreamResponse:
            call = request[CALL]
            if call.method == "POST":
                return RelayedResponse(await self.fal.post(self, client_call, call))
            return RelayedResponse(await self.fal.send(call))

        cached_call = CachedCall(request, handler, self.result_cache, KEYS, POLICY)
        return await cached_call.respond(self.input)

    async def get(self, request_id: str, suffix: str = "") -> web.StreamResponse:
        async def handler(request: web.Request) -> web.StreamResponse:
            return RelayedResponse(await self.fal.send(request[CALL]))

        path = f"/{APP}/requests/{request_id}{suffix}"
        return await self.about_requests(self.request("GET", path, "queue.fal.run"), handler)

    async def kill(self) -> None:
        """Stop all tasks; nothing of them reaches the store any more."""
        self.died_at = asyncio.get_running_loop().time()
        self.store.is_dead = True
        await self.result_cache.single_flight.close(0.0)
        for task in tuple(self.result_cache._background_tasks):
            task.cancel()


async def document_of(found: web.StreamResponse) -> Any:
    if isinstance(found, RelayedResponse):
        return json.loads(await found.read(2**20) or b"{}")
    assert isinstance(found, LocalDocument)
    return json.loads(await found.document() or b"{}")


def ending_of(status: int, headers: Mapping[str, str]) -> ClientEnding:
    fields = CIMultiDict(headers)
    return status, tuple(fields.get(name) for name in RETRY_HEADERS)


def expected_ending(fate: str) -> ClientEnding:
    """Return how a call of this fate ends for each client that shares it."""
    fate = fate.removeprefix("job ")
    if fate in HAS_NO_RESPONSE:
        error = HAS_NO_RESPONSE[fate]()
        return ending_of(error.status, error.headers)
    if fate == "gateway":
        return ending_of(502, {})
    status, _, headers = ENDINGS[fate]
    return ending_of(status, headers)
