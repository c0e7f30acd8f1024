"""Responses of the offline fal: results, errors in fal's documented shapes, and event streams."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from aiohttp import web

FAL_ERROR_DOCS = "https://docs.fal.ai/errors/#"
PYDANTIC_ERROR_DOCS = "https://errors.pydantic.dev/2.11/v/"
# Error types that come from pydantic. fal documents all other types itself.
PYDANTIC_TYPES = frozenset({
    "bool_parsing", "dict_type", "float_parsing", "int_parsing", "json_invalid", "list_type",
    "literal_error", "missing", "model_attributes_type", "string_type",
})  # fmt: skip
UNSET = object()


@dataclass(frozen=True, slots=True)
class FalResponse:
    """Status, body and headers of one response.

    body: a JSON value, or text if `is_html` is set.
    is_html: send the body as HTML, like the error pages of fal's ingress.
    has_request_id: False for an error of a gateway.
    """

    status: int
    body: object
    headers: Mapping[str, str] = field(default_factory=dict)
    is_html: bool = False
    has_request_id: bool = True

    @property
    def error_message(self) -> str | None:
        """Error text in the status of a failed job. None for a result."""
        if self.status < 400:
            return None
        detail = self.body.get("detail") if isinstance(self.body, dict) else None
        if isinstance(detail, list):
            return str(detail[0]["msg"])
        return detail if isinstance(detail, str) else f"Invalid status code: {self.status}"

    @property
    def error_type(self) -> str | None:
        """Machine-readable error type. None for a result."""
        if self.status < 400:
            return None
        body = self.body if isinstance(self.body, dict) else {}
        detail = body.get("detail")
        error_type = detail[0]["type"] if isinstance(detail, list) else body.get("error_type")
        return str(error_type or ("bad_request" if self.status < 500 else "runner_server_error"))

    def to_web_response(self, request_id: str | None = None) -> web.Response:
        """Return the aiohttp response. HTML comes from fal's ingress and has no request id."""
        if self.is_html:
            return web.Response(status=self.status, text=str(self.body), content_type="text/html")
        headers = dict(self.headers)
        if request_id is not None and self.has_request_id:
            headers["x-fal-request-id"] = request_id
        headers["Content-Type"] = "application/json"
        body = json.dumps(self.body, separators=(",", ":")).encode()
        return web.Response(status=self.status, body=body, headers=headers)


class FalError(Exception):
    """A response of fal other than a result. `server.respond` and the job queue send it."""

    def __init__(self, response: FalResponse) -> None:
        super().__init__(f"{response.status} {response.error_message}")
        self.response = response


def detail_error(status: int, detail: str, headers: Mapping[str, str] | None = None) -> FalError:
    """Return an error with the body `{"detail": text}`: authentication, unknown names, limits."""
    return FalError(FalResponse(status, {"detail": detail}, headers or {}))


def request_error(
    status: int, error_type: str, detail: str, headers: Mapping[str, str] | None = None
) -> FalError:
    """Return an infrastructure error: `{"detail", "error_type"}` (docs.fal.ai/errors)."""
    body = {"detail": detail, "error_type": error_type}
    return FalError(FalResponse(status, body, {"X-Fal-Error-Type": error_type, **(headers or {})}))


def model_error(
    details: Sequence[Mapping[str, object]], status: int = 422, is_retryable: bool = False
) -> FalError:
    """Return an error of the model: `{"detail": [...]}`. The sandbox does not bill it."""
    headers = {"X-Fal-Retryable": str(is_retryable).lower(), "X-Fal-Billable-Units": "0"}
    return FalError(FalResponse(status, {"detail": [dict(detail) for detail in details]}, headers))


def error_detail(
    error_type: str,
    msg: str,
    loc: Sequence[str | int] = ("body",),
    ctx: Mapping[str, object] | None = None,
    value: object = UNSET,
) -> dict[str, object]:
    """Return one item of a model error's `detail` list.

    value: the rejected input.
    """
    detail: dict[str, object] = {"loc": list(loc), "msg": msg, "type": error_type}
    docs = PYDANTIC_ERROR_DOCS if error_type in PYDANTIC_TYPES else FAL_ERROR_DOCS
    detail["url"] = docs + error_type
    if ctx is not None:
        detail["ctx"] = dict(ctx)
    if value is not UNSET:
        detail["input"] = value
    return detail


async def open_event_stream(request: web.Request, request_id: str) -> web.StreamResponse:
    """Send the headers of a server-sent event stream and return the response to write to."""
    headers = {
        "Content-Type": "text/event-stream; charset=utf-8",
        "Cache-Control": "no-cache",
        "X-Accel-Buffering": "no",
        "x-fal-request-id": request_id,
    }
    response = web.StreamResponse(headers=headers)
    await response.prepare(request)
    return response


def format_event(document: object) -> bytes:
    """Return one event in fal's form: a single `data:` line of JSON without an event name."""
    return f"data: {json.dumps(document, separators=(',', ':'))}\n\n".encode()
