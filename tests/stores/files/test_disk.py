"""The disk backend: files are complete or absent, and unused ones can be deleted."""

import asyncio
import fcntl
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from functools import partial
from hashlib import sha256
from pathlib import Path

import pytest

from falproxy.spool import Spool
from falproxy.stores.files import StorageError, StoredFile
from falproxy.stores.files.disk import ABANDONED_AFTER, LOCK, DiskStorage, collect_garbage, locked
from tests.support.storages import body, file_of, files_in

PNG = body(300_000, b"\x89PNG\r\n\x1a\n")
DAY = 86400.0


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "data" / "files"


@pytest.fixture
async def storage(folder: Path) -> AsyncIterator[DiskStorage]:
    async with DiskStorage(folder, lambda: "https://proxy.example.com/ai/") as storage:
        yield storage


def kept(folder: Path) -> list[Path]:
    return [path for path in files_in(folder) if path.parent.name != "incoming"]


def age(path: Path, seconds: float) -> None:
    os.utime(path, (time.time() - seconds,) * 2)


# Paths


async def test_a_url_is_below_the_proxy_s_own(storage: DiskStorage) -> None:
    file = file_of(PNG)
    assert await storage.put(file) == f"https://proxy.example.com/ai/files/{file.name}"


async def test_files_are_spread_over_folders(storage: DiskStorage, folder: Path) -> None:
    name = file_of(PNG).name
    await storage.put(file_of(PNG))
    assert kept(folder) == [folder / name[:2] / name[2:4] / name]


async def test_only_the_owner_may_read_the_folder(storage: DiskStorage, folder: Path) -> None:
    before = os.umask(0)
    try:
        await storage.put(file_of(PNG))
    finally:
        os.umask(before)
    modes = {path.is_dir(): stat.S_IMODE(path.stat().st_mode) for path in folder.rglob("*")}
    assert modes == {True: 0o700, False: 0o600}
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


async def test_opening_creates_no_folder(storage: DiskStorage, folder: Path) -> None:
    assert not folder.parent.exists()


async def test_opening_succeeds_if_the_folder_cannot_be_created(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    async with DiskStorage(tmp_path / "file", str) as storage:
        with pytest.raises(StorageError):
            await storage.check()


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("../../../etc/passwd", id="another folder"),
        pytest.param(f"{'a' * 64}.html", id="an extension that no file has"),
        pytest.param(f"{'a' * 64}", id="no extension"),
        pytest.param(f"{'a' * 63}.png", id="too short"),
        pytest.param(f"{'A' * 64}.png", id="in capitals"),
        pytest.param(f"{'a' * 64}.png\n", id="a line's end"),
        pytest.param(f"/{'a' * 64}.png", id="from the root"),
        pytest.param("", id="nothing"),
    ],
)
async def test_invalid_file_names_are_rejected(
    storage: DiskStorage, folder: Path, name: str
) -> None:
    with pytest.raises(StorageError):
        await storage.put(StoredFile(name, "image/png", Spool(PNG)))
    assert storage.size(name) is None
    assert storage.read(name, 0, 10) == b""
    assert files_in(folder.parent.parent) == []


async def test_bytes_that_do_not_match_the_name_are_not_stored(
    storage: DiskStorage, folder: Path
) -> None:
    with pytest.raises(StorageError):
        await storage.put(StoredFile(file_of(PNG).name, "image/png", Spool(b"others")))
    assert files_in(folder) == []


# Complete or absent


class Counted(Spool):
    """A source that counts its reads."""

    reads = 0

    def read(self, start: int, length: int) -> bytes:
        self.reads += 1
        return super().read(start, length)


async def test_concurrent_puts_write_a_file_once(storage: DiskStorage) -> None:
    files = [StoredFile(file_of(PNG).name, "image/png", Counted(PNG)) for _ in range(20)]
    await asyncio.gather(*(storage.put(file) for file in files))
    reads = [file.content.reads for file in files if isinstance(file.content, Counted)]
    assert sum(map(bool, reads)) == 1


async def test_a_file_is_not_written_twice(storage: DiskStorage, folder: Path) -> None:
    await storage.put(file_of(PNG))
    before = kept(folder)[0].stat().st_ino
    await storage.put(file_of(PNG))
    assert kept(folder)[0].stat().st_ino == before


async def test_a_truncated_file_is_written_again(storage: DiskStorage, folder: Path) -> None:
    await storage.put(file_of(PNG))
    os.truncate(kept(folder)[0], 1000)
    await storage.put(file_of(PNG))
    assert kept(folder)[0].read_bytes() == PNG


@pytest.mark.parametrize(
    ("seconds", "is_there"),
    [
        pytest.param(ABANDONED_AFTER + 60, False, id="abandoned"),
        pytest.param(ABANDONED_AFTER - 60, True, id="another process may"),
    ],
)
async def test_opening_deletes_abandoned_files(
    storage: DiskStorage, folder: Path, seconds: float, is_there: bool
) -> None:
    await storage.put(file_of(PNG))
    age(kept(folder)[0], 400 * DAY)
    left = folder / "incoming" / "left"
    left.write_bytes(PNG)
    age(left, seconds)
    async with DiskStorage(folder, str):
        assert left.exists() is is_there
    assert len(kept(folder)) == 1


