"""The inputs of a model, according to the OpenAPI document that fal publishes."""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import NamedTuple

NESTING_MAX = 8
# Lists and objects around a value: in inputs, and in results.
INPUT_NESTING_MAX, OUTPUT_NESTING_MAX = 3, 4
# Models with a `/stream` route, which fal's documents do not mention (fal-api.md, 3.2).
STREAMING_MODELS = ("fal-ai/flux/schnell", "fal-ai/flux-lora")
IMAGE_LIST_INPUT, IMAGE_INPUT = "image_urls", "image_url"
# Names of the inputs for the images of a request, by priority.
IMAGE_LIST_INPUTS = (IMAGE_LIST_INPUT, "images", "input_image_urls")
SINGLE_IMAGE_INPUTS = (IMAGE_INPUT, "image", "input_image_url")
MASK_INPUTS = ("mask_url", "mask_image_url", "mask")
IMAGE_INPUTS = (
    *IMAGE_LIST_INPUTS,
    *SINGLE_IMAGE_INPUTS,
    *MASK_INPUTS,
    "reference_image_url",
    "base_image_url",
    "swap_image_url",
)
NUMBER_TYPES = ("integer", "number")
FALSE, TRUE = ("false", "0", "no", "off"), ("true", "1", "yes", "on")

CHOICES_SHOWN = 40  # of an enum, in a message
URL_KEY = "url"  # in the names of results that are files

Document = Mapping[str, object]


@dataclass(frozen=True, slots=True)
class InputSchema:
    """The schema of one input, with all its alternatives (`anyOf` and others) combined.

    types: JSON Schema types, with `number` for integers.
    choices: the values of enums.
    keys: the properties of objects.
    accepts_any_string: True if a string does not have to be one of the choices.
    is_integer: True if numbers must be whole.
    items: of lists; None if they may be anything.
    properties: the schemas of the keys; empty if they may be anything.
    accepts_any_key: True if objects may have other keys as well.
    """

    types: frozenset[str]
    choices: tuple[object, ...] = ()
    keys: frozenset[str] = frozenset()
    maximum: float | None = None
    default: object = None
    accepts_any_string: bool = False
    minimum: float | None = None
    is_integer: bool = False
    items: "InputSchema | None" = None
    properties: Mapping[str, "InputSchema"] = field(default_factory=dict)
    accepts_any_key: bool = False

    def accepts(self, value: object) -> bool:
        """Return True if the model certainly accepts a value."""
        if value in self.choices:
            return True
        return type_of(value) in self.types and (not self.choices or not isinstance(value, str))

    def parse(self, text: str) -> object:
        """Convert the text of a form to a type of the input. Return the text itself if it cannot be
        converted."""
        if "string" in self.types:
            return text
        if "boolean" in self.types and text.lower() in (*TRUE, *FALSE):
            return text.lower() in TRUE
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            return text
        return value if type_of(value) in self.types or value is None else text


ANYTHING = InputSchema(frozenset())


@dataclass(frozen=True, slots=True)
class ModelSchema:
    """The inputs of a model.

    can_stream: the model can send unfinished images.
    accepts_any_input: inputs with other names may be sent as well.
    has_files: False if results certainly contain no URL of a file.
    outputs: names of the fields of results; empty if they are not described.
    """

    inputs: Mapping[str, InputSchema]
    required: frozenset[str] = frozenset()
    can_stream: bool = False
    accepts_any_input: bool = False
    has_files: bool = True
    outputs: frozenset[str] = frozenset()

    def first_input(self, *names: str) -> str | None:
        return next((name for name in names if name in self.inputs), None)

    def choices(self, name: str) -> tuple[str, ...]:
        """Return the strings that the enums of an input allow; empty if it is not an input."""
        schema = self.inputs.get(name)
        if schema is None:
            return ()
        return tuple(choice for choice in schema.choices if isinstance(choice, str))


def type_of(value: object) -> str:
    """Return the JSON Schema type of a value, with `number` for integers."""
    match value:
        case bool():
            return "boolean"
        case int() | float():
            return "number"
        case str():
            return "string"
        case list():
            return "array"
        case dict():
            return "object"
        case _:
            return "null"


def parse_document(document: object, endpoint: str) -> ModelSchema | None:
    """Read the schema of an endpoint. None if the document does not describe its queue submits."""
    reader = SchemaReader(document if isinstance(document, dict) else {})
    schema = reader.input_schema(endpoint)
    properties = schema.get("properties")
    if not isinstance(properties, dict):
        return None
    inputs = {name: reader.read_input(value) for name, value in properties.items()}
    required = schema.get("required")
    return ModelSchema(
        inputs,
        frozenset(required if isinstance(required, list) else ()),
        can_stream=endpoint in STREAMING_MODELS or f"/{endpoint}/stream" in reader.paths,
        accepts_any_input=schema.get("additionalProperties") not in (None, False),
        has_files=reader.has_files(endpoint),
        outputs=reader.outputs(endpoint),
    )


