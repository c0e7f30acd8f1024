"""Validates the body of a model call against the model's inputs, with pydantic's rules and errors.

fal's own apps validate with pydantic.
"""

import json
from collections.abc import Callable, Mapping

from falproxy.sandbox.models import SIDE_MAX, InputType, Model, ModelInput
from falproxy.sandbox.responses import error_detail, model_error

InputValues = dict[str, object]
ErrorDetail = dict[str, object]
Location = tuple[str | int, ...]
BOOLEAN_STRINGS = {"true": True, "1": True, "false": False, "0": False}
TYPE_ERRORS = {
    InputType.STRING: ("string_type", "Input should be a valid string"),
    InputType.IMAGE: ("string_type", "Input should be a valid string"),
    InputType.INTEGER: ("int_parsing", "Input should be a valid integer"),
    InputType.NUMBER: ("float_parsing", "Input should be a valid number"),
    InputType.BOOLEAN: ("bool_parsing", "Input should be a valid boolean"),
    InputType.IMAGES: ("list_type", "Input should be a valid list"),
    InputType.LORAS: ("list_type", "Input should be a valid list"),
}


class InputError(Exception):
    """An invalid input. `detail`: its item in the error's list of details."""

    def __init__(self, detail: ErrorDetail) -> None:
        super().__init__(str(detail["msg"]))
        self.detail = detail


def parse_body(body: bytes) -> object:
    """Return the JSON value of a request body, or the bytes if they are not JSON.

    As at fal, the queue accepts such a body and the model rejects it.
    """
    try:
        return json.loads(body, parse_constant=reject_constant)
    except (ValueError, RecursionError):  # UnicodeDecodeError is a ValueError
        return body


def reject_constant(name: str) -> object:
    """Raise ValueError for NaN and Infinity, which Python accepts and JSON does not allow."""
    raise ValueError(name)


def validate_inputs(model: Model, body: object) -> InputValues:
    """Return every input of the model with its value or default. Unknown keys are ignored.

    Raises:
        FalError: 422 with one detail for every invalid input.
    """
    if isinstance(body, bytes):
        raise model_error([invalid_json_detail(body)])
    if not isinstance(body, dict):
        msg = "Input should be a valid dictionary or object to extract fields from"
        raise model_error([error_detail("model_attributes_type", msg, value=body)])
    values: InputValues = {}
    details: list[ErrorDetail] = []
    for name, spec in model.inputs.items():
        try:
            values[name] = validate_input(name, spec, body)
        except InputError as error:
            details.append(error.detail)
    if details:
        raise model_error(details)
    return values


def invalid_json_detail(body: bytes) -> ErrorDetail:
    if not body:
        return error_detail("missing", "Field required", value=None)
    return error_detail(
        "json_invalid", "JSON decode error", ("body", 0), {"error": "Expecting value"}, {}
    )


def validate_input(
    name: str, spec: ModelInput, body: Mapping[str, object], parent: Location = ("body",)
) -> object:
    """Return the validated value of one input, or its default. parent: location of the body."""
    loc = (*parent, name)
    if name not in body:
        if spec.is_required:
            raise InputError(error_detail("missing", "Field required", loc, value=dict(body)))
        return spec.default
    value = body[name]
    if value is None and spec.default is None and not spec.is_required:
        return None
    return VALIDATORS[spec.type](spec, value, loc)


def type_error(input_type: InputType, value: object, loc: Location) -> InputError:
    error_type, msg = TYPE_ERRORS[input_type]
    return InputError(error_detail(error_type, msg, loc, value=value))


def validate_string(spec: ModelInput, value: object, loc: Location) -> object:
    if not isinstance(value, str):
        raise type_error(spec.type, value, loc)
    return value


def validate_integer(spec: ModelInput, value: object, loc: Location) -> object:
    """Validate as pydantic's lax mode: 3, 3.0 and "3" are the integer 3."""
    try:
        if not isinstance(value, int | float | str):
            raise type_error(spec.type, value, loc)
        number = int(value)
    except (ValueError, OverflowError):
        raise type_error(spec.type, value, loc) from None
    if isinstance(value, float) and number != value:
        raise type_error(spec.type, value, loc)
    return check_bounds(spec, number, loc)


def validate_number(spec: ModelInput, value: object, loc: Location) -> object:
    try:
        if not isinstance(value, int | float | str):
            raise type_error(spec.type, value, loc)
        return check_bounds(spec, float(value), loc)
    except (ValueError, OverflowError):
        raise type_error(spec.type, value, loc) from None


