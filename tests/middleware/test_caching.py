"""Result cache: which calls are equal, which responses are stored, and the Cache-Status header."""

import asyncio
import base64
import gzip
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from aiohttp import ClientResponse, web
from aiohttp.abc import AbstractResolver, ResolveResult
from aiohttp.pytest_plugin import AiohttpClient, AiohttpServer

from falproxy.app import HANDLER_ARGS
from falproxy.app.pipeline import compose
from falproxy.dialects import dialect_middleware, handle_errors
from falproxy.dialects.transparent import BodyLimits, transparent_dialect
from falproxy.fal.keys import KeyPool
from falproxy.media.fetch import Fetcher, fetcher_context
from falproxy.media.image_rules import ImageLimits
from falproxy.metrics import Metrics
from falproxy.middleware.access_log import access_log
from falproxy.middleware.cache_policy import CachePolicy
from falproxy.middleware.caching import cache_results
from falproxy.middleware.image_inputs import check_images
from falproxy.middleware.virtual_requests import serve_virtual_requests
from falproxy.proxy.forward import forward
from falproxy.proxy.upstream import connect_upstream
from falproxy.stores.cache.eligibility import CacheEligibility
from falproxy.stores.cache.result_cache import ResultCache, result_cache_context
from falproxy.stores.cache.sqlite import SqliteStore
from tests.support.fake_queue import (
    APP,
    CAT,
    KONTEXT,
    RUN,
    SUBMIT,
    FakeQueue,
    cache_status,
    image_result,
    is_hit,
    run,
    send,
    submit,
    submitted_id,
    upload_to,
    uuid_version,
    wait_result,
    wait_until_cached,
)
from tests.support.gateway import Gateway, MakeGateway
from tests.support.key_search import CANARY
from tests.support.offline_fal import offline_fal, png
from tests.support.urls import PROXY
from tests.support.waiting import wait_until

TIMEOUT = 30.0  # seconds; of `wait_until`

pytestmark = pytest.mark.usefixtures("fal_outlives_the_proxy")

# --- One result for every route ---


@pytest.mark.parametrize("first", [RUN, SUBMIT], ids=["run", "submit"])
@pytest.mark.parametrize("second", [RUN, SUBMIT], ids=["run", "submit"])
async def test_a_result_serves_every_route(
    first: str,
    second: str,
    store_settings: dict[str, object],
    make_gateway: MakeGateway,
    queue: FakeQueue,
) -> None:
    gateway = await make_gateway(queue.fake.origin, **store_settings)
    bodies, responses = [], []
    for target in (first, second):
        response = await send(gateway, target, CAT)
        responses.append(response)
        result = response if target == RUN else await wait_result(gateway, response)
        assert result.status == 200
        assert result.content_type == "application/json"
        bodies.append(await result.read())
        await wait_until_cached(gateway)
    assert bodies[0] == bodies[1] == image_result(1).body
    assert [is_hit(response) for response in responses] == [False, True]
    assert queue.paid == 1


async def test_a_miss_has_a_cache_status(gateway: Gateway, queue: FakeQueue) -> None:
    response = await run(gateway)
    assert cache_status(response) == {"fwd": "miss", "stored": ""}
    assert "Age" not in response.headers


async def test_a_hit_sends_nothing_to_fal(gateway: Gateway, queue: FakeQueue) -> None:
    await run(gateway)
    requests = len(queue.fake.seen)
    for _ in range(3):
        assert is_hit(await run(gateway))
    assert len(queue.fake.seen) == requests


async def test_every_hit_has_an_id_of_its_own(gateway: Gateway, queue: FakeQueue) -> None:
    responses = [await run(gateway) for _ in range(4)]
    ids = [response.headers.getall("x-fal-request-id") for response in responses]
    assert {len(values) for values in ids} == {1}
    assert [uuid_version(values[0]) for values in ids] == [4, 8, 8, 8]
    assert len({values[0] for values in ids}) == 4


async def test_results_are_there_after_a_restart(
    store_settings: dict[str, object], make_gateway: MakeGateway, queue: FakeQueue
) -> None:
    first = await make_gateway(queue.fake.origin, **store_settings)
    body = await (await run(first)).read()
    await first.client.close()
    second = await make_gateway(queue.fake.origin, **store_settings)
    response = await run(second)
    assert is_hit(response)
    assert await response.read() == body


