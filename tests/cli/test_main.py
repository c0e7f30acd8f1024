"""The command line as users see it: real processes, their exit codes and their output."""

import asyncio
import json
import signal
import socket
import sys
import time
from collections.abc import Callable, Coroutine, Mapping
from pathlib import Path

import pytest
from aiohttp import ClientConnectorError, ClientError, ClientSession, web

from falproxy import __version__
from tests.support.cli_process import (
    run_command,
    run_interpreter,
    run_refused,
    start_command,
    start_interpreter,
)
from tests.support.fake_fal import FakeFal
from tests.support.key_search import CANARY, LEAKS
from tests.support.urls import PROXY, RUN

pytestmark = pytest.mark.slow


@pytest.fixture
def directory(tmp_path: Path) -> str:
    """A working directory without a `.env` file."""
    return str(tmp_path)


async def test_the_error_for_a_missing_key_names_both_remedies(directory: str) -> None:
    message = await run_refused("serve", CWD=directory)
    assert "FAL_KEY" in message
    assert "--sandbox" in message


async def test_a_key_with_a_stray_character_is_not_shown(directory: str) -> None:
    message = await run_refused("serve", CWD=directory, FAL_KEY=f"{CANARY} ")
    assert f"at position {len(CANARY) + 1}" in message
    LEAKS.search(message, "a refused start")


async def test_an_invalid_setting_is_named(directory: str) -> None:
    message = await run_refused("serve", CWD=directory, FAL_KEY="a:b", FALPROXY_DRAIN="soon")
    assert message == (
        "falproxy: FALPROXY_DRAIN must be a number of seconds above 0 and at most 315360000.\n"
    )


async def test_a_port_in_use_is_named(directory: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        message = await run_refused("serve", "--port", port, CWD=directory, FAL_KEY="a:b")
    assert message == (
        f"falproxy: Cannot listen on 127.0.0.1:{port}: address already in use. "
        "Choose another with --host and --port.\n"
    )


async def test_an_address_of_another_machine_is_named(directory: str) -> None:
    message = await run_refused("serve", "--host", "192.0.2.1", CWD=directory, FAL_KEY="a:b")
    assert "Cannot listen on 192.0.2.1:8080: cannot assign requested address" in message


@pytest.mark.parametrize("arguments", [(), ("unknown",), ("serve", "--sandbox", "sometimes")])
async def test_invalid_arguments_print_the_usage(arguments: tuple[str, ...]) -> None:
    process = await start_interpreter(*arguments)
    _, err = await process.communicate()
    assert process.returncode == 2
    assert b"usage: falproxy" in err


async def test_the_version_is_printed() -> None:
    process = await start_interpreter("--version")
    out, _ = await process.communicate()
    assert out.decode() == f"falproxy {__version__}\n"


async def test_a_dotenv_file_is_used(tmp_path: Path, fal: FakeFal) -> None:
    (tmp_path / ".env").write_text(f"FAL_KEY={CANARY}\nFALPROXY_UPSTREAM_ORIGIN={fal.origin}\n")
    serve = run_interpreter("serve", CWD=str(tmp_path))
    async with serve as proxy, ClientSession() as session:
        headers = {"x-fal-target-url": RUN}
        async with session.post(proxy.origin + PROXY, json={}, headers=headers) as response:
            assert response.status == 200
        assert await proxy.stop() == 0
    assert fal.seen[0].header("authorization") == f"Key {CANARY}"


async def test_options_override_the_environment(directory: str) -> None:
    env = {"FALPROXY_LOG_LEVEL": "error", "FALPROXY_PORT": "1"}
    async with run_command(
        "serve", "--log-level", "info", CWD=directory, FAL_KEY="a:b", **env
    ) as proxy:
        assert proxy.origin != "http://127.0.0.1:1"


async def test_the_log_has_one_json_line_per_call(fal: FakeFal, directory: str) -> None:
    env = {"FAL_KEY": CANARY, "FALPROXY_UPSTREAM_ORIGIN": fal.origin, "CWD": directory}
    async with run_command("serve", **env) as proxy, ClientSession() as session:
        target = "https://queue.fal.run/fal-ai/flux/dev?fal_webhook=https%3A%2F%2Fprivate.example"
        for url in (target, "https://evil.tld/private"):
            headers = {"x-fal-target-url": url, "X-Request-ID": "mine", "Cookie": "private"}
            await session.post(proxy.origin + PROXY, json={"prompt": "private"}, headers=headers)
        await proxy.stop()
    calls = [line for line in proxy.log if line["logger"] == "falproxy.calls"]
    assert [
        {key: line.get(key) for key in ("request_id", "status", "error")} for line in calls
    ] == [
        {"request_id": "mine", "status": 200, "error": None},
        {"request_id": "mine", "status": 412, "error": "target_not_fal"},
    ]
    assert (calls[0]["operation"], calls[0]["endpoint"]) == ("submit", "fal-ai/flux/dev")
    assert 0 < float(str(calls[0]["upstream_seconds"])) < float(str(calls[0]["seconds"])) < 5
    assert "private" not in json.dumps(proxy.log)


MALFORMED = [
    b"x-falproxy-key : s3cret-key\r\n\r\n",
    b"x-falproxy-key: s3cret-key\x00\r\n\r\n",
    b"Authorization: Bearer s3cret-key\x7f\r\n\r\n",
    b"Content-Length: s3cret-key\r\n\r\n",
    b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}s3cret-key\r\n",
]


