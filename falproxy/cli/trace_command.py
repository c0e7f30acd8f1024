"""`falproxy trace`: the story of one request from the ledger, as text or as JSON."""

import json
from collections.abc import AsyncIterator, Iterator

from falproxy.cli.usage_command import format_duration, format_name
from falproxy.fal.pricing import MICROS_PER_USD, format_usd
from falproxy.settings import Settings
from falproxy.stores.ledger import FREE_OUTCOMES, CallRecord, JobRow
from falproxy.stores.ledger.reports import Json, call_json, format_time
from falproxy.stores.ledger.request_trace import (
    CALLS_MAX,
    RecordedCall,
    RecordedOutcome,
    RequestTrace,
    read_request_trace,
)
from falproxy.stores.ledger.writer import LEDGER_FILE, choose_database

NOT_FOUND = (
    "The ledger has nothing about this id. It has model calls and their results, but no status "
    "polls; calls are written within a second."
)
MORE_CALLS = f"There are more calls with this id than the first {CALLS_MAX}."
INDENT = "    "


class UnknownRequest(Exception):
    """The ledger has nothing about the id."""


async def trace(settings: Settings, request_id: str, *, is_json: bool) -> AsyncIterator[str]:
    """Return the lines of the report. Raises: LedgerError, SettingsError, UnknownRequest."""
    found = await read_trace(settings, request_id)
    if not found:
        raise UnknownRequest
    if is_json:
        yield json.dumps(trace_json(request_id, found), indent=2)
        return
    for line in trace_lines(found):
        yield line


async def read_trace(settings: Settings, request_id: str) -> RequestTrace:
    file = settings.data_dir / LEDGER_FILE
    if settings.ledger.database_url is None and not file.exists():
        raise UnknownRequest
    database = choose_database(settings.ledger.database_url, settings.data_dir)
    try:
        return await read_request_trace(database, request_id)
    finally:
        await database.close()


def trace_json(request_id: str, found: RequestTrace) -> Json:
    return {
        "id": request_id,
        "calls": [
            call_json(call.record) | {"result": outcome_json(call.outcome)} for call in found.calls
        ],
        "result": outcome_json(found.outcome),
        "jobs": [job_json(job) for job in found.jobs],
        "has_more": found.has_more,
    }


def outcome_json(outcome: RecordedOutcome | None) -> Json | None:
    if outcome is None:
        return None
    return {
        "at": format_time(outcome.at),
        "status": outcome.status,
        "error": outcome.error,
        "units": None if outcome.units is None else float(outcome.units),
        "spent": None if outcome.settled is None else outcome.settled / MICROS_PER_USD,
        "ended_at": None if outcome.ended_at is None else format_time(outcome.ended_at),
        "run_seconds": outcome.run_seconds,
        "stored_seconds": outcome.stored_seconds,
    }


def job_json(job: JobRow) -> Json:
    return {
        "id": job.id,
        "api": job.api,
        "request_id": job.request_id,
        "model": job.model,
        "endpoint": job.endpoint,
        "status": job.status,
        "error": job.error,
        "files": len(job.images),
        "created_at": format_time(job.created_at),
        "finished_at": None if job.finished_at is None else format_time(job.finished_at),
    }


def trace_lines(found: RequestTrace) -> Iterator[str]:
    for call in found.calls:
        yield from call_lines(call)
    if found.outcome is not None:
        yield outcome_line(found.outcome)
    for job in found.jobs:
        yield from job_lines(job)
    if found.has_more:
        yield MORE_CALLS


def call_lines(call: RecordedCall) -> Iterator[str]:
    record = call.record
    yield join(
        format_time(record.at),
        record.operation or "call",
        record.endpoint,
        f"status {record.status}",
    )
    own = format_duration(max(0.0, record.seconds - record.upstream_seconds))
    facts = {
        "request id": record.proxy_request_id,
        "fal's request id": record.request_id,
        "through": record.route,
        "caller": record.principal,
        "user": record.user_id,
        "duration": f"{own} in falproxy, {format_duration(record.upstream_seconds)} at fal",
        "files": record.stored_seconds and f"stored in {format_duration(record.stored_seconds)}",
        "error": record.error or record.error_type,
        "cache": record.cache,
        "cost": cost_text(record),
    }
    yield from (f"{INDENT}{name}: {format_name(fact)}" for name, fact in facts.items() if fact)
    if call.outcome is not None:
        yield outcome_line(call.outcome)


def cost_text(record: CallRecord) -> str | None:
    if record.settled is not None:
        text = usd(record.settled)
    elif record.estimated is not None and record.cache not in FREE_OUTCOMES:
        text = f"{usd(record.estimated)} expected"
    else:
        text = None
    if record.cache in FREE_OUTCOMES and record.estimated:
        saved = f"{usd(record.estimated)} saved"
        return f"{text}, {saved}" if text else saved
    return text


def outcome_line(outcome: RecordedOutcome) -> str:
    return join(
        format_time(outcome.at),
        "result",
        f"status {outcome.status}",
        outcome.error,
        None if outcome.units is None else f"{outcome.units.normalize():f} units",
        None if outcome.settled is None else usd(outcome.settled),
        None if outcome.run_seconds is None else f"ran {format_duration(outcome.run_seconds)}",
        None
        if outcome.stored_seconds is None
        else f"files stored in {format_duration(outcome.stored_seconds)}",
    )


def job_lines(job: JobRow) -> Iterator[str]:
    """Yield the lines of a job of an API with jobs of its own."""
    yield join(format_time(job.created_at), f"job {job.id}", f"of the {job.api} API", job.model)
    end = job.finished_at
    if end is not None:
        files = f"{len(job.images)} files" if job.images else None
        yield join(format_time(end), f"job {job.id}", job.status, job.error, files)


def usd(micros: int) -> str:
    return f"${format_usd(micros)}"


def join(*parts: str | None) -> str:
    return "  ".join(format_name(part) for part in parts if part)
