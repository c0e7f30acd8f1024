"""Results that are reused: which calls share one, what is kept, and what the answers say of it.

Here as well: the fal that the tests of ids and of single-flight pay.
"""

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
from redis import Redis

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
from tests.support.cached_calls import (
    APP,
    CAT,
    KONTEXT,
    RUN,
    SUBMIT,
    PlayedFal,
    cache_status,
    document,
    id_of,
    is_hit,
    outcome,
    picture,
    run,
    send,
    submit,
    until,
    until_kept,
    upload_to,
    version_of,
)
from tests.support.fake_fal import FakeFal
from tests.support.gateway import Gateway, MakeGateway
from tests.support.key_search import CANARY
from tests.support.offline_fal import offline_fal, png
from tests.support.redis_server import RedisServer, redis_server
from tests.support.urls import PROXY

VERSION_8 = 8


@pytest.fixture(scope="module")
def redis() -> Iterator[RedisServer]:
    with redis_server() as running:
        yield running


@pytest.fixture(params=["sqlite", "redis"])
def store(request: pytest.FixtureRequest) -> dict[str, object]:
    """The settings that choose a store."""
    if request.param == "sqlite":
        return {}
    url = request.getfixturevalue("redis").url
    with Redis.from_url(url) as client:
        client.flushall()
    return {"redis_url": url}


@pytest.fixture(autouse=True)
def fal_outlives_the_proxy(aiohttp_server: AiohttpServer) -> None:
    """What is asked for first is closed last."""


@pytest.fixture
def played(fal: FakeFal) -> Iterator[PlayedFal]:
    played = PlayedFal(fal)
    yield played
    played.release()


# --- One result for every route ---


@pytest.mark.parametrize("first", [RUN, SUBMIT], ids=["run", "submit"])
@pytest.mark.parametrize("second", [RUN, SUBMIT], ids=["run", "submit"])
async def test_a_result_serves_every_route(
    first: str, second: str, store: dict[str, object], make_gateway: MakeGateway, played: PlayedFal
) -> None:
    gateway = await make_gateway(played.fake.origin, **store)
    bodies, responses = [], []
    for target in (first, second):
        response = await send(gateway, target, CAT)
        responses.append(response)
        result = response if target == RUN else await outcome(gateway, response)
        assert result.status == 200
        assert result.content_type == "application/json"
        bodies.append(await result.read())
        await until_kept(gateway)
    assert bodies[0] == bodies[1] == picture(1).body
    assert [is_hit(response) for response in responses] == [False, True]
    assert played.paid == 1


@pytest.fixture
async def gateway(make_gateway: MakeGateway, played: PlayedFal) -> Gateway:
    return await make_gateway(played.fake.origin)


async def test_a_miss_says_so(gateway: Gateway, played: PlayedFal) -> None:
    response = await run(gateway)
    assert cache_status(response) == {"fwd": "miss", "stored": ""}
    assert "Age" not in response.headers


async def test_a_hit_asks_fal_nothing(gateway: Gateway, played: PlayedFal) -> None:
    await run(gateway)
    asked = len(played.fake.seen)
    for _ in range(3):
        assert is_hit(await run(gateway))
    assert len(played.fake.seen) == asked


async def test_every_hit_has_an_id_of_its_own(gateway: Gateway, played: PlayedFal) -> None:
    responses = [await run(gateway) for _ in range(4)]
    ids = [response.headers.getall("x-fal-request-id") for response in responses]
    assert {len(found) for found in ids} == {1}
    assert [version_of(found[0]) for found in ids] == [4, 8, 8, 8]
    assert len({found[0] for found in ids}) == 4


async def test_results_are_there_for_the_next_process(
    store: dict[str, object], make_gateway: MakeGateway, played: PlayedFal
) -> None:
    first = await make_gateway(played.fake.origin, **store)
    body = await (await run(first)).read()
    await first.client.close()
    second = await make_gateway(played.fake.origin, **store)
    response = await run(second)
    assert is_hit(response)
    assert await response.read() == body


