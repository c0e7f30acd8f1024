"""The life of a job: recorded in the ledger, submitted to fal, followed to its end."""

import asyncio
import json
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from hashlib import sha256

from aiohttp import hdrs, web
from aiohttp.typedefs import Handler

from falproxy.dialects.generate.requests import RESPOND_ASYNC, JobSpec
from falproxy.dialects.generate.responses import finished_row, job_to_document, result_error
from falproxy.dialects.generate.unsaved_jobs import SETTLE_SECONDS, UnsavedJobs
from falproxy.dialects.queue_client import (
    BufferedResponse,
    QueueClient,
    QueuedJob,
    WaitPolicy,
    submit_call,
)
from falproxy.errors import ProxyError
from falproxy.fal.policy import Globs
from falproxy.fal.queue_documents import QueueState
from falproxy.fal.registry import Registry, RegistryModel
from falproxy.proxy.call import CACHE_OUTCOME, OWNER, UPSTREAM_SECONDS
from falproxy.proxy.idempotency_key import CLIENT_DIGEST, IS_REPLAYED, read_idempotency_key
from falproxy.proxy.prices import COST_HEADER, SAVED_HEADER, PriceBook, PriceUnavailable
from falproxy.stores.ledger import FREE_OUTCOMES, JobRow, Jobs, Lease, LedgerError

logger = logging.getLogger(__name__)

FORWARDED_RESPONSE_HEADERS = (
    hdrs.AGE, "Cache-Status", COST_HEADER, SAVED_HEADER, "x-fal-request-id", "x-falproxy-rehost",
)  # fmt: skip
# Seconds after which a job without fal's id counts as lost: the process died before the submit.
SUBMIT_TIMEOUT = 300.0
SAVE_TIMEOUT = 1.0  # seconds that a call waits for each write to the ledger
FOLLOW_TIMEOUT = 4 * 3600.0  # seconds after which a job is no longer polled without a client
JOB_ID_LENGTH = 32  # of all jobs, such as those with a random id
JOBS_PATH = "/api/images/jobs/"
CLIENT_LEFT = ProxyError(499, "client_left", "The client disconnected before the job ended.")
LEDGER_UNAVAILABLE = "Jobs cannot be stored now. Try again soon, or without Prefer: respond-async."

RefreshUrls = Callable[[Iterable[str]], Awaitable[dict[str, str]]]
SubmitTask = asyncio.Task[QueuedJob | BufferedResponse]


