"""Findings of the doctor: each problem has a fix, and decides whether it is safe to start."""

import asyncio
import re
import socket
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from aiohttp import web
from redis.asyncio import Redis

from falproxy.cli.doctor import run_checks
from falproxy.cli.security_checks import Finding, Level, check_access
from falproxy.settings import SANDBOX_KEY
from tests.support.fake_fal import FakeFal
from tests.support.fake_supabase import FakeSupabase
from tests.support.gateway import Gateway
from tests.support.key_search import CANARY, SECRET
from tests.support.ports import free_port
from tests.support.redis_server import redis_server
from tests.support.settings import make_settings

LONG = "a-secret-of-many-characters-that-cannot-be-guessed"


async def findings_of(**options: object) -> list[Finding]:
    settings = make_settings(**{"fal_key": SANDBOX_KEY, "sandbox": True} | options)
    return await run_checks(settings)


@pytest.mark.parametrize(
    ("options", "level", "text"),
    [
        pytest.param({"fal_key": "noc0lon"}, Level.PROBLEM, "id:secret", id="form of the key"),
        pytest.param({"host": "0.0.0.0"}, Level.PROBLEM, "OPEN", id="open to all networks"),
        pytest.param({"host": "::"}, Level.PROBLEM, "OPEN", id="open to all networks by IPv6"),
        pytest.param({"host": "proxy.lan"}, Level.PROBLEM, "OPEN", id="open to a network"),
        pytest.param({"host": "127.0.0.1"}, Level.OK, "other machines", id="open to this machine"),
        pytest.param({"host": "localhost"}, Level.OK, "other machines", id="by name"),
        pytest.param(
            {"host": "0.0.0.0", "access_key": LONG}, Level.OK, "must authenticate", id="locked"
        ),
        pytest.param(
            {"access_keys": (("ann", "short"),)}, Level.PROBLEM, "of ann has", id="a short key"
        ),
        pytest.param({"jwt_secret": "short"}, Level.PROBLEM, "guessed", id="a short secret"),
        pytest.param(
            {"allowed_origins": ("http://a.example",)}, Level.NOTE, "encryption", id="http"
        ),
        pytest.param(
            {"allowed_origins": ("https://a.example",)}, Level.NOTE, "programs", id="CORS only"
        ),
        pytest.param({"allowed_targets": ("**",)}, Level.PROBLEM, "v1/keys", id="all targets"),
        pytest.param({"allowed_targets": ("api.fal.ai/**",)}, Level.PROBLEM, "v1/keys", id="host"),
        pytest.param(
            {"allowed_targets": ("*.fal.ai/v1/keys",)}, Level.PROBLEM, "v1/keys", id="one address"
        ),
        pytest.param(
            {"allowed_targets": ("**/billing",)}, Level.PROBLEM, "/billing", id="an ending"
        ),
        pytest.param({"fal_key": CANARY}, Level.NOTE, "not used", id="sandbox and key"),
        pytest.param({"ai_keys": (CANARY,)}, Level.NOTE, "AI_KEYS is set", id="both kinds of keys"),
        pytest.param({}, Level.NOTE, "Calls go to the sandbox", id="the sandbox"),
    ],
)
async def test_a_finding(
    tmp_path: object, options: dict[str, object], level: Level, text: str
) -> None:
    findings = await findings_of(
        **{"data_dir": tmp_path, "upstream_origin": "http://127.0.0.1:9"} | options
    )
    (finding,) = [finding for finding in findings if text in finding.text]
    assert finding.level == level
    assert finding.fix or level is Level.OK
    assert SECRET not in str(findings)


@pytest.mark.parametrize(
    ("status", "level"),
    [(200, Level.OK), (401, Level.PROBLEM), (403, Level.PROBLEM), (500, Level.NOTE)],
)
async def test_each_fal_key_is_tried(
    tmp_path: object, fal: FakeFal, status: int, level: Level
) -> None:
    async def respond(request: web.Request) -> web.StreamResponse:
        return web.json_response({}, status=status)

    fal.respond = respond
    findings = await findings_of(
        ai_keys=("one:a", "two:b"), data_dir=tmp_path, upstream_origin=fal.origin, sandbox=False
    )
    about_keys = [finding for finding in findings if "position" in finding.text]
    assert [finding.level for finding in about_keys] == [level] * 2
    assert [(seen.method, seen.header("authorization")) for seen in fal.seen] == [
        ("GET", "Key one:a"),
        ("GET", "Key two:b"),
    ]


