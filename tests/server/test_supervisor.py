"""Worker processes on one port: real ones, which are killed, frozen and stopped."""

import asyncio
import json
import os
import re
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from uuid import uuid4

import pytest
from aiohttp import ClientError, ClientSession, ClientTimeout, TCPConnector, web

from falproxy.metrics import METRICS, Metrics
from falproxy.server.supervisor import WorkerContext
from falproxy.server.worker_metrics import (
    SNAPSHOT_TIMEOUT,
    fetch_snapshot,
    share_metrics,
    socket_path,
)
from falproxy.stores.ledger.process_starts import read_starts
from falproxy.stores.ledger.sqlite import sqlite_ledger
from tests.support.cli_process import (
    CliProcess,
    run_command,
    run_refused,
    run_server,
    start_command,
)
from tests.support.fake_fal import FakeFal, respond_hello
from tests.support.key_search import CANARY
from tests.support.ports import free_port
from tests.support.urls import PROXY, REQUEST, RUN
from tests.support.waiting import wait_until

LONG_TIMEOUT = 30.0  # seconds; of `wait_until`

pytestmark = pytest.mark.slow

if not sys.platform.startswith("linux"):
    pytest.skip("needs the process table in /proc", allow_module_level=True)

POLL = {"x-fal-target-url": f"{REQUEST}/status"}
RESTART = re.compile(r"Worker (\d) \(process (\d+)\) ended with (.*); it is restarted in (\S+) s")


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """A folder with a short name: the paths of Unix sockets are limited."""
    folder = tempfile.mkdtemp(prefix="fp-", dir="/tmp")
    yield Path(folder)
    shutil.rmtree(folder)


@pytest.fixture
def env(fal: FakeFal, tmp_path: Path, short_folder: Path) -> dict[str, str]:
    return {
        "FAL_KEY": CANARY,
        "FALPROXY_UPSTREAM_ORIGIN": fal.origin,
        "FALPROXY_WORKERS": "2",
        "FALPROXY_DRAIN": "10",
        "TMPDIR": str(short_folder),
        "CWD": str(tmp_path),
    }


async def until_async(is_true: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(LONG_TIMEOUT):
        while not await is_true():
            await asyncio.sleep(0.02)


def worker_pids(proxy: CliProcess) -> set[int]:
    """Return the process ids of the workers."""
    try:
        pid = proxy.process.pid
        return {*map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())}
    except FileNotFoundError:
        return set()


def sockets_of(env: dict[str, str]) -> list[Path]:
    return [*Path(env["TMPDIR"]).glob("falproxy-workers-*/*.sock")]


@asynccontextmanager
async def serving(env: dict[str, str], workers: int = 2) -> AsyncIterator[CliProcess]:
    """Context manager: start a proxy and wait until all its workers accept calls."""
    async with run_command("serve", "--workers", str(workers), **env) as proxy:
        await until_all_serve(proxy, env, workers)
        yield proxy


async def until_all_serve(proxy: CliProcess, env: dict[str, str], workers: int = 2) -> None:
    port = int(proxy.origin.rpartition(":")[2])
    await wait_until(
        lambda: len(worker_pids(proxy)) == workers == listeners(port), seconds=LONG_TIMEOUT
    )


def listeners(port: int) -> int:
    """Return the number of sockets that listen on a port."""
    address = f"{socket.htonl(0x7F000001):08X}:{port:04X}"
    lines = Path("/proc/net/tcp").read_text().splitlines()
    return sum(line.split()[1] == address and line.split()[3] == "0A" for line in lines)


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"  # in a container, orphans may not be reaped


async def poll(origin: str) -> str:
    """Poll a status on a new connection. Return the id that the proxy gave the request."""
    async with (
        ClientSession(timeout=ClientTimeout(LONG_TIMEOUT)) as session,
        session.get(origin + PROXY, headers=POLL) as response,
    ):
        assert response.status == 200
        return response.headers["X-Request-ID"]


async def poll_counts(env: dict[str, str]) -> list[int]:
    """Return the number of polls that each worker has served."""
    snapshots = [await fetch_snapshot(path) for path in sockets_of(env)]
    return [
        snapshot["requests"].get("status 200 ", 0) for snapshot in snapshots if snapshot is not None
    ]


