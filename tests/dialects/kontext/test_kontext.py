"""`/kontext`, `/kontext/max` and `/kontext/dev` with the sandbox as fal."""

import asyncio
import base64
import hashlib
import io
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from aiohttp import ClientResponse, ClientSession, TCPConnector, web
from aiohttp.pytest_plugin import AiohttpClient, AiohttpServer
from tenacity import wait_none

from falproxy import Settings
from falproxy.app import HANDLER_ARGS
from falproxy.app.pipeline import (
    CallResources,
    authentication,
    authorization,
    call_pipeline,
    compose,
)
from falproxy.app.resources import open_rehosting, open_result_cache
from falproxy.background import Background, background_context
from falproxy.dialects import default_error, handle_errors, method_check_middleware
from falproxy.dialects.blocking import blocking_route
from falproxy.dialects.kontext import KontextDeps, kontext_dialect
from falproxy.dialects.kontext.requests import VARIANTS
from falproxy.dialects.queue_client import WaitPolicy
from falproxy.fal.image_formats import Format
from falproxy.fal.keys import KeyPool
from falproxy.media.fetch import Fetcher, FetchTimeouts, fetcher_context
from falproxy.metrics import METRICS, Metrics
from falproxy.middleware.access_log import access_log, add_timing_headers
from falproxy.middleware.cors import check_origin
from falproxy.proxy.upstream import connect_upstream
from falproxy.sandbox.faults import FAULTS
from falproxy.spool import Spool
from falproxy.stores.files import StorageError
from tests.support.fake_fal import FakeFal, WireFal, read_head
from tests.support.fake_hosts import Names
from tests.support.gateway import Gateway
from tests.support.key_search import CANARY, leak_trace
from tests.support.kontext_parameters import ALL, CELLS, GIF, PARAMETERS, uri
from tests.support.offline_fal import OfflineFal, offline_fal, png
from tests.support.settings import make_settings
from tests.support.waiting import wait_until

TIMEOUT = 5.0  # seconds; of `wait_until`
REQUEST_TIMEOUT = 30.0  # seconds; 10 MB take more than three on a busy machine

PNG = png()
DATA = base64.b64encode(PNG).decode()
CAT = {"prompt": "a cat", "image_data": DATA}
StoreInput = Callable[[Spool], Awaitable[str]]
OpenKontext = Callable[..., Awaitable[Gateway]]
RequestHandler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def kontext_app(
    settings: Settings, fetcher: Fetcher, store_input: StoreInput | None
) -> web.Application:
    """Create a proxy with the Kontext paths, which repeats failed steps without a pause."""
    app = web.Application(handler_args=HANDLER_ARGS, middlewares=[handle_errors(default_error)])
    app[METRICS] = Metrics()
    key_pool = KeyPool(settings.fal_keys, time.monotonic)
    timeouts = (settings.upstream.connect_timeout, settings.upstream.timeout)
    app.cleanup_ctx.append(
        connect_upstream(key_pool.next_key(), origin=settings.upstream.origin, timeouts=timeouts)
    )
    app.cleanup_ctx.append(fetcher_context(fetcher))
    rehosting = open_rehosting(app, settings, fetcher, "")
    result_cache = open_result_cache(app, settings)
    background = Background()
    app.cleanup_ctx.append(background_context(background, 5.0))
    authenticators = authentication(settings, None)
    authorizers = authorization(
        app, settings, key_pool, result_cache, is_locked=bool(authenticators)
    )
    pipeline = call_pipeline(settings, CallResources(key_pool, fetcher, rehosting, result_cache))
    if store_input is None and rehosting is not None:
        store_input = rehosting.rehoster.store
    deps = KontextDeps(
        max_body=settings.server.max_body, background=background, store_input=store_input
    )
    wait_policy = WaitPolicy(
        total=settings.dialects.wait, background=background, retry_wait=wait_none()
    )
    for variant in VARIANTS:
        route = blocking_route(kontext_dialect(variant, deps), wait_policy)
        middlewares = [
            access_log(app[METRICS]),
            handle_errors(route.refuse),
            method_check_middleware(route.check),
            check_origin(()),
            *authenticators,
            route.middleware,
            *authorizers,
        ]
        app.router.add_route("*", f"/{variant}", compose(middlewares, pipeline))
    app.on_response_prepare.append(add_timing_headers)
    return app


@pytest.fixture(autouse=True)
def fal_outlives_the_proxy(aiohttp_server: AiohttpServer) -> None:
    """Keep fal running until the proxy is closed: fixtures are closed in reverse order."""


@pytest.fixture
async def fal_offline(aiohttp_client: AiohttpClient) -> OfflineFal:
    return await offline_fal(aiohttp_client)


