"""Fixtures of the end-to-end tests: players of scenarios in Node, Chromium and Python."""

import os
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from tests.support.chromium import Chromium
from tests.support.fal_client_world import CLIENT_KEY, ScenarioProcess, photo
from tests.support.js_world import JS, PLAY_TIMEOUT, Play, World, need, node_player
from tests.support.page_browser import Driver, RestartableProxy, Visitor, launch, open_proxy
from tests.support.paths import CHROMIUM

FOLDER = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks all tests of this folder as slow, unless they have a marker of their own."""
    for item in items:
        if item.path.is_relative_to(FOLDER) and item.get_closest_marker("slow") is None:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="module")
def chromium() -> Iterator[Chromium]:
    """One browser for all tests of this module. Each test has its own profile and servers."""
    need(Path("node"), JS / "node_modules", CHROMIUM)
    command = ["node", str(JS / "browser.mjs")]
    with subprocess.Popen(
        command,
        env={**os.environ, "CHROMIUM": str(CHROMIUM)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None
        try:
            yield Chromium(process)
            process.stdin.close()  # ends browser.mjs, which closes the browser
            process.wait(timeout=PLAY_TIMEOUT)
        finally:
            process.kill()


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory with the scenarios, bundled as a page."""
    need(Path("node"), JS / "node_modules")
    directory = tmp_path_factory.mktemp("scenarios")
    esbuild = str(JS / "node_modules" / ".bin" / "esbuild")
    outfile = f"--outfile={directory / 'page.js'}"
    command = [esbuild, str(JS / "scenarios_page.js"), "--bundle", outfile, "--log-level=warning"]
    subprocess.run(command, check=True, timeout=60)
    (directory / "index.html").write_text('<!doctype html><script src="page.js"></script>')
    return directory


@pytest.fixture
def play_js(world: World) -> Play:
    """Runs a scenario of tests/js in Node, with the `world` of the test module."""
    return node_player(world)


@pytest.fixture(scope="module", params=["oldest", "newest"])
def scenario_process(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ScenarioProcess]:
    """A process with a fal key in its environment."""
    home = tmp_path_factory.mktemp("home")
    process = ScenarioProcess.start(request.param, home, FAL_KEY=CLIENT_KEY)
    yield process
    process.stop()


@pytest.fixture(scope="module")
def both(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[ScenarioProcess, ScenarioProcess]]:
    """The oldest and the newest fal_client at the same time."""
    homes = {version: tmp_path_factory.mktemp("home") for version in ("oldest", "newest")}
    oldest, newest = (
        ScenarioProcess.start(name, home, FAL_KEY=CLIENT_KEY) for name, home in homes.items()
    )
    yield oldest, newest
    oldest.stop()
    newest.stop()


@pytest.fixture(params=["sync", "async"])
def client_kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def image_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("images") / "photo.png"
    path.write_bytes(photo())
    return path


@pytest.fixture(scope="module")
def driver() -> Iterator[Driver]:
    """One browser for the page in all tests of this module. TEST_ARTEFACTS: directory for
    screenshots."""
    named = os.environ.get("TEST_ARTEFACTS")
    artefacts = Path(named).resolve() if named else None
    if artefacts is not None:
        artefacts.mkdir(parents=True, exist_ok=True)
    driver = launch(artefacts)
    with driver.process as process:
        assert process.stdin is not None
        try:
            yield driver
            process.stdin.close()
            process.wait(timeout=30)
        finally:
            process.kill()


@pytest.fixture
async def proxy(tmp_path: Path) -> AsyncIterator[RestartableProxy]:
    async with open_proxy(tmp_path / "data") as opened:
        yield opened


@pytest.fixture
async def visitor(driver: Driver, proxy: RestartableProxy) -> AsyncIterator[Visitor]:
    async with driver.visit(proxy.base) as opened:
        await opened.open_page()
        yield opened
