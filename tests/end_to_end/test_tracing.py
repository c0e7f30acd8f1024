"""The trace of a real process, as it is drawn in docs/images/trace.svg."""

import pytest

from tests.support.otlp_collector import SERVER
from tests.support.traced_kontext import receive_traces

pytest.importorskip("opentelemetry.sdk")
pytestmark = pytest.mark.slow(seconds=15)


async def test_a_miss_and_a_hit_of_a_real_process_are_traced() -> None:
    miss, hit = await receive_traces()
    for spans, outcome in ((miss, "miss"), (hit, "hit")):
        (call,) = (span for span in spans if span.kind == SERVER)
        assert call.name == "POST /kontext"
        assert call.attributes["falproxy.cache"] == outcome
        assert call.attributes["gen_ai.request.model"] == "fal-ai/flux-pro/kontext"
        assert {span.parent_id for span in spans if span is not call} == {call.span_id}
    hosts_of_hit = {span.attributes.get("server.address") for span in hit}
    operations = {span.attributes.get("falproxy.operation") for span in miss}
    assert {"submit", "status", "result"} <= operations
    assert "queue.fal.run" not in hosts_of_hit
    assert "redis" in {span.attributes.get("db.system.name") for span in hit}
