"""Parser of the input of a model call, for bodies that are too large to be held in memory."""

import json
import re
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from math import isinf
from typing import NoReturn, Protocol
from urllib.parse import parse_qsl

LONG_STRING_BYTES = 16 * 2**10  # longer strings are not held in memory
CHUNK_SIZE = 2**17  # bytes of one read
REMAINDER_MAX = 2**20  # bytes of a body without its long strings
# The number of values is limited too, because a value takes up to 100 times its bytes in memory. It
# is estimated by these characters, one of which precedes each value but the first. Prompts contain
# them as well, but far fewer.
SEPARATORS = (b",", b"[", b"{")
SEPARATORS_MAX = 20_000
DEPTH_MAX = 32
PREFIX_BYTES = 4096
EXACT_INTEGER_MAX = 2.0**53  # a float from here on may differ from the integer in the JSON text
# Maximum number of values of a body that is parsed on the event loop. Images are long, but few.
INLINE_VALUES_MAX = 20_000

# The incomplete character at the end of a chunk: in UTF-8, in an escape, or between the halves of a
# surrogate pair. A chunk must be larger than the longest, 11 bytes.
INCOMPLETE_CHARACTER = re.compile(
    rb"(?:[\xc0-\xff][\x80-\xbf]{0,2}"
    rb"|(?:\\u[dD][89abAB][0-9a-fA-F]{2})?(?:\\(?:u[0-9a-fA-F]{0,3})?)?)\Z"
)
INCOMPLETE_CHARACTER_MAX = 11
CONTROL_CHARACTERS = bytes(range(0x20))

Loc = tuple[str | int, ...]


class ByteSource(Protocol):
    """Bytes that can be read repeatedly, such as a `Spool`."""

    @property
    def size(self) -> int: ...

    def read(self, start: int, length: int) -> bytes: ...


@dataclass(frozen=True, slots=True)
class LongString:
    """A long JSON string that is not held in memory: the range between its quotes in a source."""

    source: ByteSource
    start: int
    end: int

    @property
    def prefix(self) -> str:
        """The characters in the first PREFIX_BYTES bytes of JSON."""
        raw = self.source.read(self.start, min(PREFIX_BYTES, self.end - self.start))
        if self.start + len(raw) < self.end:
            raw = raw[: complete_length(raw)]
        return unescape(raw).decode("utf-8", "surrogatepass")

    def chunks(self, size: int = CHUNK_SIZE) -> Iterator[bytes]:
        """Yield the string in UTF-8, with lone surrogates encoded like characters.

        size: bytes of JSON in one read, at least 12; no chunk is larger.
        Raises: ValueError, not a JSON string. It cannot happen after `parse_input` validated it.
        """
        at = self.start
        while at < self.end:
            raw = self.source.read(at, min(size, self.end - at))
            if at + len(raw) < self.end:
                raw = raw[: complete_length(raw)]
            if not raw:
                raise ValueError("the source ends before its string")
            yield unescape(raw)
            at += len(raw)


def complete_length(raw: bytes) -> int:
    """Return the number of bytes of raw JSON text before an incomplete character at its end."""
    # Without the escaped backslashes, each remaining backslash starts an escape.
    plain = raw.replace(rb"\\", b"  ") if b"\\" in raw[-INCOMPLETE_CHARACTER_MAX:] else raw
    incomplete = INCOMPLETE_CHARACTER.search(plain, max(0, len(plain) - INCOMPLETE_CHARACTER_MAX))
    return incomplete.start() if incomplete else len(raw)


def unescape(raw: bytes) -> bytes:
    """Decode the characters between the quotes of a JSON string. Raises: ValueError."""
    text = raw.decode()
    if b"\\" in raw:
        return str(json.loads(f'"{text}"')).encode("utf-8", "surrogatepass")
    if len(raw.translate(None, CONTROL_CHARACTERS)) < len(raw):
        raise ValueError("a control character")
    return raw


def parse_input(
    source: ByteSource,
    nonce: str,
    *,
    long_string_bytes: int = LONG_STRING_BYTES,
    chunk_size: int = CHUNK_SIZE,
    remainder_max: int = REMAINDER_MAX,
    validate_strings: bool = True,
) -> dict[str, object] | None:
    """Return the JSON object of a model call, with a `LongString` for each string of more than
    `long_string_bytes`. None if it is not an object, exceeds the limits above, or is ambiguous (a
    duplicate key, NaN).

    Blocks for about 1 ms per MB: call it in a thread.

    nonce: letters and digits that the client cannot guess.
    validate_strings: read each long string once. Otherwise, reading one later may fail.
    """
    try:
        remainder, long_strings = extract_long_strings(
            source, nonce, long_string_bytes, chunk_size, remainder_max
        )
        tree = json.loads(
            remainder.decode(), object_pairs_hook=unique_object, parse_constant=reject_constant
        )
        if not isinstance(tree, dict):
            return None
        for long_string in long_strings.values() if validate_strings else ():
            deque(long_string.chunks(chunk_size), maxlen=0)
        restored = map_tree(tree, partial(restore_value, long_strings))
    except (ValueError, RecursionError):
        return None
    return restored if isinstance(restored, dict) else None


