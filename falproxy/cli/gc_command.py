"""`falproxy gc`: counts or deletes what is older than its retention."""

from collections.abc import AsyncIterator
from time import time

from falproxy.cli.files_command import collect_unused
from falproxy.settings import Settings
from falproxy.stores.cache.sqlite_owners import OWNERS_FILE, SqliteOwnerStore
from falproxy.stores.ledger import Ledger
from falproxy.stores.ledger.writer import LEDGER_FILE, choose_ledger

DAY = 86400.0


async def collect_old(settings: Settings, *, delete: bool) -> AsyncIterator[str]:
    """Yield one line for each kind of data that has a retention.

    delete: delete what is older; otherwise it is only counted.
    Raises: LedgerError, StoreError, StorageError, SettingsError.
    """
    if settings.ledger.database_url or (settings.data_dir / LEDGER_FILE).exists():
        async with choose_ledger(settings.ledger.database_url, settings.data_dir) as ledger:
            yield await collect_records(settings, ledger, delete=delete)
            yield await collect_jobs(settings, ledger, delete=delete)
    if not settings.cache.redis_url and (settings.data_dir / OWNERS_FILE).exists():
        yield await collect_owners(settings, delete=delete)
    if (retention := settings.storage.files_retention) is None:
        yield describe("files", None, 0, delete=delete)
        return
    count = 0
    async for _ in collect_unused(settings, retention, delete=delete):
        count += 1
    yield describe("files", retention, count - 1, delete=delete)  # the last line is the total


async def collect_records(settings: Settings, ledger: Ledger, *, delete: bool) -> str:
    retention, count = settings.ledger.retention, 0
    if retention is not None:
        work = ledger.delete_before if delete else ledger.count_before
        count = await work(time() - retention)
    return describe("ledger", retention, count, delete=delete)


async def collect_jobs(settings: Settings, ledger: Ledger, *, delete: bool) -> str:
    ages = (settings.ledger.retention, settings.ledger.jobs_retention)
    retention, count = min((age for age in ages if age is not None), default=None), 0
    if retention is not None:
        work = ledger.delete_jobs_before if delete else ledger.count_jobs_before
        count = await work(time() - retention)
    return describe("jobs", retention, count, delete=delete)


async def collect_owners(settings: Settings, *, delete: bool) -> str:
    retention = settings.cache.owner_retention
    store = SqliteOwnerStore(settings.data_dir / OWNERS_FILE, retention=retention)
    try:
        count = await store.delete_before(time() - retention, delete=delete)
    finally:
        await store.close()
    return describe("owners", retention, count, delete=delete)


def describe(name: str, retention: float | None, count: int, *, delete: bool) -> str:
    if retention is None:
        return f"{name:<8} kept for ever"
    age = f"{retention / DAY:g}d" if retention >= DAY else f"{retention:g}s"
    return f"{name:<8} older than {age:<6} {count:>9,} {'' if delete else 'to be '}deleted"
