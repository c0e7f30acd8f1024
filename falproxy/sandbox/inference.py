"""Simulated inference: validates the input, waits, renders and stores the images, bills the job."""

import asyncio
import io
import math
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass
from decimal import Decimal

from PIL import Image

from falproxy.sandbox.faults import get_prompt, parse_delay_directive, raise_requested_fault
from falproxy.sandbox.input_images import read_input_images
from falproxy.sandbox.input_validation import InputValues, validate_inputs
from falproxy.sandbox.media_encoding import CONTENT_TYPES as MEDIA_CONTENT_TYPES
from falproxy.sandbox.media_output import get_text, media_of_equal_calls, output_seconds
from falproxy.sandbox.model_inputs import CHARACTERS
from falproxy.sandbox.models import MODELS, Model, app_id
from falproxy.sandbox.rendering import (
    CONTENT_TYPES,
    MEGAPIXEL,
    Size,
    data_uri,
    encode_image,
    render_image,
    render_preview,
)
from falproxy.sandbox.responses import FalError, FalResponse, detail_error
from falproxy.sandbox.state import Sandbox

STEPS = 4  # parts of the inference time; each ends with a log line or a partial result
SEED_MAX = 2**32


@dataclass(frozen=True, slots=True)
class InferenceTask:
    """One call of a model.

    endpoint: endpoint id from the path.
    body: request body, parsed from JSON, or bytes if it is not JSON.
    tags: of the request, as `key=value`.
    """

    sandbox: Sandbox
    endpoint: str
    body: object
    request_id: str
    tags: tuple[str, ...] = ()


def find_model(endpoint: str) -> Model:
    """Return the model of an endpoint whose app exists.

    Raises:
        FalError: 404 if the app has no such path.
    """
    model = MODELS.get(endpoint)
    if model is None:
        raise path_not_found(endpoint)
    return model


def path_not_found(endpoint: str) -> FalError:
    """Return fal's 404 for an unknown path of an existing app."""
    path = endpoint.removeprefix(app_id(endpoint)) or "/"
    return detail_error(404, f"Path {path} not found", {"X-Fal-Billable-Units": "0"})


async def run_inference(task: InferenceTask, log: Callable[[str], None]) -> FalResponse:
    """Run and bill a call and return its result.

    Raises:
        FalError: unknown path, invalid input, or a requested fault.
    """
    model = find_model(task.endpoint)
    values, input_images = await prepare_inputs(task, model)
    started_at = time.monotonic()
    for step in range(1, STEPS + 1):
        await asyncio.sleep(step_seconds(task, model))
        log(f"{step * 100 // STEPS}%|{'█' * step:<{STEPS}}| {step}/{STEPS}")
    sizes: list[Size] = []
    if model.kind == "image":
        images = await asyncio.to_thread(render_images, model, values, input_images)
        sizes = [image.size for image in images]
        document = await asyncio.to_thread(build_output, task.sandbox, model, values, images)
    else:
        async with task.sandbox.encoders:
            document = await asyncio.to_thread(
                build_media_output, task.sandbox, model, values, input_images
            )
    add_extra_fields(document, model, values, time.monotonic() - started_at)
    return billed_response(task, model, values, sizes, document)


async def stream_inference(task: InferenceTask) -> AsyncGenerator[FalResponse, None]:
    """Yield previews of increasing sharpness as data URIs, and the billed result as the last.

    Raises:
        FalError: unknown path, invalid input, or a requested fault.
    """
    model = find_model(task.endpoint)
    values, input_images = await prepare_inputs(task, model)
    images = await asyncio.to_thread(render_images, model, values, input_images)
    started_at = time.monotonic()
    for step in range(1, STEPS):
        await asyncio.sleep(step_seconds(task, model))
        yield FalResponse(200, await asyncio.to_thread(build_preview, model, images, step / STEPS))
    await asyncio.sleep(step_seconds(task, model))
    document = await asyncio.to_thread(build_output, task.sandbox, model, values, images)
    add_extra_fields(document, model, values, time.monotonic() - started_at)
    yield billed_response(task, model, values, [image.size for image in images], document)


async def prepare_inputs(
    task: InferenceTask, model: Model
) -> tuple[InputValues, list[Image.Image]]:
    """Return the validated inputs, with a random seed if there is none, and the input images.

    Raises:
        FalError: invalid input, or a requested fault.
    """
    raise_requested_fault(get_prompt(task.body), "job", task.sandbox.failures)
    values = validate_inputs(model, task.body)
    if values.get("seed") is None and "seed" in values:
        values["seed"] = secrets.randbelow(SEED_MAX)
    sandbox = task.sandbox
    images = await asyncio.to_thread(
        read_input_images, model, values, sandbox.files, sandbox.public_url
    )
    return values, images


