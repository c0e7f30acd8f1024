"""The inputs of a model, according to the OpenAPI document that fal publishes."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain

NESTING_MAX = 8
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

Document = Mapping[str, object]


@dataclass(frozen=True, slots=True)
class InputSchema:
    """The schema of one input, with all its alternatives (`anyOf` and others) combined.

    types: JSON Schema types, with `number` for integers.
    choices: the values of enums.
    keys: the properties of objects.
    accepts_any_string: True if a string does not have to be one of the choices.
    """

    types: frozenset[str]
    choices: tuple[object, ...] = ()
    keys: frozenset[str] = frozenset()
    maximum: float | None = None
    default: object = None
    accepts_any_string: bool = False

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


@dataclass(frozen=True, slots=True)
class ModelSchema:
    """The inputs of a model. can_stream: the model can send unfinished images."""

    inputs: Mapping[str, InputSchema]
    required: frozenset[str] = frozenset()
    can_stream: bool = False

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

    def read_input(self, schema: object) -> InputSchema:
        schemas = list(self._alternatives(schema))
        maxima = [
            value for each in schemas if isinstance(value := each.get("maximum"), int | float)
        ]
        strings = [each for each in schemas if "string" in types_of(each)]
        outer = schema if isinstance(schema, dict) else {}
        return InputSchema(
            types=frozenset(chain.from_iterable(map(types_of, schemas))),
            choices=tuple(chain.from_iterable(map(choices_of, schemas))),
            keys=frozenset(chain.from_iterable(get_nested(each, "properties") for each in schemas)),
            maximum=max(maxima, default=None),
            default=outer.get("default"),
            accepts_any_string=any(not choices_of(each) for each in strings),
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


def types_of(schema: Document) -> tuple[str, ...]:
    value = schema.get("type")
    names = value if isinstance(value, list) else [value]
    types = {"number" if name in NUMBER_TYPES else name for name in names if isinstance(name, str)}
    return tuple(types)


def choices_of(schema: Document) -> tuple[object, ...]:
    choices = schema.get("enum")
    if isinstance(choices, list):
        return tuple(choices)
    return (schema["const"],) if "const" in schema else ()
