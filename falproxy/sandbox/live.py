"""wma.fal.run: signalling of live video. The media flow between the client and the runner."""

from collections.abc import Mapping

from aiohttp import web

from falproxy.sandbox.faults import check_balance
from falproxy.sandbox.input_validation import parse_body
from falproxy.sandbox.live_media import InvalidOfferError
from falproxy.sandbox.live_models import LIVE_MODELS, LiveModel
from falproxy.sandbox.live_runner import open_runner
from falproxy.sandbox.live_sessions import LiveSession
from falproxy.sandbox.request import TAGS_HEADER, FalRequest, parse_tags
from falproxy.sandbox.responses import FalResponse, detail_error

# The sandbox and its clients are on one machine, so that no server has to connect them.
ICE_SERVERS: Mapping[str, object] = {"ice_servers": []}
APP_MANAGED: Mapping[str, object] = {"ice_servers": [], "status": "app_managed"}


class InvalidBodyError(Exception):
    """The body lacks something. The message is the text of a 422."""


async def get_ice_servers(request: FalRequest) -> web.StreamResponse:
    """POST /ice {"app_id"}: the servers for the connection, or a hint to ask the app."""
    try:
        model = find_live_model(await read_object(request))
    except InvalidBodyError as error:
        return invalid_body(error)
    return FalResponse(200, APP_MANAGED if model.is_app_managed else ICE_SERVERS).to_web_response()


async def get_app_ice_servers(request: FalRequest) -> web.StreamResponse:
    """POST fal.run/<endpoint>/ice: the servers of one app."""
    endpoint = request.path_params["endpoint"]
    if endpoint not in LIVE_MODELS:
        raise detail_error(404, "Path /ice not found")
    return FalResponse(200, ICE_SERVERS).to_web_response(request.request_id)


async def open_session(request: FalRequest) -> web.StreamResponse:
    """POST /session {"app_id", "sdp", "type": "offer"}: a new session, billed by its length."""
    sandbox = request.sandbox
    try:
        body = await read_object(request)
        model = find_live_model(body)
        offer = read_offer(body)
        check_balance(sandbox)
        runner = await open_runner(model.endpoint, offer)
    except (InvalidBodyError, InvalidOfferError) as error:
        return invalid_body(error)
    tags = parse_tags(request.http_request.headers.getall(TAGS_HEADER, ()))
    session = LiveSession(model.endpoint, request.account, tags, runner)
    sandbox.live.add(session)
    document = {"session_id": session.id, "sdp": runner.sdp, "type": "answer"}
    return FalResponse(200, document).to_web_response()


async def beat(request: FalRequest) -> web.StreamResponse:
    """POST /session/heartbeat {"session_id"}: whether the session is alive."""
    try:
        session_id = (await read_object(request)).get("session_id")
    except InvalidBodyError as error:
        return invalid_body(error)
    is_alive = isinstance(session_id, str) and request.sandbox.live.beat(
        session_id, request.account
    )
    return FalResponse(200, {"alive": is_alive}).to_web_response()


async def read_object(request: FalRequest) -> dict[str, object]:
    body = parse_body(await request.http_request.read() or b"{}")
    if not isinstance(body, dict):
        raise InvalidBodyError("the body must be a JSON object")
    return body


def read_offer(body: dict[str, object]) -> str:
    """Return the client's session description. Raises: InvalidBodyError."""
    offer = body.get("sdp")
    if body.get("type") != "offer" or not isinstance(offer, str):
        raise InvalidBodyError("sdp and type=offer are required")
    return offer


def find_live_model(body: dict[str, object]) -> LiveModel:
    """Raises: InvalidBodyError; FalError 404, there is no such app."""
    endpoint = body.get("app_id")
    if not isinstance(endpoint, str) or not endpoint:
        raise InvalidBodyError("missing field `app_id`")
    if (model := LIVE_MODELS.get(endpoint)) is None:
        raise detail_error(404, f'Application "{endpoint}" not found')
    return model


def invalid_body(error: Exception) -> web.Response:
    return web.Response(status=422, text=str(error))
