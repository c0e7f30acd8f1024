"""Proxies of clients that poll."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.support.fake_fal import FakeFal
from tests.support.polled_proxy import MakeProxy, polled_proxies


@pytest.fixture
async def make_proxy(fal: FakeFal, tmp_path: Path) -> AsyncIterator[MakeProxy]:
    async with polled_proxies(fal, tmp_path) as start:
        yield start
