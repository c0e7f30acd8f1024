"""The models and templates of the registry, and the inputs of the calls that are made from them."""

from collections.abc import Mapping
from decimal import Decimal
from string import Template as Text
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from falproxy.fal.endpoint import is_endpoint
from falproxy.fal.pricing import Price

LORA_INPUTS = ("loras", "lora_url", "lora_scale")
SIZE_INPUTS = ("width", "height")
IMAGE_SIZE = "image_size"
VALUE_MAX = 2000  # characters of a variable's value


def check_endpoint(endpoint: str) -> str:
    if not is_endpoint(endpoint):
        raise ValueError("not an endpoint id such as fal-ai/flux/dev")
    return endpoint


Endpoint = Annotated[str, AfterValidator(check_endpoint)]


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
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    endpoint: Endpoint
    description: str = ""
    required: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    lora: bool = False
    price: Annotated[Decimal, Field(ge=0)] | None = None
    unit: Literal["image", "megapixel"] = "image"
    defaults: dict[str, str | bool | int | float | dict[str, int]] = Field(default_factory=dict)
    rename: dict[str, str] = Field(default_factory=dict)

    @property
    def accepted_inputs(self) -> tuple[str, ...]:
        loras = LORA_INPUTS if self.lora else ()
        size = SIZE_INPUTS if IMAGE_SIZE in self.required + self.optional else ()
        return (*self.required, *self.optional, *size, *loras)

    @property
    def rate(self) -> Price | None:
        if self.price is None:
            return None
        return Price(self.price, "images" if self.unit == "image" else "megapixels")

    def build_body(self, inputs: Mapping[str, object]) -> dict[str, object]:
        """Return the request body for fal. Inputs that are None count as missing.

        Raises: InvalidInputError.
        """
        present = {name: value for name, value in inputs.items() if value is not None}
        for name in present:
            if name not in self.accepted_inputs:
                raise InvalidInputError(
                    f"{self.name} takes no {name!r}. {self._describe_inputs()}", name
                )
        body = with_loras(with_size(self.defaults | present))
        for name in self.required:
            if body.get(name) in (None, "", []):
                raise InvalidInputError(
                    f"{self.name} needs {name!r}. {self._describe_inputs()}", name
                )
        return {self.rename.get(name, name): value for name, value in body.items()}

    def _describe_inputs(self) -> str:
        others = [name for name in self.accepted_inputs if name not in self.required]
        optional = f", and takes {', '.join(others)}" if others else ""
        return f"It needs {', '.join(self.required)}{optional}."


class Variable(BaseModel):
    """A variable of a template. default: None if every call must have it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    description: str = ""
    default: str | None = None


class Template(BaseModel):
    """One template. The fields are explained in templates.toml."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    model: str
    prompt: str
    description: str = ""
    variables: dict[str, Variable] = Field(default_factory=dict)
    inputs: dict[str, str | bool | int | float | dict[str, int]] = Field(default_factory=dict)

    @model_validator(mode="after")
    def check_names(self) -> Self:
        text = Text(self.prompt)
        if not text.is_valid() or {*text.get_identifiers()} != {*self.variables}:
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
        texts = {name: self._variable_text(name, values.get(name)) for name in self.variables}
        return Text(self.prompt).substitute(texts)

    def _variable_text(self, name: str, value: object) -> str:
        variable = self.variables[name]
        if value is None:
            value = variable.default
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise InvalidInputError(f"{self.name} needs {name!r}: {variable.description}.", name)
        text = str(value).strip()
        if not 0 < len(text) <= VALUE_MAX:
            raise InvalidInputError(f"{name!r} must have 1 to {VALUE_MAX} characters.", name)
        return text


def with_size(inputs: dict[str, object]) -> dict[str, object]:
    """Replace `width` and `height` by fal's `image_size`. Raises: InvalidInputError."""
    sides = {name: inputs.pop(name) for name in SIZE_INPUTS if name in inputs}
    if not sides:
        return inputs
    for name in SIZE_INPUTS:
        side = sides.get(name)
        if isinstance(side, bool) or not isinstance(side, int) or side < 1:
            raise InvalidInputError("'width' and 'height' go together, in whole pixels.", name)
    return inputs | {IMAGE_SIZE: sides}


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
