"""Fast path for repeated requests: status polls, results, and submits whose result is not cached.

The first request with a given head goes through all middleware. The decision is cached for 60 s as
a `CachedRoute`, under the raw bytes of the head (method, URL, headers except Content-Length). Later
requests with the same head are sent to fal on an idle connection, without entering aiohttp's
request handling. Anything unusual in the request or the response falls back to the normal path,
together with the response already received.

The request id of a poll or result is left out of its key, so that requests about other jobs, whose
heads are the same otherwise, take the fast path too. The id must be a UUID, and the only one of its
kind in the head. So are the identifiers that load balancers give to each request (`REQUEST_TAGS`),
and cookies and addresses of clients (`CALLER_TAGS`).

Consequences:

* The route of a request is cached only if each middleware that the request passed is declared with
  `head_only`: it decides by the head alone, acts only on requests that the fast path does not take,
  or the fast path does its work itself (accounting, image check). If one of them is not declared
  with `any_request_id`, the route is for its own head only, with all identifiers.
* Five facts are checked for each request: whether the circuit breaker is closed, whether the
  middleware lets the request id through (`ID_CHECKS`: it is of the caller's own job, and of no
  virtual or shared one), whether direct writes are enabled, whether the caller's credential is
  still valid (a token, a key that was made at run time, an identity that a hook returned), and
  whether an access key may be used from the client's address (`ADDRESS_CHECK`). Any other state
  behind a cached decision may be up to 60 s old.
* The route of a caller that a hook has identified is used on the same connection only.
* A request that the normal path refuses ends the route of its head.
* Metrics, access log and usage records are written as on the normal path.

`FALPROXY_FAST_PATH=0` turns the fast path off. It needs the transport `pool`.
"""

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from falproxy.circuit_breaker import CircuitBreaker
from falproxy.middleware.access_log import CallLabels
from falproxy.middleware.accounting import RecordTemplate
from falproxy.middleware.job_ends import ResultAccounting
from falproxy.proxy.call import Grant
from falproxy.proxy.head_only import AddressCheck, IdCheck
from falproxy.proxy.headers import HEAD_END
from falproxy.proxy.transport import UpstreamRequest

LINE_END = b"\r\n"
# The spellings that clients use; a request with another one takes the normal path.
CONTENT_LENGTH_PREFIXES = (b"\r\nContent-Length: ", b"\r\ncontent-length: ")
DIGITS_MAX = 10
REQUESTS_PATH = b"/requests/"
UUID = re.compile(rb"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")
ID_LENGTH = 36
# Headers that identify one request. They are not sent to fal, and X-Request-ID is only logged.
REQUEST_TAGS = (
    b"x-request-id", b"x-correlation-id", b"x-request-start", b"cf-ray", b"fly-request-id",
    b"rndr-id", b"x-amzn-trace-id", b"x-amz-cf-id", b"x-azure-ref", b"x-cloud-trace-context",
    b"x-vercel-id", b"x-b3-traceid", b"x-b3-spanid", b"x-b3-parentspanid",
)  # fmt: skip
# Headers that identify a browser. They are not sent to fal either. Only a hook reads cookies: the
# routes of its callers are for their own head only. Addresses are checked and logged.
CALLER_TAGS = (
    b"x-forwarded-for", b"cookie", b"x-real-ip", b"forwarded", b"cf-connecting-ip",
    b"true-client-ip", b"fly-client-ip",
)  # fmt: skip
# A line with one of them, which the next line does not continue. Without backtracking (`*+`): that
# takes quadratic time for a line of spaces.
TAG_LINE = re.compile(
    rb"\r\n(?:(x-request-id)|(%s)|(x-forwarded-for)|%s):"
    rb"[ \t]*+([\x20-\x7e]{0,4096}+)(?=\r\n[^ \t])"
    % (b"|".join(REQUEST_TAGS[1:]), b"|".join(CALLER_TAGS[1:])),
    re.IGNORECASE,
)
# A tag that the proxy reads. It stays in a head if it has other characters, such as a tab.
READ_TAG = re.compile(rb"\r\n(?:x-request-id|x-forwarded-for):", re.IGNORECASE)
TAGGED_HEAD_MAX = 6144  # bytes


