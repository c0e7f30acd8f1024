"""Names for things that need one of their own."""

from os import urandom

SIZE = 16  # bytes of a name
AT_ONCE = 256  # the system is asked for so many at a time, which is what takes long


def new_name() -> str:
    """32 hexadecimal digits that nobody had before."""
    return urandom(SIZE).hex()


def dated(name: str, at: float) -> str:
    """The name for something of that time, in seconds since 1970: what is later sorts behind what
    was earlier, so that a database writes together what came together."""
    return f"{int(at * 1e6):014x}{name[14:]}"


class Names:
    """Many of them. A process that comes about by fork must not have its parent's."""

    def __init__(self) -> None:
        self._ready: list[str] = []

    def next(self) -> str:
        try:
            return self._ready.pop()
        except IndexError:
            drawn = urandom(SIZE * AT_ONCE).hex()
            self._ready += [drawn[at : at + 2 * SIZE] for at in range(0, len(drawn), 2 * SIZE)]
            return self._ready.pop()
