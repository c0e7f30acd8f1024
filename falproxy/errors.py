"""The one exception that a client is told about."""

from collections.abc import Mapping

NO_HEADERS: Mapping[str, str] = {}


class ProxyError(Exception):
    """A refusal or a failure that the client is told about.

    status: what the client gets. code: stable lower_snake_case word programs may test.
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


class SettingsError(ValueError):
    """A setting is missing or makes no sense. The message names it, never a secret's value."""
