"""The traces of two equal edits by a real process of falproxy, as a collector receives them."""

import base64
import tempfile

from aiohttp import ClientSession

from tests.support.cli_process import run_interpreter
from tests.support.offline_fal import png
from tests.support.otlp_collector import SERVER, ReceivedSpan, open_collector
from tests.support.redis_server import redis_server
from tests.support.waiting import wait_until

PROMPT = "make it autumn"


async def receive_traces() -> list[list[ReceivedSpan]]:
    """Return the spans of a miss and of the hit after it, by their start."""
    with redis_server() as redis, tempfile.TemporaryDirectory() as folder:
        async with open_collector() as collector:
            env = {
                "CWD": folder,
                "REDIS_URL": redis.url,
                "OTEL_EXPORTER_OTLP_ENDPOINT": collector.origin,
                "OTEL_BSP_SCHEDULE_DELAY": "100",
            }
            async with run_interpreter("serve", "--sandbox", **env) as proxy:
                for seed in (1, 7, 7):  # the first one opens connections
                    await edit(proxy.origin, seed)
                await wait_until(lambda: len(collector.of_kind(SERVER)) == 3)
                await proxy.stop()
            calls = sorted(collector.of_kind(SERVER), key=lambda span: span.start)[1:]
            spans = sorted(collector.spans, key=lambda span: span.start)
            return [[span for span in spans if span.trace_id == call.trace_id] for call in calls]


async def edit(origin: str, seed: int) -> None:
    body = {
        "prompt": PROMPT,
        "image_data": base64.b64encode(png("red", (256, 256))).decode(),
        "seed": seed,
    }
    async with (
        ClientSession() as session,
        session.post(f"{origin}/kontext", json=body) as response,
    ):
        assert response.status == 200, await response.text()
