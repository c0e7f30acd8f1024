"""What the document says of `/api/images` and `/api/templates`."""

from falproxy.fal.registry import Registry
from falproxy.web.openapi.operations import (
    AWAY,
    FAILED,
    FORBIDDEN,
    FOREIGN,
    TOO_LARGE,
    TOO_SLOW,
    WRONG_TYPE,
    Failure,
    Json,
    Operation,
    Paths,
    answer,
    body,
    content,
    headers,
    path_parameter,
    plain,
    prefer,
    ref,
    refuse_plainly,
    said_with,
)

TAG = "Generate"
GENERATE = """\
A picture by one of the models of `GET /api/images/models`, from the inputs that the model takes. \
`lora_url` with `lora_scale` stand for `loras`, `width` with `height` for `image_size`. The job is \
kept, and can be asked for by its id; with `Prefer: respond-async` that is all there is at first."""
TEMPLATE = """\
A picture by a template: a prompt with variables. The templates, with their variables, are in \
`GET /api/images/models`."""
LIGHTHOUSE = {"model": "flux-schnell", "inputs": {"prompt": "a lighthouse at dusk"}}
ORDERS = {
    "A picture": LIGHTHOUSE,
    "With a size and a user": {
        **LIGHTHOUSE,
        "options": {"width": 512, "height": 384, "seed": 7},
        "userId": "user-42",
    },
}
TEMPLATES = {
    "A product": {"variables": {"product": "a bar of soap"}},
    "Another model": {
        "variables": {"product": "a bar of soap", "surface": "slate"},
        "model": "flux-schnell",
        "inputs": {"image_size": "square"},
    },
}
SHOWN_TEMPLATE = "product-shot"
JOB_ID = "1f0c7f1f7a5b4a4f9f5d0c9e2b1a3c4d"
PICTURE = {"url": "https://v3.fal.media/files/lion/dusk.jpeg", "width": 1024, "height": 768}
DONE = {
    "jobId": JOB_ID,
    "status": "completed",
    "model": "flux-schnell",
    "imageUrl": PICTURE["url"],
    "images": [PICTURE],
    "cost": 0.003,
    "userId": None,
    "error": None,
}
RUNNING = DONE | {"status": "running", "imageUrl": None, "images": [], "cost": None}
REFUSED = DONE | {
    "status": "failed",
    "imageUrl": None,
    "images": [],
    "cost": 0.0,
    "error": {"code": "input_refused", "message": "fal.ai does not accept num_images."},
}
MODELS = {
    "models": [
        {
            "name": "flux-schnell",
            "endpoint": "fal-ai/flux/schnell",
            "description": "FLUX.1 [schnell]: pictures from a text in a second.",
            "required": ["prompt"],
            "optional": ["image_size", "num_images", "seed"],
            "lora": False,
            "price": 0.003,
            "unit": "megapixel",
            "defaults": {},
        }
    ],
    "templates": [
        {
            "name": SHOWN_TEMPLATE,
            "description": "A picture of a product as in a catalogue.",
            "model": "flux-dev",
            "variables": [{"name": "product", "description": "what is shown", "default": None}],
        }
    ],
}
SAID = ("Age", "Cache-Status", "x-fal-request-id", "x-falproxy-rehost")

WRONG = Failure(
    "The request is not what is taken, or fal.ai refuses it.",
    "invalid_input",
    "flux-schnell needs 'prompt'.",
)
BAD_GATEWAY = Failure(
    "fal.ai's answer cannot be read, or its files not kept.",
    "upstream_unreadable",
    "fal.ai's answer is too large to be read.",
)
TOO_LATE = Failure(
    "No answer of fal.ai's in time; or no result yet, for `Cache-Control: only-if-cached`.",
    "upstream_timeout",
    "fal.ai did not answer in time.",
)
ASKING = {403: FORBIDDEN, 500: FAILED, 502: BAD_GATEWAY, 503: AWAY, 504: TOO_LATE}
MAKING = ASKING | {400: WRONG, 408: TOO_SLOW, 413: TOO_LARGE, 415: WRONG_TYPE}
# Failures that a job may have ended with; it comes with them.
OF_JOBS = (400, 500, 503)
NO_TEMPLATE = Failure(
    "There is no such template.",
    "template_not_found",
    "There is no such template. There are billboard, discount-banner, product-shot.",
)
NO_JOB = Failure("There is no such job.", "job_not_found", "There is no such job.")


def generate_paths(registry: Registry | None) -> Paths:
    """registry: whose names may be told; None where they may not."""
    return {
        "/api/images/generate": ("post", generation()),
        "/api/images/models": ("get", model_list()),
        "/api/images/jobs/{id}": ("get", job()),
        "/api/templates/{name}": ("post", template(registry)),
    }


def generation() -> Operation:
    return Operation(
        id="generate",
        tag=TAG,
        summary="Make a picture by any model",
        description=GENERATE,
        parameters=[prefer()],
        body=body(ref("GenerateRequest"), ORDERS),
        answers=made(),
        failures=MAKING,
        refuse=refuse,
    )


def template(registry: Registry | None) -> Operation:
    schema: Json = {"type": "string", "minLength": 1}
    if registry is not None:
        schema = {"type": "string", "enum": list(registry.templates)}
    name = path_parameter("name", "Which template.", schema, SHOWN_TEMPLATE)
    return Operation(
        id="generateByTemplate",
        tag=TAG,
        summary="Make a picture by a template",
        description=TEMPLATE,
        parameters=[name, prefer()],
        body=body(ref("TemplateRequest"), TEMPLATES),
        answers=made(),
        failures=MAKING | {404: NO_TEMPLATE},
        refuse=refuse,
    )


def job() -> Operation:
    schema: Json = {"type": "string", "minLength": 1}
    return Operation(
        id="getJob",
        tag=TAG,
        summary="Ask for a job",
        description="A job as it is now. A locked proxy tells it to whoever ordered it.",
        parameters=[path_parameter("id", "The `jobId` of an answer.", schema, None)],
        answers={200: answer("The job.", ref("JobAnswer"), DONE)},
        failures=ASKING | {404: NO_JOB},
        refuse=refuse_plainly,
    )


def model_list() -> Operation:
    return Operation(
        id="listImageModels",
        tag=TAG,
        summary="List models and templates",
        description="All that can be asked for, with inputs and prices.",
        answers={200: answer("Models and templates.", ref("ModelsAnswer"), MODELS)},
        failures={403: FOREIGN},
        refuse=refuse_plainly,
    )


def made() -> dict[int, Json]:
    """Answers that name a job, by which it can be asked for."""
    links: Json = {
        "links": {
            "job": {
                "operationId": "getJob",
                "parameters": {"id": "$response.body#/jobId"},
                "description": "The job can be asked for by its id.",
            }
        }
    }
    late = "The job goes on: it was to be asked for later, or took too long to be waited for."
    return {
        200: answer("The job at its end.", ref("JobAnswer"), DONE, *SAID) | links,
        202: answer(late, ref("JobAnswer"), RUNNING, "Location", "Preference-Applied") | links,
    }


def refuse(status: int, failure: Failure) -> Json:
    """A request that is refused, and a job that was made and failed."""
    if status not in OF_JOBS:
        return refuse_plainly(status, failure)
    schema: Json = {"anyOf": [ref("JobAnswer"), ref("Error")]}
    examples = {"The request is refused": plain(failure), "The job failed": REFUSED}
    return {
        "description": failure.about,
        "headers": headers(*said_with(status), *SAID),
        "content": content(schema, examples),
    }
