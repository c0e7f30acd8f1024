"""@fal-ai/client in Node through the proxy: the scenarios of tests/js.

`Scenarios` is the contract; test_js_browser.py runs it in Chromium as well.
"""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.support.js_scenarios import Scenarios
from tests.support.js_world import Play, World, node_player, open_world


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    async with open_world(tmp_path, {}) as opened:
        yield opened


@pytest.fixture
def play(world: World) -> Play:
    return node_player(world)


class TestInNode(Scenarios):
    """@fal-ai/client with `proxyUrl: {url, when: "always"}`."""
