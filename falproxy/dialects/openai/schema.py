"""The bodies of the OpenAI images API, as they are checked and described."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic.config import JsonDict

N_MAX = 10
PARTIAL_IMAGES_MAX = 3
PROMPT_MAX = 32_000

EXAMPLE_PROMPT = "a heron at dawn, watercolour"
EXAMPLE_URL = "https://v3.fal.media/files/lion/heron.jpeg"


class ImageRequest(BaseModel):
    """What every request for pictures may say. Whatever else it says is for the model, by the
    model's own names (`extra_body` in OpenAI's clients)."""

    model_config = ConfigDict(extra="allow")

    prompt: str = Field(
        min_length=1, max_length=PROMPT_MAX, description="What to draw.", examples=[EXAMPLE_PROMPT]
    )
    model: str | None = Field(
        default=None,
        max_length=200,
        description="A name from `GET /v1/models`, or any of fal's endpoint ids.",
        examples=["flux-dev", "fal-ai/flux/dev"],
    )
    n: int | None = Field(
        default=None,
        ge=1,
        le=N_MAX,
        description="How many pictures. What is more than the model makes at once takes several "
        "calls, whose seeds differ.",
        examples=[1],
    )
    size: str | None = Field(
        default=None,
        description="`WIDTHxHEIGHT`, `auto`, or one of the model's own words. A model that only "
        "has presets or aspect ratios gets the nearest.",
        examples=["1024x1024", "1536x1024", "auto"],
    )
    seed: int | None = Field(
        default=None,
        description="The same seed makes the same picture. Where several calls are made, each "
        "gets the seed plus the number of pictures before it.",
        examples=[7],
    )
    response_format: Literal["url", "b64_json"] | None = Field(
        default=None,
        description="Addresses of the pictures (`url`, the default), or the pictures.",
        examples=["url"],
    )
    output_format: Literal["png", "jpeg", "webp"] | None = Field(
        default=None,
        description="The pictures' format, where the model lets choose.",
        examples=["png"],
    )
    stream: bool | None = Field(
        default=None,
        description="Server-sent events instead of a document.",
        examples=[False],
    )
    partial_images: int | None = Field(
        default=None,
        ge=0,
        le=PARTIAL_IMAGES_MAX,
        description="How many unfinished pictures a stream shows, where the model does.",
        examples=[0],
    )
    user: str | None = Field(
        default=None,
        max_length=512,
        description="The end user, for the ledger.",
        examples=["user-42"],
    )
    safety_identifier: str | None = Field(
        default=None, max_length=512, description="As `user`.", examples=["user-42"]
    )


class GenerationRequest(ImageRequest):
    """`POST /v1/images/generations`."""


def describe_form(schema: JsonDict) -> None:
    """Describes a form: no text of it is null, and its files are not among the texts."""
    properties = schema["properties"]
    assert isinstance(properties, dict)
    for field in properties.values():
        assert isinstance(field, dict)
        alternatives = field.pop("anyOf", None)
        if isinstance(alternatives, list) and isinstance(alternatives[0], dict):
            field.update(alternatives[0])
            del field["default"]
    file: JsonDict = {"type": "string", "format": "binary"}
    properties["image"] = {**file, "description": "The picture to edit: PNG, JPEG, WebP, GIF."}
    pictures = "Several pictures, for a model that takes them; instead of `image`."
    properties["image[]"] = {
        "type": "array",
        "items": file,
        "description": pictures,
        "examples": [[]],  # a form to be filled in begins without any
    }
    properties["mask"] = {**file, "description": "Where to edit, for a model that takes a mask."}


class EditRequest(ImageRequest):
    """The texts of a form for `POST /v1/images/edits`; its files are `image` or `image[]`, and
    `mask`."""

    model_config = ConfigDict(extra="allow", json_schema_extra=describe_form)

    prompt: str = Field(
        min_length=1,
        max_length=PROMPT_MAX,
        description="What is to become of the picture.",
        examples=["make it blue"],
    )
    model: str | None = Field(
        default=None,
        max_length=200,
        description="A name from `GET /v1/models`, or any of fal's endpoint ids. Without it, the "
        "first of those names whose model takes a picture.",
        examples=["kontext", "fal-ai/flux-pro/kontext"],
    )


class ImageData(BaseModel):
    """One picture, by its address or in base64."""

    url: str | None = Field(default=None, examples=[EXAMPLE_URL])
    b64_json: str | None = None
    revised_prompt: str | None = Field(
        default=None, description="The prompt, where the model changed it."
    )


class ImagesResponse(BaseModel):
    """The pictures, in the order of the calls that made them."""

    created: int = Field(description="Unix time in seconds.", examples=[1_764_000_000])
    data: list[ImageData]
    output_format: str | None = Field(default=None, examples=["jpeg"])
    size: str | None = Field(default=None, examples=["1024x768"])


class ImageEvent(BaseModel):
    """What a stream sends: an unfinished picture, or a finished one."""

    type: Literal[
        "image_generation.partial_image",
        "image_generation.completed",
        "image_edit.partial_image",
        "image_edit.completed",
    ]
    b64_json: str
    created_at: int
    size: str
    output_format: str
    quality: str = "auto"
    background: str = "auto"
    partial_image_index: int | None = None


class ModelInfo(BaseModel):
    """A model. fal does not tell when it was made."""

    id: str = Field(examples=["flux-dev"])
    object: Literal["model"] = "model"
    created: int = 0
    owned_by: str = Field(examples=["fal-ai"])
    endpoint: str = Field(description="fal's endpoint id.", examples=["fal-ai/flux/dev"])


class ModelList(BaseModel):
    """The models that have a name here. Any other of fal's is called by its endpoint id."""

    object: Literal["list"] = "list"
    data: list[ModelInfo]


class ErrorDetail(BaseModel):
    """What went wrong. param: the parameter that it is about."""

    message: str
    type: str = Field(examples=["invalid_request_error"])
    param: str | None = Field(default=None, examples=["size"])
    code: str | None = Field(default=None, examples=["model_not_found"])


class ErrorResponse(BaseModel):
    """Any failure, also as an event of a stream that had begun."""

    error: ErrorDetail
