"""Checks of the machine in `falproxy doctor`: the port, and the folders that are written to."""

import asyncio
import errno
import socket
import tempfile
from collections.abc import AsyncIterator, Iterator

from falproxy.cli.security_checks import Finding, Level
from falproxy.os_errors import describe_os_error
from falproxy.settings import Settings
from falproxy.spool import has_temporary_folder
from falproxy.stores.private_files import make_private_folder

TIMEOUT = 2.0  # seconds
HEALTH_REQUEST = b"GET /health/live HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
FALPROXY_MARK = b"falproxy;dur="  # in the header Server-Timing of each response
LISTEN_FIXES = {
    errno.EADDRINUSE: "Stop that program, or set FALPROXY_PORT to another port.",
    errno.EACCES: "Set FALPROXY_PORT to a port above 1023.",
    errno.EADDRNOTAVAIL: "Set FALPROXY_HOST to an address of this machine, or 0.0.0.0 for all.",
}


async def check_port(settings: Settings) -> AsyncIterator[Finding]:
    """Check whether the proxy can listen on its addresses. A Unix socket is not checked."""
    port = settings.server.port
    if port == 0 or settings.server.socket_file is not None:
        return
    for host in settings.server.hosts:
        try:
            await asyncio.to_thread(try_port, host, port)
        except socket.gaierror:
            fix = "Set FALPROXY_HOST to an address of this machine, or 0.0.0.0 for all."
            yield Finding(Level.PROBLEM, f"The host {host} of FALPROXY_HOST is not known.", fix)
        except OSError as error:
            if error.errno == errno.EADDRINUSE and await is_falproxy(host, port):
                yield Finding(Level.NOTE, f"A falproxy is already running on port {port}.")
                return
            reason = describe_os_error(error)
            fix = LISTEN_FIXES.get(error.errno or 0, "Set FALPROXY_HOST and FALPROXY_PORT.")
            text = f"The proxy cannot listen on port {port} of {host}: {reason}."
            yield Finding(Level.PROBLEM, text, fix)


def try_port(host: str, port: int) -> None:
    """Raises: OSError."""
    for family, kind, protocol, _, address in socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    ):
        with socket.socket(family, kind, protocol) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            listener.bind(address)


async def is_falproxy(host: str, port: int) -> bool:
    """Return whether the program on a port of this machine is a falproxy."""
    name = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    try:
        async with asyncio.timeout(TIMEOUT):
            reader, writer = await asyncio.open_connection(name, port)
            try:
                writer.write(HEALTH_REQUEST)
                return FALPROXY_MARK in await reader.read(4096)
            finally:
                writer.close()
    except (OSError, TimeoutError):
        return False


def check_folders(settings: Settings) -> Iterator[Finding]:
    """Check the folders for data and for temporary files. Blocks."""
    directory = settings.data_dir
    try:
        make_private_folder(directory)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        yield Finding(
            Level.PROBLEM,
            f"FALPROXY_DATA_DIR is not writable: {describe_os_error(error)}.",
            "Set it to a directory that this user can write to.",
        )
    else:
        yield Finding(Level.OK, f"Data is stored in {directory}.")
    yield from check_temporary_folder()


def check_temporary_folder() -> Iterator[Finding]:
    """Check whether large bodies can be held on the disk."""
    if not has_temporary_folder():
        yield Finding(
            Level.NOTE,
            "No folder for temporary files is writable: large bodies are held in memory.",
            "Set TMPDIR to a folder that this user can write to, or mount one at /tmp.",
        )
