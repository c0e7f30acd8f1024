"""A pool of fal keys that are used in turn. A key that fal refused is skipped for a while."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import sha256

COOLDOWN_SECONDS = 300.0  # time without use after fal refused a key


@dataclass(frozen=True, slots=True)
class FalKey:
    """One key.

    position: place in the setting, from 1.
    fingerprint: prefix of the key's SHA-256. It identifies the key in logs and stores, and stays
        the same when other keys are added or removed.
    authorization: value of the header.
    """

    position: int
    fingerprint: str
    authorization: str = field(repr=False)


class KeyPool:
    """Keys in rotation. clock: a monotonic clock in seconds."""

    def __init__(self, keys: Sequence[str], clock: Callable[[], float]) -> None:
        self._keys = [
            FalKey(position, sha256(key.encode()).hexdigest()[:12], f"Key {key}")
            for position, key in enumerate(keys, start=1)
        ]
        self._clock = clock
        self._available_at = dict.fromkeys(self._keys, 0.0)
        self._next_index = 0

    def __len__(self) -> int:
        return len(self._keys)

    def __repr__(self) -> str:
        return f"<KeyPool of {len(self._keys)}>"

    def __iter__(self) -> Iterator[FalKey]:
        return iter(self._keys)

    def next_key(self) -> FalKey:
        """Return the next available key, or if all are in cooldown the one whose cooldown ends
        first."""
        now = self._clock()
        for _ in self._keys:
            key = self._keys[self._next_index % len(self._keys)]
            self._next_index += 1
            if self._available_at[key] <= now:
                return key
        return min(self._keys, key=self._available_at.__getitem__)

    @property
    def resting_count(self) -> int:
        """Number of keys in cooldown."""
        now = self._clock()
        return sum(available_at > now for available_at in self._available_at.values())

    def find(self, fingerprint: str) -> FalKey | None:
        return next((key for key in self._keys if key.fingerprint == fingerprint), None)

    def start_cooldown(self, key: FalKey) -> bool:
        """Skip a key for COOLDOWN_SECONDS. Return False if it was in cooldown already."""
        now = self._clock()
        was_available = self._available_at[key] <= now
        self._available_at[key] = now + COOLDOWN_SECONDS
        return was_available
