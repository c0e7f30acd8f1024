"""`POST /api/estimate`: what a call would cost, without a call."""

from collections.abc import Mapping
from dataclasses import dataclass

from aiohttp import hdrs, web
from aiohttp.typedefs import Handler, Middleware

from falproxy.dialects import DialectRoute, default_error
from falproxy.dialects.json_body import InvalidTextError, parse_json_body
from falproxy.dialects.transparent import BodyLimits, body_chunks, check_body
from falproxy.errors import ProxyError
from falproxy.fal.endpoint import is_endpoint
from falproxy.fal.pricing import MICROS_PER_USD
from falproxy.fal.target import QUEUE_HOST, Target
from falproxy.middleware.limit_calls import LimitPolicy
from falproxy.middleware.limit_preview import preview_limits
from falproxy.proxy.call import CALL, Call
from falproxy.proxy.prices import PriceBook, Quote, make_estimate

PATH = "/api/estimate"
BODY_MAX = 16 * 2**20  # bytes
FIELDS = ("endpoint", "input")

Json = dict[str, object]


@dataclass(frozen=True, slots=True)
class PlannedCall:
    """A call that is not made."""

    endpoint: str
    inputs: Mapping[str, object]


PLANNED_CALL = web.RequestKey("falproxy.planned_call", PlannedCall)


def estimate_route(max_body: int) -> DialectRoute:
    """Return the route, whose handler is `estimate_handler`. The middleware between them treats the
    request as a submit of the planned call. max_body: bytes."""
    limits = BodyLimits(min(max_body, BODY_MAX), allow_encoded=False)
    return DialectRoute(check_method, read_planned_call(limits), default_error)


def check_method(request: web.Request) -> None:
    """Raises: ProxyError 405."""
    if request.method != hdrs.METH_POST:
        raise ProxyError(405, "method_not_allowed", "Use POST here.", {hdrs.ALLOW: "POST"})


def read_planned_call(limits: BodyLimits) -> Middleware:
    @web.middleware
    async def read_planned_call_middleware(
        request: web.Request, handler: Handler
    ) -> web.StreamResponse:
        check_body(request, limits)
        body = b"".join([chunk async for chunk in body_chunks(request.content, limits.max_body)])
        try:
            planned = parse_planned_call(await parse_json_body(body))
        except InvalidTextError as error:
            raise invalid_request(str(error)) from error
        request[PLANNED_CALL] = planned
        target = Target(QUEUE_HOST, f"/{planned.endpoint}", "")
        request[CALL] = Call(hdrs.METH_POST, target, request.headers)
        try:
            return await handler(request)
        finally:
            request.pop(CALL, None)  # it is not counted as a call

    return read_planned_call_middleware


def parse_planned_call(document: Mapping[str, object]) -> PlannedCall:
    """Raises: ProxyError 400."""
    unknown = next((name for name in document if name not in FIELDS), None)
    if unknown is not None:
        raise invalid_request(f"There is no {unknown!r}: send an endpoint and its input.")
    endpoint, inputs = document.get("endpoint"), document.get("input", {})
    if not isinstance(endpoint, str) or not is_endpoint(endpoint):
        raise invalid_request("'endpoint' must be an endpoint id such as fal-ai/flux/dev.")
    if not isinstance(inputs, dict):
        raise invalid_request("'input' must be an object with the inputs of the model.")
    return PlannedCall(endpoint, inputs)


def invalid_request(message: str) -> ProxyError:
    return ProxyError(400, "invalid_request", message)


def estimate_handler(prices: PriceBook, limits: LimitPolicy | None = None) -> Handler:
    """Return the handler. limits: None if nothing is limited."""
    preview = None if limits is None else preview_limits(limits)

    async def handle_estimate(request: web.Request) -> web.StreamResponse:
        planned = request[PLANNED_CALL]
        found = await prices.find(planned.endpoint)
        if not found.is_found:
            message = f"fal.ai knows no endpoint {planned.endpoint}."
            raise ProxyError(404, "endpoint_not_found", message)
        document = estimate_document(planned.endpoint, found, planned.inputs)
        if preview is not None:
            cost = make_estimate(found, planned.inputs).cost
            document["limits"] = await preview(request, planned.endpoint, cost)
        return web.json_response(document, headers={hdrs.CACHE_CONTROL: "no-store"})

    return handle_estimate


def estimate_document(endpoint: str, found: Quote, inputs: Mapping[str, object]) -> Json:
    """Return an estimate as JSON; amounts are in USD, null if they are unknown."""
    estimate = make_estimate(found, inputs)
    price, units = estimate.price, estimate.units
    return {
        "endpoint": endpoint,
        "price": None if price is None else float(price.usd),
        "unit": None if price is None else price.unit,
        "units": None if units is None else int(units) if units == int(units) else float(units),
        "cost": None if estimate.cost is None else estimate.cost / MICROS_PER_USD,
        "currency": "USD",
        "source": found.source,
    }
