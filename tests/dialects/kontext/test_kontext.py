"""`/kontext`, `/kontext/max` and `/kontext/dev`, from the wire in to the offline fal and back."""

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
from falproxy.app import HANDLER_ARGS, open_rehosting, open_result_cache
from falproxy.app.pipeline import authentication, authorization, call_pipeline, compose
from falproxy.background import Background, background_context
from falproxy.dialects import default_error, handle_errors, method_check_middleware
from falproxy.dialects.blocking import blocking_route
from falproxy.dialects.kontext import KontextDeps, kontext_dialect
from falproxy.dialects.kontext.requests import VARIANTS
from falproxy.dialects.queue_client import WaitPolicy
from falproxy.fal.image_formats import Format
from falproxy.fal.keys import KeyPool
from falproxy.media.fetch import Fetcher, FetchTimeouts, fetcher_context
from falproxy.metrics import Metrics
from falproxy.middleware.access_log import access_log, add_timing_headers
from falproxy.middleware.cors import check_origin
from falproxy.proxy.upstream import connect_upstream
from falproxy.sandbox.faults import FAULTS
from falproxy.spool import Spool
from falproxy.stores.files import StorageError
from tests.dialects.kontext.test_requests import ALL, CELLS, GIF, TABLE, uri
from tests.media.fetch.test_fetch import Names
from tests.support.fake_fal import FakeFal, WireFal, read_head
from tests.support.gateway import Gateway
from tests.support.key_search import CANARY, search_answers
from tests.support.offline_fal import OfflineFal, offline_fal, png
from tests.support.settings import make_settings

SOON = 5.0  # seconds in which whatever is waited for has happened
PNG = png()
DATA = base64.b64encode(PNG).decode()
CAT = {"prompt": "a cat", "image_data": DATA}
Keep = Callable[[Spool], Awaitable[str]]
Open = Callable[..., Awaitable[Gateway]]
Serve = Callable[[web.Request], Awaitable[web.StreamResponse]]


def kontext_app(settings: Settings, fetcher: Fetcher, keep: Keep | None) -> web.Application:
    """The proxy with the paths of the facade, whose attempts follow each other at once."""
    app = web.Application(handler_args=HANDLER_ARGS, middlewares=[handle_errors(default_error)])
    ring = KeyPool(settings.fal_keys, time.monotonic)
    timeouts = (settings.upstream.connect_timeout, settings.upstream.timeout)
    app.cleanup_ctx.append(
        connect_upstream(ring.next_key(), origin=settings.upstream.origin, timeouts=timeouts)
    )
    app.cleanup_ctx.append(fetcher_context(fetcher))
    rehosting = open_rehosting(app, settings, fetcher, "")
    shelf = open_result_cache(app, settings)
    background = Background()
    app.cleanup_ctx.append(background_context(background, 5.0))
    known = authentication(settings, None)
    allowed = authorization(app, settings, ring, shelf, is_locked=bool(known))
    around = call_pipeline(settings, ring, shelf, fetcher, rehosting)
    if keep is None and rehosting is not None:
        keep = rehosting.rehoster.store
    rules = KontextDeps(max_body=settings.server.max_body, background=background, store_input=keep)
    patience = WaitPolicy(
        total=settings.dialects.wait, background=background, retry_wait=wait_none()
    )
    for variant in VARIANTS:
        way = blocking_route(kontext_dialect(variant, rules), patience)
        order = [
            access_log(Metrics()),
            handle_errors(way.refuse),
            method_check_middleware(way.check),
            check_origin(()),
            *known,
            way.middleware,
            *allowed,
        ]
        app.router.add_route("*", f"/{variant}", compose(order, around))
    app.on_response_prepare.append(add_timing_headers)
    return app


@pytest.fixture(autouse=True)
def fal_outlives_the_proxy(aiohttp_server: AiohttpServer) -> None:
    """What is asked for first is closed last."""


@pytest.fixture
async def fal_offline(aiohttp_client: AiohttpClient) -> OfflineFal:
    return await offline_fal(aiohttp_client)


