"""Callers who show a JWT, such as the users of a Supabase project."""

import asyncio
import logging
import time
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jwt
from aiohttp import web

from falproxy.errors import ProxyError
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
FETCH_TIMEOUT = 5  # seconds for the public keys
COOLDOWN_SECONDS = 10.0  # seconds that an address is left alone which could not be read
CACHE_SIZE = 10_000


def jwt_authenticator(secret: str | None, jwks_url: str | None, audience: str) -> Authenticator:
    """Knows the subject of a token that is signed by the secret or by a key at the JWKS address,
    is not expired, and is meant for the audience."""
    tokens = JwtVerifier(secret, jwks_url, audience)

    async def identify(request: web.Request) -> str | None:
        token = credential(request)
        if token is None or token.count(".") != 2 or not token.isascii():
            return None
        return await tokens.subject(token)

    return identify


class JwtVerifier:
    """Reads tokens, each one once: a client that polls shows the same one many times."""

    def __init__(self, secret: str | None, jwks_url: str | None, audience: str) -> None:
        self._secret = secret
        self._keys = None if jwks_url is None else JwksClient(jwks_url)
        self._audience = audience
        self._verified: OrderedDict[str, tuple[str, float]] = OrderedDict()

    async def subject(self, token: str) -> str | None:
        """Who the token is about; None for one that does not hold. Raises: ProxyError 503."""
        subject, expires = self._verified.get(token, (None, 0.0))
        if subject is not None and time.time() < expires:
            return subject
        try:
            claims = await self._verify(token)
        except jwt.PyJWTError as error:
            logger.info("A token does not hold: %s", type(error).__name__)
            return None
        self._verified[token] = subject, _ = str(claims["sub"]), float(claims["exp"])
        if len(self._verified) > CACHE_SIZE:
            self._verified.popitem(last=False)
        return subject

    async def _verify(self, token: str) -> dict[str, Any]:
        """The claims. Raises: jwt.PyJWTError. Which kind of key is used is for the algorithm to
        say, but neither kind is ever taken for the other."""
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
    """The keys at a JWKS address. They are kept for five minutes, no redirect is followed, and an
    unknown key, which strangers can name, has them fetched anew every 30 seconds at most.

    It has one thread of its own, so that an address that hangs holds up nothing else, and after a
    failure it is left alone for a while.
    """

    def __init__(self, url: str) -> None:
        self._client = jwt.PyJWKClient(url, timeout=FETCH_TIMEOUT)
        self._executor = ThreadPoolExecutor(1, "jwks")
        self._retry_at = 0.0

    async def find_key(self, token: str) -> jwt.PyJWK:
        """The key that a token names. Raises: jwt.PyJWTError; ProxyError 503, none can be read."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._executor, self._find_key, token)

    def _find_key(self, token: str) -> jwt.PyJWK:
        try:
            if time.monotonic() >= self._retry_at:
                return self._client.get_signing_key_from_jwt(token)
        except (jwt.PyJWKClientConnectionError, ValueError, OSError) as error:
            self._retry_at = time.monotonic() + COOLDOWN_SECONDS
            logger.warning("FALPROXY_JWKS_URL cannot be read: %s", type(error).__name__)
        raise ProxyError(503, "access_unavailable", "Tokens cannot be checked now.")
