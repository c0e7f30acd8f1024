"""`/health/live` and `/health/ready`, for whoever watches the process."""

from aiohttp import web

from falproxy.proxy.forward import DirectWrite


class Drain:
    """Whether the process has begun to stop: it finishes what runs and takes nothing new."""

    def __init__(self, direct_write: DirectWrite | None = None) -> None:
        self._is_draining = False
        self._direct_write = direct_write

    async def start(self, app: web.Application) -> None:
        """Signal handler for `on_shutdown`, which comes when no new connection is accepted."""
        self._is_draining = True
        if self._direct_write is not None:
            self._direct_write.enabled = False  # every answer has one header more from now on

    async def add_connection_close(
        self, request: web.BaseRequest, response: web.StreamResponse
    ) -> None:
        """Signal handler for `on_response_prepare`: tells clients to connect anew elsewhere."""
        if self._is_draining:
            response.headers["Connection"] = "close"

    async def live(self, request: web.Request) -> web.Response:
        """200 as long as the event loop turns."""
        return web.json_response({"status": "ok"})

    async def ready(self, request: web.Request) -> web.Response:
        """200 while calls are welcome, 503 from the moment the process begins to stop."""
        if self._is_draining:
            return web.json_response({"status": "draining"}, status=503)
        return web.json_response({"status": "ok"})
