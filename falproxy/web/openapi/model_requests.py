"""Alternatives of the requests to `/api/images/generate` and `/api/templates`: one for each model
and each template, with its inputs.

The registry has names of inputs only. The types are those that fal's models give to these names.
"""

import json
import re
from collections.abc import Collection, Mapping, Sequence
from copy import deepcopy

from falproxy.fal.endpoint import is_endpoint
from falproxy.fal.registry import Registry, RegistryModel, Template
from falproxy.web.openapi.schemas import ENDPOINT_PATTERN, REF, Json

TEXT: Json = {"type": "string"}
FLAG: Json = {"type": "boolean"}
COUNT: Json = {"type": "integer", "minimum": 1}
NUMBER: Json = {"type": "number"}
SIZE: Json = {"type": "object", "properties": {"width": COUNT, "height": COUNT}}
LORA: Json = {"type": "object", "properties": {"path": TEXT, "scale": NUMBER}, "required": ["path"]}
# Names of inputs → their schemas. Other inputs may have any value.
INPUT_SCHEMAS: Mapping[str, Json] = {
    **dict.fromkeys(("prompt", "negative_prompt", "lora_url", "text", "voice"), TEXT),
    **dict.fromkeys(
        ("aspect_ratio", "acceleration", "output_format", "resolution", "resolution_mode",
         "safety_checker_version", "safety_tolerance"), TEXT,
    ),
    **dict.fromkeys(
        ("enable_safety_checker", "enhance_prompt", "expand_prompt", "generate_audio",
         "limit_generations", "prompt_optimizer", "raw", "sync_mode"), FLAG,
    ),
    **dict.fromkeys(("num_images", "num_inference_steps", "width", "height"), COUNT),
    **dict.fromkeys(
        ("cfg_scale", "guidance_scale", "lora_scale", "seconds_total", "speed"), NUMBER,
    ),
    "duration": {"anyOf": [TEXT, NUMBER], "description": "Seconds."},
    "seed": {"type": "integer"},
    "strength": {"type": "number", "minimum": 0, "maximum": 1},
    "image_size": {"anyOf": [{**TEXT, "description": "Such as square or landscape_4_3."}, SIZE]},
    "loras": {"type": "array", "items": LORA},
}  # fmt: skip
URL: Json = {"type": "string", "description": "An https URL, or a data URI."}
URLS: Json = {"type": "array", "items": URL}
WORD = re.compile(r"[A-Za-z0-9]+")
VARIABLE_TYPES = ["string", "number", "null"]
OPTIONS, ENDPOINT = "GenerateOptions", "GenerateEndpoint"
COMMON_PROPERTIES: Json = {
    "options": {"$ref": REF + OPTIONS},
    "userId": {"type": ["string", "null"], "description": "The user of your application."},
}
OPTIONS_DESCRIPTION = "Further inputs of the model; the same as putting them into `inputs`."


def add_alternatives(schemas: dict[str, Json], registry: Registry) -> None:
    """Add a component for each alternative, and refer to it in the schema of the request.

    The alternatives are complete, and components: generators of clients do not combine them with
    the properties of the request, and fail at objects inside of `oneOf`.
    """
    generate, template = schemas["GenerateRequest"], schemas["TemplateRequest"]
    titles = Titles(schemas)
    models = {
        titles.unique("Generate", model.name): generate_alternative(model)
        for model in registry.models.values()
    }
    templates = {
        titles.unique("Template", each.name): template_alternative(
            each, registry.models[each.model], template
        )
        for each in registry.templates.values()
    }
    for title, schema in (models | templates).items():
        schemas[title] = {"title": title, **schema}
    # No discriminator: it needs an entry for each value, and endpoint ids are any number.
    generate["oneOf"] = [{"$ref": REF + title} for title in (*models, ENDPOINT)]
    schemas[ENDPOINT] = {"title": ENDPOINT, **endpoint_alternative(registry)}
    if templates:
        # A request does not have to name its template, which is in the path.
        template["anyOf"] = [{"$ref": REF + title} for title in templates]
    schemas[OPTIONS] = {
        "title": OPTIONS,
        "type": "object",
        "additionalProperties": True,
        **described(OPTIONS_DESCRIPTION),
    }
    for request in (generate, template):
        for schema in properties_of(request).values():
            schema.pop("default", None)  # see `with_default`


def properties_of(schema: Json) -> dict[str, Json]:
    properties = schema["properties"]
    assert isinstance(properties, dict)
    return properties


