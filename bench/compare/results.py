"""What was measured, by scenario and contestant, in the order of the repeats."""

from dataclasses import dataclass, field
from statistics import median

from compare.load import Sample
from compare.start import Start
from compare.streams import StreamSample

REFERENCE = "nginx"
DIRECT = "direct"


@dataclass(frozen=True, slots=True)
class Latency:
    """Milliseconds."""

    p50: float
    p99: float


@dataclass(frozen=True, slots=True)
class Spread:
    """The median of paired repeats, and how far they lie apart."""

    middle: float
    low: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> "Spread":
        return cls(median(values), min(values), max(values))


@dataclass(slots=True)
class Results:
    """loads: by scenario. notes: why a contestant is missing in a scenario. at_rest: MiB that a
    contestant held before a scenario."""

    loads: dict[str, dict[str, list[Sample]]] = field(default_factory=dict)
    streams: dict[str, list[StreamSample]] = field(default_factory=dict)
    latencies: dict[str, list[Latency]] = field(default_factory=dict)
    starts: dict[str, list[Start]] = field(default_factory=dict)
    at_rest: dict[tuple[str, str], float] = field(default_factory=dict)
    notes: dict[tuple[str, str], str] = field(default_factory=dict)

    def leave_out(self, scenario: str, name: str, why: str) -> None:
        """Who fails once has no numbers at all."""
        self.notes[scenario, name] = why
        self.loads.get(scenario, {}).pop(name, None)
        if scenario == "streams":
            self.streams.pop(name, None)
        elif scenario == "latency":
            self.latencies.pop(name, None)
        elif scenario == "starts":
            self.starts.pop(name, None)

    def rates(self, scenario: str, name: str) -> list[float]:
        """Requests per CPU second; empty where it was not measured."""
        return [sample.rate for sample in self.loads.get(scenario, {}).get(name, [])]

    def ratio(self, scenario: str, name: str, to: str = REFERENCE) -> Spread | None:
        """Of requests per CPU second, repeat by repeat."""
        mine, theirs = self.rates(scenario, name), self.rates(scenario, to)
        if not mine or len(mine) != len(theirs):
            return None
        return Spread.of([a / b for a, b in zip(mine, theirs, strict=True)])

    def peak(self, scenario: str, name: str) -> float | None:
        samples = self.loads.get(scenario, {}).get(name, [])
        return max((sample.peak for sample in samples), default=None)

    def added(self, name: str, to: str = REFERENCE) -> Spread | None:
        """Milliseconds at the median, repeat by repeat."""
        mine, theirs = self.latencies.get(name, []), self.latencies.get(to, [])
        if not mine or len(mine) != len(theirs):
            return None
        return Spread.of([a.p50 - b.p50 for a, b in zip(mine, theirs, strict=True)])

    def delays(self, name: str, to: str = REFERENCE) -> Spread | None:
        """p99 of the delay of events as a ratio, repeat by repeat."""
        mine, theirs = self.streams.get(name, []), self.streams.get(to, [])
        if not mine or len(mine) != len(theirs):
            return None
        return Spread.of([a.p99 / b.p99 for a, b in zip(mine, theirs, strict=True)])