class SchemaReader:
    """Reads an OpenAPI document, any part of which may be missing or of an unexpected type."""

    def __init__(self, document: Document) -> None:
        self._document = document
        self.paths = get_nested(document, "paths")

    def input_schema(self, endpoint: str) -> Document:
        """Return the schema of the request body at the path of the endpoint, otherwise of the first
        path that has one; empty if there is none."""
        endpoint_path = self.paths.get(f"/{endpoint}")
        for path in chain((endpoint_path,), self.paths.values()):
            body = get_nested(path, "post", "requestBody", "content", "application/json", "schema")
            for schema in self._alternatives(body):
                if "properties" in schema:
                    return schema
        return {}

    def has_files(self, endpoint: str) -> bool:
        """Return False if the results of an endpoint certainly contain no URL of a file."""
        schema = self._output_schema(endpoint)
        return not get_nested(schema) or self._may_have_url(schema)

    def outputs(self, endpoint: str) -> frozenset[str]:
        """Return the names of the fields of results; empty if they are not described."""
        schemas = self._alternatives(self._output_schema(endpoint))
        return frozenset(chain.from_iterable(get_nested(each, "properties") for each in schemas))

    def _output_schema(self, endpoint: str) -> object:
        output = self.paths.get(f"/{endpoint}/requests/{{request_id}}")
        content = get_nested(output, "get", "responses", "200", "content", "application/json")
        return content.get("schema")

    def _may_have_url(self, schema: object, nesting: int = 0) -> bool:
        """Return whether a value of a schema may be a URL of a file, or contain one."""
        for each in self._alternatives(schema):
            properties = get_nested(each, "properties")
            is_open = not properties and (not each or "object" in types_of(each))
            if is_open or any(URL_KEY in name for name in properties):
                return True
            nested = [*properties.values(), *([each["items"]] if "items" in each else [])]
            if nested and nesting >= OUTPUT_NESTING_MAX:
                return True
            if any(self._may_have_url(value, nesting + 1) for value in nested):
                return True
        return False

    def read_input(self, schema: object, nesting: int = 0) -> InputSchema:
        """nesting: of the lists and objects around the input."""
        schemas = list(self._alternatives(schema))
        strings = [each for each in schemas if "string" in types_of(each)]
        numeric = [name for each in schemas for name in type_names(each) if name in NUMBER_TYPES]
        outer = schema if isinstance(schema, dict) else {}
        properties: dict[str, InputSchema] = {}
        items: InputSchema | None = None
        for each in schemas if nesting < INPUT_NESTING_MAX else ():
            for name, value in get_nested(each, "properties").items():
                properties[name] = self.read_input(value, nesting + 1)
            if isinstance(value := each.get("items"), dict):
                items = self.read_input(value, nesting + 1)
        objects = [each for each in schemas if "object" in types_of(each)]
        return InputSchema(
            types=frozenset(chain.from_iterable(map(types_of, schemas))),
            choices=tuple(chain.from_iterable(map(choices_of, schemas))),
            keys=frozenset(chain.from_iterable(get_nested(each, "properties") for each in schemas)),
            maximum=max(bounds_of(schemas, "maximum"), default=None),
            default=outer.get("default"),
            accepts_any_string=any(not choices_of(each) for each in strings),
            minimum=min(bounds_of(schemas, "minimum"), default=None),
            is_integer="integer" in numeric and "number" not in numeric,
            items=items,
            properties=properties,
            accepts_any_key=any(
                not get_nested(each, "properties")
                or each.get("additionalProperties") not in (None, False)
                for each in objects
            ),
        )

    def _alternatives(self, schema: object, nesting: int = 0) -> Iterator[Document]:
        """Yield a schema, with references resolved, and the schemas that it combines."""
        if not isinstance(schema, dict) or nesting > NESTING_MAX:
            return
        if isinstance(reference := schema.get("$ref"), str):
            names = reference.removeprefix("#/").split("/")
            yield from self._alternatives(get_nested(self._document, *names), nesting + 1)
            return
        yield schema
        for keyword in ("anyOf", "oneOf", "allOf"):
            members = schema.get(keyword)
            for member in members if isinstance(members, list) else ():
                yield from self._alternatives(member, nesting + 1)


def get_nested(value: object, *names: str) -> Document:
    """Return the object at a path of keys; empty if there is none."""
    for name in names:
        value = value.get(name) if isinstance(value, dict) else None
    return value if isinstance(value, dict) else {}


def type_names(schema: Document) -> list[str]:
    value = schema.get("type")
    names = value if isinstance(value, list) else [value]
    return [name for name in names if isinstance(name, str)]


def types_of(schema: Document) -> tuple[str, ...]:
    types = {"number" if name in NUMBER_TYPES else name for name in type_names(schema)}
    return tuple(types)


def bounds_of(schemas: Iterable[Document], keyword: str) -> list[float]:
    values = (each.get(keyword) for each in schemas)
    return [value for value in values if isinstance(value, int | float)]


def choices_of(schema: Document) -> tuple[object, ...]:
    choices = schema.get("enum")
    if isinstance(choices, list):
        return tuple(choices)
    return (schema["const"],) if "const" in schema else ()


