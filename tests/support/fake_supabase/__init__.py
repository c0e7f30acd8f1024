"""A fake of Supabase Storage on loopback with the observed behaviour of the real one, and with
faults."""

import asyncio
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Self
from urllib.parse import unquote

from aiohttp import ClientPayloadError, web

from tests.support.fake_supabase.errors import Refusal, error_response, unknown_route
from tests.support.fake_supabase.faults import Fault, NoResponse, Planned
from tests.support.fake_supabase.routes import Storage
from tests.support.fake_supabase.store import Bucket, Object
from tests.support.fake_supabase.tokens import Tokens
from tests.support.ports import free_port

PREFIX = "/storage/v1"
SIZE_MAX = 50 * 2**20
SIGNING = "a-secret-of-the-fake-that-signs-its-tokens"
BROWSER = re.compile(r"Mozilla|Chrome|Safari|Firefox")
IN_BROWSER = {"message": "Forbidden use of secret API key in browser"}

Action = Callable[..., Awaitable[web.Response]]
BUCKET, KEY = "/([^/]+)", "/(.*)"

# Methods, path and handler; the first match is used. GET includes HEAD.
ROUTES: tuple[tuple[str, re.Pattern[str], Action], ...] = tuple(
    (method, re.compile(path, re.DOTALL), action)
    for method, path, action in (
        ("POST", "/bucket/?", Storage.make_bucket),
        ("GET", "/bucket/?", Storage.list_buckets),
        ("POST", f"/bucket{BUCKET}/empty", Storage.empty_bucket),
        ("GET", f"/bucket{BUCKET}", Storage.show_bucket),
        ("PUT", f"/bucket{BUCKET}", Storage.change_bucket),
        ("DELETE", f"/bucket{BUCKET}", Storage.delete_bucket),
        ("GET", f"/object/public{BUCKET}{KEY}", Storage.read_public),
        ("GET", f"/object/authenticated{BUCKET}{KEY}", Storage.read_authenticated),
        ("GET", f"/object/info{BUCKET}{KEY}", Storage.info),
        ("GET", f"/object/sign{BUCKET}{KEY}", Storage.read_signed),
        ("POST", f"/object/sign{BUCKET}{KEY}", Storage.sign),
        ("POST", f"/object/sign{BUCKET}", Storage.sign_many),
        ("POST", f"/object/list{BUCKET}", Storage.list_objects),
        ("POST", "/object/copy", Storage.copy),
        ("POST", "/object/move", Storage.move),
        ("DELETE", f"/object{BUCKET}{KEY}", Storage.delete),
        ("DELETE", f"/object{BUCKET}", Storage.delete_many),
        ("POST", f"/object{BUCKET}{KEY}", Storage.write),
        ("PUT", f"/object{BUCKET}{KEY}", Storage.write),
        ("GET", f"/object{BUCKET}{KEY}", Storage.read),
    )
)


@dataclass(frozen=True, slots=True)
class ReceivedRequest:
    """The head of a received request.

    headers: names in lower case.
    connection: identifies the connection.
    """

    method: str
    path: str
    headers: dict[str, str]
    connection: str


class FakeSupabase:
    """The server.

    size_max: the server's limit in bytes.
    keys: roles by opaque key; the server replaces such a key by a token of its role.
    requests: all received requests.
    stops_reading: do not read the rest of a body that is rejected before its end.
    """

    def __init__(self, *, size_max: int = SIZE_MAX, keys: dict[str, str] | None = None) -> None:
        self._keys = keys or {}
        self._tokens = Tokens(SIGNING, self._keys)
        self._storage = Storage(self._tokens, size_max)
        self._planned: list[Planned] = []
        self._port = free_port()
        self._runner: web.AppRunner | None = None
        self._stopped = asyncio.Event()
        self.requests: list[ReceivedRequest] = []
        self.stops_reading = False

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.stop()

    async def start(self) -> None:
        """Listen, after a restart at the same port."""
        self._stopped = asyncio.Event()
        app = web.Application(client_max_size=2**30)
        app.router.add_route("*", "/{path:.*}", self._handle)
        runner = web.AppRunner(
            app, shutdown_timeout=0.1, access_log=None, handler_cancellation=True
        )
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", self._port, reuse_address=True).start()
        self._runner = runner

    async def stop(self) -> None:
        """Stop listening. The objects stay."""
        self._stopped.set()
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    @property
    def url(self) -> str:
        """Return the value for SUPABASE_URL."""
        return f"http://127.0.0.1:{self._port}"

    @property
    def service_key(self) -> str:
        return self.token(role="service_role")

    @property
    def buckets(self) -> dict[str, Bucket]:
        return self._storage.buckets

    def token(self, **claims: object) -> str:
        return self._tokens.make(**claims)

    def objects(self, bucket: str) -> dict[str, Object]:
        return self.buckets[bucket].objects

    def elapse(self, seconds: float) -> None:
        self._tokens.ahead += seconds

    def fail(self, fault: Fault, times: int = 1, *, method: str = "", path: str = "") -> None:
        """Apply a fault to the next requests with a method and a path prefix."""
        self._planned.append(Planned(fault, times, method, path))

    def clear_faults(self) -> None:
        self._planned.clear()

    def count(self, method: str, path: str) -> int:
        return sum(one.method == method and one.path.startswith(path) for one in self.requests)

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        path = unquote(request.raw_path.partition("?")[0]).removeprefix(PREFIX)
        assert request.transport is not None
        peer = request.transport.get_extra_info("peername")
        headers = {name.lower(): value for name, value in request.headers.items()}
        self.requests.append(ReceivedRequest(request.method, path, headers, str(peer)))
        planned = next((one for one in self._planned if one.meets(request.method, path)), None)
        try:
            if planned is None:
                return await self._act(request)
            planned.times -= 1
            return await planned.fault(request, self._act)
        except (NoResponse, ConnectionError, ClientPayloadError):
            if request.transport is not None:
                request.transport.abort()
            return web.Response()

    async def _act(self, request: web.Request) -> web.StreamResponse:
        path = unquote(request.raw_path.partition("?")[0]).removeprefix(PREFIX)
        if self._is_browser(request):
            return web.json_response(IN_BROWSER, status=401)
        try:
            return await self._route(request, path)
        except Refusal as refusal:
            refused = error_response(refusal, request.method)
            if self.stops_reading and not request.content.is_eof():
                await self._send_and_hang(request, refused)
            return refused

    async def _route(self, request: web.Request, path: str) -> web.Response:
        method = request.method.replace("HEAD", "GET")
        for known, pattern, action in ROUTES:
            if known == method and (match := pattern.fullmatch(path)):
                return await action(self._storage, request, *match.groups())
        return unknown_route(request.method, path)

    async def _send_and_hang(self, request: web.Request, refused: web.Response) -> None:
        """Send the response and leave the connection open, without reading from it."""
        await refused.prepare(request)
        await refused.write_eof()
        await self._stopped.wait()

    def _is_browser(self, request: web.Request) -> bool:
        agent = request.headers.get("User-Agent", "")
        return request.headers.get("apikey") in self._keys and bool(BROWSER.search(agent))
