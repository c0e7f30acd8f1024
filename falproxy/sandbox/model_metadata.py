"""What fal publishes of its models: OpenAPI 3.0.4 for each, and prices."""

from collections.abc import Mapping
from urllib.parse import parse_qs

from aiohttp import web

from falproxy.sandbox.models import MODELS, SIDE_MAX, Input, Kind, Model
from falproxy.sandbox.request import QUEUE, Visit
from falproxy.sandbox.responses import Answer, FalError

Schema = dict[str, object]
PLAIN = {
    Kind.TEXT: "string",
    Kind.IMAGE: "string",
    Kind.CHOICE: "string",
    Kind.INTEGER: "integer",
    Kind.NUMBER: "number",
    Kind.FLAG: "boolean",
}
SIDE_SCHEMA = {"type": "integer", "minimum": 1, "maximum": SIDE_MAX, "default": 512}
COMMON: Mapping[str, Schema] = {
    "Image": {
        "type": "object",
        "required": ["url"],
        "properties": {
            "url": {"type": "string"},
            "content_type": {"type": "string", "nullable": True},
            "file_name": {"type": "string", "nullable": True},
            "file_size": {"type": "integer", "nullable": True},
            "width": {"type": "integer", "nullable": True},
            "height": {"type": "integer", "nullable": True},
        },
    },
    "ImageSize": {
        "type": "object",
        "properties": {"width": SIDE_SCHEMA, "height": SIDE_SCHEMA},
    },
    "LoraWeight": {
        "type": "object",
        "required": ["path"],
        "properties": {
            "path": {"type": "string"},
            "scale": {"type": "number", "minimum": 0, "maximum": 4, "default": 1},
        },
    },
    "QueueStatus": {
        "type": "object",
        "required": ["status", "request_id"],
        "properties": {
            "status": {"type": "string", "enum": ["IN_QUEUE", "IN_PROGRESS", "COMPLETED"]},
            "request_id": {"type": "string"},
            "response_url": {"type": "string"},
            "status_url": {"type": "string"},
            "cancel_url": {"type": "string"},
            "logs": {"type": "object", "additionalProperties": True},
            "metrics": {"type": "object", "additionalProperties": True},
            "queue_position": {"type": "integer"},
        },
    },
}
EXTRAS: Mapping[str, Schema] = {
    "timings": {"type": "object", "additionalProperties": {"type": "number"}},
    "seed": {"type": "integer"},
    "has_nsfw_concepts": {"type": "array", "items": {"type": "boolean"}},
    "prompt": {"type": "string"},
    "description": {"type": "string"},
}


def ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def input_schema(expected: Input) -> Schema:
    """The schema of one input, with its range, choices and default."""
    schema = shape_of(expected)
    bounds = {"minimum": expected.low, "maximum": expected.high}
    if expected.kind in (Kind.INTEGER, Kind.NUMBER):
        schema |= {name: bound for name, bound in bounds.items() if bound is not None}
    if expected.default is not None:
        schema["default"] = expected.default
    return schema


def shape_of(expected: Input) -> Schema:
    match expected.kind:
        case Kind.SIZE:
            presets = {"type": "string", "enum": list(expected.choices)}
            return {"anyOf": [ref("ImageSize"), presets]}
        case Kind.LORAS:
            return {"type": "array", "items": ref("LoraWeight")}
        case Kind.IMAGES:
            return {"type": "array", "items": {"type": "string"}}
        case Kind.CHOICE:
            return {"type": "string", "enum": list(expected.choices)}
        case kind:
            return {"type": PLAIN[kind]}


def titled(name: str, expected: Input) -> Schema:
    return {"title": name.replace("_", " ").title(), **input_schema(expected)}


def schemas_of(model: Model, name: str) -> dict[str, Schema]:
    """The model's input and output, and what they refer to."""
    pictures: Schema = {"type": "array", "items": ref("Image")}
    output = {model.output: pictures if model.output == "images" else ref("Image")}
    output |= {extra: EXTRAS[extra] for extra in model.extras}
    return {
        **COMMON,
        f"{name}Input": {
            "title": f"{name}Input",
            "type": "object",
            "properties": {key: titled(key, known) for key, known in model.inputs.items()},
            "required": [key for key, known in model.inputs.items() if known.is_required],
            "x-fal-order-properties": list(model.inputs),
        },
        f"{name}Output": {
            "title": f"{name}Output",
            "type": "object",
            "properties": output,
            "required": list(output),
            "x-fal-order-properties": list(output),
        },
    }


