"""The check of the Host header, against DNS rebinding, of proxies without authentication."""

from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from aiohttp import web
from aiohttp.pytest_plugin import AiohttpClient

import falproxy
from falproxy.middleware.cors import host_name
from tests.support.fake_fal import FakeFal
from tests.support.gateway import Gateway, MakeGateway
from tests.support.key_search import CANARY
from tests.support.settings import make_settings
from tests.support.urls import PROXY, REQUEST, RUN

HOSTS = [
    pytest.param("127.0.0.1:8080", True, id="an IPv4 address"),
    pytest.param("192.168.1.7", True, id="an address in the network"),
    pytest.param("203.0.113.7:443", True, id="a public address"),
    pytest.param("[::1]:8080", True, id="an IPv6 address"),
    pytest.param("[FE80::1]", True, id="an IPv6 address in capitals"),
    pytest.param("localhost", True, id="localhost"),
    pytest.param("LocalHost:8080", True, id="localhost in any case"),
    pytest.param("localhost.:8080", True, id="a final dot"),
    pytest.param("app.localhost:3000", True, id="below localhost"),
    pytest.param("evil.com", False, id="a name"),
    pytest.param("evil.com:8080", False, id="a name with a port"),
    pytest.param("localhost.evil.com", False, id="a name that begins with localhost"),
    pytest.param("evillocalhost", False, id="a name that ends with localhost"),
    pytest.param("127.0.0.1.evil.com", False, id="a name that begins with an address"),
    pytest.param("127.0.0.1@evil.com", False, id="a user"),
    pytest.param("evil.com#127.0.0.1", False, id="a fragment"),
    pytest.param("::1", False, id="an IPv6 address without brackets"),
    pytest.param("[127.0.0.1]", False, id="an IPv4 address in brackets"),
    pytest.param("[::1].evil.com", False, id="a name after brackets"),
    pytest.param("localhost:port", False, id="an invalid port"),
    pytest.param("localhost:123456", False, id="a port that is too long"),
    pytest.param("falproxy", False, id="a name without a dot"),
    pytest.param("", False, id="empty"),
]
# Path → whether its error has the shape of fal's.
PATHS = ("/", "/dashboard", "/docs", "/openapi.json", "/api/usage", "/metrics", "/web/about.json")
CALLS = ("/kontext", "/v1/images/generations", "/v1/models", "/api/images/generate")


@pytest.fixture
async def gateway(make_gateway: MakeGateway, fal: FakeFal) -> Gateway:
    """A proxy with the default host names."""
    return await make_gateway(fal.origin, allowed_hosts=())


async def poll(gateway: Gateway, host: str, target: str = f"{REQUEST}/status") -> int:
    headers = {"x-fal-target-url": target, "Host": host}
    async with gateway.client.get(PROXY, headers=headers) as response:
        await response.read()
        return response.status


@pytest.mark.parametrize(("host", "is_allowed"), HOSTS)
async def test_an_open_proxy_responds_to_addresses_and_localhost(
    gateway: Gateway, fal: FakeFal, host: str, is_allowed: bool
) -> None:
    assert await poll(gateway, host) == (200 if is_allowed else 403)
    assert len(fal.seen) == is_allowed


@pytest.mark.parametrize(
    ("settings", "host", "is_allowed"),
    [
        ({"public_url": "https://ai.example.com/x"}, "ai.example.com", True),
        ({"public_url": "https://AI.example.com"}, "ai.example.com:8443", True),
        ({"public_url": "https://ai.example.com"}, "example.com", False),
        ({"public_url": "https://ai.example.com"}, "aiXexample.com", False),
        ({"public_url": "https://ai.example.com"}, "x.ai.example.com", False),
        ({"public_url": "https://[2001:db8::1]:8443"}, "[2001:db8::1]:8443", True),
        ({"allowed_hosts": ("falproxy",)}, "falproxy:8080", True),
        ({"allowed_hosts": ("a.example", "b.example")}, "b.example", True),
        ({"allowed_hosts": ("*.example.com",)}, "a.b.example.com", True),
        ({"allowed_hosts": ("*.example.com",)}, "example.com", False),
        ({"allowed_hosts": ("*.example.com",)}, "evil.com/.example.com", False),
        ({"allowed_hosts": ("*",)}, "evil.com", True),
        ({"access_keys": (("ann", "ann-s3cret"),)}, "evil.com", True),
    ],
)
async def test_further_names_are_configured(
    make_gateway: MakeGateway,
    fal: FakeFal,
    settings: dict[str, object],
    host: str,
    is_allowed: bool,
) -> None:
    gateway = await make_gateway(fal.origin, **{"allowed_hosts": ()} | settings)
    status = 401 if "access_keys" in settings else 200
    assert await poll(gateway, host) == (status if is_allowed else 403)