async def test_other_endpoints_are_not_cached(gateway: Gateway, queue: FakeQueue) -> None:
    for _ in range(2):
        response = await send(gateway, "https://fal.run/fal-ai/flux/dev", CAT)
        assert "Cache-Status" not in response.headers
    assert queue.paid == 2


async def test_a_result_expires(make_gateway: MakeGateway, queue: FakeQueue) -> None:
    gateway = await make_gateway(queue.fake.origin, cache_ttl=0.2)
    await run(gateway)
    await asyncio.sleep(0.25)
    assert cache_status(await run(gateway)) == {"fwd": "miss", "stored": ""}
    assert queue.paid == 2


async def test_the_cache_can_be_turned_off(
    make_gateway: MakeGateway, queue: FakeQueue, tmp_path: Path
) -> None:
    gateway = await make_gateway(queue.fake.origin, cache=False)
    for call in (run, submit, run):
        assert "Cache-Status" not in (await call(gateway)).headers
    assert queue.paid == 3
    assert not list(tmp_path.glob("results*"))


# --- Equal calls ---

PRO_PARAMETERS: dict[str, tuple[object, object]] = {
    "prompt": ("a cat", "a cat "),
    "seed": (1, 2),
    "guidance_scale": (3.5, 3.6),
    "num_images": (1, 2),
    "output_format": ("jpeg", "png"),
    "safety_tolerance": ("2", "3"),
    "enhance_prompt": (False, True),
    "aspect_ratio": ("1:1", "16:9"),
    "sync_mode": (False, True),
}
OPEN_PARAMETERS: dict[str, tuple[object, object]] = {
    "prompt": ("a cat", "A cat"),
    "num_inference_steps": (28, 29),
    "guidance_scale": (2.5, 2.51),
    "strength": (0.88, 0.881),
    "image_size": ("landscape_4_3", {"width": 1024, "height": 768}),
    "resolution_mode": ("match_input", "auto"),
    "num_images": (1, 2),
    "output_format": ("jpeg", "png"),
    "acceleration": ("none", "high"),
    "enable_safety_checker": (True, False),
    "seed": (1, 2**53 + 1),
    "sync_mode": (False, True),
    "loras": ([{"path": "a", "scale": 1}], [{"path": "a", "scale": 0.9}]),
}
LORAS: dict[str, tuple[object, object]] = {
    "path": ([{"path": "a"}], [{"path": "b"}]),
    "force": ([{"path": "a", "force": True}], [{"path": "a", "force": False}]),
    "order": ([{"path": "a"}, {"path": "b"}], [{"path": "b"}, {"path": "a"}]),
    "number": ([], [{"path": "a"}]),
}
RED, BLUE = (
    f"data:image/png;base64,{base64.b64encode(png(colour)).decode()}" for colour in ("red", "blue")
)
IMAGES: dict[str, tuple[object, object]] = {
    "image_url": (RED, BLUE),
    "mask_url": (RED, BLUE),
    "reference_image_url": (RED, BLUE),
    "image_urls": ([RED, BLUE], [BLUE, RED]),
}
OPEN = "fal-ai/flux-kontext-lora/inpaint"


def changed_parameters() -> Iterator[Any]:
    """Yield pairs of inputs that differ in one of the parameters of fal-api.md §5.1 and §5.2."""
    for endpoint, parameters in ((KONTEXT, PRO_PARAMETERS), (OPEN, OPEN_PARAMETERS)):
        first = {name: pair[0] for name, pair in parameters.items()}
        for name, (_, other) in parameters.items():
            yield pytest.param(endpoint, first, first | {name: other}, id=f"{endpoint} {name}")
            without = {key: value for key, value in first.items() if key != name}
            yield pytest.param(endpoint, first, without, id=f"{endpoint} without {name}")
    for name, (one, other) in LORAS.items():
        yield pytest.param(OPEN, {"loras": one}, {"loras": other}, id=f"the {name} of a lora")
    for name, (one, other) in IMAGES.items():
        yield pytest.param(OPEN, CAT | {name: one}, CAT | {name: other}, id=f"another {name}")
        yield pytest.param(OPEN, CAT | {name: one}, CAT, id=f"without {name}")