async def test_all_workers_serve(env: dict[str, str]) -> None:
    async with serving(env, workers=3) as proxy:
        messages = [line["message"] for line in proxy.log if "listens on" in str(line["message"])]
        assert len(messages) == 1
        assert "with 3 workers" in str(messages[0])
        ids = [await poll(proxy.origin) for _ in range(20)]

        async def have_all_served() -> bool:
            ids.append(await poll(proxy.origin))
            counts = await poll_counts(env)
            return len(counts) == 3 and all(counts)

        await until_async(have_all_served)
        assert len({*ids}) == len(ids)
        assert sum(await poll_counts(env)) == len(ids)
        assert await proxy.stop() == 0
    assert [*Path(env["TMPDIR"]).iterdir()] == []


async def test_metrics_are_the_sum_of_all_workers(env: dict[str, str]) -> None:
    async with serving(env) as proxy, ClientSession() as session:
        for _ in range(30):
            await poll(proxy.origin)
        for _ in range(5):
            async with session.get(f"{proxy.origin}/metrics") as response:
                text = await response.text()
            assert re.search(r'falproxy_requests_total{.*operation="status".*} 30\.0', text)


async def test_a_killed_worker_is_restarted(env: dict[str, str]) -> None:
    async with serving(env) as proxy:
        killed = min(worker_pids(proxy))
        os.kill(killed, signal.SIGKILL)
        await wait_until(lambda: exits(proxy), seconds=LONG_TIMEOUT)
        assert exits(proxy) == [("1", str(killed), "signal 9", "0.1")]
        await until_all_serve(proxy, env)
        for _ in range(10):
            await poll(proxy.origin)
        await wait_until(lambda: len(sockets_of(env)) == 2, seconds=LONG_TIMEOUT)
        assert await proxy.stop() == 0


async def test_the_ledger_has_the_starts_of_all_workers(env: dict[str, str]) -> None:
    """Also that of a worker that was restarted."""

    async def starts() -> int:
        async with sqlite_ledger(Path(env["CWD"]) / ".falproxy" / "ledger.sqlite") as ledger:
            return sum(mark.processes for mark in await read_starts(ledger, 0, time.time() + 60))

    async def are_recorded() -> bool:
        return await starts() == expected

    expected = 2
    async with serving(env) as proxy:
        await until_async(are_recorded)
        os.kill(min(worker_pids(proxy)), signal.SIGKILL)
        expected = 3
        await until_async(are_recorded)
        assert await proxy.stop() == 0
    assert await starts() == expected


async def test_the_counters_of_a_killed_worker_stay(env: dict[str, str]) -> None:
    async def samples() -> dict[str, float]:
        async with ClientSession() as session, session.get(f"{proxy.origin}/metrics") as response:
            found = re.findall(r"^([^# ].*) ([0-9.e+]+)$", await response.text(), re.MULTILINE)
        return {name: float(value) for name, value in found}

    polls = 'falproxy_requests_total{cache="",operation="status",status="200"}'
    async with serving(env) as proxy:
        for _ in range(30):
            await poll(proxy.origin)
        folder = next(Path(env["TMPDIR"]).glob("falproxy-workers-*"))

        async def are_saved() -> bool:
            saved = [json.loads(path.read_text()) for path in folder.glob("*.json")]
            return sum(int(each["requests"].get("status 200 ", 0)) for each in saved) == 30

        await until_async(are_saved)
        for restarts in (1, 2):
            os.kill(min(worker_pids(proxy)), signal.SIGKILL)
            await wait_until(lambda: len(exits(proxy)) == restarts, seconds=LONG_TIMEOUT)  # noqa: B023
            await until_all_serve(proxy, env)
            await wait_until(lambda: len(sockets_of(env)) == 2, seconds=LONG_TIMEOUT)
            found = await samples()
            assert found[polls] == 30
            assert found["falproxy_worker_restarts_total"] == restarts
            assert found["falproxy_requests_in_progress"] == 0
        assert await proxy.stop() == 0


