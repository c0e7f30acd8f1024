"""Keys that are made at run time, with the real commands and several processes."""

import asyncio
import json
import signal
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from aiohttp import ClientSession

from tests.support.cli_process import CliProcess, run_command, start_command
from tests.support.fake_fal import FakeFal, respond_as_queue
from tests.support.key_search import CANARY, LEAKS
from tests.support.postgres_server import PostgresServer, postgres_server
from tests.support.urls import PROXY, RUN

pytestmark = pytest.mark.slow(seconds=2)

NODES = 3
REVOKED_WITHIN = 5.0  # seconds
QUEUE = "https://queue.fal.run"
ADMIN = {"x-falproxy-key": "ann-s3cret-of-ann"}
Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@pytest.fixture(scope="module")
def server() -> Iterator[PostgresServer]:
    with postgres_server() as started:
        yield started


@pytest.fixture(params=["sqlite", "postgres"])
def environment(request: pytest.FixtureRequest, tmp_path: Path, fal: FakeFal) -> dict[str, str]:
    fal.respond = respond_as_queue
    env = {
        "CWD": str(tmp_path),
        "FALPROXY_DATA_DIR": str(tmp_path / "data"),
        "FAL_KEY": CANARY,
        "FALPROXY_UPSTREAM_ORIGIN": fal.origin,
        "FALPROXY_ACCESS_KEYS": "ann:ann-s3cret-of-ann",
        "FALPROXY_ADMINS": "ann",
    }
    if request.param == "postgres":
        env["DATABASE_URL"] = request.getfixturevalue("server").fresh()
    return env


@dataclass(frozen=True, slots=True)
class Output:
    code: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        assert self.code == 0, self.err
        return json.loads(self.out)


async def run_keys(*arguments: str, **env: str) -> Output:
    process = await start_command("keys", *arguments, **env)
    async with asyncio.timeout(60):
        out, err = await process.communicate()
    LEAKS.search((out + err).decode(), "falproxy keys")
    assert process.returncode is not None
    return Output(process.returncode, out.decode(), err.decode())


@pytest.fixture
async def nodes(environment: dict[str, str]) -> AsyncIterator[list[CliProcess]]:
    async with AsyncExitStack() as stack:
        yield [
            await stack.enter_async_context(run_command("serve", **environment))
            for _ in range(NODES)
        ]


@pytest.fixture
async def session() -> AsyncIterator[ClientSession]:
    async with ClientSession() as opened:
        yield opened


async def run_model(session: ClientSession, node: CliProcess, secret: str = "") -> int:
    headers = {"x-fal-target-url": RUN, **({"x-falproxy-key": secret} if secret else {})}
    async with session.post(node.origin + PROXY, json={}, headers=headers) as response:
        await response.read()
        return response.status


async def submit(session: ClientSession, node: CliProcess, secret: str) -> str:
    headers = {"x-fal-target-url": f"{QUEUE}/fal-ai/flux", "x-falproxy-key": secret}
    async with session.post(node.origin + PROXY, json={}, headers=headers) as response:
        assert response.status == 200, await response.text()
        return str((await response.json())["request_id"])


def poll_head(secret: str, request_id: str) -> bytes:
    target = f"{QUEUE}/fal-ai/flux/requests/{request_id}/status"
    return (
        f"GET {PROXY} HTTP/1.1\r\nHost: localhost\r\nx-falproxy-key: {secret}\r\n"
        f"x-fal-target-url: {target}\r\n\r\n"
    ).encode()


async def exchange(connection: Connection, data: bytes) -> int:
    reader, writer = connection
    writer.write(data)
    head = await reader.readuntil(b"\r\n\r\n")
    lines = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:-2])
    await reader.readexactly(int(lines[b"content-length"]))
    return int(head.split()[1])


async def poll_until_refused(connection: Connection, head: bytes) -> float:
    """Return the time of the first refusal."""
    while (status := await exchange(connection, head)) == 200:
        await asyncio.sleep(0.02)
    assert status == 401
    return time.monotonic()


