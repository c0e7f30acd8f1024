"""Adds tracing to an application."""

import asyncio
import logging
from collections.abc import AsyncIterator

from aiohttp import web
from aiohttp.typedefs import Middleware

from falproxy.background import time_left
from falproxy.concurrency import run_in_daemon_thread
from falproxy.metrics import METRICS
from falproxy.proxy.upstream import UPSTREAM
from falproxy.telemetry.calls import trace_calls
from falproxy.telemetry.export import open_telemetry
from falproxy.telemetry.instruments import Instruments
from falproxy.telemetry.metrics import CollectMetrics, observe_metrics
from falproxy.telemetry.upstream import TracedTransport
from falproxy.telemetry_settings import TelemetrySettings
from falproxy.version import __version__

logger = logging.getLogger(__name__)

CLOSE_TIMEOUT = 1.0  # seconds to export what is left at shutdown
NAME = "falproxy"  # of the instrumentation


def install_telemetry(
    app: web.Application, settings: TelemetrySettings, collect: CollectMetrics
) -> Middleware:
    """Export the calls, the requests to fal and the metrics of an application. Call it before its
    resources are opened. Returns the middleware of all calls.

    collect: returns the metrics to export.

    The threads that export are started with the application, in the process that serves it.
    """
    instruments = Instruments()

    async def telemetry_context(app: web.Application) -> AsyncIterator[None]:
        telemetry = open_telemetry(settings)
        meter = telemetry.meters.get_meter(NAME, __version__)
        instruments.open(telemetry.tracers.get_tracer(NAME, __version__), meter)
        observe_metrics(meter, app[METRICS], collect)
        yield
        try:
            async with asyncio.timeout(time_left(app, CLOSE_TIMEOUT)):
                await asyncio.gather(*map(run_in_daemon_thread, telemetry.closing))
        except TimeoutError:
            logger.warning("The last spans and metrics were not exported in time")

    async def trace_upstream(app: web.Application) -> None:
        upstream = app[UPSTREAM]
        upstream.transport = TracedTransport(upstream.transport, instruments)

    app.cleanup_ctx.append(telemetry_context)
    app.on_startup.append(trace_upstream)
    return trace_calls(instruments)
