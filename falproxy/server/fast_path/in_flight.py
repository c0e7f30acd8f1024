"""One request on the lane."""

import time
from typing import Protocol

from aiohttp import web

from falproxy.errors import ProxyError
from falproxy.metrics import Metrics
from falproxy.middleware.access_log import CLIENT_LEFT, Kind, Times, signed, tell
from falproxy.middleware.accounting import ACCOUNT
from falproxy.proxy.response_head import plain_head
from falproxy.proxy.transport import BrokenError
from falproxy.proxy.transport.connection import Connection
from falproxy.proxy.transport.response import KeptAnswer
from falproxy.proxy.transport.wire import with_body
from falproxy.proxy.upstream import IN_HAND, InHand
from falproxy.server.fast_path import Pass


class Client(Protocol):
    """Where the request came from."""

    def answer(self, data: bytes) -> None:
        """All of the answer, in one write."""

    def free(self) -> None:
        """The next request may come."""

    def hand_over(self, data: bytes, errand: "Errand") -> None:
        """Has the layers answer the request, with what the errand gives them; or settles it."""


class Errand:
    """It waits for an answer on a connection, as `exchange.connection.Waiting` says.

    data: the request as it came. name: the id that it has.
    """

    __slots__ = (
        "_account", "_client", "_connection", "_data", "_in_hand", "_metrics", "_name", "_pass",
        "_started",
    )  # fmt: skip

    def __init__(
        self, client: Client, data: bytes, given: Pass, metrics: Metrics, name: str
    ) -> None:
        self._client = client
        self._data = data
        self._pass = given
        self._metrics = metrics
        self._name = name
        self._connection: Connection | None = None
        self._in_hand: InHand | None = None
        self._started = time.perf_counter()
        self._account = given.page.open() if given.page is not None else None

    def begin(self, connection: Connection, body: bytes) -> bool:
        """Asks fal. Whether anything was sent."""
        ask = self._pass.ask
        request = ask.head if self._account is None else with_body(ask.head, body)
        self._connection = connection
        self._metrics.in_progress += 1
        try:
            connection.begin(ask, request, self, is_patient=True)
        except BrokenError:
            self._end()
            connection.close()
            return False
        return True

    # What fal says

    def done(self) -> bool:
        return self._connection is None

    def set_result(self, answer: KeptAnswer) -> None:
        upstream = time.perf_counter() - self._started
        kind = self._pass.kinds.get(answer.status)
        if kind is None or not answer.is_here or not self._send(answer, kind, upstream):
            self._hand_over(answer, upstream)

    def set_exception(self, error: Exception) -> None:
        if self._account is None and isinstance(error, BrokenError):
            self._end()
            self._client.hand_over(self._data, self)  # a question may be asked again
        else:
            self._hand_over(error, time.perf_counter() - self._started)

    def _send(self, answer: KeptAnswer, kind: Kind, upstream: float) -> bool:
        """Whether the answer is plain, and on its way."""
        given, name = self._pass, self._name
        first = time.perf_counter() - self._started
        added = (*given.added, *signed(name, first - upstream, upstream))
        head = plain_head(answer.status, answer.reason, answer.raw_headers, added)
        if head is None:
            return False
        self._connection = None
        if self._account is not None:
            self._account.end(kind.status, answer.headers, upstream)
        client = self._client
        client.answer(head + answer.take())
        whole = time.perf_counter() - self._started
        tell(self._metrics, kind, name, Times(first, whole, upstream))
        client.free()
        return True

    def _hand_over(self, outcome: KeptAnswer | Exception, seconds: float) -> None:
        self._end()
        ask = self._pass.ask
        host = ask.origin.host
        self._in_hand = InHand(outcome, ask.method, host, self._started, seconds)
        self._client.hand_over(self._data, self)

    def _end(self) -> None:
        """It is not the lane's any more."""
        self._connection = None
        self._metrics.in_progress -= 1

    def give(self, request: web.BaseRequest) -> None:
        """What there is already, for the layers. Their first one says when they have it."""
        if self._in_hand is None:
            return
        request[IN_HAND] = self._in_hand
        if self._account is not None:
            request[ACCOUNT] = self._account

    # The client leaves

    def leave(self) -> None:
        """Before there is an answer."""
        connection, self._connection = self._connection, None
        if connection is None:
            return
        connection.close()
        seconds = time.perf_counter() - self._started
        if self._account is not None:
            self._account.leave(seconds)
        self._tell_of_leaving(seconds)

    def settle(self) -> None:
        """When there is one, which the layers do not have yet. What was bought is written down."""
        in_hand = self._in_hand
        if in_hand is None or in_hand.is_taken:
            return
        in_hand.is_taken = True
        try:
            answer = in_hand.answer()
        except ProxyError as error:
            if self._account is not None:
                self._account.fail(error, in_hand.seconds)
        else:
            if self._account is not None:
                self._account.end(answer.status, answer.headers, in_hand.seconds)
            answer.close()
        self._metrics.in_progress += 1  # it is told once more
        self._tell_of_leaving(in_hand.seconds)

    def _tell_of_leaving(self, upstream: float) -> None:
        whole = time.perf_counter() - self._started
        kind = next(iter(self._pass.kinds.values()))._replace(status=CLIENT_LEFT, complete=False)
        tell(self._metrics, kind, self._name, Times(whole, whole, upstream))
