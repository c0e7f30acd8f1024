"""Metrics: they agree with the calls, stay bounded, and follow Prometheus's format."""

import json
import time
from pathlib import Path

import pytest
from aiohttp import web
from prometheus_client.metrics_core import Metric
from prometheus_client.openmetrics.parser import (
    text_string_to_metric_families as parse_openmetrics,
)
from prometheus_client.parser import text_string_to_metric_families

from falproxy.fal.target import Operation
from falproxy.metrics import (
    ERROR_CODES_MAX,
    METRICS,
    OTHER_ERROR,
    OWN_BOUNDS,
    UPSTREAM_BOUNDS,
    WORKER_SNAPSHOTS,
    HistogramData,
    Metrics,
    Snapshot,
    counters_of,
    merge_snapshots,
    quantile,
)
from falproxy.windows import Window
from tests.support.fake_fal import FakeFal
from tests.support.gateway import Gateway, MakeGateway
from tests.support.ports import free_port
from tests.support.urls import RUN, SUBMIT

KEYS = (("ann", "s3cret-ann"), ("bob", "s3cret-bob"))
PRICED = "fal-ai/flux/dev"


def metrics_of(*statuses: int) -> Metrics:
    metrics = Metrics()
    for status in statuses:
        metrics.record_request(Operation.RUN, status, "miss", 0.002, 0.3)
    return metrics


def timing(bounds: tuple[float, ...], **counts: int) -> HistogramData:
    """Return a histogram with these counts in the first buckets."""
    found = [*counts.values(), *[0] * (len(bounds) + 1 - len(counts))]
    return {"counts": found, "sum": 0.0}


async def fetch_metrics(gateway: Gateway, accept: str = "*/*") -> str:
    """Return the body of /metrics, decompressed."""
    headers = {"Accept": accept, "Accept-Encoding": "identity"}
    response = await gateway.client.get("/metrics", headers=headers)
    text = (await response.read()).decode()
    assert response.status == 200, text
    return text


async def fetch_samples(gateway: Gateway) -> dict[str, float]:
    """Return the samples of /metrics by name and labels."""
    text = await fetch_metrics(gateway)
    return {
        sample_name(sample.name, sample.labels): sample.value
        for family in parse_metrics(text)
        for sample in family.samples
    }


def parse_metrics(text: str) -> list[Metric]:
    return list(text_string_to_metric_families(text))


def sample_name(name: str, labels: dict[str, str]) -> str:
    shown = ",".join(f"{label}={value}" for label, value in sorted(labels.items()))
    return f"{name}{{{shown}}}" if shown else name


def test_requests_are_counted_by_operation_status_and_cache() -> None:
    metrics = metrics_of(200, 200, 422)
    metrics.record_request(Operation.STATUS, 200, "", 0.0001, None)
    assert metrics.snapshot()["requests"] == {
        "run 200 miss": 2, "run 422 miss": 1, "status 200 ": 1,
    }  # fmt: skip


def test_a_request_without_a_call_to_fal_has_no_upstream_time() -> None:
    metrics = Metrics()
    metrics.record_request("none", 401, "", 0.0001, None)
    assert "none" in metrics.snapshot()["own_seconds"]
    assert metrics.snapshot()["upstream_seconds"] == {}


@pytest.mark.parametrize(
    ("seconds", "bucket"),
    [
        pytest.param(0.0, 0, id="zero"),
        pytest.param(OWN_BOUNDS[0], 0, id="a bound belongs to its bucket"),
        pytest.param(0.0007, 1, id="between two bounds"),
        pytest.param(9999.0, len(OWN_BOUNDS), id="above all bounds"),
    ],
)
def test_seconds_are_counted_in_their_bucket(seconds: float, bucket: int) -> None:
    metrics = Metrics()
    metrics.record_request("run", 200, "", seconds, None)
    found = metrics.snapshot()["own_seconds"]["run"]
    assert (found["counts"].index(1), found["sum"]) == (bucket, seconds)


@pytest.mark.parametrize(
    ("header", "files"),
    [
        pytest.param("stored; count=2", {"stored": 2}, id="all stored"),
        pytest.param("failed, stored; count=1", {"failed": 1, "stored": 1}, id="partly stored"),
        pytest.param("too-large", {"too-large": 1}, id="left with fal"),
    ],
)
def test_files_are_counted_from_the_header(header: str, files: dict[str, int]) -> None:
    metrics = Metrics()
    metrics.record_rehost(header)
    assert metrics.snapshot()["files"] == files


