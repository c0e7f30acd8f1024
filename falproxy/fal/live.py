"""The calls of live video: their bodies name the endpoint or the session (fal-api.md, 3.8)."""

import json
import re
from decimal import Decimal

from falproxy.errors import ProxyError
from falproxy.fal.endpoint import is_endpoint
from falproxy.fal.policy import forbidden
from falproxy.fal.pricing import Price, cost_from_units
from falproxy.json_object import parse_object

LIVE_BODY_MAX = 128 * 2**10  # bytes; an offer with all candidates has some ten thousand
APP_FIELD, SESSION_FIELD = "app_id", "session_id"
SESSION_ID_MAX = 200  # characters
SESSION_ID = re.compile(r"[!-~]+")
# A string of a JSON text, and the colon after it if it is a name.
STRING = re.compile(r'"((?:[^"\\]|\\.)*)"(\s*:)?', re.DOTALL)
HEARTBEAT_INTERVAL = 5.0  # seconds; of fal's client
# Units of prices that count the seconds of a session, or the session.
SECOND_UNITS = ("seconds", "compute seconds")
SESSION_UNITS = ("requests", "videos")
SEPARATORS = re.compile(r"[\W_]")


class NamedValues(list[tuple[str, object]]):
    """The members of a JSON object in their order, with repeated names."""


def read_members(body: bytes) -> NamedValues:
    """Parse the JSON object of a body. Raises: ProxyError 400, it is none."""
    try:
        members = json.loads(body.decode(), object_pairs_hook=NamedValues)
    except (ValueError, RecursionError):
        members = None
    if not isinstance(members, NamedValues):
        message = "Send the call of live video as a JSON object in UTF-8."
        raise ProxyError(400, "input_unreadable", message)
    return members


def read_field(body: bytes, name: str) -> object:
    """Return the value of a field of the JSON object in a body; None if it has none.

    Servers differ in which of two equal names they read, and in the names that they take for equal.

    Raises: ProxyError 400, it is no JSON object; 403, it has the field twice, or in another
        spelling.
    """
    members = read_members(body)
    values = [value for found, value in members if is_spelling(found, name)]
    if not values:
        return None
    is_plain = any(found == name for found, _ in members) and not has_escaped_name(body, name)
    if len(values) > 1 or not is_plain:
        raise forbidden(f"the body must name its {name} once, in plain form")
    return values[0]


def is_spelling(text: str, name: str) -> bool:
    """Return whether a name differs in case and separators only."""
    return SEPARATORS.sub("", text.casefold()) == SEPARATORS.sub("", name)


def has_escaped_name(body: bytes, name: str) -> bool:
    """Return whether the text of a JSON object has a name in escapes, at any depth."""
    return any(
        colon and "\\" in text and is_spelling(str(json.loads(f'"{text}"')), name)
        for text, colon in STRING.findall(body.decode())
    )


def read_app(body: bytes) -> str | None:
    """Return the endpoint id that a call names; None if it names none, which fal refuses.

    Raises: ProxyError 400, 403, also for a value that is no endpoint id.
    """
    app = read_field(body, APP_FIELD)
    if app is None:
        return None
    if not isinstance(app, str) or not is_endpoint(app):
        raise forbidden(f"its {APP_FIELD} is no endpoint id")
    return app


def read_session_id(body: bytes) -> str | None:
    """Return the session that a heartbeat names; None if it names none. Raises: ProxyError 400,
    403."""
    return checked_id(read_field(body, SESSION_FIELD))


def opened_session_id(document: bytes) -> str | None:
    """Return the session id in fal's response to the opening of a session."""
    return checked_id((parse_object(document) or {}).get(SESSION_FIELD))


def checked_id(value: object) -> str | None:
    is_id = isinstance(value, str) and len(value) <= SESSION_ID_MAX and SESSION_ID.fullmatch(value)
    return str(value) if is_id else None


def is_empty_object(body: bytes) -> bool:
    return parse_object(body) == {}


def is_over(document: bytes | None) -> bool:
    """Return whether fal's response to a heartbeat ends the session."""
    return document is not None and (parse_object(document) or {}).get("alive") is False


def session_units(price: Price | None, seconds: float) -> Decimal | None:
    """Return the units of a session of this length; None if they are unknown."""
    if price is None or price.unit in SECOND_UNITS:
        return Decimal(f"{max(0.0, seconds):.1f}")
    return Decimal(1) if price.unit in SESSION_UNITS else None


def session_cost(price: Price | None, seconds: float) -> int | None:
    """Return the cost of a session in micro-USD; None if it is unknown."""
    return None if price is None else cost_from_units(price, session_units(price, seconds))


def session_inputs(seconds: float | None) -> dict[str, object]:
    """Return the inputs that the price of a session depends on."""
    return {} if seconds is None else {"duration": seconds}
