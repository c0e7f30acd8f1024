"""Inputs as one who holds all of them would read them, and keys that tell them apart."""

import json
import re
import time
import tracemalloc
from dataclasses import dataclass, replace
from hashlib import sha256
from math import isinf
from typing import Any, NoReturn

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from falproxy.fal.input_json import (
    DEPTH_MAX,
    LONG_STRING_BYTES,
    PREFIX_BYTES,
    REMAINDER_MAX,
    SEPARATORS_MAX,
    KeyMaterial,
    LongString,
    cache_key,
    canonical_json,
    explain_key,
    has_few_values,
    parse_input,
)

NONCE = "00c0ffee00"


@dataclass(frozen=True)
class Held:
    """A source in memory."""

    content: bytes

    @property
    def size(self) -> int:
        return len(self.content)

    def read(self, start: int, length: int) -> bytes:
        assert start >= 0
        assert length >= 0
        return self.content[start : start + length]


def parse(body: str | bytes, **bounds: Any) -> dict[str, object] | None:
    content = body.encode("utf-8", "surrogatepass") if isinstance(body, str) else body
    return parse_input(Held(content), NONCE, **bounds)


def text_of(literal: str | bytes) -> LongString:
    """The Text between the quotes that these bytes stand for."""
    content = literal.encode() if isinstance(literal, str) else literal
    return LongString(Held(b'"' + content + b'"'), 1, 1 + len(content))


