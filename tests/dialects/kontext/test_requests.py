"""Requests of the Kontext paths: each parameter, and all ways to send an image."""

import base64
import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, strategies

from falproxy.dialects.json_body import HALF_PAIR_MESSAGE
from falproxy.dialects.kontext.requests import (
    EXAMPLE_IMAGE,
    STRING_MAX,
    VARIANTS,
    Edit,
    KontextResult,
    parse_edit,
)
from falproxy.errors import ProxyError
from falproxy.spool import Spool
from tests.support.image_samples import png_header
from tests.support.kontext_parameters import ALL, CELLS, GIF, PARAMETERS, uri

PNG = png_header(64, 48) + bytes(100)
JPEG = b"\xff\xd8\xff\xe0" + bytes(100)
MIB = 2**20


def parse(body: object, variant: str = "kontext") -> Edit:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return parse_edit(Spool(content), VARIANTS[variant])


def fal_input(body: object, variant: str = "kontext") -> dict[str, Any]:
    """Return fal's input for a request."""
    document = json.loads(parse(body, variant).body)
    assert isinstance(document, dict)
    return document


def parse_error(body: object, variant: str = "kontext") -> ProxyError:
    with pytest.raises(ProxyError) as caught:
        parse(body, variant)
    assert caught.value.status == 400
    return caught.value


URL = "https://example.com/a.png"
EDIT = {"prompt": "make it blue", "image_url": URL}


@pytest.mark.parametrize(("name", "variant"), CELLS)
def test_a_valid_parameter_is_sent_in_the_type_of_fal(name: str, variant: str) -> None:
    parameter = PARAMETERS[name]
    for value, received in parameter.valid:
        expected = EDIT | ({name: received} if variant in parameter.variants else {})
        document = fal_input(EDIT | {name: value}, variant)
        assert document == expected
        assert type(document.get(name)) is type(expected.get(name)) or name == "guidance_scale"


@pytest.mark.parametrize(("name", "variant"), CELLS)
def test_an_invalid_parameter_is_refused_or_dropped(name: str, variant: str) -> None:
    parameter = PARAMETERS[name]
    for value in parameter.invalid:
        if variant in parameter.variants:
            error = parse_error(EDIT | {name: value}, variant)
            assert error.code == "parameter_invalid", value
            assert error.message == f"{name} must be {parameter.description}."
        else:
            assert fal_input(EDIT | {name: value}, variant) == EDIT


@pytest.mark.parametrize(("name", "variant"), CELLS)
def test_null_is_the_same_as_missing(name: str, variant: str) -> None:
    assert fal_input(EDIT | {name: None}, variant) == EDIT


@pytest.mark.parametrize("variant", ALL)
def test_unknown_parameters_are_ignored(variant: str) -> None:
    more = {"strength": 0.5, "loras": [{"path": "x"}], "image_size": None, "": 1, "Seed": "x"}
    assert fal_input(EDIT | more, variant) == EDIT
    assert parse(EDIT | more, variant).ignored == ("strength", "loras", "", "Seed")


@pytest.mark.parametrize("variant", ALL)
@pytest.mark.parametrize(
    ("name", "value"),
    [
        pytest.param("mask_url", URL, id="a mask"),
        pytest.param("mask", EXAMPLE_IMAGE, id="a mask in base64"),
        pytest.param("mask_image", {"url": URL}, id="a mask in an object"),
        pytest.param("image_urls", [URL], id="several images"),
        pytest.param("images", [{"image_url": URL}], id="images of OpenAI"),
        pytest.param("image", "data:image/png;base64,AA==", id="an image by another name"),
        pytest.param("image_2", URL, id="a second image"),
        pytest.param("imageUrl", "x", id="camel case"),
        pytest.param("reference", URL, id="a URL by any name"),
        pytest.param("mask_url", "A" * (STRING_MAX + 4), id="a very long one"),
    ],
)
def test_an_image_that_no_variant_has_is_refused(name: str, value: object, variant: str) -> None:
    error = parse_error(EDIT | {name: value}, variant)
    assert (error.status, error.code) == (400, "image_not_supported")
    assert error.message == f"{name} is not supported: send one image, as image_url or image_data."


