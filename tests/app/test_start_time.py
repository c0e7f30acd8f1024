"""The start is fast and needs little memory: many modules are imported on first use."""

import asyncio
import statistics
import subprocess
import sys
import time
from decimal import Decimal
from pathlib import Path

import pytest
from aiohttp import ClientSession

from falproxy import Settings
from falproxy.app.components import (
    builtin_prices,
    create_prices,
    create_registry,
    registry_prices,
)
from falproxy.app.routes import DIALECT_ROUTES, Dependencies, Lazy
from falproxy.background import Background
from falproxy.dialects.transparent import BodyLimits
from falproxy.fal.pricing import Price
from falproxy.fal.registry import Registry
from falproxy.media.fetch import Fetcher
from falproxy.proxy.prices import PricedModel
from falproxy.stores.ledger.writer import choose_ledger
from tests.support.cli_process import run_interpreter, run_refused, start_interpreter
from tests.support.fake_fal import FakeFal
from tests.support.gateway import MakeGateway
from tests.support.key_search import CANARY
from tests.support.settings import make_settings
from tests.support.urls import PROXY, REQUEST, RUN

pytestmark = pytest.mark.slow

# Modules that are imported on first use.
LATE = (
    "pydantic", "tenacity", "asyncpg", "redis", "supabase", "storage3", "httpx", "PIL", "msgpack",
    "cryptography", "prometheus_client", "swagger_ui", "yaml", "dotenv", "tomllib", "zipfile",
    "falproxy.sandbox", "falproxy.fal.registry", "falproxy.dialects.kontext",
    "falproxy.dialects.openai", "falproxy.dialects.generate", "falproxy.web.openapi",
    "falproxy.cli.cache_command", "falproxy.cli.doctor", "falproxy.stores.files.rehosting",
    "falproxy.stores.files",
    "falproxy.stores.ownership", "falproxy.middleware.rehost", "falproxy.web.usage", "gzip",
    "importlib.resources", "opentelemetry", "falproxy.telemetry",
)  # fmt: skip
# Generous, for busy machines; the aims are 250 ms and 45 MB.
SECONDS_MAX, MEGABYTES_MAX = 2.0, 60.0
STARTS = 3

AFTER_A_POLL = f"""
import asyncio, sys
import falproxy.cli.main
from aiohttp import ClientSession, web
from falproxy import create_app
from falproxy.settings import Settings, UpstreamSettings

async def site(app):
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    return runner, "http://127.0.0.1:%d" % runner.addresses[0][1]

async def respond(request):
    return web.json_response({{}})

async def main():
    fal = web.Application()
    fal.router.add_route("*", "/{{path:.*}}", respond)
    fal_runner, origin = await site(fal)
    settings = Settings(fal_key="a:b", upstream=UpstreamSettings(origin=origin))
    runner, proxy = await site(create_app(settings))
    async with ClientSession() as session:
        for method, target in (("GET", {REQUEST + "/status"!r}), ("POST", {RUN!r})):
            headers = {{"x-fal-target-url": target}}
            async with session.request(method, proxy + {PROXY!r}, headers=headers) as response:
                assert response.status == 200, await response.text()
            print(*(name for name in {LATE!r} if name in sys.modules))
        async with session.get(proxy + "/kontext") as response:
            assert response.status == 405, await response.text()
            print(*(name for name in {LATE!r} if name in sys.modules))
    await runner.cleanup()
    await fal_runner.cleanup()

asyncio.run(main())
"""


def test_modules_are_imported_with_the_first_call_that_needs_them(tmp_path: Path) -> None:
    process = subprocess.run(
        [sys.executable, "-c", AFTER_A_POLL], capture_output=True, text=True, cwd=tmp_path
    )
    assert process.returncode == 0, process.stderr
    poll, run, dialect = process.stdout.splitlines()
    assert poll == ""
    assert run == "tomllib"  # for the prices
    assert {"pydantic", "falproxy.dialects.kontext"} <= {*dialect.split()}
    assert "falproxy.dialects.generate" not in dialect.split()


@pytest.mark.timed
@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="reads the memory use from Linux"
)
async def test_the_start_is_fast_and_needs_little_memory(fal: FakeFal, tmp_path: Path) -> None:
    seconds, megabytes = [], []
    env = {"FAL_KEY": CANARY, "FALPROXY_UPSTREAM_ORIGIN": fal.origin, "CWD": str(tmp_path)}
    for _ in range(STARTS):
        started = time.perf_counter()
        serve = run_interpreter("serve", **env)
        async with serve as proxy, ClientSession() as session:
            headers = {"x-fal-target-url": f"{REQUEST}/status"}
            async with session.get(proxy.origin + PROXY, headers=headers) as response:
                assert response.status == 200
            seconds.append(time.perf_counter() - started)
            megabytes.append(memory_of(proxy.process.pid))
            assert await proxy.stop() == 0
    start, memory = statistics.median(seconds), statistics.median(megabytes)
    print(f"first proxied response after {start * 1000:.0f} ms, {memory:.1f} MB resident")
    assert start < SECONDS_MAX
    assert memory < MEGABYTES_MAX


