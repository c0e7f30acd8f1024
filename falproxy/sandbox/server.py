"""One listener that plays all of fal's hosts."""

import logging
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace

from aiohttp import web

from falproxy.sandbox.authentication import authenticate
from falproxy.sandbox.request import CDN, LOCAL, QUEUE, RUN, Address, Visit, locate
from falproxy.sandbox.responses import FalError, plain
from falproxy.sandbox.routes import Route, find_route
from falproxy.sandbox.state import Sandbox, Seen

log = logging.getLogger(__name__)

BODY_MAX = 256 * 2**20  # bytes of a JSON body: inputs may be data URIs
MARK = "x-falproxy-sandbox"


async def dispatch(visit: Visit, found: Route) -> web.StreamResponse:
    """Key first, then method, then the handler: fal checks them in this order."""
    if found.needs_key:
        visit = replace(visit, account=authenticate(visit))
    handler = found.methods.get(visit.request.method)
    if handler is None:
        raise plain(405, "Method Not Allowed", {"Allow": ", ".join(found.methods)})
    return await handler(visit)


async def answer(visit: Visit) -> web.StreamResponse:
    """The handler's response, or fal's error; a preflight is always welcome."""
    if visit.request.method == "OPTIONS":
        return preflight(visit.request)
    request_id = visit.request_id if visit.address.service in (RUN, QUEUE) else None
    try:
        found, named = find_route(visit.address)
        request_id = named.get("id", request_id)
        return await dispatch(replace(visit, named=named), found)
    except FalError as error:
        return error.answer.response(request_id)
    except web.HTTPException as refusal:  # aiohttp's own, such as a body that is too large
        return plain(refusal.status, refusal.reason).answer.response()


def preflight(request: web.Request) -> web.Response:
    asked = request.headers.get("Access-Control-Request-Headers", "*")
    headers = {
        "Access-Control-Allow-Methods": "DELETE, GET, HEAD, OPTIONS, PATCH, POST, PUT",
        "Access-Control-Allow-Headers": asked,
        "Access-Control-Max-Age": "600",
    }
    return web.Response(headers=headers)


async def sign(request: web.Request, response: web.StreamResponse) -> None:
    """Every answer says that it comes from the sandbox, and lets any page read it."""
    response.headers[MARK] = "1"
    origin = request.headers.get("Origin")
    response.headers["Access-Control-Allow-Origin"] = origin or "*"
    response.headers["Access-Control-Allow-Credentials"] = "true"
    if origin:
        response.headers.add("Vary", "Origin")


async def listen(sandbox: Sandbox, request: web.Request, address: Address) -> web.StreamResponse:
    """Answer a request and keep a record of it, unless it is for the sandbox's own pages."""
    status = 499  # unless it is answered, the client went away
    visit = Visit(sandbox, request, address, {}, str(uuid.uuid4()))
    try:
        response = await answer(visit)
        status = response.status
    except Exception as error:
        status = 499 if isinstance(error, ConnectionError) else 500
        raise
    finally:
        seen = (request.method, address.host, address.path, address.query, request.headers)
        if address.service != LOCAL:
            sandbox.record(Seen(*seen, status))
    return response


def create_app(sandbox: Sandbox) -> web.Application:
    """The whole offline fal: every API host, the CDN, and the sandbox's own pages."""

    async def handle(request: web.Request) -> web.StreamResponse:
        return await listen(sandbox, request, locate(request.raw_path, request.host))

    # A direct call whose client leaves is cancelled, as fal does (fal-api.md, 3.1).
    app = web.Application(client_max_size=BODY_MAX, handler_args={"handler_cancellation": True})
    app.router.add_route("*", "/{path:.*}", handle)
    app.on_response_prepare.append(sign)
    app.cleanup_ctx.append(open_files(sandbox))
    app.cleanup_ctx.append(run_queue(sandbox))
    app.on_shutdown.append(hang_up(sandbox))
    return app


def create_cdn(sandbox: Sandbox) -> web.Application:
    """The CDN part alone, to be mounted under a prefix of another application."""

    async def handle(request: web.Request) -> web.StreamResponse:
        path, query = f"/{request.match_info['path']}", request.rel_url.raw_query_string
        return await listen(sandbox, request, Address(request.host, CDN, path, query))

    app = web.Application(client_max_size=BODY_MAX)
    app.router.add_route("*", "/{path:.*}", handle)
    app.on_response_prepare.append(sign)
    app.cleanup_ctx.append(open_files(sandbox))
    return app


Context = Callable[[web.Application], AsyncIterator[None]]


def open_files(sandbox: Sandbox) -> Context:
    """Cleanup context: the directory of the files, as long as one application serves them."""

    async def context(app: web.Application) -> AsyncIterator[None]:
        sandbox.files.open()
        try:
            yield
        finally:
            sandbox.files.close()

    return context


def run_queue(sandbox: Sandbox) -> Context:
    """Cleanup context: no job outlives the application."""

    async def context(app: web.Application) -> AsyncIterator[None]:
        log.warning("SANDBOX: an offline fal answers; nothing is real, nothing is paid")
        sandbox.queue.open()
        try:
            yield
        finally:
            await sandbox.queue.close()

    return context


def hang_up(sandbox: Sandbox) -> Callable[[web.Application], Awaitable[None]]:
    """Shutdown signal: sockets and status streams would keep a stopping server waiting."""

    async def shutdown(app: web.Application) -> None:
        await sandbox.queue.close()
        for socket in tuple(sandbox.sockets):
            await socket.close(code=1001)

    return shutdown
