"""The key of a cached result: a hash of everything that the result depends on."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256

from falproxy.fal.input_json import (
    EXACT_INTEGER_MAX,
    LONG_STRING_BYTES,
    Loc,
    LongString,
    map_tree,
)

KEY_VERSION = "falproxy-1"


@dataclass(frozen=True, slots=True)
class Digest:
    """The identity of a long string. size: bytes in UTF-8."""

    sha256: str
    size: int


def digest_if_long(text: str | LongString) -> str | Digest:
    """Return the digest of a string of more than LONG_STRING_BYTES, and a shorter one unchanged."""
    if isinstance(text, str):
        raw = text.encode("utf-8", "surrogatepass")
        return text if len(raw) <= LONG_STRING_BYTES else Digest(sha256(raw).hexdigest(), len(raw))
    hasher, size = sha256(), 0
    for chunk in text.chunks():
        hasher.update(chunk)
        size += len(chunk)
    if size > LONG_STRING_BYTES:
        return Digest(hasher.hexdigest(), size)
    return b"".join(text.chunks()).decode("utf-8", "surrogatepass")


def canonical_json(tree: object) -> bytes:
    """Return the same JSON for equal values.

    Keys are sorted, `3.0` is written as `3`, a string begins with `=`, and the digest of a long
    string with `#`, so that no string of a client equals a digest.
    """
    canonical_tree = map_tree(tree, canonical_value)
    text = json.dumps(canonical_tree, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    return text.encode("utf-8", "surrogatepass")


def canonical_value(value: object, loc: Loc) -> object:
    if isinstance(value, str | LongString):
        text = digest_if_long(value)
        return f"={text}" if isinstance(text, str) else f"#{text.sha256}:{text.size}"
    if isinstance(value, float) and value.is_integer() and abs(value) < EXACT_INTEGER_MAX:
        return int(value)
    return value


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyMaterial:
    """Everything that the result of a call depends on.

    headers: names and values of the request headers that change the result.
    images: SHA-256 of the bytes of each image, by its location in the tree, for example
        `("images", 0, "url")`.
    upstream: the origin of the result; empty for fal.
    """

    endpoint: str
    tenant: str
    headers: tuple[tuple[str, str], ...]
    tree: Mapping[str, object]
    images: Mapping[Loc, str]
    upstream: str = ""

    def canonical_tree(self) -> dict[str, object]:
        """Return a tree in a defined order, with null at the locations of the images."""
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
    """Return the SHA-256 of the material. Reads long strings: call it in a thread."""
    return sha256(canonical_json(material.canonical_tree())).hexdigest()


def explain_key(material: KeyMaterial) -> dict[str, object]:
    """Return the material as readable JSON. Reads long strings: call it in a thread."""
    return {name: map_tree(part, explain_value) for name, part in material.canonical_tree().items()}


def explain_value(value: object, loc: Loc) -> object:
    if not isinstance(value, str | LongString):
        return value
    text = digest_if_long(value)
    return text if isinstance(text, str) else {"sha256": text.sha256, "bytes": text.size}
