"""The registry: models and templates in TOML, and the calls that they make."""

from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from falproxy.fal.pricing import parse_price
from falproxy.fal.registry import (
    InvalidInputError,
    Registry,
    RegistryModel,
    parse_registry,
    read_registry,
)
from falproxy.sandbox.models import MODELS, InputType

SHIPPED = read_registry()
OWN = """
[models.house]
endpoint = "fal-ai/flux-lora"
description = "Our house style."
required = ["prompt"]
optional = ["image_size", "strength"]
lora = true
price = 0.035
unit = "megapixel"
defaults = { strength = 0.5, image_size = { width = 512, height = 512 } }
rename = { prompt = "text" }
"""


@pytest.fixture
def registry() -> Registry:
    return parse_registry(OWN)


# All endpoints of all models, with the name of the model.
VARIANTS = [
    pytest.param(each, id=f"{name} {each.endpoint}")
    for name, model in SHIPPED.models.items()
    for each in (model, *model.variants)
]


@pytest.mark.parametrize("model", VARIANTS)
def test_a_built_in_model_matches_fal_s_schema(model: RegistryModel) -> None:
    inputs = MODELS[model.endpoint].inputs
    required = {model.rename.get(each, each) for each in model.required}
    if model.endpoint != "fal-ai/flux-pro/v1.1-ultra":  # the variant for calls with an image
        assert required == {each for each, reported in inputs.items() if reported.is_required}
    accepted = {model.rename.get(each, each) for each in model.required + model.optional}
    loras = {each for each, reported in inputs.items() if reported.type is InputType.LORAS}
    assert accepted | loras == {*inputs} - {"sync_mode"}  # jobs have URLs of files
    assert model.lora is bool(loras)


@pytest.mark.parametrize("name", SHIPPED.models)
def test_a_built_in_model_has_a_description(name: str) -> None:
    assert SHIPPED.models[name].description.endswith(".")
    assert {variant.name for variant in SHIPPED.models[name].variants} <= {name}


@pytest.mark.parametrize("model", VARIANTS)
def test_a_built_in_price_is_fal_s(model: RegistryModel) -> None:
    if model.price is not None:
        there = MODELS[model.endpoint]
        assert model.rate == parse_price(there.price, there.unit)


@pytest.mark.parametrize("name", SHIPPED.templates)
def test_a_built_in_template_makes_a_call_of_its_model(name: str) -> None:
    template = SHIPPED.templates[name]
    needed = {each for each, reported in template.variables.items() if reported.default is None}
    prompt = template.fill(dict.fromkeys(needed, "VALUE"))
    assert prompt.count("VALUE") >= len(needed) > 0
    assert "$" not in prompt
    body = SHIPPED.model(template.model).build_body({"prompt": prompt, **template.inputs})
    assert body["prompt"] == prompt


def test_a_call_has_the_defaults_that_it_leaves_out(registry: Registry) -> None:
    assert registry.models["house"].build_body({"prompt": "a cat", "strength": None}) == {
        "text": "a cat",
        "strength": 0.5,
        "image_size": {"width": 512, "height": 512},
    }


@pytest.mark.parametrize(
    ("inputs", "sent"),
    [
        pytest.param(
            {"width": 640, "height": 480}, {"image_size": {"width": 640, "height": 480}}, id="size"
        ),
        pytest.param({"width": 640}, {"image_size": {"width": 640, "height": 1024}}, id="a width"),
        pytest.param(
            {"height": 640}, {"image_size": {"width": 1024, "height": 640}}, id="a height"
        ),
        pytest.param({"text": "a dog"}, {"text": "a dog"}, id="fal's own name"),
        pytest.param(
            {"lora_url": "https://a.example/b"},
            {"loras": [{"path": "https://a.example/b", "scale": 1.0}]},
            id="a style",
        ),
        pytest.param(
            {"lora_url": "https://a.example/b", "lora_scale": 0.7},
            {"loras": [{"path": "https://a.example/b", "scale": 0.7}]},
            id="a style and how much of it",
        ),
        pytest.param({"loras": [{"path": "x"}]}, {"loras": [{"path": "x"}]}, id="styles"),
        pytest.param({"image_size": "square"}, {"image_size": "square"}, id="a preset"),
    ],
)
def test_short_names_become_fal_s_inputs(
    registry: Registry, inputs: dict[str, Any], sent: dict[str, Any]
) -> None:
    prompt = {} if "text" in inputs else {"prompt": "a cat"}
    body = registry.models["house"].build_body({**prompt, **inputs})
    assert {name: body[name] for name in sent} == sent
    assert not {"width", "height", "lora_url", "lora_scale"} & body.keys()