async def test_a_revoked_key_is_refused_by_all_nodes_on_kept_connections(
    environment: dict[str, str], nodes: list[CliProcess], session: ClientSession, fal: FakeFal
) -> None:
    created = (await run_keys("create", "web", "--json", **environment)).document
    secret = created["secret"]
    # The new key is accepted at once everywhere.
    assert [await run_model(session, node, secret) for node in nodes] == [200] * NODES
    head = poll_head(secret, await submit(session, nodes[0], secret))
    connections = []
    for node in nodes:
        port = int(node.origin.rpartition(":")[2])
        connections.append(await asyncio.open_connection("127.0.0.1", port))
        for _ in range(5):  # the polls after the first one are remembered
            assert await exchange(connections[-1], head) == 200
    polling = [asyncio.ensure_future(poll_until_refused(each, head)) for each in connections]
    revoked = await run_keys("revoke", "web", **environment)
    at = time.monotonic()
    assert revoked.code == 0, revoked.err
    async with asyncio.timeout(REVOKED_WITHIN + 5):
        seconds = [refused - at for refused in await asyncio.gather(*polling)]
    print(f"refused after {[round(each, 2) for each in seconds]} s")
    assert max(seconds) < REVOKED_WITHIN
    seen = len(fal.seen)
    assert [await exchange(each, head) for each in connections] == [401] * NODES
    assert len(fal.seen) == seen
    for _, writer in connections:
        writer.close()
    for node in nodes:
        assert secret not in json.dumps(node.log)


async def test_a_key_made_over_http_is_valid_and_revoked_on_other_nodes(
    nodes: list[CliProcess], session: ClientSession
) -> None:
    url = f"{nodes[0].origin}/api/keys"
    async with session.post(url, json={"name": "web"}, headers=ADMIN) as response:
        secret = (await response.json())["secret"]
    assert [await run_model(session, node, secret) for node in nodes] == [200] * NODES
    async with session.delete(f"{url}/web", headers=ADMIN) as response:
        assert response.status == 200
    assert await run_model(session, nodes[0], secret) == 401
    async with asyncio.timeout(REVOKED_WITHIN):
        while {await run_model(session, node, secret) for node in nodes[1:]} != {401}:
            await asyncio.sleep(0.05)


async def test_the_last_use_is_shown(
    environment: dict[str, str], nodes: list[CliProcess], session: ClientSession
) -> None:
    created = (await run_keys("create", "web", "--json", **environment)).document
    assert await run_model(session, nodes[0], created["secret"]) == 200
    async with asyncio.timeout(30):
        while not (await run_keys("show", "web", "--json", **environment)).document["last_used_at"]:
            await asyncio.sleep(0.5)


@pytest.mark.parametrize("environment", ["postgres"], indirect=True)
async def test_a_node_without_its_database_serves_known_keys(
    environment: dict[str, str], session: ClientSession, server: PostgresServer
) -> None:
    created = (await run_keys("create", "web", "--json", **environment)).document
    later = (await run_keys("create", "later", "--json", **environment)).document
    async with run_command("serve", **environment) as node:
        assert await run_model(session, node, created["secret"]) == 200
        server.stop(signal.SIGQUIT)
        try:
            unknown = created["secret"][:-4] + "0000"
            assert await run_model(session, node, created["secret"]) == 200
            assert await run_model(session, node, later["secret"]) == 200  # it was read as well
            assert await run_model(session, node, unknown) == 503
            assert await run_model(session, node) == 401
        finally:
            server.start()
        async with asyncio.timeout(30):
            while await run_model(session, node, unknown) != 401:
                await asyncio.sleep(0.2)


async def test_an_open_proxy_is_locked_at_the_next_start(
    environment: dict[str, str], session: ClientSession
) -> None:
    del environment["FALPROXY_ACCESS_KEYS"], environment["FALPROXY_ADMINS"]
    async with run_command("serve", **environment) as node:
        assert await run_model(session, node) == 200
        created = await run_keys("create", "web", "--json", **environment)
        assert "until it is restarted" in created.err
        assert await run_model(session, node) == 200
    async with run_command("serve", **environment) as node:
        assert any("FALPROXY_KEYS=0" in str(line["message"]) for line in node.log)
        assert await run_model(session, node) == 401
        assert await run_model(session, node, created.document["secret"]) == 200
        assert (await run_keys("revoke", "web", **environment)).code == 0
    async with run_command("serve", "--workers", "2", **environment) as node:
        assert await run_model(session, node) == 401
        assert await node.stop() == 0
    async with run_command("serve", FALPROXY_KEYS="0", **environment) as node:
        assert await run_model(session, node) == 200


