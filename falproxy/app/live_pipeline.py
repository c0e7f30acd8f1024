"""The pipeline of live video, imported with the first call that needs it.

The body of a call names its endpoint or its session, so that the checks of both are here, inside
`authorization`.
"""

from collections.abc import Awaitable, Sequence
from dataclasses import dataclass

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from falproxy.app.pipeline import (
    CallResources,
    LiveState,
    compose,
    create_policy,
    log_pipeline,
)
from falproxy.fal.target import LIVE_MODEL_CALLS, Operation
from falproxy.metrics import METRICS
from falproxy.middleware.live_accounting import account_heartbeats
from falproxy.middleware.live_calls import (
    LivePolicy,
    check_live_calls,
    end_sessions,
    read_opened_session,
)
from falproxy.middleware.live_limits import continue_sessions
from falproxy.proxy.call import CALL
from falproxy.proxy.forward import forward
from falproxy.proxy.prices import PriceBook
from falproxy.settings import Settings
from falproxy.stores.ledger.writer import LEDGER_WRITER
from falproxy.stores.live_sessions import LiveSessions
from falproxy.stores.ownership import OWNERSHIP, close_ownership, open_ownership


@dataclass(frozen=True, slots=True)
class LiveResources:
    """The dependencies of the pipeline of live video.

    is_locked: callers are authenticated.
    """

    app: web.Application
    settings: Settings
    resources: CallResources
    prices: PriceBook
    is_locked: bool
    state: LiveState


def create_live_pipeline(
    live: LiveResources, layers: Sequence[Middleware], post: Handler
) -> Handler:
    """Return the handler of calls that may be live video.

    layers: the middleware of model calls that live video passes as well.
    post: handles calls of models, which are not live video.
    """
    app, auth = live.app, live.settings.auth
    opened = live.state.sessions = open_sessions(live)
    policy = LivePolicy(create_policy(live.settings), live.is_locked, auth.live_max_seconds)
    limits = live.resources.limits
    heartbeat_layers = [account_heartbeats(app[LEDGER_WRITER], live.prices, app[METRICS])]
    heartbeat_layers += [] if limits is None else [continue_sessions(limits)]
    sessions = compose([*layers, read_opened_session(auth.live_max_seconds)], forward)
    heartbeats = compose([*heartbeat_layers, end_sessions()], forward)
    log_pipeline("live video calls", sessions)
    log_pipeline("live video heartbeats", heartbeats)

    def by_operation(request: web.Request) -> Awaitable[web.StreamResponse]:
        call = request[CALL]
        if call.target.operation is Operation.HEARTBEAT:
            return heartbeats(request)
        is_live = call.target.operation in LIVE_MODEL_CALLS
        return (sessions if is_live else post)(request)

    check = check_live_calls(policy, opened, live.resources.key_pool)
    return compose([check], by_operation)


def open_sessions(live: LiveResources) -> LiveSessions:
    """Open the record of sessions, in the store of request owners."""
    if (ownership := live.app.get(OWNERSHIP)) is None:
        result_cache = live.resources.result_cache
        breaker = None if result_cache is None else result_cache.breaker
        ownership, own_store = open_ownership(
            breaker, live.settings.data_dir, live.settings.cache.owner_retention
        )
        live.state.closing.push_async_callback(close_ownership, ownership, own_store)
    return LiveSessions(ownership)
