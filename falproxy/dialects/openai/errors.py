"""Failures in OpenAI's words: those of the proxy, and those of fal."""

import json
from collections.abc import Mapping
from dataclasses import dataclass

from aiohttp import hdrs, web
from aiohttp.typedefs import Handler

from falproxy.dialects.openai.schema import ErrorDetail, ErrorResponse
from falproxy.dialects.queue_client import Answer
from falproxy.errors import NO_HEADERS, ProxyError
from falproxy.fal.target import MODEL_CALLS
from falproxy.media.image_rules import InputRefused
from falproxy.proxy.call import CALL

# OpenAI's clients send again what failed with 408, 409, 429 or 5xx, unless this says no.
NO_RETRY = {"x-should-retry": "false"}
INVALID, SERVER, RATE, QUOTA = (
    "invalid_request_error", "server_error", "rate_limit_error", "insufficient_quota",
)  # fmt: skip
# A client's word for what fal calls by another.
PARAMS = {
    **dict.fromkeys(("image_size", "aspect_ratio", "resolution_mode", "width", "height"), "size"),
    **dict.fromkeys(("image_url", "image_urls"), "image"),
    **dict.fromkeys(("mask_url", "mask_image_url"), "mask"),
    "num_images": "n",
    "format": "output_format",
}
# Failures before a byte of the call has left: nothing can have been bought.
UNSENT = ("upstream_unreachable", "busy", "disk_full", "too_many_files")
# Failures that the next attempt meets as well, or after which something may have been bought.
FINAL = ("internal_error", "upstream_unauthenticated", "upstream_forbidden")
LOCKED = "user is locked"
RETRY_AFTER = "Retry-After"
# What fal says with 400 when it is not the request that is wrong.
THEIRS = "downstream_service_error"


@dataclass(frozen=True, slots=True)
class Fault:
    """What a failure is to OpenAI's clients: they choose an exception by its status."""

    status: int
    type: str
    code: str
    param: str | None = None


class ImagesError(ProxyError):
    """A failure of which it is known what it is to OpenAI's clients."""

    def __init__(self, fault: Fault, message: str, headers: Mapping[str, str] = NO_HEADERS) -> None:
        super().__init__(fault.status, fault.code, message, headers)
        self.fault = fault


NO_MODEL = Fault(404, INVALID, "model_not_found", "model")
# The proxy's own refusals that are called otherwise here.
KNOWN: Mapping[str, Fault] = {
    "unauthenticated": Fault(401, INVALID, "invalid_api_key"),
    "target_forbidden": NO_MODEL,
    "target_not_fal": NO_MODEL,
}
OF_STATUS: Mapping[int, Fault] = {
    402: Fault(429, QUOTA, "insufficient_quota"),
    408: Fault(400, INVALID, "body_timeout"),
    429: Fault(429, RATE, "rate_limit_exceeded"),
}
QUOTA_SPENT = OF_STATUS[402]
OUR_KEY = Fault(500, SERVER, "upstream_unauthenticated")


def invalid(param: str | None, message: str, code: str = "invalid_value") -> ImagesError:
    """The refusal of a parameter. param: as the client calls it."""
    return ImagesError(Fault(400, INVALID, code, param), message)


def no_model(name: str) -> ImagesError:
    return ImagesError(NO_MODEL, f"The model {name!r} does not exist, or may not be called here.")


def fault_of(error: ProxyError) -> Fault:
    """What a failure of the proxy's is to OpenAI's clients."""
    if isinstance(error, ImagesError):
        return error.fault
    if isinstance(error, InputRefused):
        return Fault(400, INVALID, error.code, param_of(error.detail[0].get("loc")))
    kind = SERVER if error.status >= web.HTTPInternalServerError.status_code else INVALID
    own = Fault(error.status, kind, error.code)
    return KNOWN.get(error.code) or OF_STATUS.get(error.status) or own


