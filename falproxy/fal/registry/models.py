"""The models and templates of the registry, and the inputs of the calls that are made from them."""

from collections.abc import Collection, Mapping
from decimal import Decimal
from string import Template as Text
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from falproxy.fal.endpoint import is_endpoint
from falproxy.fal.pricing import Price, parse_unit

LORA_INPUTS = ("loras", "lora_url", "lora_scale")
SIZE_INPUTS = ("width", "height")
SIDE_DEFAULT = 1024  # pixels of a side that a call does not have, if it has the other one
IMAGE_SIZE = "image_size"
VALUE_MAX = 2000  # characters of a variable's value


def check_endpoint(endpoint: str) -> str:
    if not is_endpoint(endpoint):
        raise ValueError("not an endpoint id such as fal-ai/flux/dev")
    return endpoint


def check_unit(unit: str) -> str:
    if parse_unit(unit) is None:
        raise ValueError("not a unit such as image, megapixel, video, second or request")
    return unit


Kind = Literal["image", "video", "audio"]
Endpoint = Annotated[str, AfterValidator(check_endpoint)]
PriceUnit = Annotated[str, AfterValidator(check_unit)]


class InvalidInputError(ValueError):
    """A model or a template does not accept an input.

    message: a sentence with the error and the accepted inputs.
    name: the name of the input.
    """

    def __init__(self, message: str, name: str) -> None:
        super().__init__(message)
        self.name = name


class RegistryModel(BaseModel):
    """One model. The fields are explained in models.toml.

    price: USD for one unit, or None if unknown.
    variants: other endpoints of the model, with the same name.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    endpoint: Endpoint
    kind: Kind = "image"
    description: str = ""
    required: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    lora: bool = False
    price: Annotated[Decimal, Field(ge=0)] | None = None
    unit: PriceUnit = "image"
    defaults: dict[str, str | bool | int | float | dict[str, int]] = Field(default_factory=dict)
    rename: dict[str, str] = Field(default_factory=dict)
    inverse: tuple[str, ...] = ()
    variants: tuple["RegistryModel", ...] = ()

    @property
    def accepted_inputs(self) -> tuple[str, ...]:
        loras = LORA_INPUTS if self.lora else ()
        size = SIZE_INPUTS if IMAGE_SIZE in self.required + self.optional else ()
        return (*self.required, *self.optional, *size, *loras)

    @property
    def fal_names(self) -> Mapping[str, str]:
        """Our names of renamed inputs by fal's names, which clients may use as well."""
        names = {fal_name: name for name, fal_name in self.rename.items()}
        return {fal_name: name for fal_name, name in names.items() if name in self.accepted_inputs}

    def takes_default(self, name: str, value: object) -> bool:
        """Return whether the model has an input that a template may set to a value."""
        return name in self.accepted_inputs

    def for_inputs(self, inputs: Collection[str]) -> "RegistryModel":
        """Return the model, or the first of its variants that accepts these inputs. The model
        itself if there is an unknown input, which `build_body` reports.

        Raises: InvalidInputError, no variant accepts all of them.
        """
        models = (self, *self.variants)
        for model in models:
            if not model.unaccepted(inputs):
                return model
        for name in self.unaccepted(inputs):
            others = (each.unaccepted(inputs) for each in models if not each.unaccepted([name]))
            if (conflicts := next(others, None)) is not None:
                message = f"{self.name} does not take {conflicts[0]!r} together with {name!r}."
                if any(not each.unaccepted(conflicts[:1]) for each in models):
                    raise InvalidInputError(message, conflicts[0])
        return self

    def unaccepted(self, inputs: Collection[str]) -> list[str]:
        return [
            name
            for name in inputs
            if name not in self.accepted_inputs and name not in self.fal_names
        ]

    @property
    def rate(self) -> Price | None:
        unit = parse_unit(self.unit)
        return None if self.price is None or unit is None else Price(self.price, unit)

    def build_body(self, inputs: Mapping[str, object]) -> dict[str, object]:
        """Return the request body for fal. Inputs that are None count as missing.

        Raises: InvalidInputError.
        """
        present = {name: value for name, value in inputs.items() if value is not None}
        for name in self.unaccepted(present):
            raise InvalidInputError(
                f"{self.name} takes no {name!r}. {self._describe_inputs()}", name
            )
        for name, value in present.items():
            if self.fal_names.get(name) in present:
                raise InvalidInputError(f"{name!r} is given twice.", name)
            check_urls(name, value)
        body = with_loras(with_size(self.defaults | present, present))
        body |= {name: invert(name, body[name]) for name in self.inverse if name in body}
        sent = {self.rename.get(name, name): value for name, value in body.items()}
        for name in self.required:
            if sent.get(self.rename.get(name, name)) in (None, "", []):
                raise InvalidInputError(
                    f"{self.name} needs {name!r}. {self._describe_inputs()}", name
                )
        return sent

    def _describe_inputs(self) -> str:
        names = (name for model in (self, *self.variants) for name in model.accepted_inputs)
        others = [name for name in dict.fromkeys(names) if name not in self.required]
        optional = f", and takes {', '.join(others)}" if others else ""
        return f"It needs {', '.join(self.required)}{optional}."


