"""fal.run: the answer of a model in the same request, whole or as a stream of partial results."""

import asyncio
from contextlib import aclosing

from aiohttp import web

from falproxy.sandbox.events import event, open_events
from falproxy.sandbox.inference import Task, find_model, infer, infer_partly, no_path
from falproxy.sandbox.input_validation import parse_body
from falproxy.sandbox.job_queue import LATE
from falproxy.sandbox.models import APPS, app_of
from falproxy.sandbox.request import Visit
from falproxy.sandbox.responses import FalError, plain

START = 0.1  # seconds until a runner takes a direct call


async def run(visit: Visit) -> web.StreamResponse:
    """POST /<endpoint>: the model's output. A client that leaves before the end pays nothing."""
    task = await read_task(visit)
    await start(visit)
    answer = await infer(task, log=lambda message: None)
    return answer.response(visit.request_id)


async def stream(visit: Visit) -> web.StreamResponse:
    """POST /<endpoint>/stream: one event for each partial result, the output as the last."""
    task = await read_task(visit)
    if not find_model(task.endpoint).streams:
        raise no_path(f"{task.endpoint}/stream")
    await start(visit)
    async with aclosing(infer_partly(task)) as parts:
        first = await anext(parts)  # what fails at once is an answer, not a stream
        response = await open_events(visit, visit.request_id)
        await response.write(event(first.body))
        async for part in parts:
            await response.write(event(part.body))
    return response


async def read_task(visit: Visit) -> Task:
    """The call, with its body read. Raises FalError: 404, nobody has such an app."""
    endpoint = check_app(visit.named["endpoint"])
    body = parse_body(await visit.request.read())
    return Task(visit.sandbox, endpoint, body, visit.request_id)


def check_app(endpoint: str) -> str:
    """The endpoint id, if its app exists. Raises FalError: 404."""
    app = app_of(endpoint)
    if app not in APPS:
        raise plain(404, f'Application "{app.rpartition("/")[2]}" not found')
    return endpoint


async def start(visit: Visit) -> None:
    """Wait for a runner, unless the caller does not want to wait that long."""
    pause = START / visit.sandbox.speed
    timeout = start_timeout(visit.request)
    if timeout is not None and timeout < pause:
        await asyncio.sleep(timeout)
        raise FalError(LATE)
    await asyncio.sleep(pause)


def start_timeout(request: web.Request) -> float | None:
    """Seconds that the caller allows until its call starts; None when it did not say."""
    try:
        return max(0.0, float(request.headers["X-Fal-Request-Timeout"]))
    except (KeyError, ValueError):
        return None
