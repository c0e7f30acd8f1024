"""Authentication by JWT, such as the tokens of a Supabase project's users."""

import asyncio
import logging
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, NamedTuple

import jwt
from aiohttp import web
from cachetools import LRUCache

from falproxy.circuit_breaker import CircuitBreaker
from falproxy.errors import TemporaryError
from falproxy.middleware.access import Authenticator, credential

logger = logging.getLogger(__name__)

HMAC_ALGORITHMS = ["HS256", "HS384", "HS512"]
PUBLIC_KEY_ALGORITHMS = [
    "RS256",
    "RS384",
    "RS512",
    "PS256",
    "PS384",
    "PS512",
    "ES256",
    "ES384",
    "EdDSA",
]
LEEWAY = 10  # seconds that clocks may differ
FETCH_TIMEOUT = 5  # seconds
COOLDOWN_SECONDS = 10.0  # after a failed fetch of the public keys
CACHE_BYTES = 16 * 2**20  # of verified tokens
ENTRY_BYTES = 512  # of a verified token, beside its characters
EXPIRY_MAX = 2.0**53  # seconds since 1970; JSON numbers have no limit
# Errors in the values of claims that PyJWT does not expect, such as an infinite time.
MALFORMED = (ValueError, OverflowError, TypeError, RecursionError)


def jwt_authenticator(secret: str | None, jwks_url: str | None, audience: str) -> Authenticator:
    """Return an authenticator for JWTs, whose principal is the subject of the token.

    A token is valid if it is signed with the secret or with a key of the JWKS URL, has not
    expired, and names the audience.
    """
    verifier = JwtVerifier(secret, jwks_url, audience)

    async def authenticate_jwt(request: web.Request) -> str | None:
        token = credential(request)
        if token is None or token.count(".") != 2 or not token.isascii():
            return None
        return await verifier.subject(token)

    return authenticate_jwt


class VerifiedToken(NamedTuple):
    """length: characters of the token and the subject."""

    subject: str
    expires_at: float
    length: int


def size_in_memory(token: VerifiedToken) -> int:
    return ENTRY_BYTES + token.length


class JwtVerifier:
    """Verifies tokens. Valid ones are cached until they expire, since a polling client repeats its
    token."""

    def __init__(self, secret: str | None, jwks_url: str | None, audience: str) -> None:
        self._secret = secret
        self._keys = None if jwks_url is None else JwksClient(jwks_url)
        self._audience = audience
        self._verified: LRUCache[str, VerifiedToken] = LRUCache(CACHE_BYTES, size_in_memory)

    async def subject(self, token: str) -> str | None:
        """Return the subject of a token, None for an invalid one. Raises: ProxyError 503."""
        cached = self._verified.get(token)
        if cached is not None and time.time() < cached.expires_at:
            return cached.subject
        try:
            claims = await self._verify(token)
        except (jwt.PyJWTError, *MALFORMED) as error:
            logger.info("A token is not valid: %s", type(error).__name__)
            return None
        subject = str(claims["sub"])
        expires_at = min(float(min(claims["exp"], EXPIRY_MAX)), EXPIRY_MAX)
        with suppress(ValueError):  # larger than the whole cache
            self._verified[token] = VerifiedToken(subject, expires_at, len(token) + len(subject))
        return subject

    async def _verify(self, token: str) -> dict[str, Any]:
        """Return the claims. The algorithm in the header selects secret or public key; each kind
        is used with its own algorithms only. Raises: jwt.PyJWTError, ProxyError 503."""
        algorithm = jwt.get_unverified_header(token).get("alg")
        if self._secret is not None and algorithm in HMAC_ALGORITHMS:
            return self._decode(token, self._secret, HMAC_ALGORITHMS)
        if self._keys is not None and algorithm in PUBLIC_KEY_ALGORITHMS:
            key = await self._keys.find_key(token)
            return self._decode(token, key, PUBLIC_KEY_ALGORITHMS)
        raise jwt.InvalidAlgorithmError

    def _decode(self, token: str, key: str | jwt.PyJWK, algorithms: list[str]) -> dict[str, Any]:
        return jwt.decode(
            token,
            key,
            algorithms=algorithms,
            audience=self._audience,
            leeway=LEEWAY,
            options={"require": ["exp", "sub"]},
        )


class JwksClient:
    """The public keys at a JWKS URL.

    PyJWKClient caches them for five minutes, follows no redirect, and fetches them again for an
    unknown key id, which anyone can send, at most every 30 seconds. It runs in a thread of its own,
    so that a URL that hangs blocks nothing else.
    """

    def __init__(self, url: str) -> None:
        self._client = jwt.PyJWKClient(url, timeout=FETCH_TIMEOUT)
        self._executor = ThreadPoolExecutor(1, "jwks")
        self._breaker = CircuitBreaker(COOLDOWN_SECONDS)

    async def find_key(self, token: str) -> jwt.PyJWK:
        """Return the key that a token names.

        Raises: jwt.PyJWTError, the key is unknown; ProxyError 503, the keys cannot be read.
        """
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._executor, self._find_key, token)

    def _find_key(self, token: str) -> jwt.PyJWK:
        if self._breaker.allow_request():
            try:
                key = self._client.get_signing_key_from_jwt(token)
            except (jwt.PyJWKClientConnectionError, ValueError, OSError) as error:
                self._breaker.trip()
                logger.warning("FALPROXY_JWKS_URL cannot be read: %s", type(error).__name__)
            except jwt.PyJWTError:
                self._breaker.reset()  # the keys were read, and this one is not among them
                raise
            else:
                self._breaker.reset()
                return key
        raise TemporaryError(503, "access_unavailable", "Tokens cannot be checked now.")
