"""How long it may take to read what a user named, and when that is tried again."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from falproxy.media.fetch.response import RetryableFetchError

if TYPE_CHECKING:
    from tenacity import AsyncRetrying
    from tenacity.wait import wait_base

ATTEMPTS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchTimeouts:
    """How long things may take, in seconds. total: one attempt; idle: silence, and a connection;
    overall: all attempts. wait: between them, None for a second and then ever longer. clock:
    seconds that only grow."""

    per_attempt: float = 20.0
    idle: float = 5.0
    overall: float = 30.0
    backoff: "wait_base | None" = None
    clock: Callable[[], float] = time.monotonic

    def retrying(self) -> "AsyncRetrying":
        """Tries again what may pass."""
        import tenacity  # which most proxies never need

        return tenacity.AsyncRetrying(
            stop=tenacity.stop_after_attempt(ATTEMPTS),
            wait=self.backoff or tenacity.wait_exponential(min=1, max=10),
            retry=tenacity.retry_if_exception_type(RetryableFetchError),
            reraise=True,
        )
