"""Realtime: pictures over a WebSocket, in msgpack."""

import asyncio
import json

import msgpack  # type: ignore[import-untyped] # it has no stubs
from aiohttp import WSMessage, WSMsgType, web

from falproxy.sandbox import rendering
from falproxy.sandbox.authentication import account_of
from falproxy.sandbox.inference import (
    Task,
    draw,
    find_model,
    format_of,
    no_path,
    pause_of,
    prepare,
    units_of,
)
from falproxy.sandbox.input_validation import Values
from falproxy.sandbox.models import Model
from falproxy.sandbox.request import Visit
from falproxy.sandbox.responses import FalError
from falproxy.sandbox.run import check_app

MESSAGE_MAX = 16 * 2**20  # bytes
SIDE = 512  # pixels of a realtime picture unless its size is asked for


async def connect(visit: Visit) -> web.StreamResponse:
    """WebSocket /<endpoint>/realtime: one result for each message."""
    endpoint = check_app(visit.named["endpoint"])
    model = find_model(endpoint)
    if not model.is_realtime:
        raise no_path(f"{endpoint}/realtime")
    socket = web.WebSocketResponse(max_msg_size=MESSAGE_MAX)
    await socket.prepare(visit.request)
    if account_of(visit.sandbox, visit.request, visit.address, visit.named) is None:
        await socket.send_json({"status": "error", "error": "Unauthorized"})
        await socket.close()
        return socket
    visit.sandbox.sockets.add(socket)
    try:
        async for message in socket:
            await reply(visit, socket, model, message)
    finally:
        visit.sandbox.sockets.discard(socket)
    return socket


async def reply(
    visit: Visit, socket: web.WebSocketResponse, model: Model, message: WSMessage
) -> None:
    """Send the result of one message, or what is wrong with it."""
    try:
        body = decode(message)
        task = Task(visit.sandbox, model.endpoint, body, visit.request_id)
        result = await draw_frame(task, model)
    except FalError as error:
        answer = error.answer
        failure = {"error": str(answer.error_type).upper(), "reason": answer.error}
        await socket.send_json({"type": "x-fal-error", **failure})
    else:
        await socket.send_bytes(msgpack.packb(result, use_bin_type=True))


def decode(message: WSMessage) -> object:
    """msgpack, or JSON as text; what is neither comes back as bytes."""
    try:
        if message.type is WSMsgType.TEXT:
            return json.loads(message.data)
        return msgpack.unpackb(message.data, raw=False)
    except ValueError:  # msgpack's errors are ValueErrors too
        return bytes(str(message.data), "utf-8")


async def draw_frame(task: Task, model: Model) -> Values:
    """The input's own fields with the pictures as bytes and the seed; paid like any job."""
    values, pictures = await prepare(task, model)
    echo = dict(task.body) if isinstance(task.body, dict) else {}
    if "image_size" not in echo:
        values["image_size"] = {"width": SIDE, "height": SIDE}
    await asyncio.sleep(pause_of(task, model))
    images = await asyncio.to_thread(draw, model, values, pictures)
    output_format = format_of(values)
    entries = []
    for image in images:
        content = await asyncio.to_thread(rendering.encode, image, output_format)
        width, height = image.size
        kind = rendering.FORMATS[output_format]
        entries.append({"content": content, "content_type": kind, "width": width, "height": height})
    units = sum(units_of(model, image.size) for image in images)
    task.sandbox.charge(model.endpoint, task.body, task.request_id, units)
    return {**echo, "images": entries, "seed": values["seed"], "prompt": values["prompt"]}
