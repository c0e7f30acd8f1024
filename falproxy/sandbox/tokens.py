"""Short-lived signed tokens (JWT, HS256) of the offline fal."""

import base64
import hashlib
import hmac
import json
import secrets
import time
from collections.abc import Sequence


def base64url_encode(content: bytes) -> str:
    """Encode as base64url without padding (RFC 7515, section 2)."""
    return base64.urlsafe_b64encode(content).rstrip(b"=").decode()


def base64url_decode(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))


class TokenIssuer:
    """Issues and verifies tokens with a secret that is random for each instance."""

    def __init__(self) -> None:
        self._secret = secrets.token_bytes(32)

    def issue(self, account: str, apps: Sequence[str], seconds: float) -> str:
        """Return a new token.

        account: the account that the token acts for.
        apps: aliases or endpoint ids that it may call, or `cdn` for uploads.
        seconds: lifetime.
        """
        now = int(time.time())
        claims = {"sub": account, "allowed_apps": list(apps), "iat": now, "exp": now + seconds}
        parts = ({"alg": "HS256", "typ": "JWT"}, claims)
        signed = ".".join(base64url_encode(json.dumps(part).encode()) for part in parts)
        return f"{signed}.{self._sign(signed)}"

    def verify(self, token: str, endpoint: str) -> str | None:
        """Return the token's account. None if it is forged, expired, or for another endpoint."""
        signed, _, signature = token.rpartition(".")
        if not hmac.compare_digest(self._sign(signed).encode(), signature.encode()):
            return None
        claims = json.loads(base64url_decode(signed.partition(".")[2]))
        if claims["exp"] <= time.time():
            return None
        is_allowed = any(matches_endpoint(app, endpoint) for app in claims["allowed_apps"])
        return str(claims["sub"]) if is_allowed else None

    def _sign(self, signed: str) -> str:
        return base64url_encode(hmac.new(self._secret, signed.encode(), hashlib.sha256).digest())


def matches_endpoint(app: str, endpoint: str) -> bool:
    """Return whether a token for `app` allows calls of `endpoint`.

    app: an alias (`flux`), or an id with or without a path (`fal-ai/flux/realtime`).
    """
    name = app.removesuffix("/realtime").removesuffix("/stream")
    alias = endpoint.split("/")[1] if "/" in endpoint else endpoint
    is_parent = "/" in name and endpoint.startswith(f"{name}/")
    return name in (alias, endpoint) or is_parent
