"""Text and JSON in the bodies of requests. Each kind of invalid text has one sentence, which all
dialects return."""

import asyncio
import codecs
import json
import re
from math import isfinite
from typing import NoReturn

from falproxy.fal.input_json import EXACT_INTEGER_MAX, ByteSource, has_few_values

BYTE_ORDER_MARK = codecs.BOM_UTF8
SURROGATE = re.compile("[\ud800-\udfff]")
NOT_UTF8 = "is not valid UTF-8"
HAS_BYTE_ORDER_MARK = "begins with a byte order mark; send UTF-8 without one"
HAS_HALF_PAIR = "has half of a surrogate pair, as of an emoji that was cut in two"
HALF_PAIR_MESSAGE = f"Invalid JSON: the body {HAS_HALF_PAIR}."
INLINE_PARSE_MAX = 256 * 2**10  # bytes; larger bodies are parsed in a thread
READ_BYTES = 2**17  # bytes that are decoded at once


class InvalidTextError(ValueError):
    """A text that no request may contain. The message is a sentence for the client."""


def decode_text(content: bytes, name: str) -> str:
    """Return a text in UTF-8. name: what the text is, at the start of the sentence.

    Raises: InvalidTextError.
    """
    try:
        text = content.decode()
    except UnicodeDecodeError:
        raise InvalidTextError(f"{name} {NOT_UTF8}.") from None
    if content.startswith(BYTE_ORDER_MARK):
        raise InvalidTextError(f"{name} {HAS_BYTE_ORDER_MARK}.")
    return text


async def parse_json_body(body: bytes) -> dict[str, object]:
    """Return the JSON object of a body; a large one is parsed in a thread.

    Raises: InvalidTextError.
    """
    if len(body) > INLINE_PARSE_MAX:
        return await asyncio.to_thread(parse_json, body)
    return parse_json(body)


def parse_json(body: bytes) -> dict[str, object]:
    """Return the JSON object of a body. Raises: InvalidTextError."""
    text = decode_text(body, "Invalid JSON: the body")
    if not has_few_values(body):
        raise invalid_json("the body has too many values")
    try:
        document = json.loads(
            text,
            parse_float=parse_finite,
            parse_constant=reject_number,
            object_pairs_hook=unique_members,
        )
    except InvalidTextError:
        raise
    except RecursionError:
        raise invalid_json("the body is nested too deeply") from None
    except ValueError:
        raise invalid_json("the body is incomplete, or is not JSON") from None
    if not isinstance(document, dict):
        raise invalid_json("the body must be one object")
    if "\\u" in text and has_half_pair(document):
        raise InvalidTextError(HALF_PAIR_MESSAGE)
    return document


def invalid_json(reason: str) -> InvalidTextError:
    return InvalidTextError(f"Invalid JSON: {reason}.")


def describe_invalid_bytes(source: ByteSource) -> str | None:
    """Return the sentence for a body whose bytes are not a JSON text, without parsing it. None if
    they are valid UTF-8 without a byte order mark. Blocks: call it in a thread for a large body."""
    if source.read(0, len(BYTE_ORDER_MARK)) == BYTE_ORDER_MARK:
        return str(invalid_json(f"the body {HAS_BYTE_ORDER_MARK}"))
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        for start in range(0, source.size, READ_BYTES):
            decoder.decode(source.read(start, READ_BYTES))
        decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        return str(invalid_json(f"the body {NOT_UTF8}"))
    return None


def has_half_pair(value: object) -> bool:
    """Return whether a text in a JSON value has a surrogate without its other half. Such a text
    cannot be encoded in UTF-8."""
    pending = [value]
    while pending:
        node = pending.pop()
        if isinstance(node, str):
            if not node.isascii() and SURROGATE.search(node):
                return True
        elif isinstance(node, dict):
            pending += [*node, *node.values()]
        elif isinstance(node, list):
            pending += node
    return False


def parse_finite(text: str) -> float:
    """Parse a number. `1.0` becomes an integer, as in JSON Schema. Raises: InvalidTextError."""
    value = float(text)
    if not isfinite(value):
        reject_number(text)
    return int(value) if value.is_integer() and abs(value) < EXACT_INTEGER_MAX else value


def reject_number(text: str) -> NoReturn:
    raise invalid_json("a number is not finite")


def unique_members(pairs: list[tuple[str, object]]) -> dict[str, object]:
    members = dict(pairs)
    if len(members) < len(pairs):
        raise invalid_json("a key occurs twice in an object")
    return members