def parse_query(query: str) -> dict[str, object]:
    """Return the inputs in the query of a model call, by name: the value, or a list if there are
    several. Of a name such as `image_urls[0]` the index is left out; a value that is a JSON list or
    object is parsed."""
    inputs: dict[str, list[object]] = {}
    for name, value in parse_qsl(query.removeprefix("?"), keep_blank_values=True):
        inputs.setdefault(name.partition("[")[0], []).append(parse_query_value(value))
    return {name: values[0] if len(values) == 1 else [*values] for name, values in inputs.items()}


def parse_query_value(value: str) -> object:
    if value.startswith(("[", "{")):
        with suppress(ValueError, RecursionError):
            return json.loads(value)
    return value


def extract_long_strings(
    source: ByteSource, nonce: str, long_string_bytes: int, chunk_size: int, remainder_max: int
) -> tuple[bytes, dict[str, LongString]]:
    """Return the JSON with a token in place of each long string, and the strings by token."""
    remainder = bytearray()
    long_strings: dict[str, LongString] = {}
    copied = 0
    quotes = quote_positions(source, chunk_size)
    for start in quotes:
        end = next(quotes, None)
        if end is None or len(remainder) + start - copied > remainder_max:
            break
        if end - start - 1 > long_string_bytes:
            token = f"{nonce}{len(long_strings)}"
            long_strings[token] = LongString(source, start + 1, end)
            remainder += source.read(copied, start - copied) + f'"{token}"'.encode()
            copied = end + 1
    if len(remainder) + source.size - copied > remainder_max:
        raise ValueError("too many bytes besides the long strings")
    remainder += source.read(copied, source.size - copied)
    if sum(map(remainder.count, SEPARATORS)) > SEPARATORS_MAX:
        raise ValueError("too many values")
    return bytes(remainder), long_strings


def quote_positions(source: ByteSource, chunk_size: int) -> Iterator[int]:
    """Yield the positions of the opening and closing quotes, alternately."""
    at = 0
    while at < source.size:
        raw = source.read(at, chunk_size)
        # Do not split an escape: of an odd number of backslashes, leave the last one.
        if (len(raw) - len(raw.rstrip(b"\\"))) % 2:
            raw = raw[:-1]
        if not raw:
            raise ValueError("the source ends in the middle of an escape")
        quote = raw.find(b'"')
        if quote >= 0 and b"\\" in raw:
            raw = raw.replace(rb"\\", b"  ").replace(rb"\"", b"  ")
            quote = raw.find(b'"')
        while quote >= 0:
            yield at + quote
            quote = raw.find(b'"', quote + 1)
        at += len(raw)


def unique_object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    members = dict(pairs)
    if len(members) < len(pairs):
        raise ValueError("duplicate key")
    return members


def reject_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def map_tree(value: object, visit: Callable[[object, Loc], object], loc: Loc = ()) -> object:
    """Return a tree with each value replaced by the result of `visit`, from the root to the
    leaves."""
    match visit(value, loc):
        case dict() as members:
            return {key: map_tree(item, visit, (*loc, key)) for key, item in members.items()}
        case list() as items:
            return [map_tree(item, visit, (*loc, index)) for index, item in enumerate(items)]
        case leaf:
            return leaf


def restore_value(long_strings: Mapping[str, LongString], value: object, loc: Loc) -> object:
    """Return the long string of a token, and other values unchanged. Raises: ValueError."""
    if len(loc) > DEPTH_MAX:
        raise ValueError("nested too deep")
    if isinstance(value, dict) and not long_strings.keys().isdisjoint(value):
        raise ValueError("key too long")
    if isinstance(value, float) and isinf(value):
        raise ValueError("number out of range")
    return long_strings.get(value, value) if isinstance(value, str) else value


def has_few_values(body: bytes) -> bool:
    """Return whether a JSON text is parsed fast enough for the event loop."""
    return body.count(b",") + body.count(b"[") + body.count(b"{") <= INLINE_VALUES_MAX
