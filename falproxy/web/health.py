"""`/health/live` and `/health/ready`, for load balancers and orchestrators."""

from aiohttp import web

from falproxy.metrics import METRICS
from falproxy.proxy.forward import DirectWrite


class Drain:
    """The state of the shutdown. A draining process finishes running requests and asks clients to
    send new ones elsewhere."""

    def __init__(self, direct_write: DirectWrite | None = None) -> None:
        self.is_watched = False  # a load balancer asks whether the process is ready
        self._is_draining = False
        self._direct_write = direct_write

    async def start(self, app: web.Application) -> None:
        """Signal handler for `on_shutdown`, sent when the process accepts no new connections."""
        self.begin()

    def begin(self) -> None:
        """Let clients reconnect. Called before the process stops to accept connections, if its
        server can do that."""
        self._is_draining = True
        if self._direct_write is not None:
            self._direct_write.enabled = False  # all responses get a Connection header

    async def add_connection_close(
        self, request: web.BaseRequest, response: web.StreamResponse
    ) -> None:
        """Signal handler for `on_response_prepare`: make clients reconnect."""
        if self._is_draining:
            response.headers["Connection"] = "close"

    async def live(self, request: web.Request) -> web.Response:
        """Respond 200 while the event loop runs."""
        return web.json_response({"status": "ok"})

    async def status(self, request: web.Request) -> web.Response:
        """Respond 200 while the process accepts calls, 503 while it drains."""
        return self._respond({})

    async def ready(self, request: web.Request) -> web.Response:
        """The same, with the states of services and stores. These do not change the status: a load
        balancer would take out all processes."""
        states = request.app[METRICS].dependencies
        dependencies = {name: "up" if is_up() else "down" for name, is_up in states.items()}
        return self._respond({"dependencies": dependencies})

    def _respond(self, details: dict[str, object]) -> web.Response:
        self.is_watched = True
        status = "draining" if self._is_draining else "ok"
        document = {"status": status} | details
        return web.json_response(document, status=503 if self._is_draining else 200)
