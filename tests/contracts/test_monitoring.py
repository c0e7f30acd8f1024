"""Alert rules and board of `deploy`: they read metrics that exist, and alert when they should."""

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from falproxy.metrics import HEALTH, Metrics
from falproxy.web.prometheus import render_metrics
from tests.support.js_world import need
from tests.support.monitoring import RULES_FILE, alerts, board, metrics_of, panel_queries
from tests.support.paths import ROOT

PROMETHEUS: dict[str, Any] = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text())
NODE_METRICS = {"node_filesystem_avail_bytes", "node_filesystem_size_bytes"}
QUERIES = [*alerts().items(), *panel_queries()]

INSTANCE = 'instance="proxy-1:8080",job="falproxy"'
REQUESTS = f"falproxy_requests_total{{{INSTANCE},operation"
ERRORS = f"falproxy_errors_total{{{INSTANCE},code"
BUCKET = f'falproxy_request_duration_seconds_bucket{{{INSTANCE},operation="status",le'
FREE = 'node_filesystem_{}_bytes{{fstype="ext4",mountpoint="/"}}'
Series = dict[str, str]
# Each minute for half an hour: first value, step, number of steps.
HEALTHY: Series = {
    f"up{{{INSTANCE}}}": "1x30",
    f'{REQUESTS}="run",status="200"}}': "0+60x30",
    f'{REQUESTS}="status",status="200"}}': "0+600x30",
    f'{REQUESTS}="run",status="422"}}': "0+60x30",
    f'{ERRORS}="upstream_unreachable"}}': "0+1x30",
    f'{BUCKET}="0.001"}}': "0+600x30",
    f'{BUCKET}="+Inf"}}': "0+600x30",
    f'falproxy_dependency_up{{{INSTANCE},dependency="redis"}}': "1x30",
    f"falproxy_fal_keys_resting{{{INSTANCE}}}": "0x30",
    f'falproxy_budget_used_ratio{{{INSTANCE},scope="principal"}}': "0.5x30",
    f'falproxy_rehosted_files_total{{{INSTANCE},outcome="failed"}}': "3x30",
    f'falproxy_closed_connections_total{{{INSTANCE},reason="limit"}}': "3x30",
    f"process_open_fds{{{INSTANCE}}}": "100x30",
    f"process_max_fds{{{INSTANCE}}}": "1000x30",
    FREE.format("avail"): "50x30",
    FREE.format("size"): "100x30",
}
# What is different from the healthy series when an alert has to fire.
TROUBLE: dict[str, Series] = {
    "FalproxyDown": {f"up{{{INSTANCE}}}": "0x30"},
    "FalproxyErrorRate": {f'{REQUESTS}="run",status="504"}}': "0+60x30"},
    "FalproxySlow": {f'{BUCKET}="0.001"}}': "0x30", f'{BUCKET}="0.25"}}': "0+600x30"},
    "FalDown": {f'{ERRORS}="upstream_unreachable"}}': "0+500x30"},
    "FalproxyDependencyDown": {f'falproxy_dependency_up{{{INSTANCE},dependency="redis"}}': "0x30"},
    "FalKeysResting": {f"falproxy_fal_keys_resting{{{INSTANCE}}}": "1x30"},
    "FalproxyBudget": {f'falproxy_budget_used_ratio{{{INSTANCE},scope="principal"}}': "0.9x30"},
    "FalproxyOutputsNotStored": {
        f'falproxy_rehosted_files_total{{{INSTANCE},outcome="failed"}}': "0+1x30"
    },
    "FalproxyConnections": {
        f'falproxy_closed_connections_total{{{INSTANCE},reason="limit"}}': "0+1x30"
    },
    "FalproxyOpenFiles": {f"process_open_fds{{{INSTANCE}}}": "900x30"},
    "DiskFull": {FREE.format("avail"): "5x30"},
}


def known_metrics() -> set[str]:
    metrics = Metrics()
    metrics.health |= {name: lambda: 0 for name in HEALTH}  # of the parts of an application
    text = render_metrics(metrics.snapshot(), "")[0].decode()
    return {*re.findall(r"^# TYPE (\S+)", text, re.MULTILINE)} | NODE_METRICS


@pytest.mark.parametrize(("name", "query"), QUERIES)
def test_queries_read_metrics_that_exist(name: str, query: str) -> None:
    names = metrics_of(query)
    assert names or "up{" in query
    assert names <= known_metrics(), name


def test_the_board_uses_the_provisioned_data_source() -> None:
    path = "deploy/grafana/provisioning/datasources/prometheus.yml"
    (source,) = yaml.safe_load((ROOT / path).read_text())["datasources"]
    used = {target["datasource"]["uid"] for panel in board()["panels"] for target in
            panel.get("targets", ())}  # fmt: skip
    assert used == {source["uid"]}
    panels = [panel["id"] for panel in board()["panels"]]
    assert len(panels) == len({*panels})


def test_panels_do_not_overlap() -> None:
    cells = [
        (x, y)
        for panel in board()["panels"]
        for at in [panel["gridPos"]]
        for x in range(at["x"], at["x"] + at["w"])
        for y in range(at["y"], at["y"] + at["h"])
    ]
    assert len(cells) == len({*cells})
    assert max(x for x, _ in cells) < 24


def test_prometheus_reads_the_key_from_a_file() -> None:
    proxies, _ = PROMETHEUS["scrape_configs"]
    assert proxies["authorization"] == {"credentials_file": "/run/secrets/metrics_key"}
    assert PROMETHEUS["rule_files"] == [RULES_FILE.name]


def play(folder: Path, series: Series, firing: dict[str, int]) -> None:
    """Evaluate the rules over the series, and compare the number of alerts that fire at the end."""
    need(Path("promtool"))
    expected = [
        {
            "expr": f'count(ALERTS{{alertname="{name}",alertstate="firing"}})',
            "eval_time": "30m",
            "exp_samples": [{"labels": "{}", "value": count}] if count else [],
        }
        for name, count in firing.items()
    ]
    inputs = [{"series": name, "values": values} for name, values in series.items()]
    test = {"interval": "1m", "input_series": inputs, "promql_expr_test": expected}
    file = folder / "test.yml"
    file.write_text(yaml.safe_dump({"rule_files": [str(RULES_FILE)], "tests": [test]}))
    result = subprocess.run(
        ["promtool", "test", "rules", str(file)], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_no_alert_fires_while_all_is_well(tmp_path: Path) -> None:
    play(tmp_path, HEALTHY, dict.fromkeys(alerts(), 0))


@pytest.mark.parametrize("alert", alerts())
def test_an_alert_fires_alone(alert: str, tmp_path: Path) -> None:
    quiet = dict.fromkeys(alerts(), 0)
    play(tmp_path, HEALTHY | TROUBLE[alert], quiet | {alert: 1})


def test_no_alert_fires_without_calls(tmp_path: Path) -> None:
    idle = {name: re.sub(r"\+\d+", "", values) for name, values in HEALTHY.items()}
    play(tmp_path, idle, dict.fromkeys(alerts(), 0))
