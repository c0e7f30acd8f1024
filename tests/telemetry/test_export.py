"""The export in the background: metrics, the collector's failures, and the end of the process."""

import asyncio
import logging
import time

import pytest

from falproxy.errors import SettingsError
from falproxy.settings import Settings
from tests.support.fake_fal import FakeFal
from tests.support.gateway import MakeGateway
from tests.support.otlp_collector import Collector
from tests.support.urls import RUN
from tests.support.waiting import wait_until

EXPORT_LOGGER = "falproxy.telemetry.export"


async def test_metrics_are_exported(
    make_gateway: MakeGateway, fal: FakeFal, collector: Collector
) -> None:
    gateway = await make_gateway(fal.origin, endpoint=collector.origin)
    for _ in range(3):
        await gateway.call(RUN, json={})
    labels = {"operation": "run", "status": "200", "cache": ""}
    await wait_until(lambda: (labels, 3.0) in collector.points.get("falproxy_requests", []))
    points = collector.points
    route = {
        "http.request.method": "POST",
        "http.route": "/api/fal/proxy",
        "url.scheme": "http",
        "http.response.status_code": 200,
    }
    host = {
        "http.request.method": "POST",
        "server.address": "fal.run",
        "http.response.status_code": 200,
    }
    assert points["http.server.request.duration"] == [(route, 3.0)]
    assert points["http.client.request.duration"] == [(host, 3.0)]
    assert points["falproxy_connections"][0][1] >= 0


async def test_the_resource_is_named(
    make_gateway: MakeGateway, fal: FakeFal, collector: Collector
) -> None:
    gateway = await make_gateway(fal.origin, endpoint=collector.origin, service_name="images")
    await gateway.call(RUN, json={})
    await collector.trace(2)
    assert collector.resources[0]["service.name"] == "images"
    assert collector.resources[0]["service.instance.id"]


async def test_the_headers_of_the_collector_are_sent_to_it(
    make_gateway: MakeGateway, fal: FakeFal, collector: Collector
) -> None:
    headers = (("Authorization", "Bearer of-the-collector"),)
    gateway = await make_gateway(fal.origin, endpoint=collector.origin, headers=headers)
    await gateway.call(RUN, json={})
    await collector.trace(2)
    assert collector.headers["Authorization"] == "Bearer of-the-collector"
    assert "of-the-collector" not in str(fal.seen)


@pytest.mark.parametrize(
    ("settings", "has_traces", "has_metrics"),
    [
        pytest.param({"traces_exporter": "none"}, False, True, id="no traces"),
        pytest.param({"metrics_exporter": "none"}, True, False, id="no metrics"),
    ],
)
async def test_each_of_both_can_be_turned_off(
    make_gateway: MakeGateway,
    fal: FakeFal,
    collector: Collector,
    settings: dict[str, str],
    has_traces: bool,
    has_metrics: bool,
) -> None:
    gateway = await make_gateway(fal.origin, endpoint=collector.origin, **settings)
    await gateway.call(RUN, json={})
    await wait_until(lambda: collector.points if has_metrics else collector.spans)
    await gateway.client.close()
    assert (bool(collector.spans), bool(collector.points)) == (has_traces, has_metrics)


async def test_what_is_left_is_exported_at_the_end(
    make_gateway: MakeGateway,
    fal: FakeFal,
    collector: Collector,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "60000")
    gateway = await make_gateway(fal.origin, endpoint=collector.origin)
    await gateway.call(RUN, json={})
    await asyncio.sleep(0.1)
    assert collector.spans == []
    await gateway.client.close()
    assert len(collector.spans) == 2


@pytest.mark.timed
@pytest.mark.parametrize("kind", ["away", "silent", "refusing"])
async def test_a_collector_that_fails_delays_neither_calls_nor_the_end(
    make_gateway: MakeGateway,
    fal: FakeFal,
    collector: Collector,
    caplog: pytest.LogCaptureFixture,
    unused_tcp_port: int,
    kind: str,
) -> None:
    endpoint = collector.origin
    if kind == "away":
        endpoint = f"http://127.0.0.1:{unused_tcp_port}"
    elif kind == "silent":
        collector.is_silent = True
    else:
        collector.status = 503
    gateway = await make_gateway(fal.origin, endpoint=endpoint)
    started = time.monotonic()
    for _ in range(20):
        assert (await gateway.call(RUN, json={})).status == 200
    assert time.monotonic() - started < 2.0
    started = time.monotonic()
    await gateway.client.close()
    assert time.monotonic() - started < 2.5
    assert endpoint not in "".join(
        record.getMessage() for record in caplog.records if record.name.startswith("falproxy")
    )


async def test_failures_are_logged_once_until_they_end(
    make_gateway: MakeGateway,
    fal: FakeFal,
    collector: Collector,
    caplog: pytest.LogCaptureFixture,
) -> None:
    collector.status = 400
    gateway = await make_gateway(fal.origin, endpoint=collector.origin, metrics_exporter="none")
    for number in range(1, 4):
        await gateway.call(RUN, json={})
        await wait_until(lambda number=number: len(collector.bodies) >= number)  # type: ignore[misc]
    collector.status = 200
    await gateway.call(RUN, json={})
    await wait_until(lambda: messages(caplog)[-1:] == ["Traces are exported again"])
    assert messages(caplog) == [
        "Traces cannot be exported: the collector does not accept them",
        "Traces are exported again",
    ]


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    records = [each for each in caplog.records if each.name == EXPORT_LOGGER]
    assert all(each.levelno in (logging.WARNING, logging.INFO) for each in records)
    return [each.getMessage() for each in records]


@pytest.mark.parametrize(
    ("variables", "is_used"),
    [
        pytest.param({}, False, id="nothing"),
        pytest.param({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c"}, True, id="endpoint"),
        pytest.param({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://c/t"}, True, id="traces"),
        pytest.param({"OTEL_EXPORTER_OTLP_METRICS_ENDPOINT": "http://c/m"}, True, id="metrics"),
        pytest.param({"OTEL_SERVICE_NAME": "x"}, False, id="a name alone"),
        pytest.param(
            {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c", "OTEL_SDK_DISABLED": "true"},
            False,
            id="disabled",
        ),
        pytest.param(
            {
                "OTEL_EXPORTER_OTLP_ENDPOINT": "http://c",
                "OTEL_TRACES_EXPORTER": "none",
                "OTEL_METRICS_EXPORTER": "none",
            },
            False,
            id="no exporter",
        ),
    ],
)
def test_the_endpoint_turns_it_on(variables: dict[str, str], is_used: bool) -> None:
    assert Settings.from_env({"FAL_KEY": "a:b"} | variables).telemetry.is_used is is_used


def test_the_urls_have_the_standard_paths() -> None:
    telemetry = Settings.from_env(
        {
            "FAL_KEY": "a:b",
            "OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318/",
            "OTEL_EXPORTER_OTLP_METRICS_ENDPOINT": "http://d/own",
        }
    ).telemetry
    assert telemetry.traces_url == "http://c:4318/v1/traces"
    assert telemetry.metrics_url == "http://d/own"


@pytest.mark.parametrize("text", ["s3cret", "a b=s3cret", "a=s3%0acret", "=s3cret", "ok=1,s3cret"])
def test_headers_of_another_form_stop_the_start(text: str) -> None:
    with pytest.raises(SettingsError, match="OTEL_EXPORTER_OTLP_HEADERS must be") as caught:
        Settings.from_env({"FAL_KEY": "a:b", "OTEL_EXPORTER_OTLP_HEADERS": text})
    assert "s3" not in str(caught.value)
