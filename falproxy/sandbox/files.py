"""The files of the offline CDN, kept in a temporary directory."""

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

KEEP_MAX = 4 * 2**30  # bytes of files; the oldest make room
NAME_MAX = 100


@dataclass(frozen=True, slots=True)
class File:
    """One stored file; `key` is `<prefix>/<name>`, the end of its URL."""

    key: str
    path: Path
    content_type: str
    size: int


class FileStore:
    """Files by key, under a directory that lives from `open` to `close`."""

    def __init__(self, keep_max: int = KEEP_MAX) -> None:
        self._directory: tempfile.TemporaryDirectory[str] | None = None
        self._users = 0
        self._files: OrderedDict[str, File] = OrderedDict()
        self._size = 0
        self._keep_max = keep_max
        # Where a file is that somebody else on this machine keeps, who may say so here.
        self.find_elsewhere: Callable[[str], Path | None] = lambda url: None
        self._lock = threading.Lock()  # files are put from several threads

    def open(self) -> None:
        """Every application that serves the files opens them; the last to close removes them."""
        if self._directory is None:
            self._directory = tempfile.TemporaryDirectory(prefix="falproxy-sandbox-")
        self._users += 1

    def close(self) -> None:
        self._users -= 1
        if self._users == 0 and self._directory is not None:
            self._directory.cleanup()
            self._directory = None
            self._files.clear()
            self._size = 0

    def new_key(self, name: str) -> str:
        """A place nobody can guess, with the name made safe for a URL."""
        kept = "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "_" for c in name)
        return f"{secrets.token_hex(16)}/{kept.lstrip('.')[-NAME_MAX:] or 'file'}"

    def put(self, key: str, source: IO[bytes], content_type: str) -> File:
        """Store what `source` still holds. Blocks: call it in a thread."""
        path = self._root() / key
        path.parent.mkdir(exist_ok=True)
        with path.open("wb") as target:
            shutil.copyfileobj(source, target)
        file = File(key, path, content_type, path.stat().st_size)
        with self._lock:
            replaced = self._files.get(key)
            self._size += file.size - (replaced.size if replaced else 0)
            self._files[key] = file
            while self._size > self._keep_max and len(self._files) > 1:
                self._drop_oldest()
        return file

    def put_part(self, upload: str, number: int, source: IO[bytes]) -> str:
        """Store one part of an upload and return its etag. Blocks."""
        path = self._part(upload, number)
        path.parent.mkdir(parents=True, exist_ok=True)
        content = source.read()
        path.write_bytes(content)
        return hashlib.md5(content, usedforsecurity=False).hexdigest()

    def parts_size(self, upload: str, numbers: Sequence[int]) -> int:
        """Bytes of an upload's parts together. Blocks. Raises OSError: a part is missing."""
        return sum(self._part(upload, number).stat().st_size for number in numbers)

    def join(self, upload: str, numbers: Sequence[int], key: str, content_type: str) -> File:
        """Make one file of an upload's parts, in order. Blocks. Raises OSError: a part is
        missing."""
        with tempfile.TemporaryFile() as whole:
            for number in sorted(numbers):
                whole.write(self._part(upload, number).read_bytes())
            whole.seek(0)
            file = self.put(key, whole, content_type)
        shutil.rmtree(self._part(upload, 0).parent)
        return file

    def _part(self, upload: str, number: int) -> Path:
        return self._root() / "uploads" / upload / str(number)

    def _root(self) -> Path:
        if self._directory is None:
            raise RuntimeError("the sandbox's files are not open")
        return Path(self._directory.name)

    def _drop_oldest(self) -> None:
        _, file = self._files.popitem(last=False)
        self._size -= file.size
        file.path.unlink(missing_ok=True)

    def get(self, key: str) -> File | None:
        return self._files.get(key)

    def find(self, url: str) -> Path | None:
        """Where the file is that a URL means, on whatever host: prefixes are unguessable."""
        file = self._files.get("/".join(urlsplit(url).path.split("/")[-2:]))
        return self.find_elsewhere(url) if file is None else file.path
