"""Commands and scripts for Redis, Valkey or a cluster of them (uses redis-py)."""

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Sequence
from contextlib import asynccontextmanager, nullcontext
from functools import cache
from hashlib import sha1
from typing import Any, TypeVar

import redis
from redis.asyncio import Redis, RedisCluster
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import NoPermissionError, NoScriptError, RedisClusterException, RedisError

from falproxy.concurrency import ResponsiveTimeout, cancel_tasks, close_within
from falproxy.spans import client_span
from falproxy.stores.operation_groups import Failure, OperationGroups

logger = logging.getLogger(__name__)

MAX_CONNECTIONS = 32  # to one server; also the maximum of concurrent commands
MAX_GROUPS = 4  # of commands, at the same time
LARGE_ARGUMENT = 64 * 1024  # bytes; a command with a larger one is not sent in a group
# All times are seconds.
CALL_TIMEOUT = 3.0  # of a command, with the connect and the wait for a connection
# Of a connect, a write, and a read, as redis-py measures it: by the clock, so that it also ends if
# the event loop was busy and the reply has arrived. A call to a single server ends by CALL_TIMEOUT;
# one to a cluster continues with another server, so that it needs a shorter one.
SOCKET_TIMEOUT, CLUSTER_SOCKET_TIMEOUT = 30.0, 2.0

# RuntimeError: of uvloop, for a connection that was closed just before a write.
REDIS_ERRORS = (RedisError, RedisClusterException, OSError, ValueError, RuntimeError)
CommandArgument = str | bytes | int | float
Command = tuple[CommandArgument, ...]
ClientT = TypeVar("ClientT", Redis, RedisCluster)
T = TypeVar("T")


class Script:
    """A Lua script and its SHA-1, by which Redis finds it."""

    def __init__(self, *parts: str) -> None:
        self.text = "\n".join(parts)
        self.digest = sha1(self.text.encode(), usedforsecurity=False).hexdigest()


