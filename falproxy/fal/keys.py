"""The fal keys of a proxy: which one a call is sent with, and which ones are left alone."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from hashlib import sha256

# Seconds that a key which fal refused is left alone.
COOLDOWN_SECONDS = 300.0


@dataclass(frozen=True, slots=True)
class FalKey:
    """One key. position: its place in the setting, from 1. mark: what a key can be told by that
    gives nothing of it away, and stays when keys are added or taken out."""

    position: int
    fingerprint: str
    authorization: str = field(repr=False)


class KeyPool:
    """Keys that take turns. clock: seconds that only grow."""

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

    def next_key(self) -> FalKey:
        """The key whose turn it is. With all of them left alone, the one that is back first."""
        now = self._clock()
        for _ in self._keys:
            key = self._keys[self._next_index % len(self._keys)]
            self._next_index += 1
            if self._available_at[key] <= now:
                return key
        return min(self._keys, key=self._available_at.__getitem__)

    def find(self, fingerprint: str) -> FalKey | None:
        return next((key for key in self._keys if key.fingerprint == fingerprint), None)

    def start_cooldown(self, key: FalKey) -> bool:
        """Takes a key out of its turn for a while. Whether that is news."""
        now = self._clock()
        is_news = self._available_at[key] <= now
        self._available_at[key] = now + COOLDOWN_SECONDS
        return is_news
