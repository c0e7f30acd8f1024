"""The lane: requests that came through all layers once, and come again.

A client that waits for its picture asks the same question many times a second, and one that orders
pictures sends the same head with every order. What the layers made of such a head stands, and the
next ones take the lane, as packets of a flow that a router knows already. Only what is plain stays
on it: everything else goes through the layers, with fal's answer in hand where there is one.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from falproxy.circuit_breaker import CircuitBreaker
from falproxy.middleware.access_log import CallLabels
from falproxy.middleware.accounting import RecordTemplate
from falproxy.proxy.transport import UpstreamRequest

HEAD_END = b"\r\n\r\n"
LINE_END = b"\r\n"
# As clients write it; whose spelling is another goes through the layers.
CONTENT_LENGTH_PREFIXES = (b"\r\nContent-Length: ", b"\r\ncontent-length: ")
DIGITS_MAX = 10


@dataclass(frozen=True, slots=True, eq=False)
class CachedRoute:
    """What the layers made of a request. ask: what goes to fal for it, but for its body. circuit:
    whether its host is left alone. request_id: of the request in fal's queue that it is about.
    until: by the clock of `time.monotonic`. name: the id that it brought along. added: headers of
    its answers beside fal's. kinds: of its call, by the status of a plain answer. page: where it
    is written down, if it is."""

    request: UpstreamRequest
    breaker: CircuitBreaker | None
    request_id: str | None
    expires_at: float
    client_request_id: str | None
    extra_headers: tuple[tuple[str, str], ...]
    labels_by_status: Mapping[int, CallLabels]
    record_template: RecordTemplate | None


def split_request(data: bytes) -> tuple[bytes, bytes]:
    """By what a request is known again, and its body. Nothing where it is not all here."""
    if not data.startswith(b"POST "):
        return data, b""
    end = data.find(HEAD_END) + len(HEAD_END)
    for name in CONTENT_LENGTH_PREFIXES:
        if (start := data.find(name, 0, end)) >= 0:
            stop = data.find(LINE_END, start + len(name), end)
            digits, body = data[start + len(name) : stop], data[end:]
            if digits.isdigit() and len(digits) < DIGITS_MAX and int(digits) == len(body):
                return data[:start] + data[stop:end], body
    return b"", b""
