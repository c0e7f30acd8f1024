"""The public keys of a JWKS URL, read again for as long as tokens are signed with them."""

import asyncio
import logging
import ssl
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import jwt

from falproxy.errors import TemporaryError

logger = logging.getLogger(__name__)

# All times are seconds.
READ_INTERVAL = 3.0  # between the starts of two reads
READ_GRACE = 2.0  # that a read may be late: a removed key is refused after 5 seconds
READ_TIMEOUT = 5.0
IDLE_SECONDS = 60.0  # without a token, until the reads end
MISS_INTERVAL = 10.0  # between two reads for unknown key ids, beside the regular ones
FAILURE_COOLDOWN = 10.0
TRUST_SECONDS = 600.0  # that known keys stay valid while the URL cannot be read
# Errors in the values of a document that PyJWT does not expect, such as an infinite time.
MALFORMED = (ValueError, OverflowError, TypeError, RecursionError)


class PublicKey:
    """A key of the set. The tokens that it has verified refer to it.

    document: as the URL returned it.
    is_withdrawn: the key is no longer in the set, or was replaced under the same id.
    """

    __slots__ = ("_keys", "document", "is_withdrawn", "jwk")

    def __init__(self, keys: "JwksClient", document: object, jwk: jwt.PyJWK) -> None:
        self._keys = keys
        self.document = document
        self.jwk = jwk
        self.is_withdrawn = False

    def __repr__(self) -> str:
        return f"<PublicKey{' (withdrawn)' if self.is_withdrawn else ''}>"

    def use(self) -> bool:
        """Return whether the key is in the set, as read within the last seconds."""
        return not self.is_withdrawn and self._keys.use()


class JwksClient:
    """The public keys at a JWKS URL.

    While tokens are used, the URL is read every READ_INTERVAL, so that a key that was removed is
    refused within seconds. An unknown key id, which anyone can send, causes one more read at most
    every MISS_INTERVAL. While the URL cannot be read, known keys stay valid for TRUST_SECONDS.

    Reads run in a thread of their own, so that a URL that hangs blocks nothing else. No redirect
    is followed.

    clock: monotonic.
    """

    def __init__(self, url: str, clock: Callable[[], float] = time.monotonic) -> None:
        is_tls = urlsplit(url).scheme == "https"
        context = ssl.create_default_context() if is_tls else None
        self._client = jwt.PyJWKClient(
            url, cache_jwk_set=False, timeout=READ_TIMEOUT, ssl_context=context
        )
        self._executor = ThreadPoolExecutor(1, "jwks")
        self._now = clock
        self._keys: dict[str, PublicKey] = {}  # by key id
        self._pending: asyncio.Future[object] | None = None  # a read
        self._timer: asyncio.TimerHandle | None = None  # of the next read
        self._is_failing = self._is_closed = False
        self._used_at = self._started_at = self._missed_at = float("-inf")
        self._current_until = self._trusted_until = self._retry_at = float("-inf")

    def __repr__(self) -> str:
        return f"<JwksClient {len(self._keys)} keys{', failing' if self._is_failing else ''}>"

    def use(self) -> bool:
        """Return whether the known keys are current, and keep them so for a while."""
        self._used_at = now = self._now()
        return now < self._current_until

    async def find(self, key_id: object) -> PublicKey:
        """Return the key with the id.

        Raises: jwt.PyJWKClientError, the set has no such key; ProxyError 503, it cannot be read.
        """
        asked_at = self._now()
        if not self.use():
            await self._read()
        key = self._get(key_id)
        if key is None and self._may_read_for_unknown_key(asked_at):
            self._missed_at = asked_at
            await self._read()
            key = self._get(key_id)
        if self._now() >= self._trusted_until or (key is None and self._is_failing):
            raise TemporaryError(503, "access_unavailable", "Tokens cannot be checked now.")
        if key is None:
            raise jwt.PyJWKClientError("unknown key id")
        return key

    def close(self) -> None:
        """End the reads."""
        self._is_closed = True
        self._cancel_timer()
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _get(self, key_id: object) -> PublicKey | None:
        return self._keys.get(key_id) if isinstance(key_id, str) else None

    def _may_read_for_unknown_key(self, asked_at: float) -> bool:
        is_read_since = self._started_at >= asked_at
        return not is_read_since and asked_at >= self._missed_at + MISS_INTERVAL

    async def _read(self) -> None:
        """Wait for a read, unless one has failed a moment ago."""
        if self._pending is None and self._now() >= self._retry_at:
            self._start()
        if self._pending is not None:
            await asyncio.wait((self._pending,))

    def _start(self) -> None:
        if self._is_closed:
            return
        self._cancel_timer()
        self._started_at = now = self._now()
        if now < self._current_until:  # known keys stay valid until the result is known
            until = min(now + READ_TIMEOUT, self._trusted_until)
            self._current_until = max(self._current_until, until)
        loop = asyncio.get_running_loop()
        self._pending = loop.run_in_executor(self._executor, self._client.fetch_data)
        self._pending.add_done_callback(self._on_read)

    def _on_read(self, read: "asyncio.Future[object]") -> None:
        self._pending = None
        if read.cancelled():
            return
        try:
            self._replace(read.result())
        except (jwt.PyJWTError, OSError, *MALFORMED) as error:
            if not self._is_failing:
                logger.warning("FALPROXY_JWKS_URL cannot be read: %s", type(error).__name__)
            self._is_failing = True
            next_at = self._retry_at = self._now() + FAILURE_COOLDOWN
        else:
            self._is_failing = False
            self._trusted_until = self._started_at + TRUST_SECONDS
            next_at = self._started_at + READ_INTERVAL
        self._current_until = min(next_at + READ_GRACE, self._trusted_until)
        if not self._is_closed:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(next_at - self._now(), self._read_if_used)

    def _read_if_used(self) -> None:
        self._timer = None
        if self._pending is None and self._now() < self._used_at + IDLE_SECONDS:
            self._start()

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _replace(self, document: object) -> None:
        """Use the keys of a document. Raises: TypeError, it is no set of keys."""
        found = document.get("keys") if isinstance(document, dict) else None
        if not isinstance(found, list):
            raise TypeError("not a set of keys")
        old, new = self._keys, dict[str, PublicKey]()
        for each in found:
            key_id = each.get("kid") if isinstance(each, dict) else None
            if not isinstance(key_id, str) or key_id in new:
                continue
            if each.get("use") not in ("sig", None):
                continue
            known = old.get(key_id)
            if known is not None and known.document == each:
                new[key_id] = known
            elif (jwk := parse_key(each)) is not None:
                new[key_id] = PublicKey(self, each, jwk)
        for key_id, key in old.items():
            key.is_withdrawn = new.get(key_id) is not key
        self._keys = new


def parse_key(document: dict[str, object]) -> jwt.PyJWK | None:
    """Return a key of a set, None for one that is not supported."""
    try:
        return jwt.PyJWK(document)
    except (jwt.PyJWTError, LookupError, AttributeError, *MALFORMED):
        return None
