"""The check of inputs against the schema that fal publishes."""

from typing import Any

import pytest

from falproxy.fal.model_schema import ModelSchema, check_inputs, parse_document
from falproxy.sandbox.model_metadata import openapi_document
from falproxy.sandbox.models import MODELS
from falproxy.stores.schema_files import deserialize, serialize

PROPERTIES: dict[str, Any] = {
    "prompt": {"type": "string"},
    "negative_prompt": {"anyOf": [{"type": "string"}, {"type": "null"}], "default": ""},
    "duration": {"type": "string", "enum": ["5", "10"], "default": "5"},
    "fps": {"type": "integer", "enum": [24, 30]},
    "length": {"anyOf": [{"type": "integer", "maximum": 9}, {"const": "auto", "type": "string"}]},
    "num_images": {"type": "integer", "minimum": 0, "maximum": 4, "default": 1},
    "strength": {"anyOf": [{"type": "number", "minimum": 0, "maximum": 1}, {"type": "null"}]},
    "seed": {"type": ["integer", "null"]},
    "audio": {"type": "boolean", "default": False},
    "image_size": {
        "anyOf": [
            {"$ref": "#/components/schemas/Size"},
            {"type": "string", "enum": ["square", "portrait"]},
        ],
        "default": {"width": 0, "height": 0},
    },
    "image_urls": {"type": "array", "items": {"type": "string"}, "default": []},
    "loras": {"type": "array", "items": {"$ref": "#/components/schemas/Lora"}},
    "extra": {"type": "object"},
    "anything": {},
    "mode": {"allOf": [{"$ref": "#/components/schemas/Mode"}], "default": "fast"},
    "style": {"anyOf": [{"type": "string", "enum": ["ink"]}, {"type": "string"}]},
}
SCHEMAS: dict[str, Any] = {
    "Size": {
        "type": "object",
        "properties": {"width": {"type": "integer", "maximum": 2000}, "height": {}},
    },
    "Lora": {
        "type": "object",
        "required": ["path"],
        "properties": {"path": {"type": "string"}, "scale": {"type": "number"}},
    },
    "Mode": {"type": "string", "enum": ["fast", "good"]},
}


def schema_of(properties: dict[str, Any], output: object = None, **more: object) -> ModelSchema:
    body = {"type": "object", "properties": properties, "required": ["prompt"], **more}
    content = {"application/json": {"schema": body}}
    paths: dict[str, Any] = {"/a/b": {"post": {"requestBody": {"content": content}}}}
    if output is not None:
        response = {"200": {"content": {"application/json": {"schema": output}}}}
        paths["/a/b/requests/{request_id}"] = {"get": {"responses": response}}
    document = {"paths": paths, "components": {"schemas": SCHEMAS}}
    schema = parse_document(document, "a/b")
    assert schema is not None
    return schema


SCHEMA = schema_of(PROPERTIES)
PROMPT = {"prompt": "a heron"}


@pytest.mark.parametrize(
    "inputs",
    [
        pytest.param({}, id="only what is required"),
        pytest.param({"seed": 7, "num_images": 4, "strength": 0.5}, id="numbers"),
        pytest.param({"num_images": 2.0, "strength": 1}, id="numbers of the other kind"),
        pytest.param({"num_images": 0}, id="the least number"),
        pytest.param({"seed": None, "negative_prompt": None, "audio": None}, id="null"),
        pytest.param({"audio": False, "duration": "10"}, id="a flag and a choice"),
        pytest.param({"image_size": "square"}, id="a preset"),
        pytest.param({"fps": 24, "length": "auto"}, id="a number as choice, a constant"),
        pytest.param({"length": 9}, id="a number beside a constant"),
        pytest.param({"image_size": {"width": 64, "height": 48}}, id="an object"),
        pytest.param({"image_urls": []}, id="an empty list"),
        pytest.param({"loras": [{"path": "https://a", "scale": 0.5}]}, id="a list of objects"),
        pytest.param({"extra": {"a": [1, {}]}}, id="an object with any keys"),
        pytest.param({"anything": [1], "mode": "good"}, id="any value and a referenced choice"),
        pytest.param({"style": "watercolour"}, id="a text that is no choice where any is accepted"),
    ],
)
def test_accepted_inputs_have_no_problem(inputs: dict[str, object]) -> None:
    assert check_inputs(SCHEMA, {**PROMPT, **inputs}) == []


