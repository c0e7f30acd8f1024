"""Reading of requests for images, and the calls that they need."""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from aiohttp import hdrs, web
from multidict import CIMultiDict, CIMultiDictProxy
from pydantic import BaseModel, ValidationError

from falproxy.dialects.json_body import InvalidTextError, parse_json_body
from falproxy.dialects.openai.bodies import FormLimits, JsonBody, read_form
from falproxy.dialects.openai.errors import ImagesError, invalid_parameter
from falproxy.dialects.openai.model_inputs import (
    ModelCall,
    build_calls,
    ignored_parameters,
    require_description,
)
from falproxy.dialects.openai.models import ModelResolver, ResolvedModel
from falproxy.dialects.openai.request_images import RequestImages, take_json_images
from falproxy.dialects.openai.schema import EditRequest, GenerationRequest, ImageRequest
from falproxy.dialects.queue_client import submit_call
from falproxy.dialects.transparent import BodyLimits, body_chunks, check_body, too_large
from falproxy.errors import ProxyError
from falproxy.fal.image_fields import carries_image
from falproxy.fal.target import RUN_HOST, Target
from falproxy.proxy.call import Call
from falproxy.proxy.headers import is_identity
from falproxy.proxy.idempotency_key import set_client_digest
from falproxy.proxy.upstream import UPSTREAM
from falproxy.spool import spool_body

# Bytes of a JSON body: a prompt, and possibly an image or two as data URIs.
JSON_MAX = 32 * 2**20
FORM_TYPE, JSON_TYPE = "multipart/form-data", "application/json"
# pydantic's type of an error → OpenAI's code.
ERROR_CODES = {
    "missing": "missing_required_parameter",
    "string_too_long": "string_above_max_length",
    "string_too_short": "empty_string",
    "greater_than_equal": "integer_below_min_value",
    "less_than_equal": "integer_above_max_value",
}
R = TypeVar("R", bound=BaseModel)


@dataclass(frozen=True, slots=True)
class ImageJob:
    """A request for images, and the calls of the model that it needs.

    headers: of the client's request.
    ignored: names of parameters that the model does not have, and that are not sent.
    """

    params: ImageRequest
    model: ResolvedModel
    model_calls: Sequence[ModelCall]
    headers: CIMultiDictProxy[str]
    ignored: Sequence[str] = ()

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
    document = await read_json(request, deps.json_limits, deps.form_limits)
    images = take_json_images(document)
    params = validate(GenerationRequest, document, is_strict=True)
    model = await deps.models.find(request.app[UPSTREAM], params.model, accepts_image=False)
    return build_job(params, model, images, request.headers)


async def read_edit(request: web.Request, deps: RequestDeps) -> ImageJob:
    """Read an edit in JSON or in a form, whose values are strings. Raises: ProxyError."""
    reject_encoded(request)
    if request.content_type == FORM_TYPE:
        form = await read_form(request, deps.form_limits, EditRequest.model_fields)
        await set_client_digest(request, form.parts())
        images, params = form.images, validate(EditRequest, form.texts, is_strict=False)
    elif request.content_type == JSON_TYPE:
        check_body(request, deps.json_limits)
        document = await read_json(request, deps.json_limits, deps.form_limits)
        images = take_json_images(document)
        params = validate(EditRequest, document, is_strict=True)
    else:
        message = f"The content type must be {FORM_TYPE} or {JSON_TYPE}."
        raise ProxyError(415, "unsupported_media_type", message)
    extra = (params.model_extra or {}).items()
    if not (images.images or images.files or any(carries_image(*each) for each in extra)):
        message = "Send an image as the file `image`, or its URL in `images`."
        raise invalid_parameter("image", message, "missing_required_parameter")
    model = await deps.models.find(request.app[UPSTREAM], params.model, accepts_image=True)
    return build_job(params, model, images, request.headers)


def build_job(
    params: ImageRequest,
    model: ResolvedModel,
    images: RequestImages,
    headers: CIMultiDictProxy[str],
) -> ImageJob:
    """Raises: ImagesError 400; 503, fal's description of the model is needed and unavailable."""
    require_description(params, model, images)
    model_calls = build_calls(params, model, images.images, images.mask, images.files)
    ignored = ignored_parameters(params, model_calls[0].inputs)
    return ImageJob(params, model, model_calls, headers, ignored)


async def read_json(
    request: web.Request, json_limits: BodyLimits, form_limits: FormLimits
) -> dict[str, object]:
    """Raises: ProxyError 400, 408, 413, 499, 503."""
    max_body = min(json_limits.max_body, JSON_MAX)
    if (request.content_length or 0) > max_body:
        raise json_too_large(max_body)
    try:
        body = await spool_body(body_chunks(request.content, max_body), form_limits.quota)
    except ProxyError as error:
        raise json_too_large(max_body) if error.status == 413 else error from None
    await set_client_digest(request, [body])
    return await parse_body(await asyncio.to_thread(body.read, 0, body.size))


def json_too_large(max_body: int) -> ProxyError:
    if max_body < JSON_MAX:
        return too_large(max_body)
    message = (
        f"A JSON body may have {JSON_MAX} bytes. Send large images as files to /v1/images/edits."
    )
    return ProxyError(413, "body_too_large", message)


def reject_encoded(request: web.Request) -> None:
    """Refuse compressed bodies: this API parses bodies, and a small one could decompress to many
    times the allowed size.

    Raises: ProxyError 415.
    """
    if not is_identity(request.headers):
        message = "Send the body without a content encoding."
        raise ProxyError(415, "unsupported_content_encoding", message)


async def parse_body(body: bytes) -> dict[str, object]:
    """Parse a JSON object. Raises: ImagesError 400."""
    try:
        return await parse_json_body(body)
    except InvalidTextError as error:
        raise invalid_parameter(None, str(error), "invalid_json") from None


def validate(model_type: type[R], values: Mapping[str, object], *, is_strict: bool) -> R:
    """Check the parameters of a request. Forms consist of strings, which are converted to numbers
    unless is_strict is true.

    Raises: ImagesError 400, with the invalid parameter.
    """
    try:
        return model_type.model_validate(values, strict=is_strict)
    except ValidationError as error:
        raise validation_error(error) from None


def validation_error(error: ValidationError) -> ImagesError:
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    param = str(first["loc"][0]) if first["loc"] else None
    code = ERROR_CODES.get(first["type"], "invalid_value")
    return invalid_parameter(param, f"{param}: {first['msg']}.", code)
