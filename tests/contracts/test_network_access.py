"""Who talks to other hosts: few modules do, and only one of them to those that users name."""

import ast
from pathlib import Path

import pytest

from tests.support.paths import PACKAGE

# What opens connections, by full name or by the name of what it is in.
WAYS_OUT = (
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
    "falproxy.proxy.upstream.open_way",
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
# Whose connections go where, none of it to be named by a user.
DOORS = {
    "upstream.py": "fal",
    "exchange": "where upstream.py sends it",
    "doctor.py": "fal, to see whether it can be reached",
    "middleware/tokens.py": "the public keys at FALPROXY_JWKS_URL",
    "storage": "the project at SUPABASE_URL",
    "client": "the proxy: it is the client's side",
    "sandbox": "the webhooks of whoever tries things out",
    "siblings.py": "the other workers on this machine",
}
# The one for the rest.
FETCH = "fetch"

MODULES = [
    path
    for path in sorted(PACKAGE.rglob("*.py"))
    if not {str(path.relative_to(PACKAGE)), path.relative_to(PACKAGE).parts[0]} & {*DOORS, FETCH}
]


def ways_out(code: str) -> set[str]:
    """What a module uses that opens connections, under whatever name it imports it."""
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
    return {name for name in used if is_way_out(name)}


def is_way_out(name: str) -> bool:
    return name.endswith(" of something") or any(
        name == way or name.startswith(f"{way}.") for way in WAYS_OUT
    )


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_opens_no_connection_of_its_own(path: Path) -> None:
    assert ways_out(path.read_text()) == set()


@pytest.mark.parametrize("door", [*DOORS, FETCH])
def test_a_door_is_still_there_and_used(door: str) -> None:
    path = PACKAGE / door
    files = [path] if path.is_file() else sorted(path.glob("*.py"))
    assert any(ways_out(file.read_text()) for file in files)


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
        pytest.param("from falproxy.proxy.upstream import open_way", id="a session meant for fal"),
    ],
)
def test_a_connection_is_seen_however_it_is_opened(code: str) -> None:
    assert ways_out(code)


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
    assert not ways_out(code)