async def test_the_fast_path_has_the_same_check(gateway: Gateway, fal: FakeFal) -> None:
    for _ in range(3):
        assert await poll(gateway, "localhost") == 200
    assert await poll(gateway, "evil.com") == 403
    assert await poll(gateway, "localhost") == 200
    assert len(fal.seen) == 4


async def test_every_path_is_checked_with_a_hint_how_to_allow_a_name(gateway: Gateway) -> None:
    for path in (*PATHS, *CALLS, "/api/fal/run/fal-ai/flux/dev", "/api/fal/rest/x"):
        method = "POST" if path in CALLS[:2] + CALLS[3:] else "GET"
        async with gateway.client.request(method, path, headers={"Host": "evil.com"}) as response:
            text = await response.text()
        assert response.status == 403, path
        for setting in ("FALPROXY_ALLOWED_HOSTS", "FALPROXY_PUBLIC_URL", "FALPROXY_ACCESS_KEYS"):
            assert setting in text, path


async def test_the_error_has_the_shape_of_the_dialect(gateway: Gateway) -> None:
    headers = {"Host": "evil.com"}
    response = await gateway.client.get(PROXY, headers={**headers, "x-fal-target-url": RUN})
    assert (await response.json())["type"] == "host_forbidden"
    response = await gateway.client.get("/v1/models", headers=headers)
    assert set((await response.json())["error"]) == {"message", "type", "param", "code"}


async def test_health_checks_may_use_any_name(gateway: Gateway) -> None:
    """A load balancer's check may have any name, and there is nothing to protect."""
    response = await gateway.client.get("/health/ready", headers={"Host": "evil.com"})
    assert response.status == 200


async def test_two_host_headers_and_none(gateway: Gateway, fal: FakeFal) -> None:
    head = f"GET {PROXY} HTTP/1.0\r\nx-fal-target-url: {RUN}\r\n"
    two = "Host: localhost\r\nHost: evil.com\r\n"
    assert b" 200 " not in (await gateway.send_raw(f"{head}{two}\r\n".encode()))[:20]
    assert b" 200 " in (await gateway.send_raw(f"{head}\r\n".encode()))[:20]


async def no_caller(request: web.Request) -> str | None:
    return None


@pytest.mark.parametrize(
    ("authenticate", "status"),
    [pytest.param(None, 403, id="open"), pytest.param(no_caller, 401, id="locked")],
)
async def test_an_embedded_proxy_has_the_same_check(
    aiohttp_client: AiohttpClient,
    fal: FakeFal,
    tmp_path: Path,
    authenticate: Callable[[web.Request], Awaitable[str | None]] | None,
    status: int,
) -> None:
    async def hello(request: web.Request) -> web.Response:
        return web.Response(text="hello")

    app = web.Application(handler_args={"handler_cancellation": True})
    app.router.add_get("/", hello)
    settings = make_settings(fal_key=CANARY, upstream_origin=fal.origin, data_dir=tmp_path)
    falproxy.setup(app, settings, prefix="/ai", authenticate=authenticate)
    client = await aiohttp_client(app)
    headers = {"Host": "evil.com", "x-fal-target-url": RUN}
    assert (await client.get(f"/ai{PROXY}", headers=headers)).status == status
    assert (await client.get("/", headers=headers)).status == 200
    assert fal.seen == []


@pytest.mark.parametrize(
    ("header", "name"),
    [("A.b:1", "a.b"), ("a.", "a"), ("[::1]:80", "[::1]"), ("a b", ""), ("a:b", ""), (":80", "")],
)
def test_the_name_in_a_header(header: str, name: str) -> None:
    assert host_name(header) == name