@pytest.mark.parametrize(("endpoint", "one", "other"), [*changed_parameters()])
async def test_a_changed_parameter_is_another_job(
    endpoint: str,
    one: dict[str, object],
    other: dict[str, object],
    gateway: Gateway,
    queue: FakeQueue,
) -> None:
    for body in (one, other, one, other):
        assert (await send(gateway, f"https://fal.run/{endpoint}", body)).status == 200
    assert queue.paid == 2


@pytest.mark.parametrize(
    ("one", "other"),
    [
        pytest.param('{"n": true}', '{"n": 1}', id="true and 1"),
        pytest.param('{"n": false}', '{"n": 0}', id="false and 0"),
        pytest.param('{"n": "1"}', '{"n": 1}', id="string and number"),
        pytest.param('{"n": null}', "{}", id="null and missing"),
        pytest.param('{"n": ""}', '{"n": null}', id="empty string and null"),
        pytest.param('{"n": 3}', '{"n": 3.5}', id="another number"),
        pytest.param('{"n": 9007199254740993}', '{"n": 9007199254740992}', id="beyond 2^53"),
        pytest.param('{"n": [1, 2]}', '{"n": [2, 1]}', id="the order of a list"),
        pytest.param('{"n": {"a": 1}}', '{"n.a": 1}', id="a nested key"),
        pytest.param('{"n": "é"}', '{"n": "e\\u0301"}', id="another normalization"),
        pytest.param('{"N": 1}', '{"n": 1}', id="the case of a key"),
    ],
)
async def test_different_values_are_different_jobs(
    one: str, other: str, gateway: Gateway, queue: FakeQueue
) -> None:
    for text in (one, other):
        await send_text(gateway, text)
    assert queue.paid == 2


@pytest.mark.parametrize(
    ("one", "other"),
    [
        pytest.param('{"n": 3}', '{"n": 3.0}', id="JavaScript's 3 and Python's 3.0"),
        pytest.param('{"n": 100}', '{"n": 1e2}', id="exponent"),
        pytest.param('{"n": 0.10}', '{"n": 0.1}', id="trailing zero"),
        pytest.param('{"a": 1, "b": 2}', '{"b": 2, "a": 1}', id="the order of keys"),
        pytest.param('{"a":1}', ' {\n\t"a" : 1 } ', id="white space"),
        pytest.param('{"a": "é/"}', '{"a": "\\u00e9\\/"}', id="escape"),
        pytest.param('{"o": {"x": 1, "y": [3]}}', '{"o":{"y":[3.0],"x":1.0}}', id="nested"),
    ],
)
async def test_equal_values_are_one_job(
    one: str, other: str, gateway: Gateway, queue: FakeQueue
) -> None:
    for text in (one, other):
        await send_text(gateway, text)
    assert queue.paid == 1


async def send_text(
    gateway: Gateway, text: str | bytes, target: str = RUN, **headers: str
) -> ClientResponse:
    fields = {"Content-Type": "application/json"} | headers
    response = await gateway.call(target, data=text, headers=list(fields.items()))
    await response.read()
    return response


@pytest.mark.parametrize(
    "endpoint",
    ["kontext/max", "kontext/multi", "kontext/text-to-image", "kontext/max/text-to-image"],
)
async def test_each_endpoint_has_results_of_its_own(
    endpoint: str, gateway: Gateway, queue: FakeQueue
) -> None:
    await run(gateway)
    for _ in range(2):
        await send(gateway, f"https://fal.run/fal-ai/flux-pro/{endpoint}", CAT)
    assert queue.paid == 2


LIFECYCLE = '{"expiration_duration_seconds": 60}'


@pytest.mark.parametrize(
    "headers",
    [
        pytest.param({"X-Fal-Object-Lifecycle-Preference": LIFECYCLE}, id="lifetime of files"),
        pytest.param({"X-Fal-Object-Lifecycle": LIFECYCLE}, id="lifetime of files, other name"),
        pytest.param({"x-app-fal-disable-fallback": "true"}, id="no fallback model"),
        pytest.param({"x-fal-something-new": "1"}, id="an unknown header"),
    ],
)
async def test_a_header_that_changes_the_result_changes_the_key(
    headers: dict[str, str], gateway: Gateway, queue: FakeQueue
) -> None:
    for call_headers in ({}, headers, {}, headers):
        await run(gateway, CAT, **call_headers)
    assert queue.paid == 2


