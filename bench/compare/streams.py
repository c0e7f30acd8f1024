"""Five hundred event streams at once: what is lost, what is late, what a stream takes."""

import asyncio
import gc
import json
import time
from dataclasses import dataclass, field
from statistics import quantiles

from compare.calls import stream
from compare.connection import BrokenError, Connection
from compare.contestants import Started
from compare.origin import EVENT_SECONDS, EVENTS
from compare.process import MIB

STREAMS = 500
# They begin one after the other, so that their events do not come all at once.
START_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class StreamSample:
    """lost: events, disordered too. p50, p99: ms from upstream to client. size: KB that one takes
    of memory."""

    lost: int
    p50: float
    p99: float
    size: float
    cpu: float


@dataclass(slots=True)
class Reader:
    """What came of one stream. sent and late: seconds, of each event."""

    numbers: list[int] = field(default_factory=list)
    sent: list[float] = field(default_factory=list)
    late: list[float] = field(default_factory=list)
    _part: bytes = b""

    def feed(self, data: bytes) -> None:
        now = time.monotonic()
        *events, self._part = (self._part + data).split(b"\n\n")
        for event in events:
            document = json.loads(event.removeprefix(b"data: "))
            self.numbers.append(document["number"])
            self.sent.append(document["sent"])
            self.late.append(now - document["sent"])


async def streams_slice(it: Started, at_rest: float) -> StreamSample:
    """at_rest: MiB that it holds without streams.

    Raises: BrokenError, a stream was not answered with 200 or broke off.
    """
    cpu = it.tree.cpu()
    connections = [await Connection.open(it.stream_port) for _ in range(STREAMS)]
    request = stream().with_headers(it.contestant.headers).wire(it.stream_port)
    readers = [Reader() for _ in connections]
    during: list[float] = []

    async def read(position: int) -> None:
        await asyncio.sleep(START_SECONDS * position / STREAMS)
        answer = await connections[position].ask(request, readers[position].feed)
        if answer.status != 200:
            raise BrokenError(f"status {answer.status}")

    async def look() -> None:
        await asyncio.sleep(EVENTS * EVENT_SECONDS - 1.0)  # all of them are in the middle
        during.append(it.tree.rss())

    gc.disable()  # a pause of ours would look like one of theirs
    began = time.monotonic()
    try:
        await asyncio.gather(*map(read, range(STREAMS)), look())
    finally:
        gc.enable()
        for connection in connections:
            connection.close()
    size = (during[0] - at_rest) * MIB / 1000 / STREAMS
    return summed_up(readers, began + 1.5 * START_SECONDS, size, it.tree.cpu() - cpu)


def summed_up(readers: list[Reader], since: float, size: float, cpu: float) -> StreamSample:
    """Delays of what was sent since a moment, at which all streams stood."""
    whole = list(range(EVENTS))
    lost = sum(
        EVENTS - sum(a == b for a, b in zip(reader.numbers, whole, strict=False))
        for reader in readers
    )
    late = [
        delay * 1000
        for reader in readers
        for sent, delay in zip(reader.sent, reader.late, strict=True)
        if sent >= since
    ]
    cuts = quantiles(late, n=100)
    return StreamSample(lost, cuts[49], cuts[98], size, cpu)
