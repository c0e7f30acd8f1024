"""Paths outside the calls: 404s in the shape of their API, request ids and timings everywhere."""

from pathlib import Path

import pytest
from aiohttp import web
from aiohttp.pytest_plugin import AiohttpClient

import falproxy
from falproxy.middleware.cors import check_host
from tests.support.fake_fal import FakeFal
from tests.support.gateway import SHARED, Gateway, MakeGateway
from tests.support.key_search import CANARY
from tests.support.settings import make_settings

SHAPES = [
    pytest.param("/v1/images/variations", "openai", id="an unknown path of OpenAI"),
    pytest.param("/v1/", "openai", id="OpenAI's base URL"),
    pytest.param("/v1/chat/completions", "openai", id="another API of OpenAI"),
    pytest.param("/api/fal/nothing", "fal", id="an unknown path of fal"),
    pytest.param("/api/fal/run/", "fal", id="no endpoint"),
    pytest.param("/api/fal/proxy/", "fal", id="a slash at the end"),
    pytest.param("/kontext/pro", "default", id="an unknown variant of Kontext"),
    pytest.param("/api/images/nothing", "default", id="an unknown path of generate"),
    pytest.param("/api/templates/a/b", "default", id="an unknown path of templates"),
    pytest.param("/nothing", "default", id="any other path"),
]


def shape_of(document: dict[str, object]) -> str:
    if document.keys() == {"message", "detail", "type", "request_id"}:
        return "fal"
    error = document["error"]
    assert isinstance(error, dict)
    return "openai" if error.keys() == {"message", "type", "param", "code"} else "default"


@SHARED
@pytest.mark.parametrize("method", ["GET", "POST", "DELETE"])
@pytest.mark.parametrize(("path", "shape"), SHAPES)
async def test_an_unknown_path_is_a_404_in_the_shape_of_its_api(
    shared_gateway: Gateway, shared_fal: FakeFal, path: str, shape: str, method: str
) -> None:
    response = await shared_gateway.client.request(method, path, headers={"X-Request-ID": "mine"})
    document = await response.json()
    assert (response.status, shape_of(document)) == (404, shape)
    assert document.get("request_id", "mine") == "mine"
    assert response.headers["X-Request-ID"] == "mine"
    assert shared_fal.seen == []


@pytest.mark.parametrize(
    ("path", "shape"),
    [
        pytest.param("/v1/models", "openai", id="OpenAI"),
        pytest.param("/api/fal/proxy", "fal", id="fal"),
        pytest.param("/kontext", "default", id="Kontext"),
        pytest.param("/health", "default", id="health"),
    ],
)
async def test_a_forbidden_host_is_a_403_in_the_shape_of_the_api(
    aiohttp_client: AiohttpClient, fal: FakeFal, tmp_path: Path, path: str, shape: str
) -> None:
    settings = make_settings(fal_key=CANARY, upstream_origin=fal.origin, data_dir=tmp_path)
    app = falproxy.create_app(settings)
    app.middlewares.append(check_host(("localhost",)))
    client = await aiohttp_client(app)
    response = await client.get(path, headers={"Host": "evil.tld", "X-Request-ID": "mine"})
    assert (response.status, shape_of(await response.json())) == (403, shape)
    assert response.headers["X-Request-ID"] == "mine"
    assert response.headers["Server-Timing"].startswith("falproxy;dur=")


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/health", 200), ("GET", "/health/live", 200), ("HEAD", "/health/ready", 200),
        ("POST", "/health", 405), ("GET", "/metrics", 200), ("GET", "/api/usage", 200),
        ("GET", "/api/usage?since=never", 400), ("GET", "/", 200), ("GET", "/dashboard", 200),
        ("GET", "/web/app.js", 200), ("GET", "/web/about.json", 200), ("GET", "/web/nothing", 404),
        ("POST", "/", 405), ("GET", "/docs", 200), ("GET", "/docs/docs.js", 200),
        ("GET", "/docs/nothing", 404), ("GET", "/openapi.json", 200), ("GET", "/nothing", 404),
        ("GET", "/files/nothing", 404), ("GET", "/api/images/models", 200),
        ("GET", "/v1/models", 200), ("GET", "/v1/nothing", 404), ("POST", "/v1/models", 405),
        ("POST", "/kontext", 415), ("PATCH", "/api/fal/proxy", 405),
    ],
)  # fmt: skip
async def test_every_response_has_a_request_id_and_timings(
    make_gateway: MakeGateway, fal: FakeFal, method: str, path: str, status: int
) -> None:
    gateway = await make_gateway(fal.origin, rehost="disk")
    headers = {"X-Request-ID": "from-the-balancer"}
    response = await gateway.client.request(method, path, headers=headers)
    assert response.status == status
    assert response.headers.getall("X-Request-ID") == ["from-the-balancer"]
    (timing,) = response.headers.getall("Server-Timing")
    assert timing.startswith("falproxy;dur=")
    own = await gateway.client.request(method, path)
    assert len(own.headers["X-Request-ID"]) == 32


async def test_unknown_paths_of_an_embedding_application_are_its_own(
    aiohttp_client: AiohttpClient, fal: FakeFal
) -> None:
    app = web.Application(handler_args={"handler_cancellation": True})
    falproxy.setup(app, make_settings(fal_key=CANARY, upstream_origin=fal.origin))

    async def own_route(request: web.Request) -> web.Response:
        return web.Response(text="own")

    app.router.add_get("/v1/own", own_route)
    client = await aiohttp_client(app)
    assert await (await client.get("/v1/own")).text() == "own"
    missing = await client.get("/v1/nothing")
    assert (missing.status, await missing.text()) == (404, "404: Not Found")
    assert (await client.get("/health")).headers["X-Request-ID"]
