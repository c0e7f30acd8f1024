"""Failover of Redis behind an address: the old server still responds on open connections."""

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterator

import pytest
from redis.asyncio import Redis

from falproxy.stores.cache import CachedResult, RequestOwner, StoreError
from falproxy.stores.cache.circuit_breaker import StoreBreaker
from falproxy.stores.cache.redis import RedisStore
from falproxy.stores.ownership import RequestOwnership
from tests.support.ports import free_port
from tests.support.redis_server import RedisServer, redis_server
from tests.support.tcp_forwarder import TcpForwarder
from tests.support.tcp_servers import stay_silent, tcp_server

RECOVERY_SECONDS = 5.0
PREFIX = "p:"


@pytest.fixture
def old_server() -> Iterator[RedisServer]:
    with redis_server() as running:
        yield running


@pytest.fixture
def new_server() -> Iterator[RedisServer]:
    with redis_server() as running:
        yield running


async def demote(server: RedisServer) -> None:
    """READONLY for writes."""
    async with Redis.from_url(server.url) as client:
        await client.replicaof("127.0.0.1", free_port())


async def lose_its_primary(server: RedisServer) -> None:
    """MASTERDOWN for every command that uses data."""
    async with Redis.from_url(server.url) as client:
        await client.config_set("replica-serve-stale-data", "no")
        await client.replicaof("127.0.0.1", free_port())


async def require_a_password(server: RedisServer) -> None:
    """NOAUTH or WRONGPASS on new connections, and NOPERM on those that are open."""
    async with Redis.from_url(server.url) as client:
        await client.execute_command("ACL", "SETUSER", "default", "off", "nocommands")  # type: ignore[no-untyped-call]


async def lose_memory(server: RedisServer) -> None:
    """OOM for writes."""
    async with Redis.from_url(server.url) as client:
        await client.config_set("maxmemory", "1")


async def stay_demoted_for_a_while(server: RedisServer) -> None:
    """The breaker opens while the address still leads to the old server."""
    await demote(server)
    await asyncio.sleep(1.0)


Fault = Callable[[RedisServer], Coroutine[object, object, None]]
FAULTS: list[Fault] = [
    demote,
    lose_its_primary,
    require_a_password,
    lose_memory,
    stay_demoted_for_a_while,
]


def result() -> CachedResult:
    now = time.time()
    return CachedResult(b"{}", "application/json", now, now + 60)


async def wait_for_use(breaker: StoreBreaker) -> float:
    """Wait until the store can be written again, and return the seconds."""
    started = time.monotonic()
    async with asyncio.timeout(RECOVERY_SECONDS):
        while breaker.is_open or await is_unusable(breaker):
            await asyncio.sleep(0.02)
    return time.monotonic() - started


async def is_unusable(breaker: StoreBreaker) -> bool:
    try:
        await breaker.call(breaker.store.finish("k", "t", result()))
    except StoreError:
        return True
    return False


@pytest.mark.parametrize("fault", FAULTS)
async def test_the_new_server_is_used_after_the_address_has_moved(
    old_server: RedisServer, new_server: RedisServer, fault: Fault
) -> None:
    async with (
        TcpForwarder(old_server.port).running() as address,
        StoreBreaker(RedisStore(address.url, prefix=PREFIX)) as breaker,
        RedisStore(new_server.url, prefix=PREFIX) as other,
    ):
        store = breaker.store
        await asyncio.gather(*(store.get(str(n)) for n in range(20)))  # opens connections
        await fault(old_server)
        address.target = new_server.port
        seconds = await wait_for_use(breaker)
        print(f"{fault.__name__}: used again after {seconds:.2f} s")
        assert (await other.get("k")).result is not None
        with store.watch("w") as changed:
            async with asyncio.timeout(RECOVERY_SECONDS):
                while not changed.is_set():  # the subscription has moved as well
                    await other.finish("w", "t", None)
                    await asyncio.sleep(0.05)


@pytest.mark.slow(seconds=4)
async def test_a_replaced_server_gets_the_owners_of_every_process(
    old_server: RedisServer, new_server: RedisServer
) -> None:
    async with (
        TcpForwarder(old_server.port).running() as address,
        StoreBreaker(RedisStore(address.url, prefix=PREFIX)) as first,
        StoreBreaker(RedisStore(address.url, prefix=PREFIX)) as second,
    ):
        ownerships = [RequestOwnership(breaker.store, breaker) for breaker in (first, second)]
        owner = RequestOwner("ann", "mark")
        await asyncio.sleep(0.5)  # both have seen the content of the old server
        await ownerships[0].add("1", owner)
        await ownerships[1].add("2", owner)
        await demote(old_server)
        address.target = new_server.port
        found = await asyncio.gather(ownerships[1].get("1"), ownerships[0].get("2"))
        assert {*found} == {owner}
        assert await ownerships[0].get("3") is None


async def test_a_subscription_leaves_a_server_that_does_not_respond(
    old_server: RedisServer, new_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for limit in ("CALL_TIMEOUT", "PUBSUB_IDLE_TIMEOUT"):
        monkeypatch.setattr(f"falproxy.stores.cache.redis_messages.{limit}", 0.2)
    async with (
        tcp_server(stay_silent) as silent,
        TcpForwarder(old_server.port).running() as address,
        RedisStore(address.url, prefix=PREFIX) as store,
        RedisStore(new_server.url, prefix=PREFIX) as other,
    ):
        with store.watch("w") as changed:
            async with asyncio.timeout(RECOVERY_SECONDS):
                await changed.wait()  # it has subscribed
                address.target, accepted = silent, address.accepted
                await close_subscriptions(old_server)
                while address.accepted == accepted:
                    await asyncio.sleep(0.01)
                address.target = new_server.port
                changed.clear()
                while not changed.is_set():
                    await other.finish("w", "t", None)
                    await asyncio.sleep(0.05)


async def close_subscriptions(server: RedisServer) -> None:
    async with Redis.from_url(server.url) as client:
        await client.client_kill_filter(_type="pubsub")
