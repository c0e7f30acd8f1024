"""Translation of requests into the inputs of models, model schemas, model names, fal's errors."""

from typing import Any

import pytest

from falproxy.dialects.openai.errors import ImagesError, error_from_response, parse_error
from falproxy.dialects.openai.model_inputs import (
    SEED_MAX,
    SizeUnknown,
    build_calls,
    ignored_parameters,
    require_description,
    size_inputs,
)
from falproxy.dialects.openai.models import ResolvedModel
from falproxy.dialects.openai.request_images import RequestImages, Upload
from falproxy.dialects.openai.schema import EditRequest, GenerationRequest
from falproxy.dialects.queue_client import BufferedResponse
from falproxy.fal.endpoint import DEFAULT_MODELS, is_endpoint
from falproxy.fal.estimates import SIZE_PRESETS
from falproxy.fal.model_schema import InputSchema, ModelSchema, parse_document
from falproxy.parsers import parse_models
from falproxy.sandbox.model_metadata import openapi_document
from falproxy.sandbox.models import MODELS
from falproxy.spool import Spool

DEV = "fal-ai/flux/dev"
KONTEXT = "fal-ai/flux-pro/kontext"
GPT_SIZES = ("auto", "1024x1024", "1536x1024", "1024x1536")
RATIOS = ("21:9", "16:9", "4:3", "3:2", "1:1", "2:3", "3:4", "9:16", "9:21")
TEXT, NUMBER = frozenset({"string"}), frozenset({"number"})


def enum(*choices: str) -> InputSchema:
    return InputSchema(TEXT, choices)


def schema_of(**inputs: InputSchema) -> ModelSchema:
    return ModelSchema(inputs)


PIXELS = InputSchema(
    frozenset({"object", "string"}), tuple(SIZE_PRESETS), frozenset({"width", "height", "url"})
)
PIXEL_SIZE = schema_of(image_size=PIXELS)
PRESETS_ONLY = schema_of(image_size=enum(*SIZE_PRESETS))
RATIO = schema_of(aspect_ratio=enum("auto", *RATIOS))
MODE = schema_of(resolution_mode=enum("auto", "match_input", *RATIOS))
GPT = schema_of(image_size=enum(*GPT_SIZES))
SIDES = schema_of(width=InputSchema(NUMBER), height=InputSchema(NUMBER))
FREE_RATIO = schema_of(aspect_ratio=InputSchema(TEXT, accepts_any_string=True))


@pytest.mark.parametrize(
    ("size", "model", "inputs"),
    [
        pytest.param("1000x600", PIXEL_SIZE,
                     {"image_size": {"width": 1000, "height": 600}}, id="pixels"),
        pytest.param("square_hd", PIXEL_SIZE, {"image_size": "square_hd"}, id="a preset by name"),
        pytest.param("1024x1024", PRESETS_ONLY, {"image_size": "square_hd"}, id="a preset"),
        pytest.param("512x512", PRESETS_ONLY, {"image_size": "square"}, id="a smaller preset"),
        pytest.param("256x256", PRESETS_ONLY, {"image_size": "square"}, id="the nearest area"),
        pytest.param("1792x1024", PRESETS_ONLY, {"image_size": "landscape_16_9"}, id="wide"),
        pytest.param("1024x1792", PRESETS_ONLY, {"image_size": "portrait_16_9"}, id="high"),
        pytest.param("1536x1024", PRESETS_ONLY, {"image_size": "landscape_4_3"},
                     id="3:2 is nearer to 4:3 than to 16:9"),
        pytest.param("1536x1024", RATIO, {"aspect_ratio": "3:2"}, id="a ratio"),
        pytest.param("1920x1080", RATIO, {"aspect_ratio": "16:9"}, id="HD"),
        pytest.param("3000x1000", RATIO, {"aspect_ratio": "21:9"}, id="wider than any"),
        pytest.param("1000x3000", RATIO, {"aspect_ratio": "9:21"}, id="higher than any"),
        pytest.param("1023x1024", RATIO, {"aspect_ratio": "1:1"}, id="nearly square"),
        pytest.param("16:9", RATIO, {"aspect_ratio": "16:9"}, id="the name of a ratio"),
        pytest.param("1024x1024", MODE, {"resolution_mode": "1:1"}, id="a resolution mode"),
        pytest.param("match_input", MODE, {"resolution_mode": "match_input"}, id="a mode by name"),
        pytest.param("1536x1024", GPT, {"image_size": "1536x1024"}, id="one of its sizes"),
        pytest.param("1792x1024", GPT, {"image_size": "1536x1024"}, id="the nearest of its sizes"),
        pytest.param("512x512", GPT, {"image_size": "1024x1024"}, id="the square one"),
        pytest.param("640x480", SIDES, {"width": 640, "height": 480}, id="two inputs"),
        pytest.param("1920x1080", FREE_RATIO, {"aspect_ratio": "16:9"}, id="any ratio"),
        pytest.param("1024x1024", schema_of(), {}, id="a model without sizes"),
        pytest.param("1024x1024", schema_of(image_size=enum("small", "large")), {},
                     id="values that are not shapes"),
        pytest.param("auto", PIXEL_SIZE, {}, id="auto"),
        pytest.param("auto", GPT, {}, id="auto, which the model has too"),
        pytest.param(None, PIXEL_SIZE, {}, id="missing"),
        pytest.param("", PIXEL_SIZE, {}, id="empty in a form"),
    ],
)  # fmt: skip
def test_a_size_is_translated_into_inputs_of_the_model(
    size: str | None, model: ModelSchema, inputs: dict[str, object]
) -> None:
    assert size_inputs(size, model, "owner/model") == inputs