def plain(value: object) -> object:
    """The tree as json.loads gives it."""
    if isinstance(value, LongString):
        return b"".join(value.chunks()).decode("utf-8", "surrogatepass")
    if isinstance(value, dict):
        return {name: plain(item) for name, item in value.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    return value


def texts_in(value: object) -> list[LongString]:
    if isinstance(value, LongString):
        return [value]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [text for item in items for text in texts_in(item)]


def keys_in(value: object) -> list[str]:
    if isinstance(value, dict):
        return [*value, *(name for item in value.values() for name in keys_in(item))]
    return [name for item in value for name in keys_in(item)] if isinstance(value, list) else []


def refuse(word: object) -> NoReturn:
    raise ValueError(word)


def finite(number: str) -> float:
    return refuse(number) if isinf(float(number)) else float(number)


def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    return dict(pairs) if len({name for name, _ in pairs}) == len(pairs) else refuse(pairs)


def reference(body: bytes) -> dict[str, object] | None:
    """What Python's own reader makes of a body that everybody reads alike."""
    try:
        tree = json.loads(
            body.decode(),
            object_pairs_hook=unique,
            parse_constant=refuse,
            parse_float=finite,
        )
    except ValueError:
        return None
    return tree if isinstance(tree, dict) else None


# What JSON strings are made of, as it is written: what a border between two pieces may fall into.
ATOMS = (
    *("a", "bc", "/", "+", "u0041", "{", "[", ",", "é", "€", "😀", "\x7f"),
    *(r"\/", r"\u002B", r"\\", r"\"", r"\n", r"\u005c", r"\u0022", r"\u0000", r"\u20ac"),
    *(r"\ud83d\ude00", r"\ud83d", r"\ude00", r"\uD83D\u0041", r"\\ud83d", r"\\\\", r"\\\""),
)
STRING = re.compile(rb'"((?:[^"\\]|\\.)*)"')
CONTENT = st.lists(st.sampled_from(ATOMS), max_size=60).map("".join)
NUMBERS = st.sampled_from(["0", "-0.0", "3", "3.0", "3e0", "9007199254740993", "1e22", "0.1"])
SPACE = st.sampled_from(["", " ", "\n\t"])
NAMES = st.sampled_from(["a", "b", "é", r"\u0061", r"\""])


def listed(items: list[str], space: str) -> str:
    return f"[{space}{f'{space},'.join(items)}]"


def mapped(items: list[tuple[str, str]], space: str) -> str:
    members = (f'{space}"{name}"{space}:{space}{item}' for name, item in items)
    return f"{space}{{{','.join(members)}{space}}}"


def objects(values: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.builds(mapped, st.lists(st.tuples(NAMES, values), max_size=4), SPACE)


VALUES = st.recursive(
    CONTENT.map('"{}"'.format) | NUMBERS | st.sampled_from(["true", "false", "null"]),
    lambda inner: objects(inner) | st.builds(listed, st.lists(inner, max_size=4), SPACE),
    max_leaves=12,
)
BODIES = objects(VALUES)


@given(BODIES, st.integers(7, 40), st.integers(12, 40))
def test_an_input_is_read_like_all_of_it_at_once(body: str, long: int, piece: int) -> None:
    tree = parse(body, long_string_bytes=long, chunk_size=piece)
    assert repr(plain(tree)) == repr(reference(body.encode()))
    long_strings = [raw for raw in STRING.findall(body.encode()) if len(raw) > long]
    assume(tree is not None)
    assert [text.source.read(text.start, text.end - text.start) for text in texts_in(tree)] == (
        long_strings
    )


@pytest.mark.parametrize("run", range(1, 8))
@pytest.mark.parametrize("piece", range(12, 24))
def test_a_border_in_a_run_of_backslashes_is_no_border(piece: int, run: int) -> None:
    ending = "" if run % 2 == 0 else '"'
    content = "x" * 5 + "\\" * run + ending + "y" * 20
    tree = parse(f'{{"a":"{content}","b":1}}', long_string_bytes=20, chunk_size=piece)
    assert repr(plain(tree)) == repr({"a": json.loads(f'"{content}"'), "b": 1})
    assert len(texts_in(tree)) == 1


@given(BODIES, st.data(), st.integers(24, 40), st.integers(12, 40))
def test_a_broken_body_is_no_input(body: str, data: st.DataObject, long: int, piece: int) -> None:
    broken = bytearray(body.encode())
    at = data.draw(st.integers(0, len(broken)))
    broken[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=2))
    tree = parse(bytes(broken), long_string_bytes=long, chunk_size=piece)
    expected = reference(bytes(broken))
    assume(tree is not None or max(map(len, keys_in(expected)), default=0) <= long // 6)
    assert repr(plain(tree)) == repr(expected)


@given(CONTENT, st.integers(12, 60))
def test_a_text_is_its_string_whatever_the_pieces(content: str, size: int) -> None:
    text = text_of(content)
    pieces = list(text.chunks(size))
    expected = str(json.loads(f'"{content}"')).encode("utf-8", "surrogatepass")
    assert b"".join(pieces) == expected == b"".join(text.chunks(size))
    assert max(map(len, pieces), default=0) <= size


@given(CONTENT.filter(bool), st.integers(0, 30))
def test_a_head_is_the_start_of_the_string(content: str, before: int) -> None:
    text = text_of("x" * (PREFIX_BYTES - before) + content * 40)
    assert str(json.loads(text.source.read(0, text.end + 1))).startswith(text.prefix)
    assert len(text.prefix) >= PREFIX_BYTES - before - 11


def test_a_head_of_a_text_shorter_than_that_is_all_of_it() -> None:
    assert text_of(r"data:image\/png,\ud83d").prefix == "data:image/png,\ud83d"


@pytest.mark.parametrize(
    ("body", "bounds"),
    [
        pytest.param('{"a":"xxxxxxxx"', {}, id="an object without an end"),
        pytest.param('{"a":"xxxxxxxxxxxx', {}, id="a long string without an end"),
        pytest.param('{"a":"xxxxxxxxxxx\\', {}, id="an escape without an end"),
        pytest.param('"xxxxxxxxxxxxxxxxxx"', {}, id="a string"),
        pytest.param("[]", {}, id="a list"),
        pytest.param("", {}, id="nothing"),
        pytest.param("\ufeff{}", {}, id="a byte order mark"),
        pytest.param('{"a":1}'.encode("utf-16"), {}, id="UTF-16"),
        pytest.param(b'{"a":"\xff"}', {}, id="not UTF-8"),
        pytest.param(b'{"a":"xxxxxxxxxxxx\xff"}', {}, id="not UTF-8 in a long string"),
        pytest.param('{"a":"xxxxxxxxxxx\ud83d"}', {}, id="a surrogate in UTF-8"),
        pytest.param('{"a":"xxxxxxxxxxx\n"}', {}, id="a line break in a long string"),
        pytest.param(r'{"a":"xxxxxxxxxxx\x"}', {}, id="no escape of JSON in a long string"),
        pytest.param(r'{"a":"xxxxxxxxxxx\u12"}', {}, id="half an escape in a long string"),
        pytest.param(r'{"a":"xxxxxxxxxxx"\"}', {}, id="a backslash after a string"),
        pytest.param('{"a":1,"a":1}', {}, id="a key twice"),
        pytest.param(r'{"b":[{"a":1,"\u0061":1}]}', {}, id="a key in two spellings"),
        pytest.param('{"aaaaaaaaaaaaa":1}', {}, id="a long key"),
        pytest.param('{"b":[{"aaaaaaaaaaaaa":1}]}', {}, id="a long key further down"),
        pytest.param('{"a":NaN}', {}, id="NaN"),
        pytest.param('{"a":-Infinity}', {}, id="Infinity"),
        pytest.param('{"a":1e999}', {}, id="a number that would be infinite"),
        pytest.param('{"a":' + "1" * 5000 + "}", {}, id="an integer that Python refuses"),
        pytest.param('{"a":"xx","b":"yy"}', {"remainder_max": 18}, id="too much text"),
        pytest.param(
            '{"a":' + " " * REMAINDER_MAX + "1}", {"chunk_size": 2**20}, id="too much space"
        ),
        pytest.param(
            '{"a":[' + "[]," * SEPARATORS_MAX + "0]}", {"chunk_size": 2**20}, id="too many values"
        ),
        pytest.param('{"a":' + "[" * 100_000, {"chunk_size": 2**20}, id="a depth bomb"),
        pytest.param(
            '{"a":' + "[" * DEPTH_MAX + "0" + "]" * DEPTH_MAX + "}", {}, id="nested too deep"
        ),
    ],
)
def test_what_is_no_input(body: str | bytes, bounds: dict[str, int]) -> None:
    assert parse(body, **{"long_string_bytes": 10, "chunk_size": 16, **bounds}) is None


def test_bounds_may_be_reached() -> None:
    nested = "[" * (DEPTH_MAX - 1) + "0" + "]" * (DEPTH_MAX - 1)
    assert parse(f'{{"a":{nested}}}') is not None
    assert parse('{"a":"xx","b":"yy"}', remainder_max=19) is not None
    assert parse('{"a":"' + "x" * LONG_STRING_BYTES + '"}') == {"a": "x" * LONG_STRING_BYTES}


@pytest.mark.timed
def test_a_body_of_50_mb_is_read_quickly_and_is_not_held() -> None:
    image = "data:image/png;base64," + r"QUJD\/0RF" * (50_000_000 // 9)
    source = Held(f'{{"prompt":"a cat","image_url":"{image}"}}'.encode())
    tracemalloc.start()
    started = time.perf_counter()
    tree = parse_input(source, NONCE)
    canonical_json(tree)
    seconds, peak = time.perf_counter() - started, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert tree is not None
    assert isinstance(tree["image_url"], LongString)
    assert tree["image_url"].prefix.startswith("data:image/png;base64,QUJD/0RF")
    assert peak < 4 * 2**20
    assert seconds < 2  # 0.2 where nothing else runs


LONG_TEXT = "é" * LONG_STRING_BYTES
LONG_DIGEST = f"#{sha256(LONG_TEXT.encode()).hexdigest()}:{2 * LONG_STRING_BYTES}"
LEAVES: tuple[object, ...] = (
    *(None, True, False, 0, 1, -1, 3, 2**53, 2**53 + 1, 2**53 - 1, 10**22),
    *(-0.0, 0.0, 1.0, 3.0, 0.1, -3.5, 2.0**53, 2.0**53 - 1, 2.0**53 + 2, 1e22, 5e-324),
    *("", "1", "1.0", "true", "null", "=", "#", "=1", LONG_DIGEST, f"={LONG_DIGEST}"),
    *("\ud83d", "\ude00", "😀", "\ud83d\ude00", r"\ud83d", "é", "e\u0301", '"', "\x00"),
    *(LONG_TEXT, LONG_TEXT + "e", "x" * LONG_STRING_BYTES, "x" * (LONG_STRING_BYTES + 1)),
    *(
        text_of(LONG_TEXT),
        text_of("x" * LONG_STRING_BYTES),
        text_of("x" * (LONG_STRING_BYTES + 1)),
        text_of(""),
    ),
    *(text_of(r"\u0031"), text_of(r"\ud83d\ude00"), text_of(r"\u00e9" * LONG_STRING_BYTES)),
)
TREES = st.recursive(
    st.sampled_from(LEAVES),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["a", "b", "=a", "", "\ud83d"]), inner, max_size=3)
    ),
    max_leaves=4,
)


