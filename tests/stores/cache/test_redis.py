"""Redis store: servers that are down, frozen, full, read-only or in a cluster."""

import asyncio
import json
import logging
import ssl
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import quote
from uuid import uuid4

import pytest
import trustme
from redis.asyncio import Redis
from redis.asyncio.client import PubSub

from falproxy.stores.cache import (
    AcquireRequest,
    CachedResult,
    Job,
    Lookup,
    RequestOwner,
    StoreError,
    StoreStats,
    VirtualRequest,
)
from falproxy.stores.cache.redis import RedisStore
from falproxy.stores.cache.redis_messages import read_messages
from falproxy.stores.redis_client import CALL_TIMEOUT, MAX_CONNECTIONS
from tests.support.key_search import CANARY
from tests.support.ports import free_port
from tests.support.redis_server import RedisServer, redis_server

JOB = Job("job-1", "fal-ai/flux")
SLOTS = 16384
LEADER = AcquireRequest("a", 10.0, is_run=False)
PASSWORD = CANARY.partition(":")[2]


class Relay:
    """A TCP relay between a store and its server.

    drops_reply: whether to close the connection in place of the reply to a command.
    dropped: number of such replies so far.
    """

    def __init__(self, server: RedisServer) -> None:
        self._server = server
        self._tasks: set[asyncio.Task[None]] = set()
        self.drops_reply: Callable[[bytes], bool] = lambda command: False
        self.dropped = 0

    @asynccontextmanager
    async def running(self, encryption: ssl.SSLContext | None = None) -> AsyncIterator[str]:
        listener = await asyncio.start_server(self._accept, "127.0.0.1", 0, ssl=encryption)
        try:
            yield f"127.0.0.1:{listener.sockets[0].getsockname()[1]}"
        finally:
            listener.close()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._tasks.add(asyncio.create_task(self._relay(reader, writer)))

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        from_server, to_server = await asyncio.open_connection("127.0.0.1", self._server.port)
        is_dropping = False

        async def relay_replies() -> None:
            while (reply := await from_server.read(65536)) and not is_dropping:
                writer.write(reply)
            writer.close()

        replies = asyncio.create_task(relay_replies())
        try:
            while command := await reader.read(65536):
                is_dropping = self.drops_reply(command)
                self.dropped += is_dropping
                to_server.write(command)
        except ConnectionError:
            pass  # the store closed the connection
        finally:
            replies.cancel()
            for stream in (writer, to_server):
                stream.close()


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    """The server of all tests that do not disturb it."""
    with redis_server() as running:
        yield running


@pytest.fixture
def own_server() -> Iterator[RedisServer]:
    """A server that a test may stop, freeze or fill."""
    with redis_server() as running:
        yield running


@asynccontextmanager
async def open_store(url: str, prefix: str | None = None) -> AsyncIterator[RedisStore]:
    async with RedisStore(url, prefix=prefix or f"{uuid4()}:") as store:
        yield store


async def execute(server: RedisServer, *command: str) -> object:
    async with Redis.from_url(server.url) as client:
        reply: object = await client.execute_command(*command)  # type: ignore[no-untyped-call]
        return reply


def result(body: bytes = b"{}") -> CachedResult:
    now = round(time.time(), 3)
    return CachedResult(body, "application/json", now, now + 60)


async def call_every_method(store: RedisStore) -> list[object]:
    """Return the result or the error of each method."""
    calls: list[Awaitable[object]] = [
        store.probe(),
        store.get("k"),
        store.acquire("k", LEADER),
        store.record_job("k", "a", JOB),
        store.renew_lease("k", "a", 1),
        store.finish("k", "a", result()),
        store.put_virtual_request("id", VirtualRequest("k", "ann", "app")),
        store.get_virtual_request("id"),
        store.put_owner("id", RequestOwner("ann", "mark")),
        store.get_owner("id"),
        store.add_holder("k", "job", "holder"),
        store.remove_holder("k", "job", "holder"),
        store.stats(),
        store.clear(),
    ]
    return await asyncio.gather(*calls, return_exceptions=True)


async def outcome_types(store: RedisStore) -> set[type]:
    return {type(outcome) for outcome in await call_every_method(store)}


async def wait_until_usable(store: RedisStore) -> None:
    async with asyncio.timeout(5):
        while True:
            try:
                await store.probe()
            except StoreError:
                await asyncio.sleep(0.01)
            else:
                return


