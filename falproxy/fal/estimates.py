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
    UNITS_TEXT_MAX,
    Price,
    Size,
    cost_from_units,
    parse_decimal,
)

COUNT_INPUTS = (
    "num_images", "num_outputs", "num_samples", "num_videos", "num_results", "num_songs",
    "number_of_images", "series_amount", "batch_size",
)  # fmt: skip
# Each of the `num_images` runs of such a model makes as many images at most.
RUN_COUNT_INPUT = "max_images"
# With one of these, the output has the size of an input image, times a factor.
SCALE_INPUTS = (
    "upscale_factor", "scale_factor", "scale_ratio", "scale", "upscale_mode", "target_resolution",
)  # fmt: skip
DURATION_INPUTS = (
    "duration", "seconds", "duration_seconds", "num_seconds", "seconds_total", "video_length",
)  # fmt: skip
RATE_INPUTS = ("frames_per_second", "fps")
RATE_MIN = Decimal("0.01")  # quotients of smaller numbers could exceed what `Decimal` can hold
TEXT_INPUTS = ("text", "prompt", "input", "script")
SIZE_INPUT = "image_size"
# Larger numbers are not plausible; they are sent to fal, which refuses them.
COUNT_MAX = 1000
DURATION_MAX = 24 * 3600
SIDE_MAX = 2**16
# Characters of one unit of a model that is charged by text.
CHARACTERS = 1000
# "5", "8s", "5 seconds"; words like "auto" are no duration.
SECONDS = re.compile(r"(\+?\d{1,32}(?:\.\d{1,32})?) ?(?:s|sec|seconds?)?", re.IGNORECASE)
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
    *COUNT_INPUTS, RUN_COUNT_INPUT, *SCALE_INPUTS, *DURATION_INPUTS, SIZE_INPUT, "width", "height",
    "num_frames", *RATE_INPUTS,
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
            size = output_size(inputs)
            return None if size is None else count * -(-size[0] * size[1] // MEGAPIXEL)
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
    counts = [parse_count(inputs[name]) for name in COUNT_INPUTS if name in inputs]
    count = max(counts, default=1)
    return min(count * parse_count(inputs.get(RUN_COUNT_INPUT)), COUNT_MAX)


def parse_count(value: object) -> int:
    """Return a number of outputs; 1 if it is missing or invalid. Of several values in a query, the
    largest counts."""
    if type(value) is int:  # mostly
        return min(max(value, 1), NUMBER_MAX)
    numbers = (parse_number(each) for each in (value if isinstance(value, list) else [value]))
    whole = (int(number) for number in numbers if number is not None and number == int(number))
    return max(whole, default=1) or 1


def output_size(inputs: Mapping[str, object]) -> Size | None:
    """Return width and height of the output in pixels, by `image_size` or the two sides, whichever
    is larger. None if it depends on an input image."""
    if any(name in inputs for name in SCALE_INPUTS):
        return None
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
    """Parse a number that is not negative, or a text of one, which fal accepts as well. One that
    is too long to be parsed, such as with fifty zeros before it, counts as the largest number."""
    if isinstance(value, LongString):
        return Decimal(NUMBER_MAX)
    if isinstance(value, bool) or not isinstance(value, int | float | str | Decimal):
        return None
    if isinstance(value, int):
        return Decimal(min(value, NUMBER_MAX)) if value >= 0 else None
    if isinstance(value, float):
        return Decimal(repr(min(value, NUMBER_MAX))) if value >= 0 else None
    text = str(value).strip()
    return Decimal(NUMBER_MAX) if len(text) > UNITS_TEXT_MAX else parse_decimal(text)


def parse_duration(inputs: Mapping[str, object]) -> Decimal | None:
    """Return the seconds of a video or a sound; None if it is not an input. Of several inputs,
    the longest counts."""
    durations = [
        seconds
        for name in DURATION_INPUTS
        if (seconds := parse_seconds(inputs.get(name))) is not None
    ]
    frames = parse_number(inputs.get("num_frames"))
    rates = [rate for name in RATE_INPUTS if (rate := parse_number(inputs.get(name)))]
    if frames and rates:
        durations.append(frames / max(min(rates), RATE_MIN))
    return min(max(durations), Decimal(DURATION_MAX)) if durations else None


def parse_seconds(value: object) -> Decimal | None:
    if isinstance(value, str):
        match = SECONDS.fullmatch(value.strip())
        return parse_number(value if match is None else match[1])
    return parse_number(value)


def text_length(inputs: Mapping[str, object]) -> int | None:
    """Return the characters of the text that a model reads aloud; of a long one, its bytes. Of
    several texts, the longest counts."""
    texts = map(inputs.get, TEXT_INPUTS)
    lengths = (
        text.end - text.start if isinstance(text, LongString) else len(text)
        for text in texts
        if isinstance(text, str | LongString)
    )
    return max(lengths, default=None)


def call_inputs(query: str, body: Mapping[str, object]) -> dict[str, object]:
    """Return the inputs of a call that its price may depend on. fal takes them in the query of the
    target as well."""
    return (select_inputs(parse_query(query)) if query else {}) | select_inputs(body)


def select_inputs(inputs: Mapping[str, object]) -> dict[str, object]:
    """Return the inputs that a price may depend on. Those that are null count as missing."""
    return {name: inputs[name] for name in PRICED_INPUTS if inputs.get(name) is not None}
