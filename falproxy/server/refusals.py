"""Responses to requests that are refused before the application sees them."""

import json
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Refusal:
    """A response to a request that is not read completely. The connection is closed after it."""

    status: int
    reason: str
    code: str
    message: str
    retry_after: str = ""

    def body(self) -> bytes:
        return json.dumps({"error": {"code": self.code, "message": self.message}}).encode()

    def response_bytes(self) -> bytes:
        body = self.body()
        retry_after = f"Retry-After: {self.retry_after}\r\n" if self.retry_after else ""
        head = (
            f"HTTP/1.1 {self.status} {self.reason}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\nX-Content-Type-Options: nosniff\r\n{retry_after}"
            "Connection: close\r\n\r\n"
        )
        return head.encode() + body


BAD_REQUEST = Refusal(400, "Bad Request", "bad_request", "The request is not valid HTTP.")
HEAD_TIMEOUT = Refusal(
    408, "Request Timeout", "head_timeout", "The request's headers did not arrive in time."
)
FIELD_TOO_LARGE = Refusal(400, "Bad Request", "head_too_large", "The URL or a header is too large.")
HEAD_TOO_LARGE = Refusal(
    431, "Request Header Fields Too Large", "head_too_large", "The request's headers are too large."
)
TOO_MANY_CONNECTIONS = Refusal(
    503,
    "Service Unavailable",
    "too_many_connections",
    "The proxy has as many connections as it can; try again soon.",
    "1",
)
REFUSALS = {refusal.status: refusal for refusal in (BAD_REQUEST, HEAD_TOO_LARGE)}