class Titles:
    """Titles of schemas. Generators of clients make names of classes of them."""

    def __init__(self, used: Collection[str]) -> None:
        self._used = {title.lower() for title in used}

    def __repr__(self) -> str:
        return f"<Titles {len(self._used)}>"

    def unique(self, kind: str, name: str) -> str:
        """Return the title for a model or template of any name: `GenerateFluxDev`."""
        words = (word[0].upper() + word[1:] for word in WORD.findall(name))
        title = base = kind + ("".join(words) or "Other")
        number = 1
        while title.lower() in self._used:
            number += 1
            title = f"{base}{number}"
        self._used.add(title.lower())
        return title


def generate_alternative(model: RegistryModel) -> Json:
    """Return the schema of requests for a model."""
    properties = {
        "model": {**TEXT, "enum": [model.name]},
        "inputs": inputs_schema(model, model.required),
        **COMMON_PROPERTIES,
    }
    required = ["model", *(["inputs"] if model.required else [])]
    return request_schema(model.description, properties, required)


def endpoint_alternative(registry: Registry) -> Json:
    """Return the schema of requests for an endpoint that is not one of the models."""
    names = [name for name in registry.models if is_endpoint(name)]
    properties = {
        "model": {
            **TEXT,
            "pattern": ENDPOINT_PATTERN,
            **({"not": {"enum": names}} if names else {}),
        },
        "inputs": {"type": "object", "additionalProperties": True},
        **COMMON_PROPERTIES,
    }
    return request_schema("Any allowed endpoint of fal, by its id.", properties, ["model"])


def request_schema(description: str, properties: Json, required: list[str]) -> Json:
    return {
        "type": "object",
        **described(description),
        "properties": properties,
        **({"required": required} if required else {}),
        "additionalProperties": False,
    }


def template_alternative(template: Template, model: RegistryModel, request: Json) -> Json:
    """Return the schema of requests for a template.

    model: the template's own.
    request: the schema of all requests.
    """
    required = [
        name
        for name, variable in template.variables.items()
        if variable.default is None and variable.fallback is None
    ]
    variables: Json = {
        "type": "object",
        "properties": {
            name: {
                "type": VARIABLE_TYPES[: 2 if name in required else 3],
                **described(with_default(variable.description, variable.default or None)),
            }
            for name, variable in template.variables.items()
        },
        **({"required": required} if required else {}),
        "additionalProperties": False,
    }
    inputs = inputs_schema(model, (), {"prompt", *template.input_variables.values()})
    del inputs["additionalProperties"]  # the request may name another model
    properties = {
        "template": {**TEXT, "enum": [template.name]},
        "variables": variables,
        "model": properties_of(request)["model"],
        "inputs": inputs,
        **COMMON_PROPERTIES,
    }
    return request_schema(template.description, properties, ["variables"] if required else [])


def inputs_schema(
    model: RegistryModel, required: Sequence[str], left_out: Collection[str] = ()
) -> Json:
    """Return the schema of a model's inputs, with those of its variants."""
    models = (model, *model.variants)
    names = dict.fromkeys(name for each in models for name in each.accepted_inputs)
    schema: Json = {
        "type": "object",
        "properties": {
            name: input_schema(name, model, is_required=name in required)
            for name in names
            if name not in left_out
        },
        "additionalProperties": False,
    }
    if required:
        schema["required"] = [*required]
    if fal_names := dict.fromkeys(name for each in models for name in each.fal_names):
        schema["description"] = f"fal's names are accepted as well: {', '.join(fal_names)}."
    return schema


def input_schema(name: str, model: RegistryModel, *, is_required: bool) -> Json:
    schema = deepcopy(INPUT_SCHEMAS.get(name))
    if schema is None:
        schema = deepcopy(URL if name.endswith("_url") else URLS if name.endswith("_urls") else {})
    if is_required and schema.get("type") in ("string", "array"):
        schema["minLength" if schema["type"] == "string" else "minItems"] = 1
    if not is_required:
        schema = nullable(schema)
    text = with_default(str(schema.get("description", "")), model.defaults.get(name))
    return {**schema, **described(text)}


def nullable(schema: Json) -> Json:
    """Return the schema of values that may be null, which counts as missing."""
    alternatives = schema.get("anyOf")
    if isinstance(alternatives, list):
        return {**schema, "anyOf": [*alternatives, {"type": "null"}]}
    return {**schema, "type": [schema["type"], "null"]} if "type" in schema else schema


def with_default(description: str, default: object) -> str:
    """Return the description with a default. Generators of clients take properties that have the
    keyword `default` to be present in each request."""
    if default is None:
        return description
    value = default if isinstance(default, str) else json.dumps(default)
    return f"{description}{' ' * bool(description)}(default: {value})"


def described(description: str) -> Json:
    return {"description": description} if description else {}
