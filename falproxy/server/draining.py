"""The first part of a stop: calls are still accepted, while clients are asked to reconnect."""

import asyncio
import socket
from collections.abc import Iterable
from contextlib import suppress
from typing import Protocol

from aiohttp import web

from falproxy.server.fast_path.protocol import FastPathRunner

CHECK_INTERVAL = 0.05  # seconds
FIRST_HEAD_CHECKS = 20
PENDING_MAX = 1024  # connections that are accepted at last


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

    It ends early if no load balancer asks, and all connections have been idle for so long that
    clients do not use them any more: a client that sends a request while its connection is closed
    cannot know whether it was received.

    delay: seconds, at most.
    """
    state = runner.app.get(DRAIN_STATE)
    if state is None or not delay:
        return
    state.begin()
    loop = asyncio.get_running_loop()
    deadline = loop.time() + delay
    while (now := loop.time()) < deadline:
        if not state.is_watched and not runner.connections.has_idle_since(now - delay):
            return
        await asyncio.sleep(min(CHECK_INTERVAL, deadline - now))


async def stop_listening(runner: FastPathRunner, listeners: Iterable[socket.socket]) -> None:
    """Close the listening sockets of a runner. Connections that wait to be accepted are accepted
    before, because the system resets them otherwise. New ones have a moment to send a request."""
    waiting: list[socket.socket] = []
    for listener in listeners:
        with suppress(OSError):  # none waits, or it is closed
            while len(waiting) < PENDING_MAX:
                waiting.append(listener.accept()[0])
    for site in runner.sites:
        await site.stop()
    for connection in waiting:
        connection.setblocking(False)
        if runner.server is not None:
            loop = asyncio.get_running_loop()
            await loop.connect_accepted_socket(runner.server, connection)
    for _ in range(FIRST_HEAD_CHECKS):
        await asyncio.sleep(CHECK_INTERVAL)
        if not runner.connections.has_unfinished_heads():
            return