@pytest.fixture
def open_kontext(aiohttp_client: AiohttpClient, tmp_path: Path) -> Open:
    async def make(origin: str, keep: Keep | None = None, **given: Any) -> Gateway:
        named: dict[str, Any] = {"upstream_origin": origin, "data_dir": tmp_path} | given
        pace = FetchTimeouts(per_attempt=2.0, idle=1.0, overall=2.0, backoff=wait_none())
        fetcher = Fetcher(trusted=[f"{origin}/"], resolver=Names({}), timeouts=pace)
        client = await aiohttp_client(
            kontext_app(make_settings(fal_key=CANARY, **named), fetcher, keep),
            connector=TCPConnector(limit=0),
            trace_configs=[search_answers()],
        )
        return Gateway(client, f"http://127.0.0.1:{client.port}")

    return make


@pytest.fixture
async def gateway(open_kontext: Open, fal_offline: OfflineFal) -> Gateway:
    return await open_kontext(fal_offline.sandbox.public_url)


@pytest.fixture
async def uncached(open_kontext: Open, fal_offline: OfflineFal) -> Gateway:
    return await open_kontext(fal_offline.sandbox.public_url, cache=False)


async def ask(
    gateway: Gateway, body: object = CAT, variant: str = "kontext", **headers: str
) -> ClientResponse:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    named["Content-Type"] = "application/json"
    content = io.BytesIO(json.dumps(body).encode())
    async with asyncio.timeout(SOON):
        response = await gateway.client.post(f"/{variant}", data=content, headers=named)
        await response.read()
    return response


async def answer(response: ClientResponse) -> dict[str, Any]:
    document = await response.json()
    assert response.status == 200, document
    assert set(document) == {"images", "prompt"}
    for image in document["images"]:
        assert set(image) == {"url", "width", "height"}
    return dict(document)


async def refusal(response: ClientResponse) -> tuple[int, str, str]:
    """Status, code and message of a refusal in the plain shape."""
    document = await response.json()
    assert set(document) == {"error"}, document
    assert set(document["error"]) == {"code", "message"}
    assert document["error"]["message"].endswith(".")
    return response.status, document["error"]["code"], document["error"]["message"]


def inputs(fal: OfflineFal) -> list[dict[str, Any]]:
    """What the jobs were asked that fal was paid for."""
    found = [paid.input for paid in fal.sandbox.paid]
    return [body for body in found if isinstance(body, dict)]


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(SOON):
        while not condition():
            await asyncio.sleep(0.005)


def asked_of(fal: OfflineFal, method: str, end: str = "") -> list[int]:
    """The statuses of such requests as fal has seen."""
    seen = fal.sandbox.seen
    return [one.status for one in seen if one.method == method and one.path.endswith(end)]


# Answers


@pytest.mark.parametrize("variant", ALL)
async def test_a_picture_is_edited(
    gateway: Gateway, fal_offline: OfflineFal, variant: str, session: ClientSession
) -> None:
    response = await ask(gateway, CAT | {"num_images": 2}, variant)
    document = await answer(response)
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
            id="nothing but a URL",
        ),
        pytest.param(
            {"images": [{"url": "u", "width": None, "height": "9", "file_size": 3}], "seed": 1,
             "prompt": "a fat cat", "has_nsfw_concepts": [False]},
            {"images": [{"url": "u", "width": None, "height": None}], "prompt": "a fat cat"},
            id="more than is told",
        ),
        pytest.param(
            {"images": [{"url": "u", "width": 640, "height": 480}], "prompt": ""},
            {"images": [{"url": "u", "width": 640, "height": 480}], "prompt": "a cat"},
            id="no prompt",
        ),
    ],
)  # fmt: skip
async def test_an_answer_has_one_shape(
    open_kontext: Open, fal: FakeFal, output: object, expected: object
) -> None:
    fal.answer = playing(output)
    assert await answer(await ask(await open_kontext(fal.origin))) == expected


@pytest.mark.parametrize(
    "output",
    [{}, [], "text", {"images": []}, {"images": ["u"]}, {"images": [{"width": 1}]},
     {"images": [{"url": None}]}, {"image": {"url": "u"}}],
    ids=json.dumps,
)  # fmt: skip
async def test_an_answer_without_pictures_is_a_500(
    open_kontext: Open, fal: FakeFal, output: object
) -> None:
    fal.answer = playing(output)
    response = await ask(await open_kontext(fal.origin))
    assert (await refusal(response))[:2] == (500, "upstream_unreadable")


