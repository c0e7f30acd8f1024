"""SchemaClient: schemas are cached for an hour, fetched once by concurrent callers, and used after
their expiry while fal does not respond."""

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import pytest
from aiohttp import web

from falproxy.fal.keys import KeyPool
from falproxy.fal.model_schema import ModelSchema
from falproxy.proxy.model_schemas import (
    CACHE_SIZE,
    RETRY_AFTER,
    SCHEMA_TTL,
    SchemaClient,
    SchemaUnavailable,
)
from falproxy.proxy.upstream import Upstream, open_transport
from falproxy.sandbox.model_metadata import openapi_document
from falproxy.sandbox.models import MODELS
from tests.support.fake_fal import FakeFal
from tests.support.schema_documents import send_503, send_document

DEV = "fal-ai/flux/dev"


@dataclass(slots=True)
class Schemas:
    """A SchemaClient with its upstream. clock: its time in seconds, which tests can change."""

    upstream: Upstream
    client: SchemaClient
    clock: list[float] = field(default_factory=lambda: [1000.0])

    async def get(self, endpoint: str = DEV) -> ModelSchema | None:
        return await self.client.get_schema(self.upstream, endpoint)


@pytest.fixture
async def schemas(fal: FakeFal) -> AsyncIterator[Schemas]:
    fal.respond = send_document
    clock = [1000.0]
    async with open_transport((5.0, 60.0)) as transport:
        next_key = KeyPool(("id:secret",), lambda: 0.0).next_key()
        upstream = Upstream(transport, next_key, origin=fal.origin)
        yield Schemas(upstream, SchemaClient(clock=lambda: clock[0], timeout=0.5), clock)


async def test_a_document_is_fetched_once_an_hour(schemas: Schemas, fal: FakeFal) -> None:
    first = await schemas.get()
    assert first is not None
    assert "image_size" in first.inputs
    schemas.clock[0] += SCHEMA_TTL - 1
    assert await schemas.get() is first
    assert len(fal.seen) == 1
    schemas.clock[0] += 1
    assert await schemas.get() is not first
    assert len(fal.seen) == 2
    assert fal.seen[0].target == ("/api/openapi/queue/openapi.json?endpoint_id=fal-ai%2Fflux%2Fdev")


async def test_concurrent_callers_share_one_request(schemas: Schemas, fal: FakeFal) -> None:
    results = await asyncio.gather(*(schemas.get() for _ in range(50)))
    assert len({id(schema) for schema in results}) == 1
    assert len(fal.seen) == 1


async def test_a_cancelled_caller_does_not_cancel_the_request_of_others(
    schemas: Schemas, fal: FakeFal
) -> None:
    received, proceed = asyncio.Event(), asyncio.Event()

    async def send_late(request: web.Request) -> web.StreamResponse:
        received.set()
        await proceed.wait()
        return await send_document(request)

    fal.respond = send_late
    async with asyncio.TaskGroup() as group:
        first, second = group.create_task(schemas.get()), group.create_task(schemas.get())
        await received.wait()
        first.cancel()
        proceed.set()
    assert second.result() is not None
    assert len(fal.seen) == 1


async def test_an_expired_schema_is_used_while_fal_does_not_respond(
    schemas: Schemas, fal: FakeFal
) -> None:
    first = await schemas.get()
    schemas.clock[0] += SCHEMA_TTL
    fal.respond = send_503
    assert await schemas.get() is first
    assert await schemas.get() is first
    assert len(fal.seen) == 2, "there is one more attempt, and then none until RETRY_AFTER"
    fal.respond = send_document
    schemas.clock[0] += RETRY_AFTER
    assert await schemas.get() is not first
    assert len(fal.seen) == 3


async def test_the_schema_of_an_unknown_model_is_cached_as_none(
    schemas: Schemas, fal: FakeFal
) -> None:
    assert await schemas.get("fal-ai/nope") is None
    assert await schemas.get("fal-ai/nope") is None
    assert len(fal.seen) == 1
    schemas.clock[0] += RETRY_AFTER
    assert await schemas.get("fal-ai/nope") is None
    assert len(fal.seen) == 2


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"{}", b'"x"', b"[" * 100_000, b" " * (4 * 2**20 + 1)]
)
async def test_an_unreadable_document_is_unavailable(
    schemas: Schemas, fal: FakeFal, body: bytes
) -> None:
    async def respond(request: web.Request) -> web.StreamResponse:
        return web.Response(body=body, content_type="application/json")

    fal.respond = respond
    for _ in range(2):
        with pytest.raises(SchemaUnavailable):
            await schemas.get()
    assert len(fal.seen) == 1


async def test_a_slow_fal_is_not_awaited(schemas: Schemas, fal: FakeFal) -> None:
    async def wait(request: web.Request) -> web.StreamResponse:
        await asyncio.sleep(30)
        return web.Response()

    fal.respond = wait
    with pytest.raises(SchemaUnavailable):
        await schemas.get()


async def test_the_cache_is_bounded(schemas: Schemas, fal: FakeFal) -> None:
    async def respond(request: web.Request) -> web.StreamResponse:
        document = json.dumps(openapi_document(MODELS[DEV])).encode()
        return web.Response(body=document, content_type="application/json")

    fal.respond = respond
    for number in range(CACHE_SIZE + 1):
        await schemas.get(f"o/{number}")
    before = len(fal.seen)
    await schemas.get(f"o/{CACHE_SIZE}")
    assert len(fal.seen) == before
    await schemas.get("o/0")
    assert len(fal.seen) == before + 1
