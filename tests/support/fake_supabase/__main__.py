"""Runs the fake until stdin ends: prints its URL and a key, then executes commands from stdin."""

import asyncio
import sys

from tests.support.fake_supabase import FakeSupabase


def write_line(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


async def run() -> None:
    async with FakeSupabase(size_max=2**30) as fake:
        write_line(f"{fake.url} {fake.service_key}")
        commands = {"start": fake.start, "stop": fake.stop}
        while command := (await asyncio.to_thread(sys.stdin.readline)).strip():
            await commands[command]()
            write_line(command)


asyncio.run(run())