@pytest.mark.parametrize(
    ("name", "value"),
    [
        pytest.param("X-Fal-Queue-Priority", "low", id="priority, sent by the JavaScript client"),
        pytest.param("X-Fal-Request-Timeout", "30.0", id="start timeout of the Python client"),
        pytest.param("X-Fal-Runner-Hint", "a", id="runner hint"),
        pytest.param("X-Fal-No-Retry", "1", id="retries"),
        pytest.param("User-Agent", "another", id="user agent"),
        pytest.param("traceparent", "00-1-1-00", id="trace"),
        pytest.param("Authorization", "Bearer another", id="authorization"),
        pytest.param("Accept", "application/json", id="accepted type"),
    ],
)
async def test_other_headers_do_not_change_the_key(
    name: str, value: str, gateway: Gateway, queue: FakeQueue
) -> None:
    await run(gateway)
    assert is_hit(await run(gateway, CAT, **{name: value}))
    assert queue.paid == 1


@pytest.mark.parametrize(
    ("scope", "paid"),
    [
        pytest.param("shared", 1, id="shared by all"),
        pytest.param("principal", 2, id="separate for each caller"),
    ],
)
async def test_the_scope_decides_whether_callers_share_results(
    scope: str, paid: int, make_gateway: MakeGateway, queue: FakeQueue
) -> None:
    keys = (("ann", "ann-secret"), ("bob", "bob-secret"))
    gateway = await make_gateway(queue.fake.origin, access_keys=keys, cache_scope=scope)
    for _ in range(2):
        for name, _ in keys:
            response = await run(gateway, CAT, Authorization=f"Key {name}-secret")
            assert response.status == 200
    assert queue.paid == paid


# --- Images are identified by their bytes ---


def data_uris(content: bytes) -> dict[str, str]:
    """Return data URIs of the same image."""
    text = base64.b64encode(content).decode()
    url_safe = text.replace("+", "-").replace("/", "_")
    wrapped = "\n".join(text[at : at + 76] for at in range(0, len(text), 76))
    return {
        "plain": f"data:image/png;base64,{text}",
        "without padding": f"data:image/png;base64,{text.rstrip('=')}",
        "with white space": f"data:image/png;base64,{wrapped}\n",
        "with escapes": f"data:image/png;base64,{quote(text, safe='')}",
        "url-safe": f"data:image/png;base64,{url_safe}",
        "wrong type": f"data:image/jpeg;base64,{text}",
        "no type": f"data:;base64,{text}",
        "parameter": f"data:image/png;name=a.png;base64,{text}",
        "capitals": f"DATA:image/png;BASE64,{text}",
        "no base64": f"data:image/png,{quote(content)}",
    }


def with_padding(content: bytes) -> bytes:
    """Return the content with a length that needs padding in base64."""
    return content + b"\0" * (1 if len(content) % 3 == 0 else 0)


# Many decoders ignore some characters of these, and decode another image.
AMBIGUOUS = ("with escapes", "url-safe", "no base64")


@pytest.mark.parametrize("spelling", AMBIGUOUS)
async def test_a_data_uri_that_other_decoders_may_misread_is_not_shared(
    spelling: str, gateway: Gateway, queue: FakeQueue
) -> None:
    """Otherwise the result of a misread image would be served for the right one."""
    uris = data_uris(with_padding(noise((400, 300))))
    for number in (1, 2):
        response = await run(gateway, CAT | {"image_url": uris[spelling]})
        assert cache_status(response) == {"fwd": "bypass", "detail": "image"}
        assert queue.paid == number
    await run(gateway, CAT | {"image_url": uris["plain"]})
    assert queue.paid == 3


@pytest.mark.parametrize(
    "spelling", [spelling for spelling in [*data_uris(b"")][1:] if spelling not in AMBIGUOUS]
)
@pytest.mark.parametrize("size", [(64, 48), (400, 300)], ids=["small", "large"])
async def test_an_image_is_the_same_in_every_data_uri(
    spelling: str, size: tuple[int, int], gateway: Gateway, queue: FakeQueue
) -> None:
    content = with_padding(png("red", size) if size[0] < 100 else noise(size))
    uris = data_uris(content)
    await run(gateway, CAT | {"image_url": uris["plain"]})
    response = await run(gateway, CAT | {"image_url": uris[spelling]})
    assert response.status == 200
    assert is_hit(response)
    assert queue.paid == 1


