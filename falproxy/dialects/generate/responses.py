"""What became of a job: from fal's answer into the ledger, and from there to the client."""

from dataclasses import replace

from falproxy.dialects.generate.schema import JobAnswer, JobError
from falproxy.dialects.generate.schema import Picture as PictureAnswer
from falproxy.dialects.kontext import Asked, failure_of, parsed
from falproxy.dialects.queue_client import Answer
from falproxy.errors import ProxyError
from falproxy.fal.pricing import USD, cost_of, read_units, settle
from falproxy.fal.registry import Model
from falproxy.fal.results import pictures_in, sizes_of
from falproxy.stores.cache.virtual_ids import is_own
from falproxy.stores.ledger import JobRow

UNITS = "x-fal-billable-units"


def failure_in(answer: Answer, model: Model | None) -> ProxyError | None:
    """Why there are no pictures in an answer of fal's; None where there are. model: whose names
    of inputs the client knows; None where it is not in the registry any more."""
    if answer.status == 200:
        if pictures_in(answer.body):
            return None
        return ProxyError(500, "upstream_unreadable", "fal.ai's answer names no pictures.")
    failure = failure_of(answer, Asked("", "image_url", None), {})
    name = refused_input(answer.body, model) if failure.code == "input_refused" else None
    if name is not None:
        failure.message = f"fal.ai does not accept {name}."
    return failure


def refused_input(body: bytes, model: Model | None) -> str | None:
    """The first input that fal names in a refusal, as the client knows it."""
    if model is None:
        return None
    names = {model.rename.get(name, name): name for name in model.accepted}
    details = parsed(body).get("detail")
    entry = details[0] if isinstance(details, list) and details else None
    loc = entry.get("loc") if isinstance(entry, dict) else None
    words = loc if isinstance(loc, list) else []
    return next((names[word] for word in words if isinstance(word, str) and word in names), None)


def outcome_of(row: JobRow, answer: Answer, model: Model | None) -> JobRow:
    """The job at its end."""
    rate = model.rate if model else None
    is_free = row.request_id is not None and is_own(row.request_id)
    units = read_units(answer.headers.get(UNITS))
    settled = 0 if is_free else settle(rate, units, answer.status)
    if (failure := failure_in(answer, model)) is not None:
        failed = replace(row, status="failed", settled=settled)
        return replace(failed, error=failure.code, error_message=failure.message)
    pictures = pictures_in(answer.body)
    if settled is None:
        settled = cost_of(rate, sizes_of(pictures))
    return replace(row, status="completed", settled=settled, images=pictures)


def answer_of(row: JobRow) -> JobAnswer:
    error = None
    if row.error is not None:
        error = JobError(code=row.error, message=row.error_message or "The job failed.")
    return JobAnswer(
        job_id=row.id,
        status=row.status,
        model=row.model,
        image_url=row.images[0].url if row.images else None,
        images=[
            PictureAnswer(url=each.url, width=each.width, height=each.height) for each in row.images
        ],
        cost=None if row.settled is None else row.settled / USD,
        user_id=row.user_id,
        error=error,
    )
