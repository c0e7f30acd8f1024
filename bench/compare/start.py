"""A start: seconds from exec to the first proxied answer, and the memory held afterwards."""

import asyncio
import time
from dataclasses import dataclass
from pathlib import Path

from compare.calls import submit
from compare.connection import Answer, BrokenError, ask_once
from compare.contestants import Contestant, launched

TRY_SECONDS = 0.002
PATIENCE = 30.0
SETTLE_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class Start:
    """seconds: until the first answer. idle: MiB, None where nobody waited to see."""

    seconds: float
    idle: float | None


async def first_answer(port: int, request: bytes) -> Answer:
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        try:
            answer, _ = await ask_once(port, request)
        except OSError:
            await asyncio.sleep(TRY_SECONDS)
        else:
            return answer
    raise BrokenError("it does not start")


async def start(contestant: Contestant, folder: Path, *, is_watched: bool) -> Start:
    """Raises: BrokenError, the first answer is not 200, or there is none."""
    call = submit().with_headers(contestant.headers)
    began = time.monotonic()
    async with launched(contestant, folder) as it:
        request = call.wire(it.port)
        answer = await first_answer(it.port, request)
        took = time.monotonic() - began
        if answer.status != 200:
            raise BrokenError(f"status {answer.status}")
        if not is_watched:
            return Start(took, None)
        await asyncio.sleep(SETTLE_SECONDS)
        return Start(took, it.tree.rss())
