"""Deletion of unused files while the proxy runs."""

import asyncio
import logging
import os
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from aiohttp import web

from falproxy.errors import SettingsError
from falproxy.stores.files import StorageError, UnusedFile
from falproxy.stores.files.disk import DiskStorage
from falproxy.stores.files.retention import collect_loop, files_retention_context
from tests.support.settings import make_settings
from tests.support.storages import body, file_of
from tests.support.waiting import wait_until

DAY = 86400.0


async def until_gone(path: Path) -> None:
    await wait_until(lambda: not path.exists())


async def test_files_that_were_not_used_are_deleted_while_the_application_runs(
    tmp_path: Path,
) -> None:
    settings = make_settings(
        fal_key="a:b", data_dir=tmp_path, rehost="disk", files_retention=30 * DAY
    )
    async with DiskStorage(tmp_path / "files", str) as storage:
        paths = []
        for days in (40, 20):
            file = file_of(body(1000 + days))
            await storage.put(file)
            path = tmp_path / "files" / file.name[:2] / file.name[2:4] / file.name
            os.utime(path, (time.time() - days * DAY,) * 2)
            paths.append(path)
        app = web.Application()
        app.cleanup_ctx.append(files_retention_context(storage, settings, interval=0.01))
        runner = web.AppRunner(app)
        await runner.setup()
        await until_gone(paths[0])
        assert paths[1].exists()
        await runner.cleanup()


async def test_an_age_below_that_of_cached_results_stops_the_start(tmp_path: Path) -> None:
    settings = make_settings(
        fal_key="a:b", data_dir=tmp_path, rehost="disk", files_retention=DAY, cache_ttl=2 * DAY
    )
    async with DiskStorage(tmp_path / "files", str) as storage:
        with pytest.raises(SettingsError, match="FALPROXY_FILES_RETENTION must be at least"):
            files_retention_context(storage, settings)


class FailingStorage(DiskStorage):
    """Fails the first collection."""

    collections = 0

    async def collect_garbage(
        self, older_than: float, now: float, *, delete: bool
    ) -> AsyncIterator[UnusedFile]:
        self.collections += 1
        if self.collections == 1:
            raise StorageError("the bucket cannot be listed")
        unused: UnusedFile
        for unused in ():
            yield unused


async def test_a_failed_collection_is_tried_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    storage = FailingStorage(tmp_path, str)
    task = asyncio.create_task(collect_loop(storage, DAY, 0.001))
    await wait_until(lambda: storage.collections >= 3)
    task.cancel()
    assert caplog.text.count("cannot be listed") == 1
