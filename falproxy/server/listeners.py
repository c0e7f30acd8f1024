"""The sockets that a server listens on: TCP addresses, a Unix socket, or sockets from systemd."""

import errno
import ipaddress
import os
import socket
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from falproxy.errors import SettingsError

FIRST_PASSED_SOCKET = 3  # descriptor of the first socket that systemd passes
SOCKET_FILE_MODE = 0o660
FREE_PORT_ATTEMPTS = 20  # to find a port that is free at all hosts
CONNECT_TIMEOUT = 1.0  # seconds to find out whether another process uses a socket file
REASONS = {
    errno.EADDRINUSE: "another process listens there",
    errno.ENAMETOOLONG: "the path is too long",
}

SocketAddress = tuple[socket.AddressFamily, tuple[object, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class ListenAddress:
    """Where to listen.

    hosts: names and IP addresses, all with the same port; `::` includes IPv4.
    port: 0 for a free one.
    socket_file: a Unix socket, which replaces hosts and port.
    passed_sockets: number of sockets from systemd, which replace all others.
    """

    hosts: tuple[str, ...]
    port: int
    socket_file: Path | None = None
    passed_sockets: int = 0

    @property
    def is_tcp(self) -> bool:
        return self.socket_file is None and not self.passed_sockets


@contextmanager
def open_listeners(
    address: ListenAddress, *, is_shared: bool = False
) -> Iterator[list[socket.socket]]:
    """Context manager: bind the sockets of an address. At the end its socket file is removed.

    is_shared: other processes bind the same TCP address.

    Raises: SettingsError, the address cannot be used.
    """
    if address.socket_file is not None and not address.passed_sockets:
        with open_unix_socket(address.socket_file) as listener:
            yield [listener]
        return
    with ExitStack() as stack:
        listeners = (
            passed_sockets(address.passed_sockets)
            if address.passed_sockets
            else bind_free_port(partial(bind_tcp, is_shared=is_shared), address)
        )
        for listener in listeners:
            stack.enter_context(closing(listener))
        yield listeners


@contextmanager
def reserve_address(
    address: ListenAddress,
) -> Iterator[tuple[ListenAddress, list[socket.socket]]]:
    """Context manager: bind an address for worker processes. Returns it with its port, and the
    sockets.

    Each worker opens TCP sockets of its own, after it has closed these, which only keep other
    programs from the port: without them, a program of the same user could share it and get some of
    the calls. A Unix socket, and sockets from systemd, are used by all workers.

    Raises: SettingsError, the address cannot be used.
    """
    if not address.is_tcp:
        with open_listeners(address) as listeners:
            yield address, listeners
        return
    with ExitStack() as stack:
        reserved = bind_free_port(bind_reserved, address)
        for listener in reserved:
            stack.enter_context(closing(listener))
        yield replace(address, port=reserved[0].getsockname()[1]), reserved


def bind_free_port(
    bind: Callable[[ListenAddress], list[socket.socket]], address: ListenAddress
) -> list[socket.socket]:
    """Return the sockets that `bind` returns for an address. Bind port 0 again if the port that was
    free at the first host is in use at another one.

    Raises: SettingsError, the address cannot be used.
    """
    for _ in range(FREE_PORT_ATTEMPTS - 1 if address.port == 0 else 0):
        try:
            return bind(address)
        except SettingsError as error:
            if getattr(error.__cause__, "errno", None) != errno.EADDRINUSE:
                raise
    return bind(address)


def bind_reserved(address: ListenAddress) -> list[socket.socket]:
    """Return bound sockets that workers share, of an address that no other program uses.

    Raises: SettingsError.
    """
    probes = bind_tcp(address)  # finds out whether the address is in use
    port = probes[0].getsockname()[1]
    for probe in probes:
        probe.close()
    return bind_tcp(replace(address, port=port), is_shared=True)


def bind_tcp(address: ListenAddress, *, is_shared: bool = False) -> list[socket.socket]:
    """Return a bound socket for each IP address. Raises: SettingsError, one cannot be used."""
    port, host = address.port, ""
    with ExitStack() as stack:
        listeners: list[socket.socket] = []
        try:
            for host in address.hosts:
                for family, socket_address in resolve(host, port):
                    listener = stack.enter_context(
                        closing(socket.socket(family, socket.SOCK_STREAM))
                    )
                    is_dual = host == "::" and "0.0.0.0" not in address.hosts
                    set_options(listener, is_shared=is_shared, is_dual=is_dual)
                    listener.bind((socket_address[0], port, *socket_address[2:]))
                    # No other process may bind the address until this one listens.
                    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
                    port = listener.getsockname()[1]
                    listeners.append(listener)
        except (OSError, UnicodeError) as error:
            raise cannot_listen(error, host, port) from error
        stack.pop_all()
        return listeners


def resolve(host: str, port: int) -> dict[SocketAddress, None]:
    """Return the distinct addresses of a host. Raises: OSError, UnicodeError."""
    results = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    return dict.fromkeys((family, address) for family, _, _, _, address in results)


def set_options(listener: socket.socket, *, is_shared: bool, is_dual: bool) -> None:
    """Set the options of a socket before it is bound: the address can be used even if connections
    of an earlier process are still closing.

    is_dual: an IPv6 socket accepts IPv4 too.
    """
    listener.setblocking(False)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if is_shared:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    if listener.family == socket.AF_INET6:
        listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(not is_dual))


def cannot_listen(error: OSError | UnicodeError, host: str, port: int) -> SettingsError:
    code = getattr(error, "errno", None) or 0
    reason = os.strerror(code).lower() if code > 0 else "there is no such host"
    address = f"{host}:{port}" if is_address(host) else f"the address of FALPROXY_HOST, port {port}"
    return SettingsError(
        f"Cannot listen on {address}: {reason}. Choose another with --host and --port."
    )


def listen_error(error: OSError, listener: socket.socket) -> SettingsError:
    """Return the error of a bound socket that cannot be listened on."""
    name = listener.getsockname()
    if isinstance(name, tuple):
        return cannot_listen(error, name[0], name[1])
    return SettingsError(f"Cannot listen on the Unix socket: {os.strerror(error.errno or 0)}.")


def is_address(host: str) -> bool:
    """Return whether a host can be shown: an IP address or `localhost`."""
    try:
        return host == "localhost" or bool(ipaddress.ip_address(host))
    except ValueError:
        return False


@contextmanager
def open_unix_socket(path: Path) -> Iterator[socket.socket]:
    """Context manager: bind a Unix socket that user and group may use. It replaces the file of a
    process that has ended. At the end its file is removed, unless another process replaced it.

    Raises: SettingsError, the path cannot be used.
    """
    with closing(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)) as listener:
        listener.setblocking(False)
        try:
            remove_unused(path)
            old_umask = os.umask(0o777 & ~SOCKET_FILE_MODE)  # no moment with more permissions
            try:
                listener.bind(os.fspath(path))
            finally:
                os.umask(old_umask)
            created = os.stat(path)
        except OSError as error:
            code = error.errno or errno.ENAMETOOLONG  # Python's own error has no number
            reason = REASONS.get(code) or os.strerror(code).lower()
            raise SettingsError(
                f"Cannot listen on the Unix socket of FALPROXY_UDS: {reason}. Choose another path "
                "with --uds."
            ) from error
        try:
            yield listener
        finally:
            with suppress(OSError):
                if os.path.samestat(os.stat(path), created):
                    path.unlink()


