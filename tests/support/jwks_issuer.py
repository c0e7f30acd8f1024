"""An issuer of JWTs: a server of public keys, and the tokens that it signs."""

import json
import time
from typing import Any

import jwt
from aiohttp import web
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey

SECRET = "a-secret-of-a-supabase-project-that-is-long-enough-for-sha-512-to-be-content"
RSA = rsa.generate_private_key(65537, 2048)
EC = ec.generate_private_key(ec.SECP256R1())
OTHER_EC = ec.generate_private_key(ec.SECP256R1())


def claims(**changes: object) -> dict[str, Any]:
    """Return valid claims with changes; a claim of None is left out."""
    valid = {"sub": "ann", "aud": "authenticated", "exp": time.time() + 60}
    return {name: value for name, value in (valid | changes).items() if value is not None}


def signed(key: Any = SECRET, algorithm: str = "HS256", kid: str = "1", **changes: object) -> str:
    return jwt.encode(claims(**changes), key, algorithm, headers={"kid": kid})


class Issuer:
    """A server of public keys.

    fetched: number of requests.
    response: sent instead of the keys.
    """

    def __init__(self) -> None:
        self.keys: dict[str, RSAPrivateKey | ec.EllipticCurvePrivateKey] = {}
        self.fetched = 0
        self.origin = ""
        self.response: tuple[int, str] | None = None

    @property
    def url(self) -> str:
        return f"{self.origin}/jwks.json"

    async def serve(self, request: web.Request) -> web.StreamResponse:
        self.fetched += 1
        if request.path == "/moved":
            raise web.HTTPFound("/jwks.json")
        if self.response is not None:
            status, text = self.response
            return web.Response(status=status, text=text)
        return web.json_response({"keys": [self.document(kid) for kid in self.keys]})

    def document(self, kid: str) -> dict[str, object]:
        key = self.keys[kid]
        is_rsa = isinstance(key, RSAPrivateKey)
        kind: Any = jwt.algorithms.RSAAlgorithm if is_rsa else jwt.algorithms.ECAlgorithm
        public = json.loads(kind.to_jwk(key.public_key()))
        algorithm = "RS256" if is_rsa else "ES256"
        return {**public, "kid": kid, "alg": algorithm, "use": "sig"}