def playing(output: object) -> Serve:
    """A queue whose jobs have ended at once, with this output."""

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
            id="fal's own of kontext",
        ),
        pytest.param(
            "kontext/max",
            {"prompt": "Put a donut next to the flour.", "guidance_scale": 3.5, "num_images": 1,
             "output_format": "jpeg", "safety_tolerance": "2", "sync_mode": False,
             "image_url": "https://v3.fal.media/files/rabbit/rmgBxhwGYb2d3pl3x9sKf_output.png"},
            id="fal's own of max, with all that it takes",
        ),
        pytest.param(
            "kontext/dev",
            {"prompt": "Change the setting to a day time, add a lot of people walking the "
             "sidewalk while maintaining the same style of the painting",
             "image_url": "https://storage.googleapis.com/falserverless/example_inputs/kontext_"
             "example_input.webp", "num_inference_steps": 28, "guidance_scale": 2.5,
             "num_images": 1, "enable_safety_checker": True, "output_format": "jpeg",
             "acceleration": "none", "resolution_mode": "match_input"},
            id="fal's own of dev",
        ),
    ],
)  # fmt: skip
async def test_the_examples_of_fal_s_documentation_are_good_requests(
    gateway: Gateway, fal_offline: OfflineFal, variant: str, body: dict[str, Any]
) -> None:
    document = await answer(await ask(gateway, body, variant))
    assert document["prompt"] == body["prompt"]
    assert [paid.input for paid in fal_offline.sandbox.paid] == [body]


@pytest.mark.parametrize("variant", ALL)
async def test_the_examples_of_the_schema_work(gateway: Gateway, variant: str) -> None:
    for example in VARIANTS[variant].request.model_json_schema()["examples"]:
        await answer(await ask(gateway, example, variant))


# Parameters


@pytest.mark.parametrize(("name", "variant"), CELLS)
async def test_fal_gets_the_parameters_that_the_variant_takes(
    uncached: Gateway, fal_offline: OfflineFal, name: str, variant: str
) -> None:
    row = TABLE[name]
    is_taken = variant in row.variants
    given = [*row.taken, *((value, None) for value in row.refused if not is_taken), (None, None)]
    bodies = [
        {"prompt": f"{at}", "image_data": DATA, name: value} for at, (value, _) in enumerate(given)
    ]
    responses = await asyncio.gather(*(ask(uncached, body, variant) for body in bodies))
    assert {response.status for response in responses} == {200}
    expected = {
        f"{at}": {"prompt": f"{at}", "image_url": uri(PNG)}
        | ({name: received} if is_taken and received is not None else {})
        for at, (_, received) in enumerate(given)
    }
    assert {sent["prompt"]: sent for sent in inputs(fal_offline)} == expected


@pytest.mark.parametrize(
    ("name", "variant"),
    [(name, variant) for name, row in TABLE.items() for variant in row.variants],
)
async def test_fal_hears_nothing_of_a_parameter_that_does_not_fit(
    gateway: Gateway, fal_offline: OfflineFal, name: str, variant: str
) -> None:
    row = TABLE[name]
    for value in row.refused:
        response = await ask(gateway, CAT | {name: value}, variant)
        said = f"{name} must be {row.accepted}."
        assert await refusal(response) == (400, "parameter_invalid", said), value
    assert fal_offline.sandbox.seen == []