def same(one: object, other: object) -> bool:
    """Equality of JSON values: of numbers as a reader in JavaScript and one in Python agree."""
    one, other = plain(one), plain(other)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[name], other[name]) for name in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same, one, other))
    if {type(one), type(other)} == {int, float}:
        return one == other and abs(float(str(one))) < 2**53
    return type(one) is type(other) and one == other


@given(TREES, TREES)
def test_only_equal_values_are_canonically_equal(one: object, other: object) -> None:
    assert (canonical_json(one) == canonical_json(other)) is same(one, other)


def test_all_leaves_are_told_apart_like_values() -> None:
    for one in LEAVES:
        for other in LEAVES:
            assert (canonical_json(one) == canonical_json(other)) is same(one, other), (one, other)


@given(BODIES, st.integers(7, 40))
def test_what_is_held_makes_no_difference(body: str, long: int) -> None:
    tree, all_held = parse(body, long_string_bytes=long), parse(body)
    assume(tree is not None)
    assert canonical_json(tree) == canonical_json(all_held)


PICTURE = sha256(b"a picture").hexdigest()
OTHER_PICTURE = sha256(b"another").hexdigest()
TREE = {"prompt": "a cat", "seed": 3, "image_url": "https://a.example/1.png", "sizes": [1, 2]}
MATERIAL = KeyMaterial(
    endpoint="fal-ai/flux-pro/kontext",
    tenant="shared",
    headers=(("x-fal-object-lifecycle-preference", "a"),),
    tree=TREE,
    images={("image_url",): PICTURE},
)


