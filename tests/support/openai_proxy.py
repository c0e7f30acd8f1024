"""A proxy with the OpenAI images API, the sandbox as fal, and OpenAI's client."""

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
from falproxy.app import HANDLER_ARGS
from falproxy.app.components import create_fetcher
from falproxy.app.pipeline import (
    CallResources,
    authentication,
    authorization,
    call_pipeline,
    compose,
)
from falproxy.app.resources import open_rehosting, open_result_cache
from falproxy.background import Background, background_context
from falproxy.dialects import default_error, dialect_route, handle_errors, method_check_middleware
from falproxy.dialects.openai import ImagesDeps, images_routes, local_file_reader
from falproxy.dialects.queue_client import WaitPolicy
from falproxy.dialects.transparent import BodyLimits, transparent_dialect
from falproxy.fal.keys import KeyPool
from falproxy.fal.policy import Globs
from falproxy.media.fetch import fetcher_context
from falproxy.metrics import METRICS, Metrics
from falproxy.middleware.access_log import access_log, add_timing_headers
from falproxy.middleware.cors import check_origin
from falproxy.proxy.upstream import connect_upstream
from falproxy.sandbox import Sandbox
from falproxy.sandbox import create_app as create_sandbox
from falproxy.stores.files.disk import DiskStorage
from tests.support.key_search import CANARY
from tests.support.offline_fal import png
from tests.support.openai_client import create_openai_client
from tests.support.settings import make_settings
from tests.support.urls import PROXY

DEV = "fal-ai/flux/dev"
SCHNELL = "fal-ai/flux/schnell"
KONTEXT = "fal-ai/flux-pro/kontext"
SDXL = "fal-ai/fast-sdxl"
NANO = "fal-ai/nano-banana"
HERON = "a heron at dawn"
SMALL = "256x256"
SEED = {"seed": 7}
KEY = "s3cret"
SKETCH = f"data:image/png;base64,{base64.b64encode(png()).decode()}"
WAIT = 20.0  # seconds


def proxy_app(settings: Settings, **deps: Any) -> web.Application:
    """Create a proxy with the paths of this API and the header route. Failed steps are repeated
    without a pause.

    deps: fields of ImagesDeps.
    """
    app = web.Application(handler_args=HANDLER_ARGS, middlewares=[handle_errors(default_error)])
    app[METRICS] = Metrics()
    key_pool = KeyPool(settings.fal_keys, time.monotonic)
    timeouts = (settings.upstream.connect_timeout, settings.upstream.timeout)
    app.cleanup_ctx.append(
        connect_upstream(key_pool.next_key(), origin=settings.upstream.origin, timeouts=timeouts)
    )
    fetcher = create_fetcher(settings)
    app.cleanup_ctx.append(fetcher_context(fetcher))
    rehosting = open_rehosting(app, settings, fetcher, "")
    result_cache = open_result_cache(app, settings)
    authenticators = authentication(settings, None)
    authorizers = authorization(
        app, settings, key_pool, result_cache, is_locked=bool(authenticators)
    )
    pipeline = call_pipeline(settings, CallResources(key_pool, fetcher, rehosting, result_cache))
    background = Background()
    app.cleanup_ctx.append(background_context(background, 5.0))
    if rehosting is not None and isinstance(rehosting.rehoster.storage, DiskStorage):
        deps["read_local"] = local_file_reader(rehosting.rehoster.storage, rehosting.base_url)
    deps.setdefault("endpoints", Globs(settings.auth.allowed_endpoints))
    images_deps = ImagesDeps(
        body_limits=BodyLimits(settings.server.max_body, allow_encoded=True), **deps
    )
    wait_policy = WaitPolicy(
        total=settings.dialects.wait, background=background, retry_wait=wait_none()
    )
    routes = images_routes(images_deps, fetcher, wait_policy)
    routes[PROXY] = dialect_route(transparent_dialect(images_deps.body_limits))
    for path, route in routes.items():
        middlewares = [
            access_log(app[METRICS]),
            handle_errors(route.refuse),
            method_check_middleware(route.check),
            check_origin(settings.auth.allowed_origins),
            *authenticators,
            route.middleware,
            *authorizers,
        ]
        app.router.add_route("*", path, compose(middlewares, pipeline))
    app.on_response_prepare.append(add_timing_headers)
    return app


@dataclass(frozen=True, slots=True)
class OpenAIProxy:
    """The proxy with OpenAI's client.

    origin: of the proxy.
    fal: origin of the sandbox.
    """

    origin: str
    fal: str
    sandbox: Sandbox
    client: openai.AsyncOpenAI
    session: ClientSession

    @property
    def submits(self) -> int:
        """Number of the submits and runs that fal received, successful or not."""
        return sum(
            seen.method == "POST" and seen.host in ("queue.fal.run", "fal.run")
            for seen in self.sandbox.seen
        )

    @property
    def inputs(self) -> list[Mapping[str, Any]]:
        """Inputs of the jobs that fal charged for."""
        return [paid.input for paid in self.sandbox.paid]  # type: ignore[misc]  # always objects

    async def download(self, url: str | None) -> Image.Image:
        assert url is not None
        async with self.session.get(url) as response:
            assert response.status == 200
            return Image.open(io.BytesIO(await response.read()))


def decode_image(b64: str | None) -> Image.Image:
    assert b64 is not None
    return Image.open(io.BytesIO(base64.b64decode(b64)))


@asynccontextmanager
async def open_openai_proxy(
    data_dir: Path, deps: Mapping[str, Any] | None = None, speed: float = 1000, **options: Any
) -> AsyncIterator[OpenAIProxy]:
    sandbox = Sandbox(speed=speed)
    async with TestServer(create_sandbox(sandbox)) as fal, ClientSession() as session:
        fal_origin = sandbox.public_url = f"http://127.0.0.1:{fal.port}"
        options = {"upstream_origin": fal_origin, "wait": WAIT, **options}
        settings = make_settings(fal_key=CANARY, data_dir=data_dir, **options)
        async with TestServer(proxy_app(settings, **(deps or {}))) as server:
            origin = f"http://127.0.0.1:{server.port}"
            async with create_openai_client(origin, KEY) as client:
                yield OpenAIProxy(origin, fal_origin, sandbox, client, session)
    for seen in sandbox.seen:
        is_public = seen.host.startswith("127.0.0.1") or seen.path.startswith("/api/openapi/")
        keys = seen.headers.getall("Authorization", [])
        assert keys == ([] if is_public else [f"Key {CANARY}"]), seen.path
        assert KEY not in str(seen.headers)
