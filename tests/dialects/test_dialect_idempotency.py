"""Idempotency-Key in the APIs whose requests become calls of fal's queue."""

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from aiohttp import FormData

from tests.support.sandbox_proxy import (
    ASYNC,
    GENERATE,
    PNG,
    Reply,
    SandboxProxy,
    data_uri,
    open_sandbox_proxy,
)
from tests.support.waiting import wait_until

GENERATIONS, EDITS = "/v1/images/generations", "/v1/images/edits"
REPLAYED, COST = "Idempotency-Replayed", "x-falproxy-cost"
HERON = "a heron at dawn"
BODIES: dict[str, dict[str, Any]] = {
    "/kontext": {"prompt": "winter", "image_data": data_uri()},
    GENERATIONS: {"model": "flux-dev", "prompt": HERON, "size": "256x256"},
    EDITS: {"model": "kontext", "prompt": "winter", "images": [{"image_url": data_uri()}]},
    GENERATE: {"model": "flux-dev", "inputs": {"prompt": HERON}},
}
PATHS = list(BODIES)


@pytest.fixture(params=["with the cache", "without"])
async def proxy(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[SandboxProxy]:
    is_cached = request.param == "with the cache"
    async with open_sandbox_proxy(tmp_path, cache=is_cached) as opened:
        yield opened


async def post(
    proxy: SandboxProxy, path: str, body: Any = None, key: str = "k", **headers: str
) -> Reply:
    body = BODIES[path] if body is None else body
    headers = {"Idempotency-Key": key, **headers}
    if isinstance(body, FormData):
        return await proxy.request("POST", path, data=body, headers=headers)
    return await proxy.request("POST", path, json=body, headers=headers)


def slow(path: str) -> dict[str, Any]:
    body = BODIES[path]
    if path == GENERATE:
        return body | {"inputs": {"prompt": "!delay 0.5 slow"}}
    return body | {"prompt": "!delay 0.5 slow"}


def without_time(document: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in document.items() if name != "created"}


@pytest.mark.parametrize("path", PATHS)
async def test_a_repeated_request_has_the_same_result(proxy: SandboxProxy, path: str) -> None:
    first = await post(proxy, path)
    assert first.status == 200, first
    assert REPLAYED not in first.headers
    assert Decimal(first.headers[COST]) > 0
    for _ in range(2):
        again = await post(proxy, path)
        assert again.status == 200, again
        assert again.headers.getall(REPLAYED) == ["true"]
        assert again.headers.getall(COST) == ["0.00"]
        assert without_time(again.document) == without_time(first.document)
    assert (proxy.submits, len(proxy.inputs)) == (1, 1)


@pytest.mark.parametrize("path", PATHS)
async def test_requests_at_once_share_a_job(proxy: SandboxProxy, path: str) -> None:
    replies = await asyncio.gather(*(post(proxy, path, slow(path)) for _ in range(5)))
    assert [reply.status for reply in replies] == [200] * 5
    first, *others = (without_time(reply.document) for reply in replies)
    assert others == [first] * 4
    assert sum(REPLAYED in reply.headers for reply in replies) == 4
    assert (proxy.submits, len(proxy.inputs)) == (1, 1)


@pytest.mark.parametrize("path", PATHS)
async def test_another_request_with_the_key_is_refused(proxy: SandboxProxy, path: str) -> None:
    await post(proxy, path)
    refused = await post(proxy, path, BODIES[path] | {"user": "x"} if path != GENERATE else
                         BODIES[path] | {"userId": "x"})  # fmt: skip
    assert refused.status == 422, refused
    assert refused.document["error"]["code"] == "idempotency_key_reused"
    for other in PATHS:
        reply = await post(proxy, other)
        assert reply.status == (200 if other == path else 422), other
    assert proxy.submits == 1


@pytest.mark.parametrize("path", PATHS)
async def test_a_malformed_key_is_refused(proxy: SandboxProxy, path: str) -> None:
    refused = await post(proxy, path, key="x" * 256)
    assert refused.status == 400, refused
    assert refused.document["error"]["code"] == "idempotency_key_invalid"
    assert proxy.submits == 0
    assert path != GENERATE or proxy.jobs() == []


@pytest.mark.parametrize("path", PATHS)
async def test_a_client_that_left_gets_the_result_of_its_job(
    proxy: SandboxProxy, path: str
) -> None:
    first = asyncio.ensure_future(post(proxy, path, slow(path)))
    await wait_until(lambda: proxy.submits)
    await asyncio.sleep(0.05)
    first.cancel()
    await asyncio.wait([first])
    again = await post(proxy, path, slow(path))
    assert again.status == 200, again
    assert (proxy.submits, len(proxy.inputs)) == (1, 1)
    assert proxy.cancels == []


@pytest.mark.parametrize("path", PATHS)
async def test_a_failed_job_fails_again_the_same_way(proxy: SandboxProxy, path: str) -> None:
    prompt = "!error 422 content_policy_violation"
    body = BODIES[path] | ({"inputs": {"prompt": prompt}} if path == GENERATE else
                           {"prompt": prompt})  # fmt: skip
    first, again = [await post(proxy, path, body) for _ in range(2)]
    assert again.status == first.status >= 400
    if path != GENERATE:
        assert again.document == first.document
    assert proxy.submits == 1


async def test_a_form_is_recognized_by_its_content(proxy: SandboxProxy) -> None:
    def form(content: bytes = PNG, prompt: str = "winter") -> FormData:
        data = FormData()  # with a new boundary
        data.add_field("model", "kontext")
        data.add_field("prompt", prompt)
        data.add_field("image", content, filename="a.png", content_type="image/png")
        return data

    first, again = [await post(proxy, EDITS, form()) for _ in range(2)]
    assert first.status == 200, first
    assert without_time(again.document) == without_time(first.document)
    for other in (form(prompt="summer"), form(PNG + b"\x00")):
        assert (await post(proxy, EDITS, other)).status == 422
    assert proxy.submits == 1


async def test_each_of_several_jobs_is_made_once(proxy: SandboxProxy) -> None:
    body = {"model": "flux-schnell", "prompt": HERON, "n": 10, "size": "256x256"}
    first, again = [await post(proxy, GENERATIONS, body) for _ in range(2)]
    assert len(first.document["data"]) == 10
    assert again.document["data"] == first.document["data"]
    assert proxy.submits == 3


async def test_a_job_has_the_same_id(proxy: SandboxProxy) -> None:
    body = slow(GENERATE)
    first, again = [await post(proxy, GENERATE, body, **ASYNC) for _ in range(2)]
    assert (first.status, again.status) == (202, 202)
    assert again.document["jobId"] == first.document["jobId"]
    assert again.headers["Location"] == first.headers["Location"]
    finished = await proxy.wait_finished(first.document["jobId"])
    assert finished["status"] == "completed"
    last = await post(proxy, GENERATE, body)
    assert (last.status, last.document) == (200, finished)
    assert [job["status"] for job in proxy.jobs()] == ["completed"]
    other = await post(proxy, GENERATE, body, key="other", **ASYNC)
    assert other.document["jobId"] != first.document["jobId"]


@pytest.mark.parametrize("partial_images", [0, 2])
async def test_a_streamed_request_is_replayed(proxy: SandboxProxy, partial_images: int) -> None:
    body = BODIES[GENERATIONS] | {"stream": True, "partial_images": partial_images}
    headers = {"Idempotency-Key": "k"}
    events = []
    for _ in range(2):
        async with proxy.session.post(
            proxy.origin + GENERATIONS, json=body, headers=headers
        ) as response:
            assert response.status == 200
            text = await response.text()
            events.append([line for line in text.splitlines() if line.startswith("data: ")])
    types = [[json.loads(line[6:])["type"] for line in lines] for lines in events]
    assert types[0] == types[1]
    assert types[0]
    assert len(proxy.inputs) == 1