@pytest.mark.parametrize(
    ("endpoint", "inputs"),
    [
        pytest.param(
            DEV, {"image_size": {"width": 640, "height": 480}}, id="a model with pixel sizes"
        ),
        pytest.param(KONTEXT, {}, id="another model"),
    ],
)
def test_without_a_schema_a_size_is_only_sent_to_known_models(
    endpoint: str, inputs: dict[str, object]
) -> None:
    assert size_inputs("640x480", None, endpoint) == inputs


@pytest.mark.parametrize("size", ["huge", "1024", "1024*1024", "0x10", "-1x5", "1x", "99999999x1"])
def test_an_invalid_size_is_refused(size: str) -> None:
    with pytest.raises(SizeUnknown):
        size_inputs(size, PIXEL_SIZE, DEV)


def model_of(endpoint: str) -> ResolvedModel:
    schema = parse_document(openapi_document(MODELS[endpoint]), endpoint)
    assert schema is not None
    return ResolvedModel(endpoint, schema)


@pytest.mark.parametrize("endpoint", sorted(MODELS))
def test_the_schemas_of_all_models_of_the_sandbox_are_parsed(endpoint: str) -> None:
    schema = model_of(endpoint).schema
    assert schema is not None
    assert schema.inputs.keys() == MODELS[endpoint].inputs.keys()
    assert schema.can_stream is MODELS[endpoint].streams
    required = {name for name, value in MODELS[endpoint].inputs.items() if value.is_required}
    assert schema.required == required


@pytest.mark.parametrize(
    "document",
    [
        pytest.param(None, id="null"),
        pytest.param([], id="a list"),
        pytest.param({}, id="empty"),
        pytest.param({"paths": {"/x": {"post": {"requestBody": 3}}}}, id="no schema"),
        pytest.param(
            {
                "components": {"schemas": {"A": {"$ref": "#/components/schemas/A"}}},
                "paths": {
                    "/x": {
                        "post": {
                            "requestBody": {
                                "content": {
                                    "application/json": {
                                        "schema": {"$ref": "#/components/schemas/A"}
                                    }
                                }
                            }
                        }
                    }
                },
            },
            id="a schema that refers to itself",
        ),
    ],
)
def test_a_document_without_a_schema_is_none(document: object) -> None:
    assert parse_document(document, "x") is None


def body(schema: object) -> dict[str, Any]:
    content = {"application/json": {"schema": schema}}
    return {"paths": {"/o/m": {"post": {"requestBody": {"content": content}}}}}


