"""The goals of falproxy beside its peers, and the results of a run."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median

from compare.load import CONCURRENCY
from compare.process import MIB
from compare.results import Results, Spread

MB = 1_000_000


@dataclass(frozen=True, slots=True)
class Goal:
    """A goal that a run was compared with.

    wanted: the bound, as text.
    reached: the result, as text.
    """

    title: str
    wanted: str
    reached: str
    is_met: bool

    def __str__(self) -> str:
        return f"{'yes' if self.is_met else 'NO ':4}{self.title}: {self.reached} ({self.wanted})"


Read = Callable[[Results], float | Spread | None]


@dataclass(frozen=True, slots=True)
class Rule:
    """A goal.

    read: returns the value, None if it was not measured.
    show: formats a value.
    at_least: the bound is a lower one.
    """

    title: str
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
        return Goal(self.title, f"{'≥' if self.at_least else '≤'} {self.show(self.bound)}",
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
    """Return a reader of the added latency in microseconds."""

    def read(results: Results) -> Spread | None:
        spread = results.added(name)
        if spread is None:
            return None
        return Spread(spread.middle * 1e3, spread.low * 1e3, spread.high * 1e3)

    return read


def size_of_transfer(scenario: str) -> Read:
    """Return a reader of the MB that each concurrent transfer adds."""

    def read(results: Results) -> float | None:
        peak = results.peak(scenario, "falproxy")
        rest = results.at_rest.get((scenario, "falproxy"))
        return None if peak is None or rest is None else (peak - rest) * MIB / MB / CONCURRENCY

    return read


def lost(results: Results) -> float | None:
    samples = results.streams.get("falproxy")
    return sum(sample.lost for sample in samples) if samples else None


def size_of_stream(results: Results) -> float | None:
    samples = results.streams.get("falproxy")
    return max(sample.size for sample in samples) if samples else None


def cold_start(results: Results) -> float | None:
    starts = results.starts.get("falproxy")
    return median(it.seconds for it in starts) * 1000 if starts else None


def idle(results: Results) -> float | None:
    values = [it.idle for it in results.starts.get("falproxy", []) if it.idle is not None]
    return median(values) * MIB / MB if values else None


ALL = "falproxy-all"
RULES = (
    Rule("status poll, of nginx", ratio("polls", "falproxy", "nginx"), 0.35, percent),
    Rule("status poll, of Express", ratio("polls", "falproxy", "express"), 8, times),
    Rule("status poll, of Hono", ratio("polls", "falproxy", "hono"), 5, times),
    Rule("status poll, every option, of nginx", ratio("polls", ALL, "nginx"), 0.25, percent),
    Rule("poll with a new head, of nginx", ratio("new", "falproxy", "nginx"), 0.25, percent),
    Rule(
        "poll with a new head from a new browser, of nginx",
        ratio("strangers", "falproxy", "nginx"), 0.25, percent,
    ),
    Rule("mixed, of nginx", ratio("mixed", "falproxy", "nginx"), 0.25, percent),
    Rule("status poll with a JWT, of nginx", ratio("tokens", "falproxy", "nginx"), 0.35, percent),
    Rule("submit, of nginx", ratio("submits", "falproxy", "nginx"), 0.25, percent),
    Rule("submit with limits, of nginx", ratio("limited", "falproxy", "nginx"), 0.20, percent),
    Rule("submit, of Express", ratio("submits", "falproxy", "express"), 8, times),
    Rule("p50 added to nginx's, 1 connection", added("falproxy"), 150, unit("µs"), at_least=False),
    Rule("3 MB responses, of nginx", ratio("responses", "falproxy", "nginx"), 0.75, percent),
    Rule("8 MB uploads, of nginx", ratio("uploads", "falproxy", "nginx"), 0.75, percent),
    Rule("a response at its peak", size_of_transfer("responses"), 2, unit("MB", 1), at_least=False),
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
    Rule("cold start to the first response", cold_start, 250, unit("ms"), at_least=False),
    Rule("idle", idle, 45, unit("MB"), at_least=False),
)  # fmt: skip


def goals_of(results: Results) -> Iterator[Goal]:
    """Yield the goals whose values this run has measured."""
    for rule in RULES:
        if goal := rule.judge(results):
            yield goal
