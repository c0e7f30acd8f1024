"""Spans around requests to stores and image hosts, for tracing (`telemetry/`).

A request of a traced call has a tracer in its context. Without one, a span costs one look-up and
records nothing.
"""

from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar
from typing import Protocol


class ClientSpan(Protocol):
    """One request to another system, while it runs."""

    def set_status(self, status: int) -> None:
        """Set the status of an HTTP response."""


class CallTracer(Protocol):
    """Records the requests that are made for one call."""

    def start(
        self, system: str, operation: str, host: str
    ) -> AbstractContextManager[ClientSpan]: ...


class UnrecordedSpan:
    def set_status(self, status: int) -> None:
        pass


# Set while a call is traced.
CALL_TRACER: ContextVar[CallTracer | None] = ContextVar("falproxy.call_tracer", default=None)
NOT_TRACED: AbstractContextManager[ClientSpan] = nullcontext(UnrecordedSpan())


def client_span(system: str, operation: str, host: str = "") -> AbstractContextManager[ClientSpan]:
    """Return a context whose duration is recorded as one request of the current call.

    system: redis, postgresql, supabase or image_host.
    operation: a command, or the first word of a statement, never with its arguments.
    """
    tracer = CALL_TRACER.get()
    return NOT_TRACED if tracer is None else tracer.start(system, operation, host)
