"""The cache key: equal for equal calls only."""

import json
from dataclasses import replace
from hashlib import sha256

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from falproxy.fal.cache_key import KeyMaterial, cache_key, canonical_json, explain_key
from falproxy.fal.input_json import LONG_STRING_BYTES
from tests.support.input_json import BODIES, long_string, materialize, parse

LONG_TEXT = "é" * LONG_STRING_BYTES
LONG_DIGEST = f"#{sha256(LONG_TEXT.encode()).hexdigest()}:{2 * LONG_STRING_BYTES}"
LEAVES: tuple[object, ...] = (
    *(None, True, False, 0, 1, -1, 3, 2**53, 2**53 + 1, 2**53 - 1, 10**22),
    *(-0.0, 0.0, 1.0, 3.0, 0.1, -3.5, 2.0**53, 2.0**53 - 1, 2.0**53 + 2, 1e22, 5e-324),
    *("", "1", "1.0", "true", "null", "=", "#", "=1", LONG_DIGEST, f"={LONG_DIGEST}"),
    *("\ud83d", "\ude00", "😀", "\ud83d\ude00", r"\ud83d", "é", "e\u0301", '"', "\x00"),
    *(LONG_TEXT, LONG_TEXT + "e", "x" * LONG_STRING_BYTES, "x" * (LONG_STRING_BYTES + 1)),
    *(
        long_string(LONG_TEXT),
        long_string("x" * LONG_STRING_BYTES),
        long_string("x" * (LONG_STRING_BYTES + 1)),
        long_string(""),
    ),
    *(
        long_string(r"\u0031"),
        long_string(r"\ud83d\ude00"),
        long_string(r"\u00e9" * LONG_STRING_BYTES),
    ),
)
TREES = st.recursive(
    st.sampled_from(LEAVES),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["a", "b", "=a", "", "\ud83d"]), inner, max_size=3)
    ),
    max_leaves=4,
)


def is_equal(one: object, other: object) -> bool:
    """Return whether JSON values are equal for parsers in both JavaScript and Python."""
    one, other = materialize(one), materialize(other)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(is_equal(one[name], other[name]) for name in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(is_equal, one, other))
    if {type(one), type(other)} == {int, float}:
        return one == other and abs(float(str(one))) < 2**53
    return type(one) is type(other) and one == other


@given(TREES, TREES)
def test_only_equal_values_have_the_same_canonical_json(one: object, other: object) -> None:
    assert (canonical_json(one) == canonical_json(other)) is is_equal(one, other)


def test_the_canonical_json_of_all_leaves_differs_like_their_values() -> None:
    for one in LEAVES:
        for other in LEAVES:
            assert (canonical_json(one) == canonical_json(other)) is is_equal(one, other), (
                one,
                other,
            )


@pytest.mark.slow
@given(BODIES, st.integers(7, 40))
def test_canonical_json_does_not_depend_on_the_limit_of_long_strings(body: str, long: int) -> None:
    tree, held_tree = parse(body, long_string_bytes=long), parse(body)
    assume(tree is not None)
    assert canonical_json(tree) == canonical_json(held_tree)


IMAGE = sha256(b"an image").hexdigest()
OTHER_IMAGE = sha256(b"another").hexdigest()
TREE = {"prompt": "a cat", "seed": 3, "image_url": "https://a.example/1.png", "sizes": [1, 2]}
MATERIAL = KeyMaterial(
    endpoint="fal-ai/flux-pro/kontext",
    tenant="shared",
    headers=(("x-fal-object-lifecycle-preference", "a"),),
    tree=TREE,
    images={("image_url",): IMAGE},
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
        pytest.param(replace(MATERIAL, tree={**TREE, "strength": None}), id="additional null"),
        pytest.param(replace(MATERIAL, images={("image_url",): OTHER_IMAGE}), id="image"),
        pytest.param(replace(MATERIAL, images={}), id="a URL without a digest"),
        pytest.param(
            replace(MATERIAL, tree={**TREE, "image_url": None}, images={}), id="null for an image"
        ),
        pytest.param(
            replace(MATERIAL, tree={**TREE, "image_url": IMAGE}, images={}),
            id="a digest for an image",
        ),
        pytest.param(
            replace(MATERIAL, images={("image_url",): IMAGE, ("prompt",): IMAGE}),
            id="an additional image",
        ),
    ],
)
def test_each_part_changes_the_key(other: KeyMaterial) -> None:
    assert cache_key(other) != cache_key(MATERIAL)


@pytest.mark.parametrize(
    "source",
    [
        pytest.param("https://b.example/2.png", id="another URL"),
        pytest.param("data:image/png;base64,AAAA", id="a short data URI"),
        pytest.param(
            long_string("data:image/png;base64," + "A" * LONG_STRING_BYTES), id="a long data URI"
        ),
        pytest.param({"url": "https://a.example/1.png", "width": 9}, id="an object"),
    ],
)
def test_the_key_depends_on_the_image_and_not_on_its_source(source: object) -> None:
    assert cache_key(replace(MATERIAL, tree={**TREE, "image_url": source})) == cache_key(MATERIAL)


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
def test_the_spelling_of_the_json_does_not_change_the_key(body: str) -> None:
    tree = parse(body)
    assert tree is not None
    assert cache_key(replace(MATERIAL, tree=tree)) == cache_key(MATERIAL)


def test_the_order_of_images_in_a_list_changes_the_key() -> None:
    tree = {"images": [{"url": "a"}, {"url": "b"}]}
    first, second = ("images", 0, "url"), ("images", 1, "url")
    one = replace(MATERIAL, tree=tree, images={first: IMAGE, second: OTHER_IMAGE})
    swapped = replace(MATERIAL, tree=tree, images={second: IMAGE, first: OTHER_IMAGE})
    reordered = replace(MATERIAL, tree=tree, images={second: OTHER_IMAGE, first: IMAGE})
    assert cache_key(one) == cache_key(reordered) != cache_key(swapped)


def test_case_and_order_of_headers_do_not_change_the_key() -> None:
    one = replace(MATERIAL, headers=(("X-Fal-B", "1"), ("x-fal-a", "2")))
    assert cache_key(one) == cache_key(
        replace(MATERIAL, headers=(("x-fal-a", "2"), ("x-fal-b", "1")))
    )


def test_the_material_of_a_key_is_explained_as_json() -> None:
    tree = {
        **TREE,
        "prompt": LONG_TEXT,
        "notes": [long_string("x" * (LONG_STRING_BYTES + 1)), long_string("short")],
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
        "images": [{"loc": ["image_url"], "sha256": IMAGE}],
    }
