"""The file of a ledger without entries: creating its tables takes half of the time of a start."""

import asyncio
import os
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path
from threading import Thread

from falproxy import Settings
from falproxy.stores.ledger.sqlite import sqlite_ledger

NAME = "ledger.sqlite"


@cache
def empty_ledger() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / NAME

        async def create() -> None:
            async with sqlite_ledger(file) as ledger:
                await ledger.probe()

        thread = Thread(target=asyncio.run, args=(create(),))  # a test has an event loop already
        thread.start()
        thread.join()
        return file.read_bytes()


def with_empty_ledger(settings: Settings) -> Settings:
    """Return the settings, with the file in their data directory if the ledger is one."""
    if settings.ledger.database_url is None:
        add_empty_ledger(settings.data_dir)
    return settings


def add_empty_ledger(data_dir: Path) -> None:
    """Write the file into a data directory, if it has none and can be used."""
    with suppress(OSError):
        data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(data_dir / NAME, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(descriptor, "wb") as file:
            file.write(empty_ledger())
