"""Groups of commands to Redis."""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any
from unittest.mock import Mock

import pytest
from redis.asyncio.connection import AbstractConnection

from falproxy.stores.redis_client import CALL_TIMEOUT, MAX_GROUPS, RedisClient, Script
from tests.support.redis_server import RedisServer, redis_server
from tests.support.tcp_forwarder import TcpForwarder


class ClientError(Exception):
    pass


ADD = Script("return redis.call('INCRBY', KEYS[1], ARGV[1])")


@pytest.fixture(scope="module")
def redis() -> Iterator[RedisServer]:
    with redis_server() as running:
        yield running


@pytest.fixture
async def client(redis: RedisServer) -> AsyncIterator[RedisClient]:
    opened = RedisClient(redis.url, ClientError, is_grouped=True)
    await opened.execute("PING")
    yield opened
    await opened.close()


async def increments(client: RedisClient, key: str, number: int) -> list[object]:
    return await asyncio.gather(*(client.execute("INCR", key) for _ in range(number)))


async def test_commands_that_wait_share_connections(redis: RedisServer) -> None:
    async with TcpForwarder(redis.port).running() as address:
        client = RedisClient(address.url, ClientError, is_grouped=True)
        await client.execute("DEL", "shared")
        for _ in range(3):
            await increments(client, "shared", 100)
        assert await client.execute("GET", "shared") == b"300"
        assert address.accepted <= MAX_GROUPS
        await client.close()


async def test_a_new_connection_reads_no_files_of_the_library(
    redis: RedisServer, client: RedisClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_version = Mock(return_value="1")
    monkeypatch.setattr("importlib.metadata.version", read_version)
    opened = RedisClient(redis.url, ClientError)
    await increments(opened, "new", 5)
    await opened.close()
    assert not read_version.called


async def test_each_command_gets_its_own_reply(client: RedisClient) -> None:
    await client.execute("DEL", "own")
    assert await increments(client, "own", 50) == list(range(1, 51))


async def test_a_command_fails_alone(client: RedisClient) -> None:
    await client.execute("SET", "text", "text")
    await client.execute("DEL", "number")
    outcomes = await asyncio.gather(
        client.execute("INCR", "number"),
        client.execute("INCR", "text"),
        client.execute("NO SUCH COMMAND"),
        client.execute("INCR", "number"),
        return_exceptions=True,
    )
    assert [outcome for outcome in outcomes if not isinstance(outcome, ClientError)] == [1, 2]
    assert client.has_failed


async def test_scripts_that_the_server_does_not_know_run_once_each(client: RedisClient) -> None:
    for _ in range(2):
        await client.execute("SCRIPT", "FLUSH")
        await client.execute("DEL", "sum")
        await asyncio.gather(*(client.run_script(ADD, ["sum"], [1]) for _ in range(20)))
        assert await client.execute("GET", "sum") == b"20"
    assert not client.has_failed


async def test_the_cancellation_of_a_caller_loses_no_other_command(client: RedisClient) -> None:
    await client.execute("DEL", "cancelled")
    callers = [asyncio.create_task(client.execute("INCR", "cancelled")) for _ in range(20)]
    await asyncio.sleep(0)
    callers[3].cancel()  # before the group has started
    outcomes = await asyncio.gather(*callers, return_exceptions=True)
    assert sum(isinstance(outcome, asyncio.CancelledError) for outcome in outcomes) == 1
    assert await client.execute("GET", "cancelled") == b"19"


async def test_a_large_command_is_sent_apart(client: RedisClient) -> None:
    content = bytes(2**20)
    commands = (client.execute("SET", name, content) for name in ("large", "also large"))
    assert await asyncio.gather(*commands, client.execute("SET", "small", b"1")) == [True] * 3
    assert await client.execute("GETRANGE", "large", 0, -1) == content


@pytest.mark.slow(seconds=8)
@pytest.mark.parametrize("is_grouped", [True, False])
async def test_a_busy_event_loop_is_no_timeout(redis: RedisServer, is_grouped: bool) -> None:
    client = RedisClient(redis.url, ClientError, is_grouped=is_grouped)
    try:
        for command in ("PING", "TIME"):  # with the connect, and after it
            replies = [asyncio.ensure_future(client.execute(command)) for _ in range(3)]
            for _ in range(3):
                await asyncio.sleep(0)
            time.sleep(CALL_TIMEOUT + 0.5)  # noqa: ASYNC251
            assert len(await asyncio.gather(*replies)) == 3
        assert not client.has_failed
    finally:
        await client.close()


async def test_commands_of_a_lost_connection_fail_and_later_ones_do_not() -> None:
    with redis_server() as own:
        client = RedisClient(own.url, ClientError, is_grouped=True)
        await client.execute("PING")
        own.kill()
        outcomes = await asyncio.gather(
            *(client.execute("PING") for _ in range(10)), return_exceptions=True
        )
        assert all(isinstance(outcome, ClientError) for outcome in outcomes)
        assert client.has_failed
        own.start()
        client.reconnect()
        assert {*await increments(client, "after", 3)} == {1, 2, 3}
        await client.close()


@pytest.mark.timed
async def test_commands_to_a_frozen_server_fail_in_time() -> None:
    with redis_server() as own:
        client = RedisClient(own.url, ClientError, is_grouped=True)
        await client.execute("PING")
        own.freeze()
        started = time.monotonic()
        calls = []
        for _ in range(20):  # more groups than run at the same time
            calls += [asyncio.create_task(client.execute("PING")) for _ in range(5)]
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
        own.thaw()
        assert all(isinstance(outcome, ClientError) for outcome in outcomes)
        assert time.monotonic() - started < CALL_TIMEOUT + 1
        await client.close()


@pytest.mark.timed
async def test_a_scan_of_a_frozen_server_fails_in_time() -> None:
    with redis_server() as own:
        client = RedisClient(own.url, ClientError)
        await client.execute("SET", "key", b"1")
        assert [name async for name in client.scan("*", 10)] == [b"key"]
        own.freeze()
        started = time.monotonic()
        with pytest.raises(ClientError, match="TimeoutError"):
            _ = [name async for name in client.scan("*", 10)]
        own.thaw()
        assert time.monotonic() - started < CALL_TIMEOUT + 1
        await client.close()


@pytest.fixture
def closed_writes(monkeypatch: pytest.MonkeyPatch) -> list[RuntimeError]:
    """Errors of writes to a connection that has just been closed, by uvloop; raised once."""
    errors: list[RuntimeError] = []
    send = AbstractConnection.send_packed_command

    async def send_or_raise(connection: AbstractConnection, *args: Any, **options: Any) -> None:
        if errors:
            raise errors.pop()
        await send(connection, *args, **options)

    monkeypatch.setattr(AbstractConnection, "send_packed_command", send_or_raise)
    return errors


@pytest.mark.parametrize("is_grouped", [True, False])
async def test_a_write_to_a_closed_connection_is_an_error_of_redis(
    redis: RedisServer, closed_writes: list[RuntimeError], is_grouped: bool
) -> None:
    client = RedisClient(redis.url, ClientError, is_grouped=is_grouped)
    await client.execute("PING")
    for call in (client.execute("PING"), client.run_script(ADD, ["closed"], [1])):
        closed_writes.append(RuntimeError("unable to perform operation on <TCPTransport>"))
        with pytest.raises(ClientError, match="RuntimeError"):
            await call
        assert client.has_failed
    assert await client.execute("PING") in (True, b"PONG")
    await client.close()
