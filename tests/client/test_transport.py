"""falproxy.client where no scenario shows it: which requests go where, and what is refused."""

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
from falproxy.client.transport import CONNECT_TIMEOUT, Route
from falproxy.errors import SettingsError
from tests.support.fake_fal import FakeFal
from tests.support.gateway import Gateway
from tests.support.urls import PROXY

ROUTE = Route(httpx.URL("https://proxy.example/api/fal/proxy"), "secret")
DEV = "fal-ai/flux/dev"
QUEUE = "https://queue.fal.run/fal-ai/flux/requests/7e2f"


def request(url: str) -> httpx.Request:
    return httpx.Request("POST", url, headers={"Authorization": "Key mine"}, json={"prompt": "x"})


@pytest.mark.parametrize(
    ("url", "target"),
    [
        pytest.param("https://fal.run/fal-ai/flux/dev", None, id="a run"),
        pytest.param("https://fal.run/a/b?x=%2F%20&y=1", None, id="a query as it was written"),
        pytest.param("https://rest.fal.ai/tokens/", None, id="below the other domain"),
        pytest.param("https://FAL.run/a/b", "https://fal.run/a/b", id="a host in capitals"),
        pytest.param("https://fal.run/a/b#c", "https://fal.run/a/b", id="no part that stays here"),
        pytest.param("http://fal.run/a/b", None, id="what the proxy will refuse"),
        pytest.param(
            QUEUE.replace("fal.run", "falrun.com"), QUEUE, id="a backup host is the proxy's affair"
        ),
    ],
)
def test_a_request_to_fal_goes_to_the_proxy(url: str, target: str | None) -> None:
    sent = ROUTE.lead(request(url))
    assert sent.url == ROUTE.url
    assert sent.headers["x-fal-target-url"] == (target or url)
    assert sent.headers["host"] == "proxy.example"
    assert sent.headers["x-falproxy-key"] == "secret"
    assert "authorization" not in sent.headers
    assert (sent.method, sent.read()) == ("POST", b'{"prompt":"x"}')


@pytest.mark.parametrize(
    "url",
    [
        pytest.param("https://v3.fal.media/files/upload", id="the CDN"),
        pytest.param("https://notfal.run/a/b", id="same letters without the dot"),
        pytest.param("https://fal.run.example.com/a/b", id="fal's name in front"),
        pytest.param("https://example.com/fal.run/a/b", id="fal's name in the path"),
        pytest.param("https://fal.run@example.com/a/b", id="fal's name as a user"),
    ],
)
def test_any_other_request_is_left_alone(url: str) -> None:
    other = request(url)
    assert ROUTE.lead(other) is other
    assert other.headers["authorization"] == "Key mine"
    assert "x-falproxy-key" not in other.headers


@pytest.mark.parametrize(
    ("given", "connect"),
    [
        pytest.param({"connect": None, "read": None}, CONNECT_TIMEOUT, id="a run without limit"),
        pytest.param({"connect": 30.0, "read": 120.0}, CONNECT_TIMEOUT, id="a patient poll"),
        pytest.param({"connect": 0.5, "read": 0.5}, 0.5, id="a caller in a hurry"),
    ],
)
def test_connecting_never_takes_forever(given: dict[str, float | None], connect: float) -> None:
    timed = httpx.Request("GET", QUEUE, extensions={"timeout": given})
    assert ROUTE.lead(timed).extensions["timeout"] == {**given, "connect": connect}
    assert timed.extensions["timeout"] == given


@pytest.mark.parametrize(
    ("given", "url"),
    [
        pytest.param("http://localhost:8080", "http://localhost:8080/api/fal/proxy", id="origin"),
        pytest.param("https://a.example/", "https://a.example/api/fal/proxy", id="with a slash"),
        pytest.param("https://a.example/ai", "https://a.example/ai/api/fal/proxy", id="a prefix"),
        pytest.param(
            "https://a.example/ai/api/fal/proxy",
            "https://a.example/ai/api/fal/proxy",
            id="the whole route",
        ),
    ],
)
def test_a_proxy_is_named_by_origin_prefix_or_route(given: str, url: str) -> None:
    assert str(SyncClient(given).route.url) == url
    assert str(AsyncClient(given).route.url) == url


@pytest.fixture
def nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A working directory and an environment that name no proxy."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FALPROXY_URL", raising=False)
    monkeypatch.delenv("FALPROXY_KEY", raising=False)
    return tmp_path


@pytest.mark.usefixtures("nowhere")
@pytest.mark.parametrize(
    ("url", "key", "said"),
    [
        pytest.param(None, None, "No proxy is named", id="nothing"),
        pytest.param("", None, "No proxy is named", id="an empty URL"),
        pytest.param("localhost:8080", None, "The URL of the proxy must be", id="no scheme"),
        pytest.param("http://me:pw@a.example", None, "The URL of the proxy must be", id="a user"),
        pytest.param("http://a.example", "s3cret\n", "The key for the proxy", id="a line break"),
        pytest.param("http://a.example", "s3crét", "The key for the proxy", id="not ASCII"),
    ],
)
def test_what_makes_no_sense_is_said_at_once(url: str | None, key: str | None, said: str) -> None:
    with pytest.raises(SettingsError, match=said) as caught:
        SyncClient(url, key)
    assert "s3cr" not in str(caught.value)


