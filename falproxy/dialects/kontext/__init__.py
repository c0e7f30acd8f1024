"""`POST /kontext`, `/kontext/max` and `/kontext/dev`: a picture edited by one request that waits
for its result."""

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
from falproxy.dialects.kontext.requests import (
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
from falproxy.media.image_rules import InputRefused
from falproxy.proxy.call import CACHE_OUTCOME, IMAGE_LIMITS
from falproxy.spool import Spool, SpoolQuota, spool_body
from falproxy.stores.cache.eligibility import is_storable
from falproxy.stores.files import StorageError

logger = logging.getLogger(__name__)

INLINE_PARSE_MAX = 16 * 2**10  # bytes of a body that are read on the event loop; more take a thread
PARSE_CONCURRENCY = 2  # such bodies; one takes six times its bytes in memory
SPOOL_QUOTA_BYTES = 4 * 2**30  # bytes on disk of all bodies and images of a process
FORWARDED_RESPONSE_HEADERS = (hdrs.AGE, "Cache-Status", "x-fal-request-id", "x-falproxy-rehost")
RETRY_SOON, RETRY_LATER = {"Retry-After": "5"}, {"Retry-After": "60"}

FIELDS = {name for variant in VARIANTS.values() for name in variant.request.model_fields}
# fal's types of refused inputs (docs.fal.ai/errors) that a person can do something about.
INPUT_ERRORS = {
    "content_policy_violation": "fal.ai's content checker refuses the prompt or the image.",
    "face_detection_error": "fal.ai finds no face in the image.",
    "file_download_error": "fal.ai cannot download the image.",
    "file_too_large": "The image has too many bytes for fal.ai.",
    "image_load_error": "fal.ai cannot read the image.",
    "image_too_large": "The image has too many pixels for fal.ai.",
    "image_too_small": "The image has too few pixels for fal.ai.",
    "no_media_generated": "fal.ai made no picture of this prompt and image.",
    "unsupported_image_format": "fal.ai cannot read images of this format.",
}
ACCOUNT_LOCKED = "upstream_locked", "fal.ai refuses the proxy's account.", RETRY_LATER
BUSY = "upstream_busy", "fal.ai takes no more jobs for now.", RETRY_SOON
UNAVAILABLE = "upstream_unavailable", "fal.ai is not there for now.", RETRY_SOON
# What fal's answers mean that may pass: a 503 with its code, its message and when to come again.
TRANSIENT_ERRORS = {
    401: ACCOUNT_LOCKED,
    403: ACCOUNT_LOCKED,
    429: BUSY,
    502: UNAVAILABLE,
    503: UNAVAILABLE,
    504: UNAVAILABLE,
}

# The proxy's own refusals that are the client's business as they are.
CLIENT_STATUSES = (400, 401, 402, 403, 405, 408, 413, 415, 429, 499, 503)
# And what the other errors of the way are here. The answer to `only-if-cached` is RFC 9111's.
STATUS_BY_CODE = {"not_cached": 504, "upstream_broken": 503, "upstream_unreachable": 503}

StoreInput = Callable[[Spool], Awaitable[str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class KontextDeps:
    """max_body: bytes that a request's body may have. keep: stores an input and gives its
    address, raises StorageError (`Outputs.store`); None where nothing is stored. background: where
    it does so. room: for what is held meanwhile. turns: to read large bodies."""

    max_body: int
    background: Background
    store_input: StoreInput | None = None
    quota: SpoolQuota = field(default_factory=lambda: SpoolQuota(SPOOL_QUOTA_BYTES))
    parse_slots: asyncio.Semaphore = field(
        default_factory=lambda: asyncio.Semaphore(PARSE_CONCURRENCY)
    )


@dataclass(frozen=True, slots=True)
class KontextParams:
    """What the answer needs to know of its request. image_name: the parameter that the image came
    in; image: what is to be stored of it."""

    prompt: str
    image_param: str
    image: Spool | None


def kontext_dialect(variant: str, deps: KontextDeps) -> BlockingDialect[KontextParams]:
    """The facade of one path. variant: a key of VARIANTS."""
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
    """The edit as one call. Raises: ProxyError 400, 408, 413, 415, 499, 503."""
    check_body(request, BodyLimits(deps.max_body, allow_encoded=False))
    spool = await spool_body(body_chunks(request.content, deps.max_body), deps.quota)
    if spool.size > INLINE_PARSE_MAX:
        async with deps.parse_slots:
            edit = await asyncio.to_thread(parse_edit, spool, variant)
    else:
        edit = parse_edit(spool, variant)
    image = None if deps.store_input is None else await spool_image(edit, deps.quota)
    call = submit_call(variant.endpoint, edit.body, request.headers)
    request[IMAGE_LIMITS] = URL_IMAGE_LIMITS
    return ParsedRequest(KontextParams(edit.prompt, edit.image_param, image), [call])


async def spool_image(edit: Edit, quota: SpoolQuota) -> Spool | None:
    """The image until it is stored, in little memory. None where it is not here, or there is no
    room for it."""
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
    """`{"images": [{"url", "width", "height"}], "prompt"}`. Raises: ProxyError 400, 500, 503."""
    answer = responses[0]
    headers = {
        name: answer.headers[name] for name in FORWARDED_RESPONSE_HEADERS if name in answer.headers
    }
    if answer.status != web.HTTPOk.status_code:
        raise error_from_response(answer, params, headers)
    if len(answer.body) > INLINE_PARSE_MAX:
        body = await asyncio.to_thread(render_result, answer, params)
    else:
        body = render_result(answer, params)
    if body is None:
        message = "fal.ai's answer names no pictures."
        raise ProxyError(500, "upstream_unreadable", message, headers)
    if (
        deps.store_input is not None
        and params.image is not None
        and request.get(CACHE_OUTCOME) != "hit"
    ):
        deps.background.spawn(store_image(params.image, deps.store_input, answer))
    return web.Response(body=body, content_type="application/json", headers=headers)


async def store_image(image: Spool, store_input: StoreInput, response: BufferedResponse) -> None:
    """Stores an input of which fal made something that its safety checker let pass: no other gets
    an address that anybody can read."""
    if not await asyncio.to_thread(is_storable, response.status, response.body):
        return
    try:
        await store_input(image)
    except StorageError as error:
        logger.warning("An input was not stored: %s", error)


def render_result(response: BufferedResponse, params: KontextParams) -> bytes | None:
    """fal's result in our shape, as JSON. None where it has no pictures."""
    document = parse_object(response.body)
    found = document.get("images")
    images = [
        {
            "url": image.get("url"),
            **{side: int_or_none(image.get(side)) for side in ("width", "height")},
        }
        for image in (found if isinstance(found, list) else ())
        if isinstance(image, dict)
    ]
    prompt = document.get("prompt")
    used = prompt if isinstance(prompt, str) and prompt else params.prompt
    try:
        result = KontextResult.model_validate({"images": images, "prompt": used})
    except ValidationError:
        return None
    return json.dumps(result.model_dump()).encode()


def int_or_none(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def parse_object(body: bytes) -> Mapping[str, object]:
    """A JSON object; an empty one for what is none."""
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        return {}
    return document if isinstance(document, dict) else {}


def error_from_response(
    response: BufferedResponse, params: KontextParams, headers: Mapping[str, str]
) -> ProxyError:
    """What a failure of fal's is for the client. Nothing of fal's own text is repeated."""
    document = parse_object(response.body)
    entries = document.get("detail")
    entry = entries[0] if isinstance(entries, list) and entries else {}
    details = entry if isinstance(entry, dict) else {}
    is_input = response.status == web.HTTPUnprocessableEntity.status_code
    if is_input or document.get("error_type") == "bad_request":
        return input_error(details, params, headers)
    if response.status in TRANSIENT_ERRORS and not details:
        code, message, again = TRANSIENT_ERRORS[response.status]
        return ProxyError(503, code, message, {**again, **headers})
    return ProxyError(500, "upstream_failed", f"fal.ai failed with {response.status}.", headers)


def input_error(
    details: Mapping[str, object], params: KontextParams, headers: Mapping[str, str]
) -> ProxyError:
    """400 for an input that fal does not accept. details: the first entry of fal's `detail`."""
    kind = details.get("type")
    if isinstance(kind, str) and kind in INPUT_ERRORS:
        return ProxyError(400, kind, INPUT_ERRORS[kind], headers)
    loc = details.get("loc")
    words = [word for word in loc if isinstance(word, str)] if isinstance(loc, list) else []
    name = next((word for word in words if word in FIELDS), "the request")
    shown = params.image_param if name == "image_url" else name
    return ProxyError(400, "input_refused", f"fal.ai does not accept {shown}.", headers)


def refuse(error: ProxyError, request_id: str) -> web.Response:
    """`{"error": {"code", "message"}}`. What went wrong on the way to fal is a 503 where it may
    pass, else a 500. A submit whose answer was lost may have been bought: nobody is told to come
    again soon."""
    status = STATUS_BY_CODE.get(
        error.code, error.status if error.status in CLIENT_STATUSES else 500
    )
    if isinstance(error, InputRefused):
        status = web.HTTPBadRequest.status_code
    headers = error.headers
    if error.code == "upstream_unreachable":
        headers = {**RETRY_SOON, **headers}
    return default_error(ProxyError(status, error.code, error.message, headers), request_id)
