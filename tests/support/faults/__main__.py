"""`make faults`: runs the schedules, and writes their table into docs/reliability.md."""

import argparse
import asyncio
import sys
import time

from tests.support.faults.report import write_section
from tests.support.faults.suite import Results, as_markdown, plan, run_plan, total


def log(text: str) -> None:
    sys.stderr.write(f"{time.strftime('%H:%M:%S')} {text}\n")


async def run(options: argparse.Namespace) -> tuple[Results, int]:
    """Return the results, and the number of clusters."""
    results, ends_at = Results(), time.monotonic() + 60 * options.minutes
    rounds = 0
    while not rounds or (results.calls < options.calls and time.monotonic() < ends_at):
        # Outputs go to Supabase and to the disk in turn.
        schedule = plan(options.seed + rounds, uses_disk=rounds % 2 == 1, windows=options.windows)
        await run_plan(schedule, results, log)
        rounds += 1
        log(f"{results.calls:,} calls, {results.broken_promises} broken promises")
    return results, rounds


def main() -> int:
    parser = argparse.ArgumentParser(prog="make faults", description=__doc__)
    parser.add_argument("--calls", type=int, default=10_000, help="at least, over all clusters")
    parser.add_argument("--minutes", type=float, default=15, help="no new cluster after that time")
    parser.add_argument("--windows", type=int, default=34, help="faults of each cluster")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--write", action="store_true", help="write docs/reliability.md")
    options = parser.parse_args()
    started = time.monotonic()
    results, rounds = asyncio.run(run(options))
    seconds = time.monotonic() - started
    for note in results.notes:
        log(note)
    table = as_markdown(results)
    everything = total(results.tallies)
    repeated = ", ".join(f"{n} x {kind}" for kind, n in everything.repeated.most_common())
    text = (
        f"{results.calls:,} calls in {seconds / 60:.0f} minutes, "
        f"{results.applied.total() - results.applied['none']} faults, seeds {options.seed} to "
        f"{options.seed + rounds - 1}.\n\n{table}\n\n"
        f"Requests that clients sent again, which is no error of a call: {repeated or 'none'}.\n\n"
        f"Equal calls without a key that were not shared: {everything.extra}.\n"
    )
    sys.stdout.write(text)
    if options.write:
        write_section("faults", text)
    return 1 if results.broken_promises else 0


if __name__ == "__main__":
    raise SystemExit(main())
