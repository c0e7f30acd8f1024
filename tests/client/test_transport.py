"""falproxy.client: request rewriting, configuration, redirects, and supported fal_clients."""

import asyncio
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fal_client
import httpx
import pytest
from aiohttp import web
from aiohttp.pytest_plugin import AiohttpServer

from falproxy.client import AsyncClient, SyncClient
from falproxy.client.transport import CONNECT_TIMEOUT, ProxyConfig
from falproxy.errors import SettingsError
from falproxy.metrics import METRICS
from falproxy.windows import Window
from tests.support.fake_fal import FakeFal
from tests.support.gateway import Gateway, MakeGateway
from tests.support.urls import PROXY

PROXY_CONFIG = ProxyConfig(httpx.URL("https://proxy.example/api/fal/proxy"), "secret")
DEV = "fal-ai/flux/dev"
QUEUE = "https://queue.fal.run/fal-ai/flux/requests/7e2f"


def request(url: str) -> httpx.Request:
    return httpx.Request("POST", url, headers={"Authorization": "Key mine"}, json={"prompt": "x"})


@pytest.mark.parametrize(
    ("url", "target"),
    [
        pytest.param("https://fal.run/fal-ai/flux/dev", None, id="a direct call"),
        pytest.param("https://fal.run/a/b?x=%2F%20&y=1", None, id="a query byte for byte"),
        pytest.param("https://rest.fal.ai/tokens/", None, id="a host below fal.ai"),
        pytest.param("https://FAL.run/a/b", "https://fal.run/a/b", id="a host in capitals"),
        pytest.param("https://fal.run/a/b#c", "https://fal.run/a/b", id="without the fragment"),
        pytest.param("http://fal.run/a/b", None, id="http, which the proxy refuses"),
        pytest.param(
            QUEUE.replace("fal.run", "falrun.com"), QUEUE, id="the main host in place of its backup"
        ),
    ],
)
def test_a_request_to_fal_is_rewritten_to_the_proxy(url: str, target: str | None) -> None:
    rewritten = PROXY_CONFIG.rewrite_request(request(url))
    assert rewritten.url == PROXY_CONFIG.url
    assert rewritten.headers["x-fal-target-url"] == (target or url)
    assert rewritten.headers["host"] == "proxy.example"
    assert rewritten.headers["x-falproxy-key"] == "secret"
    assert "authorization" not in rewritten.headers
    assert (rewritten.method, rewritten.read()) == ("POST", b'{"prompt":"x"}')


@pytest.mark.parametrize(
    "url",
    [
        pytest.param("https://v3.fal.media/files/upload", id="the CDN"),
        pytest.param("https://notfal.run/a/b", id="same letters without the dot"),
        pytest.param("https://fal.run.example.com/a/b", id="fal's name as a prefix"),
        pytest.param("https://example.com/fal.run/a/b", id="fal's name in the path"),
        pytest.param("https://fal.run@example.com/a/b", id="fal's name as user info"),
    ],
)
def test_any_other_request_is_not_changed(url: str) -> None:
    other = request(url)
    assert PROXY_CONFIG.rewrite_request(other) is other
    assert other.headers["authorization"] == "Key mine"
    assert "x-falproxy-key" not in other.headers


@pytest.mark.parametrize(
    ("timeouts", "connect"),
    [
        pytest.param(
            {"connect": None, "read": None}, CONNECT_TIMEOUT, id="a call without a timeout"
        ),
        pytest.param({"connect": 30.0, "read": 120.0}, CONNECT_TIMEOUT, id="a long timeout"),
        pytest.param({"connect": 0.5, "read": 0.5}, 0.5, id="a short timeout"),
    ],
)
def test_the_connect_timeout_is_limited(timeouts: dict[str, float | None], connect: float) -> None:
    original = httpx.Request("GET", QUEUE, extensions={"timeout": timeouts})
    rewritten = PROXY_CONFIG.rewrite_request(original)
    assert rewritten.extensions["timeout"] == {**timeouts, "connect": connect}
    assert original.extensions["timeout"] == timeouts


