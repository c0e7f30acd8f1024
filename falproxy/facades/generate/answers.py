"""What became of a job: from fal's answer into the ledger, and from there to the client."""

from dataclasses import replace

from falproxy.errors import ProxyError
from falproxy.facades.generate.models import JobAnswer, JobError
from falproxy.facades.generate.models import Picture as PictureAnswer
from falproxy.facades.kontext import Asked, failure_of
from falproxy.facades.waiting import Answer
from falproxy.ledger import JobRow
from falproxy.pictures import pictures_in, sizes_of
from falproxy.pricing import USD, Price, cost_of, read_units, settle

UNITS = "x-fal-billable-units"


def failure_in(answer: Answer) -> ProxyError | None:
    """Why there are no pictures in an answer of fal's; None where there are."""
    if answer.status != 200:
        return failure_of(answer, Asked("", "image_url", None), {})
    if not pictures_in(answer.body):
        return ProxyError(500, "upstream_unreadable", "fal.ai's answer names no pictures.")
    return None


def outcome_of(row: JobRow, answer: Answer, rate: Price | None) -> JobRow:
    """The job at its end."""
    units = read_units(answer.headers.get(UNITS))
    settled = settle(rate, units, answer.status)
    if (failure := failure_in(answer)) is not None:
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
