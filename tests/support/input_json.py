"""Sources in memory, and generated bodies, for the tests of input JSON and cache keys."""

from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st

from falproxy.fal.input_json import LongString, parse_input

NONCE = "00c0ffee00"


@dataclass(frozen=True)
class MemorySource:
    """A source in memory."""

    content: bytes

    @property
    def size(self) -> int:
        return len(self.content)

    def read(self, start: int, length: int) -> bytes:
        assert start >= 0
        assert length >= 0
        return self.content[start : start + length]


def parse(body: str | bytes, **limits: Any) -> dict[str, object] | None:
    content = body.encode("utf-8", "surrogatepass") if isinstance(body, str) else body
    return parse_input(MemorySource(content), NONCE, **limits)


def long_string(literal: str | bytes) -> LongString:
    """Return the long string with this content, as it is between the quotes."""
    content = literal.encode() if isinstance(literal, str) else literal
    return LongString(MemorySource(b'"' + content + b'"'), 1, 1 + len(content))


def materialize(value: object) -> object:
    """Return the tree with strings in place of long strings."""
    if isinstance(value, LongString):
        return b"".join(value.chunks()).decode("utf-8", "surrogatepass")
    if isinstance(value, dict):
        return {name: materialize(item) for name, item in value.items()}
    if isinstance(value, list):
        return [materialize(item) for item in value]
    return value


# Fragments of JSON strings, in which the end of a chunk may fall.
FRAGMENTS = (
    *("a", "bc", "/", "+", "u0041", "{", "[", ",", "é", "€", "😀", "\x7f"),
    *(r"\/", r"\u002B", r"\\", r"\"", r"\n", r"\u005c", r"\u0022", r"\u0000", r"\u20ac"),
    *(r"\ud83d\ude00", r"\ud83d", r"\ude00", r"\uD83D\u0041", r"\\ud83d", r"\\\\", r"\\\""),
)
CONTENT = st.lists(st.sampled_from(FRAGMENTS), max_size=60).map("".join)
NUMBERS = st.sampled_from(["0", "-0.0", "3", "3.0", "3e0", "9007199254740993", "1e22", "0.1"])
SPACE = st.sampled_from(["", " ", "\n\t"])
NAMES = st.sampled_from(["a", "b", "é", r"\u0061", r"\""])


def json_list(items: list[str], space: str) -> str:
    return f"[{space}{f'{space},'.join(items)}]"


def json_object(items: list[tuple[str, str]], space: str) -> str:
    members = (f'{space}"{name}"{space}:{space}{item}' for name, item in items)
    return f"{space}{{{','.join(members)}{space}}}"


def objects(values: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.builds(json_object, st.lists(st.tuples(NAMES, values), max_size=4), SPACE)


VALUES = st.recursive(
    CONTENT.map('"{}"'.format) | NUMBERS | st.sampled_from(["true", "false", "null"]),
    lambda inner: objects(inner) | st.builds(json_list, st.lists(inner, max_size=4), SPACE),
    max_leaves=12,
)
BODIES = objects(VALUES)
