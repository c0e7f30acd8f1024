"""Request tags of fal: the header `X-Fal-Tags`, by which fal splits its usage reports.

Format and limits are those of fal's documentation (request-tags) and of the checks in its clients:
`key=value` pairs, separated by commas; at most 10 pairs, of which keys and values have at most 1024
bytes together; keys are case-insensitive; values are printable ASCII without commas, of at most 256
characters. fal drops a tag that does not fit, without an error.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from hashlib import sha256
from urllib.parse import quote

from falproxy.errors import ProxyError

TAGS_HEADER = "x-fal-tags"
TAG_NAMES = ("principal", "user")  # keys of the tags that the proxy can add
PAIRS_MAX = 10
BYTES_MAX = 1024
VALUE_MAX = 256
# Printable ASCII without the comma, and without the percent sign of encoded bytes.
UNENCODED = "".join(chr(code) for code in range(0x20, 0x7F) if chr(code) not in ",%")
OUTER_BLANKS = re.compile("^ +| +$")
INCOMPLETE_ESCAPE = re.compile("%[0-9A-F]?$")
# Begins the hash in a shortened value. No other value contains it.
HASH_MARK = "%~"
HASH_DIGITS = 32
BLANKS = " \t"


def encode_tag_value(text: str) -> str:
    """Return a text as the value of a tag, always the same one.

    Other characters than printable ASCII, commas, percent signs and blanks at the ends are
    percent-encoded as UTF-8 (RFC 3986 §2.1). A longer value is cut, and ends in `%~` and the first
    32 digits of the text's SHA-256.
    """
    content = text.encode("utf-8", "surrogatepass")
    value = OUTER_BLANKS.sub(lambda match: "%20" * len(match[0]), quote(content, UNENCODED))
    if len(value) <= VALUE_MAX:
        return value
    end = HASH_MARK + sha256(content).hexdigest()[:HASH_DIGITS]
    return INCOMPLETE_ESCAPE.sub("", value[: VALUE_MAX - len(end)]) + end


def merge_tags(lines: Sequence[str], own: Mapping[str, str], reserved: Collection[str]) -> str:
    """Return the value of `X-Fal-Tags`: the client's tags unchanged, and the proxy's after them.

    lines: the client's headers.
    own: the proxy's tags.
    reserved: keys that the client may not set to other values.
    Raises: ProxyError 400 `tag_reserved`; `tags_too_large`, fal would drop some of the tags.
    """
    pairs = [pair for line in lines for item in line.split(",") if (pair := parse_pair(item))]
    for key, value in pairs:
        if key in reserved and own.get(key) != value:
            message = f"The tag {key!r} of X-Fal-Tags is set by this proxy: choose another key."
            raise ProxyError(400, "tag_reserved", message)
    added = [pair for pair in own.items() if pair not in pairs]
    size = sum(len(encode(key)) + len(encode(value)) for key, value in (*pairs, *added))
    if added and (len(pairs) + len(added) > PAIRS_MAX or size > BYTES_MAX):
        raise ProxyError(
            400,
            "tags_too_large",
            f"X-Fal-Tags has {len(pairs)} tags, and this proxy adds {len(added)}, together of "
            f"{size} bytes: fal.ai accepts {PAIRS_MAX} tags of {BYTES_MAX} bytes.",
        )
    return ",".join([*lines, *(f"{key}={value}" for key, value in added)])


def parse_pair(item: str) -> tuple[str, str] | None:
    """Return key and value as fal reads them; None for an empty item. An item without `=` counts
    as a key."""
    key, _, value = item.partition("=")
    pair = key.strip(BLANKS).lower(), value.strip(BLANKS)
    return pair if any(pair) else None


def encode(text: str) -> bytes:
    """Return the bytes of a part of a header."""
    return text.encode("utf-8", "surrogateescape")
