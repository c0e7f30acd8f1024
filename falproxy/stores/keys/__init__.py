"""Access keys that are made while the proxy runs.

This module has the data classes and the interface of the store. `known_keys` has the keys that a
process accepts, `sql_keys` the tables, beside the ledger's. Times are seconds since 1970, by the
clock of the database.
"""

import hashlib
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, Self

from falproxy.limit_settings import NO_CALLER_LIMITS, CallerLimits

KeyState = Literal["active", "expired", "revoked"]

# The secret: a prefix by which scanners and people recognize it, and 32 random bytes in hexadecimal
# digits.
SECRET_PREFIX, SECRET_BYTES = "fpx_", 32
SECRET = re.compile(rf"{SECRET_PREFIX}[0-9a-f]{{{2 * SECRET_BYTES}}}")
ID_BYTES = 8
KEY_ID = re.compile(rf"[0-9a-f]{{{2 * ID_BYTES}}}")
KEYS_MAX = 10_000  # keys that are not revoked
# Seconds for which a secret is recognized after its end, so that its caller gets the reason.
ENDED_RETENTION = 7 * 86400.0
ENDED_SECRETS_MAX = 10  # of one key
LAST_USE_INTERVAL = 60.0  # seconds between two writes of a key's last use


class KeyStoreError(Exception):
    """The keys cannot be read or written: the database is unreachable, slow, full or read-only."""


class KeyNameTakenError(Exception):
    """Another key that is not revoked has this name."""


class TooManyKeysError(Exception):
    """There are KEYS_MAX keys already."""


class KeyEndedError(Exception):
    """The key is revoked, or has expired."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AccessKey:
    """A key, without its secret.

    name: the caller's, unique among keys that are not revoked.
    creator: the caller that created it, with the authentication method, or `cli`.
    last_used_at: with a precision of some minutes.
    endpoints: patterns of endpoint ids that the key may call; empty for no restriction.
    """

    id: str
    name: str
    creator: str
    created_at: float
    expires_at: float | None = None
    revoked_at: float | None = None
    last_used_at: float | None = field(default=None, compare=False)
    limits: CallerLimits = NO_CALLER_LIMITS
    endpoints: tuple[str, ...] = ()

    def state(self, now: float) -> KeyState:
        if self.revoked_at is not None:
            return "revoked"
        return "active" if self.expires_at is None or now < self.expires_at else "expired"


@dataclass(frozen=True, slots=True, kw_only=True)
class Expiry:
    """The end of a key: a time, or seconds from now by the clock of the database."""

    at: float | None = None
    after: float | None = None


NEVER = Expiry()


@dataclass(frozen=True, slots=True, kw_only=True)
class NewKey:
    name: str
    creator: str
    expiry: Expiry = NEVER
    limits: CallerLimits = NO_CALLER_LIMITS
    endpoints: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyChange:
    """New values of a key. expiry: None leaves it as it is."""

    expiry: Expiry | None
    limits: CallerLimits
    endpoints: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class StoredSecret:
    """A secret of a key, by its SHA-256. expires_at: of a secret that was replaced."""

    digest: str
    expires_at: float | None
    key: AccessKey


@dataclass(frozen=True, slots=True)
class KeysVersion:
    """generation: changes with each change of a key. now: by the clock of the database."""

    generation: int
    now: float


NO_KEYS = KeysVersion(0, 0.0)


class KeyStore(Protocol):
    """Every method raises KeyStoreError, and may be called again after that. The tables are
    created with the first key."""

    async def __aenter__(self) -> Self: ...

    async def __aexit__(self, *error: object) -> None: ...

    async def version(self) -> KeysVersion:
        """Return NO_KEYS if there has never been a key."""

    async def secrets(self, now: float) -> list[StoredSecret]:
        """Return the secrets that are valid, and those that ended within ENDED_RETENTION."""

    async def list_keys(self, *, revoked: bool = False) -> list[AccessKey]:
        """Return the keys by name. revoked: with those that are revoked, which come last."""

    async def find(self, name_or_id: str) -> AccessKey | None:
        """Return the key with this id, the key of this name that is not revoked, or the one that
        was revoked last."""

    async def create(self, new: NewKey) -> tuple[AccessKey, str]:
        """Return a new key and its secret. The name of an expired key can be used again: that key
        is revoked.

        Raises: KeyNameTakenError, TooManyKeysError.
        """

    async def change(self, key_id: str, change: KeyChange) -> AccessKey | None:
        """Return the changed key; None if it is unknown. Raises: KeyEndedError, it is revoked."""

    async def rotate(self, key_id: str, grace: float) -> tuple[AccessKey, str] | None:
        """Return the key and its new secret; None if the key is unknown.

        grace: seconds for which its other secrets stay valid.
        Raises: KeyEndedError, it is revoked or has expired.
        """

    async def revoke(self, key_id: str) -> AccessKey | None:
        """Return the revoked key; None if it is unknown."""

    async def record_uses(self, key_ids: Sequence[str]) -> None:
        """Set the last use of keys to now, unless it was set within LAST_USE_INTERVAL."""

    async def disconnect(self) -> None:
        """Close the connections. The next operation opens them again."""


def new_secret() -> str:
    return SECRET_PREFIX + secrets.token_hex(SECRET_BYTES)


def digest_of(secret: str) -> str:
    """Return the SHA-256 of a secret. It has too many bits to be guessed, so a fast function is
    enough."""
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).hexdigest()


def is_secret(text: str) -> bool:
    """Return whether a credential has the form of a secret of such a key."""
    return SECRET.fullmatch(text) is not None
