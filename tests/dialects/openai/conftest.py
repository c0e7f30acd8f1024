"""Fixtures for the tests of the OpenAI images API."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.support.openai_proxy import OpenAIProxy, open_openai_proxy


@pytest.fixture
async def proxy(tmp_path: Path) -> AsyncIterator[OpenAIProxy]:
    async with open_openai_proxy(tmp_path) as openai_proxy:
        yield openai_proxy
