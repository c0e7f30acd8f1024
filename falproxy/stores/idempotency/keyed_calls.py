"""Calls with an Idempotency-Key of one process, and their records in the store."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine, Set
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Self, TypeVar
from uuid import uuid4

from falproxy.circuit_breaker import CircuitBreaker
from falproxy.concurrency import cancel_tasks
from falproxy.stores.idempotency import BeginReply, IdempotencyStore, IdempotencyStoreError
from falproxy.stores.idempotency.outcome import StoredOutcome, serialize_stored

logger = logging.getLogger(__name__)

T = TypeVar("T")

# All times are seconds.
LEASE = 15.0  # after that, a call counts as lost unless its process renews it
RENEWALS_PER_LEASE = 4
RETRY_INTERVAL = 0.5  # until an end that the store has not taken is written again
STORE_COOLDOWN = 1.0  # until a store that failed is asked again
LAST_WRITE_TIMEOUT = 1.0  # at shutdown
UNWRITTEN_MAX_BYTES = 64 * 2**20  # of outcomes that the store has not taken


class KeyedCall:
    """The first call with a key, in the process that makes it.

    is_sent: fal may have received it.
    is_released: its key is being released, or was.
    ended: its outcome; None if the store has to be asked, because the key was released, or the
        outcome is too large to be held.
    """

    __slots__ = ("_calls", "digest", "ended", "is_released", "is_sent", "key", "token")

    def __init__(self, calls: "KeyedCalls", key: str, digest: str, token: str) -> None:
        self._calls = calls
        self.key = key
        self.digest = digest
        self.token = token
        self.is_sent = False
        self.is_released = False
        self.ended: asyncio.Future[StoredOutcome | None] = (
            asyncio.get_running_loop().create_future()
        )

    def __repr__(self) -> str:
        state = "ended" if self.ended.done() else "sent" if self.is_sent else "not sent"
        return f"<KeyedCall {self.key[:12]}, {state}>"

    @property
    def is_forgotten(self) -> bool:
        """True if it has ended, and its outcome is not held in memory."""
        return self.ended.done() and self.ended.result() is None

    async def mark_sent(self) -> bool:
        """Record that the call is about to be sent. False if it must not be sent, because another
        process has taken over. Raises: IdempotencyStoreError."""
        if not self.is_sent:
            self.is_sent = await self._calls.mark_sent(self)
        return self.is_sent

    async def finish(self, outcome: StoredOutcome, *, is_storable: bool = True) -> None:
        """End the call with its outcome. It is written later if the store is away.

        is_storable: False if the response is too large to be stored.
        """
        content = serialize_stored(outcome) if is_storable else None
        await self._calls.write_end(UnwrittenEnd(self, content))
        self.ended.set_result(outcome if is_storable else None)

    async def release(self) -> None:
        """End the call, which bought nothing: the key may be used again."""
        self.is_released = True
        await self._calls.write_end(UnwrittenEnd(self, None, is_released=True))
        self.ended.set_result(None)


@dataclass(frozen=True, slots=True, eq=False)
class UnwrittenEnd:
    """The end of a call that is not in the store yet. content: as in `IdempotencyStore.finish`."""

    call: KeyedCall
    content: bytes | None
    is_released: bool = False

    @property
    def size(self) -> int:
        return len(self.content or b"")


class KeyedCalls:
    """The calls of this process that have not ended, by key. It is a context: within it, their
    leases are renewed.

    lease: seconds; LEASE by default.
    """

    def __init__(self, store: IdempotencyStore, *, lease: float | None = None) -> None:
        self._store = store
        self._lease = LEASE if lease is None else lease
        self._breaker = CircuitBreaker(STORE_COOLDOWN)
        self._calls: dict[str, KeyedCall] = {}
        self._unwritten: dict[str, UnwrittenEnd] = {}  # by token
        self._tasks: set[asyncio.Task[Any]] = set()
        self._loops: list[asyncio.Task[None]] = []

    def __repr__(self) -> str:
        counts = f"{len(self._calls)} calls, {len(self._unwritten)} unwritten"
        return f"<KeyedCalls {self._store!r}, {counts}>"

    @property
    def is_store_up(self) -> bool:
        return self._breaker.is_closed

    async def __aenter__(self) -> Self:
        await self._store.__aenter__()
        return self

    async def __aexit__(self, *error: object) -> None:
        await cancel_tasks(self._loops)
        with suppress(IdempotencyStoreError, TimeoutError):
            async with asyncio.timeout(LAST_WRITE_TIMEOUT):
                await self._write_all()
        await self._store.__aexit__(*error)

    def find(self, key: str) -> KeyedCall | None:
        return self._calls.get(key)

    async def begin(self, key: str, digest: str) -> KeyedCall | BeginReply:
        """Return the call if it is the first one with the key, otherwise the state of
        the key. Raises: IdempotencyStoreError."""
        if not self._breaker.allow_request():
            raise IdempotencyStoreError("the store is being skipped")
        self._start_loops()
        call = KeyedCall(self, key, digest, uuid4().hex)
        try:
            reply = await self._store.begin(key, digest, call.token, self._lease)
        except IdempotencyStoreError as error:
            if self._breaker.is_closed:
                logger.warning("Calls with an Idempotency-Key are refused now: %s", error)
            self._breaker.trip()
            self._keep(UnwrittenEnd(call, None, is_released=True))  # the reply may have been lost
            raise
        except asyncio.CancelledError:
            self._keep(UnwrittenEnd(call, None, is_released=True))
            raise
        if not self._breaker.is_closed:
            logger.warning("Calls with an Idempotency-Key are accepted again")
            self._breaker.reset()
        if reply.state != "started":
            return reply
        self._calls[key] = call
        return call

    async def mark_sent(self, call: KeyedCall) -> bool:
        return await self._as_holder(
            call, lambda: self._store.mark_sent(call.key, call.token, self._lease)
        )

    async def write_end(self, end: UnwrittenEnd) -> None:
        """Write the end of a call now, or later if the store is away."""
        try:
            await self._write(end)
        except IdempotencyStoreError as error:
            logger.warning("The end of a call with a key is recorded later: %s", error)
            self._keep(end)
            return
        self._forget(end.call)

    def spawn(self, work: Coroutine[object, object, T]) -> "asyncio.Task[T]":
        """Start a task that goes on when the client leaves."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._on_done)
        return task

    async def close(self, grace_period: float) -> None:
        """Wait for the calls, and cancel those that are still running after `grace_period`
        seconds."""
        tasks = tuple(self._tasks)
        if tasks:
            await asyncio.wait(tasks, timeout=grace_period)
        await cancel_tasks(tuple(self._tasks))
        if self._tasks:  # those that record the end of a cancelled call
            await asyncio.wait(tuple(self._tasks), timeout=LAST_WRITE_TIMEOUT)

    def _on_done(self, task: "asyncio.Task[Any]") -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # marks it as retrieved: the client may have left

    def _start_loops(self) -> None:
        """Start the tasks in the background, with the first call that has a key."""
        if not self._loops:
            loop = asyncio.get_running_loop()
            self._loops = [loop.create_task(work) for work in (self._renew(), self._write_again())]

    def _keep(self, end: UnwrittenEnd) -> None:
        """Hold the end of a call until the store takes it. Beyond the limit, without the response,
        which is then reported as too large."""
        size = sum(each.size for each in self._unwritten.values()) + end.size
        if size > UNWRITTEN_MAX_BYTES:
            end = UnwrittenEnd(end.call, None, end.is_released)
        self._unwritten[end.call.token] = end

    def _forget(self, call: KeyedCall) -> None:
        if self._calls.get(call.key) is call:
            del self._calls[call.key]

    async def _renew(self) -> None:
        while True:
            await asyncio.sleep(self._lease / RENEWALS_PER_LEASE)
            calls = [(call.key, call.token) for call in self._calls.values()]
            if calls:
                with suppress(IdempotencyStoreError):
                    not_held = {*await self._store.renew(calls, self._lease)}
                    await self._restore(not_held)

    async def _write_again(self) -> None:
        while True:
            await asyncio.sleep(RETRY_INTERVAL)
            with suppress(IdempotencyStoreError):
                await self._write_all()

    async def _write_all(self) -> None:
        for token, end in tuple(self._unwritten.items()):
            await self._write(end)
            self._unwritten.pop(token, None)
            self._forget(end.call)

    async def _write(self, end: UnwrittenEnd) -> None:
        call = end.call
        if end.is_released:
            await self._store.release(call.key, call.token)
        elif not await self._as_holder(
            call, lambda: self._store.finish(call.key, call.token, end.content)
        ):
            logger.warning("The outcome of a call with a key could not be recorded")

    async def _as_holder(self, call: KeyedCall, operation: Callable[[], Awaitable[bool]]) -> bool:
        """Return the result of an operation on the record of a call, which is begun again if the
        store has lost it."""
        return await operation() or (await self._begin_again(call) and await operation())

    async def _begin_again(self, call: KeyedCall) -> bool:
        """Begin the record of a call that the store has lost, as Redis does when another server
        replaces it. False if another process has the key."""
        reply = await self._store.begin(call.key, call.digest, call.token, self._lease)
        return reply.state == "started"

    async def _restore(self, not_held: Set[tuple[str, str]]) -> None:
        """Begin the records of calls again that have not ended. not_held: key and token of each."""
        calls = [each for each in self._calls.values() if (each.key, each.token) in not_held]
        for call in calls:
            if not call.is_released:
                await (self.mark_sent(call) if call.is_sent else self._begin_again(call))
            if call.is_released:
                await self._store.release(call.key, call.token)
