"""THE FORMULA: send the call to fal, hand the answer back unchanged."""

import logging
import socket
import struct
import time
from collections.abc import Callable

from aiohttp import ClientResponse, hdrs, web
from aiohttp.abc import AbstractStreamWriter

from falproxy.call import CALL, REQUEST_ID, UPSTREAM_SECONDS
from falproxy.errors import ProxyError
from falproxy.headers import headers_down
from falproxy.upstream import UPSTREAM, read_chunk

logger = logging.getLogger(__name__)

# What aiohttp adds to an answer that does not have it.
AIOHTTP_DEFAULTS = (hdrs.SERVER, hdrs.CONTENT_TYPE)
# `struct linger` switched on with no seconds: closing the socket resets the connection.
LINGER_NOT = struct.pack("ii", 1, 0)


class UpstreamResponse(web.StreamResponse):
    """fal's answer, not sent yet: `prepare` writes status and headers, then relays the body.

    Until then middleware sees the status and the headers and may add to them.

    on_sent: called once when the relay ends, however it ends, with whether all of it was sent.
    """

    def __init__(self, upstream: ClientResponse) -> None:
        super().__init__(
            status=upstream.status,
            reason=upstream.reason,
            headers=headers_down(upstream.raw_headers),
        )
        self.on_sent: Callable[[bool], None] | None = None
        self._upstream = upstream
        self._defaults = [name for name in AIOHTTP_DEFAULTS if name not in self.headers]

    async def prepare(self, request: web.BaseRequest) -> AbstractStreamWriter | None:
        """Sends everything. A body that breaks off on fal's side breaks off on the client's: its
        connection is aborted, so that it never takes a part for the whole."""
        if self.prepared:
            return await super().prepare(request)
        complete = False
        try:
            writer = await super().prepare(request)
            await self._relay()
            complete = True
        except ProxyError as error:
            logger.warning("%s in the body of %s", error.code, request.get(REQUEST_ID))
            abort(request)
            raise ConnectionResetError(error.code) from error
        finally:
            if not complete:
                self._upstream.close()
            if self.on_sent is not None:
                self.on_sent(complete)
        return writer

    async def _relay(self) -> None:
        while chunk := await read_chunk(self._upstream):
            await self.write(chunk)
        await self.write_eof()

    def drop_defaults(self) -> None:
        """Takes out what aiohttp puts in for a handler that forgot it. fal did not."""
        for name in self._defaults:
            self.headers.pop(name, None)


def abort(request: web.BaseRequest) -> None:
    """Resets the client's connection. Closing it, which is all that asyncio's `abort` does, is an
    orderly end to whoever reads until the end."""
    transport = request.transport
    if transport is None:
        return
    if (connection := transport.get_extra_info("socket")) is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_NOT)
    transport.abort()


async def forward(request: web.Request) -> UpstreamResponse:
    """Handler: fal's answer to the request's call. Raises: ProxyError 502, 504."""
    started = time.perf_counter()
    try:
        return UpstreamResponse(await request.app[UPSTREAM].send(request[CALL]))
    finally:
        request[UPSTREAM_SECONDS] = time.perf_counter() - started