@dataclass(frozen=True, slots=True, kw_only=True)
class JobDeps(ABC):
    """The dependencies of an API with jobs.

    jobs: the ledger's store of jobs.
    lease: lease of the jobs that this process follows, and their API.
    prices: of all endpoints.
    unsaved: jobs whose write failed.
    """

    jobs: Jobs
    lease: Lease
    wait_policy: WaitPolicy
    prices: PriceBook = field(default_factory=partial(PriceBook, dict))
    unsaved: UnsavedJobs = field(init=False)

    def __post_init__(self) -> None:
        unsaved = UnsavedJobs(self.jobs, self.lease, self.wait_policy.background)
        object.__setattr__(self, "unsaved", unsaved)

    async def await_price(self, endpoint: str) -> None:
        """Wait until the price of an endpoint is known, for the few seconds that it can take."""
        with suppress(PriceUnavailable):
            await self.prices.get(endpoint)

    async def find_job(self, job_id: str, owner: str) -> JobRow | None:
        """Return a job, None if it is certain that there is none: no process holds it in memory,
        because the ledger could not be written.

        Raises: LedgerError.
        """
        row = self.unsaved.get(job_id, owner) or await self.jobs.get_job(job_id, owner)
        if row is None:
            await self.jobs.probe()
            await asyncio.sleep(SETTLE_SECONDS)
            row = await self.jobs.get_job(job_id, owner)
        return row if row is not None and row.api == self.lease.api else None

    @abstractmethod
    def finish(self, row: JobRow, response: BufferedResponse) -> JobRow:
        """Return the job with the outcome of fal's response."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateDeps(JobDeps):
    """Dependencies of the generate API.

    max_body: bytes of a request.
    endpoints: allowed endpoints; empty allows all.
    fresh_urls: renews expiring URLs of stored files.
    """

    registry: Registry
    max_body: int
    endpoints: Globs = field(default_factory=partial(Globs, ()))
    fresh_urls: RefreshUrls | None = None

    def finish(self, row: JobRow, response: BufferedResponse) -> JobRow:
        model = self.registry.model_at(row.model, row.endpoint)
        return finished_row(row, response, model, self.prices)


class GenerateJob:
    """A job in the process that created it.

    The job is written to the ledger before its submit, and fal's id before the response to the
    client. Hence a job that fal has accepted is never submitted again.
    """

    def __init__(
        self,
        request: web.Request,
        handler: Handler,
        deps: GenerateDeps,
        spec: JobSpec,
        row: JobRow,
        follow: Callable[[JobRow], None],
    ) -> None:
        """follow: continues to poll a job whose result could not be fetched."""
        self._request = request
        self._deps = deps
        self._spec = spec
        self._row = row
        self._follow = follow
        self._queue_client = QueueClient(request, handler, deps.wait_policy)

    def __repr__(self) -> str:
        row = self._row
        return f"<GenerateJob {row.id} {row.model}, {row.status}, fal id {row.request_id}>"

    async def respond(self) -> web.Response:
        """Return the result, or 202 with the URL of the job if the client does not wait for it.

        Raises: ProxyError.
        """
        await self._add_row()
        started = time.perf_counter()
        submission = asyncio.get_running_loop().create_task(self._submit())
        try:
            result = await self._wait_result(submission)
            if isinstance(result, QueuedJob):
                return self._respond_accepted(submission)
            await self._finish(result)
        except asyncio.CancelledError:
            self._deps.wait_policy.background.spawn(self._abandon(submission, CLIENT_LEFT))
            raise
        except ProxyError as error:
            self._deps.wait_policy.background.spawn(self._abandon(submission, error))
            raise
        finally:
            self._request[UPSTREAM_SECONDS] = time.perf_counter() - started
        return job_response(self._row, result, self._spec.model)

    async def _wait_result(self, submission: SubmitTask) -> QueuedJob | BufferedResponse:
        """Return the result, or the accepted job if the wait ends before the job does.

        Raises: ProxyError 504, and the errors of the submit.
        """
        total = self._deps.wait_policy.total
        try:
            async with asyncio.timeout(total):
                submitted = await asyncio.shield(submission)
                if isinstance(submitted, BufferedResponse) or self._spec.is_async:
                    return submitted
                return await self._queue_client.wait_result(submitted)
        except TimeoutError:
            if submission.done():
                return submission.result()
            message = f"fal.ai timed out after {total:g} s."
            raise ProxyError(504, "upstream_timeout", message) from None
        except ProxyError:
            if submission.exception() is not None:
                raise
            return submission.result()  # fal has accepted the job, and only a poll failed

    async def _add_row(self) -> None:
        try:
            async with asyncio.timeout(None if self._spec.is_async else SAVE_TIMEOUT):
                self._row = await self._deps.jobs.add_job(self._row, self._deps.lease)
        except (LedgerError, TimeoutError) as error:
            if self._spec.is_async:  # the client could not get the result later
                raise ledger_unavailable() from error
            logger.warning("A job is saved later: %s", str(error) or "the ledger is slow")
            self._deps.unsaved.hold(self._row)

    async def _submit(self) -> QueuedJob | BufferedResponse:
        """Return the job that fal accepted, or fal's error response."""
        call = submit_call(self._spec.model.endpoint, self._spec.body, self._request.headers)
        try:
            submitted = await self._queue_client.submit(call)
        except ProxyError as error:
            if not error.code.startswith("idempotency_"):  # not the end of the first attempt
                await self._fail(error)
            raise
        if isinstance(submitted, QueuedJob) and self._row.status != "completed":
            running = replace(
                self._row, app=submitted.app, request_id=submitted.request_id, status="running"
            )
            self._row = await save_job(running, self._deps)
        return submitted

    def _respond_accepted(self, submission: SubmitTask) -> web.Response:
        """Return 202 with the URL of the job, which continues in the background."""
        self._deps.wait_policy.background.spawn(self._finish_in_background(submission))
        location = f"{self._request.path.rpartition('/api/')[0]}{JOBS_PATH}{self._row.id}"
        applied = {"Preference-Applied": RESPOND_ASYNC} if self._spec.is_async else {}
        headers = {**applied, "Location": location}
        return web.json_response(job_to_document(self._row), status=202, headers=headers)

    async def _finish_in_background(self, submission: SubmitTask) -> None:
        self._queue_client.detach_from_request()
        try:
            async with asyncio.timeout(FOLLOW_TIMEOUT):
                result = await submission
                if isinstance(result, QueuedJob):
                    result = await self._queue_client.wait_result(result)
            await self._finish(result)
        except (ProxyError, TimeoutError) as error:
            logger.warning("The result of a job could not be fetched: %s", type(error).__name__)
            self._follow(self._row)

    async def _abandon(self, submission: SubmitTask, error: ProxyError) -> None:
        """Cancel the job at fal, unless it is shared or done: then record its result. The submit
        may still be in progress."""
        self._queue_client.detach_from_request()
        try:
            submitted = await submission
        except ProxyError:
            return  # there is no job
        if isinstance(submitted, BufferedResponse) or submitted.is_shared or submitted.is_done:
            await self._finish_in_background(submission)
            return
        self._queue_client.cancel_unfinished([submitted])
        await self._fail(error)

    async def _fail(self, error: ProxyError) -> None:
        failed = replace(self._row, status="failed", error=error.code, error_message=error.message)
        self._row = await save_job(failed, self._deps)

    async def _finish(self, response: BufferedResponse) -> None:
        if self._row.status == "completed":  # by an earlier attempt with the same key
            return
        await self._deps.await_price(self._row.endpoint)
        finished = finished_row(self._row, response, self._spec.model, self._deps.prices)
        is_free = self._request.get(CACHE_OUTCOME) in FREE_OUTCOMES
        if is_free and IS_REPLAYED not in self._request:
            finished = replace(finished, settled=0)
        self._row = await save_job(finished, self._deps)


