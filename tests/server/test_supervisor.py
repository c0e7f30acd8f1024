"""Several processes on one port: real ones, which are killed, frozen and left alone."""

import asyncio
import os
import re
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from uuid import uuid4

import pytest
from aiohttp import ClientError, ClientSession, ClientTimeout, TCPConnector, web

from falproxy.server.worker_metrics import (
    SNAPSHOT_TIMEOUT,
    fetch_snapshot,
    share_metrics,
    socket_path,
)
from tests.support.cli_process import Process, refused, running
from tests.support.fake_fal import FakeFal, say_hello
from tests.support.key_search import CANARY
from tests.support.urls import PROXY, REQUEST, RUN

pytestmark = pytest.mark.slow

if not sys.platform.startswith("linux"):
    pytest.skip("/proc says which processes there are", allow_module_level=True)

PATIENT = 30.0  # seconds, for machines that do much else
POLL = {"x-fal-target-url": f"{REQUEST}/status"}
RESTART = re.compile(r"Worker (\d) \(process (\d+)\) ended with (.*); it is restarted in (\S+) s")


@pytest.fixture
def short() -> Iterator[Path]:
    """A folder with a short name, since those of sockets may not be long."""
    folder = tempfile.mkdtemp(prefix="fp-", dir="/tmp")
    yield Path(folder)
    shutil.rmtree(folder)


@pytest.fixture
def env(fal: FakeFal, tmp_path: Path, short: Path) -> dict[str, str]:
    return {
        "FAL_KEY": CANARY,
        "FALPROXY_UPSTREAM_ORIGIN": fal.origin,
        "FALPROXY_WORKERS": "2",
        "FALPROXY_DRAIN": "10",
        "TMPDIR": str(short),
        "CWD": str(tmp_path),
    }


async def until(is_so: Callable[[], object]) -> None:
    async with asyncio.timeout(PATIENT):
        while not is_so():
            await asyncio.sleep(0.01)


async def until_told(is_so: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(PATIENT):
        while not await is_so():
            await asyncio.sleep(0.02)


def workers_of(proxy: Process) -> set[int]:
    """The processes that serve."""
    try:
        pid = proxy.process.pid
        return {*map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())}
    except FileNotFoundError:
        return set()


def sockets_of(env: dict[str, str]) -> list[Path]:
    return [*Path(env["TMPDIR"]).glob("falproxy-workers-*/*.sock")]


@asynccontextmanager
async def serving(env: dict[str, str], workers: int = 2) -> AsyncIterator[Process]:
    """A proxy all of whose workers accept calls."""
    async with running("serve", "--workers", str(workers), **env) as proxy:
        await until_all_serve(proxy, env, workers)
        yield proxy


async def until_all_serve(proxy: Process, env: dict[str, str], workers: int = 2) -> None:
    port = int(proxy.origin.rpartition(":")[2])
    await until(lambda: len(workers_of(proxy)) == workers == listeners(port))


def listeners(port: int) -> int:
    """How many sockets accept connections there."""
    place = f"{socket.htonl(0x7F000001):08X}:{port:04X}"
    lines = Path("/proc/net/tcp").read_text().splitlines()
    return sum(line.split()[1] == place and line.split()[3] == "0A" for line in lines)


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"  # nobody reaps the children of who is killed, in a container


async def poll(origin: str) -> str:
    """A status, on a connection of its own; the id that the proxy gave the request."""
    async with (
        ClientSession(timeout=ClientTimeout(PATIENT)) as session,
        session.get(origin + PROXY, headers=POLL) as response,
    ):
        assert response.status == 200
        return response.headers["X-Request-ID"]


async def counts(env: dict[str, str]) -> list[int]:
    """Polls that each worker has answered."""
    told = [await fetch_snapshot(path) for path in sockets_of(env)]
    return [each["requests"].get("status 200 ", 0) for each in told if each is not None]


async def test_all_workers_serve(env: dict[str, str]) -> None:
    async with serving(env, workers=3) as proxy:
        said = [line["message"] for line in proxy.log if "listens on" in str(line["message"])]
        assert len(said) == 1
        assert "with 3 workers" in str(said[0])
        ids = [await poll(proxy.origin) for _ in range(20)]

        async def all_have() -> bool:
            ids.append(await poll(proxy.origin))
            found = await counts(env)
            return len(found) == 3 and all(found)

        await until_told(all_have)
        assert len({*ids}) == len(ids)
        assert sum(await counts(env)) == len(ids)
        assert await proxy.end() == 0
    assert [*Path(env["TMPDIR"]).iterdir()] == []


