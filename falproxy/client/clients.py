"""fal_client's two clients with the proxy between them and fal."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from datetime import datetime
from functools import cached_property
from typing import Any

import httpx

from falproxy.client.supported import (
    AsyncCDNTokenManager,
    AuthCredentials,
    CDNToken,
    CDNTokenManager,
    fal_client,
)
from falproxy.client.transport import AsyncProxyTransport, ProxyTransport, Route, http_error
from falproxy.fal.target import host_matches

# fal_client insists on a key. This one is nobody's, and comes off every request to the proxy.
NO_KEY = AuthCredentials("Key", "falproxy")
USER_AGENT = {"User-Agent": f"fal-client/{fal_client.__version__} (python)"}  # fal_client's own
CDN_TOKEN = "https://rest.fal.ai/storage/auth/token?storage_type=fal-cdn-v3"
CDN_HOST = "v3.fal.media"
CDN_HOSTS = ("fal.media", "*.fal.media")


class SyncClient(fal_client.SyncClient):
    """`fal_client.SyncClient` through the proxy; every method works as documented there.

    proxy_url: the proxy's origin (`http://localhost:8080`), what it is mounted below
    (`https://example.com/ai`), or its whole route (`.../api/fal/proxy`); None reads FALPROXY_URL
    from the environment or `.env`. key: an access key of the proxy; None reads FALPROXY_KEY, an
    empty string sends none. options: what fal_client's own class takes beside `key`, such as
    `default_timeout`.

    No fal key is needed, read or sent. `use_jwt=False` of the realtime methods, which asks for a
    socket with the fal key, makes one with a token like `use_jwt=True`.

    Raises: SettingsError, a ValueError: no proxy is named, or its URL or key makes no sense.

    The methods raise what fal_client's do: FalClientHTTPError with the sentence of fal or of the
    proxy, or with the list of details of a 422 (`stream` and the uploads too, which raise errors
    of httpx there); httpx.ConnectError, with the proxy's URL, when nobody answers there and
    fal_client has tried often enough.

        fal = SyncClient("http://localhost:8080", key="my-secret")
        fal.run("fal-ai/flux/dev", {"prompt": "a lighthouse at dusk"})
    """

    def __init__(
        self, proxy_url: str | None = None, key: str | None = None, **options: Any
    ) -> None:
        super().__init__(key=NO_KEY.token, **options)
        self.route = Route.find(proxy_url, key)

    # fal_client's are equal when their keys are, and all of ours have the same.
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    @cached_property
    def _client(self) -> httpx.Client:
        return httpx.Client(
            transport=ProxyTransport(self.route),
            headers=USER_AGENT,
            timeout=self.default_timeout,
            follow_redirects=True,  # like fal_client; the transport lets those of fal pass only
        )

    @cached_property
    def _token_manager(self) -> CDNTokenManager:
        return CDNTokens(self._client)

    # Replaced for the sandbox's sake alone, like AsyncClient._cdn_client: a fal_client that has no
    # such method uploads to fal's CDN, as it should to anything but a sandbox.
    def _get_cdn_client(self) -> httpx.Client:
        def choose(request: httpx.Request) -> None:
            choose_cdn(request, self._token_manager.get_token())

        client = super()._get_cdn_client()
        client.event_hooks["request"].append(choose)
        return client

    @contextmanager
    def realtime(self, application: str, **options: Any) -> Iterator[fal_client.RealtimeConnection]:
        with super().realtime(application, **with_token(options)) as connection:
            yield connection

    @contextmanager
    def ws_connect(self, application: str, **options: Any) -> Iterator[Any]:
        with super().ws_connect(application, **with_token(options)) as socket:
            yield socket


class AsyncClient(fal_client.AsyncClient):
    """`fal_client.AsyncClient` through the proxy: SyncClient for asyncio.

        fal = AsyncClient("http://localhost:8080")
        await fal.run("fal-ai/flux/dev", {"prompt": "a lighthouse at dusk"})

    Unlike fal_client's own, it may be used in one event loop after another.
    """

    def __init__(
        self, proxy_url: str | None = None, key: str | None = None, **options: Any
    ) -> None:
        super().__init__(key=NO_KEY.token, **options)
        self.route = Route.find(proxy_url, key)
        # Connections belong to an event loop, and a program may run one after another.
        self.clients: dict[asyncio.AbstractEventLoop, httpx.AsyncClient] = {}
        self.tokens = AsyncCDNTokens(self.http_client)

    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def http_client(self) -> httpx.AsyncClient:
        """The HTTP client of the event loop that runs."""
        loop = asyncio.get_running_loop()
        if loop not in self.clients:
            for ended in [known for known in self.clients if known.is_closed()]:
                del self.clients[ended]  # too late to close its connections
            self.clients[loop] = httpx.AsyncClient(
                transport=AsyncProxyTransport(self.route),
                headers=USER_AGENT,
                timeout=self.default_timeout,
            )
        return self.clients[loop]

    @property
    async def _client(self) -> httpx.AsyncClient:
        return self.http_client()

    @property
    async def _token_manager(self) -> AsyncCDNTokenManager:
        return self.tokens

    @asynccontextmanager
    async def _cdn_client(self) -> AsyncIterator[httpx.AsyncClient]:
        async def choose(request: httpx.Request) -> None:
            choose_cdn(request, await self.tokens.get_token())

        async with super()._cdn_client() as client:
            client.event_hooks["request"].append(choose)
            yield client

    @asynccontextmanager
    async def realtime(
        self, application: str, **options: Any
    ) -> AsyncIterator[fal_client.AsyncRealtimeConnection]:
        async with super().realtime(application, **with_token(options)) as connection:
            yield connection

    @asynccontextmanager
    async def ws_connect(self, application: str, **options: Any) -> AsyncIterator[Any]:
        async with super().ws_connect(application, **with_token(options)) as socket:
            yield socket


class CDNTokens(CDNTokenManager):
    """Tokens for uploads, made through the proxy. fal_client's own manager asks fal, by an HTTP
    client that it opens for the purpose."""

    def __init__(self, client: httpx.Client) -> None:
        super().__init__(NO_KEY)
        self.client = client
        self.token: CDNToken | None = None

    def get_token(self) -> CDNToken:
        """Raises: FalClientHTTPError, the proxy or fal gave none."""
        if self.token is None or self.token.is_expired():
            self.token = read_token(self.client.post(CDN_TOKEN, json={}))
        return self.token


class AsyncCDNTokens(AsyncCDNTokenManager):
    """CDNTokens for asyncio. client: finds the HTTP client of the event loop that runs."""

    def __init__(self, client: Callable[[], httpx.AsyncClient]) -> None:
        super().__init__(NO_KEY)
        self.client = client
        self.token: CDNToken | None = None

    async def get_token(self) -> CDNToken:
        """Raises: FalClientHTTPError, the proxy or fal gave none."""
        if self.token is None or self.token.is_expired():
            self.token = read_token(await self.client().post(CDN_TOKEN, json={}))
        return self.token


def read_token(response: httpx.Response) -> CDNToken:
    if not response.is_success:
        raise http_error(response)
    document = response.json()
    return CDNToken(
        token=document["token"],
        token_type=document["token_type"],
        base_upload_url=document["base_url"],
        expires_at=datetime.fromisoformat(document["expires_at"]),
    )


def choose_cdn(request: httpx.Request, token: CDNToken) -> None:
    """Sends an upload where its token is good. fal_client takes fal's own CDN for granted, but a
    sandbox has another, and files that are meant for it are none of fal's business."""
    cdn = httpx.URL(token.base_upload_url.rstrip("/") + request.url.raw_path.decode())
    if request.url.host == CDN_HOST and not host_matches(cdn.host, CDN_HOSTS):
        request.url = cdn
        request.headers["host"] = cdn.netloc.decode()


def with_token(options: dict[str, Any]) -> dict[str, Any]:
    """The options of a socket that is opened with a token: there is no fal key to open it with."""
    return {**options, "use_jwt": True}
