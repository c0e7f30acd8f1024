"""What one call takes on one kept connection: milliseconds, nobody else there."""

import socket
import ssl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from compare.connection import Answer, BrokenError, ignore

WARM_UP = 30
ROUNDS = 300
Line = socket.socket


@contextmanager
def line_to(port: int) -> Iterator[Line]:
    with socket.create_connection(("127.0.0.1", port), timeout=10) as line:
        line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        yield line


@contextmanager
def direct_line(host: str, authority: Path) -> Iterator[Line]:
    """To the upstream itself."""
    context = ssl.create_default_context(cafile=str(authority))
    with socket.create_connection((host, 443), timeout=10) as plain:
        plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with context.wrap_socket(plain, server_hostname=host) as line:
            yield line


def times(line: Line, request: bytes, length: int | None) -> list[float]:
    """Raises: BrokenError, an answer is not 200 or has another length."""
    taken = []
    for _ in range(WARM_UP + ROUNDS):
        started = time.perf_counter()
        answer = Answer(ignore)
        line.sendall(request)
        while not answer.is_done:
            data = line.recv(65536)
            if not data:
                raise BrokenError("the connection was closed")
            answer.feed(data)
        taken.append((time.perf_counter() - started) * 1e3)
        if answer.status != 200 or answer.length != length:
            raise BrokenError(f"status {answer.status}, {answer.length} bytes")
    return taken[WARM_UP:]