@pytest.fixture
def open_kontext(aiohttp_client: AiohttpClient, tmp_path: Path) -> OpenKontext:
    async def make(origin: str, store_input: StoreInput | None = None, **options: Any) -> Gateway:
        fields: dict[str, Any] = {"upstream_origin": origin, "data_dir": tmp_path} | options
        timeouts = FetchTimeouts(per_attempt=2.0, idle=1.0, overall=2.0, backoff=wait_none())
        fetcher = Fetcher(trusted=[f"{origin}/"], resolver=Names({}), timeouts=timeouts)
        client = await aiohttp_client(
            kontext_app(make_settings(fal_key=CANARY, **fields), fetcher, store_input),
            connector=TCPConnector(limit=0),
            trace_configs=[leak_trace()],
        )
        return Gateway(client, f"http://127.0.0.1:{client.port}")

    return make


@pytest.fixture
async def gateway(open_kontext: OpenKontext, fal_offline: OfflineFal) -> Gateway:
    return await open_kontext(fal_offline.sandbox.public_url)


@pytest.fixture
async def uncached(open_kontext: OpenKontext, fal_offline: OfflineFal) -> Gateway:
    return await open_kontext(fal_offline.sandbox.public_url, cache=False)


async def post(
    gateway: Gateway, body: object = CAT, variant: str = "kontext", **headers: str
) -> ClientResponse:
    fields = {name.replace("_", "-"): value for name, value in headers.items()}
    fields["Content-Type"] = "application/json"
    content = io.BytesIO(json.dumps(body).encode())
    async with asyncio.timeout(REQUEST_TIMEOUT):
        response = await gateway.client.post(f"/{variant}", data=content, headers=fields)
        await response.read()
    return response


async def result(response: ClientResponse) -> dict[str, Any]:
    document = await response.json()
    assert response.status == 200, document
    assert set(document) == {"images", "prompt"}
    for image in document["images"]:
        assert set(image) == {"url", "width", "height"}
    return dict(document)


async def error(response: ClientResponse) -> tuple[int, str, str]:
    """Return status, code and message of an error."""
    document = await response.json()
    assert set(document) == {"error"}, document
    assert set(document["error"]) == {"code", "message"}
    assert document["error"]["message"].endswith(".")
    return response.status, document["error"]["code"], document["error"]["message"]


def inputs(fal: OfflineFal) -> list[dict[str, Any]]:
    """Return the inputs of the jobs that fal charged for."""
    return [paid.input for paid in fal.sandbox.paid if isinstance(paid.input, dict)]


def statuses(fal: OfflineFal, method: str, suffix: str = "") -> list[int]:
    """Return the statuses of the requests to fal with a method and a suffix of the path."""
    return [
        seen.status
        for seen in fal.sandbox.seen
        if seen.method == method and seen.path.endswith(suffix)
    ]


# Results


@pytest.mark.parametrize("variant", ALL)
async def test_an_image_is_edited(
    gateway: Gateway, fal_offline: OfflineFal, variant: str, session: ClientSession
) -> None:
    response = await post(gateway, CAT | {"num_images": 2}, variant)
    document = await result(response)
    assert document["prompt"] == "a cat"
    assert len(document["images"]) == 2
    for image in document["images"]:
        assert image["width"] > 0
        assert image["height"] > 0
        file = await session.get(image["url"])
        assert (await file.read()).startswith(b"\xff\xd8\xff")
    (paid,) = fal_offline.sandbox.paid
    assert paid.endpoint == VARIANTS[variant].endpoint
    assert paid.input == {"prompt": "a cat", "image_url": uri(PNG), "num_images": 2}
    assert response.headers["x-fal-request-id"] == paid.request_id
    assert response.headers["Cache-Status"].startswith("falproxy; fwd=miss")
    assert "X-Request-ID" in response.headers
    assert "Age" not in response.headers


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        pytest.param(
            {"images": [{"url": "https://a.example/b.png"}]},
            {"images": [{"url": "https://a.example/b.png", "width": None, "height": None}],
             "prompt": "a cat"},
            id="only a URL",
        ),
        pytest.param(
            {"images": [{"url": "u", "width": None, "height": "9", "file_size": 3}], "seed": 1,
             "prompt": "a fat cat", "has_nsfw_concepts": [False]},
            {"images": [{"url": "u", "width": None, "height": None}], "prompt": "a fat cat"},
            id="other fields",
        ),
        pytest.param(
            {"images": [{"url": "u", "width": 640, "height": 480}], "prompt": ""},
            {"images": [{"url": "u", "width": 640, "height": 480}], "prompt": "a cat"},
            id="no prompt",
        ),
    ],
)  # fmt: skip
async def test_a_result_has_the_same_fields_for_all_outputs(
    open_kontext: OpenKontext, fal: FakeFal, output: object, expected: object
) -> None:
    fal.respond = fake_queue(output)
    assert await result(await post(await open_kontext(fal.origin))) == expected