# The commands


async def test_the_commands_print_tables_and_json(environment: dict[str, str]) -> None:
    empty = await run_keys("list", **environment)
    assert empty.out.startswith("There are no keys.")
    assert (await run_keys("list", "--json", **environment)).document == {"keys": []}
    options = ("--expires", "90d", "--rate", "60/minute", "--concurrency", "8", "--budget", "5/day",
               "--endpoints", "fal-ai/flux*")  # fmt: skip
    created = await run_keys("create", "web", *options, **environment)
    lines = dict(line.split(maxsplit=1) for line in created.out.splitlines() if line)
    assert lines["secret"].startswith("fpx_")
    assert "not shown again" in created.out
    assert (lines["rate"], lines["budget"], lines["endpoints"]) == (
        "60/minute", "$5.00/day", "fal-ai/flux*",
    )  # fmt: skip
    table = (await run_keys("list", **environment)).out.splitlines()
    assert table[0].split()[:3] == ["name", "state", "created"]
    assert table[1].split()[:2] == ["web", "active"]
    shown = (await run_keys("show", "web", "--json", **environment)).document
    assert shown["creator"] == "cli"
    assert shown["expires_at"] > shown["created_at"]
    assert "secret" not in shown
    rotated = (await run_keys("rotate", "web", "--grace", "1h", "--json", **environment)).document
    assert rotated["id"] == shown["id"]
    assert rotated["secret"] not in created.out
    revoked = await run_keys("revoke", shown["id"], **environment)
    assert "revoked" in revoked.out
    assert (await run_keys("list", "--json", **environment)).document == {"keys": []}
    ((listed),) = (await run_keys("list", "--all", "--json", **environment)).document["keys"]
    assert listed["state"] == "revoked"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("create", "a b"), 2, "NAME must have 1 to 64"),
        (("create", "ann"), 1, "FALPROXY_ACCESS_KEYS"),
        (("create", "web", "--rate", "60"), 2, "--rate must be like 60/minute"),
        (("create", "web", "--rate", ""), 2, "--rate must not be empty"),
        (("create", "web", "--budget", "x/day"), 2, "--budget must be"),
        (("create", "web", "--concurrency", "0"), 2, "--concurrency must be"),
        (("create", "web", "--expires", "soon"), 2, "--expires must be like 90d"),
        (("create", "web", "--endpoints", "/a"), 2, "--endpoints must be patterns"),
        (("create", "taken"), 1, "There is a key of this name"),
        (("show", "unknown"), 1, "There is no key"),
        (("rotate", "unknown"), 1, "There is no key"),
        (("rotate", "taken", "--grace", "soon"), 2, "--grace must be like"),
        (("revoke", "unknown"), 1, "There is no key"),
    ],
)
async def test_a_command_that_fails_has_one_sentence(
    tmp_path: Path, arguments: tuple[str, ...], code: int, message: str
) -> None:
    env = {"CWD": str(tmp_path), "FALPROXY_ACCESS_KEYS": "ann:ann-s3cret-of-ann"}
    assert (await run_keys("create", "taken", **env)).code == 0
    output = await run_keys(*arguments, **env)
    assert (output.code, output.out) == (code, "")
    assert message in output.err
    assert output.err.count("\n") == 1


async def test_a_database_that_is_away_is_one_sentence(tmp_path: Path) -> None:
    env = {"CWD": str(tmp_path), "DATABASE_URL": "postgresql://u:pw-s3cret@127.0.0.1:9/x"}
    for arguments in (("list",), ("create", "web"), ("revoke", "web")):
        output = await run_keys(*arguments, **env)
        assert (output.code, output.out) == (1, "")
        assert output.err.startswith("falproxy: The keys cannot be read or written: ")
        assert "s3cret" not in output.err


async def test_two_processes_create_keys_at_once(tmp_path: Path) -> None:
    env = {"CWD": str(tmp_path)}
    outputs = await asyncio.gather(*(run_keys("create", f"k-{n}", **env) for n in range(4)))
    assert [output.code for output in outputs] == [0] * 4, [output.err for output in outputs]
    assert len((await run_keys("list", "--json", **env)).document["keys"]) == 4
