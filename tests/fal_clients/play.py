"""Plays scenarios with fal_client through the proxy: for each JSON line in, one out.

The fal_client to test comes first on PYTHONPATH. A scenario is written once, for the synchronous
client, the asynchronous one, and the functions of the module after `install`.
"""

import asyncio
import inspect
import json
import os
import sys
import time
import traceback
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import fal_client
import fal_client.client as internals
import msgpack  # type: ignore[import-untyped] # it has no stubs
from fal_client import run as run_imported_early
from PIL import Image

from falproxy import client as falproxy_client

DEV = "fal-ai/flux/dev"
SCHNELL = "fal-ai/flux/schnell"
KONTEXT = "fal-ai/flux-pro/kontext"
LIGHTNING = "fal-ai/fast-lightning-sdxl"
HERON = {"prompt": "a heron at dawn", "seed": 7, "image_size": "square"}
PART = 2**16  # bytes of an upload that is sent in parts

Scenario = Callable[..., Coroutine[Any, Any, Any]]
SCENARIOS: dict[str, Scenario] = {}


def scenario(play: Scenario) -> Scenario:
    SCENARIOS[play.__name__] = play
    return play


class Functions:
    """The functions of the module, named like the methods of a client."""

    def __init__(self, suffix: str) -> None:
        self.suffix = suffix

    def __getattr__(self, name: str) -> Any:
        return getattr(fal_client, name + self.suffix)


CLIENTS: dict[str, Callable[..., Any]] = {
    "sync": falproxy_client.SyncClient,
    "async": falproxy_client.AsyncClient,
    "functions": lambda *proxy: Functions(""),
    "async functions": lambda *proxy: Functions("_async"),
}


async def settled(value: Any) -> Any:
    """What a method returns, or what the coroutine of its twin does."""
    return await value if inspect.isawaitable(value) else value


async def each(values: Any) -> AsyncIterator[Any]:
    if hasattr(values, "__aiter__"):
        async for value in values:
            yield value
    else:
        for value in values:
            yield value


@asynccontextmanager
async def entered(context: Any) -> AsyncIterator[Any]:
    if hasattr(context, "__aenter__"):
        async with context as inside:
            yield inside
    else:
        with context as inside:
            yield inside


async def error_of(value: Any) -> dict[str, Any]:
    """What a call raises. value: a function to be called, or an awaitable."""
    try:
        await settled(value() if callable(value) else value)
    except Exception as error:
        response = getattr(error, "response", None)
        return {
            "name": type(error).__name__,
            "message": getattr(error, "message", str(error)),
            "status": getattr(error, "status_code", None),
            "type": getattr(error, "error_type", None),
            "body": response.text if response is not None else None,
            "request_id": getattr(error, "request_id", None),
        }
    raise AssertionError("nothing was raised")


@contextmanager
def changed(**constants: object) -> Iterator[None]:
    """fal_client with other constants, for a while."""
    before = {name: getattr(internals, name) for name in constants}
    vars(internals).update(constants)
    try:
        yield
    finally:
        vars(internals).update(before)


def content_of(path: str) -> bytes:
    return Path(path).read_bytes()


def word(status: fal_client.Status) -> str:
    return type(status).__name__


@scenario
async def run(fal: Any, seed: int = 7) -> Any:
    inputs = {"prompt": "a heron at dawn", "seed": seed, "image_size": "square"}
    return await settled(fal.run(DEV, inputs))


@scenario
async def subscribe(fal: Any) -> Any:
    enqueued: list[str] = []
    updates: list[tuple[str, int]] = []

    def on_update(status: fal_client.Status) -> None:
        updates.append((word(status), len(getattr(status, "logs", None) or ())))

    data = await settled(
        fal.subscribe(
            DEV,
            {"prompt": "!delay 0.4 a paper boat on a river", "seed": 11},
            with_logs=True,
            on_enqueue=enqueued.append,
            on_queue_update=on_update,
        )
    )
    return {"enqueued": enqueued, "updates": updates, "data": data}


@scenario
async def handle(fal: Any) -> Any:
    job = await settled(fal.submit(DEV, {"prompt": "!delay 0.3 a stone bridge", "seed": 3}))
    first = await settled(job.status())
    events = [event async for event in each(job.iter_events(with_logs=True, interval=0.05))]
    return {
        "status_url": job.status_url,
        "first": word(first),
        "events": [word(event) for event in events],
        "logs": events[-1].logs,
        "seconds": events[-1].metrics["inference_time"],
        "data": await settled(job.get()),
        "status": word(await settled(fal.status(DEV, job.request_id))),
        "result": await settled(fal.result(DEV, job.request_id)),
    }


