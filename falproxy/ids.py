"""Names for things that need one of their own."""

from os import urandom

ID_BYTES = 16  # bytes of a name
BATCH_SIZE = 256  # the system is asked for so many at a time, which is what takes long


def new_id() -> str:
    """32 hexadecimal digits that nobody had before."""
    return urandom(ID_BYTES).hex()


def time_ordered_id(random_id: str, timestamp: float) -> str:
    """The name for something of that time, in seconds since 1970: what is later sorts behind what
    was earlier, so that a database writes together what came together."""
    return f"{int(timestamp * 1e6):014x}{random_id[14:]}"


class IdGenerator:
    """Many of them. A process that comes about by fork must not have its parent's."""

    def __init__(self) -> None:
        self._ready: list[str] = []

    def next_id(self) -> str:
        try:
            return self._ready.pop()
        except IndexError:
            drawn = urandom(ID_BYTES * BATCH_SIZE).hex()
            self._ready += [
                drawn[at : at + 2 * ID_BYTES] for at in range(0, len(drawn), 2 * ID_BYTES)
            ]
            return self._ready.pop()
