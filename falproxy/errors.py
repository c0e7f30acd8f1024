"""Errors that become a response (ProxyError) or stop the start (SettingsError)."""

from collections.abc import Mapping
from typing import Self

NO_HEADERS: Mapping[str, str] = {}


class ProxyError(Exception):
    """A refusal or failure that becomes an error response.

    status: HTTP status of the response.
    code: stable lower_snake_case identifier that programs may test.
    message: one sentence for a person; never a key, never an upstream body.
    headers: extra response headers, such as Allow with a 405.
    """

    def __init__(
        self, status: int, code: str, message: str, headers: Mapping[str, str] = NO_HEADERS
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.headers = headers

    def with_headers(self, headers: Mapping[str, str]) -> Self:
        """Return a copy with more headers, for one of several requests that share the error."""
        copied = type(self).__new__(type(self), *self.args)
        copied.__dict__.update(vars(self), headers={**headers, **self.headers})
        return copied


class TemporaryError(ProxyError):
    """An error after which the client should repeat the request: nothing was sent to fal, or the
    request changes nothing. The dialects for fal's clients add what makes these repeat it."""


CONCURRENCY_LIMITED = "concurrency_limited"


class CallerRefusal(ProxyError):
    """A refusal for reasons of the caller, such as its limits. Equal calls of other callers, which
    wait for the refused call, are not refused with it."""


class SettingsError(ValueError):
    """A setting is missing or invalid. The message names the setting, never a secret's value."""
