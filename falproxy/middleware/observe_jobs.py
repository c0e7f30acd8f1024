"""Notes the end of jobs that status polls and status streams show, for the ledger."""

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from falproxy.fal.target import Operation
from falproxy.job_times import JobTimes
from falproxy.proxy.call import CALL
from falproxy.proxy.forward import RelayedResponse
from falproxy.proxy.head_only import any_request_id

# fal responds with 202 to a poll of a job that has not ended (fal-api.md, 2.2).
COMPLETED_STATUS = 200
COMPLETED_EVENT = b'"COMPLETED"'


def observe_jobs(job_times: JobTimes) -> Middleware:
    """Middleware of status polls. The fast path does the same itself (`in_flight.py`)."""

    @any_request_id
    @web.middleware
    async def observe_jobs_middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        response = await handler(request)
        target = request[CALL].target
        if (
            response.status != COMPLETED_STATUS
            or target.request_id is None
            or not isinstance(response, RelayedResponse)
        ):
            return response
        request_id, is_stream = target.request_id, target.operation is Operation.STATUS_STREAM

        def observe(piece: bytes) -> None:
            if not is_stream or COMPLETED_EVENT in piece:
                job_times.observe(request_id, piece)

        response.on_body_end(lambda: None, observe)
        return response

    return observe_jobs_middleware
