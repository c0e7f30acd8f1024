"""Conversion of fal's responses into jobs of the ledger, and of jobs into responses."""

from collections.abc import Iterable
from dataclasses import replace

from falproxy.dialects.generate.schema import JobError, JobFile, JobImage, JobResponse
from falproxy.dialects.kontext import KontextParams, error_from_response
from falproxy.dialects.queue_client import BufferedResponse
from falproxy.errors import ProxyError
from falproxy.fal.error_body import parse_error_body
from falproxy.fal.pricing import MICROS_PER_USD, charged_cost, cost_from_sizes, parse_units
from falproxy.fal.registry import RegistryModel
from falproxy.fal.result_files import MEDIA_KINDS, parse_result_files
from falproxy.fal.results import FalImage, image_sizes
from falproxy.proxy.prices import PriceBook
from falproxy.stores.cache.virtual_requests import is_virtual_id
from falproxy.stores.ledger import UNFINISHED_STATUSES, JobRow

UNITS_HEADER = "x-fal-billable-units"


def result_error(response: BufferedResponse, model: RegistryModel | None) -> ProxyError | None:
    """Return the error of a job, or None if fal's response contains files.

    model: the names of its inputs appear in messages; None if it is no longer in the registry.
    """
    if response.status == 200:
        if parse_result_files(response.body):
            return None
        return ProxyError(500, "upstream_unreadable", "fal.ai's response contains no files.")
    failure = error_from_response(response, KontextParams("", "image_url", None), {})
    name = rejected_input_name(response.body, model) if failure.code == "input_refused" else None
    if name is not None:
        failure.message = f"fal.ai does not accept {name}."
    return failure


def rejected_input_name(body: bytes, model: RegistryModel | None) -> str | None:
    """Return the client's name of the input that fal's error locates."""
    error = parse_error_body(body).model_error
    if model is None or error is None:
        return None
    names = {model.rename.get(name, name): name for name in model.accepted_inputs}
    return next((names[key] for key in error.location if key in names), None)


def finished_row(
    row: JobRow, response: BufferedResponse, model: RegistryModel | None, prices: PriceBook
) -> JobRow:
    """Return the job with the outcome of fal's response."""
    rate = (model.rate if model else None) or prices.known(row.endpoint)
    is_free = row.request_id is not None and is_virtual_id(row.request_id)
    units = parse_units(response.headers.get(UNITS_HEADER))
    settled = 0 if is_free else charged_cost(rate, units, response.status)
    if (failure := result_error(response, model)) is not None:
        failed = replace(row, status="failed", settled=settled)
        return replace(failed, error=failure.code, error_message=failure.message)
    files = parse_result_files(response.body)
    if settled is None and (images := files_of_kind(files, "image")):
        settled = cost_from_sizes(rate, image_sizes(images))
    return replace(row, status="completed", settled=settled, images=files)


def files_of_kind(files: Iterable[FalImage], kind: str) -> list[FalImage]:
    return [file for file in files if file.kind == kind]


def job_to_response(row: JobRow) -> JobResponse:
    error = None
    if row.error is not None:
        error = JobError(code=row.error, message=row.error_message or "The job failed.")
    images, videos, audio = (files_of_kind(row.images, kind) for kind in MEDIA_KINDS)
    others = [JobFile(url=file.url, kind=file.kind) for file in row.images if file not in images]
    waits = row.status in UNFINISHED_STATUSES and row.position is not None
    return JobResponse(
        job_id=row.id,
        status="queued" if waits else row.status,
        model=row.model,
        image_url=images[0].url if images else None,
        images=[
            JobImage(url=image.url, width=image.width, height=image.height) for image in images
        ],
        cost=None if row.settled is None else row.settled / MICROS_PER_USD,
        user_id=row.user_id,
        error=error,
        position=row.position if waits else None,
        video_url=videos[0].url if videos else None,
        audio_url=audio[0].url if audio else None,
        files=others or None,
    )


def job_to_document(row: JobRow) -> dict[str, object]:
    return job_to_response(row).to_document()
