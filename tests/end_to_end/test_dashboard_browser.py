"""The dashboard in Chromium: its numbers equal those of `falproxy usage` and /metrics."""

import base64
import io
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from falproxy import __version__
from falproxy.stores.ledger import ProcessStart
from falproxy.stores.ledger.sqlite import sqlite_ledger
from falproxy.windows import WINDOWS
from tests.support.chromium import Chromium
from tests.support.js_world import JS, need
from tests.support.running_proxy import RunningProxy, open_running_proxy
from tests.support.usage import count_calls, run_usage, wait_until_equal
from tests.support.waiting import wait_until_window_lasts

pytestmark = pytest.mark.slow(seconds=6)

NONE = "\u2013"
KONTEXT = "fal-ai/flux-pro/kontext"
KEYS = (("ann", "s3cret-ann"), ("bob", "s3cret-bob"))
VISIT_SECONDS = 60  # of the longest visit, on a busy machine
# Of a visit, in this order.
PARTS = ("appearance", "chart", "csv", "pause", "list", "hour")


def image_data_uri() -> str:
    file = io.BytesIO()
    Image.new("RGB", (64, 48), "red").save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


CALLS = (
    ("fal-ai/flux/dev", {"prompt": "a lighthouse"}, 200),
    ("fal-ai/flux/dev", {"prompt": "!error 422 content_policy_violation"}, 422),
    (KONTEXT, {"prompt": "autumn", "image_url": image_data_uri()}, 200),
    (KONTEXT, {"prompt": "autumn", "image_url": image_data_uri()}, 200),
)


async def call_all(place: RunningProxy, **headers: str) -> None:
    for endpoint, body, status in CALLS:
        url = f"{place.origin}/api/fal/run/{endpoint}"
        async with place.session.post(url, json=body, headers=headers) as response:
            assert response.status == status, await response.text()
    await wait_until_equal(lambda: count_calls(place.session, place.origin, **headers), len(CALLS))


async def visit(
    chromium: Chromium,
    origin: str,
    key: str | None = None,
    *,
    manages_keys: bool = False,
    parts: Sequence[str] = PARTS,
) -> Any:
    """Return what the dashboard shows, as reported by dashboard.mjs. parts: what is done beside
    reading the numbers."""
    need(JS / "node_modules" / "axe-core")
    shown = await chromium.play(
        scenario="dashboard.visit",
        gateway=origin,
        key=key,
        managesKeys=manages_keys,
        parts=parts,
    )
    assert shown["violations"] == []
    assert shown["consoleErrors"] == []
    assert shown["origins"] == [origin.removesuffix("/deep/er")]
    return shown


async def metric(place: RunningProxy, name: str, **labels: str) -> float:
    """Return the sum of the samples of a metric that have these labels."""
    async with place.session.get(f"{place.origin}/metrics") as response:
        text = await response.text()
    return sum(
        sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    )


@pytest.mark.parametrize(
    ("prefix", "parts"),
    [
        pytest.param("", PARTS, id="at the root"),
        pytest.param("/deep/er", PARTS[1:], id="with a prefix"),  # it looks the same
    ],
)
async def test_the_numbers_equal_those_of_the_command_line_and_the_metrics(
    chromium: Chromium, tmp_path: Path, prefix: str, parts: Sequence[str]
) -> None:
    async with open_running_proxy(tmp_path, prefix) as place:
        await call_all(place)
        shown = await visit(chromium, place.origin, parts=parts)
        _, out, _ = await run_usage("--json", "--since", "24h", folder=tmp_path)
        report = json.loads(out)
        spent = await metric(place, "falproxy_spent_dollars_total")
        saved = await metric(place, "falproxy_saved_dollars_total")
        runs = await metric(place, "falproxy_requests_total", operation="run")
        hits = await metric(place, "falproxy_requests_total", cache="hit")
    tiles = {name: texts[0] for name, texts in shown["tiles"].items()}
    totals = report["totals"]
    assert tiles["calls"] == str(totals["calls"]) == f"{runs:g}" == "4"
    assert tiles["errors"] == str(totals["errors"]) == "1"
    assert tiles["hits"] == "50%"
    assert (totals["hits"], hits) == (1, 1)
    assert tiles["spent"] == f"${totals['spent']}" == f"${spent:g}" == "$0.065"
    assert tiles["saved"] == f"${totals['saved']:.2f}" == f"${saved:.2f}" == "$0.04"
    rows = {row[0]: row[1:6] for row in shown["endpoints"]}
    assert rows == {
        KONTEXT: ["2", "0", "50%", "$0.04", "$0.04"],
        "fal-ai/flux/dev": ["2", "1", NONE, "$0.025", "$0.00"],
    }
    assert {row[0] for row in shown["live"]} == {"run", "all"}
    failed = "422 content_policy_violation"
    assert [row[2] for row in shown["latest"]] == ["200", "200", failed, "200"]
    assert not shown["isEmpty"]
    assert all(" ms" in text or " s" in text for text in shown["tiles"]["latency"][:1])
    jobs, _, jobs_before = shown["tiles"]["in-flight"]
    assert (jobs, jobs_before) == ("0", "0 before")
    assert any(text.startswith("fal.ai") and "works" in text for text in shown["states"])


