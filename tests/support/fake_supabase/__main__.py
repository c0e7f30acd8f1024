"""Runs the fake until stdin ends: prints its URL and a key, then executes commands from stdin."""

import asyncio
import sys

from tests.support.fake_supabase import FakeSupabase


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


async def run() -> None:
    async with FakeSupabase(size_max=2**30) as fake:
        say(f"{fake.url} {fake.service_key}")
        reported = {"start": fake.start, "stop": fake.stop}
        while word := (await asyncio.to_thread(sys.stdin.readline)).strip():
            await reported[word]()
            say(word)


asyncio.run(run())
