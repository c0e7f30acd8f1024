"""A job in fal's queue: waits for its end and reads its result, for shared calls of the cache.
Dialects use `dialects/queue_client.py`."""

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from itertools import count

from aiohttp import hdrs

from falproxy.errors import ProxyError
from falproxy.fal.keys import FalKey
from falproxy.fal.queue_documents import INGRESS_ERRORS, is_completed
from falproxy.fal.target import QUEUE_HOST, Target
from falproxy.json_object import parse_object
from falproxy.proxy.call import Call
from falproxy.proxy.headers import is_identity
from falproxy.proxy.transport import NO_HEADERS, TransportResponse
from falproxy.proxy.upstream import Upstream, connection_lost, read_chunk

logger = logging.getLogger(__name__)

READ_TIMEOUT = 30.0  # seconds without a byte of a response; the status is then requested again
BACKOFF_MIN, BACKOFF_MAX = 0.25, 10.0  # seconds between two requests, doubling
REFUSALS_MAX = 5  # refused status requests in a row, after which the job counts as ended
JOB_TIMEOUT = 4 * 3600.0  # seconds; fal lets an app run for an hour
# Requests for a result that failed, or got an error from a gateway in front of fal.
RESULT_ATTEMPTS = 6
LINE_MAX = 2**20
# Errors of a gateway in front of fal, unless they have fal's request id.
GATEWAY_ERRORS = (429, *INGRESS_ERRORS)
FAL_REQUEST_ID = "x-fal-request-id"
FINISHED_STATUSES = (200, 404)
REFUSED_STATUSES = (400, 401, 403, 405, 410)


@dataclass(frozen=True, slots=True)
class JobResult:
    """fal's response to the request for a job's result.

    body: None if it is larger than the limit, or encoded.
    """

    status: int
    headers: Mapping[str, str]
    body: bytes | None


@dataclass(frozen=True, slots=True)
class JobFollower:
    """A job that this proxy submitted to fal's queue.

    app: the path before `/requests/`.
    key: the fal key that it was submitted with, None for the default one.
    stream_slots: limits the status streams of all jobs; a job without a slot polls its status.
    """

    upstream: Upstream
    app: str
    request_id: str
    key: FalKey | None
    stream_slots: asyncio.Semaphore

    async def wait_result(self, limit: int) -> JobResult:
        """Wait for the job's end and return its result, with a body of at most `limit` bytes.

        Raises: TimeoutError, the job did not end in time; ProxyError, its result cannot be read.
        """
        async with asyncio.timeout(JOB_TIMEOUT):
            await self.wait_completed()
            return await self.read_result(limit)

    async def read_result(self, limit: int) -> JobResult:
        """Return the result of a job that has ended, with a body of at most `limit` bytes.

        Raises: ProxyError, it cannot be read.
        """
        for attempt in range(RESULT_ATTEMPTS):
            result = await self.fetch_result(limit)
            if result is not None:
                return result
            await asyncio.sleep(backoff(attempt))
        raise connection_lost(is_repeatable=False)  # the job is paid for: clients must not retry

    async def cancel(self) -> None:
        """Cancel the job at fal. A failure is only logged."""
        try:
            await read_body(await self._request(hdrs.METH_PUT, "/cancel"), LINE_MAX)
        except (ProxyError, TimeoutError):
            logger.warning("A job without clients could not be cancelled")

    async def wait_completed(self) -> None:
        """Return when the job has ended, or fal does not know it."""
        refusals = 0
        for attempt in count():
            if await self._wait_stream_completed():
                return
            status = await self.fetch_status()
            refusals = refusals + 1 if status in REFUSED_STATUSES else 0
            if status in FINISHED_STATUSES or refusals >= REFUSALS_MAX:
                return
            await asyncio.sleep(backoff(attempt))

    async def _wait_stream_completed(self) -> bool:
        """Follow fal's status stream. Return True if it reported the end, False if there is no free
        slot or the stream failed or ended early."""
        if self.stream_slots.locked():
            return False
        try:
            async with self.stream_slots, aclosing(self._stream_lines()) as events:
                async for line in events:
                    if line.startswith(b"data:") and is_completed(line[5:]):
                        return True
        except (ProxyError, TimeoutError):
            pass  # the status is polled instead
        return False

    async def _stream_lines(self) -> AsyncGenerator[bytes, None]:
        response = await self._get("/status/stream")
        try:
            if response.status == 200 and is_event_stream(response):
                async for line in read_lines(response):
                    yield line
        finally:
            response.close()

    async def fetch_status(self) -> int:
        """Return the status code of a poll: 200 for an ended job, 202 for a running one, 404 for an
        unknown one (fal-api.md, 2.2), 0 if there was no response."""
        try:
            response = await self._get("/status")
            body = await read_body(response, LINE_MAX)
        except (ProxyError, TimeoutError):
            return 0
        if response.status == 200 and not is_completed(body or b""):
            return 202
        return response.status

    async def fetch_result(self, limit: int) -> JobResult | None:
        """Return the result, None if there was no response, or one of a gateway in front of fal."""
        try:
            response = await self._get("")
            body = await read_body(response, limit)
        except (ProxyError, TimeoutError):
            return None
        if is_gateway_error(response.status, response.headers):
            return None
        is_readable = is_identity(response.headers)
        return JobResult(response.status, response.headers, body if is_readable else None)

    async def _get(self, suffix: str) -> TransportResponse:
        return await self._request(hdrs.METH_GET, suffix)

    async def _request(self, method: str, suffix: str) -> TransportResponse:
        target = Target(QUEUE_HOST, f"/{self.app}/requests/{self.request_id}{suffix}", "")
        call = Call(method, target, NO_HEADERS, key=self.key, needs_identity=True)
        async with asyncio.timeout(READ_TIMEOUT):
            return await self.upstream.send(call)


