"""SIGHUP: new settings for open connections, without a call that fails."""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import ClientSession, web

from falproxy.server.fast_path.protocol import ProxyServer
from falproxy.server.reload import CHECK_INTERVAL, ReloadableRunner
from tests.support.cli_process import CliProcess, run_command
from tests.support.fake_fal import FakeFal, respond_hello
from tests.support.key_search import CANARY
from tests.support.urls import PROXY, REQUEST, RUN
from tests.support.waiting import wait_until

TIMEOUT = 20.0  # seconds; of `wait_until`

pytestmark = pytest.mark.slow

if not sys.platform.startswith("linux"):
    pytest.skip("needs /proc", allow_module_level=True)

ANN, BOB = "an-access-key-of-ann", "an-access-key-of-bob"
ALL_KINDS = pytest.mark.parametrize("workers", [1, 2])


def count(proxy: CliProcess, text: str) -> int:
    """Return the number of log lines with a text."""
    return sum(text in str(line["message"]) for line in proxy.log)


class Dotenv:
    """The `.env` file of a proxy."""

    def __init__(self, folder: Path, **values: str) -> None:
        self.folder = folder
        self._values = values
        self.write()

    def write(self, **values: str) -> None:
        self._values |= values
        lines = [f"{name}={value}\n" for name, value in self._values.items()]
        (self.folder / ".env").write_text("".join(lines))


@pytest.fixture
def dotenv(tmp_path: Path, fal: FakeFal) -> Dotenv:
    return Dotenv(
        tmp_path,
        FAL_KEY=CANARY,
        FALPROXY_UPSTREAM_ORIGIN=fal.origin,
        FALPROXY_ACCESS_KEYS=f"ann:{ANN}",
        FALPROXY_DRAIN="4",
    )


@asynccontextmanager
async def serving(dotenv: Dotenv, workers: int = 1) -> AsyncIterator[CliProcess]:
    arguments = ("serve", "--workers", str(workers))
    async with run_command(*arguments, CWD=str(dotenv.folder)) as proxy:
        pid = proxy.process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children")
        await wait_until(
            lambda: workers == 1 or len(children.read_text().split()) == workers, seconds=TIMEOUT
        )
        yield proxy


async def reload(proxy: CliProcess, workers: int) -> None:
    before = count(proxy, "The settings were reloaded")
    proxy.process.send_signal(signal.SIGHUP)
    await wait_until(
        lambda: count(proxy, "The settings were reloaded") == before + workers, seconds=TIMEOUT
    )


async def call(session: ClientSession, proxy: CliProcess, key: str, url: str = RUN) -> int:
    headers = {"x-fal-target-url": url, "x-falproxy-key": key}
    method = "POST" if url == RUN else "GET"
    async with session.request(
        method, proxy.origin + PROXY, json={} if url == RUN else None, headers=headers
    ) as response:
        await response.read()
        return response.status


@ALL_KINDS
async def test_keys_are_read_again_for_open_connections(dotenv: Dotenv, workers: int) -> None:
    async with serving(dotenv, workers) as proxy, ClientSession() as session:
        sessions = [session]
        assert await call(session, proxy, ANN) == 200
        assert await call(session, proxy, BOB) == 401
        dotenv.write(FALPROXY_ACCESS_KEYS=f"bob:{BOB}")
        await reload(proxy, workers)
        for each in sessions:
            assert await call(each, proxy, BOB) == 200
            assert await call(each, proxy, ANN) == 401
        assert await proxy.stop() == 0


async def test_a_removed_key_leaves_the_fast_path(dotenv: Dotenv, fal: FakeFal) -> None:
    async with serving(dotenv) as proxy, ClientSession() as session:
        for _ in range(5):
            assert await call(session, proxy, ANN, f"{REQUEST}/status") in (200, 404)
        dotenv.write(FALPROXY_ACCESS_KEYS=f"bob:{BOB}")
        await reload(proxy, 1)
        seen = len(fal.seen)
        for _ in range(5):
            assert await call(session, proxy, ANN, f"{REQUEST}/status") == 401
        assert len(fal.seen) == seen


