"""Redis, Valkey or a cluster of them as the cache store of several machines (uses redis-py)."""

import asyncio
import json
import logging
import re
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import asdict
from typing import Self, TypeVar
from urllib.parse import quote

from redis.asyncio import Redis, RedisCluster
from redis.asyncio.client import PubSub
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import NoPermissionError, NoScriptError, RedisClusterException, RedisError

from falproxy.stores.cache import (
    GRACE_PERIOD,
    JOB_RETENTION,
    OWNER_RETENTION,
    VIRTUAL_ID_RETENTION,
    AcquireRequest,
    CachedResult,
    Job,
    Lookup,
    RejectedResultError,
    RequestOwner,
    StoreError,
    StoreStats,
    VirtualRequest,
)
from falproxy.stores.cache.redis_scripts import (
    ACQUIRE,
    ADD_HOLDER,
    FINISH,
    GET,
    RECORD_JOB,
    REMOVE_HOLDER,
    RENEW_LEASE,
    Script,
    parse_lookup,
    parse_virtual_request,
    serialize_virtual_request,
)
from falproxy.stores.cache.watchers import Watchers

logger = logging.getLogger(__name__)

MAX_CONNECTIONS = 32  # to one server; also the maximum of concurrent commands
# All times are seconds.
SOCKET_TIMEOUT = 2.0  # of a connect, a write, and a read
CALL_TIMEOUT = 3.0  # of a command, with the connect and the wait for a connection
PUBSUB_IDLE_TIMEOUT = 5.0  # until an idle subscription is checked with a PING
RECONNECT_DELAY_MIN, RECONNECT_DELAY_MAX = 0.05, 5.0
JOBLESS_RETENTION = 60.0  # of a shared call without a job, after its lease
SCAN_BATCH_SIZE = 500  # keys

REDIS_ERRORS = (RedisError, RedisClusterException, OSError, ValueError)
CommandArgument = str | bytes | int | float
RedisClient = TypeVar("RedisClient", Redis, RedisCluster)


