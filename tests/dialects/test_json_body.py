"""Invalid text in bodies: the same sentence in all dialects, and nothing is sent to fal."""

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from falproxy.dialects.json_body import (
    InvalidTextError,
    decode_text,
    describe_invalid_bytes,
    has_half_pair,
    parse_json,
)
from falproxy.spool import Spool
from tests.support.openai_proxy import DEV, KONTEXT
from tests.support.sandbox_proxy import SandboxProxy, open_sandbox_proxy

URL = "https://files.example/a.png"
HALF = "Invalid JSON: the body has half of a surrogate pair, as of an emoji that was cut in two."
NOT_UTF8 = "Invalid JSON: the body is not valid UTF-8."
MARK = "Invalid JSON: the body begins with a byte order mark; send UTF-8 without one."
# Path → a valid body, in which PROMPT stands for the prompt.
PROMPT = "PROMPT"
BODIES: dict[str, dict[str, Any]] = {
    "/kontext": {"prompt": PROMPT, "image_url": URL},
    "/kontext/max": {"prompt": PROMPT, "image_url": URL},
    "/kontext/dev": {"prompt": PROMPT, "image_url": URL},
    "/v1/images/generations": {"prompt": PROMPT, "model": DEV},
    "/v1/images/edits": {"prompt": PROMPT, "model": KONTEXT, "image": URL},
    "/api/images/generate": {"model": "flux-dev", "inputs": {"prompt": PROMPT}},
    "/api/templates/product-shot": {"variables": {"product": PROMPT}},
}


@pytest.fixture
async def proxy(tmp_path: Path) -> AsyncIterator[SandboxProxy]:
    async with open_sandbox_proxy(tmp_path) as opened:
        yield opened


@pytest.mark.parametrize(
    ("prompt", "before", "message"),
    [
        pytest.param(rb"half an emoji \ud83d", b"", HALF, id="the first half of an emoji"),
        pytest.param(rb"\udc26 half an emoji", b"", HALF, id="the second half of an emoji"),
        pytest.param(b"half \xed\xa0\xbd", b"", NOT_UTF8, id="a half in bytes"),
        pytest.param(b"a heron \xff", b"", NOT_UTF8, id="not UTF-8"),
        pytest.param(b"a heron", b"\xef\xbb\xbf", MARK, id="a byte order mark"),
    ],
)
@pytest.mark.parametrize("path", BODIES)
async def test_invalid_text_has_the_same_sentence_in_all_dialects(
    proxy: SandboxProxy, path: str, prompt: bytes, before: bytes, message: str
) -> None:
    content = before + json.dumps(BODIES[path]).encode().replace(PROMPT.encode(), prompt)
    headers = {"Content-Type": "application/json"}
    reply = await proxy.request("POST", path, data=content, headers=headers)
    assert reply.status == 400
    assert reply.document["error"]["message"] == message
    assert proxy.model_requests == []


@pytest.mark.parametrize("path", BODIES)
async def test_a_whole_emoji_is_accepted(proxy: SandboxProxy, path: str) -> None:
    content = json.dumps(BODIES[path]).replace(PROMPT, r"a heron \ud83d\udc26 !delay 0")
    headers = {"Content-Type": "application/json"}
    reply = await proxy.request("POST", path, data=content, headers=headers)
    assert reply.status == 200, reply
    assert "a heron \U0001f426" in proxy.inputs[0]["prompt"]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        pytest.param(b"", "incomplete", id="empty"),
        pytest.param(b"{", "incomplete", id="incomplete"),
        pytest.param(b"[]", "one object", id="a list"),
        pytest.param(b'{"a": 1, "a": 2}', "a key occurs twice", id="a key twice"),
        pytest.param(b'{"a": {"b": 1, "b": 2}}', "a key occurs twice", id="inside"),
        pytest.param(b'{"a": NaN}', "not finite", id="NaN"),
        pytest.param(b'{"a": -Infinity}', "not finite", id="infinity"),
        pytest.param(b'{"a": 1e999}', "not finite", id="beyond the largest number"),
        pytest.param(b'{"\\ud83d": 1}', "half of a surrogate pair", id="half a pair in a key"),
        pytest.param(b'{"a": [{"b": "\\udc00"}]}', "half of a surrogate pair", id="at any depth"),
        pytest.param("{}".encode("utf-16"), "not valid UTF-8", id="UTF-16"),
        pytest.param(b"{" + b'"a": {' * 10_000, "", id="nested too deeply"),
        pytest.param(b'{"a": [' + b"1," * 30_000 + b"1]}", "too many values", id="many values"),
    ],
)
def test_the_reason_is_in_the_message(body: bytes, message: str) -> None:
    with pytest.raises(InvalidTextError, match=rf"^Invalid JSON: .*{message}.*\.$"):
        parse_json(body)


def test_numbers_keep_their_values() -> None:
    document = parse_json(b'{"a": 1, "b": 1.0, "c": 0.5, "d": 1e300}')
    assert document == {"a": 1, "b": 1, "c": 0.5, "d": 1e300}
    assert isinstance(document["b"], int)
    assert isinstance(document["d"], float)


@pytest.mark.parametrize(
    ("content", "is_valid"),
    [(b"", True), ("ü 🎨".encode(), True), (b"\xc3", False), (b"a" * 131_071 + "ü".encode(), True)],
)
def test_bytes_are_validated_in_chunks(content: bytes, is_valid: bool) -> None:
    assert (describe_invalid_bytes(Spool(content)) is None) is is_valid


def test_a_text_inside_may_contain_the_character_of_a_byte_order_mark() -> None:
    assert decode_text("a\ufeffb".encode(), "It") == "a\ufeffb"


def test_a_pair_is_not_half_a_pair() -> None:
    assert not has_half_pair({"a": ["🎨", {"b": "ü"}], "c": 3})
