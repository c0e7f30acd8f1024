"""File store of the offline CDN, in a temporary directory."""

import hashlib
import secrets
import shutil
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO
from urllib.parse import urlsplit

TOTAL_MAX = 4 * 2**30  # bytes of all files together; above that, the oldest are removed
REMOVE_ATTEMPTS = 5
NAME_MAX = 100


@dataclass(frozen=True, slots=True)
class StoredFile:
    """One stored file.

    key: `<prefix>/<name>`, the end of its URL.
    size: bytes.
    """

    key: str
    path: Path
    content_type: str
    size: int


class FileStore:
    """Files by key, in a directory that exists from `open` to `close`."""

    def __init__(self, total_max: int = TOTAL_MAX) -> None:
        self._directory: tempfile.TemporaryDirectory[str] | None = None
        self._open_count = 0
        self._files: OrderedDict[str, StoredFile] = OrderedDict()
        self._total_size = 0
        self._total_max = total_max
        # Maps the URL of a file outside this store to its local path. Set by the embedding
        # application if it has such files.
        self.find_external: Callable[[str], Path | None] = lambda url: None
        self._lock = threading.Lock()  # files are put from several threads

    def __repr__(self) -> str:
        return f"<FileStore files={len(self._files)} bytes={self._total_size}>"

    def open(self) -> None:
        """Create the directory. Each application that serves the files opens the store once."""
        if self._directory is None:
            self._directory = tempfile.TemporaryDirectory(prefix="falproxy-sandbox-")
        self._open_count += 1

    def close(self) -> None:
        """Remove the directory and the files, once every `open` has had its `close`."""
        self._open_count -= 1
        if self._open_count == 0 and self._directory is not None:
            # A thread that still stores a file does not find the directory any more.
            root = Path(self._directory.name)
            removed = root.rename(root.with_name(f"{root.name}-removed"))
            for _ in range(REMOVE_ATTEMPTS):  # a thread may be within one last call of the system
                shutil.rmtree(removed, ignore_errors=True)
                if not removed.exists():
                    break
            self._directory.cleanup()
            self._directory = None
            self._files.clear()
            self._total_size = 0

    def new_key(self, name: str) -> str:
        """Return an unguessable key that ends in the name, made safe for a URL."""
        safe = "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "_" for c in name)
        return f"{secrets.token_hex(16)}/{safe.lstrip('.')[-NAME_MAX:] or 'file'}"

    def put(self, key: str, source: IO[bytes], content_type: str) -> StoredFile:
        """Store the rest of `source`. Blocks: call it in a thread."""
        path = self._root() / key
        path.parent.mkdir(exist_ok=True)
        with path.open("wb") as target:
            shutil.copyfileobj(source, target)
        file = StoredFile(key, path, content_type, path.stat().st_size)
        with self._lock:
            replaced = self._files.get(key)
            self._total_size += file.size - (replaced.size if replaced else 0)
            self._files[key] = file
            while self._total_size > self._total_max and len(self._files) > 1:
                self._remove_oldest()
        return file

    def put_part(self, upload: str, number: int, source: IO[bytes]) -> str:
        """Store one part of an upload and return its etag. Blocks."""
        path = self._part_path(upload, number)
        path.parent.mkdir(parents=True, exist_ok=True)
        content = source.read()
        path.write_bytes(content)
        return hashlib.md5(content, usedforsecurity=False).hexdigest()

    def parts_size(self, upload: str, numbers: Sequence[int]) -> int:
        """Return the total size of an upload's parts in bytes. Blocks.

        Raises:
            OSError: a part is missing.
        """
        return sum(self._part_path(upload, number).stat().st_size for number in numbers)

    def join_parts(
        self, upload: str, numbers: Sequence[int], key: str, content_type: str
    ) -> StoredFile:
        """Store one file from an upload's parts, in the order of their numbers. Blocks.

        Raises:
            OSError: a part is missing.
        """
        with tempfile.TemporaryFile() as joined:
            for number in sorted(numbers):
                joined.write(self._part_path(upload, number).read_bytes())
            joined.seek(0)
            file = self.put(key, joined, content_type)
        shutil.rmtree(self._part_path(upload, 0).parent)
        return file

    def _part_path(self, upload: str, number: int) -> Path:
        return self._root() / "uploads" / upload / str(number)

    def _root(self) -> Path:
        if self._directory is None:
            raise RuntimeError("the sandbox's file store is not open")
        return Path(self._directory.name)

    def _remove_oldest(self) -> None:
        _, file = self._files.popitem(last=False)
        self._total_size -= file.size
        file.path.unlink(missing_ok=True)

    def get(self, key: str) -> StoredFile | None:
        return self._files.get(key)

    def find_local(self, url: str) -> Path | None:
        """Like `find_by_url`; None for a text that is no URL."""
        try:
            return self.find_by_url(url)
        except ValueError:
            return None

    def find_by_url(self, url: str) -> Path | None:
        """Return the path of a URL's file. The host is ignored, because keys are unique.

        Raises:
            ValueError: it is no URL.
        """
        file = self._files.get("/".join(urlsplit(url).path.split("/")[-2:]))
        return self.find_external(url) if file is None else file.path