def test_error_codes_of_fal_cannot_create_labels_without_bound() -> None:
    metrics = Metrics()
    for number in range(10 * ERROR_CODES_MAX):
        metrics.record_error(f"code_{number}")
    errors = metrics.snapshot()["errors"]
    assert len(errors) == ERROR_CODES_MAX + 1
    assert errors[OTHER_ERROR] == 9 * ERROR_CODES_MAX


def test_snapshots_of_several_processes_are_summed() -> None:
    snapshots = [metrics_of(200).snapshot(), metrics_of(200, 500).snapshot()]
    for each, start in zip(snapshots, (20.0, 10.0), strict=True):
        each["process"] = {
            "process_start_time_seconds": start,
            "process_resident_memory_bytes": 100.0,
        }
        each["spent"] = {PRICED: 25_000}
        each["in_progress"] = 1
    merged = merge_snapshots(json.loads(json.dumps(snapshots)))  # as from another process
    assert merged["requests"] == {"run 200 miss": 2, "run 500 miss": 1}
    assert sum(merged["own_seconds"]["run"]["counts"]) == 3
    assert merged["own_seconds"]["run"]["sum"] == pytest.approx(0.006)
    assert merged["spent"] == {PRICED: 50_000}
    assert merged["in_progress"] == 2
    assert merged["process"] == {
        "process_start_time_seconds": 10.0,
        "process_resident_memory_bytes": 200.0,
    }


def test_states_of_several_processes_are_the_worst_and_backlogs_their_sum() -> None:
    snapshots = [metrics_of().snapshot() for _ in range(2)]
    snapshots[0] |= {"dependencies": {"fal": 1, "ledger": 0}, "breakers": {"fal.run": 0}}
    snapshots[1] |= {"dependencies": {"fal": 0, "cache": 1}, "breakers": {"fal.run": 1}}
    for number, snapshot in enumerate(snapshots):
        snapshot["health"] = {
            "ledger_backlog_rows": 3,
            "ledger_dropped_rows": 1,
            "fal_keys": 2,
            "fal_keys_resting": number,
            "worker_restarts": 4 + number,
        }
    merged = merge_snapshots(json.loads(json.dumps(snapshots)))
    assert merged["dependencies"] == {"fal": 0, "ledger": 0, "cache": 1}
    assert merged["breakers"] == {"fal.run": 1}
    assert merged["health"] == {
        "ledger_backlog_rows": 6,
        "ledger_dropped_rows": 2,
        "fal_keys": 2,
        "fal_keys_resting": 1,
        "worker_restarts": 5,
    }


def test_counters_of_an_ended_process_stay_and_its_states_do_not() -> None:
    ended = metrics_of(200).snapshot()
    ended["dependencies"] = {"ledger": 0}
    ended["health"] = {"ledger_backlog_rows": 7, "ledger_dropped_rows": 2}
    ended["process"] = {"process_resident_memory_bytes": 5.0, "process_cpu_seconds_total": 2.0}
    kept = counters_of(ended)
    assert kept["requests"] == {"run 200 miss": 1}
    assert kept["own_seconds"] == ended["own_seconds"]
    assert (kept["dependencies"], kept["health"]) == ({}, {"ledger_dropped_rows": 2})
    assert kept["process"] == {"process_cpu_seconds_total": 2.0}


@pytest.mark.parametrize(
    ("code", "is_up"),
    [("upstream_unreachable", 0), ("upstream_broken", 0), ("upstream_timeout", 1), ("busy", 1)],
)
def test_fal_is_down_from_a_failed_connection_until_the_next_response(
    code: str, is_up: int
) -> None:
    metrics = metrics_of(200)
    metrics.record_request(Operation.RUN, 502, "", 0.1, 0.1)
    metrics.record_error(code)
    assert metrics.snapshot()["dependencies"]["fal"] == is_up
    metrics.record_request(Operation.RUN, 499, "", 0.1, 0.1)  # the client left
    assert metrics.snapshot()["dependencies"]["fal"] == is_up
    metrics.record_request(Operation.RUN, 422, "", 0.1, 0.1)
    assert metrics.snapshot()["dependencies"]["fal"] == 1


