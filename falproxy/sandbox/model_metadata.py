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
MODELS_PAGE_SIZE = 50
SIDE_SCHEMA = {"type": "integer", "minimum": 1, "maximum": SIDE_MAX, "default": 512}
FILE_PROPERTIES: Schema = {
    "url": {"type": "string"},
    "content_type": {"type": "string", "nullable": True},
    "file_name": {"type": "string", "nullable": True},
    "file_size": {"type": "integer", "nullable": True},
}
COMMON_SCHEMAS: Mapping[str, Schema] = {
    "File": {"type": "object", "required": ["url"], "properties": FILE_PROPERTIES},
    "Image": {
        "type": "object",
        "required": ["url"],
        "properties": {
            **FILE_PROPERTIES,
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
    "duration_ms": {"type": "integer"},
    "tags": {"type": "string"},
    "lyrics": {"type": "string"},
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
        case InputType.OBJECT:
            fields = {name: titled_schema(name, field) for name, field in spec.fields.items()}
            return {"type": "object", "properties": fields}
        case input_type:
            return {"type": JSON_TYPES[input_type]}


def titled_schema(name: str, spec: ModelInput) -> Schema:
    return {"title": name.replace("_", " ").title(), **input_schema(spec)}


def model_schemas(model: Model, name: str) -> dict[str, Schema]:
    """Return the schemas of the model's input and output, and those that they refer to."""
    file = ref("Image" if model.kind == "image" else "File")
    images: Schema = {"type": "array", "items": file}
    output = {model.output: images if model.output == "images" else file}
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
    name = title_of(model).replace(" ", "")
    return {
        "openapi": "3.0.4",
        "info": {
            "title": f"Queue OpenAPI for {model.endpoint}",
            "version": "1.0.0",
            "description": f"The OpenAPI schema for the {model.endpoint} queue.",
            "x-fal-metadata": {
                "endpointId": model.endpoint,
                "category": category_of(model),
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


def category_of(model: Model) -> str:
    """Return fal's category of a model, such as `image-to-video`."""
    if model.is_speech:
        return "text-to-speech"
    return f"{'image' if has_image_input(model) else 'text'}-to-{model.kind}"


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
    response = FalResponse(200, openapi_document(model)).to_web_response()
    response.enable_compression()  # if the client accepts it
    return response


async def get_models(request: FalRequest) -> web.StreamResponse:
    """GET api.fal.ai/v1/models?q=&category=&limit=&cursor=: models whose name has all words."""
    query = {name: values[-1] for name, values in parse_qs(request.target.query).items()}
    words = query.get("q", "").lower().split()
    names = requested_endpoints(request)
    found = [
        model
        for model in MODELS.values()
        if all(word in f"{model.endpoint} {title_of(model)}".lower() for word in words)
        and (not names or model.endpoint in names)
        and query.get("category", category_of(model)) == category_of(model)
    ]
    try:
        start, size = int(query.get("cursor", 0)), int(query.get("limit", MODELS_PAGE_SIZE))
    except ValueError:
        start, size = 0, 0
    if not 1 <= size <= MODELS_PAGE_SIZE or start < 0:
        message = "Invalid limit or cursor"
        raise FalError(
            FalResponse(400, {"error": {"type": "validation_error", "message": message}})
        )
    end = start + size
    has_more = end < len(found)
    document = {
        "models": [model_entry(model) for model in found[start:end]],
        "next_cursor": str(end) if has_more else None,
        "has_more": has_more,
    }
    return FalResponse(200, document).to_web_response()


def model_entry(model: Model) -> Schema:
    return {
        "endpoint_id": model.endpoint,
        "metadata": {
            "display_name": title_of(model),
            "category": category_of(model),
            "description": f"{title_of(model)}, drawn by the falproxy sandbox.",
            "status": "active",
            "tags": [],
            "updated_at": "2026-01-01T00:00:00Z",
            "model_url": f"https://fal.ai/models/{model.endpoint}",
            "license_type": "commercial",
            "kind": "inference",
        },
    }


def title_of(model: Model) -> str:
    return model.endpoint.removeprefix("fal-ai/").replace("/", " ").replace("-", " ").title()


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