async def test_a_malformed_request_is_not_logged(directory: str) -> None:
    async with run_command("serve", FAL_KEY="a:b", CWD=directory) as proxy:
        for case in MALFORMED:
            port = int(proxy.origin.rpartition(":")[2])
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"POST /api/fal/proxy HTTP/1.1\r\nHost: x\r\n" + case)
            assert b" 400 " in await reader.readline()
            writer.close()
        await proxy.stop()
    assert "s3cret" not in json.dumps(proxy.log)
    assert not [line for line in proxy.log if line["level"] == "error"]


def respond_after(event: asyncio.Event) -> Callable[..., Coroutine[object, object, web.Response]]:
    async def respond(request: web.Request) -> web.Response:
        await event.wait()
        return web.json_response({"finished": True})

    return respond


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_running_calls_finish_at_shutdown(
    fal: FakeFal, directory: str, number: signal.Signals
) -> None:
    release = asyncio.Event()
    fal.respond = respond_after(release)
    env = {"FAL_KEY": CANARY, "FALPROXY_UPSTREAM_ORIGIN": fal.origin, "CWD": directory}
    async with run_command("serve", **env) as proxy, ClientSession() as session:
        headers = {"x-fal-target-url": RUN}
        call = asyncio.ensure_future(session.post(proxy.origin + PROXY, json={}, headers=headers))
        while not fal.seen:
            await asyncio.sleep(0.01)
        stopping = asyncio.ensure_future(proxy.stop(number))
        await until_refused(proxy.origin)
        release.set()
        response = await call
        assert await response.json() == {"finished": True}
        assert response.headers["Connection"] == "close"
        assert await stopping == 0


async def until_refused(origin: str) -> None:
    async with asyncio.timeout(5):
        while True:
            try:
                async with ClientSession() as session:
                    await session.get(f"{origin}/health/live")
            except ClientConnectorError:
                return
            except ClientError:
                pass  # the connection was accepted and then closed
            await asyncio.sleep(0.01)