@pytest.mark.parametrize(
    ("inputs", "name", "message"),
    [
        pytest.param({}, "prompt", "house needs 'prompt'. It needs prompt, and", id="missing"),
        pytest.param({"prompt": ""}, "prompt", "needs 'prompt'", id="empty"),
        pytest.param({"prompt": "a", "sed": 1}, "sed", "takes no 'sed'", id="misspelt"),
        pytest.param({"prompt": "a", "text": "b"}, "text", "given twice", id="both names"),
        pytest.param(
            {"prompt": "a", "width": 5, "image_size": "square"},
            "image_size",
            "not both",
            id="two sizes",
        ),
        pytest.param(
            {"prompt": "a", "lora_url": "s3://a/b"}, "lora_url", "cannot read s3://", id="S3"
        ),
        pytest.param(
            {"prompt": "a", "loras": [{"path": "S3://a/b"}]},
            "loras",
            "cannot read s3://",
            id="S3 inside",
        ),
        pytest.param({"prompt": "a", "width": 5.5, "height": 5}, "width", "whole", id="no pixels"),
        pytest.param({"prompt": "a", "width": True, "height": 5}, "width", "whole", id="true"),
        pytest.param({"prompt": "a", "lora_scale": 1}, "lora_url", "lora_url", id="scale alone"),
        pytest.param(
            {"prompt": "a", "lora_url": "x", "lora_scale": "1"}, "lora_scale", "number", id="text"
        ),
        pytest.param(
            {"prompt": "a", "lora_url": "x", "loras": []}, "lora_url", "not both", id="both"
        ),
    ],
)
def test_an_unaccepted_input_is_an_error_that_lists_the_accepted_ones(
    registry: Registry, inputs: dict[str, Any], name: str, message: str
) -> None:
    with pytest.raises(InvalidInputError, match=message) as raised:
        registry.models["house"].build_body(inputs)
    assert raised.value.name == name


IMAGE = {"image_url": "https://a.example/b"}
STYLE = {"lora_url": "https://a.example/c"}


@pytest.mark.parametrize(
    ("name", "inputs", "endpoint"),
    [
        pytest.param("flux-pro", {}, "fal-ai/flux-pro/v1.1", id="a text"),
        pytest.param("flux-pro", IMAGE, "fal-ai/flux-pro/v1.1-ultra", id="an image"),
        pytest.param("flux-dev", {}, "fal-ai/flux/dev", id="a text for dev"),
        pytest.param("flux-dev", IMAGE, "fal-ai/flux/dev/image-to-image", id="an image for dev"),
        pytest.param("flux-dev", STYLE, "fal-ai/flux-lora", id="a style"),
        pytest.param("flux-dev", IMAGE | STYLE, "fal-ai/flux-lora/image-to-image", id="both"),
        pytest.param("flux-dev", IMAGE | {"mask_url": "https://a.example/d"},
                     "fal-ai/flux-lora/inpainting", id="a mask"),
        pytest.param("flux-lora", IMAGE | STYLE | {"width": 640}, "fal-ai/flux-lora/image-to-image",
                     id="an image and a style"),
        pytest.param("flux-dev", {"sed": 1}, "fal-ai/flux/dev", id="a misspelt input"),
    ],
)  # fmt: skip
def test_the_inputs_select_the_endpoint(name: str, inputs: dict[str, Any], endpoint: str) -> None:
    model = SHIPPED.model(name).for_inputs(["prompt", *inputs])
    assert (model.name, model.endpoint) == (name, endpoint)
    assert SHIPPED.model_at(name, endpoint) == model


