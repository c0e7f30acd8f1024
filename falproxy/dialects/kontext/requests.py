"""Requests to `/kontext`, `/kontext/max` and `/kontext/dev`: the parameters of each path as a
pydantic model, parsing, and the check of the image."""

import base64
import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    WithJsonSchema,
)
from pydantic.config import JsonDict

from falproxy.dialects.json_body import HALF_PAIR_MESSAGE, describe_invalid_bytes
from falproxy.errors import ProxyError
from falproxy.fal.image_fields import carries_image
from falproxy.fal.image_formats import Format
from falproxy.fal.input_json import EXACT_INTEGER_MAX, ByteSource, LongString, parse_input
from falproxy.media.image_format import SNIFF_BYTES, sniff
from falproxy.media.image_rules import (
    ImageLimits,
    InputKind,
    InputRefused,
    check_image,
    decode_data_uri,
    input_kind,
)

MIB = 2**20
# Images behind a URL, and images inside the request, whose max_bytes is the decoded size.
URL_IMAGE_LIMITS = ImageLimits(formats=(Format.JPEG, Format.PNG))
INLINE_IMAGE_LIMITS = replace(URL_IMAGE_LIMITS, max_bytes=10 * MIB)
# Bytes of a string. 10 MiB are 14 MiB in base64, which may contain white space.
STRING_MAX = 20 * MIB
REST_MAX = 2 * STRING_MAX
# A red PNG of 64 x 48 pixels.
EXAMPLE_IMAGE = (
    "iVBORw0KGgoAAAANSUhEUgAAAEAAAAAwCAIAAAAuKetIAAAAQElEQVR42u3PQQ0AAAgEoNP+nbWCXzdoQE1+6wgI"
    "CAgICAgICAgICAgICAgICAgICAgICAgICAgICAgICAgIHC36dwFfYw5C7wAAAABJRU5ErkJggg=="
)
TOLERANCES = ("1", "2", "3", "4", "5", "6")
# Descriptions of the parameters that are strings, to follow "must be".
PARAMETER_HINTS = {
    "prompt": "a text that is not empty",
    "image_url": "an http(s) URL or a data URI",
    "image_data": "the base64 of an image of at most 10 MB",
}
IMAGE_PARAMETERS = ("image_url", "image_data")
NOT_AN_OBJECT = "The body must be one JSON object without duplicate keys."
ONE_IMAGE = "Send exactly one of image_url and image_data."


def to_integer(value: object) -> object:
    """Convert `3.0` to 3: JSON has one kind of number. Return other values unchanged."""
    if isinstance(value, float) and value.is_integer() and abs(value) < EXACT_INTEGER_MAX:
        return int(value)
    return value


def to_tolerance(value: object) -> object:
    """Convert a number to the string that fal expects. Return other values unchanged."""
    number = to_integer(value)
    return str(number) if isinstance(number, int) and not isinstance(number, bool) else value


Integer = Annotated[int, BeforeValidator(to_integer)]
GuidanceScale = Annotated[float, Field(ge=1, le=20)]
ImageCount = Annotated[int, Field(ge=1, le=4), BeforeValidator(to_integer)]
Steps = Annotated[int, Field(ge=10, le=50), BeforeValidator(to_integer)]
Tolerance = Annotated[
    Literal["1", "2", "3", "4", "5", "6"],
    BeforeValidator(to_tolerance),
    WithJsonSchema({"enum": [*TOLERANCES, *map(int, TOLERANCES)]}),
]
AspectRatio = Literal["21:9", "16:9", "4:3", "3:2", "1:1", "2:3", "3:4", "9:16", "9:21"]
ResolutionMode = Literal[
    "auto", "match_input", "1:1", "16:9", "21:9", "3:2", "2:3", "4:5", "5:4", "3:4", "4:3",
    "9:16", "9:21",
]  # fmt: skip


def require_field(name: str) -> JsonDict:
    """Return the JSON schema of objects in which a parameter is present and not null."""
    return {"required": [name], "properties": {name: {"type": "string"}}}


