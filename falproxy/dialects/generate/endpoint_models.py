"""Models outside the registry: fal's endpoint ids, whose own schemas check the inputs of a call."""

from collections.abc import Collection, Mapping

from aiohttp import hdrs
from pydantic import InstanceOf

from falproxy.dialects.openai.model_inputs import (
    FORMAT_INPUTS,
    FORMAT_SPELLINGS,
    PixelSize,
    nearest_inputs,
)
from falproxy.errors import ProxyError
from falproxy.fal.endpoint import is_endpoint
from falproxy.fal.model_schema import (
    IMAGE_LIST_INPUTS,
    MASK_INPUTS,
    SINGLE_IMAGE_INPUTS,
    InputSchema,
    ModelSchema,
    check_inputs,
    check_value,
    convert_number,
)
from falproxy.fal.policy import Globs, Policy
from falproxy.fal.registry import InvalidInputError, Registry, RegistryModel
from falproxy.fal.registry.models import (
    IMAGE_SIZE,
    LORA_INPUTS,
    SIDE_DEFAULT,
    SIZE_INPUTS,
    check_urls,
    with_loras,
)
from falproxy.proxy.model_schemas import SchemaClient, SchemaUnavailable
from falproxy.proxy.prices import PriceBook
from falproxy.proxy.upstream import Upstream

COUNT_INPUT, SYNC_INPUT = "num_images", "sync_mode"
# Inputs that stand for each other: the first name of the same group that the model has is used.
SAME_INPUTS = (SINGLE_IMAGE_INPUTS, IMAGE_LIST_INPUTS, MASK_INPUTS)


class EndpointModel(RegistryModel):
    """A model without an entry in the registry. Its price is fal's."""

    input_schema: InstanceOf[ModelSchema]

    @classmethod
    def of_schema(cls, endpoint: str, schema: ModelSchema) -> "EndpointModel":
        required = tuple(name for name in schema.inputs if name in schema.required)
        optional = tuple(name for name in schema.inputs if name not in schema.required)
        return cls(
            name=endpoint,
            endpoint=endpoint,
            required=required,
            optional=optional,
            input_schema=schema,
        )

    @property
    def accepted_inputs(self) -> tuple[str, ...]:
        return tuple(self.input_schema.inputs)

    def takes_default(self, name: str, value: object) -> bool:
        input_schema = self.input_schema.inputs.get(name)
        return input_schema is not None and not check_value(name, value, input_schema)

    def for_inputs(self, inputs: Collection[str]) -> RegistryModel:
        return self

    def build_body(self, inputs: Mapping[str, object]) -> dict[str, object]:
        """Return the request body for fal. Inputs that are None count as missing.

        Raises: InvalidInputError, the first problem that fal's schema finds.
        """
        schema = self.input_schema
        body = {name: value for name, value in inputs.items() if value is not None}
        for name, value in body.items():
            check_urls(name, value)
        body = with_pixel_size(body, schema, self.endpoint)
        if "loras" in schema.inputs and not {*LORA_INPUTS[1:]} & {*schema.inputs}:
            body = with_loras(body)
        body = with_names_of(schema, body)
        for problem in check_inputs(schema, body):
            raise InvalidInputError(f"{self.endpoint}: {problem.message}", problem.name)
        return body


class ModelFinder:
    """Finds the model that a request names: in the registry, or among fal's endpoints.

    endpoints: allowed endpoints; empty allows all.
    """

    def __init__(self, registry: Registry, endpoints: Globs, prices: PriceBook) -> None:
        self.registry = registry
        self._policy = Policy(endpoints, Globs(()))
        self._schemas: SchemaClient = prices.schemas
        self._prices = prices

    async def find(self, name: str, upstream: Upstream) -> RegistryModel:
        """Raises: ProxyError 400, 403, 503."""
        if name in self.registry.models or not is_endpoint(name):
            try:
                return self.registry.model(name)
            except InvalidInputError as error:
                raise ProxyError(400, "model_not_found", str(error)) from error
        self._policy.check_endpoint(name)
        try:
            schema = await self._schemas.get_schema(upstream, name)
        except SchemaUnavailable:
            message = f"fal.ai's description of {name} cannot be read now. Try again soon."
            raise ProxyError(503, "schema_unavailable", message, {hdrs.RETRY_AFTER: "5"}) from None
        if schema is None:
            message = f"fal.ai has no model {name!r}. Search with GET /api/images/models?search=…."
            raise ProxyError(400, "model_not_found", message)
        if not schema.has_files:
            message = f"{name} generates no files. Call it through /api/fal/proxy."
            raise ProxyError(400, "model_unsupported", message)
        self._prices.refresh_soon(name)
        return EndpointModel.of_schema(name, schema)


