"""The outcome of a shared call, and its form in the store for the calls of other processes."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

from falproxy.errors import ProxyError, TemporaryError
from falproxy.json_object import parse_object
from falproxy.stores.cache import OUTCOME_MAX_BYTES, CachedResult, SharedFailure

HEADER_MAX = 1024  # characters of a header value that is shared
TOO_LARGE_BODY = b'{"detail": "The error response is too large to be shared by equal calls."}'
JSON_TYPE = "application/json"
# Headers of a failure by which fal's clients recognize a response of fal about the call itself.
FAL_RESPONSE_HEADERS = frozenset({"x-fal-request-id", "x-fal-error-type"})


@dataclass(frozen=True, slots=True)
class CallOutcome:
    """The end of a shared call. Without a result, failure and error: a response that cannot be
    shared.

    result: a response that is cached.
    failure: a response that is shared but not cached.
    error: the exception, if there was no response.
    was_executed: False if no call was made, because there was a result already, or because all
        callers had left.
    is_shareable: False if the calls of other processes that waited for this one do not get the
        outcome.
    is_stored: True if the result of this call was stored; False for one that was stored before.
    ended_at: time of the event loop at which another process ended the call; None if this process
        did.
    """

    result: CachedResult | None = None
    failure: SharedFailure | None = None
    error: Exception | None = None
    was_executed: bool = True
    is_shareable: bool = field(default=True, compare=False)
    is_stored: bool = field(default=False, compare=False)
    ended_at: float | None = field(default=None, compare=False)


def is_from_fal(failure: SharedFailure) -> bool:
    """Return whether fal sent a failure, and not a gateway in front of it."""
    return any(name.lower() in FAL_RESPONSE_HEADERS for name, _ in failure.headers)


def internal_error() -> ProxyError:
    return ProxyError(500, "internal_error", "The proxy failed; its log has the reason.")


def error_failure(error: Exception) -> SharedFailure:
    """Return an error as a response in fal's form."""
    if not isinstance(error, ProxyError):
        error = internal_error()
    document = {"detail": error.message, "error_type": error.code}
    headers = shared_headers(error.headers)
    return SharedFailure(error.status, JSON_TYPE, json.dumps(document).encode(), headers)


def shared_headers(headers: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    return tuple((name, value) for name, value in headers.items() if len(value) <= HEADER_MAX)


def serialize_outcome(outcome: CallOutcome, *, has_job: bool) -> bytes:
    """Return a line of JSON, followed by the body of the response if there is one.

    Empty for a response that is too large, if it is a result or fal has it as that of a job. Any
    other error response that is too large keeps its status and headers.
    """
    fields: dict[str, object] = {}
    body = b""
    if outcome.result is not None:
        result = outcome.result
        fields["result"] = [result.content_type, result.stored_at, result.expires_at]
        body = result.body
        if len(body) > OUTCOME_MAX_BYTES:
            return b""
    elif outcome.failure is not None:
        if has_job and len(outcome.failure.body) > OUTCOME_MAX_BYTES:
            return b""
        failure = shorten(outcome.failure)
        headers = shared_headers(dict(failure.headers))
        fields["failure"] = [failure.status, failure.content_type, headers]
        body = failure.body
    elif outcome.error is not None:
        error = outcome.error if isinstance(outcome.error, ProxyError) else internal_error()
        headers = shared_headers(error.headers)
        fields["error"] = [error.status, error.code, error.message, headers]
        fields["is_temporary"] = isinstance(error, TemporaryError)
    return json.dumps(fields).encode() + b"\n" + body


def parse_outcome(content: bytes, ended_at: float) -> CallOutcome:
    line, _, body = content.partition(b"\n")
    fields = json.loads(line)
    if "result" in fields:
        return CallOutcome(CachedResult(body, *fields["result"][:3]), ended_at=ended_at)
    if "failure" in fields:
        status, content_type, headers, *_ = fields["failure"]
        pairs = tuple((name, value) for name, value in headers)
        failure = SharedFailure(status, content_type, body, pairs)
        return CallOutcome(failure=failure, ended_at=ended_at)
    if "error" in fields:
        status, code, message, headers, *_ = fields["error"]
        make = TemporaryError if fields.get("is_temporary") else ProxyError
        return CallOutcome(error=make(status, code, message, dict(headers)), ended_at=ended_at)
    return CallOutcome(ended_at=ended_at)


def shorten(failure: SharedFailure) -> SharedFailure:
    """Return a failure with a body of at most OUTCOME_MAX_BYTES bytes. fal's validation errors
    contain the rejected input, such as a whole image: it is left out first."""
    if len(failure.body) <= OUTCOME_MAX_BYTES:
        return failure
    document = parse_object(failure.body) or {}
    details = document.get("detail")
    if isinstance(details, list):
        document["detail"] = [
            {name: value for name, value in detail.items() if name != "input"}
            for detail in details
            if isinstance(detail, dict)
        ]
        body = json.dumps(document).encode()
        if len(body) <= OUTCOME_MAX_BYTES:
            return SharedFailure(failure.status, failure.content_type, body, failure.headers)
    return SharedFailure(failure.status, JSON_TYPE, TOO_LARGE_BODY, failure.headers)
