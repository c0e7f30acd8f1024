"""A facade: an API family whose clients wait for their results."""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from falproxy.dialects import Refuse, Way
from falproxy.dialects.queue_client import Answer, Patience, Waiting
from falproxy.proxy.call import Call

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Wish(Generic[T]):
    """What a client asks for, read and checked, and the calls that it takes."""

    asked: T
    calls: Sequence[Call]


@dataclass(frozen=True, slots=True)
class Facade(Generic[T]):
    """How an API family speaks whose clients wait for their results; as a Dialect, but with
    answers that are read.

    check: raises ProxyError 405. read: raises ProxyError. write: the answers in the client's
    shape, or a ProxyError. refuse: an error in the client's shape.
    """

    check: Callable[[web.Request], None]
    read: Callable[[web.Request], Awaitable[Wish[T]]]
    write: Callable[[web.Request, T, Sequence[Answer]], Awaitable[web.StreamResponse]]
    refuse: Refuse


def speak_waiting(facade: Facade[T], patience: Patience) -> Middleware:
    """Middleware: reads the request, has its calls made, and writes what came of them."""

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        wish = await facade.read(request)
        answers = await Waiting(request, handler, patience).results(wish.calls)
        return await facade.write(request, wish.asked, answers)

    return middleware


def waiting_way(facade: Facade[T], patience: Patience) -> Way:
    return Way(facade.check, speak_waiting(facade, patience), facade.refuse)