@ALL_KINDS
async def test_the_fal_key_is_read_again(dotenv: Dotenv, fal: FakeFal, workers: int) -> None:
    async with serving(dotenv, workers) as proxy, ClientSession() as session:
        await call(session, proxy, ANN)
        dotenv.write(AI_KEYS=f"{CANARY}-2")
        await reload(proxy, workers)
        await call(session, proxy, ANN)
        keys = [seen.header("authorization") for seen in fal.seen]
        assert keys == [f"Key {CANARY}", f"Key {CANARY}-2"]


@ALL_KINDS
async def test_the_models_file_is_read_again(dotenv: Dotenv, workers: int) -> None:
    models = dotenv.folder / "own.toml"
    models.write_text('[models.mine]\nendpoint = "me/mine"\n')
    dotenv.write(FALPROXY_MODELS=str(models))
    async with serving(dotenv, workers) as proxy, ClientSession() as session:

        async def names() -> str:
            headers = {"x-falproxy-key": ANN}
            url = f"{proxy.origin}/api/images/models"
            async with session.get(url, headers=headers) as response:
                assert response.status == 200
                return await response.text()

        assert "mine" in await names()
        models.write_text('[models.yours]\nendpoint = "you/yours"\n')
        await reload(proxy, workers)
        assert "yours" in await names()


@ALL_KINDS
async def test_running_calls_go_on(dotenv: Dotenv, fal: FakeFal, workers: int) -> None:
    release = asyncio.Event()

    async def respond(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b"first ")
        await release.wait()
        await response.write(b"last")
        return response

    fal.respond = respond
    async with serving(dotenv, workers) as proxy, ClientSession() as session:
        headers = {"x-fal-target-url": RUN, "x-falproxy-key": ANN}
        async with session.post(proxy.origin + PROXY, json={}, headers=headers) as response:
            assert await response.content.readexactly(6) == b"first "
            dotenv.write(FALPROXY_ACCESS_KEYS=f"bob:{BOB}")
            await reload(proxy, workers)
            fal.respond = respond_hello
            async with ClientSession() as other:
                assert await call(other, proxy, BOB) == 200
            release.set()
            assert await response.read() == b"last"
        assert await call(session, proxy, BOB) == 200  # on the same connection
        assert await proxy.stop() == 0


@ALL_KINDS
async def test_no_call_fails_during_many_reloads(dotenv: Dotenv, workers: int) -> None:
    async with serving(dotenv, workers) as proxy, ClientSession() as session:
        is_done = False
        runs: list[int] = []
        polls: list[int] = []

        async def send() -> None:
            while not is_done:
                for url, statuses in ((RUN, runs), (f"{REQUEST}/status", polls)):
                    statuses.append(await call(session, proxy, ANN, url))

        clients = [asyncio.ensure_future(send()) for _ in range(8)]
        for number in range(5):
            dotenv.write(FALPROXY_ACCESS_KEYS=f"ann:{ANN},bob:{BOB}{number}")
            await reload(proxy, workers)
        is_done = True
        await asyncio.gather(*clients)
        assert {*runs} == {200}
        assert len({*polls}) == 1
        assert await proxy.stop() == 0


@ALL_KINDS
@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"FALPROXY_DRAIN": "soon"}, "FALPROXY_DRAIN must be"),
        ({"FAL_KEY": ""}, "FAL_KEY is not set"),
        ({"FALPROXY_MODELS": "no-such.toml"}, "FALPROXY_MODELS cannot be read"),
        ({"FALPROXY_REQUIRE_AUTH": "1", "FALPROXY_ACCESS_KEYS": ""}, "would be open"),
        ({"FALPROXY_SANDBOX": "1"}, "FALPROXY_SANDBOX needs a restart"),
        ({"FALPROXY_NO_SUCH": "1"}, "FALPROXY_NO_SUCH is no setting"),
    ],
)
async def test_invalid_settings_are_reported_and_the_old_ones_stay(
    dotenv: Dotenv, workers: int, values: dict[str, str], text: str
) -> None:
    async with serving(dotenv, workers) as proxy, ClientSession() as session:
        dotenv.write(**values)
        proxy.process.send_signal(signal.SIGHUP)
        await wait_until(lambda: count(proxy, "were not reloaded"), seconds=TIMEOUT)
        (line,) = [line for line in proxy.log if "were not reloaded" in str(line["message"])]
        assert text in str(line["message"])
        assert await call(session, proxy, ANN) == 200
        assert await proxy.stop() == 0