async def test_closing_waits_for_pending_writes(folder: Path) -> None:
    async with DiskStorage(folder, str) as storage, asyncio.TaskGroup() as group:
        putting = group.create_task(storage.put(file_of(body(50 * 2**20))))
        while not files_in(folder):
            await asyncio.sleep(0)
        putting.cancel()
    assert files_in(folder) == []


# Kills one process after the other at the n-th executed line of disk.py, and prints the number of
# the first process that was not killed.
AT_EVERY_LINE = """
import asyncio, os, signal, sys, threading
from pathlib import Path
from falproxy.spool import Spool
from falproxy.stores.files import StoredFile
from falproxy.stores.files import disk

async def put(folder, content, name):
    async with disk.DiskStorage(folder, str) as storage:
        await storage.put(StoredFile(name, "image/png", Spool(content)))

def die_at(last):
    left = last
    def trace(frame, event, argument):
        nonlocal left
        if frame.f_code.co_filename != disk.__file__:
            return None
        if event == "line":
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return trace
    sys.settrace(trace)
    threading.settrace(trace)

root, name = Path(sys.argv[1]), sys.argv[2]
content = Path(sys.argv[3]).read_bytes()
for line in range(1, 1000):
    child = os.fork()
    if child == 0:
        die_at(line)
        asyncio.run(put(root / str(line), content, name))
        os._exit(0)
    if os.waitpid(child, 0)[1] == 0:
        print(line)
        break
"""


def kill_at_every_line(root: Path, name: str, content: bytes) -> int:
    """Return the number of executed lines. Each run uses its own folder below the root."""
    (root.parent / "content").write_bytes(content)
    root.mkdir()
    words = [sys.executable, "-c", AT_EVERY_LINE, str(root), name, str(root.parent / "content")]
    done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=60)
    return int(done.stdout)


@pytest.mark.slow
async def test_a_process_killed_at_any_line_leaves_no_wrong_file(tmp_path: Path) -> None:
    content = body(600_000)
    file, root = file_of(content), tmp_path / "killed"
    lines = kill_at_every_line(root, file.name, content)
    assert lines > 50
    found = [[path.read_bytes() for path in kept(root / str(line))] for line in range(1, lines)]
    assert [content] in found
    assert [] in found
    assert all(each in ([], [content]) for each in found)
    left = [path for path in files_in(root) if path.parent.name == "incoming"]
    assert left
    for path in left:
        age(path, 2 * ABANDONED_AFTER)
    for line in range(1, lines):
        async with DiskStorage(root / str(line), str) as storage:
            await storage.put(file)
        assert [path.read_bytes() for path in files_in(root / str(line))] == [content]


# Stores files of various sizes in an endless loop, and prints their names.
WORKER = """
import asyncio, hashlib, os, random, sys
from pathlib import Path
from falproxy.spool import Spool
from falproxy.stores.files import StoredFile
from falproxy.stores.files.disk import DiskStorage

async def work(folder):
    async with DiskStorage(folder, str) as storage:
        while True:
            content = os.urandom(random.choice((1, 1000, 10**6, 5 * 10**6)))
            name = hashlib.sha256(content).hexdigest() + ".bin"
            await storage.put(StoredFile(name, "application/octet-stream", Spool(content)))
            print(name, flush=True)

asyncio.run(work(Path(sys.argv[1])))
"""


