"""A private network and mount namespace, in which fal's names are loopback addresses.

The machine is not changed: its ports, /etc/hosts and trust store stay as they are. Processes inside
cannot reach any other machine.
"""

import ctypes
import fcntl
import os
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

# Two addresses, for two servers that both listen on port 443.
QUEUE = "127.0.0.1"
RUN = "127.0.0.2"
HOSTS = f"""\
127.0.0.1 localhost
{QUEUE} queue.fal.run rest.fal.ai fal.ai
{RUN} fal.run
"""
# The PID namespace ends everything inside with its first process.
UNSHARE = ("unshare", "--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")

# With AI_ADDRCONFIG, resolvers need an address that is not loopback's own. It leads nowhere.
OTHER = "10.255.255.1"
SIOCGIFFLAGS, SIOCSIFFLAGS, SIOCSIFADDR, IFF_UP = 0x8913, 0x8914, 0x8916, 0x1
MS_BIND = 4096


def namespace_command() -> tuple[str, ...]:
    """Return the command that enters new namespaces, empty if they cannot be created."""
    command = UNSHARE if os.geteuid() == 0 else (*UNSHARE, "--user", "--map-root-user")
    try:
        trial = subprocess.run((*command, "true"), capture_output=True, check=False, timeout=20)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return ()
    return command if trial.returncode == 0 else ()


def run_inside(command: Sequence[str], arguments: Sequence[str], env: dict[str, str]) -> int:
    """Run this program again inside the namespaces. A SIGTERM ends all processes inside."""
    signal.signal(signal.SIGTERM, stop)
    process = subprocess.Popen(
        (*command, sys.executable, "-m", "compare", *arguments), env=os.environ | env
    )
    try:
        return process.wait()
    finally:
        process.kill()  # the kernel then ends all processes inside
        process.wait()


def stop(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def settle(folder: Path) -> None:
    """Inside: bring loopback up, and mount the hosts file over the machine's."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        name = struct.pack("16sh", b"lo", 0)
        _, flags = struct.unpack("16sh", fcntl.ioctl(control, SIOCGIFFLAGS, name))
        fcntl.ioctl(control, SIOCSIFFLAGS, struct.pack("16sh", b"lo", flags | IFF_UP))
        address = struct.pack("=16sHH4s8x", b"lo:1", socket.AF_INET, 0, socket.inet_aton(OTHER))
        fcntl.ioctl(control, SIOCSIFADDR, address)
    hosts = folder / "hosts"
    hosts.write_text(HOSTS)
    bind(hosts, Path("/etc/hosts"))


def bind(source: Path, place: Path) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(bytes(source), bytes(place), None, MS_BIND, None) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(place))