def check_bounds(spec: ModelInput, number: float, loc: Location) -> float:
    if spec.minimum is not None and not number >= spec.minimum:
        msg = f"Input should be greater than or equal to {spec.minimum}"
        raise InputError(error_detail("greater_than_equal", msg, loc, {"ge": spec.minimum}, number))
    if spec.maximum is not None and not number <= spec.maximum:
        msg = f"Input should be less than or equal to {spec.maximum}"
        raise InputError(error_detail("less_than_equal", msg, loc, {"le": spec.maximum}, number))
    return number


def validate_boolean(spec: ModelInput, value: object, loc: Location) -> object:
    is_scalar = isinstance(value, bool | int | str)
    boolean = BOOLEAN_STRINGS.get(str(value).lower()) if is_scalar else None
    if boolean is None:
        raise type_error(spec.type, value, loc)
    return boolean


def validate_choice(spec: ModelInput, value: object, loc: Location) -> object:
    if not isinstance(value, str) or value not in spec.choices:
        *others, last = (repr(choice) for choice in spec.choices)
        expected = f"{', '.join(others)} or {last}"
        msg = f"Input should be {expected}"
        raise InputError(error_detail("literal_error", msg, loc, {"expected": expected}, value))
    return value


def validate_images(spec: ModelInput, value: object, loc: Location) -> object:
    if not isinstance(value, list):
        raise type_error(spec.type, value, loc)
    if not value:
        msg = "List should have at least 1 item after validation, not 0"
        raise InputError(error_detail("sequence_too_short", msg, loc, {"min_length": 1}, value))
    return [validate_string(IMAGE, item, (*loc, index)) for index, item in enumerate(value)]


def validate_loras(spec: ModelInput, value: object, loc: Location) -> object:
    """Validate a list of `{"path", "scale": 0..4 = 1, "force": false}`."""
    if not isinstance(value, list):
        raise type_error(spec.type, value, loc)
    return [validate_lora(item, (*loc, index)) for index, item in enumerate(value)]


def validate_lora(item: object, loc: Location) -> InputValues:
    if not isinstance(item, dict):
        msg = "Input should be a valid dictionary"
        raise InputError(error_detail("dict_type", msg, loc, value=item))
    if "path" not in item:
        raise InputError(error_detail("missing", "Field required", (*loc, "path"), value=item))
    path = validate_string(IMAGE, item["path"], (*loc, "path"))
    scale = validate_number(LORA_SCALE, item.get("scale", 1.0), (*loc, "scale"))
    force = validate_boolean(LORA_FORCE, item.get("force", False), (*loc, "force"))
    return {"path": path, "scale": scale, "force": force}


def validate_image_size(spec: ModelInput, value: object, loc: Location) -> object:
    """Validate the name of a preset, or `{"width": pixels = 512, "height": pixels = 512}`."""
    if not isinstance(value, dict):
        return validate_choice(spec, value, loc)
    return {
        side: validate_integer(SIDE, value.get(side, 512), (*loc, side))
        for side in ("width", "height")
    }


def validate_object(spec: ModelInput, value: object, loc: Location) -> object:
    if not isinstance(value, dict):
        msg = "Input should be a valid dictionary or object to extract fields from"
        raise InputError(error_detail("model_attributes_type", msg, loc, value=value))
    return {name: validate_input(name, field, value, loc) for name, field in spec.fields.items()}


SIDE = ModelInput(InputType.INTEGER, minimum=1, maximum=SIDE_MAX)
LORA_SCALE = ModelInput(InputType.NUMBER, minimum=0, maximum=4)
LORA_FORCE = ModelInput(InputType.BOOLEAN)
IMAGE = ModelInput(InputType.IMAGE)
VALIDATORS: Mapping[InputType, Callable[[ModelInput, object, Location], object]] = {
    InputType.STRING: validate_string,
    InputType.IMAGE: validate_string,
    InputType.INTEGER: validate_integer,
    InputType.NUMBER: validate_number,
    InputType.BOOLEAN: validate_boolean,
    InputType.CHOICE: validate_choice,
    InputType.IMAGES: validate_images,
    InputType.LORAS: validate_loras,
    InputType.IMAGE_SIZE: validate_image_size,
    InputType.OBJECT: validate_object,
}
