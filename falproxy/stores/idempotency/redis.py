"""Records of several machines: Redis, Valkey or a cluster of them (uses redis-py)."""

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Self, get_args

from redis.asyncio import Redis, RedisCluster
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import NoPermissionError, NoScriptError, RedisClusterException, RedisError

from falproxy.stores.idempotency import BeginReply, IdempotencyStoreError, State
from falproxy.stores.idempotency.redis_scripts import (
    BEGIN,
    EXTEND,
    FINISH,
    RELEASE,
    IdempotencyScript,
)

MAX_SIZE = 128 * 2**20  # bytes of all records
MAX_CONNECTIONS = 32  # to one server; also the maximum of concurrent commands
SOCKET_TIMEOUT = 2.0  # seconds of a connect, a write, and a read
CALL_TIMEOUT = 3.0  # seconds of a command, with the connect and the wait for a connection
REDIS_ERRORS = (RedisError, RedisClusterException, OSError, ValueError)
STATES: dict[bytes, State] = {state.encode(): state for state in get_args(State)}
CommandArgument = str | bytes | int | float


class RedisIdempotencyStore:
    """An `IdempotencyStore` in Redis.

    prefix: of all keys.
    max_size: bytes of all records.
    Raises: ValueError, not the URL of a Redis server.
    """

    def __init__(self, url: str, *, prefix: str = "falproxy:", max_size: int = MAX_SIZE) -> None:
        self._url = url
        self._prefix = f"{prefix}{{idempotency}}:"
        self._max_size = max_size
        self._call_slots = asyncio.Semaphore(MAX_CONNECTIONS)
        self._client: Redis | RedisCluster | None = None  # selected by the first command
        try:
            self._server_client = Redis.from_url(url, **client_options())
        except (RedisError, ValueError, TypeError, AttributeError):
            # Without the cause: its text may contain a part of the password.
            raise ValueError("not a URL of a Redis server") from None

    def __repr__(self) -> str:
        return f"<RedisIdempotencyStore {self._prefix}*>"  # the URL may contain a password

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        if isinstance(self._client, RedisCluster):
            await self._client.aclose()
        await self._server_client.aclose()

    async def begin(self, key: str, digest: str, token: str, lease: float) -> BeginReply:
        reply = await self._run_script(BEGIN, key, token, digest, repr(lease), self._max_size)
        assert isinstance(reply, list)
        return BeginReply(STATES[reply[0]], *reply[1:])

    async def mark_sent(self, key: str, token: str, lease: float) -> bool:
        return await self._run_script(EXTEND, key, token, repr(lease), 1) == 1

    async def renew(self, calls: Sequence[tuple[str, str]], lease: float) -> None:
        scripts = (self._run_script(EXTEND, *call, repr(lease), 0) for call in calls)
        await asyncio.gather(*scripts)

    async def finish(self, key: str, token: str, outcome: bytes | None) -> bool:
        stored = () if outcome is None else (outcome,)
        return await self._run_script(FINISH, key, token, self._max_size, *stored) == 1

    async def release(self, key: str, token: str) -> bool:
        return await self._run_script(RELEASE, key, token) == 1

    async def _run_script(
        self, script: IdempotencyScript, key: str, *arguments: CommandArgument
    ) -> object:
        names = (f"record:{key}", "expiry", "large", "size")
        values = (len(names), *(f"{self._prefix}{name}" for name in names), *arguments)
        try:
            return await self._execute("EVALSHA", script.digest, *values)
        except IdempotencyStoreError as error:
            if not isinstance(error.__cause__, NoScriptError):
                raise
        return await self._execute("EVAL", script.text, *values)

    async def _execute(self, *command: CommandArgument) -> object:
        try:
            async with asyncio.timeout(CALL_TIMEOUT), self._call_slots:
                client = await self._connect()
                reply: object = await client.execute_command(*command)
                return reply
        except REDIS_ERRORS as error:
            await self._drop_connections()
            # The type only: the text may contain the server's address.
            message = f"Redis cannot be used ({type(error).__name__})"
            raise IdempotencyStoreError(message) from error

    async def _drop_connections(self) -> None:
        """Close idle connections: the address may belong to another server now."""
        with suppress(*REDIS_ERRORS):
            await self._server_client.connection_pool.disconnect(inuse_connections=False)

    async def _connect(self) -> Redis | RedisCluster:
        """Return the client of the server in the URL, or of the cluster that it belongs to."""
        if self._client is None:
            try:
                info = await self._server_client.info("cluster")
            except NoPermissionError:  # without the right to INFO, no cluster is assumed
                info = {}
            if self._client is None:  # unless a concurrent caller has selected it
                is_cluster = info.get("cluster_enabled") == 1
                self._client = (
                    RedisCluster.from_url(self._url, **client_options())
                    if is_cluster
                    else self._server_client
                )
        return self._client


def client_options() -> dict[str, Any]:
    """Return options of a client whose commands are not repeated: the caller does that."""
    return {
        "protocol": 2,
        "decode_responses": False,
        "retry": Retry(NoBackoff(), 0),
        "max_connections": MAX_CONNECTIONS + 1,
        "socket_connect_timeout": SOCKET_TIMEOUT,
        "socket_timeout": SOCKET_TIMEOUT,
    }