@pytest.mark.parametrize(
    ("body", "code"),
    [
        pytest.param({"image_data": DATA}, "parameter_invalid", id="no prompt"),
        pytest.param({"prompt": "a cat"}, "image_missing", id="no image"),
        pytest.param(CAT | {"image_url": uri(PNG)}, "image_ambiguous", id="two images"),
        pytest.param(CAT | {"image_data": "!"}, "image_unreadable", id="no base64"),
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
async def test_a_bad_request_is_a_400_of_which_fal_hears_nothing(
    gateway: Gateway, fal_offline: OfflineFal, body: object, code: str
) -> None:
    assert (await refusal(await ask(gateway, body)))[:2] == (400, code)
    assert fal_offline.sandbox.seen == []


async def test_ten_mb_arrive(uncached: Gateway, fal_offline: OfflineFal) -> None:
    content = PNG.ljust(10 * 2**20, b"\0")
    await answer(await ask(uncached, CAT | {"image_data": base64.b64encode(content).decode()}))
    (paid,) = fal_offline.sandbox.paid
    assert paid.input == {"prompt": "a cat", "image_url": uri(content)}


# Images behind addresses


async def test_an_image_behind_a_url_stays_there(gateway: Gateway, fal_offline: OfflineFal) -> None:
    url = put(fal_offline, "a.png", PNG)
    await answer(await ask(gateway, {"prompt": "a cat", "image_url": url}))
    (paid,) = fal_offline.sandbox.paid
    assert paid.input == {"prompt": "a cat", "image_url": url}


def put(fal: OfflineFal, name: str, content: bytes) -> str:
    """The address of a file at fal."""
    files = fal.sandbox.files
    key = files.new_key(name)
    files.put(key, io.BytesIO(content), "image/png")
    return fal.sandbox.file_url(key)


async def test_what_is_no_picture_behind_a_url_is_a_400(
    gateway: Gateway, fal_offline: OfflineFal
) -> None:
    url = put(fal_offline, "a.png", b"%PDF-1.7 and more")
    response = await ask(gateway, {"prompt": "a cat", "image_url": url})
    status, code, message = await refusal(response)
    assert (status, code) == (400, "unsupported_image_format")
    assert "a PDF document" in message
    assert fal_offline.sandbox.jobs == 0


@pytest.mark.parametrize("cache", [True, False])
async def test_behind_a_url_there_is_a_jpeg_or_a_png(
    open_kontext: Open, fal_offline: OfflineFal, cache: bool
) -> None:
    gateway = await open_kontext(fal_offline.sandbox.public_url, cache=cache)
    url = put(fal_offline, "a.gif", GIF)
    status, code, message = await refusal(await ask(gateway, {"prompt": "a cat", "image_url": url}))
    assert (status, code) == (400, "unsupported_image_format")
    assert message.endswith("a GIF image. Supported formats are .jpg, .jpeg, .png.")
    assert fal_offline.sandbox.jobs == 0
    await answer(await ask(gateway, {"prompt": "a", "image_url": put(fal_offline, "a.png", PNG)}))


async def test_the_operator_s_formats_hold_here_too(
    open_kontext: Open, fal_offline: OfflineFal
) -> None:
    given = {"image_formats": (Format.PNG, Format.GIF)}
    gateway = await open_kontext(fal_offline.sandbox.public_url, **given)
    jpeg = uri(b"\xff\xd8\xff\xe0" + bytes(100))
    response = await ask(gateway, {"prompt": "a cat", "image_data": jpeg})
    assert (await refusal(response))[:2] == (400, "unsupported_image_format")
    await answer(await ask(gateway))


async def test_a_url_into_this_network_is_a_400(gateway: Gateway, fal_offline: OfflineFal) -> None:
    response = await ask(gateway, {"prompt": "a cat", "image_url": "http://192.168.0.1/a.png"})
    assert (await refusal(response))[:2] == (400, "image_load_error")
    assert fal_offline.sandbox.seen == []


async def test_an_image_host_that_says_404_is_a_400(
    gateway: Gateway, fal_offline: OfflineFal
) -> None:
    url = fal_offline.sandbox.file_url("nothing/here.png")
    response = await ask(gateway, {"prompt": "a cat", "image_url": url})
    assert (await refusal(response))[:2] == (400, "file_download_error")
    assert fal_offline.sandbox.jobs == 0


# The proxy's own refusals


@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "DELETE", "PATCH", "OPTIONS"])
async def test_another_method_is_a_405(
    gateway: Gateway, fal_offline: OfflineFal, method: str
) -> None:
    response = await gateway.client.request(method, "/kontext", json=CAT)
    assert (response.status, response.headers["Allow"]) == (405, "POST")
    if method != "HEAD":
        assert (await refusal(response))[1] == "method_not_allowed"
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
        assert (await refusal(response))[0] == 415


@pytest.mark.parametrize("headers", [{}, {"Content-Type": "application/json"}])
async def test_no_body_is_refused(gateway: Gateway, headers: dict[str, str]) -> None:
    response = await gateway.client.post("/kontext", headers=headers)
    assert (await refusal(response))[0] == (400 if headers else 415)


@pytest.mark.parametrize("is_chunked", [False, True])
async def test_a_body_past_the_limit_is_a_413(
    open_kontext: Open, fal_offline: OfflineFal, is_chunked: bool
) -> None:
    gateway = await open_kontext(fal_offline.sandbox.public_url, max_body=1000)

    async def chunks() -> AsyncIterator[bytes]:
        yield b" " * 1001

    response = await gateway.client.post(
        "/kontext",
        data=chunks() if is_chunked else b" " * 1001,
        headers={"Content-Type": "application/json"},
    )
    assert (await refusal(response))[:2] == (413, "body_too_large")
    assert fal_offline.sandbox.seen == []


