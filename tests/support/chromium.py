"""Chromium, controlled through tests/js/browser.mjs."""

import asyncio
import json
import subprocess
from dataclasses import dataclass
from typing import Any

from tests.support.js_world import PLAY_TIMEOUT, Play, World
from tests.support.key_search import SECRET


@dataclass(frozen=True, slots=True)
class Chromium:
    """A process of browser.mjs, which reads requests and writes responses as lines of JSON.

    Not an asyncio process, because it outlives the event loop of a test.
    """

    process: subprocess.Popen[str]

    async def play(self, **request: object) -> Any:
        try:
            async with asyncio.timeout(PLAY_TIMEOUT):
                line = await asyncio.to_thread(self.exchange, json.dumps(request))
        except BaseException:
            self.process.kill()  # otherwise the thread would wait for a response forever
            raise
        assert line, "Chromium has exited"
        assert SECRET not in line
        response = json.loads(line)
        assert "error" not in response, response["error"]
        return response["result"]

    def exchange(self, line: str) -> str:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return self.process.stdout.readline()


def chromium_player(world: World, chromium: Chromium) -> Play:
    """Return a function that runs a scenario of tests/js in Chromium."""

    async def play_in_chromium(scenario: str, **options: object) -> Any:
        return await chromium.play(
            scenario=scenario, gateway=world.gateway, sandbox=world.fal, **options
        )

    return play_in_chromium