async def test_an_unreachable_fal_is_a_problem(tmp_path: object) -> None:
    findings = await findings_of(
        fal_key=CANARY, data_dir=tmp_path, upstream_origin="http://127.0.0.1:9", sandbox=False
    )
    assert findings[0].level is Level.PROBLEM
    assert "could not be reached" in findings[0].text


async def test_a_dead_upstream_origin_is_not_blamed_on_fal(tmp_path: Path) -> None:
    origin = f"http://127.0.0.1:{free_port()}"
    findings = await findings_of(
        fal_key=CANARY, data_dir=tmp_path, upstream_origin=origin, sandbox=False
    )
    assert findings[0].level is Level.PROBLEM
    assert "FALPROXY_UPSTREAM_ORIGIN" in findings[0].text
    assert "FALPROXY_UPSTREAM_ORIGIN" in findings[0].fix
    assert "status.fal.ai" not in findings[0].fix
    assert not re.search(r"\bfal\b(?! key)", findings[0].text)


@pytest.mark.parametrize("status", [200, 401, 500])
async def test_another_server_is_not_called_fal(tmp_path: Path, fal: FakeFal, status: int) -> None:
    async def respond(request: web.Request) -> web.StreamResponse:
        return web.json_response({}, status=status)

    fal.respond = respond
    (finding, *_) = await findings_of(
        fal_key=CANARY, data_dir=tmp_path, upstream_origin=fal.origin, sandbox=False
    )
    assert finding.text.startswith("The server of FALPROXY_UPSTREAM_ORIGIN ")


async def test_a_key_that_is_not_used_is_not_sent(tmp_path: Path, fal: FakeFal) -> None:
    await findings_of(fal_key=CANARY, data_dir=tmp_path, upstream_origin=fal.origin, sandbox=True)
    assert fal.seen == []


async def port_findings(folder: Path, **options: object) -> list[Finding]:
    findings = await findings_of(data_dir=folder, **options)
    texts = ("listen on port", "running on port", "of FALPROXY_HOST is")
    return [each for each in findings if any(text in each.text for text in texts)]


