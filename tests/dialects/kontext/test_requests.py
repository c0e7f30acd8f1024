"""What `/kontext` and its variants take: each parameter, and every spelling of an image."""

import base64
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given, strategies

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
from tests.media.test_image_rules import png_header

PRO = ("kontext", "kontext/max")
DEV = ("kontext/dev",)
ALL = (*PRO, *DEV)
PNG = png_header(64, 48) + bytes(100)
JPEG = b"\xff\xd8\xff\xe0" + bytes(100)
GIF = b"GIF89a\x01\x00\x01\x00\x00\x00\x00;"
MIB = 2**20
RATIOS = ("21:9", "16:9", "4:3", "3:2", "1:1", "2:3", "3:4", "9:16", "9:21")
MODES = ("auto", "match_input", "1:1", "16:9", "21:9", "3:2", "2:3", "4:5", "5:4", "3:4", "4:3",
         "9:16", "9:21")  # fmt: skip


@dataclass(frozen=True)
class Row:
    """A parameter. variants: which take it; taken: values as they are sent here and as they reach
    fal; refused: values that do not fit; accepted: what the refusal says."""

    variants: tuple[str, ...]
    taken: list[tuple[object, object]]
    refused: list[object]
    accepted: str


def same(*values: object) -> list[tuple[object, object]]:
    return [(value, value) for value in values]


NO_FLAGS = ["true", "", 0, 1, 1.0, [], {}]
TABLE = {
    "seed": Row(
        ALL,
        [*same(0, 42, -1, 2**64), (3.0, 3), (-7.0, -7)],
        ["3", "", True, False, 3.5, 1e300, [], [3], {}],
        "a whole number",
    ),
    "guidance_scale": Row(
        ALL,
        same(1, 1.0, 3.5, 20, 20.0),
        [0, 0.99, 20.01, 21, -3, 10**400, "3.5", True, [], {}],
        "a number from 1 to 20",
    ),
    "sync_mode": Row(ALL, same(True, False), NO_FLAGS, "true or false"),
    "num_images": Row(
        ALL,
        [*same(1, 4), (2.0, 2)],
        [0, 5, -1, 1.5, "1", True, [], {}],
        "a whole number from 1 to 4",
    ),
    "output_format": Row(
        ALL, same("jpeg", "png"), ["webp", "JPEG", "jpg", "", 1, True, []], "one of jpeg, png"
    ),
    "enhance_prompt": Row(PRO, same(True, False), NO_FLAGS, "true or false"),
    "safety_tolerance": Row(
        PRO,
        [*same("1", "2", "3", "4", "5", "6"), (1, "1"), (6, "6"), (3.0, "3")],
        ["0", "7", 0, 7, 2.5, "2.0", " 2", "two", "", True, [], ["2"]],
        "one of 1, 2, 3, 4, 5, 6",
    ),
    "aspect_ratio": Row(
        PRO,
        same(*RATIOS),
        ["16:10", "4:5", "match_input", "1:1 ", "", 1, 1.5, []],
        f"one of {', '.join(RATIOS)}",
    ),
    "num_inference_steps": Row(
        DEV,
        [*same(10, 50), (28.0, 28)],
        [9, 51, 0, -10, 28.5, "28", True, []],
        "a whole number from 10 to 50",
    ),
    "enable_safety_checker": Row(DEV, same(True, False), NO_FLAGS, "true or false"),
    "acceleration": Row(
        DEV,
        same("none", "regular", "high"),
        ["low", "None", "", 0, False, []],
        "one of none, regular, high",
    ),
    "resolution_mode": Row(
        DEV, same(*MODES), ["9:22", "AUTO", "", 1, True, []], f"one of {', '.join(MODES)}"
    ),
}
CELLS = [
    pytest.param(name, variant, id=f"{name} of {variant}") for name in TABLE for variant in ALL
]


def read(body: object, variant: str = "kontext") -> Edit:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return parse_edit(Spool(content), VARIANTS[variant])


