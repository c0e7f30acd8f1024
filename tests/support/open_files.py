"""A count of the open files of this process."""

import asyncio
import gc
import os


def open_files() -> int:
    gc.collect()
    return len(os.listdir("/dev/fd"))


async def until_open_files_are(number: int) -> None:
    """A thread refers to what it worked on a moment longer than the one who waits for it."""
    async with asyncio.timeout(5):
        while open_files() != number:
            await asyncio.sleep(0.01)
