"""The user of a call, as fal's and OpenAI's own clients send it."""

import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.support.ai_sdk import run
from tests.support.js_world import JS, need
from tests.support.offline_fal import png
from tests.support.openai_client import create_openai_client
from tests.support.sandbox_proxy import SandboxProxy, open_sandbox_proxy

KEY = "s3cret-of-web"
USER = "x-falproxy-user"
DEV = "fal-ai/flux/dev"
HERON = {"prompt": "a heron", "image_size": "square"}


@pytest.fixture
async def proxy(tmp_path: Path) -> AsyncIterator[SandboxProxy]:
    settings: Any = {"access_keys": (("web", KEY),), "tags": ("principal", "user")}
    async with open_sandbox_proxy(tmp_path, **settings) as opened:
        yield opened


async def recorded(proxy: SandboxProxy) -> list[str | None]:
    """Return the users in the ledger, oldest first, which fal received as tags."""
    users = [record.user_id for record in reversed(await proxy.records())]
    submits = [seen for seen in proxy.model_requests if seen.method == "POST"]
    tags = [seen.headers.get("x-fal-tags") for seen in submits]
    assert tags == [f"principal=web,user={user}" for user in users]
    assert all(USER not in seen.headers for seen in proxy.sandbox.seen)
    return users


FAL_CLIENT_CALLS = f"""
from falproxy.client import SyncClient
client = SyncClient()  # of FALPROXY_URL and FALPROXY_KEY
client.run("{DEV}", {HERON}, headers={{"{USER}": "ada"}})
client.subscribe("{DEV}", {HERON}, headers={{"{USER}": "bob"}})
client.submit("{DEV}", {HERON}, headers={{"{USER}": "eve"}}).get()
list(client.stream("fal-ai/flux/schnell", {HERON}, headers={{"{USER}": "joe"}}))
"""


async def test_fal_client_sends_the_header(proxy: SandboxProxy) -> None:
    environment = {"FALPROXY_URL": proxy.origin, "FALPROXY_KEY": KEY}
    await run(sys.executable, "-c", FAL_CLIENT_CALLS, **environment)
    assert await recorded(proxy) == ["ada", "bob", "eve", "joe"]


async def test_fal_s_javascript_client_sends_the_header(proxy: SandboxProxy) -> None:
    need(Path("node"), JS / "node_modules" / "@fal-ai" / "client")
    await run("node", str(JS / "user.mjs"), GATEWAY=proxy.origin, ACCESS_KEY=KEY)
    assert await recorded(proxy) == ["ada", "bob", "eve"]


async def test_openai_s_client_sends_the_field_or_the_header(proxy: SandboxProxy) -> None:
    async with create_openai_client(proxy.origin, KEY) as client:
        images = client.images
        await images.generate(model="flux-dev", prompt="a heron", size="256x256", user="ada")
        await images.edit(model="kontext-dev", image=png(), prompt="a heron", user="bob")
        options: Any = {"model": "flux-dev", "prompt": "a heron", "size": "256x256"}
        await images.generate(**options, extra_headers={USER: "eve"})
        with pytest.raises(openai.BadRequestError) as refusal:
            await images.generate(**options, user="x" * 129)
    assert (refusal.value.param, refusal.value.code) == ("user", "user_invalid")
    assert "has 129 characters" in refusal.value.message
    assert await recorded(proxy) == ["ada", "bob", "eve"]
