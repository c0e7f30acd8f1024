"""The table in Markdown, for bench/RESULTS.md."""

import re
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

from compare.candidates import CANDIDATES, TWO_WORKERS, Candidate
from compare.goals import Goal, goals_of, percent
from compare.machine import machine, versions
from compare.process import MIB
from compare.results import DIRECT, REFERENCE, Results, Spread

BEGIN, END = "<!-- reading -->", "<!-- /reading -->"
READING = "These numbers have not been interpreted yet."
MB = 1_000_000
LOADS = {
    "polls": "status poll",
    "new": "poll, new head",
    "strangers": "poll, new head and browser",
    "tokens": "status poll with a JWT",
    "submits": "submit",
    "limited": "submit with limits",
    "mixed": "mixed",
    "responses": "3 MB responses",
    "uploads": "8 MB uploads",
}
SCENARIO_TITLES = {
    **LOADS,
    "streams": "500 streams",
    "latency": "1 connection",
    "starts": "start",
    "workers": "2 workers",
}
INTRODUCTION = """\
falproxy and its peers as proxies to the same upstream: a server in the role of fal, over TLS on
the same machine, with a private CA, in a private network and mount namespace. `make bench` repeats
the measurement and writes this file, except for the interpretation at its end.
"""
METHOD = """\
* One process or worker each, pinned to the first core; load and upstream have the other. `x/s` is
  **requests per CPU second** of the candidate's whole process tree (user and system time), so
  that the load of other processes does not matter; then the share of nginx's in the same repeat
  (median, lowest and highest of {repeats}), then the largest RSS of the tree.
* Slices of {seconds} s of all candidates take turns, every other round backwards, after a
  warm-up. Polls and submits: wrk, 64 connections, counted in the middle of its run. Responses and
  uploads: 16 at a time; calls in progress at the end are completed and counted. A candidate with
  a response of another status than 200, or of the wrong length, is left out of that scenario. An
  upload is a run with an image in it, which falproxy checks before it sends it on; the others do
  not.
* Polls name 1,024 jobs of 64 users in turn, in requests of some 900 bytes as browsers send them.
  New head: each poll names another job. New head and browser: its cookie is new as well. With
  limits: submits with an access key, a rate, a budget of the caller and one of all. Mixed: 10 %
  submits, 80 % polls of which each head comes 12 times, 10 % results.
* With a JWT: a poll has the token of a Supabase user, which falproxy verifies, and the job has to
  be that user's. The others ignore the token.
* 1 connection: 300 polls one after the other, in {repeats} turns; what is added is the difference
  of medians to nginx's in the same turn. 500 streams: an event of 0.2 KB each 0.1 s for 6 s,
  delay from the upstream's `write` to the client's `read`, the median of up to 3 turns. Start:
  from exec to the first response of the upstream, median of 7; idle is the RSS 2 s after it.
* nginx: keep-alive and TLS sessions towards the upstream, the target by a map over two hosts (it
  can do no more of what falproxy does), uploads passed on as they arrive in pieces of 256 KB, a
  buffered access log; for the streams `proxy_buffering off`. falproxy: its defaults, one line of
  log a call to a file. "Every option on": access key, allowed endpoints, CORS with an `Origin`,
  images behind addresses checked, the result cache (for Kontext, as by default: the model called
  here is another), outputs stored on the disk, the ledger.
* server-proxy: as in its README, `express.json` with a limit of 100 MB instead of its 100 kB; no
  log. FastAPI and aiohttp: the usual forty lines ([`peers/`](peers)), uvicorn with uvloop,
  httptools and its access log; aiohttp on asyncio's own loop, no log.
"""
NOTHING = "\N{EN DASH}"


def write_report(results: Results, candidates: tuple[Candidate, ...], options: Namespace) -> None:
    """Write to the output file, keeping its interpretation, or to standard output."""
    output: Path | None = options.output
    old = output.read_text() if output and output.exists() else ""
    interpretation = re.search(f"{BEGIN}\n(.*)\n{END}", old, re.DOTALL)
    reading = interpretation[1] if interpretation else READING
    text = "\n".join(report(results, candidates, options, reading))
    if output:
        output.write_text(text)
    else:
        sys.stdout.write(text)


def report(
    results: Results, candidates: tuple[Candidate, ...], options: Namespace, reading: str
) -> Iterator[str]:
    yield "# falproxy beside its peers\n"
    yield INTRODUCTION
    yield f"{time.strftime('%Y-%m-%d')}, {machine()}. "
    yield ", ".join(f"{name} {text}" for name, text in versions().items()) + ".\n"
    yield from table(results, candidates)
    yield from footnotes(results)
    yield from workers(results)
    yield "## Goals\n"
    yield from goal_table(list(goals_of(results)))
    yield "\n## How it was measured\n"
    yield METHOD.format(repeats=options.repeats, seconds=options.seconds)
    yield "## Discussion\n"
    yield f"{BEGIN}\n{reading}\n{END}\n"


