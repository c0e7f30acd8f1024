"""Waiting for something that happens soon."""

import asyncio
import time
from collections.abc import Callable

from falproxy.windows import Window

SOON = 10.0  # seconds


async def wait_until(condition: Callable[[], object], seconds: float = SOON) -> None:
    """Wait until `condition()` is true.

    seconds: limit; shorter than what else would make the condition true, such as a time-out, a
        lease or a retry of the product.

    Raises: TimeoutError.
    """
    started = time.monotonic()  # not the event loop's clock, which some tests move forward
    while not condition():
        if time.monotonic() - started > seconds:
            raise TimeoutError(f"not within {seconds} s")
        await asyncio.sleep(0.005)


async def wait_until_window_lasts(window: Window, seconds: float) -> None:
    """Wait for the next window if the current one has fewer seconds left."""
    now = time.time()
    _, ends_at = window.bounds(now)
    if ends_at - now < seconds:
        await asyncio.sleep(ends_at - now)
