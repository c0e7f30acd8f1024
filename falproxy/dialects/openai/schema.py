"""Pydantic classes for the requests and responses of the OpenAI images API."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic.config import JsonDict

N_MAX = 10
PARTIAL_IMAGES_MAX = 3
PROMPT_MAX = 32_000

EXAMPLE_PROMPT = "a heron at dawn, watercolour"
EXAMPLE_URL = "https://v3.fal.media/files/lion/heron.jpeg"


class ImageRequest(BaseModel):
    """The parameters of all requests for images. Other parameters are passed to the model as they
    are (`extra_body` in OpenAI's clients)."""

    model_config = ConfigDict(extra="allow")

    prompt: str = Field(
        min_length=1,
        max_length=PROMPT_MAX,
        description="A description of the image.",
        examples=[EXAMPLE_PROMPT],
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
        description="Number of images. If the model generates fewer images per call, several calls "
        "with different seeds are made.",
        examples=[1],
    )
    size: str | None = Field(
        default=None,
        description="`WIDTHxHEIGHT`, `auto`, or a value that the model itself accepts. For models "
        "that only have presets or aspect ratios, the nearest one is used.",
        examples=["1024x1024", "1536x1024", "auto"],
    )
    seed: int | None = Field(
        default=None,
        description="The same seed gives the same image. If several calls are made, each is sent "
        "with the seed plus the number of images of the calls before it.",
        examples=[7],
    )
    response_format: Literal["url", "b64_json"] | None = Field(
        default=None,
        description="Return URLs of the images (`url`), or the images in base64 (`b64_json`). The "
        "default is base64 for edits and for models whose name begins with `gpt-image` or "
        "`chatgpt-image`, as in OpenAI's API, and `url` for others.",
        examples=["url"],
    )
    output_format: Literal["png", "jpeg", "webp"] | None = Field(
        default=None,
        description="The format of the images. One that the model does not support is an error.",
        examples=["png"],
    )
    stream: bool | None = Field(
        default=None,
        description="Return server-sent events instead of a document.",
        examples=[False],
    )
    partial_images: int | None = Field(
        default=None,
        ge=0,
        le=PARTIAL_IMAGES_MAX,
        description="Number of unfinished images in a stream, for models that support them.",
        examples=[0],
    )
    user: str | None = Field(
        default=None,
        description="An id of the end user, as `x-falproxy-user`: up to 128 characters.",
        examples=["user-42"],
    )
    safety_identifier: str | None = Field(
        default=None,
        description="Same as `user`, which is used if both are sent.",
        examples=["user-42"],
    )


class GenerationRequest(ImageRequest):
    """The body of `POST /v1/images/generations`."""


def describe_form(schema: JsonDict) -> None:
    """Adapt the schema of a class to the form: the strings of a form are never null, and its files
    are not fields of the class."""
    properties = schema["properties"]
    assert isinstance(properties, dict)
    for field in properties.values():
        assert isinstance(field, dict)
        alternatives = field.pop("anyOf", None)
        if isinstance(alternatives, list) and isinstance(alternatives[0], dict):
            field.update(alternatives[0])
            del field["default"]
    file: JsonDict = {"type": "string", "format": "binary"}
    # Without `image[]`: generators make the same identifier of both names.
    properties["image"] = {
        **file,
        "description": "The image to edit: PNG, JPEG, WebP or GIF. Models that support several "
        "images get one from each part with this name, or with the name `image[]`.",
    }
    properties["mask"] = {**file, "description": "The area to edit, for models that support it."}


class EditRequest(ImageRequest):
    """The form of `POST /v1/images/edits`, whose files are `image` or `image[]`, and `mask`; or the
    JSON body, with URLs in `images` and `mask`."""

    model_config = ConfigDict(extra="allow", json_schema_extra=describe_form)

    prompt: str = Field(
        min_length=1,
        max_length=PROMPT_MAX,
        description="The change to make to the image.",
        examples=["make it blue"],
    )
    model: str | None = Field(
        default=None,
        max_length=200,
        description="A name from `GET /v1/models`, or any of fal's endpoint ids. The default is "
        "the first name whose model edits images.",
        examples=["kontext", "fal-ai/flux-pro/kontext"],
    )


class ImageData(BaseModel):
    """One image, as a URL or in base64."""

    url: str | None = Field(default=None, examples=[EXAMPLE_URL])
    b64_json: str | None = None
    revised_prompt: str | None = Field(
        default=None, description="The prompt that was used, if the model changed it."
    )


class ImagesResponse(BaseModel):
    """The generated images."""

    created: int = Field(description="Unix time in seconds.", examples=[1_764_000_000])
    data: list[ImageData]
    output_format: str | None = Field(default=None, examples=["jpeg"])
    size: str | None = Field(default=None, examples=["1024x768"])


class ImageEvent(BaseModel):
    """An event of a stream: an unfinished image, or a finished one."""

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
    """A model."""

    id: str = Field(examples=["flux-dev"])
    object: Literal["model"] = "model"
    created: int = Field(default=0, description="Always 0: fal does not publish the date.")
    owned_by: str = Field(examples=["fal-ai"])
    endpoint: str = Field(description="fal's endpoint id.", examples=["fal-ai/flux/dev"])


class ModelList(BaseModel):
    """The models that have a name. Other models of fal are called by their endpoint ids."""

    object: Literal["list"] = "list"
    data: list[ModelInfo]


class ErrorDetail(BaseModel):
    """The description of an error."""

    message: str
    type: str = Field(examples=["invalid_request_error"])
    param: str | None = Field(
        default=None, description="The parameter that caused the error.", examples=["size"]
    )
    code: str | None = Field(default=None, examples=["model_not_found"])


class ErrorResponse(BaseModel):
    """An error. Also sent as an event, if a stream has already begun."""

    error: ErrorDetail
