"""What became of a job: from fal's answer into the ledger, and from there to the client."""

from dataclasses import replace

from falproxy.dialects.generate.schema import JobError, JobResponse
from falproxy.dialects.generate.schema import JobImage as PictureAnswer
from falproxy.dialects.kontext import KontextParams, error_from_response
from falproxy.dialects.queue_client import BufferedResponse
from falproxy.errors import ProxyError
from falproxy.fal.error_body import parse_error_body
from falproxy.fal.pricing import MICROS_PER_USD, charged_cost, cost_from_sizes, parse_units
from falproxy.fal.registry import RegistryModel
from falproxy.fal.results import image_sizes, parse_result_images
from falproxy.stores.cache.virtual_ids import is_virtual_id
from falproxy.stores.ledger import JobRow

UNITS = "x-fal-billable-units"


def result_error(response: BufferedResponse, model: RegistryModel | None) -> ProxyError | None:
    """Why there are no pictures in an answer of fal's; None where there are. model: whose names
    of inputs the client knows; None where it is not in the registry any more."""
    if response.status == 200:
        if parse_result_images(response.body):
            return None
        return ProxyError(500, "upstream_unreadable", "fal.ai's response contains no images.")
    failure = error_from_response(response, KontextParams("", "image_url", None), {})
    name = rejected_input_name(response.body, model) if failure.code == "input_refused" else None
    if name is not None:
        failure.message = f"fal.ai does not accept {name}."
    return failure


def rejected_input_name(body: bytes, model: RegistryModel | None) -> str | None:
    """The first input that fal names in a refusal, as the client knows it."""
    if model is None:
        return None
    names = {model.rename.get(name, name): name for name in model.accepted_inputs}
    error = parse_error_body(body).model_error
    return next((names[key] for key in error.location if key in names), None) if error else None


def finished_row(row: JobRow, response: BufferedResponse, model: RegistryModel | None) -> JobRow:
    """The job at its end."""
    rate = model.rate if model else None
    is_free = row.request_id is not None and is_virtual_id(row.request_id)
    units = parse_units(response.headers.get(UNITS))
    settled = 0 if is_free else charged_cost(rate, units, response.status)
    if (failure := result_error(response, model)) is not None:
        failed = replace(row, status="failed", settled=settled)
        return replace(failed, error=failure.code, error_message=failure.message)
    pictures = parse_result_images(response.body)
    if settled is None:
        settled = cost_from_sizes(rate, image_sizes(pictures))
    return replace(row, status="completed", settled=settled, images=pictures)


def job_to_response(row: JobRow) -> JobResponse:
    error = None
    if row.error is not None:
        error = JobError(code=row.error, message=row.error_message or "The job failed.")
    return JobResponse(
        job_id=row.id,
        status=row.status,
        model=row.model,
        image_url=row.images[0].url if row.images else None,
        images=[
            PictureAnswer(url=each.url, width=each.width, height=each.height) for each in row.images
        ],
        cost=None if row.settled is None else row.settled / MICROS_PER_USD,
        user_id=row.user_id,
        error=error,
    )
