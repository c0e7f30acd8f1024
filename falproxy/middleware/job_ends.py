"""The outcomes of queued jobs, recorded by the responses to requests for their results."""

from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from functools import partial

from aiohttp import web

from falproxy.fal.pricing import charged_cost, parse_units
from falproxy.job_times import JobTime
from falproxy.metrics import Metrics
from falproxy.middleware.charges import Charge, CostHeaders, PendingCharges, format_cost_headers
from falproxy.middleware.error_types import find_error_type
from falproxy.proxy.forward import RelayedResponse, add_headers
from falproxy.proxy.local_responses import FAL_REQUEST_ID, LocalDocument
from falproxy.stores.cache.virtual_requests import is_virtual_id
from falproxy.stores.ledger import Outcome
from falproxy.stores.ledger.writer import LedgerWriter

UNITS_HEADER = "x-fal-billable-units"
# Statuses of a result request that do not concern the job: access denied, unknown job. With 400,
# fal reports that the job is in progress or that it has failed.
NOT_JOB_STATUSES = (401, 403, 404, 405)
AMBIGUOUS_STATUS = 400
FINAL_HEADERS = (UNITS_HEADER, "x-fal-error-type", "x-fal-retryable")


def current_headers(response: web.StreamResponse) -> Mapping[str, str]:
    """Return the headers for the client, or fal's if no middleware has read the former."""
    return response.current_headers if isinstance(response, RelayedResponse) else response.headers


def upstream_headers(response: web.StreamResponse) -> Mapping[str, str]:
    return response.upstream_headers if isinstance(response, RelayedResponse) else response.headers


def is_final(response: web.StreamResponse) -> bool:
    """Return whether the response to a result request is the outcome of the job. An error without a
    request id was not sent by fal's queue, but by a proxy or load balancer in front of it."""
    if response.status < AMBIGUOUS_STATUS:
        return True
    if FAL_REQUEST_ID not in response.headers or response.status in NOT_JOB_STATUSES:
        return False
    return response.status != AMBIGUOUS_STATUS or any(
        name in response.headers for name in FINAL_HEADERS
    )


@dataclass(frozen=True, slots=True, eq=False)
class ResultAccounting:
    """Records the outcomes of queued jobs by the responses to requests for their results."""

    writer: LedgerWriter
    metrics: Metrics
    pending_charges: PendingCharges

    async def record(
        self, request_id: str, response: web.StreamResponse, stored_seconds: float | None
    ) -> None:
        """Record a final response, and add headers with the cost to it.

        request_id: as the client has it, possibly a virtual one.
        stored_seconds: time to store the files of the result.
        """
        headers = current_headers(response)
        end = self._job_end(request_id, response.status, headers, stored_document(response))
        end.stored_seconds = stored_seconds

        def record_error_type(error_type: str) -> None:
            end.error_type = error_type
            end.write(self.writer)

        end.error_type = await find_error_type(response, record_error_type)
        end.write(self.writer)
        add_headers(response, end.cost_headers())

    def record_success(
        self, request_id: str, status: int, headers: Mapping[str, str]
    ) -> CostHeaders:
        """Record a result that fal sent. Return the headers with its cost. For the fast path."""
        end = self._job_end(request_id, status, headers, None)
        end.write(self.writer)
        return end.cost_headers()

    def _job_end(
        self, request_id: str, status: int, headers: Mapping[str, str], document: bytes | None
    ) -> "JobEnd":
        charge = self.pending_charges.find(request_id)
        job_time = self.metrics.job_times.pop(request_id)
        return JobEnd(request_id, status, headers, charge, job_time, document)


# Read by the fast path, which records repeated requests for results.
RESULT_ACCOUNTING = web.RequestKey("falproxy.result_accounting", ResultAccounting)


class JobEnd:
    """The outcome of a queued job. Virtual requests share the job of another request or have a
    cached result, and are free.

    headers: of fal's response.
    charge: None if another process submitted the job.
    document: a result from the cache, whose units are not known.
    error_type: of the job's error.
    stored_seconds: time to store the files of the result.
    """

    def __init__(
        self,
        request_id: str,
        status: int,
        headers: Mapping[str, str],
        charge: Charge | None,
        job_time: JobTime,
        document: bytes | None,
    ) -> None:
        self._request_id = request_id
        self._status = status
        self._charge = charge
        self._job_time = job_time
        self._units: Decimal | None = None
        self._settled: int | None = 0
        self.error_type: str | None = None
        self.stored_seconds: float | None = None
        if is_virtual_id(request_id):
            return
        self._units = parse_units(headers.get(UNITS_HEADER))
        if charge is None:
            self._settled = charged_cost(None, self._units, status)
        else:
            self._settled = charge.settle(self._units, status, document)
        if self._settled is None and self._units is None and self._status >= AMBIGUOUS_STATUS:
            self._settled = 0  # fal sends the units of failed jobs that it charges

    def __repr__(self) -> str:
        return f"<JobEnd {self._request_id}, status {self._status}>"

    def write(self, writer: LedgerWriter) -> None:
        """Write the outcome to the ledger, and its cost later if it is not known yet."""
        self._enqueue(writer)
        if self._charge is not None and self._settled is None and self._units is not None:
            self._charge.when_priced(partial(self._settle_late, writer, self._charge))

    def cost_headers(self) -> CostHeaders:
        charge = self._charge
        if is_virtual_id(self._request_id):
            return format_cost_headers(0, None if charge is None else charge.saved)
        if self._settled is None and charge is not None and self._status < AMBIGUOUS_STATUS:
            return format_cost_headers(charge.estimated)
        return format_cost_headers(self._settled)

    def _settle_late(self, writer: LedgerWriter, charge: Charge) -> None:
        self._settled = charge.settle(self._units, self._status)
        if self._settled is not None:
            self._enqueue(writer)

    def _enqueue(self, writer: LedgerWriter) -> None:
        job_time = self._job_time
        writer.enqueue(
            Outcome(
                request_id=self._request_id,
                status=self._status,
                units=self._units,
                settled=self._settled,
                error_type=self.error_type,
                ended_at=job_time.ended_at,
                run_seconds=job_time.run_seconds,
                stored_seconds=self.stored_seconds,
            )
        )


def stored_document(response: web.StreamResponse) -> bytes | None:
    """Return a result from the cache, whose units are not known."""
    if not isinstance(response, LocalDocument) or response.status != web.HTTPOk.status_code:
        return None
    return response.body if isinstance(response.body, bytes) else None
