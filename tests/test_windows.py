"""Windows of time, aligned to UTC."""

from datetime import UTC, datetime

import pytest

from falproxy.windows import DAY, WINDOWS, Window


@pytest.mark.parametrize(
    ("window", "now", "start", "end"),
    [
        pytest.param(Window(3600), "2026-11-28T10:59:59", "2026-11-28T10:00", "2026-11-28T11:00"),
        pytest.param(Window(DAY), "2026-11-28T23:59:59", "2026-11-28T00:00", "2026-11-29T00:00"),
        pytest.param(Window(7 * DAY), "2026-11-29T23:00", "2026-11-23T00:00", "2026-11-30T00:00"),
        pytest.param(Window(7 * DAY), "2026-11-30T00:00", "2026-11-30T00:00", "2026-12-07T00:00"),
        pytest.param(Window(None), "2026-11-28T10:00", "2026-11-01T00:00", "2026-12-01T00:00"),
        pytest.param(Window(None), "2026-12-31T23:59", "2026-12-01T00:00", "2027-01-01T00:00"),
        pytest.param(Window(None), "2028-02-29T12:00", "2028-02-01T00:00", "2028-03-01T00:00"),
    ],
)
def test_windows_are_aligned_to_utc(window: Window, now: str, start: str, end: str) -> None:
    times = [datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp() for text in (start, end)]
    at = datetime.fromisoformat(now).replace(tzinfo=UTC).timestamp()
    assert window.bounds(at) == (times[0], times[1])


def test_a_window_is_shown_as_in_a_setting() -> None:
    assert {name: str(window) for name, window in WINDOWS.items()} == {n: n for n in WINDOWS}
    assert str(Window(90)) == "90s"