def remove_unused(path: Path) -> None:
    """Remove the socket file of a process that has ended. Raises: OSError, the path is in use."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise OSError(errno.EEXIST, "")
    with closing(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)) as probe:
        probe.settimeout(CONNECT_TIMEOUT)
        try:
            probe.connect(os.fspath(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
            return
    raise OSError(errno.EADDRINUSE, "")


def passed_sockets(count: int) -> list[socket.socket]:
    """Return the sockets that systemd has opened. Raises: SettingsError, they are no sockets."""
    listeners = []
    for descriptor in range(FIRST_PASSED_SOCKET, FIRST_PASSED_SOCKET + count):
        try:
            listener = socket.socket(fileno=descriptor)
        except OSError as error:
            raise SettingsError("LISTEN_FDS is set, but no sockets were passed.") from error
        if listener.type != socket.SOCK_STREAM:
            raise SettingsError("The socket unit must use ListenStream=.")
        os.set_inheritable(descriptor, False)
        listener.setblocking(False)
        listeners.append(listener)
    return listeners


def describe(address: ListenAddress, listeners: Sequence[socket.socket]) -> str:
    """Return the URLs of the sockets, or `unix:` and the path, as shown in the log."""
    if address.is_tcp:
        port = listeners[0].getsockname()[1]
        return " and ".join(http_url(host, port) for host in address.hosts)
    return " and ".join(describe_socket(listener) for listener in listeners)


def describe_socket(listener: socket.socket) -> str:
    name = listener.getsockname()
    return http_url(name[0], name[1]) if isinstance(name, tuple) else f"unix:{name}"


def http_url(host: str, port: int) -> str:
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"