class RedisClient:
    """The client of the server in a URL, or of the cluster that the server belongs to.

    Commands to a cluster are sent again after a lost connection, so they must be repeatable.

    error_type: raised for all errors of Redis.
    is_grouped: commands that wait at the same time are sent to a single server in one round trip;
        for stores with small replies.
    has_failed: a command has failed since the connections were opened.
    Raises: ValueError, not the URL of a Redis server.
    """

    def __init__(self, url: str, error_type: type[Exception], *, is_grouped: bool = False) -> None:
        self._url = url
        self._groups: OperationGroups[Command] | None = None
        if is_grouped:
            self._groups = OperationGroups(self._start_group, MAX_GROUPS)
        self._error_type = error_type
        self._timeout = ResponsiveTimeout(CALL_TIMEOUT)
        self._call_slots = asyncio.Semaphore(MAX_CONNECTIONS)
        self._client: Redis | RedisCluster | None = None  # selected by the first command
        self._old_clients: set[Redis | RedisCluster] = set()  # replaced and not closed yet
        self._tasks: set[asyncio.Task[Any]] = set()
        self.has_failed = False
        try:
            self.server_client = create_client(Redis, url, SOCKET_TIMEOUT, retries=0)
            pool = self.server_client.connection_pool
            pool.connection_class(**pool.connection_kwargs)  # checks the options in the URL
        except (RedisError, ValueError, TypeError, AttributeError):
            # Without the cause: its text may contain a part of the password.
            raise ValueError("not a URL of a Redis server") from None

    def __repr__(self) -> str:  # the URL may contain a password
        return f"<RedisClient {'after a failure' if self.has_failed else 'works'}>"

    async def close(self) -> None:
        await cancel_tasks(tuple(self._tasks), interval=0.1)
        clients = {*self._old_clients, self._client, self.server_client}
        await asyncio.gather(*map(close_client, clients))
        self._timeout.close()

    def reconnect(self) -> None:
        """Use new connections from now on: the address may belong to another server now."""
        old_clients = {client for client in (self._client, self.server_client) if client}
        self.server_client = create_client(Redis, self._url, SOCKET_TIMEOUT, retries=0)
        self._client = None
        self.has_failed = False
        self._old_clients |= old_clients
        _ = self._spawn(self._close_later(old_clients))

    async def execute(
        self, *command: CommandArgument, slots: asyncio.Semaphore | None = None
    ) -> object:
        """slots: limits concurrent commands instead of MAX_CONNECTIONS."""
        if self._groups is not None and isinstance(self._client, Redis) and is_small(command):
            with client_span("redis", str(command[0])):
                return await self._execute_in_group(self._groups.add(command))
        async with self._connected(slots, str(command[0])) as client:
            reply: object = await client.execute_command(*command)
            return reply

    async def execute_all(
        self, *commands: tuple[CommandArgument, ...], slots: asyncio.Semaphore | None = None
    ) -> list[object]:
        """Execute commands in one round trip and return their replies."""
        async with self._connected(slots, "PIPELINE") as client:
            pipeline = client.pipeline(transaction=False)
            for command in commands:
                pipeline.execute_command(*command)
            replies: list[object] = await pipeline.execute()
            return replies

    async def _execute_in_group(self, reply: "asyncio.Future[object]") -> object:
        try:
            async with self._timeout.limit():
                return await reply
        except TimeoutError as error:
            self.has_failed = True
            raise self._translate(error) from error

    def _start_group(self, commands: Sequence[Command]) -> "asyncio.Future[Sequence[object]]":
        return self._spawn(self._execute_group(commands))

    async def _execute_group(self, commands: Sequence[Command]) -> Sequence[object]:
        """Return the replies of commands, with a `Failure` for each one that failed."""
        try:
            async with self._connected(None, None) as client:
                pipeline = client.pipeline(transaction=False)
                for command in commands:
                    pipeline.execute_command(*command)
                replies = await pipeline.execute(raise_on_error=False)
        except asyncio.CancelledError:  # by `close`, and not by the callers
            raise self._error_type("Redis cannot be used (closed)") from None
        return [
            self._failure(reply) if isinstance(reply, Exception) else reply for reply in replies
        ]

    def _failure(self, error: Exception) -> Failure:
        self.has_failed |= not isinstance(error, NoScriptError)
        translated = self._translate(error)
        translated.__cause__ = error
        return Failure(translated)

    async def run_script(
        self, script: Script, keys: Sequence[str], arguments: Sequence[CommandArgument]
    ) -> object:
        parameters = (len(keys), *keys, *arguments)
        try:
            return await self.execute("EVALSHA", script.digest, *parameters)
        except self._error_type as error:
            if not isinstance(error.__cause__, NoScriptError):
                raise
        return await self.execute("EVAL", script.text, *parameters)

    async def scan(self, pattern: str, batch_size: int) -> AsyncGenerator[bytes, None]:
        """Yield the keys that match a pattern, on all servers of a cluster; some more than once."""
        try:
            async with self._timeout.limit():
                client = await self._connect()
            names = client.scan_iter(match=pattern, count=batch_size)
            while True:
                async with self._timeout.limit():
                    name = await anext(names, None)
                if name is None:
                    return
                yield name
        except REDIS_ERRORS as error:
            raise self._translate(error) from error

    @asynccontextmanager
    async def _connected(
        self, slots: asyncio.Semaphore | None, operation: str | None
    ) -> AsyncIterator[Redis | RedisCluster]:
        """Context: the client for one command. operation: its name in traces; None for those of
        several calls, which trace them."""
        try:
            with nullcontext() if operation is None else client_span("redis", operation):
                async with self._timeout.limit(), slots or self._call_slots:
                    yield await self._connect()
        except REDIS_ERRORS as error:
            self.has_failed |= not isinstance(error, NoScriptError)
            raise self._translate(error) from error
        except asyncio.CancelledError:
            # A client may leave at any time; a probe is cancelled when there is no reply in time.
            self.has_failed |= slots is not None
            raise

    def _translate(self, error: Exception) -> Exception:
        """Return an error with the type only: the text may contain the server's address."""
        return self._error_type(f"Redis cannot be used ({type(error).__name__})")

    async def _connect(self) -> Redis | RedisCluster:
        """Return the client of the server in the URL, or of the cluster that it belongs to."""
        if self._client is not None:
            return self._client
        try:
            info = await self.server_client.info("cluster")
        except NoPermissionError:  # without the right to INFO, no cluster is assumed
            info = {}
        return self._select_client(is_cluster=info.get("cluster_enabled") == 1)

    def _select_client(self, *, is_cluster: bool) -> Redis | RedisCluster:
        """Return the client, created by the first of concurrent callers."""
        if self._client is None and is_cluster:
            self._client = create_client(RedisCluster, self._url, CLUSTER_SOCKET_TIMEOUT, retries=1)
        elif self._client is None:
            self._client = self.server_client
        return self._client

    def _spawn(self, work: Coroutine[object, object, T]) -> "asyncio.Task[T]":
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _close_later(self, clients: set[Redis | RedisCluster]) -> None:
        """Close clients when none of their commands can be running any more."""
        await asyncio.sleep(CALL_TIMEOUT)
        for client in clients:
            await close_client(client)
        self._old_clients -= clients


def create_client(
    client_class: type[ClientT], url: str, socket_timeout: float, retries: int
) -> ClientT:
    """Create a client.

    socket_timeout: seconds of a connect, a write, and a read.
    retries: 1 for a cluster, whose idle connections are not checked before use and may have been
        closed meanwhile.
    """
    return client_class.from_url(
        url,
        protocol=2,
        decode_responses=False,
        retry=Retry(NoBackoff(), retries),
        max_connections=MAX_CONNECTIONS + 2,  # one listens, one probes
        socket_connect_timeout=socket_timeout,
        socket_timeout=socket_timeout,
        **library_information(),
    )


@cache
def library_information() -> dict[str, Any]:
    """Return the option with the name and version that connections report to the server. Without it
    newer versions of redis-py read files of their package for each connection, in 6 ms."""
    driver_info = getattr(redis, "DriverInfo", None)
    return {} if driver_info is None else {"driver_info": driver_info()}


async def close_client(client: Redis | RedisCluster | None) -> None:
    """Close all connections of a client. Commands that wait for a reply fail."""
    if client is not None:
        await close_within(client.aclose(), "A connection to Redis")


def is_small(command: Command) -> bool:
    return all(
        len(argument) <= LARGE_ARGUMENT for argument in command if isinstance(argument, str | bytes)
    )
