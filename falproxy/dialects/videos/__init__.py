"""The OpenAI videos API: `/v1/videos`, over fal's queue and the ledger's jobs."""

from collections.abc import Callable

from aiohttp import hdrs, web

from falproxy.dialects import DialectRoute
from falproxy.dialects.generate.takeover import JobTakeover
from falproxy.dialects.openai.errors import refuse
from falproxy.dialects.videos.handlers import VideoHandlers, video_middleware
from falproxy.dialects.videos.jobs import VideoDeps
from falproxy.errors import ProxyError

__all__ = ["VideoDeps", "video_routes"]


def video_routes(deps: VideoDeps) -> dict[str, DialectRoute]:
    takeover = JobTakeover(deps)
    handlers = VideoHandlers(deps, takeover)
    by_path = {
        "/v1/videos": {hdrs.METH_POST: handlers.create, hdrs.METH_GET: handlers.list},
        "/v1/videos/{id}": {hdrs.METH_GET: handlers.show, hdrs.METH_DELETE: handlers.delete},
        "/v1/videos/{id}/content": {hdrs.METH_GET: handlers.send_content},
    }
    return {
        path: DialectRoute(
            check_methods(tuple(methods)), video_middleware(takeover, methods), refuse
        )
        for path, methods in by_path.items()
    }


def check_methods(methods: tuple[str, ...]) -> Callable[[web.Request], None]:
    def check(request: web.Request) -> None:
        """Raises: ProxyError 405."""
        if request.method not in methods:
            message = f"Use {' or '.join(methods)}."
            raise ProxyError(405, "method_not_allowed", message, {"Allow": ", ".join(methods)})

    return check
