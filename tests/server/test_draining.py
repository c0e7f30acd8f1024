"""A stop: clients and load balancers notice it before the server stops to listen."""

import asyncio
import signal
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from aiohttp import ClientConnectorError, ClientSession, web

from falproxy.server.draining import stop_listening
from falproxy.server.fast_path.protocol import FastPathRunner
from tests.support.cli_process import CliProcess, run_command
from tests.support.fake_fal import FakeFal
from tests.support.key_search import CANARY
from tests.support.ports import free_port
from tests.support.urls import PROXY, REQUEST, RUN
from tests.support.waiting import SOON, wait_until

pytestmark = pytest.mark.slow

DELAY = 1.0  # seconds
ALL_KINDS = pytest.mark.parametrize("workers", ["1", "2"])


@pytest.fixture
def env(fal: FakeFal, tmp_path: Path) -> dict[str, str]:
    return {
        "FAL_KEY": CANARY,
        "FALPROXY_UPSTREAM_ORIGIN": fal.origin,
        "FALPROXY_STOP_DELAY": str(DELAY),
        "FALPROXY_DRAIN": "8",
        "CWD": str(tmp_path),
    }


@asynccontextmanager
async def stopping(proxy: CliProcess, number: int = signal.SIGTERM) -> AsyncIterator[None]:
    """Context manager: the time from a signal to the end of the process."""
    proxy.process.send_signal(number)
    await wait_until(
        lambda: any("Stopping" in str(line["message"]) for line in proxy.log), seconds=5
    )
    yield
    async with asyncio.timeout(10):
        assert await proxy.process.wait() == 0


async def ready(proxy: CliProcess) -> int:
    async with (
        ClientSession() as session,
        session.get(f"{proxy.origin}/health/ready") as response,
    ):
        return response.status


async def call(session: ClientSession, proxy: CliProcess, url: str = RUN) -> tuple[int, str | None]:
    method = "POST" if url == RUN else "GET"
    headers = {"x-fal-target-url": url}
    async with session.request(method, proxy.origin + PROXY, headers=headers) as response:
        await response.read()
        return response.status, response.headers.get("Connection")


@pytest.mark.timed
@pytest.mark.parametrize("url", [RUN, f"{REQUEST}/status"], ids=["run", "fast path"])
async def test_calls_are_accepted_while_readiness_is_503(env: dict[str, str], url: str) -> None:
    async with run_command("serve", **env) as proxy, ClientSession() as session:
        assert await ready(proxy) == 200
        for _ in range(3):
            assert await call(session, proxy, url) == (200, None)
        started = time.monotonic()
        async with stopping(proxy):
            assert await ready(proxy) == 503
            # On the open connection, and on new ones.
            for _ in range(3):
                assert await call(session, proxy, url) == (200, "close")
        assert DELAY * 0.8 < time.monotonic() - started < DELAY + 1.5


async def test_live_stays_200(env: dict[str, str]) -> None:
    async with run_command("serve", **env) as proxy, ClientSession() as session:
        await ready(proxy)
        async with stopping(proxy), session.get(f"{proxy.origin}/health/live") as response:
            assert response.status == 200


@pytest.mark.timed
@ALL_KINDS
async def test_without_clients_and_load_balancer_there_is_no_delay(
    env: dict[str, str], workers: str
) -> None:
    async with run_command("serve", "--workers", workers, **env) as proxy:
        started = time.monotonic()
        assert await proxy.stop() == 0
        assert time.monotonic() - started < DELAY * 0.8


async def test_an_idle_connection_is_not_closed_while_its_client_may_use_it(
    env: dict[str, str],
) -> None:
    """A client that sends on a connection that is being closed gets no response."""
    async with run_command("serve", **env) as proxy, ClientSession() as session:
        assert await call(session, proxy) == (200, None)
        async with stopping(proxy):
            await asyncio.sleep(DELAY / 2)
            assert await call(session, proxy) == (200, "close")


@ALL_KINDS
async def test_clients_that_open_a_connection_for_each_call_have_the_whole_delay(
    env: dict[str, str], workers: str
) -> None:
    """As behind nginx: no readiness is asked, and there are moments without a connection."""
    values = env | {"FALPROXY_STOP_DELAY": "4"}
    async with run_command("serve", "--workers", workers, **values) as proxy:
        for _ in range(4):  # each worker has had one, most likely
            async with ClientSession() as session:
                assert await call(session, proxy) == (200, None)
        async with stopping(proxy):
            for _ in range(4):
                await asyncio.sleep(0.1)
                async with ClientSession() as session:
                    assert (await call(session, proxy))[0] == 200


@pytest.mark.timed
@pytest.mark.parametrize("delay", ["0", "5"])
async def test_ctrl_c_and_a_delay_of_zero_stop_at_once(env: dict[str, str], delay: str) -> None:
    number = signal.SIGINT if delay == "5" else signal.SIGTERM
    async with (
        run_command("serve", **env | {"FALPROXY_STOP_DELAY": delay}) as proxy,
        ClientSession() as session,
    ):
        await ready(proxy)
        await call(session, proxy)
        started = time.monotonic()
        async with stopping(proxy, number):
            pass
        assert time.monotonic() - started < 1.5


