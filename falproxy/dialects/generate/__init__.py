"""`/api/images` and `/api/templates`: one endpoint for every model, with jobs that can be asked
for again."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial

from aiohttp import hdrs, web
from aiohttp.typedefs import Handler, Middleware

from falproxy.dialects import DialectRoute, default_error
from falproxy.dialects.generate.model_list import list_models
from falproxy.dialects.generate.requests import (
    RESPOND_ASYNC,
    JobSpec,
    check_method,
    read_generate,
    read_template,
)
from falproxy.dialects.generate.responses import finished_row, job_to_response, result_error
from falproxy.dialects.queue_client import (
    BufferedResponse,
    QueueClient,
    QueuedJob,
    WaitPolicy,
    submit_call,
)
from falproxy.errors import ProxyError
from falproxy.fal.policy import Globs
from falproxy.fal.registry import Registry, RegistryModel
from falproxy.proxy.call import CACHE_OUTCOME, OWNER, UPSTREAM_SECONDS, USER_ID
from falproxy.stores.ledger import (
    REUSED_OUTCOMES,
    UNFINISHED_STATUSES,
    JobRow,
    Jobs,
    Lease,
    LedgerError,
)

logger = logging.getLogger(__name__)

FORWARDED_RESPONSE_HEADERS = (hdrs.AGE, "Cache-Status", "x-fal-request-id", "x-falproxy-rehost")
# Seconds after which a job that fal never got is given up: whoever was to send it has died.
SUBMIT_TIMEOUT = 300.0
SAVE_TIMEOUT = 1.0  # seconds that a call waits for the ledger at a time
FOLLOW_TIMEOUT = 4 * 3600.0  # seconds after which a job is not followed any more
JOBS_PATH = "/api/images/jobs/"
CLIENT_LEFT = ProxyError(499, "client_left", "The client left before the job had ended.")
LEDGER_UNAVAILABLE = (
    "Jobs cannot be kept for now; try again soon, or without Prefer: respond-async."
)

RefreshUrls = Callable[[Iterable[str]], Awaitable[dict[str, str]]]
ReadRequest = Callable[[web.Request, Registry, int], Awaitable[JobSpec]]
SubmitTask = asyncio.Task[QueuedJob | BufferedResponse]


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateDeps:
    """jobs: where they are kept. lease: this process, as one that sees to jobs. endpoints: the
    only ones that may be called, none for all. renew: good addresses for those of kept files that
    pass."""

    registry: Registry
    jobs: Jobs
    lease: Lease
    wait_policy: WaitPolicy
    max_body: int
    endpoints: Globs = field(default_factory=partial(Globs, ()))
    fresh_urls: RefreshUrls | None = None


def generate_routes(deps: GenerateDeps) -> dict[str, DialectRoute]:
    """Each path with how it is served."""
    post, get = (partial(check_method, method=method) for method in ("POST", "GET"))
    listed = list_models(deps.registry, deps.endpoints)
    return {
        "/api/images/generate": DialectRoute(post, create_job(deps, read_generate), default_error),
        "/api/templates/{name}": DialectRoute(post, create_job(deps, read_template), default_error),
        "/api/images/jobs/{id}": DialectRoute(get, get_job(deps), default_error),
        "/api/images/models": DialectRoute(get, listed, default_error),
    }


def create_job(deps: GenerateDeps, read: ReadRequest) -> Middleware:
    """Middleware: an order becomes a job, and its result the answer."""

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        order = await read(request, deps.registry, deps.max_body)
        if order.user_id is not None:
            request[USER_ID] = order.user_id
        row = JobRow(
            owner=request.get(OWNER, ""),
            user_id=order.user_id,
            model=order.model.name,
            endpoint=order.model.endpoint,
        )
        return await GenerateJob(request, handler, deps, order, row).respond()

    return middleware


def get_job(deps: GenerateDeps) -> Middleware:
    """Middleware: a job as it is now. One that nobody follows any more, since the process that
    took it has died, is asked about at fal."""

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            row = await deps.jobs.get_job(request.match_info["id"], request.get(OWNER, ""))
        except LedgerError as error:
            raise ledger_unavailable() from error
        if row is None:
            raise ProxyError(404, "job_not_found", "There is no such job.")
        if row.status in UNFINISHED_STATUSES:
            row = await try_refresh(row, QueueClient(request, handler, deps.wait_policy), deps)
        if row.images and deps.fresh_urls is not None:
            urls = await deps.fresh_urls([image.url for image in row.images])
            images = (replace(image, url=urls.get(image.url, image.url)) for image in row.images)
            row = replace(row, images=tuple(images))
        return web.json_response(text=job_to_response(row).model_dump_json(by_alias=True))

    return middleware


async def try_refresh(row: JobRow, queue_client: QueueClient, deps: GenerateDeps) -> JobRow:
    """The job as fal knows it, or as it was known when fal does not say. Raises: ProxyError."""
    try:
        async with asyncio.timeout(deps.wait_policy.total):
            return await refresh(row, queue_client, deps)
    except TimeoutError:
        logger.warning("A job could not be asked about: fal does not answer")
    except ProxyError as error:
        if error.status < web.HTTPInternalServerError.status_code:
            raise
        logger.warning("A job could not be asked about: %s", error.code)
    return row


async def refresh(row: JobRow, queue_client: QueueClient, deps: GenerateDeps) -> JobRow:
    """The job as fal knows it. Raises: ProxyError."""
    if row.request_id is None:
        if time.time() - row.created_at < SUBMIT_TIMEOUT:
            return row
        message = "The job was lost before fal.ai confirmed it."
        return await save_job(
            replace(row, status="failed", error="job_lost", error_message=message), deps
        )
    ticket = QueuedJob(row.app, row.request_id, is_shared=True)
    if not await queue_client.poll_done(ticket):
        return row
    answer = await queue_client.wait_result(ticket)
    return await save_job(finished_row(row, answer, deps.registry.models.get(row.model)), deps)


async def save_job(row: JobRow, deps: GenerateDeps) -> JobRow:
    """Whether or not it can be kept, it is what it is, and nobody waits long for a ledger."""
    try:
        async with asyncio.timeout(SAVE_TIMEOUT):
            await deps.jobs.save_job(row)
    except (LedgerError, TimeoutError) as error:
        logger.warning("A job was not saved: %s", str(error) or "the ledger is slow")
    return row


def ledger_unavailable() -> ProxyError:
    return ProxyError(503, "ledger_unavailable", LEDGER_UNAVAILABLE, {hdrs.RETRY_AFTER: "5"})


class GenerateJob:
    """One order on its way. It is in the ledger before fal hears of it, and fal's id before the
    client does: what was accepted is never bought again."""

    def __init__(
        self,
        request: web.Request,
        handler: Handler,
        deps: GenerateDeps,
        spec: JobSpec,
        row: JobRow,
    ) -> None:
        self._request = request
        self._deps = deps
        self._spec = spec
        self._row = row
        self._queue_client = QueueClient(request, handler, deps.wait_policy)

    async def respond(self) -> web.Response:
        """The result, or after a while where it can be had. Raises: ProxyError."""
        await self._add_row()
        started = time.perf_counter()
        taking = asyncio.get_running_loop().create_task(self._submit())
        try:
            taken = await self._wait_result(taking)
            if isinstance(taken, QueuedJob):
                return self._respond_accepted(taking)
            await self._finish(taken)
        except asyncio.CancelledError:
            self._deps.wait_policy.background.spawn(self._abandon(taking, CLIENT_LEFT))
            raise
        except ProxyError as error:
            self._deps.wait_policy.background.spawn(self._abandon(taking, error))
            raise
        finally:
            self._request[UPSTREAM_SECONDS] = time.perf_counter() - started
        return job_response(self._row, taken, self._spec.model)

    async def _wait_result(self, submission: SubmitTask) -> QueuedJob | BufferedResponse:
        """What came of the job; the job itself where that is not waited for any longer.

        Raises: ProxyError 504, and what the way raises.
        """
        total = self._deps.wait_policy.total
        try:
            async with asyncio.timeout(total):
                taken = await asyncio.shield(submission)
                if isinstance(taken, BufferedResponse) or self._spec.is_async:
                    return taken
                return await self._queue_client.wait_result(taken)
        except TimeoutError:
            if submission.done():
                return submission.result()
            message = f"fal.ai timed out after {total:g} s."
            raise ProxyError(504, "upstream_timeout", message) from None
        except ProxyError:
            if submission.exception() is not None:
                raise
            return submission.result()  # fal has the job, whatever keeps us from asking about it

    async def _add_row(self) -> None:
        try:
            async with asyncio.timeout(None if self._spec.is_async else SAVE_TIMEOUT):
                self._row = await self._deps.jobs.add_job(self._row, self._deps.lease)
        except (LedgerError, TimeoutError) as error:
            if self._spec.is_async:  # nobody could ask for it
                raise ledger_unavailable() from error
            logger.warning("A job was not saved: %s", error)

    async def _submit(self) -> QueuedJob | BufferedResponse:
        """fal's job, or its refusal."""
        call = submit_call(self._spec.model.endpoint, self._spec.body, self._request.headers)
        try:
            taken = await self._queue_client.submit(call)
        except ProxyError as error:
            await self._fail(error)
            raise
        if isinstance(taken, QueuedJob):
            running = replace(self._row, app=taken.app, request_id=taken.request_id)
            self._row = await save_job(replace(running, status="running"), self._deps)
        return taken

    def _respond_accepted(self, submission: SubmitTask) -> web.Response:
        """202: the job goes on, and is asked for by its id."""
        self._deps.wait_policy.background.spawn(self._finish_in_background(submission))
        place = f"{self._request.path.rpartition('/api/')[0]}{JOBS_PATH}{self._row.id}"
        applied = {"Preference-Applied": RESPOND_ASYNC} if self._spec.is_async else {}
        text = job_to_response(self._row).model_dump_json(by_alias=True)
        return web.json_response(text=text, status=202, headers={**applied, "Location": place})

    async def _finish_in_background(self, submission: SubmitTask) -> None:
        self._queue_client.detach_from_request()
        try:
            async with asyncio.timeout(FOLLOW_TIMEOUT):
                taken = await submission
                if isinstance(taken, QueuedJob):
                    taken = await self._queue_client.wait_result(taken)
            await self._finish(taken)
        except (ProxyError, TimeoutError) as error:  # whoever asks for the job asks fal
            logger.warning("A job was not followed to its end: %s", type(error).__name__)

    async def _abandon(self, submission: SubmitTask, error: ProxyError) -> None:
        """Nobody waits for the job any more, and nobody can ask for it. One that is there, or is
        kept for others, is seen to its end. fal may be taking it only now."""
        self._queue_client.detach_from_request()
        try:
            taken = await submission
        except ProxyError:
            return  # there is no job
        if isinstance(taken, BufferedResponse) or taken.is_shared or taken.is_done:
            await self._finish_in_background(submission)
            return
        self._queue_client.cancel_unfinished([taken])
        await self._fail(error)

    async def _fail(self, error: ProxyError) -> None:
        failed = replace(self._row, status="failed", error=error.code, error_message=error.message)
        self._row = await save_job(failed, self._deps)

    async def _finish(self, response: BufferedResponse) -> None:
        outcome = finished_row(self._row, response, self._spec.model)
        if self._request.get(CACHE_OUTCOME) in REUSED_OUTCOMES:
            outcome = replace(outcome, settled=0)
        self._row = await save_job(outcome, self._deps)


def job_response(row: JobRow, response: BufferedResponse, model: RegistryModel) -> web.Response:
    """A job that has ended. Its error is where all errors of the proxy are."""
    failure = result_error(response, model)
    told = {
        name: response.headers[name]
        for name in FORWARDED_RESPONSE_HEADERS
        if name in response.headers
    }
    return web.json_response(
        text=job_to_response(row).model_dump_json(by_alias=True),
        status=200 if failure is None else failure.status,
        headers=told if failure is None else {**told, **failure.headers},
    )
