"""Notification of the tasks of this process that wait for a change under a key."""

import asyncio
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class Watchers:
    """Events by key. True in a boolean context while there are any."""

    def __init__(self) -> None:
        self._events: dict[str, set[asyncio.Event]] = {}

    def __bool__(self) -> bool:
        return bool(self._events)

    @contextmanager
    def watch(self, key: str) -> Iterator[asyncio.Event]:
        event = asyncio.Event()
        self._events.setdefault(key, set()).add(event)
        try:
            yield event
        finally:
            self._events[key].discard(event)
            if not self._events[key]:
                del self._events[key]

    def notify(self, key: str) -> None:
        for event in self._events.get(key, ()):
            event.set()

    def notify_all(self, keys: Iterable[str] | None = None) -> None:
        """keys: None notifies the watchers of every key."""
        for key in self._events if keys is None else keys:
            self.notify(key)
