"""One request on the fast path, from the write to fal to the write to the client."""

import logging
import time
from typing import Protocol

from aiohttp import web

from falproxy.errors import ProxyError
from falproxy.metrics import Metrics
from falproxy.middleware.access_log import (
    CLIENT_CLOSED_REQUEST,
    CallIds,
    CallLabels,
    Timings,
    format_timing_headers,
    record_call,
)
from falproxy.middleware.accounting import OPEN_RECORD
from falproxy.middleware.observe_jobs import COMPLETED_STATUS
from falproxy.proxy.headers import replace_header, serialize_head
from falproxy.proxy.local_responses import FAL_REQUEST_ID
from falproxy.proxy.transport import ConnectionLostError, TransportResponse
from falproxy.proxy.transport.connection import Connection
from falproxy.proxy.transport.http1 import append_body
from falproxy.proxy.transport.response import PooledResponse
from falproxy.proxy.upstream import PREFETCHED, PrefetchedResponse
from falproxy.server.fast_path import CachedRoute

logger = logging.getLogger(__name__)

# Stands for the cost until the call is recorded, once it is certain that the head can be written.
COST_PLACEHOLDER = ("x-falproxy-cost", "-")


class ClientConnection(Protocol):
    """The client's side of a request on the fast path.

    number: of the connection in this process, never used again.
    peer: the address that the connection comes from.
    """

    @property
    def number(self) -> int: ...

    @property
    def peer(self) -> str: ...

    def write_response(self, data: bytes) -> None: ...

    def release(self) -> None: ...

    def fall_back(self, data: bytes, in_flight: "InFlightRequest") -> None:
        """Pass the request to aiohttp, with the outcome that `in_flight` has received. If the
        connection is closing, call `in_flight.abandon` instead."""

    def abort(self) -> None:
        """Close the connection at once."""


