"""Translation of a request for a video into the inputs of a model.

Nothing is dropped: a parameter that the model cannot follow is refused before a job is bought.
"""

import re
from collections.abc import Mapping, Sequence
from decimal import Decimal
from math import gcd, log

from falproxy.dialects.openai.errors import ImagesError, invalid_parameter
from falproxy.dialects.openai.media_inputs import (
    check_model_inputs,
    extra_inputs,
    schema_unavailable,
)
from falproxy.dialects.openai.model_inputs import (
    AUTO,
    COMMON_RATIOS,
    PixelSize,
    SizeUnknown,
    parse_size,
    shape_of,
)
from falproxy.dialects.openai.models import ResolvedModel
from falproxy.dialects.openai.request_images import ImageValue, Upload
from falproxy.dialects.videos.schema import VideoRequest
from falproxy.fal.estimates import DURATION_INPUTS, parse_number, parse_seconds
from falproxy.fal.model_schema import (
    IMAGE_LIST_INPUTS,
    SINGLE_IMAGE_INPUTS,
    ModelSchema,
    describe_bounds,
    is_in_bounds,
)

REFERENCE = "input_reference"
# Inputs for the images and the video of a request, by priority.
START_IMAGE_INPUTS = (
    *SINGLE_IMAGE_INPUTS, "start_image_url", "first_frame_url", "first_frame_image_url",
    "reference_image_url", "subject_reference_image_url",
)  # fmt: skip
IMAGES_INPUTS = (*IMAGE_LIST_INPUTS, "reference_image_urls", "input_images")
VIDEO_INPUTS = ("video_url", "input_video_url", "reference_video_url")
FRAMES_INPUT, RATE_INPUTS = "num_frames", ("frames_per_second", "fps", "frame_rate")
RATIO_INPUT, RESOLUTION_INPUT = "aspect_ratio", "resolution"
# Inputs for a size in pixels, or one of several sizes.
SIZE_INPUTS = ("video_size", "image_size", "size", RESOLUTION_INPUT, RATIO_INPUT)
SEPARATOR = re.compile(r"[x*]")
# A resolution by its shorter side.
SHORT_SIDE = re.compile(r"(\d{3,4})p", re.IGNORECASE)
NAMED_SIDES = {"2k": 1440, "4k": 2160}
# The largest differences, as logarithms: 1792x1024 is 16:9, and 1024 is 1080p.
RATIO_TOLERANCE, SIDE_TOLERANCE = 0.06, 0.08
SECONDS = re.compile(r"\d{1,5}(?:\.\d{1,3})?", re.ASCII)


def build_inputs(
    params: VideoRequest,
    model: ResolvedModel,
    references: Sequence[ImageValue],
    files: Mapping[str, Upload],
    *,
    is_form: bool,
) -> dict[str, object]:
    """Return the inputs of the model.

    files: by the names of the model's inputs.
    is_form: other parameters are texts, which are converted.
    Raises: ImagesError 400; 503, fal's description of the model is needed and unavailable.
    """
    inputs: dict[str, object] = {"prompt": params.prompt}
    extra = {**(params.model_extra or {}), **files}
    schema = model.schema
    if schema is None:
        needs = {"seconds": params.seconds, "size": params.size, REFERENCE: references, **extra}
        if (name := next((name for name, value in needs.items() if value), None)) is not None:
            raise schema_unavailable(model, name)
        return inputs
    mapped = [
        reference_inputs(references, schema, model.endpoint),
        extra_inputs(extra, schema, is_form=is_form),
        size_inputs(params.size, schema, model.endpoint, has_image=bool(references)),
    ]
    mapped.append(duration_inputs(params.seconds, schema, model.endpoint, mapped[1]))
    for part in mapped:
        for name in part:
            if name in inputs:
                raise invalid_parameter(name, f"{name} was sent more than once.")
        inputs |= part
    renamed = dict.fromkeys((*START_IMAGE_INPUTS, *IMAGES_INPUTS, *VIDEO_INPUTS), REFERENCE)
    check_model_inputs(inputs, model, renamed)
    return inputs


