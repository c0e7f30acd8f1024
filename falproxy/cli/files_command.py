"""`falproxy files gc`: kept outputs that nobody has needed for a while."""

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from time import time

from falproxy.stores.files.disk import collect_garbage


def collect_unused(folder: Path, older_than: float, delete: bool) -> Iterator[str]:
    """A line for each file, and one for all of them. older_than: seconds. delete: else nothing is
    deleted. Raises: StorageError.
    """
    count = size = 0
    for file in collect_garbage(folder, older_than, time(), delete=delete):
        day = datetime.fromtimestamp(file.used_at, UTC).date()
        yield f"{day}  {file.size:>12,}  {file.name}"
        count += 1
        size += file.size
    files = f"{count} file{'s' * (count != 1)} of {size:,} bytes"
    if delete:
        yield f"{files} deleted."
    else:
        yield f"{files} would be deleted{': say --delete to do so' * bool(count)}."
