"""Inputs of models for which the OpenAI API has no parameter, and checks of all inputs."""

from collections.abc import Mapping

from falproxy.dialects.json_body import HAS_HALF_PAIR, has_half_pair
from falproxy.dialects.openai.errors import SCHEMA_UNAVAILABLE, ImagesError, invalid_parameter
from falproxy.dialects.openai.models import ResolvedModel
from falproxy.dialects.openai.request_images import Upload
from falproxy.fal.model_schema import ModelSchema, check_inputs


def extra_inputs(
    extra: Mapping[str, object], schema: ModelSchema, *, is_form: bool
) -> dict[str, object]:
    """Return the parameters that are inputs of the model by their own names.

    is_form: the values are texts, which are converted to the type of the input.
    Raises: ImagesError 400.
    """
    inputs: dict[str, object] = {}
    for name, value in extra.items():
        if value is None:
            continue
        input_schema = schema.inputs.get(name)
        if is_form and isinstance(value, str) and input_schema is not None:
            value = input_schema.parse(value)
            if has_half_pair(value):
                raise invalid_parameter(name, f"{name} {HAS_HALF_PAIR}.", "invalid_text")
        inputs[name] = value
    return inputs


def check_model_inputs(
    inputs: Mapping[str, object], model: ResolvedModel, renamed: Mapping[str, str]
) -> None:
    """Check names and values. renamed: names of inputs with the parameter that sets them.

    Raises: ImagesError 400.
    """
    if model.schema is None:
        return
    # A file is sent as a data URI.
    sent = {
        name: "data:," if isinstance(value, Upload) else value for name, value in inputs.items()
    }
    for problem in check_inputs(model.schema, sent):
        name = problem.name.partition(".")[0].partition("[")[0]
        is_missing = name not in inputs
        code = "missing_required_parameter" if is_missing else "invalid_value"
        param = renamed.get(name, problem.name)
        message = f"{model.endpoint}: {problem.message}"
        if is_missing and param != name:
            message = f"{model.endpoint} needs {param} ({name})."
        raise invalid_parameter(param, message, code)


def schema_unavailable(model: ResolvedModel, name: str) -> ImagesError:
    message = (
        f"fal.ai's description of {model.endpoint} cannot be read now, and {name} needs it. "
        "Try again soon."
    )
    return ImagesError(SCHEMA_UNAVAILABLE, message, {"Retry-After": "5"})
