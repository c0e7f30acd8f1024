"""The body of a model call, checked against the model's table as fal's own apps do (pydantic)."""

import json
from collections.abc import Callable, Mapping

from falproxy.sandbox.models import SIDE_MAX, Input, Kind, Model
from falproxy.sandbox.responses import field_error, model_error

Values = dict[str, object]
Entry = dict[str, object]
TRUTHS = {"true": True, "1": True, "false": False, "0": False}
TYPES = {
    Kind.TEXT: ("string_type", "Input should be a valid string"),
    Kind.IMAGE: ("string_type", "Input should be a valid string"),
    Kind.INTEGER: ("int_parsing", "Input should be a valid integer"),
    Kind.NUMBER: ("float_parsing", "Input should be a valid number"),
    Kind.FLAG: ("bool_parsing", "Input should be a valid boolean"),
    Kind.IMAGES: ("list_type", "Input should be a valid list"),
    Kind.LORAS: ("list_type", "Input should be a valid list"),
}


class Misfit(Exception):
    """A value that does not fit; `entry` is its line in fal's answer."""

    def __init__(self, entry: Entry) -> None:
        super().__init__(str(entry["msg"]))
        self.entry = entry


def parse_body(body: bytes) -> object:
    """The JSON value of a request body. What is no JSON comes back as the bytes it was: the
    queue takes it, and the model refuses it."""
    try:
        return json.loads(body, parse_constant=refuse_constant)
    except (ValueError, RecursionError):  # UnicodeDecodeError is a ValueError
        return body


def refuse_constant(name: str) -> object:
    """NaN and Infinity are no JSON, whatever Python thinks."""
    raise ValueError(name)


def check_inputs(model: Model, body: object) -> Values:
    """Every input of the model with its value or default; keys it does not know are ignored.

    Raises:
        FalError: 422 with one entry for every input that does not fit.
    """
    if isinstance(body, bytes):
        raise model_error([unreadable(body)])
    if not isinstance(body, dict):
        msg = "Input should be a valid dictionary or object to extract fields from"
        raise model_error([field_error("model_attributes_type", msg, value=body)])
    values: Values = {}
    entries: list[Entry] = []
    for name, expected in model.inputs.items():
        try:
            values[name] = take(name, expected, body)
        except Misfit as misfit:
            entries.append(misfit.entry)
    if entries:
        raise model_error(entries)
    return values


def unreadable(body: bytes) -> Entry:
    if not body:
        return field_error("missing", "Field required", value=None)
    return field_error(
        "json_invalid", "JSON decode error", ("body", 0), {"error": "Expecting value"}, {}
    )


def take(name: str, expected: Input, body: Mapping[str, object]) -> object:
    """The checked value of one input, or its default."""
    loc = ("body", name)
    if name not in body:
        if expected.is_required:
            raise Misfit(field_error("missing", "Field required", loc, value=dict(body)))
        return expected.default
    value = body[name]
    if value is None and expected.default is None and not expected.is_required:
        return None
    return CHECKS[expected.kind](expected, value, loc)


Loc = tuple[str | int, ...]


def wrong_type(kind: Kind, value: object, loc: Loc) -> Misfit:
    name, msg = TYPES[kind]
    return Misfit(field_error(name, msg, loc, value=value))


def check_text(expected: Input, value: object, loc: Loc) -> object:
    if not isinstance(value, str):
        raise wrong_type(expected.kind, value, loc)
    return value


def check_whole(expected: Input, value: object, loc: Loc) -> object:
    """pydantic's lax mode: 3, 3.0 and "3" are the integer three."""
    try:
        if not isinstance(value, int | float | str):
            raise wrong_type(expected.kind, value, loc)
        found = int(value)
    except (ValueError, OverflowError):
        raise wrong_type(expected.kind, value, loc) from None
    if isinstance(value, float) and found != value:
        raise wrong_type(expected.kind, value, loc)
    return within(expected, found, loc)


def check_number(expected: Input, value: object, loc: Loc) -> object:
    try:
        if not isinstance(value, int | float | str):
            raise wrong_type(expected.kind, value, loc)
        return within(expected, float(value), loc)
    except (ValueError, OverflowError):
        raise wrong_type(expected.kind, value, loc) from None


def within(expected: Input, found: float, loc: Loc) -> float:
    if expected.low is not None and not found >= expected.low:
        msg = f"Input should be greater than or equal to {expected.low}"
        raise Misfit(field_error("greater_than_equal", msg, loc, {"ge": expected.low}, found))
    if expected.high is not None and not found <= expected.high:
        msg = f"Input should be less than or equal to {expected.high}"
        raise Misfit(field_error("less_than_equal", msg, loc, {"le": expected.high}, found))
    return found


def check_flag(expected: Input, value: object, loc: Loc) -> object:
    truth = TRUTHS.get(str(value).lower()) if isinstance(value, bool | int | str) else None
    if truth is None:
        raise wrong_type(expected.kind, value, loc)
    return truth


def check_choice(expected: Input, value: object, loc: Loc) -> object:
    if not isinstance(value, str) or value not in expected.choices:
        *others, last = (repr(choice) for choice in expected.choices)
        listed = f"{', '.join(others)} or {last}"
        msg = f"Input should be {listed}"
        raise Misfit(field_error("literal_error", msg, loc, {"expected": listed}, value))
    return value


def check_images(expected: Input, value: object, loc: Loc) -> object:
    if not isinstance(value, list):
        raise wrong_type(expected.kind, value, loc)
    if not value:
        msg = "List should have at least 1 item after validation, not 0"
        raise Misfit(field_error("sequence_too_short", msg, loc, {"min_length": 1}, value))
    return [check_text(IMAGE, item, (*loc, index)) for index, item in enumerate(value)]


def check_loras(expected: Input, value: object, loc: Loc) -> object:
    """A list of `{"path", "scale": 0..4 = 1, "force": false}`."""
    if not isinstance(value, list):
        raise wrong_type(expected.kind, value, loc)
    return [check_lora(item, (*loc, index)) for index, item in enumerate(value)]


def check_lora(item: object, loc: Loc) -> Values:
    if not isinstance(item, dict):
        msg = "Input should be a valid dictionary"
        raise Misfit(field_error("dict_type", msg, loc, value=item))
    if "path" not in item:
        raise Misfit(field_error("missing", "Field required", (*loc, "path"), value=item))
    path = check_text(IMAGE, item["path"], (*loc, "path"))
    scale = check_number(SCALE, item.get("scale", 1.0), (*loc, "scale"))
    force = check_flag(FORCE, item.get("force", False), (*loc, "force"))
    return {"path": path, "scale": scale, "force": force}


def check_size(expected: Input, value: object, loc: Loc) -> object:
    if not isinstance(value, dict):
        return check_choice(expected, value, loc)
    return {side: check_whole(SIDE, value.get(side, 512), (*loc, side)) for side in SIDES}


SIDES = ("width", "height")
SIDE = Input(Kind.INTEGER, low=1, high=SIDE_MAX)
FORCE = Input(Kind.FLAG)
SCALE = Input(Kind.NUMBER, low=0, high=4)
IMAGE = Input(Kind.IMAGE)
CHECKS: Mapping[Kind, Callable[[Input, object, Loc], object]] = {
    Kind.TEXT: check_text,
    Kind.IMAGE: check_text,
    Kind.INTEGER: check_whole,
    Kind.NUMBER: check_number,
    Kind.FLAG: check_flag,
    Kind.CHOICE: check_choice,
    Kind.IMAGES: check_images,
    Kind.LORAS: check_loras,
    Kind.SIZE: check_size,
}
