"""Log lines about a state that may change often, such as that of a store on a full disk."""

import asyncio
import logging
from collections import deque

WINDOW = 60.0  # seconds
BURST = 4  # lines within WINDOW; of further changes only the last one is logged, at its end


class StateLog:
    """Logs the changes of one state as warnings, a limited number in a time. Used in an event loop.

    logger: of the module whose state it is.
    """

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger
        self._logged_at: deque[float] = deque(maxlen=BURST)
        self._latest: tuple[str, tuple[object, ...]] | None = None  # not logged
        self._skipped = 0
        self._timer: asyncio.TimerHandle | None = None

    def __repr__(self) -> str:
        return f"<StateLog of {self._logger.name}, {self._skipped} skipped>"

    def warning(self, message: str, *args: object) -> None:
        """Log a change, now or, if there were many, when the time is over."""
        loop = asyncio.get_running_loop()
        now = loop.time()
        is_full = len(self._logged_at) == BURST and now < self._logged_at[0] + WINDOW
        if not is_full and self._timer is None:
            self._log(now, message, args)
            return
        self._latest = message, args
        self._skipped += 1
        if self._timer is None:
            self._timer = loop.call_at(self._logged_at[0] + WINDOW, self._flush)

    def _flush(self) -> None:
        self._timer = None
        if self._latest is not None:
            message, args = self._latest
            text = f"{message} (after {self._skipped} changes within {WINDOW:g} s)"
            self._log(asyncio.get_running_loop().time(), text, args)
            self._latest, self._skipped = None, 0

    def _log(self, now: float, message: str, args: tuple[object, ...]) -> None:
        self._logged_at.append(now)
        self._logger.warning(message, *args, stacklevel=3)
