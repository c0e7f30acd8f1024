"""Calls with an Idempotency-Key: the outcome of the first call with each key.

A record begins before its call is sent, and ends with the call's outcome. If its process ends in
between, the record shows whether the call may have been sent: then no process sends it again.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, Self

State = Literal["started", "running", "lost", "done", "dropped", "mismatch", "full"]

RETENTION = 86400.0  # seconds after the last change of a record
RECORD_BYTES = 1024  # that a record without its outcome counts
# Bytes of an outcome that is never dropped to make room: a submit's, or an error.
SMALL_OUTCOME_MAX = 16 * 2**10


class IdempotencyStoreError(Exception):
    """The records cannot be read or written: the store is unreachable, slow, full or locked."""


@dataclass(frozen=True, slots=True)
class BeginReply:
    """The state of a key.

    state:
        started: the caller is the first one, and has to end the record.
        running: another call with the key has not ended.
        lost: the process of that call has ended, and may have sent it.
        done: the call has ended, with `outcome`.
        dropped: the call has ended, and its outcome is not stored because of its size.
        mismatch: the key belongs to a call with another digest.
        full: there is no room for another record.
    """

    state: State
    outcome: bytes = b""


class IdempotencyStore(Protocol):
    """Records that several processes share. All methods raise IdempotencyStoreError, and may be
    repeated with the same token after that."""

    async def __aenter__(self) -> Self: ...

    async def __aexit__(self, *error: object) -> None: ...

    async def begin(self, key: str, digest: str, token: str, lease: float) -> BeginReply:
        """Begin a record, or return the state of its key.

        digest: of the call.
        token: identifies the caller; an unused random name.
        lease: seconds until another caller may assume that this one has ended, unless it renews
            the lease. A call that was not sent by then may be taken over.
        """

    async def mark_sent(self, key: str, token: str, lease: float) -> bool:
        """Record that the call is about to be sent. False if another caller has taken over: it must
        not be sent then."""

    async def renew(
        self, calls: Sequence[tuple[str, str]], lease: float
    ) -> Sequence[tuple[str, str]]:
        """Extend the leases of records that have not ended. calls: key and token of each.

        Returns: those without such a record: it has ended, is another caller's, or does not exist.
        """

    async def finish(self, key: str, token: str, outcome: bytes | None) -> bool:
        """End a record with its outcome, for RETENTION seconds. False if it had ended, or is
        another caller's.

        outcome: None if it is too large to be stored. Large outcomes of other records are dropped
            to make room for it, oldest first.
        """

    async def release(self, key: str, token: str) -> bool:
        """Delete a record whose call bought nothing: the key may be used again. False if it had
        ended, or is another caller's."""
