"""Authentication by JWT, such as the tokens of a Supabase project's users."""

import logging
import time
from contextlib import suppress
from typing import Any

import jwt
from aiohttp import web
from cachetools import LRUCache

from falproxy.middleware.access import credential
from falproxy.middleware.jwks import MALFORMED, JwksClient, PublicKey
from falproxy.proxy.call import GRANT

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
CACHE_BYTES = 16 * 2**20  # of verified tokens
ENTRY_BYTES = 512  # of a verified token, beside its characters
EXPIRY_MAX = 2**53  # seconds since 1970; JSON numbers have no limit


class VerifiedToken:
    """A token whose signature and claims are valid. Cached decisions refer to it.

    It ends by both clocks: one of them stands still while a machine sleeps, the other may be set
    back.

    expires_at: seconds since 1970.
    deadline: the same moment by `time.monotonic`.
    public_key: that verified it; None for the secret.
    length: characters of the token and the subject.
    """

    __slots__ = ("deadline", "expires_at", "length", "public_key", "subject")

    def __init__(
        self, subject: str, expires_at: float, length: int, public_key: PublicKey | None
    ) -> None:
        self.subject = subject
        self.expires_at = expires_at
        self.deadline = time.monotonic() + expires_at - time.time()
        self.length = length
        self.public_key = public_key

    def __repr__(self) -> str:
        return f"<VerifiedToken, expires in {self.expires_at - time.time():.0f} s>"

    def use(self) -> bool:
        """Return whether the token is valid without another verification: it has not expired, and
        its key is in the set of keys."""
        if time.time() >= self.expires_at or time.monotonic() >= self.deadline:
            return False
        return self.public_key is None or self.public_key.use()

    @property
    def has_ended(self) -> bool:
        """True once the leeway is over too, also if the clock was set back."""
        return time.monotonic() >= self.deadline + LEEWAY


def size_in_memory(token: VerifiedToken) -> int:
    return ENTRY_BYTES + token.length


class JwtVerifier:
    """Verifies tokens. A token is valid if it is signed with the secret or with a key of the JWKS
    URL, has not expired, and names the audience.

    Valid tokens are cached until they expire, since a polling client repeats its token. A dict
    compares a token with one of the same keyed hash only: the duration of a lookup reveals nothing
    about the tokens in it.
    """

    def __init__(self, secret: str | None, jwks_url: str | None, audience: str) -> None:
        self._secret = secret
        self._keys = None if jwks_url is None else JwksClient(jwks_url)
        self._audience = audience
        self._verified: LRUCache[str, VerifiedToken] = LRUCache(CACHE_BYTES, size_in_memory)

    async def authenticate(self, request: web.Request) -> str | None:
        """Return the subject of a request's token. Raises: ProxyError 503."""
        token = credential(request)
        if token is None or token.count(".") != 2 or not token.isascii():
            return None
        verified = await self.verify(token)
        if verified is None:
            return None
        request[GRANT] = verified
        return verified.subject

    async def close(self, app: web.Application) -> None:
        if self._keys is not None:
            self._keys.close()

    async def subject(self, token: str) -> str | None:
        """Return the subject of a token, None for an invalid one. Raises: ProxyError 503."""
        verified = await self.verify(token)
        return None if verified is None else verified.subject

    async def verify(self, token: str) -> VerifiedToken | None:
        """Return a valid token, None for an invalid one. Raises: ProxyError 503."""
        cached = self._verified.get(token)
        if cached is not None and cached.use():
            return cached
        try:
            if cached is not None and cached.has_ended:
                raise jwt.ExpiredSignatureError
            verified = await self._verify(token)
        except (jwt.PyJWTError, *MALFORMED) as error:
            logger.info("A token is not valid: %s", type(error).__name__)
            return None
        if cached is not None:
            verified.deadline = min(verified.deadline, cached.deadline)
        with suppress(ValueError):  # larger than the whole cache
            self._verified[token] = verified
        return verified

    async def _verify(self, token: str) -> VerifiedToken:
        """The algorithm in the header selects secret or public key; each kind is used with its own
        algorithms only. Raises: jwt.PyJWTError, ProxyError 503."""
        header = jwt.get_unverified_header(token)
        algorithm, public_key = header.get("alg"), None
        if self._secret is not None and algorithm in HMAC_ALGORITHMS:
            claims = self._decode(token, self._secret, HMAC_ALGORITHMS)
        elif self._keys is not None and algorithm in PUBLIC_KEY_ALGORITHMS:
            public_key = await self._keys.find(header.get("kid"))
            claims = self._decode(token, public_key.jwk, PUBLIC_KEY_ALGORITHMS)
        else:
            raise jwt.InvalidAlgorithmError
        subject, expires_at = str(claims["sub"]), float(min(int(claims["exp"]), EXPIRY_MAX))
        return VerifiedToken(subject, expires_at, len(token) + len(subject), public_key)

    def _decode(self, token: str, key: str | jwt.PyJWK, algorithms: list[str]) -> dict[str, Any]:
        return jwt.decode(
            token,
            key,
            algorithms=algorithms,
            audience=self._audience,
            leeway=LEEWAY,
            options={"require": ["exp", "sub"]},
        )
