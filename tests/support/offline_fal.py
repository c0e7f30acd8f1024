"""A sandbox on a loopback port, and helpers for its tests."""

import asyncio
import io
from dataclasses import dataclass
from typing import Any

from aiohttp import ClientResponse
from aiohttp.pytest_plugin import AiohttpClient
from aiohttp.test_utils import TestClient
from PIL import Image

from falproxy.sandbox import Sandbox, create_app

KEY = {"Authorization": "Key id:secret"}
DEV = "fal-ai/flux/dev"
KONTEXT = "fal-ai/flux-pro/kontext"
SMALL = {"width": 64, "height": 64}


@dataclass(frozen=True, slots=True)
class OfflineFal:
    """A running sandbox and a client for it."""

    sandbox: Sandbox
    client: TestClient[Any, Any]

    async def run(self, endpoint: str, body: object, **headers: str) -> ClientResponse:
        url = f"/fal.run/{endpoint}"
        return await self.client.post(url, json=body, headers={**KEY, **headers})

    async def submit(self, endpoint: str, body: object, query: str = "", **headers: str) -> str:
        """Submit a job and return its request id."""
        url = f"/queue.fal.run/{endpoint}{query}"
        response = await self.client.post(url, json=body, headers={**KEY, **headers})
        assert response.status == 200, await response.text()
        return str((await response.json())["request_id"])

    async def get(
        self, request_id: str, path: str = "", app: str = "fal-ai/flux"
    ) -> ClientResponse:
        """GET a job's result, or another resource of it such as `/status`."""
        url = f"/queue.fal.run/{app}/requests/{request_id}{path}"
        return await self.client.get(url, headers=KEY)

    async def cancel(self, request_id: str, app: str = "fal-ai/flux") -> ClientResponse:
        url = f"/queue.fal.run/{app}/requests/{request_id}/cancel"
        return await self.client.put(url, headers=KEY)

    async def wait_completed(self, request_id: str, app: str = "fal-ai/flux") -> dict[str, Any]:
        """Wait for the end of a job and return its status."""
        async with asyncio.timeout(5):
            # The stream ends with the job, so there is no need to poll.
            await (await self.get(request_id, "/status/stream", app)).read()
        response = await self.get(request_id, "/status?logs=1", app)
        document: dict[str, Any] = await response.json()
        assert document["status"] == "COMPLETED"
        return document


async def offline_fal(
    aiohttp_client: AiohttpClient, speed: float = 1000, **options: Any
) -> OfflineFal:
    sandbox = Sandbox(speed=speed, **options)
    client = await aiohttp_client(create_app(sandbox))
    sandbox.public_url = str(client.make_url("/")).rstrip("/")
    return OfflineFal(sandbox, client)


def png(color: str = "red", size: tuple[int, int] = (64, 48)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, color).save(file, "png")
    return file.getvalue()


async def result_image(fal: OfflineFal, response: ClientResponse) -> Image.Image:
    """Download and return the first image of a result."""
    document = await response.json()
    assert response.status == 200, document
    image = document["images"][0] if "images" in document else document["image"]
    file = await fal.client.session.get(image["url"])
    return Image.open(io.BytesIO(await file.read()))
