"""Which answers go out past aiohttp's own writing of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from aiohttp import web


@dataclass(slots=True)
class DirectWrite:
    """What goes out past aiohttp's own writing of answers. enabled: false while
    other code has to see responses. sign: what every answer says of itself."""

    extra_headers: Callable[[web.BaseRequest], Sequence[tuple[str, str]]]
    enabled: bool = True


# There for requests to an application that is the proxy's own.
DIRECT_WRITE = web.RequestKey("falproxy.short_cut", DirectWrite)


def can_write_directly(request: web.BaseRequest) -> bool:
    short_cut = request.get(DIRECT_WRITE)
    return short_cut is not None and short_cut.enabled