@ALL_KINDS
async def test_settings_that_need_a_restart_are_named(dotenv: Dotenv, workers: int) -> None:
    async with serving(dotenv, workers) as proxy, ClientSession() as session:
        dotenv.write(FALPROXY_DRAIN="9", FALPROXY_IDLE_TIMEOUT="80")
        await reload(proxy, workers)
        (line,) = {str(line["message"]) for line in proxy.log if "restart" in str(line["message"])}
        assert line == "Changes of FALPROXY_IDLE_TIMEOUT, FALPROXY_DRAIN need a restart"
        assert await call(session, proxy, ANN) == 200


async def test_a_restarted_worker_has_the_new_settings(dotenv: Dotenv) -> None:
    async with serving(dotenv, 2) as proxy, ClientSession() as session:
        dotenv.write(FALPROXY_ACCESS_KEYS=f"bob:{BOB}")
        await reload(proxy, 2)
        pid = proxy.process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children")
        old = {*map(int, children.read_text().split())}
        for worker in old:
            os.kill(worker, signal.SIGKILL)
        await wait_until(
            lambda: len({*map(int, children.read_text().split())} - old) == 2, seconds=TIMEOUT
        )

        async def serves() -> bool:
            try:
                return await call(session, proxy, BOB) == 200
            except OSError:
                return False

        async with asyncio.timeout(TIMEOUT):
            while not await serves():
                await asyncio.sleep(0.05)


async def test_metrics_go_on(dotenv: Dotenv) -> None:
    dotenv.write(FALPROXY_ADMINS="ann")
    async with serving(dotenv) as proxy, ClientSession() as session:
        await call(session, proxy, ANN)
        await reload(proxy, 1)
        await call(session, proxy, ANN)
        async with session.get(
            f"{proxy.origin}/metrics", headers={"x-falproxy-key": ANN}
        ) as response:
            lines = (await response.text()).splitlines()
        (line,) = [
            line
            for line in lines
            if line.startswith("falproxy_requests_total") and 'operation="run"' in line
        ]
        assert line.endswith(" 2.0")


async def test_the_sandbox_survives_the_signal(tmp_path: Path) -> None:
    async with run_command("serve", "--sandbox", CWD=str(tmp_path)) as proxy:
        proxy.process.send_signal(signal.SIGHUP)
        await wait_until(lambda: count(proxy, "needs a restart"), seconds=TIMEOUT)
        assert await proxy.stop() == 0


async def test_an_application_is_open_until_a_request_that_has_just_begun_ends() -> None:
    is_closed, begun = asyncio.Event(), asyncio.get_running_loop().create_future()

    async def respond(request: web.Request) -> web.Response:
        await asyncio.sleep(2 * CHECK_INTERVAL)
        return web.Response(text="closed" if is_closed.is_set() else "open")

    async def close(_: web.Application) -> None:
        is_closed.set()

    async def wait_for_request(_: web.Application) -> None:
        await begun

    old, new = web.Application(), web.Application()
    old.router.add_get("/", respond)
    old.on_cleanup.append(close)
    new.on_startup.append(wait_for_request)
    runner = ReloadableRunner(old)
    await runner.setup()
    assert isinstance(runner.server, ProxyServer)
    make_request = runner.server.request_factory

    def begin(*arguments: Any) -> web.BaseRequest:
        """Lets the new application start before the task of the handler does."""
        begun.set_result(None)
        return make_request(*arguments)

    runner.server.request_factory = begin
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        replacing = asyncio.ensure_future(runner.replace_app(new))
        host, port = runner.addresses[0]
        async with ClientSession() as session, session.get(f"http://{host}:{port}/") as response:
            assert await response.text() == "open"
        await replacing
        await wait_until(is_closed.is_set, seconds=TIMEOUT)
    finally:
        await runner.cleanup()