async def test_access_is_as_on_every_other_path(
    open_kontext: Open, fal_offline: OfflineFal
) -> None:
    gateway = await open_kontext(
        fal_offline.sandbox.public_url,
        access_keys=(("anna", "secret"),),
        allowed_endpoints=("fal-ai/flux-kontext/dev",),
    )
    anna = "Bearer secret"
    assert (await refusal(await ask(gateway)))[:2] == (401, "unauthenticated")
    assert (await refusal(await ask(gateway, Authorization=anna)))[0] == 403
    assert fal_offline.sandbox.seen == []
    await answer(await ask(gateway, variant="kontext/dev", Authorization=anna))
    assert fal_offline.sandbox.jobs == 1


# The cache


@pytest.mark.timed
async def test_an_equal_request_is_served_in_milliseconds(
    gateway: Gateway, fal_offline: OfflineFal
) -> None:
    first = second = await ask(gateway)
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        second = await ask(gateway)
        seconds.append(time.perf_counter() - started)
        assert await answer(second) == await answer(first)
    assert min(seconds) < 0.05
    assert fal_offline.sandbox.jobs == 1
    assert second.headers["Cache-Status"].startswith("falproxy; hit; ttl=")
    assert int(second.headers["Age"]) < 10
    assert second.headers["x-fal-request-id"] != first.headers["x-fal-request-id"]


async def test_every_spelling_of_a_request_is_one_job(
    gateway: Gateway, fal_offline: OfflineFal
) -> None:
    jpeg_by_name = uri(PNG, "image/jpeg")
    spellings = [
        CAT | {"seed": 3, "guidance_scale": 2},
        CAT | {"guidance_scale": 2.0, "seed": 3.0, "strength": 9, "acceleration": "?"},
        CAT | {"seed": 3, "guidance_scale": 2, "num_images": None},
        {"image_data": uri(PNG), "prompt": "a cat", "seed": 3, "guidance_scale": 2},
        {"image_url": uri(PNG), "prompt": "a cat", "seed": 3, "guidance_scale": 2},
        {"image_url": jpeg_by_name, "prompt": "a cat", "seed": 3, "guidance_scale": 2},
        {"image_url": put(fal_offline, "a.png", PNG), "prompt": "a cat", "seed": 3,
         "guidance_scale": 2},
    ]  # fmt: skip
    documents = [await answer(await ask(gateway, body)) for body in spellings]
    assert documents == [documents[0]] * len(spellings)
    assert fal_offline.sandbox.jobs == 1


async def test_equal_requests_at_once_share_a_job(
    gateway: Gateway, fal_offline: OfflineFal
) -> None:
    responses = await asyncio.gather(*(ask(gateway) for _ in range(10)))
    documents = [await answer(response) for response in responses]
    assert documents == [documents[0]] * 10
    assert fal_offline.sandbox.jobs == 1
    told = [response.headers["Cache-Status"] for response in responses]
    assert sum("collapsed" in line for line in told) == 9


async def test_variants_do_not_share(gateway: Gateway, fal_offline: OfflineFal) -> None:
    for variant in ALL:
        await answer(await ask(gateway, variant=variant))
    assert fal_offline.sandbox.jobs == 3


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        pytest.param("no-cache", "falproxy; fwd=request", id="a new one"),
        pytest.param("no-store", "falproxy; fwd=bypass; detail=no-store", id="one's own"),
    ],
)
async def test_cache_control_is_heeded(
    gateway: Gateway, fal_offline: OfflineFal, asked: str, told: str
) -> None:
    await answer(await ask(gateway))
    response = await ask(gateway, Cache_Control=asked)
    await answer(response)
    assert response.headers["Cache-Status"].startswith(told)
    assert fal_offline.sandbox.jobs == 2


async def test_only_if_cached_never_makes_a_job(gateway: Gateway, fal_offline: OfflineFal) -> None:
    response = await ask(gateway, Cache_Control="only-if-cached")
    assert (await refusal(response))[:2] == (504, "not_cached")
    assert fal_offline.sandbox.seen == []
    await answer(await ask(gateway))
    await answer(await ask(gateway, Cache_Control="only-if-cached"))
    assert fal_offline.sandbox.jobs == 1


