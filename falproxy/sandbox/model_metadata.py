"""Published model metadata: an OpenAPI 3.0.4 document for each model, and the prices."""

from collections.abc import Mapping
from urllib.parse import parse_qs

from aiohttp import web

from falproxy.sandbox.live_models import LIVE_PRICES
from falproxy.sandbox.models import FURTHER_PRICES, MODELS, SIDE_MAX, InputType, Model, ModelInput
from falproxy.sandbox.request import QUEUE, FalRequest
from falproxy.sandbox.responses import FalError, FalResponse

Schema = dict[str, object]
JSON_TYPES = {
    InputType.STRING: "string",
    InputType.IMAGE: "string",
    InputType.CHOICE: "string",
    InputType.INTEGER: "integer",
    InputType.NUMBER: "number",
    InputType.BOOLEAN: "boolean",
}
SIDE_SCHEMA = {"type": "integer", "minimum": 1, "maximum": SIDE_MAX, "default": 512}
COMMON_SCHEMAS: Mapping[str, Schema] = {
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
EXTRA_FIELD_SCHEMAS: Mapping[str, Schema] = {
    "timings": {"type": "object", "additionalProperties": {"type": "number"}},
    "seed": {"type": "integer"},
    "has_nsfw_concepts": {"type": "array", "items": {"type": "boolean"}},
    "prompt": {"type": "string"},
    "description": {"type": "string"},
}


def ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def input_schema(spec: ModelInput) -> Schema:
    """Return the schema of one input, with its bounds, choices and default."""
    schema = type_schema(spec)
    bounds = {"minimum": spec.minimum, "maximum": spec.maximum}
    if spec.type in (InputType.INTEGER, InputType.NUMBER):
        schema |= {name: bound for name, bound in bounds.items() if bound is not None}
    if spec.default is not None:
        schema["default"] = spec.default
    return schema


def type_schema(spec: ModelInput) -> Schema:
    match spec.type:
        case InputType.IMAGE_SIZE:
            presets = {"type": "string", "enum": list(spec.choices)}
            return {"anyOf": [ref("ImageSize"), presets]}
        case InputType.LORAS:
            return {"type": "array", "items": ref("LoraWeight")}
        case InputType.IMAGES:
            return {"type": "array", "items": {"type": "string"}}
        case InputType.CHOICE:
            return {"type": "string", "enum": list(spec.choices)}
        case input_type:
            return {"type": JSON_TYPES[input_type]}


def titled_schema(name: str, spec: ModelInput) -> Schema:
    return {"title": name.replace("_", " ").title(), **input_schema(spec)}


def model_schemas(model: Model, name: str) -> dict[str, Schema]:
    """Return the schemas of the model's input and output, and those that they refer to."""
    images: Schema = {"type": "array", "items": ref("Image")}
    output = {model.output: images if model.output == "images" else ref("Image")}
    output |= {extra: EXTRA_FIELD_SCHEMAS[extra] for extra in model.extra_fields}
    return {
        **COMMON_SCHEMAS,
        f"{name}Input": {
            "title": f"{name}Input",
            "type": "object",
            "properties": {key: titled_schema(key, spec) for key, spec in model.inputs.items()},
            "required": [key for key, spec in model.inputs.items() if spec.is_required],
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


def json_response(schema: Schema, description: str = "The request status.") -> Schema:
    content = {"application/json": {"schema": schema}}
    return {"responses": {"200": {"description": description, "content": content}}}


def model_paths(model: Model, name: str) -> Schema:
    """Return submit, status, result and cancel, below the full endpoint id as at fal."""
    id_parameter = {"name": "request_id", "in": "path", "required": True,
                    "schema": {"type": "string", "format": "uuid"}}  # fmt: skip
    logs = {"name": "logs", "in": "query", "required": False, "schema": {"type": "number"}}
    root = f"/{model.endpoint}"
    request_path = f"{root}/requests/{{request_id}}"
    output = ref(f"{name}Output")
    body = {"required": True, "content": {"application/json": {"schema": ref(f"{name}Input")}}}
    success: Schema = {"type": "object", "properties": {"success": {"type": "boolean"}}}
    return {
        f"{request_path}/status": {
            "get": {"parameters": [id_parameter, logs], **json_response(ref("QueueStatus"))}
        },
        f"{request_path}/cancel": {"put": {"parameters": [id_parameter], **json_response(success)}},
        root: {"post": {"requestBody": body, **json_response(ref("QueueStatus"))}},
        request_path: {"get": {"parameters": [id_parameter], **json_response(output)}},
    }


def openapi_document(model: Model) -> Schema:
    title = model.endpoint.removeprefix("fal-ai/").replace("/", " ").replace("-", " ").title()
    name = title.replace(" ", "")
    return {
        "openapi": "3.0.4",
        "info": {
            "title": f"Queue OpenAPI for {model.endpoint}",
            "version": "1.0.0",
            "description": f"The OpenAPI schema for the {model.endpoint} queue.",
            "x-fal-metadata": {
                "endpointId": model.endpoint,
                "category": "image-to-image" if has_image_input(model) else "text-to-image",
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
            "schemas": model_schemas(model, name),
        },
        "paths": model_paths(model, name),
        "servers": [{"url": f"https://{QUEUE}"}],
        "security": [{"apiKeyAuth": []}],
    }


def has_image_input(model: Model) -> bool:
    types = {spec.type for spec in model.inputs.values()}
    return bool(types & {InputType.IMAGE, InputType.IMAGES})


def requested_endpoints(request: FalRequest) -> list[str]:
    """Return the ids in `endpoint_id`, which may be repeated or separated by commas."""
    values = parse_qs(request.target.query).get("endpoint_id", [])
    return [endpoint for value in values for endpoint in value.split(",")]


async def get_openapi(request: FalRequest) -> web.StreamResponse:
    """GET fal.ai/api/openapi/queue/openapi.json?endpoint_id=: 404 with `null` if it is unknown."""
    model = next((MODELS[name] for name in requested_endpoints(request) if name in MODELS), None)
    if model is None:
        raise FalError(FalResponse(404, None))
    return FalResponse(200, openapi_document(model)).to_web_response()


async def get_pricing(request: FalRequest) -> web.StreamResponse:
    """GET api.fal.ai/v1/models/pricing?endpoint_id=: USD for one unit. Without ids, the prices of
    the sandbox's own models."""
    endpoints = requested_endpoints(request)
    listed = {name: (str(model.price), model.unit) for name, model in MODELS.items()}
    known = listed if not endpoints else {**listed, **FURTHER_PRICES, **LIVE_PRICES}
    unknown = [endpoint for endpoint in endpoints if endpoint not in known]
    if unknown:
        message = f"Endpoint {unknown[0]} not found"
        raise FalError(FalResponse(404, {"error": {"type": "not_found", "message": message}}))
    prices = [
        {"endpoint_id": name, "unit_price": float(price), "unit": unit, "currency": "USD"}
        for name, (price, unit) in known.items() if not endpoints or name in endpoints
    ]  # fmt: skip
    document = {"prices": prices, "next_cursor": None, "has_more": False}
    return FalResponse(200, document).to_web_response()
