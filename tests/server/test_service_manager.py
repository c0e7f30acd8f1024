"""Notifications of a service manager, with the socket that systemd would read."""

import asyncio
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from falproxy.server.service_manager import ServiceManager
from tests.support.cli_process import run_command
from tests.support.fake_fal import FakeFal
from tests.support.key_search import CANARY

if not sys.platform.startswith("linux"):
    pytest.skip("needs abstract sockets", allow_module_level=True)

ALL_KINDS = pytest.mark.parametrize("workers", ["1", "2"])


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        name = f"\0falproxy-test-{os.getpid()}" if request.param == "abstract" else "notify"
        if request.param == "path":
            name = f"/tmp/fp-notify-{os.getpid()}"
        receiver.bind(name)
        receiver.setblocking(False)
        yield receiver
    if request.param == "path":
        Path(name).unlink()


def address(manager: socket.socket) -> str:
    name = manager.getsockname()
    return "@" + name[1:].decode() if isinstance(name, bytes) else str(name)


@pytest.fixture
def env(fal: FakeFal, tmp_path: Path, manager: socket.socket) -> dict[str, str]:
    return {
        "FAL_KEY": CANARY,
        "FALPROXY_UPSTREAM_ORIGIN": fal.origin,
        "CWD": str(tmp_path),
        "NOTIFY_SOCKET": address(manager),
    }


async def receive(manager: socket.socket, is_last: Callable[[str], bool]) -> list[str]:
    """Return the messages up to one."""
    messages: list[str] = []
    async with asyncio.timeout(20):
        while not messages or not is_last(messages[-1]):
            data = await asyncio.get_running_loop().sock_recv(manager, 4096)
            messages.append(data.decode())
    return messages


@pytest.mark.slow
@ALL_KINDS
async def test_the_states_of_a_process(
    env: dict[str, str], manager: socket.socket, workers: str
) -> None:
    async with run_command("serve", "--workers", workers, **env) as proxy:
        assert await receive(manager, lambda _: True) == ["READY=1"]
        proxy.process.send_signal(signal.SIGHUP)
        reloading, ready = await receive(manager, lambda text: text == "READY=1")
        state, _, clock = reloading.partition("\n")
        assert (state, ready) == ("RELOADING=1", "READY=1")
        assert int(clock.removeprefix("MONOTONIC_USEC=")) > 0
        assert await proxy.stop() == 0
        assert await receive(manager, lambda _: True) == ["STOPPING=1"]


@pytest.mark.slow
@ALL_KINDS
async def test_the_watchdog_is_notified_that_the_process_runs(
    env: dict[str, str], manager: socket.socket, workers: str
) -> None:
    async with run_command("serve", "--workers", workers, WATCHDOG_USEC="400000", **env) as proxy:
        for _ in range(3):
            await receive(manager, lambda text: text == "WATCHDOG=1")
        assert await proxy.stop() == 0


@pytest.mark.slow
async def test_a_service_manager_that_is_away_does_not_matter(
    env: dict[str, str], tmp_path: Path
) -> None:
    async with run_command("serve", **env | {"NOTIFY_SOCKET": str(tmp_path / "none")}) as proxy:
        assert await proxy.stop() == 0


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        pytest.param({}, ServiceManager(), id="none"),
        pytest.param({"NOTIFY_SOCKET": "@a"}, ServiceManager("@a"), id="no watchdog"),
        pytest.param(
            {"NOTIFY_SOCKET": "/a", "WATCHDOG_USEC": "3000000", "WATCHDOG_PID": "7"},
            ServiceManager("/a", 3.0),
            id="watchdog",
        ),
        pytest.param(
            {"WATCHDOG_USEC": "3000000", "WATCHDOG_PID": "8", "LISTEN_FDS": "2", "LISTEN_PID": "8"},
            ServiceManager(),
            id="of another process",
        ),
        pytest.param(
            {"WATCHDOG_USEC": "soon", "LISTEN_FDS": "-1", "LISTEN_PID": "7"},
            ServiceManager(),
            id="no numbers",
        ),
        pytest.param(
            {"LISTEN_FDS": "2", "LISTEN_PID": "7"}, ServiceManager("", None, 2), id="sockets"
        ),
    ],
)
def test_variables_are_read(variables: dict[str, str], expected: ServiceManager) -> None:
    assert ServiceManager.from_variables(variables, 7) == expected
