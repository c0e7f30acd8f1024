"""httpx transports that send fal_client's requests to the proxy."""

import asyncio
import logging
import ssl
import time
from dataclasses import dataclass, field
from functools import cache
from typing import Self

import httpx

from falproxy.client.compat import fal_client
from falproxy.environment import read_environment
from falproxy.errors import SettingsError
from falproxy.fal.target import FAL_HOSTS, host_matches
from falproxy.parsers import parse_url

log = logging.getLogger(__name__)

PROXY_PATH = "/api/fal/proxy"
# The URLs of a job have the host that accepted it, which may be a backup. The proxy selects
# between a host and its backup itself.
BACKUP_HOSTS = {"falrun.com": "fal.run", "queue.falrun.com": "queue.fal.run"}
# Seconds, also for calls without a time limit. fal_client 1.0.3 uses the same for fal.
CONNECT_TIMEOUT = 5.0
# The longest wait that a 429 of the proxy may ask for. fal_client repeats a request after a 429
# without regard to `Retry-After`.
RETRY_AFTER_MAX = 60


@dataclass(frozen=True, slots=True)
class ProxyConfig:
    """URL and key of the proxy.

    url: full URL of its route for calls.
    key: access key of the proxy. Empty sends none.
    """

    url: httpx.URL
    key: str = field(repr=False)

    @classmethod
    def resolve(cls, proxy_url: str | None, key: str | None) -> Self:
        """Return the configuration from arguments, or from the environment if they are None.

        Raises:
            SettingsError: no proxy URL, or a malformed URL or key.
        """
        env = read_environment() if proxy_url is None or key is None else {}
        url = env.get("FALPROXY_URL") if proxy_url is None else proxy_url
        secret = env.get("FALPROXY_KEY", "") if key is None else key
        if not url:
            raise SettingsError(
                "No proxy URL: pass one, such as http://localhost:8080, or set FALPROXY_URL."
            )
        if not all("!" <= character <= "~" for character in secret):
            raise SettingsError(
                "The key for the proxy has a character that is not allowed in a header."
            )
        try:
            return cls(httpx.URL(parse_url(url).removesuffix(PROXY_PATH) + PROXY_PATH), secret)
        except ValueError as error:
            raise SettingsError(f"The URL of the proxy {error}.") from error

    def rewrite_request(self, request: httpx.Request) -> httpx.Request:
        """Return the request to the proxy, or the request itself if it is not for fal."""
        target = request.url
        target = target.copy_with(host=BACKUP_HOSTS.get(target.host, target.host))
        if not host_matches(target.host, FAL_HOSTS):
            return request
        headers = request.headers.copy()
        headers.pop("authorization", None)
        headers["host"] = self.url.netloc.decode()
        headers["x-fal-target-url"] = (
            f"{target.scheme}://{target.netloc.decode()}{request.url.raw_path.decode()}"
        )
        if self.key:
            headers["x-falproxy-key"] = self.key
        timeouts = request.extensions.get("timeout", {})
        connect = min(timeouts.get("connect") or CONNECT_TIMEOUT, CONNECT_TIMEOUT)
        return httpx.Request(
            request.method,
            self.url,
            headers=headers,
            stream=request.stream,
            extensions={**request.extensions, "timeout": {**timeouts, "connect": connect}},
        )

    def map_transport_error(
        self, error: httpx.TransportError, request: httpx.Request
    ) -> httpx.TransportError:
        """Return the error to raise. Its type stays, because fal_client's retries depend on it.

        It refers to the original request, because the request to the proxy contains the key. If
        the proxy is unreachable, the message has its URL.
        """
        error.request = request
        if not isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
            return error
        message = f"The proxy at {self.url} cannot be reached: {str(error) or type(error).__name__}"
        log.warning("%s", message)
        return type(error)(message, request=request)

    def response_error(self, response: httpx.Response) -> fal_client.FalClientError:
        """Return the error for a response that fal_client would mishandle."""
        if not response.has_redirect_location:
            return http_error(response)
        location = response.headers["location"]
        return fal_client.FalClientError(
            f"{self.url} redirects to {location}: use the URL of the proxy itself."
        )


