"""fal's OpenAPI documents: kept for an hour, asked for once, told while fal is away."""

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import pytest
from aiohttp import web

from falproxy.dialects.openai.model_schema import ModelSchema
from falproxy.dialects.openai.models import (
    CACHE_SIZE,
    RETRY_AFTER,
    SCHEMA_TTL,
    SchemaClient,
    SchemaUnavailable,
)
from falproxy.fal.keys import KeyPool
from falproxy.proxy.upstream import Upstream, open_transport
from falproxy.sandbox.model_metadata import openapi_document
from falproxy.sandbox.models import MODELS
from tests.support.fake_fal import FakeFal

DEV = "fal-ai/flux/dev"


@dataclass(slots=True)
class Desk:
    """The documents of one process, with a clock to move."""

    upstream: Upstream
    schemas: SchemaClient
    clock: list[float] = field(default_factory=lambda: [1000.0])

    async def find(self, endpoint: str = DEV) -> ModelSchema | None:
        return await self.schemas.get_schema(self.upstream, endpoint)


async def tell(request: web.Request) -> web.StreamResponse:
    assert request.host == "fal.ai"
    model = MODELS.get(request.query["endpoint_id"])
    if model is None:
        return web.json_response(None, status=404)
    return web.json_response(openapi_document(model))


async def be_away(request: web.Request) -> web.StreamResponse:
    return web.Response(status=503)


@pytest.fixture
async def desk(fal: FakeFal) -> AsyncIterator[Desk]:
    fal.answer = tell
    clock = [1000.0]
    async with open_transport((5.0, 60.0)) as way:
        upstream = Upstream(way, KeyPool(("id:secret",), lambda: 0.0).next_key(), origin=fal.origin)
        yield Desk(upstream, SchemaClient(clock=lambda: clock[0], timeout=0.5), clock)


async def test_a_document_is_asked_for_once_an_hour(desk: Desk, fal: FakeFal) -> None:
    first = await desk.find()
    assert first is not None
    assert "image_size" in first.inputs
    desk.clock[0] += SCHEMA_TTL - 1
    assert await desk.find() is first
    assert len(fal.seen) == 1
    desk.clock[0] += 1
    assert await desk.find() is not first
    assert len(fal.seen) == 2
    assert fal.seen[0].target == ("/api/openapi/queue/openapi.json?endpoint_id=fal-ai%2Fflux%2Fdev")


async def test_all_who_ask_at_once_share_one_answer(desk: Desk, fal: FakeFal) -> None:
    found = await asyncio.gather(*(desk.find() for _ in range(50)))
    assert len({id(takes) for takes in found}) == 1
    assert len(fal.seen) == 1


async def test_one_who_leaves_takes_nothing_from_the_others(desk: Desk, fal: FakeFal) -> None:
    asked, go_on = asyncio.Event(), asyncio.Event()

    async def tell_late(request: web.Request) -> web.StreamResponse:
        asked.set()
        await go_on.wait()
        return await tell(request)

    fal.answer = tell_late
    async with asyncio.TaskGroup() as group:
        first, second = group.create_task(desk.find()), group.create_task(desk.find())
        await asked.wait()
        first.cancel()
        go_on.set()
    assert second.result() is not None
    assert len(fal.seen) == 1


async def test_what_was_known_is_told_while_fal_is_away(desk: Desk, fal: FakeFal) -> None:
    known = await desk.find()
    desk.clock[0] += SCHEMA_TTL
    fal.answer = be_away
    assert await desk.find() is known
    assert await desk.find() is known
    assert len(fal.seen) == 2, "it was asked once more, and then left alone"
    fal.answer = tell
    desk.clock[0] += RETRY_AFTER
    assert await desk.find() is not known
    assert len(fal.seen) == 3


async def test_a_model_that_fal_does_not_know_is_none_for_a_while(desk: Desk, fal: FakeFal) -> None:
    assert await desk.find("fal-ai/nope") is None
    assert await desk.find("fal-ai/nope") is None
    assert len(fal.seen) == 1
    desk.clock[0] += RETRY_AFTER
    assert await desk.find("fal-ai/nope") is None
    assert len(fal.seen) == 2


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"{}", b'"x"', b"[" * 100_000, b" " * (4 * 2**20 + 1)]
)
async def test_a_document_that_cannot_be_read_is_none_at_all(
    desk: Desk, fal: FakeFal, body: bytes
) -> None:
    async def answer(request: web.Request) -> web.StreamResponse:
        return web.Response(body=body, content_type="application/json")

    fal.answer = answer
    for _ in range(2):
        with pytest.raises(SchemaUnavailable):
            await desk.find()
    assert len(fal.seen) == 1


async def test_a_slow_fal_holds_nobody_up(desk: Desk, fal: FakeFal) -> None:
    async def wait(request: web.Request) -> web.StreamResponse:
        await asyncio.sleep(30)
        return web.Response()

    fal.answer = wait
    with pytest.raises(SchemaUnavailable):
        await desk.find()


async def test_many_models_are_not_kept_for_ever(desk: Desk, fal: FakeFal) -> None:
    async def answer(request: web.Request) -> web.StreamResponse:
        document = json.dumps(openapi_document(MODELS[DEV])).encode()
        return web.Response(body=document, content_type="application/json")

    fal.answer = answer
    for number in range(CACHE_SIZE + 1):
        await desk.find(f"o/{number}")
    before = len(fal.seen)
    await desk.find(f"o/{CACHE_SIZE}")
    assert len(fal.seen) == before
    await desk.find("o/0")
    assert len(fal.seen) == before + 1
