"""fal_client's two client classes with the proxy between them and fal."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from datetime import datetime
from functools import cached_property
from typing import Any
from uuid import uuid4

import httpx

from falproxy.client.compat import (
    AsyncCDNTokenManager,
    AuthCredentials,
    CDNToken,
    CDNTokenManager,
    fal_client,
)
from falproxy.client.transport import AsyncProxyTransport, ProxyConfig, ProxyTransport, http_error
from falproxy.fal.target import host_matches

# fal_client requires a key. This one is not valid, and is removed from every request to the proxy.
PLACEHOLDER_KEY = AuthCredentials("Key", "falproxy")
USER_AGENT = {"User-Agent": f"fal-client/{fal_client.__version__} (python)"}  # as fal_client's
IDEMPOTENCY_KEY = "idempotency-key"
Headers = Mapping[str, str]
NO_HEADERS: Headers = {}
CDN_TOKEN_URL = "https://rest.fal.ai/storage/auth/token?storage_type=fal-cdn-v3"
CDN_HOST = "v3.fal.media"
CDN_HOSTS = ("fal.media", "*.fal.media")


class SyncClient(fal_client.SyncClient):
    """`fal_client.SyncClient` through the proxy. Every method works as documented there.

        fal = SyncClient("http://localhost:8080", key="my-secret")
        fal.run("fal-ai/flux/dev", {"prompt": "a lighthouse at dusk"})

    proxy_url: the proxy's origin (`http://localhost:8080`), a prefix below which it is mounted
        (`https://example.com/ai`), or its full URL (`.../api/fal/proxy`). None reads FALPROXY_URL
        from the environment or `.env`.
    key: an access key of the proxy. None reads FALPROXY_KEY, an empty string sends no key.
    options: arguments of fal_client's own class other than `key`, such as `default_timeout`.

    A fal key is not needed, read or sent. Realtime methods always use a token, as with
    `use_jwt=True`: without a fal key, `use_jwt=False` is not possible and is ignored.

    `run` and `submit` (and thus `subscribe`) send an `Idempotency-Key`, which is the same when
    fal_client repeats the call: a call whose response was lost is paid for once.

    Raises:
        SettingsError: no proxy URL, or a malformed URL or key. It is a ValueError.

    The methods raise the exceptions of fal_client:

    * FalClientHTTPError with the message of fal or of the proxy, or with the list of details of a
      422. `stream` and uploads raise it too, where fal_client itself raises errors of httpx.
    * httpx.ConnectError with the proxy's URL, if the proxy is unreachable after fal_client's
      retries.
    """

    def __init__(
        self, proxy_url: str | None = None, key: str | None = None, **options: Any
    ) -> None:
        super().__init__(key=PLACEHOLDER_KEY.token, **options)
        self.proxy = ProxyConfig.resolve(proxy_url, key)

    # By identity: fal_client compares clients by key, and all of these have the same one.
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    @cached_property
    def _client(self) -> httpx.Client:
        return httpx.Client(
            transport=ProxyTransport(self.proxy),
            headers=USER_AGENT,
            timeout=self.default_timeout,
            follow_redirects=True,  # as fal_client; the transport rejects redirects to other hosts
        )

    @cached_property
    def _token_manager(self) -> CDNTokenManager:
        return ProxyTokenManager(self._client)

    # Overridden for the sandbox only, like AsyncClient._cdn_client. A fal_client without this
    # method uploads to fal's CDN, which is correct unless the proxy uses a sandbox.
    def _get_cdn_client(self) -> httpx.Client:
        def on_request(request: httpx.Request) -> None:
            rewrite_upload_url(request, self._token_manager.get_token())

        client = super()._get_cdn_client()
        client.event_hooks["request"].append(on_request)
        return client

    def run(self, *args: Any, headers: Headers = NO_HEADERS, **options: Any) -> Any:
        return super().run(*args, headers=with_idempotency_key(headers), **options)

    def submit(
        self, *args: Any, headers: Headers = NO_HEADERS, **options: Any
    ) -> fal_client.SyncRequestHandle:
        return super().submit(*args, headers=with_idempotency_key(headers), **options)

    @contextmanager
    def realtime(self, application: str, **options: Any) -> Iterator[fal_client.RealtimeConnection]:
        with super().realtime(application, **with_jwt(options)) as connection:
            yield connection

    @contextmanager
    def ws_connect(self, application: str, **options: Any) -> Iterator[Any]:
        with super().ws_connect(application, **with_jwt(options)) as socket:
            yield socket


class AsyncClient(fal_client.AsyncClient):
    """`fal_client.AsyncClient` through the proxy: the same as SyncClient, for asyncio.

        fal = AsyncClient("http://localhost:8080")
        await fal.run("fal-ai/flux/dev", {"prompt": "a lighthouse at dusk"})

    Unlike fal_client's class, one object may be used in several event loops, one after another.
    """

    def __init__(
        self, proxy_url: str | None = None, key: str | None = None, **options: Any
    ) -> None:
        super().__init__(key=PLACEHOLDER_KEY.token, **options)
        self.proxy = ProxyConfig.resolve(proxy_url, key)
        # One for each event loop, because connections belong to the loop that opened them.
        self.http_clients: dict[asyncio.AbstractEventLoop, httpx.AsyncClient] = {}
        self.token_manager = AsyncProxyTokenManager(self.http_client)

    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def http_client(self) -> httpx.AsyncClient:
        """Return the HTTP client of the running event loop."""
        loop = asyncio.get_running_loop()
        if loop not in self.http_clients:
            for closed in [other for other in self.http_clients if other.is_closed()]:
                del self.http_clients[closed]  # its connections can no longer be closed
            self.http_clients[loop] = httpx.AsyncClient(
                transport=AsyncProxyTransport(self.proxy),
                headers=USER_AGENT,
                timeout=self.default_timeout,
            )
        return self.http_clients[loop]

    @property
    async def _client(self) -> httpx.AsyncClient:
        return self.http_client()

    @property
    async def _token_manager(self) -> AsyncCDNTokenManager:
        return self.token_manager

    @asynccontextmanager
    async def _cdn_client(self) -> AsyncIterator[httpx.AsyncClient]:
        async def on_request(request: httpx.Request) -> None:
            rewrite_upload_url(request, await self.token_manager.get_token())

        async with super()._cdn_client() as client:
            client.event_hooks["request"].append(on_request)
            yield client

    async def run(self, *args: Any, headers: Headers = NO_HEADERS, **options: Any) -> Any:
        return await super().run(*args, headers=with_idempotency_key(headers), **options)

    async def submit(
        self, *args: Any, headers: Headers = NO_HEADERS, **options: Any
    ) -> fal_client.AsyncRequestHandle:
        return await super().submit(*args, headers=with_idempotency_key(headers), **options)

    @asynccontextmanager
    async def realtime(
        self, application: str, **options: Any
    ) -> AsyncIterator[fal_client.AsyncRealtimeConnection]:
        async with super().realtime(application, **with_jwt(options)) as connection:
            yield connection

    @asynccontextmanager
    async def ws_connect(self, application: str, **options: Any) -> AsyncIterator[Any]:
        async with super().ws_connect(application, **with_jwt(options)) as socket:
            yield socket


class ProxyTokenManager(CDNTokenManager):
    """Obtains upload tokens through the proxy.

    fal_client's own manager requests them from fal, with an HTTP client that it opens itself.
    """

    def __init__(self, client: httpx.Client) -> None:
        super().__init__(PLACEHOLDER_KEY)
        self.client = client
        self.token: CDNToken | None = None

    def get_token(self) -> CDNToken:
        """Return a valid token.

        Raises:
            FalClientHTTPError: the proxy or fal refused the request for a token.
        """
        if self.token is None or self.token.is_expired():
            self.token = parse_token(self.client.post(CDN_TOKEN_URL, json={}))
        return self.token


class AsyncProxyTokenManager(AsyncCDNTokenManager):
    """ProxyTokenManager for asyncio.

    get_client: returns the HTTP client of the running event loop.
    """

    def __init__(self, get_client: Callable[[], httpx.AsyncClient]) -> None:
        super().__init__(PLACEHOLDER_KEY)
        self.get_client = get_client
        self.token: CDNToken | None = None

    async def get_token(self) -> CDNToken:
        """Return a valid token.

        Raises:
            FalClientHTTPError: the proxy or fal refused the request for a token.
        """
        if self.token is None or self.token.is_expired():
            self.token = parse_token(await self.get_client().post(CDN_TOKEN_URL, json={}))
        return self.token


def parse_token(response: httpx.Response) -> CDNToken:
    if not response.is_success:
        raise http_error(response)
    document = response.json()
    return CDNToken(
        token=document["token"],
        token_type=document["token_type"],
        base_upload_url=document["base_url"],
        expires_at=datetime.fromisoformat(document["expires_at"]),
    )


def rewrite_upload_url(request: httpx.Request, token: CDNToken) -> None:
    """Send an upload to the CDN that issued the token.

    fal_client always uploads to fal's CDN. The token of a sandbox is not valid there, and files
    for the sandbox must not leave the machine.
    """
    cdn = httpx.URL(token.base_upload_url.rstrip("/") + request.url.raw_path.decode())
    if request.url.host == CDN_HOST and not host_matches(cdn.host, CDN_HOSTS):
        request.url = cdn
        request.headers["host"] = cdn.netloc.decode()


def with_idempotency_key(headers: Headers) -> dict[str, str]:
    """Return the headers of a call with an Idempotency-Key, unless they have one. fal_client sends
    the same headers when it repeats a call whose response was lost: the proxy then returns the
    first one's response, instead of a second job."""
    if any(name.lower() == IDEMPOTENCY_KEY for name in headers):
        return dict(headers)
    return {**headers, IDEMPOTENCY_KEY: str(uuid4())}


def with_jwt(options: dict[str, Any]) -> dict[str, Any]:
    """Return the options of a socket that is opened with a token, since there is no fal key."""
    return {**options, "use_jwt": True}
