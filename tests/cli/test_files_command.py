"""`falproxy files gc` as a user meets it."""

import asyncio
import os
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from falproxy.stores.files.disk import DiskStorage
from falproxy.stores.files.supabase import SupabaseStorage
from tests.support.cli_process import start_command
from tests.support.fake_supabase import FakeSupabase
from tests.support.key_search import SECRET
from tests.support.storages import body, file_of

pytestmark = pytest.mark.slow

DAY = 86400
SECRET_KEY = f"sb_secret_{SECRET}"  # looked for in all logs of the run


@pytest.fixture
async def names(tmp_path: Path) -> list[str]:
    """Stored files of three ages: today, ten days and forty days."""
    folder = tmp_path / "files"
    files = [file_of(body(1000 + each)) for each in range(3)]
    async with DiskStorage(folder, str) as storage:
        for file, days in zip(files, (0, 10, 40), strict=True):
            await storage.put(file)
            used_at = time.time() - days * DAY
            os.utime(path_of(tmp_path, file.name), (used_at, used_at))
    return [file.name for file in files]


def path_of(data_dir: Path, name: str) -> Path:
    return data_dir / "files" / name[:2] / name[2:4] / name


def left(data_dir: Path, names: list[str]) -> list[bool]:
    return [path_of(data_dir, name).exists() for name in names]


async def gc(*words: str, folder: Path, **env: str) -> tuple[int, str, str]:
    """Return the exit code, stdout and stderr of a real process."""
    process = await start_command(
        "files", "gc", *words, CWD=str(folder), FALPROXY_DATA_DIR=str(folder), **env
    )
    async with asyncio.timeout(10):
        out, err = await process.communicate()
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()


async def test_unused_files_are_listed_and_stay(tmp_path: Path, names: list[str]) -> None:
    code, out, err = await gc("--older-than", "7d", folder=tmp_path)
    assert (code, err) == (0, "")
    assert [name in out for name in names] == [False, True, True]
    assert "2 files of 2,003 bytes would be deleted: use --delete" in out
    assert left(tmp_path, names) == [True, True, True]


async def test_unused_files_are_deleted_on_request(tmp_path: Path, names: list[str]) -> None:
    code, out, _ = await gc("--older-than", "30d", "--delete", folder=tmp_path)
    assert (code, out.splitlines()[-1]) == (0, "1 file of 1,002 bytes deleted.")
    assert left(tmp_path, names) == [True, True, False]


async def test_a_missing_folder_has_no_files(tmp_path: Path) -> None:
    code, out, err = await gc("--older-than", "1d", folder=tmp_path)
    assert (code, out, err) == (0, "0 files of 0 bytes would be deleted.\n", "")


async def test_files_that_cached_results_may_name_are_not_deleted(
    tmp_path: Path, names: list[str]
) -> None:
    code, out, err = await gc("--older-than", "59m", "--delete", folder=tmp_path)
    assert (code, out) == (1, "")
    assert "choose at least that age" in err
    assert all(left(tmp_path, names))


@pytest.mark.parametrize(
    "words",
    [
        pytest.param((), id="no age"),
        pytest.param(("--older-than", "30"), id="no unit"),
        pytest.param(("--older-than", "-1d"), id="the future"),
        pytest.param(("--older-than", "1y"), id="years"),
    ],
)
async def test_an_age_is_a_number_with_a_unit(tmp_path: Path, words: tuple[str, ...]) -> None:
    code, out, err = await gc(*words, folder=tmp_path)
    assert (code, out) == (2, "")
    assert "--older-than" in err


# The Supabase bucket

BUCKET = "fal_images"


@dataclass(frozen=True, slots=True)
class Bucket:
    """A bucket with files of three ages, as on the disk."""

    fake: FakeSupabase
    names: list[str]
    env: dict[str, str]

    def left(self) -> list[bool]:
        return [name in self.fake.objects(BUCKET) for name in self.names]


@pytest.fixture
async def bucket() -> AsyncIterator[Bucket]:
    files = [file_of(body(1000 + each)) for each in range(3)]
    async with FakeSupabase(keys={SECRET_KEY: "service_role"}) as fake:
        async with SupabaseStorage(fake.url, SECRET_KEY) as storage:
            for file, days in zip(files, (0, 10, 40), strict=True):
                await storage.put(file)
                made = fake.objects(BUCKET)[file.name]
                made.created = made.updated = datetime.now(UTC) - timedelta(days=days)
        env = {"SUPABASE_URL": fake.url, "SUPABASE_KEY": SECRET_KEY}
        yield Bucket(fake, [file.name for file in files], env)


async def test_unused_files_of_the_bucket_are_listed_and_stay(
    tmp_path: Path, bucket: Bucket
) -> None:
    code, out, err = await gc("--older-than", "7d", folder=tmp_path, **bucket.env)
    assert (code, err) == (0, "")
    assert [name in out for name in bucket.names] == [False, True, True]
    assert "2 files of 2,003 bytes would be deleted: use --delete" in out
    assert bucket.left() == [True, True, True]
    assert bucket.fake.count("DELETE", "/") == 0


async def test_unused_files_of_the_bucket_are_deleted_on_request(
    tmp_path: Path, bucket: Bucket
) -> None:
    code, out, err = await gc("--older-than", "30d", "--delete", folder=tmp_path, **bucket.env)
    assert (code, err) == (0, "")
    assert out.splitlines()[-1] == "1 file of 1,002 bytes deleted."
    assert bucket.left() == [True, True, False]
    assert len(bucket.fake.objects(BUCKET)) == 2


async def test_the_disk_stays_as_it_is_when_outputs_go_to_the_bucket(
    tmp_path: Path, names: list[str], bucket: Bucket
) -> None:
    await gc("--older-than", "7d", "--delete", folder=tmp_path, **bucket.env)
    assert left(tmp_path, names) == [True, True, True]
    env = bucket.env | {"FALPROXY_REHOST": "disk"}
    await gc("--older-than", "7d", "--delete", folder=tmp_path, **env)
    assert left(tmp_path, names) == [True, False, False]
    assert bucket.left() == [True, False, False]


async def test_a_bucket_that_cannot_be_reached_is_one_sentence(
    tmp_path: Path, bucket: Bucket
) -> None:
    await bucket.fake.stop()
    code, out, err = await gc("--older-than", "7d", "--delete", folder=tmp_path, **bucket.env)
    assert (code, out) == (1, "")
    assert err.count("\n") == 1
    assert "Supabase Storage cannot be reached" in err
    assert SECRET_KEY not in err


async def test_files_of_the_bucket_that_results_may_name_are_not_deleted(
    tmp_path: Path, bucket: Bucket
) -> None:
    code, _, err = await gc("--older-than", "119m", "--delete", folder=tmp_path, **bucket.env)
    assert code == 1
    assert "choose at least that age" in err
    assert all(bucket.left())
