"""The OpenAI images API of the proxy with the sandbox behind it."""

import base64
import io
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
from aiohttp import ClientSession, web
from aiohttp.test_utils import TestServer
from PIL import Image
from tenacity import wait_none

from falproxy import Settings
from falproxy.app import HANDLER_ARGS, open_rehosting, open_result_cache
from falproxy.app.components import create_fetcher
from falproxy.app.pipeline import authentication, authorization, call_pipeline, compose
from falproxy.background import Background, background_context
from falproxy.dialects import default_error, dialect_route, handle_errors, method_check_middleware
from falproxy.dialects.openai import ImagesDeps, images_routes, local_file_reader
from falproxy.dialects.queue_client import WaitPolicy
from falproxy.dialects.transparent import BodyLimits, transparent_dialect
from falproxy.fal.keys import KeyPool
from falproxy.fal.policy import Globs
from falproxy.media.fetch import fetcher_context
from falproxy.metrics import Metrics
from falproxy.middleware.access_log import access_log, add_timing_headers
from falproxy.middleware.cors import check_origin
from falproxy.proxy.upstream import connect_upstream
from falproxy.sandbox import Sandbox
from falproxy.sandbox import create_app as create_sandbox
from falproxy.stores.files.disk import DiskStorage
from tests.support.key_search import CANARY
from tests.support.settings import make_settings
from tests.support.urls import PROXY

DEV = "fal-ai/flux/dev"
SCHNELL = "fal-ai/flux/schnell"
KONTEXT = "fal-ai/flux-pro/kontext"
HERON = "a heron at dawn"
SMALL = "256x256"
KEY = "s3cret"
# How long the tests wait for a job that is not meant to end.
WAIT = 20.0


def proxy_app(settings: Settings, **rules: Any) -> web.Application:
    """The order of `app.add_proxy`, with the paths of this API and the header route."""
    app = web.Application(handler_args=HANDLER_ARGS, middlewares=[handle_errors(default_error)])
    ring = KeyPool(settings.fal_keys, time.monotonic)
    timeouts = (settings.upstream.connect_timeout, settings.upstream.timeout)
    app.cleanup_ctx.append(
        connect_upstream(ring.next_key(), origin=settings.upstream.origin, timeouts=timeouts)
    )
    fetcher = create_fetcher(settings)
    app.cleanup_ctx.append(fetcher_context(fetcher))
    rehosting = open_rehosting(app, settings, fetcher, "")
    shelf = open_result_cache(app, settings)
    known = authentication(settings, None)
    allowed = authorization(app, settings, ring, shelf, is_locked=bool(known))
    around = call_pipeline(settings, ring, shelf, fetcher, rehosting)
    goodbyes = Background()
    app.cleanup_ctx.append(background_context(goodbyes, 5.0))
    if rehosting is not None and isinstance(rehosting.rehoster.storage, DiskStorage):
        rules["read_local"] = local_file_reader(rehosting.rehoster.storage, rehosting.base_url)
    rules.setdefault("endpoints", Globs(settings.auth.allowed_endpoints))
    images = ImagesDeps(
        body_limits=BodyLimits(settings.server.max_body, allow_encoded=True), **rules
    )
    patience = WaitPolicy(total=settings.dialects.wait, background=goodbyes, retry_wait=wait_none())
    ways = images_routes(images, fetcher, patience)
    ways[PROXY] = dialect_route(transparent_dialect(images.body_limits))
    for path, way in ways.items():
        order = [
            access_log(Metrics()),
            handle_errors(way.refuse),
            method_check_middleware(way.check),
            check_origin(settings.auth.allowed_origins),
            *known,
            way.middleware,
            *allowed,
        ]
        app.router.add_route("*", path, compose(order, around))
    app.on_response_prepare.append(add_timing_headers)
    return app


@dataclass(frozen=True, slots=True)
class Studio:
    """The proxy with the sandbox behind it, and OpenAI's client before it."""

    origin: str
    fal: str
    sandbox: Sandbox
    client: openai.AsyncOpenAI
    session: ClientSession

    @property
    def submits(self) -> int:
        """How often a job was asked of fal, whatever became of it."""
        return sum(
            seen.method == "POST" and seen.host in ("queue.fal.run", "fal.run")
            for seen in self.sandbox.seen
        )

    @property
    def inputs(self) -> list[Mapping[str, Any]]:
        """What fal was paid for, in its order."""
        return [paid.input for paid in self.sandbox.paid]  # type: ignore[misc]  # always objects

    async def download(self, url: str | None) -> Image.Image:
        assert url is not None
        async with self.session.get(url) as response:
            assert response.status == 200
            return Image.open(io.BytesIO(await response.read()))


def picture(b64: str | None) -> Image.Image:
    assert b64 is not None
    return Image.open(io.BytesIO(base64.b64decode(b64)))


@asynccontextmanager
async def open_studio(
    data_dir: Path, rules: Mapping[str, Any] | None = None, speed: float = 1000, **given: Any
) -> AsyncIterator[Studio]:
    sandbox = Sandbox(speed=speed)
    async with TestServer(create_sandbox(sandbox)) as fal, ClientSession() as session:
        fal_origin = sandbox.public_url = f"http://127.0.0.1:{fal.port}"
        given = {"upstream_origin": fal_origin, "wait": WAIT, **given}
        settings = make_settings(fal_key=CANARY, data_dir=data_dir, **given)
        async with TestServer(proxy_app(settings, **(rules or {}))) as proxy:
            origin = f"http://127.0.0.1:{proxy.port}"
            async with openai.AsyncOpenAI(base_url=f"{origin}/v1", api_key=KEY) as client:
                yield Studio(origin, fal_origin, sandbox, client, session)
    for seen in sandbox.seen:
        is_file = seen.host.startswith("127.0.0.1")
        keys = seen.headers.getall("Authorization", [])
        assert keys == ([] if is_file else [f"Key {CANARY}"]), seen.path
        assert KEY not in str(seen.headers)
