"""`falproxy files gc`: lists or deletes stored files that have not been used recently."""

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from time import time

from falproxy.stores.files.disk import collect_garbage


def collect_unused(folder: Path, older_than: float, delete: bool) -> Iterator[str]:
    """Yield one line for each unused file, and a line with the total.

    older_than: seconds since the last use.
    delete: delete the files; otherwise they are only listed.
    Raises: StorageError.
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
