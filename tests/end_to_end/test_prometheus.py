"""A real Prometheus with the files of `deploy` reads a proxy's metrics and evaluates queries."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from aiohttp import ClientSession

from tests.support.js_world import need
from tests.support.limits import LONG
from tests.support.monitoring import RULES_FILE, alerts, metrics_of, panel_queries
from tests.support.paths import ROOT
from tests.support.ports import free_port
from tests.support.reverse_proxies import running
from tests.support.sandbox_proxy import SandboxProxy, open_sandbox_proxy

pytestmark = [pytest.mark.slow(seconds=10)]
KEY = "the-key-of-prometheus"
SECONDS = 30.0
MODEL = "https://fal.run/fal-ai/flux/dev"
UNKNOWN_PRICE = "https://fal.run/fal-ai/no-such-model"
# Metrics of other programs, and of parts that this proxy does not have.
OTHERS = ("node_",)
# Panels of events that do not occur here.
WITHOUT_EVENTS = {"Saved per hour", "Connections closed by a limit", "Stored outputs"}


@asynccontextmanager
async def prometheus(folder: Path, target: str) -> AsyncIterator[str]:
    """Context: the origin of a Prometheus that reads the metrics of one proxy each half second."""
    need(Path("prometheus"))
    config = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "500ms", "evaluation_interval": "500ms"}
    proxies, _ = config["scrape_configs"]
    config["scrape_configs"] = [proxies]
    proxies["static_configs"] = [{"targets": [target]}]
    proxies["authorization"]["credentials_file"] = str(folder / "key")
    (folder / "key").write_text(KEY)
    (folder / RULES_FILE.name).write_text(RULES_FILE.read_text())
    file = folder / "prometheus.yml"
    file.write_text(yaml.safe_dump(config))
    port = free_port()
    options = {
        "config.file": file,
        "storage.tsdb.path": folder / "data",
        "web.listen-address": f"127.0.0.1:{port}",
        "log.level": "error",
    }
    command = [f"--{name}={value}" for name, value in options.items()]
    async with running(port, "prometheus", *command) as origin:
        yield origin


async def evaluate(session: ClientSession, origin: str, query: str) -> list[Any]:
    """Return the result of a query with Grafana's variables replaced."""
    query = query.replace("$__rate_interval", "5s").replace("$instance", ".*")
    async with session.post(f"{origin}/api/v1/query", data={"query": query}) as response:
        document = await response.json()
        assert document["status"] == "success", (query, document)
        result: list[Any] = document["data"]["result"]
        return result


async def make_calls(proxy: SandboxProxy) -> None:
    """Make calls until they are cancelled: good ones, refused ones and failures of fal."""
    headers = {"x-falproxy-key": KEY}
    for number in range(10_000):
        prompt = ("a lighthouse", "!error 503 runner_connection_error")[number % 5 == 4]
        await proxy.call_target(MODEL, {"prompt": prompt}, headers=headers)
        await proxy.call_target("https://fal.run/keys", headers=headers)
        await proxy.call_target(UNKNOWN_PRICE, {"prompt": prompt}, headers=headers)
        await asyncio.sleep(0.05)


async def test_prometheus_evaluates_all_queries(tmp_path: Path) -> None:
    async with (
        open_sandbox_proxy(
            tmp_path / "proxy",
            access_keys=(("prometheus", KEY),),
            admins=("prometheus",),
            budget=(100_000_000, LONG),
        ) as proxy,
        prometheus(tmp_path, proxy.origin.removeprefix("http://")) as origin,
        ClientSession() as session,
    ):
        calls = asyncio.ensure_future(make_calls(proxy))
        missing = {title: query for title, query in panel_queries() if has_data(title, query)}
        assert len(missing) > 10
        async with asyncio.timeout(SECONDS):
            while missing:
                assert not calls.done()
                await asyncio.sleep(0.5)
                for title, query in (*missing.items(),):
                    if await evaluate(session, origin, query):
                        del missing[title]
        for query in alerts().values():
            await evaluate(session, origin, query)
        firing = await evaluate(session, origin, 'ALERTS{alertstate="firing"}')
        assert firing == []
        calls.cancel()


def has_data(title: str, query: str) -> bool:
    names = metrics_of(query)
    return title not in WITHOUT_EVENTS and not any(name.startswith(OTHERS) for name in names)
