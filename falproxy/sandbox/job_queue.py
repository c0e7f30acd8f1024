"""The queue: jobs wait for one of a few runners, first come, first served."""

import asyncio
import logging
import time
import uuid
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime

from falproxy.sandbox.responses import Answer, FalError, plain, request_error

log = logging.getLogger(__name__)

KEPT_MAX = 2000  # finished jobs whose results can still be read
CANCELLED = request_error(499, "client_cancelled", "Request was cancelled by the client.").answer
BROKEN = plain(500, "Internal Server Error").answer
LATE = request_error(
    504,
    "request_timeout",
    "Request did not start within the time that the caller allowed.",
    {"X-Fal-Request-Timeout-Type": "user"},
).answer


@dataclass(slots=True)
class Job:
    """One submitted request.

    endpoint: the full id. app: owner and alias. prompt: may hold orders to the sandbox.
    pause: seconds that even a free runner takes to start it. start_timeout: seconds the caller
    allows until it runs. logs: grow while it runs.
    """

    endpoint: str
    app: str
    account: str
    prompt: str
    webhook: str | None = None
    pause: float = 0.0
    start_timeout: float | None = None
    id: str = field(default_factory=lambda: str(uuid.uuid4()))
    logs: list[dict[str, str]] = field(default_factory=list)
    started: float | None = None
    seconds: float | None = None
    answer: Answer | None = None
    task: asyncio.Task[None] | None = None

    def log(self, message: str) -> None:
        stamp = datetime.now(UTC).isoformat()
        line = {"message": message, "timestamp": stamp, "level": "INFO", "source": "USER"}
        self.logs.append(line)

    def finish(self, answer: Answer) -> None:
        if self.started is not None:
            self.seconds = time.monotonic() - self.started
        self.answer = answer


Work = Callable[[Job], Awaitable[Answer]]
Finished = Callable[[Job], Awaitable[None]]


class Queue:
    """Jobs by id, and who waits for a runner. It owns the jobs' tasks: `close` ends them."""

    def __init__(self, runners: int) -> None:
        self._jobs: OrderedDict[str, Job] = OrderedDict()
        self._waiting: list[Job] = []
        self._runners = asyncio.Semaphore(runners)
        self._tasks: set[asyncio.Task[None]] = set()
        self._changed = asyncio.Event()
        self._is_closed = False

    def __len__(self) -> int:
        """How many jobs wait."""
        return len(self._waiting)

    def get(self, request_id: str) -> Job | None:
        return self._jobs.get(request_id)

    def position(self, job: Job) -> int | None:
        """How many wait ahead; None when it does not wait."""
        return self._waiting.index(job) if job in self._waiting else None

    def submit(self, job: Job, work: Work, finished: Finished) -> None:
        """Take the job in. `finished` is told of its end, unless it was cancelled."""
        self._jobs[job.id] = job
        while len(self._jobs) > KEPT_MAX and next(iter(self._jobs.values())).answer:
            self._jobs.popitem(last=False)
        self._waiting.append(job)
        job.task = asyncio.get_running_loop().create_task(self._see_through(job, work, finished))
        self._tasks.add(job.task)
        job.task.add_done_callback(self._ended)

    def cancel(self, job: Job) -> None:
        """End a job that has no answer yet; it is not paid."""
        job.finish(CANCELLED)
        self._leave(job)
        if job.task is not None:
            job.task.cancel()
        self.tell()

    def tell(self) -> None:
        """Wake everybody who follows a job."""
        self._changed.set()
        self._changed = asyncio.Event()

    async def follow(self, job: Job) -> AsyncIterator[None]:
        """One turn now and one after each change, the last when the job has its answer."""
        while not self._is_closed:
            changed = self._changed
            is_last = job.answer is not None
            yield
            if is_last:
                return
            await changed.wait()

    def open(self) -> None:
        self._is_closed = False

    async def close(self) -> None:
        """End all jobs, and the streams that follow them."""
        self._is_closed = True
        tasks = tuple(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self.tell()

    async def _see_through(self, job: Job, work: Work, finished: Finished) -> None:
        try:
            job.finish(await self._answer(job, work))
        except Exception:
            log.exception("job %s of %s broke", job.id, job.endpoint)
            job.finish(BROKEN)
        finally:
            self._leave(job)
            self.tell()
        await finished(job)

    async def _answer(self, job: Job, work: Work) -> Answer:
        limit = asyncio.timeout(job.start_timeout)
        try:
            async with limit, self._runners:
                await asyncio.sleep(job.pause)
                limit.reschedule(None)
                self._leave(job)
                job.started = time.monotonic()
                self.tell()
                return await work(job)
        except FalError as error:
            return error.answer
        except TimeoutError:
            if limit.expired():
                return LATE
            raise

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()):
            log.error("the end of a job could not be told", exc_info=error)

    def _leave(self, job: Job) -> None:
        if job in self._waiting:
            self._waiting.remove(job)
