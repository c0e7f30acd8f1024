"""`falproxy usage`: what the ledger tells, as a table or as JSON."""

import json
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from falproxy.errors import SettingsError
from falproxy.fal.pricing import USD, format_usd
from falproxy.settings import Settings
from falproxy.stores.ledger import By, Totals
from falproxy.stores.ledger.reports import Json, check_steps, parse_span, table, table_of
from falproxy.stores.ledger.writer import choose_ledger

NONE_YET = "No calls yet: there is no ledger in {}."
NO_CALLS = "No calls from {} until {}."
HEADS = ("calls", "errors", "hits", "hit rate", "spent", "saved", "falproxy", "fal.ai")
UNKNOWN = "?"
NOTHING = "-"
NOTES = {
    "?": "?   the price is not known",
    "+": "+   and more, whose price is not known",
}


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked, in the words of the command line. is_json: how it is answered."""

    since: str
    until: str | None
    by: By
    is_json: bool


async def usage(settings: Settings, asked: Question) -> AsyncIterator[str]:
    """The lines of the answer. Raises: LedgerError; SettingsError, for a question without sense
    too."""
    try:
        span = parse_span(asked.since, asked.until, time.time())
        check_steps(span, asked.by)
    except ValueError as error:
        raise SettingsError(f"--{error}.") from error
    ledger = choose_ledger(settings.database_url, settings.data_dir)
    file = settings.data_dir / "ledger.sqlite"
    if settings.database_url is None and not file.exists():
        told = table_of(span, asked.by, None, Totals(), [])
        lines = [NONE_YET.format(file.parent.resolve())]
    else:
        async with ledger:
            told = await table(ledger, span, asked.by, None)
        lines = lines_of(told)
    for line in [json.dumps(told, indent=2)] if asked.is_json else lines:
        yield line


def lines_of(told: Json) -> list[str]:
    """A table with its totals, or a sentence that there is nothing."""
    rows, totals = told["rows"], told["totals"]
    assert isinstance(rows, list)
    assert isinstance(totals, dict)
    since, until = (str(told[name])[:16].replace("T", " ") for name in ("since", "until"))
    if not rows:
        return [NO_CALLS.format(since, f"{until} UTC")]
    named = [[str(row["name"]) or NOTHING, *cells(row)] for row in rows]
    grid = [[str(told["by"]), *HEADS], *named, ["all", *cells(totals)]]
    lines = aligned(grid)
    text = "\n".join(lines)
    notes = [note for sign, note in NOTES.items() if f"{sign} " in f"{text} "]
    return [f"{since} until {until} UTC", "", *lines, *([""] if notes else []), *notes]


def cells(row: Json) -> list[str]:
    more = "+" if row["unpriced"] and row["spent"] is not None else ""
    return [
        *(str(row[name]) for name in ("calls", "errors", "hits")),
        share(row["hit_rate"]),
        dollars(row["spent"]) + more,
        dollars(row["saved"]),
        duration(row["own_seconds"]),
        duration(row["upstream_seconds"]),
    ]


def share(value: object) -> str:
    return f"{value:.0%}" if isinstance(value, float) else NOTHING


def dollars(value: object) -> str:
    return f"${format_usd(round(value * USD))}" if isinstance(value, float) else UNKNOWN


def duration(value: object) -> str:
    if not isinstance(value, float):
        return NOTHING
    return f"{value:.2f} s" if value >= 1 else f"{value * 1000:.1f} ms"


def aligned(grid: Sequence[Sequence[str]]) -> list[str]:
    """Names to the left, numbers to the right, and a line above the totals."""
    widths = [max(map(len, column)) for column in zip(*grid, strict=True)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in grid
    ]
    return [*lines[:-1], "-" * len(lines[0]), lines[-1]]
