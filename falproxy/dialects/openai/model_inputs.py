"""A request in a model's own terms: the inputs of every call that it takes."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from falproxy.dialects.openai.errors import invalid_parameter
from falproxy.dialects.openai.model_schema import ModelSchema
from falproxy.dialects.openai.schema import EditRequest, ImageRequest
from falproxy.dialects.openai.sizes import SizeUnknown, size_inputs
from falproxy.spool import Spool

SEED_MAX = 2**31 - 1
# Pictures that a model makes at once which does not say how many it can.
DEFAULT_IMAGES_PER_CALL = 4
IMAGE_LIST_INPUT, IMAGE_INPUT = "image_urls", "image_url"
MASK_INPUTS = ("mask_url", "mask_image_url")
IMAGE_INPUTS = (
    IMAGE_LIST_INPUT,
    IMAGE_INPUT,
    *MASK_INPUTS,
    "reference_image_url",
    "base_image_url",
    "swap_image_url",
)
# Ends of the ids of models that take a list of pictures, known without their documents.
LIST_MODEL_SUFFIXES = ("/edit", "/edit-image", "/multi")
FORMAT_INPUTS = ("output_format", "format")
FORMAT_SPELLINGS = {"jpeg": ("jpeg", "jpg"), "png": ("png",), "webp": ("webp",)}
# What this API has a word of its own for.
ALIASES = {"num_images": "n"}
# OpenAI's parameters that mean nothing to most models: only a model that has the same parameter
# with the same value gets them.
OPENAI_ONLY = (
    "background", "input_fidelity", "moderation", "output_compression", "quality", "style",
)  # fmt: skip
# And those that no model of fal's has: they are dropped.
DROPPED = ("complexity", "frame_count", "frame_duration_ms", "markup", "svg")


@dataclass(frozen=True, slots=True)
class Upload:
    """A file of a form, to stand in a call as a data URI."""

    content: Spool
    content_type: str


class ResolvedModel(NamedTuple):
    """A model that is asked. takes: None where nobody knows what it takes."""

    endpoint: str
    schema: ModelSchema | None


class ModelCall(NamedTuple):
    """One of the calls that a request takes. is_alone: whether its result must not be another's,
    because nothing in its input tells the two apart."""

    inputs: dict[str, object]
    is_unshared: bool


def build_calls(
    params: ImageRequest,
    model: ResolvedModel,
    files: Sequence[Upload] = (),
    mask: Upload | None = None,
) -> list[ModelCall]:
    """Raises: ImagesError 400, with the parameter that does not fit."""
    inputs: dict[str, object] = {"prompt": params.prompt}
    inputs |= image_inputs(files, mask, model)
    try:
        inputs |= size_inputs(params.size, model.schema, model.endpoint)
    except SizeUnknown:
        raise invalid_parameter("size", "The size must be like 1024x1024, or auto.") from None
    inputs |= format_inputs(params.output_format, model.schema)
    if params.seed is not None and (model.schema is None or "seed" in model.schema.inputs):
        inputs["seed"] = params.seed
    inputs |= extra_inputs(params, model.schema)
    check_required_images(inputs, model)
    return split_calls(inputs, params.n or 1, model.schema)


def image_inputs(
    files: Sequence[Upload], mask: Upload | None, model: ResolvedModel
) -> dict[str, object]:
    """Raises: ImagesError 400."""
    inputs: dict[str, object] = {}
    if files:
        name = image_input_name(len(files), model)
        if name == IMAGE_INPUT and len(files) > 1:
            raise invalid_parameter("image", f"{model.endpoint} takes one picture.")
        inputs[name] = files[0] if name == IMAGE_INPUT else list(files)
    if mask is not None:
        place = MASK_INPUTS[0] if model.schema is None else model.schema.first_input(*MASK_INPUTS)
        if place is None:
            raise invalid_parameter("mask", f"{model.endpoint} takes no mask.")
        inputs[place] = mask
    return inputs


def image_input_name(count: int, model: ResolvedModel) -> str:
    """The input that takes so many pictures. Raises: ImagesError 400, there is none."""
    takes = model.schema
    if takes is None:
        return (
            IMAGE_LIST_INPUT
            if count > 1 or model.endpoint.endswith(LIST_MODEL_SUFFIXES)
            else IMAGE_INPUT
        )
    names = [name for name in (IMAGE_LIST_INPUT, IMAGE_INPUT) if name in takes.inputs]
    if not names:
        raise invalid_parameter("image", f"{model.endpoint} takes no picture.")
    if len(names) == 2 and count == 1:
        return IMAGE_INPUT if IMAGE_LIST_INPUT not in takes.required else IMAGE_LIST_INPUT
    return names[0]


def format_inputs(output_format: str | None, schema: ModelSchema | None) -> dict[str, object]:
    """A format that the model does not have is left for it to choose."""
    name = schema.first_input(*FORMAT_INPUTS) if schema else None
    if schema is None or output_format is None or name is None:
        return {}
    known = schema.choices(name) or (output_format,)
    spelled = next((word for word in FORMAT_SPELLINGS[output_format] if word in known), None)
    return {} if spelled is None else {name: spelled}


def extra_inputs(params: ImageRequest, schema: ModelSchema | None) -> dict[str, object]:
    """What a request says by the model's own names. Raises: ImagesError 400."""
    inputs: dict[str, object] = {}
    for name, value in (params.model_extra or {}).items():
        if name in ALIASES:
            raise invalid_parameter(name, f"Say {ALIASES[name]} instead of {name}.")
        if name in DROPPED or value is None:
            continue
        known = schema.inputs.get(name) if schema else None
        if known is not None and isinstance(params, EditRequest) and isinstance(value, str):
            value = known.parse(value)
        if name in OPENAI_ONLY:
            if known is not None and known.accepts(value):
                inputs[name] = value
        elif known is not None or schema is None:
            inputs[name] = value
    return inputs


