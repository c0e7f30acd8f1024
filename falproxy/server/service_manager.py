"""Messages to systemd, or another service manager with its protocol (sd_notify)."""

import asyncio
import logging
import socket
import time
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass

from falproxy.parse_digits import parse_digits

logger = logging.getLogger(__name__)

# Variables that a service manager sets for its process.
VARIABLES = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "LISTEN_FDS", "LISTEN_PID")
MICROSECONDS = 1_000_000


@dataclass(frozen=True, slots=True)
class ServiceManager:
    """The service manager of this process.

    address: of its datagram socket, empty if there is none; `@` begins an abstract name.
    watchdog: seconds without a message after which it ends the process; None for never.
    passed_sockets: number of listening sockets that it has passed.
    """

    address: str = ""
    watchdog: float | None = None
    passed_sockets: int = 0

    @classmethod
    def from_variables(cls, variables: Mapping[str, str], pid: int) -> "ServiceManager":
        """Read VARIABLES. Those of the watchdog and of sockets may be meant for another process."""
        watchdog = None
        if variables.get("WATCHDOG_PID", str(pid)) == str(pid):
            watchdog = parse_digits(variables.get("WATCHDOG_USEC", ""))
        sockets = None
        if variables.get("LISTEN_PID") == str(pid):
            sockets = parse_digits(variables.get("LISTEN_FDS", ""))
        seconds = watchdog / MICROSECONDS if watchdog else None
        return cls(variables.get("NOTIFY_SOCKET", ""), seconds, sockets or 0)

    @property
    def watchdog_interval(self) -> float | None:
        """Seconds between two messages for the watchdog."""
        return None if self.watchdog is None or not self.address else self.watchdog / 2

    def ready(self) -> None:
        self._send("READY=1")

    def reloading(self) -> None:
        now = time.clock_gettime(time.CLOCK_MONOTONIC)
        self._send(f"RELOADING=1\nMONOTONIC_USEC={int(now * MICROSECONDS)}")

    def stopping(self) -> None:
        self._send("STOPPING=1")

    def alive(self) -> None:
        self._send("WATCHDOG=1")

    async def keep_alive(self) -> None:
        """Send messages for the watchdog until the task is cancelled, as long as the event loop
        runs."""
        while (interval := self.watchdog_interval) is not None:
            self.alive()
            await asyncio.sleep(interval)

    def _send(self, message: str) -> None:
        if not self.address:
            return
        address = "\0" + self.address[1:] if self.address.startswith("@") else self.address
        try:
            with closing(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)) as sender:
                sender.setblocking(False)
                sender.sendto(message.encode(), address)
        except OSError as error:
            logger.warning("The service manager was not notified: %s", type(error).__name__)


NO_SERVICE_MANAGER = ServiceManager()