def seconds_to_wait(response: httpx.Response) -> int:
    """Return the seconds after which a request that a limit refused may be repeated; 0 for other
    responses."""
    value = response.headers.get("retry-after", "")
    is_limited = response.status_code == httpx.codes.TOO_MANY_REQUESTS
    return int(value[:9]) if is_limited and value.isascii() and value.isdecimal() else 0


def limit_error(response: httpx.Response) -> fal_client.FalClientError:
    """Return the error for a wait that is too long; fal_client does not repeat the request."""
    return fal_client.FalClientError(str(http_error(response)))


def is_mishandled(request: httpx.Request, response: httpx.Response) -> bool:
    """Return whether fal_client would mishandle a response.

    It follows redirects to hosts other than fal's, without the target URL. If an error arrives in
    place of an event stream, it reports the wrong content type and not the error.
    """
    if response.has_redirect_location:
        return not host_matches(httpx.URL(response.headers["location"]).host, FAL_HOSTS)
    return response.is_error and "text/event-stream" in request.headers.get("accept", "")


def http_error(response: httpx.Response) -> fal_client.FalClientHTTPError:
    """Return the error that fal_client raises for an error response."""
    try:
        body = response.json()
    except ValueError:
        body = None
    document = body if isinstance(body, dict) else {}
    return fal_client.FalClientHTTPError(
        document.get("detail", response.text),
        response.status_code,
        dict(response.headers),
        response=response,
        error_type=document.get("error_type") or response.headers.get("x-fal-error-type"),
    )


@cache
def tls_context() -> ssl.SSLContext:
    """Return the context for TLS that httpx makes by default, which all clients share: reading the
    certificates takes 18 ms."""
    return httpx.create_ssl_context()


class ProxyTransport(httpx.BaseTransport):
    """Sends requests for fal to the proxy, and other requests to their own host."""

    def __init__(self, proxy: ProxyConfig) -> None:
        self.proxy = proxy
        # A client and not a transport, because it respects HTTPS_PROXY and NO_PROXY.
        self.client = httpx.Client(follow_redirects=False, verify=tls_context())

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        sent = self.proxy.rewrite_request(request)
        if sent is request:
            return self.client.send(request, stream=True)
        try:
            response = self.client.send(sent, stream=True)
        except httpx.TransportError as error:
            raise self.proxy.map_transport_error(error, request) from None
        response.request = request
        if is_mishandled(request, response):
            response.read()
            raise self.proxy.response_error(response)
        if seconds := seconds_to_wait(response):
            if seconds > RETRY_AFTER_MAX:
                response.read()
                raise limit_error(response)
            time.sleep(seconds)
        return response

    def close(self) -> None:
        self.client.close()


class AsyncProxyTransport(httpx.AsyncBaseTransport):
    """ProxyTransport for asyncio."""

    def __init__(self, proxy: ProxyConfig) -> None:
        self.proxy = proxy
        self.client = httpx.AsyncClient(follow_redirects=False, verify=tls_context())

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        sent = self.proxy.rewrite_request(request)
        if sent is request:
            return await self.client.send(request, stream=True)
        try:
            response = await self.client.send(sent, stream=True)
        except httpx.TransportError as error:
            raise self.proxy.map_transport_error(error, request) from None
        response.request = request
        if is_mishandled(request, response):
            await response.aread()
            raise self.proxy.response_error(response)
        if seconds := seconds_to_wait(response):
            if seconds > RETRY_AFTER_MAX:
                await response.aread()
                raise limit_error(response)
            await asyncio.sleep(seconds)
        return response

    async def aclose(self) -> None:
        await self.client.aclose()
