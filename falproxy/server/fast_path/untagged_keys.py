"""The keys of heads without their tags, remembered by the heads with the tags.

A browser sends the same cookies with each request. Its tags are removed from the first head only.
"""

from falproxy.server.fast_path import PollHead, RouteKey, Tags

KEYS_MAX = 4096
KEYS_MAX_BYTES = 8 * 2**20
ENTRY_BYTES = 512  # of an entry, beside its head
ADDRESS_BYTES = 64  # of a value of X-Forwarded-For, beside its characters


class UntaggedKeys:
    """All entries are dropped when there are too many: each client chooses its tags."""

    def __init__(self) -> None:
        self._keys: dict[RouteKey, tuple[RouteKey, Tags]] = {}
        self._size = 0  # bytes

    def __repr__(self) -> str:
        return f"<UntaggedKeys of {len(self._keys)} heads>"

    def find(self, tagged: RouteKey) -> tuple[RouteKey, Tags] | None:
        """Return the key of a head without its tags, and the tags."""
        return self._keys.get(tagged)

    def add(self, tagged: RouteKey, untagged: RouteKey, tags: Tags) -> None:
        """Remember a key, unless the next head is likely to have other tags."""
        if not tags.is_of_caller:
            return
        if len(self._keys) >= KEYS_MAX or self._size > KEYS_MAX_BYTES:
            self._keys.clear()
            self._size = 0
        self._keys[tagged] = untagged, tags
        addresses = sum(ADDRESS_BYTES + len(value) for value in tags.forwarded_for)
        self._size += ENTRY_BYTES + length_of(tagged) + length_of(untagged) + addresses


def length_of(key: RouteKey) -> int:
    parts = (key,) if isinstance(key, bytes) else key
    return sum(len(part) for part in parts if isinstance(part, bytes))


def is_same_poll(head: bytes, tagged: PollHead | None, untagged: PollHead | None) -> bool:
    """Return whether a head and the one without its tags have the request id at the same place, for
    any id: it must not be in a tag. Or whether both have none."""
    if tagged is None or untagged is None:
        return tagged is untagged
    return tagged[0] == untagged[0] and head.count(tagged[0]) == 1
