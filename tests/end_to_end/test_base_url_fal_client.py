"""The unmodified fal_client, pointed at the proxy's base URLs by its environment variables."""

import asyncio
import json
import os
import ssl
import sys
from pathlib import Path

import pytest
import trustme
from aiohttp import web
from aiohttp.pytest_plugin import AiohttpServer

from falproxy import create_app
from falproxy.sandbox import Sandbox
from falproxy.sandbox import create_app as create_sandbox
from tests.support.key_search import CANARY
from tests.support.settings import make_settings

ACCESS_KEY = "an-access-key-of-the-proxy"
SCRIPT = """
import json
import fal_client

inputs = {"prompt": "a heron", "seed": 7, "sync_mode": True}
handle = fal_client.submit("fal-ai/flux/schnell", inputs)
events = [type(event).__name__ for event in handle.iter_events(with_logs=True)]
cancelled = fal_client.submit("fal-ai/flux/dev", {"prompt": "!delay 20 slow"})
cancelled.cancel()
print(json.dumps({
    "run": fal_client.run("fal-ai/flux/schnell", inputs),
    "subscribe": fal_client.subscribe("fal-ai/flux/schnell", inputs),
    "stream": list(fal_client.stream("fal-ai/flux/schnell", inputs))[-1],
    "submit": handle.get(),
    "result": fal_client.result("fal-ai/flux/schnell", handle.request_id),
    "last_event": events[-1],
}))
"""


@pytest.fixture
async def sandbox(aiohttp_server: AiohttpServer) -> Sandbox:
    sandbox = Sandbox(speed=50)
    server = await aiohttp_server(create_sandbox(sandbox))
    sandbox.public_url = f"http://127.0.0.1:{server.port}"
    return sandbox


async def test_fal_client_works_with_the_base_urls(
    aiohttp_server: AiohttpServer, sandbox: Sandbox, tmp_path: Path
) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("localhost").configure_cert(context)
    settings = make_settings(
        fal_key=CANARY,
        upstream_origin=sandbox.public_url,
        data_dir=tmp_path,
        access_key=ACCESS_KEY,
    )
    app: web.Application = create_app(settings)
    server = await aiohttp_server(app, ssl=context)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", SCRIPT),
        env={
            "PATH": os.environ["PATH"],
            "FAL_RUN_HOST": f"localhost:{server.port}/api/fal/run",
            "FAL_QUEUE_RUN_HOST": f"localhost:{server.port}/api/fal/queue",
            "FAL_KEY": ACCESS_KEY,
            "SSL_CERT_FILE": str(tmp_path / "ca.pem"),
        },
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(60):
        out, err = await process.communicate()
    assert process.returncode == 0, err.decode()
    results = json.loads(out)
    assert results.pop("last_event") == "Completed"
    images = {name: result["images"][0]["url"] for name, result in results.items()}
    assert len(set(images.values())) == 1, "every method gives the same image"
    assert sandbox.keys_seen == {f"Key {CANARY}"}
    assert any(seen.method == "PUT" and seen.status == 202 for seen in sandbox.seen)
