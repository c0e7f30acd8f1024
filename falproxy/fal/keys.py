"""The fal keys of a proxy: which one a call is sent with, and which ones are left alone."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from hashlib import sha256

# Seconds that a key which fal refused is left alone.
REST_SECONDS = 300.0


@dataclass(frozen=True, slots=True)
class FalKey:
    """One key. position: its place in the setting, from 1. mark: what a key can be told by that
    gives nothing of it away, and stays when keys are added or taken out."""

    position: int
    mark: str
    authorization: str = field(repr=False)


class KeyRing:
    """Keys that take turns. clock: seconds that only grow."""

    def __init__(self, keys: Sequence[str], clock: Callable[[], float]) -> None:
        self._keys = [
            FalKey(position, sha256(key.encode()).hexdigest()[:12], f"Key {key}")
            for position, key in enumerate(keys, start=1)
        ]
        self._clock = clock
        self._back_at = dict.fromkeys(self._keys, 0.0)
        self._turn = 0

    def __len__(self) -> int:
        return len(self._keys)

    def next(self) -> FalKey:
        """The key whose turn it is. With all of them left alone, the one that is back first."""
        now = self._clock()
        for _ in self._keys:
            key = self._keys[self._turn % len(self._keys)]
            self._turn += 1
            if self._back_at[key] <= now:
                return key
        return min(self._keys, key=self._back_at.__getitem__)

    def find(self, mark: str) -> FalKey | None:
        return next((key for key in self._keys if key.mark == mark), None)

    def leave_alone(self, key: FalKey) -> bool:
        """Takes a key out of its turn for a while. Whether that is news."""
        now = self._clock()
        is_news = self._back_at[key] <= now
        self._back_at[key] = now + REST_SECONDS
        return is_news