async def test_a_taken_port_is_a_problem(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        (finding,) = await port_findings(tmp_path, port=port)
    assert finding.level is Level.PROBLEM
    assert f"port {port}" in finding.text
    assert "another program uses it" in finding.text
    assert "FALPROXY_PORT" in finding.fix
    assert await port_findings(tmp_path, port=port) == []


async def test_a_running_falproxy_is_a_note(tmp_path: Path, gateway: Gateway) -> None:
    port = gateway.client.server.port
    (finding,) = await port_findings(tmp_path, port=port)
    assert finding == Finding(Level.NOTE, f"A falproxy is already running on port {port}.")


@pytest.mark.parametrize(
    ("host", "text"),
    [("192.0.2.1", "not an address of this machine"), ("no.such.host.invalid", "is not known")],
)
async def test_a_host_of_another_machine_is_a_problem(tmp_path: Path, host: str, text: str) -> None:
    findings = await port_findings(tmp_path, host=host, port=free_port())
    (finding,) = [each for each in findings if text in each.text]
    assert finding.level is Level.PROBLEM
    assert "FALPROXY_HOST" in finding.fix


async def test_a_missing_temporary_folder_is_noted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    findings = await findings_of(data_dir=tmp_path)
    (finding,) = [each for each in findings if "temporary files" in each.text]
    assert finding.level is Level.NOTE
    assert "TMPDIR" in finding.fix
    assert str(tmp_path) not in finding.text


async def test_a_data_folder_that_is_a_file_is_a_problem_in_words(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    findings = await findings_of(data_dir=tmp_path / "file" / "data")
    (finding,) = [each for each in findings if "FALPROXY_DATA_DIR is" in each.text]
    assert finding.text == "FALPROXY_DATA_DIR is not writable: a part of the path is a file."


async def cache_finding(folder: Path, **options: object) -> Finding:
    findings = await findings_of(
        **{"data_dir": folder, "upstream_origin": "http://127.0.0.1:9"} | options
    )
    finding = findings[-1]
    assert finding.fix or finding.level is Level.OK
    assert "s3cret" not in str(findings)
    return finding


async def test_a_writable_cache_file_is_ok(tmp_path: Path) -> None:
    finding = await cache_finding(tmp_path)
    assert finding.level is Level.OK
    assert "Results are stored in a file" in finding.text
    assert (tmp_path / "results.sqlite").exists()


async def test_a_cache_file_that_is_not_writable_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / "results.sqlite").mkdir()
    finding = await cache_finding(tmp_path)
    assert finding.level is Level.PROBLEM
    assert "results.sqlite in FALPROXY_DATA_DIR" in finding.text
    assert "FALPROXY_DATA_DIR" in finding.fix


async def test_a_cache_that_is_off_is_a_note(tmp_path: Path) -> None:
    findings = await findings_of(data_dir=tmp_path, cache=False)
    assert findings[-1].level is Level.NOTE
    assert "FALPROXY_CACHE is off" in findings[-1].text
    assert not (tmp_path / "results.sqlite").exists()


async def test_redis_is_checked_without_the_cache_too(tmp_path: Path) -> None:
    """It also stores the owners of queued requests."""
    with redis_server() as server:
        findings = await findings_of(data_dir=tmp_path, cache=False, redis_url=server.url)
    assert [finding.level for finding in findings[-2:]] == [Level.NOTE, Level.OK]
    findings = await findings_of(data_dir=tmp_path, cache=False, redis_url="redis://127.0.0.1:9")
    assert [finding.level for finding in findings[-2:]] == [Level.NOTE, Level.PROBLEM]


async def test_a_writable_redis_is_ok(tmp_path: Path) -> None:
    with redis_server(requirepass="s3cret") as server:
        url = f"redis://:s3cret@127.0.0.1:{server.port}/0"
        finding = await cache_finding(tmp_path, redis_url=url)
    assert finding.level is Level.OK
    assert "Results are stored in Redis" in finding.text
    assert not (tmp_path / "results.sqlite").exists()


@pytest.mark.parametrize(
    ("options", "url", "fix"),
    [
        pytest.param(
            {"requirepass": "another"}, "redis://:s3cret@127.0.0.1:{}", "password", id="password"
        ),
        pytest.param(
            {"requirepass": "s3cret"}, "redis://127.0.0.1:{}", "password", id="no password"
        ),
        pytest.param(
            {"replicaof": "127.0.0.1 9"}, "redis://127.0.0.1:{}", "primary", id="a replica"
        ),
        pytest.param({"maxmemory": "1"}, "redis://127.0.0.1:{}", "memory", id="full"),
        pytest.param({}, "rediss://:s3cret@127.0.0.1:{}", "TLS", id="no TLS"),
    ],
)
async def test_a_redis_that_is_not_writable_is_a_problem(
    tmp_path: Path, options: dict[str, str], url: str, fix: str
) -> None:
    with redis_server(**options) as server:
        finding = await cache_finding(tmp_path, redis_url=url.format(server.port))
    assert finding.level is Level.PROBLEM
    assert fix in finding.fix


@pytest.mark.parametrize(
    "permissions",
    [
        pytest.param(("~other:*", "+@all"), id="other keys"),
        pytest.param(("~*", "&*", "+@all", "-@scripting"), id="no scripts"),
        pytest.param(("%R~*", "+@all"), id="read only"),
    ],
)
async def test_a_redis_user_without_permissions_is_a_problem(
    tmp_path: Path, permissions: tuple[str, ...]
) -> None:
    with redis_server() as server:
        async with Redis(port=server.port) as redis:
            command = ("ACL", "SETUSER", "ann", "on", ">s3cret", *permissions)
            await redis.execute_command(*command)  # type: ignore[no-untyped-call]  # redis-py's own
        url = f"redis://ann:s3cret@127.0.0.1:{server.port}"
        finding = await cache_finding(tmp_path, redis_url=url)
    assert finding.level is Level.PROBLEM
    assert "falproxy:*" in finding.fix


async def test_an_unreachable_redis_is_a_problem(tmp_path: Path) -> None:
    finding = await cache_finding(tmp_path, redis_url="redis://:s3cret@127.0.0.1:9")
    assert finding.level is Level.PROBLEM
    assert "firewall" in finding.fix


async def test_a_frozen_redis_is_a_problem_within_seconds(tmp_path: Path) -> None:
    with redis_server() as server:
        server.freeze()
        async with asyncio.timeout(8):
            finding = await cache_finding(tmp_path, redis_url=server.url)
    assert finding.level is Level.PROBLEM


@asynccontextmanager
async def delaying_proxy(port: int, seconds: float) -> AsyncIterator[int]:
    """Forward a port to another one with a delay. Yields the new port."""

    async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while content := await reader.read(2**16):
            await asyncio.sleep(seconds)
            writer.write(content)
        writer.close()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        target = await asyncio.open_connection("127.0.0.1", port)
        async with asyncio.TaskGroup() as directions:
            directions.create_task(forward(reader, target[1]))
            directions.create_task(forward(target[0], writer))

    async with await asyncio.start_server(accept, "127.0.0.1", 0) as server:
        yield server.sockets[0].getsockname()[1]


async def test_a_slow_redis_is_a_note(tmp_path: Path) -> None:
    with redis_server() as server:
        async with delaying_proxy(server.port, 0.04) as port:
            finding = await cache_finding(tmp_path, redis_url=f"redis://127.0.0.1:{port}")
    assert finding.level is Level.NOTE
    assert "nearer" in finding.fix


@pytest.mark.parametrize(
    ("policy", "level", "text"),
    [
        pytest.param("allkeys-lru", Level.PROBLEM, "ids of paid requests", id="all keys"),
        pytest.param("volatile-ttl", Level.NOTE, "calls in flight", id="by time to live"),
        pytest.param("noeviction", Level.NOTE, "stores nothing", id="nothing"),
    ],
)
async def test_what_a_full_redis_evicts_is_checked(
    tmp_path: Path, policy: str, level: Level, text: str
) -> None:
    with redis_server(maxmemory="100mb", maxmemory_policy=policy) as server:
        findings = await findings_of(data_dir=tmp_path, redis_url=server.url)
    (finding,) = (finding for finding in findings if "When Redis is full" in finding.text)
    assert finding.level is level
    assert text in finding.text
    assert "volatile-lru" in finding.fix


@pytest.mark.parametrize("options", [{}, {"maxmemory": "9mb", "maxmemory_policy": "volatile-lru"}])
async def test_a_redis_that_evicts_only_results_is_ok(
    tmp_path: Path, options: dict[str, str]
) -> None:
    with redis_server(**options) as server:
        findings = await findings_of(data_dir=tmp_path, redis_url=server.url)
    assert not [finding for finding in findings if "When Redis is full" in finding.text]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        pytest.param({"redis_url": "redis://127.0.0.1:9"}, "/api/images/jobs", id="Redis only"),
        pytest.param(
            {"database_url": "postgresql://127.0.0.1:9/db"}, "queued request", id="PostgreSQL only"
        ),
    ],
)
async def test_half_a_cluster_is_a_note(options: dict[str, str], text: str, tmp_path: Path) -> None:
    findings = await findings_of(data_dir=tmp_path, **options)
    (finding,) = (finding for finding in findings if "is set without" in finding.text)
    assert finding.level is Level.NOTE
    assert text in finding.text
    both = options | {
        "redis_url": "redis://127.0.0.1:9",
        "database_url": "postgresql://127.0.0.1:9/db",
    }
    findings = await findings_of(data_dir=tmp_path, **both)
    assert not [finding for finding in findings if "is set without" in finding.text]