@pytest.mark.parametrize(
    "output",
    [{}, [], "text", {"images": []}, {"images": ["u"]}, {"images": [{"width": 1}]},
     {"images": [{"url": None}]}, {"image": {"url": "u"}}],
    ids=json.dumps,
)  # fmt: skip
async def test_a_result_without_images_is_a_500(
    open_kontext: OpenKontext, fal: FakeFal, output: object
) -> None:
    fal.respond = fake_queue(output)
    response = await post(await open_kontext(fal.origin))
    assert (await error(response))[:2] == (500, "upstream_unreadable")


def fake_queue(output: object) -> RequestHandler:
    """Create a handler that emulates fal's queue. Its jobs are completed at once."""

    async def serve(request: web.Request) -> web.StreamResponse:
        if request.method == "POST":
            return web.json_response({"request_id": "1", "status": "IN_QUEUE"})
        is_status = request.path.endswith("/status")
        return web.json_response({"status": "COMPLETED"} if is_status else output)

    return serve


@pytest.mark.parametrize(
    ("variant", "body"),
    [
        pytest.param(
            "kontext",
            {"prompt": "Put a donut next to the flour.",
             "image_url": "https://v3.fal.media/files/rabbit/rmgBxhwGYb2d3pl3x9sKf_output.png"},
            id="of kontext",
        ),
        pytest.param(
            "kontext/max",
            {"prompt": "Put a donut next to the flour.", "guidance_scale": 3.5, "num_images": 1,
             "output_format": "jpeg", "safety_tolerance": "2", "sync_mode": False,
             "image_url": "https://v3.fal.media/files/rabbit/rmgBxhwGYb2d3pl3x9sKf_output.png"},
            id="of max, with all parameters",
        ),
        pytest.param(
            "kontext/dev",
            {"prompt": "Change the setting to a day time, add a lot of people walking the "
             "sidewalk while maintaining the same style of the painting",
             "image_url": "https://storage.googleapis.com/falserverless/example_inputs/kontext_"
             "example_input.webp", "num_inference_steps": 28, "guidance_scale": 2.5,
             "num_images": 1, "enable_safety_checker": True, "output_format": "jpeg",
             "acceleration": "none", "resolution_mode": "match_input"},
            id="of dev",
        ),
    ],
)  # fmt: skip
async def test_the_examples_of_fal_s_documentation_are_valid(
    gateway: Gateway, fal_offline: OfflineFal, variant: str, body: dict[str, Any]
) -> None:
    document = await result(await post(gateway, body, variant))
    assert document["prompt"] == body["prompt"]
    assert [paid.input for paid in fal_offline.sandbox.paid] == [body]


@pytest.mark.parametrize("variant", ALL)
async def test_the_examples_of_the_schema_are_valid(gateway: Gateway, variant: str) -> None:
    for example in VARIANTS[variant].request.model_json_schema()["examples"]:
        await result(await post(gateway, example, variant))


# Parameters


@pytest.mark.parametrize(("name", "variant"), CELLS)
async def test_fal_gets_the_parameters_of_the_variant(
    uncached: Gateway, fal_offline: OfflineFal, name: str, variant: str
) -> None:
    parameter = PARAMETERS[name]
    is_supported = variant in parameter.variants
    values = [*parameter.valid, (None, None)]
    if not is_supported:
        values += [(value, None) for value in parameter.invalid]
    bodies = [
        {"prompt": f"{index}", "image_data": DATA, name: value}
        for index, (value, _) in enumerate(values)
    ]
    responses = await asyncio.gather(*(post(uncached, body, variant) for body in bodies))
    assert {response.status for response in responses} == {200}
    expected = {
        f"{index}": {"prompt": f"{index}", "image_url": uri(PNG)}
        | ({name: received} if is_supported and received is not None else {})
        for index, (_, received) in enumerate(values)
    }
    assert {sent["prompt"]: sent for sent in inputs(fal_offline)} == expected


@pytest.mark.parametrize(
    ("name", "variant"),
    [(name, variant) for name, parameter in PARAMETERS.items() for variant in parameter.variants],
)
async def test_an_invalid_parameter_is_not_sent_to_fal(
    gateway: Gateway, fal_offline: OfflineFal, name: str, variant: str
) -> None:
    parameter = PARAMETERS[name]
    for value in parameter.invalid:
        response = await post(gateway, CAT | {name: value}, variant)
        message = f"{name} must be {parameter.description}."
        assert await error(response) == (400, "parameter_invalid", message), value
    assert fal_offline.sandbox.seen == []


@pytest.mark.parametrize(
    ("body", "code"),
    [
        pytest.param({"image_data": DATA}, "parameter_invalid", id="no prompt"),
        pytest.param({"prompt": "a cat"}, "image_missing", id="no image"),
        pytest.param(CAT | {"image_url": uri(PNG)}, "image_ambiguous", id="two images"),
        pytest.param(CAT | {"image_data": "!"}, "image_unreadable", id="not base64"),
        pytest.param(
            CAT | {"image_data": uri(GIF)}, "unsupported_image_format", id="a GIF in the request"
        ),
        pytest.param(
            CAT | {"image_data": base64.b64encode(PNG.ljust(10 * 2**20 + 1)).decode()},
            "file_too_large",
            id="a byte too many",
        ),
        pytest.param(["a cat"], "body_unreadable", id="a list"),
    ],
)
async def test_an_invalid_request_is_a_400_and_not_sent_to_fal(
    gateway: Gateway, fal_offline: OfflineFal, body: object, code: str
) -> None:
    assert (await error(await post(gateway, body)))[:2] == (400, code)
    assert fal_offline.sandbox.seen == []


