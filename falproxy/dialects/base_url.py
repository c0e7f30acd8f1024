"""The mounts, `/api/fal/run/…`, `/queue/…` and `/rest/…`: the transparent dialect for clients
that take a base URL and cannot name a target in a header."""

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
from falproxy.fal.target import MODEL_CALLS, Operation, Target, parse_target
from falproxy.proxy.call import CALL, Call
from falproxy.proxy.forward import RelayedResponse, sync_rewrite
from falproxy.proxy.local_responses import LocalDocument, LocalEventStream

# Mount → the host of fal that it stands for.
BASE_URL_HOSTS = {"run": "fal.run", "queue": "queue.fal.run", "rest": "rest.fal.ai"}
PREFIX = "/api/fal/"
QUEUE_PATH = f"{PREFIX}queue"
# The addresses in fal's answers that clients follow, on fal's host or on its backup.
QUEUE_URL = re.compile(
    rb'("(?:status|response|cancel)_url"\s*:\s*")https:\\?/\\?/queue\.(?:fal\.run|falrun\.com)'
)
OPERATIONS_WITH_URLS = (Operation.SUBMIT, Operation.STATUS, Operation.STATUS_STREAM)
SAFE_PREFIX = re.compile(r"(?:/[\w.-]+)*")


def base_url_dialect(name: str, limits: BodyLimits, public_url: str | None) -> Dialect:
    """The dialect of one mount. public_url: where clients reach the proxy; None takes a
    request's own word for it."""
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
    """As on the header route, whose header makes browsers ask before they send."""
    if request.method == hdrs.METH_POST and request.content_type != "application/json":
        # With a body or without: pages of any origin may post other types without asking.
        raise not_json()
    call = await read_call(request, read_target=read_target, limits=limits)
    if request.method == hdrs.METH_GET and call.target.operation in MODEL_CALLS:
        # Any page may have its browser get anything, as a picture say.
        raise ProxyError(405, "method_not_allowed", "Use POST here.", {hdrs.ALLOW: "POST"})
    return replace(call, needs_identity=call.target.operation in OPERATIONS_WITH_URLS)


def target_from_path(request: web.Request, *, name: str) -> Target:
    """The target that a path below a mount stands for. Raises: ProxyError 412."""
    path = request.raw_path.partition(f"{PREFIX}{name}/")[2]
    return parse_target(f"https://{BASE_URL_HOSTS[name]}/{path}")


async def rewrite_queue_urls(
    request: web.Request, response: web.StreamResponse, *, public_url: str | None
) -> web.StreamResponse:
    """fal's answer with its addresses below the mount: clients follow them as they stand, and
    would send fal what is meant for the proxy."""
    here = (public_url + QUEUE_PATH if public_url else queue_base_url(request)).encode()
    operation = request[CALL].target.operation
    rewrite = partial(QUEUE_URL.sub, lambda match: match[1] + here)
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
    """The queue's mount as the client sees it."""
    prefix, found, _ = request.raw_path.partition(PREFIX)
    prefix = prefix if found and SAFE_PREFIX.fullmatch(prefix) else ""
    return f"{public_origin(request)}{prefix}{QUEUE_PATH}"