def memory_of(pid: int) -> float:
    """Return the resident memory of a process in megabytes."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS:"))


async def test_an_invalid_model_file_stops_the_start(tmp_path: Path) -> None:
    own = tmp_path / "own.toml"
    own.write_text("[models.mine]\nendpoint = 7\n")
    message = await run_refused("serve", CWD=str(tmp_path), FAL_KEY="a:b", FALPROXY_MODELS=str(own))
    assert message.startswith("falproxy: FALPROXY_MODELS is wrong at models.mine.endpoint: ")


async def test_the_help_is_printed() -> None:
    process = await start_interpreter("--help")
    out, _ = await process.communicate()
    assert (process.returncode, b"usage: falproxy" in out) == (0, True)


async def make_dependencies(settings: Settings) -> Dependencies:
    return Dependencies(
        body_limits=BodyLimits(settings.server.max_body, allow_encoded=True),
        fetcher=Fetcher(),
        rehosting=None,
        background=Background(),
        load_registry=lambda: create_registry(settings),
        jobs=choose_ledger(None, settings.data_dir),
        prices=create_prices(settings, lambda: create_registry(settings)),
    )


async def test_each_dialect_has_the_paths_of_its_row(tmp_path: Path) -> None:
    settings = make_settings(fal_key="a:b", data_dir=tmp_path)
    dependencies = await make_dependencies(settings)
    for paths, create_routes in DIALECT_ROUTES.items():
        assert paths == (*create_routes(settings, dependencies),)


def test_the_built_in_prices_are_those_of_the_registry() -> None:
    models = create_registry(make_settings(fal_key="a:b")).models.values()
    assert builtin_prices() == {
        model.endpoint: PricedModel(model.rate, model.defaults)
        for model in models
        if model.rate is not None
    }
    prices = registry_prices(make_settings(fal_key="a:b"), lambda: Registry({}, {}))()
    for variant in (each for model in models for each in model.variants):
        known = prices.get(variant.endpoint)
        assert (known and known.price) == variant.rate


def test_prices_of_a_model_file_are_known(tmp_path: Path) -> None:
    own = tmp_path / "own.toml"
    own.write_text(
        '[models.mine]\nendpoint = "me/mine"\nprice = 0.25\nunit = "second"\n'
        "defaults = { duration = 5 }\n"
    )
    settings = make_settings(fal_key="a:b", models_file=own)
    prices = registry_prices(settings, lambda: create_registry(settings))()
    assert prices["me/mine"] == PricedModel(Price(Decimal("0.25"), "seconds"), {"duration": 5})
    assert builtin_prices().keys() < prices.keys()


async def test_an_import_error_is_a_500_and_the_next_request_tries_again(
    fal: FakeFal, make_gateway: MakeGateway, caplog: pytest.LogCaptureFixture
) -> None:
    gateway = await make_gateway(fal.origin)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "falproxy.dialects.kontext", None)
        async with gateway.client.get("/kontext") as response:
            assert response.status == 500
            assert (await response.json())["error"]["code"] == "internal_error"
            assert response.headers["X-Request-ID"]
    assert any("failed inside" in record.message and record.exc_info for record in caplog.records)
    async with gateway.client.get("/kontext") as response:
        assert response.status == 405
    assert fal.seen == []


async def test_polls_continue_during_an_import(fal: FakeFal, make_gateway: MakeGateway) -> None:
    release = asyncio.Event()
    loop = asyncio.get_running_loop()

    def create() -> str:
        asyncio.run_coroutine_threadsafe(release.wait(), loop).result()
        return "created"

    getting = asyncio.ensure_future(Lazy(create).get())
    gateway = await make_gateway(fal.origin)
    async with await gateway.call(f"{REQUEST}/status", "GET") as response:
        assert response.status == 200
    assert not getting.done()
    release.set()
    assert await getting == "created"


async def test_concurrent_callers_share_one_creation() -> None:
    created: list[object] = []

    def create() -> object:
        time.sleep(0.05)
        created.append(object())
        return created[0]

    lazy = Lazy(create)
    cancelled = asyncio.ensure_future(lazy.get())
    others = [asyncio.ensure_future(lazy.get()) for _ in range(5)]
    await asyncio.sleep(0.01)
    cancelled.cancel()
    assert {id(value) for value in await asyncio.gather(*others)} == {id(created[0])}
    assert await lazy.get() is created[0]
    assert len(created) == 1


async def test_a_failed_creation_is_tried_again_by_the_next_caller() -> None:
    tries: list[int] = []

    def create() -> int:
        tries.append(len(tries))
        if len(tries) == 1:
            time.sleep(0.02)
            raise ImportError("not now")
        return len(tries)

    lazy = Lazy(create)
    errors = await asyncio.gather(lazy.get(), lazy.get(), return_exceptions=True)
    assert [type(error) for error in errors] == [ImportError, ImportError]
    assert await lazy.get() == 2
