"""CORS: @fal-ai/client in Chromium on pages of other origins, and the CORS headers as tables."""

import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from aiohttp import ClientResponse, web
from aiohttp.test_utils import TestServer

from falproxy import create_app
from falproxy.errors import SettingsError
from tests.support.ai_sdk import ACCESS_SECRET, LOCKED, open_proxy
from tests.support.chromium import Chromium
from tests.support.fake_fal import FakeFal
from tests.support.gateway import Gateway, MakeGateway
from tests.support.js_world import DEV, JS, KONTEXT, World, need, photo
from tests.support.settings import make_settings
from tests.support.urls import PROXY, REQUEST, RUN

# A page. Placeholders: the proxy's URL and the access key.
PAGE = '<!doctype html><script src="page.js" data-proxy-url="{}" data-access-key="{}"></script>'


@dataclass(frozen=True, slots=True)
class Pages:
    """A server of pages under two origins.

    world: the proxy that the pages call.
    allowed, foreign: the two origins; the proxy allows the first one.
    """

    world: World
    allowed: str
    foreign: str
    chromium: Chromium

    async def play(self, scenario: str, origin: str | None = None) -> Any:
        """Play a scenario of cors.mjs on a page of an origin, by default the allowed one."""
        return await self.chromium.play(scenario=scenario, gateway=origin or self.allowed)


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return cors.mjs, bundled as a script for browsers."""
    need(Path("node"), JS / "node_modules")
    outfile = tmp_path_factory.mktemp("cors") / "page.js"
    esbuild = str(JS / "node_modules" / ".bin" / "esbuild")
    command = [esbuild, str(JS / "cors.mjs"), "--bundle", f"--outfile={outfile}"]
    subprocess.run([*command, "--log-level=warning"], check=True, timeout=60)
    return outfile


def pages_app(script: Path, html: Callable[[], str]) -> web.Application:
    async def index(request: web.Request) -> web.Response:
        return web.Response(text=html(), content_type="text/html")

    async def page_script(request: web.Request) -> web.FileResponse:
        return web.FileResponse(script)

    async def photo_fixture(request: web.Request) -> web.Response:
        return web.Response(body=photo(), content_type="image/png")

    app = web.Application()
    app.router.add_get("/scenarios/index.html", index)
    app.router.add_get("/scenarios/page.js", page_script)
    app.router.add_get("/fixtures/photo.png", photo_fixture)
    return app


OpenPages = Callable[..., Any]


@pytest.fixture
def open_pages(script: Path, chromium: Chromium, tmp_path: Path) -> OpenPages:
    """Start a server of pages and a proxy.

    is_shared: whether the proxy allows the first origin.
    is_open: whether the proxy requires no access key.
    """

    @asynccontextmanager
    async def opener(
        *, is_shared: bool, is_open: bool = False, access_key: str = ACCESS_SECRET
    ) -> AsyncIterator[Pages]:
        html = ""
        async with TestServer(pages_app(script, lambda: html)) as server:
            allowed = f"http://localhost:{server.port}"
            origins = (allowed,) if is_shared else ()
            keys = () if is_open else LOCKED
            async with open_proxy(tmp_path, access_keys=keys, allowed_origins=origins) as world:
                html = PAGE.format(world.gateway + PROXY, access_key)
                yield Pages(world, allowed, f"http://127.0.0.1:{server.port}", chromium)

    return opener


@pytest.fixture
async def pages(open_pages: OpenPages) -> AsyncIterator[Pages]:
    async with open_pages(is_shared=True) as opened:
        yield opened


async def test_a_page_of_an_allowed_origin_runs_a_model(pages: Pages) -> None:
    result = await pages.play("run")
    inputs = {"prompt": "a heron at dawn", "seed": 7, "image_size": "square"}
    assert pages.world.sandbox.jobs == 1
    image = await pages.world.result_image(result["data"])
    assert image == await pages.world.made_directly(DEV, **inputs)


@pytest.mark.parametrize("scenario", ["subscribeByPolling", "subscribeByStreaming"])
async def test_a_page_of_an_allowed_origin_subscribes(pages: Pages, scenario: str) -> None:
    result = await pages.play(scenario)
    assert pages.world.sandbox.jobs == 1
    assert result["enqueued"] == result["requestId"]
    statuses = list(dict.fromkeys(update["status"] for update in result["updates"]))
    assert statuses[-2:] == ["IN_PROGRESS", "COMPLETED"]
    streams = [call for call in pages.world.sandbox.seen if call.path.endswith("/status/stream")]
    assert len(streams) == (scenario == "subscribeByStreaming")
    assert (await pages.world.result_image(result["data"])).size == (1024, 768)


@pytest.mark.timed
async def test_a_page_of_an_allowed_origin_cancels_by_put(pages: Pages) -> None:
    result = await pages.play("cancelRunning")
    assert result["milliseconds"] < 2000  # the job itself would take five seconds
    assert (result["error"]["name"], result["error"]["status"]) == ("ApiError", 499)
    cancels = [call for call in pages.world.sandbox.seen if call.path.endswith("/cancel")]
    assert [(call.method, call.status) for call in cancels] == [("PUT", 202)]


async def test_a_page_of_an_allowed_origin_reads_errors_of_fal(pages: Pages) -> None:
    error = await pages.play("invalidField")
    assert (error["name"], error["status"]) == ("ValidationError", 422)
    (field_error,) = error["fieldErrors"]
    assert field_error["loc"] == ["body", "guidance_scale"]


async def test_a_page_of_an_allowed_origin_reads_errors_of_the_proxy(
    open_pages: OpenPages,
) -> None:
    async with open_pages(is_shared=True, access_key="another") as pages:
        error = await pages.play("invalidField")
        assert (error["name"], error["status"]) == ("ApiError", 401)
        assert error["body"]["type"] == "unauthenticated"
        assert pages.world.sandbox.seen == []


async def test_a_page_of_an_allowed_origin_uploads_an_image_and_edits_it(pages: Pages) -> None:
    result = await pages.play("editUpload")
    assert await pages.world.download(result["imageUrl"]) == photo()
    inputs = {"prompt": "make it winter", "image_url": result["imageUrl"], "seed": 21}
    image = await pages.world.result_image(result["data"])
    assert image == await pages.world.made_directly(KONTEXT, **inputs)


async def test_a_page_of_an_allowed_origin_reads_the_request_ids(pages: Pages) -> None:
    seen = await pages.play("fetchDirectly")
    assert seen["status"] == 200
    assert seen["headers"]["x-fal-request-id"] == pages.world.sandbox.paid[0].request_id
    assert seen["headers"]["x-request-id"]


async def test_a_page_of_another_origin_cannot_call(pages: Pages) -> None:
    error = await pages.play("invalidField", pages.foreign)
    assert (error["name"], error["message"]) == ("TypeError", "Failed to fetch")
    assert pages.world.sandbox.seen == []


async def test_without_allowed_origins_no_page_can_call(open_pages: OpenPages) -> None:
    async with open_pages(is_shared=False) as pages:
        for origin in (pages.allowed, pages.foreign):
            error = await pages.play("invalidField", origin)
            assert (error["name"], error["message"]) == ("TypeError", "Failed to fetch")
        assert pages.world.sandbox.seen == []


@pytest.mark.parametrize("is_shared", [True, False])
@pytest.mark.parametrize(
    "scenario",
    [
        pytest.param("postText", id="a post of text"),
        pytest.param("postNothing", id="a post without a body"),
    ],
)
async def test_a_request_without_a_preflight_is_not_forwarded(
    open_pages: OpenPages, scenario: str, is_shared: bool
) -> None:
    async with open_pages(is_shared=is_shared, is_open=True) as pages:
        sent = await pages.play(scenario, pages.foreign)
        assert sent == {"type": "opaque", "status": 0}  # sent; the page cannot read the response
        assert [(call.method, call.status) for call in pages.world.sandbox.seen] == []


# CORS headers, without a browser.
EXACT = "https://shop.example.net"
DEVELOPMENT = "http://localhost:5173"
BELOW = "https://a.example.com"
ORIGINS = (EXACT, "https://*.example.com", DEVELOPMENT)
BASE_URL_PATHS = ("/api/fal/run/a/b", "/api/fal/queue/a/b", "/api/fal/rest/tokens/")

CLIENT_HEADERS = (
    "accept",
    "authorization",
    "baggage",
    "cache-control",
    "content-type",
    "idempotency-key",
    "openai-beta",
    "openai-organization",
    "prefer",
    "traceparent",
    "user-agent",
    "x-app-fal-disable-fallback",
    "x-fal-object-lifecycle",
    "x-fal-object-lifecycle-preference",
    "x-fal-queue-priority",
    "x-fal-request-timeout",
    "x-fal-runner-hint",
    "x-fal-target-url",
    "x-fal-user-agent",
    "x-falproxy-key",
    "x-falproxy-user",
    "x-request-id",
    "x-stainless-arch",
    "x-stainless-retry-count",
    "x-stainless-timeout",
)
# Response headers that clients act upon, and that describe a response.
READ_HEADERS = (
    "age", "cache-status", "ratelimit", "ratelimit-policy", "retry-after", "retry-after-ms",
    "server-timing", "x-fal-billable-units", "x-fal-error-type", "x-fal-needs-retry",
    "x-fal-request-id", "x-fal-request-timeout-type", "x-fal-retryable", "x-falproxy-cost",
    "x-falproxy-ignored", "x-falproxy-rehost", "x-falproxy-saved", "x-ratelimit-remaining-requests",
    "x-ratelimit-reset-requests", "x-request-id", "x-should-retry",
)  # fmt: skip


@pytest.fixture
async def shared(make_gateway: MakeGateway, fal: FakeFal) -> Gateway:
    return await make_gateway(fal.origin, allowed_origins=ORIGINS)


async def preflight(
    gateway: Gateway, origin: str, *, path: str = PROXY, headers: str = "x-fal-target-url"
) -> ClientResponse:
    """Send a preflight for a POST."""
    preflight_headers = {
        "Origin": origin,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": headers,
    }
    return await gateway.client.options(path, headers=preflight_headers)


def cors_headers(response: ClientResponse) -> list[tuple[str, str]]:
    """Return the Access-Control headers of a response, sorted."""
    return sorted(
        (lower, value)
        for name, value in response.headers.items()
        if (lower := name.lower()).startswith("access-control-")
    )


def varies_by_origin(response: ClientResponse) -> bool:
    names = ",".join(response.headers.getall("Vary", [])).lower().split(",")
    return "origin" in [name.strip() for name in names]


@pytest.mark.parametrize("path", [PROXY, *BASE_URL_PATHS])
@pytest.mark.parametrize(
    "origin",
    [
        pytest.param(EXACT, id="exactly"),
        pytest.param(DEVELOPMENT, id="exactly, with its port"),
        pytest.param(BELOW, id="one label below"),
        pytest.param("https://b-2.a1.example.com", id="two labels below"),
    ],
)
async def test_a_preflight_of_an_allowed_origin_is_a_204(
    shared: Gateway, fal: FakeFal, path: str, origin: str
) -> None:
    response = await preflight(shared, origin, path=path)
    assert response.status == 204
    assert cors_headers(response) == [
        ("access-control-allow-headers", "x-fal-target-url"),
        ("access-control-allow-methods", "GET, POST, PUT, DELETE"),
        ("access-control-allow-origin", origin),
        ("access-control-expose-headers", response.headers["Access-Control-Expose-Headers"]),
        ("access-control-max-age", "600"),
    ]
    assert varies_by_origin(response)
    assert fal.seen == []


@pytest.mark.parametrize(
    "origin",
    [
        pytest.param("https://example.com.evil.tld", id="an allowed one as labels of another"),
        pytest.param("https://a.example.com.evil.tld", id="an allowed one before another"),
        pytest.param("https://shop.example.net.evil.tld", id="the exact one before another"),
        pytest.param("https://evilexample.com", id="same letters without the dot"),
        pytest.param("https://example.com", id="the name above the wildcard"),
        pytest.param("https://.example.com", id="an empty label"),
        pytest.param("https://a..example.com", id="an empty label between"),
        pytest.param("https://-a.example.com", id="a label that starts with a hyphen"),
        pytest.param("https://*.example.com", id="the pattern itself"),
        pytest.param("https://shop-example.net", id="another character for the dot"),
        pytest.param("https://a.shop.example.net", id="below the exact one"),
        pytest.param("http://shop.example.net", id="http for https"),
        pytest.param("http://a.example.com", id="http below the wildcard"),
        pytest.param("https://localhost:5173", id="https for http"),
        pytest.param("http://localhost", id="no port"),
        pytest.param("http://localhost:5174", id="another port"),
        pytest.param("http://localhost:51731", id="a longer port"),
        pytest.param("https://a.example.com:8443", id="a port below the wildcard"),
        pytest.param("https://a.example.com/", id="a last slash"),
        pytest.param("https://evil.tld/.example.com", id="a path"),
        pytest.param("https://evil.tld?.example.com", id="a query"),
        pytest.param("https://evil.tld#.example.com", id="a fragment"),
        pytest.param("https://evil.tld\\.example.com", id="a backslash"),
        pytest.param("https://me@a.example.com", id="a user"),
        pytest.param("https://evil.tld:1@a.example.com", id="a host as a user"),
        pytest.param("https://A.example.com", id="an upper-case label"),
        pytest.param("https://a.EXAMPLE.com", id="an upper-case name"),
        pytest.param("HTTPS://a.example.com", id="an upper-case scheme"),
        pytest.param("https://a.example.com evil", id="more after a space"),
        pytest.param("https://a.example.com,https://evil.tld", id="two in one"),
        pytest.param("a.example.com", id="no scheme"),
        pytest.param("*", id="a star"),
        pytest.param("null", id="null"),
        pytest.param("", id="nothing"),
    ],
)
async def test_a_preflight_of_another_origin_is_a_405(
    shared: Gateway, fal: FakeFal, origin: str
) -> None:
    response = await preflight(shared, origin)
    assert response.status == 405
    assert response.headers["Allow"] == "GET, POST"
    assert (await response.json())["type"] == "method_not_allowed"
    assert cors_headers(response) == []
    assert varies_by_origin(response)
    assert fal.seen == []


async def test_the_log_has_the_setting_that_allows_a_refused_origin(
    shared: Gateway, caplog: pytest.LogCaptureFixture
) -> None:
    await preflight(shared, EXACT)
    assert "FALPROXY_ALLOWED_ORIGINS" not in caplog.text
    await preflight(shared, "https://evil.tld")
    assert "FALPROXY_ALLOWED_ORIGINS" in caplog.text
    assert "evil" not in caplog.text


@pytest.mark.parametrize("origin", [EXACT, "https://evil.tld", "null"])
async def test_without_allowed_origins_every_preflight_is_a_405(
    gateway: Gateway, origin: str
) -> None:
    response = await preflight(gateway, origin)
    assert (response.status, cors_headers(response)) == (405, [])


@pytest.mark.parametrize("header", CLIENT_HEADERS)
async def test_headers_of_the_clients_are_allowed(shared: Gateway, header: str) -> None:
    response = await preflight(shared, EXACT, headers=header)
    assert response.headers["Access-Control-Allow-Headers"] == header


@pytest.mark.parametrize(
    "header",
    [
        pytest.param("cookie", id="cookies"),
        pytest.param("x-evil", id="an unknown header"),
        pytest.param("x-forwarded-for", id="a load balancer's"),
        pytest.param("x-falx", id="only the same prefix"),
        pytest.param("x-app-falx", id="only the same prefix, with app"),
        pytest.param("x-falproxykey", id="only the same prefix as the proxy's"),
        pytest.param("openai", id="a prefix alone"),
        pytest.param("x-api-key", id="another API's"),
        pytest.param("x-real-ip", id="another load balancer's"),
        pytest.param("*", id="all"),
        pytest.param("", id="nothing"),
    ],
)
async def test_no_other_header_is_allowed(shared: Gateway, header: str) -> None:
    response = await preflight(shared, EXACT, headers=header)
    assert response.headers["Access-Control-Allow-Headers"] == ""


async def test_only_the_known_headers_of_a_list_are_allowed(shared: Gateway) -> None:
    requested = f"{', '.join(CLIENT_HEADERS)},X-Evil , Cookie"
    response = await preflight(shared, EXACT, headers=requested)
    assert response.headers["Access-Control-Allow-Headers"] == ", ".join(CLIENT_HEADERS)


@pytest.mark.parametrize(
    "origin", [EXACT, "https://evil.tld", "http://10.0.0.7:3000", "null", "capacitor://localhost"]
)
async def test_all_origins_may_be_allowed_if_callers_need_a_key(
    make_gateway: MakeGateway, fal: FakeFal, origin: str
) -> None:
    gateway = await make_gateway(fal.origin, allowed_origins=("*",), access_keys=LOCKED)
    response = await preflight(gateway, origin)
    assert (response.status, response.headers["Access-Control-Allow-Origin"]) == (204, origin)
    headers = [("Origin", origin), ("Sec-Fetch-Site", "cross-site")]
    refused = await gateway.call(RUN, json={}, headers=headers)
    assert (refused.status, refused.headers["Access-Control-Allow-Origin"]) == (401, origin)
    headers += [("Authorization", f"Bearer {ACCESS_SECRET}")]
    assert (await gateway.call(RUN, json={}, headers=headers)).status == 200


def test_all_origins_are_refused_for_an_open_proxy() -> None:
    with pytest.raises(SettingsError, match=r"FALPROXY_ALLOWED_ORIGINS=\*"):
        create_app(make_settings(fal_key="id:secret", allowed_origins=("*",)))


async def test_a_preflight_needs_no_access_key(make_gateway: MakeGateway, fal: FakeFal) -> None:
    gateway = await make_gateway(fal.origin, allowed_origins=ORIGINS, access_keys=LOCKED)
    assert (await preflight(gateway, EXACT)).status == 204
    refused = await gateway.call(RUN, json={}, headers=[("Origin", EXACT)])
    assert refused.status == 401
    assert refused.headers["Access-Control-Allow-Origin"] == EXACT


async def test_options_without_a_preflight_header_is_a_405(shared: Gateway, fal: FakeFal) -> None:
    response = await shared.call(RUN, "OPTIONS", headers=[("Origin", EXACT)])
    assert response.status == 405
    assert fal.seen == []


Send = Callable[[Gateway, list[tuple[str, str]]], Awaitable[ClientResponse]]


def sends(target: str | None, method: str = "POST", **options: object) -> Send:
    async def send(gateway: Gateway, headers: list[tuple[str, str]]) -> ClientResponse:
        return await gateway.call(target, method, headers=headers, **options)

    return send


def sends_to(path: str) -> Send:
    async def send(gateway: Gateway, headers: list[tuple[str, str]]) -> ClientResponse:
        return await gateway.client.post(path, json={}, headers=headers)

    return send


RESPONSES = pytest.mark.parametrize(
    ("send", "status"),
    [
        pytest.param(sends(RUN, json={}), 200, id="a response of fal"),
        pytest.param(sends(RUN + "/fails", json={}), 422, id="an error of fal"),
        pytest.param(sends(REQUEST + "/cancel", "PUT"), 200, id="a cancel"),
        pytest.param(sends_to(BASE_URL_PATHS[0]), 200, id="a response through a base URL"),
        pytest.param(sends_to("/api/fal/run/a//b"), 412, id="a refusal of a base URL"),
        pytest.param(sends_to("/v1/images/variations"), 404, id="an unknown path of OpenAI"),
        pytest.param(sends(None, json={}), 400, id="no target"),
        pytest.param(
            sends("https://notfal.run/a/b", json={}), 412, id="a target that is not fal's"
        ),
        pytest.param(sends(RUN, "DELETE"), 405, id="another method"),
        pytest.param(sends(RUN, "HEAD"), 405, id="HEAD"),
        pytest.param(sends(RUN, data=b"a=b"), 415, id="another content type"),
        pytest.param(sends(RUN, json={"prompt": "x" * 3000}), 413, id="a large body"),
    ],
)


async def respond_with_cors_headers(request: web.Request) -> web.StreamResponse:
    """Respond with CORS headers of fal's own, some of them repeated."""
    headers = [
        ("Access-Control-Allow-Origin", "*"),
        ("Access-Control-Allow-Origin", "https://fal.ai"),
        ("Access-Control-Allow-Credentials", "true"),
        ("Access-Control-Allow-Headers", "*"),
        ("Access-Control-Expose-Headers", "*"),
        ("access-control-max-age", "9"),
        ("Access-Control-Allow-Private-Network", "true"),
        ("Vary", "Accept-Encoding"),
    ]
    status = 422 if request.path.endswith("/fails") else 200
    response = web.json_response({}, status=status)
    response.headers.extend(headers)
    return response


