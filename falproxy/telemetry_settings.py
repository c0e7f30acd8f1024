"""Settings of OpenTelemetry, under its standard names."""

import re
from dataclasses import dataclass
from urllib.parse import unquote

from falproxy.parsers import one_of, parse_flag, parse_list, parse_url
from falproxy.setting_fields import setting

TRACES_PATH, METRICS_PATH = "/v1/traces", "/v1/metrics"
HEADER_NAME = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")
HEADER_VALUE = re.compile(r"[ -~]*")


def parse_headers(value: str) -> tuple[tuple[str, str], ...]:
    """Parse `name=value` pairs. Values are percent-encoded (W3C Baggage)."""
    headers = []
    for position, item in enumerate(parse_list(value), start=1):
        name, equals, encoded = item.partition("=")
        text = unquote(encoded.strip())
        if not (equals and HEADER_NAME.fullmatch(name.strip()) and HEADER_VALUE.fullmatch(text)):
            raise ValueError(
                "must be name=value pairs with commas between them and escapes for special "
                f"characters; number {position} is not"
            )
        headers.append((name.strip(), text))
    return tuple(headers)


@dataclass(frozen=True, slots=True, kw_only=True)
class TelemetrySettings:
    """Where traces and metrics are exported to. The SDK reads further variables itself, such as
    those of sampling and queues."""

    endpoint: str | None = setting(
        "OTEL_EXPORTER_OTLP_ENDPOINT",
        parse_url,
        None,
        "URL of a collector that receives traces and metrics by OTLP/HTTP, such as "
        "`http://localhost:4318`",
    )
    traces_endpoint: str | None = setting(
        "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT",
        parse_url,
        None,
        "complete URL for traces, if it is another one",
    )
    metrics_endpoint: str | None = setting(
        "OTEL_EXPORTER_OTLP_METRICS_ENDPOINT",
        parse_url,
        None,
        "complete URL for metrics, if it is another one",
    )
    headers: tuple[tuple[str, str], ...] = setting(
        "OTEL_EXPORTER_OTLP_HEADERS",
        parse_headers,
        (),
        "headers for the collector as `name=value`, comma separated, such as its key",
        secret=True,
    )
    traces_exporter: str = setting(
        "OTEL_TRACES_EXPORTER", one_of("otlp", "none"), "otlp", "`none` exports no traces"
    )
    metrics_exporter: str = setting(
        "OTEL_METRICS_EXPORTER", one_of("otlp", "none"), "otlp", "`none` exports no metrics"
    )
    service_name: str = setting(
        "OTEL_SERVICE_NAME", str, "falproxy", "name of this service in traces and metrics"
    )
    disabled: bool = setting(
        "OTEL_SDK_DISABLED", parse_flag, False, "`true` exports neither traces nor metrics"
    )

    @property
    def traces_url(self) -> str | None:
        """The URL to export traces to; None exports none."""
        if self.disabled or self.traces_exporter == "none":
            return None
        return self.traces_endpoint or (self.endpoint and self.endpoint + TRACES_PATH)

    @property
    def metrics_url(self) -> str | None:
        """The URL to export metrics to; None exports none."""
        if self.disabled or self.metrics_exporter == "none":
            return None
        return self.metrics_endpoint or (self.endpoint and self.endpoint + METRICS_PATH)

    @property
    def is_used(self) -> bool:
        return self.traces_url is not None or self.metrics_url is not None


NO_TELEMETRY = TelemetrySettings()
