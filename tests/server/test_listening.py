"""Addresses: both families, several hosts, Unix sockets, and sockets from a service manager."""

import asyncio
import os
import signal
import socket
import stat
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, closing
from pathlib import Path

import pytest
from aiohttp import ClientSession, UnixConnector

from falproxy.errors import SettingsError
from falproxy.server import listeners
from tests.support.cli_process import (
    CliProcess,
    base_environment,
    run_command,
    run_refused,
    run_server,
    start_command,
)
from tests.support.fake_fal import FakeFal
from tests.support.key_search import CANARY
from tests.support.ports import free_port
from tests.support.urls import PROXY, RUN
from tests.support.waiting import wait_until

pytestmark = pytest.mark.slow

if not sys.platform.startswith("linux"):
    pytest.skip("needs abstract sockets", allow_module_level=True)

ALL_KINDS = pytest.mark.parametrize("workers", ["1", "2"])


@pytest.fixture
def env(fal: FakeFal, tmp_path: Path) -> dict[str, str]:
    return {
        "FAL_KEY": CANARY,
        "FALPROXY_UPSTREAM_ORIGIN": fal.origin,
        "CWD": str(tmp_path),
        "FALPROXY_DRAIN": "2",
    }


@pytest.fixture
def socket_file() -> Iterator[Path]:
    """A path with a short name: those of Unix sockets are limited."""
    with tempfile.TemporaryDirectory(prefix="fp-", dir="/tmp") as folder:
        yield Path(folder) / "proxy.sock"


@asynccontextmanager
async def serving_unix(
    path: Path, workers: str, env: dict[str, str]
) -> AsyncIterator[tuple[CliProcess, ClientSession]]:
    process = CliProcess(
        await start_command("serve", "--workers", workers, "--uds", str(path), **env)
    )
    reading = asyncio.ensure_future(process.read_log())
    try:
        async with asyncio.timeout(20):
            while not any(
                f"listens on unix:{path}" in str(each["message"]) for each in process.log
            ):
                assert process.process.returncode is None, process.log
                await asyncio.sleep(0.01)
        async with ClientSession(connector=UnixConnector(str(path))) as session:
            yield process, session
    finally:
        if process.process.returncode is None:
            process.process.kill()
            await process.process.wait()
        await process.end_reading(reading)


async def run(session: ClientSession, origin: str) -> int:
    headers = {"x-fal-target-url": RUN, "Host": "localhost"}
    async with session.post(origin + PROXY, json={}, headers=headers) as response:
        return response.status


@ALL_KINDS
async def test_two_colons_serve_both_families(env: dict[str, str], workers: str) -> None:
    async with (
        run_command("serve", "--host", "::", "--workers", workers, **env) as proxy,
        ClientSession() as session,
    ):
        port = proxy.origin.rpartition(":")[2]
        assert proxy.origin == f"http://[::]:{port}"
        for host in ("127.0.0.1", "[::1]"):
            assert await run(session, f"http://{host}:{port}") == 200
        assert await proxy.stop() == 0


@ALL_KINDS
@pytest.mark.parametrize("hosts", ["127.0.0.1,::1", "0.0.0.0, ::", "127.0.0.2,[::1],127.0.0.1"])
async def test_several_hosts_have_one_port(env: dict[str, str], workers: str, hosts: str) -> None:
    arguments = ("serve", "--host", hosts, "--port", "0")
    async with (
        run_server(start_command(*arguments, "--workers", workers, **env)) as proxy,
        ClientSession() as session,
    ):
        port = proxy.origin.rpartition(":")[2]
        for host in ("127.0.0.1", "[::1]"):
            assert await run(session, f"http://{host}:{port}") == 200
        assert await proxy.stop() == 0


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[socket.socket]]:
    """Sockets of another program, which uses the first two ports at the second host."""
    sockets: list[socket.socket] = []

    def resolve_late(host: str, port: int) -> dict[listeners.SocketAddress, None]:
        if host == "127.0.0.2" and len(sockets) < 2:
            sockets.append(socket.create_server((host, port)))
        return resolve(host, port)

    resolve = listeners.resolve
    monkeypatch.setattr(listeners, "resolve", resolve_late)
    yield sockets
    for each in sockets:
        each.close()


@pytest.mark.parametrize("is_reserved", [False, True])
def test_a_free_port_is_free_at_all_hosts(taken: list[socket.socket], *, is_reserved: bool) -> None:
    address = listeners.ListenAddress(hosts=("127.0.0.1", "127.0.0.2"), port=0)
    with ExitStack() as stack:
        if is_reserved:
            found, opened = stack.enter_context(listeners.reserve_address(address))
            assert found.port == opened[0].getsockname()[1]
        else:
            opened = stack.enter_context(listeners.open_listeners(address))
        (port,) = {each.getsockname()[1] for each in opened}
    assert [each.getsockname()[0] for each in taken] == ["127.0.0.2"] * 2
    assert port not in {each.getsockname()[1] for each in taken}


