"""Runs scenarios with fal_client through the proxy: one JSON command a line in, one result out.

The fal_client under test must be first on PYTHONPATH. Every scenario is written once and runs with
the synchronous client, the asynchronous client, and the module functions after `install`.
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
PART_SIZE = 2**16  # bytes

Scenario = Callable[..., Coroutine[Any, Any, Any]]
SCENARIOS: dict[str, Scenario] = {}


def scenario(function: Scenario) -> Scenario:
    """Register a scenario under its name."""
    SCENARIOS[function.__name__] = function
    return function


class Functions:
    """The module functions of fal_client, under the names of the client's methods."""

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


async def maybe_await(value: Any) -> Any:
    """Return the value, or the result of the awaitable that an asynchronous method returns."""
    return await value if inspect.isawaitable(value) else value


async def iterate(values: Any) -> AsyncIterator[Any]:
    """Iterate over a synchronous or asynchronous iterable."""
    if hasattr(values, "__aiter__"):
        async for value in values:
            yield value
    else:
        for value in values:
            yield value


@asynccontextmanager
async def enter(context: Any) -> AsyncIterator[Any]:
    """Enter a synchronous or asynchronous context manager."""
    if hasattr(context, "__aenter__"):
        async with context as value:
            yield value
    else:
        with context as value:
            yield value


async def capture_error(value: Any) -> dict[str, Any]:
    """Return the exception of a call.

    value: a function to call, or an awaitable.
    """
    try:
        await maybe_await(value() if callable(value) else value)
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
def patched_constants(**constants: object) -> Iterator[None]:
    """Replace constants of fal_client in a `with` block."""
    before = {name: getattr(internals, name) for name in constants}
    vars(internals).update(constants)
    try:
        yield
    finally:
        vars(internals).update(before)


def status_name(status: fal_client.Status) -> str:
    return type(status).__name__


@scenario
async def run(fal: Any, seed: int = 7) -> Any:
    inputs = {"prompt": "a heron at dawn", "seed": seed, "image_size": "square"}
    return await maybe_await(fal.run(DEV, inputs))


