"""How long the other side of a connection may be silent."""

import asyncio
from abc import ABC, abstractmethod
from math import inf

from aiohttp.base_protocol import BaseProtocol

from falproxy.proxy.transport import IDLE_SECONDS


class TimeoutProtocol(BaseProtocol, ABC):
    """A connection with one timer for all its exchanges: it is not set anew for each of them.

    silence: seconds that the other side may say nothing while it is its turn. heard: when it said
    something last, or when its turn began; `inf` while it is ours.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, read_timeout: float) -> None:
        super().__init__(loop)
        self._read_timeout = read_timeout
        self._last_activity = loop.time()
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = inf

    @property
    @abstractmethod
    def is_idle(self) -> bool:
        """Whether nobody has a request on it."""

    @abstractmethod
    def close(self) -> None:
        """Ends it at once."""

    @abstractmethod
    def fail(self, error: Exception) -> None:
        """The exchange is over, for this reason."""

    def start_timeout(self) -> None:
        """From now on it is the other side's turn."""
        self._last_activity = self._loop.time()
        limit = self._last_activity + min(self._read_timeout, IDLE_SECONDS)
        if self._timer is None or self._timer_at > limit:
            self._set_timer(limit)

    def stop_timeout(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _set_timer(self, when: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer_at = when
        self._timer = self._loop.call_at(when, self._check_timeout)

    def _check_timeout(self) -> None:
        self._timer = None
        now = self._loop.time()
        is_idle = self.is_idle
        if self._reading_paused and not is_idle:
            self._last_activity = now  # it is our client that does not read
        limit = self._last_activity + (IDLE_SECONDS if is_idle else self._read_timeout)
        if now < limit:
            self._set_timer(min(limit, now + IDLE_SECONDS))
        elif is_idle:
            self.close()
        else:
            self.fail(TimeoutError())
