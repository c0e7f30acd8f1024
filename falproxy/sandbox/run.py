"""fal.run: direct model calls, streams of partial results, and realtime WebSockets."""

import asyncio
import json
from contextlib import aclosing

import msgpack  # type: ignore[import-untyped] # it has no stubs
from aiohttp import WSMessage, WSMsgType, web

from falproxy.sandbox.authentication import find_account
from falproxy.sandbox.faults import check_balance
from falproxy.sandbox.inference import (
    InferenceTask,
    bill,
    find_model,
    get_output_format,
    path_not_found,
    prepare_inputs,
    render_images,
    run_inference,
    step_seconds,
    stream_inference,
)
from falproxy.sandbox.input_validation import InputValues, parse_body
from falproxy.sandbox.job_queue import START_TIMEOUT
from falproxy.sandbox.models import APPS, Model, app_id
from falproxy.sandbox.rendering import CONTENT_TYPES, encode_image
from falproxy.sandbox.request import TAGS_HEADER, FalRequest, parse_tags
from falproxy.sandbox.responses import FalError, detail_error, format_event, open_event_stream

START_DELAY = 0.1  # seconds until a runner starts a direct call
MESSAGE_MAX = 16 * 2**20  # bytes of a WebSocket message
REALTIME_SIDE = 512  # default width and height of a realtime image, in pixels


async def run(request: FalRequest) -> web.StreamResponse:
    """POST /<endpoint>: the model's output. Not billed if the client disconnects earlier."""
    task = await read_task(request)
    await wait_for_runner(request)
    response = await run_inference(task, log=lambda message: None)
    return response.to_web_response(request.request_id)


async def stream(request: FalRequest) -> web.StreamResponse:
    """POST /<endpoint>/stream: one event for each partial result, the output as the last."""
    task = await read_task(request)
    if not find_model(task.endpoint).streams:
        raise path_not_found(f"{task.endpoint}/stream")
    await wait_for_runner(request)
    async with aclosing(stream_inference(task)) as results:
        # Raises before the stream is open, so that an input error is a plain response.
        first = await anext(results)
        response = await open_event_stream(request.http_request, request.request_id)
        await response.write(format_event(first.body))
        async for result in results:
            await response.write(format_event(result.body))
    return response


async def read_task(request: FalRequest) -> InferenceTask:
    """Read the body and return the model call.

    Raises:
        FalError: 404 if the app does not exist.
    """
    endpoint = check_app(request.path_params["endpoint"])
    body = parse_body(await request.http_request.read())
    check_balance(request.sandbox)
    tags = parse_tags(request.http_request.headers.getall(TAGS_HEADER, ()))
    return InferenceTask(request.sandbox, endpoint, body, request.request_id, tags)


def check_app(endpoint: str) -> str:
    """Return the endpoint id if its app exists.

    Raises:
        FalError: 404 if it does not.
    """
    app = app_id(endpoint)
    if app not in APPS:
        raise detail_error(404, f'Application "{app.rpartition("/")[2]}" not found')
    return endpoint


async def wait_for_runner(request: FalRequest) -> None:
    """Sleep for the start delay.

    Raises:
        FalError: 504 if the caller's start timeout is shorter.
    """
    delay = START_DELAY / request.sandbox.speed
    timeout = parse_start_timeout(request.http_request)
    if timeout is not None and timeout < delay:
        await asyncio.sleep(timeout)
        raise FalError(START_TIMEOUT)
    await asyncio.sleep(delay)


def parse_start_timeout(request: web.Request) -> float | None:
    """Return X-Fal-Request-Timeout in seconds. None if it is missing or not a number."""
    try:
        return max(0.0, float(request.headers["X-Fal-Request-Timeout"]))
    except (KeyError, ValueError):
        return None


async def connect_realtime(request: FalRequest) -> web.StreamResponse:
    """WebSocket /<endpoint>/realtime: one msgpack result for each message."""
    endpoint = check_app(request.path_params["endpoint"])
    model = find_model(endpoint)
    if not model.is_realtime:
        raise path_not_found(f"{endpoint}/realtime")
    socket = web.WebSocketResponse(max_msg_size=MESSAGE_MAX)
    await socket.prepare(request.http_request)
    if find_account(request) is None:
        await socket.send_json({"status": "error", "error": "Unauthorized"})
        await socket.close()
        return socket
    request.sandbox.sockets.add(socket)
    try:
        async for message in socket:
            await handle_message(request, socket, model, message)
    finally:
        request.sandbox.sockets.discard(socket)
    return socket


async def handle_message(
    request: FalRequest, socket: web.WebSocketResponse, model: Model, message: WSMessage
) -> None:
    """Send the result of one message, or its error as JSON."""
    body = decode_message(message)
    task = InferenceTask(request.sandbox, model.endpoint, body, request.request_id)
    try:
        result = await run_realtime(task, model)
    except FalError as error:
        response = error.response
        failure = {"error": str(response.error_type).upper(), "reason": response.error_message}
        await socket.send_json({"type": "x-fal-error", **failure})
    else:
        await socket.send_bytes(msgpack.packb(result, use_bin_type=True))


def decode_message(message: WSMessage) -> object:
    """Decode msgpack, or JSON in a text message. Return bytes if it is neither."""
    try:
        if message.type is WSMsgType.TEXT:
            return json.loads(message.data)
        return msgpack.unpackb(message.data, raw=False)
    except ValueError:  # includes the errors of msgpack
        return bytes(str(message.data), "utf-8")


async def run_realtime(task: InferenceTask, model: Model) -> InputValues:
    """Return the message's own fields, the images as bytes and the seed. Billed like any job."""
    values, input_images = await prepare_inputs(task, model)
    echo = dict(task.body) if isinstance(task.body, dict) else {}
    if "image_size" not in echo:
        values["image_size"] = {"width": REALTIME_SIDE, "height": REALTIME_SIDE}
    await asyncio.sleep(step_seconds(task, model))
    images = await asyncio.to_thread(render_images, model, values, input_images)
    output_format = get_output_format(values)
    content_type = CONTENT_TYPES[output_format]
    entries = []
    for image in images:
        content = await asyncio.to_thread(encode_image, image, output_format)
        width, height = image.size
        entries.append(
            {"content": content, "content_type": content_type, "width": width, "height": height}
        )
    bill(task, model, values, [image.size for image in images])
    return {**echo, "images": entries, "seed": values["seed"], "prompt": values["prompt"]}