def test_alternatives_of_an_input_are_combined() -> None:
    size = {"anyOf": [{"type": "object", "properties": {"width": {}, "height": {}}},
                      {"enum": ["square"], "type": "string"}, {"type": "null"}]}  # fmt: skip
    count = {"anyOf": [{"type": "integer", "maximum": 6}, {"type": "null"}], "default": 2}
    schema = {"allOf": [{"properties": {"image_size": size, "num_images": count}}]}
    parsed = parse_document(body(schema), "o/m")
    assert parsed is not None
    assert parsed.inputs["image_size"].keys == {"width", "height"}
    assert parsed.inputs["image_size"].choices == ("square",)
    assert not parsed.inputs["image_size"].accepts_any_string
    assert parsed.inputs["num_images"].maximum == 6
    assert parsed.inputs["num_images"].default == 2


@pytest.mark.parametrize(
    ("schema", "text", "value"),
    [
        pytest.param(InputSchema(NUMBER), "3", 3, id="an integer"),
        pytest.param(InputSchema(NUMBER), "3.5", 3.5, id="a number"),
        pytest.param(InputSchema(NUMBER), "many", "many", id="not a number, which fal refuses"),
        pytest.param(InputSchema(frozenset({"boolean"})), "true", True, id="true"),
        pytest.param(InputSchema(frozenset({"boolean"})), "False", False, id="false"),
        pytest.param(InputSchema(TEXT), "3", "3", id="a string of a digit"),
        pytest.param(InputSchema(frozenset({"array"})), '["a"]', ["a"], id="a list"),
        pytest.param(InputSchema(frozenset({"object"})), '{"a": 1}', {"a": 1}, id="an object"),
        pytest.param(InputSchema(frozenset({"array"})), "[" * 99_999, "[" * 99_999, id="too deep"),
    ],
)
def test_a_string_of_a_form_is_converted(schema: InputSchema, text: str, value: object) -> None:
    assert schema.parse(text) == value


def generation(**params: Any) -> GenerationRequest:
    return GenerationRequest.model_validate({"prompt": "a heron"} | params)


@pytest.mark.parametrize(
    ("count", "maximum", "sizes"),
    [
        pytest.param(1, 4, [None], id="one"),
        pytest.param(4, 4, [4], id="the maximum"),
        pytest.param(5, 4, [4, None], id="one more than the maximum"),
        pytest.param(10, 4, [4, 4, 2], id="ten"),
        pytest.param(10, 10, [10], id="a maximum of ten"),
        pytest.param(3, 1, [None, None, None], id="a maximum of one"),
        pytest.param(9, None, [4, 4, None], id="no maximum"),
    ],
)
def test_images_are_split_into_calls_by_the_maximum_of_the_model(
    count: int, maximum: float | None, sizes: list[int | None]
) -> None:
    schema = schema_of(
        num_images=InputSchema(NUMBER, maximum=maximum, default=1), seed=InputSchema(NUMBER)
    )
    calls = build_calls(generation(n=count), ResolvedModel(DEV, schema))
    assert [call.inputs.get("num_images") for call in calls] == sizes
    assert not any(call.is_unshared for call in calls)
    seeds = [call.inputs.get("seed") for call in calls]
    assert len(set(seeds)) == len(seeds)
    assert seeds[0] is None
    assert all(isinstance(seed, int) and 0 < seed <= SEED_MAX for seed in seeds[1:])


def test_num_images_is_sent_if_it_is_not_the_default() -> None:
    schema = schema_of(num_images=InputSchema(NUMBER, maximum=4, default=4))
    assert build_calls(generation(), ResolvedModel(DEV, schema))[0].inputs["num_images"] == 1
    assert "num_images" not in build_calls(generation(n=4), ResolvedModel(DEV, schema))[0].inputs


def test_seeds_are_offset_by_the_images_before() -> None:
    schema = schema_of(num_images=InputSchema(NUMBER, maximum=2), seed=InputSchema(NUMBER))
    calls = build_calls(generation(n=5, seed=100), ResolvedModel(DEV, schema))
    assert [call.inputs["seed"] for call in calls] == [100, 102, 104]


@pytest.mark.parametrize("schema", [None, schema_of(prompt=InputSchema(TEXT))])
def test_equal_calls_do_not_use_the_cache(schema: ModelSchema | None) -> None:
    calls = build_calls(generation(n=3), ResolvedModel(KONTEXT, schema))
    assert [call.inputs for call in calls] == [{"prompt": "a heron"}] * 3
    assert [call.is_unshared for call in calls] == [False, True, True]