async def test_an_image_of_ten_mb_is_sent(uncached: Gateway, fal_offline: OfflineFal) -> None:
    content = PNG.ljust(10 * 2**20, b"\0")
    await result(await post(uncached, CAT | {"image_data": base64.b64encode(content).decode()}))
    (paid,) = fal_offline.sandbox.paid
    assert paid.input == {"prompt": "a cat", "image_url": uri(content)}


# Images behind URLs


async def test_the_url_of_an_image_is_sent_unchanged(
    gateway: Gateway, fal_offline: OfflineFal
) -> None:
    url = put_file(fal_offline, "a.png", PNG)
    await result(await post(gateway, {"prompt": "a cat", "image_url": url}))
    (paid,) = fal_offline.sandbox.paid
    assert paid.input == {"prompt": "a cat", "image_url": url}


def put_file(fal: OfflineFal, name: str, content: bytes) -> str:
    """Store a file at fal, and return its URL."""
    files = fal.sandbox.files
    key = files.new_key(name)
    files.put(key, io.BytesIO(content), "image/png")
    return fal.sandbox.file_url(key)


async def test_a_url_of_a_file_that_is_not_an_image_is_a_400(
    gateway: Gateway, fal_offline: OfflineFal
) -> None:
    url = put_file(fal_offline, "a.png", b"%PDF-1.7 and more")
    response = await post(gateway, {"prompt": "a cat", "image_url": url})
    status, code, message = await error(response)
    assert (status, code) == (400, "unsupported_image_format")
    assert "a PDF document" in message
    assert fal_offline.sandbox.jobs == 0


@pytest.mark.parametrize("cache", [True, False])
async def test_a_url_of_a_gif_is_a_400(
    open_kontext: OpenKontext, fal_offline: OfflineFal, cache: bool
) -> None:
    gateway = await open_kontext(fal_offline.sandbox.public_url, cache=cache)
    url = put_file(fal_offline, "a.gif", GIF)
    status, code, message = await error(await post(gateway, {"prompt": "a cat", "image_url": url}))
    assert (status, code) == (400, "unsupported_image_format")
    assert message.endswith("a GIF image. Supported formats are .jpg, .jpeg, .png.")
    assert fal_offline.sandbox.jobs == 0
    await result(
        await post(gateway, {"prompt": "a", "image_url": put_file(fal_offline, "a.png", PNG)})
    )


async def test_the_setting_of_image_formats_applies(
    open_kontext: OpenKontext, fal_offline: OfflineFal
) -> None:
    gateway = await open_kontext(
        fal_offline.sandbox.public_url, image_formats=(Format.PNG, Format.GIF)
    )
    jpeg = uri(b"\xff\xd8\xff\xe0" + bytes(100))
    response = await post(gateway, {"prompt": "a cat", "image_data": jpeg})
    assert (await error(response))[:2] == (400, "unsupported_image_format")
    await result(await post(gateway))


async def test_a_url_with_a_private_address_is_a_400(
    gateway: Gateway, fal_offline: OfflineFal
) -> None:
    response = await post(gateway, {"prompt": "a cat", "image_url": "http://192.168.0.1/a.png"})
    assert (await error(response))[:2] == (400, "image_load_error")
    assert fal_offline.sandbox.seen == []


async def test_a_url_whose_host_responds_with_404_is_a_400(
    gateway: Gateway, fal_offline: OfflineFal
) -> None:
    url = fal_offline.sandbox.file_url("nothing/here.png")
    response = await post(gateway, {"prompt": "a cat", "image_url": url})
    assert (await error(response))[:2] == (400, "file_download_error")
    assert fal_offline.sandbox.jobs == 0


# Refusals by the proxy


@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "DELETE", "PATCH", "OPTIONS"])
async def test_another_method_is_a_405(
    gateway: Gateway, fal_offline: OfflineFal, method: str
) -> None:
    response = await gateway.client.request(method, "/kontext", json=CAT)
    assert (response.status, response.headers["Allow"]) == (405, "POST")
    if method != "HEAD":
        assert (await error(response))[1] == "method_not_allowed"
    assert fal_offline.sandbox.seen == []


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Content-Type": "text/plain"}, 415),
        ({"Content-Type": "multipart/form-data; boundary=x"}, 415),
        ({}, 415),
        ({"Content-Type": "application/json", "Content-Encoding": "gzip"}, 415),
        ({"Content-Type": "application/json; charset=utf-8"}, 200),
    ],
)
async def test_a_body_is_plain_json(gateway: Gateway, headers: dict[str, str], status: int) -> None:
    body = json.dumps(CAT).encode()
    response = await gateway.client.post(
        "/kontext", data=body, headers=headers, skip_auto_headers=("Content-Type",)
    )
    assert response.status == status
    if status != 200:
        assert (await error(response))[0] == 415


