"""A search for the fal key in everything that a test run logs and receives: it must be nowhere."""

import logging

from aiohttp import TraceConfig, TraceRequestEndParams, TraceResponseChunkReceivedParams

# Looked for in every log line, header and body of the whole run: it must be in none of them.
CANARY = "canary-id:canary-secret-5d41402abc4b2a76b9719d911017c592"


SECRET = CANARY.partition(":")[2]


class Leaks(logging.Handler):
    """Keeps the places where the key was seen."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.setFormatter(logging.Formatter("%(name)s %(message)s"))
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.look(self.format(record) + repr(record.__dict__), f"log of {record.name}")

    def look(self, text: str, where: str) -> None:
        if SECRET in text:
            self.found.append(where)


LEAKS = Leaks()


def search_answers() -> TraceConfig:
    """Has a client session look for the key in every header and body that it receives."""
    trace = TraceConfig()

    async def head(session: object, context: object, params: TraceRequestEndParams) -> None:
        LEAKS.look(repr(params.response.raw_headers), f"headers of {params.url}")

    async def body(
        session: object, context: object, params: TraceResponseChunkReceivedParams
    ) -> None:
        LEAKS.look(params.chunk.decode("latin-1"), f"body of {params.url}")

    trace.on_request_end.append(head)
    trace.on_response_chunk_received.append(body)
    return trace
