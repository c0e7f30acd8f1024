"""Limits of several machines: Redis, Valkey or a cluster of them (uses redis-py)."""

import asyncio
import time
from collections.abc import Iterator, Sequence
from typing import Any, Self

from redis.asyncio import Redis, RedisCluster
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import NoPermissionError, NoScriptError, RedisClusterException, RedisError

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
    LimitsScript,
)

MAX_CONNECTIONS = 32  # to one server; also the maximum of concurrent commands
SOCKET_TIMEOUT = 2.0  # seconds of a connect, a write, and a read
CALL_TIMEOUT = 3.0  # seconds of a command, with the connect and the wait for a connection
WRONG_CLOCK = -2  # a script's reply: the server's time is in none of the windows
REDIS_ERRORS = (RedisError, RedisClusterException, OSError, ValueError)
CommandArgument = str | bytes | int | float


class RedisLimitsStore:
    """A `LimitsStore` in Redis.

    prefix: of all keys.
    Raises: ValueError, not the URL of a Redis server.
    """

    def __init__(self, url: str, *, prefix: str = "falproxy:") -> None:
        self._url = url
        self._prefix = f"{prefix}{{limits}}:"
        self._call_slots = asyncio.Semaphore(MAX_CONNECTIONS)
        self._client: Redis | RedisCluster | None = None  # selected by the first command
        try:
            self._server_client = Redis.from_url(url, **client_options(retries=0))
        except (RedisError, ValueError, TypeError, AttributeError):
            # Without the cause: its text may contain a part of the password.
            raise ValueError("not a URL of a Redis server") from None

    def __repr__(self) -> str:
        return f"<RedisLimitsStore {self._prefix}*>"  # the URL may contain a password

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        if isinstance(self._client, RedisCluster):
            await self._client.aclose()
        await self._server_client.aclose()

    async def reserve(self, request: ReserveRequest) -> Admission:
        keys = [self._reservation_key(request.token), f"{self._prefix}open"]
        arguments = (request.token, request.amount, repr(request.lease))
        return await self._read_states(RESERVE, keys, arguments, request.limits, request.amount)

    async def attach(self, token: str, request_id: str, details: str, lease: float) -> bool:
        keys = [*self._open_keys(token), self._request_key(request_id)]
        arguments = (token, request_id, details, repr(lease))
        return await self._run_script(ATTACH, keys, arguments) == 1

    async def renew(self, token: str, lease: float) -> bool:
        return await self._run_script(RENEW, self._open_keys(token), (token, repr(lease))) == 1

    async def find(self, request_id: str) -> Reservation | None:
        token = await self._execute("GET", self._request_key(request_id))
        return await self._load(text(token)) if isinstance(token, bytes) else None

    async def settle(self, token: str, amount: int) -> bool:
        return await self._run_script(SETTLE, self._open_keys(token), (token, amount)) == 1

    async def release(self, token: str) -> bool:
        return await self.settle(token, 0)

    async def claim_due(self, limit: int, lease: float) -> list[Reservation]:
        reply = await self._run_script(CLAIM_DUE, [f"{self._prefix}open"], (limit, repr(lease)))
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
        script: LimitsScript,
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
        return [self._reservation_key(token), f"{self._prefix}open"]

    def _reservation_key(self, token: str) -> str:
        return f"{self._prefix}reservation:{token}"

    def _request_key(self, request_id: str) -> str:
        return f"{self._prefix}request:{request_id}"

    async def _run_script(
        self, script: LimitsScript, keys: Sequence[str], arguments: Sequence[CommandArgument]
    ) -> object:
        values = (len(keys), *keys, *arguments)
        try:
            return await self._execute("EVALSHA", script.digest, *values)
        except LimitsError as error:
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
            # The type only: the text may contain the server's address.
            raise LimitsError(f"Redis cannot be used ({type(error).__name__})") from error

    async def _connect(self) -> Redis | RedisCluster:
        """Return the client of the server in the URL, or of the cluster that it belongs to."""
        if self._client is None:
            try:
                info = await self._server_client.info("cluster")
            except NoPermissionError:  # without the right to INFO, no cluster is assumed
                info = {}
            self._select_client(info.get("cluster_enabled") == 1)
        return self._client or self._server_client

    def _select_client(self, is_cluster: bool) -> None:
        """Set the client, unless one of concurrent callers has."""
        if self._client is None and is_cluster:
            self._client = RedisCluster.from_url(self._url, **client_options(retries=0))
        elif self._client is None:
            self._client = self._server_client


def client_options(retries: int) -> dict[str, Any]:
    """Return options of a client whose commands are not repeated: a reservation is made once."""
    return {
        "protocol": 2,
        "decode_responses": False,
        "retry": Retry(NoBackoff(), retries),
        "max_connections": MAX_CONNECTIONS + 1,
        "socket_connect_timeout": SOCKET_TIMEOUT,
        "socket_timeout": SOCKET_TIMEOUT,
    }


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
