"""queue.fal.run: submit, status, status stream, result, cancel."""

from dataclasses import replace
from urllib.parse import parse_qs

from aiohttp import web

from falproxy.sandbox.authentication import find_account, parse_authorization, unauthorized_error
from falproxy.sandbox.faults import FAULTS_BY_KEY, check_balance, get_prompt, raise_requested_fault
from falproxy.sandbox.hosts import check_webhook_origin
from falproxy.sandbox.inference import InferenceTask, run_inference
from falproxy.sandbox.input_validation import parse_body
from falproxy.sandbox.job_queue import Job
from falproxy.sandbox.models import app_id
from falproxy.sandbox.request import QUEUE, TAGS_HEADER, FalRequest, parse_tags
from falproxy.sandbox.responses import (
    FalError,
    FalResponse,
    detail_error,
    format_event,
    open_event_stream,
)
from falproxy.sandbox.run import check_app, parse_start_timeout
from falproxy.sandbox.state import Sandbox
from falproxy.sandbox.webhooks import deliver_webhook

START_DELAY = 0.3  # seconds between a free runner and the start of a job
NOT_FOUND = FalResponse(404, {"status": "NOT_FOUND"})


async def submit(request: FalRequest) -> web.StreamResponse:
    """POST /<endpoint>: accept a job with any input. Input errors become the job's result."""
    sandbox, http_request = request.sandbox, request.http_request
    endpoint = check_app(request.path_params["endpoint"])
    body = parse_body(await http_request.read())
    prompt = get_prompt(body)
    raise_requested_fault(prompt, "submit", sandbox.failures)
    check_balance(sandbox)
    tags = parse_tags(http_request.headers.getall(TAGS_HEADER, ()))
    options = parse_qs(request.target.query)
    check_queue_length(sandbox, options.get("fal_max_queue_length", [""])[0])
    job = Job(endpoint, app_id(endpoint), request.account, prompt)
    job.id = request.request_id
    job.webhook_url = options.get("fal_webhook", [None])[0]
    if job.webhook_url is not None:
        check_webhook_origin(http_request)
    job.start_delay = START_DELAY / sandbox.speed
    job.start_timeout = parse_start_timeout(http_request)

    async def run_job(job: Job) -> FalResponse:
        def log(message: str) -> None:
            job.log(message)
            sandbox.queue.notify()

        return await run_inference(InferenceTask(sandbox, endpoint, body, job.id, tags), log)

    async def on_finished(job: Job) -> None:
        await deliver_webhook(sandbox.signer, job, sandbox.speed)

    sandbox.queue.submit(job, run_job, on_finished)
    ids = {"request_id": job.id, "gateway_request_id": job.id}
    position = sandbox.queue.position(job)
    document = {"status": "IN_QUEUE", **ids, **job_urls(job), "queue_position": position}
    return FalResponse(200, document).to_web_response(job.id)


def check_queue_length(sandbox: Sandbox, limit: str) -> None:
    """Check the number of waiting jobs against the caller's limit.

    Raises:
        FalError: 429 if more jobs wait.
    """
    if limit.isdecimal() and len(sandbox.queue) > int(limit):
        raise FAULTS_BY_KEY[429, "queue_full"].to_error()


def job_urls(job: Job) -> dict[str, str]:
    """Return the three URLs of a job. As at fal, they have the app id, not the endpoint id."""
    root = f"https://{QUEUE}/{job.app}/requests/{job.id}"
    return {"response_url": root, "status_url": f"{root}/status", "cancel_url": f"{root}/cancel"}


def find_job(request: FalRequest) -> Job:
    """Return the job in the path, which names its app id or its endpoint id.

    Raises:
        FalError: 404 if the account has no such job; 401 if the key is bad, or if it is missing
            and the job exists.
    """
    job = request.sandbox.queue.get(request.path_params["id"])
    if job is not None and job.app != app_id(request.path_params["endpoint"]):
        job = None
    account = find_account(request)
    has_authorization = bool(parse_authorization(request.http_request)[0])
    if account is None and (job is not None or has_authorization):
        raise unauthorized_error(request)
    if job is None or job.account != account:
        raise FalError(NOT_FOUND)
    return job


def find_readable_job(request: FalRequest) -> Job:
    """Return the job in the path. fal also locks the reads of a locked account.

    Raises:
        FalError: as `find_job`; 403 if the account has run out of balance.
    """
    job = find_job(request)
    if request.sandbox.is_locked:
        error = FAULTS_BY_KEY[403, "locked"].to_error()
        error.response = replace(error.response, has_request_id=False)
        raise error
    return job


def status_response(job: Job, sandbox: Sandbox, logs: list[dict[str, str]] | None) -> FalResponse:
    """Return 202 while the job waits or runs, and 200 after its end, failed or not.

    logs: log lines to include. None if the caller did not request logs.
    """
    document: dict[str, object] = {"request_id": job.id, **job_urls(job)}
    position = sandbox.queue.position(job)
    if job.response is None and position is not None:
        return FalResponse(202, {"status": "IN_QUEUE", "queue_position": position, **document})
    # Always present: fal_client reads the key unconditionally.
    document["logs"] = logs
    if job.response is None:
        return FalResponse(202, {"status": "IN_PROGRESS", **document})
    document["metrics"] = {"inference_time": job.inference_seconds}
    if job.response.error_message is not None:
        document["error"] = job.response.error_message
        document["error_type"] = job.response.error_type
    return FalResponse(200, {"status": "COMPLETED", **document})


def wants_logs(request: FalRequest) -> bool:
    return parse_qs(request.target.query).get("logs", [""])[0].lower() in ("1", "true")


async def status(request: FalRequest) -> web.StreamResponse:
    """GET .../requests/<id>/status."""
    job = find_readable_job(request)
    raise_requested_fault(job.prompt, "status", request.sandbox.failures)
    logs = job.logs if wants_logs(request) else None
    return status_response(job, request.sandbox, logs).to_web_response(job.id)


async def status_stream(request: FalRequest) -> web.StreamResponse:
    """GET .../requests/<id>/status/stream: one event for each change, until the job has ended.

    An event has the new log lines only, because fal's JavaScript client concatenates them.
    """
    job = find_job(request)
    sandbox = request.sandbox
    raise_requested_fault(job.prompt, "status", sandbox.failures)
    response = await open_event_stream(request.http_request, job.id)
    sent_lines, previous_state = 0, None
    async for _ in sandbox.queue.changes(job):
        line_count = len(job.logs) if wants_logs(request) else 0
        logs = job.logs[sent_lines:line_count] if wants_logs(request) else None
        state = (job.response is None, sandbox.queue.position(job), line_count)
        if state != previous_state:
            await response.write(format_event(status_response(job, sandbox, logs).body))
        sent_lines, previous_state = line_count, state
    return response


async def result(request: FalRequest) -> web.StreamResponse:
    """GET .../requests/<id>: the output, or the error with its own status and body."""
    job = find_readable_job(request)
    raise_requested_fault(job.prompt, "result", request.sandbox.failures)
    if job.response is None:
        raise detail_error(400, "Request is still in progress")
    return job.response.to_web_response(job.id)


async def cancel(request: FalRequest) -> web.StreamResponse:
    """PUT .../requests/<id>/cancel."""
    job = find_job(request)
    raise_requested_fault(job.prompt, "cancel", request.sandbox.failures)
    if job.response is not None:
        return FalResponse(400, {"status": "ALREADY_COMPLETED"}).to_web_response(job.id)
    request.sandbox.queue.cancel(job)
    return FalResponse(202, {"status": "CANCELLATION_REQUESTED"}).to_web_response(job.id)
