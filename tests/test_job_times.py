"""Times of jobs, which are read from status documents without parsing them."""

import json
import time

import pytest

from falproxy import job_times
from falproxy.job_times import JobTimes, parse_run_seconds


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        pytest.param({"metrics": {"inference_time": 2.5}}, 2.5, id="seconds"),
        pytest.param({"metrics": {"inference_time": 3}}, 3.0, id="a whole number"),
        pytest.param({"metrics": {"inference_time": None}}, None, id="null"),
        pytest.param({"metrics": {}}, None, id="missing"),
        pytest.param({"metrics": {"inference_time": "2.5"}}, None, id="a text"),
        pytest.param({"metrics": {"inference_time": -1}}, None, id="negative"),
        pytest.param({"metrics": {"inference_time": 1e300}}, None, id="an exponent"),
        pytest.param(
            {"logs": [{"message": '{"inference_time": 9}'}], "metrics": {"inference_time": 2}},
            2.0,
            id="a text of the log has the same name",
        ),
    ],
)
@pytest.mark.parametrize("separators", [(",", ":"), (", ", ": ")], ids=["compact", "spaced"])
def test_the_run_time_is_read(
    document: object, expected: float | None, separators: tuple[str, str]
) -> None:
    assert parse_run_seconds(json.dumps(document, separators=separators).encode()) == expected


def test_the_first_poll_that_shows_the_end_counts() -> None:
    times, before = JobTimes(), time.time()
    times.observe("job", b'{"metrics": {"inference_time": 1.5}}')
    between = time.time()
    times.observe("job", b'{"metrics": {"inference_time": 9}}')
    ended_at, run_seconds = times.pop("job")
    assert before <= ended_at <= between
    assert run_seconds == 1.5
    assert times.pop("job").run_seconds is None


def test_the_number_of_jobs_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_times, "JOBS_MAX", 2)
    times = JobTimes()
    for name in ("a", "b", "c"):
        times.observe(name, b'{"metrics": {"inference_time": 1}}')
    assert times.pop("a").run_seconds is None
    assert times.pop("c").run_seconds == 1