class KontextRequest(BaseModel):
    """An edit of one image: the parameters of all variants. A parameter that is null counts as
    missing; unknown parameters are ignored."""

    model_config = ConfigDict(
        strict=True,
        extra="ignore",
        json_schema_extra={
            "oneOf": [require_field("image_url"), require_field("image_data")],
            "examples": [{"prompt": "make it blue", "image_data": EXAMPLE_IMAGE, "seed": 42}],
        },
    )

    prompt: Annotated[str, Field(pattern=r"\S")] = Field(
        description="The change to make to the image.",
        examples=["Put a donut next to the flour."],
    )
    image_url: str | None = Field(
        None,
        description="The image: the http(s) URL of a JPEG or PNG of at most 100 MB, or a data URI "
        "of at most 10 MB. Send either this or `image_data`.",
        examples=["https://v3.fal.media/files/rabbit/rmgBxhwGYb2d3pl3x9sKf_output.png"],
    )
    image_data: str | None = Field(
        None,
        description="The image in base64: JPEG or PNG of at most 10 MB, with or without the prefix "
        "`data:image/...;base64,`. Send either this or `image_url`.",
        examples=[EXAMPLE_IMAGE],
    )
    seed: Integer | None = Field(
        None, description="The same seed and prompt give the same image.", examples=[42]
    )
    guidance_scale: GuidanceScale | None = Field(
        None, description="How closely the model follows the prompt.", examples=[3.5]
    )
    sync_mode: bool | None = Field(
        None, description="Return the images as data URIs.", examples=[False]
    )
    num_images: ImageCount | None = Field(None, description="Number of images.", examples=[1])
    output_format: Literal["jpeg", "png"] | None = Field(
        None, description="The format of the images.", examples=["jpeg"]
    )


class KontextProRequest(KontextRequest):
    """An edit by FLUX.1 Kontext [pro] or [max]."""

    enhance_prompt: bool | None = Field(
        None, description="Let fal.ai improve the prompt.", examples=[False]
    )
    safety_tolerance: Tolerance | None = Field(
        None,
        description="From 1, the strictest, to 6, as a string or number.",
        examples=["2"],
    )
    aspect_ratio: AspectRatio | None = Field(
        None,
        description="The aspect ratio of the result; by default that of the input.",
        examples=["16:9"],
    )


class KontextDevRequest(KontextRequest):
    """An edit by FLUX.1 Kontext [dev]."""

    num_inference_steps: Steps | None = Field(
        None, description="More steps are slower and give finer results.", examples=[28]
    )
    enable_safety_checker: bool | None = Field(
        None, description="Check the results for unsafe content.", examples=[True]
    )
    acceleration: Literal["none", "regular", "high"] | None = Field(
        None,
        description="More acceleration is faster and gives coarser results.",
        examples=["none"],
    )
    resolution_mode: ResolutionMode | None = Field(
        None, description="The aspect ratio of the result.", examples=["match_input"]
    )


class KontextImage(BaseModel):
    """An image generated by the model. Width and height are null if fal.ai does not report them."""

    url: str
    width: int | None
    height: int | None


class KontextResult(BaseModel):
    """The result of an edit."""

    images: Annotated[list[KontextImage], Field(min_length=1)]
    prompt: str = Field(description="The prompt that the model used.")


@dataclass(frozen=True, slots=True)
class Variant:
    """One of the models.

    endpoint: fal's id of the model.
    request: the parameters of the model.
    """

    endpoint: str
    request: type[KontextRequest]


# The keys are the paths of the API.
VARIANTS: Mapping[str, Variant] = {
    "kontext": Variant("fal-ai/flux-pro/kontext", KontextProRequest),
    "kontext/max": Variant("fal-ai/flux-pro/kontext/max", KontextProRequest),
    "kontext/dev": Variant("fal-ai/flux-kontext/dev", KontextDevRequest),
}
# The parameters of all variants.
PARAMETERS = {name for variant in VARIANTS.values() for name in variant.request.model_fields}


@dataclass(frozen=True, slots=True)
class Edit:
    """A parsed request.

    body: the input for fal as JSON.
    image_param: the parameter that contained the image.
    image: the bytes of the image; None for a URL.
    ignored: names of parameters that the variant does not have.
    """

    prompt: str
    body: bytes
    image_param: str
    image: bytes | None
    ignored: tuple[str, ...] = ()