@pytest.mark.parametrize(
    ("output_format", "schema", "inputs"),
    [
        pytest.param("png", schema_of(output_format=enum("jpeg", "png")), {"output_format": "png"},
                     id="by OpenAI's name"),
        pytest.param("png", schema_of(format=enum("jpeg", "png")), {"format": "png"},
                     id="by another name"),
        pytest.param("jpeg", schema_of(output_format=enum("jpg", "png")), {"output_format": "jpg"},
                     id="with another spelling"),
        pytest.param("webp", schema_of(output_format=InputSchema(TEXT, accepts_any_string=True)),
                     {"output_format": "webp"}, id="any format"),
    ],
)  # fmt: skip
def test_a_format_is_sent_by_the_name_of_the_model(
    output_format: str, schema: ModelSchema | None, inputs: dict[str, object]
) -> None:
    (call,) = build_calls(generation(output_format=output_format), ResolvedModel("o/m", schema))
    assert call.inputs == {"prompt": "a heron"} | inputs


WITHOUT_MASK = {"image_url": InputSchema(TEXT, accepts_any_string=True)}
STYLES = [{"path": "https://a.example/b.safetensors"}]


@pytest.mark.parametrize(
    ("params", "schema", "param"),
    [
        pytest.param({"output_format": "webp"}, schema_of(output_format=enum("jpeg", "png")),
                     "output_format", id="a format that the model does not have"),
        pytest.param({"output_format": "png"}, schema_of(), "output_format",
                     id="a format of a model without formats"),
        pytest.param({"size": "1024x1024"}, schema_of(), "size", id="a model without sizes"),
        pytest.param({"size": "1024x1024"}, schema_of(image_size=enum("small", "large")), "size",
                     id="values that are not shapes"),
        pytest.param({"background": "transparent"}, schema_of(), "background",
                     id="a transparent background"),
        pytest.param({"background": "transparent"}, schema_of(background=enum("auto", "opaque")),
                     "background", id="a background that the model does not have"),
        pytest.param({"image_url": "https://a.example/b"}, schema_of(), "image_url", id="an image"),
        pytest.param({"image_urls": ["https://a.example/b"]}, ModelSchema(WITHOUT_MASK),
                     "image_urls", id="images for a model that takes one"),
        pytest.param({"mask_url": "https://a.example/b"}, ModelSchema(WITHOUT_MASK), "mask_url",
                     id="a mask"),
        pytest.param({"init_image": "iVBORw0KGgo="}, schema_of(), "init_image",
                     id="an image by the name of another API"),
        pytest.param({"maskUrl": {"url": "x"}}, schema_of(), "maskUrl", id="a mask in camel case"),
        pytest.param({"reference": "https://a.example/b"}, schema_of(), "reference",
                     id="a URL by any name"),
        pytest.param({"reference": "data:image/png;base64,AA=="}, schema_of(), "reference",
                     id="a data URI by any name"),
        pytest.param({"references": [{"file_id": "file-1"}]}, schema_of(), "references",
                     id="an uploaded file"),
        pytest.param({"markup": {"image_url": "https://a.example/b"}}, schema_of(), "markup",
                     id="markup"),
        pytest.param({"loras": STYLES}, schema_of(), "loras", id="LoRAs"),
        pytest.param({"size": "640x640", "image_size": "square"}, PIXEL_SIZE, "image_size",
                     id="a size by both names"),
    ],
)  # fmt: skip
def test_a_parameter_that_determines_the_image_is_refused_if_the_model_lacks_it(
    params: dict[str, object], schema: ModelSchema, param: str
) -> None:
    with pytest.raises(ImagesError) as caught:
        build_calls(generation(**params), ResolvedModel("o/m", schema))
    assert (caught.value.status, caught.value.info.param) == (400, param)
    assert param.partition("_")[0] in str(caught.value)


