"""Signals of a serving process: to stop, and to read the settings again."""

import asyncio
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress

SIGNALS = (signal.SIGTERM, signal.SIGINT)
RELOAD_SIGNAL: "signal.Signals | None" = getattr(signal, "SIGHUP", None)
STOP_LATER = b"1"  # in a stop pipe: the worker may delay its stop, which it does not at EOF


class StopRequest:
    """The request to stop this process.

    stop_pipe: in a worker process, reaches its end when it has to stop; its supervisor handles
        second signals.
    on_reload: called on SIGHUP.
    """

    def __init__(self, stop_pipe: int | None, on_reload: Callable[[], None] | None) -> None:
        self._loop = asyncio.get_running_loop()
        self._stop: asyncio.Future[bool] = self._loop.create_future()
        self._stop_pipe = stop_pipe
        self._on_reload = on_reload
        self._has_terminal = is_terminal()

    async def wait(self) -> bool:
        """Wait for the request. Return whether it must not be delayed, such as by Ctrl-C."""
        return await self._stop

    def listen(self) -> None:
        """Install the handlers of signals."""
        for number in SIGNALS:
            self._loop.add_signal_handler(number, self._request, number == signal.SIGINT)
        if RELOAD_SIGNAL is not None:
            self._loop.add_signal_handler(RELOAD_SIGNAL, self._on_hangup)
        if self._stop_pipe is not None:
            self._loop.add_reader(self._stop_pipe, self._read_pipe, self._stop_pipe)

    def ignore_further(self) -> None:
        """Let a second signal end the process at once, except in a worker."""
        if self._stop_pipe is not None:
            self._loop.remove_reader(self._stop_pipe)
            return
        for number in SIGNALS:
            self._loop.remove_signal_handler(number)

    def _request(self, is_urgent: bool) -> None:
        if not self._stop.done():
            self._stop.set_result(is_urgent)

    def _read_pipe(self, pipe: int) -> None:
        self._loop.remove_reader(pipe)
        self._request(os.read(pipe, 1) != STOP_LATER)

    def _on_hangup(self) -> None:
        """SIGHUP also means that the terminal of the process was closed."""
        if self._has_terminal and not is_terminal():
            self._request(True)
        elif self._on_reload is not None:
            self._on_reload()


def is_terminal() -> bool:
    """Return whether standard input is an open terminal."""
    with suppress(OSError, ValueError):
        return sys.stdin is not None and os.isatty(sys.stdin.fileno())
    return False
