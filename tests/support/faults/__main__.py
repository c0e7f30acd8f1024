"""`make faults`: runs the schedules, and writes their table into docs/reliability.md."""

import argparse
import asyncio
import sys
import time

from tests.support.faults.report import write_section
from tests.support.faults.suite import Results, as_markdown, plan, run_plan, total


def log(text: str) -> None:
    sys.stderr.write(f"{time.strftime('%H:%M:%S')} {text}\n")


async def run(rounds: int, windows: int, seed: int) -> Results:
    results = Results()
    for number in range(rounds):
        uses_disk = number % 2 == 1
        await run_plan(plan(seed + number, uses_disk=uses_disk, windows=windows), results, log)
        log(f"{results.calls:,} calls, {results.broken_promises} broken promises")
    return results


def main() -> int:
    parser = argparse.ArgumentParser(prog="make faults", description=__doc__)
    parser.add_argument("--rounds", type=int, default=4, help="clusters, one after the other")
    parser.add_argument("--windows", type=int, default=26, help="faults of each cluster")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--write", action="store_true", help="write docs/reliability.md")
    options = parser.parse_args()
    started = time.monotonic()
    results = asyncio.run(run(options.rounds, options.windows, options.seed))
    seconds = time.monotonic() - started
    for note in results.notes:
        log(note)
    table = as_markdown(results)
    everything = total(results.tallies)
    repeated = ", ".join(f"{n} x {kind}" for kind, n in everything.repeated.most_common())
    text = (
        f"{results.calls:,} calls in {seconds / 60:.0f} minutes, "
        f"{results.applied.total() - results.applied['none']} faults, seeds {options.seed} to "
        f"{options.seed + options.rounds - 1}.\n\n{table}\n\n"
        f"Requests that clients sent again, which is no error of a call: {repeated or 'none'}.\n\n"
        f"Equal calls without a key that were not shared: {everything.extra}.\n"
    )
    sys.stdout.write(text)
    if options.write:
        write_section("faults", text)
    return 1 if results.broken_promises else 0


if __name__ == "__main__":
    raise SystemExit(main())