@pytest.mark.parametrize(
    ("params", "ignored"),
    [
        pytest.param({"quality": "high", "style": "vivid"}, ["quality", "style"], id="of OpenAI"),
        pytest.param({"strength": 2, "negative_prompt": "people"}, ["strength", "negative_prompt"],
                     id="of other models"),
        pytest.param({"seed": 3, "svg": {}}, ["seed", "svg"], id="a seed"),
        pytest.param({"n": 2, "user": "ada", "stream": True, "partial_images": 1,
                      "response_format": "url", "model": "x"}, [], id="served by the proxy"),
        pytest.param({"quality": "auto", "background": "auto", "size": "auto", "style": None}, [],
                     id="defaults"),
        pytest.param({"max_images": "2", "num_steps": 3}, ["max_images", "num_steps"],
                     id="numbers by names of images"),
    ],
)  # fmt: skip
def test_other_parameters_that_the_model_lacks_are_listed(
    params: dict[str, object], ignored: list[str]
) -> None:
    parsed = generation(**params)
    first, *_ = build_calls(parsed, ResolvedModel("o/m", schema_of()))
    assert sorted(ignored_parameters(parsed, first.inputs)) == sorted(ignored)


IMAGES, MASK = RequestImages(images=["https://a.example/b"]), RequestImages(mask="data:,")


@pytest.mark.parametrize(
    ("params", "images", "endpoint", "param"),
    [
        pytest.param({"size": "640x480"}, RequestImages(), KONTEXT, "size", id="a size"),
        pytest.param({"size": "640x480"}, RequestImages(), DEV, None,
                     id="a size of a model that certainly takes it"),
        pytest.param({"size": "auto"}, RequestImages(), KONTEXT, None, id="any size"),
        pytest.param({"output_format": "png"}, RequestImages(), DEV, "output_format",
                     id="a format"),
        pytest.param({"background": "transparent"}, RequestImages(), DEV, "background",
                     id="a background"),
        pytest.param({"background": "opaque"}, RequestImages(), DEV, None, id="the default"),
        pytest.param({}, IMAGES, KONTEXT, None, id="an image for a model that needs one"),
        pytest.param({}, IMAGES, DEV, "image", id="an image for any model"),
        pytest.param({"image_url": "https://a.example/b"}, RequestImages(), DEV, "image_url",
                     id="an image by the name of fal"),
        pytest.param({"image_url": "https://a.example/b"}, RequestImages(), KONTEXT, None,
                     id="an image by the name of fal for a model that needs one"),
        pytest.param({"mask_url": "https://a.example/b"}, RequestImages(), KONTEXT, "mask_url",
                     id="a mask by the name of fal"),
        pytest.param({"loras": STYLES}, RequestImages(), DEV, "loras", id="LoRAs"),
        pytest.param({}, MASK, KONTEXT, "mask", id="a mask"),
        pytest.param({}, MASK, "fal-ai/flux-lora/inpainting", None,
                     id="a mask for a model that needs one"),
        pytest.param({"seed": 3, "strength": 0.5}, RequestImages(), DEV, None, id="other inputs"),
    ],
)  # fmt: skip
def test_without_a_schema_a_request_that_depends_on_it_is_a_503(
    params: dict[str, object], images: RequestImages, endpoint: str, param: str | None
) -> None:
    model = ResolvedModel(endpoint, None)
    if param is None:
        require_description(generation(**params), model, images)
        return
    with pytest.raises(ImagesError, match=f"and {param} needs it. Try again soon") as caught:
        require_description(generation(**params), model, images)
    assert (caught.value.status, caught.value.headers) == (503, {"Retry-After": "5"})


