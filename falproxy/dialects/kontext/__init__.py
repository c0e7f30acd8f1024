"""The dialect of `POST /kontext`, `/kontext/max` and `/kontext/dev`: one request edits an image and
waits for the result."""

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from aiohttp import hdrs, web
from pydantic import ValidationError

from falproxy.background import Background
from falproxy.dialects import default_error
from falproxy.dialects.blocking import BlockingDialect, ParsedRequest
from falproxy.dialects.ignored import ignored_header
from falproxy.dialects.kontext.requests import (
    PARAMETERS,
    URL_IMAGE_LIMITS,
    VARIANTS,
    Edit,
    KontextResult,
    Variant,
    parse_edit,
)
from falproxy.dialects.queue_client import BufferedResponse, submit_call
from falproxy.dialects.transparent import BodyLimits, body_chunks, check_body
from falproxy.errors import ProxyError
from falproxy.fal.error_body import ModelError, parse_error_body
from falproxy.fal.results import IMAGES_KEY, parse_dimension
from falproxy.json_object import parse_object
from falproxy.media.image_rules import InputRefused
from falproxy.proxy.call import CACHE_OUTCOME, IMAGE_LIMITS
from falproxy.proxy.idempotency_key import set_client_digest
from falproxy.proxy.prices import COST_HEADER, SAVED_HEADER
from falproxy.spool import Spool, SpoolQuota, spool_body
from falproxy.stores.cache.eligibility import is_storable
from falproxy.stores.files import StorageError

logger = logging.getLogger(__name__)

INLINE_PARSE_MAX = 16 * 2**10  # bytes; larger bodies are parsed in a thread
PARSE_CONCURRENCY = 2  # large bodies; parsing one needs six times its size in memory
SPOOL_QUOTA_BYTES = 4 * 2**30  # disk space for the bodies and images of a process
FORWARDED_RESPONSE_HEADERS = (
    hdrs.AGE, "Cache-Status", COST_HEADER, SAVED_HEADER, "x-fal-request-id", "x-falproxy-rehost",
)  # fmt: skip
RETRY_SOON, RETRY_LATER = {"Retry-After": "5"}, {"Retry-After": "60"}

# fal's types of input errors (docs.fal.ai/errors) that the user can correct.
INPUT_ERRORS = {
    "content_policy_violation": "fal.ai's content checker refuses the prompt or the image.",
    "face_detection_error": "fal.ai finds no face in the image.",
    "file_download_error": "fal.ai cannot download the image.",
    "file_too_large": "The image has too many bytes for fal.ai.",
    "image_load_error": "fal.ai cannot read the image.",
    "image_too_large": "The image has too many pixels for fal.ai.",
    "image_too_small": "The image has too few pixels for fal.ai.",
    "no_media_generated": "fal.ai generated no image from this prompt and image.",
    "unsupported_image_format": "fal.ai cannot read images of this format.",
}
ACCOUNT_LOCKED = "upstream_locked", "fal.ai refuses the proxy's account.", RETRY_LATER
BUSY = "upstream_busy", "fal.ai accepts no more jobs at the moment.", RETRY_SOON
UNAVAILABLE = "upstream_unavailable", "fal.ai is unavailable at the moment.", RETRY_SOON
# fal's status → code, message and Retry-After of the 503 that the client gets.
TRANSIENT_ERRORS = {
    401: ACCOUNT_LOCKED,
    403: ACCOUNT_LOCKED,
    429: BUSY,
    502: UNAVAILABLE,
    503: UNAVAILABLE,
    504: UNAVAILABLE,
}

# Statuses of the proxy's errors that the client gets unchanged; others become 500.
CLIENT_STATUSES = (400, 401, 402, 403, 405, 408, 413, 415, 429, 499, 503)
# Exceptions by error code. 504 for `only-if-cached` is that of RFC 9111 §5.2.1.7.
STATUS_BY_CODE = {
    "not_cached": 504,
    "upstream_broken": 503,
    "upstream_unreachable": 503,
    "idempotency_in_progress": 409,
    "idempotency_key_reused": 422,
    "idempotency_response_dropped": 410,
}