def test_a_dotenv_file_names_the_proxy(nowhere: Path) -> None:
    (nowhere / ".env").write_text("FALPROXY_URL=http://a.example\nFALPROXY_KEY=friend\n")
    assert AsyncClient().route == Route(httpx.URL(f"http://a.example{PROXY}"), "friend")
    assert SyncClient("http://b.example", "").route.key == ""


def test_options_are_fal_client_s_own() -> None:
    assert SyncClient("http://a.example", default_timeout=7.0).default_timeout == 7.0
    assert AsyncClient("http://a.example", default_timeout=7.0).default_timeout == 7.0
    with pytest.raises(TypeError, match="colour"):
        SyncClient("http://a.example", colour="red")


@pytest.mark.parametrize("make", [SyncClient, AsyncClient])
def test_two_clients_are_not_one(make: Callable[..., Any]) -> None:
    assert len({make("http://a.example"), make("http://b.example")}) == 2


def test_what_belongs_to_an_ended_event_loop_is_forgotten() -> None:
    client = AsyncClient("http://a.example")

    async def use() -> None:
        (await client.get_handle(DEV, "an-id")).client.headers.clear()

    for _ in range(5):
        asyncio.run(use())
    assert len(client.clients) == 1


@pytest.fixture
async def elsewhere(aiohttp_server: AiohttpServer) -> tuple[str, list[str]]:
    """A server that answers every call with a redirect to itself, and what it was asked for."""
    asked: list[str] = []

    async def redirect(request: web.Request) -> web.StreamResponse:
        asked.append(request.path)
        raise web.HTTPTemporaryRedirect("/login")

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", redirect)
    server = await aiohttp_server(app)
    return f"http://127.0.0.1:{server.port}", asked


async def run_by(client: Any) -> Any:
    """A run, with the client's connections closed after it."""
    inputs = {"prompt": "x"}
    if isinstance(client, AsyncClient):
        async with (await client.get_handle(DEV, "an-id")).client:
            return await client.run(DEV, inputs)
    with client.get_handle(DEV, "an-id").client:
        return await asyncio.to_thread(client.run, DEV, inputs)


@pytest.mark.parametrize("make", [SyncClient, AsyncClient])
async def test_a_redirect_away_is_not_followed(
    elsewhere: tuple[str, list[str]], make: Callable[..., Any]
) -> None:
    url, asked = elsewhere
    with pytest.raises(fal_client.FalClientError, match="redirects to /login: give the URL"):
        await run_by(make(url, "secret"))
    assert asked == [PROXY]


async def test_a_redirect_of_fals_own_goes_through_the_proxy(
    gateway: Gateway, fal: FakeFal
) -> None:
    """fal_client's synchronous client follows redirects, its other one does not."""

    async def move(request: web.Request) -> web.StreamResponse:
        if request.path.endswith("/new"):
            return web.json_response({"moved": True})
        return web.Response(status=307, headers={"Location": "https://fal.run/fal-ai/new"})

    fal.answer = move
    assert await run_by(SyncClient(gateway.origin)) == {"moved": True}
    assert [seen.target for seen in fal.seen] == [f"/{DEV}", "/fal-ai/new"]
    assert fal.seen[1].body == fal.seen[0].body


NAMES = "_client = _token_manager = None"
STUB = """
class SyncClient:
    {names}
class AsyncClient:
    {names}
__version__ = "{version}"
version_tuple = tuple(int(part) for part in __version__.split("."))
"""


@pytest.mark.parametrize(
    ("version", "names"),
    [
        pytest.param("0.14.1", NAMES, id="too old"),
        pytest.param("2.0.0", NAMES, id="too new"),
        pytest.param("1.8.0", "_token_manager = None", id="another way to its HTTP client"),
        pytest.param("1.9.0", NAMES, id="without what we import"),
    ],
)
def test_an_unsupported_fal_client_is_named(
    tmp_path: Path, root: Path, version: str, names: str
) -> None:
    (tmp_path / "fal_client.py").write_text(STUB.format(version=version, names=names))
    assert import_error(tmp_path, root) == (
        f"ImportError: falproxy.client does not support fal_client {version}: "
        "pip install 'fal-client>=1.0,<2', or a newer falproxy."
    )


def test_a_fal_client_without_a_version_is_too_old(tmp_path: Path, root: Path) -> None:
    (tmp_path / "fal_client.py").write_text("")
    assert "does not support fal_client of unknown version" in import_error(tmp_path, root)


def test_a_missing_fal_client_is_said(tmp_path: Path, root: Path) -> None:
    (tmp_path / "fal_client.py").write_text("raise ModuleNotFoundError('fal_client')")
    assert import_error(tmp_path, root) == (
        "ImportError: falproxy.client needs fal's own client: pip install 'falproxy[client]'."
    )


def import_error(first: Path, root: Path) -> str:
    """The last line that an import of falproxy.client says, with `first` before all packages."""
    code = f"import sys; sys.path[:0] = [{str(first)!r}, {str(root)!r}]; import falproxy.client"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    return done.stderr.splitlines()[-1]