@pytest.mark.parametrize(
    ("params", "schema", "inputs"),
    [
        pytest.param({"quality": "high"}, schema_of(quality=enum("low", "high")),
                     {"quality": "high"}, id="the same parameter with the same value"),
        pytest.param({"quality": "hd"}, schema_of(quality=enum("low", "high")), {},
                     id="the same parameter with another value"),
        pytest.param({"style": "vivid"}, schema_of(), {},
                     id="a parameter that the model does not have"),
        pytest.param({"style": "vivid"}, None, {}, id="of OpenAI only, no schema"),
        pytest.param({"strength": 2}, schema_of(strength=InputSchema(NUMBER)), {"strength": 2},
                     id="an input of the model"),
        pytest.param({"strength": "2"}, schema_of(strength=InputSchema(NUMBER)), {"strength": "2"},
                     id="a string in JSON is not converted"),
        pytest.param({"strength": 2}, schema_of(), {}, id="an input of another model"),
        pytest.param({"strength": 2}, None, {"strength": 2}, id="no schema"),
        pytest.param({"strength": None}, schema_of(strength=InputSchema(NUMBER)), {}, id="null"),
        pytest.param({"svg": {}, "frame_count": 3}, None, {},
                     id="parameters that no model of fal has"),
        pytest.param({"user": "ada", "moderation": "low"}, None, {},
                     id="parameters of OpenAI only"),
        pytest.param({"seed": 3}, schema_of(), {}, id="a model without seeds"),
        pytest.param({"image_url": ""}, ModelSchema(WITHOUT_MASK), {}, id="an empty image"),
        pytest.param({"image_url": [], "mask_url": ""}, schema_of(), {}, id="no images, no mask"),
        pytest.param({"image_size": "square"}, PIXEL_SIZE, {"image_size": "square"},
                     id="an input of fal for the size"),
    ],
)  # fmt: skip
def test_other_parameters_are_sent_to_models_that_have_them(
    params: dict[str, object], schema: ModelSchema | None, inputs: dict[str, object]
) -> None:
    (call,) = build_calls(generation(**params), ResolvedModel("o/m", schema))
    assert call.inputs == {"prompt": "a heron"} | inputs


A, B = Upload(Spool(b"a"), "image/png"), Upload(Spool(b"b"), "image/png")
IMAGE, LIST = InputSchema(TEXT, accepts_any_string=True), InputSchema(frozenset({"array"}))


@pytest.mark.parametrize(
    ("files", "schema", "inputs"),
    [
        pytest.param([A], schema_of(image_url=IMAGE), {"image_url": A}, id="one"),
        pytest.param([A], schema_of(image_urls=LIST), {"image_urls": [A]}, id="one in a list"),
        pytest.param([A, B], schema_of(image_urls=LIST), {"image_urls": [A, B]}, id="several"),
        pytest.param([A, B], schema_of(image_urls=LIST, image_url=IMAGE), {"image_urls": [A, B]},
                     id="several, and the model has both inputs"),
        pytest.param([A], schema_of(image_urls=LIST, image_url=IMAGE), {"image_url": A},
                     id="one, and the model has both inputs"),
        pytest.param([A], ModelSchema({"image_urls": LIST, "image_url": IMAGE},
                                frozenset({"image_urls"})), {"image_urls": [A]},
                     id="one, and the list is required"),
        pytest.param([A, B], schema_of(images=LIST), {"images": [A, B]}, id="by another name"),
        pytest.param([A], schema_of(image=IMAGE), {"image": A}, id="one by another name"),
        pytest.param(["https://a.example/b", A], schema_of(image_urls=LIST),
                     {"image_urls": ["https://a.example/b", A]}, id="a URL and a file"),
        pytest.param([A], None, {"image_url": A}, id="one, no schema"),
        pytest.param([A, B], None, {"image_urls": [A, B]}, id="several, no schema"),
    ],
)  # fmt: skip
def test_files_are_sent_in_the_image_input_of_the_model(
    files: list[Upload], schema: ModelSchema | None, inputs: dict[str, object]
) -> None:
    params = EditRequest(prompt="a heron")
    (call,) = build_calls(params, ResolvedModel("o/m", schema), files)
    assert call.inputs == {"prompt": "a heron"} | inputs


@pytest.mark.parametrize(
    ("name", "schema"),
    [
        ("mask", schema_of(image_url=IMAGE, mask=IMAGE)),
        ("mask_url", schema_of(image_url=IMAGE, mask_url=IMAGE)),
        ("mask_image_url", schema_of(image_url=IMAGE, mask_image_url=IMAGE)),
        ("mask_url", None),
    ],
)
def test_a_mask_is_sent_in_the_mask_input_of_the_model(
    name: str, schema: ModelSchema | None
) -> None:
    (call,) = build_calls(EditRequest(prompt="a heron"), ResolvedModel("o/m", schema), [A], B)
    assert call.inputs[name] == B


