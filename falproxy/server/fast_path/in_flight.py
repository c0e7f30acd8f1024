"""One request on the lane."""

import time
from typing import Protocol

from aiohttp import web

from falproxy.errors import ProxyError
from falproxy.metrics import Metrics
from falproxy.middleware.access_log import (
    CLIENT_CLOSED_REQUEST,
    CallLabels,
    Timings,
    format_timing_headers,
    record_call,
)
from falproxy.middleware.accounting import OPEN_RECORD
from falproxy.proxy.headers import serialize_head
from falproxy.proxy.transport import ConnectionLostError
from falproxy.proxy.transport.connection import Connection
from falproxy.proxy.transport.http1 import append_body
from falproxy.proxy.transport.response import PooledResponse
from falproxy.proxy.upstream import PREFETCHED, PrefetchedResponse
from falproxy.server.fast_path import CachedRoute


class ClientConnection(Protocol):
    """Where the request came from."""

    def write_response(self, data: bytes) -> None:
        """All of the answer, in one write."""

    def release(self) -> None:
        """The next request may come."""

    def fall_back(self, data: bytes, in_flight: "InFlightRequest") -> None:
        """Has the layers answer the request, with what the errand gives them; or settles it."""


class InFlightRequest:
    """It waits for an answer on a connection, as `exchange.connection.Waiting` says.

    data: the request as it came. name: the id that it has.
    """

    __slots__ = (
        "_client",
        "_connection",
        "_data",
        "_metrics",
        "_open_record",
        "_prefetched",
        "_request_id",
        "_route",
        "_started",
    )  # fmt: skip

    def __init__(
        self,
        client: ClientConnection,
        data: bytes,
        route: CachedRoute,
        metrics: Metrics,
        request_id: str,
    ) -> None:
        self._client = client
        self._data = data
        self._route = route
        self._metrics = metrics
        self._request_id = request_id
        self._connection: Connection | None = None
        self._prefetched: PrefetchedResponse | None = None
        self._started = time.perf_counter()
        self._open_record = (
            route.record_template.open_record() if route.record_template is not None else None
        )

    def start(self, connection: Connection, body: bytes) -> bool:
        """Asks fal. Whether anything was sent."""
        ask = self._route.request
        request = ask.head if self._open_record is None else append_body(ask.head, body)
        self._connection = connection
        self._metrics.in_progress += 1
        try:
            connection.start_request(ask, request, self, wait_for_body=True)
        except ConnectionLostError:
            self._detach()
            connection.close()
            return False
        return True

    # What fal says

    def done(self) -> bool:
        return self._connection is None

    def set_result(self, response: PooledResponse) -> None:
        upstream = time.perf_counter() - self._started
        kind = self._route.labels_by_status.get(response.status)
        if (
            kind is None
            or not response.is_complete
            or not self._try_write_response(response, kind, upstream)
        ):
            self._fall_back(response, upstream)

    def set_exception(self, error: Exception) -> None:
        if self._open_record is None and isinstance(error, ConnectionLostError):
            self._detach()
            self._client.fall_back(self._data, self)  # a question may be asked again
        else:
            self._fall_back(error, time.perf_counter() - self._started)

    def _try_write_response(
        self, response: PooledResponse, labels: CallLabels, upstream_seconds: float
    ) -> bool:
        """Whether the answer is plain, and on its way."""
        given, name = self._route, self._request_id
        first = time.perf_counter() - self._started
        added = (
            *given.extra_headers,
            *format_timing_headers(name, first - upstream_seconds, upstream_seconds),
        )
        head = serialize_head(response.status, response.reason, response.raw_headers, added)
        if head is None:
            return False
        self._connection = None
        if self._open_record is not None:
            self._open_record.complete(labels.status, response.headers, upstream_seconds)
        client = self._client
        client.write_response(head + response.read_nowait())
        whole = time.perf_counter() - self._started
        record_call(self._metrics, labels, name, Timings(first, whole, upstream_seconds))
        client.release()
        return True

    def _fall_back(self, outcome: PooledResponse | Exception, seconds: float) -> None:
        self._detach()
        ask = self._route.request
        host = ask.origin.host
        self._prefetched = PrefetchedResponse(outcome, ask.method, host, self._started, seconds)
        self._client.fall_back(self._data, self)

    def _detach(self) -> None:
        """It is not the lane's any more."""
        self._connection = None
        self._metrics.in_progress -= 1

    def attach_to(self, request: web.BaseRequest) -> None:
        """What there is already, for the layers. Their first one says when they have it."""
        if self._prefetched is None:
            return
        request[PREFETCHED] = self._prefetched
        if self._open_record is not None:
            request[OPEN_RECORD] = self._open_record

    # The client leaves

    def on_disconnect(self) -> None:
        """Before there is an answer."""
        connection, self._connection = self._connection, None
        if connection is None:
            return
        connection.close()
        seconds = time.perf_counter() - self._started
        if self._open_record is not None:
            self._open_record.client_left(seconds)
        self._record_disconnect(seconds)

    def abandon(self) -> None:
        """When there is one, which the layers do not have yet. What was bought is written down."""
        in_hand = self._prefetched
        if in_hand is None or in_hand.is_consumed:
            return
        in_hand.is_consumed = True
        try:
            answer = in_hand.response()
        except ProxyError as error:
            if self._open_record is not None:
                self._open_record.fail(error, in_hand.upstream_seconds)
        else:
            if self._open_record is not None:
                self._open_record.complete(answer.status, answer.headers, in_hand.upstream_seconds)
            answer.close()
        self._metrics.in_progress += 1  # it is told once more
        self._record_disconnect(in_hand.upstream_seconds)

    def _record_disconnect(self, upstream_seconds: float) -> None:
        whole = time.perf_counter() - self._started
        kind = next(iter(self._route.labels_by_status.values()))._replace(
            status=CLIENT_CLOSED_REQUEST, complete=False
        )
        record_call(self._metrics, kind, self._request_id, Timings(whole, whole, upstream_seconds))