def noise(size: tuple[int, int]) -> bytes:
    """Return a PNG that cannot be compressed, so that its call is too large for the event loop."""
    from PIL import Image

    file = io.BytesIO()
    Image.effect_noise(size, 100).save(file, "png")
    content = file.getvalue()
    assert len(content) > 64 * 2**10
    return content


async def test_uploads_and_data_uris_of_one_image_are_one_job(
    make_gateway: MakeGateway, aiohttp_client: AiohttpClient
) -> None:
    sandbox = (await offline_fal(aiohttp_client)).sandbox
    gateway = await make_gateway(sandbox.public_url)
    file_urls = [upload_to(sandbox, png("red"), name) for name in ("a.png", "b.jpg")]
    bodies = []
    for url in (*file_urls, data_uris(png("red"))["plain"]):
        response = await run(gateway, CAT | {"image_url": url})
        assert response.status == 200, await response.text()
        bodies.append(await response.read())
    assert len(set(bodies)) == 1
    assert sandbox.jobs == 1
    await run(gateway, CAT | {"image_url": upload_to(sandbox, png("blue"), "a.png")})
    assert sandbox.jobs == 2


@pytest.mark.parametrize(
    "url",
    [
        pytest.param("data:image/png;base64,{}!!{}", id="stray characters"),
        pytest.param("data:image/png;base64,{}={}", id="padding in the middle"),
    ],
)
async def test_an_ambiguous_data_uri_is_not_shared(
    url: str, gateway: Gateway, queue: FakeQueue
) -> None:
    text = base64.b64encode(png()).decode()
    for _ in range(2):
        response = await run(gateway, CAT | {"image_url": url.format(text, text)})
        assert cache_status(response) == {"fwd": "bypass", "detail": "image"}
    assert queue.paid == 2


# --- Images on third-party hosts ---


@dataclass
class ThirdParty(AbstractResolver):
    """A third-party host, under every name. files: content by path."""

    files: dict[str, bytes] = field(default_factory=dict)
    port: int = 0

    async def resolve(self, host: str, port: int = 0, family: int = 0) -> list[ResolveResult]:
        address = {"hostname": host, "host": "127.0.0.1", "port": port, "family": 2}
        return [ResolveResult(**address, proto=0, flags=0)]  # type: ignore[typeddict-item]

    async def close(self) -> None: ...

    async def serve(self, request: web.Request) -> web.Response:
        content = self.files.get(request.path)
        return web.Response(status=404) if content is None else web.Response(body=content)

    def url(self, path: str, host: str = "images.example") -> str:
        return f"http://{host}:{self.port}{path}"


@pytest.fixture
async def third_party(aiohttp_server: AiohttpServer) -> ThirdParty:
    third_party = ThirdParty({"/a.png": png("red"), "/b.png": png("red")})
    app = web.Application()
    app.router.add_get("/{path:.*}", third_party.serve)
    third_party.port = (await aiohttp_server(app)).port or 0
    return third_party


@pytest.fixture
async def reaching_gateway(
    third_party: ThirdParty, queue: FakeQueue, tmp_path: Path, aiohttp_client: AiohttpClient
) -> Gateway:
    """A proxy that may read from the third party, which is on loopback."""
    fetcher = Fetcher(resolver=third_party, is_allowed=bool, ports=(third_party.port,))
    key_pool = KeyPool([CANARY], lambda: 0.0)
    eligibility = CacheEligibility(["fal-ai/flux-pro/kontext"])
    result_cache = ResultCache(SqliteStore(tmp_path / "results.sqlite", max_size=2**20))
    dialect = transparent_dialect(BodyLimits(2**20, allow_encoded=True))
    policy = CachePolicy(ttl=3600.0, max_entry=2**20, is_private=False, upstream=queue.fake.origin)
    order = [
        access_log(Metrics()),
        handle_errors(dialect.refuse),
        dialect_middleware(dialect),
        serve_virtual_requests(eligibility, result_cache, key_pool, policy),
        check_images(ImageLimits(), fetcher, eligibility, check_remote=False),
        cache_results(eligibility, result_cache, key_pool, policy),
    ]
    app = web.Application(handler_args=HANDLER_ARGS)
    app.router.add_route("*", PROXY, compose(order, forward))
    connect = connect_upstream(key_pool.next_key(), origin=queue.fake.origin, timeouts=(5.0, 5.0))
    app.cleanup_ctx.extend(
        [connect, fetcher_context(fetcher), result_cache_context(result_cache, 1.0)]
    )
    client = await aiohttp_client(app)
    return Gateway(client, str(client.make_url("")))


