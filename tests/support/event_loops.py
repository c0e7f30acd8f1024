"""The event loops of the tests."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

try:
    import uvloop
except ImportError:  # no wheel for this platform
    uvloop = None  # type: ignore[assignment]

NewLoop = Callable[[], asyncio.AbstractEventLoop]


def new_uvloop() -> asyncio.AbstractEventLoop:
    """Return an event loop that stops when a test has exceeded its time limit.

    uvloop itself only logs the exception that pytest-timeout raises, and the test waits on.
    """
    loop = uvloop.new_event_loop()
    loop.set_exception_handler(stop_at_time_limit)
    return loop


def stop_at_time_limit(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    loop.default_exception_handler(context)
    if isinstance(context.get("exception"), pytest.fail.Exception):
        loop.stop()


# By name.
EVENT_LOOPS: dict[str, NewLoop] = {"asyncio": asyncio.new_event_loop}
if uvloop is not None:
    EVENT_LOOPS["uvloop"] = new_uvloop