@pytest.mark.parametrize(
    ("files", "mask", "endpoint", "param"),
    [
        pytest.param([A], None, DEV, "image", id="a model without image inputs"),
        pytest.param([A, B], None, KONTEXT, "image", id="two for a model with one image input"),
        pytest.param([A], B, KONTEXT, "mask", id="a model without mask inputs"),
        pytest.param([], None, KONTEXT, "image", id="a model that requires an image"),
    ],
)
def test_images_that_the_model_does_not_support_are_refused(
    files: list[Upload], mask: Upload | None, endpoint: str, param: str
) -> None:
    with pytest.raises(ImagesError) as caught:
        build_calls(EditRequest(prompt="a heron"), model_of(endpoint), files, mask)
    assert (caught.value.status, caught.value.info.param) == (400, param)


@pytest.mark.parametrize(
    ("value", "models"),
    [
        pytest.param("flux:fal-ai/flux/dev", (("flux", DEV),), id="one"),
        pytest.param(f" a:{DEV} , b:{KONTEXT},", (("a", DEV), ("b", KONTEXT)), id="two"),
        pytest.param(DEV, ((DEV, DEV),), id="an endpoint without a name"),
    ],
)
def test_models_are_parsed_from_a_setting(value: str, models: tuple[tuple[str, str], ...]) -> None:
    assert parse_models(value) == models


@pytest.mark.parametrize(
    "value",
    ["", " , ", "flux", "flux:", ":fal-ai/flux/dev", "a b:fal-ai/flux", "x:https://fal.run/a/b",
     f"a:{DEV},a:{KONTEXT}", "a:fal-ai/flux/requests/1"],
)  # fmt: skip
def test_an_invalid_setting_is_refused_with_a_sentence(value: str) -> None:
    with pytest.raises(ValueError, match=r"^must "):
        parse_models(value)


def test_the_sandbox_has_the_default_models() -> None:
    assert {endpoint for _, endpoint in DEFAULT_MODELS} <= {*MODELS}


def test_the_default_models_are_a_valid_setting() -> None:
    assert (
        parse_models(",".join(f"{name}:{model}" for name, model in DEFAULT_MODELS))
        == DEFAULT_MODELS
    )


@pytest.mark.parametrize(
    ("text", "is_valid"),
    [
        (DEV, True), ("Owner_1/app.v2/a-b", True), ("flux", False), ("a/", False), ("/a/b", False),
        ("a//b", False), ("a/../b", False), ("a/.b", False), ("a/%2e", False), ("a/b?c", False),
        ("a/b/stream", False), ("a/b/requests", False), ("a/b/Requests/1", False), ("ä/b", False),
        ("a/" * 120 + "b", False), ("a/b\n", False),
    ],
)  # fmt: skip
def test_endpoint_ids_are_recognized(text: str, is_valid: bool) -> None:
    assert is_endpoint(text) is is_valid


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        pytest.param(b'{"detail": [{"loc": ["body", "image_urls", 0], "msg": "M", "type": "T"}]}',
                     ("T", "M", "image"), id="a model error"),
        pytest.param(b'{"detail": [{"loc": ["body", "image_size", "width"], "msg": "M"}]}',
                     ("", "M", "size"), id="a nested location"),
        pytest.param(b'{"detail": [{"loc": ["body"], "msg": "M", "type": "T"}]}', ("T", "M", None),
                     id="the whole body"),
        pytest.param(b'{"detail": "D", "error_type": "E"}', ("E", "D", None), id="a string"),
        pytest.param(b'{"detail": []}', ("", "", None), id="an empty list"),
        pytest.param(b'{"detail": ["x"]}', ("", "", None), id="a list of strings"),
        pytest.param(b"<html>", ("", "", None), id="HTML"),
        pytest.param(b"[1]", ("", "", None), id="not an object"),
    ],
)  # fmt: skip
def test_errors_of_fal_are_parsed(document: bytes, expected: tuple[str, str, str | None]) -> None:
    assert parse_error(document) == expected


@pytest.mark.parametrize(
    ("status", "expected"),
    [(400, 400), (413, 400), (422, 400), (404, 404), (429, 429), (401, 500), (403, 500),
     (409, 500), (499, 500), (500, 500), (502, 502), (503, 503), (504, 504), (599, 500)],
)  # fmt: skip
def test_statuses_of_fal_are_converted(status: int, expected: int) -> None:
    error = error_from_response(BufferedResponse(status, {}, b""))
    assert (error.status, error.info.status) == (expected, expected)
    assert error.message
