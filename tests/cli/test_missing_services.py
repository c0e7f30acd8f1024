"""A start while a service is away: it has one line in the log, and is used when it is there."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from aiohttp import ClientSession

from tests.support.cli_process import CliProcess, run_command
from tests.support.key_search import CANARY
from tests.support.ports import free_port
from tests.support.postgres_server import PostgresServer
from tests.support.redis_server import RedisServer
from tests.support.waiting import SOON

pytestmark = pytest.mark.slow(seconds=3)

OTHER_WARNINGS = ("is set without",)


@dataclass(frozen=True, slots=True)
class Missing:
    """env: settings with the service. start: starts it. log: a part of the line about it."""

    name: str
    env: dict[str, str]
    start: Callable[[], AbstractAsyncContextManager[None]]
    log: str


def listening(port: int) -> Callable[[], AbstractAsyncContextManager[None]]:
    @asynccontextmanager
    async def start() -> AsyncIterator[None]:
        server = await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", port)
        async with server:
            yield

    return start


def missing_fal() -> Missing:
    port = free_port()
    env = {"FALPROXY_UPSTREAM_ORIGIN": f"http://127.0.0.1:{port}"}
    return Missing("fal", env, listening(port), "fal cannot be reached (nothing listens there)")


def missing_supabase() -> Missing:
    port = free_port()
    env = {"SUPABASE_URL": f"http://127.0.0.1:{port}", "SUPABASE_KEY": "sb_secret_of_a_test"}
    log = "Supabase (SUPABASE_URL) cannot be reached (nothing listens there)"
    return Missing("supabase", env, listening(port), log)


def missing_redis() -> Missing:
    server = RedisServer()

    @asynccontextmanager
    async def start() -> AsyncIterator[None]:
        server.start()
        try:
            yield
        finally:
            server.close()

    return Missing("redis", {"REDIS_URL": server.url}, start, "Redis cannot be used")


def missing_postgres() -> Missing:
    server = PostgresServer()
    server.create()

    @asynccontextmanager
    async def start() -> AsyncIterator[None]:
        await asyncio.to_thread(server.start)
        try:
            yield
        finally:
            server.close()

    return Missing("postgres", {"DATABASE_URL": server.url}, start, "it cannot be reached")


async def dependencies(session: ClientSession, proxy: CliProcess) -> dict[str, str]:
    async with session.get(f"{proxy.origin}/health/ready") as response:
        assert response.status == 200
        document = await response.json()
    assert document["status"] == "ok"
    found: dict[str, str] = document["dependencies"]
    return found


@pytest.mark.parametrize(
    "create",
    [
        pytest.param(missing_fal, id="fal"),
        pytest.param(missing_supabase, id="supabase"),
        pytest.param(missing_redis, id="redis"),
        pytest.param(missing_postgres, id="postgres"),
    ],
)
@pytest.mark.parametrize("workers", ["1", "2"])
async def test_the_proxy_starts_without_a_service_and_uses_it_later(
    create: Callable[[], Missing], workers: str, tmp_path: Path
) -> None:
    missing = create()
    env = {"FAL_KEY": CANARY, "FALPROXY_ACCESS_KEYS": "ann:a-key-of-the-test", "CWD": str(tmp_path)}
    async with (
        listening(fal_port := free_port())(),
        run_command(
            *("serve", "--workers", workers),
            **env | {"FALPROXY_UPSTREAM_ORIGIN": f"http://127.0.0.1:{fal_port}"} | missing.env,
        ) as proxy,
        ClientSession() as session,
    ):
        async with asyncio.timeout(SOON):
            while (await dependencies(session, proxy))[missing.name] != "down":
                await asyncio.sleep(0.05)
        async with missing.start(), asyncio.timeout(20):
            while (await dependencies(session, proxy))[missing.name] != "up":
                await asyncio.sleep(0.05)
            warnings = [
                str(line["message"])
                for line in proxy.log
                if line["level"] == "warning" and not is_other(str(line["message"]))
            ]
            assert missing.log in warnings[0]
            about = [text for text in warnings if missing.log in text]
            assert len(about) <= (1 if missing.name in ("fal", "supabase") else int(workers))
            assert await proxy.stop() == 0


def is_other(message: str) -> bool:
    return any(part in message for part in OTHER_WARNINGS)


async def test_the_ledger_is_not_called_written_again_at_a_stop(tmp_path: Path) -> None:
    env = {"DATABASE_URL": f"postgresql://user:pw@127.0.0.1:{free_port()}/db"}
    async with run_command("serve", FAL_KEY=CANARY, CWD=str(tmp_path), **env) as proxy:
        assert await proxy.stop() == 0
    assert not any("written again" in str(line["message"]) for line in proxy.log)


async def test_health_itself_has_the_status_only(tmp_path: Path) -> None:
    async with (
        run_command("serve", FAL_KEY=CANARY, CWD=str(tmp_path)) as proxy,
        ClientSession() as session,
        session.get(f"{proxy.origin}/health") as response,
    ):
        assert await response.json() == {"status": "ok"}
