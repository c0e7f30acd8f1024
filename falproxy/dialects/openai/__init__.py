"""The OpenAI images API: `/v1/images/generations`, `/v1/images/edits` and `/v1/models`."""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from urllib.parse import unquote

from aiohttp import hdrs, web
from aiohttp.typedefs import Handler, Middleware

from falproxy.dialects import DialectRoute
from falproxy.dialects.openai.errors import RetryGuard, error_from_response, model_not_found, refuse
from falproxy.dialects.openai.model_names import ModelNames
from falproxy.dialects.openai.model_schema_client import SchemaClient
from falproxy.dialects.openai.multipart import FormLimits
from falproxy.dialects.openai.requests import (
    ImageJob,
    RequestDeps,
    read_edit,
    read_generation,
    resolve_model,
)
from falproxy.dialects.openai.responses import stream_partial_images, write_document, write_events
from falproxy.dialects.openai.result_images import (
    ImageReader,
    ReadLocal,
    local_file_reader,
    no_local_files,
)
from falproxy.dialects.openai.schema import ModelInfo, ModelList
from falproxy.dialects.queue_client import BufferedResponse, QueueClient, WaitPolicy, read_response
from falproxy.dialects.transparent import BodyLimits
from falproxy.errors import ProxyError
from falproxy.fal.endpoint import DEFAULT_MODELS, NamedEndpoint
from falproxy.fal.policy import Globs
from falproxy.media.fetch import Fetcher
from falproxy.proxy.call import CALL, USER_ID
from falproxy.proxy.forward import RelayedResponse

__all__ = ["ImagesDeps", "images_routes", "local_file_reader"]

EVENT_STREAM = "text/event-stream"
# fal's answers to a stream that was not begun: the queue may still take the call.
STREAM_UNAVAILABLE = (404, 405, 429)

ReadJob = Callable[[web.Request], Awaitable[ImageJob]]


@dataclass(frozen=True, slots=True, kw_only=True)
class ImagesDeps:
    """models: names and endpoints. endpoints: the only ones that may be called, none for all.
    read_own: the files that the proxy serves by itself."""

    body_limits: BodyLimits
    models: Sequence[NamedEndpoint] = DEFAULT_MODELS
    endpoints: Globs = field(default_factory=partial(Globs, ()))
    read_local: ReadLocal = no_local_files


def images_routes(
    deps: ImagesDeps, fetcher: Fetcher, wait_policy: WaitPolicy
) -> dict[str, DialectRoute]:
    """The paths of the API, and how each is served."""
    allows = partial(is_allowed, deps.endpoints)
    names = ModelNames((name, endpoint) for name, endpoint in deps.models if allows(endpoint))
    form = FormLimits(deps.body_limits.max_body)
    orders = RequestDeps(names, SchemaClient(wait_policy.background), deps.body_limits, form)
    pictures = ImageReader(fetcher, deps.read_local)
    post, get = require_method(hdrs.METH_POST), require_method(hdrs.METH_GET)
    generate = images_middleware(partial(read_generation, deps=orders), pictures, wait_policy)
    edit = images_middleware(partial(read_edit, deps=orders), pictures, wait_policy)
    return {
        "/v1/images/generations": DialectRoute(post, generate, refuse),
        "/v1/images/edits": DialectRoute(post, edit, refuse),
        "/v1/models": DialectRoute(get, list_models(names), refuse),
        "/v1/models/{model:(?s:.+)}": DialectRoute(get, show_model(orders, allows), refuse),
    }


def require_method(method: str) -> Callable[[web.Request], None]:
    def check(request: web.Request) -> None:
        """Raises: ProxyError 405."""
        if request.method != method:
            message = f"Use {method}."
            raise ProxyError(405, "method_not_allowed", message, {hdrs.ALLOW: method})

    return check


def images_middleware(
    read_job: ReadJob, image_reader: ImageReader, wait_policy: WaitPolicy
) -> Middleware:
    """Middleware: reads an order, has its calls made, and writes what came of them. A failure
    after something may have been bought says so."""

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        order = await read_job(request)
        if user := order.params.user or order.params.safety_identifier:
            request[USER_ID] = user
        purchase = RetryGuard(handler)
        try:
            return await run_job(request, order, purchase, image_reader, wait_policy)
        except ProxyError as error:
            purchase.forbid_retry(error)
            raise

    return middleware


async def run_job(
    request: web.Request,
    job: ImageJob,
    retry_guard: RetryGuard,
    image_reader: ImageReader,
    wait_policy: WaitPolicy,
) -> web.StreamResponse:
    """Raises: ProxyError."""
    answers: Sequence[BufferedResponse] | None = None
    if job.is_streamed:
        begun = await open_stream(request, job, retry_guard)
        if isinstance(begun, RelayedResponse):
            return stream_partial_images(
                request, job.params, begun, image_reader, wait_policy.total
            )
        answers = begun
    answers = answers or await QueueClient(request, retry_guard, wait_policy).submit_and_wait(
        job.calls()
    )
    if answers[-1].status != web.HTTPOk.status_code:
        raise error_from_response(answers[-1])
    write = write_events if job.params.stream else write_document
    return await write(request, job.params, answers, image_reader)


async def open_stream(
    request: web.Request, job: ImageJob, retry_guard: RetryGuard
) -> RelayedResponse | list[BufferedResponse] | None:
    """The model's stream, or what it answers instead. None: it has none now, and nothing is lost.

    Raises: ProxyError.
    """
    request[CALL] = job.stream_call()
    response = await retry_guard(request)
    is_begun = response.status == web.HTTPOk.status_code and response.content_type == EVENT_STREAM
    if isinstance(response, RelayedResponse) and is_begun:
        return response
    answer = await read_response(response)
    return None if answer.status in STREAM_UNAVAILABLE else [answer]


def is_allowed(endpoints: Globs, endpoint: str) -> bool:
    return not endpoints or endpoints.match(endpoint)


def list_models(names: ModelNames) -> Middleware:
    """Middleware that answers: the models that have names."""
    models = ModelList(
        data=[model_info(name, endpoint) for name, endpoint in names.endpoint_by_name.items()]
    )
    body = models.model_dump_json()

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        return web.json_response(text=body)

    return middleware


def show_model(deps: RequestDeps, allows: Callable[[str], bool]) -> Middleware:
    """Middleware that answers: one model, by its name or by fal's id, whose slashes may be
    escaped."""

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        name = unquote(request.match_info["model"])
        endpoint = deps.names.endpoint(name)
        if endpoint is None or not allows(endpoint):
            raise model_not_found(name)
        await resolve_model(request, deps, name, endpoint)
        return web.json_response(text=model_info(name, endpoint).model_dump_json())

    return middleware


def model_info(name: str, endpoint: str) -> ModelInfo:
    return ModelInfo(id=name, owned_by=endpoint.partition("/")[0], endpoint=endpoint)
