"""The handlers of `/v1/videos`. Each is a middleware, because it calls fal through the handlers
below it."""

from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import replace

from aiohttp import hdrs, web
from aiohttp.typedefs import Handler, Middleware
from pydantic import BaseModel

from falproxy.dialects.generate.jobs import try_refresh_state
from falproxy.dialects.generate.takeover import JobTakeover
from falproxy.dialects.openai.errors import ImagesError, error_info, invalid_parameter
from falproxy.dialects.openai.handlers import RetryGuard, name_openai_user
from falproxy.dialects.queue_client import QueueClient, QueuedJob
from falproxy.dialects.videos.jobs import (
    FILES,
    VideoDeps,
    VideoJob,
    find_video,
    jobs_unavailable,
    to_video,
    video_not_found,
)
from falproxy.dialects.videos.model_inputs import REFERENCE
from falproxy.dialects.videos.results import VARIANT_FIELDS, VIDEO
from falproxy.dialects.videos.schema import DeletedVideo, VideoList, VideoRequest
from falproxy.errors import ProxyError
from falproxy.fal.model_schema import SINGLE_IMAGE_INPUTS
from falproxy.fal.pricing import format_usd
from falproxy.fal.queue_documents import QueueState
from falproxy.parse_digits import parse_digits
from falproxy.proxy.call import OWNER
from falproxy.proxy.limit_fields import openai_rate_fields
from falproxy.proxy.prices import COST_HEADER
from falproxy.stores.ledger import (
    UNFINISHED_STATUSES,
    JobQuery,
    JobRow,
    LedgerError,
    position_of,
)

LIMIT_DEFAULT, LIMIT_MAX = 20, 100
ORDERS = ("asc", "desc")
FAL_REQUEST_ID = "x-fal-request-id"
IMAGE_PARAM = "image"  # of errors about images in OpenAI's images API

VideoHandler = Callable[[web.Request, Handler], Awaitable[web.StreamResponse]]


def video_middleware(takeover: JobTakeover, handlers: Mapping[str, VideoHandler]) -> Middleware:
    """Middleware: respond by the handler of the request's method."""

    @web.middleware
    async def respond_by_method(request: web.Request, handler: Handler) -> web.StreamResponse:
        takeover.start(request, handler)
        return await handlers[request.method](request, handler)

    return respond_by_method