async def test_one_page_has_the_numbers_of_all(env: dict[str, str]) -> None:
    async with serving(env) as proxy, ClientSession() as session:
        for _ in range(30):
            await poll(proxy.origin)
        for _ in range(5):
            async with session.get(f"{proxy.origin}/metrics") as response:
                page = await response.text()
            assert re.search(r'falproxy_requests_total{.*operation="status".*} 30\.0', page)


async def test_a_worker_that_is_killed_has_a_successor(env: dict[str, str]) -> None:
    async with serving(env) as proxy:
        killed = min(workers_of(proxy))
        os.kill(killed, signal.SIGKILL)
        await until(lambda: ends_of(proxy))
        assert ends_of(proxy) == [("1", str(killed), "signal 9", "0.1")]
        await until_all_serve(proxy, env)
        for _ in range(10):
            await poll(proxy.origin)
        await until(lambda: len(sockets_of(env)) == 2)
        assert await proxy.end() == 0


async def test_a_worker_that_dies_again_and_again_is_waited_for_ever_longer(
    env: dict[str, str],
) -> None:
    async with serving(env) as proxy:
        steady = max(workers_of(proxy))
        for deaths in range(1, 4):
            await until(lambda: workers_of(proxy) - {steady})
            (other,) = workers_of(proxy) - {steady}
            os.kill(other, signal.SIGKILL)
            await until(partial(have_ended, proxy, deaths))
        assert [seconds for *_, seconds in ends_of(proxy)] == ["0.1", "0.2", "0.4"]
        assert await poll(proxy.origin)


def have_ended(proxy: Process, deaths: int) -> bool:
    return len(ends_of(proxy)) == deaths


def ends_of(proxy: Process) -> list[tuple[str, ...]]:
    """Of the workers that ended unasked: place, process, how, seconds until there is another."""
    told = (RESTART.search(str(line["message"])) for line in proxy.log)
    return [match.groups() for match in told if match is not None]


async def test_a_worker_that_is_told_to_stop_finishes_what_it_does(
    env: dict[str, str], fal: FakeFal
) -> None:
    release = asyncio.Event()
    fal.answer = held_until(release)
    async with serving(env) as proxy, ClientSession() as session:
        before = workers_of(proxy)
        call = asyncio.ensure_future(run(session, proxy))
        await until(lambda: fal.seen)
        for pid in before:
            os.kill(pid, signal.SIGTERM)
            os.kill(pid, signal.SIGTERM)
        await until(lambda: sum(map(is_alive, before)) == 1)
        release.set()
        assert await call == {"finished": True}
        await until(lambda: not workers_of(proxy) & before)
        await until_all_serve(proxy, env)
        assert await proxy.end() == 0


def held_until(release: asyncio.Event) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    async def answer(request: web.Request) -> web.StreamResponse:
        await release.wait()
        return web.json_response({"finished": True})

    return answer


async def run(session: ClientSession, proxy: Process) -> object:
    headers = {"x-fal-target-url": RUN}
    async with session.post(proxy.origin + PROXY, json={}, headers=headers) as response:
        return await response.json()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_stop_lets_running_calls_finish(
    env: dict[str, str], fal: FakeFal, number: signal.Signals
) -> None:
    release = asyncio.Event()
    fal.answer = held_until(release)
    async with serving(env) as proxy, ClientSession(connector=TCPConnector(limit=0)) as session:
        calls = [asyncio.ensure_future(run(session, proxy)) for _ in range(8)]
        await until(lambda: len(fal.seen) == 8)
        ending = asyncio.ensure_future(proxy.end(number))
        port = int(proxy.origin.rpartition(":")[2])
        await until(lambda: listeners(port) == 0)
        release.set()
        assert await asyncio.gather(*calls) == [{"finished": True}] * 8
        assert await ending == 0


