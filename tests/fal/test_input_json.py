"""The parser of inputs finds the same in a body as a parser that holds all of it in memory."""

import json
import re
import time
import tracemalloc
from math import isinf
from typing import NoReturn

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from falproxy.fal.cache_key import canonical_json
from falproxy.fal.input_json import (
    DEPTH_MAX,
    LONG_STRING_BYTES,
    PREFIX_BYTES,
    REMAINDER_MAX,
    SEPARATORS_MAX,
    LongString,
    has_few_values,
    parse_input,
)
from tests.support.input_json import (
    BODIES,
    CONTENT,
    NONCE,
    MemorySource,
    long_string,
    materialize,
    parse,
)

STRING = re.compile(rb'"((?:[^"\\]|\\.)*)"')


def long_strings_in(value: object) -> list[LongString]:
    if isinstance(value, LongString):
        return [value]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [text for item in items for text in long_strings_in(item)]


def keys_in(value: object) -> list[str]:
    if isinstance(value, dict):
        return [*value, *(name for item in value.values() for name in keys_in(item))]
    return [name for item in value for name in keys_in(item)] if isinstance(value, list) else []


def refuse(value: object) -> NoReturn:
    raise ValueError(value)


def finite(number: str) -> float:
    return refuse(number) if isinf(float(number)) else float(number)


def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    return dict(pairs) if len({name for name, _ in pairs}) == len(pairs) else refuse(pairs)


def reference(body: bytes) -> dict[str, object] | None:
    """Parse an unambiguous body with Python's parser."""
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


@pytest.mark.slow
@given(BODIES, st.integers(7, 40), st.integers(12, 40))
def test_a_body_in_chunks_is_parsed_like_the_whole(body: str, long: int, chunk_size: int) -> None:
    tree = parse(body, long_string_bytes=long, chunk_size=chunk_size)
    assert repr(materialize(tree)) == repr(reference(body.encode()))
    long_strings = [raw for raw in STRING.findall(body.encode()) if len(raw) > long]
    assume(tree is not None)
    assert [
        text.source.read(text.start, text.end - text.start) for text in long_strings_in(tree)
    ] == (long_strings)


@pytest.mark.parametrize("run", range(1, 8))
@pytest.mark.parametrize("chunk_size", range(12, 24))
def test_backslashes_at_the_end_of_a_chunk_are_not_split(chunk_size: int, run: int) -> None:
    ending = "" if run % 2 == 0 else '"'
    content = "x" * 5 + "\\" * run + ending + "y" * 20
    tree = parse(f'{{"a":"{content}","b":1}}', long_string_bytes=20, chunk_size=chunk_size)
    assert repr(materialize(tree)) == repr({"a": json.loads(f'"{content}"'), "b": 1})
    assert len(long_strings_in(tree)) == 1


