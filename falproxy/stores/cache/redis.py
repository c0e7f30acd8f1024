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
    CLAIM_KEPT,
    GRACE,
    JOB_KEPT,
    Claim,
    Found,
    Job,
    Result,
    Stats,
    StoreError,
    UnfitError,
    Wish,
)
from falproxy.stores.cache.redis_scripts import (
    ACCEPT,
    ACQUIRE,
    FINISH,
    GET,
    JOIN,
    LEAVE,
    RENEW,
    Script,
    read_claim,
    read_found,
    write_claim,
)
from falproxy.stores.cache.watchers import Watchers

logger = logging.getLogger(__name__)

CONNECTIONS = 32  # to one server, and calls that are under way at once
SOCKET_SECONDS = 2.0  # for connecting, writing, and an answer
CALL_SECONDS = 3.0  # for a call with all of it, and the wait for its turn
SILENCE_SECONDS = 5.0  # until the connection that listens is asked whether it lives
FIRST_WAIT, LONGEST_WAIT = 0.05, 5.0  # seconds before connecting again
JOBLESS_KEPT = 60.0  # seconds that a leader who has no job yet is known after its lease
COUNTED_AT_ONCE = 500

FAILURES = (RedisError, RedisClusterException, OSError, ValueError)
Word = str | bytes | int | float
Client = TypeVar("Client", Redis, RedisCluster)


