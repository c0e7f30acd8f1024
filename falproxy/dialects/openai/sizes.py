"""`size` in the words of a model: pixels, a preset, an aspect ratio or a resolution mode."""

import re
from collections.abc import Iterable
from math import log
from typing import NamedTuple

from falproxy.dialects.openai.model_schema import ModelSchema

AUTO = "auto"
PIXELS = re.compile(r"([1-9]\d{0,4})x([1-9]\d{0,4})", re.ASCII)
RATIO = re.compile(r"([1-9]\d{0,2}):([1-9]\d{0,2})", re.ASCII)
# fal's presets of `image_size`, in pixels (fal-api.md, 6).
PRESETS = {
    "square_hd": (1024, 1024),
    "square": (512, 512),
    "portrait_4_3": (768, 1024),
    "portrait_16_9": (576, 1024),
    "landscape_4_3": (1024, 768),
    "landscape_16_9": (1024, 576),
}
# Inputs with a word for a shape, in the order that they are looked for.
SHAPE_INPUTS = ("image_size", "aspect_ratio", "resolution_mode")
# The ratios that most models know, for those that do not say which.
COMMON_RATIOS = ("21:9", "16:9", "4:3", "3:2", "1:1", "2:3", "3:4", "9:16", "9:21")
# Models that take an `image_size` of any pixels, known without their documents.
PIXEL_SIZE_MODELS = (
    "fal-ai/flux/dev", "fal-ai/flux/schnell", "fal-ai/flux-lora", "fal-ai/flux-pro/v1.1",
    "fal-ai/fast-sdxl", "fal-ai/fast-lightning-sdxl",
)  # fmt: skip


class Size(NamedTuple):
    width: int
    height: int


class SizeUnknown(ValueError):
    """A size that is neither in pixels nor one of the model's own words."""


def size_inputs(text: str | None, schema: ModelSchema | None, endpoint: str) -> dict[str, object]:
    """The inputs that give a picture its size. None for those that the model chooses itself, and
    for models whose pictures have the size that they have. takes: None where nobody knows.

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


def parse_size(text: str) -> Size:
    """Raises: SizeUnknown."""
    match = PIXELS.fullmatch(text)
    if match is None:
        raise SizeUnknown(text)
    return Size(int(match[1]), int(match[2]))


def nearest_inputs(size: Size, schema: ModelSchema) -> dict[str, object]:
    image_size = schema.inputs.get("image_size")
    if image_size is not None and {"width", "height"} <= image_size.keys:
        return {"image_size": size._asdict()}
    if image_size is None and schema.first_input("width") and schema.first_input("height"):
        return dict(size._asdict())
    for name in SHAPE_INPUTS:
        known = schema.inputs.get(name)
        if known is None:
            continue
        words = schema.choices(name) or (
            COMMON_RATIOS if known.accepts_any_string and name != "image_size" else ()
        )
        if (nearest := nearest_value(size, words)) is not None:
            return {name: nearest}
    return {}


def nearest_value(size: Size, values: Iterable[str]) -> str | None:
    """The word whose shape is the nearest, and of equal ones the one whose area is. None where no
    word says a shape."""
    shapes = [(word, shape) for word in values if (shape := shape_of(word)) is not None]
    if not shapes:
        return None
    return min(shapes, key=lambda known: distance(size, known[1]))[0]


def shape_of(value: str) -> tuple[int, int] | None:
    """Width and height that a word stands for: pixels, or a ratio alone."""
    match = PIXELS.fullmatch(value) or RATIO.fullmatch(value)
    return (int(match[1]), int(match[2])) if match else PRESETS.get(value)


def distance(size: Size, shape: tuple[int, int]) -> tuple[float, float]:
    """By the logarithm, so that twice as wide is as far as twice as high."""
    width, height = shape
    ratio = abs(log(size.width / size.height) - log(width / height))
    return round(ratio, 6), abs(log(size.width * size.height) - log(width * height))
