"""Rows of objects, as Supabase Storage lists them: times, and which of them are unused files."""

from collections.abc import Mapping
from datetime import UTC, datetime

from falproxy.stores.files import FILE_NAME, UnusedFile

USE_KEYS = ("updated_at", "last_accessed_at", "last_modified")


def unused_file(row: Mapping[str, object], before: float) -> UnusedFile | None:
    """Return the file in a row of a list, None if it was used since `before` (seconds since 1970),
    or is not one of the proxy's."""
    name, used_at = str(row.get("name")), last_use(row)
    is_object = row.get("id") is not None and FILE_NAME.fullmatch(name) is not None
    if not is_object or used_at is None or used_at >= before:
        return None
    metadata = row.get("metadata")
    size = metadata.get("size") if isinstance(metadata, dict) else None
    return UnusedFile(name, size if isinstance(size, int) else 0, used_at)


def last_use(row: Mapping[str, object]) -> float | None:
    """Return the latest time in the row of an object in seconds since 1970, None if it has none."""
    times = [parse_time(row[key]) for key in USE_KEYS if key in row]
    known = [each for each in times if each is not None]
    return max(known) if known else parse_time(row.get("created_at"))


def parse_time(value: object) -> float | None:
    """Parse a time of ISO 8601, in UTC if it has no time zone."""
    try:
        parsed = datetime.fromisoformat(str(value))
    except ValueError:
        return None
    return (parsed if parsed.tzinfo else parsed.replace(tzinfo=UTC)).timestamp()
