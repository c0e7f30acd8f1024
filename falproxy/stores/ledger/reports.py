"""What a ledger tells, as documents: for `falproxy usage`, `/api/usage` and the dashboard."""

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from typing import get_args

from falproxy.fal.pricing import USD
from falproxy.parsers import parse_age
from falproxy.stores.ledger import By, Entries, Entry, Overviews, Question, Step, Totals
from falproxy.stores.ledger.rows import step_name
from falproxy.stores.ledger.statements import MILLISECONDS

Json = dict[str, object]

# How a moment is written; without an offset it is UTC.
MOMENT = re.compile(
    r"\d{1,6}[smhdSMHD]|"
    r"\d{4}-\d{2}-\d{2}(T\d{2}:\d{2}(:\d{2}(\.\d{1,6})?)?(Z|[+-]\d{2}:\d{2})?)?"
)
DAY = 86400.0
SPAN_MAX = 400 * DAY
STEPS_MAX = 1000  # in a series
PART_MAX = 100  # endpoints, principals or routes in an overview; the dearest
LATEST_MAX = 50
LENGTHS: dict[By, float] = {step: length / 1000 for step, length in MILLISECONDS.items()}
# The longest stretch that is shown by so short steps.
STEP_OF: tuple[tuple[float, Step], ...] = ((3 * 3600, "minute"), (8 * DAY, "hour"))


@dataclass(frozen=True, slots=True)
class Span:
    """From `since` up to `until`, in seconds since 1970."""

    since: float
    until: float

    @property
    def step(self) -> Step:
        """The stretch of time that it is shown by."""
        length = self.until - self.since
        return next((step for longest, step in STEP_OF if length <= longest), "day")

    def named(self) -> Json:
        return {"since": moment(self.since), "until": moment(self.until)}


def parse_span(since: str, until: str | None, now: float) -> Span:
    """Raises: ValueError, with a sentence that begins with the name of what is wrong."""
    start = parse_moment("since", since, now)
    end = now if until is None else parse_moment("until", until, now)
    if not start < end:
        raise ValueError("since must be before until")
    if end - start > SPAN_MAX:
        raise ValueError(f"since must be at most {SPAN_MAX / DAY:g} days before until")
    return Span(start, end)


def parse_moment(name: str, text: str, now: float) -> float:
    """Seconds since 1970, from how long ago (`7d`) or a date (`2026-11-01`,
    `2026-11-01T09:30Z`)."""
    match = MOMENT.fullmatch(text)
    try:
        seconds = None if match is None else read_moment(text, now)
    except (ValueError, OverflowError):  # February 30, say
        seconds = None
    if seconds is None:
        raise ValueError(f"{name} must be like 7d, 12h or 2026-11-01, not {text[:40]!r}")
    return max(0.0, seconds)


def read_moment(text: str, now: float) -> float:
    if text[-1].isalpha() and text[:-1].isdecimal():
        return now - parse_age(text)
    when = datetime.fromisoformat(text)
    return (when if when.tzinfo else when.replace(tzinfo=UTC)).timestamp()


def parse_by(text: str) -> By:
    """Raises: ValueError."""
    for by in get_args(By):
        if by == text:
            found: By = by
            return found
    raise ValueError(f"by must be one of {', '.join(get_args(By))}, not {text[:40]!r}")


def check_steps(span: Span, by: By | None) -> None:
    """Raises: ValueError, that would be too many rows."""
    if by in LENGTHS and (span.until - span.since) / LENGTHS[by] > STEPS_MAX:
        raise ValueError(f"since must be later: that is more than {STEPS_MAX} times one {by}")


async def table(entries: Entries, span: Span, by: By, principal: str | None) -> Json:
    """Sums over a span, all together and by name. principal: whose calls; None for everybody's.

    Raises: LedgerError.
    """
    question = Question(since=span.since, until=span.until, principal=principal, limit=STEPS_MAX)
    rows = await entries.totals(question, by)
    all_together = add_up(totals for _, totals in rows)
    if len(rows) == STEPS_MAX:  # there may be more
        ((_, all_together),) = await entries.totals(question)
    return table_of(span, by, principal, all_together, rows)


def table_of(
    span: Span, by: By, principal: str | None, all_together: Totals, rows: list[tuple[str, Totals]]
) -> Json:
    return {
        **span.named(),
        "principal": principal,
        "by": by,
        "totals": sums(all_together),
        "rows": [{"name": name, **sums(totals)} for name, totals in rows],
    }


async def overview(overviews: Overviews, span: Span, principal: str | None) -> Json:
    """All that the dashboard shows of a span, but for the latest calls. Raises: LedgerError."""
    question = Question(since=span.since, until=span.until, principal=principal, limit=STEPS_MAX)
    parts = await overviews.overview(question, span.step)
    named = {
        by: [{"name": name, **sums(totals)} for name, totals in parts[by][:PART_MAX]]
        for by in ("endpoint", "principal", "route")
    }
    return {
        **span.named(),
        "principal": principal,
        "totals": sums(add_up(totals for _, totals in parts[span.step])),
        "step": span.step,
        "series": series(parts[span.step], span),
        "endpoints": named["endpoint"],
        "routes": named["route"],
        "principals": named["principal"] if principal is None else None,
    }


def series(rows: Iterable[tuple[str, Totals]], span: Span) -> list[Json]:
    """Each step of a span, the empty ones too. at: when it begins."""
    length = MILLISECONDS[span.step]
    known = dict(rows)
    first, last = int(span.since * 1000) // length, int(span.until * 1000 - 1) // length
    return [
        {
            "at": moment(number * length / 1000),
            **sums(known.get(step_name(number, span.step), Totals())),
        }
        for number in range(first, last + 1)
    ]


async def latest(entries: Entries, span: Span, principal: str | None) -> list[Json]:
    """Raises: LedgerError."""
    question = Question(since=span.since, until=span.until, principal=principal, limit=LATEST_MAX)
    return [call(entry) for entry in await entries.latest(question)]


def call(entry: Entry) -> Json:
    """One call, with nothing of what was asked for."""
    shown = asdict(replace(entry, units=None))
    paid = entry.estimated if entry.settled is None else entry.settled
    for name in ("id", "user_id", "units", "estimated", "settled"):
        del shown[name]
    return shown | {"at": moment(entry.at), "spent": None if paid is None else paid / USD}


def sums(totals: Totals) -> Json:
    """Money in USD. spent, saved: None where there were such calls, and no price of any is known.
    own_seconds, upstream_seconds: of a call, on average."""
    calls = totals.calls
    is_unknown = totals.unpriced > 0 and totals.spent == 0
    own = totals.seconds - totals.upstream_seconds
    return {
        "calls": calls,
        "errors": totals.errors,
        "hits": totals.hits,
        "misses": totals.misses,
        "hit_rate": totals.hit_rate,
        "spent": None if is_unknown else totals.spent / USD,
        "saved": None if totals.hits and not totals.saved else totals.saved / USD,
        "unpriced": totals.unpriced,
        "own_seconds": round(own / calls, 6) if calls else None,
        "upstream_seconds": round(totals.upstream_seconds / calls, 6) if calls else None,
    }


def add_up(several: Iterable[Totals]) -> Totals:
    found = list(several)
    return Totals(
        **{each.name: sum(getattr(one, each.name) for one in found) for each in fields(Totals)}
    )


def moment(seconds: float) -> str:
    when = datetime.fromtimestamp(seconds, UTC)
    return when.isoformat(timespec="milliseconds").replace("+00:00", "Z")