async def test_other_endpoints_are_none_of_its_business(
    gateway: Gateway, played: PlayedFal
) -> None:
    for _ in range(2):
        response = await send(gateway, "https://fal.run/fal-ai/flux/dev", CAT)
        assert "Cache-Status" not in response.headers
    assert played.paid == 2


async def test_a_result_is_too_old_after_its_time(
    make_gateway: MakeGateway, played: PlayedFal
) -> None:
    gateway = await make_gateway(played.fake.origin, cache_ttl=0.2)
    await run(gateway)
    await asyncio.sleep(0.25)
    assert cache_status(await run(gateway)) == {"fwd": "miss", "stored": ""}
    assert played.paid == 2


async def test_the_cache_can_be_off(
    make_gateway: MakeGateway, played: PlayedFal, tmp_path: Path
) -> None:
    gateway = await make_gateway(played.fake.origin, cache=False)
    for call in (run, submit, run):
        assert "Cache-Status" not in (await call(gateway)).headers
    assert played.paid == 3
    assert not list(tmp_path.glob("results*"))


# --- What makes two calls equal ---

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
PICTURES: dict[str, tuple[object, object]] = {
    "image_url": (RED, BLUE),
    "mask_url": (RED, BLUE),
    "reference_image_url": (RED, BLUE),
    "image_urls": ([RED, BLUE], [BLUE, RED]),
}
OPEN = "fal-ai/flux-kontext-lora/inpaint"


def changes() -> Iterator[Any]:
    """Two inputs that differ in one parameter, for each of fal-api.md §5.1 and §5.2."""
    for endpoint, parameters in ((KONTEXT, PRO_PARAMETERS), (OPEN, OPEN_PARAMETERS)):
        first = {name: pair[0] for name, pair in parameters.items()}
        for name, (_, other) in parameters.items():
            yield pytest.param(endpoint, first, first | {name: other}, id=f"{endpoint} {name}")
            gone = {key: value for key, value in first.items() if key != name}
            yield pytest.param(endpoint, first, gone, id=f"{endpoint} without {name}")
    for name, (one, other) in LORAS.items():
        yield pytest.param(OPEN, {"loras": one}, {"loras": other}, id=f"the {name} of a lora")
    for name, (one, other) in PICTURES.items():
        yield pytest.param(OPEN, CAT | {name: one}, CAT | {name: other}, id=f"another {name}")
        yield pytest.param(OPEN, CAT | {name: one}, CAT, id=f"without {name}")


@pytest.mark.parametrize(("endpoint", "one", "other"), [*changes()])
async def test_another_parameter_is_another_job(
    endpoint: str,
    one: dict[str, object],
    other: dict[str, object],
    gateway: Gateway,
    played: PlayedFal,
) -> None:
    for body in (one, other, one, other):
        assert (await send(gateway, f"https://fal.run/{endpoint}", body)).status == 200
    assert played.paid == 2


@pytest.mark.parametrize(
    ("one", "other"),
    [
        pytest.param('{"n": true}', '{"n": 1}', id="true is not 1"),
        pytest.param('{"n": false}', '{"n": 0}', id="false is not 0"),
        pytest.param('{"n": "1"}', '{"n": 1}', id="a text is no number"),
        pytest.param('{"n": null}', "{}", id="null is there"),
        pytest.param('{"n": ""}', '{"n": null}', id="an empty text is not null"),
        pytest.param('{"n": 3}', '{"n": 3.5}', id="another number"),
        pytest.param('{"n": 9007199254740993}', '{"n": 9007199254740992}', id="beyond 2^53"),
        pytest.param('{"n": [1, 2]}', '{"n": [2, 1]}', id="the order of a list"),
        pytest.param('{"n": {"a": 1}}', '{"n.a": 1}', id="a nested key"),
        pytest.param('{"n": "é"}', '{"n": "e\\u0301"}', id="another spelling of a letter"),
        pytest.param('{"N": 1}', '{"n": 1}', id="the case of a key"),
    ],
)
async def test_what_is_not_equal_is_not_shared(
    one: str, other: str, gateway: Gateway, played: PlayedFal
) -> None:
    for text in (one, other):
        await send_text(gateway, text)
    assert played.paid == 2


