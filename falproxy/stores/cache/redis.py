"""Redis, Valkey or a cluster of them as the cache store of several machines (uses redis-py)."""

import asyncio
import json
import logging
import re
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator
from contextlib import aclosing, contextmanager, suppress
from dataclasses import asdict
from typing import Self
from urllib.parse import quote
from uuid import uuid4

from redis.asyncio import Redis

from falproxy.concurrency import cancel_tasks
from falproxy.json_object import known_fields
from falproxy.stores.cache import (
    GRACE_PERIOD,
    JOB_RETENTION,
    OUTCOME_RETENTION,
    OWNER_RETENTION,
    VIRTUAL_ID_RETENTION,
    AcquireRequest,
    CachedResult,
    Job,
    Lookup,
    RejectedResultError,
    RequestOwner,
    SharedOutcome,
    StoreContent,
    StoreError,
    StoreStats,
    VirtualRequest,
)
from falproxy.stores.cache.redis_messages import read_messages
from falproxy.stores.cache.redis_scripts import (
    ACQUIRE,
    ADD_HOLDER,
    FINISH,
    GET,
    RECORD_JOB,
    REMOVE_HOLDER,
    RENEW_LEASE,
    REPORT_PROCESS,
    parse_lookup,
    parse_virtual_request,
    serialize_virtual_request,
)
from falproxy.stores.cache.watchers import Watchers
from falproxy.stores.redis_client import REDIS_ERRORS, CommandArgument, RedisClient, Script

logger = logging.getLogger(__name__)

# All times are seconds.
RECONNECT_DELAY_MIN, RECONNECT_DELAY_MAX = 0.05, 5.0
# Seconds after which a process that does not report has ended, with what it held in memory.
SILENCE_SECONDS = 60
LEAVE_TIMEOUT = 1.0
PROBE_RETRY = 5.0  # until the policy of a server that was down is checked again
JOBLESS_RETENTION = 60.0  # of a shared call without a job, after its lease
# Seconds in which processes that start now do not report an id as unknown, after the server was
# emptied: others may restore theirs.
NEW_CONTENT_SECONDS = 1.5
EXPIRY_INTERVAL = 600.0  # between two deletions of expired ids
# Ids that live longer have no time to live: a full server evicts keys that have one.
EVICTABLE_RETENTION_MAX = 3600.0
# Version of the keys and values, and the oldest version that works with them. Nodes of two versions
# share a server during an upgrade, so fields are added and keys get no other meaning: parsers skip
# what they do not know.
FORMAT_VERSION, FORMAT_MIN_READER = 1, 1
SCAN_BATCH_SIZE = 500  # keys
# Policies for a full server, by the setting `maxmemory-policy`, that delete more than results.
UNSAFE_POLICIES = ("allkeys-lru", "allkeys-lfu", "allkeys-lrm", "allkeys-random", "volatile-ttl",
                   "volatile-random")  # fmt: skip


