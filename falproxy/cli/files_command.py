"""`falproxy files gc`: lists or deletes stored files that have not been used recently."""

from collections.abc import AsyncIterator
from datetime import UTC, datetime
from time import time

from falproxy.app.components import create_storage
from falproxy.settings import Settings
from falproxy.stores.files import Storage, StorageError
from falproxy.stores.files.disk import create_storage as create_disk_storage
from falproxy.stores.files.retention import minimum_age


def open_storage(settings: Settings) -> Storage:
    """Return the storage in use, or if there is none the disk, which may have files of an earlier
    configuration.

    Raises: SettingsError.
    """
    return (
        create_disk_storage(settings)
        if settings.storage_backend == "off"
        else create_storage(settings)
    )


async def collect_unused(
    settings: Settings, older_than: float, *, delete: bool
) -> AsyncIterator[str]:
    """Yield one line for each unused file, and a line with the total.

    older_than: seconds since the last use.
    delete: delete the files; otherwise they are only listed.
    Raises: StorageError, also for an age that is too low; SettingsError.
    """
    storage = open_storage(settings)
    if older_than < (least := minimum_age(settings, storage)):
        message = f"Cached results refer to files for {least:g} s: choose at least that age."
        raise StorageError(message)
    count = size = 0
    async with storage:
        async for file in storage.collect_garbage(older_than, time(), delete=delete):
            day = datetime.fromtimestamp(file.used_at, UTC).date()
            yield f"{day}  {file.size:>12,}  {file.name}"
            count += 1
            size += file.size
    files = f"{count} file{'s' * (count != 1)} of {size:,} bytes"
    if delete:
        yield f"{files} deleted."
    else:
        yield f"{files} would be deleted{': use --delete to do so' * bool(count)}."
