"""Traces and metrics by OpenTelemetry. Imported only if a collector is configured.

* `calls.py`: the server span of each call, and the spans of requests to stores and image hosts.
* `upstream.py`: the client span of each request to fal, with `traceparent` in its headers.
* `metrics.py`: the metrics of `/metrics`, and durations.
* `export.py`: exports both in the background.

A span has names, numbers and ids only: never a key, a header, a body, a path or a query.
"""

from falproxy.telemetry.install import install_telemetry as install_telemetry
