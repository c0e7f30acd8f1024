"""The base URL routes `/api/fal/run/…`, `/api/fal/queue/…` and `/api/fal/rest/…`: the transparent
dialect for clients that can be given a base URL, but cannot send the target in a header."""

import re
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from aiohttp import hdrs, web

from falproxy.dialects import Dialect
from falproxy.dialects.public_url import public_base_url
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
# JSON or events, with parameters that are not another type.
DATA_TYPE = re.compile(
    r"\s*(?:application/(?:[\w.-]+\+)?json|text/event-stream)\s*(?:;[^,]*)?", re.IGNORECASE
)
SAFE_PREFIX = re.compile(r"(?:/[\w.-]+)*")


def base_url_dialect(
    name: str, limits: BodyLimits, public_url: str | None, listed: frozenset[str] = frozenset()
) -> Dialect:
    """Create the dialect of one base URL.

    name: a key of BASE_URL_HOSTS.
    public_url: the configured URL of the proxy; None derives the URL from each request.
    listed: see `parse_target`.
    """
    read_target = partial(target_from_path, name=name, listed=listed)
    return Dialect(
        check=partial(check_method, read_target=read_target),
        read=partial(read_base_url_call, read_target=read_target, limits=limits),
        write=partial(write_response, public_url=public_url),
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


def target_from_path(
    request: web.Request, *, name: str, listed: frozenset[str] = frozenset()
) -> Target:
    """Raises: ProxyError 412."""
    path = split_path(request)[1]
    return parse_target(f"https://{BASE_URL_HOSTS[name]}/{path}", listed)


def split_path(request: web.Request) -> tuple[str, str]:
    """Return the URL of a request up to `/api/fal/<name>`, and the rest: fal's path with the query.

    It is split where the route's pattern has its variable part. The text before may be spelled
    otherwise than in the pattern, such as `/api/fal/ru%6e/`, and is not looked for.
    """
    raw_path = request.raw_path
    if not raw_path.startswith("/"):  # with scheme and authority (RFC 9112 §3.2.2)
        raw_path = "/" + raw_path.split("/", 3)[3]
    resource = request.match_info.route.resource
    assert resource is not None
    depth = resource.canonical.removesuffix("{path}").count("/")
    *segments, rest = raw_path.split("/", depth)
    return "/".join(segments), rest


async def write_response(
    request: web.Request, response: web.StreamResponse, *, public_url: str | None
) -> web.StreamResponse:
    """Replace fal's queue host in the response, and isolate other responses than data: a browser
    can open these URLs, and a page or an image with scripts would have the origin of the proxy."""
    response = await rewrite_queue_urls(request, response, public_url=public_url)
    if isinstance(response, RelayedResponse):
        if not is_data(response.upstream_headers.getall(hdrs.CONTENT_TYPE, [])):
            response.add_header(hdrs.CONTENT_SECURITY_POLICY, "sandbox")
    elif not is_data(response.headers.getall(hdrs.CONTENT_TYPE, [])):
        response.headers.add(hdrs.CONTENT_SECURITY_POLICY, "sandbox")
    return response


def is_data(content_types: Sequence[str]) -> bool:
    """Return whether browsers take a body for JSON or events, according to its `Content-Type`
    headers. Of several, or of several in one, they take the last."""
    return len(content_types) == 1 and DATA_TYPE.fullmatch(content_types[0]) is not None


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
    resource = request.match_info.route.resource
    prefix = "" if resource is None else resource.canonical.partition(PREFIX)[0]
    if "{" in prefix:  # the outer application has variables in its prefix
        prefix = split_path(request)[0].rsplit("/", PREFIX.count("/"))[0]
    prefix = prefix if SAFE_PREFIX.fullmatch(prefix) else ""
    return f"{public_base_url(request)}{prefix}{QUEUE_PATH}"
