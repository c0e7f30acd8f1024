"""Fixtures of the tests of the cache store: a fake store, and the breaker in front of it."""

from collections.abc import AsyncIterator

import pytest

from falproxy.stores.cache.circuit_breaker import StoreBreaker
from tests.support.fake_store import FakeStore


@pytest.fixture
def store() -> FakeStore:
    return FakeStore()


@pytest.fixture
async def breaker(store: FakeStore) -> AsyncIterator[StoreBreaker]:
    async with StoreBreaker(store) as breaker:
        yield breaker