@pytest.mark.parametrize("headers", [{}, {"Content-Type": "application/json"}])
async def test_a_missing_body_is_refused(gateway: Gateway, headers: dict[str, str]) -> None:
    response = await gateway.client.post("/kontext", headers=headers)
    assert (await error(response))[0] == (400 if headers else 415)


@pytest.mark.parametrize("is_chunked", [False, True])
async def test_a_body_past_the_limit_is_a_413(
    open_kontext: OpenKontext, fal_offline: OfflineFal, is_chunked: bool
) -> None:
    gateway = await open_kontext(fal_offline.sandbox.public_url, max_body=1000)

    async def chunks() -> AsyncIterator[bytes]:
        yield b" " * 1001

    response = await gateway.client.post(
        "/kontext",
        data=chunks() if is_chunked else b" " * 1001,
        headers={"Content-Type": "application/json"},
    )
    assert (await error(response))[:2] == (413, "body_too_large")
    assert fal_offline.sandbox.seen == []


async def test_authentication_and_allowed_endpoints_apply(
    open_kontext: OpenKontext, fal_offline: OfflineFal
) -> None:
    gateway = await open_kontext(
        fal_offline.sandbox.public_url,
        access_keys=(("anna", "secret"),),
        allowed_endpoints=("fal-ai/flux-kontext/dev",),
    )
    anna = "Bearer secret"
    assert (await error(await post(gateway)))[:2] == (401, "unauthenticated")
    assert (await error(await post(gateway, Authorization=anna)))[0] == 403
    assert fal_offline.sandbox.seen == []
    await result(await post(gateway, variant="kontext/dev", Authorization=anna))
    assert fal_offline.sandbox.jobs == 1


# The cache


@pytest.mark.timed
async def test_an_equal_request_is_served_in_milliseconds(
    gateway: Gateway, fal_offline: OfflineFal
) -> None:
    first = second = await post(gateway)
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        second = await post(gateway)
        seconds.append(time.perf_counter() - started)
        assert await result(second) == await result(first)
    assert min(seconds) < 0.05
    assert fal_offline.sandbox.jobs == 1
    assert second.headers["Cache-Status"].startswith("falproxy; hit; ttl=")
    assert int(second.headers["Age"]) < 10
    assert second.headers["x-fal-request-id"] != first.headers["x-fal-request-id"]


async def test_equivalent_requests_share_a_job(gateway: Gateway, fal_offline: OfflineFal) -> None:
    declared_as_jpeg = uri(PNG, "image/jpeg")
    bodies = [
        CAT | {"seed": 3, "guidance_scale": 2},
        CAT | {"guidance_scale": 2.0, "seed": 3.0, "strength": 9, "acceleration": "?"},
        CAT | {"seed": 3, "guidance_scale": 2, "num_images": None},
        {"image_data": uri(PNG), "prompt": "a cat", "seed": 3, "guidance_scale": 2},
        {"image_url": uri(PNG), "prompt": "a cat", "seed": 3, "guidance_scale": 2},
        {"image_url": declared_as_jpeg, "prompt": "a cat", "seed": 3, "guidance_scale": 2},
        {"image_url": put_file(fal_offline, "a.png", PNG), "prompt": "a cat", "seed": 3,
         "guidance_scale": 2},
    ]  # fmt: skip
    documents = [await result(await post(gateway, body)) for body in bodies]
    assert documents == [documents[0]] * len(bodies)
    assert fal_offline.sandbox.jobs == 1


async def test_concurrent_equal_requests_share_a_job(
    gateway: Gateway, fal_offline: OfflineFal
) -> None:
    responses = await asyncio.gather(*(post(gateway) for _ in range(10)))
    documents = [await result(response) for response in responses]
    assert documents == [documents[0]] * 10
    assert fal_offline.sandbox.jobs == 1
    cache_statuses = [response.headers["Cache-Status"] for response in responses]
    assert sum("collapsed" in status for status in cache_statuses) == 9


async def test_variants_do_not_share(gateway: Gateway, fal_offline: OfflineFal) -> None:
    for variant in ALL:
        await result(await post(gateway, variant=variant))
    assert fal_offline.sandbox.jobs == 3


