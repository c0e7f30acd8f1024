"""What is asked of the system about sockets and addresses."""

import asyncio
import select
from ipaddress import ip_address
from socket import AF_INET, AF_INET6, IPPROTO_TCP, SOCK_STREAM

from aiohappyeyeballs import AddrInfoType

from falproxy.proxy.transport import Origin


def literal_addr_info(origin: Origin) -> AddrInfoType | None:
    try:
        version = ip_address(origin.host).version
    except ValueError:
        return None
    return addr_info(AF_INET if version == 4 else AF_INET6, origin.host, origin.port)


def addr_info(family: int, host: str, port: int) -> AddrInfoType:
    """As the system's own `getaddrinfo` tells it."""
    place = (host, port, 0, 0) if family == AF_INET6 else (host, port)
    return (family, SOCK_STREAM, IPPROTO_TCP, "", place)


def poll_readable(transport: asyncio.BaseTransport) -> "select.poll | None":
    """Asks the system about a connection on which nothing should be coming. None where it cannot
    be asked."""
    connection = transport.get_extra_info("socket")
    if connection is None or not hasattr(select, "poll"):
        return None
    poll = select.poll()
    poll.register(connection.fileno(), select.POLLIN | getattr(select, "POLLRDHUP", 0))
    return poll
