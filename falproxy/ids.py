"""Names for things that need one of their own: no two are the same, and anybody may guess them."""

from random import getrandbits


def new_name() -> str:
    """32 hexadecimal digits."""
    return f"{getrandbits(128):032x}"
