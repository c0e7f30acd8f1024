"""Errors of the proxy and of fal in the format of the OpenAI API."""

from collections.abc import Mapping
from dataclasses import dataclass

from aiohttp import web

from falproxy.dialects.openai.schema import ErrorDetail, ErrorResponse
from falproxy.dialects.queue_client import BufferedResponse
from falproxy.errors import NO_HEADERS, ProxyError
from falproxy.fal.error_body import parse_error_body, parse_location
from falproxy.media.image_rules import InputRefused

# OpenAI's clients repeat requests that failed with 408, 409, 429 or 5xx unless this header is set.
NO_RETRY = {"x-should-retry": "false"}
INVALID, SERVER, RATE, QUOTA = (
    "invalid_request_error", "server_error", "rate_limit_error", "insufficient_quota",
)  # fmt: skip
# fal's name of an input → the parameter of the OpenAI API.
PARAM_NAMES = {
    **dict.fromkeys(("image_size", "aspect_ratio", "resolution_mode", "width", "height"), "size"),
    **dict.fromkeys(("image_url", "image_urls"), "image"),
    **dict.fromkeys(("mask_url", "mask_image_url"), "mask"),
    "num_images": "n",
    "format": "output_format",
}
# Errors that a retry would meet again, or after which fal may have charged for a job.
NON_RETRYABLE_CODES = ("internal_error", "upstream_unauthenticated", "upstream_forbidden")
LOCKED_MESSAGE = "user is locked"
RETRY_AFTER = "Retry-After"
# Seconds. OpenAI's clients do not wait longer: they would repeat the request too early.
RETRY_AFTER_MAX = 60
# fal's type of a 400 that the request did not cause.
FAL_SERVICE_ERROR = "downstream_service_error"


@dataclass(frozen=True, slots=True)
class OpenAIErrorInfo:
    """The fields of an error. OpenAI's clients choose the exception by status.

    param: the parameter that caused the error.
    """

    status: int
    type: str
    code: str
    param: str | None = None


class ImagesError(ProxyError):
    def __init__(
        self, info: OpenAIErrorInfo, message: str, headers: Mapping[str, str] = NO_HEADERS
    ) -> None:
        super().__init__(info.status, info.code, message, headers)
        self.info = info


MODEL_NOT_FOUND = OpenAIErrorInfo(404, INVALID, "model_not_found", "model")
# Errors of the proxy that differ in the OpenAI API, by their code, then by their status.
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
SCHEMA_UNAVAILABLE = OpenAIErrorInfo(503, SERVER, "schema_unavailable")
QUOTA_EXHAUSTED = ERRORS_BY_STATUS[402]
UPSTREAM_KEY_REJECTED = OpenAIErrorInfo(500, SERVER, "upstream_unauthenticated")


def invalid_parameter(param: str | None, message: str, code: str = "invalid_value") -> ImagesError:
    """Return the error for an invalid parameter. param: None for the request as a whole."""
    return ImagesError(OpenAIErrorInfo(400, INVALID, code, param), message)


def model_not_found(name: str) -> ImagesError:
    return ImagesError(
        MODEL_NOT_FOUND,
        f"The model {name!r} does not exist, or may not be called here. "
        "GET /v1/models lists the names; endpoint ids of fal work too.",
    )


def error_info(error: ProxyError) -> OpenAIErrorInfo:
    if isinstance(error, ImagesError):
        return error.info
    if isinstance(error, InputRefused):
        param = client_param(parse_location(error.detail[0].get("loc")))
        return OpenAIErrorInfo(400, INVALID, error.code, param)
    error_type = SERVER if error.status >= web.HTTPInternalServerError.status_code else INVALID
    default = OpenAIErrorInfo(error.status, error_type, error.code)
    return ERRORS_BY_CODE.get(error.code) or ERRORS_BY_STATUS.get(error.status) or default


def error_response(error: ProxyError) -> ErrorResponse:
    info = error_info(error)
    detail = ErrorDetail(message=error.message, type=info.type, param=info.param, code=info.code)
    return ErrorResponse(error=detail)


def refuse(error: ProxyError, request_id: str) -> web.Response:
    """Render an error for OpenAI's clients, with a header that prevents useless retries.

    Retries are useless for example after the budget is used up.
    """
    info = error_info(error)
    is_late = int(error.headers.get(RETRY_AFTER, "0")) > RETRY_AFTER_MAX
    is_final = info.code in NON_RETRYABLE_CODES or info.type == QUOTA or is_late
    headers = {**(NO_RETRY if is_final else {}), **error.headers}
    return web.json_response(
        text=error_response(error).model_dump_json(), status=info.status, headers=headers
    )


def error_from_response(response: BufferedResponse) -> ImagesError:
    error_type, message, param = parse_error(response.body)
    status = response.status
    if status == web.HTTPUnauthorized.status_code:
        return ImagesError(UPSTREAM_KEY_REJECTED, "fal.ai does not accept this proxy's key.")
    if status == web.HTTPForbidden.status_code:
        return forbidden_error(message)
    if status == web.HTTPNotFound.status_code:
        return ImagesError(MODEL_NOT_FOUND, "fal.ai does not know this model.")
    if status == web.HTTPTooManyRequests.status_code:
        after = response.headers.get(RETRY_AFTER)
        message = message or "fal.ai has too many requests of this account."
        return ImagesError(ERRORS_BY_STATUS[status], message, {RETRY_AFTER: after} if after else {})
    if status in (400, 413, 422) and error_type != FAL_SERVICE_ERROR:
        return invalid_parameter(
            param, message or "fal.ai refused the input.", error_type or "invalid_value"
        )
    info = OpenAIErrorInfo(
        status if status in (502, 503, 504) else 500, SERVER, error_type or "upstream_failed"
    )
    return ImagesError(info, f"fal.ai failed with {status}.")


def forbidden_error(message: str) -> ImagesError:
    if LOCKED_MESSAGE in message.lower():
        return ImagesError(QUOTA_EXHAUSTED, "The fal.ai account of this proxy is out of balance.")
    info = OpenAIErrorInfo(500, SERVER, "upstream_forbidden")
    return ImagesError(info, "fal.ai does not let this proxy call the model.")


def parse_error(body: bytes) -> tuple[str, str, str | None]:
    """Return type, message and parameter of fal's error; empty strings and None if missing."""
    error = parse_error_body(body)
    if error.model_error is None:
        return error.error_type, error.message, None
    entry = error.model_error
    return entry.type, entry.message, client_param(entry.location)


def client_param(location: tuple[str, ...]) -> str | None:
    """Return the client's name of a rejected input. location: such as `("body", "image_urls")`."""
    keys = location[1:] if location[:1] == ("body",) else location
    return PARAM_NAMES.get(keys[-1], keys[-1]) if keys else None
