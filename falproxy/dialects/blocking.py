"""Dialects whose clients send one request and wait for the result."""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from falproxy.dialects import DialectRoute, ErrorResponder
from falproxy.dialects.queue_client import BufferedResponse, QueueClient, WaitPolicy
from falproxy.proxy.call import Call

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class ParsedRequest(Generic[T]):
    """A request that was read and checked.

    params: passed on to `BlockingDialect.write`.
    calls: the queue submits that the request needs.
    """

    params: T
    calls: Sequence[Call]


@dataclass(frozen=True, slots=True)
class BlockingDialect(Generic[T]):
    """The functions of an API family whose clients wait for the result. In contrast to a Dialect,
    one request may need several calls, and the bodies of their responses are buffered.

    check: raises ProxyError 405. It runs before authentication.
    read: returns the calls that the request needs; raises ProxyError.
    write: returns the results in the shape of the dialect; raises ProxyError.
    refuse: renders an error in the shape of the dialect.
    """

    check: Callable[[web.Request], None]
    read: Callable[[web.Request], Awaitable[ParsedRequest[T]]]
    write: Callable[[web.Request, T, Sequence[BufferedResponse]], Awaitable[web.StreamResponse]]
    refuse: ErrorResponder


def blocking_middleware(dialect: BlockingDialect[T], wait_policy: WaitPolicy) -> Middleware:
    """Create the middleware that reads a request, runs its calls through the queue and writes the
    results."""

    @web.middleware
    async def read_submit_write(request: web.Request, handler: Handler) -> web.StreamResponse:
        parsed = await dialect.read(request)
        responses = await QueueClient(request, handler, wait_policy).submit_and_wait(parsed.calls)
        return await dialect.write(request, parsed.params, responses)

    return read_submit_write


def blocking_route(dialect: BlockingDialect[T], wait_policy: WaitPolicy) -> DialectRoute:
    return DialectRoute(dialect.check, blocking_middleware(dialect, wait_policy), dialect.refuse)