def step_seconds(task: InferenceTask, model: Model) -> float:
    delay = parse_delay_directive(get_prompt(task.body))
    return (model.inference_seconds / task.sandbox.speed if delay is None else delay) / STEPS


def render_images(
    model: Model, values: InputValues, input_images: list[Image.Image]
) -> list[Image.Image]:
    return [
        render_image(model.endpoint, values, input_images, index)
        for index in range(image_count(values))
    ]


def image_count(values: Mapping[str, object]) -> int:
    count = values.get("num_images")
    return count if isinstance(count, int) else 1


def get_output_format(values: Mapping[str, object]) -> str:
    return str(values.get("output_format") or values.get("format") or "jpeg")


def build_output(
    sandbox: Sandbox, model: Model, values: InputValues, images: list[Image.Image]
) -> dict[str, object]:
    """Return the images of the output: stored on the CDN, or as data URIs with `sync_mode`."""
    output_format = get_output_format(values)
    entries = []
    for index, image in enumerate(images):
        content = encode_image(image, output_format)
        name = f"{secrets.token_hex(8)}_{index}.{output_format}"
        entry = build_file(sandbox, values, name, content, CONTENT_TYPES[output_format])
        width, height = image.size
        entries.append({**entry, "width": width, "height": height})
    return {model.output: entries if model.output == "images" else entries[0]}


def build_media_output(
    sandbox: Sandbox, model: Model, values: InputValues, input_images: list[Image.Image]
) -> dict[str, object]:
    """Return the video or the sound of the output."""
    content, extension = media_of_equal_calls(model, values, input_images)
    name = f"{secrets.token_hex(8)}.{extension}"
    return {
        model.output: build_file(sandbox, values, name, content, MEDIA_CONTENT_TYPES[extension])
    }


def build_file(
    sandbox: Sandbox, values: InputValues, name: str, content: bytes, content_type: str
) -> dict[str, object]:
    """Return a file of the output: stored on the CDN, or a data URI with `sync_mode`."""
    if values.get("sync_mode"):
        url = data_uri(content, content_type)
    else:
        key = sandbox.files.new_key(name)
        sandbox.files.put(key, io.BytesIO(content), content_type)
        url = sandbox.file_url(key)
    return {"url": url, "content_type": content_type, "file_name": name, "file_size": len(content)}


def build_preview(model: Model, images: list[Image.Image], progress: float) -> dict[str, object]:
    """Return a partial result.

    progress: completed share of the inference, 0 to 1.
    """
    entries = []
    for image in images:
        content = encode_image(render_preview(image, progress), "jpeg")
        width, height = image.size
        url = data_uri(content, "image/jpeg")
        entries.append({"url": url, "content_type": "image/jpeg", "width": width, "height": height})
    return {model.output: entries}


def add_extra_fields(
    document: dict[str, object], model: Model, values: InputValues, seconds: float
) -> None:
    """Add the model's output fields other than the files.

    seconds: inference time.
    """
    extras: dict[str, object] = {
        "timings": {"inference": round(seconds, 4)},
        "seed": values.get("seed"),
        "has_nsfw_concepts": [False] * image_count(values),
        "prompt": values.get("prompt"),
        "description": "An image drawn by the falproxy sandbox.",
        "duration_ms": round(output_seconds(model, values) * 1000),
        "tags": "sandbox",
        "lyrics": "" if values.get("instrumental") else values.get("prompt"),
    }
    document.update({name: extras[name] for name in model.extra_fields})


def billed_response(
    task: InferenceTask,
    model: Model,
    values: InputValues,
    sizes: list[Size],
    document: dict[str, object],
) -> FalResponse:
    """Bill the job and return its result. sizes: of the images."""
    units = bill(task, model, values, sizes)
    return FalResponse(200, document, {"X-Fal-Billable-Units": str(units)})


def bill(task: InferenceTask, model: Model, values: InputValues, sizes: list[Size]) -> Decimal:
    """Bill the outputs of a job and return the number of units."""
    units = billable_units(model, values, sizes)
    task.sandbox.bill(model.endpoint, task.body, task.request_id, units, task.tags)
    return units


def billable_units(model: Model, values: InputValues, sizes: list[Size]) -> Decimal:
    """Return the units of a job: its images, their megapixels rounded up, its video or sound, the
    seconds of it, or the characters of its text."""
    match model.unit:
        case "images":
            return Decimal(len(sizes))
        case "megapixels":
            return Decimal(sum(math.ceil(width * height / MEGAPIXEL) for width, height in sizes))
        case "seconds":
            return Decimal(f"{output_seconds(model, values):g}")
        case "compute seconds":
            return Decimal(str(model.inference_seconds))
        case unit:
            return Decimal(len(get_text(values))) / 1000 if unit == CHARACTERS else Decimal(1)
