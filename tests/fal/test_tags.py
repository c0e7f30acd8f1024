"""The header `X-Fal-Tags`: encoding of values, and the merge with the client's own tags."""

from urllib.parse import unquote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from falproxy.errors import ProxyError
from falproxy.fal.tags import VALUE_MAX, encode_tag_value, merge_tags

NAMES = ("principal", "user")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        pytest.param("ada", "ada", id="a word"),
        pytest.param("auth0|42/a=b;c:d@e.f", "auth0|42/a=b;c:d@e.f", id="printable ASCII"),
        pytest.param("ada lovelace", "ada lovelace", id="a blank inside"),
        pytest.param(" ada ", "%20ada%20", id="blanks at the ends, which fal removes"),
        pytest.param("a,b", "a%2Cb", id="the separator"),
        pytest.param("50%", "50%25", id="a percent sign, so that values stay distinct"),
        pytest.param("a%2Cb", "a%252Cb", id="an escape in the text"),
        pytest.param("zoë", "zo%C3%AB", id="UTF-8"),
        pytest.param("a\r\nx: y", "a%0D%0Ax: y", id="a line break"),
        pytest.param("a\x00\x7f", "a%00%7F", id="control characters"),
        pytest.param("\ud83d", "%ED%A0%BD", id="half of a surrogate pair"),
    ],
)
def test_a_value_is_printable_ascii_without_a_comma(text: str, value: str) -> None:
    assert encode_tag_value(text) == value


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("x" * 257, id="ASCII"),
        pytest.param("艾" * 128, id="UTF-8"),
        pytest.param("x" * 221 + "é" * 30, id="cut inside of an escape"),
    ],
)
def test_a_long_value_is_cut_and_ends_in_a_hash(text: str) -> None:
    value = encode_tag_value(text)
    start, mark, digits = value.rpartition("%~")
    assert (mark, len(digits)) == ("%~", 32)
    assert VALUE_MAX - 3 < len(value) <= VALUE_MAX
    assert text.startswith(unquote(start, errors="ignore"))
    assert value == encode_tag_value(text) != encode_tag_value(f"{text}y")


@given(st.text() | st.text(min_size=200), st.text() | st.text(min_size=200))
def test_every_value_fits_and_different_texts_have_different_values(one: str, two: str) -> None:
    values = [encode_tag_value(one), encode_tag_value(two)]
    for value in values:
        assert value.isascii()
        assert value.isprintable()
        assert "," not in value
        assert value == value.strip()
        assert len(value) <= VALUE_MAX
    assert (values[0] == values[1]) is (one == two)


@pytest.mark.parametrize(
    ("lines", "own", "merged"),
    [
        pytest.param([], {"user": "ada"}, "user=ada", id="no tags of the client"),
        pytest.param(
            ["team=a"], {"principal": "web", "user": "b"}, "team=a,principal=web,user=b", id="after"
        ),
        pytest.param(["a=1", "b=2"], {"user": "x"}, "a=1,b=2,user=x", id="several headers are one"),
        pytest.param(
            [" Team = a b ,, bad,fal.x=1 "], {"user": "x"}, " Team = a b ,, bad,fal.x=1 ,user=x",
            id="the client's bytes stay",
        ),
        pytest.param(["a=1"], {}, "a=1", id="nothing to add"),
        pytest.param(["a=" + "x" * 2000], {}, "a=" + "x" * 2000, id="nothing to add to a long one"),
        pytest.param(["user=ada"], {"user": "ada"}, "user=ada", id="the same tag"),
        pytest.param([" USER = ada"], {"user": "ada"}, " USER = ada", id="the same, other letters"),
        pytest.param(["users=a,principals=b"], {}, "users=a,principals=b", id="similar keys"),
        pytest.param(
            [",".join(f"k{n}=v" for n in range(8))], {"principal": "p", "user": "u"},
            ",".join(f"k{n}=v" for n in range(8)) + ",principal=p,user=u", id="ten tags",
        ),
        pytest.param(
            ["a=" + "x" * 1014], {"user": "abcde"}, "a=" + "x" * 1014 + ",user=abcde",
            id="1024 bytes",
        ),
    ],
)  # fmt: skip
def test_tags_of_the_client_are_kept(lines: list[str], own: dict[str, str], merged: str) -> None:
    assert merge_tags(lines, own, NAMES) == merged


@pytest.mark.parametrize(
    ("lines", "own", "code"),
    [
        pytest.param(["user=bob"], {"user": "ada"}, "tag_reserved", id="another user"),
        pytest.param(["user=bob"], {}, "tag_reserved", id="a user that the call does not name"),
        pytest.param(["a=1", "x=2, Principal =p"], {}, "tag_reserved", id="spelled differently"),
        pytest.param(["user=ada,user=bob"], {"user": "ada"}, "tag_reserved", id="twice"),
        pytest.param(["user"], {"user": "ada"}, "tag_reserved", id="a key alone"),
        pytest.param(["user=a=b"], {"user": "a"}, "tag_reserved", id="split at the first sign"),
        pytest.param(
            [",".join(f"k{n}=v" for n in range(10))], {"user": "a"}, "tags_too_large", id="11 tags"
        ),
        pytest.param(
            [",".join("k=v" for _ in range(10))], {"user": "a"}, "tags_too_large",
            id="equal keys count",
        ),
        pytest.param(["a=" + "x" * 1015], {"user": "abcde"}, "tags_too_large", id="1025 bytes"),
        pytest.param(["a=" + "ë" * 510], {"user": "abcde"}, "tags_too_large", id="bytes of UTF-8"),
    ],
)  # fmt: skip
def test_tags_that_fal_would_drop_are_refused(
    lines: list[str], own: dict[str, str], code: str
) -> None:
    with pytest.raises(ProxyError) as refusal:
        merge_tags(lines, own, NAMES)
    assert (refusal.value.status, refusal.value.code) == (400, code)
    assert refusal.value.message.endswith(".")
