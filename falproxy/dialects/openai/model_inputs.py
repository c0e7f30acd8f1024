"""Translation of a request into the inputs of a model: images, size, format, and the number of
calls that it needs.

Images, masks, LoRAs, `size`, `output_format` and a transparent background are sent or refused.
Other parameters that a model does not have are ignored, and listed in a header of the response.
"""

import random
import re
from collections.abc import Iterable, Mapping, Sequence
from math import log
from typing import NamedTuple

from falproxy.dialects.json_body import HAS_HALF_PAIR, has_half_pair
from falproxy.dialects.openai.errors import SCHEMA_UNAVAILABLE, ImagesError, invalid_parameter
from falproxy.dialects.openai.models import EDIT_MODEL, ResolvedModel
from falproxy.dialects.openai.request_images import ImageValue, RequestImages, Upload
from falproxy.dialects.openai.schema import EditRequest, ImageRequest
from falproxy.fal.estimates import SIZE_PRESETS
from falproxy.fal.image_fields import carries_image
from falproxy.fal.model_schema import (
    ANYTHING,
    IMAGE_INPUT,
    IMAGE_INPUTS,
    IMAGE_LIST_INPUT,
    IMAGE_LIST_INPUTS,
    MASK_INPUTS,
    SINGLE_IMAGE_INPUTS,
    InputSchema,
    ModelSchema,
    check_value,
    convert_number,
)
from falproxy.fal.registry.models import LORA_INPUTS

SEED_MAX = 2**31 - 1
# Images per call of a model whose schema has no limit.
IMAGES_MAX = 10_000  # a schema may name any number, such as an infinite one
DEFAULT_IMAGES_PER_CALL = 4
# Endings of endpoint ids of models that accept a list of images, for models without a schema.
LIST_MODEL_SUFFIXES = ("/edit", "/edit-image", "/multi")
FORMAT_INPUTS = ("output_format", "format")
FORMAT_SPELLINGS = {"jpeg": ("jpeg", "jpg"), "png": ("png",), "webp": ("webp",)}
# fal's inputs for which the OpenAI API has a parameter.
ALIASES = {"num_images": "n"}
# OpenAI's parameters that most models do not have. They are only sent to a model that has an input
# of the same name and accepts the value.
OPENAI_ONLY = (
    "background", "input_fidelity", "moderation", "output_compression", "quality", "style",
)  # fmt: skip
# OpenAI's parameters that no model of fal's has.
DROPPED = ("complexity", "frame_count", "frame_duration_ms", "svg")
# Parameters whose meaning is independent of the model.
ALWAYS_SERVED = (
    "model", "n", "partial_images", "prompt", "response_format", "safety_identifier", "stream",
    "user",
)  # fmt: skip
TRANSPARENT = "transparent"
# Endpoint ids of models that need an image and a mask.
MASK_MODEL = re.compile(r"/(?:inpaint|inpainting|fill)(?:/|$)")

AUTO = "auto"
PIXELS = re.compile(r"([1-9]\d{0,4})x([1-9]\d{0,4})", re.ASCII)
RATIO = re.compile(r"([1-9]\d{0,2}):([1-9]\d{0,2})", re.ASCII)
# Inputs that determine the aspect ratio by a string, by priority.
SHAPE_INPUTS = ("image_size", "aspect_ratio", "resolution_mode")
# The ratios that most models support, for models whose schema does not list any.
COMMON_RATIOS = ("21:9", "16:9", "4:3", "3:2", "1:1", "2:3", "3:4", "9:16", "9:21")
# Models whose `image_size` accepts any size in pixels, for models without a schema.
PIXEL_SIZE_MODELS = (
    "fal-ai/flux/dev", "fal-ai/flux/schnell", "fal-ai/flux-lora", "fal-ai/flux-pro/v1.1",
    "fal-ai/fast-sdxl", "fal-ai/fast-lightning-sdxl",
)  # fmt: skip


class ModelCall(NamedTuple):
    """One call of a model.

    is_unshared: the result must not come from the cache, because another call of the same request
        has the same inputs and has to give different images.
    """

    inputs: dict[str, object]
    is_unshared: bool