def returns(schema: Schema, description: str = "The request status.") -> Schema:
    content = {"application/json": {"schema": schema}}
    return {"responses": {"200": {"description": description, "content": content}}}


def paths_of(model: Model, name: str) -> Schema:
    """Submit, status, result and cancel, under the full id as fal publishes them."""
    id_parameter = {"name": "request_id", "in": "path", "required": True,
                    "schema": {"type": "string", "format": "uuid"}}  # fmt: skip
    logs = {"name": "logs", "in": "query", "required": False, "schema": {"type": "number"}}
    root = f"/{model.endpoint}"
    one = f"{root}/requests/{{request_id}}"
    body = {"required": True, "content": {"application/json": {"schema": ref(f"{name}Input")}}}
    success: Schema = {"type": "object", "properties": {"success": {"type": "boolean"}}}
    return {
        f"{one}/status": {
            "get": {"parameters": [id_parameter, logs], **returns(ref("QueueStatus"))}
        },
        f"{one}/cancel": {"put": {"parameters": [id_parameter], **returns(success)}},
        root: {"post": {"requestBody": body, **returns(ref("QueueStatus"))}},
        one: {"get": {"parameters": [id_parameter], **returns(ref(f"{name}Output"))}},
    }


def describe(model: Model) -> Schema:
    """The model's OpenAPI document."""
    words = model.endpoint.removeprefix("fal-ai/").replace("/", " ").replace("-", " ")
    name = words.title().replace(" ", "")
    return {
        "openapi": "3.0.4",
        "info": {
            "title": f"Queue OpenAPI for {model.endpoint}",
            "version": "1.0.0",
            "description": f"The OpenAPI schema for the {model.endpoint} queue.",
            "x-fal-metadata": {
                "endpointId": model.endpoint,
                "category": "image-to-image" if takes_pictures(model) else "text-to-image",
                "playgroundUrl": f"https://fal.ai/models/{model.endpoint}",
                "documentationUrl": f"https://fal.ai/models/{model.endpoint}/api",
            },
        },
        "components": {
            "securitySchemes": {
                "apiKeyAuth": {
                    "type": "apiKey",
                    "in": "header",
                    "name": "Authorization",
                    "description": "Fal Key",
                }
            },
            "schemas": schemas_of(model, name),
        },
        "paths": paths_of(model, name),
        "servers": [{"url": f"https://{QUEUE}"}],
        "security": [{"apiKeyAuth": []}],
    }


def takes_pictures(model: Model) -> bool:
    kinds = {known.kind for known in model.inputs.values()}
    return bool(kinds & {Kind.IMAGE, Kind.IMAGES})


def endpoints_of(visit: Visit) -> list[str]:
    """The ids of `endpoint_id`, which may be repeated or separated by commas."""
    named = parse_qs(visit.address.query).get("endpoint_id", [])
    return [endpoint for value in named for endpoint in value.split(",")]


async def openapi(visit: Visit) -> web.StreamResponse:
    """GET fal.ai/api/openapi/queue/openapi.json?endpoint_id=: 404 with `null` for no model."""
    model = next((MODELS[name] for name in endpoints_of(visit) if name in MODELS), None)
    if model is None:
        raise FalError(Answer(404, None))
    return Answer(200, describe(model)).response()


async def pricing(visit: Visit) -> web.StreamResponse:
    """GET api.fal.ai/v1/models/pricing?endpoint_id=: USD for one unit."""
    named = endpoints_of(visit)
    unknown = [endpoint for endpoint in named if endpoint not in MODELS]
    if unknown:
        message = f"Endpoint {unknown[0]} not found"
        raise FalError(Answer(404, {"error": {"type": "not_found", "message": message}}))
    prices = [
        {"endpoint_id": model.endpoint, "unit_price": float(model.price), "unit": model.unit,
         "currency": "USD"}
        for model in MODELS.values() if not named or model.endpoint in named
    ]  # fmt: skip
    return Answer(200, {"prices": prices, "next_cursor": None, "has_more": False}).response()
