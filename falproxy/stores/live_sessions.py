"""Open sessions of live video: the caller that opened them, the endpoint, and since when.

They are stored like the owners of queued requests, under names that no request id has. The text in
place of the key's fingerprint is a JSON list of the fields beside the owner.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass

from falproxy.stores.cache import RequestOwner
from falproxy.stores.ownership import RequestOwnership

PREFIX = "live/"  # no request id in a URL has a slash


@dataclass(frozen=True, slots=True)
class LiveSession:
    """A session of live video.

    id: fal's.
    owner: name of the caller; empty when callers are anonymous.
    key_mark: fingerprint of the fal key that opened it; empty for the default one.
    endpoint: empty if it is not known.
    opened_at: seconds since 1970.
    """

    id: str
    owner: str
    key_mark: str
    endpoint: str
    opened_at: float


class LiveSessions:
    """The open sessions of all processes that share a store.

    clock: seconds since 1970.
    """

    def __init__(self, ownership: RequestOwnership, clock: Callable[[], float] = time.time) -> None:
        self._ownership = ownership
        self.clock = clock

    def __repr__(self) -> str:
        return f"<LiveSessions in {self._ownership!r}>"

    async def add(self, session: LiveSession) -> None:
        """Record a session before the client receives its id. An existing one stays."""
        fields = json.dumps([session.key_mark, session.endpoint, session.opened_at])
        await self._ownership.add(PREFIX + session.id, RequestOwner(session.owner, fields))

    async def find(self, session_id: str, *, wait_for_store: bool) -> LiveSession | None:
        """Return a session, None if it is certain that there is none. Raises: TemporaryError 503,
        it cannot be looked up."""
        stored = await self._ownership.get(PREFIX + session_id, wait_for_store=wait_for_store)
        return None if stored is None else parse_session(session_id, stored)

    async def peek(self, session_id: str) -> LiveSession | None:
        """Return a session, None if there is none or it cannot be looked up now."""
        stored = await self._ownership.peek(PREFIX + session_id)
        return None if stored is None else parse_session(session_id, stored)


def parse_session(session_id: str, stored: RequestOwner) -> LiveSession:
    key_mark, endpoint, opened_at, *_ = json.loads(stored.key_mark)
    return LiveSession(session_id, stored.owner, key_mark, endpoint, opened_at)
