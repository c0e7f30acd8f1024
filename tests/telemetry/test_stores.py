"""Spans of requests to stores and image hosts, with everything configured."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.fake_supabase import FakeSupabase
from tests.support.otlp_collector import CLIENT, SERVER, Collector, ReceivedSpan
from tests.support.postgres_server import PostgresServer, postgres_server
from tests.support.redis_server import RedisServer, redis_server
from tests.support.sandbox_proxy import open_sandbox_proxy
from tests.support.waiting import wait_until

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def redis() -> Iterator[RedisServer]:
    with redis_server() as running:
        yield running


@pytest.fixture(scope="module")
def postgres() -> Iterator[PostgresServer]:
    with postgres_server() as running:
        yield running


def system(span: ReceivedSpan) -> str:
    """Return the system that a span's request was sent to."""
    attributes = span.attributes
    named = attributes.get("db.system.name") or attributes.get("peer.service")
    return str(named or attributes["server.address"])


async def test_a_miss_and_a_hit_show_every_request_that_was_made(
    tmp_path: Path, redis: RedisServer, postgres: PostgresServer, collector: Collector
) -> None:
    async with FakeSupabase() as supabase:
        stores: dict[str, Any] = {
            "redis_url": redis.url,
            "database_url": postgres.fresh(),
            "supabase_url": supabase.url,
            "supabase_key": supabase.service_key,
            "rehost": "supabase",
            "access_keys": (("ann", "s3cret-of-ann"),),
        }
        async with open_sandbox_proxy(
            tmp_path, endpoint=collector.origin, metrics_exporter="none", **stores
        ) as proxy:
            body = {"prompt": "s3cret prompt", "image_url": proxy.add_file(), "seed": 1}
            headers = {"x-falproxy-key": "s3cret-of-ann"}
            for _ in range(2):
                reply = await proxy.request("POST", "/kontext", json=body, headers=headers)
                assert reply.status == 200
            await wait_until(lambda: len(collector.of_kind(SERVER)) == 2)
    miss, hit = sorted(collector.of_kind(SERVER), key=lambda span: span.start)
    outcomes = [span.attributes["falproxy.cache"] for span in (miss, hit)]
    assert outcomes == ["miss", "hit"]
    of_miss, of_hit = (
        Counter(map(system, children))
        for parent in (miss, hit)
        if (children := [span for span in collector.spans if span.parent_id == parent.span_id])
    )
    assert {"redis", "supabase", "image_host", "queue.fal.run"} <= of_miss.keys()
    assert "queue.fal.run" not in of_hit
    assert of_hit["redis"] > 0
    assert {span.trace_id for span in collector.of_kind(CLIENT)} <= {
        miss.trace_id,
        hit.trace_id,
        *(span.trace_id for span in collector.spans if span.parent_id == ""),
    }
    exported = b"".join(collector.bodies)
    assert b"s3cret" not in exported
    assert supabase.service_key.encode() not in exported
    assert b".png" not in exported


async def test_requests_to_postgres_are_spans_of_the_call(
    tmp_path: Path, postgres: PostgresServer, collector: Collector
) -> None:
    settings: dict[str, Any] = {"database_url": postgres.fresh(), "endpoint": collector.origin}
    async with open_sandbox_proxy(tmp_path, metrics_exporter="none", **settings) as proxy:
        reply = await proxy.generate("flux-dev", {"prompt": "s3cret prompt"})
        assert reply.status == 200
        await wait_until(lambda: collector.of_kind(SERVER))
    (server, *_) = collector.of_kind(SERVER)
    children = [span for span in collector.spans if span.parent_id == server.span_id]
    statements = [span for span in children if span.attributes.get("db.system.name")]
    assert {span.attributes["db.system.name"] for span in statements} == {"postgresql"}
    assert {span.attributes["db.operation.name"] for span in statements} >= {"INSERT", "UPDATE"}
    assert all(span.name.split()[0].isupper() for span in statements)
    assert b"s3cret" not in b"".join(collector.bodies)


async def test_what_goes_on_without_a_call_is_not_traced(
    tmp_path: Path, redis: RedisServer, postgres: PostgresServer, collector: Collector
) -> None:
    """Probes, and writes for many calls together, would be traces without end."""
    settings: dict[str, Any] = {"redis_url": redis.url, "database_url": postgres.fresh()}
    async with open_sandbox_proxy(tmp_path, endpoint=collector.origin, **settings) as proxy:
        body = {"prompt": "a fox", "seed": 2}
        await proxy.call_target("https://fal.run/fal-ai/flux/dev", body)
        await proxy.records()
        await wait_until(lambda: collector.of_kind(SERVER))
    roots = [span for span in collector.spans if span.parent_id == ""]
    assert {span.name for span in roots if span.kind == SERVER} == {"POST /api/fal/proxy"}
    assert all("db.system.name" not in span.attributes for span in roots)