class RedisStore:
    """A `CacheStore` in Redis.

    prefix: prefix of all keys, and of the channel on which changes are published.
    Raises: ValueError, not the URL of a Redis server.
    """

    is_remote = True

    def __init__(self, url: str, *, prefix: str = "falproxy:") -> None:
        self._url = url
        self._prefix = prefix
        self._channel = f"{prefix}changes"
        self._call_slots = asyncio.Semaphore(MAX_CONNECTIONS)
        self._probe_slot = asyncio.Semaphore(1)  # a probe does not wait for other commands
        self._watchers = Watchers()
        self._listen_task: asyncio.Task[None] | None = None
        self._client: Redis | RedisCluster | None = None  # selected by the first command
        try:
            self._server_client = create_client(Redis, url, retries=0)
            pool = self._server_client.connection_pool
            pool.connection_class(**pool.connection_kwargs)  # checks the options in the URL
        except (RedisError, ValueError, TypeError, AttributeError):
            # Without the cause: its text may contain a part of the password.
            raise ValueError("not a URL of a Redis server") from None

    def __repr__(self) -> str:
        return f"<RedisStore {self._prefix}*>"  # the URL may contain a password

    async def __aenter__(self) -> Self:
        self._listen_task = asyncio.get_running_loop().create_task(self._listen())
        self._listen_task.add_done_callback(log_task_error)
        return self

    async def __aexit__(self, *error: object) -> None:
        while self._listen_task is not None and not self._listen_task.done():
            self._listen_task.cancel()  # again: while it connects, redis-py may swallow it
            await asyncio.wait([self._listen_task], timeout=0.1)
        if isinstance(self._client, RedisCluster):
            await self._client.aclose()
        await self._server_client.aclose()

    async def probe(self) -> None:
        await self._execute("SET", f"{self._prefix}probe", b"", "PX", 1000, slots=self._probe_slot)

    async def get(self, key: str) -> Lookup:
        return parse_lookup(await self._run_script(GET, key))

    async def acquire(self, key: str, request: AcquireRequest) -> Lookup:
        retentions = (JOBLESS_RETENTION, JOB_RETENTION)
        wanted = (request.owner_token, request.lease, int(request.is_run), request.min_stored_at)
        return parse_lookup(await self._run_script(ACQUIRE, key, *wanted, *retentions))

    async def record_job(self, key: str, owner_token: str, job: Job) -> bool:
        fields = (job.request_id, job.app, job.key_mark, JOB_RETENTION)
        arguments = (owner_token, self._channel, key, *fields)
        return await self._run_script(RECORD_JOB, key, *arguments) == 1

    async def renew_lease(self, key: str, owner_token: str, lease: float) -> bool:
        retentions = (JOBLESS_RETENTION, JOB_RETENTION)
        arguments = (owner_token, self._channel, key, lease, *retentions)
        return await self._run_script(RENEW_LEASE, key, *arguments) == 1

    async def finish(self, key: str, owner_token: str, result: CachedResult | None) -> None:
        fields: tuple[CommandArgument, ...] = ()
        if result is not None:
            delete_at = int((result.expires_at + GRACE_PERIOD) * 1000)
            times = (repr(result.stored_at), repr(result.expires_at), delete_at)
            fields = (result.body, result.content_type, *times)
        try:
            await self._run_script(FINISH, key, owner_token, self._channel, key, *fields)
        except StoreError as error:
            if not fields:
                raise
            await self._run_script(FINISH, key, owner_token, self._channel, key)
            raise RejectedResultError("Redis did not store a result") from error

    async def put_virtual_request(
        self,
        request_id: str,
        virtual_request: VirtualRequest,
        retention: float = VIRTUAL_ID_RETENTION,
    ) -> None:
        name = self._virtual_request_key(request_id)
        value = serialize_virtual_request(virtual_request)
        await self._execute("SET", name, value, "PX", int(retention * 1000))

    async def get_virtual_request(self, request_id: str) -> VirtualRequest | None:
        value = await self._execute("GET", self._virtual_request_key(request_id))
        return parse_virtual_request(value) if isinstance(value, bytes) else None

    async def put_owner(self, request_id: str, request_owner: RequestOwner) -> None:
        value = json.dumps(asdict(request_owner))
        milliseconds = int(OWNER_RETENTION * 1000)
        await self._execute("SET", self._owner_key(request_id), value, "NX", "PX", milliseconds)

    async def get_owner(self, request_id: str) -> RequestOwner | None:
        value = await self._execute("GET", self._owner_key(request_id))
        if isinstance(value, bytes):
            return RequestOwner(**json.loads(value))
        # Earlier versions stored an owner as a virtual request. It expires after 30 days.
        virtual_request = await self.get_virtual_request(f"submission:{request_id}")
        if virtual_request is None or virtual_request.job is None:
            return None
        return RequestOwner(virtual_request.owner, virtual_request.job.key_mark)

    async def add_holder(self, key: str, job_id: str, holder: str) -> bool:
        return await self._run_script(ADD_HOLDER, key, job_id, holder) == 1

    async def remove_holder(self, key: str, job_id: str, holder: str) -> bool | None:
        reply = await self._run_script(REMOVE_HOLDER, key, job_id, holder, self._channel, key)
        return None if reply == 2 else reply == 1

    @contextmanager
    def watch(self, key: str) -> Iterator[asyncio.Event]:
        with self._watchers.watch(key) as event:
            yield event

    async def stats(self) -> StoreStats:
        size = results = 0
        async with aclosing(self._scan_keys("{*}:result")) as batches:
            async for names in batches:
                lengths = (self._execute("HSTRLEN", name, "body") for name in names)
                sizes = await asyncio.gather(*lengths)
                results += len(names)
                size += sum(size for size in sizes if isinstance(size, int))
        flights = [len(names) async for names in self._scan_keys("{*}:flight")]
        virtual_ids = [len(names) async for names in self._scan_keys("claim:*")]
        return StoreStats(results, size, sum(flights), sum(virtual_ids))

    async def clear(self) -> int:
        count = 0
        async with aclosing(self._scan_keys("{*}:result")) as batches:
            async for names in batches:
                replies = await asyncio.gather(*(self._execute("DEL", name) for name in names))
                count += replies.count(1)
        return count

    def _virtual_request_key(self, request_id: str) -> str:
        # An earlier name of a virtual request; proxies of several versions share the keys.
        return f"{self._prefix}claim:{request_id}"

    def _owner_key(self, request_id: str) -> str:
        return f"{self._prefix}owner:{request_id}"

    async def _scan_keys(self, pattern: str) -> AsyncGenerator[list[bytes], None]:
        """Yield batches of the keys that match a pattern below the prefix, on all servers, each key
        once."""
        seen: set[bytes] = set()
        match = re.sub(r"([*?\[\]\\])", r"\\\1", self._prefix) + pattern
        batch: list[bytes] = []
        try:
            client = await self._connect()
            async for name in client.scan_iter(match=match, count=SCAN_BATCH_SIZE):
                if name not in seen:
                    seen.add(name)
                    batch.append(name)
                if len(batch) >= SCAN_BATCH_SIZE:
                    yield batch
                    batch = []
        except REDIS_ERRORS as error:
            raise store_error(error) from error
        yield batch

    async def _run_script(self, script: Script, key: str, *arguments: CommandArgument) -> object:
        """Run a script on the result and the shared call of a cache key. The braces (hash tag) put
        both into one slot of a cluster."""
        name = f"{self._prefix}{{{quote(key, safe='')}}}"
        parameters = (2, f"{name}:result", f"{name}:flight", *arguments)
        try:
            return await self._execute("EVALSHA", script.digest, *parameters)
        except StoreError as error:
            if not isinstance(error.__cause__, NoScriptError):
                raise
        return await self._execute("EVAL", script.text, *parameters)

    async def _execute(
        self, *command: CommandArgument, slots: asyncio.Semaphore | None = None
    ) -> object:
        try:
            async with asyncio.timeout(CALL_TIMEOUT), slots or self._call_slots:
                client = await self._connect()
                reply: object = await client.execute_command(*command)
                return reply
        except REDIS_ERRORS as error:
            raise store_error(error) from error

    async def _connect(self) -> Redis | RedisCluster:
        """Return the client of the server in the URL, or of the cluster that it belongs to."""
        if self._client is not None:
            return self._client
        try:
            info = await self._server_client.info("cluster")
        except NoPermissionError:  # without the right to INFO, no cluster is assumed
            info = {}
        return self._select_client(info.get("cluster_enabled") == 1)

    def _select_client(self, is_cluster: bool) -> Redis | RedisCluster:
        """Return the client, created by the first of concurrent callers."""
        if self._client is None and is_cluster:
            self._client = create_client(RedisCluster, self._url, retries=1)
        elif self._client is None:
            self._client = self._server_client
        return self._client

    async def _listen(self) -> None:
        """Notify watchers of published changes; reconnect with exponential backoff."""
        delay = RECONNECT_DELAY_MIN
        while True:
            try:
                async with self._server_client.pubsub() as subscription:
                    await subscription.subscribe(self._channel)
                    async for message in read_messages(subscription):
                        delay = RECONNECT_DELAY_MIN
                        self._on_message(message)
            except REDIS_ERRORS as error:
                logger.info("Redis subscription lost (%s)", type(error).__name__)
            await asyncio.sleep(delay)
            delay = min(2 * delay, RECONNECT_DELAY_MAX)

    def _on_message(self, message: dict[str, object]) -> None:
        if message["type"] == "subscribe":  # earlier changes may have been missed
            self._watchers.notify_all()
        elif message["type"] == "message" and isinstance(message["data"], bytes):
            self._watchers.notify(message["data"].decode())


