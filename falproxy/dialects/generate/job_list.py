"""The jobs of a caller: a page of them, the state of one, and its cancellation."""

import re
from collections.abc import Sequence
from dataclasses import replace

from aiohttp import hdrs, web
from aiohttp.typedefs import Handler, Middleware

from falproxy.dialects.generate.jobs import (
    GenerateDeps,
    ledger_unavailable,
    save_job,
    try_refresh,
)
from falproxy.dialects.generate.responses import job_to_document
from falproxy.dialects.generate.takeover import JobTakeover
from falproxy.dialects.queue_client import QueueClient, QueuedJob
from falproxy.errors import ProxyError, TemporaryError
from falproxy.json_object import parse_object
from falproxy.proxy.call import OWNER
from falproxy.stores.ledger import UNFINISHED_STATUSES, JobPosition, JobQuery, JobRow, LedgerError

PAGE_SIZE, PAGE_SIZE_MAX = 20, 100  # jobs
CURSOR = re.compile(r"(\d{1,15})-(\w{1,64})", re.ASCII)
CANCEL_STATUSES = (200, 202)  # of fal: the job is out of the queue, or is being cancelled
CANCELLED = ("cancelled", "The job was cancelled.")


def list_jobs(deps: GenerateDeps, takeover: JobTakeover) -> Middleware:
    """Middleware: respond with a page of the caller's jobs, newest first."""

    @web.middleware
    async def list_jobs_middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        takeover.start(request, handler)
        limit, before = read_page(request)
        try:
            owner = request.get(OWNER, "")
            query = JobQuery(owner=owner, api="generate", after=before, limit=limit + 1)
            rows = await deps.jobs.list_jobs(query)
        except LedgerError as error:
            raise ledger_unavailable() from error
        page, has_more = rows[:limit], len(rows) > limit
        jobs = [job_to_document(row) for row in await with_fresh_urls(page, deps)]
        cursor = cursor_of(page[-1]) if has_more else None
        return web.json_response({"jobs": jobs, "nextCursor": cursor})

    return list_jobs_middleware


def show_job(deps: GenerateDeps, takeover: JobTakeover) -> Middleware:
    """Middleware: respond with the current state of a job, which DELETE cancels. An unfinished job
    is refreshed from fal: the process that created it may have died."""

    @web.middleware
    async def show_job_middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        takeover.start(request, handler)
        try:
            row = await deps.find_job(request.match_info["id"], request.get(OWNER, ""))
        except LedgerError as error:
            raise ledger_unavailable() from error
        if row is None:
            raise ProxyError(404, "job_not_found", "There is no such job.")
        queue_client = QueueClient(request, handler, deps.wait_policy)
        if request.method == hdrs.METH_DELETE:
            row = await cancel_job(row, queue_client, deps)
            if row.status == "failed":
                takeover.read_outcome(row)
        elif row.status in UNFINISHED_STATUSES:
            row = await try_refresh(row, queue_client, deps)
        (row,) = await with_fresh_urls([row], deps)
        return web.json_response(job_to_document(row))

    return show_job_middleware


async def cancel_job(row: JobRow, queue_client: QueueClient, deps: GenerateDeps) -> JobRow:
    """Cancel an unfinished job at fal, and return it. A job that is done already is refreshed.

    Raises: ProxyError 409, 502, 503.
    """
    if row.status not in UNFINISHED_STATUSES:
        raise ProxyError(409, "job_finished", f"The job has ended already: it is {row.status}.")
    if row.request_id is None:
        message = "fal.ai has not confirmed the job yet. Try again soon."
        raise TemporaryError(503, "job_not_submitted", message, {hdrs.RETRY_AFTER: "1"})
    response = await queue_client.cancel(QueuedJob(row.app, row.request_id, is_shared=True))
    is_refused = (parse_object(response.body) or {}).get("success") is False
    if response.status in CANCEL_STATUSES and not is_refused:
        error, message = CANCELLED
        return await save_job(
            replace(row, status="failed", error=error, error_message=message), deps
        )
    row = await try_refresh(row, queue_client, deps)
    if row.status in UNFINISHED_STATUSES:
        raise ProxyError(502, "job_not_cancelled", "fal.ai has not cancelled the job.")
    return row


async def with_fresh_urls(rows: Sequence[JobRow], deps: GenerateDeps) -> list[JobRow]:
    """Return the jobs with URLs that have not expired."""
    urls = [image.url for row in rows for image in row.images]
    if deps.fresh_urls is None or not urls:
        return [*rows]
    fresh = await deps.fresh_urls(urls)
    return [
        replace(
            row,
            images=tuple(replace(each, url=fresh.get(each.url, each.url)) for each in row.images),
        )
        for row in rows
    ]


def read_page(request: web.Request) -> tuple[int, JobPosition | None]:
    """Return the number of jobs of a page, and the job before it. Raises: ProxyError 400."""
    limit, cursor = request.query.get("limit", str(PAGE_SIZE)), request.query.get("cursor", "")
    is_number = re.fullmatch(r"\d{1,4}", limit, re.ASCII) is not None
    if not is_number or not 1 <= int(limit) <= PAGE_SIZE_MAX:
        message = f"limit must be a whole number from 1 to {PAGE_SIZE_MAX}."
        raise ProxyError(400, "invalid_request", message)
    match = CURSOR.fullmatch(cursor)
    if cursor and match is None:
        raise ProxyError(400, "invalid_request", "cursor must be the nextCursor of a page.")
    return int(limit), None if match is None else JobPosition(int(match[1]), match[2])


def cursor_of(row: JobRow) -> str:
    return f"{round(row.created_at * 1000)}-{row.id}"
