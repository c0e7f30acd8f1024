"""A start: seconds from exec to the first proxied response, and the memory held afterwards."""

import asyncio
import time
from dataclasses import dataclass
from pathlib import Path

from compare.calls import submit
from compare.candidates import Candidate, launched
from compare.connection import BadResponseError, Response, request_once

TRY_SECONDS = 0.002
START_TIMEOUT = 30.0
SETTLE_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class Start:
    """One start.

    seconds: until the first response.
    idle: MiB, None if it was not measured.
    """

    seconds: float
    idle: float | None


async def first_response(port: int, request: bytes) -> Response:
    deadline = time.monotonic() + START_TIMEOUT
    while time.monotonic() < deadline:
        try:
            response, _ = await request_once(port, request)
        except OSError:
            await asyncio.sleep(TRY_SECONDS)
        else:
            return response
    raise BadResponseError("it did not start in time")


async def start(candidate: Candidate, folder: Path, *, is_watched: bool) -> Start:
    """Start a candidate and stop it again.

    is_watched: measure the idle memory as well.

    Raises: BadResponseError, the first response is not 200, or there is none.
    """
    call = submit().with_headers(candidate.headers)
    started = time.monotonic()
    async with launched(candidate, folder) as it:
        request = call.wire(it.port)
        response = await first_response(it.port, request)
        seconds = time.monotonic() - started
        if response.status != 200:
            raise BadResponseError(f"status {response.status}")
        if not is_watched:
            return Start(seconds, None)
        await asyncio.sleep(SETTLE_SECONDS)
        return Start(seconds, it.tree.rss())