@pytest.mark.parametrize(
    ("one", "other"),
    [
        pytest.param('{"n": 3}', '{"n": 3.0}', id="JavaScript's 3 and Python's 3.0"),
        pytest.param('{"n": 100}', '{"n": 1e2}', id="an exponent"),
        pytest.param('{"n": 0.10}', '{"n": 0.1}', id="a zero at the end"),
        pytest.param('{"a": 1, "b": 2}', '{"b": 2, "a": 1}', id="the order of keys"),
        pytest.param('{"a":1}', ' {\n\t"a" : 1 } ', id="white space"),
        pytest.param('{"a": "é/"}', '{"a": "\\u00e9\\/"}', id="an escape"),
        pytest.param('{"o": {"x": 1, "y": [3]}}', '{"o":{"y":[3.0],"x":1.0}}', id="deep inside"),
    ],
)
async def test_what_means_the_same_is_one_job(
    one: str, other: str, gateway: Gateway, played: PlayedFal
) -> None:
    for text in (one, other):
        await send_text(gateway, text)
    assert played.paid == 1


async def send_text(
    gateway: Gateway, text: str | bytes, target: str = RUN, **headers: str
) -> ClientResponse:
    named = {"Content-Type": "application/json"} | headers
    response = await gateway.call(target, data=text, headers=list(named.items()))
    await response.read()
    return response


@pytest.mark.parametrize(
    "endpoint",
    ["kontext/max", "kontext/multi", "kontext/text-to-image", "kontext/max/text-to-image"],
)
async def test_every_variant_has_results_of_its_own(
    endpoint: str, gateway: Gateway, played: PlayedFal
) -> None:
    await run(gateway)
    for _ in range(2):
        await send(gateway, f"https://fal.run/fal-ai/flux-pro/{endpoint}", CAT)
    assert played.paid == 2


LIFE = '{"expiration_duration_seconds": 60}'


@pytest.mark.parametrize(
    "headers",
    [
        pytest.param({"X-Fal-Object-Lifecycle-Preference": LIFE}, id="how long files live"),
        pytest.param({"X-Fal-Object-Lifecycle": LIFE}, id="its other name"),
        pytest.param({"x-app-fal-disable-fallback": "true"}, id="no other model"),
        pytest.param({"x-fal-something-new": "1"}, id="a header that nobody knows yet"),
    ],
)
async def test_a_header_that_changes_the_result_changes_the_key(
    headers: dict[str, str], gateway: Gateway, played: PlayedFal
) -> None:
    for given in ({}, headers, {}, headers):
        await run(gateway, CAT, **given)
    assert played.paid == 2


@pytest.mark.parametrize(
    ("name", "value"),
    [
        pytest.param("X-Fal-Queue-Priority", "low", id="the JavaScript client's on each submit"),
        pytest.param("X-Fal-Request-Timeout", "30.0", id="the Python client's deadline"),
        pytest.param("X-Fal-Runner-Hint", "a", id="a runner"),
        pytest.param("X-Fal-No-Retry", "1", id="retries"),
        pytest.param("User-Agent", "somebody", id="whose client it is"),
        pytest.param("traceparent", "00-1-1-00", id="a trace"),
        pytest.param("Authorization", "Bearer somebody", id="a caller's key"),
        pytest.param("Accept", "application/json", id="what is accepted"),
    ],
)
async def test_a_header_that_only_says_how_changes_nothing(
    name: str, value: str, gateway: Gateway, played: PlayedFal
) -> None:
    await run(gateway)
    assert is_hit(await run(gateway, CAT, **{name: value}))
    assert played.paid == 1


