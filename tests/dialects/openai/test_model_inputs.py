"""How a request becomes a model's inputs: sizes, counts, formats, pictures, and names."""

from typing import Any

import pytest

from falproxy.dialects.openai.bodies import Upload
from falproxy.dialects.openai.errors import ImagesError, error_from_response, parse_error
from falproxy.dialects.openai.model_inputs import (
    PRESETS,
    SEED_MAX,
    SizeUnknown,
    build_calls,
    size_inputs,
)
from falproxy.dialects.openai.model_schema import InputSchema, ModelSchema, parse_document
from falproxy.dialects.openai.models import ResolvedModel
from falproxy.dialects.openai.schema import EditRequest, GenerationRequest
from falproxy.dialects.queue_client import BufferedResponse
from falproxy.fal.endpoint import DEFAULT_MODELS, is_endpoint
from falproxy.parsers import parse_models
from falproxy.sandbox.model_metadata import openapi_document
from falproxy.sandbox.models import MODELS
from falproxy.spool import Spool

DEV = "fal-ai/flux/dev"
KONTEXT = "fal-ai/flux-pro/kontext"
GPT_SIZES = ("auto", "1024x1024", "1536x1024", "1024x1536")
RATIOS = ("21:9", "16:9", "4:3", "3:2", "1:1", "2:3", "3:4", "9:16", "9:21")
TEXT, NUMBER = frozenset({"string"}), frozenset({"number"})


def words(*choices: str) -> InputSchema:
    return InputSchema(TEXT, choices)


def takes(**inputs: InputSchema) -> ModelSchema:
    return ModelSchema(inputs)


PIXELS = InputSchema(
    frozenset({"object", "string"}), tuple(PRESETS), frozenset({"width", "height", "url"})
)
ANY = takes(image_size=PIXELS)
PRESETS_ONLY = takes(image_size=words(*PRESETS))
RATIO = takes(aspect_ratio=words("auto", *RATIOS))
MODE = takes(resolution_mode=words("auto", "match_input", *RATIOS))
GPT = takes(image_size=words(*GPT_SIZES))
SIDES = takes(width=InputSchema(NUMBER), height=InputSchema(NUMBER))
FREE = takes(aspect_ratio=InputSchema(TEXT, accepts_any_string=True))


@pytest.mark.parametrize(
    ("size", "model", "inputs"),
    [
        pytest.param("1000x600", ANY, {"image_size": {"width": 1000, "height": 600}}, id="pixels"),
        pytest.param("square_hd", ANY, {"image_size": "square_hd"}, id="a preset's own name"),
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
        pytest.param("16:9", RATIO, {"aspect_ratio": "16:9"}, id="a ratio's own name"),
        pytest.param("1024x1024", MODE, {"resolution_mode": "1:1"}, id="a resolution mode"),
        pytest.param("match_input", MODE, {"resolution_mode": "match_input"}, id="a mode's name"),
        pytest.param("1536x1024", GPT, {"image_size": "1536x1024"}, id="one of its sizes"),
        pytest.param("1792x1024", GPT, {"image_size": "1536x1024"}, id="the nearest of its sizes"),
        pytest.param("512x512", GPT, {"image_size": "1024x1024"}, id="the square one"),
        pytest.param("640x480", SIDES, {"width": 640, "height": 480}, id="two inputs"),
        pytest.param("1920x1080", FREE, {"aspect_ratio": "16:9"}, id="a ratio without a list"),
        pytest.param("1024x1024", takes(), {}, id="a model without sizes"),
        pytest.param("1024x1024", takes(image_size=words("small", "large")), {}, id="no shapes"),
        pytest.param("auto", ANY, {}, id="auto"),
        pytest.param("auto", GPT, {}, id="auto where the model has it too"),
        pytest.param(None, ANY, {}, id="nothing said"),
        pytest.param("", ANY, {}, id="nothing in a form"),
    ],
)  # fmt: skip
def test_a_size_in_the_model_s_own_words(
    size: str | None, model: ModelSchema, inputs: dict[str, object]
) -> None:
    assert size_inputs(size, model, "owner/model") == inputs