async def test_a_second_signal_does_not_wait(env: dict[str, str], fal: FakeFal) -> None:
    fal.answer = held_until(asyncio.Event())
    async with serving(env | {"FALPROXY_DRAIN": "300"}) as proxy, ClientSession() as session:
        workers = workers_of(proxy)
        call = asyncio.ensure_future(run(session, proxy))
        await until(lambda: fal.seen)
        proxy.process.send_signal(signal.SIGTERM)
        await until(lambda: any("Stopping" in str(line["message"]) for line in proxy.log))
        proxy.process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(PATIENT):
            assert await proxy.process.wait() == 128 + signal.SIGTERM
        assert not any(map(is_alive, workers))
        with pytest.raises(ClientError):
            await call


async def test_a_worker_that_does_not_end_is_killed(env: dict[str, str]) -> None:
    async with serving(env | {"FALPROXY_DRAIN": "0.5"}) as proxy:
        workers = workers_of(proxy)
        os.kill(min(workers), signal.SIGSTOP)
        proxy.process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(PATIENT):
            assert await proxy.process.wait() == 1
        assert not any(map(is_alive, workers))


async def test_workers_do_not_outlive_who_looks_after_them(
    env: dict[str, str], fal: FakeFal
) -> None:
    release = asyncio.Event()
    fal.answer = held_until(release)
    async with serving(env) as proxy, ClientSession() as session:
        workers = workers_of(proxy)
        call = asyncio.ensure_future(run(session, proxy))
        await until(lambda: fal.seen)
        proxy.process.kill()
        await until(lambda: sum(map(is_alive, workers)) == 1)
        port = proxy.origin.rpartition(":")[2]
        fal.answer = say_hello
        await serve_at(port, env)  # while the old ones finish what they do
        release.set()
        assert await call == {"finished": True}
        await until(lambda: not any(map(is_alive, workers)))


@pytest.mark.parametrize("workers", ["1", "2"])
async def test_a_port_with_workers_is_not_shared_by_accident(
    env: dict[str, str], workers: str
) -> None:
    async with serving(env) as proxy:
        port = proxy.origin.rpartition(":")[2]
        said = await refused("serve", "--workers", workers, "--port", port, **env)
        assert said == (
            f"falproxy: Cannot listen on 127.0.0.1:{port}: address already in use. "
            "Choose another with --host and --port.\n"
        )
        await poll(proxy.origin)


async def test_a_port_in_use_is_named(env: dict[str, str]) -> None:
    with socket.create_server(("127.0.0.1", 0), reuse_port=True) as taken:
        port = str(taken.getsockname()[1])
        assert "address already in use" in await refused("serve", "--port", port, **env)


async def test_a_port_can_be_used_again_at_once(env: dict[str, str]) -> None:
    async with serving(env) as proxy:
        port = proxy.origin.rpartition(":")[2]
        await poll(proxy.origin)
        assert await proxy.end() == 0
    for workers in ("1", "2", "1"):
        await serve_at(port, env | {"FALPROXY_WORKERS": workers})


async def serve_at(port: str, env: dict[str, str]) -> None:
    """A proxy on that very port, which answers a call and ends."""
    again = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "falproxy", "serve", "--port", port),
        env={"PATH": os.environ["PATH"]} | env,
        cwd=env["CWD"],
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        async with asyncio.timeout(PATIENT):
            while not await is_polled(f"http://127.0.0.1:{port}"):
                assert again.returncode is None
    finally:
        if again.returncode is None:
            again.terminate()
        assert await again.wait() == 0


async def is_polled(origin: str) -> bool:
    try:
        await poll(origin)
    except ClientError:
        await asyncio.sleep(0.02)
        return False
    return True


async def test_a_host_that_is_none_is_named(env: dict[str, str]) -> None:
    said = await refused("serve", "--host", "no.such.host.invalid", **env)
    assert "Cannot listen on no.such.host.invalid:8080: there is no such host" in said


async def test_a_name_with_several_addresses_has_one_port(env: dict[str, str]) -> None:
    async with running("serve", "--host", "localhost", **env) as proxy:
        assert await poll(proxy.origin)
        assert await proxy.end() == 0


async def test_what_no_worker_can_start_with_stops_the_start(env: dict[str, str]) -> None:
    own = Path(env["CWD"]) / "own.toml"
    own.write_text("[models.mine]\nendpoint = 7\n")
    said = await refused("serve", "--port", "0", **env, FALPROXY_MODELS=str(own))
    assert said.startswith("falproxy: FALPROXY_MODELS is wrong at models.mine.endpoint: ")