def create_client(client_class: type[RedisClient], url: str, retries: int) -> RedisClient:
    """Create a client. All commands of the store can be repeated.

    retries: 1 for a cluster, whose idle connections are not checked before use and may have been
        closed meanwhile.
    """
    return client_class.from_url(
        url,
        protocol=2,
        decode_responses=False,
        retry=Retry(NoBackoff(), retries),
        max_connections=MAX_CONNECTIONS + 2,  # one listens, one probes
        socket_connect_timeout=SOCKET_TIMEOUT,
        socket_timeout=SOCKET_TIMEOUT,
    )


async def read_messages(subscription: PubSub) -> AsyncGenerator[dict[str, object], None]:
    """Yield the messages of a subscription.

    Raises: TimeoutError, the server does not respond to a PING any more.
    """
    is_ping_sent = False
    while True:
        message = await subscription.get_message(timeout=PUBSUB_IDLE_TIMEOUT)
        if message is not None:
            is_ping_sent = False
            yield message
        elif is_ping_sent:
            raise TimeoutError
        else:
            await subscription.ping()
            is_ping_sent = True


def log_task_error(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and task.exception() is not None:
        logger.error("The Redis subscription has ended", exc_info=task.exception())


def store_error(error: Exception) -> StoreError:
    """Return a StoreError with the error's type only: its text may contain the server's address."""
    return StoreError(f"Redis cannot be used ({type(error).__name__})")
