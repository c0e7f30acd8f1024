"""Makes docs/images/page.png and docs/images/dashboard.png.

Fills a ledger with a day of calls, starts `falproxy serve --sandbox`, and takes screenshots in
Chromium. Run it from the root of the repository, after `make browser`:
`.venv/bin/python scripts/make_screenshots.py [folder]`.
"""

import asyncio
import math
import os
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from falproxy import __version__
from falproxy.stores.ledger import CallRecord, ProcessStart
from falproxy.stores.ledger.sqlite import sqlite_ledger
from tests.support.cli_process import run_interpreter
from tests.support.paths import CHROMIUM, ROOT

SCRIPT = ROOT / "scripts" / "screenshots.mjs"
TIMEOUT = 180.0  # seconds for all screenshots
HOURS = 24
# Endpoint, route, price in micro-USD, seconds at fal, share of cache hits, relative frequency.
MODELS = (
    ("fal-ai/flux-pro/kontext", "/api/fal/proxy", 40_000, 6.2, 0.38, 9),
    ("fal-ai/flux/dev", "/api/fal/proxy", 25_000, 2.9, 0.0, 7),
    ("fal-ai/flux/schnell", "/v1/images", 3_000, 0.8, 0.0, 6),
    ("fal-ai/nano-banana", "/api/images", 39_000, 7.4, 0.0, 3),
    ("fal-ai/kling-video/v2.1/standard/text-to-video", "/v1/videos", 250_000, 74.0, 0.0, 1),
)
CALLERS = ("web", "mobile", "batch")
USERS = ("ada", "grace", "linus", "margaret", "ken", "barbara")
# Version and hours ago: a restart at night, a deploy before the incident.
STARTS = ((__version__, 30.0), (__version__, 14.4), ("0.1.1", 3.4), (__version__, 2.1))
ERRORS = ((422, "content_policy_violation"), (429, "rate_limited"), (502, "upstream_unreachable"))


def records(now: float) -> Iterator[CallRecord]:
    """Yield the calls of a day: more at noon than at night, and an incident three hours ago."""
    dice = random.Random(7)
    for hour in range(HOURS):
        count = int(18 + 26 * (1 + math.sin((hour - 8) / HOURS * 2 * math.pi)))
        for _ in range(count):
            at = now - (HOURS - hour) * 3600 + dice.uniform(0, 3600)
            share = 0.12 if hour == HOURS - 3 else 0.015
            yield record(dice, min(at, now - 60), has_error=dice.random() < share)


def record(dice: random.Random, at: float, *, has_error: bool) -> CallRecord:
    (model,) = dice.choices(MODELS, [model[-1] for model in MODELS])
    endpoint, route, price, seconds, hit_share, _ = model
    status, error = dice.choice(ERRORS) if has_error else (200, None)
    is_hit = not has_error and dice.random() < hit_share
    at_fal = 0.0 if is_hit else seconds * dice.uniform(0.7, 1.6)
    is_paid = not (has_error or is_hit)
    return CallRecord(
        at=round(at, 3),
        route=route,
        status=status,
        error=error,
        principal=dice.choice(CALLERS),
        user_id=dice.choice(USERS),
        operation="run",
        endpoint=endpoint,
        cache=("hit" if is_hit else "miss") if hit_share else None,
        seconds=at_fal + dice.uniform(0.0008, 0.003),
        upstream_seconds=at_fal,
        units=Decimal(1) if is_paid else None,
        estimated=price,
        settled=price if is_paid else 0,
    )


async def fill_ledger(folder: Path) -> None:
    async with sqlite_ledger(folder / "ledger.sqlite") as ledger:
        await ledger.probe()
        now = time.time()
        await ledger.write([*records(now)])
        for version, hours in STARTS:
            for _ in range(2):
                await ledger.add_start(ProcessStart(version, "host", now - hours * 3600))


async def make_screenshots(target: Path) -> int:
    with tempfile.TemporaryDirectory() as folder:
        data_dir = Path(folder) / "data"
        data_dir.mkdir(mode=0o700)
        await fill_ledger(data_dir)
        env = {"CWD": folder, "FALPROXY_DATA_DIR": str(data_dir)}
        async with run_interpreter("serve", "--sandbox", **env) as proxy:
            node = await asyncio.create_subprocess_exec(
                *("node", str(SCRIPT), proxy.origin, str(target)),
                env=os.environ | {"CHROMIUM": str(CHROMIUM)},
            )
            async with asyncio.timeout(TIMEOUT):
                return await node.wait()


if __name__ == "__main__":
    images = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs" / "images"
    images.mkdir(parents=True, exist_ok=True)
    sys.exit(asyncio.run(make_screenshots(images.resolve())))
