"""A job in fal's queue: waiting for its end, and reading how it ended."""

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from itertools import count

from aiohttp import hdrs
from multidict import CIMultiDict, CIMultiDictProxy

from falproxy.errors import ProxyError
from falproxy.fal.keys import FalKey
from falproxy.fal.target import QUEUE_HOST, Target
from falproxy.proxy.call import Call
from falproxy.proxy.transport import TransportResponse
from falproxy.proxy.upstream import Upstream, connection_lost, read_chunk

logger = logging.getLogger(__name__)

# Seconds of silence after which an exchange is given up, and the status asked for anew.
READ_TIMEOUT = 30.0
# Seconds between two questions, which double from the first to the last.
BACKOFF_MIN, BACKOFF_MAX = 0.25, 10.0
# How often in a row fal may refuse to tell a status until the job is given up.
REFUSALS_MAX = 5
# Seconds after which a job is given up: fal lets an app run for an hour.
JOB_TIMEOUT = 4 * 3600.0
# How often a result is asked for that some gateway before fal, or nobody, answered.
RESULT_ATTEMPTS = 6
LINE_MAX = 2**20
INGRESS_ERRORS = (502, 503, 504)
FINISHED_STATUSES = (200, 404)
REFUSED_STATUSES = (400, 401, 403, 405, 410)
NO_HEADERS = CIMultiDictProxy(CIMultiDict[str]())


@dataclass(frozen=True, slots=True)
class JobResult:
    """How a job ended: fal's answer to who asks for its result. body: None for one that is
    larger than was asked for."""

    status: int
    headers: Mapping[str, str]
    body: bytes | None


@dataclass(frozen=True, slots=True)
class QueueJob:
    """A job of ours in fal's queue. app: the path before `/requests/`. key: the fal key that it
    was submitted with, None for the only one. streams: for the status streams of all; without a
    turn the status is asked for now and then."""

    upstream: Upstream
    app: str
    request_id: str
    key: FalKey | None
    stream_slots: asyncio.Semaphore

    async def wait_result(self, limit: int) -> JobResult:
        """Waits for the job's end and reads its result, of at most `limit` bytes.

        Raises: TimeoutError, the job was given up; ProxyError, its result cannot be had.
        """
        async with asyncio.timeout(JOB_TIMEOUT):
            await self._wait_completed()
            for attempt in range(RESULT_ATTEMPTS):
                ending = await self._fetch_result(limit)
                if ending is not None:
                    return ending
                await asyncio.sleep(backoff(attempt))
        raise connection_lost(hdrs.METH_POST)  # it was bought, and must not be once more

    async def cancel(self) -> None:
        """Nobody wants the job any more. fal's answer makes no difference to anybody."""
        try:
            await read_body(await self._request(hdrs.METH_PUT, "/cancel"), LINE_MAX)
        except (ProxyError, TimeoutError):
            logger.warning("A job that nobody wants any more could not be cancelled")

    async def _wait_completed(self) -> None:
        """Returns when the job is at its end, or is not known to fal."""
        refusals = 0
        for attempt in count():
            if await self._wait_stream_completed():
                return
            status = await self._fetch_status()
            refusals = refusals + 1 if status in REFUSED_STATUSES else 0
            if status in FINISHED_STATUSES or refusals >= REFUSALS_MAX:
                return
            await asyncio.sleep(backoff(attempt))

    async def _wait_stream_completed(self) -> bool:
        """Whether fal's status stream told of the end. A stream that falls silent or breaks off
        tells nothing."""
        if self.stream_slots.locked():
            return False
        try:
            async with self.stream_slots, aclosing(self._stream_lines()) as events:
                async for line in events:
                    if line.startswith(b"data:") and is_completed(line[5:]):
                        return True
        except (ProxyError, TimeoutError):
            pass  # the status is asked for instead
        return False

    async def _stream_lines(self) -> AsyncGenerator[bytes, None]:
        response = await self._get("/status/stream")
        try:
            if response.status == 200 and is_event_stream(response):
                async for line in read_lines(response):
                    yield line
        finally:
            response.close()

    async def _fetch_status(self) -> int:
        """fal's answer to a poll: 200 at the end, 404 for what it does not know (fal-api.md, 2.2).
        0 where there is none."""
        try:
            response = await self._get("/status")
            body = await read_body(response, LINE_MAX)
        except (ProxyError, TimeoutError):
            return 0
        if response.status == 200 and not is_completed(body or b""):
            return 202
        return response.status

    async def _fetch_result(self, limit: int) -> JobResult | None:
        """None where it was not fal itself who answered, or nobody did."""
        try:
            response = await self._get("")
            body = await read_body(response, limit)
        except (ProxyError, TimeoutError):
            return None
        is_fal_s = "x-fal-request-id" in response.headers
        if response.status == 429 or (response.status in INGRESS_ERRORS and not is_fal_s):
            return None
        is_coded = response.headers.get(hdrs.CONTENT_ENCODING, "identity") != "identity"
        return JobResult(response.status, response.headers, None if is_coded else body)

    async def _get(self, suffix: str) -> TransportResponse:
        return await self._request(hdrs.METH_GET, suffix)

    async def _request(self, method: str, suffix: str) -> TransportResponse:
        target = Target(QUEUE_HOST, f"/{self.app}/requests/{self.request_id}{suffix}", "")
        call = Call(method, target, NO_HEADERS, key=self.key, needs_identity=True)
        async with asyncio.timeout(READ_TIMEOUT):
            return await self.upstream.send(call)


def is_event_stream(response: TransportResponse) -> bool:
    return response.headers.get(hdrs.CONTENT_TYPE, "").startswith("text/event-stream")


def backoff(attempt: int) -> float:
    return float(min(BACKOFF_MIN * 2**attempt, BACKOFF_MAX))


async def read_lines(response: TransportResponse) -> AsyncIterator[bytes]:
    """Raises: TimeoutError, nothing came for a while; ProxyError."""
    rest = b""
    while True:
        async with asyncio.timeout(READ_TIMEOUT):
            chunk = await read_chunk(response)
        if not chunk or len(rest) > LINE_MAX:
            return
        *whole, rest = (rest + chunk).split(b"\n")
        for line in whole:
            yield line


def is_completed(text: bytes) -> bool:
    try:
        status = json.loads(text)
    except (ValueError, RecursionError):
        return False
    return isinstance(status, dict) and status.get("status") == "COMPLETED"


async def read_body(response: TransportResponse, limit: int) -> bytes | None:
    """The body of an answer, None when it has more than `limit` bytes.

    Raises: TimeoutError, nothing came for a while; ProxyError.
    """
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