@pytest.mark.parametrize(
    ("cache_control", "cache_status"),
    [
        pytest.param("no-cache", "falproxy; fwd=request", id="a new job"),
        pytest.param("no-store", "falproxy; fwd=bypass; detail=no-store", id="a private job"),
    ],
)
async def test_cache_control_is_respected(
    gateway: Gateway, fal_offline: OfflineFal, cache_control: str, cache_status: str
) -> None:
    await result(await post(gateway))
    response = await post(gateway, Cache_Control=cache_control)
    await result(response)
    assert response.headers["Cache-Status"].startswith(cache_status)
    assert fal_offline.sandbox.jobs == 2


async def test_only_if_cached_does_not_start_a_job(
    gateway: Gateway, fal_offline: OfflineFal
) -> None:
    response = await post(gateway, Cache_Control="only-if-cached")
    assert (await error(response))[:2] == (504, "not_cached")
    assert fal_offline.sandbox.seen == []
    await result(await post(gateway))
    await result(await post(gateway, Cache_Control="only-if-cached"))
    assert fal_offline.sandbox.jobs == 1


async def test_without_a_cache_there_is_no_cache_status(
    uncached: Gateway, fal_offline: OfflineFal
) -> None:
    for _ in range(2):
        response = await post(uncached)
        await result(response)
        assert "Cache-Status" not in response.headers
    assert fal_offline.sandbox.jobs == 2


# Errors of fal

INPUT_REFUSED = (400, "fal.ai does not accept the request.")
INPUT_ERRORS = (
    "content_policy_violation", "no_media_generated", "image_too_small", "image_too_large",
    "image_load_error", "file_download_error", "face_detection_error", "file_too_large",
    "unsupported_image_format",
)  # fmt: skip
TEMPORARY = (
    "request_timeout", "startup_timeout", "runner_scheduling_failure",
    "runner_connection_timeout", "runner_disconnected", "runner_connection_refused",
    "runner_connection_error", "runner_incomplete_response",
)  # fmt: skip


def expected_error(status: int, name: str) -> tuple[int, str]:
    """Return status and code of the error that the client gets for a fault of the sandbox."""
    if status == 422:
        return 400, name if name in INPUT_ERRORS else "input_refused"
    if name == "bad_request":
        return 400, "input_refused"
    if name == "nginx":  # does not describe the job, which fal has accepted
        return 500, "result_unavailable"
    if status in (401, 403):
        return 503, "upstream_locked"
    if status == 429:
        return 503, "upstream_busy"
    return (503, "upstream_unavailable") if name in TEMPORARY else (500, "upstream_failed")


async def test_every_error_of_fal_has_its_status(uncached: Gateway) -> None:
    faults = FAULTS
    bodies = [CAT | {"prompt": f"!error {fault.status} {fault.name}"} for fault in faults]
    responses = await asyncio.gather(*(post(uncached, body) for body in bodies))
    for fault, response in zip(faults, responses, strict=True):
        label = f"{fault.status} {fault.name}"
        status, code, message = await error(response)
        assert (status, code) == expected_error(fault.status, fault.name), label
        assert fault.message not in message, label
        assert ("Retry-After" in response.headers) is (status == 503), label


async def test_a_content_policy_violation_is_described(
    gateway: Gateway, fal_offline: OfflineFal
) -> None:
    body = CAT | {"prompt": "!error 422 content_policy_violation"}
    response = await post(gateway, body)
    assert await error(response) == (
        400,
        "content_policy_violation",
        "fal.ai's content checker refuses the prompt or the image.",
    )
    assert "x-fal-request-id" in response.headers
    assert response.headers["Cache-Status"].startswith("falproxy; fwd=miss")
    assert fal_offline.sandbox.jobs == 0


@pytest.mark.parametrize("status", [401, 403])
async def test_an_account_locked_after_the_submit_is_a_500(uncached: Gateway, status: int) -> None:
    """The job is paid for: a client must not repeat the request."""
    response = await post(uncached, CAT | {"prompt": f"!error {status} at=result"})
    assert (await error(response))[:2] == (500, "result_unavailable")


@pytest.mark.parametrize("status", [401, 403])
async def test_a_locked_account_is_a_503(uncached: Gateway, status: int) -> None:
    response = await post(uncached, CAT | {"prompt": f"!error {status} at=submit"})
    assert await error(response) == (
        503, "upstream_locked", "fal.ai refuses the proxy's account.",
    )  # fmt: skip
    assert response.headers["Retry-After"] == "60"


@pytest.mark.parametrize("image", ["image_url", "image_data"])
async def test_an_error_names_the_parameter_of_the_client(
    open_kontext: OpenKontext, fal: FakeFal, image: str
) -> None:
    detail = [{"loc": ["body", "image_url"], "msg": "fal's message", "type": "odd"}]
    fal.respond = failing_queue(422, {"detail": detail})
    response = await post(await open_kontext(fal.origin), {"prompt": "a cat", image: uri(PNG)})
    message = f"fal.ai does not accept {image}."
    assert await error(response) == (400, "input_refused", message)