def require_description(params: ImageRequest, model: ResolvedModel, images: RequestImages) -> None:
    """Check that fal's description of the model is available if the request depends on it.

    Without it, inputs have their usual names. fal ignores an input that it does not know, and would
    generate another image than the one that was requested.

    Raises: ImagesError 503.
    """
    if model.schema is not None:
        return
    extra = params.model_extra or {}
    # fal refuses a call of these models without an image or a mask, whatever its name is.
    required: list[str] = []
    if EDIT_MODEL.search(model.endpoint):
        required += ["image", *IMAGE_LIST_INPUTS, *SINGLE_IMAGE_INPUTS]
    if MASK_MODEL.search(model.endpoint):
        required += ["mask", *MASK_INPUTS]
    needs = {
        **{name: is_indispensable(name, value) for name, value in extra.items()},
        **dict.fromkeys(images.files, True),
        "size": params.size not in (None, "", AUTO) and model.endpoint not in PIXEL_SIZE_MODELS,
        "output_format": params.output_format is not None,
        "background": extra.get("background") == TRANSPARENT,
        "mask": images.mask is not None,
        "image": bool(images.images),
    }
    names = (name for name, is_needed in needs.items() if is_needed and name not in required)
    if (name := next(names, None)) is not None:
        message = (
            f"fal.ai's description of {model.endpoint} cannot be read now, and {name} needs it. "
            f"Try again soon, or leave {name} out."
        )
        raise ImagesError(SCHEMA_UNAVAILABLE, message, {"Retry-After": "5"})


def is_indispensable(name: str, value: object) -> bool:
    """Return whether a model without this input generates something else than what was requested:
    it is an image, a mask, another file, or a LoRA."""
    return (name in LORA_INPUTS and bool(value)) or carries_image(name, value)


def build_calls(
    params: ImageRequest,
    model: ResolvedModel,
    images: Sequence[ImageValue] = (),
    mask: ImageValue | None = None,
    files: Mapping[str, Upload] | None = None,
) -> list[ModelCall]:
    """Return the calls of the model. files: by the names of the model's inputs.

    Raises: ImagesError 400, with the invalid parameter.
    """
    inputs: dict[str, object] = {"prompt": params.prompt}
    inputs |= image_inputs(images, mask, model)
    inputs |= checked_size_inputs(params.size, model)
    inputs |= format_inputs(params.output_format, model)
    if params.seed is not None and (model.schema is None or "seed" in model.schema.inputs):
        inputs["seed"] = params.seed
    for name, value in {**extra_inputs(params, model), **file_inputs(files or {}, model)}.items():
        if name in inputs:
            raise invalid_parameter(name, f"{name} was sent more than once.")
        inputs[name] = value
    check_required_images(inputs, model)
    return split_calls(inputs, params.n or 1, model.schema)


def ignored_parameters(params: ImageRequest, inputs: Mapping[str, object]) -> list[str]:
    """Return the names of the parameters that have no influence on the inputs of a call."""
    given = {**params.model_dump(exclude_none=True)}
    sent = {*inputs, *ALWAYS_SERVED, "size", "output_format"}
    return [name for name, value in given.items() if name not in sent and value != AUTO]


def image_inputs(
    images: Sequence[ImageValue], mask: ImageValue | None, model: ResolvedModel
) -> dict[str, object]:
    """Raises: ImagesError 400."""
    inputs: dict[str, object] = {}
    if images:
        name = image_input_name(len(images), model)
        if name in SINGLE_IMAGE_INPUTS and len(images) > 1:
            raise invalid_parameter("image", f"{model.endpoint} takes one image.")
        inputs[name] = images[0] if name in SINGLE_IMAGE_INPUTS else list(images)
    if mask is not None:
        mask_input = (
            MASK_INPUTS[0] if model.schema is None else model.schema.first_input(*MASK_INPUTS)
        )
        if mask_input is None:
            raise invalid_parameter("mask", f"{model.endpoint} takes no mask.")
        inputs[mask_input] = mask
    return inputs


def file_inputs(files: Mapping[str, Upload], model: ResolvedModel) -> dict[str, object]:
    """Return the files whose names are inputs of the model. Raises: ImagesError 400."""
    for name in files:
        if model.schema is not None and name not in model.schema.inputs:
            raise unknown_file(name, model)
    return dict(files)


def unknown_file(name: str, model: ResolvedModel) -> ImagesError:
    inputs = model.schema.inputs if model.schema else {}
    names = [
        each
        for each, input_schema in inputs.items()
        if carries_image(each, "x") and "number" not in input_schema.types
    ]
    accepted = f"It takes {', '.join(names)}." if names else "It takes no image and no mask."
    return invalid_parameter(name, f"{model.endpoint} takes no {name}. {accepted}")


