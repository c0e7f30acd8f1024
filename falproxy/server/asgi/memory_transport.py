"""A transport whose peer is an ASGI server instead of a socket."""

import asyncio
import logging
import ssl
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from httptools import HttpParserError

from falproxy.server.asgi.response_parser import Message, MessageParser

logger = logging.getLogger(__name__)

WRITE_BUFFER_MAX = 64 * 2**10  # bytes of a response at which the writer pauses
WRITE_BUFFER_MIN = WRITE_BUFFER_MAX // 4  # bytes at which it goes on
TLS_CONTEXT = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)


class MemoryTransport(asyncio.Transport):
    """The server's end of a connection with one request.

    Bytes that the protocol writes are parsed into the ASGI messages of the response, which
    `next_message` returns.

    can_read: set unless the protocol has paused reading.
    on_break: called when the connection ends before the response was sent.
    """

    def __init__(self, scope: Mapping[str, Any], root_path: str) -> None:
        super().__init__(extra_info(scope, root_path))
        self.can_read = asyncio.Event()
        self.can_read.set()
        self.on_break: Callable[[], None] | None = None
        self._loop = asyncio.get_running_loop()
        self._protocol: asyncio.Protocol | None = None
        self._response = MessageParser(scope["method"])
        self._changed = asyncio.Event()  # there is a message, or the connection ended
        self._is_write_paused = False
        self._is_closing = False
        self._is_lost = False  # the protocol was notified, or will be at once

    def __repr__(self) -> str:
        state = "lost" if self._is_lost else "closing" if self._is_closing else "open"
        return f"<MemoryTransport {state}, {self._response.size} bytes to send>"

    @property
    def is_response_complete(self) -> bool:
        """Whether the protocol has written the whole response."""
        return self._response.is_complete

    @property
    def _sendfile_compatible(self) -> NoReturn:
        """asyncio reads this attribute. aiohttp then copies the file itself."""
        raise NotImplementedError

    # The side of the ASGI server

    def connect(self, protocol: asyncio.Protocol) -> None:
        self._protocol = protocol
        protocol.connection_made(self)

    def feed_data(self, data: bytes) -> None:
        if data and self._protocol is not None and not self._is_lost:
            self._protocol.data_received(data)

    async def next_message(self) -> Message | None:
        """Return the next message of the response, None if no more will come."""
        while not self._response.messages:
            if self._is_lost or self._is_closing or self._response.is_complete:
                return None
            self._changed.clear()
            await self._changed.wait()
        return self._response.take()

    def message_sent(self) -> None:
        """Let the protocol go on once the client has received enough of the response."""
        if self._is_write_paused and self._response.size <= WRITE_BUFFER_MIN:
            self._is_write_paused = False
            if self._protocol is not None and not self._is_lost:
                self._protocol.resume_writing()

    def disconnect(self) -> None:
        """End the connection, as a client that leaves does. If the protocol has written the whole
        response, it is left to end by itself."""
        if self._response.is_complete:
            self._response.drop()
            self.message_sent()
        elif not self._is_lost:
            self._lose()
            self._connection_lost()
        self._break()

    def release(self) -> None:
        """Drop the response: the ASGI server takes no more of it."""
        self.on_break = None
        self._response.close()

    # asyncio.Transport

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if self._is_closing:
            return
        try:
            self._response.feed_data(bytes(data))
        except HttpParserError:
            logger.exception("The server wrote an invalid response")
            self.abort()
            return
        self._changed.set()
        if self._response.size > WRITE_BUFFER_MAX and not self._is_write_paused:
            self._is_write_paused = True
            if self._protocol is not None:
                self._protocol.pause_writing()

    def get_write_buffer_size(self) -> int:
        return self._response.size

    def get_write_buffer_limits(self) -> tuple[int, int]:
        return WRITE_BUFFER_MIN, WRITE_BUFFER_MAX

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        """Do nothing: the end of a response is part of it."""

    def pause_reading(self) -> None:
        self.can_read.clear()

    def resume_reading(self) -> None:
        self.can_read.set()

    def is_reading(self) -> bool:
        return self.can_read.is_set()

    def is_closing(self) -> bool:
        return self._is_closing

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        assert isinstance(protocol, asyncio.Protocol)
        self._protocol = protocol

    def get_protocol(self) -> asyncio.BaseProtocol:
        assert self._protocol is not None
        return self._protocol

    def close(self) -> None:
        """End the connection. Messages that were written can still be taken."""
        if not self._is_closing:
            self._lose()
            self._loop.call_soon(self._connection_lost)

    def abort(self) -> None:
        """End the connection and drop the unsent bytes, so that the client cannot take a part of
        the response for the whole."""
        self._response.drop()
        self._response.is_complete = False
        self.close()
        self._break()

    def _lose(self) -> None:
        self._is_closing = self._is_lost = True
        self.can_read.set()
        self._changed.set()

    def _break(self) -> None:
        on_break, self.on_break = self.on_break, None
        if on_break is not None:
            on_break()

    def _connection_lost(self) -> None:
        protocol, self._protocol = self._protocol, None
        if protocol is not None:
            protocol.connection_lost(None)


def extra_info(scope: Mapping[str, Any], root_path: str) -> dict[str, Any]:
    """Return what the protocol and the proxy read about the connection."""
    info: dict[str, Any] = {"asgi_scope": scope, "root_path": root_path}
    for name, key in (("peername", "client"), ("sockname", "server")):
        if address := scope.get(key):
            info[name] = tuple(address)
    if scope.get("scheme") == "https":
        info["sslcontext"] = TLS_CONTEXT
    return info
