"""Random ids for requests, jobs and records."""

from os import urandom

ID_BYTES = 16
BATCH_SIZE = 256  # ids for one system call, which takes most of the time


def new_id() -> str:
    """Return 32 random hexadecimal digits."""
    return urandom(ID_BYTES).hex()


def time_ordered_id(random_id: str, timestamp: float) -> str:
    """Return an id that sorts by time, so that a database index grows at its end only.

    timestamp: seconds since 1970.
    """
    return f"{int(timestamp * 1e6):014x}{random_id[14:]}"


class IdGenerator:
    """Makes random ids in batches. Not to be used across a fork: the child would repeat its
    parent's ids."""

    def __init__(self) -> None:
        self._ready: list[str] = []

    def next_id(self) -> str:
        try:
            return self._ready.pop()
        except IndexError:
            digits, length = urandom(ID_BYTES * BATCH_SIZE).hex(), 2 * ID_BYTES
            self._ready += [
                digits[start : start + length] for start in range(0, len(digits), length)
            ]
            return self._ready.pop()