@pytest.mark.parametrize(
    ("scope", "paid"),
    [
        pytest.param("shared", 1, id="everybody shares"),
        pytest.param("principal", 2, id="nobody gets another's"),
    ],
)
async def test_the_scope_says_who_shares(
    scope: str, paid: int, make_gateway: MakeGateway, played: PlayedFal
) -> None:
    keys = (("ann", "ann-secret"), ("bob", "bob-secret"))
    gateway = await make_gateway(played.fake.origin, access_keys=keys, cache_scope=scope)
    for _ in range(2):
        for name, _ in keys:
            response = await run(gateway, CAT, Authorization=f"Key {name}-secret")
            assert response.status == 200
    assert played.paid == paid


# --- Pictures are known by their bytes ---


def spellings(content: bytes) -> dict[str, str]:
    """Data URIs of the same picture."""
    text = base64.b64encode(content).decode()
    safe = text.replace("+", "-").replace("/", "_")
    spread = "\n".join(text[at : at + 76] for at in range(0, len(text), 76))
    return {
        "plain": f"data:image/png;base64,{text}",
        "without padding": f"data:image/png;base64,{text.rstrip('=')}",
        "with white space": f"data:image/png;base64,{spread}\n",
        "with escapes": f"data:image/png;base64,{quote(text, safe='')}",
        "url-safe": f"data:image/png;base64,{safe}",
        "a lying type": f"data:image/jpeg;base64,{text}",
        "no type": f"data:;base64,{text}",
        "a parameter": f"data:image/png;name=a.png;base64,{text}",
        "capitals": f"DATA:image/png;BASE64,{text}",
        "no base64 at all": f"data:image/png,{quote(content)}",
    }


def with_odd_end(content: bytes) -> bytes:
    """As many bytes as need padding in base64."""
    return content + b"\0" * (1 if len(content) % 3 == 0 else 0)


# Many readers drop the signs in these and get another picture.
AMBIGUOUS = ("with escapes", "url-safe", "no base64 at all")


@pytest.mark.parametrize("spelling", AMBIGUOUS)
async def test_what_others_may_read_as_another_picture_shares_nothing(
    spelling: str, gateway: Gateway, played: PlayedFal
) -> None:
    """Else the result of what fal made of it would be the result of the picture."""
    spelled = spellings(with_odd_end(noise((400, 300))))
    for number in (1, 2):
        response = await run(gateway, CAT | {"image_url": spelled[spelling]})
        assert cache_status(response) == {"fwd": "bypass", "detail": "image"}
        assert played.paid == number
    await run(gateway, CAT | {"image_url": spelled["plain"]})
    assert played.paid == 3


@pytest.mark.parametrize(
    "spelling", [spelling for spelling in [*spellings(b"")][1:] if spelling not in AMBIGUOUS]
)
@pytest.mark.parametrize("size", [(64, 48), (400, 300)], ids=["small", "large"])
async def test_a_picture_is_the_same_in_every_spelling(
    spelling: str, size: tuple[int, int], gateway: Gateway, played: PlayedFal
) -> None:
    content = with_odd_end(png("red", size) if size[0] < 100 else noise(size))
    spelled = spellings(content)
    await run(gateway, CAT | {"image_url": spelled["plain"]})
    response = await run(gateway, CAT | {"image_url": spelled[spelling]})
    assert response.status == 200
    assert is_hit(response)
    assert played.paid == 1


def noise(size: tuple[int, int]) -> bytes:
    """A PNG that does not shrink, so that its call is too large to be read at once."""
    from PIL import Image

    file = io.BytesIO()
    Image.effect_noise(size, 100).save(file, "png")
    assert file.tell() > 64 * 2**10
    return file.getvalue()