class VideoHandlers:
    """The handlers of the API. takeover: follows the jobs."""

    def __init__(self, deps: VideoDeps, takeover: JobTakeover) -> None:
        self._deps = deps
        self._takeover = takeover

    async def create(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Create a video, and respond with its job. Raises: ProxyError."""
        spec = await self._deps.reader.read(request)
        name_openai_user(request, spec.params)
        retry_guard = RetryGuard(handler)
        job = VideoJob(request, retry_guard, self._deps, spec, self._takeover.spawn_follow)
        try:
            submitted = await job.create()
        except ProxyError as error:
            retry_guard.forbid_retry(error)
            error.headers = {**openai_rate_fields(request), **error.headers}
            raise name_reference(error, spec.params) from error
        headers = {**submitted.result_headers, FAL_REQUEST_ID: submitted.request_id}
        return json_response(to_video(job.row), {**headers, **openai_rate_fields(request)})

    async def list(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Respond with a page of the caller's videos. Raises: ProxyError 400, 503."""
        owner, unsaved = request.get(OWNER, ""), self._deps.unsaved
        query = read_query(request, owner)
        try:
            if after := request.query.get("after"):
                last = await self._deps.jobs.get_job(after, owner)
                if last is None or last.api != query.api:
                    raise invalid_parameter("after", "after is not the id of a video.")
                query = replace(query, after=position_of(last))
            rows = await self._deps.jobs.list_jobs(replace(query, limit=query.limit + 1))
        except LedgerError as error:
            raise jobs_unavailable() from error
        videos = [to_video(unsaved.get(row.id, owner) or row) for row in rows[: query.limit]]
        return json_response(
            VideoList(
                data=videos,
                first_id=videos[0].id if videos else None,
                last_id=videos[-1].id if videos else None,
                has_more=len(rows) > query.limit,
            )
        )

    async def show(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Respond with the current state of a video. Raises: ProxyError."""
        row, state = await self._find_current(request, handler)
        return json_response(to_video(row, state.percent), cost_header(row))

    async def delete(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Delete a video; one that is not finished is cancelled first. Raises: ProxyError."""
        row = await find_video(request, self._deps)
        if row.status in UNFINISHED_STATUSES:
            await self._cancel(row, QueueClient(request, handler, self._deps.wait_policy))
        try:
            is_deleted = await self._deps.jobs.delete_job(row.id, row.owner)
        except LedgerError as error:
            raise jobs_unavailable() from error
        if not is_deleted:
            raise video_not_found()
        if row.status in UNFINISHED_STATUSES:
            self._takeover.read_outcome(row)
        return json_response(DeletedVideo(id=row.id))

    async def send_content(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Respond with the file of a video, or of one of its variants. Raises: ProxyError."""
        variant = request.query.get("variant") or VIDEO
        if variant not in VARIANT_FIELDS:
            message = f"The variant must be one of {', '.join(VARIANT_FIELDS)}."
            raise invalid_parameter("variant", message)
        row, _ = await self._find_current(request, handler)
        if row.status == "failed":
            message = row.error_message or "The video failed."
            raise ProxyError(404, row.error or "video_failed", message)
        if row.status != "completed":
            message = f"The video is not ready: it is {to_video(row).status}."
            raise ProxyError(404, "video_not_ready", message)
        files = row.details.get(FILES)
        url = files.get(variant) if isinstance(files, dict) else None
        if not isinstance(url, str):
            message = f"The model has made no {variant} of this video."
            raise ProxyError(404, "variant_not_found", message)
        if self._deps.fresh_urls is not None:
            url = (await self._deps.fresh_urls([url])).get(url, url)
        return await self._deps.files.respond(request, url, cost_header(row))

    async def _find_current(
        self, request: web.Request, handler: Handler
    ) -> tuple[JobRow, QueueState]:
        """Return the job of a video, refreshed from fal, and its state in fal's queue. Raises:
        ProxyError."""
        row = await find_video(request, self._deps)
        if row.status not in UNFINISHED_STATUSES:
            return row, QueueState()
        client = QueueClient(request, handler, self._deps.wait_policy)
        row, state = await try_refresh_state(row, client, self._deps, with_logs=True)
        if row.status not in UNFINISHED_STATUSES and row.finished_at is None:
            with suppress(LedgerError):  # another task has finished it
                row = await self._deps.jobs.get_job(row.id, row.owner) or row
        return row, state

    async def _cancel(self, row: JobRow, queue_client: QueueClient) -> None:
        """Cancel a job at fal. Raises: ProxyError, fal cannot be asked now."""
        if row.request_id is None:
            message = "The video is just being submitted. Try again."
            raise ProxyError(409, "video_not_submitted", message, {hdrs.RETRY_AFTER: "1"})
        response = await queue_client.cancel(QueuedJob(row.app, row.request_id, is_shared=False))
        if response.status >= web.HTTPInternalServerError.status_code:
            message = "fal.ai cannot be asked to cancel the video now. Try again."
            raise ProxyError(502, "cancel_failed", message, {hdrs.RETRY_AFTER: "5"})


def read_query(request: web.Request, owner: str) -> JobQuery:
    """Raises: ImagesError 400."""
    text, order = request.query.get("limit"), request.query.get("order", "desc")
    limit = LIMIT_DEFAULT if text is None else parse_digits(text)
    if limit is None or not 0 < limit <= LIMIT_MAX:
        raise invalid_parameter("limit", f"limit must be a number from 1 to {LIMIT_MAX}.")
    if order not in ORDERS:
        raise invalid_parameter("order", f"order must be one of {', '.join(ORDERS)}.")
    return JobQuery(owner=owner, api="videos", limit=limit, is_ascending=order == "asc")


def name_reference(error: ProxyError, params: VideoRequest) -> ProxyError:
    """Return an error about an image with the name of the parameter that the image was sent in."""
    info = error_info(error)
    if info.param != IMAGE_PARAM:
        return error
    extra = params.model_extra or {}
    param = next((name for name in SINGLE_IMAGE_INPUTS if name in extra), REFERENCE)
    return ImagesError(replace(info, param=param), error.message, error.headers)


def cost_header(row: JobRow) -> dict[str, str]:
    cost = row.settled if row.settled is not None else row.estimated
    return {} if cost is None else {COST_HEADER: format_usd(cost)}


def json_response(document: BaseModel, headers: dict[str, str] | None = None) -> web.Response:
    return web.json_response(text=document.model_dump_json(), headers=headers)