@pytest.mark.timed
async def test_the_delay_is_at_most_half_of_the_drain(env: dict[str, str]) -> None:
    values = {"FALPROXY_STOP_DELAY": "60", "FALPROXY_DRAIN": "1"}
    async with run_command("serve", **env | values) as proxy:
        await ready(proxy)
        started = time.monotonic()
        assert await proxy.stop() == 0
        assert 0.4 < time.monotonic() - started < 2


@ALL_KINDS
async def test_new_connections_in_the_queue_are_served(env: dict[str, str], workers: str) -> None:
    """Clients that open a connection for each call, until one is refused before it is sent."""
    arguments = ("serve", "--workers", workers)
    async with run_command(*arguments, **env | {"FALPROXY_STOP_DELAY": "0.3"}) as proxy:
        assert await ready(proxy) == 200
        statuses: list[int] = []

        async def send() -> None:
            while True:
                async with ClientSession() as session:
                    try:
                        statuses.append((await call(session, proxy))[0])
                    except ClientConnectorError:
                        return

        clients = [asyncio.ensure_future(send()) for _ in range(16)]
        await asyncio.sleep(0.3)
        assert await proxy.stop() == 0
        await asyncio.gather(*clients)
        assert {*statuses} == {200}


@ALL_KINDS
@pytest.mark.parametrize("is_chunked", [False, True], ids=["length", "chunks"])
async def test_a_body_that_is_being_sent_is_received_after_the_stop_began(
    env: dict[str, str], fal: FakeFal, workers: str, is_chunked: bool
) -> None:
    """Load balancers that do not buffer requests send the head first."""
    parts = [b'{"prompt": "', b"a light", b'house"}']
    framing = (
        "Transfer-Encoding: chunked" if is_chunked else f"Content-Length: {len(b''.join(parts))}"
    )
    head = f"POST {PROXY} HTTP/1.1\r\nHost: localhost\r\nx-fal-target-url: {RUN}\r\n"
    head += f"Content-Type: application/json\r\n{framing}\r\n\r\n"
    arguments = ("serve", "--workers", workers)
    async with run_command(*arguments, **env | {"FALPROXY_STOP_DELAY": "0.2"}) as proxy:
        port = int(proxy.origin.rpartition(":")[2])
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(head.encode())

        async def send(part: bytes) -> None:
            writer.write(b"%x\r\n%s\r\n" % (len(part), part) if is_chunked else part)
            await writer.drain()

        await send(parts[0])
        await asyncio.sleep(0.1)
        async with stopping(proxy):
            await until_refused(port)
            await asyncio.sleep(0.3)  # the server has begun to close connections
            for part in parts[1:]:
                await send(part)
                await asyncio.sleep(0.1)
            if is_chunked:
                writer.write(b"0\r\n\r\n")
            async with asyncio.timeout(3):
                response = await reader.read()
            assert response.startswith(b"HTTP/1.1 200 OK\r\n")
        writer.close()
    assert [seen.body for seen in fal.seen] == [b"".join(parts)]


async def until_refused(port: int) -> None:
    async with asyncio.timeout(SOON):
        while True:
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", port)
            except ConnectionRefusedError:
                return
            writer.close()
            await asyncio.sleep(0.02)


class SlowSite(web.SockSite):
    """A site of a process that does not run for some time just before its socket is closed."""

    async def stop(self) -> None:
        time.sleep(0.3)  # noqa: ASYNC251 - nothing else may run
        await super().stop()


def request_until_refused(address: tuple[str, int]) -> list[str]:
    """Send requests on new connections. Return the responses, and errors other than a refusal."""
    found = []
    while True:
        try:
            with socket.create_connection(address, timeout=10) as client:
                client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
                found.append(client.recv(1024).decode().partition("\r\n")[0])
        except ConnectionRefusedError:
            return found
        except OSError as error:
            found.append(type(error).__name__)


async def test_a_connection_that_is_established_while_the_socket_is_closed_is_served() -> None:
    async def respond(request: web.Request) -> web.Response:
        return web.Response()

    app = web.Application()
    app.router.add_get("/", respond)
    runner = FastPathRunner(app, shutdown_timeout=1)
    await runner.setup()
    with socket.create_server(("127.0.0.1", free_port())) as listener:
        await SlowSite(runner, listener).start()
        clients = [
            asyncio.create_task(asyncio.to_thread(request_until_refused, listener.getsockname()))
            for _ in range(4)
        ]
        await asyncio.sleep(0.1)
        await stop_listening(runner, [listener])
        await runner.cleanup()
        found = [each for client in clients for each in await client]
    assert {*found} == {"HTTP/1.1 200 OK"}


async def test_a_socket_of_another_process_keeps_accepting() -> None:
    """systemd's sockets have connections that the next process accepts."""
    runner = FastPathRunner(web.Application(), shutdown_timeout=1)
    await runner.setup()
    with socket.create_server(("127.0.0.1", 0)) as passed:
        listener = passed.dup()
        await web.SockSite(runner, listener).start()
        await stop_listening(runner, [listener], are_passed=True)
        await runner.cleanup()
        with socket.create_connection(passed.getsockname(), timeout=5):
            passed.accept()[0].close()
