"""The units that a call will be charged for, estimated from its input before it is sent.

An estimate is what the model makes with this input: the number of images, their size, the seconds
of a video. Inputs that are missing have the model's own defaults.
"""

import math
import re
from collections.abc import Mapping
from decimal import Decimal

from falproxy.fal.pricing import MEGAPIXEL, Price, Size, cost_from_units

COUNT_INPUTS = ("num_images", "num_outputs", "num_samples", "num_videos", "batch_size")
DURATION_INPUTS = ("duration", "seconds", "duration_seconds", "num_seconds", "video_length")
TEXT_INPUTS = ("text", "prompt", "input", "script")
SIZE_INPUT = "image_size"
# Larger numbers are not plausible; they are sent to fal, which refuses them.
COUNT_MAX = 1000
DURATION_MAX = 24 * 3600
SIDE_MAX = 2**16
# Characters of one unit of a model that is charged by text.
CHARACTERS = 1000
# "5", "8s", "5 seconds"; words like "auto" are no duration.
SECONDS = re.compile(r"(\d{1,6}(?:\.\d{1,3})?) ?(?:s|sec|seconds?)?", re.IGNORECASE)
# fal's presets of `image_size`, in pixels (fal-api.md, 6).
SIZE_PRESETS: Mapping[str, Size] = {
    "square_hd": (1024, 1024),
    "square": (512, 512),
    "portrait_4_3": (768, 1024),
    "portrait_16_9": (576, 1024),
    "landscape_4_3": (1024, 768),
    "landscape_16_9": (1024, 576),
}
DEFAULT_SIZE = (1024, 1024)  # of models whose size is not known before the result


def estimate_cost(
    price: Price | None, inputs: Mapping[str, object], defaults: Mapping[str, object]
) -> int | None:
    """Return the expected cost of a call in micro-USD; None if the price or the units are unknown.

    inputs: of the call.
    defaults: values that the model uses for missing inputs.
    """
    if price is None:
        return None
    return cost_from_units(price, estimate_units(price, {**defaults, **inputs}))


def estimate_units(price: Price, inputs: Mapping[str, object]) -> Decimal | None:
    """Return the number of units of a price; None if it cannot be known before the result."""
    count = Decimal(count_outputs(inputs))
    match price.unit:
        case "images" | "videos":
            return count
        case "requests":
            return Decimal(1)
        case "megapixels":
            width, height = output_size(inputs)
            return count * -(-width * height // MEGAPIXEL)
        case "seconds":
            seconds = parse_duration(inputs)
            return None if seconds is None else count * seconds
        case "characters":
            length = text_length(inputs)
            return None if length is None else Decimal(length) / CHARACTERS
        case "compute seconds":
            return None


def count_outputs(inputs: Mapping[str, object]) -> int:
    """Return the number of images or videos that a call makes."""
    for name in COUNT_INPUTS:
        value = inputs.get(name)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, int) and not isinstance(value, bool):
            return min(max(value, 1), COUNT_MAX)
    return 1


def output_size(inputs: Mapping[str, object]) -> Size:
    """Return width and height of the output in pixels, by `image_size` or the two sides."""
    size = inputs.get(SIZE_INPUT)
    if isinstance(size, str):
        return SIZE_PRESETS.get(size, DEFAULT_SIZE)
    sides = size if isinstance(size, dict) else inputs
    width, height = (parse_side(sides.get(name)) for name in ("width", "height"))
    return (width or DEFAULT_SIZE[0], height or DEFAULT_SIZE[1])


def parse_side(value: object) -> int | None:
    if isinstance(value, float) and math.isfinite(value):
        value = math.ceil(value)
    if not isinstance(value, int) or isinstance(value, bool):
        return None
    return min(max(value, 1), SIDE_MAX)


def parse_duration(inputs: Mapping[str, object]) -> Decimal | None:
    """Return the seconds of a video or a sound; None if they are not known."""
    for name in DURATION_INPUTS:
        value = inputs.get(name)
        if value is None or isinstance(value, bool):
            continue
        match = SECONDS.fullmatch(str(value).strip())
        if match is not None:
            return min(Decimal(match[1]), Decimal(DURATION_MAX))
    frames, rate = inputs.get("num_frames"), inputs.get("frames_per_second", inputs.get("fps"))
    if isinstance(frames, int) and isinstance(rate, int) and frames > 0 and rate > 0:
        return min(Decimal(frames) / rate, Decimal(DURATION_MAX))
    return None


def text_length(inputs: Mapping[str, object]) -> int | None:
    """Return the characters of the text that a model reads aloud."""
    texts = (text for name in TEXT_INPUTS if isinstance(text := inputs.get(name), str))
    text = next(texts, None)
    return None if text is None else len(text)