async def test_uploads_and_data_uris_of_one_picture_are_one_job(
    make_gateway: MakeGateway, aiohttp_client: AiohttpClient
) -> None:
    sandbox = (await offline_fal(aiohttp_client)).sandbox
    gateway = await make_gateway(sandbox.public_url)
    addresses = [upload_to(sandbox, png("red"), name) for name in ("a.png", "b.jpg")]
    bodies = []
    for url in (*addresses, spellings(png("red"))["plain"]):
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
        pytest.param("data:image/png;base64,{}!!{}", id="a stray letter"),
        pytest.param("data:image/png;base64,{}={}", id="padding in the middle"),
    ],
)
async def test_a_picture_that_may_be_read_in_two_ways_is_not_shared(
    url: str, gateway: Gateway, played: PlayedFal
) -> None:
    text = base64.b64encode(png()).decode()
    for _ in range(2):
        response = await run(gateway, CAT | {"image_url": url.format(text, text)})
        assert cache_status(response) == {"fwd": "bypass", "detail": "image"}
    assert played.paid == 2


# --- Pictures that somebody else serves ---


@dataclass
class Elsewhere(AbstractResolver):
    """A host of somebody else's, under every name, and what it serves on which path."""

    files: dict[str, bytes] = field(default_factory=dict)
    port: int = 0

    async def resolve(self, host: str, port: int = 0, family: int = 0) -> list[ResolveResult]:
        found = {"hostname": host, "host": "127.0.0.1", "port": port, "family": 2}
        return [ResolveResult(**found, proto=0, flags=0)]  # type: ignore[typeddict-item]

    async def close(self) -> None: ...

    async def serve(self, request: web.Request) -> web.Response:
        content = self.files.get(request.path)
        return web.Response(status=404) if content is None else web.Response(body=content)

    def url(self, path: str, host: str = "pictures.example") -> str:
        return f"http://{host}:{self.port}{path}"


@pytest.fixture
async def elsewhere(aiohttp_server: AiohttpServer) -> Elsewhere:
    found = Elsewhere({"/a.png": png("red"), "/b.png": png("red")})
    app = web.Application()
    app.router.add_get("/{path:.*}", found.serve)
    found.port = (await aiohttp_server(app)).port or 0
    return found


@pytest.fixture
async def reaching(
    elsewhere: Elsewhere, played: PlayedFal, tmp_path: Path, aiohttp_client: AiohttpClient
) -> Gateway:
    """A proxy that may read from elsewhere, which is on this machine."""
    fetcher = Fetcher(resolver=elsewhere, is_allowed=bool, ports=(elsewhere.port,))
    ring = KeyPool([CANARY], lambda: 0.0)
    reuse = CacheEligibility(["fal-ai/flux-pro/kontext"])
    shelf = ResultCache(SqliteStore(tmp_path / "results.sqlite", max_size=2**20))
    dialect = transparent_dialect(BodyLimits(2**20, allow_encoded=True))
    terms = CachePolicy(ttl=3600.0, max_entry=2**20, is_private=False, upstream=played.fake.origin)
    order = [
        access_log(Metrics()),
        handle_errors(dialect.refuse),
        dialect_middleware(dialect),
        serve_virtual_requests(reuse, shelf, ring, terms),
        check_images(ImageLimits(), fetcher, reuse, check_remote=False),
        cache_results(reuse, shelf, ring, terms),
    ]
    app = web.Application(handler_args=HANDLER_ARGS)
    app.router.add_route("*", PROXY, compose(order, forward))
    connect = connect_upstream(ring.next_key(), origin=played.fake.origin, timeouts=(5.0, 5.0))
    app.cleanup_ctx.extend([connect, fetcher_context(fetcher), result_cache_context(shelf, 1.0)])
    client = await aiohttp_client(app)
    return Gateway(client, str(client.make_url("")))


async def test_an_address_is_reused_for_itself(
    reaching: Gateway, elsewhere: Elsewhere, played: PlayedFal
) -> None:
    body = CAT | {"image_url": elsewhere.url("/a.png")}
    assert [is_hit(await run(reaching, body)) for _ in range(3)] == [False, True, True]
    assert played.paid == 1