def document_of(error: ProxyError) -> ErrorResponse:
    fault = fault_of(error)
    detail = ErrorDetail(message=error.message, type=fault.type, param=fault.param, code=fault.code)
    return ErrorResponse(error=detail)


def refuse(error: ProxyError, request_id: str) -> web.Response:
    """An error that OpenAI's clients can show. A spent budget is not back at the next attempt."""
    fault = fault_of(error)
    is_final = fault.code in FINAL or fault.type == QUOTA
    headers = {**(NO_RETRY if is_final else {}), **error.headers}
    return web.json_response(
        text=document_of(error).model_dump_json(), status=fault.status, headers=headers
    )


def failure_of(answer: Answer) -> ImagesError:
    """Why there is no result, by fal's answer."""
    kind, message, param = told(answer.body)
    status = answer.status
    if status == web.HTTPUnauthorized.status_code:
        return ImagesError(OUR_KEY, "fal.ai does not accept this proxy's key.")
    if status == web.HTTPForbidden.status_code:
        return forbidden(message)
    if status == web.HTTPNotFound.status_code:
        return ImagesError(NO_MODEL, "fal.ai does not know this model.")
    if status == web.HTTPTooManyRequests.status_code:
        after = answer.headers.get(RETRY_AFTER)
        busy = message or "fal.ai has too many requests of this account."
        return ImagesError(OF_STATUS[status], busy, {RETRY_AFTER: after} if after else {})
    if status in (400, 413, 422) and kind != THEIRS:
        return invalid(param, message or "fal.ai refused the input.", kind or "invalid_value")
    failed = status if status in (502, 503, 504) else 500
    return ImagesError(
        Fault(failed, SERVER, kind or "upstream_failed"), f"fal.ai failed with {status}."
    )


def forbidden(message: str) -> ImagesError:
    if LOCKED in message.lower():
        return ImagesError(QUOTA_SPENT, "The fal.ai account of this proxy is out of balance.")
    fault = Fault(500, SERVER, "upstream_forbidden")
    return ImagesError(fault, "fal.ai does not let this proxy call the model.")


def told(body: bytes) -> tuple[str, str, str | None]:
    """fal's kind of an error, its sentence, and the parameter that it is about, as far as the
    body says (fal-api.md, 4)."""
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        document = None
    if not isinstance(document, dict):
        return "", "", None
    kind, detail = document.get("error_type"), document.get("detail")
    if isinstance(detail, list) and detail and isinstance(detail[0], dict):
        entry = detail[0]
        return text_of(entry.get("type")), text_of(entry.get("msg")), param_of(entry.get("loc"))
    return text_of(kind), text_of(detail), None


def text_of(value: object) -> str:
    return value if isinstance(value, str) else ""


def param_of(loc: object) -> str | None:
    """The client's word for a place in fal's input, such as `["body", "image_urls", 0]`."""
    names = [name for name in loc if isinstance(name, str)] if isinstance(loc, list) else []
    names = names[1:] if names[:1] == ["body"] else names
    return PARAMS.get(names[-1], names[-1]) if names else None


class Purchase:
    """A handler that remembers whether fal may have taken a job through it."""

    def __init__(self, handler: Handler) -> None:
        self._handler = handler
        self._may_be_made = False

    async def __call__(self, request: web.Request) -> web.StreamResponse:
        call = request[CALL]
        if call.method != hdrs.METH_POST or call.target.operation not in MODEL_CALLS:
            return await self._handler(request)
        was_made, self._may_be_made = self._may_be_made, True  # until the answer says no
        try:
            response = await self._handler(request)
        except ProxyError as error:
            is_unsent = error.status < 500 or error.code in UNSENT
            self._may_be_made = was_made or not is_unsent
            raise
        is_refused = 400 <= response.status < 500
        self._may_be_made = was_made or not is_refused
        return response

    def settle(self, error: ProxyError) -> None:
        """Has a failure tell OpenAI's clients not to buy again."""
        if self._may_be_made:
            error.headers = {**error.headers, **NO_RETRY}
