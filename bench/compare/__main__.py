"""`python -m compare`: measures falproxy beside its peers and writes the table.

It takes about 25 minutes, runs on loopback only, and leaves nothing behind.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import uvloop

from compare.candidates import CANDIDATES, Candidate
from compare.certificates import write_certificates
from compare.goals import goals_of
from compare.namespace import namespace_command, run_inside, settle
from compare.process import PARTS
from compare.report import write_report
from compare.results import Results
from compare.scenarios import SCENARIOS, Plan
from compare.upstream import Upstream

FOLDER = "FALPROXY_BENCH_FOLDER"  # set for the run inside the namespaces
NEEDED = ("nginx", "wrk", "taskset")


def parse_arguments() -> argparse.Namespace:
    names = [candidate.name for candidate in CANDIDATES]
    parser = argparse.ArgumentParser(prog="compare", description=__doc__)
    parser.add_argument("--only", help=f"some of {','.join(SCENARIOS)}", default="")
    parser.add_argument("--candidates", help=f"some of {','.join(names)}", default="")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=int, default=2, help="of a slice")
    parser.add_argument("--output", type=Path, help="the table's file (default: standard output)")
    parser.add_argument("--samples", type=Path, help="a file for all samples, as JSON")
    options = parser.parse_args()
    options.only = select(parser, options.only, list(SCENARIOS))
    options.candidates = select(parser, options.candidates, names)
    return options


def select(parser: argparse.ArgumentParser, names: str, known: list[str]) -> list[str]:
    selected = names.split(",") if names else known
    if unknown := set(selected) - set(known):
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    return [name for name in known if name in selected]


def present(names: list[str]) -> tuple[Candidate, ...]:
    """Return the candidates that can be started here, and report the others."""
    wanted = [candidate for candidate in CANDIDATES if candidate.name in names]
    for candidate in wanted:
        if not candidate.is_installed:
            say(f"Left out: {candidate.title} (there is no {candidate.needs})")
    return tuple(candidate for candidate in wanted if candidate.is_installed)


def say(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


async def measure(options: argparse.Namespace, folder: Path) -> int:
    settle(folder)
    write_certificates(folder)
    os.sched_setaffinity(0, PARTS["load"])
    results = Results()
    async with Upstream.running(folder) as upstream:
        plan = Plan(
            present(options.candidates),
            options.repeats,
            options.seconds,
            folder,
            upstream,
            results,
            say,
        )
        for name in options.only:
            say(f"== {name}")
            await SCENARIOS[name](plan)
    if options.samples:
        options.samples.write_text(json.dumps(samples_of(results), indent=1))
    write_report(results, plan.candidates, options)
    for goal in goals_of(results):
        say(str(goal))
    return int(any(name.startswith(("nginx", "falproxy")) for _, name in results.notes))


def samples_of(results: Results) -> dict[str, object]:
    document = asdict(results)
    for key in ("at_rest", "notes"):
        document[key] = {" ".join(pair): value for pair, value in document[key].items()}
    return document


def main() -> int:
    options = parse_arguments()
    if folder := os.environ.get(FOLDER):
        return uvloop.run(measure(options, Path(folder)))
    missing = [name for name in NEEDED if shutil.which(name) is None]
    if missing:
        say(f"Nothing is measured: there is no {', '.join(missing)}.")
        return 2
    command = namespace_command()
    if not command:
        say("Nothing is measured: no network and mount namespace can be made here (unshare).")
        return 2
    with tempfile.TemporaryDirectory(prefix="falproxy-bench-") as folder:
        return run_inside(command, sys.argv[1:], {FOLDER: folder})


if __name__ == "__main__":
    raise SystemExit(main())
