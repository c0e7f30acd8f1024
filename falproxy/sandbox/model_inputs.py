"""Inputs of the sandbox's models, and the model itself."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from enum import StrEnum
from typing import Literal


class InputType(StrEnum):
    """Type of an input. IMAGE and IMAGES are URLs; OBJECT has inputs of its own."""

    STRING = "string"
    INTEGER = "integer"
    NUMBER = "number"
    BOOLEAN = "boolean"
    CHOICE = "choice"
    IMAGE = "image"
    IMAGES = "images"
    LORAS = "loras"
    IMAGE_SIZE = "image size"
    OBJECT = "object"


@dataclass(frozen=True, slots=True)
class ModelInput:
    """One input of a model.

    default: value if the input is missing. None means no default.
    minimum, maximum: inclusive bounds.
    choices: allowed values, for image sizes the names of the presets.
    fields: inputs of an object.
    """

    type: InputType
    default: object = None
    minimum: float | None = None
    maximum: float | None = None
    choices: tuple[str, ...] = ()
    is_required: bool = False
    fields: Mapping[str, "ModelInput"] = field(default_factory=dict)


Kind = Literal["image", "video", "audio"]
KINDS: Mapping[str, Kind] = {"video": "video", "audio": "audio", "audio_file": "audio"}
CHARACTERS = "1000 characters"


@dataclass(frozen=True, slots=True)
class Model:
    """One endpoint.

    price: USD for one unit.
    unit: "images", "megapixels", rounded up for each image, "videos", "audios", "seconds" of the
        output, "1000 characters" of the text, or "compute seconds".
    inference_seconds: duration of a call.
    output: output field: "images", or a single file: "image", "video", "audio" or "audio_file".
    extra_fields: other output fields.
    default_seconds: of a video or sound without an input for its length.
    audio_format: of a sound, "wav" or "mp3".
    streams: offers `/stream`.
    is_realtime: offers `/realtime`.
    """

    endpoint: str
    inputs: Mapping[str, ModelInput]
    price: Decimal
    unit: str
    inference_seconds: float
    output: str = "images"
    extra_fields: tuple[str, ...] = ("timings", "seed", "has_nsfw_concepts", "prompt")
    streams: bool = False
    is_realtime: bool = False
    default_seconds: float = 5.0
    audio_format: str = "wav"

    @property
    def kind(self) -> Kind:
        return KINDS.get(self.output, "image")

    @property
    def is_speech(self) -> bool:
        """Whether the model reads a text aloud."""
        return self.unit == CHARACTERS

    @property
    def app(self) -> str:
        return app_id(self.endpoint)


def app_id(endpoint: str) -> str:
    """Return the app of an endpoint: owner and alias, the first two segments of its id."""
    return "/".join(endpoint.split("/")[:2])


def string(default: str = "") -> ModelInput:
    return ModelInput(InputType.STRING, default)


def integer(default: int | None, minimum: int, maximum: int) -> ModelInput:
    return ModelInput(InputType.INTEGER, default, minimum, maximum)


def number(default: float, minimum: float, maximum: float) -> ModelInput:
    return ModelInput(InputType.NUMBER, default, minimum, maximum)


def boolean(default: bool) -> ModelInput:
    return ModelInput(InputType.BOOLEAN, default)


def choice(default: str | None, *choices: str) -> ModelInput:
    return ModelInput(InputType.CHOICE, default, choices=choices)


def required(input_type: InputType) -> ModelInput:
    return ModelInput(input_type, is_required=True)


def optional_string() -> ModelInput:
    return ModelInput(InputType.STRING)


def object_input(**fields: ModelInput) -> ModelInput:
    return ModelInput(InputType.OBJECT, fields=fields)