async def test_the_delay_of_restarts_grows(env: dict[str, str]) -> None:
    async with serving(env) as proxy:
        survivor = max(worker_pids(proxy))
        for crashes in range(1, 4):
            await wait_until(lambda: worker_pids(proxy) - {survivor}, seconds=LONG_TIMEOUT)
            (other,) = worker_pids(proxy) - {survivor}
            os.kill(other, signal.SIGKILL)
            await wait_until(partial(have_exited, proxy, crashes), seconds=LONG_TIMEOUT)
        assert [seconds for *_, seconds in exits(proxy)] == ["0.1", "0.2", "0.4"]
        assert await poll(proxy.origin)


def have_exited(proxy: CliProcess, crashes: int) -> bool:
    return len(exits(proxy)) == crashes


def exits(proxy: CliProcess) -> list[tuple[str, ...]]:
    """Return slot, process id, exit status and restart delay of each worker that crashed."""
    matches = (RESTART.search(str(line["message"])) for line in proxy.log)
    return [match.groups() for match in matches if match is not None]


async def test_a_worker_that_gets_sigterm_finishes_its_calls(
    env: dict[str, str], fal: FakeFal
) -> None:
    release = asyncio.Event()
    fal.respond = held_until(release)
    async with serving(env) as proxy, ClientSession() as session:
        before = worker_pids(proxy)
        call = asyncio.ensure_future(run(session, proxy))
        await wait_until(lambda: fal.seen, seconds=LONG_TIMEOUT)
        for pid in before:
            os.kill(pid, signal.SIGTERM)
            os.kill(pid, signal.SIGTERM)
        await wait_until(lambda: sum(map(is_alive, before)) == 1, seconds=LONG_TIMEOUT)
        release.set()
        assert await call == {"finished": True}
        await wait_until(lambda: not worker_pids(proxy) & before, seconds=LONG_TIMEOUT)
        await until_all_serve(proxy, env)
        assert await proxy.stop() == 0


def held_until(release: asyncio.Event) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    async def respond(request: web.Request) -> web.StreamResponse:
        await release.wait()
        return web.json_response({"finished": True})

    return respond


async def run(session: ClientSession, proxy: CliProcess) -> object:
    headers = {"x-fal-target-url": RUN}
    async with session.post(proxy.origin + PROXY, json={}, headers=headers) as response:
        return await response.json()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_stop_lets_running_calls_finish(
    env: dict[str, str], fal: FakeFal, number: signal.Signals
) -> None:
    release = asyncio.Event()
    fal.respond = held_until(release)
    async with serving(env) as proxy, ClientSession(connector=TCPConnector(limit=0)) as session:
        calls = [asyncio.ensure_future(run(session, proxy)) for _ in range(8)]
        await wait_until(lambda: len(fal.seen) == 8, seconds=LONG_TIMEOUT)
        stopping = asyncio.ensure_future(proxy.stop(number))
        port = int(proxy.origin.rpartition(":")[2])
        await wait_until(lambda: listeners(port) == 0, seconds=LONG_TIMEOUT)
        release.set()
        assert await asyncio.gather(*calls) == [{"finished": True}] * 8
        assert await stopping == 0


async def test_a_second_signal_kills_the_workers(env: dict[str, str], fal: FakeFal) -> None:
    fal.respond = held_until(asyncio.Event())
    async with serving(env | {"FALPROXY_DRAIN": "300"}) as proxy, ClientSession() as session:
        workers = worker_pids(proxy)
        call = asyncio.ensure_future(run(session, proxy))
        await wait_until(lambda: fal.seen, seconds=LONG_TIMEOUT)
        proxy.process.send_signal(signal.SIGTERM)
        await wait_until(
            lambda: any("Stopping" in str(line["message"]) for line in proxy.log),
            seconds=LONG_TIMEOUT,
        )
        proxy.process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(LONG_TIMEOUT):
            assert await proxy.process.wait() == 128 + signal.SIGTERM
        assert not any(map(is_alive, workers))
        with pytest.raises(ClientError):
            await call


async def test_a_worker_that_does_not_stop_is_killed(env: dict[str, str]) -> None:
    async with serving(env | {"FALPROXY_DRAIN": "0.5"}) as proxy:
        workers = worker_pids(proxy)
        os.kill(min(workers), signal.SIGSTOP)
        proxy.process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(LONG_TIMEOUT):
            assert await proxy.process.wait() == 1
        assert not any(map(is_alive, workers))