async def test_without_a_cache_nothing_is_said_of_it(
    uncached: Gateway, fal_offline: OfflineFal
) -> None:
    for _ in range(2):
        response = await ask(uncached)
        await answer(response)
        assert "Cache-Status" not in response.headers
    assert fal_offline.sandbox.jobs == 2


# fal's failures

NOT_ACCEPTED = (400, "fal.ai does not accept the request.")
REFUSED = (
    "content_policy_violation", "no_media_generated", "image_too_small", "image_too_large",
    "image_load_error", "file_download_error", "face_detection_error", "file_too_large",
    "unsupported_image_format",
)  # fmt: skip
DOWN = (
    "request_timeout", "startup_timeout", "runner_scheduling_failure",
    "runner_connection_timeout", "runner_disconnected", "runner_connection_refused",
    "runner_connection_error", "runner_incomplete_response",
)  # fmt: skip


def expected_for(status: int, kind: str) -> tuple[int, str]:
    """What a failure of fal's is here."""
    if status == 422:
        return 400, kind if kind in REFUSED else "input_refused"
    if kind == "bad_request":
        return 400, "input_refused"
    if kind == "nginx":  # which says nothing of the job that fal has taken
        return 500, "result_unavailable"
    if status in (401, 403):
        return 503, "upstream_locked"
    if status == 429:
        return 503, "upstream_busy"
    return (503, "upstream_unavailable") if kind in DOWN else (500, "upstream_failed")


async def test_every_failure_of_fal_s_has_its_status(uncached: Gateway) -> None:
    faults = FAULTS
    bodies = [CAT | {"prompt": f"!error {fault.status} {fault.name}"} for fault in faults]
    responses = await asyncio.gather(*(ask(uncached, body) for body in bodies))
    for fault, response in zip(faults, responses, strict=True):
        name = f"{fault.status} {fault.name}"
        status, code, message = await refusal(response)
        assert (status, code) == expected_for(fault.status, fault.name), name
        assert fault.message not in message, name
        assert ("Retry-After" in response.headers) is (status == 503), name


async def test_a_refused_content_says_so(gateway: Gateway, fal_offline: OfflineFal) -> None:
    body = CAT | {"prompt": "!error 422 content_policy_violation"}
    response = await ask(gateway, body)
    assert await refusal(response) == (
        400,
        "content_policy_violation",
        "fal.ai's content checker refuses the prompt or the image.",
    )
    assert "x-fal-request-id" in response.headers
    assert response.headers["Cache-Status"].startswith("falproxy; fwd=miss")
    assert fal_offline.sandbox.jobs == 0


@pytest.mark.parametrize("status", [401, 403])
@pytest.mark.parametrize("at", ["submit", "result"])
async def test_a_locked_account_is_a_503(uncached: Gateway, status: int, at: str) -> None:
    response = await ask(uncached, CAT | {"prompt": f"!error {status} at={at}"})
    assert await refusal(response) == (
        503, "upstream_locked", "fal.ai refuses the proxy's account.",
    )  # fmt: skip
    assert response.headers["Retry-After"] == "60"


@pytest.mark.parametrize("image", ["image_url", "image_data"])
async def test_a_field_is_called_as_the_client_called_it(
    open_kontext: Open, fal: FakeFal, image: str
) -> None:
    detail = [{"loc": ["body", "image_url"], "msg": "fal's own words", "type": "odd"}]
    fal.answer = failing(422, {"detail": detail})
    response = await ask(await open_kontext(fal.origin), {"prompt": "a cat", image: uri(PNG)})
    said = f"fal.ai does not accept {image}."
    assert await refusal(response) == (400, "input_refused", said)


