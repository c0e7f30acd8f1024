"""The samples by scenario and candidate, in the order of the repeats."""

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
    """The median, minimum and maximum over paired repeats."""

    middle: float
    low: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> "Spread":
        return cls(median(values), min(values), max(values))


@dataclass(slots=True)
class Results:
    """All samples of a run.

    loads: by scenario.
    at_rest: MiB of a candidate before a scenario.
    notes: why a candidate is missing in a scenario.
    """

    loads: dict[str, dict[str, list[Sample]]] = field(default_factory=dict)
    streams: dict[str, list[StreamSample]] = field(default_factory=dict)
    latencies: dict[str, list[Latency]] = field(default_factory=dict)
    starts: dict[str, list[Start]] = field(default_factory=dict)
    at_rest: dict[tuple[str, str], float] = field(default_factory=dict)
    notes: dict[tuple[str, str], str] = field(default_factory=dict)

    def leave_out(self, scenario: str, name: str, reason: str) -> None:
        """Drop all samples of a candidate that failed once."""
        self.notes[scenario, name] = reason
        self.loads.get(scenario, {}).pop(name, None)
        if scenario == "streams":
            self.streams.pop(name, None)
        elif scenario == "latency":
            self.latencies.pop(name, None)
        elif scenario == "starts":
            self.starts.pop(name, None)

    def rates(self, scenario: str, name: str) -> list[float]:
        """Return requests per CPU second, empty if not measured."""
        return [sample.rate for sample in self.loads.get(scenario, {}).get(name, [])]

    def ratio(self, scenario: str, name: str, to: str = REFERENCE) -> Spread | None:
        """Return the ratio of requests per CPU second, paired by repeat."""
        values, references = self.rates(scenario, name), self.rates(scenario, to)
        if not values or len(values) != len(references):
            return None
        return Spread.of([a / b for a, b in zip(values, references, strict=True)])

    def peak(self, scenario: str, name: str) -> float | None:
        samples = self.loads.get(scenario, {}).get(name, [])
        return max((sample.peak for sample in samples), default=None)

    def added(self, name: str, to: str = REFERENCE) -> Spread | None:
        """Return the difference of the medians in milliseconds, paired by repeat."""
        values, references = self.latencies.get(name, []), self.latencies.get(to, [])
        if not values or len(values) != len(references):
            return None
        return Spread.of([a.p50 - b.p50 for a, b in zip(values, references, strict=True)])

    def delays(self, name: str, to: str = REFERENCE) -> Spread | None:
        """Return the ratio of the p99 delays of events, paired by repeat."""
        values, references = self.streams.get(name, []), self.streams.get(to, [])
        if not values or len(values) != len(references):
            return None
        return Spread.of([a.p99 / b.p99 for a, b in zip(values, references, strict=True)])
