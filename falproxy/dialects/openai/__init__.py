"""The OpenAI images API: `/v1/images/generations`, `/v1/images/edits` and `/v1/models`."""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from urllib.parse import unquote

from aiohttp import hdrs, web
from aiohttp.typedefs import Handler, Middleware

from falproxy.dialects import Way
from falproxy.dialects.openai.errors import Purchase, failure_of, no_model, refuse
from falproxy.dialects.openai.model_names import Names
from falproxy.dialects.openai.model_schema_client import Schemas
from falproxy.dialects.openai.multipart import FormRules
from falproxy.dialects.openai.requests import (
    Order,
    OrderRules,
    look_up,
    read_edit,
    read_generation,
)
from falproxy.dialects.openai.responses import follow, write_document, write_events
from falproxy.dialects.openai.result_images import Pictures, ReadOwn, files_of, none_own
from falproxy.dialects.openai.schema import ModelInfo, ModelList
from falproxy.dialects.queue_client import Answer, Patience, Waiting, read
from falproxy.dialects.transparent import BodyRules
from falproxy.errors import ProxyError
from falproxy.fal.endpoint import NAMED_MODELS, Named
from falproxy.fal.policy import Globs
from falproxy.media.fetch import Fetcher
from falproxy.proxy.call import CALL, USER_ID
from falproxy.proxy.forward import UpstreamResponse

__all__ = ["ImagesRules", "files_of", "images_ways"]

EVENTS = "text/event-stream"
# fal's answers to a stream that was not begun: the queue may still take the call.
NOT_BEGUN = (404, 405, 429)

ReadOrder = Callable[[web.Request], Awaitable[Order]]


@dataclass(frozen=True, slots=True, kw_only=True)
class ImagesRules:
    """models: names and endpoints. endpoints: the only ones that may be called, none for all.
    read_own: the files that the proxy serves by itself."""

    body: BodyRules
    models: Sequence[Named] = NAMED_MODELS
    endpoints: Globs = field(default_factory=partial(Globs, ()))
    read_own: ReadOwn = none_own


def images_ways(rules: ImagesRules, fetcher: Fetcher, patience: Patience) -> dict[str, Way]:
    """The paths of the API, and how each is served."""
    allows = partial(is_allowed, rules.endpoints)
    names = Names((name, endpoint) for name, endpoint in rules.models if allows(endpoint))
    form = FormRules(rules.body.max_body)
    orders = OrderRules(names, Schemas(patience.goodbyes), rules.body, form)
    pictures = Pictures(fetcher, rules.read_own)
    post, get = only(hdrs.METH_POST), only(hdrs.METH_GET)
    generate = speak(partial(read_generation, rules=orders), pictures, patience)
    edit = speak(partial(read_edit, rules=orders), pictures, patience)
    return {
        "/v1/images/generations": Way(post, generate, refuse),
        "/v1/images/edits": Way(post, edit, refuse),
        "/v1/models": Way(get, list_models(names), refuse),
        "/v1/models/{model:(?s:.+)}": Way(get, show_model(orders, allows), refuse),
    }


def only(method: str) -> Callable[[web.Request], None]:
    def check(request: web.Request) -> None:
        """Raises: ProxyError 405."""
        if request.method != method:
            message = f"Use {method}."
            raise ProxyError(405, "method_not_allowed", message, {hdrs.ALLOW: method})

    return check


def speak(read_order: ReadOrder, pictures: Pictures, patience: Patience) -> Middleware:
    """Middleware: reads an order, has its calls made, and writes what came of them. A failure
    after something may have been bought says so."""

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        order = await read_order(request)
        if user := order.asked.user or order.asked.safety_identifier:
            request[USER_ID] = user
        purchase = Purchase(handler)
        try:
            return await serve(request, order, purchase, pictures, patience)
        except ProxyError as error:
            purchase.settle(error)
            raise

    return middleware


async def serve(
    request: web.Request,
    order: Order,
    purchase: Purchase,
    pictures: Pictures,
    patience: Patience,
) -> web.StreamResponse:
    """Raises: ProxyError."""
    answers: Sequence[Answer] | None = None
    if order.is_followed:
        begun = await begin(request, order, purchase)
        if isinstance(begun, UpstreamResponse):
            return follow(request, order.asked, begun, pictures, patience.total)
        answers = begun
    answers = answers or await Waiting(request, purchase, patience).results(order.calls())
    if answers[-1].status != web.HTTPOk.status_code:
        raise failure_of(answers[-1])
    write = write_events if order.asked.stream else write_document
    return await write(request, order.asked, answers, pictures)


async def begin(
    request: web.Request, order: Order, purchase: Purchase
) -> UpstreamResponse | list[Answer] | None:
    """The model's stream, or what it answers instead. None: it has none now, and nothing is lost.

    Raises: ProxyError.
    """
    request[CALL] = order.stream()
    response = await purchase(request)
    is_begun = response.status == web.HTTPOk.status_code and response.content_type == EVENTS
    if isinstance(response, UpstreamResponse) and is_begun:
        return response
    answer = await read(response)
    return None if answer.status in NOT_BEGUN else [answer]


def is_allowed(endpoints: Globs, endpoint: str) -> bool:
    return not endpoints or endpoints.match(endpoint)


def list_models(names: Names) -> Middleware:
    """Middleware that answers: the models that have names."""
    models = ModelList(data=[info(name, endpoint) for name, endpoint in names.listed.items()])
    body = models.model_dump_json()

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        return web.json_response(text=body)

    return middleware


def show_model(orders: OrderRules, allows: Callable[[str], bool]) -> Middleware:
    """Middleware that answers: one model, by its name or by fal's id, whose slashes may be
    escaped."""

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        name = unquote(request.match_info["model"])
        endpoint = orders.names.endpoint(name)
        if endpoint is None or not allows(endpoint):
            raise no_model(name)
        await look_up(request, orders, name, endpoint)
        return web.json_response(text=info(name, endpoint).model_dump_json())

    return middleware


def info(name: str, endpoint: str) -> ModelInfo:
    return ModelInfo(id=name, owned_by=endpoint.partition("/")[0], endpoint=endpoint)
