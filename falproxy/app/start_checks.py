"""Services that cannot be reached when the proxy starts: it starts without them, and has a line in
the log about each. Redis and PostgreSQL are not checked here: their stores are probed.
"""

import asyncio
import logging
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass

from aiohttp import web
from yarl import URL

from falproxy.concurrency import cancel_tasks
from falproxy.metrics import METRICS
from falproxy.os_errors import describe_os_error
from falproxy.settings import Settings

logger = logging.getLogger(__name__)

FAL_URL = "https://fal.run"
CONNECT_TIMEOUT = 5.0  # seconds
CHECK_INTERVAL = 2.0  # seconds between two checks of a service that cannot be reached


@dataclass(frozen=True, slots=True)
class Service:
    """names: of its states in the metrics. title, consequence: parts of the line in the log."""

    names: tuple[str, ...]
    url: str
    title: str
    consequence: str


def services(settings: Settings) -> Iterator[Service]:
    """Yield the services that are used."""
    url = settings.upstream.origin or FAL_URL
    yield Service(("fal",), url, "fal", "calls fail until it can be reached")
    if settings.storage_backend == "supabase" and settings.storage.supabase_url is not None:
        yield Service(
            ("supabase", "storage"),
            settings.storage.supabase_url,
            "Supabase (SUPABASE_URL)",
            "outputs are not stored until it can be reached",
        )


def check_services(app: web.Application, settings: Settings, *, is_logged: bool = True) -> None:
    """Check the services in the background while the application starts. One that cannot be reached
    counts as down until it can.

    is_logged: False for all but one process of several.
    """
    missing: set[str] = set()

    async def check_services_context(app: web.Application) -> AsyncIterator[None]:
        states = app[METRICS].dependencies
        for name, is_up in tuple(states.items()):
            states[name] = state_of(name, is_up, missing)
        loop = asyncio.get_running_loop()
        tasks = [
            loop.create_task(watch(service, missing, is_logged=is_logged))
            for service in services(settings)
        ]
        yield
        await cancel_tasks(tasks)

    app.cleanup_ctx.append(check_services_context)


def state_of(name: str, is_up: Callable[[], bool], missing: set[str]) -> Callable[[], bool]:
    return lambda: name not in missing and is_up()


async def watch(service: Service, missing: set[str], *, is_logged: bool) -> None:
    """Wait until a service can be reached; until then its names are missing."""
    while (reason := await connect_error(service.url)) is not None:
        if is_logged and not missing.issuperset(service.names):
            logger.warning(
                "%s cannot be reached (%s): %s", service.title, reason, service.consequence
            )
        missing.update(service.names)
        await asyncio.sleep(CHECK_INTERVAL)
    if is_logged and missing.issuperset(service.names):
        logger.warning("%s can be reached now", service.title)
    missing.difference_update(service.names)


async def connect_error(url: str) -> str | None:
    """Return why no connection to the host of a URL can be opened; None if one can."""
    parsed = URL(url)
    try:
        async with asyncio.timeout(CONNECT_TIMEOUT):
            _, writer = await asyncio.open_connection(parsed.host, parsed.port)
    except TimeoutError:
        return "it did not respond in time"
    except socket.gaierror:
        return "there is no such host"
    except OSError as error:
        return describe_os_error(error)
    writer.close()
    return None