class InputProblem(NamedTuple):
    """An input that a model does not accept.

    name: of the input; a part of it is like `image_size.width`.
    message: a sentence with the accepted names or values, without any value of the call.
    """

    name: str
    message: str


def check_inputs(schema: ModelSchema, inputs: Mapping[str, object]) -> list[InputProblem]:
    """Return the problems of a call's inputs; empty if the schema does not rule out the call.

    Only what is certain is a problem: an unknown name, a missing input, a value of another type, or
    one that is not among the choices or within the bounds. Inputs that are None count as missing.
    """
    problems = []
    for name, value in inputs.items():
        if value is None:
            continue
        if (input_schema := schema.inputs.get(name)) is not None:
            problems += check_value(name, value, input_schema)
        elif not schema.accepts_any_input:
            problems.append(unknown_name(name, schema.inputs))
    problems += (
        InputProblem(name, f"{name!r} is missing. {describe_names(schema)}")
        for name in schema.inputs
        if name in schema.required and inputs.get(name) in (None, "", [])
    )
    return problems


def check_value(name: str, value: object, schema: InputSchema) -> list[InputProblem]:
    """Return the problems of a value, and of the values in it."""
    if isinstance(value, list) and "array" in schema.types:
        items = schema.items or ANYTHING
        nested = (check_value(f"{name}[{n}]", each, items) for n, each in enumerate(value))
        return [problem for problems in nested for problem in problems]
    if isinstance(value, dict) and "object" in schema.types:
        return check_object(name, value, schema)
    if accepts_scalar(value, schema):
        return []
    return [InputProblem(name, f"{name!r} must be {describe_values(schema)}.")]


def accepts_scalar(value: object, schema: InputSchema) -> bool:
    """Return whether a model may accept a value that is no list and no object of its kind."""
    if not schema.types or value in schema.choices:
        return True
    if isinstance(value, str):
        return schema.accepts_any_string
    if isinstance(value, int | float) and not isinstance(value, bool):
        is_number = "number" in schema.types and not has_number_choices(schema)
        return is_number and is_in_bounds(value, schema)
    return type_of(value) in schema.types


def has_number_choices(schema: InputSchema) -> bool:
    return any(type_of(choice) == "number" for choice in schema.choices)


def convert_number(value: object, schema: InputSchema) -> object:
    """Return a number as one of the texts that an input accepts instead, such as a tolerance of 2
    as "2". Other values stay as they are."""
    if isinstance(value, bool) or not isinstance(value, int | float) or schema.accepts(value):
        return value
    text = str(value) if isinstance(value, int) else f"{value:g}"
    return text if text in schema.choices else value


def check_object(name: str, value: Mapping[str, object], schema: InputSchema) -> list[InputProblem]:
    problems = []
    for key, each in value.items():
        path = f"{name}.{key}"
        if key in schema.properties:
            if each is not None:
                problems += check_value(path, each, schema.properties[key])
        elif not schema.accepts_any_key and key not in schema.keys:
            problems.append(unknown_name(path, schema.keys))
    return problems


def is_in_bounds(value: float, schema: InputSchema) -> bool:
    if schema.is_integer and value != value // 1:
        return False
    if schema.minimum is not None and value < schema.minimum:
        return False
    return schema.maximum is None or value <= schema.maximum


def unknown_name(name: str, known: Iterable[str]) -> InputProblem:
    return InputProblem(name, f"There is no input {name!r}. There are {', '.join(sorted(known))}.")


def describe_names(schema: ModelSchema) -> str:
    """Return a sentence with the names of all inputs, the required ones first."""
    required = [name for name in schema.inputs if name in schema.required]
    optional = [name for name in schema.inputs if name not in schema.required]
    parts = [f"Required are {', '.join(required)}"] if required else []
    parts += [f"{'o' if required else 'O'}ptional are {', '.join(optional)}"] if optional else []
    return f"{'; '.join(parts)}." if parts else "The model takes no inputs."


def describe_values(schema: InputSchema) -> str:
    """Return the accepted values: `a whole number from 1 to 4`."""
    parts = []
    if "number" in schema.types and not has_number_choices(schema):
        noun = "a whole number" if schema.is_integer else "a number"
        parts.append(noun + describe_bounds(schema.minimum, schema.maximum))
    if "boolean" in schema.types:
        parts.append("true or false")
    if schema.choices:
        shown = [f"{choice!r}" for choice in schema.choices[:CHOICES_SHOWN]]
        more = ["…"] if len(schema.choices) > len(shown) else []
        parts.append(f"one of {', '.join(shown + more)}")
    if schema.accepts_any_string:
        parts.append("a text")
    if "array" in schema.types:
        parts.append("a list")
    if "object" in schema.types:
        keys = f" with {', '.join(sorted(schema.keys))}" if schema.keys else ""
        parts.append(f"an object{keys}")
    return ", or ".join(parts) or "left out"


def describe_bounds(minimum: float | None, maximum: float | None) -> str:
    if minimum is not None and maximum is not None:
        return f" from {minimum:g} to {maximum:g}"
    if minimum is not None:
        return f" of at least {minimum:g}"
    return "" if maximum is None else f" of at most {maximum:g}"
