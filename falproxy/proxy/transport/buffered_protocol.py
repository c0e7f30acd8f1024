"""How bytes reach a connection: through one buffer for all of them.

A protocol that takes bytes is given new ones for every read, which the event loop makes as large as
a read could be; where it decrypts, that is 256 KB from the system for a poll's 700 bytes.
"""

import asyncio

from falproxy.proxy.transport.connection import Connection

BUFFER_SIZE = 2**16


class SharedBufferProtocol(asyncio.BufferedProtocol):
    """What the transport sees of a connection. buffer: may be shared by all connections of an
    event loop, since what was read is taken out at once."""

    __slots__ = ("_buffer", "connection")

    def __init__(self, connection: Connection, buffer: memoryview) -> None:
        self.connection = connection
        self._buffer = buffer

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        # Of what is decrypted already, the rest comes a moment later: nobody may begin before it.
        self.connection.has_pending_data = nbytes == BUFFER_SIZE
        self.connection.data_received(self._buffer[:nbytes].tobytes())

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.connection.connection_made(transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self.connection.connection_lost(exc)

    def pause_writing(self) -> None:
        self.connection.pause_writing()

    def resume_writing(self) -> None:
        self.connection.resume_writing()

    def eof_received(self) -> bool | None:
        return self.connection.eof_received()
