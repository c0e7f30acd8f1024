"""A facade: an API family whose clients wait for their results."""

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
    """What a client asks for, read and checked, and the calls that it takes."""

    params: T
    calls: Sequence[Call]


@dataclass(frozen=True, slots=True)
class BlockingDialect(Generic[T]):
    """How an API family speaks whose clients wait for their results; as a Dialect, but with
    answers that are read.

    check: raises ProxyError 405. read: raises ProxyError. write: the answers in the client's
    shape, or a ProxyError. refuse: an error in the client's shape.
    """

    check: Callable[[web.Request], None]
    read: Callable[[web.Request], Awaitable[ParsedRequest[T]]]
    write: Callable[[web.Request, T, Sequence[BufferedResponse]], Awaitable[web.StreamResponse]]
    refuse: ErrorResponder


def blocking_middleware(dialect: BlockingDialect[T], wait_policy: WaitPolicy) -> Middleware:
    """Middleware: reads the request, has its calls made, and writes what came of them."""

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        wish = await dialect.read(request)
        answers = await QueueClient(request, handler, wait_policy).submit_and_wait(wish.calls)
        return await dialect.write(request, wish.params, answers)

    return middleware


def blocking_route(dialect: BlockingDialect[T], wait_policy: WaitPolicy) -> DialectRoute:
    return DialectRoute(dialect.check, blocking_middleware(dialect, wait_policy), dialect.refuse)
