"""Windows of time in which requests or money are counted, aligned to UTC."""

from dataclasses import dataclass
from datetime import UTC, datetime

MINUTE, HOUR, DAY = 60, 3600, 86400
WEEK = 7 * DAY
MONDAY_OFFSET = 4 * DAY  # 1970-01-01 was a Thursday


@dataclass(frozen=True, slots=True)
class Window:
    """The period in which requests or money are counted.

    seconds: its length; None for a calendar month.
    """

    seconds: int | None

    @property
    def length(self) -> float:
        return 30.0 * DAY if self.seconds is None else float(self.seconds)

    def bounds(self, now: float) -> tuple[int, int]:
        """Return start and end of the window that contains a time, aligned to UTC: days start at
        midnight, weeks on Monday, months on their first day."""
        if self.seconds is None:
            date = datetime.fromtimestamp(now, UTC)
            start = datetime(date.year, date.month, 1, tzinfo=UTC)
            end = datetime(date.year + date.month // 12, date.month % 12 + 1, 1, tzinfo=UTC)
            return int(start.timestamp()), int(end.timestamp())
        offset = MONDAY_OFFSET if self.seconds % WEEK == 0 else 0
        start_at = int((now - offset) // self.seconds) * self.seconds + offset
        return start_at, start_at + self.seconds

    def __str__(self) -> str:
        """Return the window as in a setting: `minute`, `day`, `90s`."""
        return NAMES.get(self.seconds, f"{self.seconds}s")


NAMES = {1: "second", MINUTE: "minute", HOUR: "hour", DAY: "day", WEEK: "week", None: "month"}
WINDOWS = {name: Window(seconds) for seconds, name in NAMES.items()}
