"""One name for one thing, and no metaphors: words that code, tests and documents avoid."""

import re
from pathlib import Path

import pytest

from tests.support.paths import ROOT

# Word → the term to use instead.
WORDS = {
    "lane": "fast path",
    "lanes": "fast path",
    "door": "protocol, endpoint",
    "doors": "protocol, endpoint",
    "errand": "request, call",
    "errands": "requests, calls",
    "shelf": "cache, store",
    "shelves": "caches, stores",
    "passenger": "waiter, follower",
    "passengers": "waiters, followers",
    "aboard": "joined",
    "landing": "outcome",
    "landings": "outcomes",
    "landed": "done",
    "ticket": "request id, token",
    "tickets": "request ids, tokens",
    "wish": "request, input",
    "wishes": "requests, inputs",
    "purchase": "charge",
    "purchases": "charges",
    "picture": "image",
    "pictures": "images",
    "answer": "response",
    "answers": "responses",
    "answered": "responded to",
    "answering": "responding to",
    "facade": "dialect, API",
    "facades": "dialects, APIs",
    "patience": "timeout",
    "patient": "waiting",
    "mend": "fix",
    "mends": "fixes",
    "mended": "fixed",
    "whoever": "the caller, the client",
    "whom": "the caller, the client",
    "nobody": "no caller, no client",
    "somebody": "a caller, a client",
    "everybody": "all callers, all clients",
    "anybody": "any caller, any client",
    "anew": "again",
    "hurry": "drain",
    "tell": "return, send, notify",
    "tells": "returns, sends, notifies",
    "told": "sent, notified, reported",
    "say": "report, return",
    "says": "reports, returns",
    "said": "reported, returned",
}
# File → words that are right there.
ALLOWED: dict[str, set[str]] = {
    "tests/contracts/test_vocabulary.py": {*WORDS},
    # Error codes and schemas of the API, which are public.
    "falproxy/dialects/openai/responses.py": {"picture"},
    "falproxy/dialects/openai/result_images.py": {"picture"},
    "falproxy/web/openapi/schemas.py": {"picture", "answer"},
    "falproxy/web/openapi/openapi.yaml": {"answer"},
    "tests/dialects/openai/test_images.py": {"picture"},
    "tests/web/test_openapi.py": {"picture", "answer"},
    # A session description that accepts an offer (RFC 3264).
    "falproxy/sandbox/live.py": {"answer"},
    "falproxy/sandbox/live_runner.py": {"answer"},
    "falproxy/sandbox/live_video.py": {"answer"},
    "tests/sandbox/test_live.py": {"answer"},
    "tests/support/fake_live.py": {"answer"},
    # The method of file objects.
    "falproxy/sandbox/cdn.py": {"tell"},
}
SOURCES = (
    "falproxy/**/*.py",
    "falproxy/**/*.js",
    "falproxy/**/*.html",
    "falproxy/**/*.yaml",
    "tests/**/*.py",
    "tests/**/*.js",
    "tests/**/*.mjs",
    "docs/*.md",
    "examples/*/*.py",
    "examples/js-client/*.html",
    "examples/js-client/src/*.js",
    "*.md",
    "docs/*.md",
)
# `in_flight`, `inFlight` and `InFlight` are two words each, `HTTPError` is HTTP and Error.
WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
FILES = [
    path
    for pattern in SOURCES
    for path in sorted(ROOT.glob(pattern))
    if "node_modules" not in path.parts
]


def words_of(text: str) -> set[str]:
    """Return the lower-case words of a text; identifiers are split at `_` and capital letters."""
    return {word.lower() for word in WORD.findall(text)}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_file_uses_the_standard_terms(path: Path) -> None:
    allowed = ALLOWED.get(path.relative_to(ROOT).as_posix(), set())
    used = words_of(path.read_text()) & {*WORDS} - allowed
    assert {word: WORDS[word] for word in used} == {}


@pytest.mark.parametrize("name", ALLOWED)
def test_an_exception_is_still_needed(name: str) -> None:
    assert ALLOWED[name] <= words_of((ROOT / name).read_text())


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("# through the lane", id="a comment"),
        pytest.param("fast_lane = 1", id="a part of a name"),
        pytest.param("class FastLane: ...", id="a part of a class"),
        pytest.param("const fastLane = 1;", id="a part of a name in JavaScript"),
        pytest.param("LANE_MAX = 1", id="a constant"),
        pytest.param("The Lane", id="a heading"),
    ],
)
def test_a_word_is_found_inside_names(text: str) -> None:
    assert "lane" in words_of(text)


def test_a_word_is_not_found_inside_another_word() -> None:
    assert not words_of("planes essay intelligence indoors tells_apart") & {"lane", "say", "tell"}
