"""Limits of model calls: requests in a window, jobs under way, and money in a window.

A call reserves its part of all limits that hold for it in one step, or is refused by one of them.
The reservation ends when it is settled to the actual cost, or released. Amounts are micro-USD, in
integers. Times are seconds, by the clock of the store.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, Self

from falproxy.windows import DAY, Window

LimitKind = Literal["rate", "concurrency", "budget"]

# The window of a rate is counted in this many parts, and one more, so that no window of the full
# length ever holds more requests than the limit.
RATE_PARTS = 60
# Seconds after which a reservation is deleted that no process has ended: long after the last one
# that fal could still charge.
RESERVATION_RETENTION = 2 * DAY
BUDGET_GRACE = 2 * DAY  # seconds after its window for which an amount is kept, for late settlements
CONCURRENCY_RETRY = 1.0  # seconds; a running job may end at any time


class LimitsError(Exception):
    """The limits cannot be read or written: the store is unreachable, slow, full or locked."""


@dataclass(frozen=True, slots=True)
class Limit:
    """One limit.

    subject: name of the callers that are counted together, such as `principal:web`.
    maximum: requests, jobs or micro-USD.
    window: None for concurrency.
    """

    kind: LimitKind
    subject: str
    maximum: int
    window: Window | None = None


@dataclass(frozen=True, slots=True)
class LimitState:
    """The count of a limit.

    used: requests, jobs or micro-USD, with the call that was admitted.
    seconds: until there is room again, for a limit that refuses a call; otherwise until a part of
        the count expires.
    """

    used: int
    seconds: float


@dataclass(frozen=True, slots=True)
class ReserveRequest:
    """A call that asks to be admitted.

    token: identifies the reservation; an unused random name.
    limits: all limits that hold for the call.
    amount: its maximum cost, which is reserved in each budget.
    lease: seconds after which the reservation is due, unless it is renewed or ends.
    """

    token: str
    limits: Sequence[Limit]
    amount: int
    lease: float


@dataclass(frozen=True, slots=True)
class Reservation:
    """A call that was admitted and has not ended.

    amount: reserved in each budget.
    request_id: fal's id, once it is known.
    details: for the question to fal about the job; written and read by the caller.
    age: seconds since the call was admitted.
    """

    token: str
    amount: int
    request_id: str | None = None
    details: str = ""
    age: float = field(default=0.0, compare=False)


@dataclass(frozen=True, slots=True)
class Admission:
    """The outcome of a ReserveRequest.

    refused: index of the limit that refuses the call; None if it is admitted.
    states: of each limit.
    """

    refused: int | None
    states: tuple[LimitState, ...]


class LimitsStore(Protocol):
    """Counters that several processes share. All methods raise LimitsError."""

    async def __aenter__(self) -> Self: ...

    async def __aexit__(self, *error: object) -> None: ...

    async def reserve(self, request: ReserveRequest) -> Admission:
        """Admit a call by all of its limits, or count nothing. A call with a budget or with
        concurrency has an open reservation from then on."""

    async def attach(self, token: str, request_id: str, details: str, lease: float) -> bool:
        """Store fal's request id, by which `find` returns the reservation. The job counts as
        running until the reservation ends. False if it has ended already."""

    async def renew(self, token: str, lease: float) -> bool:
        """Extend the time until the reservation is due. False if it has ended."""

    async def find(self, request_id: str) -> Reservation | None:
        """Return the open reservation of a job of fal's."""

    async def settle(self, token: str, amount: int) -> bool:
        """End a reservation: its budgets count `amount` instead of the reserved one. False if it
        had ended before; then nothing changes."""

    async def release(self, token: str) -> bool:
        """End a reservation of a call that cost nothing."""

    async def claim_due(self, limit: int, lease: float) -> list[Reservation]:
        """Return reservations that are due, oldest first, each to one of the processes that ask
        within `lease` seconds."""

    async def count(self, limits: Sequence[Limit]) -> tuple[LimitState, ...]:
        """Return the counts of the limits, without admitting a call."""


def rate_name(limit: Limit) -> str:
    """Return the name of the counter of a rate limit. Rates of different windows are counted
    apart."""
    assert limit.window is not None
    return f"rate:{limit.window.seconds}:{limit.subject}"


def running_name(limit: Limit) -> str:
    return f"running:{limit.subject}"


def budget_name(limit: Limit, start: int) -> str:
    """Return the name of the counter of one window of a budget. Windows of different lengths are
    counted apart, since they can start at the same time."""
    assert limit.window is not None
    return f"budget:{limit.window.seconds or 'month'}:{start}:{limit.subject}"


def part_length(window: Window) -> float:
    """Return the seconds of one part of a rate's window."""
    return window.length / RATE_PARTS


def rate_state(limit: Limit, counts: Sequence[tuple[int, int]], now: float) -> LimitState:
    """Return the state of a rate limit.

    counts: number of each part of the window since 1970, and its requests.
    """
    assert limit.window is not None
    part = part_length(limit.window)
    current = int(now // part)
    recent = sorted(pair for pair in counts if pair[0] >= current - RATE_PARTS)
    used = left = sum(count for _, count in recent)
    seconds = 0.0
    for number, count in recent:
        seconds = (number + RATE_PARTS + 1) * part - now
        left -= count
        if left < limit.maximum:
            break
    return LimitState(used, seconds)


def share(limit: Limit, amount: int) -> int:
    """Return the part of a limit that one call of this cost takes."""
    return amount if limit.kind == "budget" else 1


def admitted_state(limit: Limit, state: LimitState, amount: int, now: float) -> LimitState:
    """Return the state of a limit after it has admitted a call of this cost."""
    seconds = state.seconds
    if limit.kind == "rate" and state.used == 0:
        assert limit.window is not None
        part = part_length(limit.window)
        seconds = (int(now // part) + RATE_PARTS + 1) * part - now
    return LimitState(state.used + share(limit, amount), seconds)