def is_gateway_error(status: int, headers: Mapping[str, str]) -> bool:
    """Return whether a response to a request about a job does not concern the job. With fal's
    request id it is the end of the job itself, whatever its status."""
    return status in GATEWAY_ERRORS and FAL_REQUEST_ID not in headers


def is_job_end(status: int, headers: Mapping[str, str], body: bytes) -> bool:
    """Return whether a response to a request for a job's result is the end of the job. With 400 fal
    reports also that the job is in progress."""
    if status < 400:
        return status == 200
    is_unknown = (parse_object(body) or {}).get("status") == "NOT_FOUND"
    return status != 400 and FAL_REQUEST_ID in headers and not is_unknown


def is_event_stream(response: TransportResponse) -> bool:
    return response.headers.get(hdrs.CONTENT_TYPE, "").startswith("text/event-stream")


def backoff(attempt: int) -> float:
    return float(min(BACKOFF_MIN * 2**attempt, BACKOFF_MAX))


async def read_lines(response: TransportResponse) -> AsyncIterator[bytes]:
    """Yield the complete lines of a body. Raises: TimeoutError, ProxyError."""
    rest = b""
    while True:
        async with asyncio.timeout(READ_TIMEOUT):
            chunk = await read_chunk(response)
        if not chunk or len(rest) > LINE_MAX:
            return
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            yield line


async def read_body(response: TransportResponse, limit: int) -> bytes | None:
    """Return a body, None if it has more than `limit` bytes. Raises: TimeoutError, ProxyError."""
    chunks: list[bytes] = []
    size = 0
    try:
        while True:
            async with asyncio.timeout(READ_TIMEOUT):
                chunk = await read_chunk(response)
            size += len(chunk)
            if not chunk or size > limit:
                return None if chunk else b"".join(chunks)
            chunks.append(chunk)
    finally:
        if not response.is_consumed:
            response.close()