@scenario
async def subscribe(fal: Any) -> Any:
    enqueued: list[str] = []
    updates: list[tuple[str, int]] = []

    def on_update(status: fal_client.Status) -> None:
        updates.append((status_name(status), len(getattr(status, "logs", None) or ())))

    data = await maybe_await(
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
    job = await maybe_await(fal.submit(DEV, {"prompt": "!delay 0.3 a stone bridge", "seed": 3}))
    first = await maybe_await(job.status())
    events = [event async for event in iterate(job.iter_events(with_logs=True, interval=0.05))]
    return {
        "status_url": job.status_url,
        "first": status_name(first),
        "events": [status_name(event) for event in events],
        "logs": events[-1].logs,
        "seconds": events[-1].metrics["inference_time"],
        "data": await maybe_await(job.get()),
        "status": status_name(await maybe_await(fal.status(DEV, job.request_id))),
        "result": await maybe_await(fal.result(DEV, job.request_id)),
    }


@scenario
async def get_handle(fal: Any) -> Any:
    job = await maybe_await(fal.submit(DEV, {"prompt": "a stone bridge", "seed": 3}))
    handle = await maybe_await(fal.get_handle(DEV, job.request_id))
    return await maybe_await(handle.get())


@scenario
async def webhook(fal: Any, url: str) -> Any:
    job = await maybe_await(
        fal.submit(DEV, {"prompt": "a bell"}, webhook_url=url, hint="h", priority="low")
    )
    return await maybe_await(job.get())


@scenario
async def cancel_running(fal: Any, by_id: bool) -> Any:
    started = time.monotonic()
    job = await maybe_await(fal.submit(DEV, {"prompt": "!delay 5 a long road"}))
    while status_name(await maybe_await(job.status())) != "InProgress":
        await asyncio.sleep(0.02)
    await maybe_await(fal.cancel(DEV, job.request_id) if by_id else job.cancel())
    error = await capture_error(job.get)
    return {"seconds": time.monotonic() - started, "error": error}


@scenario
async def cancel_too_late(fal: Any) -> Any:
    job = await maybe_await(fal.submit(DEV, {"prompt": "a short road"}))
    await maybe_await(job.get())
    return await capture_error(job.cancel)


@scenario
async def stream(fal: Any) -> Any:
    started = time.monotonic()
    arrivals, last = [], None
    async for event in iterate(fal.stream(SCHNELL, {"prompt": "!delay 0.6 a kite", "seed": 5})):
        arrivals.append(time.monotonic() - started)
        last = event
    return {"arrivals": arrivals, "data": last}


@scenario
async def stream_error(fal: Any, **inputs: Any) -> Any:
    async def read_stream() -> None:
        async for _ in iterate(fal.stream(SCHNELL, inputs)):
            pass

    return await capture_error(read_stream)


@scenario
async def upload(fal: Any, path: str) -> Any:
    content = Path(path).read_bytes()
    with Image.open(path) as image:
        image_url = await maybe_await(fal.upload_image(image, format="png"))
    return {
        "bytes": await maybe_await(fal.upload(content, "image/png", "photo.png")),
        "file": await maybe_await(fal.upload_file(path)),
        "image": image_url,
        "storage": await maybe_await(fal.upload(content, "image/png", repository="fal")),
    }


@scenario
async def upload_in_parts(fal: Any, path: str, as_bytes: bool) -> Any:
    with patched_constants(MULTIPART_THRESHOLD=PART_SIZE, MULTIPART_CHUNK_SIZE=PART_SIZE):
        if as_bytes:
            return await maybe_await(fal.upload(Path(path).read_bytes(), "image/png", "photo.png"))
        return await maybe_await(fal.upload_file(path))


@scenario
async def edit(fal: Any, path: str) -> Any:
    url = await maybe_await(fal.upload_file(path))
    inputs = {"prompt": "make it winter", "image_url": url, "seed": 21}
    return {"image_url": url, "data": await maybe_await(fal.subscribe(KONTEXT, inputs))}


@scenario
async def edit_in_all_ways(fal: Any, path: str, seed: int) -> Any:
    """Make the same edit with every form of the image and every method that calls a model."""
    image_urls = {
        "bytes": await maybe_await(fal.upload(Path(path).read_bytes(), "image/png", "photo.png")),
        "file": await maybe_await(fal.upload_file(path)),
        "data": fal_client.encode_file(Path(path)),
    }
    edits = []
    for form, url in image_urls.items():
        inputs = {"prompt": "make it winter", "seed": seed, "image_url": url}
        ids: list[str] = []
        subscribed = await maybe_await(fal.subscribe(KONTEXT, inputs, on_enqueue=ids.append))
        edits.append({"form": form, "way": "subscribe", "id": ids[0], "data": subscribed})
        job = await maybe_await(fal.submit(KONTEXT, inputs))
        data = await maybe_await(job.get())
        edits.append({"form": form, "way": "submit", "id": job.request_id, "data": data})
        edits.append(
            {"form": form, "way": "run", "data": await maybe_await(fal.run(KONTEXT, inputs))}
        )
    return edits


@scenario
async def ask_about_an_edit(fal: Any, path: str) -> Any:
    """Make an edit twice, and query the second one by all methods."""
    url = await maybe_await(fal.upload_file(path))
    inputs = {"prompt": "make it winter", "seed": 21, "image_url": url}
    first = await maybe_await(fal.subscribe(KONTEXT, inputs))
    updates: list[Any] = []
    ids: list[str] = []
    subscribed = await maybe_await(
        fal.subscribe(
            KONTEXT,
            inputs,
            with_logs=True,
            on_enqueue=ids.append,
            on_queue_update=lambda status: updates.append(status_fields(status)),
        )
    )
    job = await maybe_await(fal.submit(KONTEXT, inputs))
    urls = [job.status_url, job.response_url, job.cancel_url]
    events = [event async for event in iterate(job.iter_events(with_logs=True, interval=0.02))]
    return {
        "first": first,
        "subscribed": {"id": ids[0], "updates": updates, "data": subscribed},
        "job": {"id": job.request_id, "urls": urls},
        "status": status_fields(await maybe_await(job.status())),
        "status_with_logs": status_fields(await maybe_await(job.status(with_logs=True))),
        "events": [status_fields(event) for event in events],
        "data": await maybe_await(job.get()),
        "cancel": await capture_error(job.cancel),
        "by_id": {
            "status": status_fields(
                await maybe_await(fal.status(KONTEXT, job.request_id, with_logs=True))
            ),
            "data": await maybe_await(fal.result(KONTEXT, job.request_id)),
            "cancel": await capture_error(lambda: fal.cancel(KONTEXT, job.request_id)),
        },
    }


def status_fields(status: fal_client.Status) -> dict[str, Any]:
    return {"is": status_name(status), **vars(status)}


@scenario
async def edit_by_submit(fal: Any, is_cancelled: bool, **inputs: Any) -> Any:
    job = await maybe_await(fal.submit(KONTEXT, inputs))
    if is_cancelled:
        await maybe_await(job.cancel())
        last = [event async for event in iterate(job.iter_events(interval=0.02))][-1]
        return {
            "id": job.request_id,
            "last": status_fields(last),
            "error": await capture_error(job.get),
        }
    return {"id": job.request_id, "data": await maybe_await(job.get())}


@scenario
async def submit_error(fal: Any, endpoint: str, **inputs: Any) -> Any:
    return await capture_error(lambda: fal.submit(endpoint, inputs))


@scenario
async def edit_an_upload(fal: Any, path: str) -> Any:
    url = await maybe_await(fal.upload(Path(path).read_bytes(), "image/png", Path(path).name))
    return await capture_error(
        lambda: fal.run(KONTEXT, {"prompt": "make it winter", "image_url": url})
    )


@scenario
async def make_in_all_ways(fal: Any) -> Any:
    """Make the same image by every method that calls a model, and one more by a stream."""
    results: list[Any] = [{"way": "run", "data": await maybe_await(fal.run(DEV, HERON))}]
    ids: list[str] = []
    subscribed = await maybe_await(fal.subscribe(DEV, HERON, on_enqueue=ids.append))
    results.append({"way": "subscribe", "id": ids[0], "data": subscribed})
    job = await maybe_await(fal.submit(DEV, HERON))
    results.append({"way": "submit", "id": job.request_id, "data": await maybe_await(job.get())})
    data = await maybe_await(fal.result(DEV, job.request_id))
    results.append({"way": "result", "id": job.request_id, "data": data})
    events = [event async for event in iterate(fal.stream(SCHNELL, HERON))]
    results.append({"way": "stream", "data": events[-1]})
    return results


@scenario
async def make_by_queue(fal: Any, endpoint: str, **inputs: Any) -> Any:
    """Submit a job and fetch its result once."""
    job = await maybe_await(fal.submit(endpoint, inputs))
    await wait_completed(job)
    return {"id": job.request_id, "data": await maybe_await(job.get())}


@scenario
async def result_of(fal: Any, endpoint: str, request_id: str) -> Any:
    return await maybe_await(fal.result(endpoint, request_id))


@scenario
async def result_fifty_times(fal: Any) -> Any:
    job = await maybe_await(fal.submit(DEV, HERON))
    await wait_completed(job)
    if isinstance(fal, fal_client.AsyncClient):
        return await asyncio.gather(*(fal.result(DEV, job.request_id) for _ in range(50)))
    with ThreadPoolExecutor(50) as pool:
        return list(pool.map(lambda _: fal.result(DEV, job.request_id), range(50)))


@scenario
async def edit_what_was_made(fal: Any) -> Any:
    """Make an image, and edit it twice in the same way."""
    original = await maybe_await(fal.run(DEV, HERON))
    inputs = {"prompt": "make it winter", "seed": 21, "image_url": original["images"][0]["url"]}
    edited = await maybe_await(fal.subscribe(KONTEXT, inputs))
    return {
        "made": original,
        "edited": edited,
        "again": await maybe_await(fal.run(KONTEXT, inputs)),
    }


@scenario
async def result_error(fal: Any, endpoint: str, **inputs: Any) -> Any:
    job = await maybe_await(fal.submit(endpoint, inputs))
    await wait_completed(job)
    with patched_constants(MAX_ATTEMPTS=2):
        return {"id": job.request_id, **await capture_error(job.get)}


@scenario
async def endless_stream(fal: Any, **inputs: Any) -> Any:
    events = []

    async def read_stream() -> None:
        async for event in iterate(fal.stream(SCHNELL, inputs)):
            events.append(event)

    return {**await capture_error(read_stream), "events": len(events)}


async def wait_completed(job: Any) -> None:
    async for _ in iterate(job.iter_events(interval=0.02)):
        pass


@scenario
async def realtime(fal: Any, fal_run: str, **options: Any) -> Any:
    """fal_run: URL of fal, to which sockets are opened directly."""
    with patched_constants(REALTIME_URL_FORMAT=fal_run):
        async with enter(fal.realtime(LIGHTNING, **options)) as connection:
            await maybe_await(connection.send({"prompt": "a moth", "seed": 9}))
            result = await maybe_await(connection.recv())
    return {"seed": result["seed"], "sizes": [len(image["content"]) for image in result["images"]]}


@scenario
async def ws_connect(fal: Any, fal_run: str, **options: Any) -> Any:
    with patched_constants(REALTIME_URL_FORMAT=fal_run):
        async with enter(fal.ws_connect(LIGHTNING, path="/realtime", **options)) as socket:
            await maybe_await(socket.send(msgpack.packb({"prompt": "a moth", "seed": 9})))
            result = msgpack.unpackb(await maybe_await(socket.recv()))
    return {"seed": result["seed"], "sizes": [len(image["content"]) for image in result["images"]]}


@scenario
async def run_error(fal: Any, endpoint: str = DEV, options: Any = None, **inputs: Any) -> Any:
    return await capture_error(lambda: fal.run(endpoint, inputs, **(options or {})))


@scenario
async def queue_error(fal: Any, **inputs: Any) -> Any:
    return await capture_error(lambda: fal.subscribe(DEV, inputs))


@scenario
async def realtime_error(fal: Any) -> Any:
    async def open_socket() -> None:
        async with enter(fal.realtime(LIGHTNING)):
            pass

    return await capture_error(open_socket)


@scenario
async def upload_error(fal: Any) -> Any:
    return await capture_error(lambda: fal.upload(b"x", "text/plain", fallback_repository=[]))


@scenario
async def client_timeout(fal: Any) -> Any:
    started = time.monotonic()
    inputs = {"prompt": "!delay 5 a slow train"}
    error = await capture_error(lambda: fal.subscribe(DEV, inputs, client_timeout=1.2))
    return {"seconds": time.monotonic() - started, "error": error}


@scenario
async def unreachable(fal: Any) -> Any:
    with patched_constants(MAX_ATTEMPTS=2):
        return await capture_error(lambda: fal.run(DEV, {"prompt": "unreachable"}))


@scenario
async def parallel_calls(fal: Any) -> Any:
    def call(seed: int) -> Any:
        return fal.subscribe(DEV, {"prompt": "one of many", "seed": seed, "image_size": "square"})

    if isinstance(fal, fal_client.AsyncClient):
        return await asyncio.gather(*(call(seed) for seed in range(10)))
    return await asyncio.gather(*(asyncio.to_thread(call, seed) for seed in range(10)))


@scenario
async def early_import(fal: Any) -> Any:
    return run_imported_early(DEV, {"prompt": "a heron at dawn", "seed": 7, "image_size": "square"})


@scenario
async def client_repr(fal: Any) -> Any:
    return repr([fal, fal.proxy])


@scenario
async def install_again(fal: Any, second: str) -> Any:
    falproxy_client.install(second)
    return await run(fal)


@scenario
async def defaults(fal: Any) -> Any:
    """Return the classes of the clients that the module functions are bound to."""
    owners = [value.__self__ for value in vars(fal_client).values() if hasattr(value, "__self__")]
    functions = [value for value in vars(fal_client).values() if hasattr(value, "__func__")]
    return {
        "classes": sorted({type(owner).__module__ for owner in owners}),
        "is_falproxy": isinstance(fal_client.sync_client, falproxy_client.SyncClient),
        "is_bound": all(
            function.__func__ is getattr(type(function.__self__), function.__name__)
            for function in functions
        ),
    }


@scenario
async def version(fal: Any) -> Any:
    return {"version": fal_client.__version__, "file": fal_client.__file__}


def run_scenario(command: dict[str, Any]) -> Any:
    kind, proxy = command["kind"], (command["proxy"], command["key"])
    function, options = SCENARIOS[command["scenario"]], command["options"]
    os.environ.update(command["env"])
    if "functions" in kind:
        for _ in range(2):
            falproxy_client.install(*proxy)
    try:
        fal = CLIENTS[kind](*proxy)
        for _ in range(command["loops"] - 1):
            asyncio.run(function(fal, **options))
        return asyncio.run(function(fal, **options))
    finally:
        falproxy_client.uninstall()
        for name in command["env"]:
            del os.environ[name]


def main() -> None:
    for line in sys.stdin:
        try:
            output = {"result": run_scenario(json.loads(line))}
        except Exception:
            output = {"error": traceback.format_exc()}
        print(json.dumps(output), flush=True)


if __name__ == "__main__":
    main()
