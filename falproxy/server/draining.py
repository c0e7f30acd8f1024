"""The first part of a stop: calls are still accepted, while clients are asked to reconnect."""

import asyncio
import ctypes
import socket
import struct
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Protocol

from aiohttp import web

from falproxy.server.fast_path.protocol import FastPathRunner

CHECK_INTERVAL = 0.05  # seconds
FIRST_HEAD_CHECKS = 20
PENDING_MAX = 1024  # connections that are accepted at last
SO_ATTACH_FILTER = 26  # of Linux
# A packet filter (opcode, jump if true, jump if false, operand) that drops TCP packets with SYN.
NO_SYN = (
    (0x30, 0, 0, 13),  # load the byte with the flags
    (0x45, 0, 1, 0x02),  # continue if it has SYN, else skip one
    (0x06, 0, 0, 0),  # return: drop the packet
    (0x06, 0, 0, 0xFFFF_FFFF),  # return: keep it
)
HANDSHAKE_TIME = 0.1  # seconds in which connections that have begun are established


class DrainState(Protocol):
    """How an application asks clients and load balancers to leave."""

    @property
    def is_watched(self) -> bool:
        """Whether a load balancer asks if the application is ready."""

    def begin(self) -> None:
        """Return 503 for readiness from now on, and let clients close their connections."""


DRAIN_STATE: web.AppKey[DrainState] = web.AppKey("falproxy.drain_state")


async def drain_connections(runner: FastPathRunner, delay: float) -> None:
    """Wait until load balancers and clients have noticed that the process stops.

    It ends early if no load balancer asks for readiness, and no client has used a connection for so
    long. A client that sends a request while its connection is closed cannot know whether it was
    received.

    delay: seconds, at most.
    """
    state = runner.app.get(DRAIN_STATE)
    if state is None or not delay:
        return
    state.begin()
    loop = asyncio.get_running_loop()
    deadline = loop.time() + delay
    while (now := loop.time()) < deadline:
        if not state.is_watched and not runner.connections.was_used_since(now - delay):
            return
        await asyncio.sleep(min(CHECK_INTERVAL, deadline - now))


async def stop_listening(
    runner: FastPathRunner, listeners: Sequence[socket.socket], *, are_passed: bool = False
) -> None:
    """Close the listening sockets of a runner. Connections that wait to be accepted are accepted
    before, because the system resets them otherwise. New ones have a moment to send a request.

    are_passed: another process has the sockets too, so that they stay open.
    """
    waiting = await accept_waiting(listeners, are_passed=are_passed)
    for site in runner.sites:
        await site.stop()
    loop = asyncio.get_running_loop()
    for connection in waiting:
        connection.setblocking(False)
        if runner.server is not None:
            with suppress(OSError):  # its client has left
                await loop.connect_accepted_socket(runner.server, connection)
    for _ in range(FIRST_HEAD_CHECKS):
        await asyncio.sleep(CHECK_INTERVAL)
        if not runner.connections.has_unfinished_heads():
            return


async def accept_waiting(
    listeners: Sequence[socket.socket], *, are_passed: bool
) -> list[socket.socket]:
    """Return the connections that wait to be accepted, after the last ones were established."""
    has_filter = [drop_connection_requests(listener) for listener in listeners if not are_passed]
    if any(has_filter):
        await asyncio.sleep(HANDSHAKE_TIME)
    waiting: list[socket.socket] = []
    for listener in listeners:
        with suppress(OSError):  # none waits, or it is closed
            while len(waiting) < PENDING_MAX:
                waiting.append(listener.accept()[0])
    return waiting


def drop_connection_requests(listener: socket.socket) -> bool:
    """Let the system drop requests to connect to a TCP socket. Return whether it can do that.

    A client repeats the request after a second, and is refused once the socket is closed. Without
    this, a connection that is established just before that would be reset, with the HTTP request
    that its client has sent already.
    """
    if sys.platform != "linux" or listener.family == socket.AF_UNIX:
        return False
    code = b"".join(struct.pack("HBBI", *instruction) for instruction in NO_SYN)
    instructions = ctypes.create_string_buffer(code)
    program = struct.pack("HP", len(NO_SYN), ctypes.addressof(instructions))
    try:
        listener.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, program)
    except OSError:  # closed, or not allowed
        return False
    return True
