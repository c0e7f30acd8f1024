"""Helpers for tests of `/v1/videos` and `/v1/audio/speech`."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import openai
from openai.types import Video

from tests.support.openai_client import create_openai_client
from tests.support.sandbox_proxy import Reply, SandboxProxy
from tests.support.waiting import SOON

VIDEOS = "/v1/videos"
HERON = "!delay 0 a heron at dawn"
SLOW = "!delay 1 a heron at dawn"
ENDLESS = "!delay 60 a heron at dawn"
KLING = "fal-ai/kling-video/v2.5-turbo/pro"
KLING_T2V, KLING_I2V = f"{KLING}/text-to-video", f"{KLING}/image-to-video"
VEO = "fal-ai/veo3.1/fast"


@asynccontextmanager
async def open_client(
    proxy: SandboxProxy, key: str = "unused"
) -> AsyncIterator[openai.AsyncOpenAI]:
    """OpenAI's client of a proxy, which repeats nothing."""
    async with create_openai_client(proxy.origin, key, max_retries=0) as client:
        yield client


async def wait_video(client: openai.AsyncOpenAI, video_id: str) -> Video:
    """Return a video when it has ended."""
    async with asyncio.timeout(SOON):
        while (video := await client.videos.retrieve(video_id)).status not in (
            "completed",
            "failed",
        ):
            await asyncio.sleep(0.02)
    return video


def error_of(reply: Reply, status: int) -> dict[str, Any]:
    """Return an error in OpenAI's shape."""
    assert reply.status == status, reply
    assert set(reply.document) == {"error"}, reply
    error: dict[str, Any] = reply.document["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error