@pytest.mark.parametrize(
    ("status", "document", "expected"),
    [
        (422, {"detail": [{"loc": ["body", "seed"]}]}, (400, "fal.ai does not accept seed.")),
        (422, {"detail": "text"}, INPUT_REFUSED),
        (422, {"detail": [{"loc": ["body", "<script>"]}]}, INPUT_REFUSED),
        (422, {"detail": [{"loc": [{}, [], None], "type": []}]}, INPUT_REFUSED),
        (422, {"detail": ["text"]}, INPUT_REFUSED),
        (422, "text", INPUT_REFUSED),
        (400, {"detail": "text"}, (500, "fal.ai failed with 400.")),
        (418, None, (500, "fal.ai failed with 418.")),
        (302, {}, (500, "fal.ai failed with 302.")),
    ],
)  # fmt: skip
async def test_malformed_errors_of_fal_are_handled(
    open_kontext: OpenKontext,
    fal: FakeFal,
    status: int,
    document: object,
    expected: tuple[int, str],
) -> None:
    fal.respond = failing_queue(status, document)
    response = await post(await open_kontext(fal.origin))
    actual_status, _, message = await error(response)
    assert (actual_status, message) == expected


def failing_queue(
    status: int, document: object
) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    """Create a handler that emulates fal's queue. Its jobs fail at once."""

    async def serve(request: web.Request) -> web.StreamResponse:
        if request.method == "POST":
            return web.json_response({"request_id": "1", "status": "IN_QUEUE"})
        if request.path.endswith("/status"):
            return web.json_response({"status": "COMPLETED", "error": "it failed"})
        return web.json_response(document, status=status)

    return serve


async def test_steps_are_repeated_after_temporary_errors(
    uncached: Gateway, fal_offline: OfflineFal
) -> None:
    faults = ["429 times=2 at=submit", "503 nginx times=2 at=status", "502 nginx times=2 at=result"]
    for fault in faults:
        await result(await post(uncached, CAT | {"prompt": f"!error {fault}"}))
    assert fal_offline.sandbox.jobs == 3


async def test_an_unreachable_fal_is_a_503(open_kontext: OpenKontext, unused_tcp_port: int) -> None:
    gateway = await open_kontext(f"http://127.0.0.1:{unused_tcp_port}")
    response = await post(gateway)
    assert (await error(response))[:2] == (503, "upstream_unreachable")
    assert response.headers["Retry-After"] == "5"


@pytest.mark.parametrize("cache", [True, False])
async def test_a_submit_whose_response_is_lost_is_not_repeated(
    open_kontext: OpenKontext, wire: WireFal, cache: bool
) -> None:
    async def read_and_disconnect(
        reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        await read_head(reader)

    wire.serve = read_and_disconnect
    response = await post(await open_kontext(wire.origin, cache=cache))
    assert (await error(response))[:2] == (503, "upstream_broken")
    assert "Retry-After" not in response.headers
    assert wire.connections == 1


# Waiting


@pytest.mark.parametrize("cache", [True, False])
async def test_the_error_of_a_time_out_has_the_duration(
    open_kontext: OpenKontext, fal_offline: OfflineFal, cache: bool
) -> None:
    gateway = await open_kontext(fal_offline.sandbox.public_url, wait=0.3, cache=cache)
    response = await post(gateway, CAT | {"prompt": "!delay 1"})
    assert await error(response) == (500, "upstream_timeout", "fal.ai timed out after 0.3 s.")
    if cache:  # the job goes on, because its result is cached
        assert statuses(fal_offline, "PUT") == []
        await wait_until(lambda: fal_offline.sandbox.jobs == 1, seconds=TIMEOUT)
    else:
        await wait_until(lambda: statuses(fal_offline, "PUT", "/cancel") == [202], seconds=TIMEOUT)
        assert fal_offline.sandbox.jobs == 0


async def disconnect_while_running(gateway: Gateway, fal: OfflineFal) -> None:
    """Send a request, and disconnect when its job is running."""
    posting = asyncio.ensure_future(post(gateway, CAT | {"prompt": "!delay 0.5"}))
    await wait_until(lambda: statuses(fal, "GET", "/status"), seconds=TIMEOUT)
    posting.cancel()
    await asyncio.gather(posting, return_exceptions=True)


async def test_the_job_of_a_disconnected_client_is_cancelled(
    uncached: Gateway, fal_offline: OfflineFal
) -> None:
    await disconnect_while_running(uncached, fal_offline)
    await wait_until(lambda: statuses(fal_offline, "PUT", "/cancel") == [202], seconds=TIMEOUT)
    assert fal_offline.sandbox.jobs == 0


async def test_a_job_whose_result_is_cached_goes_on(
    gateway: Gateway, fal_offline: OfflineFal
) -> None:
    await disconnect_while_running(gateway, fal_offline)
    await wait_until(lambda: fal_offline.sandbox.jobs == 1, seconds=TIMEOUT)
    await result(await post(gateway, CAT | {"prompt": "!delay 0.5"}))
    assert statuses(fal_offline, "PUT") == []
    assert fal_offline.sandbox.jobs == 1


# Stored inputs


def stored_file(folder: Path, content: bytes) -> Path:
    return next(folder.rglob(f"{hashlib.sha256(content).hexdigest()}*"), folder / "none")


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(CAT, id="base64"),
        pytest.param({"prompt": "a cat", "image_url": uri(PNG)}, id="a data URI"),
    ],
)
async def test_an_input_is_stored_with_its_result(
    open_kontext: OpenKontext, fal_offline: OfflineFal, tmp_path: Path, body: object
) -> None:
    gateway = await open_kontext(fal_offline.sandbox.public_url, rehost="disk")
    response = await post(gateway, body)
    document = await result(response)
    assert response.headers["x-falproxy-rehost"] == "stored; count=1"
    assert document["images"][0]["url"].startswith(f"{gateway.origin}/files/")
    await wait_until(lambda: stored_file(tmp_path, PNG).exists(), seconds=TIMEOUT)
    assert stored_file(tmp_path, PNG).read_bytes() == PNG


