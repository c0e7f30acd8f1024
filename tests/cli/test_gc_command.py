"""`falproxy gc`: what is older than its retention."""

import asyncio
import os
import time
from dataclasses import replace
from pathlib import Path

import pytest

from falproxy.cli.gc_command import collect_old
from falproxy.cli.main import main
from falproxy.settings import Settings
from falproxy.stores.cache import RequestOwner
from falproxy.stores.cache.sqlite_owners import OWNERS_FILE, SqliteOwnerStore
from falproxy.stores.files.disk import DiskStorage
from falproxy.stores.ledger import CallRecord, JobRow, Lease
from falproxy.stores.ledger.sqlite import sqlite_ledger
from tests.support.fake_clock import FakeClock
from tests.support.settings import make_settings
from tests.support.storages import body, file_of

DAY = 86400.0


async def fill(folder: Path) -> None:
    """Write two records, a job, two owners and a file, half of them 40 days old."""
    clock = FakeClock(time.time() - 40 * DAY)
    async with sqlite_ledger(folder / "ledger.sqlite") as ledger:
        await ledger.write(
            [CallRecord(at=at, route="proxy", status=200) for at in (clock.now, time.time())]
        )
        job = await ledger.add_job(JobRow(owner="ann", model="m", endpoint="e"), Lease("p", 1.0))
        await ledger.save_job(replace(job, status="completed"))
        old = int(clock.now * 1000)
        await ledger._database.execute("UPDATE falproxy_jobs SET finished_at = $1", (old,))
    owners = SqliteOwnerStore(folder / OWNERS_FILE, clock, retention=1e9)
    await owners.put_owner("old", RequestOwner("ann", ""))
    clock.now = time.time()
    await owners.put_owner("new", RequestOwner("ann", ""))
    await owners.close()
    async with DiskStorage(folder / "files", str) as storage:
        stored = file_of(body(1000))
        await storage.put(stored)
    path = folder / "files" / stored.name[:2] / stored.name[2:4] / stored.name
    os.utime(path, (clock.now - 40 * DAY, clock.now - 40 * DAY))


def settings_of(folder: Path, **flat: object) -> Settings:
    month = 30 * DAY
    return make_settings(
        fal_key="a:b",
        data_dir=folder,
        rehost="disk",
        **{"ledger_retention": month, "jobs_retention": month, "files_retention": month, **flat},
    )


async def collected(settings: Settings, *, delete: bool) -> list[tuple[str, str]]:
    """Return the name and the count of each line."""
    lines = [line.split() async for line in collect_old(settings, delete=delete)]
    return [(line[0], line[4] if line[1] == "older" else line[1]) for line in lines]


async def test_old_data_is_counted_and_stays_then_it_is_deleted(tmp_path: Path) -> None:
    await fill(tmp_path)
    settings = settings_of(tmp_path)
    old = [("ledger", "1"), ("jobs", "1"), ("owners", "1"), ("files", "1")]
    assert await collected(settings, delete=False) == old
    assert sorted(await collected(settings, delete=True))[1:] == [
        ("jobs", "0"),  # deleted with the records
        ("ledger", "1"),
        ("owners", "1"),
    ]
    assert {count for _, count in await collected(settings, delete=False)} == {"0"}


async def test_jobs_can_be_deleted_before_the_records(tmp_path: Path) -> None:
    await fill(tmp_path)
    settings = settings_of(tmp_path, ledger_retention=None, files_retention=None)
    expected = [("ledger", "kept"), ("jobs", "1"), ("owners", "1"), ("files", "kept")]
    assert await collected(settings, delete=True) == expected
    async with sqlite_ledger(tmp_path / "ledger.sqlite") as ledger:
        assert await ledger.count_before(time.time() + 60) == 2


async def test_nothing_is_created_where_there_is_nothing(tmp_path: Path) -> None:
    settings = settings_of(tmp_path, files_retention=None)
    assert await collected(settings, delete=True) == [("files", "kept")]
    assert list(tmp_path.iterdir()) == []


async def test_the_command_prints_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    await fill(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FALPROXY_DATA_DIR", str(tmp_path))
    monkeypatch.setenv("FALPROXY_LEDGER_RETENTION", "30d")
    assert await asyncio.to_thread(main, ["gc", "--delete"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ["ledger", "older", "than", "30d", "1", "deleted"]
    assert lines[-1] == ["files", "kept", "for", "ever"]
