"""What calls are recorded with. It records nothing before the application has started."""

from opentelemetry.metrics import Meter, NoOpMeter
from opentelemetry.trace import NoOpTracer, Tracer

# Upper bounds in seconds, those that the semantic conventions advise, and more for models.
BOUNDS = (
    0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 30.0, 60.0,
    120.0, 300.0,
)  # fmt: skip


class Instruments:
    """tracer: of all spans.
    server_durations: of calls, until their response was sent.
    client_durations: of requests to fal, until the response began.
    """

    def __init__(self) -> None:
        self.open(NoOpTracer(), NoOpMeter("falproxy"))

    def __repr__(self) -> str:
        return f"<Instruments with {self.tracer!r}>"

    def open(self, tracer: Tracer, meter: Meter) -> None:
        self.tracer = tracer
        self.server_durations = meter.create_histogram(
            "http.server.request.duration",
            "s",
            "Duration of calls, until their response was sent.",
            explicit_bucket_boundaries_advisory=BOUNDS,
        )
        self.client_durations = meter.create_histogram(
            "http.client.request.duration",
            "s",
            "Duration of requests to fal, until the response began.",
            explicit_bucket_boundaries_advisory=BOUNDS,
        )
