"""One of several processes cannot use Redis: what only it knows is not missing for the others."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass

import pytest

from falproxy.errors import TemporaryError
from falproxy.stores.cache import RequestOwner, StoreError, VirtualRequest
from falproxy.stores.cache.circuit_breaker import SLOW_SECONDS, StoreBreaker
from falproxy.stores.cache.redis import RedisStore
from falproxy.stores.cache.virtual_requests import VirtualRequests, new_virtual_id
from falproxy.stores.ownership import RequestOwnership
from tests.support.redis_server import redis_server
from tests.support.tcp_forwarder import TcpForwarder
from tests.support.waiting import SOON, wait_until

TIMEOUT = 20.0  # seconds; of `wait_until`

pytestmark = pytest.mark.slow(seconds=5)

REPLY_DELAY = 1.5  # seconds, more than the time limit of a probe
REQUEST_ID, OTHER_ID = new_virtual_id(), new_virtual_id()


@dataclass(frozen=True, slots=True)
class Process:
    """find: returns whether there is an entry; raises if it cannot be looked up."""

    breaker: StoreBreaker
    add: Callable[[str], Awaitable[None]]
    find: Callable[[str], Awaitable[bool]]


def owners(url: str) -> Process:
    breaker = StoreBreaker(RedisStore(url))
    ownership = RequestOwnership(breaker.store, breaker)

    async def find(request_id: str) -> bool:
        return await ownership.get(request_id) is not None

    return Process(breaker, lambda request_id: ownership.add(request_id, OWNER), find)


def virtual_requests(url: str) -> Process:
    breaker = StoreBreaker(RedisStore(url))
    known = VirtualRequests(breaker)

    async def find(request_id: str) -> bool:
        return await known.find(request_id) is not None

    return Process(breaker, lambda request_id: known.put(request_id, VIRTUAL_REQUEST), find)


OWNER = RequestOwner("ann", "mark")
VIRTUAL_REQUEST = VirtualRequest("key", "ann", "fal-ai/flux-pro")
KINDS = pytest.mark.parametrize("create", [owners, virtual_requests])


@asynccontextmanager
async def processes(
    create: Callable[[str], Process],
) -> AsyncIterator[tuple[Process, Process, TcpForwarder]]:
    """Context: a process whose way to Redis may be slow, another one, and that way."""
    with redis_server() as redis:
        async with TcpForwarder(redis.port).running() as way:
            first, other = create(way.url), create(redis.url)
            async with first.breaker, other.breaker:
                yield first, other, way


async def until_missing(process: Process, request_id: str) -> None:
    """Wait until it is certain that there is no such entry."""
    async with asyncio.timeout(TIMEOUT):
        while True:
            try:
                is_found = await process.find(request_id)
            except (StoreError, TemporaryError):
                await asyncio.sleep(0.05)
            else:
                assert not is_found
                return


@KINDS
async def test_an_entry_of_a_process_that_cannot_write_it_is_not_missing(
    create: Callable[[str], Process],
) -> None:
    async with processes(create) as (first, other, way):
        for process in (first, other):
            await until_missing(process, REQUEST_ID)  # both have reported
        way.reply_delay = REPLY_DELAY
        await wait_until(lambda: first.breaker.is_open, seconds=TIMEOUT)
        await first.add(REQUEST_ID)
        with pytest.raises((StoreError, TemporaryError)):
            await other.find(REQUEST_ID)
        way.reply_delay = 0.0
        async with asyncio.timeout(TIMEOUT):
            while not await finds(other):
                await asyncio.sleep(0.05)


async def finds(process: Process) -> bool:
    """Fails if the entry is missing."""
    try:
        assert await process.find(REQUEST_ID)
    except (StoreError, TemporaryError):
        return False
    return True


@KINDS
async def test_an_unknown_id_is_missing_again_when_all_processes_work(
    create: Callable[[str], Process],
) -> None:
    async with processes(create) as (first, other, way):
        await until_missing(first, REQUEST_ID)  # it has reported
        way.reply_delay = REPLY_DELAY
        await wait_until(lambda: first.breaker.is_open, seconds=TIMEOUT)
        with pytest.raises((StoreError, TemporaryError)):
            await other.find(REQUEST_ID)
        way.reply_delay = 0.0
        await until_missing(other, REQUEST_ID)


@KINDS
async def test_a_process_that_has_stopped_does_not_count(
    create: Callable[[str], Process],
) -> None:
    with redis_server() as redis:
        first, other = create(redis.url), create(redis.url)
        async with other.breaker:
            async with first.breaker:
                await until_missing(first, REQUEST_ID)
            await until_missing(other, REQUEST_ID)


@KINDS
async def test_a_process_that_stops_writes_its_entries_although_it_skips_the_store(
    create: Callable[[str], Process],
) -> None:
    with redis_server() as redis:
        async with TcpForwarder(redis.port).running() as way:
            first, other = create(way.url), create(redis.url)
            async with other.breaker:
                async with first.breaker:
                    way.reply_delay = REPLY_DELAY
                    await wait_until(lambda: first.breaker.is_open, seconds=TIMEOUT)
                    await first.add(REQUEST_ID)
                    way.reply_delay = 0.0
                assert await other.find(REQUEST_ID)


@KINDS
async def test_entries_of_a_process_with_a_slow_store_are_found(
    create: Callable[[str], Process],
) -> None:
    """A process that skips a slow store writes to it in the background."""
    async with processes(create) as (first, other, way):
        await first.find(new_virtual_id())  # both have seen the store
        way.reply_delay = 3 * SLOW_SECONDS
        await wait_until(lambda: first.breaker.is_open, seconds=TIMEOUT)
        await first.add(REQUEST_ID)
        async with asyncio.timeout(SOON):
            while True:
                with suppress(StoreError, TemporaryError):
                    if await other.find(REQUEST_ID):
                        break
                await asyncio.sleep(0.05)
        assert first.breaker.is_open
        await other.add(OTHER_ID)
        assert await first.find(OTHER_ID)
        assert not await first.find(new_virtual_id())
