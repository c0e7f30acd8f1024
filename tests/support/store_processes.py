"""Stores that share a file, a database or a server, opened like those of several processes."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import dataclass, field
from typing import Any, Generic, Self, TypeVar

S = TypeVar("S", bound=AbstractAsyncContextManager[Any])

Clock = Callable[[], float]


@dataclass(slots=True)
class StoreProcesses(Generic[S]):
    """make: creates a store that is not open.
    wait: lets seconds pass, by the clock of the stores.
    now: the time of the stores in seconds since 1970.
    """

    make: Callable[[], S]
    wait: Callable[[float], Awaitable[None]] = asyncio.sleep
    now: Clock = time.time
    stack: AsyncExitStack = field(default_factory=AsyncExitStack)

    @classmethod
    def with_clock(cls, make: Callable[[Clock], S]) -> Self:
        """Return stores whose clock is moved by `wait`. make: creates a store with a clock."""
        offset = 0.0

        def now() -> float:
            return time.time() + offset

        async def wait(seconds: float) -> None:
            nonlocal offset
            offset += seconds

        return cls(lambda: make(now), wait, now)

    async def store(self) -> S:
        """Return an open store, as a process of its own would have it."""
        return await self.stack.enter_async_context(self.make())