def reference_inputs(
    references: Sequence[ImageValue], schema: ModelSchema, endpoint: str
) -> dict[str, object]:
    """Return the input for the image or the video that a video begins with. Raises: ImagesError
    400."""
    if not references:
        return {}
    kind = "a video" if is_video(references[0]) else "an image"
    single = VIDEO_INPUTS if is_video(references[0]) else START_IMAGE_INPUTS
    lists = () if is_video(references[0]) else IMAGES_INPUTS
    names = [name for name in (*single, *lists) if name in schema.inputs]
    # A required input first, and one for several images if there are several.
    is_list = len(references) > 1
    names.sort(key=lambda name: (name in single and is_list, name not in schema.required))
    if not names:
        raise invalid_parameter(REFERENCE, f"{endpoint} does not take {kind}.")
    if names[0] in single and is_list:
        raise invalid_parameter(REFERENCE, f"{endpoint} takes one {REFERENCE}.")
    return {names[0]: references[0] if names[0] in single else list(references)}


def is_video(value: ImageValue) -> bool:
    if isinstance(value, Upload):
        return value.content_type.startswith("video/")
    return value[:11].lower().startswith("data:video/")


def duration_inputs(
    seconds: str | float | None,
    schema: ModelSchema,
    endpoint: str,
    extra: Mapping[str, object],
) -> dict[str, object]:
    """Return the input for the length of the video. extra: other inputs of the request.

    Raises: ImagesError 400.
    """
    if seconds is None or seconds == "":
        return {}
    length = Decimal(str(seconds)) if SECONDS.fullmatch(str(seconds)) else Decimal()
    if not length:
        raise invalid_parameter("seconds", "seconds must be a number of seconds, such as 5.")
    name = schema.first_input(*DURATION_INPUTS)
    if name is None:
        return frame_inputs(length, schema, endpoint, extra)
    found = schema.inputs[name]
    choices = {each: choice for choice in found.choices if (each := parse_seconds(choice))}
    if choices:
        if length not in choices:
            accepted = ", ".join(f"{each:f}" for each in choices)
            message = f"seconds: {endpoint} makes videos of {accepted} seconds."
            raise invalid_parameter("seconds", message)
        return {name: choices[length]}
    if "number" in found.types:
        return {name: int(length) if length == int(length) else float(length)}
    suffix = "s" if isinstance(found.default, str) and found.default.endswith("s") else ""
    return {name: f"{length:f}{suffix}"}


def frame_inputs(
    length: Decimal, schema: ModelSchema, endpoint: str, extra: Mapping[str, object]
) -> dict[str, object]:
    """Return the number of frames of a video, for models that have no other length. Raises:
    ImagesError 400."""
    frames = schema.inputs.get(FRAMES_INPUT)
    rate_name = schema.first_input(*RATE_INPUTS)
    rate = None
    if rate_name is not None:
        rate = parse_number(extra.get(rate_name, schema.inputs[rate_name].default))
    if frames is None or not rate:
        message = f"seconds: the length of the videos of {endpoint} cannot be set. Leave it out."
        raise invalid_parameter("seconds", message)
    # Models whose numbers of frames are multiples of 4 or 8 count the first frame in addition.
    default = frames.default if isinstance(frames.default, int) else 0
    count = round(length * rate) + (1 if default % 4 == 1 else 0)
    if not is_in_bounds(count, frames):
        bounds = [
            bound and float(f"{bound / float(rate):.3g}")
            for bound in (frames.minimum, frames.maximum)
        ]
        message = f"seconds: {endpoint} makes videos{describe_bounds(*bounds)} seconds."
        raise invalid_parameter("seconds", message)
    return {FRAMES_INPUT: count}


