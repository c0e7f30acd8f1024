"""The outcome of a call with an Idempotency-Key, and its form in the store."""

import json
from dataclasses import dataclass, field

from falproxy.errors import ProxyError, TemporaryError


@dataclass(frozen=True, slots=True)
class StoredOutcome:
    """A response, or the error in its place.

    operation: of the call, as in `Target`.
    key_mark: fingerprint of the fal key that the call was sent with; empty for the default one.
    error: the exception, if there was no response.
    """

    operation: str
    status: int = 0
    headers: tuple[tuple[str, str], ...] = ()
    body: bytes = field(default=b"", repr=False)
    key_mark: str = ""
    error: ProxyError | None = None


def serialize_stored(outcome: StoredOutcome) -> bytes:
    """Return a line of JSON, followed by the body."""
    fields: dict[str, object] = {"operation": outcome.operation}
    if (error := outcome.error) is not None:
        fields["error"] = [error.status, error.code, error.message, dict(error.headers)]
        fields["is_temporary"] = isinstance(error, TemporaryError)
    else:
        fields["response"] = [outcome.status, outcome.headers, outcome.key_mark]
    return json.dumps(fields).encode() + b"\n" + outcome.body


def parse_stored(content: bytes) -> StoredOutcome:
    """Raises: ValueError, TypeError, KeyError: written by another version."""
    line, _, body = content.partition(b"\n")
    fields = json.loads(line)
    operation = str(fields["operation"])
    if "error" in fields:
        status, code, message, headers, *_ = fields["error"]
        make = TemporaryError if fields["is_temporary"] else ProxyError
        return StoredOutcome(operation, error=make(status, code, message, headers))
    status, pairs, key_mark, *_ = fields["response"]
    headers = tuple((name, value) for name, value in pairs)
    return StoredOutcome(operation, status, headers, body, key_mark)