def sent(body: object, variant: str = "kontext") -> dict[str, Any]:
    """fal's input for a request."""
    document = json.loads(read(body, variant).body)
    assert isinstance(document, dict)
    return document


def refusal(body: object, variant: str = "kontext") -> ProxyError:
    with pytest.raises(ProxyError) as caught:
        read(body, variant)
    assert caught.value.status == 400
    return caught.value


def uri(content: bytes, declared: str = "image/png") -> str:
    return f"data:{declared};base64,{base64.b64encode(content).decode()}"


URL = "https://example.com/a.png"
ASKED = {"prompt": "make it blue", "image_url": URL}


@pytest.mark.parametrize(("name", "variant"), CELLS)
def test_a_parameter_that_fits_is_sent_as_fal_takes_it(name: str, variant: str) -> None:
    row = TABLE[name]
    for value, received in row.taken:
        expected = ASKED | ({name: received} if variant in row.variants else {})
        found = sent(ASKED | {name: value}, variant)
        assert found == expected
        assert type(found.get(name)) is type(expected.get(name)) or name == "guidance_scale"


@pytest.mark.parametrize(("name", "variant"), CELLS)
def test_a_parameter_that_does_not_fit_is_refused_or_dropped(name: str, variant: str) -> None:
    row = TABLE[name]
    for value in row.refused:
        if variant in row.variants:
            error = refusal(ASKED | {name: value}, variant)
            assert error.code == "parameter_invalid", value
            assert error.message == f"{name} must be {row.accepted}."
        else:
            assert sent(ASKED | {name: value}, variant) == ASKED


@pytest.mark.parametrize(("name", "variant"), CELLS)
def test_null_is_as_good_as_nothing(name: str, variant: str) -> None:
    assert sent(ASKED | {name: None}, variant) == ASKED


@pytest.mark.parametrize("variant", ALL)
def test_what_no_variant_knows_is_ignored(variant: str) -> None:
    more = {"strength": 0.5, "loras": [{"path": "x"}], "image_size": None, "": 1, "Seed": "x"}
    assert sent(ASKED | more, variant) == ASKED


@pytest.mark.parametrize("variant", ALL)
def test_the_table_has_every_parameter(variant: str) -> None:
    taken = {name for name, row in TABLE.items() if variant in row.variants}
    assert {*VARIANTS[variant].request.model_fields} == taken | {
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
        pytest.param("half a pair: \ud800", id="no Unicode"),
    ],
)
def test_a_prompt_is_a_text(prompt: object) -> None:
    error = refusal(ASKED | {"prompt": prompt})
    assert error.message == "prompt must be a text that is not empty."


def test_a_prompt_must_be_there() -> None:
    error = refusal({"image_url": URL})
    assert error.message == "prompt must be a text that is not empty."


@pytest.mark.parametrize("prompt", ["ü 東京 🎨", 'a "quoted"\nline\\', "x" * 20_000])
def test_a_prompt_reaches_fal_as_it_is(prompt: str) -> None:
    edit = read(ASKED | {"prompt": prompt})
    assert (edit.prompt, json.loads(edit.body)["prompt"]) == (prompt, prompt)


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(b"{", id="broken off"),
        pytest.param(b"[]", id="a list"),
        pytest.param(b'"text"', id="a string"),
        pytest.param(b"null", id="null"),
        pytest.param(b'{"prompt": "a", "prompt": "b"}', id="a key twice"),
        pytest.param(b'{"seed": NaN}', id="NaN"),
        pytest.param(b'{"seed": 1e999}', id="beyond all floats"),
        pytest.param(b'{"seed": ' + b"9" * 5000 + b"}", id="digits without end"),
        pytest.param(b'{"prompt": "\xff"}', id="no UTF-8"),
        pytest.param(b'{"a": ' + b"[" * 5000 + b"]" * 5000 + b"}", id="too deep"),
    ],
)
def test_a_body_is_one_json_object(body: bytes) -> None:
    assert refusal(body).code == "body_unreadable"


