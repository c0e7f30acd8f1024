"""The input of a model call, read from a body that may be larger than memory should hold, and the
key of the result that it leads to."""

import json
import re
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from math import isinf
from typing import NoReturn, Protocol

LONG_STRING_BYTES = 16 * 2**10  # bytes; a string of more is not held
CHUNK_SIZE = 2**17  # bytes that are read at once
REMAINDER_MAX = 2**20  # bytes of a body without its long strings
# A value takes up to 100 times its bytes in memory, so bytes alone are no bound. All values but the
# first come after one of these; prompts have them too, but not so many.
SEPARATORS = (b",", b"[", b"{")
SEPARATORS_MAX = 20_000
DEPTH_MAX = 32
PREFIX_BYTES = 4096
# Floats from here on are not sure to be the integer they were written as.
EXACT_INTEGER_MAX = 2.0**53
# Values of a body that is read at once, on the event loop. Pictures in it are long, but few.
INLINE_VALUES_MAX = 20_000
KEY_VERSION = "falproxy-1"

# What may be the first part of a character when a piece ends in it: UTF-8, an escape, the first
# half of a surrogate pair. PIECE must be larger than the longest, 11 bytes.
INCOMPLETE_CHARACTER = re.compile(
    rb"(?:[\xc0-\xff][\x80-\xbf]{0,2}"
    rb"|(?:\\u[dD][89abAB][0-9a-fA-F]{2})?(?:\\(?:u[0-9a-fA-F]{0,3})?)?)\Z"
)
INCOMPLETE_CHARACTER_MAX = 11
CONTROL_CHARACTERS = bytes(range(0x20))

Loc = tuple[str | int, ...]


class ByteSource(Protocol):
    """Bytes that can be read again and again, a Spool for one."""

    @property
    def size(self) -> int: ...

    def read(self, start: int, length: int) -> bytes: ...