async def test_what_comes_of_somebody_s_address_serves_nobody_who_has_the_picture(
    reaching: Gateway, elsewhere: Elsewhere, played: PlayedFal
) -> None:
    """He may show fal another picture than us: what comes of it must not become the result of
    all who really have ours."""
    poisoned = await run(reaching, CAT | {"image_url": elsewhere.url("/a.png")})
    honest = await run(reaching, CAT | {"image_url": spellings(png("red"))["plain"]})
    other = await run(reaching, CAT | {"image_url": elsewhere.url("/b.png", "other.example")})
    assert not is_hit(honest)
    assert await poisoned.read() == picture(1).body
    assert await honest.read() == picture(2).body
    # Of the bytes themselves it is known what comes.
    assert await other.read() == picture(2).body


async def test_another_address_of_the_same_bytes_is_another_job(
    reaching: Gateway, elsewhere: Elsewhere, played: PlayedFal
) -> None:
    for path in ("/a.png", "/b.png"):
        assert not is_hit(await run(reaching, CAT | {"image_url": elsewhere.url(path)}))
    assert played.paid == 2


async def test_a_result_of_the_very_bytes_serves_an_address(
    reaching: Gateway, elsewhere: Elsewhere, played: PlayedFal
) -> None:
    await run(reaching, CAT | {"image_url": spellings(png("red"))["plain"]})
    assert is_hit(await run(reaching, CAT | {"image_url": elsewhere.url("/a.png")}))


async def test_another_picture_at_the_same_address_is_another_job(
    reaching: Gateway, elsewhere: Elsewhere, played: PlayedFal
) -> None:
    for colour in ("red", "blue"):
        elsewhere.files["/a.png"] = png(colour)
        assert not is_hit(await run(reaching, CAT | {"image_url": elsewhere.url("/a.png")}))
    assert played.paid == 2


async def test_an_address_that_cannot_be_read_is_left_to_fal(
    reaching: Gateway, elsewhere: Elsewhere, played: PlayedFal
) -> None:
    for _ in range(2):
        response = await run(reaching, CAT | {"image_url": elsewhere.url("/no.png")})
        assert response.status == 200
        assert cache_status(response) == {"fwd": "bypass", "detail": "image"}
    assert played.paid == 2


# --- Calls that are made for themselves ---


@pytest.mark.parametrize(
    ("query", "headers", "detail"),
    [
        pytest.param("?fal_webhook=https://a.example", {}, "webhook", id="a webhook"),
        pytest.param("?fal_max_queue_length=3", {}, "query", id="any other query"),
        pytest.param("", {"X-Fal-Store-IO": "0"}, "store-io", id="nothing is to be stored"),
        pytest.param("", {"Cache-Control": "no-store"}, "no-store", id="no-store"),
        pytest.param("", {"Cache-Control": "max-age=9, No-Store"}, "no-store", id="among others"),
    ],
)
async def test_a_call_of_its_own_is_sent_and_not_kept(
    query: str, headers: dict[str, str], detail: str, gateway: Gateway, played: PlayedFal
) -> None:
    for _ in range(2):
        response = await send(gateway, SUBMIT + query, CAT, **headers)
        assert version_of(await id_of(response)) == 4
        assert cache_status(response) == {"fwd": "bypass", "detail": detail}
    assert not is_hit(await run(gateway))
    assert played.paid == 3


async def test_no_store_is_obeyed_on_any_line(gateway: Gateway, played: PlayedFal) -> None:
    lines = [("Cache-Control", "max-age=60"), ("Cache-Control", "no-store")]
    for _ in range(2):
        response = await gateway.call(RUN, json=CAT, headers=lines)
        assert cache_status(response) == {"fwd": "bypass", "detail": "no-store"}
    assert played.paid == 2


