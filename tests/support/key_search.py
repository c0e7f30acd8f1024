"""Search for the fal key in everything that a test run logs and receives."""

import logging

from aiohttp import TraceConfig, TraceRequestEndParams, TraceResponseChunkReceivedParams

# The fal key of the tests. No log line, header or body of the whole run may contain its secret.
CANARY = "canary-id:canary-secret-5d41402abc4b2a76b9719d911017c592"
SECRET = CANARY.partition(":")[2]


class Leaks(logging.Handler):
    """Collects the places in which the key was seen."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.setFormatter(logging.Formatter("%(name)s %(message)s"))
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.search(self.format(record) + repr(record.__dict__), f"log of {record.name}")

    def search(self, text: str, place: str) -> None:
        if SECRET in text:
            self.found.append(place)


LEAKS = Leaks()


def leak_trace() -> TraceConfig:
    """Return a trace that searches every header and body that a client session receives."""
    trace = TraceConfig()

    async def head(session: object, context: object, params: TraceRequestEndParams) -> None:
        LEAKS.search(repr(params.response.raw_headers), f"headers of {params.url}")

    async def body(
        session: object, context: object, params: TraceResponseChunkReceivedParams
    ) -> None:
        LEAKS.search(params.chunk.decode("latin-1"), f"body of {params.url}")

    trace.on_request_end.append(head)
    trace.on_response_chunk_received.append(body)
    return trace