def image_input_name(count: int, model: ResolvedModel) -> str:
    """Return the input for a number of images. Raises: ImagesError 400, the model has none."""
    schema = model.schema
    if schema is None:
        is_list = count > 1 or model.endpoint.endswith(LIST_MODEL_SUFFIXES)
        return IMAGE_LIST_INPUT if is_list else IMAGE_INPUT
    list_input = schema.first_input(*IMAGE_LIST_INPUTS)
    single_input = schema.first_input(*SINGLE_IMAGE_INPUTS)
    if list_input is None and single_input is None:
        raise invalid_parameter("image", f"{model.endpoint} takes no image.")
    if single_input is None or (list_input in schema.required and list_input is not None):
        return list_input or IMAGE_LIST_INPUT
    return single_input if count == 1 or list_input is None else list_input


def format_inputs(output_format: str | None, model: ResolvedModel) -> dict[str, object]:
    """Return the input for the output format. Raises: ImagesError 400, the model has no such."""
    if output_format is None or model.schema is None:
        return {}
    name = model.schema.first_input(*FORMAT_INPUTS)
    choices = (model.schema.choices(name) or (output_format,)) if name else ()
    value = next((name for name in FORMAT_SPELLINGS[output_format] if name in choices), None)
    if name is None or value is None:
        accepted = f"Its formats are {', '.join(choices)}." if choices else "Its format is fixed."
        message = f"output_format: {model.endpoint} does not generate {output_format}. {accepted}"
        raise invalid_parameter("output_format", message)
    return {name: value}


def extra_inputs(params: ImageRequest, model: ResolvedModel) -> dict[str, object]:
    """Return the parameters that are not part of the OpenAI API, but inputs of the model.

    Raises: ImagesError 400.
    """
    inputs: dict[str, object] = {}
    for name, value in (params.model_extra or {}).items():
        if name in ALIASES:
            raise invalid_parameter(name, f"Send {ALIASES[name]} instead of {name}.")
        is_empty_image = value in ("", [], {}) and carries_image(name, "x")
        if name in DROPPED or value is None or is_empty_image:
            continue
        input_schema = model.schema.inputs.get(name) if model.schema else None
        if input_schema is not None and isinstance(params, EditRequest) and isinstance(value, str):
            value = parse_text(input_schema, name, value)
        if is_sent(name, value, input_schema, model):
            is_checked = input_schema is not None and not model.is_listed
            inputs[name] = checked(name, value, input_schema) if is_checked else value
    return inputs


def checked(name: str, value: object, input_schema: InputSchema | None) -> object:
    """Return a value in the form that the model expects. Raises: ImagesError 400, it is invalid."""
    input_schema = input_schema or ANYTHING
    value = convert_number(value, input_schema)
    for problem in check_value(name, value, input_schema):
        raise invalid_parameter(name, problem.message)
    return value


def is_sent(
    name: str, value: object, input_schema: InputSchema | None, model: ResolvedModel
) -> bool:
    """Return whether the model gets a parameter.

    Raises: ImagesError 400, it does not, and would generate something else than what was requested.
    """
    if name in OPENAI_ONLY:
        if input_schema is not None and input_schema.accepts(value):
            return True
        if model.schema is not None and (name, value) == ("background", TRANSPARENT):
            message = f"background: {model.endpoint} does not generate transparent images."
            raise invalid_parameter(name, message)
        return False
    if input_schema is None and model.schema is not None and is_indispensable(name, value):
        raise unknown_file(name, model)
    return input_schema is not None or model.schema is None


def parse_text(input_schema: InputSchema, name: str, text: str) -> object:
    """Raises: ImagesError 400."""
    value = input_schema.parse(text)
    if has_half_pair(value):
        raise invalid_parameter(name, f"{name} {HAS_HALF_PAIR}.", "invalid_text")
    return value


def check_required_images(inputs: Mapping[str, object], model: ResolvedModel) -> None:
    """Raises: ImagesError 400, an image that the model requires is missing."""
    if model.schema is None:
        return
    for name in IMAGE_INPUTS:
        if name in model.schema.required and name not in inputs:
            param = "mask" if name in MASK_INPUTS else "image"
            raise invalid_parameter(
                param,
                f"{model.endpoint} needs an image ({name}): send it to /v1/images/edits.",
                "missing_required_parameter",
            )


def split_calls(
    inputs: dict[str, object], count: int, schema: ModelSchema | None
) -> list[ModelCall]:
    """Return the calls that generate a number of images. Their seeds differ, because calls with
    equal inputs would share one result."""
    model_calls: list[ModelCall] = []
    done = 0
    for size in batch_sizes(count, schema):
        call_inputs = dict(inputs)
        if size != default_count(schema):
            call_inputs["num_images"] = size
        has_seed = "seed" in call_inputs
        if done and has_seed:
            call_inputs["seed"] = offset_seed(call_inputs["seed"], done)
        elif done and schema is not None and "seed" in schema.inputs:
            call_inputs["seed"] = random.randint(1, SEED_MAX)
            has_seed = True
        model_calls.append(ModelCall(call_inputs, is_unshared=bool(done) and not has_seed))
        done += size
    return model_calls