JSON = strategies.recursive(
    strategies.none() | strategies.booleans() | strategies.integers() | strategies.floats()
    | strategies.text() | strategies.sampled_from([EXAMPLE_IMAGE, URL, "data:,", "data:;base64,A"]),
    lambda inner: strategies.lists(inner, max_size=3)
    | strategies.dictionaries(strategies.text(max_size=3), inner, max_size=3),
    max_leaves=4,
)  # fmt: skip
NAMES = strategies.sampled_from([*TABLE, "prompt", "image_url", "image_data", "other", "\ud800"])


@given(body=JSON | strategies.dictionaries(NAMES, JSON), variant=strategies.sampled_from(ALL))
def test_whatever_comes_is_read_or_refused(body: object, variant: str) -> None:
    refused = None
    try:
        found = sent(body, variant)
    except ProxyError as error:
        refused = error
    else:
        assert found.keys() <= VARIANTS[variant].request.model_fields.keys() - {"image_data"}
    assert refused is None or refused.status == 400


# One image


@pytest.mark.parametrize(
    ("given", "code"),
    [
        pytest.param({}, "image_missing", id="none"),
        pytest.param({"image_url": None}, "image_missing", id="null"),
        pytest.param({"image_url": None, "image_data": None}, "image_missing", id="null twice"),
        pytest.param({"image_url": URL, "image_data": EXAMPLE_IMAGE}, "image_ambiguous", id="both"),
        pytest.param({"image_url": "", "image_data": ""}, "image_ambiguous", id="both empty"),
    ],
)
def test_there_is_exactly_one_image(given: dict[str, object], code: str) -> None:
    error = refusal({"prompt": "a cat"} | given)
    assert (error.code, error.message) == (code, "Send exactly one of image_url and image_data.")


@pytest.mark.parametrize("null", ["image_url", "image_data"])
def test_the_other_image_may_be_null(null: str) -> None:
    given = {"image_url": URL, "image_data": EXAMPLE_IMAGE} | {null: None}
    assert sent({"prompt": "a cat"} | given)["image_url"]


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
def test_a_url_reaches_fal_as_it_is(url: str) -> None:
    edit = read({"prompt": "a cat", "image_url": url})
    assert json.loads(edit.body)["image_url"] == url
    assert (edit.image_param, edit.image) == ("image_url", None)


@pytest.mark.parametrize(
    "url", ["", "a.png", "ftp://a.example/b", "//a.example/b", "http://", "https:///a", "http://[::",
            "http://a:b", "http://a:0", "http://a:65536", "http://a/\ud800", "http://a/\n",
            " https://a.example", "file:///etc/passwd", EXAMPLE_IMAGE, 3, ["https://a.example"]]
)  # fmt: skip
def test_what_is_no_url_is_refused(url: object) -> None:
    error = refusal({"prompt": "a cat", "image_url": url})
    assert error.message == "image_url must be an http(s) URL or a data URI."


@pytest.mark.parametrize("name", ["image_data", "image_url"])
@pytest.mark.parametrize("content", [PNG, JPEG, JPEG + b"\xfb\xff\xfe"], ids=["png", "jpeg", "+/"])
@pytest.mark.parametrize(
    "spell",
    [
        pytest.param(lambda text: text, id="plain"),
        pytest.param(lambda text: text.rstrip("="), id="without padding"),
        pytest.param(lambda text: f"{text.rstrip('=')}====", id="too much padding"),
        pytest.param(lambda text: text.translate({43: "-", 47: "_"}), id="url-safe"),
        pytest.param(lambda text: "\r\n".join((text[:76], text[76:])), id="in lines"),
        pytest.param(lambda text: f" \t{text}\n", id="white space around"),
    ],
)
def test_every_spelling_of_base64_is_one_data_uri(
    name: str, content: bytes, spell: Callable[[str], str]
) -> None:
    media_type = "image/png" if content == PNG else "image/jpeg"
    text = spell(base64.b64encode(content).decode())
    heads = [
        "",
        "data:image/png;base64,",
        "data:image/jpeg;base64,",
        "DATA:;BASE64,",
        "data:x;base64,",
    ]
    for head in heads[name == "image_url" :]:
        edit = read({"prompt": "a cat", name: head + text})
        assert json.loads(edit.body)["image_url"] == uri(content, media_type)
        assert (edit.image_param, edit.image) == (name, content)


