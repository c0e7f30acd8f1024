"""Records of several machines: Redis, Valkey or a cluster of them (uses redis-py)."""

import asyncio
from collections.abc import Sequence
from typing import Self, get_args

from falproxy.stores.idempotency import BeginReply, IdempotencyStoreError, State
from falproxy.stores.idempotency.redis_scripts import BEGIN, EXTEND, FINISH, RELEASE
from falproxy.stores.redis_client import CommandArgument, RedisClient, Script

MAX_SIZE = 128 * 2**20  # bytes of all records
STATES: dict[bytes, State] = {state.encode(): state for state in get_args(State)}


class RedisIdempotencyStore:
    """An `IdempotencyStore` in Redis.

    prefix: of all keys.
    max_size: bytes of all records.
    Raises: ValueError, not the URL of a Redis server.
    """

    def __init__(self, url: str, *, prefix: str = "falproxy:", max_size: int = MAX_SIZE) -> None:
        self._redis = RedisClient(url, IdempotencyStoreError, is_grouped=True)
        self._prefix = f"{prefix}{{idempotency}}:"
        self._max_size = max_size

    def __repr__(self) -> str:
        return f"<RedisIdempotencyStore {self._prefix}*>"  # the URL may contain a password

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._redis.close()

    async def begin(self, key: str, digest: str, token: str, lease: float) -> BeginReply:
        reply = await self._run_script(BEGIN, key, token, digest, repr(lease), self._max_size)
        assert isinstance(reply, list)
        return BeginReply(STATES[reply[0]], *reply[1:])

    async def mark_sent(self, key: str, token: str, lease: float) -> bool:
        return await self._run_script(EXTEND, key, token, repr(lease), 1) == 1

    async def renew(
        self, calls: Sequence[tuple[str, str]], lease: float
    ) -> Sequence[tuple[str, str]]:
        scripts = (self._run_script(EXTEND, *call, repr(lease), 0) for call in calls)
        replies = await asyncio.gather(*scripts)
        return [call for call, reply in zip(calls, replies, strict=True) if reply != 1]

    async def finish(self, key: str, token: str, outcome: bytes | None) -> bool:
        stored = () if outcome is None else (outcome,)
        return await self._run_script(FINISH, key, token, self._max_size, *stored) == 1

    async def release(self, key: str, token: str) -> bool:
        return await self._run_script(RELEASE, key, token) == 1

    async def _run_script(self, script: Script, key: str, *arguments: CommandArgument) -> object:
        if self._redis.has_failed:
            self._redis.reconnect()
        names = (f"record:{key}", "expiry", "large", "size")
        keys = [f"{self._prefix}{name}" for name in names]
        return await self._redis.run_script(script, keys, arguments)
