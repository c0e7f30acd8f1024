"""Roles of requests, by JWT or by an opaque key that a gateway exchanges for a JWT."""

import time
from collections.abc import Mapping

import jwt

from tests.support.fake_supabase.errors import (
    EXPIRED,
    NO_JWT,
    NO_ROLE,
    NO_TOKEN,
    SIGNED_EXPIRED,
    SIGNED_FOR_ANOTHER,
    SIGNED_UNREAD,
    WRONG_SIGNATURE,
    ErrorKind,
    Refusal,
)

ROLES = (None, "anon", "authenticated", "service_role")
BAD, FORGED, LATE = "bad", "forged", "late"
OF_REQUESTS = {BAD: NO_JWT, FORGED: WRONG_SIGNATURE, LATE: EXPIRED}
OF_URLS = {BAD: SIGNED_UNREAD, FORGED: SIGNED_FOR_ANOTHER, LATE: SIGNED_EXPIRED}


class Tokens:
    """JWTs and opaque keys.

    secret: signs JWTs.
    ahead: seconds by which the clock is fast.
    keys: opaque keys that a gateway exchanges for JWTs, by role.
    """

    def __init__(self, secret: str, keys: Mapping[str, str]) -> None:
        self._secret = secret
        self._keys = keys
        self.ahead = 0.0

    def make(self, **claims: object) -> str:
        return jwt.encode(claims, self._secret, "HS256")

    def make_url_token(self, path: str, seconds: int) -> str:
        now = int(self._now())
        return self.make(url=path, iat=now, exp=now + seconds)

    def check_url_token(self, token: str, path: str) -> None:
        if self._read(token, OF_URLS).get("url") != path:
            raise Refusal(SIGNED_FOR_ANOTHER)

    def role(self, headers: Mapping[str, str]) -> object:
        """Raises: Refusal."""
        token = headers.get("Authorization")
        apikey = headers.get("apikey", "")
        if token is None or token.startswith("Bearer sb_"):
            if apikey in self._keys:
                return self._keys[apikey]
            if token is None:
                raise Refusal(NO_TOKEN)
        role = self._read(token.removeprefix("Bearer "), OF_REQUESTS).get("role")
        if role not in ROLES:
            raise Refusal(NO_ROLE)
        return role

    def _read(self, token: str, kinds: Mapping[str, ErrorKind]) -> dict[str, object]:
        try:
            options = {"verify_exp": False, "verify_iat": False}
            claims: dict[str, object] = jwt.decode(
                token,
                self._secret,
                ["HS256"],
                options=options,  # type: ignore[arg-type] # a TypedDict
            )
        except jwt.InvalidSignatureError:
            raise Refusal(kinds[FORGED]) from None
        except jwt.InvalidTokenError:
            raise Refusal(kinds[BAD]) from None
        until = claims.get("exp")
        if isinstance(until, int | float) and until <= self._now():
            raise Refusal(kinds[LATE])
        return claims

    def _now(self) -> float:
        return time.time() + self.ahead
