"""What a client orders: its request, read and checked, and the calls that it takes."""

import asyncio
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import isfinite
from typing import TypeVar

from aiohttp import hdrs, web
from multidict import CIMultiDict, CIMultiDictProxy
from pydantic import ValidationError

from falproxy.dialects.openai.errors import ImagesError, invalid_parameter, model_not_found
from falproxy.dialects.openai.json_body import JsonBody
from falproxy.dialects.openai.model_inputs import (
    IMAGE_INPUTS,
    ModelCall,
    ResolvedModel,
    build_calls,
)
from falproxy.dialects.openai.model_names import ModelNames
from falproxy.dialects.openai.model_schema_client import SchemaClient, SchemaUnavailable
from falproxy.dialects.openai.multipart import FormLimits, read_form
from falproxy.dialects.openai.schema import EditRequest, GenerationRequest, ImageRequest
from falproxy.dialects.queue_client import submit_call
from falproxy.dialects.transparent import BodyLimits, body_chunks, check_body
from falproxy.errors import ProxyError
from falproxy.fal.input_json import has_few_values
from falproxy.fal.target import RUN_HOST, Target
from falproxy.proxy.call import Call
from falproxy.proxy.upstream import UPSTREAM
from falproxy.spool import spool_body

# A generation's body has a prompt, and at most a picture or two as data URIs.
JSON_MAX = 32 * 2**20
# What pydantic calls a wrong value, in OpenAI's words.
ERROR_CODES = {
    "missing": "missing_required_parameter",
    "string_too_long": "string_above_max_length",
    "string_too_short": "empty_string",
    "greater_than_equal": "integer_below_min_value",
    "less_than_equal": "integer_above_max_value",
}
# In the ids of models that are for editing, known without their documents.
EDIT_MODEL = re.compile(r"kontext(?!.*text-to-image)|/(?:edit|image-to-image|inpaint)")

R = TypeVar("R", bound=ImageRequest)


@dataclass(frozen=True, slots=True)
class ImageJob:
    """What is asked of which model, and what is sent to it for that."""

    params: ImageRequest
    model: ResolvedModel
    model_calls: Sequence[ModelCall]
    headers: CIMultiDictProxy[str]

    def calls(self) -> list[Call]:
        """Submits, each to be made once."""
        return [self._build_call(made) for made in self.model_calls]

    def stream_call(self) -> Call:
        """The one call of an order that is followed while it is made."""
        target = Target(RUN_HOST, f"/{self.model.endpoint}/stream", "")
        return replace(self._build_call(self.model_calls[0]), target=target)

    @property
    def is_streamed(self) -> bool:
        """Whether unfinished pictures are wanted, and can be had."""
        takes = self.model.schema
        is_wanted = bool(self.params.stream and self.params.partial_images)
        return is_wanted and takes is not None and takes.can_stream and (self.params.n or 1) == 1

    def _build_call(self, model_call: ModelCall) -> Call:
        body = JsonBody(model_call.inputs)
        headers = CIMultiDict(self.headers)
        if model_call.is_unshared:
            wish = headers.get(hdrs.CACHE_CONTROL)
            headers[hdrs.CACHE_CONTROL] = f"{wish}, no-store" if wish else "no-store"
        call = submit_call(self.model.endpoint, b"", headers)
        return replace(call, body=body.chunks(), length=body.size)


@dataclass(frozen=True, slots=True)
class RequestDeps:
    """names: of the models. schemas: what they take. json, form: how large a request may be."""

    names: ModelNames
    schema_client: SchemaClient
    json_limits: BodyLimits
    form_limits: FormLimits


async def read_generation(request: web.Request, deps: RequestDeps) -> ImageJob:
    """Raises: ProxyError."""
    reject_encoded(request)
    check_body(request, deps.json_limits)
    most = min(deps.json_limits.max_body, JSON_MAX)
    body = await spool_body(body_chunks(request.content, most), deps.form_limits.quota)
    content = await asyncio.to_thread(body.read, 0, body.size)
    asked = validate(GenerationRequest, parse_object(content))
    model = await find_model(request, deps, asked.model, accepts_image=False)
    return ImageJob(asked, model, build_calls(asked, model), request.headers)


async def read_edit(request: web.Request, deps: RequestDeps) -> ImageJob:
    """Raises: ProxyError."""
    reject_encoded(request)
    form = await read_form(request, deps.form_limits)
    asked = validate(EditRequest, form.texts)
    if not form.files and not set(IMAGE_INPUTS) & set(asked.model_extra or {}):
        message = "Send a picture as the file `image`."
        raise invalid_parameter("image", message, "missing_required_parameter")
    model = await find_model(request, deps, asked.model, accepts_image=True)
    made = build_calls(asked, model, form.files, form.mask)
    return ImageJob(asked, model, made, request.headers)


def reject_encoded(request: web.Request) -> None:
    """Raises: ProxyError 415. Bodies are read here, and decoding is what makes a bomb of them."""
    if request.headers.get(hdrs.CONTENT_ENCODING, "identity").lower() != "identity":
        message = "Send the body without a content encoding."
        raise ProxyError(415, "unsupported_content_encoding", message)


def parse_object(body: bytes) -> dict[str, object]:
    """Raises: ImagesError 400."""
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
    """A number that others can read as well. What is whole is an integer to JSON Schema, however
    it is written. Raises: ValueError."""
    value = float(text)
    if not isfinite(value):
        raise ValueError(text)
    return int(value) if value.is_integer() else value


def validate(model_type: type[R], values: Mapping[str, object]) -> R:
    """A form has texts only, which may stand for numbers.

    Raises: ImagesError 400, with the parameter that is wrong.
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


async def find_model(
    request: web.Request, deps: RequestDeps, name: str | None, *, accepts_image: bool
) -> ResolvedModel:
    """takes_picture: what the model is good for that is taken where a client names none.

    Raises: ImagesError 404.
    """
    if name:
        endpoint = deps.names.endpoint(name)
        if endpoint is None:
            raise model_not_found(name)
        return await resolve_model(request, deps, name, endpoint)
    if not deps.names.endpoint_by_name:
        raise invalid_parameter("model", "Name the model.", "missing_required_parameter")
    async with asyncio.TaskGroup() as group:
        asked = [
            group.create_task(resolve_model(request, deps, listed, endpoint))
            for listed, endpoint in deps.names.endpoint_by_name.items()
        ]
    models = [task.result() for task in asked]
    return next((model for model in models if needs_image(model) is accepts_image), models[0])


async def resolve_model(
    request: web.Request, deps: RequestDeps, name: str, endpoint: str
) -> ResolvedModel:
    """Raises: ImagesError 404, fal does not know the model. One that the operator has listed may
    still be there: fal publishes nothing of an account's own apps."""
    try:
        takes = await deps.schema_client.get_schema(request.app[UPSTREAM], endpoint)
    except SchemaUnavailable:
        return ResolvedModel(endpoint, None)
    if takes is None and not deps.names.is_listed_endpoint(endpoint):
        raise model_not_found(name)
    return ResolvedModel(endpoint, takes)


def needs_image(model: ResolvedModel) -> bool:
    if model.schema is None:
        return EDIT_MODEL.search(model.endpoint) is not None
    return bool(model.schema.required & set(IMAGE_INPUTS))