@pytest.mark.parametrize(
    "other",
    [
        pytest.param(replace(MATERIAL, endpoint="fal-ai/flux-kontext/dev"), id="endpoint"),
        pytest.param(replace(MATERIAL, tenant="ann"), id="tenant"),
        pytest.param(replace(MATERIAL, headers=()), id="no header"),
        pytest.param(
            replace(MATERIAL, headers=(("x-fal-object-lifecycle-preference", "b"),)), id="header"
        ),
        pytest.param(replace(MATERIAL, tree={**TREE, "prompt": "a dog"}), id="prompt"),
        pytest.param(replace(MATERIAL, tree={**TREE, "seed": 4}), id="seed"),
        pytest.param(replace(MATERIAL, tree={**TREE, "seed": "3"}), id="type"),
        pytest.param(replace(MATERIAL, tree={**TREE, "sizes": [2, 1]}), id="order of a list"),
        pytest.param(replace(MATERIAL, tree={**TREE, "strength": None}), id="one more, null"),
        pytest.param(replace(MATERIAL, images={("image_url",): OTHER_PICTURE}), id="picture"),
        pytest.param(replace(MATERIAL, images={}), id="a URL that was not looked at"),
        pytest.param(
            replace(MATERIAL, tree={**TREE, "image_url": None}, images={}), id="null for a picture"
        ),
        pytest.param(
            replace(MATERIAL, tree={**TREE, "image_url": PICTURE}, images={}),
            id="a digest for a picture",
        ),
        pytest.param(
            replace(MATERIAL, images={("image_url",): PICTURE, ("prompt",): PICTURE}),
            id="a picture more",
        ),
    ],
)
def test_each_part_changes_the_key(other: KeyMaterial) -> None:
    assert cache_key(other) != cache_key(MATERIAL)


