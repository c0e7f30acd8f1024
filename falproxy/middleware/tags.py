"""Request tags: fal's usage reports by caller and user (FALPROXY_TAGS)."""

from collections.abc import Collection
from dataclasses import replace

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from falproxy.fal.tags import TAGS_HEADER, encode_tag_value, merge_tags
from falproxy.proxy.call import CALL, PRINCIPAL, USER, Call
from falproxy.proxy.head_only import any_request_id
from falproxy.proxy.headers import CONNECTION, connection_header_names

# Key of a tag → where its value is.
TAG_SOURCES = {"principal": PRINCIPAL, "user": USER}


def add_tags(names: Collection[str]) -> Middleware:
    """Middleware: tag model calls with their caller and user. A tag whose value is unknown is left
    out. A call that shares the job of another one does not reach fal: the job has the tags of the
    call that was sent.

    names: keys of TAG_SOURCES.
    """

    @any_request_id
    @web.middleware
    async def add_tags_middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        own = {
            name: encode_tag_value(value)
            for name in names
            if (value := request.get(TAG_SOURCES[name]))
        }
        call = request[CALL]
        lines = client_lines(call)
        if own or lines:
            request[CALL] = replace(call, tags=merge_tags(lines, own, names), is_memoized=False)
        return await handler(request)

    return add_tags_middleware


def client_lines(call: Call) -> list[str]:
    """Return the client's `X-Fal-Tags`; none if they were meant for the proxy only."""
    lines = call.headers.getall(TAGS_HEADER, [])
    if lines and TAGS_HEADER in connection_header_names(call.headers.getall(CONNECTION, ())):
        return []
    return lines