@pytest.mark.parametrize(
    ("inputs", "name", "expected"),
    [
        pytest.param({"sed": 7}, "sed", "anything, audio, duration,", id="an unknown name"),
        pytest.param({"prompt": None}, "prompt", "'prompt' is missing. Required are prompt; opti",
                     id="null for a required one"),
        pytest.param({"prompt": ""}, "prompt", "'prompt' is missing", id="an empty required one"),
        pytest.param({"prompt": 5}, "prompt", "must be a text", id="a number for a text"),
        pytest.param({"prompt": ["x"]}, "prompt", "must be a text", id="a list for a text"),
        pytest.param({"num_images": "2"}, "num_images", "a whole number from 0 to 4",
                     id="a text for a number"),
        pytest.param({"num_images": 5}, "num_images", "a whole number from 0 to 4", id="too many"),
        pytest.param({"num_images": -1}, "num_images", "from 0 to 4", id="too few"),
        pytest.param({"num_images": 1.5}, "num_images", "a whole number", id="half an image"),
        pytest.param({"num_images": True}, "num_images", "a whole number", id="a flag"),
        pytest.param({"strength": 1.1}, "strength", "a number from 0 to 1", id="too strong"),
        pytest.param({"seed": "x"}, "seed", "a whole number", id="a text as seed"),
        pytest.param({"audio": 1}, "audio", "true or false", id="a number for a flag"),
        pytest.param({"audio": "true"}, "audio", "true or false", id="a text for a flag"),
        pytest.param({"duration": "7"}, "duration", "one of '5', '10'", id="no choice"),
        pytest.param({"duration": 5}, "duration", "one of '5', '10'", id="a number for a choice"),
        pytest.param({"fps": 25}, "fps", "must be one of 24, 30", id="another number"),
        pytest.param({"length": 10}, "length", "of at most 9, or one of 'auto'", id="too long"),
        pytest.param({"length": "long"}, "length", "one of 'auto'", id="no constant"),
        pytest.param({"mode": "slow"}, "mode", "one of 'fast', 'good'", id="a referenced choice"),
        pytest.param({"image_size": "huge"}, "image_size",
                     "one of 'square', 'portrait', or an object with height, width", id="a preset"),
        pytest.param({"image_size": [1]}, "image_size", "an object", id="a list as size"),
        pytest.param({"image_size": {"widht": 5}}, "image_size.widht", "There are height, width",
                     id="a misspelt key"),
        pytest.param({"image_size": {"width": "5"}}, "image_size.width", "whole number of at most",
                     id="a key of another type"),
        pytest.param({"image_urls": "https://a"}, "image_urls", "a list", id="one for a list"),
        pytest.param({"image_urls": ["https://a", 5]}, "image_urls[1]", "a text", id="an item"),
        pytest.param({"loras": [{"path": "x", "scale": "y"}]}, "loras[0].scale", "a number",
                     id="a key of an item"),
        pytest.param({"extra": "x"}, "extra", "an object", id="a text for an object"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("schema", [SCHEMA, deserialize(serialize(SCHEMA))], ids=["fal", "disk"])
def test_a_problem_names_the_input_and_what_is_accepted(
    schema: ModelSchema, inputs: dict[str, object], name: str, expected: str
) -> None:
    (problem,) = check_inputs(schema, {**PROMPT, **inputs})
    assert problem.name == name
    assert repr(name) in problem.message
    assert expected in problem.message
    assert problem.message.endswith(".")


def test_all_problems_are_returned() -> None:
    names = [problem.name for problem in check_inputs(SCHEMA, {"sed": 1, "seed": "x"})]
    assert names == ["sed", "seed", "prompt"]


def test_a_message_contains_no_value_of_the_call() -> None:
    inputs = {"prompt": ["s3cret"], "duration": "s3cret", "image_size": {"width": "s3cret"}}
    assert "s3cret" not in str(check_inputs(SCHEMA, inputs))


def test_a_model_that_takes_any_input_has_no_unknown_names() -> None:
    schema = schema_of(PROPERTIES, additionalProperties=True)
    assert check_inputs(schema, PROMPT | {"node_5": 1}) == []


@pytest.mark.parametrize("endpoint", sorted(MODELS))
def test_the_defaults_of_a_model_are_accepted(endpoint: str) -> None:
    schema = parse_document(openapi_document(MODELS[endpoint]), endpoint)
    assert schema is not None
    defaults = {name: each.default for name, each in schema.inputs.items()}
    problems = check_inputs(schema, defaults)
    assert {problem.name for problem in problems} == schema.required


@pytest.mark.parametrize(
    ("output", "has_files"),
    [
        pytest.param(None, True, id="not described"),
        pytest.param({}, True, id="anything"),
        pytest.param({"type": "object"}, True, id="any object"),
        pytest.param({"properties": {"output": {"type": "string"}}}, False, id="a text"),
        pytest.param({"properties": {"usage": {"type": "object",
                      "properties": {"n": {"type": "integer"}}}}}, False, id="numbers"),
        pytest.param({"properties": {"image_url": {"type": "string"}}}, True, id="a URL"),
        pytest.param({"properties": {"video": {"properties": {"url": {}}}}}, True, id="a file"),
        pytest.param({"properties": {"images": {"type": "array", "items": {"anyOf": [
                      {"type": "null"}, {"properties": {"url": {}}}]}}}}, True, id="files"),
    ],
)  # fmt: skip
def test_a_result_without_files_is_recognized(output: object, has_files: bool) -> None:
    schema = schema_of(PROPERTIES, output)
    assert schema.has_files is has_files
    assert deserialize(serialize(schema)) == schema
