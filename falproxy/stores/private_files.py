"""Files and folders that only the user of the process can read, and files read without following
symbolic links."""

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Lock

FOLDER_MODE, FILE_MODE = 0o700, 0o600
CREATE_FLAGS = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
CREATION_LOCK = Lock()  # a new file is closed before this process opens it again
READ_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
# Opening a named pipe must not wait for a writer.
FILE_FLAGS = READ_FLAGS | os.O_NONBLOCK


def make_private_folder(folder: Path) -> None:
    """Create a folder, unless it exists, with access for its owner only. Raises: OSError."""
    folder.mkdir(FOLDER_MODE, parents=True, exist_ok=True)


def make_private_file(file: Path) -> None:
    """Create a file and its folder, unless they exist. The file is never readable for others, not
    even for a moment; an existing file loses such rights.

    An existing file is not opened: closing it would release the locks that connections of SQLite in
    this process have on it (POSIX), and another process could then delete its WAL.

    Raises: OSError.
    """
    make_private_folder(file.parent)
    with CREATION_LOCK:
        with suppress(FileExistsError):
            os.close(os.open(file, CREATE_FLAGS, FILE_MODE))
        mode = file.stat().st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if stat.S_IMODE(mode) != FILE_MODE:
            file.chmod(FILE_MODE)


@contextmanager
def open_below(folder: Path, *names: str) -> Iterator[int]:
    """Context: a descriptor of a regular file. names: those of the folders below `folder`, and of
    the file; none of them may be a symbolic link.

    Raises: OSError; FileNotFoundError, there is no such file.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for position, name in enumerate(names, start=1):
            flags = FILE_FLAGS if position == len(names) else READ_FLAGS | os.O_DIRECTORY
            parent, descriptor = descriptor, -1
            try:
                descriptor = os.open(name, flags, dir_fd=parent)
            finally:
                os.close(parent)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise FileNotFoundError(names[-1])
        yield descriptor
    finally:
        if descriptor >= 0:
            os.close(descriptor)
