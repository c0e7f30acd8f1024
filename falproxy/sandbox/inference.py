"""What a model does with a call: checks it, takes its time, draws, stores, counts."""

import asyncio
import io
import math
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass

from PIL import Image

from falproxy.sandbox import rendering
from falproxy.sandbox.faults import obey, prompt_of, read_delay
from falproxy.sandbox.input_images import read_pictures
from falproxy.sandbox.input_validation import Values, check_inputs
from falproxy.sandbox.models import MODELS, Model, app_of
from falproxy.sandbox.responses import Answer, FalError, plain
from falproxy.sandbox.state import Sandbox

STEPS = 4  # slices of the inference time; a log line or a partial result ends each
SEED_MAX = 2**32


@dataclass(frozen=True, slots=True)
class Task:
    """One call of a model. endpoint: as it was named; body: as it was sent, JSON or bytes."""

    sandbox: Sandbox
    endpoint: str
    body: object
    request_id: str


def find_model(endpoint: str) -> Model:
    """Raises FalError: 404, the app is known and has no such path."""
    model = MODELS.get(endpoint)
    if model is None:
        raise no_path(endpoint)
    return model


def no_path(endpoint: str) -> FalError:
    """fal's 404 for a path that a known app does not have."""
    path = endpoint.removeprefix(app_of(endpoint)) or "/"
    return plain(404, f"Path {path} not found", {"X-Fal-Billable-Units": "0"})


async def infer(task: Task, log: Callable[[str], None]) -> Answer:
    """The result of a call, which is paid from here on.

    Raises:
        FalError: the path, the input or the model's own failure.
    """
    model = find_model(task.endpoint)
    values, pictures = await prepare(task, model)
    started = time.monotonic()
    for step in range(1, STEPS + 1):
        await asyncio.sleep(pause_of(task, model))
        log(f"{step * 100 // STEPS}%|{'█' * step:<{STEPS}}| {step}/{STEPS}")
    images = await asyncio.to_thread(draw, model, values, pictures)
    document = await asyncio.to_thread(publish, task.sandbox, model, values, images)
    add_extras(document, model, values, time.monotonic() - started)
    return settle(task, model, images, document)


async def infer_partly(task: Task) -> AsyncGenerator[Answer, None]:
    """What a stream carries: sharper and sharper pictures as data URIs, the result at the end."""
    model = find_model(task.endpoint)
    values, pictures = await prepare(task, model)
    images = await asyncio.to_thread(draw, model, values, pictures)
    started = time.monotonic()
    for step in range(1, STEPS):
        await asyncio.sleep(pause_of(task, model))
        yield Answer(200, await asyncio.to_thread(sketches, model, images, step / STEPS))
    await asyncio.sleep(pause_of(task, model))
    document = await asyncio.to_thread(publish, task.sandbox, model, values, images)
    add_extras(document, model, values, time.monotonic() - started)
    yield settle(task, model, images, document)


async def prepare(task: Task, model: Model) -> tuple[Values, list[Image.Image]]:
    """The checked inputs, a seed among them, and the pictures they bring."""
    obey(prompt_of(task.body), "job", task.sandbox.failures)
    values = check_inputs(model, task.body)
    if values.get("seed") is None and "seed" in values:
        values["seed"] = secrets.randbelow(SEED_MAX)
    sandbox = task.sandbox
    pictures = await asyncio.to_thread(
        read_pictures, model, values, sandbox.files, sandbox.public_url
    )
    return values, pictures


def pause_of(task: Task, model: Model) -> float:
    """Seconds of one step."""
    delay = read_delay(prompt_of(task.body))
    return (model.seconds / task.sandbox.speed if delay is None else delay) / STEPS


def draw(model: Model, values: Values, pictures: list[Image.Image]) -> list[Image.Image]:
    return [
        rendering.render(model.endpoint, values, pictures, index)
        for index in range(count_of(values))
    ]


def count_of(values: Mapping[str, object]) -> int:
    count = values.get("num_images")
    return count if isinstance(count, int) else 1


def format_of(values: Mapping[str, object]) -> str:
    return str(values.get("output_format") or values.get("format") or "jpeg")


def publish(
    sandbox: Sandbox, model: Model, values: Values, images: list[Image.Image]
) -> dict[str, object]:
    """The pictures as the output names them: on the CDN, or inline with `sync_mode`."""
    output_format = format_of(values)
    content_type = rendering.FORMATS[output_format]
    entries = []
    for index, image in enumerate(images):
        content = rendering.encode(image, output_format)
        name = f"{secrets.token_hex(8)}_{index}.{output_format}"
        if values.get("sync_mode"):
            url = rendering.data_uri(content, content_type)
        else:
            key = sandbox.files.new_key(name)
            sandbox.files.put(key, io.BytesIO(content), content_type)
            url = sandbox.file_url(key)
        width, height = image.size
        entries.append(
            {"url": url, "content_type": content_type, "file_name": name,
             "file_size": len(content), "width": width, "height": height}
        )  # fmt: skip
    return {model.output: entries if model.output == "images" else entries[0]}


def sketches(model: Model, images: list[Image.Image], share: float) -> dict[str, object]:
    entries = []
    for image in images:
        content = rendering.encode(rendering.sketch(image, share), "jpeg")
        width, height = image.size
        url = rendering.data_uri(content, "image/jpeg")
        entries.append({"url": url, "content_type": "image/jpeg", "width": width, "height": height})
    return {model.output: entries}


def add_extras(document: dict[str, object], model: Model, values: Values, seconds: float) -> None:
    """The keys that the model's output has beside its pictures."""
    extras: dict[str, object] = {
        "timings": {"inference": round(seconds, 4)},
        "seed": values.get("seed"),
        "has_nsfw_concepts": [False] * count_of(values),
        "prompt": values.get("prompt"),
        "description": "A picture drawn by the falproxy sandbox.",
    }
    document.update({name: extras[name] for name in model.extras})


def settle(
    task: Task, model: Model, images: list[Image.Image], document: dict[str, object]
) -> Answer:
    """The result, counted and paid."""
    units = sum(units_of(model, image.size) for image in images)
    task.sandbox.charge(model.endpoint, task.body, task.request_id, units)
    return Answer(200, document, {"X-Fal-Billable-Units": str(units)})


def units_of(model: Model, size: tuple[int, int]) -> int:
    """One for each picture, or its megapixels rounded up."""
    if model.unit == "images":
        return 1
    return math.ceil(size[0] * size[1] / rendering.MEGAPIXEL)