@given(BODIES, st.data(), st.integers(24, 40), st.integers(12, 40))
def test_a_corrupted_body_is_parsed_or_rejected_like_the_whole(
    body: str, data: st.DataObject, long: int, chunk_size: int
) -> None:
    broken = bytearray(body.encode())
    at = data.draw(st.integers(0, len(broken)))
    broken[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=2))
    tree = parse(bytes(broken), long_string_bytes=long, chunk_size=chunk_size)
    expected = reference(bytes(broken))
    assume(tree is not None or max(map(len, keys_in(expected)), default=0) <= long // 6)
    assert repr(materialize(tree)) == repr(expected)


@given(CONTENT, st.integers(12, 60))
def test_the_chunks_of_a_long_string_are_its_content(content: str, size: int) -> None:
    text = long_string(content)
    chunks = list(text.chunks(size))
    expected = str(json.loads(f'"{content}"')).encode("utf-8", "surrogatepass")
    assert b"".join(chunks) == expected == b"".join(text.chunks(size))
    assert max(map(len, chunks), default=0) <= size


@given(CONTENT.filter(bool), st.integers(0, 30))
def test_the_prefix_is_the_start_of_the_string(content: str, before: int) -> None:
    text = long_string("x" * (PREFIX_BYTES - before) + content * 40)
    assert str(json.loads(text.source.read(0, text.end + 1))).startswith(text.prefix)
    assert len(text.prefix) >= PREFIX_BYTES - before - 11


def test_the_prefix_of_a_shorter_string_is_the_whole_string() -> None:
    assert long_string(r"data:image\/png,\ud83d").prefix == "data:image/png,\ud83d"


@pytest.mark.parametrize(
    ("body", "limits"),
    [
        pytest.param('{"a":"xxxxxxxx"', {}, id="object without an end"),
        pytest.param('{"a":"xxxxxxxxxxxx', {}, id="long string without an end"),
        pytest.param('{"a":"xxxxxxxxxxx\\', {}, id="escape without an end"),
        pytest.param('"xxxxxxxxxxxxxxxxxx"', {}, id="a string"),
        pytest.param("[]", {}, id="a list"),
        pytest.param("", {}, id="empty"),
        pytest.param("\ufeff{}", {}, id="a byte order mark"),
        pytest.param('{"a":1}'.encode("utf-16"), {}, id="UTF-16"),
        pytest.param(b'{"a":"\xff"}', {}, id="not UTF-8"),
        pytest.param(b'{"a":"xxxxxxxxxxxx\xff"}', {}, id="not UTF-8 in a long string"),
        pytest.param('{"a":"xxxxxxxxxxx\ud83d"}', {}, id="a surrogate in UTF-8"),
        pytest.param('{"a":"xxxxxxxxxxx\n"}', {}, id="a line break in a long string"),
        pytest.param(r'{"a":"xxxxxxxxxxx\x"}', {}, id="unknown escape in a long string"),
        pytest.param(r'{"a":"xxxxxxxxxxx\u12"}', {}, id="half an escape in a long string"),
        pytest.param(r'{"a":"xxxxxxxxxxx"\"}', {}, id="a backslash after a string"),
        pytest.param('{"a":1,"a":1}', {}, id="duplicate key"),
        pytest.param(r'{"b":[{"a":1,"\u0061":1}]}', {}, id="duplicate key with an escape"),
        pytest.param('{"aaaaaaaaaaaaa":1}', {}, id="a long key"),
        pytest.param('{"b":[{"aaaaaaaaaaaaa":1}]}', {}, id="a nested long key"),
        pytest.param('{"a":NaN}', {}, id="NaN"),
        pytest.param('{"a":-Infinity}', {}, id="Infinity"),
        pytest.param('{"a":1e999}', {}, id="number out of range"),
        pytest.param('{"a":' + "1" * 5000 + "}", {}, id="integer with too many digits"),
        pytest.param('{"a":"xx","b":"yy"}', {"remainder_max": 18}, id="too many bytes"),
        pytest.param(
            '{"a":' + " " * REMAINDER_MAX + "1}", {"chunk_size": 2**20}, id="too much white space"
        ),
        pytest.param(
            '{"a":[' + "[]," * SEPARATORS_MAX + "0]}", {"chunk_size": 2**20}, id="too many values"
        ),
        pytest.param('{"a":' + "[" * 100_000, {"chunk_size": 2**20}, id="extreme depth"),
        pytest.param(
            '{"a":' + "[" * DEPTH_MAX + "0" + "]" * DEPTH_MAX + "}", {}, id="nested too deep"
        ),
    ],
)
def test_an_invalid_or_ambiguous_body_is_none(body: str | bytes, limits: dict[str, int]) -> None:
    assert parse(body, **{"long_string_bytes": 10, "chunk_size": 16, **limits}) is None


def test_the_limits_are_inclusive() -> None:
    nested = "[" * (DEPTH_MAX - 1) + "0" + "]" * (DEPTH_MAX - 1)
    assert parse(f'{{"a":{nested}}}') is not None
    assert parse('{"a":"xx","b":"yy"}', remainder_max=19) is not None
    assert parse('{"a":"' + "x" * LONG_STRING_BYTES + '"}') == {"a": "x" * LONG_STRING_BYTES}


@pytest.mark.timed
def test_a_body_of_50_mb_is_parsed_fast_and_not_held_in_memory() -> None:
    image = "data:image/png;base64," + r"QUJD\/0RF" * (50_000_000 // 9)
    source = MemorySource(f'{{"prompt":"a cat","image_url":"{image}"}}'.encode())
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
    assert seconds < 2  # 0.2 on an idle machine


@pytest.mark.parametrize(
    ("body", "is_few"),
    [
        pytest.param(b'{"prompt": "a cat"}', True, id="a call"),
        pytest.param(b'"' + b"A" * 2**20 + b'"', True, id="an image"),
        pytest.param(b"[" + b"0," * 30_000 + b"0]", False, id="numbers"),
        pytest.param(b"[" * 30_000, False, id="depth"),
        pytest.param(b'{"a":' * 30_000, False, id="nested objects"),
    ],
)
def test_a_body_with_many_values_is_not_parsed_on_the_event_loop(body: bytes, is_few: bool) -> None:
    assert has_few_values(body) is is_few
