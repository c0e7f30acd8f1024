"""`/api/images` and `/api/templates`: one API for all models, with persistent jobs."""

from collections.abc import Awaitable, Callable
from functools import partial

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from falproxy.dialects import DialectRoute, default_error
from falproxy.dialects.generate.endpoint_models import ModelFinder
from falproxy.dialects.generate.job_list import list_jobs, show_job
from falproxy.dialects.generate.jobs import (
    GenerateDeps,
    GenerateJob,
    job_id_of,
)
from falproxy.dialects.generate.model_list import list_models, list_templates
from falproxy.dialects.generate.requests import (
    JobSpec,
    check_method,
    read_generate,
    read_template,
)
from falproxy.dialects.generate.takeover import JobTakeover
from falproxy.proxy.call import OWNER, USER
from falproxy.proxy.user import name_user
from falproxy.stores.ledger import JobRow, new_job_id

__all__ = ["GenerateDeps", "generate_routes"]

ReadRequest = Callable[[web.Request, ModelFinder, int], Awaitable[JobSpec]]


def generate_routes(deps: GenerateDeps) -> dict[str, DialectRoute]:
    takeover = JobTakeover(deps)
    generate, template = (
        create_job(deps, takeover, read) for read in (read_generate, read_template)
    )
    routes = {
        "/api/images/generate": (generate, ["POST"]),
        "/api/images/jobs": (list_jobs(deps, takeover), ["GET"]),
        "/api/images/jobs/{id}": (show_job(deps, takeover), ["GET", "DELETE"]),
        "/api/images/models": (list_models(deps.registry, deps.endpoints, deps.prices), ["GET"]),
        "/api/templates": (list_templates(deps.registry, deps.endpoints), ["GET"]),
        "/api/templates/{name}": (template, ["POST"]),
    }
    return {
        path: DialectRoute(partial(check_method, methods=methods), middleware, default_error)
        for path, (middleware, methods) in routes.items()
    }


def create_job(deps: GenerateDeps, takeover: JobTakeover, read: ReadRequest) -> Middleware:
    """Middleware: create a job for the request, and respond with its result."""
    finder = ModelFinder(deps.registry, deps.endpoints, deps.prices)

    @web.middleware
    async def create_job_middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        takeover.start(request, handler)
        spec = await read(request, finder, deps.max_body)
        if spec.user_id is not None:
            name_user(request, spec.user_id, "userId")
        row = JobRow(
            id=job_id_of(request) or new_job_id(),
            owner=request.get(OWNER, ""),
            user_id=request.get(USER, spec.user_id),
            model=spec.model.name,
            endpoint=spec.model.endpoint,
        )
        job = GenerateJob(request, handler, deps, spec, row, takeover.follow)
        return await job.respond()

    return create_job_middleware
