"""Limits of several machines: Redis, Valkey or a cluster of them (uses redis-py)."""

import asyncio
import time
from collections.abc import Iterator, Sequence
from typing import Self

from falproxy.stores.limits import (
    Admission,
    Limit,
    LimitsError,
    LimitState,
    Reservation,
    ReserveRequest,
    budget_name,
    part_length,
    rate_name,
    running_name,
    share,
)
from falproxy.stores.limits.redis_scripts import (
    ATTACH,
    CLAIM_DUE,
    COUNT,
    LOAD,
    RENEW,
    RESERVE,
    SETTLE,
)
from falproxy.stores.redis_client import CommandArgument, RedisClient, Script

WRONG_CLOCK = -2  # a script's reply: the server's time is in none of the windows


class RedisLimitsStore:
    """A `LimitsStore` in Redis.

    prefix: of all keys.
    Raises: ValueError, not the URL of a Redis server.
    """

    def __init__(self, url: str, *, prefix: str = "falproxy:") -> None:
        self._redis = RedisClient(url, LimitsError, is_grouped=True)
        self._prefix = f"{prefix}{{limits}}:"
        self._open_key, self._expiry_key = f"{self._prefix}open", f"{self._prefix}expiry"

    def __repr__(self) -> str:
        return f"<RedisLimitsStore {self._prefix}*>"  # the URL may contain a password

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._redis.close()

    async def reserve(self, request: ReserveRequest) -> Admission:
        keys = self._open_keys(request.token)
        arguments = (request.token, request.amount, repr(request.lease))
        return await self._read_states(RESERVE, keys, arguments, request.limits, request.amount)

    async def attach(self, token: str, request_id: str, details: str, lease: float) -> bool:
        keys = [*self._open_keys(token), self._request_key(request_id)]
        arguments = (token, request_id, details, repr(lease))
        return await self._run_script(ATTACH, keys, arguments) == 1

    async def renew(self, token: str, lease: float) -> bool:
        return await self._run_script(RENEW, self._open_keys(token), (token, repr(lease))) == 1

    async def find(self, request_id: str) -> Reservation | None:
        self._reconnect_after_failure()
        token = await self._redis.execute("GET", self._request_key(request_id))
        return await self._load(text(token)) if isinstance(token, bytes) else None

    async def settle(self, token: str, amount: int) -> bool:
        return await self._run_script(SETTLE, self._open_keys(token), (token, amount)) == 1

    async def release(self, token: str) -> bool:
        return await self.settle(token, 0)

    async def claim_due(self, limit: int, lease: float) -> list[Reservation]:
        reply = await self._run_script(
            CLAIM_DUE, [self._open_key, self._expiry_key], (limit, repr(lease))
        )
        tokens = [text(token) for token in reply] if isinstance(reply, list) else []
        loaded = await asyncio.gather(*map(self._load, tokens))
        return [reservation for reservation in loaded if reservation is not None]

    async def count(self, limits: Sequence[Limit]) -> tuple[LimitState, ...]:
        return (await self._read_states(COUNT, [], (), limits, 0)).states

    async def _load(self, token: str) -> Reservation | None:
        """Return an open reservation; one that has expired is removed from those that are due."""
        reply = await self._run_script(LOAD, self._open_keys(token), (token,))
        if not isinstance(reply, list):
            return None
        amount, request_id, details, age = reply
        request = None if request_id is None else text(request_id)
        return Reservation(token, int(amount), request, text(details or b""), float(age))

    async def _read_states(
        self,
        script: Script,
        keys: Sequence[str],
        arguments: Sequence[CommandArgument],
        limits: Sequence[Limit],
        amount: int,
    ) -> Admission:
        """Run a script that reads limits. If the clock of this process differs from the server's by
        more than a window, it is run again with the windows around the server's time."""
        now = time.time()
        for _ in range(2):
            limit_keys = [f"{self._prefix}{key}" for limit in limits for key in names(limit, now)]
            values = [value for limit in limits for value in parameters(limit, amount, now)]
            reply = await self._run_script(
                script, [*keys, *limit_keys], [*arguments, len(limits), *values]
            )
            assert isinstance(reply, list)
            if reply[0] != WRONG_CLOCK:
                return parse_admission(reply)
            now = float(reply[1])
        raise LimitsError("Redis has another time than this machine")

    def _open_keys(self, token: str) -> list[str]:
        return [f"{self._prefix}reservation:{token}", self._open_key, self._expiry_key]

    def _request_key(self, request_id: str) -> str:
        return f"{self._prefix}request:{request_id}"

    async def _run_script(
        self, script: Script, keys: Sequence[str], arguments: Sequence[CommandArgument]
    ) -> object:
        self._reconnect_after_failure()
        return await self._redis.run_script(script, keys, arguments)

    def _reconnect_after_failure(self) -> None:
        """The limiter does not use a store for a moment after it failed."""
        if self._redis.has_failed:
            self._redis.reconnect()


def names(limit: Limit, now: float) -> Iterator[str]:
    """Yield the names of a limit's counters: one, or three windows of a budget."""
    match limit.kind:
        case "rate":
            yield rate_name(limit)
        case "concurrency":
            yield running_name(limit)
        case "budget":
            for start, _ in windows(limit, now):
                yield budget_name(limit, start)


def parameters(limit: Limit, amount: int, now: float) -> Iterator[CommandArgument]:
    yield limit.kind
    yield limit.maximum
    yield share(limit, amount)
    if limit.kind == "rate" and limit.window is not None:
        yield repr(part_length(limit.window))
    elif limit.kind == "budget":
        for window in windows(limit, now):
            yield from window


def windows(limit: Limit, now: float) -> tuple[tuple[int, int], ...]:
    """Return start and end of the windows before, at and after a time."""
    assert limit.window is not None
    start, end = limit.window.bounds(now)
    return limit.window.bounds(start - 1), (start, end), limit.window.bounds(end)


def parse_admission(reply: Sequence[object]) -> Admission:
    refused, _, values = reply
    assert isinstance(values, list)
    states = [
        LimitState(int(used), float(seconds))
        for used, seconds in zip(values[::2], values[1::2], strict=True)
    ]
    return Admission(None if refused == -1 else int(str(refused)), tuple(states))


def text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value
