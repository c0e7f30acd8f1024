"""HTTP transports that take fal_client's requests to the proxy."""

import logging
from dataclasses import dataclass, field
from typing import Self

import httpx

from falproxy.client.supported import fal_client
from falproxy.errors import SettingsError
from falproxy.fal.target import FAL_HOSTS, host_matches
from falproxy.parsers import parse_url
from falproxy.settings import read_environment

log = logging.getLogger(__name__)

ROUTE = "/api/fal/proxy"
# The URLs of a job name the host that took it. The proxy knows the way to these by itself.
BACKUP_HOSTS = {"falrun.com": "fal.run", "queue.falrun.com": "queue.fal.run"}
# Seconds until the proxy is reached, even where a call may take any time; fal_client 1.0.3 gives
# fal as many.
CONNECT_TIMEOUT = 5.0


@dataclass(frozen=True, slots=True)
class Route:
    """The way to the proxy. url: where it takes calls; key: ours to it, or empty."""

    url: httpx.URL
    key: str = field(repr=False)

    @classmethod
    def find(cls, proxy_url: str | None, key: str | None) -> Self:
        """Raises SettingsError: no proxy is named, or its URL or key makes no sense."""
        env = read_environment() if proxy_url is None or key is None else {}
        url = env.get("FALPROXY_URL") if proxy_url is None else proxy_url
        secret = env.get("FALPROXY_KEY", "") if key is None else key
        if not url:
            raise SettingsError(
                "No proxy is named: give its URL, like http://localhost:8080, or set FALPROXY_URL."
            )
        if not all("!" <= character <= "~" for character in secret):
            raise SettingsError("The key for the proxy has a character that no header can carry.")
        try:
            return cls(httpx.URL(parse_url(url).removesuffix(ROUTE) + ROUTE), secret)
        except ValueError as error:
            raise SettingsError(f"The URL of the proxy {error}.") from error

    def lead(self, request: httpx.Request) -> httpx.Request:
        """The request as it is sent: to the proxy when it is for fal, else the request itself."""
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

    def failed(self, error: httpx.TransportError, request: httpx.Request) -> httpx.TransportError:
        """The error as it is raised: about the request to fal, since the one to the proxy has our
        key in it, and in words that name a proxy that nobody reaches. fal_client tries again by
        the type."""
        error.request = request
        if not isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
            return error
        message = f"The proxy at {self.url} cannot be reached: {str(error) or type(error).__name__}"
        log.warning("%s", message)
        return type(error)(message, request=request)

    def failure(self, response: httpx.Response) -> fal_client.FalClientError:
        """The error for an answer that fal_client would misread."""
        if not response.has_redirect_location:
            return http_error(response)
        location = response.headers["location"]
        return fal_client.FalClientError(
            f"{self.url} redirects to {location}: give the URL of the proxy itself."
        )


def is_misread(request: httpx.Request, response: httpx.Response) -> bool:
    """Whether fal_client would misread an answer: it would follow a redirect that leads away from
    fal and loses the target, and of an error in place of events only say that it is none."""
    if response.has_redirect_location:
        return not host_matches(httpx.URL(response.headers["location"]).host, FAL_HOSTS)
    return response.is_error and "text/event-stream" in request.headers.get("accept", "")


def http_error(response: httpx.Response) -> fal_client.FalClientHTTPError:
    """What fal_client raises for an answer that it reads itself."""
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


class ProxyTransport(httpx.BaseTransport):
    """Sends what is for fal to the proxy."""

    def __init__(self, route: Route) -> None:
        self.route = route
        # Not a bare transport: a client heeds HTTPS_PROXY and NO_PROXY, as fal_client's does.
        self.client = httpx.Client(follow_redirects=False)

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        sent = self.route.lead(request)
        if sent is request:
            return self.client.send(request, stream=True)
        try:
            response = self.client.send(sent, stream=True)
        except httpx.TransportError as error:
            raise self.route.failed(error, request) from None
        response.request = request
        if is_misread(request, response):
            response.read()
            raise self.route.failure(response)
        return response

    def close(self) -> None:
        self.client.close()


class AsyncProxyTransport(httpx.AsyncBaseTransport):
    """ProxyTransport for asyncio."""

    def __init__(self, route: Route) -> None:
        self.route = route
        self.client = httpx.AsyncClient(follow_redirects=False)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        sent = self.route.lead(request)
        if sent is request:
            return await self.client.send(request, stream=True)
        try:
            response = await self.client.send(sent, stream=True)
        except httpx.TransportError as error:
            raise self.route.failed(error, request) from None
        response.request = request
        if is_misread(request, response):
            await response.aread()
            raise self.route.failure(response)
        return response

    async def aclose(self) -> None:
        await self.client.aclose()
