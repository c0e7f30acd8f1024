"""The keys that a process accepts, in memory, and their refresh from the store.

A request reads no database: the secrets are known by their SHA-256. The version of the keys is read
every POLL_INTERVAL, and the keys again if it has changed. A secret that is not known causes one
more refresh, so that a new key is accepted at once. While the database is away, the keys that were
known stay valid until they expire, for at most TRUST_SECONDS.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine
from typing import Self

from aiohttp import web

from falproxy.concurrency import cancel_tasks
from falproxy.fal.policy import Globs
from falproxy.limit_settings import NO_CALLER_LIMITS
from falproxy.stores.keys import (
    LAST_USE_INTERVAL,
    NO_KEYS,
    KeyStore,
    KeyStoreError,
    StoredSecret,
    digest_of,
)

logger = logging.getLogger(__name__)

MANAGED_KEY_METHOD = "managed"  # name of the authentication method

# All times are seconds.
POLL_INTERVAL = 1.0
REFRESH_INTERVAL_MIN = 0.1  # between the starts of two refreshes, however many secrets are unknown
REFRESH_TIMEOUT = 2.0
FAILURE_COOLDOWN = 1.0  # after a failed refresh, until an unknown secret causes the next one
TRUST_SECONDS = 600.0
USES_INTERVAL = 5.0  # between two writes of last uses
LOG_INTERVAL = 60.0  # between two log lines about the same ended key

NEVER_EXPIRES = float("inf")


class KeyGrant:
    """The rights of one secret, in this process. Cached decisions refer to it.

    expires_at: of the secret, by the clock of the database.
    endpoints: of the key; None for no restriction.
    is_withdrawn: the key was changed or revoked, or the secret replaced.
    is_used: since the last use was written.
    """

    __slots__ = (
        "_known_keys",
        "endpoints",
        "expires_at",
        "is_used",
        "is_withdrawn",
        "key",
        "logged_at",
    )  # fmt: skip

    def __init__(self, known_keys: "KnownKeys", stored: StoredSecret) -> None:
        self._known_keys = known_keys
        self.key = stored.key
        ends = (stored.expires_at, stored.key.expires_at)
        self.expires_at = min((end for end in ends if end is not None), default=NEVER_EXPIRES)
        self.endpoints = Globs(stored.key.endpoints) if stored.key.endpoints else None
        self.is_withdrawn = stored.key.revoked_at is not None
        self.is_used = False
        self.logged_at = float("-inf")

    def __repr__(self) -> str:
        return f"<KeyGrant {self.key.name}, {'valid' if self.is_valid() else 'not valid'}>"

    def is_valid(self) -> bool:
        return not self.has_ended and self._known_keys.is_trusted

    def use(self) -> bool:
        """Return whether a request may pass, and remember the use of the key."""
        if self.is_valid():
            self.is_used = True
            return True
        return False

    @property
    def has_ended(self) -> bool:
        """True if the key is revoked or expired, or its secret replaced."""
        return self.is_withdrawn or self._known_keys.database_time() >= self.expires_at

    @property
    def is_key_expired(self) -> bool:
        expires_at = self.key.expires_at
        return expires_at is not None and self._known_keys.database_time() >= expires_at

    def should_log(self) -> bool:
        """Return whether to log a request with the ended key: once in LOG_INTERVAL."""
        now = self._known_keys.now()
        if now < self.logged_at + LOG_INTERVAL:
            return False
        self.logged_at = now
        return True


class KnownKeys:
    """It is a context: within it, the keys are refreshed.

    clock: monotonic, in seconds.
    has_limits: one of the keys has limits of its own.
    """

    def __init__(self, store: KeyStore, clock: Callable[[], float] = time.monotonic) -> None:
        self.store = store
        self.now = clock
        self.has_limits = False
        self._trusted_until = float("-inf")
        self._clock_offset = 0.0  # from `now` to the clock of the database
        self._grants: dict[str, KeyGrant] = {}  # by the digest of the secret
        self._version = NO_KEYS
        self._has_keys = asyncio.Event()
        self._pending: asyncio.Task[None] | None = None  # a refresh that has not begun
        self._lock = asyncio.Lock()
        self._started_at = self._failed_at = float("-inf")
        self._is_failing = False
        self._uses_written_at: dict[str, float] = {}  # by the id of the key
        self._tasks: set[asyncio.Task[None]] = set()
        self._poll_task: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        state = ", failing" if self._is_failing else ""
        return f"<KnownKeys {len(self._grants)} secrets{state}>"

    async def __aenter__(self) -> Self:
        await self.store.__aenter__()
        self._poll_task = self._start(self._poll())
        return self

    async def __aexit__(self, *error: object) -> None:
        await cancel_tasks(tuple(self._tasks))
        try:
            async with asyncio.timeout(REFRESH_TIMEOUT):
                await self._write_uses(is_last=True)
        except (KeyStoreError, TimeoutError):
            logger.info("The last use of keys was not written")
        await self.store.__aexit__(*error)

    @property
    def is_trusted(self) -> bool:
        """True if the keys were read within TRUST_SECONDS."""
        return self.now() < self._trusted_until

    def database_time(self) -> float:
        return self.now() + self._clock_offset

    @property
    def names(self) -> set[str]:
        """The names of the keys that are known, with those that have ended recently."""
        return {grant.key.name for grant in self._grants.values()}

    def get(self, secret: str) -> KeyGrant | None:
        return self._grants.get(digest_of(secret))

    async def find(self, secret: str) -> KeyGrant | None:
        """Return the grant of a secret, after a refresh if it is not known. The grant may have
        ended.

        Raises: KeyStoreError, the store was not read, so that it is not certain whether the key
            is valid.
        """
        grant = self.get(secret)
        if grant is None or not (grant.has_ended or grant.is_valid()):
            if self.now() < self._failed_at + FAILURE_COOLDOWN:
                raise KeyStoreError("it failed a moment ago")
            await self.refresh()
            grant = self.get(secret)
        return grant

    async def refresh(self) -> None:
        """Wait for a refresh that begins from now on. Raises: KeyStoreError."""
        if self._pending is None:
            self._pending = self._start(self._refresh_in_turn())
        await asyncio.shield(self._pending)

    def _start(self, work: Coroutine[object, object, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._on_done)
        return task

    def _on_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None and not isinstance(error, KeyStoreError):
            logger.error("The refresh of the keys failed", exc_info=error)

    async def _refresh_in_turn(self) -> None:
        async with self._lock:
            await asyncio.sleep(self._started_at + REFRESH_INTERVAL_MIN - self.now())
            self._pending = None
            self._started_at = self.now()
            try:
                async with asyncio.timeout(REFRESH_TIMEOUT):
                    await self._refresh()
            except (KeyStoreError, TimeoutError) as error:
                self._on_failure(error)
                raise KeyStoreError("the keys cannot be read") from error
            self._on_success()

    async def _refresh(self) -> None:
        version = await self.store.version()
        if version.generation != self._version.generation:
            # A change after the first query causes another refresh.
            self._replace(await self.store.secrets(version.now))
        self._version = version
        self._clock_offset = version.now - self._started_at
        self._trusted_until = self._started_at + TRUST_SECONDS
        if not self._grants:
            await self.store.disconnect()

    def _replace(self, secrets: list[StoredSecret]) -> None:
        old, self._grants = self._grants, {}
        for stored in secrets:
            grant = old.get(stored.digest)
            new = KeyGrant(self, stored)
            is_equal = grant is not None and (grant.key, grant.expires_at) == (
                new.key,
                new.expires_at,
            )
            self._grants[stored.digest] = grant if grant is not None and is_equal else new
        for digest, grant in old.items():
            if self._grants.get(digest) is not grant:
                grant.is_withdrawn = True
        self.has_limits = any(stored.key.limits != NO_CALLER_LIMITS for stored in secrets)
        if self._grants:
            self._has_keys.set()
        else:
            self._has_keys.clear()

    async def _poll(self) -> None:
        """Refresh the keys as long as there are any. Without keys, only unknown secrets cause a
        refresh."""
        uses_at = self.now()
        while True:
            try:
                await self.refresh()
                if self.now() > uses_at + USES_INTERVAL:
                    uses_at = self.now()
                    await self._write_uses()
            except KeyStoreError as error:
                logger.debug("The keys were not refreshed: %s", error)
            await self._has_keys.wait()
            await asyncio.sleep(POLL_INTERVAL)

    async def _write_uses(self, *, is_last: bool = False) -> None:
        now = self.now()
        used = {}
        for grant in self._grants.values():
            written_at = self._uses_written_at.get(grant.key.id, float("-inf"))
            if grant.is_used and (is_last or now >= written_at + LAST_USE_INTERVAL):
                used[grant.key.id] = grant
        if not used:
            return
        await self.store.record_uses(tuple(used))
        for grant in used.values():
            grant.is_used = False
        key_ids = {grant.key.id for grant in self._grants.values()}
        kept = {each: at for each, at in self._uses_written_at.items() if each in key_ids}
        self._uses_written_at = kept | dict.fromkeys(used, now)

    def _on_failure(self, error: Exception) -> None:
        self._failed_at = self.now()
        if not self._is_failing and self._grants:
            logger.warning(
                "Keys cannot be read: known ones stay valid for %d s, others are a 503 (%s)",
                TRUST_SECONDS,
                str(error) or type(error).__name__,
            )
        self._is_failing = True

    def _on_success(self) -> None:
        if self._is_failing and self._grants:
            logger.warning("Keys can be read again")
        self._is_failing = False


KNOWN_KEYS = web.AppKey("falproxy.known_keys", KnownKeys)
