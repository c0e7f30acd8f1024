"""The ledgers of several processes, in one file or one PostgreSQL database."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from falproxy.stores.ledger import Ledger
from falproxy.stores.ledger.postgres import postgres_ledger
from falproxy.stores.ledger.sqlite import sqlite_ledger
from tests.support.store_processes import StoreProcesses

LedgerProcesses = StoreProcesses[Ledger]
DATABASES = ["sqlite", pytest.param("postgres", marks=pytest.mark.slow)]


@asynccontextmanager
async def open_ledger_processes(
    request: pytest.FixtureRequest, folder: Path
) -> AsyncIterator[LedgerProcesses]:
    """Context: the processes of a fixture whose parameter is one of DATABASES."""
    if request.param == "sqlite":
        processes = LedgerProcesses(lambda: sqlite_ledger(folder / "data" / "ledger.sqlite"))
    else:
        url = request.getfixturevalue("postgres").fresh()
        processes = LedgerProcesses(lambda: postgres_ledger(url))
    async with processes.stack:
        yield processes