async def test_a_failure_leads_to_its_calls_and_their_details(
    chromium: Chromium, tmp_path: Path
) -> None:
    async with open_running_proxy(tmp_path) as place:
        await call_all(place)
        shown = await visit(chromium, place.origin, parts=["list"])
    ((status, error, calls, before, *_),) = shown["failures"]
    assert (status, calls, before) == ("422", "1", "new")
    assert error.split() == ["content_policy_violation", "fal-ai/flux/dev"]
    listed = shown["list"]
    assert listed["violations"] == []
    assert listed["focused"].startswith("Show the calls with content_policy_violation of")
    assert listed["filtered"] == ["422 content_policy_violation"]
    for part in ("status=422", "error=content_policy_violation", "endpoint=fal-ai%2Fflux%2Fdev"):
        assert part in listed["url"]
        assert part not in listed["cleared"]
    assert listed["expanded"] == "true"
    assert listed["steps"] == ["Received", "Sent to fal.ai", "Failed with content_policy_violation"]
    assert listed["copied"] in listed["facts"]
    head, row, rest = listed["csv"].split("\r\n")
    assert head.startswith("at,endpoint,operation,status,error,")
    assert ",fal-ai/flux/dev,run,422,content_policy_violation," in row
    assert listed["copied"] in row
    assert rest == ""


async def test_a_chart_is_read_by_keyboard_and_the_time_range_is_changed(
    chromium: Chromium,
    tmp_path: Path,
) -> None:
    async with open_running_proxy(tmp_path) as place:
        await call_all(place)
        shown = await visit(chromium, place.origin, parts=["chart", "pause", "hour"])
    first, before, oldest, last = shown["chart"]["announced"]
    assert first == last
    assert len({first, before, oldest}) == 3
    assert shown["chart"]["tooltip"] == last
    assert sum("calls 0" in text for text in (before, oldest)) >= 1
    assert (shown["points"], shown["hour"]["points"]) in {(25, 61), (24, 60), (25, 60), (24, 61)}
    assert shown["hour"]["tiles"]["calls"][0] == "4"
    assert shown["url"].endswith("/dashboard?range=hour")
    assert shown["usageQueries"][0] == "?since=24h"
    assert shown["usageQueries"][-1] == "?since=1h"
    assert shown["pause"]["pressed"] == "true"
    assert "paused" in shown["pause"]["text"]