def test_merging_one_snapshot_changes_nothing() -> None:
    snapshot = metrics_of(200).snapshot()
    assert merge_snapshots([snapshot]) == snapshot


@pytest.mark.parametrize(
    ("counts", "share", "expected"),
    [
        pytest.param({}, 0.5, None, id="nothing was metrics_of"),
        pytest.param({"a": 4}, 0.5, OWN_BOUNDS[0] / 2, id="half of the first bucket"),
        pytest.param(
            {"a": 1, "b": 1}, 1.0, OWN_BOUNDS[1], id="the maximum is the bound of the last bucket"
        ),
    ],
)
def test_a_percentile_is_estimated(
    counts: dict[str, int], share: float, expected: float | None
) -> None:
    found = quantile(timing(OWN_BOUNDS, **counts), OWN_BOUNDS, share)
    assert found == (None if expected is None else pytest.approx(expected))


def test_a_quantile_above_all_bounds_is_the_last_bound() -> None:
    full: HistogramData = {"counts": [0] * len(UPSTREAM_BOUNDS) + [3], "sum": 9000.0}
    assert quantile(full, UPSTREAM_BOUNDS, 0.5) == UPSTREAM_BOUNDS[-1]


async def test_the_metrics_agree_with_the_calls(gateway: Gateway, fal: FakeFal) -> None:
    async def respond(request: web.Request) -> web.StreamResponse:
        status = 422 if b"bad" in await request.read() else 200
        return web.json_response({}, status=status, headers={"x-fal-billable-units": "2"})

    fal.respond = respond
    for prompt in ("good", "good", "bad"):
        await (await gateway.call(RUN, json={"prompt": prompt})).read()
    await (await gateway.call("https://example.com/")).read()
    await (await gateway.call(f"{RUN}?x=1", "GET")).read()
    found = await fetch_samples(gateway)
    assert found["falproxy_requests_total{cache=,operation=run,status=200}"] == 3
    assert found["falproxy_requests_total{cache=,operation=run,status=422}"] == 1
    assert found["falproxy_requests_total{cache=,operation=none,status=412}"] == 1
    assert found["falproxy_errors_total{code=target_not_fal}"] == 1
    assert found["falproxy_request_duration_seconds_count{operation=run}"] == 4
    assert found["falproxy_upstream_duration_seconds_count{operation=run}"] == 4
    assert found["falproxy_requests_in_progress"] == 0
    assert found[f"falproxy_spent_dollars_total{{endpoint={PRICED}}}"] == pytest.approx(0.2)
    assert found["process_resident_memory_bytes"] > 2**20
    assert not any("example.com" in name for name in found)


async def test_the_cost_of_a_job_is_counted_once_for_repeated_results(
    gateway: Gateway, fal: FakeFal
) -> None:
    async def respond(request: web.Request) -> web.StreamResponse:
        document = {"request_id": "r1", "status": "IN_QUEUE"}
        units = {"x-fal-billable-units": "1"} if request.method == "GET" else {}
        return web.json_response(document, headers={"x-fal-request-id": "r1", **units})

    fal.respond = respond
    await (await gateway.call(SUBMIT, json={})).read()
    for _ in range(3):
        await (await gateway.call("https://queue.fal.run/fal-ai/flux/requests/r1", "GET")).read()
    found = await fetch_samples(gateway)
    assert found[f"falproxy_spent_dollars_total{{endpoint={PRICED}}}"] == pytest.approx(0.025)


async def test_a_disconnect_ends_the_call_in_progress(gateway: Gateway, fal: FakeFal) -> None:
    arrived: list[Metrics] = []

    async def respond(request: web.Request) -> web.StreamResponse:
        arrived.append(gateway.client.app[METRICS])
        assert arrived[0].in_progress == 1
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b"begun")
        assert request.transport is not None
        request.transport.abort()
        return response

    fal.respond = respond
    with pytest.raises(Exception):  # noqa: B017, PT011  # the connection is reset, reported in several ways
        await (await gateway.call(RUN, json={})).read()
    assert arrived[0].in_progress == 0


