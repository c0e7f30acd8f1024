"""Reading of JSON documents that are expected to be objects."""

import json
from collections.abc import Mapping
from dataclasses import fields
from typing import Any


def parse_object(document: bytes | str) -> dict[str, object] | None:
    """Parse a JSON object. Return None for anything else: text that is not JSON, bytes that are not
    Unicode, nesting beyond the interpreter's limit, or a value of another type."""
    try:
        value = json.loads(document)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def known_fields(kind: type, document: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values for the fields of a dataclass, without those that a newer version added."""
    return {field.name: document[field.name] for field in fields(kind) if field.name in document}
