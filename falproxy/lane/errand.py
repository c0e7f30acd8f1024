"""One request on the lane."""

import time
from typing import Protocol

from falproxy.exchange import BrokenError
from falproxy.exchange.answer import KeptAnswer
from falproxy.exchange.connection import Connection
from falproxy.heads import plain_head
from falproxy.lane import Pass
from falproxy.metrics import Metrics
from falproxy.middleware.observe import CLIENT_LEFT, Kind, Times, signed, tell
from falproxy.upstream import InHand


class Client(Protocol):
    """Where the request came from."""

    def answer(self, data: bytes) -> None:
        """All of the answer, in one write."""

    def free(self) -> None:
        """The next request may come."""

    def hand_over(self, data: bytes, in_hand: InHand | None) -> None:
        """Has the layers answer the request, with what there is of fal already."""


class Errand:
    """It waits for an answer on a connection, as `exchange.connection.Waiting` says.

    data: the request as it came. name: the id that it has.
    """

    __slots__ = (
        "_account", "_client", "_connection", "_data", "_metrics", "_name", "_pass", "_started",
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
        self._started = time.perf_counter()
        self._account = given.page.open() if given.page is not None else None

    def begin(self, connection: Connection, body: bytes) -> bool:
        """Asks fal. Whether anything was sent."""
        ask = self._pass.ask
        request = ask.head
        if self._account is not None:
            request = b"%bcontent-length: %d\r\n\r\n%b" % (ask.head, len(body), body)
        self._connection = connection
        self._metrics.in_progress += 1
        try:
            connection.begin(ask, request, self)
        except BrokenError:
            self._end()
            connection.close()
            return False
        return True

    def leave(self) -> None:
        """The client has left before its answer."""
        connection = self._connection
        if connection is None:
            return
        self._connection = None
        connection.close()
        seconds = time.perf_counter() - self._started
        kind = next(iter(self._pass.kinds.values()))._replace(status=CLIENT_LEFT, complete=False)
        if self._account is not None:
            self._account.leave(seconds)
        tell(self._metrics, kind, self._name, Times(seconds, seconds, seconds))

    def done(self) -> bool:
        return self._connection is None

    def set_result(self, answer: KeptAnswer) -> None:
        upstream = time.perf_counter() - self._started
        kind = self._pass.kinds.get(answer.status)
        if kind is None or not answer.is_here or not self._send(answer, kind, upstream):
            self._end()
            in_hand = InHand(answer, self._started, upstream)
            self._client.hand_over(self._data, in_hand)

    def set_exception(self, error: Exception) -> None:
        self._end()
        in_hand = None  # a question may be asked again
        if self._account is not None or not isinstance(error, BrokenError):
            in_hand = InHand(error, self._started, time.perf_counter() - self._started)
        self._client.hand_over(self._data, in_hand)

    def _end(self) -> None:
        """It is not the lane's any more."""
        self._connection = None
        self._metrics.in_progress -= 1

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