@pytest.mark.parametrize(
    ("proxy_url", "url"),
    [
        pytest.param("http://localhost:8080", "http://localhost:8080/api/fal/proxy", id="origin"),
        pytest.param("https://a.example/", "https://a.example/api/fal/proxy", id="with a slash"),
        pytest.param("https://a.example/ai", "https://a.example/ai/api/fal/proxy", id="a prefix"),
        pytest.param(
            "https://a.example/ai/api/fal/proxy",
            "https://a.example/ai/api/fal/proxy",
            id="the full URL",
        ),
    ],
)
def test_the_proxy_url_is_an_origin_a_prefix_or_the_full_url(proxy_url: str, url: str) -> None:
    assert str(SyncClient(proxy_url).proxy.url) == url
    assert str(AsyncClient(proxy_url).proxy.url) == url


@pytest.fixture
def no_proxy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A working directory and an environment without a proxy URL."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FALPROXY_URL", raising=False)
    monkeypatch.delenv("FALPROXY_KEY", raising=False)
    return tmp_path


@pytest.mark.usefixtures("no_proxy")
@pytest.mark.parametrize(
    ("url", "key", "message"),
    [
        pytest.param(None, None, "No proxy URL", id="no URL"),
        pytest.param("", None, "No proxy URL", id="an empty URL"),
        pytest.param("localhost:8080", None, "The URL of the proxy must be", id="no scheme"),
        pytest.param("http://me:pw@a.example", None, "The URL of the proxy must be", id="a user"),
        pytest.param("http://a.example", "s3cret\n", "The key for the proxy", id="a line break"),
        pytest.param("http://a.example", "s3crét", "The key for the proxy", id="not ASCII"),
    ],
)
def test_a_bad_url_or_key_is_a_settings_error(
    url: str | None, key: str | None, message: str
) -> None:
    with pytest.raises(SettingsError, match=message) as caught:
        SyncClient(url, key)
    assert "s3cr" not in str(caught.value)


def test_the_proxy_is_read_from_a_dotenv_file(no_proxy: Path) -> None:
    (no_proxy / ".env").write_text("FALPROXY_URL=http://a.example\nFALPROXY_KEY=friend\n")
    assert AsyncClient().proxy == ProxyConfig(httpx.URL(f"http://a.example{PROXY}"), "friend")
    assert SyncClient("http://b.example", "").proxy.key == ""


def test_options_are_passed_to_fal_client() -> None:
    assert SyncClient("http://a.example", default_timeout=7.0).default_timeout == 7.0
    assert AsyncClient("http://a.example", default_timeout=7.0).default_timeout == 7.0
    with pytest.raises(TypeError, match="color"):
        SyncClient("http://a.example", color="red")


@pytest.mark.parametrize("client_class", [SyncClient, AsyncClient])
def test_two_clients_are_not_equal(client_class: Callable[..., Any]) -> None:
    assert len({client_class("http://a.example"), client_class("http://b.example")}) == 2


def test_http_clients_of_closed_event_loops_are_dropped() -> None:
    client = AsyncClient("http://a.example")

    async def open_http_client() -> None:
        (await client.get_handle(DEV, "an-id")).client.headers.clear()

    for _ in range(5):
        asyncio.run(open_http_client())
    assert len(client.http_clients) == 1


@pytest.fixture
async def redirecting_server(aiohttp_server: AiohttpServer) -> tuple[str, list[str]]:
    """The URL of a server that redirects every request to itself, and the requested paths."""
    paths: list[str] = []

    async def redirect(request: web.Request) -> web.StreamResponse:
        paths.append(request.path)
        raise web.HTTPTemporaryRedirect("/login")

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", redirect)
    server = await aiohttp_server(app)
    return f"http://127.0.0.1:{server.port}", paths


async def call_run(client: Any) -> Any:
    """Call `run` and close the client's connections."""
    inputs = {"prompt": "x"}
    if isinstance(client, AsyncClient):
        async with (await client.get_handle(DEV, "an-id")).client:
            return await client.run(DEV, inputs)
    with client.get_handle(DEV, "an-id").client:
        return await asyncio.to_thread(client.run, DEV, inputs)


@pytest.mark.parametrize("client_class", [SyncClient, AsyncClient])
async def test_a_redirect_to_another_host_is_not_followed(
    redirecting_server: tuple[str, list[str]], client_class: Callable[..., Any]
) -> None:
    url, paths = redirecting_server
    with pytest.raises(fal_client.FalClientError, match="redirects to /login: use the URL"):
        await call_run(client_class(url, "secret"))
    assert paths == [PROXY]


