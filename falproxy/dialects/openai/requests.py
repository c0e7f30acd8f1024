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

from falproxy.dialects.openai.errors import ImagesError, invalid, no_model
from falproxy.dialects.openai.json_body import Body
from falproxy.dialects.openai.model_inputs import PICTURES, Made, Model, calls_of
from falproxy.dialects.openai.model_names import Names
from falproxy.dialects.openai.model_schema_client import NoSchema, Schemas
from falproxy.dialects.openai.multipart import FormRules, read_form
from falproxy.dialects.openai.schema import EditRequest, GenerationRequest, ImageRequest
from falproxy.dialects.queue_client import call_of
from falproxy.dialects.transparent import BodyRules, body_chunks, check_body
from falproxy.errors import ProxyError
from falproxy.fal.input_json import has_few_values
from falproxy.fal.target import RUN_HOST, Target
from falproxy.proxy.call import Call
from falproxy.proxy.upstream import UPSTREAM
from falproxy.spool import hold

# A generation's body has a prompt, and at most a picture or two as data URIs.
JSON_MAX = 32 * 2**20
# What pydantic calls a wrong value, in OpenAI's words.
CODES = {
    "missing": "missing_required_parameter",
    "string_too_long": "string_above_max_length",
    "string_too_short": "empty_string",
    "greater_than_equal": "integer_below_min_value",
    "less_than_equal": "integer_above_max_value",
}
# In the ids of models that are for editing, known without their documents.
FOR_EDITS = re.compile(r"kontext(?!.*text-to-image)|/(?:edit|image-to-image|inpaint)")

R = TypeVar("R", bound=ImageRequest)


@dataclass(frozen=True, slots=True)
class Order:
    """What is asked of which model, and what is sent to it for that."""

    asked: ImageRequest
    model: Model
    made: Sequence[Made]
    headers: CIMultiDictProxy[str]

    def calls(self) -> list[Call]:
        """Submits, each to be made once."""
        return [self._call(made) for made in self.made]

    def stream(self) -> Call:
        """The one call of an order that is followed while it is made."""
        target = Target(RUN_HOST, f"/{self.model.endpoint}/stream", "")
        return replace(self._call(self.made[0]), target=target)

    @property
    def is_followed(self) -> bool:
        """Whether unfinished pictures are wanted, and can be had."""
        takes = self.model.takes
        is_wanted = bool(self.asked.stream and self.asked.partial_images)
        return is_wanted and takes is not None and takes.streams and (self.asked.n or 1) == 1

    def _call(self, made: Made) -> Call:
        body = Body(made.inputs)
        headers = CIMultiDict(self.headers)
        if made.is_alone:
            wish = headers.get(hdrs.CACHE_CONTROL)
            headers[hdrs.CACHE_CONTROL] = f"{wish}, no-store" if wish else "no-store"
        call = call_of(self.model.endpoint, b"", headers)
        return replace(call, body=body.chunks(), length=body.size)


@dataclass(frozen=True, slots=True)
class OrderRules:
    """names: of the models. schemas: what they take. json, form: how large a request may be."""

    names: Names
    schemas: Schemas
    json: BodyRules
    form: FormRules


async def read_generation(request: web.Request, rules: OrderRules) -> Order:
    """Raises: ProxyError."""
    refuse_coded(request)
    check_body(request, rules.json)
    most = min(rules.json.max_body, JSON_MAX)
    body = await hold(body_chunks(request.content, most), rules.form.room)
    content = await asyncio.to_thread(body.read, 0, body.size)
    asked = checked(GenerationRequest, read_object(content))
    model = await find_model(request, rules, asked.model, takes_picture=False)
    return Order(asked, model, calls_of(asked, model), request.headers)


async def read_edit(request: web.Request, rules: OrderRules) -> Order:
    """Raises: ProxyError."""
    refuse_coded(request)
    form = await read_form(request, rules.form)
    asked = checked(EditRequest, form.texts)
    if not form.files and not set(PICTURES) & set(asked.model_extra or {}):
        message = "Send a picture as the file `image`."
        raise invalid("image", message, "missing_required_parameter")
    model = await find_model(request, rules, asked.model, takes_picture=True)
    made = calls_of(asked, model, form.files, form.mask)
    return Order(asked, model, made, request.headers)


def refuse_coded(request: web.Request) -> None:
    """Raises: ProxyError 415. Bodies are read here, and decoding is what makes a bomb of them."""
    if request.headers.get(hdrs.CONTENT_ENCODING, "identity").lower() != "identity":
        message = "Send the body without a content encoding."
        raise ProxyError(415, "unsupported_content_encoding", message)


def read_object(body: bytes) -> dict[str, object]:
    """Raises: ImagesError 400."""
    try:
        document = None
        if has_few_values(body):
            document = json.loads(body, parse_float=number, parse_constant=number)
    except (ValueError, RecursionError):
        document = None
    if not isinstance(document, dict):
        raise invalid(None, "The body must be a JSON object.", "invalid_json")
    return document


def number(text: str) -> float:
    """A number that others can read as well. What is whole is an integer to JSON Schema, however
    it is written. Raises: ValueError."""
    value = float(text)
    if not isfinite(value):
        raise ValueError(text)
    return int(value) if value.is_integer() else value


def checked(form: type[R], given: Mapping[str, object]) -> R:
    """A form has texts only, which may stand for numbers.

    Raises: ImagesError 400, with the parameter that is wrong.
    """
    try:
        return form.model_validate(given, strict=form is not EditRequest)
    except ValidationError as error:
        raise explained(error) from None


def explained(error: ValidationError) -> ImagesError:
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    param = str(first["loc"][0]) if first["loc"] else None
    code = CODES.get(first["type"], "invalid_value")
    return invalid(param, f"{param}: {first['msg']}.", code)


async def find_model(
    request: web.Request, rules: OrderRules, name: str | None, *, takes_picture: bool
) -> Model:
    """takes_picture: what the model is good for that is taken where a client names none.

    Raises: ImagesError 404.
    """
    if name:
        endpoint = rules.names.endpoint(name)
        if endpoint is None:
            raise no_model(name)
        return await look_up(request, rules, name, endpoint)
    if not rules.names.listed:
        raise invalid("model", "Name the model.", "missing_required_parameter")
    async with asyncio.TaskGroup() as group:
        asked = [
            group.create_task(look_up(request, rules, listed, endpoint))
            for listed, endpoint in rules.names.listed.items()
        ]
    models = [task.result() for task in asked]
    return next((model for model in models if needs_picture(model) is takes_picture), models[0])


async def look_up(request: web.Request, rules: OrderRules, name: str, endpoint: str) -> Model:
    """Raises: ImagesError 404, fal does not know the model. One that the operator has listed may
    still be there: fal publishes nothing of an account's own apps."""
    try:
        takes = await rules.schemas.find(request.app[UPSTREAM], endpoint)
    except NoSchema:
        return Model(endpoint, None)
    if takes is None and not rules.names.vouches_for(endpoint):
        raise no_model(name)
    return Model(endpoint, takes)


def needs_picture(model: Model) -> bool:
    if model.takes is None:
        return FOR_EDITS.search(model.endpoint) is not None
    return bool(model.takes.required & set(PICTURES))
