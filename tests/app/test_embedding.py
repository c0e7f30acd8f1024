"""The proxy inside another aiohttp application."""

import pytest
from aiohttp import ClientResponse, web
from aiohttp.pytest_plugin import AiohttpClient
from aiohttp.test_utils import TestClient
from yarl import URL

import falproxy
from tests.support.doc_snippets import find
from tests.support.fake_fal import FakeFal
from tests.support.key_search import CANARY
from tests.support.settings import make_settings
from tests.support.urls import PROXY, RUN

HANDLER_ARGS = {"handler_cancellation": True}
Client = TestClient[web.Request, web.Application]


def settings_for(fal: FakeFal) -> falproxy.Settings:
    return make_settings(fal_key=CANARY, upstream_origin=fal.origin)


async def call(client: Client, path: str, **headers: str) -> ClientResponse:
    return await client.post(path, json={"a": 1}, headers={"x-fal-target-url": RUN, **headers})


@pytest.mark.parametrize("prefix", ["", "/ai", "/ai/", "/deep/er"])
async def test_the_proxy_works_below_any_prefix(
    aiohttp_client: AiohttpClient, fal: FakeFal, prefix: str
) -> None:
    app = web.Application(handler_args=HANDLER_ARGS)
    falproxy.setup(app, settings_for(fal), prefix=prefix)
    client = await aiohttp_client(app)
    response = await call(client, prefix.rstrip("/") + PROXY)
    assert (response.status, await response.json()) == (200, {"hello": "fal"})
    assert (await client.get(f"{prefix.rstrip('/')}/health/ready")).status == 200


@pytest.mark.parametrize(
    "path", ["/ai/api/fal/ru%6e/a/b", "/%61i/api/fal/run/a/b", "/ai/a%70i/f%61l/run/a/b"]
)
async def test_a_base_url_in_another_spelling_keeps_its_target(
    aiohttp_client: AiohttpClient, fal: FakeFal, path: str
) -> None:
    app = web.Application(handler_args=HANDLER_ARGS)
    falproxy.setup(app, settings_for(fal), prefix="/ai")
    client = await aiohttp_client(app)
    response = await client.post(URL(path, encoded=True), json={})
    assert response.status == 200
    assert [seen.target for seen in fal.seen] == ["/a/b"]


async def test_the_proxy_works_in_a_sub_application(
    aiohttp_client: AiohttpClient, fal: FakeFal
) -> None:
    inner = web.Application()
    falproxy.setup(inner, settings_for(fal))
    app = web.Application(handler_args=HANDLER_ARGS)
    app.add_subapp("/inner", inner)
    client = await aiohttp_client(app)
    response = await call(client, "/inner" + PROXY)
    assert (response.status, await response.json()) == (200, {"hello": "fal"})
    assert response.headers["X-Request-ID"]


async def test_the_application_s_own_routes_and_errors_are_unchanged(
    aiohttp_client: AiohttpClient, fal: FakeFal
) -> None:
    async def own_route(request: web.Request) -> web.Response:
        return web.Response(text="own")

    app = web.Application(handler_args=HANDLER_ARGS)
    app.router.add_get("/own", own_route)
    falproxy.setup(app, settings_for(fal), prefix="/ai")
    client = await aiohttp_client(app)
    response = await client.get("/own")
    assert await response.text() == "own"
    assert not {"X-Request-ID", "Server-Timing"} & set(response.headers)
    missing = await client.get("/ai/nothing")
    assert (missing.status, await missing.text()) == (404, "404: Not Found")


async def test_two_proxies_work_in_one_application(
    aiohttp_client: AiohttpClient, fal: FakeFal
) -> None:
    app = web.Application(handler_args=HANDLER_ARGS)
    for name in ("one", "two"):
        inner = web.Application()
        settings = make_settings(fal_key=f"id:{name}", upstream_origin=fal.origin)
        falproxy.setup(inner, settings)
        app.add_subapp(f"/{name}", inner)
    client = await aiohttp_client(app)
    for name in ("one", "two"):
        await call(client, f"/{name}{PROXY}")
        assert fal.seen[-1].header("authorization") == f"Key id:{name}"


async def test_a_compressed_body_is_refused_if_the_server_would_decompress_it(
    aiohttp_client: AiohttpClient, fal: FakeFal
) -> None:
    app = web.Application(handler_args=HANDLER_ARGS)
    falproxy.setup(app, settings_for(fal))
    client = await aiohttp_client(app)
    headers = {
        "x-fal-target-url": RUN,
        "Content-Type": "application/json",
        "Content-Encoding": "gzip",
    }
    response = await client.post(PROXY, data=b"{}", headers=headers)
    assert (response.status, (await response.json())["type"]) == (
        415,
        "unsupported_content_encoding",
    )
    assert fal.seen == []


async def test_the_guide_s_example_runs(
    aiohttp_client: AiohttpClient, fal: FakeFal, monkeypatch: pytest.MonkeyPatch
) -> None:
    example = find("docs/embedding.md", "falproxy.setup(").text
    monkeypatch.setenv("FAL_KEY", CANARY)
    monkeypatch.setenv("FALPROXY_UPSTREAM_ORIGIN", fal.origin)
    names: dict[str, object] = {"__name__": "example"}
    exec(compile(example, "embedding.md", "exec"), names)
    app = names["app"]
    assert isinstance(app, web.Application)
    client = await aiohttp_client(app)
    response = await call(client, "/ai" + PROXY)
    assert (response.status, await response.json()) == (200, {"hello": "fal"})
