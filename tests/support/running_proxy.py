"""A proxy that uses the sandbox as fal, alone or mounted in another application."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aiohttp import ClientSession, web
from aiohttp.test_utils import TestServer

import falproxy
from falproxy.app import HANDLER_ARGS
from falproxy.media.fetch import FETCHER
from falproxy.sandbox import Sandbox
from falproxy.sandbox import create_app as create_sandbox
from falproxy.web.openapi import PATH
from tests.support.empty_ledger import with_empty_ledger
from tests.support.key_search import CANARY
from tests.support.settings import make_settings


@dataclass(frozen=True, slots=True)
class RunningProxy:
    """A running proxy that uses the sandbox as fal. origin: its URL, with the prefix."""

    origin: str
    app: web.Application
    session: ClientSession

    async def document(self, **headers: str) -> Any:
        async with self.session.get(self.origin + PATH, headers=headers) as response:
            assert response.status == 200
            assert response.content_type == "application/json"
            return await response.json()


@asynccontextmanager
async def open_running_proxy(
    data_dir: Path, prefix: str = "", **settings: Any
) -> AsyncIterator[RunningProxy]:
    """Start a proxy.

    prefix: if not empty, the proxy is mounted in another application.
    settings: those of the proxy, by flat names.
    """
    sandbox = Sandbox(speed=1000)
    async with TestServer(create_sandbox(sandbox)) as fal, ClientSession() as session:
        sandbox.public_url = f"http://127.0.0.1:{fal.port}"
        defaults: dict[str, Any] = {
            "fal_key": CANARY,
            "upstream_origin": sandbox.public_url,
            "data_dir": data_dir,
            "rehost": "disk",
            "allowed_hosts": ("*",),
        }
        proxy_settings = with_empty_ledger(make_settings(**(defaults | settings)))
        app = web.Application(handler_args=HANDLER_ARGS)
        if prefix:
            falproxy.setup(app, proxy_settings, prefix=prefix)
        else:
            app = falproxy.create_app(proxy_settings)
        async with TestServer(app) as server:
            app[FETCHER].trust(f"{sandbox.public_url}/")
            yield RunningProxy(f"http://127.0.0.1:{server.port}{prefix}", app, session)
