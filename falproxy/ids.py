"""Names for things that need one of their own."""

from os import urandom


def new_name() -> str:
    """32 hexadecimal digits that nobody had before."""
    return urandom(16).hex()
