"""Connections on which an answer is heard while the request's body is still being sent.

httpx sends all of a body before it reads a word. Supabase answers "exists already", "too large"
or "no such bucket" before it has read the body, then stops reading, and both would wait for
each other until a time-out hides the answer. What is cut off by an answer is never used again.
"""

import asyncio
import ssl
from collections.abc import Callable, Iterable
from typing import Any

import httpcore
import httpx

from falproxy.version import __version__

USER_AGENT = (
    f"falproxy/{__version__}"  # Supabase refuses secret keys from what looks like a browser
)
MAX_CONNECTIONS = 16
KEEPALIVE_SECONDS = 4.0  # what Node keeps an idle connection, 5 s, with a margin
READ_MAX = 64 * 2**10

AddAuth = Callable[[httpx.Request], httpx.Request]


class EarlyResponseStream(httpcore.AsyncNetworkStream):
    """A connection that is read from while it is written to."""

    def __init__(self, stream: httpcore.AsyncNetworkStream) -> None:
        self._stream = stream
        self._pending_read: asyncio.Task[bytes] | None = (
            None  # reads since the request's first byte
        )

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:  # noqa: ASYNC109 - as httpcore has it
        if self._pending_read is None:
            return await self._stream.read(max_bytes, timeout)
        heard, _ = await asyncio.wait([self._pending_read], timeout=timeout)
        if not heard:
            raise httpcore.ReadTimeout
        content = self._pending_read.result()
        self._pending_read = None
        return content

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:  # noqa: ASYNC109 - as httpcore has it
        """Raises: WriteError, also when something came from the other side; httpcore takes it as
        a reason to read the answer, and closes the connection afterwards."""
        if not buffer:
            return
        loop = asyncio.get_running_loop()
        if self._pending_read is None:
            self._pending_read = loop.create_task(self._stream.read(READ_MAX))
        writing = loop.create_task(self._stream.write(buffer, timeout))
        try:
            await asyncio.wait([writing, self._pending_read], return_when=asyncio.FIRST_COMPLETED)
            if not writing.done():
                raise httpcore.WriteError("answered before all was sent")
            await writing
        finally:
            await cancel_and_wait(writing)

    async def aclose(self) -> None:
        if self._pending_read is not None:
            await cancel_and_wait(self._pending_read)
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
        socket_options: Iterable[Any] | None = None,  # Any: httpcore keeps their type to itself
    ) -> httpcore.AsyncNetworkStream:
        stream = await super().connect_tcp(host, port, timeout, local_address, socket_options)
        return EarlyResponseStream(stream)


class SupabaseTransport(httpx.AsyncHTTPTransport):
    """httpx's own over such connections."""

    def __init__(self, ssl_context: ssl.SSLContext) -> None:
        super().__init__(verify=ssl_context, trust_env=False)
        # httpx 0.28 makes its pool itself and takes no network backend for it.
        self._pool = httpcore.AsyncConnectionPool(
            ssl_context=ssl_context,
            max_connections=MAX_CONNECTIONS,
            max_keepalive_connections=MAX_CONNECTIONS,
            keepalive_expiry=KEEPALIVE_SECONDS,
            network_backend=EarlyResponseBackend(),
        )


async def open_client(timeouts: httpx.Timeout, add_auth: AddAuth) -> httpx.AsyncClient:
    """sign: adds the key to a request, so that it is in no header of a client."""
    encryption = await asyncio.to_thread(ssl.create_default_context)  # reads hundreds of files
    return httpx.AsyncClient(
        transport=SupabaseTransport(encryption),
        timeout=timeouts,
        auth=add_auth,
        headers={"User-Agent": USER_AGENT},
        follow_redirects=False,
        trust_env=False,
    )


async def cancel_and_wait(task: asyncio.Task[Any]) -> None:
    """Whatever the task comes to, it is over and seen."""
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
