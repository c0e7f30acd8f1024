"""Failures in OpenAI's words: those of the proxy, and those of fal."""

import json
from collections.abc import Mapping
from dataclasses import dataclass

from aiohttp import hdrs, web
from aiohttp.typedefs import Handler

from falproxy.dialects.openai.schema import ErrorDetail, ErrorResponse
from falproxy.dialects.queue_client import BufferedResponse
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
PARAM_NAMES = {
    **dict.fromkeys(("image_size", "aspect_ratio", "resolution_mode", "width", "height"), "size"),
    **dict.fromkeys(("image_url", "image_urls"), "image"),
    **dict.fromkeys(("mask_url", "mask_image_url"), "mask"),
    "num_images": "n",
    "format": "output_format",
}
# Failures before a byte of the call has left: nothing can have been bought.
NOT_SENT_CODES = ("upstream_unreachable", "busy", "disk_full", "too_many_files")
# Failures that the next attempt meets as well, or after which something may have been bought.
NON_RETRYABLE_CODES = ("internal_error", "upstream_unauthenticated", "upstream_forbidden")
LOCKED_MESSAGE = "user is locked"
RETRY_AFTER = "Retry-After"
# What fal says with 400 when it is not the request that is wrong.
FAL_SERVICE_ERROR = "downstream_service_error"


@dataclass(frozen=True, slots=True)
class OpenAIErrorInfo:
    """What a failure is to OpenAI's clients: they choose an exception by its status."""

    status: int
    type: str
    code: str
    param: str | None = None


class ImagesError(ProxyError):
    """A failure of which it is known what it is to OpenAI's clients."""

    def __init__(
        self, info: OpenAIErrorInfo, message: str, headers: Mapping[str, str] = NO_HEADERS
    ) -> None:
        super().__init__(info.status, info.code, message, headers)
        self.info = info


MODEL_NOT_FOUND = OpenAIErrorInfo(404, INVALID, "model_not_found", "model")
# The proxy's own refusals that are called otherwise here.
ERRORS_BY_CODE: Mapping[str, OpenAIErrorInfo] = {
    "unauthenticated": OpenAIErrorInfo(401, INVALID, "invalid_api_key"),
    "target_forbidden": MODEL_NOT_FOUND,
    "target_not_fal": MODEL_NOT_FOUND,
}
ERRORS_BY_STATUS: Mapping[int, OpenAIErrorInfo] = {
    402: OpenAIErrorInfo(429, QUOTA, "insufficient_quota"),
    408: OpenAIErrorInfo(400, INVALID, "body_timeout"),
    429: OpenAIErrorInfo(429, RATE, "rate_limit_exceeded"),
}
QUOTA_EXHAUSTED = ERRORS_BY_STATUS[402]
UPSTREAM_KEY_REJECTED = OpenAIErrorInfo(500, SERVER, "upstream_unauthenticated")


def invalid_parameter(param: str | None, message: str, code: str = "invalid_value") -> ImagesError:
    """The refusal of a parameter. param: as the client calls it."""
    return ImagesError(OpenAIErrorInfo(400, INVALID, code, param), message)


def model_not_found(name: str) -> ImagesError:
    return ImagesError(
        MODEL_NOT_FOUND, f"The model {name!r} does not exist, or may not be called here."
    )


def error_info(error: ProxyError) -> OpenAIErrorInfo:
    """What a failure of the proxy's is to OpenAI's clients."""
    if isinstance(error, ImagesError):
        return error.info
    if isinstance(error, InputRefused):
        return OpenAIErrorInfo(400, INVALID, error.code, client_param(error.detail[0].get("loc")))
    kind = SERVER if error.status >= web.HTTPInternalServerError.status_code else INVALID
    own = OpenAIErrorInfo(error.status, kind, error.code)
    return ERRORS_BY_CODE.get(error.code) or ERRORS_BY_STATUS.get(error.status) or own


