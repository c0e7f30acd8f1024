"""What may be asked of `/kontext`, `/kontext/max` and `/kontext/dev`: the parameters of each as a
pydantic model, and the image, read and checked."""

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

from falproxy.errors import ProxyError
from falproxy.fal.image_formats import Format
from falproxy.fal.input_json import EXACT_INTEGER_MAX, ByteSource, parse_input
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
# Pictures behind a URL, and those that stand in the request itself; max_bytes: once decoded.
URL_IMAGE_LIMITS = ImageLimits(formats=(Format.JPEG, Format.PNG))
INLINE_IMAGE_LIMITS = replace(URL_IMAGE_LIMITS, max_bytes=10 * MIB)
# Bytes of a string that are held. Ten MiB in base64 are 14, and white space may be between them.
STRING_MAX = 20 * MIB
REST_MAX = 2 * STRING_MAX
# A red PNG of 64 x 48 pixels.
EXAMPLE_IMAGE = (
    "iVBORw0KGgoAAAANSUhEUgAAAEAAAAAwCAIAAAAuKetIAAAAQElEQVR42u3PQQ0AAAgEoNP+nbWCXzdoQE1+6wgI"
    "CAgICAgICAgICAgICAgICAgICAgICAgICAgICAgICAgIHC36dwFfYw5C7wAAAABJRU5ErkJggg=="
)
TOLERANCES = ("1", "2", "3", "4", "5", "6")
# What the parameters take whose schema is a string's.
PARAMETER_HINTS = {
    "prompt": "a text that is not empty",
    "image_url": "an http(s) URL or a data URI",
    "image_data": "the base64 of a picture of at most 10 MB",
}
ONE_IMAGE = "Send exactly one of image_url and image_data."


def to_integer(value: object) -> object:
    """JSON has one kind of number: `3.0` is the integer 3."""
    is_whole = isinstance(value, float) and value.is_integer() and abs(value) < EXACT_INTEGER_MAX
    return int(value) if is_whole and isinstance(value, float) else value


def to_tolerance(value: object) -> object:
    """fal takes the number as text."""
    whole = to_integer(value)
    return str(whole) if isinstance(whole, int) and not isinstance(whole, bool) else value


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
    """JSON schema: the parameter is there and not null."""
    return {"required": [name], "properties": {name: {"type": "string"}}}


class KontextRequest(BaseModel):
    """An edit of one picture, in what all variants take. null is as good as nothing; other keys
    are not looked at."""

    model_config = ConfigDict(
        strict=True,
        extra="ignore",
        json_schema_extra={
            "oneOf": [require_field("image_url"), require_field("image_data")],
            "examples": [{"prompt": "make it blue", "image_data": EXAMPLE_IMAGE, "seed": 42}],
        },
    )

    prompt: Annotated[str, Field(pattern=r"\S")] = Field(
        description="What is to become of the picture.",
        examples=["Put a donut next to the flour."],
    )
    image_url: str | None = Field(
        None,
        description="Where the picture is, http(s), JPEG or PNG of at most 100 MB; or the picture "
        "itself as a data URI of at most 10 MB. This or `image_data`.",
        examples=["https://v3.fal.media/files/rabbit/rmgBxhwGYb2d3pl3x9sKf_output.png"],
    )
    image_data: str | None = Field(
        None,
        description="The picture in base64, JPEG or PNG of at most 10 MB, with or without "
        "`data:image/...;base64,` before it. This or `image_url`.",
        examples=[EXAMPLE_IMAGE],
    )
    seed: Integer | None = Field(
        None, description="The same seed and prompt give the same picture.", examples=[42]
    )
    guidance_scale: GuidanceScale | None = Field(
        None, description="How closely the prompt is followed.", examples=[3.5]
    )
    sync_mode: bool | None = Field(
        None, description="Whether pictures come as data URIs.", examples=[False]
    )
    num_images: ImageCount | None = Field(None, description="How many pictures.", examples=[1])
    output_format: Literal["jpeg", "png"] | None = Field(
        None, description="The format of the pictures.", examples=["jpeg"]
    )


class KontextProRequest(KontextRequest):
    """An edit by FLUX.1 Kontext [pro] or [max]."""

    enhance_prompt: bool | None = Field(
        None, description="Whether fal.ai may make more of the prompt.", examples=[False]
    )
    safety_tolerance: Tolerance | None = Field(
        None, description="From 1, the strictest, to 6, as text or number.", examples=["2"]
    )
    aspect_ratio: AspectRatio | None = Field(
        None, description="Of the result; without it, that of the input.", examples=["16:9"]
    )


