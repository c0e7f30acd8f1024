"""The base URL routes `/api/fal/run/…`, `/api/fal/queue/…` and `/api/fal/rest/…`: the transparent
dialect for clients that can be given a base URL, but cannot send the target in a header."""

import re
from dataclasses import replace
from functools import partial

from aiohttp import hdrs, web

from falproxy.dialects import Dialect
from falproxy.dialects.public_url import public_origin
from falproxy.dialects.transparent import (
    BodyLimits,
    ReadTarget,
    check_method,
    not_json,
    read_call,
    refuse,
)
from falproxy.errors import ProxyError
from falproxy.fal.policy import is_model_call
from falproxy.fal.target import Operation, Target, parse_target
from falproxy.proxy.call import CALL, Call
from falproxy.proxy.forward import RelayedResponse, sync_rewrite
from falproxy.proxy.local_responses import LocalDocument, LocalEventStream

# First path segment below PREFIX → host of fal.
BASE_URL_HOSTS = {"run": "fal.run", "queue": "queue.fal.run", "rest": "rest.fal.ai"}
PREFIX = "/api/fal/"
QUEUE_PATH = f"{PREFIX}queue"
# The URLs in fal's responses that clients follow, on fal's host or on its backup host.
QUEUE_URL = re.compile(
    rb'("(?:status|response|cancel)_url"\s*:\s*")https:\\?/\\?/queue\.(?:fal\.run|falrun\.com)'
)
OPERATIONS_WITH_URLS = (Operation.SUBMIT, Operation.STATUS, Operation.STATUS_STREAM)
SAFE_PREFIX = re.compile(r"(?:/[\w.-]+)*")


def base_url_dialect(name: str, limits: BodyLimits, public_url: str | None) -> Dialect:
    """Create the dialect of one base URL.

    name: a key of BASE_URL_HOSTS.
    public_url: the configured URL of the proxy; None derives the URL from each request.
    """
    read_target = partial(target_from_path, name=name)
    return Dialect(
        check=partial(check_method, read_target=read_target),
        read=partial(read_base_url_call, read_target=read_target, limits=limits),
        write=partial(rewrite_queue_urls, public_url=public_url),
        refuse=refuse,
    )


async def read_base_url_call(
    request: web.Request, *, read_target: ReadTarget, limits: BodyLimits
) -> Call:
    """Read a call as `transparent.read_call` does, and refuse requests that browsers send for any
    page without a CORS preflight. (On the header route, the header itself forces a preflight.)

    Raises: ProxyError 400, 405, 412, 413, 415.
    """
    if request.method == hdrs.METH_POST and request.content_type != "application/json":
        # Also without a body: browsers send other content types without a preflight.
        raise not_json()
    call = await read_call(request, read_target=read_target, limits=limits)
    if request.method == hdrs.METH_GET and is_model_call(request.method, call.target):
        # Browsers send GET without a preflight, for example as the source of an image.
        raise ProxyError(405, "method_not_allowed", "Use POST here.", {hdrs.ALLOW: "POST"})
    return replace(call, needs_identity=call.target.operation in OPERATIONS_WITH_URLS)


def target_from_path(request: web.Request, *, name: str) -> Target:
    """Raises: ProxyError 412."""
    path = request.raw_path.partition(f"{PREFIX}{name}/")[2]
    return parse_target(f"https://{BASE_URL_HOSTS[name]}/{path}")


async def rewrite_queue_urls(
    request: web.Request, response: web.StreamResponse, *, public_url: str | None
) -> web.StreamResponse:
    """Replace fal's queue host by the proxy in the URLs of a response. Clients follow these URLs
    unchanged, and would otherwise send requests that are meant for the proxy to fal."""
    base_url = (public_url + QUEUE_PATH if public_url else queue_base_url(request)).encode()
    operation = request[CALL].target.operation
    rewrite = partial(QUEUE_URL.sub, lambda match: match[1] + base_url)
    if operation is Operation.STATUS_STREAM and isinstance(
        response, RelayedResponse | LocalEventStream
    ):
        response.rewrite_lines(sync_rewrite(rewrite))
    elif (
        operation in OPERATIONS_WITH_URLS
        and isinstance(response, RelayedResponse | LocalDocument)
        and (document := await response.document()) is not None
    ):
        response.replace_document(rewrite(document))
    return response


def queue_base_url(request: web.Request) -> str:
    """Return the URL of the queue route as the client sees it, with the prefix of an outer
    application."""
    prefix, separator, _ = request.raw_path.partition(PREFIX)
    prefix = prefix if separator and SAFE_PREFIX.fullmatch(prefix) else ""
    return f"{public_origin(request)}{prefix}{QUEUE_PATH}"