@dataclass(frozen=True, slots=True)
class LongString:
    """A long JSON string that is not held: the bytes between its quotes, in their source."""

    source: ByteSource
    start: int
    end: int

    @property
    def prefix(self) -> str:
        """Its first characters, as many as HEAD bytes of JSON have."""
        raw = self.source.read(self.start, min(PREFIX_BYTES, self.end - self.start))
        if self.start + len(raw) < self.end:
            raw = raw[: complete_length(raw)]
        return unescape(raw).decode("utf-8", "surrogatepass")

    def chunks(self, size: int = CHUNK_SIZE) -> Iterator[bytes]:
        """All of it in UTF-8, lone surrogates like characters.

        size: bytes of JSON that are read at once, 12 or more; a piece is never larger.
        Raises: ValueError, for a string that is none (never one from `parse_input`).
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
    """The bytes of raw JSON text that are whole characters, whatever comes after them."""
    # With the escaped backslashes out of the way, each one left is the start of an escape.
    plain = raw.replace(rb"\\", b"  ") if b"\\" in raw[-INCOMPLETE_CHARACTER_MAX:] else raw
    unfinished = INCOMPLETE_CHARACTER.search(plain, max(0, len(plain) - INCOMPLETE_CHARACTER_MAX))
    return unfinished.start() if unfinished else len(raw)


def unescape(raw: bytes) -> bytes:
    """Raises: ValueError, for what cannot stand between the quotes of a JSON string."""
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
    """The JSON object of a model call, in which each string of more than `long` bytes is a Text.

    None: there is no such object, or not everybody would read the same out of it (a key twice,
    NaN), or it is beyond the bounds above. Blocks for about 1 ms per MB: call it in a thread.
    nonce: letters and digits that the client cannot know. to_the_end: whether long strings are
    read through now; without it they may turn out broken when they are.
    """
    try:
        rest, texts = extract_long_strings(
            source, nonce, long_string_bytes, chunk_size, remainder_max
        )
        tree = json.loads(
            rest.decode(), object_pairs_hook=unique_object, parse_constant=reject_constant
        )
        if not isinstance(tree, dict):
            return None
        for text in texts.values() if validate_strings else ():
            # Read to its end once, so that it cannot turn out broken later.
            deque(text.chunks(chunk_size), maxlen=0)
        restored = map_tree(tree, partial(restore_value, texts))
    except (ValueError, RecursionError):
        return None
    return restored if isinstance(restored, dict) else None


def extract_long_strings(
    source: ByteSource, nonce: str, long_string_bytes: int, chunk_size: int, remainder_max: int
) -> tuple[bytes, dict[str, LongString]]:
    """The JSON with a short token for each long string, and the strings by their tokens."""
    rest = bytearray()
    texts: dict[str, LongString] = {}
    copied = 0
    marks = quote_positions(source, chunk_size)
    for start in marks:
        end = next(marks, None)
        if end is None or len(rest) + start - copied > remainder_max:
            break
        if end - start - 1 > long_string_bytes:
            token = f"{nonce}{len(texts)}"
            texts[token] = LongString(source, start + 1, end)
            rest += source.read(copied, start - copied) + f'"{token}"'.encode()
            copied = end + 1
    if len(rest) + source.size - copied > remainder_max:
        raise ValueError("too much besides the long strings")
    rest += source.read(copied, source.size - copied)
    if sum(map(rest.count, SEPARATORS)) > SEPARATORS_MAX:
        raise ValueError("too many values")
    return bytes(rest), texts


def quote_positions(source: ByteSource, chunk_size: int) -> Iterator[int]:
    """Where the strings start and end, in turns."""
    at = 0
    while at < source.size:
        raw = source.read(at, chunk_size)
        # An escape stays in one piece: after an odd number of backslashes, the last one waits.
        if (len(raw) - len(raw.rstrip(b"\\"))) % 2:
            raw = raw[:-1]
        if not raw:
            raise ValueError("the source ends in the middle of an escape")
        found = raw.find(b'"')
        if found >= 0 and b"\\" in raw:
            raw = raw.replace(rb"\\", b"  ").replace(rb"\"", b"  ")
            found = raw.find(b'"')
        while found >= 0:
            yield at + found
            found = raw.find(b'"', found + 1)
        at += len(raw)


def unique_object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key twice")
    return found


def reject_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def map_tree(value: object, visit: Callable[[object, Loc], object], loc: Loc = ()) -> object:
    """The tree with what `visit` makes of each value, from the root to the leaves."""
    match visit(value, loc):
        case dict() as found:
            return {key: map_tree(item, visit, (*loc, key)) for key, item in found.items()}
        case list() as found:
            return [map_tree(item, visit, (*loc, at)) for at, item in enumerate(found)]
        case leaf:
            return leaf


def restore_value(long_strings: Mapping[str, LongString], value: object, loc: Loc) -> object:
    """The long string of a token. Raises: ValueError, for what JSON allows and we do not."""
    if len(loc) > DEPTH_MAX:
        raise ValueError("nested too deep")
    if isinstance(value, dict) and not long_strings.keys().isdisjoint(value):
        raise ValueError("a long key")
    if isinstance(value, float) and isinf(value):
        raise ValueError("a number beyond all floats")
    return long_strings.get(value, value) if isinstance(value, str) else value


@dataclass(frozen=True, slots=True)
class Digest:
    """What a long string is told by. size: its bytes in UTF-8."""

    sha256: str
    size: int


def digest_if_long(text: str | LongString) -> str | Digest:
    """The string itself if it is short, whether it was held or not."""
    if isinstance(text, str):
        raw = text.encode("utf-8", "surrogatepass")
        return text if len(raw) <= LONG_STRING_BYTES else Digest(sha256(raw).hexdigest(), len(raw))
    hasher, size = sha256(), 0
    for piece in text.chunks():
        hasher.update(piece)
        size += len(piece)
    if size > LONG_STRING_BYTES:
        return Digest(hasher.hexdigest(), size)
    return b"".join(text.chunks()).decode("utf-8", "surrogatepass")


def canonical_json(tree: object) -> bytes:
    """JSON that is the same for equal values: keys sorted, `3.0` as `3`, strings after a `=`, or
    after a `#` the digest of a long one, which no client can write."""
    settled = map_tree(tree, canonical_value)
    text = json.dumps(settled, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    return text.encode("utf-8", "surrogatepass")


def canonical_value(value: object, loc: Loc) -> object:
    if isinstance(value, str | LongString):
        short = digest_if_long(value)
        return f"={short}" if isinstance(short, str) else f"#{short.sha256}:{short.size}"
    if isinstance(value, float) and value.is_integer() and abs(value) < EXACT_INTEGER_MAX:
        return int(value)
    return value


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyMaterial:
    """All that a result depends on.

    headers: names and values of those that change the result. images: the SHA-256 of an image's
    bytes by the image's place in the tree, such as `("images", 0, "url")`. upstream: where it
    comes from, empty for fal itself.
    """

    endpoint: str
    tenant: str
    headers: tuple[tuple[str, str], ...]
    tree: Mapping[str, object]
    images: Mapping[Loc, str]
    upstream: str = ""

    def canonical_tree(self) -> dict[str, object]:
        """All of it as a tree in a settled order, each image once: its place is null."""
        images = sorted(self.images.items(), key=lambda image: canonical_json([*image[0]]))
        headers = sorted(self.headers, key=lambda header: header[0].lower())
        return {
            "version": KEY_VERSION,
            "upstream": self.upstream,
            "endpoint": self.endpoint,
            "tenant": self.tenant,
            "headers": [[name.lower(), value] for name, value in headers],
            "inputs": map_tree(self.tree, lambda value, loc: None if loc in self.images else value),
            "images": [{"loc": [*loc], "sha256": digest} for loc, digest in images],
        }


def cache_key(material: KeyMaterial) -> str:
    """The SHA-256 that names the result in a cache. Reads long strings: call it in a thread."""
    return sha256(canonical_json(material.canonical_tree())).hexdigest()


def explain_key(material: KeyMaterial) -> dict[str, object]:
    """What went into the key, as JSON for a person. Reads long strings: call it in a thread."""
    return {name: map_tree(part, explain_value) for name, part in material.canonical_tree().items()}


def explain_value(value: object, loc: Loc) -> object:
    if not isinstance(value, str | LongString):
        return value
    short = digest_if_long(value)
    return short if isinstance(short, str) else {"sha256": short.sha256, "bytes": short.size}


def has_few_values(body: bytes) -> bool:
    """Whether a JSON text is soon read: each value but the first follows a comma or a bracket."""
    return body.count(b",") + body.count(b"[") + body.count(b"{") <= INLINE_VALUES_MAX
