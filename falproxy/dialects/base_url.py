"""The mounts, `/api/fal/run/…`, `/queue/…` and `/rest/…`: the transparent dialect for clients
that take a base URL and cannot name a target in a header."""

import re
from dataclasses import replace
from functools import partial

from aiohttp import hdrs, web

from falproxy.dialects import Dialect
from falproxy.dialects.public_url import seen_origin
from falproxy.dialects.transparent import (
    BodyRules,
    ReadTarget,
    check_method,
    not_json,
    read,
    refuse,
)
from falproxy.errors import ProxyError
from falproxy.fal.target import MODEL_CALLS, Operation, Target, parse_target
from falproxy.proxy.call import CALL, Call
from falproxy.proxy.forward import UpstreamResponse
from falproxy.proxy.line_rewriter import at_once
from falproxy.proxy.local_responses import OwnDocument, OwnEvents

# Mount → the host of fal that it stands for.
MOUNTS = {"run": "fal.run", "queue": "queue.fal.run", "rest": "rest.fal.ai"}
PREFIX = "/api/fal/"
QUEUE = f"{PREFIX}queue"
# The addresses in fal's answers that clients follow, on fal's host or on its backup.
FOLLOWED = re.compile(
    rb'("(?:status|response|cancel)_url"\s*:\s*")https:\\?/\\?/queue\.(?:fal\.run|falrun\.com)'
)
WITH_ADDRESSES = (Operation.SUBMIT, Operation.STATUS, Operation.STATUS_STREAM)
PLAIN_PREFIX = re.compile(r"(?:/[\w.-]+)*")


def mount(name: str, rules: BodyRules, public_url: str | None) -> Dialect:
    """The dialect of one mount. public_url: where clients reach the proxy; None takes a
    request's own word for it."""
    read_target = partial(target_below, name=name)
    return Dialect(
        check=partial(check_method, read_target=read_target),
        read=partial(read_below, read_target=read_target, rules=rules),
        write=partial(point_back, public_url=public_url),
        refuse=refuse,
    )


async def read_below(request: web.Request, *, read_target: ReadTarget, rules: BodyRules) -> Call:
    """As on the header route, whose header makes browsers ask before they send."""
    if request.method == hdrs.METH_POST and request.content_type != "application/json":
        # With a body or without: pages of any origin may post other types without asking.
        raise not_json()
    call = await read(request, read_target=read_target, rules=rules)
    if request.method == hdrs.METH_GET and call.target.operation in MODEL_CALLS:
        # Any page may have its browser get anything, as a picture say.
        raise ProxyError(405, "method_not_allowed", "Use POST here.", {hdrs.ALLOW: "POST"})
    return replace(call, is_document=call.target.operation in WITH_ADDRESSES)


def target_below(request: web.Request, *, name: str) -> Target:
    """The target that a path below a mount stands for. Raises: ProxyError 412."""
    path = request.raw_path.partition(f"{PREFIX}{name}/")[2]
    return parse_target(f"https://{MOUNTS[name]}/{path}")


async def point_back(
    request: web.Request, response: web.StreamResponse, *, public_url: str | None
) -> web.StreamResponse:
    """fal's answer with its addresses below the mount: clients follow them as they stand, and
    would send fal what is meant for the proxy."""
    here = (public_url + QUEUE if public_url else own_address(request)).encode()
    operation = request[CALL].target.operation
    rewrite = partial(FOLLOWED.sub, lambda match: match[1] + here)
    if operation is Operation.STATUS_STREAM and isinstance(response, UpstreamResponse | OwnEvents):
        response.rewrite_lines(at_once(rewrite))
    elif (
        operation in WITH_ADDRESSES
        and isinstance(response, UpstreamResponse | OwnDocument)
        and (document := await response.document()) is not None
    ):
        response.replace_document(rewrite(document))
    return response


def own_address(request: web.Request) -> str:
    """The queue's mount as the client sees it."""
    prefix, found, _ = request.raw_path.partition(PREFIX)
    prefix = prefix if found and PLAIN_PREFIX.fullmatch(prefix) else ""
    return f"{seen_origin(request)}{prefix}{QUEUE}"