class KontextDevRequest(KontextRequest):
    """An edit by FLUX.1 Kontext [dev]."""

    num_inference_steps: Steps | None = Field(
        None, description="More of them are slower and finer.", examples=[28]
    )
    enable_safety_checker: bool | None = Field(
        None, description="Whether results are checked.", examples=[True]
    )
    acceleration: Literal["none", "regular", "high"] | None = Field(
        None, description="More of it is faster and coarser.", examples=["none"]
    )
    resolution_mode: ResolutionMode | None = Field(
        None, description="The shape of the result.", examples=["match_input"]
    )


class KontextImage(BaseModel):
    """A picture that was made. width and height are null when fal.ai says none."""

    url: str
    width: int | None
    height: int | None


class KontextResult(BaseModel):
    """What became of an edit. prompt: the one that was used."""

    images: Annotated[list[KontextImage], Field(min_length=1)]
    prompt: str


@dataclass(frozen=True, slots=True)
class Variant:
    """endpoint: fal's id. request: what it takes."""

    endpoint: str
    request: type[KontextRequest]


# Variant → what it is. The names are the paths of the API.
VARIANTS: Mapping[str, Variant] = {
    "kontext": Variant("fal-ai/flux-pro/kontext", KontextProRequest),
    "kontext/max": Variant("fal-ai/flux-pro/kontext/max", KontextProRequest),
    "kontext/dev": Variant("fal-ai/flux-kontext/dev", KontextDevRequest),
}


@dataclass(frozen=True, slots=True)
class Edit:
    """A request that was read. body: fal's input as JSON. image_name: the parameter that the
    image came in; image: its bytes, None where it is behind a URL."""

    prompt: str
    body: bytes
    image_param: str
    image: bytes | None


def parse_edit(source: ByteSource, variant: Variant) -> Edit:
    """Reads a request's body. Blocks: call it in a thread when there is much of it.

    Raises: ProxyError 400 `body_unreadable`, `parameter_invalid`, `image_missing`,
    `image_ambiguous`, `image_unreadable`, and what `check_image` refuses.
    """
    given = parse_parameters(source, variant.request)
    names = [name for name in ("image_url", "image_data") if name in given]
    if len(names) != 1:
        raise ProxyError(400, "image_ambiguous" if names else "image_missing", ONE_IMAGE)
    name = names[0]
    text = given.pop(name)
    image = None
    if name == "image_data" or input_kind(text) is InputKind.DATA:
        image = decode_image(name, text.strip())
        text = data_uri(image)
    elif not is_web_url(text):
        raise invalid_parameter(variant.request, name)
    body = json.dumps({**given, "image_url": text}).encode()
    return Edit(given["prompt"], body, name, image)


def parse_parameters(source: ByteSource, request: type[KontextRequest]) -> dict[str, Any]:
    """What was given of what the variant takes, as fal takes it. Raises: ProxyError 400."""
    nonce = secrets.token_hex(8)
    tree = parse_input(source, nonce, long_string_bytes=STRING_MAX, remainder_max=REST_MAX)
    if tree is None:
        message = "The body must be one JSON object, each of its keys once."
        raise ProxyError(400, "body_unreadable", message)
    try:
        return request.model_validate(tree).model_dump(exclude_none=True)
    except ValidationError as error:
        raise invalid_parameter(request, str(error.errors()[0]["loc"][0])) from None


def invalid_parameter(request: type[KontextRequest], name: str) -> ProxyError:
    message = f"{name} must be {describe_parameter(request, name)}."
    return ProxyError(400, "parameter_invalid", message)


def describe_parameter(request: type[KontextRequest], name: str) -> str:
    """What a parameter takes, in words that follow "must be"."""
    if name in PARAMETER_HINTS:
        return PARAMETER_HINTS[name]
    schema = request.model_json_schema()["properties"][name]["anyOf"][0]
    if "enum" in schema:
        return f"one of {', '.join(dict.fromkeys(map(str, schema['enum'])))}"
    if schema["type"] == "boolean":
        return "true or false"
    words = "a whole number" if schema["type"] == "integer" else "a number"
    bounds = f" from {schema['minimum']} to {schema['maximum']}" if "minimum" in schema else ""
    return words + bounds


def decode_image(name: str, text: str) -> bytes:
    """The picture that stands in a parameter. Raises: ProxyError 400."""
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
    """With the media type that the bytes have."""
    return f"data:image/{sniff(image)};base64,{base64.b64encode(image).decode()}"


def is_web_url(text: str) -> bool:
    try:
        parts = urlsplit(text)
        is_whole = bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False
    return is_whole and input_kind(text) is InputKind.REMOTE and text.isprintable()
