"""Job queue of the offline fal: first in, first out, with a limited number of runners."""

import asyncio
import logging
import time
import uuid
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime

from falproxy.sandbox.responses import FalError, FalResponse, detail_error, request_error

log = logging.getLogger(__name__)

JOBS_MAX = 2000  # jobs kept; above that, the oldest are dropped once they have ended
CANCELLED = request_error(499, "client_cancelled", "Request was cancelled by the client.").response
INTERNAL_ERROR = detail_error(500, "Internal Server Error").response
START_TIMEOUT = request_error(
    504,
    "request_timeout",
    "Request did not start within the time that the caller allowed.",
    {"X-Fal-Request-Timeout-Type": "user"},
).response


@dataclass(slots=True, repr=False)
class Job:
    """One submitted request.

    endpoint: full endpoint id.
    app: owner and alias.
    account: key id of the caller.
    prompt: may hold directives to the sandbox.
    webhook_url: URL to post the result to.
    start_delay: seconds between a free runner and the start of the job.
    start_timeout: seconds within which the job must start. None means no limit.
    logs: log lines, appended while the job runs.
    started_at: monotonic time in seconds. None before the start.
    inference_seconds: run time. None unless the job has started and ended.
    response: result or error. None until the job has ended.
    """

    endpoint: str
    app: str
    account: str
    prompt: str
    webhook_url: str | None = None
    start_delay: float = 0.0
    start_timeout: float | None = None
    id: str = field(default_factory=lambda: str(uuid.uuid4()))
    logs: list[dict[str, str]] = field(default_factory=list)
    started_at: float | None = None
    inference_seconds: float | None = None
    response: FalResponse | None = None
    task: asyncio.Task[None] | None = None

    def log(self, message: str) -> None:
        timestamp = datetime.now(UTC).isoformat()
        line = {"message": message, "timestamp": timestamp, "level": "INFO", "source": "USER"}
        self.logs.append(line)

    def finish(self, response: FalResponse) -> None:
        if self.started_at is not None:
            self.inference_seconds = time.monotonic() - self.started_at
        self.response = response

    def __repr__(self) -> str:
        if self.response is not None:
            state = f"ended with {self.response.status}"
        else:
            state = "queued" if self.started_at is None else "running"
        return f"<Job {self.id} {self.endpoint} {state}>"


RunJob = Callable[[Job], Awaitable[FalResponse]]
OnFinished = Callable[[Job], Awaitable[None]]


class JobQueue:
    """Jobs by request id, and the tasks that run them. `close` cancels the tasks."""

    def __init__(self, runners: int) -> None:
        self._jobs: OrderedDict[str, Job] = OrderedDict()
        self._waiting: list[Job] = []
        self._runners = asyncio.Semaphore(runners)
        self._tasks: set[asyncio.Task[None]] = set()
        self._changed = asyncio.Event()
        self._is_closed = False

    def __len__(self) -> int:
        """Number of jobs that wait for a runner."""
        return len(self._waiting)

    def __repr__(self) -> str:
        running = len(self._tasks) - len(self._waiting)
        return f"<JobQueue waiting={len(self._waiting)} running={running}>"

    def get(self, request_id: str) -> Job | None:
        return self._jobs.get(request_id)

    def position(self, job: Job) -> int | None:
        """Return the number of jobs ahead. None if the job does not wait for a runner."""
        return self._waiting.index(job) if job in self._waiting else None

    def submit(self, job: Job, run: RunJob, on_finished: OnFinished) -> None:
        """Add a job.

        run: produces the job's response.
        on_finished: called when the job has ended, but not if it was cancelled.
        """
        self._jobs[job.id] = job
        while len(self._jobs) > JOBS_MAX and next(iter(self._jobs.values())).response:
            self._jobs.popitem(last=False)
        self._waiting.append(job)
        job.task = asyncio.get_running_loop().create_task(self._process(job, run, on_finished))
        self._tasks.add(job.task)
        job.task.add_done_callback(self._on_task_done)

    def cancel(self, job: Job) -> None:
        """Cancel a job that has not ended. It is not billed."""
        job.finish(CANCELLED)
        self._stop_waiting(job)
        if job.task is not None:
            job.task.cancel()
        self.notify()

    def notify(self) -> None:
        """Wake all `changes` iterators."""
        self._changed.set()
        self._changed = asyncio.Event()

    async def changes(self, job: Job) -> AsyncIterator[None]:
        """Yield once at the start and once after each change, until the job has ended."""
        while not self._is_closed:
            changed = self._changed
            is_last = job.response is not None
            yield
            if is_last:
                return
            await changed.wait()

    def open(self) -> None:
        self._is_closed = False

    async def close(self) -> None:
        """Cancel all jobs and end all `changes` iterators."""
        self._is_closed = True
        tasks = tuple(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self.notify()

    async def _process(self, job: Job, run: RunJob, on_finished: OnFinished) -> None:
        try:
            job.finish(await self._run_when_free(job, run))
        except Exception:
            log.exception("job %s of %s failed with an unexpected error", job.id, job.endpoint)
            job.finish(INTERNAL_ERROR)
        finally:
            self._stop_waiting(job)
            self.notify()
        await on_finished(job)

    async def _run_when_free(self, job: Job, run: RunJob) -> FalResponse:
        limit = asyncio.timeout(job.start_timeout)
        try:
            async with limit, self._runners:
                await asyncio.sleep(job.start_delay)
                limit.reschedule(None)
                self._stop_waiting(job)
                job.started_at = time.monotonic()
                self.notify()
                return await run(job)
        except FalError as error:
            return error.response
        except TimeoutError:
            if limit.expired():
                return START_TIMEOUT
            raise

    def _on_task_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()):
            log.error("the callback of a finished job failed", exc_info=error)

    def _stop_waiting(self, job: Job) -> None:
        if job in self._waiting:
            self._waiting.remove(job)