class Tags(NamedTuple):
    """What the proxy reads of the tags of one request.

    request_id: the first X-Request-ID.
    forwarded_for: the values of X-Forwarded-For.
    is_of_caller: there is none of `REQUEST_TAGS`: later requests are likely to have the same tags.
    """

    request_id: str | None
    forwarded_for: tuple[str, ...]
    is_of_caller: bool


# The request id in the head of a poll, and the head before and behind it.
PollHead = tuple[bytes, tuple[bytes, bytes]]
# A request head, with the number of its connection if the route is for that alone; or the head of a
# poll in two parts, without the request id.
RouteKey = bytes | tuple[int, bytes] | tuple[bytes, bytes]


@dataclass(frozen=True, slots=True, eq=False)
class CachedRoute:
    """The decision of the middleware about one request head, or about those that differ in the
    request id only.

    request: as sent to fal, without the body.
    parts: the bytes sent to fal before and behind the request id; None for one head only.
    breaker: of the target's host, None for a host without a backup.
    request_id: of the job in fal's queue that the request is about, None for a submit.
    id_checks: of the middleware, for each request id.
    expires_at: by `time.monotonic`.
    client_request_id: the X-Request-ID in the head.
    forwarded_for: the values of X-Forwarded-For in the head.
    address_check: whether the caller may use its credential from an address; None if it may from
        all.
    extra_headers: of the response, beside fal's.
    labels_by_status: for metrics and log, for each status that the fast path handles.
    record_template: for the usage record of a submit.
    results: records the outcome of a job whose result is requested; None for other requests.
    grant: of the caller, if its credential may end; the route ends with it.
    """

    request: UpstreamRequest
    parts: tuple[bytes, bytes] | None
    breaker: CircuitBreaker | None
    request_id: str | None
    id_checks: tuple[IdCheck, ...]
    expires_at: float
    client_request_id: str | None
    forwarded_for: tuple[str, ...]
    address_check: AddressCheck | None
    extra_headers: tuple[tuple[str, str], ...]
    labels_by_status: Mapping[int, CallLabels]
    record_template: RecordTemplate | None
    results: ResultAccounting | None
    grant: Grant | None

    def __repr__(self) -> str:
        seconds = self.expires_at - time.monotonic()
        return f"<CachedRoute {self.request!r}, expires in {seconds:.1f} s>"

    def admits(self, request_id: str | None) -> bool:
        """Return whether the middleware would decide about this request id as about the first."""
        if request_id is not None:
            for check in self.id_checks:
                if not check(request_id):
                    return False
        return True

    def head_for(self, request_id: str | None) -> bytes:
        """Return the head that is sent to fal."""
        if self.parts is None or request_id is None:
            return self.request.head
        before, behind = self.parts
        return b"".join((before, request_id.encode(), behind))


def split_poll(head: bytes) -> PollHead | None:
    """Return the parts of a head whose first path with a request id has a UUID of lower case. None
    for other heads.

    Heads with equal outer parts differ in the id only: it has the same length in all, and no
    character with a meaning in URLs or headers.
    """
    start = head.find(REQUESTS_PATH) + len(REQUESTS_PATH)
    end = start + ID_LENGTH
    if start < len(REQUESTS_PATH) or UUID.fullmatch(head, start, end) is None:
        return None
    return head[start:end], (head[:start], head[end:])


def split_tags(head: bytes) -> tuple[bytes, Tags | None]:
    """Return a head without `REQUEST_TAGS` and `CALLER_TAGS`, and its tags. None for a head
    without tags, and one that is not complete or too large, which is returned as it is."""
    if len(head) > TAGGED_HEAD_MAX or head.find(HEAD_END) != len(head) - len(HEAD_END):
        return head, None
    if not (tags := TAG_LINE.findall(head)):
        return head, None
    client_id = next((value for is_id, _, _, value in tags if is_id), None)
    addresses = [value for _, _, is_address, value in tags if is_address]
    return TAG_LINE.sub(b"", head), Tags(
        None if client_id is None else client_id.rstrip().decode("ascii"),
        tuple(value.rstrip().decode("ascii") for value in addresses),
        not any(is_id or is_other for is_id, is_other, _, _ in tags),
    )


def split_request(data: bytes) -> tuple[bytes, bytes]:
    """Return the key of a request in the route cache, and its body.

    The key is the head without Content-Length. Both are empty if the request is incomplete.
    """
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