StoreInput = Callable[[Spool], Awaitable[str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class KontextDeps:
    """Limits and services of the dialect.

    max_body: bytes of a request's body.
    background: runs the storing of inputs.
    store_input: stores an input image and returns its URL; raises StorageError. None: images are
        not stored.
    quota: disk space for bodies, and for images until they are stored.
    parse_slots: limits the number of large bodies that are parsed at once.
    """

    max_body: int
    background: Background
    store_input: StoreInput | None = None
    quota: SpoolQuota = field(default_factory=lambda: SpoolQuota(SPOOL_QUOTA_BYTES))
    parse_slots: asyncio.Semaphore = field(
        default_factory=lambda: asyncio.Semaphore(PARSE_CONCURRENCY)
    )


@dataclass(frozen=True, slots=True)
class KontextParams:
    """The parts of a request that its response needs.

    image_param: the parameter that contained the image.
    image: the image to store; None to store nothing.
    ignored: names of parameters that the variant does not have.
    """

    prompt: str
    image_param: str
    image: Spool | None
    ignored: tuple[str, ...] = ()


def kontext_dialect(variant: str, deps: KontextDeps) -> BlockingDialect[KontextParams]:
    """Create the dialect of one path. variant: a key of VARIANTS."""
    return BlockingDialect(
        check=check,
        read=partial(read, variant=VARIANTS[variant], deps=deps),
        write=partial(write, deps=deps),
        refuse=refuse,
    )


def check(request: web.Request) -> None:
    """Raises: ProxyError 405."""
    if request.method != hdrs.METH_POST:
        raise ProxyError(405, "method_not_allowed", "Use POST here.", {hdrs.ALLOW: "POST"})


async def read(
    request: web.Request, *, variant: Variant, deps: KontextDeps
) -> ParsedRequest[KontextParams]:
    """Read a request, which needs one call. Raises: ProxyError 400, 408, 413, 415, 499, 503."""
    check_body(request, BodyLimits(deps.max_body, allow_encoded=False))
    spool = await spool_body(body_chunks(request.content, deps.max_body), deps.quota)
    if spool.size > INLINE_PARSE_MAX:
        async with deps.parse_slots:
            edit = await asyncio.to_thread(parse_edit, spool, variant)
    else:
        edit = parse_edit(spool, variant)
    image = None if deps.store_input is None else await spool_image(edit, deps.quota)
    await set_client_digest(request, [spool])
    call = submit_call(variant.endpoint, edit.body, request.headers)
    request[IMAGE_LIMITS] = URL_IMAGE_LIMITS
    params = KontextParams(edit.prompt, edit.image_param, image, edit.ignored)
    return ParsedRequest(params, [call])


async def spool_image(edit: Edit, quota: SpoolQuota) -> Spool | None:
    """Copy the image of a request to a spool, where it waits to be stored. Return None for an image
    behind a URL, or if the quota is used up."""
    if edit.image is None:
        return None
    try:
        return await spool_body(Spool(edit.image).chunks(), quota)
    except ProxyError as error:
        logger.warning("An input will not be stored: %s", error.message)
        return None


async def write(
    request: web.Request,
    params: KontextParams,
    responses: Sequence[BufferedResponse],
    *,
    deps: KontextDeps,
) -> web.Response:
    """Write `{"images": [{"url", "width", "height"}], "prompt"}`.

    Raises: ProxyError 400, 500, 503.
    """
    response = responses[0]
    headers = {
        name: response.headers[name]
        for name in FORWARDED_RESPONSE_HEADERS
        if name in response.headers
    }
    headers |= ignored_header(params.ignored)
    if response.status != web.HTTPOk.status_code:
        raise error_from_response(response, params, headers)
    if len(response.body) > INLINE_PARSE_MAX:
        body = await asyncio.to_thread(render_result, response, params)
    else:
        body = render_result(response, params)
    if body is None:
        message = "fal.ai's response contains no images."
        raise ProxyError(500, "upstream_unreadable", message, headers)
    if (
        deps.store_input is not None
        and params.image is not None
        and request.get(CACHE_OUTCOME) != "hit"
    ):
        deps.background.spawn(store_image(params.image, deps.store_input, response))
    return web.Response(body=body, content_type="application/json", headers=headers)


async def store_image(image: Spool, store_input: StoreInput, response: BufferedResponse) -> None:
    """Store an input image. Its URL is public, so images are only stored if the result passed fal's
    safety checker."""
    if not await asyncio.to_thread(is_storable, response.status, response.body):
        return
    try:
        await store_input(image)
    except StorageError as error:
        logger.warning("An input was not stored: %s", error)


def render_result(response: BufferedResponse, params: KontextParams) -> bytes | None:
    """Return fal's result as a KontextResult in JSON; None if it has no images."""
    document = parse_object(response.body) or {}
    entries = document.get(IMAGES_KEY)
    images = [
        {
            "url": entry.get("url"),
            "width": parse_dimension(entry.get("width")),
            "height": parse_dimension(entry.get("height")),
        }
        for entry in (entries if isinstance(entries, list) else ())
        if isinstance(entry, dict)
    ]
    fal_prompt = document.get("prompt")
    prompt = fal_prompt if isinstance(fal_prompt, str) and fal_prompt else params.prompt
    try:
        result = KontextResult.model_validate({"images": images, "prompt": prompt})
    except ValidationError:
        return None
    return json.dumps(result.model_dump()).encode()


def error_from_response(
    response: BufferedResponse, params: KontextParams, headers: Mapping[str, str]
) -> ProxyError:
    """Convert an error of fal's. fal's own messages are not repeated.

    headers: added to the error.
    """
    error = parse_error_body(response.body)
    is_rejected = response.status == web.HTTPUnprocessableEntity.status_code
    if is_rejected or error.error_type == "bad_request":
        return input_error(error.model_error, params, headers)
    if response.status in TRANSIENT_ERRORS and error.model_error is None:
        code, message, retry_after = TRANSIENT_ERRORS[response.status]
        return ProxyError(503, code, message, {**retry_after, **headers})
    return ProxyError(500, "upstream_failed", f"fal.ai failed with {response.status}.", headers)


def input_error(
    error: ModelError | None, params: KontextParams, headers: Mapping[str, str]
) -> ProxyError:
    """Return the 400 for an input that fal does not accept."""
    if error is not None and error.type in INPUT_ERRORS:
        return ProxyError(400, error.type, INPUT_ERRORS[error.type], headers)
    location = () if error is None else error.location
    name = next((key for key in location if key in PARAMETERS), "the request")
    if name == "image_url":
        name = params.image_param
    return ProxyError(400, "input_refused", f"fal.ai does not accept {name}.", headers)


def refuse(error: ProxyError, request_id: str) -> web.Response:
    """Render an error as `{"error": {"code", "message"}}`.

    Temporary failures between the proxy and fal become 503, others 500. `Retry-After` is only sent
    if the call did not reach fal: after a lost response, fal may have accepted a job, and a retry
    would be charged again.
    """
    status = STATUS_BY_CODE.get(
        error.code, error.status if error.status in CLIENT_STATUSES else 500
    )
    if isinstance(error, InputRefused):
        status = web.HTTPBadRequest.status_code
    headers = error.headers
    if error.code == "upstream_unreachable":
        headers = {**RETRY_SOON, **headers}
    return default_error(ProxyError(status, error.code, error.message, headers), request_id)