@pytest.mark.parametrize("failure", ["422 content_policy_violation", "422 image_too_small", "500"])
async def test_an_input_that_fal_refuses_is_not_stored(
    open_kontext: OpenKontext, fal_offline: OfflineFal, failure: str
) -> None:
    stored: list[bytes] = []
    gateway = await open_kontext(fal_offline.sandbox.public_url, store_input=collect_in(stored))
    await post(gateway, CAT | {"prompt": f"!error {failure}"})
    other = png("blue")
    await result(await post(gateway, CAT | {"image_data": uri(other)}))
    await wait_until(lambda: stored, seconds=TIMEOUT)
    assert stored == [other]


async def test_an_input_that_the_safety_checker_flags_is_not_stored(
    open_kontext: OpenKontext, fal: FakeFal
) -> None:
    stored: list[bytes] = []
    gateway = await open_kontext(fal.origin, store_input=collect_in(stored))
    output = {"images": [{"url": "https://a.example/b.png"}]}
    other = png("blue")
    for content, is_flagged in ((PNG, True), (other, False)):
        fal.respond = fake_queue(output | {"has_nsfw_concepts": [is_flagged]})
        await result(await post(gateway, CAT | {"image_data": uri(content)}))
    await wait_until(lambda: stored, seconds=TIMEOUT)
    assert stored == [other]


def collect_in(stored: list[bytes]) -> StoreInput:
    """Create a storage that appends all contents to a list."""

    async def store_input(content: Spool) -> str:
        stored.append(content.read(0, content.size))
        return "https://a.example/b.png"

    return store_input


async def test_an_input_is_stored_once(open_kontext: OpenKontext, fal_offline: OfflineFal) -> None:
    stored: list[bytes] = []
    gateway = await open_kontext(fal_offline.sandbox.public_url, store_input=collect_in(stored))
    large = PNG.ljust(2**20, b"\0")
    for content in (PNG, PNG, large):
        await result(await post(gateway, CAT | {"image_data": uri(content)}))
    url = put_file(fal_offline, "a.png", PNG)
    await result(await post(gateway, {"prompt": "another cat", "image_url": url}))
    await wait_until(lambda: stored == [PNG, large], seconds=TIMEOUT)


async def test_a_failure_to_store_an_input_is_only_logged(
    open_kontext: OpenKontext, fal_offline: OfflineFal, caplog: pytest.LogCaptureFixture
) -> None:
    async def store_input(content: Spool) -> str:
        raise StorageError("The bucket is full.")

    gateway = await open_kontext(fal_offline.sandbox.public_url, store_input=store_input)
    await result(await post(gateway))
    message = "An input was not stored: The bucket is full."
    await wait_until(lambda: ("WARNING", message) in log_lines(caplog), seconds=TIMEOUT)
    assert DATA not in caplog.text
    assert "a cat" not in caplog.text


def log_lines(caplog: pytest.LogCaptureFixture) -> list[tuple[str, str]]:
    return [(record.levelname, record.getMessage()) for record in caplog.records]


async def test_the_response_does_not_wait_for_the_storage(
    open_kontext: OpenKontext, fal_offline: OfflineFal
) -> None:
    proceed = asyncio.Event()

    async def store_input(content: Spool) -> str:
        await proceed.wait()
        return "https://a.example/b.png"

    gateway = await open_kontext(fal_offline.sandbox.public_url, store_input=store_input)
    await result(await post(gateway))
    proceed.set()


async def test_the_log_has_one_line_per_request(
    gateway: Gateway, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.clear()
    await post(gateway)
    (record,) = [record for record in caplog.records if record.name == "falproxy.calls"]
    fields = record.__dict__["fields"]
    assert record.levelno == logging.INFO
    assert (fields["status"], fields["cache"], fields["method"]) == (200, "miss", "POST")
    assert fields["upstream_seconds"] <= fields["seconds"]