def table(results: Results, candidates: tuple[Candidate, ...]) -> Iterator[str]:
    columns: dict[str, Callable[[str], str]] = {
        f"{title}, x/s": load_cell(results, scenario)
        for scenario, title in LOADS.items()
        if scenario in results.loads
    }
    if results.streams:
        columns["500 streams: delay p50 / p99, KB each"] = stream_cell(results)
    if results.latencies:
        columns["1 connection: p50 / p99, p50 added"] = latency_cell(results)
    if results.starts:
        columns["start, idle RSS"] = start_cell(results)
    yield "| | " + " | ".join(columns) + " |"
    yield "|---" + "|--:" * len(columns) + "|"
    for candidate in candidates:
        cells = (show(candidate.name) for show in columns.values())
        yield f"| {candidate.title} | " + " | ".join(cells) + " |"
    if results.latencies.get(DIRECT):
        cells = (latency_cell(results)(DIRECT) if "p50 added" in title else "" for title in columns)
        yield "| no proxy at all | " + " | ".join(cells) + " |"
    yield ""


def load_cell(results: Results, scenario: str) -> Callable[[str], str]:
    def show(name: str) -> str:
        rates = results.rates(scenario, name)
        peak = results.peak(scenario, name)
        if not rates or peak is None:
            return missing(results, scenario, name)
        share = spread(results.ratio(scenario, name), percent)
        return f"{number(median(rates))}{share} · {peak * MIB / MB:.0f} MB"

    return show


def stream_cell(results: Results) -> Callable[[str], str]:
    def show(name: str) -> str:
        samples = results.streams.get(name)
        if not samples:
            return missing(results, "streams", name)
        p50, p99 = (
            median(values) for values in zip(*((s.p50, s.p99) for s in samples), strict=True)
        )
        size = max(sample.size for sample in samples)
        lost = sum(sample.lost for sample in samples)
        text = f"{p50:.1f} / {p99:.1f} ms · {size:.0f} KB"
        return f"{text} · {lost} lost" if lost else text

    return show


def latency_cell(results: Results) -> Callable[[str], str]:
    def show(name: str) -> str:
        samples = results.latencies.get(name)
        if not samples:
            return missing(results, "latency", name)
        p50, p99 = median(s.p50 for s in samples), median(s.p99 for s in samples)
        added = results.added(name)
        more = f" · {added.middle * 1000:+.0f}" if added and name != REFERENCE else ""
        return f"{p50 * 1000:.0f} / {p99 * 1000:.0f}{more} µs"

    return show


def start_cell(results: Results) -> Callable[[str], str]:
    def show(name: str) -> str:
        samples = results.starts.get(name)
        if not samples:
            return missing(results, "starts", name)
        seconds = median(sample.seconds for sample in samples)
        idle = median(sample.idle for sample in samples if sample.idle is not None)
        return f"{seconds * 1000:.0f} ms · {idle * MIB / MB:.0f} MB"

    return show


def spread(value: Spread | None, show: Callable[[float], str]) -> str:
    if value is None or value.middle == value.low == value.high == 1:
        return ""
    return f" · {show(value.middle)} ({show(value.low)} to {show(value.high)})"


def number(value: float) -> str:
    return f"{value:,.0f}".replace(",", " ")


def missing(results: Results, scenario: str, name: str) -> str:
    notes = list(results.notes)
    if (scenario, name) not in notes:
        return NOTHING
    return f"{NOTHING} [{notes.index((scenario, name)) + 1}]"


def footnotes(results: Results) -> Iterator[str]:
    titles = {candidate.name: candidate.title for candidate in (*CANDIDATES, TWO_WORKERS)}
    for place, ((scenario, name), text) in enumerate(results.notes.items(), start=1):
        yield f"[{place}] {titles[name]}, {SCENARIO_TITLES[scenario]}: {text}.\n"


def workers(results: Results) -> Iterator[str]:
    """Yield the table of two workers beside one, with requests per second of wall time."""
    loads = results.loads.get("workers", {})
    if len(loads) < 2:
        return
    yield "| status poll | per CPU second | per second |\n|---|--:|--:|"
    for name, title in (("falproxy", "1 worker"), (TWO_WORKERS.name, "2 workers")):
        rates, samples = results.rates("workers", name), loads[name]
        wall = median(sample.requests / sample.wall for sample in samples)
        yield f"| {title} | {number(median(rates))} | {number(wall)} |"
    yield "\nThe two share both cores with the load and the upstream here.\n"


def goal_table(goals: list[Goal]) -> Iterator[str]:
    yield "| | goal | reached | |\n|---|--:|--:|---|"
    for goal in goals:
        verdict = "yes" if goal.is_met else "**no**"
        yield f"| {goal.title} | {goal.wanted} | {goal.reached} | {verdict} |"