def check_required_images(inputs: Mapping[str, object], model: ResolvedModel) -> None:
    """Raises: ImagesError 400, the model needs a picture that is not there."""
    if model.schema is None:
        return
    for name in IMAGE_INPUTS:
        if name in model.schema.required and name not in inputs:
            param = "mask" if name in MASK_INPUTS else "image"
            raise invalid_parameter(
                param,
                f"{model.endpoint} needs a picture ({name}): send it to /v1/images/edits.",
                "missing_required_parameter",
            )


def split_calls(
    inputs: dict[str, object], count: int, schema: ModelSchema | None
) -> list[ModelCall]:
    """The calls that make so many pictures. No two are equal: equal calls may share a result."""
    made: list[ModelCall] = []
    done = 0
    for size in batch_sizes(count, schema):
        own = dict(inputs)
        if size != default_count(schema):
            own["num_images"] = size
        has_seed = "seed" in own
        if done and has_seed:
            own["seed"] = offset_seed(own["seed"], done)
        elif done and schema is not None and "seed" in schema.inputs:
            own["seed"] = random.randint(1, SEED_MAX)
            has_seed = True
        made.append(ModelCall(own, is_unshared=bool(done) and not has_seed))
        done += size
    return made


def offset_seed(seed: object, offset: int) -> object:
    return seed + offset if isinstance(seed, int) else seed


def batch_sizes(count: int, schema: ModelSchema | None) -> list[int]:
    """How many pictures each call makes. One by one where nobody knows how to ask for more."""
    known = schema.inputs.get("num_images") if schema else None
    most = 1 if known is None else max(1, int(known.maximum or DEFAULT_IMAGES_PER_CALL))
    return [min(most, count - done) for done in range(0, count, most)]


def default_count(schema: ModelSchema | None) -> object:
    """How many pictures a model makes that is not asked for a number of them."""
    known = schema.inputs.get("num_images") if schema else None
    return 1 if known is None or known.default is None else known.default
