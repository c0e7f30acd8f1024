"""What the document says of `/v1`, the images API of OpenAI."""

import json
from collections.abc import Sequence

from falproxy.dialects.kontext.requests import EXAMPLE
from falproxy.web.openapi.operations import (
    EVENTS,
    FOREIGN,
    JSON,
    TOO_LARGE,
    WRONG_TYPE,
    Failure,
    Json,
    Operation,
    Paths,
    answer,
    body,
    content,
    path_parameter,
    ref,
    said_with,
)

TAG = "OpenAI images"
GENERATE = """\
As [OpenAI's](https://platform.openai.com/docs/api-reference/images/create). `model` is a name of \
`GET /v1/models` or any of fal's endpoint ids; whatever else a model takes may be said by its own \
names."""
EDIT = """\
As [OpenAI's](https://platform.openai.com/docs/api-reference/images/createEdit): a form with the \
picture as the file `image`, or several as `image[]`. For a model that takes one, `image_url` may \
say where the picture is, instead of a file."""
# One event of a stream. OpenAPI has a word of its own for these from 3.2 on.
EVENT_SCHEMA: Json = {
    "type": "object",
    "description": "With `stream`: an event for each picture.",
    "required": ["data"],
    "properties": {
        "data": {
            "type": "string",
            "contentMediaType": JSON,
            "contentSchema": {"anyOf": [ref("OpenAIImageEvent"), ref("OpenAIErrorResponse")]},
        }
    },
}

SCHNELL = "fal-ai/flux/schnell"
GENERATIONS = {
    "A picture": {"prompt": "a heron at dawn, watercolour", "model": SCHNELL},
    "Two, of a size, in base64": {
        "prompt": "a heron at dawn, watercolour",
        "model": SCHNELL,
        "n": 2,
        "size": "512x384",
        "seed": 7,
        "response_format": "b64_json",
    },
}
EDITS = {
    "A picture without a file": {
        "prompt": "make it blue",
        "model": "fal-ai/flux-pro/kontext",
        "image_url": f"data:image/png;base64,{EXAMPLE}",
    }
}
PICTURES = {
    "created": 1_764_000_000,
    "data": [{"url": "https://v3.fal.media/files/lion/heron.jpeg"}],
    "size": "1024x768",
}
EVENT = {
    "type": "image_generation.completed",
    "b64_json": EXAMPLE,
    "created_at": 1_764_000_000,
    "size": "64x48",
    "output_format": "png",
    "quality": "auto",
    "background": "auto",
    "partial_image_index": None,
}
MODEL = {
    "id": "flux-dev",
    "object": "model",
    "created": 0,
    "owned_by": "fal-ai",
    "endpoint": "fal-ai/flux/dev",
}

INVALID, SERVER = "invalid_request_error", "server_error"
NO_MODEL = Failure(
    "There is no such model, or it may not be called here.",
    "model_not_found",
    "The model 'flux-9' does not exist, or may not be called here.",
)
MAKING = {
    400: Failure(
        "A parameter is not what is taken, or fal.ai refuses it. `param` names it.",
        "invalid_value",
        "The size must be like 1024x1024, or auto.",
    ),
    403: FOREIGN,
    404: NO_MODEL,
    413: TOO_LARGE,
    415: WRONG_TYPE,
    429: Failure(
        "fal.ai has too many requests of this proxy, or its balance is spent.",
        "rate_limit_exceeded",
        "fal.ai has too many requests of this account.",
    ),
    500: Failure("fal.ai or the proxy failed.", "upstream_failed", "fal.ai answered 500."),
    502: Failure(
        "fal.ai cannot be reached, or its answer not read.",
        "upstream_unreachable",
        "fal.ai could not be reached.",
    ),
    503: Failure(
        "fal.ai or the proxy has no room for now.",
        "busy",
        "Too many requests are under way: try again soon.",
    ),
    504: Failure(
        "No result in time; or none yet, for `Cache-Control: only-if-cached`.",
        "upstream_timeout",
        "fal.ai timed out after 300 s.",
    ),
}
SAID = ("Age", "Cache-Status", "x-falproxy-rehost")
PARAMS = {"model_not_found": "model", "invalid_value": "size"}


def images_paths(names: Sequence[str]) -> Paths:
    """names: of models, to be told."""
    return {
        "/v1/images/generations": ("post", generation()),
        "/v1/images/edits": ("post", edit()),
        "/v1/models": ("get", model_list()),
        "/v1/models/{model}": ("get", model(names)),
    }


def generation() -> Operation:
    return Operation(
        id="createImage",
        tag=TAG,
        summary="Draw pictures",
        description=GENERATE,
        body=body(ref("OpenAIGenerationRequest"), GENERATIONS),
        answers={200: pictures()},
        failures=MAKING,
        refuse=refuse,
    )


def edit() -> Operation:
    return Operation(
        id="createImageEdit",
        tag=TAG,
        summary="Edit pictures",
        description=EDIT,
        body=body(ref("OpenAIEditRequest"), EDITS, "multipart/form-data"),
        answers={200: pictures()},
        failures=MAKING,
        refuse=refuse,
    )


def pictures() -> Json:
    document = answer("The pictures.", ref("OpenAIImagesResponse"), PICTURES, *SAID)
    events = content(EVENT_SCHEMA, {"A picture": {"data": json.dumps(EVENT)}}, EVENTS)
    found = document["content"]
    assert isinstance(found, dict)
    return document | {"content": found | events}


def model_list() -> Operation:
    found = {"object": "list", "data": [MODEL]}
    return Operation(
        id="listModels",
        tag=TAG,
        summary="List models",
        description="The models that have a name. Any other of fal's is called by its endpoint id.",
        answers={200: answer("The models.", ref("OpenAIModelList"), found)},
        failures={403: FOREIGN},
        refuse=refuse,
    )


def model(names: Sequence[str]) -> Operation:
    known = f" The names are {', '.join(names)}." if names else ""
    about = f"A name, or one of fal's endpoint ids, whose slashes may be escaped.{known}"
    schema: Json = {"type": "string", "minLength": 1}
    return Operation(
        id="getModel",
        tag=TAG,
        summary="Show a model",
        description="Whether there is a model, and which one a name means.",
        parameters=[path_parameter("model", about, schema, names[0] if names else SCHNELL)],
        answers={200: answer("The model.", ref("OpenAIModelInfo"), MODEL)},
        failures={403: FOREIGN, 404: NO_MODEL},
        refuse=refuse,
    )


def refuse(status: int, failure: Failure) -> Json:
    """In the shape of OpenAI's errors."""
    example = {
        "message": failure.message,
        "type": INVALID if status < 500 else SERVER,
        "param": PARAMS.get(failure.code),
        "code": "invalid_api_key" if failure.code == "unauthenticated" else failure.code,
    }
    names = (*said_with(status), *(("x-should-retry",) if status >= 500 else ()))
    return answer(failure.about, ref("OpenAIErrorResponse"), {"error": example}, *names)
