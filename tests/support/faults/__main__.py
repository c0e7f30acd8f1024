"""`make faults`: runs the schedules, and writes their table into docs/reliability.md."""

import argparse
import asyncio
import logging
import sys
import time

from tests.support.faults.report import write_section
from tests.support.faults.suite import Results, as_markdown, plan, run_plan, total


def log(text: str) -> None:
    sys.stderr.write(f"{time.strftime('%H:%M:%S')} {text}\n")


async def run(options: argparse.Namespace) -> Results:
    results, started, rounds = Results(), time.monotonic(), 0
    ends_at = started + 60 * options.minutes
    while not rounds or (results.calls < options.calls and time.monotonic() < ends_at):
        # Outputs go to Supabase and to the disk in turn.
        schedule = plan(options.seed + rounds, uses_disk=rounds % 2 == 1, windows=options.windows)
        await run_plan(schedule, results, log)
        rounds += 1
        seeds = f"seeds {options.seed} to {options.seed + rounds - 1}"
        text = describe(results, time.monotonic() - started, seeds)
        log(f"{results.calls:,} calls, {results.broken_promises} broken promises\n{text}")
        if options.write:
            write_section("faults", text)
    return results


def describe(results: Results, seconds: float, seeds: str) -> str:
    everything = total(results.tallies)
    repeated = ", ".join(f"{n} x {kind}" for kind, n in everything.repeated.most_common())
    return (
        f"{results.calls:,} calls in {seconds / 60:.0f} minutes, "
        f"{results.applied.total() - results.applied['none']} faults, {seeds}.\n\n"
        f"{as_markdown(results)}\n\n"
        f"Requests that clients sent again, which is no error of a call: {repeated or 'none'}.\n\n"
        f"Equal calls without a key that were not shared: {everything.extra}.\n"
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="make faults", description=__doc__)
    parser.add_argument("--calls", type=int, default=10_000, help="at least, over all clusters")
    parser.add_argument("--minutes", type=float, default=15, help="no new cluster after that time")
    parser.add_argument("--windows", type=int, default=34, help="faults of each cluster")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--write", action="store_true", help="write docs/reliability.md")
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    return 1 if asyncio.run(run(parser.parse_args())).broken_promises else 0


if __name__ == "__main__":
    raise SystemExit(main())
