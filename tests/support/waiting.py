"""Waiting for something that happens soon, with one limit for a loaded machine."""

import asyncio
import time
from collections.abc import Callable

SOON = 60.0  # seconds; more than a loaded machine takes, and half of a test's time limit


async def wait_until(condition: Callable[[], object], interval: float = 0.005) -> float:
    """Wait until `condition()` is true, and return the seconds. Raises: TimeoutError.

    interval: seconds between two looks at the condition.
    """
    started = time.monotonic()  # not the event loop's clock, which some tests move forward
    while not condition():
        if time.monotonic() - started > SOON:
            raise TimeoutError(f"not within {SOON} s")
        await asyncio.sleep(interval)
    return time.monotonic() - started
