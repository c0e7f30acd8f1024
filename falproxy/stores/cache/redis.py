"""The store of several machines: Redis, Valkey or a cluster of them. Alone imports redis-py."""

import asyncio
import logging
import re
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, contextmanager
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
    VIRTUAL_ID_RETENTION,
    AcquireRequest,
    CachedResult,
    Job,
    Lookup,
    RejectedResultError,
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

MAX_CONNECTIONS = 32  # to one server, and calls that are under way at once
SOCKET_TIMEOUT = 2.0  # for connecting, writing, and an answer
CALL_TIMEOUT = 3.0  # for a call with all of it, and the wait for its turn
PUBSUB_IDLE_TIMEOUT = 5.0  # until the connection that listens is asked whether it lives
RECONNECT_DELAY_MIN, RECONNECT_DELAY_MAX = 0.05, 5.0  # seconds before connecting again
JOBLESS_RETENTION = 60.0  # seconds that a leader who has no job yet is known after its lease
SCAN_BATCH_SIZE = 500

REDIS_ERRORS = (RedisError, RedisClusterException, OSError, ValueError)
CommandArgument = str | bytes | int | float
RedisClient = TypeVar("RedisClient", Redis, RedisCluster)


class RedisStore:
    """A `Store` in Redis. prefix: of all keys, and of the channel that tells of changes.

    Raises: ValueError, the URL is none of Redis's.
    """

    is_remote = True

    def __init__(self, url: str, *, prefix: str = "falproxy:") -> None:
        self._url = url
        self._prefix = prefix
        self._channel = f"{prefix}changes"
        self._call_slots = asyncio.Semaphore(MAX_CONNECTIONS)
        self._probe_slot = asyncio.Semaphore(1)  # they wait for nobody else
        self._watchers = Watchers()
        self._listen_task: asyncio.Task[None] | None = None
        self._client: Redis | RedisCluster | None = None  # None until the server said which
        try:
            self._server_client = create_client(Redis, url, retries=0)
            pool = self._server_client.connection_pool
            pool.connection_class(**pool.connection_kwargs)  # it knows which options there are
        except (RedisError, ValueError, TypeError, AttributeError):
            # Without the cause: its text may hold a part of the password.
            raise ValueError("not a URL of a Redis server") from None

    async def __aenter__(self) -> Self:
        self._listen_task = asyncio.get_running_loop().create_task(self._listen())
        self._listen_task.add_done_callback(log_task_error)
        return self

    async def __aexit__(self, *error: object) -> None:
        while self._listen_task is not None and not self._listen_task.done():
            self._listen_task.cancel()  # which redis-py takes for a failure while it connects
            await asyncio.wait([self._listen_task], timeout=0.1)
        if isinstance(self._client, RedisCluster):
            await self._client.aclose()
        await self._server_client.aclose()

    async def probe(self) -> None:
        await self._execute("SET", f"{self._prefix}probe", b"", "PX", 1000, slots=self._probe_slot)

    async def get(self, key: str) -> Lookup:
        return parse_lookup(await self._run_script(GET, key))

    async def acquire(self, key: str, request: AcquireRequest) -> Lookup:
        kept = (JOBLESS_RETENTION, JOB_RETENTION)
        asked = (request.owner_token, request.lease, int(request.is_run), request.min_stored_at)
        return parse_lookup(await self._run_script(ACQUIRE, key, *asked, *kept))

    async def record_job(self, key: str, owner_token: str, job: Job) -> bool:
        given = (job.request_id, job.app, job.key_mark, JOB_RETENTION)
        return await self._run_script(RECORD_JOB, key, owner_token, self._channel, key, *given) == 1

    async def renew_lease(self, key: str, owner_token: str, lease: float) -> bool:
        kept = (JOBLESS_RETENTION, JOB_RETENTION)
        return (
            await self._run_script(RENEW_LEASE, key, owner_token, self._channel, key, lease, *kept)
            == 1
        )

    async def finish(self, key: str, owner_token: str, result: CachedResult | None) -> None:
        kept: tuple[CommandArgument, ...] = ()
        if result is not None:
            gone_at = int((result.expires_at + GRACE_PERIOD) * 1000)
            times = (repr(result.stored_at), repr(result.expires_at), gone_at)
            kept = (result.body, result.content_type, *times)
        try:
            await self._run_script(FINISH, key, owner_token, self._channel, key, *kept)
        except StoreError as error:
            if not kept:
                raise
            await self._run_script(FINISH, key, owner_token, self._channel, key)
            raise RejectedResultError("Redis did not take a result") from error

    async def put_virtual_request(
        self,
        request_id: str,
        virtual_request: VirtualRequest,
        retention: float = VIRTUAL_ID_RETENTION,
    ) -> None:
        name = self._virtual_request_key(request_id)
        await self._execute(
            "SET", name, serialize_virtual_request(virtual_request), "PX", int(retention * 1000)
        )

    async def get_virtual_request(self, request_id: str) -> VirtualRequest | None:
        text = await self._execute("GET", self._virtual_request_key(request_id))
        return parse_virtual_request(text) if isinstance(text, bytes) else None

    async def add_holder(self, key: str, job_id: str, holder: str) -> bool:
        return await self._run_script(ADD_HOLDER, key, job_id, holder) == 1

    async def remove_holder(self, key: str, job_id: str, holder: str) -> bool | None:
        left = await self._run_script(REMOVE_HOLDER, key, job_id, holder, self._channel, key)
        return None if left == 2 else left == 1

    @contextmanager
    def watch(self, key: str) -> Iterator[asyncio.Event]:
        with self._watchers.watch(key) as event:
            yield event

    async def stats(self) -> StoreStats:
        size = results = 0
        async with aclosing(self._scan_keys("{*}:result")) as names:
            async for some in names:
                sizes = await asyncio.gather(*(self._execute("HSTRLEN", n, "body") for n in some))
                results += len(some)
                size += sum(size for size in sizes if isinstance(size, int))
        flights = [len(some) async for some in self._scan_keys("{*}:flight")]
        claims = [len(some) async for some in self._scan_keys("claim:*")]
        return StoreStats(results, size, sum(flights), sum(claims))

    async def clear(self) -> int:
        cleared = 0
        async with aclosing(self._scan_keys("{*}:result")) as names:
            async for some in names:
                gone = await asyncio.gather(*(self._execute("DEL", name) for name in some))
                cleared += gone.count(1)
        return cleared

    def _virtual_request_key(self, request_id: str) -> str:
        return f"{self._prefix}claim:{request_id}"

    async def _scan_keys(self, pattern: str) -> AsyncGenerator[list[bytes], None]:
        """Names of keys below the prefix, over all servers, some at once and none twice."""
        seen: set[bytes] = set()
        match = re.sub(r"([*?\[\]\\])", r"\\\1", self._prefix) + pattern
        some: list[bytes] = []
        try:
            client = await self._connect()
            async for name in client.scan_iter(match=match, count=SCAN_BATCH_SIZE):
                if name not in seen:
                    seen.add(name)
                    some.append(name)
                if len(some) >= SCAN_BATCH_SIZE:
                    yield some
                    some = []
        except REDIS_ERRORS as error:
            raise store_error(error) from error
        yield some

    async def _run_script(self, script: Script, key: str, *arguments: CommandArgument) -> object:
        """What a script says about a cache key, whose own keys are in one slot of a cluster."""
        name = f"{self._prefix}{{{quote(key, safe='')}}}"
        words = (2, f"{name}:result", f"{name}:flight", *arguments)
        try:
            return await self._execute("EVALSHA", script.digest, *words)
        except StoreError as error:
            if not isinstance(error.__cause__, NoScriptError):
                raise
        return await self._execute("EVAL", script.text, *words)

    async def _execute(
        self, *command: CommandArgument, slots: asyncio.Semaphore | None = None
    ) -> object:
        try:
            async with asyncio.timeout(CALL_TIMEOUT), slots or self._call_slots:
                client = await self._connect()
                answer: object = await client.execute_command(*command)
                return answer
        except REDIS_ERRORS as error:
            raise store_error(error) from error

    async def _connect(self) -> Redis | RedisCluster:
        """What to ask: the server of the URL, or the cluster that it says it belongs to."""
        if self._client is not None:
            return self._client
        try:
            about = await self._server_client.info("cluster")
        except NoPermissionError:  # who may not ask is taken to be in none
            about = {}
        return self._select_client(about.get("cluster_enabled") == 1)

    def _select_client(self, is_cluster: bool) -> Redis | RedisCluster:
        """Made by the first of those who asked at once."""
        if self._client is None and is_cluster:
            self._client = create_client(RedisCluster, self._url, retries=1)
        elif self._client is None:
            self._client = self._server_client
        return self._client

    async def _listen(self) -> None:
        """Tells watchers of changes, over one connection that is made anew when it is lost."""
        wait = RECONNECT_DELAY_MIN
        while True:
            try:
                async with self._server_client.pubsub() as subscription:
                    await subscription.subscribe(self._channel)
                    async for message in read_messages(subscription):
                        wait = RECONNECT_DELAY_MIN
                        self._on_message(message)
            except REDIS_ERRORS as error:
                logger.info("no news of other processes (%s)", type(error).__name__)
            await asyncio.sleep(wait)
            wait = min(2 * wait, RECONNECT_DELAY_MAX)

    def _on_message(self, message: dict[str, object]) -> None:
        if message["type"] == "subscribe":  # what happened before was not heard
            self._watchers.notify_all()
        elif message["type"] == "message" and isinstance(message["data"], bytes):
            self._watchers.notify(message["data"].decode())


def create_client(client_class: type[RedisClient], url: str, retries: int) -> RedisClient:
    """retries: one where connections are not looked at before they are used, as in a cluster,
    and may have been closed meanwhile. Every command may be sent again."""
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
    """What a subscription says. Raises: TimeoutError, its server does not answer any more."""
    is_asked = False
    while True:
        message = await subscription.get_message(timeout=PUBSUB_IDLE_TIMEOUT)
        if message is not None:
            is_asked = False
            yield message
        elif is_asked:
            raise TimeoutError
        else:
            await subscription.ping()
            is_asked = True


def log_task_error(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and task.exception() is not None:
        logger.error("nobody listens to other processes", exc_info=task.exception())


def store_error(error: Exception) -> StoreError:
    """Says what kind of error it was only: the text of one may name the server."""
    return StoreError(f"Redis cannot be used ({type(error).__name__})")
