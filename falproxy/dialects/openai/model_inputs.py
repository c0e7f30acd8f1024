"""A request in a model's own terms: the inputs of every call that it takes."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from falproxy.dialects.openai.errors import invalid
from falproxy.dialects.openai.model_schema import Takes
from falproxy.dialects.openai.schema import EditRequest, ImageRequest
from falproxy.dialects.openai.sizes import SizeUnknown, size_inputs
from falproxy.spool import Spool

SEED_MAX = 2**31 - 1
# Pictures that a model makes at once which does not say how many it can.
AT_ONCE = 4
LIST, ONE = "image_urls", "image_url"
MASKS = ("mask_url", "mask_image_url")
PICTURES = (LIST, ONE, *MASKS, "reference_image_url", "base_image_url", "swap_image_url")
# Ends of the ids of models that take a list of pictures, known without their documents.
LISTED = ("/edit", "/edit-image", "/multi")
FORMATS = ("output_format", "format")
SPELLINGS = {"jpeg": ("jpeg", "jpg"), "png": ("png",), "webp": ("webp",)}
# What this API has a word of its own for.
OURS = {"num_images": "n"}
# OpenAI's parameters that mean nothing to most models: only a model that has the same parameter
# with the same value gets them.
THEIRS = (
    "background", "input_fidelity", "moderation", "output_compression", "quality", "style",
)  # fmt: skip
# And those that no model of fal's has: they are dropped.
DROPPED = ("complexity", "frame_count", "frame_duration_ms", "markup", "svg")


@dataclass(frozen=True, slots=True)
class Upload:
    """A file of a form, to stand in a call as a data URI."""

    content: Spool
    content_type: str


class Model(NamedTuple):
    """A model that is asked. takes: None where nobody knows what it takes."""

    endpoint: str
    takes: Takes | None


class Made(NamedTuple):
    """One of the calls that a request takes. is_alone: whether its result must not be another's,
    because nothing in its input tells the two apart."""

    inputs: dict[str, object]
    is_alone: bool


def calls_of(
    asked: ImageRequest, model: Model, files: Sequence[Upload] = (), mask: Upload | None = None
) -> list[Made]:
    """Raises: ImagesError 400, with the parameter that does not fit."""
    inputs: dict[str, object] = {"prompt": asked.prompt}
    inputs |= picture_inputs(files, mask, model)
    try:
        inputs |= size_inputs(asked.size, model.takes, model.endpoint)
    except SizeUnknown:
        raise invalid("size", "The size must be like 1024x1024, or auto.") from None
    inputs |= format_inputs(asked.output_format, model.takes)
    if asked.seed is not None and (model.takes is None or "seed" in model.takes.inputs):
        inputs["seed"] = asked.seed
    inputs |= more_inputs(asked, model.takes)
    check_pictures(inputs, model)
    return split(inputs, asked.n or 1, model.takes)


def picture_inputs(files: Sequence[Upload], mask: Upload | None, model: Model) -> dict[str, object]:
    """Raises: ImagesError 400."""
    inputs: dict[str, object] = {}
    if files:
        name = list_or_one(len(files), model)
        if name == ONE and len(files) > 1:
            raise invalid("image", f"{model.endpoint} takes one picture.")
        inputs[name] = files[0] if name == ONE else list(files)
    if mask is not None:
        place = MASKS[0] if model.takes is None else model.takes.first(*MASKS)
        if place is None:
            raise invalid("mask", f"{model.endpoint} takes no mask.")
        inputs[place] = mask
    return inputs


def list_or_one(count: int, model: Model) -> str:
    """The input that takes so many pictures. Raises: ImagesError 400, there is none."""
    takes = model.takes
    if takes is None:
        return LIST if count > 1 or model.endpoint.endswith(LISTED) else ONE
    names = [name for name in (LIST, ONE) if name in takes.inputs]
    if not names:
        raise invalid("image", f"{model.endpoint} takes no picture.")
    if len(names) == 2 and count == 1:
        return ONE if LIST not in takes.required else LIST
    return names[0]


def format_inputs(wanted: str | None, takes: Takes | None) -> dict[str, object]:
    """A format that the model does not have is left for it to choose."""
    name = takes.first(*FORMATS) if takes else None
    if takes is None or wanted is None or name is None:
        return {}
    known = takes.choices(name) or (wanted,)
    spelled = next((word for word in SPELLINGS[wanted] if word in known), None)
    return {} if spelled is None else {name: spelled}


def more_inputs(asked: ImageRequest, takes: Takes | None) -> dict[str, object]:
    """What a request says by the model's own names. Raises: ImagesError 400."""
    inputs: dict[str, object] = {}
    for name, value in (asked.model_extra or {}).items():
        if name in OURS:
            raise invalid(name, f"Say {OURS[name]} instead of {name}.")
        if name in DROPPED or value is None:
            continue
        known = takes.inputs.get(name) if takes else None
        if known is not None and isinstance(asked, EditRequest) and isinstance(value, str):
            value = known.read(value)
        if name in THEIRS:
            if known is not None and known.accepts(value):
                inputs[name] = value
        elif known is not None or takes is None:
            inputs[name] = value
    return inputs


def check_pictures(inputs: Mapping[str, object], model: Model) -> None:
    """Raises: ImagesError 400, the model needs a picture that is not there."""
    if model.takes is None:
        return
    for name in PICTURES:
        if name in model.takes.required and name not in inputs:
            param = "mask" if name in MASKS else "image"
            raise invalid(
                param,
                f"{model.endpoint} needs a picture ({name}): send it to /v1/images/edits.",
                "missing_required_parameter",
            )


def split(inputs: dict[str, object], count: int, takes: Takes | None) -> list[Made]:
    """The calls that make so many pictures. No two are equal: equal calls may share a result."""
    made: list[Made] = []
    done = 0
    for size in sizes_of(count, takes):
        own = dict(inputs)
        if size != usual(takes):
            own["num_images"] = size
        has_seed = "seed" in own
        if done and has_seed:
            own["seed"] = moved(own["seed"], done)
        elif done and takes is not None and "seed" in takes.inputs:
            own["seed"] = random.randint(1, SEED_MAX)
            has_seed = True
        made.append(Made(own, is_alone=bool(done) and not has_seed))
        done += size
    return made


def moved(seed: object, by: int) -> object:
    return seed + by if isinstance(seed, int) else seed


def sizes_of(count: int, takes: Takes | None) -> list[int]:
    """How many pictures each call makes. One by one where nobody knows how to ask for more."""
    known = takes.inputs.get("num_images") if takes else None
    most = 1 if known is None else max(1, int(known.maximum or AT_ONCE))
    return [min(most, count - done) for done in range(0, count, most)]


def usual(takes: Takes | None) -> object:
    """How many pictures a model makes that is not asked for a number of them."""
    known = takes.inputs.get("num_images") if takes else None
    return 1 if known is None or known.default is None else known.default