@pytest.fixture
async def strict(make_gateway: MakeGateway, fal: FakeFal) -> Gateway:
    """A proxy before a fal that sends CORS headers of its own."""
    fal.respond = respond_with_cors_headers
    return await make_gateway(fal.origin, allowed_origins=ORIGINS, max_body=2048)


@RESPONSES
@pytest.mark.parametrize("origin", [EXACT, BELOW])
async def test_pages_of_an_allowed_origin_may_read_every_response(
    strict: Gateway, send: Send, status: int, origin: str
) -> None:
    response = await send(strict, [("Origin", origin)])
    assert response.status == status
    (allowed, exposed) = cors_headers(response)
    assert allowed == ("access-control-allow-origin", origin)
    assert exposed[0] == "access-control-expose-headers"
    assert {*READ_HEADERS, "*"} <= set(exposed[1].split(", "))
    assert varies_by_origin(response)


@RESPONSES
@pytest.mark.parametrize(
    "headers",
    [
        pytest.param([("Origin", "https://evil.tld")], id="another origin"),
        pytest.param([("Origin", "null")], id="an opaque origin"),
        pytest.param([], id="no origin"),
    ],
)
async def test_other_requests_get_no_cors_header_except_vary(
    strict: Gateway, send: Send, status: int, headers: list[tuple[str, str]]
) -> None:
    response = await send(strict, headers)
    assert response.status == status
    assert cors_headers(response) == []
    assert varies_by_origin(response)


@pytest.mark.parametrize("origin", [EXACT, "https://evil.tld"])
async def test_vary_of_fals_response_is_kept(strict: Gateway, origin: str) -> None:
    response = await strict.call(RUN, json={}, headers=[("Origin", origin)])
    assert response.headers.getall("Vary") == ["Accept-Encoding", "Origin"]


@pytest.mark.parametrize("origin", [EXACT, "https://fal.ai"])
async def test_without_allowed_origins_cors_headers_of_fal_are_removed(
    gateway: Gateway, fal: FakeFal, origin: str
) -> None:
    fal.respond = respond_with_cors_headers
    response = await gateway.call(RUN, json={}, headers=[("Origin", origin)])
    assert response.status == 200
    assert cors_headers(response) == []


async def test_a_page_reads_the_error_for_an_unreachable_fal(
    make_gateway: MakeGateway, unused_tcp_port: int
) -> None:
    origin = f"http://127.0.0.1:{unused_tcp_port}"
    gateway = await make_gateway(origin, allowed_origins=ORIGINS)
    response = await gateway.call(RUN, json={}, headers=[("Origin", EXACT)])
    assert response.status == 502
    assert response.headers["Access-Control-Allow-Origin"] == EXACT
    assert varies_by_origin(response)