@pytest.mark.timed
async def test_the_shutdown_waits_no_longer_than_the_drain_time(
    fal: FakeFal, directory: str
) -> None:
    fal.respond = respond_after(asyncio.Event())
    env = {"FAL_KEY": CANARY, "FALPROXY_UPSTREAM_ORIGIN": fal.origin, "CWD": directory}
    async with run_command("serve", FALPROXY_DRAIN="1", **env) as proxy, ClientSession() as session:
        headers = {"x-fal-target-url": RUN}
        call = asyncio.ensure_future(session.post(proxy.origin + PROXY, json={}, headers=headers))
        while not fal.seen:
            await asyncio.sleep(0.01)
        started = time.monotonic()
        assert await proxy.stop() == 0
        assert 0.9 < time.monotonic() - started < 1.8
        with pytest.raises(ClientError):
            await call


async def test_the_health_checks_are_ok(directory: str) -> None:
    async with (
        run_command("serve", FAL_KEY="a:b", CWD=directory) as proxy,
        ClientSession() as session,
    ):
        for path in ("live", "ready"):
            async with session.get(f"{proxy.origin}/health/{path}") as response:
                document = await response.json()
                assert (response.status, document["status"]) == (200, "ok")


@pytest.mark.parametrize("name", ["localhost", "127.0.0.1", "studio.example:9000"])
async def test_an_output_of_the_sandbox_can_be_an_input(directory: str, name: str) -> None:
    """For each host name of the proxy: it may run in a container or on another machine."""
    public = "http://studio.example:9000"
    env = {"FALPROXY_PUBLIC_URL": public} if "studio" in name else {}
    async with (
        run_command("serve", "--sandbox", CWD=directory, **env) as proxy,
        ClientSession() as session,
    ):
        port = proxy.origin.rpartition(":")[2]

        async def generate(endpoint: str, body: Mapping[str, object]) -> str:
            headers = {"x-fal-target-url": f"https://fal.run/{endpoint}"}
            headers["Host"] = name if ":" in name else f"{name}:{port}"
            async with session.post(proxy.origin + PROXY, json=body, headers=headers) as response:
                assert response.status == 200, await response.text()
                return str((await response.json())["images"][0]["url"])

        arguments = {"prompt": "!delay 0 a lighthouse"}
        first = await generate("fal-ai/flux/schnell", arguments)
        assert first.startswith(f"http://{name}")
        second = await generate("fal-ai/flux-pro/kontext", arguments | {"image_url": first})
        assert second != first
        another = await generate(
            "fal-ai/flux-pro/kontext", arguments | {"image_url": second, "seed": 1}
        )
        assert another != second


@pytest.mark.parametrize(
    ("arguments", "env"),
    [
        (("serve", "--sandbox"), {}),
        (("serve", "--sandbox", "auto"), {}),
        (("serve",), {"FALPROXY_SANDBOX": "1"}),
        (("serve", "--sandbox"), {"FAL_KEY": CANARY}),
    ],
)
async def test_the_sandbox_generates_images_without_an_account(
    directory: str, arguments: tuple[str, ...], env: dict[str, str]
) -> None:
    async with run_command(*arguments, CWD=directory, **env) as proxy, ClientSession() as session:
        assert "SANDBOX" in str(proxy.log[-1]["message"])
        headers = {"x-fal-target-url": "https://fal.run/fal-ai/flux/schnell"}
        body = {"prompt": "a lighthouse"}
        async with session.post(proxy.origin + PROXY, json=body, headers=headers) as response:
            assert response.headers["x-falproxy-sandbox"] == "1"
            url = (await response.json())["images"][0]["url"]
        assert url.startswith(f"{proxy.origin}/files/")
        async with session.get(url) as image:
            assert (image.status, image.content_type) == (200, "image/jpeg")
            assert (await image.read())[:3] == b"\xff\xd8\xff"
        assert await proxy.stop() == 0


async def test_a_missing_c_extension_is_logged(directory: str) -> None:
    env = {"AIOHTTP_NO_EXTENSIONS": "1", "FAL_KEY": "a:b", "CWD": directory}
    async with run_interpreter("serve", **env) as proxy:
        await proxy.stop()
    assert any("C extension is missing" in str(line["message"]) for line in proxy.log)