class Variable(BaseModel):
    """A variable of a template.

    default: None if every call must have it.
    fallback: another variable, whose value is used if a call does not have this one.
    phrase: the text for the prompt if a call has the variable, with `$value`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    description: str = ""
    default: str | None = None
    fallback: str | None = None
    phrase: str = "$value"


class Template(BaseModel):
    """One template. The fields are explained in templates.toml."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    model: str
    prompt: str
    description: str = ""
    variables: dict[str, Variable] = Field(default_factory=dict)
    inputs: dict[str, str | bool | int | float | dict[str, int]] = Field(default_factory=dict)
    input_variables: dict[str, str] = Field(default_factory=dict)

    @model_validator(mode="after")
    def check_names(self) -> Self:
        text = Text(self.prompt)
        names = {*text.get_identifiers(), *self.input_variables}
        if not text.is_valid() or names != {*self.variables}:
            raise ValueError("the prompt must have the same $names as there are variables")
        return self

    def fill(self, values: Mapping[str, object]) -> str:
        """Return the prompt with all variables replaced. Raises: InvalidInputError."""
        for name in values:
            if name not in self.variables:
                names = ", ".join(self.variables)
                raise InvalidInputError(
                    f"{self.name} has no variable {name!r}. It has {names}.", name
                )
        texts = {
            name: self._variable_text(name, values)
            for name in self.variables
            if name not in self.input_variables
        }
        return Text(self.prompt).substitute(texts)

    def variable_inputs(self, values: Mapping[str, object]) -> dict[str, object]:
        """Return the variables that are inputs of the model instead of parts of the prompt."""
        names = self.input_variables.items()
        return {name: values[variable] for variable, name in names if values.get(variable)}

    def _variable_text(self, name: str, values: Mapping[str, object]) -> str:
        variable = self.variables[name]
        value = values.get(name)
        if value is None and variable.fallback is not None:
            value = values.get(variable.fallback)
        elif value is None and variable.default is not None:
            return variable.default
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise InvalidInputError(f"{self.name} needs {name!r}: {variable.description}.", name)
        text = str(value).strip()
        if not 0 < len(text) <= VALUE_MAX:
            raise InvalidInputError(f"{name!r} must have 1 to {VALUE_MAX} characters.", name)
        return variable.phrase.replace("$value", text)


def check_urls(name: str, value: object) -> None:
    """Raises: InvalidInputError, a URL that fal cannot read."""
    pending = [value]
    while pending:
        node = pending.pop()
        if isinstance(node, str) and node[:5].lower() == "s3://":
            message = f"{name!r}: fal.ai cannot read s3:// URLs. Send an https URL of the file."
            raise InvalidInputError(message, name)
        if isinstance(node, dict | list):
            pending += node.values() if isinstance(node, dict) else node


def invert(name: str, value: object) -> float:
    """Return 1 minus a value. Raises: InvalidInputError."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise InvalidInputError(f"{name!r} must be a number from 0 to 1.", name)
    return round(1 - value, 6)


def with_size(inputs: dict[str, object], given: Collection[str]) -> dict[str, object]:
    """Replace `width` and `height` by fal's `image_size`. given: the inputs that are no defaults.

    Raises: InvalidInputError.
    """
    sides = {name: inputs.pop(name) for name in SIZE_INPUTS if name in inputs}
    if not sides:
        return inputs
    if IMAGE_SIZE in given:
        raise InvalidInputError("Give 'image_size' or 'width' and 'height', not both.", IMAGE_SIZE)
    size = {name: sides.get(name, SIDE_DEFAULT) for name in SIZE_INPUTS}
    for name, side in size.items():
        if isinstance(side, bool) or not isinstance(side, int) or side < 1:
            raise InvalidInputError(f"{name!r} must be a whole number of pixels.", name)
    return inputs | {IMAGE_SIZE: size}


def with_loras(inputs: dict[str, object]) -> dict[str, object]:
    """Replace `lora_url` and `lora_scale` by fal's list `loras`. Raises: InvalidInputError."""
    url, scale = inputs.pop("lora_url", None), inputs.pop("lora_scale", None)
    if url is None and scale is None:
        return inputs
    if not isinstance(url, str) or not url:
        raise InvalidInputError("'lora_scale' goes with 'lora_url', the URL of a file.", "lora_url")
    if "loras" in inputs:
        raise InvalidInputError("Give 'loras' or 'lora_url', not both.", "lora_url")
    if isinstance(scale, bool) or not isinstance(scale, int | float | None):
        raise InvalidInputError("'lora_scale' must be a number.", "lora_scale")
    return inputs | {"loras": [{"path": url, "scale": 1.0 if scale is None else scale}]}
