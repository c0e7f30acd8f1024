"""Reservations of sessions of live video, which last as long as their heartbeats."""

from math import ceil

from falproxy.fal.live import HEARTBEAT_INTERVAL
from falproxy.fal.pricing import Price
from falproxy.middleware.job_costs import JobDetails, LiveProgress
from falproxy.middleware.limiter import CallReservation

# Seconds without a heartbeat after which a session has ended: three heartbeats that fail, each
# after its interval and its time-out in fal's client, end it there.
SESSION_LEASE = 30.0
# Without a maximum, budgets are reserved for the first seconds of a session, and then for further
# ones as it goes on.
FIRST_SECONDS, NEXT_SECONDS = 60.0, 30.0


def reservation_name(session_id: str) -> str:
    """Return the name of a session in the limits store, where those of jobs are fal's ids."""
    return f"live/{session_id}"


def first_seconds(max_seconds: float | None) -> float:
    """Return the length of a session that is reserved when it is opened."""
    return FIRST_SECONDS if max_seconds is None else max_seconds


async def attach_session(
    reservation: CallReservation,
    session_id: str,
    price: Price | None,
    covered: float,
    started: float = 0.0,
) -> None:
    """Link a reservation to its session.

    price: None if it is unknown.
    covered: length that is reserved.
    started: length of the session so far, if an earlier reservation has ended.
    """
    details = JobDetails(price=price, live=LiveProgress(started, covered=covered))
    await reservation.attach(reservation_name(session_id), details.serialize(), SESSION_LEASE)


def missing_seconds(live: LiveProgress, seconds: float) -> float:
    """Return the length that must be reserved until the next heartbeat, in whole steps.

    seconds: length since the reservation was made.
    """
    missing = seconds + HEARTBEAT_INTERVAL - live.covered
    return max(0, ceil(missing / NEXT_SECONDS)) * NEXT_SECONDS
