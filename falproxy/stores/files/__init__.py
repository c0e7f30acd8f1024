"""Storage of files, such as re-hosted outputs: the protocol that every backend implements."""

import re
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Protocol, Self

from falproxy.media.content_type import CONTENT_TYPES

# The name of a stored file: the SHA-256 of its bytes in hexadecimal, and an extension.
FILE_NAME = re.compile(rf"(?P<digest>[0-9a-f]{{64}})\.(?P<extension>{'|'.join(CONTENT_TYPES)})")
FILE_CHUNK = 256 * 2**10  # bytes of a file that are read or written at once
# Origin of the URLs of files that the proxy serves itself. It is replaced by the origin that a
# client uses before a document is sent.
LOCAL_ORIGIN = "https://falproxy.invalid"


class StorageError(Exception):
    """A file could not be stored, or the storage is unavailable. A later attempt may succeed.

    The message is a sentence for users. It contains neither a key nor a URL.
    """


class RejectedFileError(StorageError):
    """The storage rejects this file because of its size or type. Another attempt is of no use."""


class FileSource(Protocol):
    """Bytes that can be read repeatedly in constant memory, such as a `falproxy.spool.Spool`."""

    @property
    def size(self) -> int: ...

    def read(self, start: int, length: int) -> bytes:
        """Return up to `length` bytes, none at the end. May block; safe to call in a thread."""

    def chunks(self) -> AsyncIterator[bytes]:
        """Iterate over all bytes without blocking the event loop."""


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file to be stored.

    name: matches `FILE_NAME`. Equal names mean equal bytes.
    content_type: determined from the bytes; never a type that browsers execute.
    """

    name: str
    content_type: str
    content: FileSource


@dataclass(frozen=True, slots=True)
class UnusedFile:
    """A file that was not used recently.

    size: bytes.
    used_at: last use in seconds since 1970.
    """

    name: str
    size: int
    used_at: float


class LocalFiles(Protocol):
    """Files that the proxy serves itself, below `/files/`. The methods block."""

    def size(self, name: str) -> int | None:
        """Return the size of a file, or None if there is no such file. Raises: OSError."""

    def read(self, name: str, start: int, length: int) -> bytes:
        """Return up to `length` bytes of a file. Raises: OSError."""


class Storage(Protocol):
    """Stores files under content-addressed names. An existing file is never overwritten.

    has_permanent_urls: whether the URLs of stored files never expire.
    use_resolution: seconds by which the recorded last use of a file may be too early.
    """

    has_permanent_urls: bool = True
    use_resolution: float = 0.0

    @property
    def local_files(self) -> LocalFiles | None:
        """The files, if the proxy serves them itself; None if their URLs lead elsewhere."""
        return None

    async def __aenter__(self) -> Self: ...

    async def __aexit__(self, *error: object) -> None: ...

    async def put(self, file: StoredFile) -> str:
        """Store a file durably and return a URL from which it can be read without credentials.

        Raises: StorageError, also if the source ends early.
        """

    def is_expiring(self, url: str) -> bool:
        """Return whether the URL of a stored file expires soon and should be renewed."""
        return False

    async def renew_url(self, url: str) -> str:
        """Return a fresh URL for an expiring one, others unchanged. Raises: StorageError."""
        return url

    def collect_garbage(
        self, older_than: float, now: float, *, delete: bool
    ) -> AsyncIterator[UnusedFile]:
        """Iterate over the files that were last used more than `older_than` seconds ago. With
        `delete`, each is deleted before it is yielded. Other files are left alone.

        now: seconds since 1970.
        Raises: StorageError.
        """

    async def check(self) -> None:
        """Write, read and delete a test file. Raises: StorageError."""