def test_a_port_that_was_chosen_is_not_replaced(taken: list[socket.socket]) -> None:
    address = listeners.ListenAddress(hosts=("127.0.0.1", "127.0.0.2"), port=free_port())
    with pytest.raises(SettingsError, match=r"127\.0\.0\.2:\d+: address already in use"):
        listeners.bind_free_port(listeners.bind_reserved, address)
    assert len(taken) == 1


@pytest.mark.parametrize("option", ["--host", "--port", "--uds", "--workers", "--log-level"])
async def test_an_empty_option_is_refused(env: dict[str, str], option: str) -> None:
    assert f"{option} is empty" in await run_refused("serve", option, "", **env)


@pytest.mark.parametrize("hosts", [",", "127.0.0.1,", ",::", " , "])
async def test_an_empty_host_is_refused(env: dict[str, str], hosts: str) -> None:
    assert "FALPROXY_HOST must be" in await run_refused("serve", "--host", hosts, **env)


@ALL_KINDS
async def test_a_second_host_that_cannot_be_used_is_named(
    env: dict[str, str], workers: str
) -> None:
    arguments = ("serve", "--workers", workers, "--port", str(free_port()))
    message = await run_refused(*arguments, "--host", "127.0.0.1,192.0.2.1", **env)
    assert "Cannot listen on 192.0.2.1:" in message


@ALL_KINDS
async def test_a_unix_socket_serves_calls_and_is_removed(
    env: dict[str, str], socket_file: Path, workers: str
) -> None:
    async with serving_unix(socket_file, workers, env) as (proxy, session):
        assert stat.S_IMODE(socket_file.stat().st_mode) == 0o660
        assert await run(session, "http://localhost") == 200
        assert await proxy.stop() == 0
        assert not socket_file.exists()


@ALL_KINDS
async def test_the_socket_of_a_killed_process_is_replaced(
    env: dict[str, str], socket_file: Path, workers: str
) -> None:
    async with serving_unix(socket_file, workers, env) as (proxy, session):
        assert await run(session, "http://localhost") == 200
        proxy.process.kill()
        await proxy.process.wait()
    await wait_until(lambda: not is_used(socket_file), seconds=20)
    async with serving_unix(socket_file, workers, env) as (proxy, session):
        assert await run(session, "http://localhost") == 200
        assert await proxy.stop() == 0


def is_used(path: Path) -> bool:
    with closing(socket.socket(socket.AF_UNIX)) as probe:
        return probe.connect_ex(str(path)) == 0


async def test_a_socket_in_use_is_refused(env: dict[str, str], socket_file: Path) -> None:
    async with serving_unix(socket_file, "1", env) as (_, session):
        message = await run_refused("serve", "--uds", str(socket_file), **env)
        assert "another process listens there" in message
        assert await run(session, "http://localhost") == 200


@pytest.mark.parametrize(
    ("name", "reason"),
    [("file", "file exists"), ("no/folder", "no such file"), ("x" * 200, "path is too long")],
)
async def test_a_path_that_cannot_be_used_is_refused(
    env: dict[str, str], socket_file: Path, name: str, reason: str
) -> None:
    other = socket_file.parent / "file"
    other.write_text("mine")
    message = await run_refused("serve", "--uds", str(socket_file.parent / name), **env)
    assert reason in message
    assert other.read_text() == "mine"


async def test_a_socket_that_another_process_has_replaced_stays(
    env: dict[str, str], socket_file: Path
) -> None:
    async with serving_unix(socket_file, "1", env) as (proxy, _):
        socket_file.unlink()
        with closing(socket.socket(socket.AF_UNIX)) as other:
            other.bind(str(socket_file))
            assert await proxy.stop() == 0
            assert socket_file.exists()


@ALL_KINDS
async def test_sockets_of_a_service_manager_are_used(env: dict[str, str], workers: str) -> None:
    """systemd passes sockets from descriptor 3 on, to the process whose id it names."""
    code = (
        "import os, sys; os.dup2(int(sys.argv[1]), 3);"
        "os.environ['LISTEN_PID'] = str(os.getpid());"
        "os.execv(sys.executable, [sys.executable, '-m', 'falproxy', 'serve', '--workers',"
        " sys.argv[2]])"
    )
    with socket.create_server(("127.0.0.1", 0)) as listener:
        origin = f"http://127.0.0.1:{listener.getsockname()[1]}"
        folder = env.pop("CWD")
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", code, str(listener.fileno()), workers),
            env=base_environment() | env | {"LISTEN_FDS": "1"},
            cwd=folder,
            pass_fds=[listener.fileno()],
        )
        async with ClientSession() as session:
            assert await run(session, origin) == 200  # waits in the queue of the socket
        process.send_signal(signal.SIGTERM)
        assert await process.wait() == 0


async def test_passed_sockets_of_another_process_are_not_used(env: dict[str, str]) -> None:
    passed = {"LISTEN_FDS": "1", "LISTEN_PID": str(os.getpid())}
    async with run_command("serve", **env, **passed) as proxy:
        assert proxy.origin.startswith("http://127.0.0.1:")
