"""Ports for servers that have to be known before they start, or that start again."""

import os
import random
import socket
from contextlib import suppress

# Below the ports that the system gives to other sockets: after a server has stopped, its port is
# not given away. The bus of a Redis cluster uses the port 10000 above.
FIRST_PORT, LAST_PORT = 11_000, 22_000
PROCESSES = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
PROCESS = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))


def free_port() -> int:
    """Return a free port, of a part of the range that no other process of the tests uses."""
    count = (LAST_PORT - FIRST_PORT) // PROCESSES
    first = FIRST_PORT + count * (PROCESS % PROCESSES)
    while True:
        port = random.randrange(first, first + count)
        with suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return port
