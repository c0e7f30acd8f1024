"""create_app and setup: the table of dialects, the order of middleware, the cleanup contexts."""

from collections.abc import Sequence
from functools import partial

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from falproxy.config import Settings
from falproxy.facades import Dialect, answer_errors, refuse_plainly, speak
from falproxy.facades.health import Drain
from falproxy.facades.transparent import transparent
from falproxy.middleware.observe import observe, sign_answer
from falproxy.proxy import forward
from falproxy.upstream import MAX_HEADER_FIELD, connect_upstream

# What the server under the application is told.
HANDLER_ARGS = {
    "handler_cancellation": True,  # a client that leaves takes its call to fal with it
    "auto_decompress": False,  # a body goes up as it came
    "max_field_size": MAX_HEADER_FIELD,
    "max_line_size": MAX_HEADER_FIELD,
}


def create_app(settings: Settings) -> web.Application:
    """The proxy as an application of its own, for `falproxy serve`, `web.run_app` or gunicorn."""
    app = web.Application(handler_args=HANDLER_ARGS, middlewares=[answer_errors(refuse_plainly)])
    add_proxy(app, settings, prefix="", encoded_bodies=True)
    return app


def setup(app: web.Application, settings: Settings, *, prefix: str = "") -> None:
    """Puts the proxy into an application, all its paths below `prefix` (like `/ai`).

    The application's own routes, middleware and errors stay as they are. Make it with
    `handler_args={"handler_cancellation": True}`, so that a client that leaves takes its call to
    fal with it.
    """
    add_proxy(app, settings, prefix=prefix.rstrip("/"), encoded_bodies=False)


def add_proxy(
    app: web.Application, settings: Settings, *, prefix: str, encoded_bodies: bool
) -> None:
    dialects: dict[str, Dialect] = {
        "/api/fal/proxy": transparent(max_body=settings.max_body, encoded_bodies=encoded_bodies),
    }
    for path, dialect in dialects.items():
        order = [observe(), answer_errors(dialect.refuse), speak(dialect)]
        app.router.add_route("*", prefix + path, pass_through(order, forward))

    drain = Drain()
    app.router.add_get(f"{prefix}/health/live", drain.live)
    app.router.add_get(f"{prefix}/health/ready", drain.ready)
    app.on_shutdown.append(drain.begin)

    app.on_response_prepare.extend((sign_answer, drain.sign))
    app.cleanup_ctx.append(
        connect_upstream(
            settings.fal_key,
            origin=settings.upstream_origin,
            timeouts=(settings.connect_timeout, settings.upstream_timeout),
        )
    )


def pass_through(order: Sequence[Middleware], handler: Handler) -> Handler:
    """A handler behind middleware, outermost first.

    The order belongs to a route, where an application's own `middlewares` would belong to all
    of them: those of somebody's application that took the proxy in are none of our business.
    """
    for middleware in reversed(order):
        handler = partial(middleware, handler=handler)
    return handler
