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
CONNECTIONS = 16
IDLE_SECONDS = 4.0  # what Node keeps an idle connection, 5 s, with a margin
READ_MAX = 64 * 2**10

Sign = Callable[[httpx.Request], httpx.Request]


class HearingStream(httpcore.AsyncNetworkStream):
    """A connection that is read from while it is written to."""

    def __init__(self, stream: httpcore.AsyncNetworkStream) -> None:
        self._stream = stream
        self._hearing: asyncio.Task[bytes] | None = None  # reads since the request's first byte

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:  # noqa: ASYNC109 - as httpcore has it
        if self._hearing is None:
            return await self._stream.read(max_bytes, timeout)
        heard, _ = await asyncio.wait([self._hearing], timeout=timeout)
        if not heard:
            raise httpcore.ReadTimeout
        content = self._hearing.result()
        self._hearing = None
        return content

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:  # noqa: ASYNC109 - as httpcore has it
        """Raises: WriteError, also when something came from the other side; httpcore takes it as
        a reason to read the answer, and closes the connection afterwards."""
        if not buffer:
            return
        loop = asyncio.get_running_loop()
        if self._hearing is None:
            self._hearing = loop.create_task(self._stream.read(READ_MAX))
        writing = loop.create_task(self._stream.write(buffer, timeout))
        try:
            await asyncio.wait([writing, self._hearing], return_when=asyncio.FIRST_COMPLETED)
            if not writing.done():
                raise httpcore.WriteError("answered before all was sent")
            await writing
        finally:
            await end(writing)

    async def aclose(self) -> None:
        if self._hearing is not None:
            await end(self._hearing)
        await self._stream.aclose()

    async def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,  # noqa: ASYNC109 - as httpcore has it
    ) -> httpcore.AsyncNetworkStream:
        return HearingStream(await self._stream.start_tls(ssl_context, server_hostname, timeout))

    def get_extra_info(self, info: str) -> object:
        return self._stream.get_extra_info(info)


class HearingBackend(httpcore.AnyIOBackend):
    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ASYNC109 - as httpcore has it
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,  # Any: httpcore keeps their type to itself
    ) -> httpcore.AsyncNetworkStream:
        stream = await super().connect_tcp(host, port, timeout, local_address, socket_options)
        return HearingStream(stream)


class Transport(httpx.AsyncHTTPTransport):
    """httpx's own over such connections."""

    def __init__(self, encryption: ssl.SSLContext) -> None:
        super().__init__(verify=encryption, trust_env=False)
        # httpx 0.28 makes its pool itself and takes no network backend for it.
        self._pool = httpcore.AsyncConnectionPool(
            ssl_context=encryption,
            max_connections=CONNECTIONS,
            max_keepalive_connections=CONNECTIONS,
            keepalive_expiry=IDLE_SECONDS,
            network_backend=HearingBackend(),
        )


async def open_client(times: httpx.Timeout, sign: Sign) -> httpx.AsyncClient:
    """sign: adds the key to a request, so that it is in no header of a client."""
    encryption = await asyncio.to_thread(ssl.create_default_context)  # reads hundreds of files
    return httpx.AsyncClient(
        transport=Transport(encryption),
        timeout=times,
        auth=sign,
        headers={"User-Agent": USER_AGENT},
        follow_redirects=False,
        trust_env=False,
    )


async def end(task: asyncio.Task[Any]) -> None:
    """Whatever the task comes to, it is over and seen."""
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
