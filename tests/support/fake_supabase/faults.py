"""What can go wrong with a request, to be had with `FakeSupabase.fail`."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from aiohttp import web

from tests.support.fake_supabase.errors import ErrorKind, body_of

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
Fault = Callable[[web.Request, Handler], Awaitable[web.StreamResponse]]


class NoResponse(Exception):
    """No response is sent on this connection."""


@dataclass(slots=True)
class Planned:
    """A fault, the requests that it applies to, and how many."""

    fault: Fault
    times: int
    method: str
    path: str

    def meets(self, method: str, path: str) -> bool:
        return self.times > 0 and self.method in ("", method) and path.startswith(self.path)


def fail_with(kind: ErrorKind) -> Fault:
    """Respond with an error of the storage."""
    return respond(kind.http, body_of(kind))


def respond(status: int, body: dict[str, object] | str) -> Fault:
    """Respond like a gateway: with JSON, or with a page if the body is text."""

    async def fault(request: web.Request, handler: Handler) -> web.StreamResponse:
        await drain(request)
        if isinstance(body, str):
            return web.Response(status=status, text=body, content_type="text/html")
        return web.json_response(body, status=status)

    return fault


async def hang(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Neither read nor respond until the fake is stopped."""
    await asyncio.Event().wait()
    raise NoResponse


async def close_connection(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Close the connection before the request is executed."""
    raise NoResponse


async def lose_response(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Execute the request, then close the connection."""
    await handler(request)
    raise NoResponse


def delay(seconds: float) -> Fault:
    async def fault(request: web.Request, handler: Handler) -> web.StreamResponse:
        await asyncio.sleep(seconds)
        return await handler(request)

    return fault


async def drain(request: web.Request) -> None:
    async for _ in request.content.iter_any():
        pass  # the result does not matter