@pytest.mark.parametrize("variant", ALL)
def test_the_table_has_every_parameter(variant: str) -> None:
    names = {name for name, parameter in PARAMETERS.items() if variant in parameter.variants}
    assert {*VARIANTS[variant].request.model_fields} == names | {
        "prompt", "image_url", "image_data",
    }  # fmt: skip


@pytest.mark.parametrize(
    "prompt",
    [
        pytest.param(None, id="null"),
        pytest.param("", id="empty"),
        pytest.param(" \n\t", id="blank"),
        pytest.param(3, id="a number"),
        pytest.param(["a cat"], id="a list"),
    ],
)
def test_a_prompt_is_a_non_empty_string(prompt: object) -> None:
    error = parse_error(EDIT | {"prompt": prompt})
    assert error.message == "prompt must be a text that is not empty."


def test_half_a_surrogate_pair_is_not_an_empty_prompt() -> None:
    error = parse_error(EDIT | {"prompt": "half a pair: \ud800"})
    assert (error.status, error.code) == (400, "body_unreadable")
    assert error.message == HALF_PAIR_MESSAGE


def test_a_prompt_is_required() -> None:
    error = parse_error({"image_url": URL})
    assert error.message == "prompt must be a text that is not empty."


@pytest.mark.parametrize("prompt", ["ü 東京 🎨", 'a "quoted"\nline\\', "x" * 20_000])
def test_a_prompt_is_sent_unchanged(prompt: str) -> None:
    edit = parse(EDIT | {"prompt": prompt})
    assert (edit.prompt, json.loads(edit.body)["prompt"]) == (prompt, prompt)


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"{", id="incomplete"),
        pytest.param(b"[]", id="a list"),
        pytest.param(b'"text"', id="a string"),
        pytest.param(b"null", id="null"),
        pytest.param(b'{"prompt": "a", "prompt": "b"}', id="a key twice"),
        pytest.param(b'{"seed": NaN}', id="NaN"),
        pytest.param(b'{"seed": 1e999}', id="beyond the largest float"),
        pytest.param(b'{"seed": ' + b"9" * 5000 + b"}", id="thousands of digits"),
        pytest.param(b'{"prompt": "\xff"}', id="not UTF-8"),
        pytest.param(b'{"a": ' + b"[" * 5000 + b"]" * 5000 + b"}", id="nested too deeply"),
    ],
)
def test_a_body_is_one_json_object(body: bytes) -> None:
    assert parse_error(body).code == "body_unreadable"


JSON = strategies.recursive(
    strategies.none() | strategies.booleans() | strategies.integers() | strategies.floats()
    | strategies.text() | strategies.sampled_from([EXAMPLE_IMAGE, URL, "data:,", "data:;base64,A"]),
    lambda inner: strategies.lists(inner, max_size=3)
    | strategies.dictionaries(strategies.text(max_size=3), inner, max_size=3),
    max_leaves=4,
)  # fmt: skip
NAMES = strategies.sampled_from(
    [*PARAMETERS, "prompt", "image_url", "image_data", "other", "\ud800"]
)


@given(body=JSON | strategies.dictionaries(NAMES, JSON), variant=strategies.sampled_from(ALL))
def test_any_body_is_parsed_or_refused(body: object, variant: str) -> None:
    refusal = None
    try:
        document = fal_input(body, variant)
    except ProxyError as error:
        refusal = error
    else:
        assert document.keys() <= VARIANTS[variant].request.model_fields.keys() - {"image_data"}
    assert refusal is None or refusal.status == 400


# One image