@scenario
async def found_handle(fal: Any) -> Any:
    job = await settled(fal.submit(DEV, {"prompt": "a stone bridge", "seed": 3}))
    found = await settled(fal.get_handle(DEV, job.request_id))
    return await settled(found.get())


@scenario
async def webhook(fal: Any, url: str) -> Any:
    job = await settled(
        fal.submit(DEV, {"prompt": "a bell"}, webhook_url=url, hint="h", priority="low")
    )
    return await settled(job.get())


@scenario
async def cancel_running(fal: Any, by_id: bool) -> Any:
    started = time.monotonic()
    job = await settled(fal.submit(DEV, {"prompt": "!delay 5 a long road"}))
    while word(await settled(job.status())) != "InProgress":
        await asyncio.sleep(0.02)
    await settled(fal.cancel(DEV, job.request_id) if by_id else job.cancel())
    error = await error_of(job.get)
    return {"seconds": time.monotonic() - started, "error": error}


@scenario
async def cancel_too_late(fal: Any) -> Any:
    job = await settled(fal.submit(DEV, {"prompt": "a short road"}))
    await settled(job.get())
    return await error_of(job.cancel)


@scenario
async def stream(fal: Any) -> Any:
    started = time.monotonic()
    arrivals, last = [], None
    async for event in each(fal.stream(SCHNELL, {"prompt": "!delay 0.6 a kite", "seed": 5})):
        arrivals.append(time.monotonic() - started)
        last = event
    return {"arrivals": arrivals, "data": last}


@scenario
async def stream_error(fal: Any, **inputs: Any) -> Any:
    async def play() -> None:
        async for _ in each(fal.stream(SCHNELL, inputs)):
            pass

    return await error_of(play)


@scenario
async def upload(fal: Any, path: str) -> Any:
    content = content_of(path)
    with Image.open(path) as image:
        pixels = await settled(fal.upload_image(image, format="png"))
    return {
        "bytes": await settled(fal.upload(content, "image/png", "photo.png")),
        "file": await settled(fal.upload_file(path)),
        "image": pixels,
        "storage": await settled(fal.upload(content, "image/png", repository="fal")),
    }


@scenario
async def upload_in_parts(fal: Any, path: str, as_bytes: bool) -> Any:
    with changed(MULTIPART_THRESHOLD=PART, MULTIPART_CHUNK_SIZE=PART):
        if as_bytes:
            return await settled(fal.upload(content_of(path), "image/png", "photo.png"))
        return await settled(fal.upload_file(path))


@scenario
async def edit(fal: Any, path: str) -> Any:
    url = await settled(fal.upload_file(path))
    inputs = {"prompt": "make it winter", "image_url": url, "seed": 21}
    return {"image_url": url, "data": await settled(fal.subscribe(KONTEXT, inputs))}


@scenario
async def edit_in_all_ways(fal: Any, path: str, seed: int) -> Any:
    """The same edit with its picture in every form, by every way to call a model."""
    pictures = {
        "bytes": await settled(fal.upload(content_of(path), "image/png", "photo.png")),
        "file": await settled(fal.upload_file(path)),
        "data": fal_client.encode_file(Path(path)),
    }
    edits = []
    for form, url in pictures.items():
        inputs = {"prompt": "make it winter", "seed": seed, "image_url": url}
        ids: list[str] = []
        subscribed = await settled(fal.subscribe(KONTEXT, inputs, on_enqueue=ids.append))
        edits.append({"form": form, "way": "subscribe", "id": ids[0], "data": subscribed})
        job = await settled(fal.submit(KONTEXT, inputs))
        got = await settled(job.get())
        edits.append({"form": form, "way": "submit", "id": job.request_id, "data": got})
        edits.append({"form": form, "way": "run", "data": await settled(fal.run(KONTEXT, inputs))})
    return edits


