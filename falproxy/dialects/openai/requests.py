"""Reading of requests for images, and the calls that they need."""

import asyncio
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import isfinite
from typing import TypeVar

from aiohttp import hdrs, web
from multidict import CIMultiDict, CIMultiDictProxy
from pydantic import ValidationError

from falproxy.dialects.openai.bodies import FormLimits, JsonBody, read_form
from falproxy.dialects.openai.errors import ImagesError, invalid_parameter
from falproxy.dialects.openai.model_inputs import ModelCall, build_calls
from falproxy.dialects.openai.model_schema import IMAGE_INPUTS
from falproxy.dialects.openai.models import ModelResolver, ResolvedModel
from falproxy.dialects.openai.schema import EditRequest, GenerationRequest, ImageRequest
from falproxy.dialects.queue_client import submit_call
from falproxy.dialects.transparent import BodyLimits, body_chunks, check_body
from falproxy.errors import ProxyError
from falproxy.fal.input_json import has_few_values
from falproxy.fal.target import RUN_HOST, Target
from falproxy.proxy.call import Call
from falproxy.proxy.headers import is_identity
from falproxy.proxy.upstream import UPSTREAM
from falproxy.spool import spool_body

# Bytes of a JSON body: a prompt, and possibly an image or two as data URIs.
JSON_MAX = 32 * 2**20
# pydantic's type of an error → OpenAI's code.
ERROR_CODES = {
    "missing": "missing_required_parameter",
    "string_too_long": "string_above_max_length",
    "string_too_short": "empty_string",
    "greater_than_equal": "integer_below_min_value",
    "less_than_equal": "integer_above_max_value",
}
R = TypeVar("R", bound=ImageRequest)


@dataclass(frozen=True, slots=True)
class ImageJob:
    """A request for images, and the calls of the model that it needs.

    headers: of the client's request.
    """

    params: ImageRequest
    model: ResolvedModel
    model_calls: Sequence[ModelCall]
    headers: CIMultiDictProxy[str]

    def calls(self) -> list[Call]:
        """Return the queue submits. Each can be sent once only, because it consumes its body."""
        return [self._build_call(model_call) for model_call in self.model_calls]

    def stream_call(self) -> Call:
        """Return the call of a streamed job, which has only one."""
        target = Target(RUN_HOST, f"/{self.model.endpoint}/stream", "")
        return replace(self._build_call(self.model_calls[0]), target=target)

    @property
    def is_streamed(self) -> bool:
        """True if the client wants unfinished images, and the model can send them."""
        schema = self.model.schema
        is_wanted = bool(self.params.stream and self.params.partial_images)
        return is_wanted and schema is not None and schema.can_stream and (self.params.n or 1) == 1

    def _build_call(self, model_call: ModelCall) -> Call:
        headers = CIMultiDict(self.headers)
        if model_call.is_unshared:
            lines = [*headers.getall(hdrs.CACHE_CONTROL, ()), "no-store"]
            headers[hdrs.CACHE_CONTROL] = ", ".join(lines)
        return submit_call(self.model.endpoint, JsonBody(model_call.inputs), headers)


@dataclass(frozen=True, slots=True)
class RequestDeps:
    """Limits and services that the reading of requests needs."""

    models: ModelResolver
    json_limits: BodyLimits
    form_limits: FormLimits


async def read_generation(request: web.Request, deps: RequestDeps) -> ImageJob:
    """Raises: ProxyError."""
    reject_encoded(request)
    check_body(request, deps.json_limits)
    max_body = min(deps.json_limits.max_body, JSON_MAX)
    body = await spool_body(body_chunks(request.content, max_body), deps.form_limits.quota)
    content = await asyncio.to_thread(body.read, 0, body.size)
    params = validate(GenerationRequest, parse_body(content))
    model = await deps.models.find(request.app[UPSTREAM], params.model, accepts_image=False)
    return ImageJob(params, model, build_calls(params, model), request.headers)


async def read_edit(request: web.Request, deps: RequestDeps) -> ImageJob:
    """Raises: ProxyError."""
    reject_encoded(request)
    form = await read_form(request, deps.form_limits)
    params = validate(EditRequest, form.texts)
    if not form.files and not set(IMAGE_INPUTS) & set(params.model_extra or {}):
        message = "Send an image as the file `image`."
        raise invalid_parameter("image", message, "missing_required_parameter")
    model = await deps.models.find(request.app[UPSTREAM], params.model, accepts_image=True)
    model_calls = build_calls(params, model, form.files, form.mask)
    return ImageJob(params, model, model_calls, request.headers)


def reject_encoded(request: web.Request) -> None:
    """Refuse compressed bodies: this API parses bodies, and a small one could decompress to many
    times the allowed size.

    Raises: ProxyError 415.
    """
    if not is_identity(request.headers):
        message = "Send the body without a content encoding."
        raise ProxyError(415, "unsupported_content_encoding", message)


def parse_body(body: bytes) -> dict[str, object]:
    """Parse a JSON object, with a limit on the number of its values.

    Raises: ImagesError 400.
    """
    try:
        document = None
        if has_few_values(body):
            document = json.loads(body, parse_float=parse_number, parse_constant=parse_number)
    except (ValueError, RecursionError):
        document = None
    if not isinstance(document, dict):
        raise invalid_parameter(None, "The body must be a JSON object.", "invalid_json")
    return document


def parse_number(text: str) -> float:
    """Parse a number. `1.0` becomes an integer, as in JSON Schema. `NaN` and `Infinity`, which are
    not JSON, are refused.

    Raises: ValueError.
    """
    value = float(text)
    if not isfinite(value):
        raise ValueError(text)
    return int(value) if value.is_integer() else value


def validate(model_type: type[R], values: Mapping[str, object]) -> R:
    """Check the parameters of a request. Forms consist of strings, so that numbers in them are
    converted.

    Raises: ImagesError 400, with the invalid parameter.
    """
    try:
        return model_type.model_validate(values, strict=model_type is not EditRequest)
    except ValidationError as error:
        raise validation_error(error) from None


def validation_error(error: ValidationError) -> ImagesError:
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    param = str(first["loc"][0]) if first["loc"] else None
    code = ERROR_CODES.get(first["type"], "invalid_value")
    return invalid_parameter(param, f"{param}: {first['msg']}.", code)
