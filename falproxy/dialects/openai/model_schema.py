"""What a model takes, read from the OpenAPI document that fal publishes of it."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain

NESTING_MAX = 8
# Models with a `/stream` route: fal's documents do not tell (fal-api.md, 3.2).
STREAMING_MODELS = ("fal-ai/flux/schnell", "fal-ai/flux-lora")
NUMBER_TYPES = ("integer", "number")
FALSE, TRUE = ("false", "0", "no", "off"), ("true", "1", "yes", "on")

Document = Mapping[str, object]


@dataclass(frozen=True, slots=True)
class InputSchema:
    """One input of a model, all its alternatives together. types: JSON Schema's words. choices: of
    its enums. keys: of the object that it may be. is_free: whether it may be a text outside of
    the choices."""

    types: frozenset[str]
    choices: tuple[object, ...] = ()
    keys: frozenset[str] = frozenset()
    maximum: float | None = None
    default: object = None
    accepts_any_string: bool = False

    def accepts(self, value: object) -> bool:
        """Whether a value is plainly one of those that the model takes."""
        if value in self.choices:
            return True
        return type_of(value) in self.types and (not self.choices or not isinstance(value, str))

    def parse(self, text: str) -> object:
        """The value that a form's text stands for; the text itself where that is none."""
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
    """The inputs of a model. streams: whether it tells how a picture comes about."""

    inputs: Mapping[str, InputSchema]
    required: frozenset[str] = frozenset()
    can_stream: bool = False

    def first_input(self, *names: str) -> str | None:
        """The first of these that is an input."""
        return next((name for name in names if name in self.inputs), None)

    def choices(self, name: str) -> tuple[str, ...]:
        """The texts that an input may be; none where it is none."""
        known = self.inputs.get(name)
        return tuple(choice for choice in known.choices if isinstance(choice, str)) if known else ()


def type_of(value: object) -> str:
    """JSON Schema's word for a value. An integer is a number as well: both words are of one."""
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
    """None where the document is not the one of an endpoint's queue, as far as it can be read."""
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
    """An OpenAPI document, of which nothing is taken for granted."""

    def __init__(self, document: Document) -> None:
        self._document = document
        self.paths = get_nested(document, "paths")

    def input_schema(self, endpoint: str) -> Document:
        """The schema of what is submitted: at the endpoint's own path, else at any."""
        own = self.paths.get(f"/{endpoint}")
        for path in chain((own,), self.paths.values()):
            body = get_nested(path, "post", "requestBody", "content", "application/json", "schema")
            for schema in self._alternatives(body):
                if "properties" in schema:
                    return schema
        return {}

    def read_input(self, schema: object) -> InputSchema:
        found = list(self._alternatives(schema))
        bounds = [bound for one in found if isinstance(bound := one.get("maximum"), int | float)]
        texts = [one for one in found if "string" in types_of(one)]
        outer = schema if isinstance(schema, dict) else {}
        return InputSchema(
            types=frozenset(chain.from_iterable(map(types_of, found))),
            choices=tuple(chain.from_iterable(map(choices_of, found))),
            keys=frozenset(chain.from_iterable(get_nested(one, "properties") for one in found)),
            maximum=max(bounds, default=None),
            default=outer.get("default"),
            accepts_any_string=any(not choices_of(one) for one in texts),
        )

    def _alternatives(self, schema: object, nesting: int = 0) -> Iterator[Document]:
        """A schema, or what it refers to or consists of."""
        if not isinstance(schema, dict) or nesting > NESTING_MAX:
            return
        if isinstance(reference := schema.get("$ref"), str):
            names = reference.removeprefix("#/").split("/")
            yield from self._alternatives(get_nested(self._document, *names), nesting + 1)
            return
        yield schema
        for word in ("anyOf", "oneOf", "allOf"):
            members = schema.get(word)
            for member in members if isinstance(members, list) else ():
                yield from self._alternatives(member, nesting + 1)


def get_nested(value: object, *names: str) -> Document:
    """The object at the end of these keys, an empty one where there is none."""
    for name in names:
        value = value.get(name) if isinstance(value, dict) else None
    return value if isinstance(value, dict) else {}


def types_of(schema: Document) -> tuple[str, ...]:
    stated = schema.get("type")
    words = stated if isinstance(stated, list) else [stated]
    types = {"number" if word in NUMBER_TYPES else word for word in words if isinstance(word, str)}
    return tuple(types)


def choices_of(schema: Document) -> tuple[object, ...]:
    choices = schema.get("enum")
    if isinstance(choices, list):
        return tuple(choices)
    return (schema["const"],) if "const" in schema else ()
