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
from falproxy.dialects import refuse_plainly
from falproxy.dialects.blocking import Facade, Wish
from falproxy.dialects.kontext.requests import (
    BEHIND_URL,
    VARIANTS,
    Edit,
    KontextResult,
    Variant,
    read_edit,
)
from falproxy.dialects.queue_client import Answer, call_of
from falproxy.dialects.transparent import BodyRules, body_chunks, check_body
from falproxy.errors import ProxyError
from falproxy.media.image_rules import InputRefused
from falproxy.proxy.call import CACHE, IMAGE_RULES
from falproxy.spool import Room, Spool, hold
from falproxy.stores.cache.eligibility import is_good
from falproxy.stores.files import StorageError

logger = logging.getLogger(__name__)

AT_ONCE = 16 * 2**10  # bytes of a body that are read on the event loop; more take a thread
READ_AT_ONCE = 2  # such bodies; one takes six times its bytes in memory
HELD_MAX = 4 * 2**30  # bytes on disk of all bodies and images of a process
PASSED_DOWN = (hdrs.AGE, "Cache-Status", "x-fal-request-id", "x-falproxy-rehost")
SOON, LATER = {"Retry-After": "5"}, {"Retry-After": "60"}

FIELDS = {name for variant in VARIANTS.values() for name in variant.request.model_fields}
# fal's types of refused inputs (docs.fal.ai/errors) that a person can do something about.
REFUSALS = {
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
LOCKED = "upstream_locked", "fal.ai refuses the proxy's account.", LATER
BUSY = "upstream_busy", "fal.ai takes no more jobs for now.", SOON
DOWN = "upstream_unavailable", "fal.ai is not there for now.", SOON
# What fal's answers mean that may pass: a 503 with its code, its message and when to come again.
PASSING = {401: LOCKED, 403: LOCKED, 429: BUSY, 502: DOWN, 503: DOWN, 504: DOWN}

# The proxy's own refusals that are the client's business as they are.
OWN = (400, 401, 402, 403, 405, 408, 413, 415, 429, 499, 503)
# And what the other errors of the way are here. The answer to `only-if-cached` is RFC 9111's.
STATUSES = {"not_cached": 504, "upstream_broken": 503, "upstream_unreachable": 503}

Keep = Callable[[Spool], Awaitable[str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class KontextRules:
    """max_body: bytes that a request's body may have. keep: stores an input and gives its
    address, raises StorageError (`Outputs.keep`); None where nothing is stored. background: where
    it does so. room: for what is held meanwhile. turns: to read large bodies."""

    max_body: int
    background: Background
    keep: Keep | None = None
    room: Room = field(default_factory=lambda: Room(HELD_MAX))
    turns: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(READ_AT_ONCE))


@dataclass(frozen=True, slots=True)
class Asked:
    """What the answer needs to know of its request. image_name: the parameter that the image came
    in; image: what is to be stored of it."""

    prompt: str
    image_name: str
    image: Spool | None


def kontext(variant: str, rules: KontextRules) -> Facade[Asked]:
    """The facade of one path. variant: a key of VARIANTS."""
    return Facade(
        check=check,
        read=partial(read, variant=VARIANTS[variant], rules=rules),
        write=partial(write, rules=rules),
        refuse=refuse,
    )


def check(request: web.Request) -> None:
    """Raises: ProxyError 405."""
    if request.method != hdrs.METH_POST:
        raise ProxyError(405, "method_not_allowed", "Use POST here.", {hdrs.ALLOW: "POST"})


async def read(request: web.Request, *, variant: Variant, rules: KontextRules) -> Wish[Asked]:
    """The edit as one call. Raises: ProxyError 400, 408, 413, 415, 499, 503."""
    check_body(request, BodyRules(rules.max_body, are_encoded=False))
    spool = await hold(body_chunks(request.content, rules.max_body), rules.room)
    if spool.size > AT_ONCE:
        async with rules.turns:
            edit = await asyncio.to_thread(read_edit, spool, variant)
    else:
        edit = read_edit(spool, variant)
    image = None if rules.keep is None else await held_image(edit, rules.room)
    call = call_of(variant.endpoint, edit.body, request.headers)
    request[IMAGE_RULES] = BEHIND_URL
    return Wish(Asked(edit.prompt, edit.image_name, image), [call])


async def held_image(edit: Edit, room: Room) -> Spool | None:
    """The image until it is stored, in little memory. None where it is not here, or there is no
    room for it."""
    if edit.image is None:
        return None
    try:
        return await hold(Spool(edit.image).chunks(), room)
    except ProxyError as error:
        logger.warning("An input will not be stored: %s", error.message)
        return None


async def write(
    request: web.Request, asked: Asked, answers: Sequence[Answer], *, rules: KontextRules
) -> web.Response:
    """`{"images": [{"url", "width", "height"}], "prompt"}`. Raises: ProxyError 400, 500, 503."""
    answer = answers[0]
    headers = {name: answer.headers[name] for name in PASSED_DOWN if name in answer.headers}
    if answer.status != web.HTTPOk.status_code:
        raise failure_of(answer, asked, headers)
    if len(answer.body) > AT_ONCE:
        body = await asyncio.to_thread(written, answer, asked)
    else:
        body = written(answer, asked)
    if body is None:
        message = "fal.ai's answer names no pictures."
        raise ProxyError(500, "upstream_unreadable", message, headers)
    if rules.keep is not None and asked.image is not None and request.get(CACHE) != "hit":
        rules.background.see_to(store(asked.image, rules.keep, answer))
    return web.Response(body=body, content_type="application/json", headers=headers)


async def store(image: Spool, keep: Keep, answer: Answer) -> None:
    """Stores an input of which fal made something that its safety checker let pass: no other gets
    an address that anybody can read."""
    if not await asyncio.to_thread(is_good, answer.status, answer.body):
        return
    try:
        await keep(image)
    except StorageError as error:
        logger.warning("An input was not stored: %s", error)


def written(answer: Answer, asked: Asked) -> bytes | None:
    """fal's result in our shape, as JSON. None where it has no pictures."""
    document = parsed(answer.body)
    found = document.get("images")
    images = [
        {"url": image.get("url"), **{side: size(image.get(side)) for side in ("width", "height")}}
        for image in (found if isinstance(found, list) else ())
        if isinstance(image, dict)
    ]
    prompt = document.get("prompt")
    used = prompt if isinstance(prompt, str) and prompt else asked.prompt
    try:
        result = KontextResult.model_validate({"images": images, "prompt": used})
    except ValidationError:
        return None
    return json.dumps(result.model_dump()).encode()


def size(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def parsed(body: bytes) -> Mapping[str, object]:
    """A JSON object; an empty one for what is none."""
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        return {}
    return document if isinstance(document, dict) else {}


def failure_of(answer: Answer, asked: Asked, headers: Mapping[str, str]) -> ProxyError:
    """What a failure of fal's is for the client. Nothing of fal's own text is repeated."""
    document = parsed(answer.body)
    entries = document.get("detail")
    entry = entries[0] if isinstance(entries, list) and entries else {}
    details = entry if isinstance(entry, dict) else {}
    is_input = answer.status == web.HTTPUnprocessableEntity.status_code
    if is_input or document.get("error_type") == "bad_request":
        return refused(details, asked, headers)
    if answer.status in PASSING and not details:
        code, message, again = PASSING[answer.status]
        return ProxyError(503, code, message, {**again, **headers})
    return ProxyError(500, "upstream_failed", f"fal.ai failed with {answer.status}.", headers)


def refused(details: Mapping[str, object], asked: Asked, headers: Mapping[str, str]) -> ProxyError:
    """400 for an input that fal does not accept. details: the first entry of fal's `detail`."""
    kind = details.get("type")
    if isinstance(kind, str) and kind in REFUSALS:
        return ProxyError(400, kind, REFUSALS[kind], headers)
    loc = details.get("loc")
    words = [word for word in loc if isinstance(word, str)] if isinstance(loc, list) else []
    name = next((word for word in words if word in FIELDS), "the request")
    shown = asked.image_name if name == "image_url" else name
    return ProxyError(400, "input_refused", f"fal.ai does not accept {shown}.", headers)


def refuse(error: ProxyError, request_id: str) -> web.Response:
    """`{"error": {"code", "message"}}`. What went wrong on the way to fal is a 503 where it may
    pass, else a 500. A submit whose answer was lost may have been bought: nobody is told to come
    again soon."""
    status = STATUSES.get(error.code, error.status if error.status in OWN else 500)
    if isinstance(error, InputRefused):
        status = web.HTTPBadRequest.status_code
    headers = error.headers
    if error.code == "upstream_unreachable":
        headers = {**SOON, **headers}
    return refuse_plainly(ProxyError(status, error.code, error.message, headers), request_id)