@pytest.mark.parametrize(
    ("body", "encoding"),
    [
        pytest.param(gzip.compress(json.dumps(CAT).encode()), "gzip", id="a coded body"),
        pytest.param(b'["a cat"]', "", id="a list"),
        pytest.param(b'"a cat"', "", id="a text"),
        pytest.param(b'{"prompt": "a", "prompt": "b"}', "", id="a key twice"),
        pytest.param(b'{"seed": NaN}', "", id="no JSON"),
        pytest.param(b'{"prompt": ', "", id="half a body"),
        pytest.param(b"", "", id="no body"),
    ],
)
async def test_an_input_that_is_not_understood_is_fal_s_to_judge(
    body: bytes, encoding: str, gateway: Gateway, played: PlayedFal
) -> None:
    coding = {"Content-Encoding": encoding} if encoding else {}
    for _ in range(2):
        response = await send_text(gateway, body, **coding)
        assert cache_status(response) == {"fwd": "bypass", "detail": "input"}
        assert played.fake.seen[-1].body == body
        assert played.fake.seen[-1].all("content-encoding") == [*coding.values()]
    assert played.paid == 2


# --- What callers ask of the cache ---


@pytest.mark.parametrize("directive", ["no-cache", "max-age=0", "max-age=0, no-cache"])
async def test_a_refresh_replaces_what_was_kept(
    directive: str, gateway: Gateway, played: PlayedFal
) -> None:
    await run(gateway)
    fresh = await run(gateway, CAT, Cache_Control=directive)
    assert cache_status(fresh) == {"fwd": "request", "stored": ""}
    hit = await run(gateway)
    assert is_hit(hit)
    assert await fresh.read() == await hit.read() == picture(2).body


async def test_a_result_that_is_young_enough_will_do(gateway: Gateway, played: PlayedFal) -> None:
    await run(gateway)
    assert is_hit(await run(gateway, CAT, Cache_Control="max-age=60"))


async def test_a_result_stays_when_its_refresh_fails(gateway: Gateway, played: PlayedFal) -> None:
    body = await (await run(gateway)).read()
    played.output = lambda number: web.json_response({"detail": "no"}, status=500)
    assert (await run(gateway, CAT, Cache_Control="no-cache")).status == 500
    hit = await run(gateway)
    assert is_hit(hit)
    assert await hit.read() == body


async def test_who_does_not_ask_for_a_refresh_does_not_wait_for_it(
    gateway: Gateway, played: PlayedFal
) -> None:
    body = await (await run(gateway)).read()
    played.hold()
    async with asyncio.TaskGroup() as group:
        refresh = group.create_task(run(gateway, CAT, Cache_Control="no-cache"))
        await until(lambda: played.paid == 2)
        try:
            hit = await asyncio.wait_for(run(gateway), 1.0)
        finally:
            played.release()
        assert await hit.read() == body
        assert is_hit(hit)
    assert await refresh.result().read() == picture(2).body


async def test_a_refresh_that_fails_is_nobody_else_s_failure(
    gateway: Gateway, played: PlayedFal
) -> None:
    body = await (await run(gateway)).read()
    played.output = lambda number: web.json_response({"detail": "no"}, status=500)
    played.hold()
    async with asyncio.TaskGroup() as group:
        refresh = group.create_task(run(gateway, CAT, Cache_Control="no-cache"))
        await until(lambda: played.paid == 2)
        plain = group.create_task(run(gateway))
        await until(lambda: plain.done() or len(group._tasks) == 2)  # it is on its way
        await asyncio.sleep(0.05)
        played.release()
    assert refresh.result().status == 500
    assert plain.result().status == 200
    assert await plain.result().read() == body


