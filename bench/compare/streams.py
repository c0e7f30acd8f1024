"""Five hundred concurrent event streams: lost events, delays, memory of a stream."""

import asyncio
import gc
import json
import time
from dataclasses import dataclass, field
from statistics import quantiles

from compare.calls import stream
from compare.candidates import Started
from compare.connection import BadResponseError, Connection
from compare.origin import EVENT_SECONDS, EVENTS
from compare.process import MIB

STREAMS = 500
# Streams start one after the other, so that their events are spread over time.
START_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class StreamSample:
    """The result of one slice.

    lost: events, including those out of order.
    p50, p99: milliseconds from upstream to client.
    size: KB of memory for each stream.
    """

    lost: int
    p50: float
    p99: float
    size: float
    cpu: float


@dataclass(slots=True)
class Reader:
    """Reads one stream.

    sent: time of each event at the upstream, in seconds.
    late: delay of each event, in seconds.
    """

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
    """Run all streams once.

    at_rest: MiB of the candidate without streams.

    Raises: BadResponseError, a response was not 200 or broke off.
    """
    cpu = it.tree.cpu()
    connections = [await Connection.open(it.stream_port) for _ in range(STREAMS)]
    request = stream().with_headers(it.candidate.headers).wire(it.stream_port)
    readers = [Reader() for _ in connections]
    during: list[float] = []

    async def read(position: int) -> None:
        await asyncio.sleep(START_SECONDS * position / STREAMS)
        response = await connections[position].request(request, readers[position].feed)
        if response.status != 200:
            raise BadResponseError(f"status {response.status}")

    async def measure_memory() -> None:
        await asyncio.sleep(EVENTS * EVENT_SECONDS - 1.0)  # when all streams are running
        during.append(it.tree.rss())

    gc.disable()  # a pause of this process would count as delay
    started = time.monotonic()
    try:
        await asyncio.gather(*map(read, range(STREAMS)), measure_memory())
    finally:
        gc.enable()
        for connection in connections:
            connection.close()
    size = (during[0] - at_rest) * MIB / 1000 / STREAMS
    return summarize(readers, started + 1.5 * START_SECONDS, size, it.tree.cpu() - cpu)


def summarize(readers: list[Reader], since: float, size: float, cpu: float) -> StreamSample:
    """Summarize the delays of events sent since a time at which all streams were open."""
    expected = list(range(EVENTS))
    lost = sum(
        EVENTS - sum(a == b for a, b in zip(reader.numbers, expected, strict=False))
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