async def test_redis_without_redis_py_is_a_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "falproxy.stores.cache.redis", raising=False)
    monkeypatch.setitem(sys.modules, "redis.asyncio", None)
    finding = await cache_finding(tmp_path, redis_url="redis://127.0.0.1:9")
    assert finding.level is Level.PROBLEM
    assert "pip install 'falproxy[redis]'" in finding.text


async def test_an_invalid_redis_url_is_a_problem(tmp_path: Path) -> None:
    finding = await cache_finding(tmp_path, redis_url="redis://:s3cret@127.0.0.1:port")
    assert finding.level is Level.PROBLEM


async def output_findings(**options: object) -> list[Finding]:
    return [
        finding
        for finding in await findings_of(cache=False, **options)
        if finding.text.startswith(("Outputs", "fal cannot read", "Results are shared"))
    ]


async def test_outputs_that_stay_with_fal_are_a_note(tmp_path: Path) -> None:
    (finding,) = await output_findings(data_dir=tmp_path, rehost="off")
    assert finding.level is Level.NOTE
    assert "SUPABASE_URL" in finding.fix


async def test_a_writable_disk_is_ok(tmp_path: Path) -> None:
    (finding,) = await output_findings(data_dir=tmp_path)
    assert (finding.level, finding.fix) == (Level.OK, "")
    files = [path for path in (tmp_path / "files").rglob("*") if path.is_file()]
    assert {path.name for path in files} <= {"lock"}


async def test_a_disk_that_is_not_writable_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / "files").write_text("a file where a folder should be")
    (finding,) = await output_findings(data_dir=tmp_path)
    assert finding.level is Level.PROBLEM
    assert str(tmp_path) not in finding.text