@pytest.mark.parametrize(
    ("status", "document", "expected"),
    [
        (422, {"detail": [{"loc": ["body", "seed"]}]}, (400, "fal.ai does not accept seed.")),
        (422, {"detail": "text"}, NOT_ACCEPTED),
        (422, {"detail": [{"loc": ["body", "<script>"]}]}, NOT_ACCEPTED),
        (422, {"detail": [{"loc": [{}, [], None], "type": []}]}, NOT_ACCEPTED),
        (422, {"detail": ["text"]}, NOT_ACCEPTED),
        (422, "text", NOT_ACCEPTED),
        (400, {"detail": "text"}, (500, "fal.ai failed with 400.")),
        (418, None, (500, "fal.ai failed with 418.")),
        (302, {}, (500, "fal.ai failed with 302.")),
    ],
)  # fmt: skip
async def test_no_answer_of_fal_s_confuses_it(
    open_kontext: Open, fal: FakeFal, status: int, document: object, expected: tuple[int, str]
) -> None:
    fal.answer = failing(status, document)
    response = await ask(await open_kontext(fal.origin))
    found = await refusal(response)
    assert (found[0], found[2]) == expected


def failing(
    status: int, document: object
) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    """A queue whose jobs have failed at once."""

    async def serve(request: web.Request) -> web.StreamResponse:
        if request.method == "POST":
            return web.json_response({"request_id": "1", "status": "IN_QUEUE"})
        if request.path.endswith("/status"):
            return web.json_response({"status": "COMPLETED", "error": "it failed"})
        return web.json_response(document, status=status)

    return serve


async def test_what_passes_is_waited_for(uncached: Gateway, fal_offline: OfflineFal) -> None:
    orders = ["429 times=2 at=submit", "503 nginx times=2 at=status", "502 nginx times=2 at=result"]
    for order in orders:
        await answer(await ask(uncached, CAT | {"prompt": f"!error {order}"}))
    assert fal_offline.sandbox.jobs == 3


async def test_an_unreachable_fal_is_a_503(open_kontext: Open, unused_tcp_port: int) -> None:
    gateway = await open_kontext(f"http://127.0.0.1:{unused_tcp_port}")
    response = await ask(gateway)
    assert (await refusal(response))[:2] == (503, "upstream_unreachable")
    assert response.headers["Retry-After"] == "5"


@pytest.mark.parametrize("cache", [True, False])
async def test_a_submit_whose_answer_is_lost_is_not_bought_again(
    open_kontext: Open, wire: WireFal, cache: bool
) -> None:
    async def take_and_hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_head(reader)

    wire.serve = take_and_hang_up
    response = await ask(await open_kontext(wire.origin, cache=cache))
    assert (await refusal(response))[:2] == (503, "upstream_broken")
    assert "Retry-After" not in response.headers
    assert wire.connections == 1


# Patience


@pytest.mark.parametrize("cache", [True, False])
async def test_a_time_out_says_how_long_was_waited(
    open_kontext: Open, fal_offline: OfflineFal, cache: bool
) -> None:
    gateway = await open_kontext(fal_offline.sandbox.public_url, wait=0.3, cache=cache)
    response = await ask(gateway, CAT | {"prompt": "!delay 1"})
    assert await refusal(response) == (500, "upstream_timeout", "fal.ai timed out after 0.3 s.")
    if cache:  # somebody is going to ask again
        assert asked_of(fal_offline, "PUT") == []
        await until(lambda: fal_offline.sandbox.jobs == 1)
    else:
        await until(lambda: asked_of(fal_offline, "PUT", "/cancel") == [202])
        assert fal_offline.sandbox.jobs == 0


async def leave(gateway: Gateway, fal: OfflineFal) -> None:
    """Asks, and hangs up when the job is known to run."""
    asking = asyncio.ensure_future(ask(gateway, CAT | {"prompt": "!delay 0.5"}))
    await until(lambda: asked_of(fal, "GET", "/status"))
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)


async def test_a_client_that_leaves_takes_its_job_with_it(
    uncached: Gateway, fal_offline: OfflineFal
) -> None:
    await leave(uncached, fal_offline)
    await until(lambda: asked_of(fal_offline, "PUT", "/cancel") == [202])
    assert fal_offline.sandbox.jobs == 0


async def test_a_job_whose_result_is_kept_goes_on(
    gateway: Gateway, fal_offline: OfflineFal
) -> None:
    await leave(gateway, fal_offline)
    await until(lambda: fal_offline.sandbox.jobs == 1)
    await answer(await ask(gateway, CAT | {"prompt": "!delay 0.5"}))
    assert asked_of(fal_offline, "PUT") == []
    assert fal_offline.sandbox.jobs == 1


# Inputs that are kept


