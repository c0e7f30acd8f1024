"""Time of a submit with all limits on beside one without limits, in milliseconds.

Run it with `make bench`. Proxy, client and a fal that accepts at once share one process, so the
difference is the cost of the limits: rates, a reservation, and the link to the job. `REDIS_URL`
adds limits in Redis.
"""

import asyncio
import logging
import os
import sys
import tempfile
import time
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any

from aiohttp import ClientSession, web
from aiohttp.test_utils import TestServer

from falproxy import Settings, create_app
from falproxy.limit_settings import LimitSettings
from falproxy.log import ACCESS_LOGGER
from falproxy.settings import CacheSettings, ServerSettings, UpstreamSettings
from falproxy.windows import Window

SUBMIT = "https://queue.fal.run/fal-ai/flux/dev"
CALLS, WARM_UP = 300, 30
DAY = Window(86400)
LIMITS = LimitSettings(
    rate=(10**6, DAY), concurrency=10**6, budget=(10**12, DAY), total_budget=(10**12, DAY)
)
IDS = count()


async def accept(request: web.Request) -> web.Response:
    """Accept a job, as fal's queue does."""
    await request.read()
    request_id = f"7e2f0b8a-0001-4000-8000-{next(IDS):012}"
    root = f"https://queue.fal.run/fal-ai/flux/requests/{request_id}"
    document = {"status": "IN_QUEUE", "request_id": request_id, "queue_position": 0}
    document |= {"status_url": f"{root}/status", "response_url": root}
    return web.json_response(document)


async def measure(title: str, **options: Any) -> None:
    fal = web.Application()
    fal.router.add_post("/{path:.*}", accept)
    with tempfile.TemporaryDirectory() as folder:
        async with TestServer(fal) as upstream:
            settings = Settings(
                fal_key="a:b",
                data_dir=Path(folder),
                upstream=UpstreamSettings(origin=f"http://127.0.0.1:{upstream.port}"),
                server=ServerSettings(fast_path=False),
                **options,
            )
            async with TestServer(create_app(settings)) as proxy, ClientSession() as session:
                url = f"http://127.0.0.1:{proxy.port}/api/fal/proxy"
                seconds = [await submit(session, url) for _ in range(CALLS + WARM_UP)][WARM_UP:]
                started = time.perf_counter()
                await asyncio.gather(*(submit(session, url) for _ in range(CALLS)))
                rate = CALLS / (time.perf_counter() - started)
    print(f"  {title:<24} {median(seconds) * 1e3:8.2f} ms {rate:8.0f} submits/s at once")


async def submit(session: ClientSession, url: str) -> float:
    started = time.perf_counter()
    headers = {"x-fal-target-url": SUBMIT}
    async with session.post(url, json={"prompt": "a heron"}, headers=headers) as response:
        await response.read()
        assert response.status == 200, response.status
    return time.perf_counter() - started


async def main() -> int:
    logging.getLogger(ACCESS_LOGGER).disabled = True
    print("a submit, without the fast path")
    await measure("without limits")
    await measure("all limits, SQLite", limits=LIMITS)
    if url := os.environ.get("REDIS_URL"):
        await measure("all limits, Redis", limits=LIMITS, cache=CacheSettings(redis_url=url))
    return 0


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
