"""A count of the open files of this process."""

import asyncio
import gc
import os


def open_files() -> int:
    gc.collect()
    return len(os.listdir("/dev/fd"))


async def until_open_files_are(number: int) -> None:
    """Wait until there are at most so many: a thread may refer to a spool a moment longer than its
    caller, and files of earlier tests may be closed meanwhile."""
    async with asyncio.timeout(30):
        while open_files() > number:
            await asyncio.sleep(0.01)