def kept_file(folder: Path, content: bytes) -> Path:
    return next(folder.rglob(f"{hashlib.sha256(content).hexdigest()}*"), folder / "none")


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(CAT, id="base64"),
        pytest.param({"prompt": "a cat", "image_url": uri(PNG)}, id="a data URI"),
    ],
)
async def test_an_input_is_stored_with_its_result(
    open_kontext: Open, fal_offline: OfflineFal, tmp_path: Path, body: object
) -> None:
    gateway = await open_kontext(fal_offline.sandbox.public_url, rehost="disk")
    response = await ask(gateway, body)
    document = await answer(response)
    assert response.headers["x-falproxy-rehost"] == "stored; count=1"
    assert document["images"][0]["url"].startswith(f"{gateway.origin}/files/")
    await until(lambda: kept_file(tmp_path, PNG).exists())
    assert kept_file(tmp_path, PNG).read_bytes() == PNG


@pytest.mark.parametrize("failure", ["422 content_policy_violation", "422 image_too_small", "500"])
async def test_an_input_that_fal_does_nothing_with_is_not_stored(
    open_kontext: Open, fal_offline: OfflineFal, failure: str
) -> None:
    kept: list[bytes] = []
    gateway = await open_kontext(fal_offline.sandbox.public_url, keep=keeping(kept))
    await ask(gateway, CAT | {"prompt": f"!error {failure}"})
    other = png("blue")
    await answer(await ask(gateway, CAT | {"image_data": uri(other)}))
    await until(lambda: kept)
    assert kept == [other]


async def test_an_input_that_the_safety_checker_flags_is_not_stored(
    open_kontext: Open, fal: FakeFal
) -> None:
    kept: list[bytes] = []
    gateway = await open_kontext(fal.origin, keep=keeping(kept))
    output = {"images": [{"url": "https://a.example/b.png"}]}
    other = png("blue")
    for content, is_flagged in ((PNG, True), (other, False)):
        fal.answer = playing(output | {"has_nsfw_concepts": [is_flagged]})
        await answer(await ask(gateway, CAT | {"image_data": uri(content)}))
    await until(lambda: kept)
    assert kept == [other]


def keeping(kept: list[bytes]) -> Keep:
    """A storage that takes all."""

    async def keep(content: Spool) -> str:
        kept.append(content.read(0, content.size))
        return "https://a.example/b.png"

    return keep


async def test_an_input_is_stored_once(open_kontext: Open, fal_offline: OfflineFal) -> None:
    kept: list[bytes] = []
    gateway = await open_kontext(fal_offline.sandbox.public_url, keep=keeping(kept))
    large = PNG.ljust(2**20, b"\0")
    for content in (PNG, PNG, large):
        await answer(await ask(gateway, CAT | {"image_data": uri(content)}))
    url = put(fal_offline, "a.png", PNG)
    await answer(await ask(gateway, {"prompt": "another cat", "image_url": url}))
    await until(lambda: kept == [PNG, large])


async def test_an_input_that_cannot_be_stored_fails_nothing(
    open_kontext: Open, fal_offline: OfflineFal, caplog: pytest.LogCaptureFixture
) -> None:
    async def keep(content: Spool) -> str:
        raise StorageError("The bucket is full.")

    gateway = await open_kontext(fal_offline.sandbox.public_url, keep=keep)
    await answer(await ask(gateway))
    message = "An input was not stored: The bucket is full."
    await until(lambda: ("WARNING", message) in levels(caplog))
    assert DATA not in caplog.text
    assert "a cat" not in caplog.text


def levels(caplog: pytest.LogCaptureFixture) -> list[tuple[str, str]]:
    return [(record.levelname, record.getMessage()) for record in caplog.records]


async def test_nobody_waits_for_a_slow_storage(open_kontext: Open, fal_offline: OfflineFal) -> None:
    is_open = asyncio.Event()

    async def keep(content: Spool) -> str:
        await is_open.wait()
        return "https://a.example/b.png"

    gateway = await open_kontext(fal_offline.sandbox.public_url, keep=keep)
    await answer(await ask(gateway))
    is_open.set()


async def test_the_log_has_one_line_a_request(
    gateway: Gateway, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.clear()
    await ask(gateway)
    (record,) = [record for record in caplog.records if record.name == "falproxy.calls"]
    fields = record.__dict__["fields"]
    assert record.levelno == logging.INFO
    assert (fields["status"], fields["cache"], fields["method"]) == (200, "miss", "POST")
    assert fields["upstream_seconds"] <= fields["seconds"]
