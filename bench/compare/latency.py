"""Latency of sequential calls on one keep-alive connection, without other load."""

import socket
import ssl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from compare.connection import BadResponseError, Response, ignore

WARM_UP = 30
ROUNDS = 300


@contextmanager
def connect(port: int) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        yield connection


@contextmanager
def connect_directly(host: str, authority: Path) -> Iterator[socket.socket]:
    """Connect to the upstream itself."""
    context = ssl.create_default_context(cafile=str(authority))
    with socket.create_connection((host, 443), timeout=10) as plain:
        plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with context.wrap_socket(plain, server_hostname=host) as connection:
            yield connection


def times(connection: socket.socket, request: bytes, length: int | None) -> list[float]:
    """Return the milliseconds of each call.

    Raises: BadResponseError, a response is not 200 or has another length.
    """
    samples = []
    for _ in range(WARM_UP + ROUNDS):
        started = time.perf_counter()
        response = Response(ignore)
        connection.sendall(request)
        while not response.is_done:
            data = connection.recv(65536)
            if not data:
                raise BadResponseError("the connection was closed")
            response.feed(data)
        samples.append((time.perf_counter() - started) * 1e3)
        if response.status != 200 or response.length != length:
            raise BadResponseError(f"status {response.status}, {response.length} bytes")
    return samples[WARM_UP:]