def test_inputs_that_no_endpoint_accepts_together_are_an_error() -> None:
    with pytest.raises(InvalidInputError, match="take 'width' together with 'image_url'"):
        SHIPPED.model("flux-pro").for_inputs(["prompt", "image_url", "width"])


def test_an_inverse_input_is_sent_as_one_minus_its_value() -> None:
    ultra = SHIPPED.model("flux-pro").for_inputs(["prompt", "image_url"])
    sent = ultra.build_body({"prompt": "a", **IMAGE, "strength": 0.7})
    assert sent == {"prompt": "a", **IMAGE, "image_prompt_strength": 0.3}
    with pytest.raises(InvalidInputError, match="'strength' must be a number from 0 to 1"):
        ultra.build_body({"prompt": "a", **IMAGE, "strength": 7})


def test_an_unknown_model_is_an_error_that_lists_the_models(registry: Registry) -> None:
    with pytest.raises(InvalidInputError, match=r"no model 'unknown'\. There are house"):
        registry.model("unknown")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        pytest.param({"product": "tea"}, "needs 'headline': the words on", id="missing"),
        pytest.param({"product": " ", "headline": "Hi"}, "1 to 2000", id="empty"),
        pytest.param({"product": "x" * 2001, "headline": "Hi"}, "1 to 2000", id="too long"),
        pytest.param({"product": ["tea"], "headline": "Hi"}, "needs 'product'", id="a list"),
        pytest.param({"town": "Rome"}, "no variable 'town'. It has product,", id="unknown"),
    ],
)
def test_an_invalid_variable_is_an_error_with_its_name(
    values: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidInputError, match=message):
        SHIPPED.templates["billboard"].fill(values)


def test_variables_in_values_are_not_replaced() -> None:
    values = {"product": "$city ${city} {city}", "headline": "$value"}
    assert "$city ${city} {city}" in SHIPPED.templates["billboard"].fill(values)


@pytest.mark.parametrize("name", SHIPPED.templates)
def test_all_templates_have_the_common_variables(name: str) -> None:
    values = {"headline": "Winter Sale", "background_style": "snowy", "avatar_lora": "https://a.b"}
    prompt = SHIPPED.templates[name].fill(values)
    assert "Winter Sale" in prompt
    assert "snowy" in prompt
    assert "https" not in prompt
    assert SHIPPED.templates[name].variable_inputs(values) == {"lora_url": "https://a.b"}
    without = SHIPPED.templates[name].fill({"headline": "Winter Sale"})
    assert "  " not in without
    assert " ," not in without


def test_the_user_s_file_adds_and_replaces(tmp_path: Path) -> None:
    own = tmp_path / "models.toml"
    own.write_text(OWN + '[models.flux-dev]\nendpoint = "me/mine"\n')
    registry = read_registry(own)
    assert registry.models["house"].price == Decimal("0.035")
    assert registry.models["flux-dev"].endpoint == "me/mine"
    assert registry.models["flux-dev"].price is None
    assert {*SHIPPED.models} < {*registry.models}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param("models = 3", "wrong at models", id="no table"),
        pytest.param("x =", "is not TOML", id="no TOML"),
        pytest.param("[model.a]\nendpoint='a/b'", "wrong at model: extra", id="misspelt group"),
        pytest.param("[models.a]\nendpoint='ab'", r"models\.a\.endpoint", id="no endpoint id"),
        pytest.param("[models.a]\nendpoint='a/../b'", r"models\.a\.endpoint", id="dots"),
        pytest.param("[models.a]\nendpoint='a/b'\nprize=1", r"models\.a\.prize", id="misspelt"),
        pytest.param("[models.a]\nendpoint='a/b'\nprice=-1", r"models\.a\.price", id="price"),
        pytest.param("[models.a]\nendpoint='a/b'\nunit='s'", r"models\.a\.unit", id="unit"),
        pytest.param(
            "[templates.a]\nmodel='b'\nprompt='x'", "a model that is not there: 'b'", id="nowhere"
        ),
        pytest.param(
            "[models.b]\nendpoint='a/b'\n[templates.a]\nmodel='b'\nprompt='$x'",
            "same \\$names",
            id="a name without a variable",
        ),
    ],
)
def test_an_invalid_file_is_an_error_with_the_location(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_registry(text)
