"""`/api/images` and `/api/templates`: one API for all models, with persistent jobs."""

from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import partial

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from falproxy.dialects import DialectRoute, default_error
from falproxy.dialects.generate.endpoint_models import ModelFinder
from falproxy.dialects.generate.jobs import (
    GenerateDeps,
    GenerateJob,
    job_id_of,
    ledger_unavailable,
    try_refresh,
)
from falproxy.dialects.generate.model_list import list_models
from falproxy.dialects.generate.requests import (
    JobSpec,
    check_method,
    read_generate,
    read_template,
)
from falproxy.dialects.generate.responses import job_to_document
from falproxy.dialects.generate.takeover import JobTakeover
from falproxy.dialects.queue_client import QueueClient
from falproxy.errors import ProxyError
from falproxy.proxy.call import OWNER, USER
from falproxy.proxy.user import name_user
from falproxy.stores.ledger import UNFINISHED_STATUSES, JobRow, LedgerError, new_job_id

__all__ = ["GenerateDeps", "generate_routes"]

ReadRequest = Callable[[web.Request, ModelFinder, int], Awaitable[JobSpec]]


def generate_routes(deps: GenerateDeps) -> dict[str, DialectRoute]:
    post, get = (partial(check_method, method=method) for method in ("POST", "GET"))
    takeover = JobTakeover(deps)
    generate, template = (
        create_job(deps, takeover, read) for read in (read_generate, read_template)
    )
    models = list_models(deps.registry, deps.endpoints)
    return {
        "/api/images/generate": DialectRoute(post, generate, default_error),
        "/api/templates/{name}": DialectRoute(post, template, default_error),
        "/api/images/jobs/{id}": DialectRoute(get, get_job(deps, takeover), default_error),
        "/api/images/models": DialectRoute(get, models, default_error),
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


def get_job(deps: GenerateDeps, takeover: JobTakeover) -> Middleware:
    """Middleware: respond with the current state of a job. An unfinished job is refreshed from fal:
    the process that created it may have died."""

    @web.middleware
    async def get_job_middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        takeover.start(request, handler)
        try:
            row = await deps.find_job(request.match_info["id"], request.get(OWNER, ""))
        except LedgerError as error:
            raise ledger_unavailable() from error
        if row is None:
            raise ProxyError(404, "job_not_found", "There is no such job.")
        if row.status in UNFINISHED_STATUSES:
            row = await try_refresh(row, QueueClient(request, handler, deps.wait_policy), deps)
        if row.images and deps.fresh_urls is not None:
            urls = await deps.fresh_urls([image.url for image in row.images])
            images = (replace(image, url=urls.get(image.url, image.url)) for image in row.images)
            row = replace(row, images=tuple(images))
        return web.json_response(job_to_document(row))

    return get_job_middleware