@pytest.mark.parametrize(
    ("endpoint", "inputs"),
    [
        pytest.param(DEV, {"image_size": {"width": 640, "height": 480}}, id="known to take pixels"),
        pytest.param(KONTEXT, {}, id="unknown"),
    ],
)
def test_without_a_schema_a_size_is_only_sent_where_it_is_right(
    endpoint: str, inputs: dict[str, object]
) -> None:
    assert size_inputs("640x480", None, endpoint) == inputs


@pytest.mark.parametrize("size", ["huge", "1024", "1024*1024", "0x10", "-1x5", "1x", "99999999x1"])
def test_what_is_no_size_is_refused(size: str) -> None:
    with pytest.raises(SizeUnknown):
        size_inputs(size, ANY, DEV)


def model_of(endpoint: str) -> ResolvedModel:
    known = parse_document(openapi_document(MODELS[endpoint]), endpoint)
    assert known is not None
    return ResolvedModel(endpoint, known)


@pytest.mark.parametrize("endpoint", sorted(MODELS))
def test_every_model_of_the_sandbox_is_read(endpoint: str) -> None:
    known = model_of(endpoint).schema
    assert known is not None
    assert known.inputs.keys() == MODELS[endpoint].inputs.keys()
    assert known.can_stream is MODELS[endpoint].streams
    needed = {name for name, given in MODELS[endpoint].inputs.items() if given.is_required}
    assert known.required == needed


@pytest.mark.parametrize(
    "document",
    [
        pytest.param(None, id="null"),
        pytest.param([], id="a list"),
        pytest.param({}, id="nothing"),
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
            id="a schema of itself",
        ),
    ],
)
def test_a_document_that_tells_nothing_is_none(document: object) -> None:
    assert parse_document(document, "x") is None


def body(schema: object) -> dict[str, Any]:
    content = {"application/json": {"schema": schema}}
    return {"paths": {"/o/m": {"post": {"requestBody": {"content": content}}}}}


def test_alternatives_of_an_input_are_taken_together() -> None:
    size = {"anyOf": [{"type": "object", "properties": {"width": {}, "height": {}}},
                      {"enum": ["square"], "type": "string"}, {"type": "null"}]}  # fmt: skip
    count = {"anyOf": [{"type": "integer", "maximum": 6}, {"type": "null"}], "default": 2}
    schema = {"allOf": [{"properties": {"image_size": size, "num_images": count}}]}
    known = parse_document(body(schema), "o/m")
    assert known is not None
    assert known.inputs["image_size"].keys == {"width", "height"}
    assert known.inputs["image_size"].choices == ("square",)
    assert not known.inputs["image_size"].accepts_any_string
    assert known.inputs["num_images"].maximum == 6
    assert known.inputs["num_images"].default == 2


@pytest.mark.parametrize(
    ("known", "text", "value"),
    [
        pytest.param(InputSchema(NUMBER), "3", 3, id="an integer"),
        pytest.param(InputSchema(NUMBER), "3.5", 3.5, id="a number"),
        pytest.param(InputSchema(NUMBER), "many", "many", id="no number, for fal to refuse"),
        pytest.param(InputSchema(frozenset({"boolean"})), "true", True, id="true"),
        pytest.param(InputSchema(frozenset({"boolean"})), "False", False, id="false"),
        pytest.param(InputSchema(TEXT), "3", "3", id="a text of a digit"),
        pytest.param(InputSchema(frozenset({"array"})), '["a"]', ["a"], id="a list"),
        pytest.param(InputSchema(frozenset({"object"})), '{"a": 1}', {"a": 1}, id="an object"),
        pytest.param(InputSchema(frozenset({"array"})), "[" * 99_999, "[" * 99_999, id="too deep"),
    ],
)
def test_a_form_s_text_is_what_the_model_takes(
    known: InputSchema, text: str, value: object
) -> None:
    assert known.parse(text) == value