@pytest.mark.parametrize(("host", "code"), [("127.0.0.1", 0), ("0.0.0.0", 1)])
async def test_the_exit_code_of_the_doctor_is_1_for_a_problem(
    directory: str, host: str, code: int
) -> None:
    process = await start_command("doctor", "--host", host, CWD=directory, FALPROXY_SANDBOX="1")
    out, err = await process.communicate()
    assert (process.returncode, err) == (code, b"")
    assert (b"OPEN" in out) is bool(code)


async def test_an_open_proxy_is_logged(directory: str) -> None:
    env = {"FAL_KEY": "a:b", "CWD": directory}
    async with run_command("serve", "--host", "0.0.0.0", **env) as proxy:
        assert any("OPEN" in str(line["message"]) for line in proxy.log)
    async with run_command("serve", "--host", "0.0.0.0", CUSTOM_ACCESS_KEY="s", **env) as proxy:
        assert not any("OPEN" in str(line["message"]) for line in proxy.log)


@pytest.mark.parametrize(
    ("host", "env", "status"),
    [
        pytest.param("localhost:8080", {}, 200, id="localhost"),
        pytest.param("127.0.0.1", {}, 200, id="its IPv4 address"),
        pytest.param("[::1]:8080", {}, 200, id="its IPv6 address"),
        pytest.param("rebind.evil.tld:8080", {}, 403, id="the host name of a web page"),
        pytest.param("localhost.evil.tld", {}, 403, id="a name that begins with localhost"),
        pytest.param("localhost:port", {}, 403, id="an invalid port"),
        pytest.param("x:99999", {}, 403, id="a port that is too large"),
        pytest.param(
            "a.b", {"FALPROXY_PUBLIC_URL": "https://a.b"}, 200, id="the host name of the public URL"
        ),
        pytest.param(
            "evil.tld", {"FALPROXY_PUBLIC_URL": "https://a.b"}, 403, id="another name than that"
        ),
        pytest.param("x", {"FALPROXY_ALLOWED_HOSTS": "y,x"}, 200, id="an allowed name"),
        pytest.param(
            "a.b", {"CUSTOM_ACCESS_KEY": "s3cret"}, 401, id="with authentication any name"
        ),
    ],
)
@pytest.mark.parametrize("address", ["127.0.0.1", "0.0.0.0"])
async def test_an_open_proxy_accepts_only_its_own_host_names(
    directory: str, fal: FakeFal, address: str, host: str, env: dict[str, str], status: int
) -> None:
    env = {"FAL_KEY": CANARY, "FALPROXY_UPSTREAM_ORIGIN": fal.origin, "CWD": directory} | env
    serve = run_command("serve", "--host", address, **env)
    async with serve as proxy, ClientSession() as session:
        url = proxy.origin.replace("0.0.0.0", "127.0.0.1") + PROXY
        headers = {"x-fal-target-url": RUN, "Host": host}
        async with session.post(url, json={}, headers=headers) as response:
            assert response.status == status
    assert len(fal.seen) == (status == 200)


@pytest.mark.parametrize("path", [PROXY, "/", "/sandbox/files/b/a/b.png"])
async def test_the_demo_accepts_only_its_own_host_names(directory: str, path: str) -> None:
    async with run_command("serve", "--sandbox", CWD=directory) as proxy:
        for host, is_refused in (("evil.tld:8080", True), ("localhost", False)):
            headers = {"x-fal-target-url": f"{RUN}/status", "Host": host}
            async with (
                ClientSession() as session,
                session.get(proxy.origin + path, headers=headers) as response,
            ):
                assert ("FALPROXY_ALLOWED_HOSTS" in await response.text()) is is_refused


