"""A collector, and short intervals of the exports."""

from collections.abc import AsyncIterator

import pytest

from tests.support.otlp_collector import Collector, open_collector

pytest.importorskip("opentelemetry.sdk")


@pytest.fixture(autouse=True)
def short_intervals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "20")
    monkeypatch.setenv("OTEL_METRIC_EXPORT_INTERVAL", "100")


@pytest.fixture(autouse=True)
async def collector(short_intervals: None) -> AsyncIterator[Collector]:
    """Is closed after the proxy, which exports the rest."""
    async with open_collector() as running:
        yield running
