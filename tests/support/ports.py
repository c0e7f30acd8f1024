"""Ports for servers that have to be known before they start, or that start again."""

import random
import socket
from contextlib import suppress

# Below the ports that the system gives to other sockets: between a stop and the next start, the
# port is not given away. The bus of a Redis cluster uses the port 10000 above.
FIRST_PORT, LAST_PORT = 11_000, 22_000


def free_port() -> int:
    """Return a free port."""
    while True:
        port = random.randint(FIRST_PORT, LAST_PORT)
        with suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return port
