"""Lookups of entries that another process may not have been able to write yet.

A store that does not have an entry proves nothing while another process holds entries in memory:
because the store was down, locked or full when they were written, or because it lost its content.
Such an entry cannot be looked up; it is not reported as missing.
"""

import asyncio
from collections.abc import Awaitable, Callable
from math import inf
from typing import TypeVar

from falproxy.stores.cache import StoreError

T = TypeVar("T")

LOOKUP_TIMEOUT = 5.0  # seconds
RECHECK_INTERVAL = 0.1  # seconds between two reads of one entry
WAITING_MAX = 1000  # lookups that wait at once; further ones fail immediately


class Lookups:
    """Lookups of one kind of entry.

    is_complete: returns whether no process has had entries that are not in the store since a time
        by the clock of the event loop. It may raise StoreError.
    settle_seconds: time in which every process writes its entries once the store is usable.
    """

    def __init__(
        self, is_complete: Callable[[float], Awaitable[bool]], settle_seconds: float
    ) -> None:
        self._is_complete = is_complete
        self._settle_seconds = settle_seconds
        self._waiting = 0

    def __repr__(self) -> str:
        return f"<Lookups {self._waiting} waiting>"

    async def find(
        self, read: Callable[[], Awaitable[T | None]], *, wait_for_store: bool = True
    ) -> T | None:
        """Return an entry, or None if it is certain that it does not exist.

        read: reads the store, or what this process has learned meanwhile; it may raise StoreError.
        wait_for_store: wait for a store that cannot be read, instead of failing at once.

        Raises: StoreError, the entry cannot be looked up.
        """
        if self._waiting >= WAITING_MAX:
            return await self._find_now(read)
        self._waiting += 1
        try:
            return await self._find(read, wait_for_store)
        finally:
            self._waiting -= 1

    async def _find_now(self, read: Callable[[], Awaitable[T | None]]) -> T | None:
        if (entry := await read()) is None:
            raise StoreError("too many lookups are waiting")
        return entry

    async def _find(
        self, read: Callable[[], Awaitable[T | None]], wait_for_store: bool
    ) -> T | None:
        loop = asyncio.get_running_loop()
        began = loop.time()
        deadline = began + LOOKUP_TIMEOUT
        complete_since: float | None = None
        while True:
            error = StoreError("the entry may be in another process's memory")
            started = loop.time()
            try:
                if (entry := await read()) is not None:
                    return entry
                if started >= (complete_since or inf) + self._settle_seconds:
                    return None
                is_complete = await self._is_complete(began)
                complete_since = (complete_since or loop.time()) if is_complete else None
            except StoreError as store_error:
                if not wait_for_store:
                    raise
                error, complete_since = store_error, None
            if loop.time() >= deadline:
                raise error
            await asyncio.sleep(RECHECK_INTERVAL)