async def test_workers_stop_when_the_supervisor_dies(env: dict[str, str], fal: FakeFal) -> None:
    release = asyncio.Event()
    fal.respond = held_until(release)
    drain = {"FALPROXY_DRAIN": "60"}  # longer than the start of another proxy
    async with serving(env | drain) as proxy, ClientSession() as session:
        workers = worker_pids(proxy)
        call = asyncio.ensure_future(run(session, proxy))
        await wait_until(lambda: fal.seen, seconds=LONG_TIMEOUT)
        proxy.process.kill()
        await wait_until(lambda: sum(map(is_alive, workers)) == 1, seconds=LONG_TIMEOUT)
        port = proxy.origin.rpartition(":")[2]
        fal.respond = respond_hello
        await serve_at(port, env)  # while the old ones finish their calls
        release.set()
        assert await call == {"finished": True}
        await wait_until(lambda: not any(map(is_alive, workers)), seconds=LONG_TIMEOUT)


@pytest.mark.parametrize("workers", ["1", "2"])
async def test_a_port_in_use_by_workers_is_refused(env: dict[str, str], workers: str) -> None:
    async with serving(env) as proxy:
        port = proxy.origin.rpartition(":")[2]
        error_output = await run_refused("serve", "--workers", workers, "--port", port, **env)
        assert error_output == (
            f"falproxy: Cannot listen on 127.0.0.1:{port}: address already in use. "
            "Choose another with --host and --port.\n"
        )
        await poll(proxy.origin)


async def test_the_error_of_a_port_in_use_gives_the_reason(env: dict[str, str]) -> None:
    with socket.create_server(("127.0.0.1", 0), reuse_port=True) as listener:
        port = str(listener.getsockname()[1])
        assert "address already in use" in await run_refused("serve", "--port", port, **env)


async def test_a_port_can_be_used_again_at_once(env: dict[str, str]) -> None:
    port = str(free_port())
    for workers in ("2", "1", "2", "1"):
        await serve_at(port, env | {"FALPROXY_WORKERS": workers})


async def serve_at(port: str, env: dict[str, str]) -> None:
    """Start a proxy on this port, send one call, and stop it."""
    async with run_server(start_command("serve", "--port", port, **env)) as proxy:
        async with asyncio.timeout(LONG_TIMEOUT):
            while not await is_polled(proxy.origin):
                pass
        assert await proxy.stop() == 0


async def is_polled(origin: str) -> bool:
    try:
        await poll(origin)
    except ClientError:
        await asyncio.sleep(0.02)
        return False
    return True


async def test_the_error_of_an_unknown_host_names_it(env: dict[str, str]) -> None:
    error_output = await run_refused("serve", "--host", "no.such.host.invalid", **env)
    assert "the address of FALPROXY_HOST, port 8080: there is no such host" in error_output


async def test_a_name_with_several_addresses_has_one_port(env: dict[str, str]) -> None:
    async with run_command("serve", "--host", "localhost", **env) as proxy:
        assert await poll(proxy.origin)
        assert await proxy.stop() == 0


async def test_a_first_worker_that_fails_ends_the_command(env: dict[str, str]) -> None:
    models_file = Path(env["CWD"]) / "own.toml"
    models_file.write_text("[models.mine]\nendpoint = 7\n")
    error_output = await run_refused(
        "serve", "--port", "0", **env, FALPROXY_MODELS=str(models_file)
    )
    assert error_output.startswith("falproxy: FALPROXY_MODELS is wrong at models.mine.endpoint: ")


async def test_the_sandbox_has_no_workers(env: dict[str, str]) -> None:
    error_output = await run_refused("serve", "--sandbox", **env)
    assert (
        error_output == "falproxy: The sandbox runs in one process: leave FALPROXY_WORKERS at 1.\n"
    )


@pytest.mark.parametrize("count", ["0", "-1", "two", "1000"])
async def test_an_invalid_number_of_workers_is_refused(env: dict[str, str], count: str) -> None:
    error_output = await run_refused("serve", "--workers", count, **env)
    assert error_output == ("falproxy: FALPROXY_WORKERS must be a whole number from 1 to 256.\n")


