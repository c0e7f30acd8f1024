"""The response header that lists the parameters that had no effect."""

import re
from collections.abc import Iterable

IGNORED_HEADER = "x-falproxy-ignored"
NAME = re.compile(r"[\w.\[\]-]{1,64}", re.ASCII)  # others could not be in a header
NAMES_MAX = 20


def ignored_header(names: Iterable[str]) -> dict[str, str]:
    """Return the header with the names of ignored parameters; empty if there are none."""
    listed = [name for name in names if NAME.fullmatch(name)][:NAMES_MAX]
    return {IGNORED_HEADER: ", ".join(listed)} if listed else {}
