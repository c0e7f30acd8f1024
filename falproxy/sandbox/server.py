"""The aiohttp applications of the offline fal. One listener serves all of fal's hosts."""

import logging
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace

from aiohttp import web

from falproxy.sandbox.authentication import authenticate
from falproxy.sandbox.hosts import check_host
from falproxy.sandbox.request import (
    CDN,
    LOCAL,
    QUEUE,
    RUN,
    FalRequest,
    RequestTarget,
    resolve_target,
)
from falproxy.sandbox.responses import FalError, detail_error
from falproxy.sandbox.routes import Route, find_route
from falproxy.sandbox.state import Sandbox, SeenRequest

log = logging.getLogger(__name__)

BODY_MAX = 256 * 2**20  # bytes of a JSON body, which may hold data URIs
SANDBOX_HEADER = "x-falproxy-sandbox"


async def handle_request(
    sandbox: Sandbox, http_request: web.Request, target: RequestTarget
) -> web.StreamResponse:
    """Return the response to a request and record it, except for the local pages."""
    status = 499  # stays if the task is cancelled because the client has disconnected
    request = FalRequest(sandbox, http_request, target, {}, str(uuid.uuid4()))
    try:
        response = await respond(request)
        status = response.status
    except Exception as error:
        status = 499 if isinstance(error, ConnectionError) else 500
        raise
    finally:
        if target.service != LOCAL:
            sandbox.record_request(
                SeenRequest(
                    http_request.method,
                    target.host,
                    target.path,
                    target.query,
                    http_request.headers,
                    status,
                )
            )
    return response


async def respond(request: FalRequest) -> web.StreamResponse:
    """Return the handler's response, fal's error, or the response to a preflight request."""
    if request.http_request.method == "OPTIONS":
        return preflight_response(request.http_request)
    request_id = request.request_id if request.target.service in (RUN, QUEUE) else None
    try:
        route, path_params = find_route(request.target)
        request_id = path_params.get("id", request_id)
        return await dispatch(replace(request, path_params=path_params), route)
    except FalError as error:
        return error.response.to_web_response(request_id)
    except web.HTTPException as error:  # from aiohttp itself, such as a body that is too large
        return detail_error(error.status, error.reason).response.to_web_response()


async def dispatch(request: FalRequest, route: Route) -> web.StreamResponse:
    """Check key and method, in fal's order, and call the handler."""
    if route.needs_key:
        request = replace(request, account=authenticate(request))
    handler = route.methods.get(request.http_request.method)
    if handler is None:
        raise detail_error(405, "Method Not Allowed", {"Allow": ", ".join(route.methods)})
    return await handler(request)


def preflight_response(request: web.Request) -> web.Response:
    headers = {
        "Access-Control-Allow-Methods": "DELETE, GET, HEAD, OPTIONS, PATCH, POST, PUT",
        "Access-Control-Allow-Headers": request.headers.get("Access-Control-Request-Headers", "*"),
        "Access-Control-Max-Age": "600",
    }
    return web.Response(headers=headers)


async def add_headers(request: web.Request, response: web.StreamResponse) -> None:
    """Mark a response as the sandbox's and allow every origin to read it."""
    response.headers[SANDBOX_HEADER] = "1"
    origin = request.headers.get("Origin")
    response.headers["Access-Control-Allow-Origin"] = origin or "*"
    response.headers["Access-Control-Allow-Credentials"] = "true"
    if origin:
        response.headers.add("Vary", "Origin")


def create_app(sandbox: Sandbox) -> web.Application:
    """Return the application with all API hosts, the CDN and the local pages."""

    async def handle_any_host(request: web.Request) -> web.StreamResponse:
        try:
            check_host(request, sandbox)
        except FalError as error:
            return error.response.to_web_response()
        target = resolve_target(request.raw_path, request.host)
        return await handle_request(sandbox, request, target)

    # fal cancels a direct call when its client disconnects.
    app = web.Application(client_max_size=BODY_MAX, handler_args={"handler_cancellation": True})
    app.router.add_route("*", "/{path:.*}", handle_any_host)
    app.on_response_prepare.append(add_headers)
    app.cleanup_ctx.append(file_store_context(sandbox))
    app.cleanup_ctx.append(job_queue_context(sandbox))
    app.on_shutdown.append(close_streams(sandbox))
    return app


def create_cdn(sandbox: Sandbox) -> web.Application:
    """Return an application with the CDN alone, to be mounted below a prefix of another one."""

    async def handle_cdn(request: web.Request) -> web.StreamResponse:
        path, query = f"/{request.match_info['path']}", request.rel_url.raw_query_string
        target = RequestTarget(request.host, CDN, path, query)
        return await handle_request(sandbox, request, target)

    app = web.Application(client_max_size=BODY_MAX)
    app.router.add_route("*", "/{path:.*}", handle_cdn)
    app.on_response_prepare.append(add_headers)
    app.cleanup_ctx.append(file_store_context(sandbox))
    return app


CleanupContext = Callable[[web.Application], AsyncIterator[None]]


def file_store_context(sandbox: Sandbox) -> CleanupContext:
    """Return a cleanup context that opens the file store while an application runs."""

    async def open_files(app: web.Application) -> AsyncIterator[None]:
        sandbox.files.open()
        try:
            yield
        finally:
            sandbox.files.close()

    return open_files


def job_queue_context(sandbox: Sandbox) -> CleanupContext:
    """Return a cleanup context that cancels all jobs when the application stops."""

    async def open_queue(app: web.Application) -> AsyncIterator[None]:
        log.warning("SANDBOX: serving an offline fal emulator; it runs no models and costs nothing")
        sandbox.queue.open()
        try:
            yield
        finally:
            await sandbox.queue.close()

    return open_queue


def close_streams(sandbox: Sandbox) -> Callable[[web.Application], Awaitable[None]]:
    """Return a shutdown handler that ends WebSockets and status streams.

    Open ones would delay the shutdown of the server.
    """

    async def close_open_streams(app: web.Application) -> None:
        await sandbox.queue.close()
        await sandbox.live.close()
        for socket in tuple(sandbox.sockets):
            await socket.close(code=1001)

    return close_open_streams