@pytest.mark.parametrize("after", [0, 1800, 3599], ids=lambda seconds: f"{seconds} s")
async def test_deploys_and_restarts_are_marked_in_the_charts(
    chromium: Chromium, tmp_path: Path, after: int
) -> None:
    """With the pointer, by keyboard, and in the table for screen readers. after: the start of an
    hour, the interval of the chart."""
    started = (time.time() // 3600 - 5) * 3600 + after
    parts = ["appearance", "chart"] if after == 0 else ["chart"]
    async with open_running_proxy(tmp_path) as place:
        async with sqlite_ledger(tmp_path / "ledger.sqlite") as ledger:
            for version, host, hours in (
                ("0.0.8", "a", 30),  # before the day that is shown
                ("0.0.8", "a", 2),
                ("0.0.9", "a", 0),
                ("0.0.9", "b", 0),
            ):
                await ledger.add_start(ProcessStart(version, host, started - hours * 3600))
        await call_all(place)
        shown = (await visit(chromium, place.origin, parts=parts))["chart"]["starts"]
    restart = "0.0.8 started on 1 process, "
    deploy = "new version 0.0.9 started on 2 processes of 2 hosts, "
    own = f"new version {__version__} started on 1 process, "
    assert shown["classes"] == ["restart", "deploy", "deploy"]
    for texts in (shown["announced"], shown["hovered"], shown["table"], shown["otherCharts"]):
        found = [text for text in texts if "started on" in text]
        assert len(found) == 3, texts
        assert all(part in text for part, text in zip((restart, deploy, own), found, strict=True))
    assert all("calls " in text for text in shown["announced"])
    assert shown["note"]


async def test_each_panel_has_its_numbers_as_csv_and_the_request_for_them(
    chromium: Chromium,
    tmp_path: Path,
) -> None:
    """And callers and users have the bars of their budgets, those of keys their own."""
    admin = {"x-falproxy-key": "s3cret-ann"}
    await wait_until_window_lasts(WINDOWS["day"], VISIT_SECONDS)  # weeks begin with a day
    async with open_running_proxy(
        tmp_path,
        access_keys=KEYS,
        admins=("ann",),
        budget=(100_000, WINDOWS["day"]),
        user_budget=(70_000, WINDOWS["week"]),
    ) as place:
        await call_all(place, **admin, **{"x-falproxy-user": "ada"})
        new_key = {"name": "batch", "budget": "1/month"}
        async with place.session.post(
            f"{place.origin}/api/keys", json=new_key, headers=admin
        ) as response:
            assert response.status == 201
        shown = await visit(chromium, place.origin, "s3cret-ann", parts=["appearance", "csv"])
        for request in shown["api"]:
            method, _, path = request.partition(" ")
            assert method == "GET"
            async with place.session.get(f"{place.origin}/{path}", headers=admin) as response:
                assert response.status == 200, request
    assert {request.partition("?")[0] for request in shown["api"]} == {
        f"GET api/{name}"
        for name in ("usage", "usage/performance", "usage/state", "usage/calls", "keys")
    }
    files = {name.removeprefix("falproxy-"): lines for name, lines in shown["csv"].items()}
    assert {*files} == {
        f"{name}.csv"
        for name in (
            "calls-chart", "failures", "endpoints", "routes", "principals", "users", "keys",
            "latency",
        )
    }  # fmt: skip
    assert all(len(lines) > 1 for lines in files.values())
    calls = [line.split(",") for line in files["calls-chart.csv"]]
    assert calls[0] == ["from", "calls", "errors"]
    assert sum(int(row[1]) for row in calls[1:]) == 4
    assert files["keys.csv"][1].startswith("batch,active,")
    assert [row[-1].split() for row in shown["principals"]] == [["$0.10/day", "$0.065", "spent"]]
    assert [row[-1].split() for row in shown["users"]] == [["$0.07/week", "$0.065", "spent"]]


async def test_without_calls_instructions_are_shown(chromium: Chromium, tmp_path: Path) -> None:
    async with open_running_proxy(tmp_path) as place:
        shown = await visit(chromium, place.origin)
    assert shown["isEmpty"]
    assert shown["tiles"]["calls"][0] == "0"
    assert shown["tiles"]["hits"][0] == NONE
    assert shown["endpoints"] == []


@pytest.mark.parametrize(
    ("name", "calls", "scope"),
    [
        pytest.param("ann", "4", "Calls of all callers", id="an admin"),
        pytest.param("bob", "0", "Your calls, bob", id="another caller"),
    ],
)
async def test_a_proxy_with_access_keys_requires_one(
    chromium: Chromium, tmp_path: Path, name: str, calls: str, scope: str
) -> None:
    async with open_running_proxy(tmp_path, access_keys=KEYS, admins=("ann",)) as place:
        await call_all(place, **{"x-falproxy-key": "s3cret-ann", "x-falproxy-user": "ada"})
        shown = await visit(chromium, place.origin, f"s3cret-{name}")
    assert shown["tiles"]["calls"][0] == calls
    assert shown["scope"] == scope
    assert [row[:3] for row in shown["users"]] == ([["ada", "ann", "4"]] if name == "ann" else [])
    assert bool(shown["live"]) is (name == "ann")
    assert shown["hasKeys"] is (name == "ann")


async def test_an_admin_creates_rotates_and_revokes_a_key(
    chromium: Chromium, tmp_path: Path
) -> None:
    async with open_running_proxy(tmp_path, access_keys=KEYS, admins=("ann",)) as place:
        await call_all(place, **{"x-falproxy-key": "s3cret-ann"})
        async with place.session.post(
            f"{place.origin}/api/keys",
            json={"name": "batch"},
            headers={"x-falproxy-key": "s3cret-ann"},
        ) as response:
            assert response.status == 201
        shown = await visit(
            chromium, place.origin, "s3cret-ann", manages_keys=True, parts=["appearance"]
        )
        keys = shown["keys"]
        statuses = []
        for secret in (keys["created"]["secret"], keys["rotated"]["secret"]):
            headers = {"x-falproxy-key": secret}
            async with place.session.get(f"{place.origin}/api/usage", headers=headers) as response:
                statuses.append(response.status)
    assert "must be like 60/minute" in keys["message"]
    for step in ("created", "rotated"):
        assert keys[step]["secret"].startswith("fpx_")
        assert keys[step]["clipboard"] == keys[step]["secret"]
    assert keys["created"]["secret"] != keys["rotated"]["secret"]
    *before, last = keys["tables"]
    budget = "$5.00/day\n$0.00 spent"
    limits = ["active", "60/minute", "8", budget, "fal-ai/flux*, fal-ai/kling/**", "never"]
    assert [rows[1][:7] for rows in before] == [["web", *limits]] * 3
    assert [row[0] for row in last] == ["batch"]
    assert not keys["isSecretLeft"]
    assert statuses == [401, 401]


async def test_an_open_proxy_shows_no_keys(chromium: Chromium, tmp_path: Path) -> None:
    async with open_running_proxy(tmp_path) as place:
        assert not (await visit(chromium, place.origin, parts=[]))["hasKeys"]
