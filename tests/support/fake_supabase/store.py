"""What the fake holds: buckets with objects in them, and the rules for both."""

import re
from dataclasses import dataclass, field
from datetime import UTC, datetime
from hashlib import md5

from tests.support.fake_supabase.errors import (
    INVALID_BUCKET,
    INVALID_KEY,
    NAME_TOO_LONG,
    TOO_LARGE,
    TYPE_REFUSED,
    TYPE_UNREAD,
    Refusal,
)

KEY = re.compile(r"[\w/\-.!*'() &$@=;:+,?]+", re.ASCII)
BUCKET = re.compile(r"[A-Za-z0-9 ._'-]{1,100}")
TYPE = re.compile(r"[\w!#$&^.+-]+/[\w!#$&^.+*-]+(\s*;.*)?", re.ASCII)
SIZE = re.compile(r"(\d+(?:\.\d+)?)(GB|MB|KB|B)?", re.IGNORECASE)
UNITS = {"GB": 10**9, "MB": 10**6, "KB": 10**3, "B": 1}
PLACEHOLDER = ".emptyFolderPlaceholder"
PART_MAX = 250  # bytes of one part of a path, as the file back end has it


@dataclass(slots=True)
class Object:
    id: str
    content: bytes = field(repr=False)
    content_type: str
    cache_control: str
    created: datetime
    updated: datetime
    metadata: dict[str, object]
    etag: str = ""

    def __post_init__(self) -> None:
        self.etag = f'"{md5(self.content, usedforsecurity=False).hexdigest()}"'


@dataclass(slots=True)
class Bucket:
    name: str
    is_public: bool = False
    size_max: int | None = None
    types: list[str] | None = None
    created: datetime = field(default_factory=lambda: datetime.now(UTC))
    updated: datetime = field(default_factory=lambda: datetime.now(UTC))
    objects: dict[str, Object] = field(default_factory=dict)

    def row(self) -> dict[str, object]:
        return {
            "id": self.name,
            "name": self.name,
            "owner": "",
            "public": self.is_public,
            "file_size_limit": self.size_max,
            "allowed_mime_types": self.types,
            "created_at": self.created.isoformat(),
            "updated_at": self.updated.isoformat(),
        }

    def change(self, given: dict[str, object]) -> None:
        """Raises: Refusal."""
        if "public" in given:
            self.is_public = given["public"] is True
        if "file_size_limit" in given:
            self.size_max = size_of(given["file_size_limit"])
        if "allowed_mime_types" in given:
            types = given["allowed_mime_types"]
            self.types = [str(one) for one in types] if isinstance(types, list) else None

    def check_type(self, content_type: str) -> None:
        """Compare the literal type, with its parameters."""
        if not TYPE.fullmatch(content_type):
            raise Refusal(TYPE_UNREAD)
        kind = content_type.partition("/")[0]
        if self.types and not {content_type, f"{kind}/*", "*/*"} & {*self.types}:
            raise Refusal(TYPE_REFUSED, content_type)

    def check_size(self, size: int, server_max: int) -> None:
        if size > min(server_max, server_max if self.size_max is None else self.size_max):
            raise Refusal(TOO_LARGE)


def size_of(given: object) -> int | None:
    """Parse a number, or text such as `1MB`."""
    if given is None:
        return None
    match = SIZE.fullmatch(str(given))
    if match is None:
        raise Refusal(INVALID_BUCKET)
    return int(float(match[1]) * UNITS[(match[2] or "B").upper()])


def check_key(key: str) -> None:
    if not KEY.fullmatch(key):
        raise Refusal(INVALID_KEY, key)
    if any(len(part.encode()) >= PART_MAX for part in key.split("/")):
        raise Refusal(NAME_TOO_LONG)


def check_bucket_name(name: object) -> str:
    if not isinstance(name, str) or not BUCKET.fullmatch(name):
        raise Refusal(INVALID_BUCKET)
    return name


def row_of(name: str, found: Object) -> dict[str, object]:
    """Return the row of an object in a listing."""
    return {
        "name": name,
        "id": found.id,
        "created_at": found.created.isoformat(),
        "updated_at": found.updated.isoformat(),
        "last_accessed_at": found.updated.isoformat(),
        "metadata": {
            "eTag": found.etag,
            "size": len(found.content),
            "mimetype": found.content_type,
            "cacheControl": found.cache_control,
            "lastModified": found.updated.isoformat(),
            "contentLength": len(found.content),
            "httpStatusCode": 200,
        },
    }