@pytest.mark.slow
def test_processes_killed_while_they_write_leave_no_wrong_file(folder: Path) -> None:
    words = [sys.executable, "-c", WORKER, str(folder)]
    workers = [subprocess.Popen(words, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    message = []
    for worker in workers:
        assert worker.stdout is not None
        message.append(worker.stdout.readline().strip())
        time.sleep(random.random() / 10)
        worker.send_signal(signal.SIGKILL)
        message += worker.communicate()[0].split()
    there = {path.name: sha256(path.read_bytes()).hexdigest() for path in kept(folder)}
    assert there == {name: name.partition(".")[0] for name in there}
    assert set(message) <= there.keys()


# Stores a file that is too large for a disk of 1 MiB, and one that fits.
FULL_DISK = """
import asyncio, hashlib, sys
from pathlib import Path
from falproxy.spool import Spool
from falproxy.stores.files import StorageError, StoredFile
from falproxy.stores.files.disk import DiskStorage

def file_of(content):
    return StoredFile(f"{hashlib.sha256(content).hexdigest()}.bin", "", Spool(content))

async def work(folder):
    async with DiskStorage(folder, str) as storage:
        try:
            await storage.put(file_of(bytes(2**21)))
        except StorageError as error:
            print(error)
        await storage.put(file_of(bytes(2**19)))
    print([path.stat().st_size for path in folder.rglob("*.bin")])
    print([*(folder / "incoming").iterdir()])

asyncio.run(work(Path(sys.argv[1])))
"""
OWN_MOUNTS = ["unshare", "-rm", "sh", "-ec"]


@pytest.mark.skipif(
    shutil.which("unshare") is None
    or subprocess.run([*OWN_MOUNTS, "true"], capture_output=True).returncode != 0,
    reason="mounting a disk is not permitted here",
)
def test_a_full_disk_is_an_error_and_stays_unchanged(tmp_path: Path) -> None:
    script = 'mount -t tmpfs -o size=1m none "$0" && exec "$@"'
    python = [sys.executable, "-c", FULL_DISK, str(tmp_path)]
    words = [*OWN_MOUNTS, script, str(tmp_path), *python]
    done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=30)
    assert done.stdout.splitlines() == ["The disk has no room for the file.", "[524288]", "[]"]


# Unused files


async def unused_and_used(storage: DiskStorage, folder: Path) -> tuple[Path, Path]:
    old, new = file_of(b"old"), file_of(b"new")
    for file, days in ((old, 31), (new, 29)):
        await storage.put(file)
        age(next(folder.rglob(file.name)), days * DAY)
    return next(folder.rglob(old.name)), next(folder.rglob(new.name))


async def test_unused_files_are_listed(storage: DiskStorage, folder: Path) -> None:
    old, new = await unused_and_used(storage, folder)
    (found,) = collect_garbage(folder, 30 * DAY, time.time(), delete=False)
    assert (found.name, found.size) == (old.name, 3)
    assert found.used_at == pytest.approx(time.time() - 31 * DAY, abs=60)
    assert old.exists()
    assert new.exists()


async def test_unused_files_are_deleted(storage: DiskStorage, folder: Path) -> None:
    old, new = await unused_and_used(storage, folder)
    assert [
        found.name for found in collect_garbage(folder, 30 * DAY, time.time(), delete=True)
    ] == [old.name]
    assert kept(folder) == [new]
    assert list(collect_garbage(folder, 30 * DAY, time.time(), delete=True)) == []


async def test_a_file_that_is_put_again_stays(storage: DiskStorage, folder: Path) -> None:
    await unused_and_used(storage, folder)
    await storage.put(file_of(b"old"))
    assert list(collect_garbage(folder, 30 * DAY, time.time(), delete=True)) == []
    assert len(kept(folder)) == 2


async def test_a_deleted_file_can_be_put_again(storage: DiskStorage, folder: Path) -> None:
    await unused_and_used(storage, folder)
    assert len(list(collect_garbage(folder, 0, time.time(), delete=True))) == 2
    await storage.put(file_of(b"old"))
    assert [path.read_bytes() for path in kept(folder)] == [b"old"]


async def test_other_files_are_left_alone(storage: DiskStorage, folder: Path) -> None:
    await storage.put(file_of(PNG))
    foreign = [
        folder / "incoming" / "half",
        folder / "notes.txt",
        folder / "aa" / "bb" / "notes.txt",
        folder / "aa" / "bb" / file_of(PNG).name,  # a name that belongs elsewhere
    ]
    (folder / "aa" / "bb").mkdir(parents=True)
    for path in foreign:
        path.write_text("mine")
        age(path, 400 * DAY)
    list(collect_garbage(folder, 0, time.time() + DAY, delete=True))
    assert all(path.exists() for path in foreign)
    assert (folder / LOCK).exists()


def test_a_missing_folder_has_no_unused_files(folder: Path) -> None:
    assert list(collect_garbage(folder, 0, time.time(), delete=True)) == []
    assert not folder.exists()


async def test_a_put_waits_for_a_deletion(storage: DiskStorage, folder: Path) -> None:
    await storage.put(file_of(PNG))
    async with asyncio.TaskGroup() as group:
        with locked(folder, fcntl.LOCK_EX):
            putting = group.create_task(storage.put(file_of(PNG)))
            await asyncio.sleep(0.05)
            assert not putting.done()
            kept(folder)[0].unlink()
    assert [path.read_bytes() for path in kept(folder)] == [PNG]


async def test_a_deletion_waits_for_a_put(storage: DiskStorage, folder: Path) -> None:
    await unused_and_used(storage, folder)
    deletion = partial(collect_garbage, folder, 30 * DAY, time.time(), delete=True)
    async with asyncio.TaskGroup() as group:
        with locked(folder, fcntl.LOCK_SH):
            deleting = group.create_task(asyncio.to_thread(lambda: list(deletion())))
            await asyncio.sleep(0.05)
            assert not deleting.done()
            await storage.put(file_of(b"old"))
    assert deleting.result() == []


async def test_a_put_and_a_deletion_at_the_same_time_lose_nothing(
    storage: DiskStorage, folder: Path
) -> None:
    """Files that are put again are never deleted, whatever the order of the operations."""
    files = [file_of(body(size)) for size in range(1, 40)]
    for _ in range(5):
        for file in files:
            await storage.put(file)
        for path in kept(folder):
            age(path, 31 * DAY)
        deleting = asyncio.to_thread(
            lambda: list(collect_garbage(folder, 30 * DAY, time.time(), delete=True))
        )
        await asyncio.gather(deleting, *(storage.put(file) for file in files))
        assert {path.name for path in kept(folder)} == {file.name for file in files}