class RedisStore:
    """A `CacheStore` in Redis.

    Owners and virtual requests have no time to live, so that the policies `volatile-*` evict
    results only. A sorted set has their expiry, and each process deletes those that have expired.

    prefix: prefix of all keys, and of the channel on which changes are published.
    owner_retention: seconds for which an owner is stored.
    Raises: ValueError, not the URL of a Redis server.
    """

    is_remote = True

    def __init__(
        self, url: str, *, prefix: str = "falproxy:", owner_retention: float = OWNER_RETENTION
    ) -> None:
        self._redis = RedisClient(url, StoreError)
        self.has_unwritten: Callable[[], bool] = lambda: False
        self._process_id = uuid4().hex
        self._prefix = prefix
        self._owner_retention = owner_retention
        self._channel = f"{prefix}changes"
        self._probe_slot = asyncio.Semaphore(1)  # a probe does not wait for other commands
        self._watchers = Watchers()
        self._tasks: set[asyncio.Task[None]] = set()
        self._listen_task: asyncio.Task[None] | None = None
        self._is_policy_checked = False

    def __repr__(self) -> str:
        return f"<RedisStore {self._prefix}*>"  # the URL may contain a password

    async def __aenter__(self) -> Self:
        self._start_listening()
        _ = self._spawn(self._expire_loop())
        return self

    async def __aexit__(self, *error: object) -> None:
        await cancel_tasks(tuple(self._tasks), interval=0.1)
        if not self.has_unwritten() and not self._redis.has_failed:
            with suppress(StoreError, TimeoutError):
                async with asyncio.timeout(LEAVE_TIMEOUT):
                    await self._redis.execute("ZREM", self._processes, self._process_id)
        await self._redis.close()

    async def probe(self) -> StoreContent:
        if self._redis.has_failed:
            self._redis.reconnect()
        commands = (
            ("SET", f"{self._prefix}probe", b"", "PX", 1000),
            ("GET", f"{self._prefix}probe:content"),
            ("EXISTS", f"{self._prefix}probe:new"),
            ("GET", f"{self._prefix}probe:format"),
            (
                *("EVAL", REPORT_PROCESS.text, 1, self._processes, self._process_id),
                *(int(not self.has_unwritten()), SILENCE_SECONDS),
            ),
        )
        replies = await self._redis.execute_all(*commands, slots=self._probe_slot)
        _, content, is_new, data_format, complete_age = replies
        self._listen_to_current_client()
        await self._check_format(data_format)
        if isinstance(content, bytes):
            age = float(complete_age) if isinstance(complete_age, bytes) else 0.0
            return StoreContent(content.decode(), is_new == 1, age)
        return await self._mark_content()

    @property
    def _processes(self) -> str:
        return f"{self._prefix}probe:processes"

    async def _check_format(self, stored: object) -> None:
        """Compare the version of the data with this one's, and raise it if it is older.

        Raises: StoreError, this version cannot work with the data.
        """
        text = stored.decode() if isinstance(stored, bytes) else "0 0"
        version, min_reader = map(int, text.split()[:2])
        if version < FORMAT_VERSION:
            value = f"{FORMAT_VERSION} {FORMAT_MIN_READER}"
            name = f"{self._prefix}probe:format"
            options = ("PX", int(OWNER_RETENTION * 1000))  # as long as the data
            await self._redis.execute("SET", name, value, *options, slots=self._probe_slot)
        elif version > FORMAT_VERSION and min_reader > FORMAT_VERSION:
            raise StoreError(
                f"Redis has data of a newer falproxy (version {version}, which works with version "
                f"{min_reader} or newer, this one supports {FORMAT_VERSION}); upgrade this one, or "
                "use another database in REDIS_URL"
            )

    async def _mark_content(self) -> StoreContent:
        """Mark an empty server, so that all processes notice that it is another one, or was
        emptied. The first of them creates the mark."""
        new, milliseconds = f"{self._prefix}probe:new", int(NEW_CONTENT_SECONDS * 1000)
        await self._redis.execute("SET", new, b"", "PX", milliseconds, slots=self._probe_slot)
        name = f"{self._prefix}probe:content"
        await self._redis.execute("SET", name, uuid4().hex, "NX", slots=self._probe_slot)
        content = await self._redis.execute("GET", name, slots=self._probe_slot)
        return StoreContent(content.decode() if isinstance(content, bytes) else "", True)

    def _start_listening(self) -> None:
        self._listen_task = self._spawn(self._listen(self._redis.server_client))
        self._listened_client = self._redis.server_client

    def _listen_to_current_client(self) -> None:
        """Subscribe at the server that commands go to, after the clients were replaced."""
        if self._listen_task is None or self._listened_client is self._redis.server_client:
            return
        _ = self._spawn(cancel_tasks([self._listen_task], interval=0.1))
        self._start_listening()

    def _spawn(self, work: Coroutine[object, object, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(log_task_error)
        return task

    async def eviction_policy(self) -> str | None:
        memory = await self._redis.execute("INFO", "memory")
        if not isinstance(memory, dict) or not memory.get("maxmemory"):
            return None
        return str(memory.get("maxmemory_policy"))

    async def _warn_of_eviction(self) -> None:
        try:
            policy = await self.eviction_policy()
        except StoreError:
            return
        self._is_policy_checked = True
        if policy in UNSAFE_POLICIES:
            logger.warning(
                "A full Redis evicts ids of paid requests (maxmemory-policy %s): use volatile-lru.",
                policy,
            )

    async def _expire_loop(self) -> None:
        """Delete expired owners and virtual requests from time to time."""
        while True:
            with suppress(StoreError):
                while await self._expire_batch() == SCAN_BATCH_SIZE:
                    pass
            if not self._is_policy_checked:
                await self._warn_of_eviction()
            await asyncio.sleep(EXPIRY_INTERVAL if self._is_policy_checked else PROBE_RETRY)

    async def _expire_batch(self) -> int:
        """Delete a batch of expired ids and return its size."""
        expiry = f"{self._prefix}expiry"
        limits = ("-inf", int(time.time()), "LIMIT", 0, SCAN_BATCH_SIZE)
        names = await self._redis.execute("ZRANGEBYSCORE", expiry, *limits)
        if not isinstance(names, list) or not names:
            return 0
        deletions = [("DEL", self._prefix.encode() + name) for name in names]
        await self._redis.execute_all(*deletions, ("ZREM", expiry, *names))
        return len(names)

    async def get(self, key: str) -> Lookup:
        return parse_lookup(await self._run_script(GET, key))

    async def acquire(self, key: str, request: AcquireRequest) -> Lookup:
        retentions = (JOBLESS_RETENTION, JOB_RETENTION)
        wanted = (request.owner_token, request.lease, int(request.is_run), request.min_stored_at)
        awaited, known = request.awaited_token, request.known_outcome
        waited = () if known is None else (awaited, known)
        reply = await self._run_script(
            ACQUIRE, key, *wanted, *retentions, *waited, outcome_of=awaited
        )
        return parse_lookup(reply)

    async def record_job(self, key: str, owner_token: str, job: Job) -> bool:
        fields = (job.request_id, job.app, job.key_mark, JOB_RETENTION)
        arguments = (owner_token, self._channel, key, *fields)
        return await self._run_script(RECORD_JOB, key, *arguments) == 1

    async def renew_lease(self, key: str, owner_token: str, lease: float) -> bool:
        retentions = (JOBLESS_RETENTION, JOB_RETENTION)
        arguments = (owner_token, self._channel, key, lease, *retentions)
        return await self._run_script(RENEW_LEASE, key, *arguments) == 1

    async def finish(
        self,
        key: str,
        owner_token: str,
        result: CachedResult | None,
        outcome: SharedOutcome | None = None,
    ) -> None:
        content, age = (b"", 0.0) if outcome is None else (outcome.content, outcome.age)
        ended = (owner_token, self._channel, key, content, age, OUTCOME_RETENTION)
        fields: tuple[CommandArgument, ...] = ()
        if result is not None:
            delete_at = int((result.expires_at + GRACE_PERIOD) * 1000)
            times = (repr(result.stored_at), repr(result.expires_at), delete_at)
            fields = (result.body, result.content_type, *times)
        try:
            await self._run_script(FINISH, key, *ended, *fields, outcome_of=owner_token)
        except StoreError as error:
            if not fields:
                raise
            await self._run_script(FINISH, key, *ended, outcome_of=owner_token)
            raise RejectedResultError("Redis did not store a result") from error

    async def put_virtual_request(
        self,
        request_id: str,
        virtual_request: VirtualRequest,
        retention: float = VIRTUAL_ID_RETENTION,
    ) -> None:
        value = serialize_virtual_request(virtual_request)
        await self._put(f"claim:{request_id}", value, retention)

    async def get_virtual_request(self, request_id: str) -> VirtualRequest | None:
        value = await self._redis.execute("GET", self._virtual_request_key(request_id))
        return parse_virtual_request(value) if isinstance(value, bytes) else None

    async def put_owner(self, request_id: str, request_owner: RequestOwner) -> bool:
        value = json.dumps(asdict(request_owner)).encode()
        return await self._put(f"owner:{request_id}", value, self._owner_retention, "NX")

    async def check_owners_writable(self) -> None:
        await self.probe()

    async def get_owner(self, request_id: str) -> RequestOwner | None:
        value = await self._redis.execute("GET", self._owner_key(request_id))
        if isinstance(value, bytes):
            return RequestOwner(**known_fields(RequestOwner, json.loads(value)))
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
                lengths = (self._redis.execute("HSTRLEN", name, "body") for name in names)
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
                replies = await asyncio.gather(
                    *(self._redis.execute("DEL", name) for name in names)
                )
                count += replies.count(1)
        return count

    async def _put(self, name: str, value: bytes, retention: float, *options: str) -> bool:
        """Set a key below the prefix. It expires, but is never evicted under `volatile-*`. False if
        the options prevented it."""
        key = f"{self._prefix}{name}"
        if retention <= EVICTABLE_RETENTION_MAX:
            expiry = ("PX", int(retention * 1000))
            return await self._redis.execute("SET", key, value, *options, *expiry) is not None
        expires_at = int(time.time() + retention)
        add = ("ZADD", f"{self._prefix}expiry", expires_at, name)
        _, reply = await self._redis.execute_all(add, ("SET", key, value, *options))
        return reply is not None

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
        async with aclosing(self._redis.scan(match, SCAN_BATCH_SIZE)) as names:
            async for name in names:
                if name not in seen:
                    seen.add(name)
                    batch.append(name)
                if len(batch) >= SCAN_BATCH_SIZE:
                    yield batch
                    batch = []
        yield batch

    async def _run_script(
        self, script: Script, key: str, *arguments: CommandArgument, outcome_of: str = ""
    ) -> object:
        """Run a script on the result, the shared call and the outcomes of a cache key. The braces
        (hash tag) put all of them into one slot of a cluster.

        outcome_of: token of the leader with that outcome.
        """
        name = f"{self._prefix}{{{quote(key, safe='')}}}"
        outcome = f"{name}:outcome:{quote(outcome_of, safe='')}"
        keys = (f"{name}:result", f"{name}:flight", f"{name}:last", outcome)
        return await self._redis.run_script(script, keys, arguments)

    async def _listen(self, client: Redis) -> None:
        """Notify watchers of published changes; reconnect with exponential backoff."""
        delay = RECONNECT_DELAY_MIN
        while True:
            try:
                async with client.pubsub() as subscription:
                    async for message in read_messages(subscription, self._channel):
                        delay = RECONNECT_DELAY_MIN
                        self._on_message(message)
            except REDIS_ERRORS as error:
                if delay == RECONNECT_DELAY_MIN:  # once, until it works again
                    logger.info("Redis subscription lost (%s)", type(error).__name__)
            await asyncio.sleep(delay)
            delay = min(2 * delay, RECONNECT_DELAY_MAX)

    def _on_message(self, message: dict[str, object]) -> None:
        if message["type"] == "subscribe":  # earlier changes may have been missed
            self._watchers.notify_all()
        elif message["type"] == "message" and isinstance(message["data"], bytes):
            self._watchers.notify(message["data"].decode())


def log_task_error(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and task.exception() is not None:
        logger.error("The Redis subscription has ended", exc_info=task.exception())
