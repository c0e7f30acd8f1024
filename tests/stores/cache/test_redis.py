"""What only the Redis store does: servers that are away, frozen, full, read only or a cluster."""

import asyncio
import logging
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import quote
from uuid import uuid4

import pytest
import trustme
from redis.asyncio import Redis

from falproxy.stores.cache import (
    AcquireRequest,
    CachedResult,
    Job,
    Lookup,
    StoreError,
    StoreStats,
    VirtualRequest,
)
from falproxy.stores.cache.redis import CALL_TIMEOUT, MAX_CONNECTIONS, RedisStore
from tests.support.key_search import CANARY
from tests.support.redis_server import RedisServer, free_port, redis_server

JOB = Job("job-1", "fal-ai/flux")
SLOTS = 16384
LEADER = AcquireRequest("a", 10.0, is_run=False)
PASSWORD = CANARY.partition(":")[2]


class Relay:
    """Stands between a store and its server. swallows: whether it is to hang up instead of
    passing on what the server says to a command."""

    def __init__(self, server: RedisServer) -> None:
        self._server = server
        self._relays: set[asyncio.Task[None]] = set()
        self.swallows: Callable[[bytes], bool] = lambda command: False
        self.swallowed = 0

    @asynccontextmanager
    async def running(self, encryption: ssl.SSLContext | None = None) -> AsyncIterator[str]:
        listener = await asyncio.start_server(self._accept, "127.0.0.1", 0, ssl=encryption)
        try:
            yield f"127.0.0.1:{listener.sockets[0].getsockname()[1]}"
        finally:
            listener.close()
            for relay in self._relays:
                relay.cancel()
            await asyncio.gather(*self._relays, return_exceptions=True)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._relays.add(asyncio.create_task(self._relay(reader, writer)))

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        from_server, to_server = await asyncio.open_connection("127.0.0.1", self._server.port)
        is_swallowing = False

        async def pass_on() -> None:
            while (answer := await from_server.read(65536)) and not is_swallowing:
                writer.write(answer)
            writer.close()

        answers = asyncio.create_task(pass_on())
        try:
            while command := await reader.read(65536):
                is_swallowing = self.swallows(command)
                self.swallowed += is_swallowing
                to_server.write(command)
        except ConnectionError:
            pass  # the store hung up
        finally:
            answers.cancel()
            for end in (writer, to_server):
                end.close()


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    """One for all tests that do it no harm."""
    with redis_server() as running:
        yield running


@pytest.fixture
def own_server() -> Iterator[RedisServer]:
    """One to be stopped, frozen or filled."""
    with redis_server() as running:
        yield running


@asynccontextmanager
async def store_of(url: str, prefix: str | None = None) -> AsyncIterator[RedisStore]:
    async with RedisStore(url, prefix=prefix or f"{uuid4()}:") as store:
        yield store


async def say(server: RedisServer, *command: str) -> object:
    """What the server answers to a command of the test itself."""
    async with Redis.from_url(server.url) as client:
        answer: object = await client.execute_command(*command)  # type: ignore[no-untyped-call]
        return answer


def result(body: bytes = b"{}") -> CachedResult:
    now = round(time.time(), 3)
    return CachedResult(body, "application/json", now, now + 60)


async def ask_all(store: RedisStore) -> list[object]:
    """What every method does: an answer, or an error."""
    asked: list[Awaitable[object]] = [
        store.probe(),
        store.get("k"),
        store.acquire("k", LEADER),
        store.record_job("k", "a", JOB),
        store.renew_lease("k", "a", 1),
        store.finish("k", "a", result()),
        store.put_virtual_request("id", VirtualRequest("k", "ann", "app")),
        store.get_virtual_request("id"),
        store.add_holder("k", "job", "holder"),
        store.remove_holder("k", "job", "holder"),
        store.stats(),
        store.clear(),
    ]
    return await asyncio.gather(*asked, return_exceptions=True)


async def kinds(store: RedisStore) -> set[type]:
    return {type(answer) for answer in await ask_all(store)}


async def works_again(store: RedisStore) -> None:
    """Returns as soon as the store answers."""
    async with asyncio.timeout(5):
        while True:
            try:
                return await store.probe()
            except StoreError:
                await asyncio.sleep(0.01)


async def heard(event: asyncio.Event, seconds: float = 5.0) -> None:
    async with asyncio.timeout(seconds):
        await event.wait()
    event.clear()


async def listening(server: RedisServer, stores: int) -> None:
    """Returns when so many stores hear of changes."""
    async with asyncio.timeout(5):
        while len(await clients(server, "pubsub")) < stores:
            await asyncio.sleep(0.01)


async def clients(server: RedisServer, kind: str) -> list[object]:
    async with Redis.from_url(server.url) as client:
        return list(await client.client_list(_type=kind))


@pytest.mark.timed
async def test_a_server_that_is_away_is_an_error_at_once_and_none_at_the_start() -> None:
    async with store_of(f"redis://127.0.0.1:{free_port()}") as store:
        began = time.monotonic()
        with store.watch("k"):
            assert await kinds(store) == {StoreError}
        assert time.monotonic() - began < 0.5


