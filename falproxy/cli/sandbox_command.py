"""`falproxy sandbox`, the offline fal, and `falproxy serve --sandbox`, the proxy in front of it."""

import logging
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from aiohttp import web

from falproxy.app import create_app
from falproxy.cli.serve_command import http_url, public_url, serve_app
from falproxy.errors import SettingsError
from falproxy.media.fetch import FETCHER
from falproxy.settings import Settings
from falproxy.storage_backends import FILES_FOLDER
from falproxy.version import __version__

if TYPE_CHECKING:
    from falproxy.sandbox import Sandbox

logger = logging.getLogger(__name__)

SANDBOX_PREFIX = "/sandbox"  # path of the sandbox's files on the proxy's port


async def run_sandbox(settings: Settings) -> None:
    sandbox = create_sandbox()
    from falproxy.sandbox import create_app as create_sandbox_app

    def on_started(port: int) -> None:
        sandbox.public_url = public_url(settings, port)
        logger.info(
            "The SANDBOX imitates fal.ai on %s. Send a proxy there with FALPROXY_UPSTREAM_ORIGIN.",
            http_url(settings.server.host, port),
        )

    await serve_app(create_sandbox_app(sandbox), settings, on_started)


async def run_with_sandbox(settings: Settings) -> None:
    """Run the proxy on the configured port, and a sandbox as its upstream on a local port."""
    sandbox = create_sandbox()
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
        app.add_subapp(SANDBOX_PREFIX, create_cdn(sandbox))

        def on_started(port: int) -> None:
            sandbox.public_url = public_url(settings, port) + SANDBOX_PREFIX
            app[FETCHER].trust(f"{sandbox.public_url}/")
            if settings.storage_backend == "disk":
                find = partial(find_file, settings.data_dir / FILES_FOLDER)
                app[FETCHER].find_local = sandbox.files.find_external = find
            logger.info(
                "falproxy %s listens on %s with the SANDBOX: nothing leaves this machine, "
                "nothing costs money. Set FAL_KEY to use fal.ai.",
                __version__,
                http_url(settings.server.host, port),
            )

        await serve_app(app, settings, on_started)
    finally:
        await upstream_runner.cleanup()


def create_sandbox() -> "Sandbox":
    """Raises: SettingsError, an optional package of the sandbox is not installed."""
    try:
        from falproxy.sandbox import Sandbox
    except ModuleNotFoundError as error:
        raise SettingsError(
            f"The sandbox needs {error.name}: pip install 'falproxy[sandbox]'."
        ) from error
    return Sandbox(public_url="")
