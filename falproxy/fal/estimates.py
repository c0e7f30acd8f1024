"""The units that a call will be charged for, estimated from its input before it is sent.

An estimate is what the model makes with this input: the number of images, their size, the seconds
of a video. Inputs that are missing have the model's own defaults.
"""

import math
import re
from collections.abc import Mapping
from decimal import Decimal

from falproxy.fal.input_json import LongString, parse_query
from falproxy.fal.pricing import (
    MEGAPIXEL,
    NUMBER_MAX,
    Price,
    Size,
    cost_from_units,
    parse_decimal,
)

COUNT_INPUTS = ("num_images", "num_outputs", "num_samples", "num_videos", "batch_size")
DURATION_INPUTS = (
    "duration", "seconds", "duration_seconds", "num_seconds", "seconds_total", "video_length",
)  # fmt: skip
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
DEFAULT_SIDE = 1024
DEFAULT_SIZE = (DEFAULT_SIDE, DEFAULT_SIDE)  # of models whose size is not known before the result
PIXELS = re.compile(r"([1-9]\d{0,4})x([1-9]\d{0,4})", re.ASCII)
# The inputs that units depend on, without texts, for which a model has no default.
SIZED_INPUTS = (
    *COUNT_INPUTS, *DURATION_INPUTS, SIZE_INPUT, "width", "height", "num_frames",
    "frames_per_second", "fps",
)  # fmt: skip
PRICED_INPUTS = (*SIZED_INPUTS, *TEXT_INPUTS)


def estimate_cost(
    price: Price | None, inputs: Mapping[str, object], defaults: Mapping[str, object]
) -> int | None:
    """Return the expected cost of a call in micro-USD; None if the price or the units are unknown.

    inputs: of the call.
    defaults: values that the model uses for missing inputs.
    """
    if price is None:
        return None
    return cost_from_units(price, estimate_units(price, {**defaults, **select_inputs(inputs)}))


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
    """Return the number of images or videos that a call makes. Of several inputs, the largest
    counts: the model may ignore the others."""
    counts = (parse_number(inputs.get(name)) for name in COUNT_INPUTS)
    whole = (int(count) for count in counts if count is not None and count == int(count))
    return min(max(whole, default=1) or 1, COUNT_MAX)


def output_size(inputs: Mapping[str, object]) -> Size:
    """Return width and height of the output in pixels, by `image_size` or the two sides, whichever
    is larger."""
    sizes = [size for given in (inputs.get(SIZE_INPUT), inputs) if (size := parse_size(given))]
    return max(sizes, key=lambda size: size[0] * size[1], default=DEFAULT_SIZE)


def parse_size(value: object) -> Size | None:
    """Parse a preset, `1536x1024`, or an object with `width` and `height`."""
    if isinstance(value, str):
        match = PIXELS.fullmatch(value)
        return (int(match[1]), int(match[2])) if match else SIZE_PRESETS.get(value)
    if not isinstance(value, Mapping):
        return None
    width, height = (parse_side(value.get(name)) for name in ("width", "height"))
    return None if not width and not height else (width or DEFAULT_SIDE, height or DEFAULT_SIDE)


def parse_side(value: object) -> int | None:
    side = parse_number(value)
    return None if side is None else min(max(math.ceil(side), 1), SIDE_MAX)


def parse_number(value: object) -> Decimal | None:
    """Parse a number that is not negative, or a text of one, which fal accepts as well."""
    if isinstance(value, bool) or not isinstance(value, int | float | str | Decimal):
        return None
    if isinstance(value, int):
        return Decimal(min(value, NUMBER_MAX)) if value >= 0 else None
    if isinstance(value, float):
        return Decimal(repr(min(value, NUMBER_MAX))) if value >= 0 else None
    return parse_decimal(str(value).strip())


def parse_duration(inputs: Mapping[str, object]) -> Decimal | None:
    """Return the seconds of a video or a sound; None if it is not an input. Of several inputs,
    the largest counts."""
    durations = [
        seconds
        for name in DURATION_INPUTS
        if (seconds := parse_seconds(inputs.get(name))) is not None
    ]
    frames = parse_number(inputs.get("num_frames"))
    rate = parse_number(inputs.get("frames_per_second", inputs.get("fps")))
    if frames and rate:
        durations.append(frames / rate)
    return min(max(durations), Decimal(DURATION_MAX)) if durations else None


def parse_seconds(value: object) -> Decimal | None:
    if isinstance(value, str):
        match = SECONDS.fullmatch(value.strip())
        return None if match is None else Decimal(match[1])
    return parse_number(value)


def text_length(inputs: Mapping[str, object]) -> int | None:
    """Return the characters of the text that a model reads aloud; of a long one, its bytes."""
    for name in TEXT_INPUTS:
        text = inputs.get(name)
        if isinstance(text, str):
            return len(text)
        if isinstance(text, LongString):
            return text.end - text.start
    return None


def call_inputs(query: str, body: Mapping[str, object]) -> dict[str, object]:
    """Return the inputs of a call that its price may depend on. fal takes them in the query of the
    target as well."""
    return (select_inputs(parse_query(query)) if query else {}) | select_inputs(body)


def select_inputs(inputs: Mapping[str, object]) -> dict[str, object]:
    """Return the inputs that a price may depend on. Those that are null count as missing."""
    return {name: inputs[name] for name in PRICED_INPUTS if inputs.get(name) is not None}