def job_id_of(request: web.Request) -> str | None:
    """Return the id of the job that all requests with the same Idempotency-Key and body share; None
    for a request without a key."""
    key = read_idempotency_key(request.headers)
    if key is None:
        return None
    identity = [request.get(OWNER, ""), key, request[CLIENT_DIGEST]]
    return sha256(json.dumps(identity).encode()).hexdigest()[:JOB_ID_LENGTH]


async def try_refresh(row: JobRow, queue_client: QueueClient, deps: JobDeps) -> JobRow:
    """Return the refreshed job, or the job unchanged if fal is unavailable.

    Raises: ProxyError, fal or the policy rejects the request.
    """
    return (await try_refresh_state(row, queue_client, deps))[0]


async def try_refresh_state(
    row: JobRow, queue_client: QueueClient, deps: JobDeps, *, with_logs: bool = False
) -> tuple[JobRow, QueueState]:
    """Refresh a job as `try_refresh` does. Return it with its state in fal's queue.

    Raises: ProxyError.
    """
    try:
        async with asyncio.timeout(deps.wait_policy.total):
            return await refresh_state(row, queue_client, deps, with_logs=with_logs)
    except TimeoutError:
        logger.warning("A job could not be refreshed: fal does not respond")
    except ProxyError as error:
        if error.status < web.HTTPInternalServerError.status_code:
            raise
        logger.warning("A job could not be refreshed: %s", error.code)
    return row, QueueState(is_started=row.status == "running")


async def refresh(row: JobRow, queue_client: QueueClient, deps: JobDeps) -> JobRow:
    """Update a job from fal, without a submit. A job that fal does not have counts as lost after
    SUBMIT_TIMEOUT.

    Raises: ProxyError.
    """
    return (await refresh_state(row, queue_client, deps))[0]


async def refresh_state(
    row: JobRow, queue_client: QueueClient, deps: JobDeps, *, with_logs: bool = False
) -> tuple[JobRow, QueueState]:
    """Update a job as `refresh` does. Return it with its state in fal's queue.

    Raises: ProxyError.
    """
    if row.request_id is None:
        if time.time() - row.created_at < SUBMIT_TIMEOUT:
            return row, QueueState()
        message = "The job was lost before fal.ai confirmed it."
        lost = replace(row, status="failed", error="job_lost", error_message=message)
        return await save_job(lost, deps), QueueState()
    job = QueuedJob(row.app, row.request_id, is_shared=True)
    state = await queue_client.poll(job, with_logs=with_logs)
    if state.is_completed:
        await deps.await_price(row.endpoint)
        row = await save_job(deps.finish(row, await queue_client.fetch_result(job)), deps)
    elif state.is_started and row.status == "queued":
        row = await save_job(replace(row, status="running"), deps)
    return replace(row, position=state.position), state


async def save_job(row: JobRow, deps: JobDeps) -> JobRow:
    """Write a job to the ledger, now or later, and return it. The call goes on without the
    ledger."""
    deps.unsaved.update(row)
    try:
        async with asyncio.timeout(SAVE_TIMEOUT):
            return await deps.jobs.save_job(row) or row
    except (LedgerError, TimeoutError) as error:
        logger.warning("A job is saved later: %s", str(error) or "the ledger is slow")
        deps.unsaved.hold(row)
    return row


def ledger_unavailable() -> ProxyError:
    return ProxyError(503, "ledger_unavailable", LEDGER_UNAVAILABLE, {hdrs.RETRY_AFTER: "5"})


def job_response(row: JobRow, response: BufferedResponse, model: RegistryModel) -> web.Response:
    """Return the response for a finished job. The error of a failed job determines its status."""
    failure = result_error(response, model)
    headers = {
        name: response.headers[name]
        for name in FORWARDED_RESPONSE_HEADERS
        if name in response.headers
    }
    return web.json_response(
        job_to_document(row),
        status=200 if failure is None else failure.status,
        headers=headers if failure is None else {**headers, **failure.headers},
    )
