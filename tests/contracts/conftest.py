"""The servers of the stores. Each test has a prefix or a database of its own on them."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from falproxy.stores.ledger import Ledger
from tests.support.ledger_processes import DATABASES, LedgerProcesses, open_ledger_processes
from tests.support.postgres_server import PostgresServer, postgres_server
from tests.support.redis_server import RedisServer, redis_server


@pytest.fixture(scope="package")
def redis() -> Iterator[RedisServer]:
    with redis_server() as running:
        yield running


@pytest.fixture(scope="package")
def postgres() -> Iterator[PostgresServer]:
    with postgres_server() as running:
        yield running


@pytest.fixture(params=DATABASES)
async def ledger_processes(
    request: pytest.FixtureRequest, tmp_path: Path
) -> AsyncIterator[LedgerProcesses]:
    async with open_ledger_processes(request, tmp_path) as opened:
        yield opened


@pytest.fixture
async def ledger(ledger_processes: LedgerProcesses) -> Ledger:
    return await ledger_processes.store()
