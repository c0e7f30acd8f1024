"""What falproxy wants to reach beside its peers, and what it did reach."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median

from compare.load import AT_ONCE
from compare.process import MIB
from compare.results import Results, Spread

MB = 1_000_000


@dataclass(frozen=True, slots=True)
class Goal:
    """wanted: with its bound. reached: as it is shown."""

    what: str
    wanted: str
    reached: str
    is_met: bool

    def __str__(self) -> str:
        return f"{'yes' if self.is_met else 'NO ':4}{self.what}: {self.reached} ({self.wanted})"


Read = Callable[[Results], float | Spread | None]


@dataclass(frozen=True, slots=True)
class Rule:
    """at_least: whether the bound is a lower one. show: a number as text."""

    what: str
    read: Read
    bound: float
    show: Callable[[float], str]
    at_least: bool = True

    def judge(self, results: Results) -> Goal | None:
        value = self.read(results)
        if value is None:
            return None
        middle = value.middle if isinstance(value, Spread) else value
        is_met = middle >= self.bound if self.at_least else middle <= self.bound
        reached = self.show(middle)
        if isinstance(value, Spread):
            reached += f" ({self.show(value.low)} to {self.show(value.high)})"
        return Goal(self.what, f"{'≥' if self.at_least else '≤'} {self.show(self.bound)}",
                    reached, is_met)  # fmt: skip


def percent(value: float) -> str:
    return f"{value:.0%}"


def times(value: float) -> str:
    return f"{value:.1f} x"


def unit(name: str, digits: int = 0) -> Callable[[float], str]:
    return lambda value: f"{value:.{digits}f} {name}"


def ratio(scenario: str, name: str, to: str) -> Read:
    return lambda results: results.ratio(scenario, name, to)


def added(name: str) -> Read:
    """Microseconds."""

    def read(results: Results) -> Spread | None:
        spread = results.added(name)
        if spread is None:
            return None
        return Spread(spread.middle * 1e3, spread.low * 1e3, spread.high * 1e3)

    return read


def size_of_transfer(scenario: str) -> Read:
    """MB that one of the transfers at once adds to what is held without any."""

    def read(results: Results) -> float | None:
        peak = results.peak(scenario, "falproxy")
        rest = results.at_rest.get((scenario, "falproxy"))
        return None if peak is None or rest is None else (peak - rest) * MIB / MB / AT_ONCE

    return read


def lost(results: Results) -> float | None:
    samples = results.streams.get("falproxy")
    return sum(sample.lost for sample in samples) if samples else None


def size_of_stream(results: Results) -> float | None:
    samples = results.streams.get("falproxy")
    return max(sample.size for sample in samples) if samples else None


def cold_start(results: Results) -> float | None:
    kept = results.starts.get("falproxy")
    return median(it.seconds for it in kept) * 1000 if kept else None


def idle(results: Results) -> float | None:
    seen = [it.idle for it in results.starts.get("falproxy", []) if it.idle is not None]
    return median(seen) * MIB / MB if seen else None


ALL = "falproxy-all"
RULES = (
    Rule("status poll, of nginx", ratio("polls", "falproxy", "nginx"), 0.35, percent),
    Rule("status poll, of Express", ratio("polls", "falproxy", "express"), 8, times),
    Rule("status poll, of Hono", ratio("polls", "falproxy", "hono"), 5, times),
    Rule("status poll, every option, of nginx", ratio("polls", ALL, "nginx"), 0.25, percent),
    Rule("submit, of nginx", ratio("submits", "falproxy", "nginx"), 0.30, percent),
    Rule("submit, of Express", ratio("submits", "falproxy", "express"), 8, times),
    Rule("p50 added to nginx's, 1 connection", added("falproxy"), 150, unit("µs"), at_least=False),
    Rule("3 MB answers, of nginx", ratio("answers", "falproxy", "nginx"), 0.75, percent),
    Rule("8 MB uploads, of nginx", ratio("uploads", "falproxy", "nginx"), 0.75, percent),
    Rule("an answer at its peak", size_of_transfer("answers"), 2, unit("MB", 1), at_least=False),
    Rule("an upload at its peak", size_of_transfer("uploads"), 2, unit("MB", 1), at_least=False),
    Rule("events lost or out of order", lost, 0, unit("events"), at_least=False),
    Rule(
        "p99 delay of events, of nginx's", lambda it: it.delays("falproxy"), 2, times,
        at_least=False,
    ),
    Rule("a stream", size_of_stream, 70, unit("KB"), at_least=False),
    Rule(
        "work per CPU second with 2 workers, of 1",
        ratio("workers", "falproxy-2", "falproxy"), 0.9, percent,
    ),
    Rule("cold start to the first answer", cold_start, 250, unit("ms"), at_least=False),
    Rule("idle", idle, 45, unit("MB"), at_least=False),
)  # fmt: skip


def goals_of(results: Results) -> Iterator[Goal]:
    """Those that this run can judge."""
    for rule in RULES:
        if goal := rule.judge(results):
            yield goal