async def test_a_redirect_to_fal_is_followed_through_the_proxy(
    gateway: Gateway, fal: FakeFal
) -> None:
    """Only the synchronous client of fal_client follows redirects."""

    async def redirect(request: web.Request) -> web.StreamResponse:
        if request.path.endswith("/new"):
            return web.json_response({"moved": True})
        return web.Response(status=307, headers={"Location": "https://fal.run/fal-ai/new"})

    fal.respond = redirect
    assert await call_run(SyncClient(gateway.origin)) == {"moved": True}
    assert [seen.target for seen in fal.seen] == [f"/{DEV}", "/fal-ai/new"]
    assert fal.seen[1].body == fal.seen[0].body


MEMBERS = "_client = _token_manager = None"
STUB = """
class SyncClient:
    {members}
class AsyncClient:
    {members}
__version__ = "{version}"
version_tuple = tuple(int(part) for part in __version__.split("."))
"""


@pytest.mark.parametrize(
    ("version", "members"),
    [
        pytest.param("0.14.1", MEMBERS, id="too old"),
        pytest.param("2.0.0", MEMBERS, id="too new"),
        pytest.param("1.8.0", "_token_manager = None", id="without the HTTP client"),
        pytest.param("1.9.0", MEMBERS, id="without the imported classes"),
    ],
)
def test_an_unsupported_fal_client_is_named(
    tmp_path: Path, root: Path, version: str, members: str
) -> None:
    (tmp_path / "fal_client.py").write_text(STUB.format(version=version, members=members))
    assert import_error(tmp_path, root) == (
        f"ImportError: falproxy.client does not support fal_client {version}: "
        "pip install 'fal-client>=1.0,<2', or a newer falproxy."
    )


def test_a_fal_client_without_a_version_is_unsupported(tmp_path: Path, root: Path) -> None:
    (tmp_path / "fal_client.py").write_text("")
    assert "does not support fal_client of unknown version" in import_error(tmp_path, root)


@pytest.mark.parametrize("missing", [["fal_client"], ["fal_client", "httpx"]], ids=" ".join)
def test_a_missing_fal_client_is_named(tmp_path: Path, root: Path, missing: list[str]) -> None:
    for name in missing:
        (tmp_path / f"{name}.py").write_text(f"raise ModuleNotFoundError({name!r})")
    assert import_error(tmp_path, root) == (
        "ImportError: falproxy.client needs fal's own client: pip install 'falproxy[client]'."
    )


def import_error(first: Path, root: Path) -> str:
    """Import falproxy.client and return the last line of the error.

    first: directory that precedes all packages in `sys.path`.
    """
    code = f"import sys; sys.path[:0] = [{str(first)!r}, {str(root)!r}]; import falproxy.client"
    completed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert completed.returncode == 1
    return completed.stderr.splitlines()[-1]


@pytest.mark.parametrize("client_class", [SyncClient, AsyncClient])
async def test_a_refusal_by_a_limit_is_repeated_after_the_wait(
    make_gateway: MakeGateway, fal: FakeFal, client_class: Callable[..., Any]
) -> None:
    gateway = await make_gateway(fal.origin, rate=(1, Window(2)))
    for _ in range(2):
        assert await call_run(client_class(gateway.origin, "")) == {"hello": "fal"}
    assert len(fal.seen) == 2
    refusals = gateway.client.server.app[METRICS].snapshot()["limited"]  # type: ignore[attr-defined]
    assert refusals == {"rate principal": 1}, "it is not repeated before"


@pytest.mark.parametrize("client_class", [SyncClient, AsyncClient])
@pytest.mark.parametrize(
    ("settings", "text"),
    [
        pytest.param({"rate": (1, Window(7200))}, "try again in", id="a long window"),
        pytest.param({"budget": (25_000, Window(7200))}, "It is renewed at", id="a budget"),
    ],
)
async def test_a_refusal_with_a_long_wait_is_an_error_at_once(
    make_gateway: MakeGateway,
    fal: FakeFal,
    client_class: Callable[..., Any],
    settings: dict[str, Any],
    text: str,
) -> None:
    gateway = await make_gateway(fal.origin, **settings)
    await call_run(client_class(gateway.origin, ""))
    async with asyncio.timeout(5):
        with pytest.raises(fal_client.FalClientError, match=text):
            await call_run(client_class(gateway.origin, ""))
    assert len(fal.seen) == 1
    refusals = gateway.client.server.app[METRICS].snapshot()["limited"]  # type: ignore[attr-defined]
    assert sum(refusals.values()) == 1
