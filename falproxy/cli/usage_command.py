"""`falproxy usage`: usage from the ledger, as a table or as JSON."""

import json
import time
import unicodedata
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from falproxy.errors import SettingsError
from falproxy.fal.pricing import MICROS_PER_USD, format_usd
from falproxy.settings import Settings
from falproxy.stores.ledger.reports import (
    Json,
    TableBy,
    check_series_length,
    parse_page,
    parse_time_range,
    table_json,
    usage_table,
)
from falproxy.stores.ledger.writer import choose_ledger

NO_LEDGER = "No calls yet: there is no ledger in {}."
NO_CALLS = "No calls from {} until {}."
COLUMN_HEADERS = ("calls", "errors", "hits", "hit rate", "spent", "saved", "falproxy", "fal.ai")
UNKNOWN = "?"
NO_VALUE = "-"
REPLACEMENT = "\ufffd"
MORE_ROWS = "There are more rows: see --limit and --offset."
NOTES = {
    "?": "?   the price is not known",
    "+": "+   and more, whose price is not known",
}


@dataclass(frozen=True, slots=True)
class UsageArguments:
    """Options of the command line, without conversion. is_json: print JSON instead of a table."""

    since: str
    until: str | None
    by: TableBy
    is_json: bool
    limit: str | None = None
    offset: str | None = None


async def usage(settings: Settings, arguments: UsageArguments) -> AsyncIterator[str]:
    """Return the lines of the report.

    Raises: LedgerError; SettingsError, also for invalid arguments.
    """
    try:
        time_range = parse_time_range(arguments.since, arguments.until, time.time())
        check_series_length(time_range, arguments.by)
        page = parse_page(arguments.limit, arguments.offset)
    except ValueError as error:
        raise SettingsError(f"--{error}.") from error
    ledger = choose_ledger(settings.ledger.database_url, settings.data_dir)
    file = settings.data_dir / "ledger.sqlite"
    if settings.ledger.database_url is None and not file.exists():
        report = table_json(time_range, arguments.by, None)
        lines = [NO_LEDGER.format(file.parent.resolve())]
    else:
        async with ledger:
            report = await usage_table(ledger, time_range, arguments.by, None, page)
        lines = format_lines(report)
    for line in [json.dumps(report, indent=2)] if arguments.is_json else lines:
        yield line


def format_lines(report: Json) -> list[str]:
    """Return a table with totals, or one sentence if there are no calls."""
    rows, totals = report["rows"], report["totals"]
    assert isinstance(rows, list)
    assert isinstance(totals, dict)
    since, until = (str(report[name])[:16].replace("T", " ") for name in ("since", "until"))
    if not rows:
        return [NO_CALLS.format(since, f"{until} UTC")]
    names = ("name", "principal") if report["by"] == "user" else ("name",)
    body = [[*(format_name(row[name]) for name in names), *format_cells(row)] for row in rows]
    headers = [str(report["by"]), *names[1:], *COLUMN_HEADERS]
    all_calls = ["all", *("" for _ in names[1:]), *format_cells(totals)]
    lines = align_columns([headers, *body, all_calls], len(names))
    text = "\n".join(lines)
    notes = [note for mark, note in NOTES.items() if f"{mark} " in f"{text} "]
    if report["has_more"]:
        notes.append(MORE_ROWS)
    return [f"{since} until {until} UTC", "", *lines, *([""] if notes else []), *notes]


def format_name(name: object) -> str:
    """Return a name for a terminal, without the control characters that it may contain."""
    characters = (each if each.isprintable() else REPLACEMENT for each in str(name))
    return "".join(characters) or NO_VALUE


def format_cells(row: Json) -> list[str]:
    mark = "+" if row["unpriced"] and row["spent"] is not None else ""
    return [
        *(str(row[name]) for name in ("calls", "errors", "hits")),
        format_percentage(row["hit_rate"]),
        format_dollars(row["spent"]) + mark,
        format_dollars(row["saved"]),
        format_duration(row["own_seconds"]),
        format_duration(row["upstream_seconds"]),
    ]


def format_percentage(value: object) -> str:
    return f"{value:.0%}" if isinstance(value, float) else NO_VALUE


def format_dollars(value: object) -> str:
    return f"${format_usd(round(value * MICROS_PER_USD))}" if isinstance(value, float) else UNKNOWN


def format_duration(value: object) -> str:
    if not isinstance(value, float):
        return NO_VALUE
    return f"{value:.2f} s" if value >= 1 else f"{value * 1000:.1f} ms"


def align_columns(grid: Sequence[Sequence[str]], names: int) -> list[str]:
    """Align names to the left and numbers to the right, with a rule above the totals.

    names: number of columns that are names.
    """
    widths = [max(map(display_width, column)) for column in zip(*grid, strict=True)]
    lines = [
        "  ".join(pad(cell, widths[n], is_name=n < names) for n, cell in enumerate(row))
        for row in grid
    ]
    return [*lines[:-1], "-" * display_width(lines[0]), lines[-1]]


def pad(text: str, width: int, *, is_name: bool) -> str:
    blanks = " " * (width - display_width(text))
    return text + blanks if is_name else blanks + text


def display_width(text: str) -> int:
    """Return the number of columns that a text takes in a terminal."""
    if text.isascii():
        return len(text)
    return sum(
        0 if unicodedata.combining(each) else 1 + (unicodedata.east_asian_width(each) in "WF")
        for each in text
    )