def generation(**given: Any) -> GenerationRequest:
    return GenerationRequest.model_validate({"prompt": "a heron"} | given)


@pytest.mark.parametrize(
    ("count", "maximum", "sizes"),
    [
        pytest.param(1, 4, [None], id="one"),
        pytest.param(4, 4, [4], id="as many as it makes"),
        pytest.param(5, 4, [4, None], id="one more"),
        pytest.param(10, 4, [4, 4, 2], id="ten"),
        pytest.param(10, 10, [10], id="a model that makes ten"),
        pytest.param(3, 1, [None, None, None], id="a model that makes one"),
        pytest.param(9, None, [4, 4, None], id="a model that does not say"),
    ],
)
def test_many_pictures_are_split_by_the_model_s_own_maximum(
    count: int, maximum: float | None, sizes: list[int | None]
) -> None:
    known = takes(
        num_images=InputSchema(NUMBER, maximum=maximum, default=1), seed=InputSchema(NUMBER)
    )
    made = build_calls(generation(n=count), ResolvedModel(DEV, known))
    assert [one.inputs.get("num_images") for one in made] == sizes
    assert not any(one.is_unshared for one in made)
    seeds = [one.inputs.get("seed") for one in made]
    assert len(set(seeds)) == len(seeds)
    assert seeds[0] is None
    assert all(isinstance(seed, int) and 0 < seed <= SEED_MAX for seed in seeds[1:])


def test_a_number_of_pictures_that_is_not_the_model_s_usual_is_said() -> None:
    known = takes(num_images=InputSchema(NUMBER, maximum=4, default=4))
    assert build_calls(generation(), ResolvedModel(DEV, known))[0].inputs["num_images"] == 1
    assert "num_images" not in build_calls(generation(n=4), ResolvedModel(DEV, known))[0].inputs


def test_seeds_follow_the_pictures_before_them() -> None:
    known = takes(num_images=InputSchema(NUMBER, maximum=2), seed=InputSchema(NUMBER))
    made = build_calls(generation(n=5, seed=100), ResolvedModel(DEV, known))
    assert [one.inputs["seed"] for one in made] == [100, 102, 104]


@pytest.mark.parametrize("known", [None, takes(prompt=InputSchema(TEXT))])
def test_equal_calls_keep_away_from_the_cache(known: ModelSchema | None) -> None:
    made = build_calls(generation(n=3), ResolvedModel(KONTEXT, known))
    assert [one.inputs for one in made] == [{"prompt": "a heron"}] * 3
    assert [one.is_unshared for one in made] == [False, True, True]


@pytest.mark.parametrize(
    ("wanted", "known", "inputs"),
    [
        pytest.param("png", takes(output_format=words("jpeg", "png")), {"output_format": "png"},
                     id="by OpenAI's name"),
        pytest.param("png", takes(format=words("jpeg", "png")), {"format": "png"},
                     id="by another name"),
        pytest.param("jpeg", takes(output_format=words("jpg", "png")), {"output_format": "jpg"},
                     id="by another spelling"),
        pytest.param("webp", takes(output_format=words("jpeg", "png")), {},
                     id="a format that it does not have"),
        pytest.param("webp", takes(output_format=InputSchema(TEXT, accepts_any_string=True)),
                     {"output_format": "webp"}, id="any format"),
        pytest.param("png", takes(), {}, id="a model without formats"),
        pytest.param("png", None, {}, id="a model that nobody knows"),
    ],
)  # fmt: skip
def test_a_format_goes_where_the_model_takes_it(
    wanted: str, known: ModelSchema | None, inputs: dict[str, object]
) -> None:
    (made,) = build_calls(generation(output_format=wanted), ResolvedModel("o/m", known))
    assert made.inputs == {"prompt": "a heron"} | inputs


