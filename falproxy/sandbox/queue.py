"""queue.fal.run: submit, status, status stream, result, cancel."""

from urllib.parse import parse_qs

from aiohttp import web

from falproxy.sandbox.authentication import account_of, authorization, refusal
from falproxy.sandbox.events import event, open_events
from falproxy.sandbox.faults import CATALOGUE, obey, prompt_of
from falproxy.sandbox.inference import Task, infer
from falproxy.sandbox.input_validation import parse_body
from falproxy.sandbox.job_queue import Job
from falproxy.sandbox.models import app_of
from falproxy.sandbox.request import QUEUE, Visit
from falproxy.sandbox.responses import Answer, FalError, plain
from falproxy.sandbox.run import check_app, start_timeout
from falproxy.sandbox.state import Sandbox
from falproxy.sandbox.webhooks import deliver

PAUSE = 0.3  # seconds from a free runner to a running job
NOT_FOUND = Answer(404, {"status": "NOT_FOUND"})


async def submit(visit: Visit) -> web.StreamResponse:
    """POST /<endpoint>: a job, whatever its input; what is wrong with it shows in its result."""
    sandbox, request = visit.sandbox, visit.request
    endpoint = check_app(visit.named["endpoint"])
    body = parse_body(await request.read())
    obey(prompt_of(body), "submit", sandbox.failures)
    options = parse_qs(visit.address.query)
    check_length(sandbox, options.get("fal_max_queue_length", [""])[0])
    job = Job(endpoint, app_of(endpoint), visit.account, prompt_of(body))
    job.id = visit.request_id
    job.webhook = options.get("fal_webhook", [None])[0]
    job.pause = PAUSE / sandbox.speed
    job.start_timeout = start_timeout(request)

    async def work(job: Job) -> Answer:
        def log(message: str) -> None:
            job.log(message)
            sandbox.queue.tell()

        return await infer(Task(sandbox, endpoint, body, job.id), log)

    async def finished(job: Job) -> None:
        await deliver(sandbox.signer, job, sandbox.speed)

    sandbox.queue.submit(job, work, finished)
    document = {"status": "IN_QUEUE", "request_id": job.id, "gateway_request_id": job.id}
    position = sandbox.queue.position(job)
    return Answer(200, {**document, **urls(job), "queue_position": position}).response(job.id)


def check_length(sandbox: Sandbox, limit: str) -> None:
    """Raises FalError: 429, more jobs wait than the caller wants to wait behind."""
    if limit.isdecimal() and len(sandbox.queue) > int(limit):
        raise CATALOGUE[429, "queue_full"].error()


def urls(job: Job) -> dict[str, str]:
    """The three addresses of a request; they keep owner and alias only."""
    root = f"https://{QUEUE}/{job.app}/requests/{job.id}"
    return {"response_url": root, "status_url": f"{root}/status", "cancel_url": f"{root}/cancel"}


def find_job(visit: Visit) -> Job:
    """The job that the path names, under its app or its full id.

    Raises:
        FalError: 404, there is none for this key; 401, the key is bad, or none came for a job
        that exists.
    """
    job = visit.sandbox.queue.get(visit.named["id"])
    if job is not None and job.app != app_of(visit.named["endpoint"]):
        job = None
    account = account_of(visit.sandbox, visit.request, visit.address, visit.named)
    if account is None and (job is not None or authorization(visit.request)[0]):
        raise refusal(visit)
    if job is None or job.account != account:
        raise FalError(NOT_FOUND)
    return job


def status_of(job: Job, sandbox: Sandbox, logs: list[dict[str, str]] | None) -> Answer:
    """202 while the job waits or runs, 200 when it has ended, well or not.

    logs: the lines to tell, None when nobody asked for them.
    """
    document: dict[str, object] = {"request_id": job.id, **urls(job)}
    position = sandbox.queue.position(job)
    if job.answer is None and position is not None:
        return Answer(202, {"status": "IN_QUEUE", "queue_position": position, **document})
    # The key is there in any case: fal_client reads it without asking.
    document["logs"] = logs
    if job.answer is None:
        return Answer(202, {"status": "IN_PROGRESS", **document})
    document["metrics"] = {"inference_time": job.seconds}
    if job.answer.error is not None:
        document |= {"error": job.answer.error, "error_type": job.answer.error_type}
    return Answer(200, {"status": "COMPLETED", **document})


def wants_logs(visit: Visit) -> bool:
    return parse_qs(visit.address.query).get("logs", [""])[0].lower() in ("1", "true")


async def status(visit: Visit) -> web.StreamResponse:
    job = find_job(visit)
    obey(job.prompt, "status", visit.sandbox.failures)
    return status_of(job, visit.sandbox, job.logs if wants_logs(visit) else None).response(job.id)


async def status_stream(visit: Visit) -> web.StreamResponse:
    """One event for each change of the status, until the job has ended. An event tells only the
    log lines that are new: the JavaScript client adds them up."""
    job = find_job(visit)
    obey(job.prompt, "status", visit.sandbox.failures)
    response = await open_events(visit, job.id)
    told, last = 0, None
    async for _ in visit.sandbox.queue.follow(job):
        count = len(job.logs) if wants_logs(visit) else 0
        logs = job.logs[told:count] if wants_logs(visit) else None
        now = (job.answer is None, visit.sandbox.queue.position(job), count)
        if now != last:
            await response.write(event(status_of(job, visit.sandbox, logs).body))
        told, last = count, now
    return response


async def result(visit: Visit) -> web.StreamResponse:
    """The output, or the failure with its own status and body."""
    job = find_job(visit)
    obey(job.prompt, "result", visit.sandbox.failures)
    if job.answer is None:
        raise plain(400, "Request is still in progress")
    return job.answer.response(job.id)


async def cancel(visit: Visit) -> web.StreamResponse:
    job = find_job(visit)
    obey(job.prompt, "cancel", visit.sandbox.failures)
    if job.answer is not None:
        return Answer(400, {"status": "ALREADY_COMPLETED"}).response(job.id)
    visit.sandbox.queue.cancel(job)
    return Answer(202, {"status": "CANCELLATION_REQUESTED"}).response(job.id)
