"""The handlers of the OpenAI images API. Each is a middleware, because it calls fal through the
handlers below it."""

from collections.abc import Awaitable, Callable
from typing import Protocol
from urllib.parse import unquote

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from falproxy.dialects.ignored import ignored_header
from falproxy.dialects.openai.errors import (
    NO_RETRY,
    error_from_response,
    invalid_parameter,
    model_not_found,
)
from falproxy.dialects.openai.models import ModelNames, ModelResolver
from falproxy.dialects.openai.requests import ImageJob
from falproxy.dialects.openai.responses import stream_partial_images, write_document, write_events
from falproxy.dialects.openai.result_images import ImageReader
from falproxy.dialects.openai.schema import ModelInfo, ModelList
from falproxy.dialects.queue_client import BufferedResponse, QueueClient, WaitPolicy, read_response
from falproxy.errors import ProxyError
from falproxy.fal.policy import is_model_call
from falproxy.proxy.call import CALL
from falproxy.proxy.event_recording import RecordedEventStream
from falproxy.proxy.forward import RelayedResponse
from falproxy.proxy.idempotency_key import OTHER_OPERATION
from falproxy.proxy.limit_fields import openai_rate_fields
from falproxy.proxy.upstream import UPSTREAM
from falproxy.proxy.user import name_user

EVENT_STREAM = "text/event-stream"
# fal's responses if a model cannot be streamed now. The call can still be sent to the queue.
STREAM_UNAVAILABLE = (404, 405, 429)
# Errors before the call was sent. fal cannot have charged for it.
NOT_SENT_CODES = ("upstream_unreachable", "busy", "disk_full", "too_many_files")

ReadJob = Callable[[web.Request], Awaitable[ImageJob]]


class RetryGuard:
    """Wraps a handler, and records whether fal may have charged for a call through it."""

    def __init__(self, handler: Handler) -> None:
        self._handler = handler
        self._may_be_billed = False

    async def __call__(self, request: web.Request) -> web.StreamResponse:
        call = request[CALL]
        if not is_model_call(call.method, call.target):
            return await self._handler(request)
        # True while the call is in progress, in case its response is lost.
        was_billed, self._may_be_billed = self._may_be_billed, True
        try:
            response = await self._handler(request)
        except ProxyError as error:
            is_unsent = error.status < 500 or error.code in NOT_SENT_CODES
            self._may_be_billed = was_billed or not is_unsent
            raise
        is_refused = 400 <= response.status < 500
        self._may_be_billed = was_billed or not is_refused
        return response

    def forbid_retry(self, error: ProxyError) -> None:
        """Add the header to an error that keeps OpenAI's clients from repeating a request for which
        fal may have charged."""
        if self._may_be_billed:
            error.headers = {**error.headers, **NO_RETRY}


def images_middleware(
    read_job: ReadJob, image_reader: ImageReader, wait_policy: WaitPolicy
) -> Middleware:
    @web.middleware
    async def create_images(request: web.Request, handler: Handler) -> web.StreamResponse:
        job = await read_job(request)
        name_openai_user(request, job.params)
        retry_guard = RetryGuard(handler)
        try:
            response = await run_job(request, job, retry_guard, image_reader, wait_policy)
        except ProxyError as error:
            retry_guard.forbid_retry(error)
            error.headers = {**openai_rate_fields(request), **error.headers}
            raise
        response.headers.update(ignored_header(job.ignored))
        response.headers.update(openai_rate_fields(request))
        return response

    return create_images


class UserParams(Protocol):
    """The parameters of a request that name the end user."""

    user: str | None
    safety_identifier: str | None


def name_openai_user(request: web.Request, params: UserParams) -> None:
    """Set the user of a request: `user`, else `safety_identifier`. Raises: ImagesError 400."""
    field = "user" if (params.user or "").strip() else "safety_identifier"
    try:
        name_user(request, getattr(params, field) or "", field)
    except ProxyError as error:
        raise invalid_parameter(field, error.message, error.code) from None


async def run_job(
    request: web.Request,
    job: ImageJob,
    retry_guard: RetryGuard,
    image_reader: ImageReader,
    wait_policy: WaitPolicy,
) -> web.StreamResponse:
    """Call the model and write its images. Raises: ProxyError."""
    opened = await open_stream(request, job, retry_guard) if job.is_streamed else None
    if isinstance(opened, RelayedResponse | RecordedEventStream):
        return stream_partial_images(request, job.params, opened, image_reader, wait_policy.total)
    if opened is not None:
        responses = [opened]
    else:
        queue_client = QueueClient(request, retry_guard, wait_policy)
        responses = await queue_client.submit_and_wait(
            job.calls(), [call.inputs for call in job.model_calls]
        )
    if responses[-1].status != web.HTTPOk.status_code:
        raise error_from_response(responses[-1])
    write = write_events if job.params.stream else write_document
    return await write(request, job.params, responses, image_reader)


async def open_stream(
    request: web.Request, job: ImageJob, retry_guard: RetryGuard
) -> RelayedResponse | RecordedEventStream | BufferedResponse | None:
    """Return the stream of the model, or the complete response that fal sends instead. None if the
    model cannot be streamed now.

    Raises: ProxyError.
    """
    request[CALL] = job.stream_call()
    try:
        response = await retry_guard(request)
    except ProxyError as error:
        if error.code == OTHER_OPERATION:  # an earlier attempt with the key used the queue
            return None
        raise
    is_stream = response.status == web.HTTPOk.status_code and response.content_type == EVENT_STREAM
    if isinstance(response, RelayedResponse | RecordedEventStream) and is_stream:
        return response
    buffered = await read_response(response)
    return None if buffered.status in STREAM_UNAVAILABLE else buffered


def list_models(names: ModelNames) -> Middleware:
    models = ModelList(
        data=[model_info(name, endpoint) for name, endpoint in names.endpoint_by_name.items()]
    )
    body = models.model_dump_json()

    @web.middleware
    async def respond_with_models(request: web.Request, handler: Handler) -> web.StreamResponse:
        return web.json_response(text=body)

    return respond_with_models


def show_model(models: ModelResolver, is_allowed: Callable[[str], bool]) -> Middleware:
    """Create the handler that describes one model, given by name or by fal's endpoint id, whose
    slashes may be escaped.

    is_allowed: returns True if an endpoint may be called.
    """

    @web.middleware
    async def respond_with_model(request: web.Request, handler: Handler) -> web.StreamResponse:
        name = unquote(request.match_info["model"])
        endpoint = models.names.endpoint(name)
        if endpoint is None or not is_allowed(endpoint):
            raise model_not_found(name)
        await models.resolve(request.app[UPSTREAM], name, endpoint)
        return web.json_response(text=model_info(name, endpoint).model_dump_json())

    return respond_with_model


def model_info(name: str, endpoint: str) -> ModelInfo:
    return ModelInfo(id=name, owned_by=endpoint.partition("/")[0], endpoint=endpoint)
