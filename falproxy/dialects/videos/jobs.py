"""The life of a video: recorded in the ledger, submitted to fal, followed to its end.

A job is written to the ledger before its submit, and fal's id before the response to the client.
Hence a video that fal has accepted is never submitted again, and is found after a restart.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, replace
from typing import Final

from aiohttp import hdrs, web
from aiohttp.typedefs import Handler

from falproxy.dialects.generate.jobs import (
    CLIENT_LEFT,
    JobDeps,
    SubmitTask,
    job_id_of,
    ledger_unavailable,
    save_job,
)
from falproxy.dialects.openai.errors import error_from_response
from falproxy.dialects.openai.media_files import MediaFiles
from falproxy.dialects.queue_client import (
    BufferedResponse,
    QueueClient,
    QueuedJob,
    submit_call,
)
from falproxy.dialects.videos.requests import VideoReader, VideoSpec
from falproxy.dialects.videos.results import VIDEO, parse_video_result
from falproxy.dialects.videos.schema import Video, VideoError
from falproxy.errors import ProxyError
from falproxy.fal.pricing import MICROS_PER_USD, charged_cost, parse_decimal, parse_units
from falproxy.proxy.call import OWNER, USER
from falproxy.proxy.prices import COST_HEADER
from falproxy.stores.cache.virtual_requests import is_virtual_id
from falproxy.stores.ledger import (
    UNFINISHED_STATUSES,
    InvalidRowError,
    JobRow,
    JobStatus,
    LedgerError,
    new_job_id,
)

logger = logging.getLogger(__name__)

API: Final = "videos"
ID_PREFIX = "video_"
FILES = "files"  # the URLs of the variants of a video, in the details of its job
# Errors of a repeated request, after which the first one with its Idempotency-Key goes on.
FIRST_ATTEMPT_ERRORS = (
    "idempotency_in_progress", "idempotency_response_dropped", "idempotency_unavailable",
)  # fmt: skip
UNITS_HEADER = "x-fal-billable-units"
STATUSES = {"running": "in_progress"}
COMPLETE, PROGRESS_MAX = 100, 99  # percent; PROGRESS_MAX of a video that is not complete

RefreshUrls = Callable[[Iterable[str]], Awaitable[dict[str, str]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoDeps(JobDeps):
    """Dependencies of the videos API.

    fresh_urls: renews expiring URLs of stored files.
    """

    reader: VideoReader
    files: MediaFiles
    fresh_urls: RefreshUrls | None = None

    def finish(self, row: JobRow, response: BufferedResponse) -> JobRow:
        is_free = row.request_id is not None and is_virtual_id(row.request_id)
        units = parse_units(response.headers.get(UNITS_HEADER))
        price = self.prices.known(row.endpoint)
        settled = 0 if is_free else charged_cost(price, units, response.status)
        if settled is None and response.status == web.HTTPOk.status_code:
            settled = micros_of(response.headers.get(COST_HEADER))
        row = replace(row, settled=settled)
        if response.status != web.HTTPOk.status_code:
            return failed_row(row, job_error(response))
        result = parse_video_result(response.body)
        if VIDEO not in result.urls:
            message = "The model's result has no video."
            return failed_row(row, ProxyError(502, "no_video", message))
        found = {"seconds": result.seconds, "size": result.size, FILES: dict(result.urls)}
        details = {**row.details, **{name: value for name, value in found.items() if value}}
        return replace(row, status="completed", details=details)


class VideoJob:
    """A video in the process that creates it."""

    def __init__(
        self,
        request: web.Request,
        handler: Handler,
        deps: VideoDeps,
        spec: VideoSpec,
        follow: Callable[[JobRow], None],
    ) -> None:
        """follow: polls the job until it ends."""
        self._request = request
        self._deps = deps
        self._spec = spec
        self._follow = follow
        self._queue_client = QueueClient(request, handler, deps.wait_policy)
        params = spec.params
        seconds = None if params.seconds in (None, "") else str(params.seconds)
        self.row = JobRow(
            id=ID_PREFIX + (job_id_of(request) or new_job_id()),
            api=API,
            owner=request.get(OWNER, ""),
            user_id=request.get(USER),
            model=spec.name,
            endpoint=spec.model.endpoint,
            details={"prompt": params.prompt, "seconds": seconds, "size": params.size or None},
        )

    def __repr__(self) -> str:
        return f"<VideoJob {self.row.id} {self.row.endpoint}, fal id {self.row.request_id}>"

    async def create(self) -> QueuedJob:
        """Submit the job. Raises: ProxyError."""
        try:
            self.row = await self._deps.jobs.add_job(self.row, self._deps.lease)
        except InvalidRowError as error:
            raise ProxyError(400, "invalid_request", "The request cannot be stored.") from error
        except LedgerError as error:  # the client could not find the video later
            raise ledger_unavailable() from error
        submission = asyncio.get_running_loop().create_task(self._submit())
        total = self._deps.wait_policy.total
        try:
            async with asyncio.timeout(total):
                submitted = await asyncio.shield(submission)
        except TimeoutError:
            self._deps.wait_policy.background.spawn(self._abandon(submission))
            message = f"fal.ai timed out after {total:g} s."
            raise ProxyError(504, "upstream_timeout", message) from None
        except asyncio.CancelledError:
            self._deps.wait_policy.background.spawn(self._abandon(submission))
            raise
        if isinstance(submitted, BufferedResponse):
            raise error_from_response(submitted)
        return submitted

    async def _submit(self) -> QueuedJob | BufferedResponse:
        """Return the job that fal accepted, or fal's error response, for which there is no video.
        Raises: ProxyError."""
        call = submit_call(self._spec.model.endpoint, self._spec.body, self._request.headers)
        try:
            submitted = await self._queue_client.submit(call)
        except ProxyError as error:
            if error.code in FIRST_ATTEMPT_ERRORS:  # the job is that of the first attempt
                raise
            if error.status >= web.HTTPInternalServerError.status_code:
                self.row = await save_job(failed_row(self.row, error), self._deps)
            else:
                await self._discard()
            raise
        if isinstance(submitted, BufferedResponse):
            await self._discard()
        elif self.row.status in UNFINISHED_STATUSES:  # it may be an earlier attempt with the key
            accepted = replace(
                self.row,
                app=submitted.app,
                request_id=submitted.request_id,
                estimated=micros_of(submitted.result_headers.get(COST_HEADER)),
            )
            self.row = await save_job(accepted, self._deps)
            self._follow(self.row)
        return submitted

    async def _discard(self) -> None:
        try:
            await self._deps.jobs.delete_job(self.row.id, self.row.owner)
        except LedgerError:
            logger.warning("The job of a refused video stays in the ledger")

    async def _abandon(self, submission: SubmitTask) -> None:
        """Cancel a video whose client left without its id, unless the job is shared. The submit may
        still be in progress."""
        self._queue_client.detach_from_request()
        try:
            submitted = await submission
        except ProxyError:
            return  # there is no job
        if isinstance(submitted, QueuedJob) and not submitted.is_shared:
            self._queue_client.cancel_unfinished([submitted])
            await save_job(failed_row(self.row, CLIENT_LEFT), self._deps)


def job_error(response: BufferedResponse) -> ProxyError:
    """Return the error of a job that failed at fal."""
    if response.status == web.HTTPNotFound.status_code:
        return ProxyError(500, "job_lost", "fal.ai does not have this job any more.")
    return error_from_response(response)


def failed_row(row: JobRow, error: ProxyError) -> JobRow:
    return replace(row, status="failed", error=error.code, error_message=error.message)


def micros_of(usd: str | None) -> int | None:
    amount = None if usd is None else parse_decimal(usd)
    return None if amount is None else int(amount * MICROS_PER_USD)


def to_video(row: JobRow, percent: int | None = None) -> Video:
    """Return the video of a job. percent: how much of it is done, if that is known."""
    status: JobStatus = row.status
    error = None
    if status == "failed":
        message = row.error_message or "The video failed."
        error = VideoError(code=row.error or "failed", message=message)
    progress = min(percent or 0, PROGRESS_MAX) if status in UNFINISHED_STATUSES else 0
    facts = {
        "id": row.id,
        "status": STATUSES.get(status, status),
        "progress": COMPLETE if status == "completed" else progress,
        "model": row.model,
        "created_at": int(row.created_at),
        "completed_at": int(row.finished_at or row.updated_at) if status == "completed" else None,
        "error": error,
    }
    details = {name: row.details.get(name) for name in ("prompt", "seconds", "size")}
    return Video.model_validate({**facts, **details})


async def find_video(request: web.Request, deps: VideoDeps) -> JobRow:
    """Return the job of the video in a request's path. Raises: ProxyError 404, 503."""
    video_id = request.match_info["id"]
    try:
        row = None
        if video_id.startswith(ID_PREFIX):
            row = await deps.find_job(video_id, request.get(OWNER, ""))
    except LedgerError as error:
        raise jobs_unavailable() from error
    if row is None:
        raise video_not_found()
    return row


def video_not_found() -> ProxyError:
    return ProxyError(404, "video_not_found", "There is no such video.")


def jobs_unavailable() -> ProxyError:
    message = "Videos cannot be looked up now. Try again soon."
    return ProxyError(503, "ledger_unavailable", message, {hdrs.RETRY_AFTER: "5"})
