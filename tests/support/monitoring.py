"""The Prometheus files and the Grafana board of `deploy`."""

import json
import re
from collections.abc import Iterator
from typing import Any

import yaml

from tests.support.paths import ROOT

RULES_FILE = ROOT / "deploy/prometheus/alerts.yml"
BOARD_FILE = ROOT / "deploy/grafana/dashboards/falproxy.json"
METRIC = re.compile(r"\b((?:falproxy|process|node)_[a-z_]+)\b(?!\s*=)")


def alerts() -> dict[str, str]:
    """Return the query of each alert rule by its name."""
    (group,) = yaml.safe_load(RULES_FILE.read_text())["groups"]
    return {rule["alert"]: rule["expr"] for rule in group["rules"]}


def board() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(BOARD_FILE.read_text())
    return loaded


def panel_queries() -> Iterator[tuple[str, str]]:
    """Yield the title of each panel with one of its queries."""
    for panel in board()["panels"]:
        for target in panel.get("targets", ()):
            yield panel["title"], target["expr"]


def metrics_of(query: str) -> set[str]:
    """Return the names of the metrics that a query reads, without the suffixes of histograms."""
    return {re.sub("_(bucket|sum|count)$", "", name) for name in METRIC.findall(query)}
