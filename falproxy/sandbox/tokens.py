"""Short-lived tokens of the offline fal: signed, so that a wrong or old one is refused."""

import base64
import hashlib
import hmac
import json
import secrets
import time
from collections.abc import Sequence


def encode64(content: bytes) -> str:
    """base64url without padding (RFC 7515, section 2)."""
    return base64.urlsafe_b64encode(content).rstrip(b"=").decode()


def decode64(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))


class Tokens:
    """Mints and reads JWTs (HS256) with a secret that nobody else knows."""

    def __init__(self) -> None:
        self._secret = secrets.token_bytes(32)

    def mint(self, account: str, apps: Sequence[str], seconds: float) -> str:
        """A token for `apps`, which are aliases or endpoint ids, or `cdn` for uploads."""
        now = int(time.time())
        claims = {"sub": account, "allowed_apps": list(apps), "iat": now, "exp": now + seconds}
        parts = ({"alg": "HS256", "typ": "JWT"}, claims)
        head = ".".join(encode64(json.dumps(part).encode()) for part in parts)
        return f"{head}.{self._sign(head)}"

    def account(self, token: str, endpoint: str) -> str | None:
        """Whose token it is; None when it is forged, too old, or not for this endpoint."""
        head, _, signature = token.rpartition(".")
        if not hmac.compare_digest(self._sign(head).encode(), signature.encode()):
            return None
        claims = json.loads(decode64(head.partition(".")[2]))
        if claims["exp"] <= time.time():
            return None
        allowed = any(is_for(app, endpoint) for app in claims["allowed_apps"])
        return str(claims["sub"]) if allowed else None

    def _sign(self, head: str) -> str:
        return encode64(hmac.new(self._secret, head.encode(), hashlib.sha256).digest())


def is_for(app: str, endpoint: str) -> bool:
    """Clients name the alias alone (`flux`) or an id with its path (`fal-ai/flux/realtime`)."""
    named = app.removesuffix("/realtime").removesuffix("/stream")
    alias = endpoint.split("/")[1] if "/" in endpoint else endpoint
    is_parent = "/" in named and endpoint.startswith(f"{named}/")
    return named in (alias, endpoint) or is_parent
