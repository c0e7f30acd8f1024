"""Few modules open connections, and only one opens URLs that users name."""

import ast
from pathlib import Path

import pytest

from tests.support.paths import PACKAGE

# Names that open connections: functions and classes, or the module that contains them.
CONNECTING_NAMES = (
    "aiohttp.BaseConnector",
    "aiohttp.ClientSession",
    "aiohttp.TCPConnector",
    "aiohttp.UnixConnector",
    "aiohttp.client",
    "aiohttp.connector",
    "aiohttp.request",
    "asyncio.open_connection",
    "asyncio.open_unix_connection",
    "falproxy.media.fetch.connector.open_session",
    "falproxy.proxy.transport.aiohttp_transport.open_session",
    "falproxy.proxy.upstream.open_transport",
    "ftplib",
    "http.client",
    "httpx",
    "jwt.PyJWKClient",
    "pycurl",
    "requests",
    "smtplib",
    "socket.create_connection",
    "urllib.request",
    "urllib3",
    "websockets",
    "xmlrpc",
)
# Methods of an event loop and of a socket; databases have a `connect` of their own.
METHODS = ("create_connection", "sock_connect", "connect_ex")
# The modules that open connections, none of them to a host that a user named.
CONNECTING_MODULES = {
    "proxy/upstream.py": "fal",
    "proxy/transport": "the host that proxy/upstream.py names",
    "app/start_checks.py": "fal and Supabase, to see whether they can be reached",
    "cli/estimate_command.py": "fal, for its prices",
    "cli/doctor.py": "fal, to see whether it can be reached",
    "cli/system_checks.py": "the program that uses the port of FALPROXY_PORT",
    "middleware/jwks.py": "the public keys at FALPROXY_JWKS_URL",
    "stores/files": "the project at SUPABASE_URL",
    "client": "the proxy: it is the client's side",
    "sandbox": "the webhooks of its callers",
    "server/worker_metrics.py": "the other workers on this machine",
}
# The only module that opens connections to hosts that users name.
FETCH = "media/fetch"


def is_allowed(path: Path) -> bool:
    places = {path.relative_to(PACKAGE).as_posix()} | {
        parent.as_posix() for parent in path.relative_to(PACKAGE).parents
    }
    return not places.isdisjoint({*CONNECTING_MODULES, FETCH})


MODULES = [path for path in sorted(PACKAGE.rglob("*.py")) if not is_allowed(path)]


def connections_in(code: str) -> set[str]:
    """Return the connecting names that a module uses, also under another name."""
    tree = ast.parse(code)
    names: dict[str, str] = {}
    used: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            used |= {alias.name for alias in node.names}
            names |= {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom):
            full = {
                alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names
            }
            used |= {*full.values()}
            names |= full
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            root, dot, rest = ast.unparse(node).partition(".")
            used.add(names.get(root, root) + dot + rest)
            if node.attr in METHODS:
                used.add(f"{node.attr} of something")
    return {name for name in used if is_connecting_name(name)}


def is_connecting_name(name: str) -> bool:
    return name.endswith(" of something") or any(
        name == way or name.startswith(f"{way}.") for way in CONNECTING_NAMES
    )


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_opens_no_connection_of_its_own(path: Path) -> None:
    assert connections_in(path.read_text()) == set()


@pytest.mark.parametrize("place", [*CONNECTING_MODULES, FETCH])
def test_a_module_that_may_open_connections_does(place: str) -> None:
    path = PACKAGE / place
    files = [path] if path.is_file() else sorted(path.glob("*.py"))
    assert any(connections_in(file.read_text()) for file in files)


@pytest.mark.parametrize(
    "code",
    [
        pytest.param("from aiohttp import ClientSession", id="by its name"),
        pytest.param("from aiohttp import ClientSession as Session", id="by another name"),
        pytest.param("import aiohttp\naiohttp.ClientSession()", id="by its module"),
        pytest.param("import aiohttp as a\na.request('GET', url)", id="by another module's name"),
        pytest.param("from aiohttp.client import ClientSession", id="where it is at home"),
        pytest.param("from aiohttp import client", id="its home"),
        pytest.param("def read():\n    import urllib.request", id="inside a function"),
        pytest.param("from urllib import request", id="urllib in two parts"),
        pytest.param("import httpx", id="another library"),
        pytest.param("import socket as s\ns.create_connection(address)", id="a socket"),
        pytest.param("import asyncio\nasyncio.open_connection(host, 80)", id="a stream"),
        pytest.param("loop.create_connection(make, host)", id="a method of the event loop"),
        pytest.param("from falproxy.proxy.upstream import open_transport", id="one meant for fal"),
    ],
)
def test_a_connection_is_seen_however_it_is_opened(code: str) -> None:
    assert connections_in(code)


@pytest.mark.parametrize(
    "code",
    [
        pytest.param("from aiohttp import web", id="aiohttp's server"),
        pytest.param("from urllib.parse import urljoin", id="the parser of urllib"),
        pytest.param("import sqlite3\nsqlite3.connect(path)", id="a database"),
        pytest.param("request.url", id="a name that only looks like it"),
    ],
)
def test_what_opens_no_connection_is_left_alone(code: str) -> None:
    assert not connections_in(code)