@pytest.mark.parametrize(
    ("params", "code"),
    [
        pytest.param({}, "image_missing", id="none"),
        pytest.param({"image_url": None}, "image_missing", id="null"),
        pytest.param({"image_url": None, "image_data": None}, "image_missing", id="null twice"),
        pytest.param({"image_url": URL, "image_data": EXAMPLE_IMAGE}, "image_ambiguous", id="both"),
        pytest.param({"image_url": "", "image_data": ""}, "image_ambiguous", id="both empty"),
    ],
)
def test_exactly_one_image_is_required(params: dict[str, object], code: str) -> None:
    error = parse_error({"prompt": "a cat"} | params)
    assert (error.code, error.message) == (code, "Send exactly one of image_url and image_data.")


@pytest.mark.parametrize("null", ["image_url", "image_data"])
def test_the_other_image_may_be_null(null: str) -> None:
    params = {"image_url": URL, "image_data": EXAMPLE_IMAGE} | {null: None}
    assert fal_input({"prompt": "a cat"} | params)["image_url"]


@pytest.mark.parametrize(
    "url",
    [
        URL,
        "http://example.com/a.png?b=c&d=%20#e",
        "HTTPS://EXAMPLE.COM/A.PNG",
        "https://[2606:4700::1111]:8443/a",
        "https://example.com/ü.png",
    ],
)
def test_a_url_is_sent_unchanged(url: str) -> None:
    edit = parse({"prompt": "a cat", "image_url": url})
    assert json.loads(edit.body)["image_url"] == url
    assert (edit.image_param, edit.image) == ("image_url", None)


@pytest.mark.parametrize(
    "url", ["", "a.png", "ftp://a.example/b", "//a.example/b", "http://", "https:///a", "http://[::",
            "http://a:b", "http://a:0", "http://a:65536", "http://a/\ud800", "http://a/\n",
            " https://a.example", "file:///etc/passwd", EXAMPLE_IMAGE, 3, ["https://a.example"]]
)  # fmt: skip
def test_an_invalid_url_is_refused(url: object) -> None:
    error = parse_error({"prompt": "a cat", "image_url": url})
    assert error.message == "image_url must be an http(s) URL or a data URI."


@pytest.mark.parametrize("name", ["image_data", "image_url"])
@pytest.mark.parametrize("content", [PNG, JPEG, JPEG + b"\xfb\xff\xfe"], ids=["png", "jpeg", "+/"])
@pytest.mark.parametrize(
    "format_base64",
    [
        pytest.param(lambda text: text, id="plain"),
        pytest.param(lambda text: text.rstrip("="), id="without padding"),
        pytest.param(lambda text: f"{text.rstrip('=')}====", id="too much padding"),
        pytest.param(lambda text: text.translate({43: "-", 47: "_"}), id="url-safe"),
        pytest.param(lambda text: "\r\n".join((text[:76], text[76:])), id="in lines"),
        pytest.param(lambda text: f" \t{text}\n", id="white space around"),
    ],
)
def test_all_forms_of_base64_give_the_same_data_uri(
    name: str, content: bytes, format_base64: Callable[[str], str]
) -> None:
    media_type = "image/png" if content == PNG else "image/jpeg"
    text = format_base64(base64.b64encode(content).decode())
    prefixes = [
        "",
        "data:image/png;base64,",
        "data:image/jpeg;base64,",
        "DATA:;BASE64,",
        "data:x;base64,",
    ]
    for prefix in prefixes[name == "image_url" :]:
        edit = parse({"prompt": "a cat", name: prefix + text})
        assert json.loads(edit.body)["image_url"] == uri(content, media_type)
        assert (edit.image_param, edit.image) == (name, content)


def test_a_data_uri_without_base64_is_supported() -> None:
    text = "data:image/png," + "".join(f"%{byte:02x}" for byte in PNG)
    assert parse({"prompt": "a cat", "image_url": text}).image == PNG