def offset_seed(seed: object, offset: int) -> object:
    return seed + offset if isinstance(seed, int) else seed


def batch_sizes(count: int, schema: ModelSchema | None) -> list[int]:
    """Return the number of images of each call; 1 for each if the model has no `num_images`."""
    input_schema = schema.inputs.get("num_images") if schema else None
    limit = 1
    if input_schema is not None:
        limit = int(min(max(1, input_schema.maximum or DEFAULT_IMAGES_PER_CALL), IMAGES_MAX))
    return [min(limit, count - done) for done in range(0, count, limit)]


def default_count(schema: ModelSchema | None) -> object:
    """Return the number of images that the model generates without `num_images`."""
    input_schema = schema.inputs.get("num_images") if schema else None
    if input_schema is None or input_schema.default is None:
        return 1
    return input_schema.default


class PixelSize(NamedTuple):
    width: int
    height: int


class SizeUnknown(ValueError):
    """A size that is neither in pixels nor a value that the model accepts."""


def checked_size_inputs(text: str | None, model: ResolvedModel) -> dict[str, object]:
    """Return the inputs for the size of the images. Raises: ImagesError 400."""
    try:
        inputs = size_inputs(text, model.schema, model.endpoint)
    except SizeUnknown:
        raise invalid_parameter("size", "The size must be like 1024x1024, or auto.") from None
    if not inputs and text not in (None, "", AUTO) and model.schema is not None:
        message = (
            f"The size of the images of {model.endpoint} cannot be set. Send auto as the size."
        )
        raise invalid_parameter("size", message)
    return inputs


def size_inputs(text: str | None, schema: ModelSchema | None, endpoint: str) -> dict[str, object]:
    """Return the inputs for the size of the images. Empty for `auto`, and for models whose size
    cannot be set.

    text: the `size` of the request.
    schema: None if it is unavailable.
    Raises: SizeUnknown.
    """
    if text is None or text in ("", AUTO):
        return {}
    if schema is not None:
        for name in SHAPE_INPUTS:
            if text in schema.choices(name):
                return {name: text}
    size = parse_size(text)
    if schema is None:
        return {"image_size": size._asdict()} if endpoint in PIXEL_SIZE_MODELS else {}
    return nearest_inputs(size, schema)


def parse_size(text: str) -> PixelSize:
    """Raises: SizeUnknown."""
    match = PIXELS.fullmatch(text)
    if match is None:
        raise SizeUnknown(text)
    return PixelSize(int(match[1]), int(match[2]))


def nearest_inputs(size: PixelSize, schema: ModelSchema) -> dict[str, object]:
    """Return the inputs for a size, or for the nearest one that the model supports."""
    image_size = schema.inputs.get("image_size")
    if image_size is not None and {"width", "height"} <= image_size.keys:
        return {"image_size": size._asdict()}
    if image_size is None and schema.first_input("width") and schema.first_input("height"):
        return dict(size._asdict())
    for name in SHAPE_INPUTS:
        input_schema = schema.inputs.get(name)
        if input_schema is None:
            continue
        values = schema.choices(name)
        if not values and input_schema.accepts_any_string and name != "image_size":
            values = COMMON_RATIOS
        if (nearest := nearest_value(size, values)) is not None:
            return {name: nearest}
    return {}


def nearest_value(size: PixelSize, values: Iterable[str]) -> str | None:
    """Return the value with the nearest aspect ratio, and of those the one with the nearest area.
    None if no value describes a shape."""
    shapes = [(value, shape) for value in values if (shape := shape_of(value)) is not None]
    if not shapes:
        return None
    return min(shapes, key=lambda entry: distance(size, entry[1]))[0]


def shape_of(value: str) -> tuple[int, int] | None:
    """Return width and height of a value: pixels, a ratio, or a preset. None for other values."""
    match = PIXELS.fullmatch(value) or RATIO.fullmatch(value)
    return (int(match[1]), int(match[2])) if match else SIZE_PRESETS.get(value)


def distance(size: PixelSize, shape: tuple[int, int]) -> tuple[float, float]:
    """Return the differences in aspect ratio and in area. They are logarithmic, so that twice as
    wide is as far away as twice as high."""
    width, height = shape
    ratio = abs(log(size.width / size.height) - log(width / height))
    return round(ratio, 6), abs(log(size.width * size.height) - log(width * height))
