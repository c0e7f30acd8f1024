"""A transport on aiohttp's client: slower than the pool, and nearly all of it documented API."""

import ssl
from collections.abc import Iterable
from typing import Any

from aiohttp import (
    ClientConnectorError,
    ClientError,
    ClientRequest,
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
from falproxy.parse_digits import DIGITS_MAX
from falproxy.proxy.headers import (
    HEAD_END,
    clean_reason,
    encode_lines,
    encode_value,
    has_surrogates,
    is_well_formed,
)
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
    """A `Transport` on an aiohttp session.

    timeouts: seconds to connect, and seconds without a byte while a response is expected.
    """

    def __init__(self, session: ClientSession, timeouts: tuple[float, float]) -> None:
        self._session = session
        connect, read = timeouts
        self._timeout = ClientTimeout(
            total=None, connect=connect, sock_connect=connect, sock_read=read
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
        if not has_valid_headers(response):
            response.close()
            raise ConnectionLostError("a header of the response is malformed")
        return AiohttpResponse(response)


class AiohttpResponse:
    def __init__(self, response: ClientResponse) -> None:
        self._response = response
        self.method = response.method
        self.status = response.status
        self.reason = clean_reason(encode_value(response.reason or ""))
        self.raw_headers = response.raw_headers
        self.headers: CIMultiDictProxy[str] = response.headers
        self.close = response.close

    def __repr__(self) -> str:
        state = "consumed" if self.is_consumed else "complete" if self.is_complete else "incomplete"
        return f"<AiohttpResponse {self.status} to {self.method}, {state}>"

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
            raise  # some time-outs of aiohttp are a ClientError as well
        except ClientError as error:
            raise ConnectionLostError(describe_error(error)) from error


def build_url(request: UpstreamRequest) -> URL:
    # yarl drops a lone "?" when it splits and joins a URL. It leaves the path as it is, so path
    # and query are passed as one.
    origin = request.origin
    return URL.build(
        scheme="https" if origin.is_tls else "http",
        host=origin.host,
        port=origin.port,
        path=request.path,
        encoded=True,
    )


def has_valid_headers(response: ClientResponse) -> bool:
    """Return whether no header has control characters, and the length not too many digits. aiohttp
    checks less than the pool's parser."""
    lengths = response.headers.getall("content-length", ())
    return all(len(length) <= DIGITS_MAX for length in lengths) and all(
        is_well_formed(value, 1) for _, value in response.raw_headers
    )


def map_client_error(error: Exception) -> Exception:
    """Map an exception of aiohttp's client to one of the transport's."""
    # aiohttp wraps exceptions that the body raises while it is sent.
    if isinstance(error.__cause__, ProxyError):
        return error.__cause__
    if isinstance(error, ClientConnectorError | ConnectionTimeoutError):
        return ConnectError(describe_error(error))
    return (
        TimeoutError()
        if isinstance(error, TimeoutError)
        else ConnectionLostError(describe_error(error))
    )


class OpaqueHeaderRequest(ClientRequest):
    """A request that is sent with the bytes of its headers. aiohttp's own drops those that are not
    UTF-8. Not documented by aiohttp: a test of such bytes fails when `send` is not called."""

    async def send(self, conn: Connection) -> ClientResponse:
        if not any(has_surrogates(value) for value in self.headers.values()):
            return await super().send(conn)
        assert conn.protocol is not None
        transport = HeadTransport(conn.protocol.transport, self.headers)
        delegate: Any = Delegate(conn, protocol=Delegate(conn.protocol, transport=transport))
        return await super().send(delegate)


class Delegate:
    """An object with the attributes of another one, except for those that are given."""

    def __init__(self, target: object, **attributes: object) -> None:
        self.__dict__.update(attributes, _target=target)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._target, name)


class HeadTransport(Delegate):
    """A transport that writes the given headers in place of those in the first bytes written."""

    _headers: CIMultiDict[str] | None

    def __init__(self, transport: object, headers: CIMultiDict[str]) -> None:
        super().__init__(transport, _headers=headers)

    def write(self, data: bytes) -> None:
        if self._headers is not None:
            line, rest = data.partition(b"\r\n")[0], data.partition(HEAD_END)[2]
            lines = [f"{name}: {value}" for name, value in self._headers.items()]
            data = encode_lines([line.decode(), *lines]) + rest
            self._headers = None
        self._target.write(data)

    def writelines(self, chunks: Iterable[bytes]) -> None:
        self.write(b"".join(chunks))


class StrictConnector(TCPConnector):
    """A connector that does not reuse a connection with unsolicited bytes: the next request, which
    may be another client's, would get them as its response."""

    async def _get(self, key: ConnectionKey, traces: list[Trace]) -> Connection | None:
        # Not documented by aiohttp, which only checks whether a pooled connection is open. A test
        # of unsolicited bytes (test_forward.py) fails when this method is no longer called.
        while (connection := await super()._get(key, traces)) is not None:
            if connection.protocol is not None and not connection.protocol.should_close:
                return connection
            connection.close()
        return None


def open_session(
    ssl_context: ssl.SSLContext | None = None, resolver: AbstractResolver | None = None
) -> ClientSession:
    """Return a session that changes nothing: no cookies, no decoding, no default headers, no proxy
    from the environment, no limit on connections."""
    connector = StrictConnector(
        limit=0,
        keepalive_timeout=IDLE_SECONDS,
        ssl=ssl_context or True,
        resolver=resolver,
        use_dns_cache=resolver is None,
    )
    session = ClientSession(
        connector=connector,
        request_class=OpaqueHeaderRequest,
        cookie_jar=DummyCookieJar(),
        auto_decompress=False,
        skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding", "Content-Type"),
        max_field_size=MAX_HEADER_FIELD,
        max_line_size=MAX_HEADER_FIELD,
        max_headers=MAX_HEADERS,
    )
    # aiohttp would send GET and PUT again by itself, and a GET can be a paid run. Only
    # `upstream.is_replayable` decides; tests (test_forward.py) fail when this attribute is gone.
    session._retry_connection = False
    return session
