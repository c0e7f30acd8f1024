"""Reading and validation of requests to `/api/images/generate` and `/api/templates`."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from aiohttp import hdrs, web
from pydantic import BaseModel, ValidationError

from falproxy.dialects.generate.endpoint_models import ModelFinder
from falproxy.dialects.generate.schema import GenerateRequest, TemplateRequest
from falproxy.dialects.json_body import InvalidTextError, parse_json_body
from falproxy.dialects.transparent import BodyLimits, body_chunks, check_body
from falproxy.errors import ProxyError
from falproxy.fal.registry import InvalidInputError, RegistryModel, Template
from falproxy.fal.registry.models import IMAGE_SIZE, SIZE_INPUTS
from falproxy.proxy.idempotency_key import set_client_digest
from falproxy.proxy.upstream import UPSTREAM
from falproxy.spool import Spool

JSON_MAX = 32 * 2**20  # bytes of a body
RESPOND_ASYNC = "respond-async"  # RFC 7240, section 4.1

M = TypeVar("M", bound=BaseModel)


@dataclass(frozen=True, slots=True)
class JobSpec:
    """A validated request.

    body: the JSON body of the submit.
    is_async: respond with the job instead of its result.
    """

    model: RegistryModel
    body: bytes
    user_id: str | None
    is_async: bool


async def read_generate(request: web.Request, finder: ModelFinder, max_body: int) -> JobSpec:
    """Raises: ProxyError 400, 403, 408, 413, 415, 503."""
    params = await read_body(request, GenerateRequest, max_body)
    model = await finder.find(params.model, request.app[UPSTREAM])
    try:
        inputs = merge_inputs(params.inputs, params.options)
        model = model.for_inputs(present(inputs))
        body = model.build_body(inputs)
    except InvalidInputError as error:
        raise invalid_input(error) from error
    return build_spec(request, model, body, params.user_id)


async def read_template(request: web.Request, finder: ModelFinder, max_body: int) -> JobSpec:
    """Raises: ProxyError 400, 403, 404, 408, 413, 415, 503."""
    templates = finder.registry.templates
    template = templates.get(request.match_info["name"])
    if template is None:
        names = ", ".join(templates)
        raise ProxyError(
            404, "template_not_found", f"There is no such template. There are {names}."
        )
    params = await read_body(request, TemplateRequest, max_body)
    if params.template not in (None, template.name):
        message = f"The path is that of the template {template.name!r}, not {params.template!r}."
        raise ProxyError(400, "invalid_request", message)
    model = await finder.find(params.model or template.model, request.app[UPSTREAM])
    try:
        inputs = merge_inputs(params.inputs, params.options)
        inputs = merge_inputs(inputs, {"prompt": template.fill(params.variables)})
        inputs = merge_inputs(inputs, template.variable_inputs(params.variables))
        model = model.for_inputs(present(inputs))
        body = model.build_body(template_defaults(template, model, inputs) | inputs)
    except InvalidInputError as error:
        raise invalid_input(error) from error
    return build_spec(request, model, body, params.user_id)


def build_spec(
    request: web.Request, model: RegistryModel, body: Mapping[str, object], user_id: str | None
) -> JobSpec:
    preferences = ",".join(request.headers.getall("Prefer", ())).lower().split(",")
    is_async = any(preference.strip() == RESPOND_ASYNC for preference in preferences)
    try:
        text = json.dumps(body, allow_nan=False)
    except ValueError as error:
        raise ProxyError(
            400, "invalid_request", "The body has a number that is not finite."
        ) from error
    return JobSpec(model, text.encode(), user_id, is_async)


def present(inputs: Mapping[str, object]) -> list[str]:
    return [name for name, value in inputs.items() if value is not None]


def template_defaults(
    template: Template, model: RegistryModel, inputs: Mapping[str, object]
) -> dict[str, object]:
    """Return the inputs of a template that a call does not have. The client may have chosen a model
    without some of them."""
    has_size = any(inputs.get(name) is not None for name in SIZE_INPUTS)
    return {
        name: value
        for name, value in template.inputs.items()
        if model.takes_default(name, value) and not (name == IMAGE_SIZE and has_size)
    }


def merge_inputs(inputs: Mapping[str, object], options: Mapping[str, object]) -> dict[str, object]:
    """Raises: InvalidInputError, a name is in both."""
    for name in options:
        if name in inputs:
            raise InvalidInputError(f"{name!r} is given twice.", name)
    return {**inputs, **options}


def invalid_input(error: InvalidInputError) -> ProxyError:
    return ProxyError(400, "invalid_input", str(error))


async def read_body(request: web.Request, model_type: type[M], max_body: int) -> M:
    """Raises: ProxyError 400, 408, 413, 415."""
    if not request.body_exists or request.content_type != "application/json":
        raise ProxyError(415, "unsupported_media_type", "Send a JSON body, as application/json.")
    check_body(request, BodyLimits(max_body, allow_encoded=False))
    size_limit = min(max_body, JSON_MAX)
    content = b"".join([chunk async for chunk in body_chunks(request.content, size_limit)])
    await set_client_digest(request, [Spool(content)])
    try:
        return model_type.model_validate(await parse_json_body(content))
    except InvalidTextError as error:
        raise ProxyError(400, "invalid_request", str(error)) from error
    except ValidationError as error:
        raise ProxyError(400, "invalid_request", first_error(error)) from error
    except RecursionError as error:
        raise ProxyError(400, "invalid_request", "The body is nested too deeply.") from error


def first_error(error: ValidationError) -> str:
    """Return the first error as a sentence. It repeats names from the body, but no values."""
    details = error.errors(include_url=False, include_input=False, include_context=False)[0]
    location = ".".join(str(part) for part in details["loc"])
    message = details["msg"].rstrip(".")
    return f"{location}: {message}." if location else f"{message}."


def check_method(request: web.Request, *, methods: Sequence[str]) -> None:
    """Raises: ProxyError 405."""
    head = (hdrs.METH_HEAD,) if hdrs.METH_GET in methods else ()
    if request.method not in (*methods, *head):
        message = f"Use {' or '.join(methods)} here."
        raise ProxyError(405, "method_not_allowed", message, {hdrs.ALLOW: ", ".join(methods)})
