"""aiohttp's own client as a way to send requests: slower, and nearly all of it documented."""

import ssl

from aiohttp import (
    ClientConnectorError,
    ClientError,
    ClientResponse,
    ClientSession,
    ClientTimeout,
    ConnectionTimeoutError,
    DummyCookieJar,
    TCPConnector,
)
from aiohttp.abc import AbstractResolver
from aiohttp.client_reqrep import ConnectionKey
from aiohttp.connector import Connection
from aiohttp.tracing import Trace
from multidict import CIMultiDict, CIMultiDictProxy
from yarl import URL

from falproxy.errors import ProxyError
from falproxy.proxy.transport import (
    IDLE_SECONDS,
    MAX_HEADER_FIELD,
    MAX_HEADERS,
    NO_HEADERS,
    ConnectError,
    ConnectionLostError,
    TransportResponse,
    UpstreamRequest,
    describe_error,
)


class AiohttpTransport:
    """timeouts: seconds until a connection must stand, and seconds that the other side may be
    silent."""

    def __init__(self, session: ClientSession, timeouts: tuple[float, float]) -> None:
        self._session = session
        connect, silence = timeouts
        self._timeout = ClientTimeout(
            total=None, connect=connect, sock_connect=connect, sock_read=silence
        )

    async def send(self, request: UpstreamRequest) -> TransportResponse:
        headers = CIMultiDict(request.headers)
        if request.length is not None:
            headers["content-length"] = str(request.length)
        try:
            response = await self._session.request(
                request.method,
                build_url(request),
                headers=headers,
                data=request.body,
                allow_redirects=False,
                timeout=self._timeout,
            )
        except (ClientError, TimeoutError) as error:
            raise map_client_error(error) from error
        return AiohttpResponse(response)


class AiohttpResponse:
    """aiohttp's answer, as `falproxy.proxy.transport.Answer` says."""

    def __init__(self, response: ClientResponse) -> None:
        self._response = response
        self.method = response.method
        self.status = response.status
        self.reason = response.reason or ""
        self.raw_headers = response.raw_headers
        self.headers: CIMultiDictProxy[str] = response.headers
        self.close = response.close

    def drop_headers(self) -> None:
        self.headers = NO_HEADERS

    @property
    def is_complete(self) -> bool:
        return self._response.content.is_eof()

    @property
    def is_consumed(self) -> bool:
        return self._response.content.at_eof()

    async def read(self) -> bytes:
        try:
            return await self._response.content.readany()
        except TimeoutError:
            raise  # some of aiohttp's are a ClientError as well
        except ClientError as error:
            raise ConnectionLostError(describe_error(error)) from error


def build_url(request: UpstreamRequest) -> URL:
    # yarl splits a URL to put it together again and loses a lone "?" on the way. What stands
    # in the path is left alone, so path and query go there as one.
    origin = request.origin
    return URL.build(
        scheme="https" if origin.is_tls else "http",
        host=origin.host,
        port=origin.port,
        path=request.path,
        encoded=True,
    )


def map_client_error(error: Exception) -> Exception:
    """What a failed request means, in our own terms."""
    # aiohttp wraps what the body raises while it is sent.
    if isinstance(error.__cause__, ProxyError):
        return error.__cause__
    if isinstance(error, ClientConnectorError | ConnectionTimeoutError):
        return ConnectError(describe_error(error))
    return (
        TimeoutError()
        if isinstance(error, TimeoutError)
        else ConnectionLostError(describe_error(error))
    )


class StrictConnector(TCPConnector):
    """A pool that gives out no connection on which something came that nobody asked for: it would
    be taken for the answer to the next call, which may be another client's."""

    async def _get(self, key: ConnectionKey, traces: list[Trace]) -> Connection | None:
        # Not documented by aiohttp, which looks only whether a kept connection still stands. A
        # test of what nobody asked for (test_relay.py) fails when this is no longer called.
        while (connection := await super()._get(key, traces)) is not None:
            if connection.protocol is not None and not connection.protocol.should_close:
                return connection
            connection.close()
        return None


def open_session(
    ssl_context: ssl.SSLContext | None = None, resolver: AbstractResolver | None = None
) -> ClientSession:
    """A session that changes nothing: no cookies kept, no bodies decoded, no headers of its own,
    no proxy from the environment, and no limit on connections that would be a hidden queue."""
    connector = StrictConnector(
        limit=0,
        keepalive_timeout=IDLE_SECONDS,
        ssl=ssl_context or True,
        resolver=resolver,
        use_dns_cache=resolver is None,
    )
    session = ClientSession(
        connector=connector,
        cookie_jar=DummyCookieJar(),
        auto_decompress=False,
        skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding", "Content-Type"),
        max_field_size=MAX_HEADER_FIELD,
        max_line_size=MAX_HEADER_FIELD,
        max_headers=MAX_HEADERS,
    )
    # It would send GET and PUT again by itself, and a GET can be a run: is_repeatable says what
    # may be, and tests of both (test_relay.py) fail when this switch is gone.
    session._retry_connection = False
    return session
