"""The clients: each makes calls through any node, and checks what it gets."""

import asyncio
import json
import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from random import Random
from uuid import uuid4

from aiohttp import ClientConnectorError, ClientError, ClientSession, ClientTimeout

from tests.support.faults.cluster import CALLERS, Cluster, access_key
from tests.support.faults.counting_fal import image_of
from tests.support.urls import PROXY

logger = logging.getLogger(__name__)

MODEL, CACHED_MODEL = "fal-ai/flux/dev", "fal-ai/flux-pro/kontext"
REQUEST_TIMEOUT = 120.0  # seconds in which each request has to end, on a busy machine
CALL_TIMEOUT = 240.0  # seconds until a job's result, or the end of the retries of a keyed call
RETRY_INTERVAL = 0.3
POLL_INTERVAL = 0.15
# Statuses of a poll that fal's clients repeat, or that a load balancer would have.
REPEATED = (408, 409, 429, 500, 502, 503, 504)
EQUAL_CALLS = 3  # of the same caller, at the same time
KINDS = (
    "run",
    "keyed run",
    "submit",
    "keyed submit",
    "equal runs",
    "equal submits",
    "repeated key",
)
# A keyed call whose outcome is known to be unknown, or that was refused: its client gives up.
FINAL = ("outcome_unknown",)
LOST_RESPONSE, LOSSES_MAX = "upstream_broken", 10


@dataclass(slots=True)
class Tally:
    """What happened to the calls of one row of the report.

    doubles: calls that fal was paid for more than once.
    lost: results that a client cannot get, although it has the id of the job.
    foreign: responses of another call. broken: files with other bytes.
    hung: requests or calls that did not end in time.
    extra: equal calls without a key that were not shared.
    errors: final errors of calls, by kind. repeated: those of polls, which were sent again.
    """

    calls: int = 0
    doubles: int = 0
    lost: int = 0
    foreign: int = 0
    broken: int = 0
    hung: int = 0
    extra: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    repeated: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)

    @property
    def broken_promises(self) -> int:
        return self.doubles + self.lost + self.foreign + self.broken + self.hung


@dataclass(frozen=True, slots=True)
class Response:
    """status: 0 if there was no response. error: its kind; empty for a success."""

    status: int
    document: Mapping[str, object]
    error: str

    @property
    def is_success(self) -> bool:
        return 200 <= self.status < 300


@dataclass(slots=True)
class Job:
    """A call that a client made.

    expected: number of paid calls at most, which equal calls without a key may exceed.
    key: Idempotency-Key. request_id: of a submit with a response. result: has arrived.
    """

    prompt: str
    caller: str
    tally: Tally
    model: str
    is_queued: bool
    key: str | None = None
    expected: int = 1
    request_id: str | None = None
    has_result: bool = False
    sent: int = 1


