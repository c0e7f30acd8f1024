"""States of the services and stores that the proxy depends on, for its metrics."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial

from aiohttp import web

from falproxy.app.pipeline import CallResources
from falproxy.concurrency import cancel_tasks
from falproxy.metrics import METRICS, Metrics
from falproxy.proxy.upstream import BACKUP_HOSTS, UPSTREAM
from falproxy.settings import Settings
from falproxy.stores.ledger.writer import LedgerWriter

State = tuple[str, Callable[[], bool]]
OBSERVE_INTERVAL = 5.0  # seconds between two looks at the states, for the times of their changes


def watch_health(
    app: web.Application, settings: Settings, calls: CallResources, writer: LedgerWriter
) -> None:
    """Add the states to the metrics, which read them when they are asked for. Parts that are turned
    off have none."""
    metrics = app[METRICS]
    metrics.dependencies |= {
        "ledger": lambda: not writer.is_down,
        **dict(store_states(calls)),
    }
    metrics.last_errors["ledger"] = lambda: writer.last_error
    for name, (role, is_used) in service_roles(settings).items():
        if is_used and role in metrics.dependencies:
            metrics.dependencies[name] = metrics.dependencies[role]
            if role in metrics.last_errors:
                metrics.last_errors[name] = metrics.last_errors[role]
    metrics.health |= {
        "ledger_backlog_rows": lambda: writer.pending_rows,
        "ledger_dropped_rows": lambda: writer.dropped,
        "fal_keys": lambda: len(calls.key_pool),
        "fal_keys_resting": lambda: calls.key_pool.resting_count,
        "tasks": lambda: len(asyncio.all_tasks()),
    }
    if settings.upstream.origin is None:
        metrics.breakers |= {host: partial(is_open, app, host) for host in BACKUP_HOSTS}
    app.cleanup_ctx.append(observe_states)


async def observe_states(app: web.Application) -> AsyncIterator[None]:
    """Cleanup context: record when dependencies fail and recover, even if no metrics are read."""
    task = asyncio.ensure_future(observe_repeatedly(app[METRICS]))
    yield
    await cancel_tasks([task])


async def observe_repeatedly(metrics: Metrics) -> None:
    while True:
        metrics.observe_dependencies()
        await asyncio.sleep(OBSERVE_INTERVAL)


def store_states(calls: CallResources) -> Iterator[State]:
    """Yield whether each store worked when it was used last."""
    if (result_cache := calls.result_cache) is not None:
        yield "cache", lambda: not result_cache.breaker.is_open
    if (limits := calls.limits) is not None:
        yield "limits", lambda: limits.limiter.is_store_up
    if (keyed_calls := calls.keyed_calls) is not None:
        yield "idempotency", lambda: keyed_calls.is_store_up
    if (rehosting := calls.rehosting) is not None:
        yield "storage", lambda: rehosting.rehoster.is_storage_up


def service_roles(settings: Settings) -> dict[str, tuple[str, bool]]:
    """Return for each service the store whose state it has, and whether it is used."""
    return {
        "postgres": ("ledger", bool(settings.ledger.database_url)),
        "redis": ("cache", bool(settings.cache.redis_url)),
        "supabase": ("storage", settings.storage_backend == "supabase"),
    }


def is_open(app: web.Application, host: str) -> bool:
    """Return whether the backup of a host is used."""
    breaker = app[UPSTREAM].breaker(host)
    return breaker is not None and not breaker.is_closed