async def test_a_server_that_comes_later_is_used(own_server: RedisServer) -> None:
    own_server.kill()
    async with store_of(own_server.url, "p:") as store, store_of(own_server.url, "p:") as other:
        with pytest.raises(StoreError):
            await store.probe()
        own_server.start()
        with store.watch("k") as event:
            await works_again(store)
            await heard(event)  # that it may have missed something
            await other.finish("k", "a", None)
            await heard(event)


@pytest.mark.timed
async def test_a_server_that_stops_is_an_error_and_used_again_when_it_is_back(
    own_server: RedisServer,
) -> None:
    async with store_of(own_server.url, "p:") as store, store_of(own_server.url, "p:") as other:
        await asyncio.gather(*(store.get(str(n)) for n in range(MAX_CONNECTIONS)))
        with store.watch("k") as event:
            await listening(own_server, 2)
            event.clear()
            own_server.stop()
            began = time.monotonic()
            assert await kinds(store) == {StoreError}
            assert time.monotonic() - began < 0.5
            own_server.start()
            answers = await asyncio.gather(*(store.get(str(n)) for n in range(MAX_CONNECTIONS)))
            assert answers == [Lookup()] * MAX_CONNECTIONS, (
                "connections that went stale are replaced"
            )
            await heard(event)
            await other.finish("k", "a", None)
            await heard(event)


@pytest.mark.timed
async def test_a_frozen_server_is_an_error_in_time(own_server: RedisServer) -> None:
    async with store_of(own_server.url) as store:
        await store.probe()
        own_server.freeze()
        began = time.monotonic()
        asked = [store.get(str(n)) for n in range(3 * MAX_CONNECTIONS)]
        answers = await asyncio.gather(*asked, return_exceptions=True)
        assert {type(answer) for answer in answers} == {StoreError}
        assert time.monotonic() - began < CALL_TIMEOUT + 0.5, "nobody waits in a queue for ever"
        own_server.thaw()
        await works_again(store)
        assert StoreError not in await kinds(store)


async def test_a_read_only_replica_is_an_error(own_server: RedisServer) -> None:
    async with store_of(own_server.url) as store:
        await store.finish("k", "a", result())
        await say(own_server, "REPLICAOF", "127.0.0.1", str(free_port()))
        with pytest.raises(StoreError, match="ReadOnly"):
            await store.probe()
        with pytest.raises(StoreError):
            await store.acquire("l", LEADER)
        assert (await store.get("k")).result is not None
        await say(own_server, "REPLICAOF", "NO", "ONE")
        await works_again(store)


async def test_a_full_server_is_an_error_and_ends_flights_even_so(own_server: RedisServer) -> None:
    async with store_of(own_server.url) as store:
        await store.acquire("k", LEADER)
        await say(own_server, "CONFIG", "SET", "maxmemory", "1", "maxmemory-policy", "noeviction")
        with pytest.raises(StoreError, match="OutOfMemory"):
            await store.probe()
        with pytest.raises(StoreError):
            await store.acquire("l", LEADER)
        with pytest.raises(StoreError):
            await store.finish("k", "a", result(b"x" * 1000))
        assert await store.get("k") == Lookup()
        await say(own_server, "CONFIG", "SET", "maxmemory", "0")
        assert (await store.acquire("l", LEADER)).is_leader


@pytest.fixture(scope="module")
def locked() -> Iterator[RedisServer]:
    with redis_server(requirepass=PASSWORD) as running:
        yield running


async def test_the_password_of_the_url_is_used(locked: RedisServer) -> None:
    async with store_of(f"redis://:{quote(PASSWORD)}@127.0.0.1:{locked.port}") as store:
        await store.probe()
        await store.finish("k", "a", result())
        with store.watch("k") as event:
            await store.finish("k", "a", None)
            await heard(event)


