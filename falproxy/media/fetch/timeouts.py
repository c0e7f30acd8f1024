"""Time-outs and retries of fetches."""

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
    """Time-outs in seconds.

    per_attempt: one attempt.
    idle: opening a connection, and the time without data.
    overall: all attempts.
    backoff: pause between attempts; None for one that grows from 1 s to 10 s.
    clock: a monotonic clock.
    """

    per_attempt: float = 20.0
    idle: float = 5.0
    overall: float = 30.0
    backoff: "wait_base | None" = None
    clock: Callable[[], float] = time.monotonic

    def retrying(self) -> "AsyncRetrying":
        import tenacity  # not needed at start

        return tenacity.AsyncRetrying(
            stop=tenacity.stop_after_attempt(ATTEMPTS),
            wait=self.backoff or tenacity.wait_exponential(min=1, max=10),
            retry=tenacity.retry_if_exception_type(RetryableFetchError),
            reraise=True,
        )