@pytest.mark.parametrize(
    "env",
    [
        pytest.param({}, id="by default"),
        pytest.param({"FALPROXY_REHOST_ON_ERROR": "error"}, id="files are required"),
        pytest.param({"FALPROXY_PUBLIC_URL": "https://127.0.0.1:9"}, id="an unreachable address"),
        pytest.param(
            {"FALPROXY_PUBLIC_URL": "https://a.example/x", "FALPROXY_REHOST_ON_ERROR": "error"},
            id="an unknown name",
        ),
    ],
)
async def test_the_same_call_twice_in_the_demo(directory: str, env: dict[str, str]) -> None:
    """The files of a cached result are stored already: they are no source to be stored again."""
    target = "https://fal.run/fal-ai/flux-pro/kontext/text-to-image"
    serve = run_command("serve", "--sandbox", CWD=directory, **env)
    async with serve as proxy, ClientSession() as session:
        responses = []
        for host in ("localhost", "127.0.0.1:8080", "localhost"):
            headers = {"x-fal-target-url": target, "Host": host}
            body = {"prompt": "a lighthouse", "seed": 7}
            url = proxy.origin + PROXY
            async with session.post(url, json=body, headers=headers) as response:
                assert response.status == 200, await response.text()
                document = await response.json()
                (image,) = document["images"]
                responses.append((response.headers, image["url"]))
    assert responses[0][0]["x-falproxy-rehost"] == "stored; count=1"
    for hit, _ in responses[1:]:
        assert "hit" in hit["Cache-Status"]
        assert "failed" not in hit.get("x-falproxy-rehost", "")
    assert all("/files/" in url and "/sandbox/" not in url for _, url in responses)
    assert not [line for line in proxy.log if "was not stored" in str(line["message"])]


@pytest.mark.parametrize("workers", ["1", "2"])
async def test_required_authentication_is_required_at_the_start(
    directory: str, workers: str
) -> None:
    env = {"CWD": directory, "FALPROXY_REQUIRE_AUTH": "1", "FALPROXY_WORKERS": workers}
    message = await run_refused("serve", **env, FAL_KEY="a:b")
    assert "FALPROXY_ACCESS_KEYS" in message


async def test_with_an_access_key_required_authentication_is_there(directory: str) -> None:
    env = {"CWD": directory, "FAL_KEY": "a:b", "FALPROXY_REQUIRE_AUTH": "1"}
    async with run_command("serve", **env, CUSTOM_ACCESS_KEY="s3cret") as proxy:
        assert await proxy.stop() == 0


async def test_the_sandbox_needs_no_authentication(directory: str) -> None:
    serve = run_command("serve", "--sandbox", CWD=directory, FALPROXY_REQUIRE_AUTH="1")
    async with serve as proxy:
        assert await proxy.stop() == 0


@pytest.mark.parametrize("arguments", [["sandbox"], ["serve", "--sandbox"]])
async def test_a_missing_package_of_the_sandbox_is_named(
    directory: str, arguments: list[str]
) -> None:
    hide = "import sys; sys.modules['PIL'] = None; from falproxy.cli.main import main; "
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", f"{hide} raise SystemExit(main({arguments}))"),
        cwd=directory,
        stderr=asyncio.subprocess.PIPE,
    )
    _, err = await process.communicate()
    assert process.returncode == 2
    assert err.decode() == "falproxy: The sandbox needs PIL: pip install 'falproxy[sandbox]'.\n"


async def test_sandbox_auto_uses_fal_if_there_is_a_key(directory: str) -> None:
    async with run_command("serve", "--sandbox", "auto", FAL_KEY="a:b", CWD=directory) as proxy:
        assert any("sends to fal.ai" in str(line["message"]) for line in proxy.log)


async def test_the_sandbox_runs_alone(directory: str) -> None:
    async with run_command("sandbox", CWD=directory) as sandbox, ClientSession() as session:
        headers = {"Host": "fal.run", "Authorization": "Key a:b"}
        url = f"{sandbox.origin}/fal-ai/flux/schnell"
        async with session.post(url, json={"prompt": "x"}, headers=headers) as response:
            assert response.status == 200
        assert await sandbox.stop() == 0
