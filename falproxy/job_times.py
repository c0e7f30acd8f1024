"""Times of jobs that status polls show: when a job was completed, and how long it ran at fal."""

import re
import time
from typing import NamedTuple

from cachetools import FIFOCache

JOBS_MAX = 20_000
# In the status document of a completed job. Inside a text of the log, its quotes are escaped.
INFERENCE_TIME = re.compile(rb'"inference_time"\s*:\s*(\d{1,9}(?:\.\d{1,30})?)(?![\d.eE])')


class JobTime(NamedTuple):
    """ended_at: in seconds since 1970. run_seconds: None if fal does not send it."""

    ended_at: float
    run_seconds: float | None


class JobTimes:
    """The times of jobs that have ended and whose results were not fetched yet."""

    def __init__(self) -> None:
        self._times: FIFOCache[str, JobTime] = FIFOCache(JOBS_MAX)

    def __repr__(self) -> str:
        return f"<JobTimes of {len(self._times)} jobs>"

    def observe(self, request_id: str, body: bytes) -> None:
        """Record that a job has ended, from a body that shows it. Only the first one counts."""
        if request_id not in self._times:
            self._times[request_id] = JobTime(time.time(), parse_run_seconds(body))

    def pop(self, request_id: str) -> JobTime:
        """Return the times of a job; if no poll has shown its end, the present time."""
        known: JobTime | None = self._times.pop(request_id, None)
        return JobTime(time.time(), None) if known is None else known


def parse_run_seconds(body: bytes) -> float | None:
    """Return the run time in a status document, which is not parsed: the fast path has it."""
    match = INFERENCE_TIME.search(body)
    return None if match is None else float(match[1])