def test_a_data_uri_without_base64_is_read_too() -> None:
    text = "data:image/png," + "".join(f"%{byte:02x}" for byte in PNG)
    assert read({"prompt": "a cat", "image_url": text}).image == PNG


@pytest.mark.parametrize(
    ("text", "code", "message"),
    [
        pytest.param("", "image_missing", "image_data is empty.", id="empty"),
        pytest.param(" \n", "image_missing", "image_data is empty.", id="blank"),
        pytest.param("data:image/png;base64,", "image_missing", "empty", id="an empty data URI"),
        pytest.param("data:image/png;base64", "image_unreadable", "base64", id="no comma"),
        pytest.param("====", "image_missing", "empty", id="padding only"),
        pytest.param("!!!", "image_unreadable", "base64", id="no base64"),
        pytest.param(EXAMPLE_IMAGE[:41], "image_unreadable", "base64", id="a letter too many"),
        pytest.param(f"{EXAMPLE_IMAGE}!", "image_unreadable", "base64", id="more behind it"),
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
def test_what_is_no_picture_is_refused(text: str, code: str, message: str) -> None:
    error = refusal({"prompt": "a cat", "image_data": text})
    assert error.code == code
    assert error.message.startswith("image_data")
    assert message in error.message


@pytest.mark.parametrize("value", [3, True, [EXAMPLE_IMAGE], {"url": EXAMPLE_IMAGE}])
def test_image_data_is_a_text(value: object) -> None:
    error = refusal({"prompt": "a cat", "image_data": value})
    assert error.message == "image_data must be the base64 of an image of at most 10 MB."


@pytest.mark.parametrize("name", ["image_data", "image_url"])
def test_ten_mb_are_let_in_and_no_byte_more(name: str) -> None:
    for size in (10 * MIB - 1, 10 * MIB):
        body = {"prompt": "a cat", name: uri(JPEG.ljust(size, b"\0"))}
        assert len(read(body).image or b"") == size
    error = refusal({"prompt": "a cat", name: uri(JPEG.ljust(10 * MIB + 1, b"\0"))})
    assert error.code == "file_too_large"
    assert error.message.startswith(f"{name}: ")


def test_a_text_past_all_measure_is_not_even_held() -> None:
    error = refusal({"prompt": "a cat", "image_data": "A" * (STRING_MAX + 4)})
    assert error.message == "image_data must be the base64 of an image of at most 10 MB."


# Schemas


@pytest.mark.parametrize("variant", ALL)
def test_the_schema_describes_every_parameter(variant: str) -> None:
    schema = VARIANTS[variant].request.model_json_schema()
    assert schema["required"] == ["prompt"]
    for name, described in schema["properties"].items():
        assert described["description"], name
        assert described["examples"], name
    assert schema["properties"]["num_images"]["anyOf"][0] == {
        "type": "integer", "minimum": 1, "maximum": 4,
    }  # fmt: skip


@pytest.mark.parametrize("variant", ALL)
def test_the_examples_are_good_requests(variant: str) -> None:
    schema = VARIANTS[variant].request.model_json_schema()
    for example in schema["examples"]:
        assert read(example, variant).prompt == example["prompt"]
    for name, described in schema["properties"].items():
        for example in described["examples"]:
            given = {} if name.startswith("image_") else {"image_url": URL}
            read({"prompt": "a cat"} | given | {name: example}, variant)


def test_the_answer_has_a_schema() -> None:
    schema = KontextResult.model_json_schema()
    assert schema["required"] == ["images", "prompt"]
    assert schema["$defs"]["KontextImage"]["required"] == ["url", "width", "height"]
