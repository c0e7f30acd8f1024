"""HTTP connections to Supabase that notice a response while the request body is being sent.

httpx sends the whole body before it reads. Supabase responds "exists already", "too large" or "no
such bucket" before it has read the body, and then stops reading. Both sides would wait for each
other until a time-out, and the response would be lost. A connection on which a response ended a
request body early is closed.
"""

import asyncio
import ssl
from collections.abc import Callable, Iterable
from typing import Any

import httpcore
import httpx

from falproxy.concurrency import cancel_tasks
from falproxy.spans import client_span
from falproxy.version import __version__

# Supabase rejects secret keys from user agents that look like a browser.
USER_AGENT = f"falproxy/{__version__}"
MAX_CONNECTIONS = 16
KEEPALIVE_SECONDS = 4.0  # Node closes idle connections after 5 s
READ_MAX = 64 * 2**10

AddKey = Callable[[httpx.Request], httpx.Request]


class EarlyResponseStream(httpcore.AsyncNetworkStream):
    """A connection that reads while it writes."""

    def __init__(self, stream: httpcore.AsyncNetworkStream) -> None:
        self._stream = stream
        # A read that was started together with the first write of a request.
        self._pending_read: asyncio.Task[bytes] | None = None

    def __repr__(self) -> str:
        state = "idle" if self._pending_read is None else "reading"
        return f"<EarlyResponseStream {state}, {self._stream!r}>"

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:  # noqa: ASYNC109 - as httpcore has it
        if self._pending_read is None:
            return await self._stream.read(max_bytes, timeout)
        done, _ = await asyncio.wait([self._pending_read], timeout=timeout)
        if not done:
            raise httpcore.ReadTimeout
        content = self._pending_read.result()
        self._pending_read = None
        return content

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:  # noqa: ASYNC109 - as httpcore has it
        """Write all bytes.

        Raises: WriteError, also if a response arrives first. httpcore then reads the response and
            closes the connection.
        """
        if not buffer:
            return
        loop = asyncio.get_running_loop()
        if self._pending_read is None:
            self._pending_read = loop.create_task(self._stream.read(READ_MAX))
        writing = loop.create_task(self._stream.write(buffer, timeout))
        try:
            await asyncio.wait([writing, self._pending_read], return_when=asyncio.FIRST_COMPLETED)
            if not writing.done():
                raise httpcore.WriteError("response before the end of the request")
            await writing
        finally:
            await cancel_tasks([writing])

    async def aclose(self) -> None:
        if self._pending_read is not None:
            await cancel_tasks([self._pending_read])
        await self._stream.aclose()

    async def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,  # noqa: ASYNC109 - as httpcore has it
    ) -> httpcore.AsyncNetworkStream:
        return EarlyResponseStream(
            await self._stream.start_tls(ssl_context, server_hostname, timeout)
        )

    def get_extra_info(self, info: str) -> object:
        return self._stream.get_extra_info(info)


class EarlyResponseBackend(httpcore.AnyIOBackend):
    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ASYNC109 - as httpcore has it
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,  # Any: httpcore does not export their type
    ) -> httpcore.AsyncNetworkStream:
        stream = await super().connect_tcp(host, port, timeout, local_address, socket_options)
        return EarlyResponseStream(stream)


class SupabaseTransport(httpx.AsyncHTTPTransport):
    """The transport of httpx over connections that notice early responses."""

    def __init__(self, ssl_context: ssl.SSLContext) -> None:
        super().__init__(verify=ssl_context, trust_env=False)
        # httpx 0.28 creates its pool itself and accepts no network backend for it.
        self._pool = httpcore.AsyncConnectionPool(
            ssl_context=ssl_context,
            max_connections=MAX_CONNECTIONS,
            max_keepalive_connections=MAX_CONNECTIONS,
            keepalive_expiry=KEEPALIVE_SECONDS,
            network_backend=EarlyResponseBackend(),
        )

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        with client_span("supabase", request.method, request.url.host) as span:
            response = await super().handle_async_request(request)
            span.set_status(response.status_code)
            return response


async def open_client(
    timeouts: httpx.Timeout, add_key: AddKey, *, is_tls: bool
) -> httpx.AsyncClient:
    """Return an HTTP client for Supabase. It follows no redirects, which could lead the key to
    another host, and ignores proxy variables of the environment.

    add_key: adds the key to a request, so that no attribute of a client has it.
    is_tls: whether the project has a URL with TLS.
    """
    if is_tls:
        ssl_context = await asyncio.to_thread(ssl.create_default_context)  # reads hundreds of files
    else:
        ssl_context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # trusts no server
    return httpx.AsyncClient(
        transport=SupabaseTransport(ssl_context),
        timeout=timeouts,
        auth=add_key,
        headers={"User-Agent": USER_AGENT},
        follow_redirects=False,
        trust_env=False,
    )
