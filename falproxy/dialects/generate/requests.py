"""What a client orders, read and checked: a model's call, by itself or by a template."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

from aiohttp import hdrs, web
from pydantic import BaseModel, ValidationError

from falproxy.dialects.generate.schema import GenerateRequest, TemplateRequest
from falproxy.dialects.transparent import BodyLimits, body_chunks, check_body
from falproxy.errors import ProxyError
from falproxy.fal.input_json import has_few_values
from falproxy.fal.registry import InvalidInputError, Registry, RegistryModel

JSON_MAX = 32 * 2**20  # bytes of a body, which is read whole
RESPOND_ASYNC = "respond-async"  # RFC 7240, section 4.1

M = TypeVar("M", bound=BaseModel)


@dataclass(frozen=True, slots=True)
class JobSpec:
    """body: what fal gets. is_async: whether the client asks later."""

    model: RegistryModel
    body: bytes
    user_id: str | None
    is_async: bool


async def read_generate(request: web.Request, registry: Registry, max_body: int) -> JobSpec:
    """Raises: ProxyError 400, 408, 413, 415."""
    asked = await read_body(request, GenerateRequest, max_body)
    model = find_model(registry, asked.model)
    try:
        body = model.build_body(merge_inputs(asked.inputs, asked.options))
    except InvalidInputError as error:
        raise invalid_input(error) from error
    return build_spec(request, model, body, asked.user_id)


async def read_template(request: web.Request, registry: Registry, max_body: int) -> JobSpec:
    """Raises: ProxyError 400, 404, 408, 413, 415."""
    template = registry.templates.get(request.match_info["name"])
    if template is None:
        known = ", ".join(registry.templates)
        raise ProxyError(
            404, "template_not_found", f"There is no such template. There are {known}."
        )
    asked = await read_body(request, TemplateRequest, max_body)
    model = find_model(registry, asked.model or template.model)
    try:
        prompt = {"prompt": template.fill(asked.variables)}
        own = merge_inputs(merge_inputs(asked.inputs, asked.options), prompt)
        # Another model than the template's need not take all that the template says.
        usual = {
            name: each for name, each in template.inputs.items() if name in model.accepted_inputs
        }
        body = model.build_body(usual | own)
    except InvalidInputError as error:
        raise invalid_input(error) from error
    return build_spec(request, model, body, asked.user_id)


def build_spec(
    request: web.Request, model: RegistryModel, body: Mapping[str, object], user_id: str | None
) -> JobSpec:
    wishes = ",".join(request.headers.getall("Prefer", ())).lower().split(",")
    is_async = any(wish.strip() == RESPOND_ASYNC for wish in wishes)
    try:
        text = json.dumps(body, allow_nan=False)
    except ValueError as error:
        raise ProxyError(400, "invalid_request", "A number in the body is no number.") from error
    return JobSpec(model, text.encode(), user_id, is_async)


def merge_inputs(inputs: Mapping[str, object], options: Mapping[str, object]) -> dict[str, object]:
    """Raises: InvalidInputError, one is in both."""
    for name in options:
        if name in inputs:
            raise InvalidInputError(f"{name!r} is said twice.", name)
    return {**inputs, **options}


def find_model(registry: Registry, name: str) -> RegistryModel:
    """Raises: ProxyError 400."""
    try:
        return registry.model(name)
    except InvalidInputError as error:
        raise ProxyError(400, "model_not_found", str(error)) from error


def invalid_input(error: InvalidInputError) -> ProxyError:
    return ProxyError(400, "invalid_input", str(error))


async def read_body(request: web.Request, model_type: type[M], max_body: int) -> M:
    """Raises: ProxyError 400, 408, 413, 415."""
    if not request.body_exists or request.content_type != "application/json":
        raise ProxyError(415, "unsupported_media_type", "Send a JSON body, as application/json.")
    check_body(request, BodyLimits(max_body, allow_encoded=False))
    most = min(max_body, JSON_MAX)
    content = b"".join([chunk async for chunk in body_chunks(request.content, most)])
    if not has_few_values(content):
        raise ProxyError(400, "invalid_request", "The body has too many values.")
    try:
        return model_type.model_validate_json(content)
    except ValidationError as error:
        raise ProxyError(400, "invalid_request", first_error(error)) from error
    except RecursionError as error:
        raise ProxyError(400, "invalid_request", "The body is nested too deeply.") from error


def first_error(error: ValidationError) -> str:
    """What is wrong first, in a sentence that repeats nothing of the body but names."""
    found = error.errors(include_url=False, include_input=False, include_context=False)[0]
    where = ".".join(str(part) for part in found["loc"])
    said = found["msg"].rstrip(".")
    return f"{where}: {said}." if where else f"{said}."


def check_method(request: web.Request, *, method: str) -> None:
    """Raises: ProxyError 405."""
    allowed = (method, hdrs.METH_HEAD) if method == hdrs.METH_GET else (method,)
    if request.method not in allowed:
        raise ProxyError(405, "method_not_allowed", f"Use {method} here.", {hdrs.ALLOW: method})