@pytest.mark.parametrize(
    "place",
    [
        pytest.param("https://b.example/2.png", id="another URL"),
        pytest.param("data:image/png;base64,AAAA", id="a short data URI"),
        pytest.param(
            text_of("data:image/png;base64," + "A" * LONG_STRING_BYTES), id="one that is not held"
        ),
        pytest.param({"url": "https://a.example/1.png", "width": 9}, id="an object"),
    ],
)
def test_the_same_picture_is_the_same_wherever_it_came_from(place: object) -> None:
    assert cache_key(replace(MATERIAL, tree={**TREE, "image_url": place})) == cache_key(MATERIAL)


@pytest.mark.parametrize(
    "body",
    [
        pytest.param('{"seed":3,"sizes":[1,2],"image_url":"","prompt":"a cat"}', id="key order"),
        pytest.param(
            ' {"prompt" : "a cat",\n"seed":3, "image_url":"", "sizes":[1, 2]}', id="white space"
        ),
        pytest.param('{"prompt":"a cat","seed":3.0,"image_url":"","sizes":[1,2e0]}', id="3.0"),
        pytest.param(r'{"prompt":"\u0061 cat","seed":3,"image_url":"","sizes":[1,2]}', id="escape"),
    ],
)
def test_spelling_does_not_change_the_key(body: str) -> None:
    tree = parse(body)
    assert tree is not None
    assert cache_key(replace(MATERIAL, tree=tree)) == cache_key(MATERIAL)


def test_pictures_in_a_list_have_their_places() -> None:
    tree = {"images": [{"url": "a"}, {"url": "b"}]}
    first, second = ("images", 0, "url"), ("images", 1, "url")
    one = replace(MATERIAL, tree=tree, images={first: PICTURE, second: OTHER_PICTURE})
    swapped = replace(MATERIAL, tree=tree, images={second: PICTURE, first: OTHER_PICTURE})
    listed = replace(MATERIAL, tree=tree, images={second: OTHER_PICTURE, first: PICTURE})
    assert cache_key(one) == cache_key(listed) != cache_key(swapped)


def test_header_names_are_told_apart_without_case_and_order() -> None:
    one = replace(MATERIAL, headers=(("X-Fal-B", "1"), ("x-fal-a", "2")))
    assert cache_key(one) == cache_key(
        replace(MATERIAL, headers=(("x-fal-a", "2"), ("x-fal-b", "1")))
    )


def test_a_material_can_be_shown() -> None:
    tree = {
        **TREE,
        "prompt": LONG_TEXT,
        "notes": [text_of("x" * (LONG_STRING_BYTES + 1)), text_of("short")],
    }
    digest = sha256(b"x" * (LONG_STRING_BYTES + 1)).hexdigest()
    assert json.loads(json.dumps(explain_key(replace(MATERIAL, tree=tree)))) == {
        "version": "falproxy-1",
        "upstream": "",
        "endpoint": "fal-ai/flux-pro/kontext",
        "tenant": "shared",
        "headers": [["x-fal-object-lifecycle-preference", "a"]],
        "inputs": {
            "prompt": {
                "sha256": sha256(LONG_TEXT.encode()).hexdigest(),
                "bytes": 2 * LONG_STRING_BYTES,
            },
            "seed": 3,
            "image_url": None,
            "sizes": [1, 2],
            "notes": [{"sha256": digest, "bytes": LONG_STRING_BYTES + 1}, "short"],
        },
        "images": [{"loc": ["image_url"], "sha256": PICTURE}],
    }


@pytest.mark.parametrize(
    ("body", "is_few"),
    [
        pytest.param(b'{"prompt": "a cat"}', True, id="a call"),
        pytest.param(b'"' + b"A" * 2**20 + b'"', True, id="a picture"),
        pytest.param(b"[" + b"0," * 30_000 + b"0]", False, id="numbers"),
        pytest.param(b"[" * 30_000, False, id="depth"),
        pytest.param(b'{"a":' * 30_000, False, id="objects in objects"),
    ],
)
def test_a_body_that_takes_long_to_read_is_known_by_sight(body: bytes, is_few: bool) -> None:
    assert has_few_values(body) is is_few