async def test_openmetrics_is_written_if_accepted(gateway: Gateway) -> None:
    await (await gateway.call(RUN, json={})).read()
    kind = "application/openmetrics-text; version=1.0.0; charset=utf-8"
    text = await fetch_metrics(gateway, kind)
    assert text.endswith("# EOF\n")
    parsed = parse_openmetrics(text)  # type: ignore[no-untyped-call]  # the package has no types
    families = {family.name for family in parsed}
    assert {"falproxy_requests", "falproxy_request_duration_seconds", "falproxy_build"} <= families


async def test_metric_names_have_units_and_counters_their_suffix(gateway: Gateway) -> None:
    text = await fetch_metrics(gateway)
    for family in parse_metrics(text):
        assert family.documentation
        if family.type == "counter":
            assert f"# TYPE {family.name}_total counter" in text or "cpu_seconds" in family.name
        if family.type == "histogram":
            assert family.name.endswith("_seconds")


async def test_dependencies_and_keys_are_shown(make_gateway: MakeGateway, fal: FakeFal) -> None:
    gateway = await make_gateway(fal.origin, ai_keys=("a:b", "c:d"), rate=(100, Window(60)))
    await (await gateway.call(SUBMIT, json={})).read()
    up = {
        name: value
        for name, value in (await fetch_samples(gateway)).items()
        if name.startswith("falproxy_dependency_up")
    }
    expected = ("cache", "fal", "idempotency", "ledger", "limits", "owners")
    assert up == {f"falproxy_dependency_up{{dependency={name}}}": 1 for name in expected}
    found = await fetch_samples(gateway)
    assert (found["falproxy_fal_keys"], found["falproxy_fal_keys_resting"]) == (2, 0)


async def test_an_unreachable_fal_is_shown(make_gateway: MakeGateway) -> None:
    gateway = await make_gateway(f"http://127.0.0.1:{free_port()}")
    assert (await gateway.call(RUN, json={})).status == 502
    found = await fetch_samples(gateway)
    assert found["falproxy_dependency_up{dependency=fal}"] == 0


async def test_a_broken_ledger_and_its_backlog_are_shown(
    make_gateway: MakeGateway, fal: FakeFal, tmp_path: Path
) -> None:
    (tmp_path / "ledger.sqlite").write_text("no database" * 1000)
    gateway = await make_gateway(fal.origin)
    await (await gateway.call(RUN, json={})).read()
    found = await fetch_samples(gateway)
    assert found["falproxy_dependency_up{dependency=ledger}"] == 0
    assert found["falproxy_ledger_backlog_rows"] == 1


async def test_other_workers_are_included(make_gateway: MakeGateway, fal: FakeFal) -> None:
    gateway = await make_gateway(fal.origin)
    other = metrics_of(200).snapshot()

    async def siblings() -> list[Snapshot]:
        return [other, other]

    with pytest.warns(
        DeprecationWarning, match="started"
    ):  # a test comes late: the application runs already
        gateway.client.app[WORKER_SNAPSHOTS] = siblings
    found = await fetch_samples(gateway)
    assert found["falproxy_requests_total{cache=miss,operation=run,status=200}"] == 2


@pytest.mark.parametrize(
    ("key", "admins", "status"),
    [
        pytest.param(None, ("ann",), 401, id="an unknown caller"),
        pytest.param("s3cret-ann", ("ann",), 200, id="an admin"),
        pytest.param("s3cret-bob", ("ann",), 403, id="another caller"),
        pytest.param("s3cret-ann", (), 403, id="no admins configured"),
    ],
)
async def test_metrics_of_a_locked_proxy_are_for_admins(
    make_gateway: MakeGateway, fal: FakeFal, key: str | None, admins: tuple[str, ...], status: int
) -> None:
    gateway = await make_gateway(fal.origin, access_keys=KEYS, admins=admins)
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    response = await gateway.client.get("/metrics", headers=headers)
    assert response.status == status
    if status == 403:
        assert "FALPROXY_ADMINS" in await response.text()


def test_counting_a_poll_stays_cheap(capsys: pytest.CaptureFixture[str]) -> None:
    """The budget is two microseconds; a busy machine may take ten times that."""
    metrics, polls = Metrics(), 50_000
    started = time.process_time()
    for _ in range(polls):
        metrics.record_request(Operation.STATUS, 200, "", 0.0004, 0.012)
    cost = (time.process_time() - started) / polls
    assert cost < 20e-6, f"{cost * 1e6:.2f} µs"
