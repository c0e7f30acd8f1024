"""Open sessions of live video. A session ends when its heartbeats stop."""

import asyncio
import logging
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

from falproxy.sandbox.live_runner import Runner

log = logging.getLogger(__name__)

HEARTBEAT_TIMEOUT = 15.0  # seconds
CHECK_INTERVAL = 0.25  # seconds


@dataclass(slots=True)
class LiveSession:
    """One session.

    tags: of the request that opened it, as `key=value`.
    opened_at, heard_at: when `LiveSessions.add` opened it, and its last heartbeat, by their clock.
    """

    endpoint: str
    account: str
    tags: tuple[str, ...]
    runner: Runner
    id: str = field(default_factory=lambda: str(uuid.uuid4()))
    opened_at: float = 0.0
    heard_at: float = 0.0

    @property
    def seconds(self) -> float:
        """Length until the last heartbeat."""
        return self.heard_at - self.opened_at


class LiveSessions:
    """The open sessions of a sandbox.

    on_end: called with each session that has ended.
    timeout: seconds without a heartbeat after which a session ends.
    clock: a monotonic clock in seconds.
    """

    def __init__(self, on_end: Callable[[LiveSession], None]) -> None:
        self.clock: Callable[[], float] = time.monotonic
        self.timeout = HEARTBEAT_TIMEOUT
        self.open: dict[str, LiveSession] = {}
        self._on_end = on_end
        self._task: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        return f"<LiveSessions {len(self.open)} open>"

    def add(self, session: LiveSession) -> None:
        session.opened_at = session.heard_at = self.clock()
        self.open[session.id] = session
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._end_silent())

    def beat(self, session_id: str, account: str) -> bool:
        """Record a heartbeat. Return whether the account has such a session."""
        session = self.open.get(session_id)
        if session is None or session.account != account:
            return False
        session.heard_at = self.clock()
        return True

    async def close(self) -> None:
        """End all sessions."""
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task
        for session in tuple(self.open.values()):
            await self._end(session)

    async def _end_silent(self) -> None:
        while self.open:
            await asyncio.sleep(CHECK_INTERVAL)
            now = self.clock()
            for session in tuple(self.open.values()):
                if now - session.heard_at > self.timeout:
                    await self._end(session)

    async def _end(self, session: LiveSession) -> None:
        if self.open.pop(session.id, None) is not None:
            self._on_end(session)
            try:
                await session.runner.close()
            except Exception:
                log.exception("The runner of a live video session could not be closed")