class Clients:
    """Clients of all callers.

    jobs: all calls so far.
    lost_ids: of the requests that were not found.
    """

    def __init__(self, cluster: Cluster, session: ClientSession, random: Random) -> None:
        self.jobs: list[Job] = []
        self.lost_ids: list[str] = []
        self._cluster = cluster
        self._session = session
        self._random = random

    async def call(self, tally: Tally) -> None:
        """Make one call of any kind, and wait for its result."""
        kind = self._random.choice(KINDS)
        is_queued, is_equal = "submit" in kind, "equal" in kind
        if kind == "repeated key":
            is_queued = self._random.random() < 0.5
        job = Job(
            prompt=f"{kind.replace(' ', '-')}-{uuid4().hex}",
            caller=self._random.choice(CALLERS),
            tally=tally,
            model=CACHED_MODEL if is_equal else MODEL,
            is_queued=is_queued,
            key=str(uuid4()) if "key" in kind else None,
        )
        self.jobs.append(job)
        clients = EQUAL_CALLS if is_equal or kind == "repeated key" else 1
        job.sent = clients
        tally.calls += clients
        try:
            async with asyncio.timeout(CALL_TIMEOUT + REQUEST_TIMEOUT):
                await asyncio.gather(*(self._call(job) for _ in range(clients)))
        except TimeoutError:
            self._note(job, "did not end")
            tally.hung += 1

    async def _call(self, job: Job) -> None:
        host = "queue.fal.run" if job.is_queued else "fal.run"
        target = f"https://{host}/{job.model}"
        body = {"prompt": job.prompt}
        response = await self._post(job, target, body)
        if not response.is_success:
            job.tally.errors[response.error] += 1
            return
        if not job.is_queued:
            await self._check_result(job, response)
            return
        request_id = str(response.document["request_id"])
        if job.key is not None and job.request_id not in (None, request_id):
            self._note(job, "has two request ids")
            job.tally.foreign += 1
        job.request_id = request_id
        await self.fetch_result(job, request_id)

    async def _post(self, job: Job, target: str, body: object) -> Response:
        """Send a call, with a key until its outcome is certain."""
        deadline = asyncio.get_running_loop().time() + CALL_TIMEOUT
        losses = 0  # of fal's response, which the key remembers
        while True:
            response = await self._request(job, "POST", target, body)
            losses += LOST_RESPONSE in response.error
            is_over = asyncio.get_running_loop().time() > deadline or losses > LOSSES_MAX
            if job.key is None or response.is_success or is_over:
                return response
            if response.status not in (0, *REPEATED) or any(
                code in response.error for code in FINAL
            ):
                return response
            job.tally.repeated[response.error] += 1
            await asyncio.sleep(RETRY_INTERVAL)

    async def fetch_result(self, job: Job, request_id: str) -> None:
        """Poll a job as fal's clients do, at any node, and check its result."""
        root = f"https://queue.fal.run/{job.model.rsplit('/', 1)[0]}/requests/{request_id}"
        deadline = asyncio.get_running_loop().time() + CALL_TIMEOUT
        path = "/status"
        while asyncio.get_running_loop().time() < deadline:
            response = await self._request(job, "GET", root + path)
            if response.is_success:
                if not path:
                    await self._check_result(job, response)
                    return
                if response.document.get("status") == "COMPLETED":
                    if "error" in response.document and await self._has_failed(job, root):
                        return
                    path = ""
                    continue
            elif response.status in (0, *REPEATED):
                job.tally.repeated[response.error] += 1
                await asyncio.sleep(RETRY_INTERVAL)
            elif path or response.status != 400:
                self.lost_ids.append(request_id)
                self._lose(job, f"{path or 'result'} of {request_id}: {response.error}")
                return
            await asyncio.sleep(POLL_INTERVAL)
        self._lose(job, f"no result after {CALL_TIMEOUT:g} s")

    async def _has_failed(self, job: Job, root: str) -> bool:
        """Return whether a shared job has ended with an error that its clients get."""
        response = await self._request(job, "GET", root)
        if response.is_success or job.prompt not in self._cluster.fal.lost:
            return False
        job.tally.errors[f"result of a shared job: {response.error}"] += 1
        job.request_id = None
        return True

    async def _check_result(self, job: Job, response: Response) -> None:
        document = response.document
        if document.get("prompt") != job.prompt:
            self._note(job, f"got {document}")
            job.tally.foreign += 1
            return
        job.has_result = True
        images = document["images"]
        assert isinstance(images, list)
        await self._check_file(job, str(images[0]["url"]))

    async def _check_file(self, job: Job, url: str) -> None:
        """Download the file of a result: from any node, if a node serves it."""
        for _ in range(5):
            origins = [node.origin for node in self._cluster.nodes]
            path = next((url.removeprefix(each) for each in origins if url.startswith(each)), None)
            link = url if path is None else self._random.choice(origins) + path
            try:
                async with self._session.get(link) as response:
                    content = await response.read()
                    status = response.status
            except (ClientError, OSError, TimeoutError):
                status, content = 0, b""
            if status == 200:
                if content != image_of(job.prompt):
                    self._note(job, f"has a file with {len(content)} other bytes")
                    job.tally.broken += 1
                return
            if status == 404 and path is not None:
                self._note(job, "has no file")
                job.tally.lost += 1
                return
            await asyncio.sleep(1.0)

    def _lose(self, job: Job, reason: str) -> None:
        self._note(job, reason)
        job.tally.lost += 1

    def _note(self, job: Job, text: str) -> None:
        job.tally.notes.append(f"{job.prompt}: {text}")
        logger.warning("%s: %s", job.prompt, text)

    async def _request(self, job: Job, method: str, target: str, body: object = None) -> Response:
        """Send a request to a node, and to another one if it cannot connect, as a load balancer
        does."""
        headers = {"x-fal-target-url": target, "Authorization": f"Key {access_key(job.caller)}"}
        if job.key is not None and method == "POST":
            headers["Idempotency-Key"] = job.key
        nodes = self._random.sample(self._cluster.nodes, len(self._cluster.nodes))
        for node in nodes:
            try:
                async with self._session.request(
                    method,
                    node.origin + PROXY,
                    json=body,
                    headers=headers,
                    timeout=ClientTimeout(total=REQUEST_TIMEOUT),
                ) as response:
                    return read_response(response.status, await response.read())
            except ClientConnectorError:
                continue
            except TimeoutError:
                self._note(job, f"{method} {target} did not end")
                job.tally.hung += 1
                return Response(0, {}, "time-out of the client")
            except (ClientError, OSError):
                return Response(0, {}, "connection lost")
        return Response(0, {}, "no node accepts connections")

    async def check_at_the_end(self) -> None:
        """After the repair of all parts: count what fal was paid for, and ask again for results
        that clients have the ids of."""
        for job in self.jobs:
            paid = self._cluster.fal.paid[job.prompt]
            is_keyed_or_single = job.key is not None or job.sent == 1
            if paid > 1 and is_keyed_or_single:
                self._note(job, f"was paid {paid} times")
                job.tally.doubles += 1
            elif paid > 1:
                job.tally.extra += paid - 1
        queued = [job for job in self.jobs if job.request_id is not None]
        for job in self._random.sample(queued, min(len(queued), 300)):
            assert job.request_id is not None
            await self.fetch_result(job, job.request_id)
        keyed = [job for job in self.jobs if job.key is not None and job.has_result]
        for job in self._random.sample(keyed, min(len(keyed), 150)):
            paid = self._cluster.fal.paid[job.prompt]
            await self._call(job)
            if self._cluster.fal.paid[job.prompt] != paid:
                self._note(job, "was paid again at the end")
                job.tally.doubles += 1


def read_response(status: int, content: bytes) -> Response:
    try:
        document = json.loads(content)
    except ValueError:
        document = {}
    document = document if isinstance(document, dict) else {}
    error = "" if 200 <= status < 300 else f"{status} {error_code(document)}".strip()
    return Response(status, document, error)


def error_code(document: Mapping[str, object]) -> str:
    error = document.get("error")
    if isinstance(error, dict):
        return str(error.get("code", ""))
    return str(document.get("error_type") or document.get("type") or "")
