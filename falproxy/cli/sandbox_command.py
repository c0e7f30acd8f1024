"""`falproxy sandbox`, the offline fal, and `falproxy serve --sandbox`, the proxy in front of it."""

import logging
from dataclasses import replace
from decimal import Decimal
from functools import partial
from typing import TYPE_CHECKING

from aiohttp import web

from falproxy.app import create_app
from falproxy.app.pipeline import host_middleware
from falproxy.cli.serve_command import public_url, serve_app
from falproxy.dialects import default_error, handle_errors
from falproxy.errors import SettingsError
from falproxy.fal.pricing import MICROS_PER_USD
from falproxy.media.fetch import FETCHER
from falproxy.server.listeners import http_url
from falproxy.settings import Settings
from falproxy.storage_backends import FILES_FOLDER
from falproxy.version import __version__

if TYPE_CHECKING:
    from falproxy.sandbox import Sandbox

logger = logging.getLogger(__name__)

SANDBOX_PREFIX = "/sandbox"  # path of the sandbox's files on the proxy's port


async def run_sandbox(settings: Settings) -> None:
    sandbox = create_sandbox(settings)
    from falproxy.sandbox import create_app as create_sandbox_app

    def on_started(urls: str) -> None:
        sandbox.public_url = public_url(settings, urls)
        logger.info(
            "The SANDBOX imitates fal.ai on %s. Send a proxy there with FALPROXY_UPSTREAM_ORIGIN.",
            urls,
        )

    await serve_app(create_sandbox_app(sandbox), settings, on_started)


async def run_with_sandbox(settings: Settings) -> None:
    """Run the proxy on the configured port, and a sandbox as its upstream on a local port."""
    sandbox = create_sandbox(settings)
    from falproxy.sandbox import create_app as create_sandbox_app
    from falproxy.sandbox import create_cdn
    from falproxy.stores.files.disk import find_file

    upstream_runner = web.AppRunner(create_sandbox_app(sandbox), access_log=None)
    await upstream_runner.setup()
    try:
        await web.TCPSite(upstream_runner, "127.0.0.1", 0).start()
        origin = http_url("127.0.0.1", upstream_runner.addresses[0][1])
        upstream = replace(settings.upstream, origin=origin)
        app = create_app(replace(settings, upstream=upstream))
        cdn = create_cdn(sandbox)
        host_check = host_middleware(settings, is_locked=settings.auth.is_locked)
        cdn.middlewares.extend([handle_errors(default_error), *host_check])
        app.add_subapp(SANDBOX_PREFIX, cdn)

        def on_started(urls: str) -> None:
            sandbox.public_url = public_url(settings, urls) + SANDBOX_PREFIX
            app[FETCHER].trust(f"{sandbox.public_url}/")
            if settings.storage_backend == "disk":
                find = partial(find_file, settings.data_dir / FILES_FOLDER)
                sandbox.files.find_external = find
            app[FETCHER].find_local = sandbox.files.find_local
            logger.info(
                "falproxy %s listens on %s with the SANDBOX: nothing leaves this machine, "
                "nothing costs money. Set FAL_KEY to use fal.ai.",
                __version__,
                urls,
            )

        await serve_app(app, settings, on_started)
    finally:
        await upstream_runner.cleanup()


def create_sandbox(settings: Settings) -> "Sandbox":
    """Raises: SettingsError, an optional package of the sandbox is not installed."""
    try:
        from falproxy.sandbox import Sandbox
    except ModuleNotFoundError as error:
        raise SettingsError(
            f"The sandbox needs {error.name}: pip install 'falproxy[sandbox]'."
        ) from error
    micros = settings.sandbox_balance
    balance = None if micros is None else Decimal(micros) / MICROS_PER_USD
    return Sandbox(public_url="", balance=balance, hosts=settings.auth.allowed_hosts)