@pytest.mark.parametrize(
    "login",
    [
        pytest.param("", id="no password"),
        pytest.param(f":{CANARY}@", id="a wrong password"),
        pytest.param(f"user:{CANARY}@", id="a wrong user"),
    ],
)
async def test_a_wrong_login_is_an_error_that_does_not_say_it(
    locked: RedisServer, login: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with store_of(f"redis://{login}127.0.0.1:{locked.port}") as store:
        answers = await ask_all(store)
        assert {type(answer) for answer in answers} == {StoreError}
        for text in (*map(repr, answers), caplog.text):
            assert PASSWORD not in text
            assert "127.0.0.1" not in text


@pytest.mark.parametrize(
    "url",
    [
        pytest.param(f"http://:{CANARY}@host", id="another scheme"),
        pytest.param(f"redis://:a/{CANARY}@host:port", id="a slash in the password"),
        pytest.param(f"redis://:{CANARY}@[host", id="no host"),
        pytest.param(f"redis://:{CANARY}@host?db=first", id="an option that is no number"),
        pytest.param(f"redis://:{CANARY}@host?colour=red", id="an option that there is not"),
    ],
)
def test_what_is_no_url_of_redis_is_refused_without_its_text(url: str) -> None:
    with pytest.raises(ValueError, match="not a URL of a Redis server") as refused:
        RedisStore(url)
    assert refused.value.__cause__ is None


async def test_tls_is_spoken_and_certificates_are_checked(
    server: RedisServer, tmp_path: Path
) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    encryption = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("127.0.0.1").configure_cert(encryption)
    async with Relay(server).running(encryption) as origin:
        async with store_of(f"rediss://{origin}?ssl_ca_certs={tmp_path / 'ca.pem'}") as store:
            await store.finish("k", "a", result(b"x" * 2**20))
            assert (await store.get("k")).result is not None
            with store.watch("k") as event:
                await store.finish("k", "a", None)
                await heard(event)
        for untrusted in ("rediss", "redis"):
            async with store_of(f"{untrusted}://{origin}") as store:
                with pytest.raises(StoreError):
                    await store.probe()


@pytest.fixture(scope="module")
def cluster() -> Iterator[RedisServer]:
    """A cluster of one."""

    async def is_ok(server: RedisServer) -> bool:
        about = await say(server, "CLUSTER INFO")
        return isinstance(about, dict) and about["cluster_state"] == "ok"

    with redis_server(cluster_enabled="yes") as running:
        asyncio.run(say(running, "CLUSTER", "ADDSLOTSRANGE", "0", str(SLOTS - 1)))
        until = time.monotonic() + 10
        while time.monotonic() < until and not asyncio.run(is_ok(running)):
            time.sleep(0.05)
        yield running


async def test_a_cluster_is_a_store_like_any_other(cluster: RedisServer) -> None:
    async with store_of(cluster.url, "p:") as store, store_of(cluster.url, "p:") as other:
        for n in range(20):
            key = f"key {n} {{}}"
            assert (await store.acquire(key, LEADER)).is_leader
            assert await store.record_job(key, "a", JOB)
            assert await other.add_holder(key, JOB.request_id, "second")
            with other.watch(key) as event:
                await store.finish(key, "a", result())
                await heard(event)
            await store.put_virtual_request(key, VirtualRequest(key, "ann", "app"))
            assert await other.get_virtual_request(key) == VirtualRequest(key, "ann", "app")
        assert await store.stats() == StoreStats(20, 40, 0, 20)
        assert await store.clear() == 20


async def test_a_cluster_that_was_away_is_used_again(cluster: RedisServer) -> None:
    async with store_of(cluster.url) as store:
        await asyncio.gather(*(store.get(str(n)) for n in range(10)))
        cluster.freeze()
        with pytest.raises(StoreError):
            await store.get("k")
        cluster.thaw()
        await works_again(store)
        await say(cluster, "CLIENT", "KILL", "TYPE", "normal")
        answers = await asyncio.gather(*(store.get(str(n)) for n in range(10)))
        assert answers == [Lookup()] * 10


async def test_an_answer_that_was_lost_is_the_same_when_asked_again(server: RedisServer) -> None:
    between = Relay(server)
    async with between.running() as origin, store_of(f"redis://{origin}") as store:
        await store.acquire("warm", LEADER)
        between.swallows = lambda command: b"EVALSHA" in command
        with pytest.raises(StoreError):
            await store.acquire("k", LEADER)
        assert between.swallowed == 1, "nothing is sent again by itself"
        between.swallows = lambda command: False
        assert (await store.acquire("k", LEADER)).is_leader
        assert not (await store.acquire("k", AcquireRequest("b", 10, is_run=False))).is_leader


async def test_a_server_that_forgot_the_scripts_is_told_them_again(server: RedisServer) -> None:
    async with store_of(server.url) as store:
        for _ in range(2):
            await say(server, "SCRIPT", "FLUSH")
            assert (await store.acquire("k", LEADER)).is_leader


async def test_many_calls_share_few_connections(server: RedisServer) -> None:
    async with store_of(server.url) as store:
        calls = [store.acquire(str(n), LEADER) for n in range(20 * MAX_CONNECTIONS)]
        assert all(found.is_leader for found in await asyncio.gather(*calls))
        assert len(await clients(server, "normal")) <= MAX_CONNECTIONS + 1


async def test_all_that_is_stored_goes_away_by_itself(server: RedisServer) -> None:
    async with store_of(server.url) as store:
        await store.acquire("k", LEADER)
        await store.acquire("l", LEADER)
        await store.record_job("l", "a", JOB)
        await store.add_holder("l", JOB.request_id, "second")
        await store.finish("m", "a", result())
        await store.put_virtual_request("id", VirtualRequest("k", "ann", "app"))
        await store.probe()
        async with Redis.from_url(server.url) as client:
            names = [name async for name in client.scan_iter(match=f"{store._prefix}*")]
            assert len(names) == 5
            assert -1 not in [await client.ttl(name) for name in names]


async def test_a_lost_connection_is_no_failure_of_the_listener(
    own_server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    async with store_of(own_server.url) as store:
        with store.watch("k") as event:
            for _ in range(3):
                await listening(own_server, 1)
                event.clear()
                await say(own_server, "CLIENT", "KILL", "TYPE", "pubsub")
                await heard(event)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