async def test_a_third_party_url_shares_its_own_results(
    reaching_gateway: Gateway, third_party: ThirdParty, queue: FakeQueue
) -> None:
    body = CAT | {"image_url": third_party.url("/a.png")}
    assert [is_hit(await run(reaching_gateway, body)) for _ in range(3)] == [False, True, True]
    assert queue.paid == 1


async def test_a_result_of_a_third_party_url_is_not_served_for_the_image(
    reaching_gateway: Gateway, third_party: ThirdParty, queue: FakeQueue
) -> None:
    """The host may send another image to fal than to the proxy."""
    poisoned = await run(reaching_gateway, CAT | {"image_url": third_party.url("/a.png")})
    honest = await run(reaching_gateway, CAT | {"image_url": data_uris(png("red"))["plain"]})
    other = await run(
        reaching_gateway, CAT | {"image_url": third_party.url("/b.png", "other.example")}
    )
    assert not is_hit(honest)
    assert await poisoned.read() == image_result(1).body
    assert await honest.read() == image_result(2).body
    # The result of the bytes themselves is known.
    assert await other.read() == image_result(2).body


async def test_another_third_party_url_of_the_same_bytes_is_another_job(
    reaching_gateway: Gateway, third_party: ThirdParty, queue: FakeQueue
) -> None:
    for path in ("/a.png", "/b.png"):
        assert not is_hit(await run(reaching_gateway, CAT | {"image_url": third_party.url(path)}))
    assert queue.paid == 2


async def test_a_result_of_the_bytes_is_served_for_a_third_party_url(
    reaching_gateway: Gateway, third_party: ThirdParty, queue: FakeQueue
) -> None:
    await run(reaching_gateway, CAT | {"image_url": data_uris(png("red"))["plain"]})
    assert is_hit(await run(reaching_gateway, CAT | {"image_url": third_party.url("/a.png")}))


async def test_another_image_at_the_same_url_is_another_job(
    reaching_gateway: Gateway, third_party: ThirdParty, queue: FakeQueue
) -> None:
    for colour in ("red", "blue"):
        third_party.files["/a.png"] = png(colour)
        assert not is_hit(
            await run(reaching_gateway, CAT | {"image_url": third_party.url("/a.png")})
        )
    assert queue.paid == 2


async def test_a_url_that_cannot_be_read_is_left_to_fal(
    reaching_gateway: Gateway, third_party: ThirdParty, queue: FakeQueue
) -> None:
    for _ in range(2):
        response = await run(reaching_gateway, CAT | {"image_url": third_party.url("/no.png")})
        assert response.status == 200
        assert cache_status(response) == {"fwd": "bypass", "detail": "image"}
    assert queue.paid == 2


# --- Calls that bypass the cache ---


@pytest.mark.parametrize(
    ("query", "headers", "detail"),
    [
        pytest.param("?fal_webhook=https://a.example", {}, "webhook", id="webhook"),
        pytest.param("?fal_max_queue_length=3", {}, "query", id="another query"),
        pytest.param("", {"X-Fal-Store-IO": "0"}, "store-io", id="no storage at fal"),
        pytest.param("", {"Cache-Control": "no-store"}, "no-store", id="no-store"),
        pytest.param(
            "", {"Cache-Control": "max-age=9, No-Store"}, "no-store", id="no-store among others"
        ),
    ],
)
async def test_a_bypassing_call_is_sent_and_not_cached(
    query: str, headers: dict[str, str], detail: str, gateway: Gateway, queue: FakeQueue
) -> None:
    for _ in range(2):
        response = await send(gateway, SUBMIT + query, CAT, **headers)
        assert uuid_version(await submitted_id(response)) == 4
        assert cache_status(response) == {"fwd": "bypass", "detail": detail}
    assert not is_hit(await run(gateway))
    assert queue.paid == 3