def parse_edit(source: ByteSource, variant: Variant) -> Edit:
    """Parse the body of a request. Blocking: call it in a thread for large bodies.

    Raises: ProxyError 400 `body_unreadable`, `parameter_invalid`, `image_missing`,
    `image_ambiguous`, `image_unreadable`, `image_not_supported`, and the codes of `check_image`.
    """
    tree = parse_body(source)
    params = validate(tree, variant.request)
    names = [name for name in IMAGE_PARAMETERS if name in params]
    if len(names) != 1:
        raise ProxyError(400, "image_ambiguous" if names else "image_missing", ONE_IMAGE)
    name = names[0]
    text = params.pop(name)
    image = None
    if name == "image_data" or input_kind(text) is InputKind.DATA:
        image = decode_image(name, text.strip())
        text = data_uri(image)
    elif not is_web_url(text):
        raise invalid_parameter(variant.request, name)
    body = json.dumps({**params, "image_url": text}).encode()
    return Edit(params["prompt"], body, name, image, ignored_names(tree, variant.request))


def parse_body(source: ByteSource) -> dict[str, object]:
    """Parse a JSON object. Raises: ProxyError 400."""
    nonce = secrets.token_hex(8)
    tree = parse_input(source, nonce, long_string_bytes=STRING_MAX, remainder_max=REST_MAX)
    if tree is None:
        message = describe_invalid_bytes(source) or NOT_AN_OBJECT
        raise ProxyError(400, "body_unreadable", message)
    return tree


def validate(tree: Mapping[str, object], request: type[KontextRequest]) -> dict[str, Any]:
    """Return the parameters of a request that the variant supports, converted to fal's types.

    Raises: ProxyError 400.
    """
    for name, value in tree.items():
        start = value.prefix if isinstance(value, LongString) else value
        if name not in PARAMETERS and carries_image(name, start):
            message = f"{name} is not supported: send one image, as image_url or image_data."
            raise ProxyError(400, "image_not_supported", message)
    try:
        return request.model_validate(tree).model_dump(exclude_none=True)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        if first["type"] == "string_unicode" and name not in IMAGE_PARAMETERS:
            raise ProxyError(400, "body_unreadable", HALF_PAIR_MESSAGE) from None
        raise invalid_parameter(request, name) from None


def ignored_names(tree: Mapping[str, object], request: type[KontextRequest]) -> tuple[str, ...]:
    given = (name for name, value in tree.items() if value is not None)
    return tuple(name for name in given if name not in request.model_fields)


def invalid_parameter(request: type[KontextRequest], name: str) -> ProxyError:
    message = f"{name} must be {describe_parameter(request, name)}."
    return ProxyError(400, "parameter_invalid", message)


def describe_parameter(request: type[KontextRequest], name: str) -> str:
    """Describe the values of a parameter, to follow "must be"."""
    if name in PARAMETER_HINTS:
        return PARAMETER_HINTS[name]
    schema = request.model_json_schema()["properties"][name]["anyOf"][0]
    if "enum" in schema:
        return f"one of {', '.join(dict.fromkeys(map(str, schema['enum'])))}"
    if schema["type"] == "boolean":
        return "true or false"
    number = "a whole number" if schema["type"] == "integer" else "a number"
    bounds = f" from {schema['minimum']} to {schema['maximum']}" if "minimum" in schema else ""
    return number + bounds


def decode_image(name: str, text: str) -> bytes:
    """Return the image that a parameter contains. Raises: ProxyError 400."""
    pieces = decode_data_uri(text if input_kind(text) is InputKind.DATA else f"data:;base64,{text}")
    content = b"".join(pieces)
    if not pieces.is_complete:
        raise ProxyError(
            400, "image_unreadable", f"{name} must be {PARAMETER_HINTS['image_data']}."
        )
    if not content:
        raise ProxyError(400, "image_missing", f"{name} is empty.")
    try:
        check_image(content[:SNIFF_BYTES], len(content), INLINE_IMAGE_LIMITS, (name,))
    except InputRefused as error:
        raise ProxyError(400, error.code, f"{name}: {error.message}") from None
    return content


def data_uri(image: bytes) -> str:
    """Return a data URI with the media type that the bytes have."""
    return f"data:image/{sniff(image)};base64,{base64.b64encode(image).decode()}"


def is_web_url(text: str) -> bool:
    try:
        parts = urlsplit(text)
        is_complete = bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False
    return is_complete and input_kind(text) is InputKind.REMOTE and text.isprintable()
