"""Real clients whose first response is lost: their retries have the same Idempotency-Key, and fal
makes one image."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from falproxy.client import AsyncClient, SyncClient
from tests.support.ai_sdk import run
from tests.support.js_world import JS, need
from tests.support.lossy_relay import LossyRelay, lossy_relay
from tests.support.openai_client import create_openai_client
from tests.support.sandbox_proxy import SandboxProxy, open_sandbox_proxy

ENDPOINT = "fal-ai/flux/dev"
PROMPT = "a heron at dawn"


@pytest.fixture
async def proxy(tmp_path: Path) -> AsyncIterator[SandboxProxy]:
    async with open_sandbox_proxy(tmp_path, cache=False) as opened:
        yield opened


@pytest.fixture
async def relay(proxy: SandboxProxy) -> AsyncIterator[LossyRelay]:
    async with lossy_relay(proxy.origin) as opened:
        yield opened


def check(proxy: SandboxProxy, relay: LossyRelay) -> None:
    assert relay.attempts >= 2
    assert (proxy.submits, len(proxy.inputs)) == (1, 1)


async def test_openai_for_python(proxy: SandboxProxy, relay: LossyRelay) -> None:
    async with create_openai_client(relay.origin) as client:
        response = await client.images.generate(
            model="flux-dev", prompt=PROMPT, extra_headers={"Idempotency-Key": "k"}
        )
    assert response.data is not None
    assert response.data[0].url
    check(proxy, relay)


async def test_openai_for_node(proxy: SandboxProxy, relay: LossyRelay) -> None:
    need(Path("node"), JS / "node_modules" / "openai")
    options = {"model": "flux-dev", "prompt": PROMPT, "key": "k"}
    output = await run(
        "node", str(JS / "openai.mjs"), "generateWithKey",
        given=json.dumps(options), GATEWAY=relay.origin, ACCESS_KEY="none",
    )  # fmt: skip
    played = json.loads(output.splitlines()[-1])
    assert played["result"]["data"][0]["url"], played
    check(proxy, relay)


@pytest.mark.parametrize("method", ["run", "subscribe"])
async def test_falproxy_client(proxy: SandboxProxy, relay: LossyRelay, method: str) -> None:
    client = AsyncClient(relay.origin, "")
    result = await getattr(client, method)(ENDPOINT, {"prompt": PROMPT})
    await client.http_client().aclose()
    assert result["images"][0]["url"]
    check(proxy, relay)


@pytest.mark.parametrize("method", ["run", "subscribe"])
async def test_falproxy_client_without_asyncio(
    proxy: SandboxProxy, relay: LossyRelay, method: str
) -> None:
    client = SyncClient(relay.origin, "")
    result = await asyncio.to_thread(getattr(client, method), ENDPOINT, {"prompt": PROMPT})
    client._client.close()
    assert result["images"][0]["url"]
    check(proxy, relay)


async def test_fal_for_node(proxy: SandboxProxy, relay: LossyRelay) -> None:
    """As in examples/js-client: a submit with the header."""
    need(Path("node"), JS / "node_modules" / "@fal-ai" / "client")
    script = str(JS / "keyed_submit.mjs")
    output = await run("node", script, ENDPOINT, PROMPT, GATEWAY=relay.origin)
    assert json.loads(output.splitlines()[-1])["images"][0]["url"]
    check(proxy, relay)