async def test_no_store_is_obeyed_in_any_header_line(gateway: Gateway, queue: FakeQueue) -> None:
    lines = [("Cache-Control", "max-age=60"), ("Cache-Control", "no-store")]
    for _ in range(2):
        response = await gateway.call(RUN, json=CAT, headers=lines)
        assert cache_status(response) == {"fwd": "bypass", "detail": "no-store"}
    assert queue.paid == 2


@pytest.mark.parametrize(
    ("body", "encoding"),
    [
        pytest.param(gzip.compress(json.dumps(CAT).encode(), mtime=0), "gzip", id="encoded body"),
        pytest.param(b'["a cat"]', "", id="list"),
        pytest.param(b'"a cat"', "", id="string"),
        pytest.param(b'{"prompt": "a", "prompt": "b"}', "", id="duplicate key"),
        pytest.param(b'{"seed": NaN}', "", id="not JSON"),
        pytest.param(b'{"prompt": ', "", id="incomplete JSON"),
        pytest.param(b"", "", id="no body"),
    ],
)
async def test_an_input_that_cannot_be_parsed_is_left_to_fal(
    body: bytes, encoding: str, gateway: Gateway, queue: FakeQueue
) -> None:
    encoding_header = {"Content-Encoding": encoding} if encoding else {}
    for _ in range(2):
        response = await send_text(gateway, body, **encoding_header)
        assert cache_status(response) == {"fwd": "bypass", "detail": "input"}
        assert queue.fake.seen[-1].body == body
        assert queue.fake.seen[-1].all("content-encoding") == [*encoding_header.values()]
    assert queue.paid == 2


# --- Cache-Control of requests ---


@pytest.mark.parametrize("directive", ["no-cache", "max-age=0", "max-age=0, no-cache"])
async def test_a_refresh_replaces_the_cached_result(
    directive: str, gateway: Gateway, queue: FakeQueue
) -> None:
    await run(gateway)
    fresh = await run(gateway, CAT, Cache_Control=directive)
    assert cache_status(fresh) == {"fwd": "request", "stored": ""}
    hit = await run(gateway)
    assert is_hit(hit)
    assert await fresh.read() == await hit.read() == image_result(2).body


async def test_max_age_accepts_a_younger_result(gateway: Gateway, queue: FakeQueue) -> None:
    await run(gateway)
    assert is_hit(await run(gateway, CAT, Cache_Control="max-age=60"))


async def test_a_failed_refresh_keeps_the_cached_result(gateway: Gateway, queue: FakeQueue) -> None:
    body = await (await run(gateway)).read()
    queue.output = lambda number: web.json_response({"detail": "no"}, status=500)
    assert (await run(gateway, CAT, Cache_Control="no-cache")).status == 500
    hit = await run(gateway)
    assert is_hit(hit)
    assert await hit.read() == body


async def test_other_calls_do_not_wait_for_a_refresh(gateway: Gateway, queue: FakeQueue) -> None:
    body = await (await run(gateway)).read()
    queue.hold()
    async with asyncio.TaskGroup() as group:
        refresh = group.create_task(run(gateway, CAT, Cache_Control="no-cache"))
        await wait_until(lambda: queue.paid == 2, seconds=TIMEOUT)
        try:
            hit = await asyncio.wait_for(run(gateway), 1.0)
        finally:
            queue.release()
        assert await hit.read() == body
        assert is_hit(hit)
    assert await refresh.result().read() == image_result(2).body


async def test_a_failed_refresh_does_not_fail_other_calls(
    gateway: Gateway, queue: FakeQueue
) -> None:
    body = await (await run(gateway)).read()
    queue.output = lambda number: web.json_response({"detail": "no"}, status=500)
    queue.hold()
    async with asyncio.TaskGroup() as group:
        refresh = group.create_task(run(gateway, CAT, Cache_Control="no-cache"))
        await wait_until(lambda: queue.paid == 2, seconds=TIMEOUT)
        plain = group.create_task(run(gateway))
        await wait_until(
            lambda: plain.done() or len(group._tasks) == 2, seconds=TIMEOUT
        )  # until it is sent
        await asyncio.sleep(0.05)
        queue.release()
    assert refresh.result().status == 500
    assert plain.result().status == 200
    assert await plain.result().read() == body


