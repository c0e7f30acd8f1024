"""Files that are kept: what a storage does, by Protocol."""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Protocol, Self


class StorageError(Exception):
    """A file could not be kept or the storage cannot be used now; what was tried is not lost, and
    may be tried again. Its text is a sentence for a person, without a key or a URL."""


class RejectedFileError(StorageError):
    """This file is not taken, for what it is; others are, and trying again is of no use."""


class FileSource(Protocol):
    """Bytes that can be read again and again, in flat memory (falproxy.spool.Spool is one)."""

    @property
    def size(self) -> int: ...

    def read(self, start: int, length: int) -> bytes:
        """As many of these bytes as there are at once, none at the end. May block, but may be
        called in a thread."""

    def chunks(self) -> AsyncIterator[bytes]:
        """All of it, in pieces, without blocking the event loop."""


@dataclass(frozen=True, slots=True)
class StoredFile:
    """What is to be kept. name: the SHA-256 of its bytes in hexadecimal and the extension that
    tells what they are, such as `5d41….png`; the same name always means the same bytes.
    content_type: by the bytes as well; nothing that a browser runs."""

    name: str
    content_type: str
    content: FileSource


class Storage(Protocol):
    """Keeps files under names that tell their content: nothing is ever written over, and what is
    there already is done.

    lasts: whether an address of a kept file is good for ever.
    """

    has_permanent_urls: bool = True

    async def __aenter__(self) -> Self: ...

    async def __aexit__(self, *error: object) -> None: ...

    async def put(self, file: StoredFile) -> str:
        """The URL under which whoever has it can read the file, once it is there for good.

        Raises: StorageError, also where the source breaks off.
        """

    def is_expiring(self, url: str) -> bool:
        """Whether an address of a kept file is good for some time only, and had better be renewed
        by now."""
        return False

    async def renew_url(self, url: str) -> str:
        """An address that is as good as new, for one that passes. Raises: StorageError."""
        return url

    async def check(self) -> None:
        """Whether files can be written, read and deleted. Raises: StorageError."""
