"""The end of a client's connection that nobody can take for an orderly one."""

import socket
import struct

from aiohttp import web

# `struct linger` switched on with no seconds: closing the socket resets the connection.
NO_LINGER = struct.pack("ii", 1, 0)


def reset_connection(request: web.BaseRequest) -> None:
    """Resets the client's connection. Closing it, which is all that asyncio's `abort` does, is an
    orderly end to whoever reads until the end."""
    transport = request.transport
    if transport is None:
        return
    if (connection := transport.get_extra_info("socket")) is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, NO_LINGER)
    transport.abort()