@pytest.mark.parametrize("target", [RUN, SUBMIT], ids=["run", "submit"])
async def test_only_if_cached_is_a_hit_or_a_504(
    target: str, gateway: Gateway, queue: FakeQueue
) -> None:
    refused = await send(gateway, target, CAT, Cache_Control="only-if-cached")
    assert refused.status == 504
    assert (await refused.json())["type"] == "not_cached"
    assert queue.fake.seen == []
    await run(gateway)
    assert is_hit(await send(gateway, target, CAT, Cache_Control="only-if-cached"))
    both = await send(gateway, target, CAT, Cache_Control="only-if-cached, max-age=0")
    assert both.status == 504
    assert queue.paid == 1


async def test_a_504_of_only_if_cached_has_a_cache_status(
    gateway: Gateway, queue: FakeQueue
) -> None:
    response = await run(gateway, CAT, Cache_Control="only-if-cached")
    assert cache_status(response) == {"detail": "not-cached"}


async def test_only_if_cached_of_a_bypassing_call_is_a_504(
    gateway: Gateway, queue: FakeQueue
) -> None:
    response = await send(
        gateway, f"{SUBMIT}?fal_max_queue_length=3", CAT, Cache_Control="only-if-cached"
    )
    assert response.status == 504
    assert queue.fake.seen == []


# --- Storable responses ---


def document(status: int = 200, **output: object) -> Callable[[int], web.Response]:
    return lambda number: web.json_response({"seed": number} | output, status=status)


NOT_STORABLE = [
    pytest.param(document(422, detail=[{"msg": "no"}]), id="rejected input"),
    pytest.param(document(500, detail="Internal Server Error"), id="server error"),
    pytest.param(document(202), id="another 2xx"),
    pytest.param(document(error="no image"), id="error in a 200"),
    pytest.param(document(detail="no image"), id="detail in a 200"),
    pytest.param(document(has_nsfw_concepts=[False, True]), id="flagged image"),
    pytest.param(document(has_nsfw_concepts=True), id="flag without a list"),
    pytest.param(document(text="x" * 2000), id="document too large"),
    pytest.param(lambda number: web.Response(text="<html>"), id="HTML"),
    pytest.param(
        lambda number: web.Response(text="{", content_type="application/json"), id="not JSON"
    ),
    pytest.param(lambda number: web.json_response([number]), id="not an object"),
    pytest.param(lambda number: web.Response(body=b""), id="empty"),
    pytest.param(
        lambda number: web.Response(
            body=gzip.compress(b"{}", mtime=0), headers={"Content-Encoding": "gzip"}
        ),
        id="unrequested encoding",
    ),
]


@pytest.mark.parametrize("target", [RUN, SUBMIT], ids=["run", "submit"])
@pytest.mark.parametrize("output", NOT_STORABLE)
async def test_a_response_that_is_not_storable_is_not_cached(
    output: Callable[[int], web.Response],
    target: str,
    make_gateway: MakeGateway,
    queue: FakeQueue,
) -> None:
    gateway = await make_gateway(queue.fake.origin, cache_max_entry=1000)
    queue.output = output
    for number in (1, 2):
        response = await send(gateway, target, CAT)
        assert cache_status(response) == {"fwd": "miss"}
        result = response if target == RUN else await wait_result(gateway, response)
        assert (result.status, await result.read()) == (output(number).status, output(number).body)
        await wait_until_processed(gateway, queue, number)
    queue.output = image_result
    assert not is_hit(await run(gateway))
    assert queue.paid == 3


async def wait_until_processed(gateway: Gateway, queue: FakeQueue, number: int) -> None:
    """Wait until the proxy has read the result of the nth job."""
    if not queue.jobs:
        return
    request_id = list(queue.jobs)[number - 1]
    result_path = f"/{APP}/requests/{request_id}"

    def read_count() -> int:
        return [seen.target for seen in queue.fake.seen].count(result_path)

    await wait_until(lambda: read_count() >= 2, seconds=TIMEOUT)
    await asyncio.sleep(0.05)  # from the response to the store


async def test_a_result_of_the_maximum_size_is_cached(
    make_gateway: MakeGateway, queue: FakeQueue
) -> None:
    size = len(image_result(1).body or b"")  # type: ignore[arg-type]
    gateway = await make_gateway(queue.fake.origin, cache_max_entry=size)
    await run(gateway)
    assert is_hit(await run(gateway))