@scenario
async def ask_about_an_edit(fal: Any, path: str) -> Any:
    """Makes an edit twice, and asks all there is to ask about the second."""
    url = await settled(fal.upload_file(path))
    inputs = {"prompt": "make it winter", "seed": 21, "image_url": url}
    first = await settled(fal.subscribe(KONTEXT, inputs))
    updates: list[Any] = []
    ids: list[str] = []
    subscribed = await settled(
        fal.subscribe(
            KONTEXT,
            inputs,
            with_logs=True,
            on_enqueue=ids.append,
            on_queue_update=lambda status: updates.append(told(status)),
        )
    )
    job = await settled(fal.submit(KONTEXT, inputs))
    urls = [job.status_url, job.response_url, job.cancel_url]
    events = [event async for event in each(job.iter_events(with_logs=True, interval=0.02))]
    return {
        "first": first,
        "subscribed": {"id": ids[0], "updates": updates, "data": subscribed},
        "job": {"id": job.request_id, "urls": urls},
        "status": told(await settled(job.status())),
        "status_with_logs": told(await settled(job.status(with_logs=True))),
        "events": [told(event) for event in events],
        "data": await settled(job.get()),
        "cancel": await error_of(job.cancel),
        "by_id": {
            "status": told(await settled(fal.status(KONTEXT, job.request_id, with_logs=True))),
            "data": await settled(fal.result(KONTEXT, job.request_id)),
            "cancel": await error_of(lambda: fal.cancel(KONTEXT, job.request_id)),
        },
    }


def told(status: fal_client.Status) -> dict[str, Any]:
    return {"is": word(status), **vars(status)}


@scenario
async def edit_by_submit(fal: Any, is_cancelled: bool, **inputs: Any) -> Any:
    job = await settled(fal.submit(KONTEXT, inputs))
    if is_cancelled:
        await settled(job.cancel())
        last = [event async for event in each(job.iter_events(interval=0.02))][-1]
        return {"id": job.request_id, "last": told(last), "error": await error_of(job.get)}
    return {"id": job.request_id, "data": await settled(job.get())}


@scenario
async def submit_error(fal: Any, endpoint: str, **inputs: Any) -> Any:
    return await error_of(lambda: fal.submit(endpoint, inputs))


@scenario
async def edit_an_upload(fal: Any, path: str) -> Any:
    url = await settled(fal.upload(content_of(path), "image/png", Path(path).name))
    return await error_of(lambda: fal.run(KONTEXT, {"prompt": "make it winter", "image_url": url}))


@scenario
async def make_in_all_ways(fal: Any) -> Any:
    """The same picture by every way to call a model, and one more as the end of a stream."""
    made: list[Any] = [{"way": "run", "data": await settled(fal.run(DEV, HERON))}]
    ids: list[str] = []
    subscribed = await settled(fal.subscribe(DEV, HERON, on_enqueue=ids.append))
    made.append({"way": "subscribe", "id": ids[0], "data": subscribed})
    job = await settled(fal.submit(DEV, HERON))
    made.append({"way": "submit", "id": job.request_id, "data": await settled(job.get())})
    found = await settled(fal.result(DEV, job.request_id))
    made.append({"way": "result", "id": job.request_id, "data": found})
    events = [event async for event in each(fal.stream(SCHNELL, HERON))]
    made.append({"way": "stream", "data": events[-1]})
    return made


@scenario
async def make_by_queue(fal: Any, endpoint: str, **inputs: Any) -> Any:
    """Its result is fetched once."""
    job = await settled(fal.submit(endpoint, inputs))
    await ended(job)
    return {"id": job.request_id, "data": await settled(job.get())}


@scenario
async def result_of(fal: Any, endpoint: str, request_id: str) -> Any:
    return await settled(fal.result(endpoint, request_id))


@scenario
async def result_fifty_times(fal: Any) -> Any:
    job = await settled(fal.submit(DEV, HERON))
    await ended(job)
    if isinstance(fal, fal_client.AsyncClient):
        return await asyncio.gather(*(fal.result(DEV, job.request_id) for _ in range(50)))
    with ThreadPoolExecutor(50) as pool:
        return list(pool.map(lambda _: fal.result(DEV, job.request_id), range(50)))


@scenario
async def edit_what_was_made(fal: Any) -> Any:
    """Makes a picture, and edits what was made, twice the same."""
    made = await settled(fal.run(DEV, HERON))
    inputs = {"prompt": "make it winter", "seed": 21, "image_url": made["images"][0]["url"]}
    edited = await settled(fal.subscribe(KONTEXT, inputs))
    return {"made": made, "edited": edited, "again": await settled(fal.run(KONTEXT, inputs))}


@scenario
async def result_error(fal: Any, endpoint: str, **inputs: Any) -> Any:
    job = await settled(fal.submit(endpoint, inputs))
    await ended(job)
    with changed(MAX_ATTEMPTS=2):
        return {"id": job.request_id, **await error_of(job.get)}


@scenario
async def endless_stream(fal: Any, **inputs: Any) -> Any:
    events = []

    async def play() -> None:
        async for event in each(fal.stream(SCHNELL, inputs)):
            events.append(event)

    return {**await error_of(play), "events": len(events)}


async def ended(job: Any) -> None:
    async for _ in each(job.iter_events(interval=0.02)):
        pass