@pytest.mark.parametrize(
    ("given", "known", "inputs"),
    [
        pytest.param({"quality": "high"}, takes(quality=words("low", "high")),
                     {"quality": "high"}, id="the same parameter with the same value"),
        pytest.param({"quality": "hd"}, takes(quality=words("low", "high")), {},
                     id="the same parameter with another value"),
        pytest.param({"style": "vivid"}, takes(), {}, id="a parameter that it does not have"),
        pytest.param({"style": "vivid"}, None, {}, id="OpenAI's, of a model that nobody knows"),
        pytest.param({"strength": 2}, takes(strength=InputSchema(NUMBER)), {"strength": 2},
                     id="the model's own"),
        pytest.param({"strength": "2"}, takes(strength=InputSchema(NUMBER)), {"strength": "2"},
                     id="of JSON nothing is read anew"),
        pytest.param({"strength": 2}, takes(), {}, id="another model's"),
        pytest.param({"strength": 2}, None, {"strength": 2}, id="a model that nobody knows"),
        pytest.param({"strength": None}, takes(strength=InputSchema(NUMBER)), {}, id="null"),
        pytest.param({"svg": {}, "frame_count": 3}, None, {}, id="what no model of fal's has"),
        pytest.param({"user": "ada", "moderation": "low"}, None, {}, id="for nobody but OpenAI"),
        pytest.param({"seed": 3}, takes(), {}, id="a model without seeds"),
        pytest.param({"image_size": "square"}, ANY, {"image_size": "square"}, id="fal's own word"),
    ],
)  # fmt: skip
def test_the_rest_goes_to_models_that_take_it(
    given: dict[str, object], known: ModelSchema | None, inputs: dict[str, object]
) -> None:
    (made,) = build_calls(generation(**given), ResolvedModel("o/m", known))
    assert made.inputs == {"prompt": "a heron"} | inputs


A, B = Upload(Spool(b"a"), "image/png"), Upload(Spool(b"b"), "image/png")
PICTURE, LIST = InputSchema(TEXT, accepts_any_string=True), InputSchema(frozenset({"array"}))


@pytest.mark.parametrize(
    ("files", "known", "inputs"),
    [
        pytest.param([A], takes(image_url=PICTURE), {"image_url": A}, id="one"),
        pytest.param([A], takes(image_urls=LIST), {"image_urls": [A]}, id="one in a list"),
        pytest.param([A, B], takes(image_urls=LIST), {"image_urls": [A, B]}, id="several"),
        pytest.param([A, B], takes(image_urls=LIST, image_url=PICTURE), {"image_urls": [A, B]},
                     id="several of a model that takes both"),
        pytest.param([A], takes(image_urls=LIST, image_url=PICTURE), {"image_url": A},
                     id="one of a model that takes both"),
        pytest.param([A], ModelSchema({"image_urls": LIST, "image_url": PICTURE},
                                frozenset({"image_urls"})), {"image_urls": [A]},
                     id="one of a model that needs the list"),
        pytest.param([A], None, {"image_url": A}, id="one, and nobody knows"),
        pytest.param([A, B], None, {"image_urls": [A, B]}, id="several, and nobody knows"),
    ],
)  # fmt: skip
def test_files_go_where_the_model_takes_them(
    files: list[Upload], known: ModelSchema | None, inputs: dict[str, object]
) -> None:
    asked = EditRequest(prompt="a heron")
    (made,) = build_calls(asked, ResolvedModel("o/m", known), files)
    assert made.inputs == {"prompt": "a heron"} | inputs


@pytest.mark.parametrize(
    ("place", "known"),
    [
        ("mask_url", takes(image_url=PICTURE, mask_url=PICTURE)),
        ("mask_image_url", takes(image_url=PICTURE, mask_image_url=PICTURE)),
        ("mask_url", None),
    ],
)
def test_a_mask_goes_where_the_model_takes_it(place: str, known: ModelSchema | None) -> None:
    (made,) = build_calls(EditRequest(prompt="a heron"), ResolvedModel("o/m", known), [A], B)
    assert made.inputs[place] == B