class RedisStore:
    """A `Store` in Redis. prefix: of all keys, and of the channel that tells of changes.

    Raises: ValueError, the URL is none of Redis's.
    """

    is_remote = True

    def __init__(self, url: str, *, prefix: str = "falproxy:") -> None:
        self._url = url
        self._prefix = prefix
        self._channel = f"{prefix}changes"
        self._slots = asyncio.Semaphore(CONNECTIONS)
        self._probes = asyncio.Semaphore(1)  # they wait for nobody else
        self._watchers = Watchers()
        self._listening: asyncio.Task[None] | None = None
        self._client: Redis | RedisCluster | None = None  # None until the server said which
        try:
            self._server = client_of(Redis, url, retries=0)
            pool = self._server.connection_pool
            pool.connection_class(**pool.connection_kwargs)  # it knows which options there are
        except (RedisError, ValueError, TypeError, AttributeError):
            # Without the cause: its text may hold a part of the password.
            raise ValueError("not a URL of a Redis server") from None

    async def __aenter__(self) -> Self:
        self._listening = asyncio.get_running_loop().create_task(self._listen())
        self._listening.add_done_callback(log_failure)
        return self

    async def __aexit__(self, *error: object) -> None:
        while self._listening is not None and not self._listening.done():
            self._listening.cancel()  # which redis-py takes for a failure while it connects
            await asyncio.wait([self._listening], timeout=0.1)
        if isinstance(self._client, RedisCluster):
            await self._client.aclose()
        await self._server.aclose()

    async def probe(self) -> None:
        await self._ask("SET", f"{self._prefix}probe", b"", "PX", 1000, turns=self._probes)

    async def get(self, key: str) -> Found:
        return read_found(await self._run(GET, key))

    async def acquire(self, key: str, wish: Wish) -> Found:
        kept = (JOBLESS_KEPT, JOB_KEPT)
        asked = (wish.token, wish.lease, int(wish.is_run), wish.newer_than)
        return read_found(await self._run(ACQUIRE, key, *asked, *kept))

    async def accept(self, key: str, token: str, job: Job) -> bool:
        given = (job.request_id, job.app, job.key_mark, JOB_KEPT)
        return await self._run(ACCEPT, key, token, self._channel, key, *given) == 1

    async def renew(self, key: str, token: str, lease: float) -> bool:
        kept = (JOBLESS_KEPT, JOB_KEPT)
        return await self._run(RENEW, key, token, self._channel, key, lease, *kept) == 1

    async def finish(self, key: str, token: str, result: Result | None) -> None:
        kept: tuple[Word, ...] = ()
        if result is not None:
            gone_at = int((result.expires_at + GRACE) * 1000)
            times = (repr(result.stored_at), repr(result.expires_at), gone_at)
            kept = (result.body, result.content_type, *times)
        try:
            await self._run(FINISH, key, token, self._channel, key, *kept)
        except StoreError as error:
            if not kept:
                raise
            await self._run(FINISH, key, token, self._channel, key)
            raise UnfitError("Redis did not take a result") from error

    async def put_claim(self, request_id: str, claim: Claim, kept: float = CLAIM_KEPT) -> None:
        name = self._claim_name(request_id)
        await self._ask("SET", name, write_claim(claim), "PX", int(kept * 1000))

    async def get_claim(self, request_id: str) -> Claim | None:
        text = await self._ask("GET", self._claim_name(request_id))
        return read_claim(text) if isinstance(text, bytes) else None

    async def join(self, key: str, job_id: str, holder: str) -> bool:
        return await self._run(JOIN, key, job_id, holder) == 1

    async def leave(self, key: str, job_id: str, holder: str) -> bool | None:
        left = await self._run(LEAVE, key, job_id, holder, self._channel, key)
        return None if left == 2 else left == 1

    @contextmanager
    def watch(self, key: str) -> Iterator[asyncio.Event]:
        with self._watchers.watch(key) as event:
            yield event

    async def stats(self) -> Stats:
        size = results = 0
        async with aclosing(self._names("{*}:result")) as names:
            async for some in names:
                sizes = await asyncio.gather(*(self._ask("HSTRLEN", n, "body") for n in some))
                results += len(some)
                size += sum(size for size in sizes if isinstance(size, int))
        flights = [len(some) async for some in self._names("{*}:flight")]
        claims = [len(some) async for some in self._names("claim:*")]
        return Stats(results, size, sum(flights), sum(claims))

    async def clear(self) -> int:
        cleared = 0
        async with aclosing(self._names("{*}:result")) as names:
            async for some in names:
                gone = await asyncio.gather(*(self._ask("DEL", name) for name in some))
                cleared += gone.count(1)
        return cleared

    def _claim_name(self, request_id: str) -> str:
        return f"{self._prefix}claim:{request_id}"

    async def _names(self, pattern: str) -> AsyncGenerator[list[bytes], None]:
        """Names of keys below the prefix, over all servers, some at once and none twice."""
        seen: set[bytes] = set()
        match = re.sub(r"([*?\[\]\\])", r"\\\1", self._prefix) + pattern
        some: list[bytes] = []
        try:
            client = await self._connected()
            async for name in client.scan_iter(match=match, count=COUNTED_AT_ONCE):
                if name not in seen:
                    seen.add(name)
                    some.append(name)
                if len(some) >= COUNTED_AT_ONCE:
                    yield some
                    some = []
        except FAILURES as error:
            raise unusable(error) from error
        yield some

    async def _run(self, script: Script, key: str, *given: Word) -> object:
        """What a script says about a cache key, whose own keys are in one slot of a cluster."""
        name = f"{self._prefix}{{{quote(key, safe='')}}}"
        words = (2, f"{name}:result", f"{name}:flight", *given)
        try:
            return await self._ask("EVALSHA", script.digest, *words)
        except StoreError as error:
            if not isinstance(error.__cause__, NoScriptError):
                raise
        return await self._ask("EVAL", script.text, *words)

    async def _ask(self, *command: Word, turns: asyncio.Semaphore | None = None) -> object:
        try:
            async with asyncio.timeout(CALL_SECONDS), turns or self._slots:
                client = await self._connected()
                answer: object = await client.execute_command(*command)
                return answer
        except FAILURES as error:
            raise unusable(error) from error

    async def _connected(self) -> Redis | RedisCluster:
        """What to ask: the server of the URL, or the cluster that it says it belongs to."""
        if self._client is not None:
            return self._client
        try:
            about = await self._server.info("cluster")
        except NoPermissionError:  # who may not ask is taken to be in none
            about = {}
        return self._chosen(about.get("cluster_enabled") == 1)

    def _chosen(self, is_cluster: bool) -> Redis | RedisCluster:
        """Made by the first of those who asked at once."""
        if self._client is None and is_cluster:
            self._client = client_of(RedisCluster, self._url, retries=1)
        elif self._client is None:
            self._client = self._server
        return self._client

    async def _listen(self) -> None:
        """Tells watchers of changes, over one connection that is made anew when it is lost."""
        wait = FIRST_WAIT
        while True:
            try:
                async with self._server.pubsub() as subscription:
                    await subscription.subscribe(self._channel)
                    async for message in messages(subscription):
                        wait = FIRST_WAIT
                        self._hear(message)
            except FAILURES as error:
                logger.info("no news of other processes (%s)", type(error).__name__)
            await asyncio.sleep(wait)
            wait = min(2 * wait, LONGEST_WAIT)

    def _hear(self, message: dict[str, object]) -> None:
        if message["type"] == "subscribe":  # what happened before was not heard
            self._watchers.tell_all()
        elif message["type"] == "message" and isinstance(message["data"], bytes):
            self._watchers.tell(message["data"].decode())


def client_of(kind: type[Client], url: str, retries: int) -> Client:
    """retries: one where connections are not looked at before they are used, as in a cluster,
    and may have been closed meanwhile. Every command may be sent again."""
    return kind.from_url(
        url,
        protocol=2,
        decode_responses=False,
        retry=Retry(NoBackoff(), retries),
        max_connections=CONNECTIONS + 2,  # one listens, one probes
        socket_connect_timeout=SOCKET_SECONDS,
        socket_timeout=SOCKET_SECONDS,
    )


async def messages(subscription: PubSub) -> AsyncGenerator[dict[str, object], None]:
    """What a subscription says. Raises: TimeoutError, its server does not answer any more."""
    is_asked = False
    while True:
        message = await subscription.get_message(timeout=SILENCE_SECONDS)
        if message is not None:
            is_asked = False
            yield message
        elif is_asked:
            raise TimeoutError
        else:
            await subscription.ping()
            is_asked = True


def log_failure(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and task.exception() is not None:
        logger.error("nobody listens to other processes", exc_info=task.exception())


def unusable(error: Exception) -> StoreError:
    """Says what kind of error it was only: the text of one may name the server."""
    return StoreError(f"Redis cannot be used ({type(error).__name__})")