def size_inputs(
    text: str | None, schema: ModelSchema, endpoint: str, *, has_image: bool
) -> dict[str, object]:
    """Return the inputs for the size of the video.

    has_image: the video has the shape of an image, if the model has no input for the shape.
    Raises: ImagesError 400.
    """
    if text is None or text in ("", AUTO):
        return {}
    for name in SIZE_INPUTS:
        if text in schema.choices(name):
            return {name: text}
    try:
        size = parse_size(text)
    except SizeUnknown:
        message = "The size must be like 1280x720, auto, or a value of the model's own."
        raise invalid_parameter("size", message) from None
    if (exact := exact_size_inputs(size, schema)) is not None:
        return exact
    inputs = {
        name: value
        for name, value in (
            (RATIO_INPUT, nearest_ratio(size, schema)),
            (RESOLUTION_INPUT, nearest_resolution(size, schema)),
        )
        if name in schema.inputs and value is not None
    }
    # Each input that describes the size must have a value; the shape may be that of an image.
    missing = [
        name
        for name in (RATIO_INPUT, RESOLUTION_INPUT)
        if name not in inputs and (name in schema.inputs or (name == RATIO_INPUT and not has_image))
    ]
    if missing or not inputs:
        raise size_refused(text, schema, endpoint)
    return dict(inputs)


def exact_size_inputs(size: PixelSize, schema: ModelSchema) -> dict[str, object] | None:
    """Return the inputs for a size in pixels; None if the model has none for it."""
    for name in ("video_size", "image_size"):
        found = schema.inputs.get(name)
        if found is not None and {"width", "height"} <= found.keys:
            return {name: size._asdict()}
    if schema.first_input("width") and schema.first_input("height"):
        return dict(size._asdict())
    for name in SIZE_INPUTS:
        for choice in schema.choices(name):
            sides = SEPARATOR.split(choice)
            if sides == [str(size.width), str(size.height)]:
                return {name: choice}
    return None


def nearest_ratio(size: PixelSize, schema: ModelSchema) -> str | None:
    """Return the model's aspect ratio that a size has; None if it has none of them."""
    found = schema.inputs.get(RATIO_INPUT)
    values = schema.choices(RATIO_INPUT)
    if found is not None and not values and found.accepts_any_string:
        divisor = gcd(size.width, size.height)
        values = (*COMMON_RATIOS, f"{size.width // divisor}:{size.height // divisor}")
    ratios = {
        value: abs(log(size.width / size.height) - log(shape[0] / shape[1]))
        for value in values
        if (shape := shape_of(value)) is not None
    }
    return nearest(ratios, RATIO_TOLERANCE)


def nearest_resolution(size: PixelSize, schema: ModelSchema) -> str | None:
    """Return the model's resolution that a size has; None if it has none of them."""
    short = min(size)
    sides = {
        value: abs(log(short / side))
        for value in schema.choices(RESOLUTION_INPUT)
        if (side := short_side(value)) is not None
    }
    return nearest(sides, SIDE_TOLERANCE)


def short_side(value: str) -> int | None:
    """Return the pixels of a resolution such as `720p` or `4k`; None for other texts."""
    match = SHORT_SIDE.fullmatch(value)
    return int(match[1]) if match else NAMED_SIDES.get(value.lower())


def nearest(distances: Mapping[str, float], tolerance: float) -> str | None:
    value = min(distances, key=distances.__getitem__, default=None)
    return value if value is not None and distances[value] <= tolerance else None


def size_refused(text: str, schema: ModelSchema, endpoint: str) -> ImagesError:
    accepted = [
        f"{name} {', '.join(schema.choices(name))}" for name in SIZE_INPUTS if schema.choices(name)
    ]
    choices = f" It takes {' and '.join(accepted)}." if accepted else ""
    message = f"size: {endpoint} does not make videos of {text}.{choices} Or send auto."
    return invalid_parameter("size", message)
