"""`python -m compare`: measures falproxy beside its peers and writes the table.

It takes about twelve minutes, runs on loopback only, and leaves nothing behind.
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

from compare.certificates import write_certificates
from compare.contestants import CONTESTANTS, Contestant
from compare.goals import goals_of
from compare.namespace import run_inside, settle, way_in
from compare.process import PARTS
from compare.report import write_report
from compare.results import Results
from compare.scenarios import SCENARIOS, Plan
from compare.upstream import Upstream

FOLDER = "FALPROXY_BENCH_FOLDER"  # set for the run inside the namespaces
NEEDED = ("nginx", "wrk", "taskset")


def parse_arguments() -> argparse.Namespace:
    names = [contestant.name for contestant in CONTESTANTS]
    parser = argparse.ArgumentParser(prog="compare", description=__doc__)
    parser.add_argument("--only", help=f"some of {','.join(SCENARIOS)}", default="")
    parser.add_argument("--contestants", help=f"some of {','.join(names)}", default="")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=int, default=2, help="of a slice")
    parser.add_argument("--output", type=Path, help="the table's file (default: standard output)")
    parser.add_argument("--samples", type=Path, help="a file for all samples, as JSON")
    options = parser.parse_args()
    options.only = chosen(parser, options.only, list(SCENARIOS))
    options.contestants = chosen(parser, options.contestants, names)
    return options


def chosen(parser: argparse.ArgumentParser, given: str, known: list[str]) -> list[str]:
    words = given.split(",") if given else known
    if unknown := set(words) - set(known):
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    return [name for name in known if name in words]


def present(names: list[str]) -> tuple[Contestant, ...]:
    """The contestants that can be started here; the others are named."""
    wanted = [contestant for contestant in CONTESTANTS if contestant.name in names]
    for contestant in wanted:
        if not contestant.is_there:
            say(f"Left out: {contestant.title} (there is no {contestant.needs})")
    return tuple(contestant for contestant in wanted if contestant.is_there)


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
            present(options.contestants),
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
    write_report(results, plan.contestants, options)
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
    command = way_in()
    if not command:
        say("Nothing is measured: no network and mount namespace can be made here (unshare).")
        return 2
    with tempfile.TemporaryDirectory(prefix="falproxy-bench-") as made:
        return run_inside(command, sys.argv[1:], {FOLDER: made})


if __name__ == "__main__":
    raise SystemExit(main())