async def wait_for_event(event: asyncio.Event, seconds: float = 5.0) -> None:
    async with asyncio.timeout(seconds):
        await event.wait()
    event.clear()


async def wait_for_subscribers(server: RedisServer, count: int) -> None:
    async with asyncio.timeout(5):
        while len(await clients(server, "pubsub")) < count:
            await asyncio.sleep(0.01)


async def clients(server: RedisServer, kind: str) -> list[object]:
    async with Redis.from_url(server.url) as client:
        return list(await client.client_list(_type=kind))


@pytest.mark.timed
async def test_an_unreachable_server_is_an_error_at_once_but_not_at_the_start() -> None:
    async with open_store(f"redis://127.0.0.1:{free_port()}") as store:
        started_at = time.monotonic()
        with store.watch("k"):
            assert await outcome_types(store) == {StoreError}
        assert time.monotonic() - started_at < 0.5


async def test_a_server_that_starts_later_is_used(own_server: RedisServer) -> None:
    own_server.kill()
    async with open_store(own_server.url, "p:") as store, open_store(own_server.url, "p:") as other:
        with pytest.raises(StoreError):
            await store.probe()
        own_server.start()
        with store.watch("k") as event:
            await wait_until_usable(store)
            await wait_for_event(event)  # changes may have been missed
            await other.finish("k", "a", None)
            await wait_for_event(event)


@pytest.mark.timed
async def test_a_stopped_server_is_an_error_and_is_used_after_its_restart(
    own_server: RedisServer,
) -> None:
    async with open_store(own_server.url, "p:") as store, open_store(own_server.url, "p:") as other:
        await asyncio.gather(*(store.get(str(n)) for n in range(MAX_CONNECTIONS)))
        with store.watch("k") as event:
            await wait_for_subscribers(own_server, 2)
            event.clear()
            own_server.stop()
            started_at = time.monotonic()
            assert await outcome_types(store) == {StoreError}
            assert time.monotonic() - started_at < 0.5
            own_server.start()
            lookups = await asyncio.gather(*(store.get(str(n)) for n in range(MAX_CONNECTIONS)))
            assert lookups == [Lookup()] * MAX_CONNECTIONS, "stale connections are replaced"
            await wait_for_event(event)
            await other.finish("k", "a", None)
            await wait_for_event(event)


@pytest.mark.timed
async def test_a_frozen_server_is_an_error_within_the_timeout(own_server: RedisServer) -> None:
    async with open_store(own_server.url) as store:
        await store.probe()
        own_server.freeze()
        started_at = time.monotonic()
        calls = [store.get(str(n)) for n in range(3 * MAX_CONNECTIONS)]
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
        assert {type(outcome) for outcome in outcomes} == {StoreError}
        assert time.monotonic() - started_at < CALL_TIMEOUT + 0.5, (
            "calls do not queue without limit"
        )
        own_server.thaw()
        await wait_until_usable(store)
        assert StoreError not in await outcome_types(store)


async def test_a_read_only_replica_is_an_error(own_server: RedisServer) -> None:
    async with open_store(own_server.url) as store:
        await store.finish("k", "a", result())
        await execute(own_server, "REPLICAOF", "127.0.0.1", str(free_port()))
        with pytest.raises(StoreError, match="ReadOnly"):
            await store.probe()
        with pytest.raises(StoreError):
            await store.acquire("l", LEADER)
        assert (await store.get("k")).result is not None
        await execute(own_server, "REPLICAOF", "NO", "ONE")
        await wait_until_usable(store)


async def test_a_full_server_is_an_error_and_flights_end_nevertheless(
    own_server: RedisServer,
) -> None:
    async with open_store(own_server.url) as store:
        await store.acquire("k", LEADER)
        await execute(
            own_server, "CONFIG", "SET", "maxmemory", "1", "maxmemory-policy", "noeviction"
        )
        with pytest.raises(StoreError, match="OutOfMemory"):
            await store.probe()
        with pytest.raises(StoreError):
            await store.acquire("l", LEADER)
        with pytest.raises(StoreError):
            await store.finish("k", "a", result(b"x" * 1000))
        assert await store.get("k") == Lookup()
        await execute(own_server, "CONFIG", "SET", "maxmemory", "0")
        assert (await store.acquire("l", LEADER)).is_leader


