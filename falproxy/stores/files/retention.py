"""Deletion of stored files that have not been used for a while, while the proxy runs."""

import asyncio
import logging
import random
import time
from collections.abc import AsyncIterator, Callable

from aiohttp import web

from falproxy.concurrency import cancel_tasks
from falproxy.errors import SettingsError
from falproxy.settings import Settings
from falproxy.stores.files import Storage, StorageError
from falproxy.stores.files.rehosting import URL_CACHE_TTL

logger = logging.getLogger(__name__)

COLLECT_INTERVAL = 6 * 3600.0  # mean seconds between two collections of one process


def minimum_age(settings: Settings, storage: Storage) -> float:
    """Return the seconds for which a file may be referred to after its recorded last use."""
    return max(settings.cache.ttl, URL_CACHE_TTL) + storage.use_resolution


def files_retention_context(
    storage: Storage, settings: Settings, interval: float = COLLECT_INTERVAL
) -> Callable[[web.Application], AsyncIterator[None]]:
    """Cleanup context: delete the files that were not used for FALPROXY_FILES_RETENTION.

    storage: open while the application runs.
    interval: mean seconds between two collections.
    Raises: SettingsError, cached results refer to files for longer.
    """
    older_than = settings.storage.files_retention or 0.0
    if older_than < (least := minimum_age(settings, storage)):
        raise SettingsError(
            f"FALPROXY_FILES_RETENTION must be at least {least:g}s: results in the cache refer to "
            "files for that time."
        )

    async def context(app: web.Application) -> AsyncIterator[None]:
        task = asyncio.get_running_loop().create_task(collect_loop(storage, older_than, interval))
        yield
        await cancel_tasks((task,))

    return context


async def collect_loop(storage: Storage, older_than: float, interval: float) -> None:
    """Collect for ever, at random times: the workers of all machines should not do so at once."""
    while True:
        await asyncio.sleep(interval * (0.5 + random.random()))
        try:
            count = size = 0
            async for file in storage.collect_garbage(older_than, time.time(), delete=True):
                count += 1
                size += file.size
        except StorageError as error:
            logger.info("Unused files were not deleted: %s", error)
        else:
            if count:
                logger.info("%d unused files of %d bytes were deleted", count, size)