class InFlightRequest:
    """A request that was sent to fal and has no response yet: the `ResponseWaiter` of its
    connection.

    data: the request as received.
    ids: for the log and the response; fal's is that of a polled job.
    """

    __slots__ = (
        "_client",
        "_connection",
        "_data",
        "_ids",
        "_metrics",
        "_open_record",
        "_prefetched",
        "_route",
        "_started",
    )  # fmt: skip

    def __init__(
        self,
        client: ClientConnection,
        data: bytes,
        route: CachedRoute,
        metrics: Metrics,
        ids: CallIds,
    ) -> None:
        self._client = client
        self._data = data
        self._route = route
        self._metrics = metrics
        self._ids = ids
        self._connection: Connection | None = None
        self._prefetched: PrefetchedResponse | None = None
        self._started = time.perf_counter()
        self._open_record = (
            route.record_template.open_record() if route.record_template is not None else None
        )
        if self._open_record is not None:
            self._open_record.proxy_request_id = ids.request

    def __repr__(self) -> str:
        state = "done" if self._connection is None else f"on {self._connection!r}"
        return f"<InFlightRequest {self._ids.request} {self._route.request!r}, {state}>"

    def start(self, connection: Connection, body: bytes) -> bool:
        """Send the request to fal. Return False if the connection turned out to be closed."""
        request, data = self._route.request, self._route.head_for(self._ids.fal)
        if self._open_record is not None:
            data = append_body(data, body)
        self._connection = connection
        self._metrics.in_progress += 1
        try:
            connection.start_request(request, data, self, wait_for_body=True)
        except ConnectionLostError:
            self._detach()
            connection.close()
            return False
        if self._open_record is not None:
            self._open_record.read_inputs(body)
        return True

    # fal's response: the methods of `ResponseWaiter`

    def done(self) -> bool:
        return self._connection is None

    def set_result(self, response: PooledResponse) -> None:
        upstream_seconds = time.perf_counter() - self._started
        labels = self._route.labels_by_status.get(response.status)
        try:
            if (
                labels is None
                or not response.is_complete
                or not self._try_write_response(response, labels, upstream_seconds)
            ):
                self._fall_back(response, upstream_seconds)
        except Exception:
            self._abort()

    def set_exception(self, error: Exception) -> None:
        try:
            self._on_error(error)
        except Exception:
            self._abort()

    def _abort(self) -> None:
        """Close the client's connection after an error here: nothing else would respond to it."""
        logger.exception("A request on the fast path failed inside the proxy")
        if self._connection is not None:
            self._detach()
        self._client.abort()

    def _on_error(self, error: Exception) -> None:
        if self._open_record is None and isinstance(error, ConnectionLostError):
            self._detach()
            self._client.fall_back(self._data, self)  # a poll may be sent again
        else:
            self._fall_back(error, time.perf_counter() - self._started)

    def _try_write_response(
        self, response: PooledResponse, labels: CallLabels, upstream_seconds: float
    ) -> bool:
        """Write the response to the client and record the call. Return False, with nothing done,
        for a response that needs the normal path."""
        route, ids = self._route, self._ids
        first_byte = time.perf_counter() - self._started
        has_cost = self._open_record is not None or route.results is not None
        extra_headers = (
            *((COST_PLACEHOLDER,) if has_cost else ()),
            *route.extra_headers,
            *format_timing_headers(ids.request, first_byte - upstream_seconds, upstream_seconds),
        )
        head = serialize_head(response.status, response.reason, response.raw_headers, extra_headers)
        if head is None:
            return False
        self._connection = None
        body = response.read_nowait()
        if self._open_record is not None:
            costs = self._open_record.complete(labels.status, response.headers, upstream_seconds)
            head = replace_header(head, COST_PLACEHOLDER, costs)
        elif route.results is not None and ids.fal is not None:
            costs = route.results.record_success(ids.fal, labels.status, response.headers)
            head = replace_header(head, COST_PLACEHOLDER, costs)
        elif labels.status == COMPLETED_STATUS and ids.fal is not None:
            self._metrics.job_times.observe(ids.fal, body)
        client = self._client
        client.write_response(head + body)
        total = time.perf_counter() - self._started
        if ids.fal is None:
            ids = ids._replace(fal=response.headers.get(FAL_REQUEST_ID))
        timings = Timings(first_byte, total, upstream_seconds)
        record_call(self._metrics, labels, ids, timings)
        client.release()
        return True

    def _fall_back(self, outcome: PooledResponse | Exception, seconds: float) -> None:
        self._detach()
        request = self._route.request
        self._prefetched = PrefetchedResponse(
            outcome, request.method, request.origin.host, self._started, seconds
        )
        self._client.fall_back(self._data, self)

    def _detach(self) -> None:
        """Leave the fast path. The normal path counts the request again."""
        self._connection = None
        self._metrics.in_progress -= 1

    def attach_to(self, request: web.BaseRequest) -> None:
        """Give the outcome to aiohttp's request. The first middleware marks it as consumed."""
        if self._prefetched is None:
            return
        request[PREFETCHED] = self._prefetched
        if self._open_record is not None:
            request[OPEN_RECORD] = self._open_record

    # The client disconnects

    def on_disconnect(self) -> None:
        """Record a client that left before fal's response was complete, and abort the request to
        fal. The outcome of a job is known as soon as the head of its result has arrived."""
        connection, self._connection = self._connection, None
        if connection is None:
            return
        seconds = time.perf_counter() - self._started
        response = connection.pending_response
        self._record_outcome(response)
        connection.close()
        if self._open_record is not None:
            self._open_record.client_left(seconds)
            response = None
        self._record_disconnect(seconds, None if response is None else response.status)

    def abandon(self) -> None:
        """Record a client that left after fal responded, before the normal path took over. The
        usage record of a submit and the outcome of a job are still written."""
        prefetched = self._prefetched
        if prefetched is None or prefetched.is_consumed:
            return
        prefetched.is_consumed = True
        try:
            response = prefetched.response()
        except ProxyError as error:
            if self._open_record is not None:
                self._open_record.fail(error, prefetched.upstream_seconds)
        else:
            if self._open_record is not None:
                self._open_record.complete(
                    response.status, response.headers, prefetched.upstream_seconds
                )
            self._record_outcome(response)
            response.close()
        self._metrics.in_progress += 1  # `_detach` has counted it down, and so does the next line
        self._record_disconnect(prefetched.upstream_seconds)

    def _record_outcome(self, response: TransportResponse | None) -> None:
        """Record the outcome of a job by the head of its result, which the client does not get."""
        results, request_id = self._route.results, self._ids.fal
        if response is None or results is None or request_id is None:
            return
        if response.status in self._route.labels_by_status:
            results.record_success(request_id, response.status, response.headers)

    def _record_disconnect(self, upstream_seconds: float, status: int | None = None) -> None:
        """Log a response that did not reach the client. status: of fal's response, if it began."""
        total = time.perf_counter() - self._started
        any_labels = next(iter(self._route.labels_by_status.values()))
        labels = any_labels._replace(status=status or CLIENT_CLOSED_REQUEST, complete=False)
        timings = Timings(total, total, upstream_seconds)
        record_call(self._metrics, labels, self._ids, timings)