@pytest.mark.parametrize("target", [RUN, SUBMIT], ids=["run", "submit"])
async def test_only_if_cached_never_pays(target: str, gateway: Gateway, played: PlayedFal) -> None:
    refused = await send(gateway, target, CAT, Cache_Control="only-if-cached")
    assert refused.status == 504
    assert (await refused.json())["type"] == "not_cached"
    assert played.fake.seen == []
    await run(gateway)
    assert is_hit(await send(gateway, target, CAT, Cache_Control="only-if-cached"))
    both = await send(gateway, target, CAT, Cache_Control="only-if-cached, max-age=0")
    assert both.status == 504
    assert played.paid == 1


async def test_a_refused_wish_for_a_kept_result_says_so_as_well(
    gateway: Gateway, played: PlayedFal
) -> None:
    response = await run(gateway, CAT, Cache_Control="only-if-cached")
    assert cache_status(response) == {"detail": "not-cached"}


async def test_only_if_cached_never_pays_for_what_is_not_kept_either(
    gateway: Gateway, played: PlayedFal
) -> None:
    response = await send(
        gateway, f"{SUBMIT}?fal_max_queue_length=3", CAT, Cache_Control="only-if-cached"
    )
    assert response.status == 504
    assert played.fake.seen == []


# --- Answers that are kept ---


BAD = [
    pytest.param(document(422, detail=[{"msg": "no"}]), id="a refused input"),
    pytest.param(document(500, detail="Internal Server Error"), id="a broken model"),
    pytest.param(document(202), id="another success"),
    pytest.param(document(error="no picture"), id="an error in a 200"),
    pytest.param(document(detail="no picture"), id="a detail in a 200"),
    pytest.param(document(has_nsfw_concepts=[False, True]), id="a flagged picture"),
    pytest.param(document(has_nsfw_concepts=True), id="a flag alone"),
    pytest.param(document(text="x" * 2000), id="too large a document"),
    pytest.param(lambda number: web.Response(text="<html>"), id="a page"),
    pytest.param(
        lambda number: web.Response(text="{", content_type="application/json"), id="no JSON"
    ),
    pytest.param(lambda number: web.json_response([number]), id="no object"),
    pytest.param(lambda number: web.Response(body=b""), id="nothing"),
    pytest.param(
        lambda number: web.Response(
            body=gzip.compress(b"{}"), headers={"Content-Encoding": "gzip"}
        ),
        id="a coding that nobody asked for",
    ),
]


@pytest.mark.parametrize("target", [RUN, SUBMIT], ids=["run", "submit"])
@pytest.mark.parametrize("output", BAD)
async def test_an_answer_that_is_not_good_is_forgotten(
    output: Callable[[int], web.Response],
    target: str,
    make_gateway: MakeGateway,
    played: PlayedFal,
) -> None:
    gateway = await make_gateway(played.fake.origin, cache_max_entry=1000)
    played.output = output
    for number in (1, 2):
        response = await send(gateway, target, CAT)
        assert cache_status(response) == {"fwd": "miss"}
        result = response if target == RUN else await outcome(gateway, response)
        assert (result.status, await result.read()) == (output(number).status, output(number).body)
        await until_forgotten(gateway, played, number)
    played.output = picture
    assert is_hit(await again(gateway)) is False
    assert played.paid == 3


async def until_forgotten(gateway: Gateway, played: PlayedFal, number: int) -> None:
    """Until the proxy has followed the nth job to its end: then it has read the result, too."""
    if not played.jobs:
        return
    request_id = list(played.jobs)[number - 1]
    results = f"/{APP}/requests/{request_id}"

    def reads() -> int:
        return [seen.target for seen in played.fake.seen].count(results)

    await until(lambda: reads() >= 2)
    await asyncio.sleep(0.05)  # from the answer to the store


async def again(gateway: Gateway) -> ClientResponse:
    return await run(gateway)


async def test_a_result_just_as_large_as_allowed_is_kept(
    make_gateway: MakeGateway, played: PlayedFal
) -> None:
    size = len(picture(1).body or b"")  # type: ignore[arg-type]
    gateway = await make_gateway(played.fake.origin, cache_max_entry=size)
    await run(gateway)
    assert is_hit(await run(gateway))