async def test_the_sandbox_has_no_workers(env: dict[str, str]) -> None:
    said = await refused("serve", "--sandbox", **env)
    assert said == "falproxy: The sandbox lives in one process: leave FALPROXY_WORKERS at 1.\n"


@pytest.mark.parametrize("count", ["0", "-1", "two", "1000"])
async def test_a_number_of_workers_makes_sense(env: dict[str, str], count: str) -> None:
    said = await refused("serve", "--workers", count, **env)
    assert said == (
        f"falproxy: FALPROXY_WORKERS must be a whole number from 1 to 256, not '{count}'.\n"
    )


async def test_an_open_door_is_said_once(env: dict[str, str]) -> None:
    async with running("serve", "--host", "0.0.0.0", **env) as proxy:
        await until(lambda: len(workers_of(proxy)) == 2)
        assert await proxy.end() == 0
    assert sum("OPEN" in str(line["message"]) for line in proxy.log) == 1


async def test_one_of_many_equal_calls_is_paid_whichever_workers_get_them(
    env: dict[str, str], fal: FakeFal
) -> None:
    paid: list[str] = []

    async def answer(request: web.Request) -> web.StreamResponse:
        if request.method == "POST":
            paid.append(str(uuid4()))
            await asyncio.sleep(0.3)
            told = {"status": "IN_QUEUE", "request_id": paid[-1], "queue_position": 0}
            return web.json_response(told, headers={"x-fal-request-id": paid[-1]})
        told = {"status": "IN_PROGRESS", "request_id": paid[0]}
        return web.json_response(told, status=202, headers={"x-fal-request-id": paid[0]})

    fal.answer = answer
    kontext = "https://queue.fal.run/fal-ai/flux-pro/kontext"
    keys = {"FALPROXY_ACCESS_KEYS": "ann:ann-s-long-secret,bob:bob-s-long-secret"}
    ann, bob = ({"x-falproxy-key": f"{name}-s-long-secret"} for name in ("ann", "bob"))
    body = {"prompt": "a lighthouse", "image_url": "data:image/gif;base64,R0lGODlhAQABAAAAACw="}

    async def ask_for(method: str, url: str, who: dict[str, str]) -> tuple[int, dict[str, str]]:
        async with (
            ClientSession(timeout=ClientTimeout(PATIENT)) as session,  # a connection of its own
            session.request(
                method,
                proxy.origin + PROXY,
                json=body if method == "POST" else None,
                headers=who | {"x-fal-target-url": url},
            ) as response,
        ):
            return response.status, await response.json()

    async with serving(env | keys) as proxy:
        answers = await asyncio.gather(*(ask_for("POST", kontext, ann) for _ in range(50)))
        assert {status for status, _ in answers} == {200}
        ids = [document["request_id"] for _, document in answers]
        assert (len(paid), len({*ids})) == (1, 50)
        app = "https://queue.fal.run/fal-ai/flux-pro"
        for request_id in ids[:5]:
            status = f"{app}/requests/{request_id}/status"
            told = await asyncio.gather(*(ask_for("GET", status, ann) for _ in range(8)))
            assert {code for code, _ in told} == {202}, told
            told = await asyncio.gather(*(ask_for("GET", status, bob) for _ in range(8)))
            assert {code for code, _ in told} == {404}


async def test_who_does_not_tell_its_numbers_is_left_out(
    short: Path, caplog: pytest.LogCaptureFixture
) -> None:
    is_over = asyncio.Event()

    async def say_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()
        await writer.wait_closed()
        is_over.set()

    server = await asyncio.start_unix_server(say_nothing, short / "1.sock")
    async with asyncio.timeout(SNAPSHOT_TIMEOUT + PATIENT):
        assert await fetch_snapshot(short / "1.sock") is None
        await is_over.wait()
    server.close()
    assert await fetch_snapshot(short / "2.sock") is None
    assert sum("left out" in record.message for record in caplog.records) == 2


async def test_a_folder_whose_name_is_too_long_is_named(tmp_path: Path) -> None:
    folder = tmp_path / ("long" * 30)
    folder.mkdir()
    app = web.Application()
    share_metrics(app, folder)
    with pytest.raises(ValueError, match="Workers cannot share their numbers below"):
        await web.AppRunner(app).setup()
    assert socket_path(folder, 7).name == "7.sock"
