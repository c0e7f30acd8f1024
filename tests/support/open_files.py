"""A count of the open files of this process."""

import gc
import os

from tests.support.waiting import wait_until


def open_files() -> int:
    gc.collect()
    return len(os.listdir("/dev/fd"))


async def until_open_files_are(number: int) -> None:
    """Wait until there are at most so many: a thread may refer to a spool a moment longer than its
    caller, and files of earlier tests may be closed meanwhile."""
    await wait_until(lambda: open_files() <= number, seconds=30)
