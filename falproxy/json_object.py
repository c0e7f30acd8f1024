"""Reading of JSON documents that are expected to be objects."""

import json


def parse_object(document: bytes | str) -> dict[str, object] | None:
    """Parse a JSON object. Return None for anything else: text that is not JSON, bytes that are not
    Unicode, nesting beyond the interpreter's limit, or a value of another type."""
    try:
        value = json.loads(document)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
