"""Which answers go out past aiohttp's own writing of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from aiohttp import web


@dataclass(slots=True)
class ShortCut:
    """What goes out past aiohttp's own writing of answers. is_open: as long as nobody but the
    proxy itself has something to say about them. sign: what every answer says of itself."""

    sign: Callable[[web.BaseRequest], Sequence[tuple[str, str]]]
    is_open: bool = True


# There for requests to an application that is the proxy's own.
SHORT_CUT = web.RequestKey("falproxy.short_cut", ShortCut)


def may_cut_short(request: web.BaseRequest) -> bool:
    short_cut = request.get(SHORT_CUT)
    return short_cut is not None and short_cut.is_open