async def test_the_warning_of_an_open_proxy_is_logged_once(env: dict[str, str]) -> None:
    async with run_command("serve", "--host", "0.0.0.0", **env) as proxy:
        await wait_until(lambda: len(worker_pids(proxy)) == 2, seconds=LONG_TIMEOUT)
        assert await proxy.stop() == 0
    assert sum("OPEN" in str(line["message"]) for line in proxy.log) == 1


async def test_equal_calls_to_several_workers_are_paid_once(
    env: dict[str, str], fal: FakeFal
) -> None:
    paid: list[str] = []

    async def respond(request: web.Request) -> web.StreamResponse:
        if request.method == "POST":
            paid.append(str(uuid4()))
            await asyncio.sleep(0.3)
            document = {"status": "IN_QUEUE", "request_id": paid[-1], "queue_position": 0}
            return web.json_response(document, headers={"x-fal-request-id": paid[-1]})
        document = {"status": "IN_PROGRESS", "request_id": paid[0]}
        return web.json_response(document, status=202, headers={"x-fal-request-id": paid[0]})

    fal.respond = respond
    kontext = "https://queue.fal.run/fal-ai/flux-pro/kontext"
    keys = {"FALPROXY_ACCESS_KEYS": "ann:ann-s-long-secret,bob:bob-s-long-secret"}
    ann, bob = ({"x-falproxy-key": f"{name}-s-long-secret"} for name in ("ann", "bob"))
    body = {"prompt": "a lighthouse", "image_url": "data:image/gif;base64,R0lGODlhAQABAAAAACw="}

    async def send_request(
        method: str, url: str, caller: dict[str, str]
    ) -> tuple[int, dict[str, str]]:
        async with (
            ClientSession(
                timeout=ClientTimeout(LONG_TIMEOUT)
            ) as session,  # a connection of its own
            session.request(
                method,
                proxy.origin + PROXY,
                json=body if method == "POST" else None,
                headers=caller | {"x-fal-target-url": url},
            ) as response,
        ):
            return response.status, await response.json()

    async with serving(env | keys) as proxy:
        responses = await asyncio.gather(*(send_request("POST", kontext, ann) for _ in range(50)))
        assert {status for status, _ in responses} == {200}
        ids = [document["request_id"] for _, document in responses]
        assert (len(paid), len({*ids})) == (1, 50)
        app = "https://queue.fal.run/fal-ai/flux-pro"
        for request_id in ids[:5]:
            status = f"{app}/requests/{request_id}/status"
            statuses = await asyncio.gather(*(send_request("GET", status, ann) for _ in range(8)))
            assert {code for code, _ in statuses} == {202}, statuses
            statuses = await asyncio.gather(*(send_request("GET", status, bob) for _ in range(8)))
            assert {code for code, _ in statuses} == {404}


async def test_a_worker_without_metrics_is_left_out(
    short_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    is_over = asyncio.Event()

    async def never_respond(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()
        await writer.wait_closed()
        is_over.set()

    server = await asyncio.start_unix_server(never_respond, short_folder / "1.sock")
    async with asyncio.timeout(SNAPSHOT_TIMEOUT + LONG_TIMEOUT):
        assert await fetch_snapshot(short_folder / "1.sock") is None
        await is_over.wait()
    server.close()
    assert await fetch_snapshot(short_folder / "2.sock") is None
    assert sum("left out" in record.message for record in caplog.records) == 2


async def test_a_folder_with_a_name_that_is_too_long_is_an_error(tmp_path: Path) -> None:
    folder = tmp_path / ("long" * 30)
    folder.mkdir()
    app = web.Application()
    app[METRICS] = Metrics()
    share_metrics(app, folder)
    with pytest.raises(ValueError, match="Workers cannot share their numbers below"):
        await web.AppRunner(app).setup()
    assert socket_path(folder, 7).name == "7.sock"


def test_a_worker_that_starts_when_its_supervisor_has_died_reports_no_error() -> None:
    """It notices that by its stop pipe, and stops."""
    reader, ready_pipe = os.pipe()
    os.close(reader)
    WorkerContext(-1, None, ready_pipe).signal_ready()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.close(ready_pipe)