@pytest.mark.parametrize(
    ("text", "code", "message"),
    [
        pytest.param("", "image_missing", "image_data is empty.", id="empty"),
        pytest.param(" \n", "image_missing", "image_data is empty.", id="blank"),
        pytest.param("data:image/png;base64,", "image_missing", "empty", id="an empty data URI"),
        pytest.param("data:image/png;base64", "image_unreadable", "base64", id="no comma"),
        pytest.param("====", "image_missing", "empty", id="padding only"),
        pytest.param("!!!", "image_unreadable", "base64", id="not base64"),
        pytest.param(EXAMPLE_IMAGE[:41], "image_unreadable", "base64", id="an extra letter"),
        pytest.param(f"{EXAMPLE_IMAGE}!", "image_unreadable", "base64", id="characters after it"),
        pytest.param(
            f"{EXAMPLE_IMAGE},{EXAMPLE_IMAGE}", "image_unreadable", "base64", id="two of them"
        ),
        pytest.param(URL, "image_unreadable", "base64", id="a URL"),
        pytest.param("aGVsbG8=", "unsupported_image_format", "the bytes are text", id="text"),
        pytest.param(uri(GIF), "unsupported_image_format", "a GIF image", id="a GIF"),
        pytest.param(
            uri(b"RIFF\0\0\0\0WEBPVP8 "), "unsupported_image_format", "a WEBP image", id="a WebP"
        ),
        pytest.param(
            uri(png_header(10_000, 10_000)), "image_too_large", "pixels", id="too many pixels"
        ),
    ],
)
def test_data_that_is_not_an_image_is_refused(text: str, code: str, message: str) -> None:
    error = parse_error({"prompt": "a cat", "image_data": text})
    assert error.code == code
    assert error.message.startswith("image_data")
    assert message in error.message


@pytest.mark.parametrize("value", [3, True, [EXAMPLE_IMAGE], {"url": EXAMPLE_IMAGE}])
def test_image_data_is_a_string(value: object) -> None:
    error = parse_error({"prompt": "a cat", "image_data": value})
    assert error.message == "image_data must be the base64 of an image of at most 10 MB."


@pytest.mark.parametrize("name", ["image_data", "image_url"])
def test_an_image_has_at_most_ten_mb(name: str) -> None:
    for size in (10 * MIB - 1, 10 * MIB):
        body = {"prompt": "a cat", name: uri(JPEG.ljust(size, b"\0"))}
        assert len(parse(body).image or b"") == size
    error = parse_error({"prompt": "a cat", name: uri(JPEG.ljust(10 * MIB + 1, b"\0"))})
    assert error.code == "file_too_large"
    assert error.message.startswith(f"{name}: ")


def test_a_string_above_the_limit_is_refused() -> None:
    error = parse_error({"prompt": "a cat", "image_data": "A" * (STRING_MAX + 4)})
    assert error.message == "image_data must be the base64 of an image of at most 10 MB."


# Schemas


@pytest.mark.parametrize("variant", ALL)
def test_the_schema_describes_every_parameter(variant: str) -> None:
    schema = VARIANTS[variant].request.model_json_schema()
    assert schema["required"] == ["prompt"]
    for name, field in schema["properties"].items():
        assert field["description"], name
        assert field["examples"], name
    assert schema["properties"]["num_images"]["anyOf"][0] == {
        "type": "integer", "minimum": 1, "maximum": 4,
    }  # fmt: skip


@pytest.mark.parametrize("variant", ALL)
def test_the_examples_are_valid_requests(variant: str) -> None:
    schema = VARIANTS[variant].request.model_json_schema()
    for example in schema["examples"]:
        assert parse(example, variant).prompt == example["prompt"]
    for name, field in schema["properties"].items():
        for example in field["examples"]:
            image = {} if name.startswith("image_") else {"image_url": URL}
            parse({"prompt": "a cat"} | image | {name: example}, variant)


def test_the_result_has_a_schema() -> None:
    schema = KontextResult.model_json_schema()
    assert schema["required"] == ["images", "prompt"]
    assert schema["$defs"]["KontextImage"]["required"] == ["url", "width", "height"]