async def test_stored_files_that_fal_cannot_read_are_a_note(tmp_path: Path, fal: FakeFal) -> None:
    options = {"sandbox": False, "rehost": "disk", "data_dir": tmp_path}
    _, note = await output_findings(**options, upstream_origin=fal.origin)
    assert (note.level, "FALPROXY_PUBLIC_URL" in note.fix) == (Level.NOTE, True)
    options["public_url"] = "https://proxy.example.com"
    (finding,) = await output_findings(**options, upstream_origin=fal.origin)
    assert finding.level is Level.OK


async def test_shared_results_whose_files_are_not_shared_are_a_note(tmp_path: Path) -> None:
    with redis_server() as server:
        _, note = await output_findings(data_dir=tmp_path, redis_url=server.url)
    assert note.level is Level.NOTE
    assert "Supabase" in note.fix


async def test_a_writable_bucket_is_ok(tmp_path: Path) -> None:
    async with FakeSupabase() as fake:
        project = {"supabase_url": fake.url, "supabase_key": fake.service_key}
        (finding,) = await output_findings(data_dir=tmp_path, **project)
        assert (finding.level, "fal_images" in finding.text) == (Level.OK, True)
        assert fake.objects("fal_images") == {}
        signed = project | {"supabase_bucket": "private", "supabase_signed_urls": 60.0}
        (finding,) = await output_findings(data_dir=tmp_path, **signed)
        assert (finding.level, fake.buckets["private"].is_public) == (Level.OK, False)


async def test_a_bucket_that_is_not_writable_is_a_problem_with_its_reason(tmp_path: Path) -> None:
    async with FakeSupabase() as fake:
        anonymous = {"supabase_url": fake.url, "supabase_key": fake.token(role="anon")}
        (finding,) = await output_findings(data_dir=tmp_path, **anonymous)
    assert finding.level is Level.PROBLEM
    assert "secret key" in finding.text


@pytest.mark.parametrize(
    ("options", "text"),
    [
        pytest.param({"supabase_key": "with space"}, "key", id="a key"),
        pytest.param({"supabase_bucket": "a/b"}, "bucket", id="a bucket"),
        pytest.param({"supabase_key": None}, "SUPABASE_KEY", id="no key"),
    ],
)
async def test_an_invalid_supabase_project_is_a_problem(
    tmp_path: Path, options: dict[str, object], text: str
) -> None:
    project = {"supabase_url": "http://127.0.0.1:9", "supabase_key": "s3cret", "rehost": "supabase"}
    (finding,) = await output_findings(data_dir=tmp_path, **project | options)
    assert (finding.level, text in finding.text) == (Level.PROBLEM, True)


async def test_supabase_without_its_client_is_a_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "falproxy.stores.files.supabase", raising=False)
    monkeypatch.setitem(sys.modules, "supabase", None)
    project = {"supabase_url": "http://127.0.0.1:9", "supabase_key": "s3cret"}
    (finding,) = await output_findings(data_dir=tmp_path, **project)
    assert finding.level is Level.PROBLEM
    assert "pip install 'falproxy[supabase]'" in finding.text


async def ledger_finding(**options: object) -> Finding:
    findings = await findings_of(cache=False, **options)
    (finding,) = [finding for finding in findings if "recorded" in finding.text]
    return finding


async def test_a_writable_ledger_is_ok(tmp_path: Path) -> None:
    assert (await ledger_finding(data_dir=tmp_path)).level is Level.OK


@pytest.mark.parametrize(
    "url",
    [
        pytest.param("postgresql://ann:s3cret@127.0.0.1:9/falproxy", id="no server"),
        pytest.param("mysql://ann:s3cret@127.0.0.1/falproxy", id="another database"),
    ],
)
async def test_a_ledger_that_is_not_writable_is_a_problem(tmp_path: Path, url: str) -> None:
    finding = await ledger_finding(data_dir=tmp_path, database_url=url)
    assert finding.level is Level.PROBLEM
    assert "DATABASE_URL" in finding.fix
    assert "s3cret" not in finding.text


@pytest.mark.parametrize(
    ("settings", "level", "word"),
    [
        pytest.param({"required": True}, Level.PROBLEM, "REQUIRE_AUTH", id="it does not start"),
        pytest.param({"allowed_hosts": ("*",)}, Level.NOTE, "rebinding", id="any host name"),
    ],
)
def test_settings_of_an_open_proxy_are_checked(
    settings: dict[str, object], level: Level, word: str
) -> None:
    findings = [*check_access(make_settings(fal_key="a:b", **settings))]
    assert [finding.level for finding in findings if word in finding.text] == [level]
    locked = make_settings(fal_key="a:b", access_key="s3cret", **settings)
    assert [finding.level for finding in check_access(locked)] == [Level.OK]
