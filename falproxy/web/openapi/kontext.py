"""What the document says of `/kontext` and its variants."""

from falproxy.dialects.kontext.requests import EXAMPLE, VARIANTS, KontextDevRequest
from falproxy.web.openapi.operations import (
    AWAY,
    FAILED,
    FORBIDDEN,
    TOO_LARGE,
    TOO_SLOW,
    WRONG_TYPE,
    Failure,
    Operation,
    Paths,
    answer,
    body,
    ref,
    refuse_plainly,
)

ABOUT = """\
Changes a picture as a text says, and waits for the result. Send the picture as `image_data` or \
`image_url`, one of the two. Parameters that this variant does not take are left out."""
SUMMARIES = {
    "kontext": ("edit", "Edit a picture with FLUX.1 Kontext [pro]"),
    "kontext/max": ("editMax", "Edit a picture with FLUX.1 Kontext [max]"),
    "kontext/dev": ("editDev", "Edit a picture with FLUX.1 Kontext [dev]"),
}
BLUE = {"prompt": "make it blue", "image_data": EXAMPLE, "seed": 42}
PRO = {
    "A picture in base64": BLUE,
    "A data URI, and more": {
        "prompt": "make it winter",
        "image_url": f"data:image/png;base64,{EXAMPLE}",
        "aspect_ratio": "16:9",
        "safety_tolerance": "2",
        "output_format": "png",
    },
}
DEV = {
    "A picture in base64": BLUE,
    "A data URI, and more": {
        "prompt": "make it winter",
        "image_url": f"data:image/png;base64,{EXAMPLE}",
        "num_inference_steps": 28,
        "resolution_mode": "match_input",
        "acceleration": "none",
    },
}
RESULT = {
    "images": [{"url": "https://v3.fal.media/files/lion/blue.jpeg", "width": 1184, "height": 880}],
    "prompt": "make it blue",
}
SAID = ("Age", "Cache-Status", "x-fal-request-id", "x-falproxy-rehost")
FAILURES = {
    400: Failure(
        "A parameter or the picture is not what is taken, or fal.ai refuses them.",
        "parameter_invalid",
        "num_images must be a whole number from 1 to 4.",
    ),
    403: FORBIDDEN,
    408: TOO_SLOW,
    413: TOO_LARGE,
    415: WRONG_TYPE,
    500: FAILED,
    503: AWAY,
    504: Failure(
        "The request was `Cache-Control: only-if-cached`, and there is no result yet.",
        "not_cached",
        "There is no result of this call.",
    ),
}


def kontext_paths() -> Paths:
    return {f"/{variant}": ("post", edit(variant)) for variant in VARIANTS}


def edit(variant: str) -> Operation:
    name, summary = SUMMARIES[variant]
    request = VARIANTS[variant].request
    return Operation(
        id=name,
        tag="Kontext",
        summary=summary,
        description=ABOUT,
        body=body(ref(request.__name__), DEV if request is KontextDevRequest else PRO),
        answers={200: answer("The pictures.", ref("KontextResult"), RESULT, *SAID)},
        failures=FAILURES,
        refuse=refuse_plainly,
    )