@scenario
async def realtime(fal: Any, fal_run: str, **options: Any) -> Any:
    """Sockets go to fal itself, which is `fal_run` here."""
    with changed(REALTIME_URL_FORMAT=fal_run):
        async with entered(fal.realtime(LIGHTNING, **options)) as connection:
            await settled(connection.send({"prompt": "a moth", "seed": 9}))
            answer = await settled(connection.recv())
    return {"seed": answer["seed"], "sizes": [len(image["content"]) for image in answer["images"]]}


@scenario
async def ws_connect(fal: Any, fal_run: str, **options: Any) -> Any:
    with changed(REALTIME_URL_FORMAT=fal_run):
        async with entered(fal.ws_connect(LIGHTNING, path="/realtime", **options)) as socket:
            await settled(socket.send(msgpack.packb({"prompt": "a moth", "seed": 9})))
            answer = msgpack.unpackb(await settled(socket.recv()))
    return {"seed": answer["seed"], "sizes": [len(image["content"]) for image in answer["images"]]}


@scenario
async def run_error(fal: Any, endpoint: str = DEV, options: Any = None, **inputs: Any) -> Any:
    return await error_of(lambda: fal.run(endpoint, inputs, **(options or {})))


@scenario
async def queue_error(fal: Any, **inputs: Any) -> Any:
    return await error_of(lambda: fal.subscribe(DEV, inputs))


@scenario
async def realtime_error(fal: Any) -> Any:
    async def play() -> None:
        async with entered(fal.realtime(LIGHTNING)):
            pass

    return await error_of(play)


@scenario
async def upload_error(fal: Any) -> Any:
    return await error_of(lambda: fal.upload(b"x", "text/plain", fallback_repository=[]))


@scenario
async def client_timeout(fal: Any) -> Any:
    started = time.monotonic()
    inputs = {"prompt": "!delay 5 a slow train"}
    error = await error_of(lambda: fal.subscribe(DEV, inputs, client_timeout=1.2))
    return {"seconds": time.monotonic() - started, "error": error}


@scenario
async def unreachable(fal: Any) -> Any:
    with changed(MAX_ATTEMPTS=2):
        return await error_of(lambda: fal.run(DEV, {"prompt": "nobody there"}))


@scenario
async def many_at_once(fal: Any) -> Any:
    def one(seed: int) -> Any:
        return fal.subscribe(DEV, {"prompt": "one of many", "seed": seed, "image_size": "square"})

    if isinstance(fal, fal_client.AsyncClient):
        return await asyncio.gather(*(one(seed) for seed in range(10)))
    return await asyncio.gather(*(asyncio.to_thread(one, seed) for seed in range(10)))


@scenario
async def early_import(fal: Any) -> Any:
    return run_imported_early(DEV, {"prompt": "a heron at dawn", "seed": 7, "image_size": "square"})


@scenario
async def shown(fal: Any) -> Any:
    return repr([fal, fal.proxy])


@scenario
async def install_again(fal: Any, second: str) -> Any:
    falproxy_client.install(second)
    return await run(fal)


@scenario
async def defaults(fal: Any) -> Any:
    """Whose methods the functions of the module are now."""
    owners = [value.__self__ for value in vars(fal_client).values() if hasattr(value, "__self__")]
    functions = [value for value in vars(fal_client).values() if hasattr(value, "__func__")]
    return {
        "classes": sorted({type(owner).__module__ for owner in owners}),
        "is_ours": isinstance(fal_client.sync_client, falproxy_client.SyncClient),
        "is_bound": all(
            function.__func__ is getattr(type(function.__self__), function.__name__)
            for function in functions
        ),
    }


@scenario
async def version(fal: Any) -> Any:
    return {"version": fal_client.__version__, "file": fal_client.__file__}


def play(order: dict[str, Any]) -> Any:
    kind, proxy = order["kind"], (order["proxy"], order["key"])
    os.environ.update(order["env"])
    if "functions" in kind:
        for _ in range(2):
            falproxy_client.install(*proxy)
    try:
        fal = CLIENTS[kind](*proxy)
        for _ in range(order["loops"] - 1):
            asyncio.run(SCENARIOS[order["scenario"]](fal, **order["options"]))
        return asyncio.run(SCENARIOS[order["scenario"]](fal, **order["options"]))
    finally:
        falproxy_client.uninstall()
        for name in order["env"]:
            del os.environ[name]


def main() -> None:
    for line in sys.stdin:
        try:
            answer = {"result": play(json.loads(line))}
        except Exception:
            answer = {"failed": traceback.format_exc()}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
