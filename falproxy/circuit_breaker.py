"""A circuit breaker: no requests to a failed service during a cooldown, then one probe."""

import time
from collections.abc import Callable


class CircuitBreaker:
    """The state of one service, shared by all its callers.

    cooldown: seconds during which no request is sent after a failure.
    clock: a monotonic clock in seconds.
    """

    __slots__ = ("_clock", "_cooldown", "_retry_at")

    def __init__(self, cooldown: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._cooldown = cooldown
        self._clock = clock
        self._retry_at: float | None = None

    def __repr__(self) -> str:
        if self._retry_at is None:
            return "<CircuitBreaker closed>"
        return f"<CircuitBreaker open, probe in {max(0.0, self._retry_at - self._clock()):.1f} s>"

    @property
    def is_closed(self) -> bool:
        """True when the last outcome was a success, or there was none."""
        return self._retry_at is None

    def allow_request(self) -> bool:
        """Return whether to send a request. False while the breaker is open; after the cooldown
        one caller gets True and acts as the probe, and the next cooldown begins."""
        if self._retry_at is None:
            return True
        now = self._clock()
        if now < self._retry_at:
            return False
        self._retry_at = now + self._cooldown
        return True

    def trip(self) -> None:
        """Record a failure: no requests during the cooldown."""
        self._retry_at = self._clock() + self._cooldown

    def reset(self) -> None:
        """Record a success."""
        self._retry_at = None