def error_response(error: ProxyError) -> ErrorResponse:
    fault = error_info(error)
    detail = ErrorDetail(message=error.message, type=fault.type, param=fault.param, code=fault.code)
    return ErrorResponse(error=detail)


def refuse(error: ProxyError, request_id: str) -> web.Response:
    """An error that OpenAI's clients can show. A spent budget is not back at the next attempt."""
    fault = error_info(error)
    is_final = fault.code in NON_RETRYABLE_CODES or fault.type == QUOTA
    headers = {**(NO_RETRY if is_final else {}), **error.headers}
    return web.json_response(
        text=error_response(error).model_dump_json(), status=fault.status, headers=headers
    )


def error_from_response(response: BufferedResponse) -> ImagesError:
    """Why there is no result, by fal's answer."""
    kind, message, param = parse_error(response.body)
    status = response.status
    if status == web.HTTPUnauthorized.status_code:
        return ImagesError(UPSTREAM_KEY_REJECTED, "fal.ai does not accept this proxy's key.")
    if status == web.HTTPForbidden.status_code:
        return forbidden_error(message)
    if status == web.HTTPNotFound.status_code:
        return ImagesError(MODEL_NOT_FOUND, "fal.ai does not know this model.")
    if status == web.HTTPTooManyRequests.status_code:
        after = response.headers.get(RETRY_AFTER)
        busy = message or "fal.ai has too many requests of this account."
        return ImagesError(ERRORS_BY_STATUS[status], busy, {RETRY_AFTER: after} if after else {})
    if status in (400, 413, 422) and kind != FAL_SERVICE_ERROR:
        return invalid_parameter(
            param, message or "fal.ai refused the input.", kind or "invalid_value"
        )
    failed = status if status in (502, 503, 504) else 500
    return ImagesError(
        OpenAIErrorInfo(failed, SERVER, kind or "upstream_failed"), f"fal.ai failed with {status}."
    )


def forbidden_error(message: str) -> ImagesError:
    if LOCKED_MESSAGE in message.lower():
        return ImagesError(QUOTA_EXHAUSTED, "The fal.ai account of this proxy is out of balance.")
    fault = OpenAIErrorInfo(500, SERVER, "upstream_forbidden")
    return ImagesError(fault, "fal.ai does not let this proxy call the model.")


def parse_error(body: bytes) -> tuple[str, str, str | None]:
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
        return (
            string_or_empty(entry.get("type")),
            string_or_empty(entry.get("msg")),
            client_param(entry.get("loc")),
        )
    return string_or_empty(kind), string_or_empty(detail), None


def string_or_empty(value: object) -> str:
    return value if isinstance(value, str) else ""


def client_param(loc: object) -> str | None:
    """The client's word for a place in fal's input, such as `["body", "image_urls", 0]`."""
    names = [name for name in loc if isinstance(name, str)] if isinstance(loc, list) else []
    names = names[1:] if names[:1] == ["body"] else names
    return PARAM_NAMES.get(names[-1], names[-1]) if names else None


class RetryGuard:
    """A handler that remembers whether fal may have taken a job through it."""

    def __init__(self, handler: Handler) -> None:
        self._handler = handler
        self._may_be_billed = False

    async def __call__(self, request: web.Request) -> web.StreamResponse:
        call = request[CALL]
        if call.method != hdrs.METH_POST or call.target.operation not in MODEL_CALLS:
            return await self._handler(request)
        was_made, self._may_be_billed = self._may_be_billed, True  # until the answer says no
        try:
            response = await self._handler(request)
        except ProxyError as error:
            is_unsent = error.status < 500 or error.code in NOT_SENT_CODES
            self._may_be_billed = was_made or not is_unsent
            raise
        is_refused = 400 <= response.status < 500
        self._may_be_billed = was_made or not is_refused
        return response

    def forbid_retry(self, error: ProxyError) -> None:
        """Has a failure tell OpenAI's clients not to buy again."""
        if self._may_be_billed:
            error.headers = {**error.headers, **NO_RETRY}