@pytest.mark.parametrize(
    ("files", "mask", "endpoint", "param"),
    [
        pytest.param([A], None, DEV, "image", id="a model that takes no picture"),
        pytest.param([A, B], None, KONTEXT, "image", id="two for a model that takes one"),
        pytest.param([A], B, KONTEXT, "mask", id="a model that takes no mask"),
        pytest.param([], None, KONTEXT, "image", id="a model that needs a picture"),
    ],
)
def test_pictures_that_do_not_fit_are_refused(
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
        pytest.param(DEV, ((DEV, DEV),), id="an endpoint is its own name"),
    ],
)
def test_models_are_read_from_a_setting(value: str, models: tuple[tuple[str, str], ...]) -> None:
    assert parse_models(value) == models


@pytest.mark.parametrize(
    "value",
    ["", " , ", "flux", "flux:", ":fal-ai/flux/dev", "a b:fal-ai/flux", "x:https://fal.run/a/b",
     f"a:{DEV},a:{KONTEXT}", "a:fal-ai/flux/requests/1"],
)  # fmt: skip
def test_a_setting_without_sense_is_refused_with_a_sentence(value: str) -> None:
    with pytest.raises(ValueError, match=r"^must "):
        parse_models(value)


def test_the_models_that_are_built_in_are_a_setting_too() -> None:
    assert (
        parse_models(",".join(f"{name}:{model}" for name, model in DEFAULT_MODELS))
        == DEFAULT_MODELS
    )


@pytest.mark.parametrize(
    ("text", "is_one"),
    [
        (DEV, True), ("Owner_1/app.v2/a-b", True), ("flux", False), ("a/", False), ("/a/b", False),
        ("a//b", False), ("a/../b", False), ("a/.b", False), ("a/%2e", False), ("a/b?c", False),
        ("a/b/stream", False), ("a/b/requests", False), ("a/b/Requests/1", False), ("ä/b", False),
        ("a/" * 120 + "b", False), ("a/b\n", False),
    ],
)  # fmt: skip
def test_an_endpoint_id_is_nothing_else(text: str, is_one: bool) -> None:
    assert is_endpoint(text) is is_one


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        pytest.param(b'{"detail": [{"loc": ["body", "image_urls", 0], "msg": "M", "type": "T"}]}',
                     ("T", "M", "image"), id="fal's list"),
        pytest.param(b'{"detail": [{"loc": ["body", "image_size", "width"], "msg": "M"}]}',
                     ("", "M", "size"), id="a place inside"),
        pytest.param(b'{"detail": [{"loc": ["body"], "msg": "M", "type": "T"}]}', ("T", "M", None),
                     id="the whole body"),
        pytest.param(b'{"detail": "D", "error_type": "E"}', ("E", "D", None), id="a sentence"),
        pytest.param(b'{"detail": []}', ("", "", None), id="an empty list"),
        pytest.param(b'{"detail": ["x"]}', ("", "", None), id="a list of texts"),
        pytest.param(b"<html>", ("", "", None), id="a page"),
        pytest.param(b"[1]", ("", "", None), id="no object"),
    ],
)  # fmt: skip
def test_what_fal_says_of_an_error_is_read(
    document: bytes, expected: tuple[str, str, str | None]
) -> None:
    assert parse_error(document) == expected


@pytest.mark.parametrize(
    ("status", "expected"),
    [(400, 400), (413, 400), (422, 400), (404, 404), (429, 429), (401, 500), (403, 500),
     (409, 500), (499, 500), (500, 500), (502, 502), (503, 503), (504, 504), (599, 500)],
)  # fmt: skip
def test_every_status_of_fal_s_has_one_of_openai_s(status: int, expected: int) -> None:
    error = error_from_response(BufferedResponse(status, {}, b""))
    assert (error.status, error.info.status) == (expected, expected)
    assert error.message