@pytest.fixture(scope="module")
def locked() -> Iterator[RedisServer]:
    with redis_server(requirepass=PASSWORD) as running:
        yield running


async def test_the_password_of_the_url_is_used(locked: RedisServer) -> None:
    async with open_store(f"redis://:{quote(PASSWORD)}@127.0.0.1:{locked.port}") as store:
        await store.probe()
        await store.finish("k", "a", result())
        with store.watch("k") as event:
            await store.finish("k", "a", None)
            await wait_for_event(event)


@pytest.mark.parametrize(
    "login",
    [
        pytest.param("", id="no password"),
        pytest.param(f":{CANARY}@", id="wrong password"),
        pytest.param(f"user:{CANARY}@", id="wrong user"),
    ],
)
async def test_the_error_of_a_failed_login_has_no_secrets(
    locked: RedisServer, login: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with open_store(f"redis://{login}127.0.0.1:{locked.port}") as store:
        outcomes = await call_every_method(store)
        assert {type(outcome) for outcome in outcomes} == {StoreError}
        for text in (*map(repr, outcomes), caplog.text):
            assert PASSWORD not in text
            assert "127.0.0.1" not in text


@pytest.mark.parametrize(
    "url",
    [
        pytest.param(f"http://:{CANARY}@host", id="another scheme"),
        pytest.param(f"redis://:a/{CANARY}@host:port", id="slash in the password"),
        pytest.param(f"redis://:{CANARY}@[host", id="no host"),
        pytest.param(f"redis://:{CANARY}@host?db=first", id="option that is not a number"),
        pytest.param(f"redis://:{CANARY}@host?colour=red", id="unknown option"),
    ],
)
def test_an_invalid_url_is_refused_without_its_text(url: str) -> None:
    with pytest.raises(ValueError, match="not a URL of a Redis server") as refused:
        RedisStore(url)
    assert refused.value.__cause__ is None


async def test_tls_is_used_and_certificates_are_verified(
    server: RedisServer, tmp_path: Path
) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    encryption = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("127.0.0.1").configure_cert(encryption)
    async with Relay(server).running(encryption) as origin:
        async with open_store(f"rediss://{origin}?ssl_ca_certs={tmp_path / 'ca.pem'}") as store:
            await store.finish("k", "a", result(b"x" * 2**20))
            assert (await store.get("k")).result is not None
            with store.watch("k") as event:
                await store.finish("k", "a", None)
                await wait_for_event(event)
        for untrusted in ("rediss", "redis"):
            async with open_store(f"{untrusted}://{origin}") as store:
                with pytest.raises(StoreError):
                    await store.probe()


@pytest.fixture(scope="module")
def cluster() -> Iterator[RedisServer]:
    """A cluster of one server."""

    async def is_ok(server: RedisServer) -> bool:
        info = await execute(server, "CLUSTER INFO")
        return isinstance(info, dict) and info["cluster_state"] == "ok"

    with redis_server(cluster_enabled="yes") as running:
        asyncio.run(execute(running, "CLUSTER", "ADDSLOTSRANGE", "0", str(SLOTS - 1)))
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline and not asyncio.run(is_ok(running)):
            time.sleep(0.05)
        yield running


async def test_a_cluster_works_like_a_single_server(cluster: RedisServer) -> None:
    async with open_store(cluster.url, "p:") as store, open_store(cluster.url, "p:") as other:
        for n in range(20):
            key = f"key {n} {{}}"
            assert (await store.acquire(key, LEADER)).is_leader
            assert await store.record_job(key, "a", JOB)
            assert await other.add_holder(key, JOB.request_id, "second")
            with other.watch(key) as event:
                await store.finish(key, "a", result())
                await wait_for_event(event)
            await store.put_virtual_request(key, VirtualRequest(key, "ann", "app"))
            assert await other.get_virtual_request(key) == VirtualRequest(key, "ann", "app")
            await store.put_owner(key, RequestOwner("ann", "mark"))
            assert await other.get_owner(key) == RequestOwner("ann", "mark")
        assert await store.stats() == StoreStats(20, 40, 0, 20)
        assert await store.clear() == 20


async def test_a_cluster_is_used_again_after_a_freeze(cluster: RedisServer) -> None:
    async with open_store(cluster.url) as store:
        await asyncio.gather(*(store.get(str(n)) for n in range(10)))
        cluster.freeze()
        with pytest.raises(StoreError):
            await store.get("k")
        cluster.thaw()
        await wait_until_usable(store)
        await execute(cluster, "CLIENT", "KILL", "TYPE", "normal")
        lookups = await asyncio.gather(*(store.get(str(n)) for n in range(10)))
        assert lookups == [Lookup()] * 10


async def test_a_repeated_call_after_a_lost_reply_returns_the_same(server: RedisServer) -> None:
    relay = Relay(server)
    async with relay.running() as origin, open_store(f"redis://{origin}") as store:
        await store.acquire("warm", LEADER)
        relay.drops_reply = lambda command: b"EVALSHA" in command
        with pytest.raises(StoreError):
            await store.acquire("k", LEADER)
        assert relay.dropped == 1, "commands are not repeated automatically"
        relay.drops_reply = lambda command: False
        assert (await store.acquire("k", LEADER)).is_leader
        assert not (await store.acquire("k", AcquireRequest("b", 10, is_run=False))).is_leader


async def test_scripts_are_sent_again_to_a_server_that_lost_them(server: RedisServer) -> None:
    async with open_store(server.url) as store:
        for _ in range(2):
            await execute(server, "SCRIPT", "FLUSH")
            assert (await store.acquire("k", LEADER)).is_leader


async def test_many_calls_share_few_connections(server: RedisServer) -> None:
    async with open_store(server.url) as store:
        calls = [store.acquire(str(n), LEADER) for n in range(20 * MAX_CONNECTIONS)]
        assert all(lookup.is_leader for lookup in await asyncio.gather(*calls))
        assert len(await clients(server, "normal")) <= MAX_CONNECTIONS + 1


async def test_only_results_and_calls_in_flight_can_be_evicted(server: RedisServer) -> None:
    """A full server evicts keys with a time to live; a lost id is a paid request that is lost."""
    async with open_store(server.url) as store:
        await store.acquire("k", LEADER)
        await store.acquire("l", LEADER)
        await store.record_job("l", "a", JOB)
        await store.add_holder("l", JOB.request_id, "second")
        await store.finish("m", "a", result())
        await store.put_virtual_request("id", VirtualRequest("k", "ann", "app"))
        await store.put_owner("id", RequestOwner("ann", "mark"))
        await store.probe()
        prefix = store._prefix
        async with Redis.from_url(server.url) as client:
            names = [name.decode() async for name in client.scan_iter(match=f"{prefix}*")]
            evictable = {n.removeprefix(prefix) for n in names if await client.ttl(n) >= 0}
            others = {n.removeprefix(prefix) for n in names if await client.ttl(n) < 0}
    assert {name for name in evictable if "probe" not in name} == {
        "{k}:flight",
        "{l}:flight",
        "{m}:result",
    }
    assert others == {"claim:id", "owner:id", "expiry", "probe:content"}


async def test_expired_ids_are_deleted(server: RedisServer) -> None:
    prefix = f"{uuid4()}:"
    async with open_store(server.url, prefix) as store:
        await store.put_owner("old", RequestOwner("ann", "mark"))
        await store.put_virtual_request("old", VirtualRequest("k", "ann", "app"))
        await store.put_owner("new", RequestOwner("ann", "mark"))
        for name in ("owner:old", "claim:old"):
            await execute(server, "ZADD", f"{prefix}expiry", str(time.time() - 1), name)
    async with open_store(server.url, prefix) as store, asyncio.timeout(5):
        while await store.get_owner("old") or await store.get_virtual_request("old"):
            await asyncio.sleep(0.01)
        assert await store.get_owner("new") == RequestOwner("ann", "mark")
        assert await execute(server, "ZRANGE", f"{prefix}expiry", "0", "-1") == [b"owner:new"]


async def test_an_emptied_server_has_another_content(server: RedisServer) -> None:
    prefix = f"{uuid4()}:"
    async with open_store(server.url, prefix) as store, open_store(server.url, prefix) as other:
        first = await store.probe()
        assert first.is_new
        assert await other.probe() == first
        await execute(server, "DEL", f"{prefix}probe:new")
        assert (await store.probe(), first.id) == (await other.probe(), (await store.probe()).id)
        assert not (await store.probe()).is_new
        async with Redis.from_url(server.url) as client:
            await client.delete(*[name async for name in client.scan_iter(match=f"{prefix}*")])
        second = await other.probe()
        assert second.is_new
        assert second.id != first.id
        assert await store.probe() == second


@pytest.mark.parametrize(
    ("options", "policy", "is_safe"),
    [
        pytest.param({}, None, True, id="no limit"),
        pytest.param({"maxmemory_policy": "volatile-lru"}, "volatile-lru", True, id="safe"),
        pytest.param({"maxmemory_policy": "allkeys-lru"}, "allkeys-lru", False, id="all keys"),
    ],
)
async def test_a_policy_that_evicts_ids_is_logged_at_the_start(
    options: dict[str, str],
    policy: str | None,
    is_safe: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:
    limits = options and {"maxmemory": "100mb", **options}
    with redis_server(**limits) as server:
        async with open_store(server.url) as store, asyncio.timeout(5):
            while not store._is_policy_checked:
                await asyncio.sleep(0.01)
            assert await store.eviction_policy() == policy
    assert ("evicts ids of paid requests" in caplog.text) is not is_safe


async def test_a_lost_subscription_is_renewed_without_a_warning(
    own_server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    async with open_store(own_server.url) as store:
        with store.watch("k") as event:
            for _ in range(3):
                await wait_for_subscribers(own_server, 1)
                event.clear()
                await execute(own_server, "CLIENT", "KILL", "TYPE", "pubsub")
                await wait_for_event(event)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


async def test_a_subscription_whose_connection_closes_during_a_write_is_renewed(
    own_server: RedisServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    errors = [RuntimeError("unable to perform operation on <TCPTransport>")]

    async def read_or_raise(
        subscription: PubSub, channel: str
    ) -> AsyncGenerator[dict[str, object], None]:
        async for message in read_messages(subscription, channel):
            yield message
            if errors:
                raise errors.pop()

    monkeypatch.setattr("falproxy.stores.cache.redis.read_messages", read_or_raise)
    async with open_store(own_server.url) as store:
        with store.watch("k") as event:
            while errors:
                await wait_for_event(event)
                event.clear()
            await wait_for_event(event)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


async def test_an_owner_that_an_earlier_version_stored_is_found(server: RedisServer) -> None:
    async with open_store(server.url) as store:
        earlier = VirtualRequest("", "ann", "", Job("id", "", "mark"))
        await store.put_virtual_request("submission:id", earlier)
        assert await store.get_owner("id") == RequestOwner("ann", "mark")
        assert await store.get_owner("another") is None
        await store.put_owner("id", RequestOwner("bob", ""))
        assert await store.get_owner("id") == RequestOwner("bob", "")


NEWER_VALUES = {
    "owner:id": {"owner": "ann", "key_mark": "mark", "team": "blue"},
    "claim:id": {
        "key": "k",
        "owner": "ann",
        "app": "fal-ai/flux",
        "job": {"request_id": "job-1", "app": "fal-ai/flux", "key_mark": "", "region": "eu"},
        "failure": None,
        "is_cancelled": False,
        "priority": 1,
    },
}


async def test_values_of_a_newer_version_are_read_without_its_fields(server: RedisServer) -> None:
    async with open_store(server.url) as store:
        for name, value in NEWER_VALUES.items():
            await execute(server, "SET", f"{store._prefix}{name}", json.dumps(value))
        assert await store.get_owner("id") == RequestOwner("ann", "mark")
        assert await store.get_virtual_request("id") == VirtualRequest(
            "k", "ann", "fal-ai/flux", JOB
        )


@pytest.mark.parametrize("stored", [None, "0 0", "1 1", "7 1", "7 1 later"])
async def test_a_server_of_a_compatible_version_is_used_and_not_downgraded(
    server: RedisServer, stored: str | None
) -> None:
    async with open_store(server.url) as store:
        if stored is not None:
            await execute(server, "SET", f"{store._prefix}probe:format", stored)
        await store.probe()
        expected = stored if stored is not None and stored.startswith("7") else "1 1"
        assert await execute(server, "GET", f"{store._prefix}probe:format") == expected.encode()


async def test_a_server_with_data_of_an_incompatible_version_is_an_error(
    server: RedisServer,
) -> None:
    async with open_store(server.url) as store:
        await execute(server, "SET", f"{store._prefix}probe:format", "7 6")
        with pytest.raises(StoreError, match=r"newer falproxy \(version 7, .* upgrade this one"):
            await store.probe()
        assert await execute(server, "GET", f"{store._prefix}probe:format") == b"7 6"
