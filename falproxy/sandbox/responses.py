"""What fal answers, and the one exception that carries an answer other than a result."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from aiohttp import web

DOCUMENTED = "https://docs.fal.ai/errors/#"
PYDANTIC = "https://errors.pydantic.dev/2.11/v/"
# Types that come straight from pydantic; fal documents all others itself.
PYDANTIC_TYPES = frozenset({
    "bool_parsing", "dict_type", "float_parsing", "int_parsing", "json_invalid", "list_type",
    "literal_error", "missing", "model_attributes_type", "string_type",
})  # fmt: skip
UNSET = object()


@dataclass(frozen=True, slots=True)
class Answer:
    """Status, body and headers of one answer.

    body: a JSON value, or text that is sent as HTML when `is_html` (what fal's ingress answers).
    """

    status: int
    body: object
    headers: Mapping[str, str] = field(default_factory=dict)
    is_html: bool = False

    @property
    def error(self) -> str | None:
        """What a status says of a failed job; None for a result."""
        if self.status < 400:
            return None
        detail = self.body.get("detail") if isinstance(self.body, dict) else None
        if isinstance(detail, list):
            return str(detail[0]["msg"])
        return detail if isinstance(detail, str) else f"Invalid status code: {self.status}"

    @property
    def error_type(self) -> str | None:
        """The stable word of a failure; None for a result."""
        if self.status < 400:
            return None
        body = self.body if isinstance(self.body, dict) else {}
        detail = body.get("detail")
        kind = detail[0]["type"] if isinstance(detail, list) else body.get("error_type")
        return str(kind or ("bad_request" if self.status < 500 else "runner_server_error"))

    def response(self, request_id: str | None = None) -> web.Response:
        """The answer on the wire; HTML comes from the ingress and knows no request id."""
        if self.is_html:
            return web.Response(status=self.status, text=str(self.body), content_type="text/html")
        headers = dict(self.headers)
        if request_id is not None:
            headers["x-fal-request-id"] = request_id
        headers["Content-Type"] = "application/json"
        body = json.dumps(self.body, separators=(",", ":")).encode()
        return web.Response(status=self.status, body=body, headers=headers)


class FalError(Exception):
    """fal answers something that is not a result; `server.answer` and the queue write it."""

    def __init__(self, answer: Answer) -> None:
        super().__init__(f"{answer.status} {answer.error}")
        self.answer = answer


def plain(status: int, detail: str, headers: Mapping[str, str] | None = None) -> FalError:
    """An error whose body is `{"detail": text}`: access, unknown names, limits."""
    return FalError(Answer(status, {"detail": detail}, headers or {}))


def request_error(
    status: int, kind: str, detail: str, headers: Mapping[str, str] | None = None
) -> FalError:
    """An error of fal's infrastructure: `{"detail", "error_type"}` (docs.fal.ai/errors)."""
    body = {"detail": detail, "error_type": kind}
    return FalError(Answer(status, body, {"X-Fal-Error-Type": kind, **(headers or {})}))


def field_error(
    kind: str,
    msg: str,
    loc: Sequence[str | int] = ("body",),
    ctx: Mapping[str, object] | None = None,
    value: object = UNSET,
) -> dict[str, object]:
    """One entry of a model error's `detail` list."""
    entry: dict[str, object] = {"loc": list(loc), "msg": msg, "type": kind}
    entry["url"] = (PYDANTIC if kind in PYDANTIC_TYPES else DOCUMENTED) + kind
    if ctx is not None:
        entry["ctx"] = dict(ctx)
    if value is not UNSET:
        entry["input"] = value
    return entry


def model_error(
    entries: Sequence[Mapping[str, object]], status: int = 422, is_retryable: bool = False
) -> FalError:
    """An error of the model: `{"detail": [...]}`, never billed here."""
    headers = {"X-Fal-Retryable": str(is_retryable).lower(), "X-Fal-Billable-Units": "0"}
    return FalError(Answer(status, {"detail": [dict(entry) for entry in entries]}, headers))
