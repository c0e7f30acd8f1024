"""The sandbox on a loopback port, and the few calls that all its tests make."""

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
    """A running sandbox and a client with a key."""

    sandbox: Sandbox
    client: TestClient[Any, Any]

    async def run(self, endpoint: str, body: object, **headers: str) -> ClientResponse:
        url = f"/fal.run/{endpoint}"
        return await self.client.post(url, json=body, headers={**KEY, **headers})

    async def submit(self, endpoint: str, body: object, query: str = "", **headers: str) -> str:
        """The id of an accepted job."""
        url = f"/queue.fal.run/{endpoint}{query}"
        response = await self.client.post(url, json=body, headers={**KEY, **headers})
        assert response.status == 200, await response.text()
        return str((await response.json())["request_id"])

    async def ask(
        self, request_id: str, verb: str = "", app: str = "fal-ai/flux"
    ) -> ClientResponse:
        """GET of a request's status, result or what else the verb names."""
        url = f"/queue.fal.run/{app}/requests/{request_id}{verb}"
        return await self.client.get(url, headers=KEY)

    async def cancel(self, request_id: str, app: str = "fal-ai/flux") -> ClientResponse:
        url = f"/queue.fal.run/{app}/requests/{request_id}/cancel"
        return await self.client.put(url, headers=KEY)

    async def wait(self, request_id: str, app: str = "fal-ai/flux") -> dict[str, Any]:
        """The status of a job that has ended."""
        async with asyncio.timeout(5):
            # The stream ends with the job: no polling.
            await (await self.ask(request_id, "/status/stream", app)).read()
        response = await self.ask(request_id, "/status?logs=1", app)
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


def png(colour: str = "red", size: tuple[int, int] = (64, 48)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "png")
    return file.getvalue()


async def picture_of(fal: OfflineFal, response: ClientResponse) -> Image.Image:
    """The first picture of a result, read from where it says it is."""
    document = await response.json()
    assert response.status == 200, document
    image = document["images"][0] if "images" in document else document["image"]
    file = await fal.client.session.get(image["url"])
    return Image.open(io.BytesIO(await file.read()))
