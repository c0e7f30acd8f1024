"""Fixtures of the tests of stored files: a host of files, and a fetcher that reaches it."""

from collections.abc import AsyncIterator

import pytest

from falproxy.media.fetch import Fetcher
from tests.support.rehosting import Cdn, fetcher_of, open_cdn


@pytest.fixture
async def cdn() -> AsyncIterator[Cdn]:
    async with open_cdn() as opened:
        yield opened


@pytest.fixture
async def fetcher(cdn: Cdn) -> AsyncIterator[Fetcher]:
    async with fetcher_of(cdn.origin) as opened:
        yield opened