def with_pixel_size(
    inputs: dict[str, object], schema: ModelSchema, endpoint: str
) -> dict[str, object]:
    """Replace `width` and `height` by the inputs for a size that the model has.

    Raises: InvalidInputError.
    """
    sides = {name: inputs[name] for name in SIZE_INPUTS if name in inputs}
    if not sides:
        return inputs
    if IMAGE_SIZE not in schema.inputs and {*SIZE_INPUTS} & {*schema.inputs}:
        return {name: SIDE_DEFAULT for name in SIZE_INPUTS if name in schema.inputs} | inputs
    rest = {name: value for name, value in inputs.items() if name not in sides}
    lengths = {name: sides.get(name, SIDE_DEFAULT) for name in SIZE_INPUTS}
    for name, side in lengths.items():
        if isinstance(side, bool) or not isinstance(side, int) or side < 1:
            raise InvalidInputError(f"{name!r} must be a whole number of pixels.", name)
    given = next(iter(sides))
    size = nearest_inputs(PixelSize(**lengths), schema)  # type: ignore[arg-type]  # checked above
    if not size:
        message = f"{endpoint} takes no {given!r}: the size of its results cannot be set so."
        raise InvalidInputError(message, given)
    for name in size:
        if name in rest:
            message = f"Give {name!r} or 'width' and 'height', not both."
            raise InvalidInputError(message, name)
    return rest | size


def with_names_of(schema: ModelSchema, inputs: Mapping[str, object]) -> dict[str, object]:
    """Return the inputs by the names, and in the forms, that the model has for them. An input that
    is not understood stays as it is.

    Raises: InvalidInputError, an input is given twice, or would return files inside of the result.
    """
    if inputs.get(SYNC_INPUT) is True:
        message = f"{SYNC_INPUT!r} is not available here: results have URLs of files."
        raise InvalidInputError(message, SYNC_INPUT)
    body: dict[str, object] = {}
    for given, given_value in inputs.items():
        name, value = given, given_value
        if name not in schema.inputs:
            if (name, value) in ((COUNT_INPUT, 1), (SYNC_INPUT, False)):
                continue  # as the model does anyway
            name, value = renamed_input(schema, name, value)
        if name in body or (name != given and name in inputs):
            raise InvalidInputError(f"{name!r} is given twice.", name)
        input_schema = schema.inputs.get(name)
        body[name] = value if input_schema is None else converted(value, input_schema)
    return body


def renamed_input(schema: ModelSchema, name: str, value: object) -> tuple[str, object]:
    """Return another name of an input that the model has, and the value in its form."""
    if name in SINGLE_IMAGE_INPUTS and schema.first_input(*SINGLE_IMAGE_INPUTS) is None:
        list_input = schema.first_input(*IMAGE_LIST_INPUTS)
        return (name, value) if list_input is None else (list_input, [value])
    if name in IMAGE_LIST_INPUTS and schema.first_input(*IMAGE_LIST_INPUTS) is None:
        single_input = schema.first_input(*SINGLE_IMAGE_INPUTS)
        if single_input is not None and isinstance(value, list) and len(value) == 1:
            return single_input, value[0]
        return name, value
    for names in (*SAME_INPUTS, FORMAT_INPUTS):
        if name in names:
            return schema.first_input(*names) or name, value
    return name, value


def converted(value: object, schema: InputSchema) -> object:
    """Return a value in the form that the model expects: a number as one of its texts, a format in
    its spelling."""
    if schema.accepts(value):
        return value
    for spellings in FORMAT_SPELLINGS.values():
        if value in spellings:
            return next((each for each in spellings if each in schema.choices), value)
    return convert_number(value, schema)
