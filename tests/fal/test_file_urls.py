"""Addresses in a document: which are of fal's files, where they stand, and all else untouched."""

import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from falproxy.fal.file_urls import find_links, is_fal_file, replace_links

FAL = "https://v3.fal.media/files/a/b.png"
KEPT = "https://kept.example/files/c.png"


# URLs of fal's files


@pytest.mark.parametrize(
    "url",
    [
        pytest.param("https://fal.media/a.png", id="the host itself"),
        pytest.param("https://v3.fal.media/files/b/c/d.png", id="a host below it"),
        pytest.param("https://a.b.fal.media/a.png", id="a host two labels below"),
        pytest.param("https://V3.FAL.media/a.png", id="capitals"),
        pytest.param("HTTPS://v3.fal.media/a.png", id="a scheme in capitals"),
        pytest.param("https://v3.fal.media/", id="the root"),
        pytest.param("https://v3.fal.media/a.png?sig=a/b&c=@:", id="a query"),
        pytest.param("https://v3.fal.media/a@b:c/%C3%A9%20.png", id="characters of a path"),
        pytest.param("https://storage.googleapis.com/falserverless/a/b.png", id="the bucket"),
        pytest.param("https://storage.googleapis.com/falserverless/a.png?x=..", id="bucket, query"),
        pytest.param("https://Storage.GoogleAPIs.com/falserverless/a.png", id="bucket, capitals"),
    ],
)
def test_urls_of_fal_s_files(url: str) -> None:
    assert is_fal_file(url)


@pytest.mark.parametrize(
    "url",
    [
        pytest.param("https://evilfal.media/a.png", id="the same letters without the dot"),
        pytest.param("https://fal.media.evil.com/a.png", id="a host that starts so"),
        pytest.param("https://fal.media@evil.com/a.png", id="a user that looks like it"),
        pytest.param("https://evil.com@fal.media/a.png", id="a user"),
        pytest.param("https://a:b@fal.media/a.png", id="a user with a password"),
        pytest.param("https://evil.com/fal.media/a.png", id="in the path"),
        pytest.param("https://evil.com/?https://fal.media/a.png", id="in the query"),
        pytest.param("https://evil.com#@fal.media/a.png", id="behind a fragment"),
        pytest.param("https://evil.com\\@fal.media/a.png", id="behind a backslash"),
        pytest.param("https://fal.media\\a.png", id="a backslash for the slash"),
        pytest.param("https://fal.media/a\\b.png", id="a backslash in the path"),
        pytest.param("https:\\\\fal.media/a.png", id="backslashes"),
        pytest.param("https://fal.media:443/a.png", id="a port, though the usual one"),
        pytest.param("https://fal.media:8443/a.png", id="another port"),
        pytest.param("https://fal.media:/a.png", id="an empty port"),
        pytest.param("http://fal.media/a.png", id="plain http"),
        pytest.param("ftp://fal.media/a.png", id="another scheme"),
        pytest.param("//fal.media/a.png", id="no scheme"),
        pytest.param("fal.media/a.png", id="a host alone"),
        pytest.param("https://fal.media./a.png", id="a dot at the end"),
        pytest.param("https://fal.media", id="no path"),
        pytest.param("https://fal.media?a", id="a query without a path"),
        pytest.param("https://fal.media/a.png#part", id="a fragment"),
        pytest.param("https://fal.media/a b.png", id="a space"),
        pytest.param("https://fal.media/a.png\n", id="a line's end"),
        pytest.param(" https://fal.media/a.png", id="a space before"),
        pytest.param("https://fal.media/\x00", id="NUL"),
        pytest.param('https://fal.media/"a', id="a quote"),
        pytest.param("https://fal.media/ä.png", id="another alphabet"),
        pytest.param("https://fal%2emedia/a.png", id="an escaped dot"),
        pytest.param("https://fal。media/a.png", id="a dot of IDNA"),
        pytest.param("https://fal.run/a.png", id="a host for calls"),
        pytest.param("https://cdn.fal.ai/a.png", id="another host of fal's"),
        pytest.param("https://storage.googleapis.com/other/a.png", id="another bucket"),
        pytest.param("https://storage.googleapis.com/falserverless", id="the bucket's listing"),
        pytest.param("https://storage.googleapis.com/falserverless2/a", id="a name that starts so"),
        pytest.param("https://storage.googleapis.com/Falserverless/a", id="a bucket in capitals"),
        pytest.param("https://storage.googleapis.com//falserverless/a", id="two slashes"),
        pytest.param("https://storage.googleapis.com/x/falserverless/a", id="below a bucket"),
        pytest.param("https://falserverless.storage.googleapis.com/a", id="the bucket as a host"),
        pytest.param("https://x.storage.googleapis.com/falserverless/a", id="a host below it"),
        pytest.param("https://storage.googleapis.com/falserverless/../x/a", id="out of the bucket"),
        pytest.param("https://storage.googleapis.com/falserverless/%2e%2e/x/a", id="escaped dots"),
        pytest.param("https://storage.googleapis.com/falserverless/.%2E/x", id="one escaped dot"),
        pytest.param("https://storage.googleapis.com/falserverless/..%2fx", id="escaped slash"),
        pytest.param("https://storage.googleapis.com/falserverless/a/..", id="dots at the end"),
        pytest.param("https://storage.googleapis.com/falserverless/%252e%252e/x", id="twice"),
        pytest.param("", id="nothing"),
    ],
)
def test_urls_of_other_things(url: str) -> None:
    assert not is_fal_file(url)


@pytest.mark.parametrize(
    "url",
    [
        pytest.param("https://\u212a.fal.media/a.png", id="the sign for Kelvin, a K by IDNA"),
        pytest.param("https://\u017f.fal.media/a.png", id="a long s"),
        pytest.param("https://.fal.media/a.png", id="an empty label"),
        pytest.param("https://..fal.media/a.png", id="two empty labels"),
    ],
)
def test_an_invalid_host_is_not_fal_s(url: str) -> None:
    assert not is_fal_file(url)


# Links in documents


def urls_in(document: bytes) -> list[str]:
    return [link.url for link in find_links(document)]


@pytest.mark.parametrize(
    ("document", "found"),
    [
        pytest.param('{"url": "https://a/b"}', ["https://a/b"], id="plain"),
        pytest.param('{"url":"http://a/b"}', ["http://a/b"], id="http, no space"),
        pytest.param('{"url" \t\r\n: \t\r\n "https://a"}', ["https://a"], id="all white space"),
        pytest.param(
            '{"a": [[{"b": {"url": "https://a"}}], {"url": "https://b"}], "url": "https://c"}',
            ["https://a", "https://b", "https://c"],
            id="any depth",
        ),
        pytest.param('[{"url": "https://a"}, {"url": "https://a"}]', ["https://a"] * 2, id="twice"),
        pytest.param('{"url": {"url": "https://a"}}', ["https://a"], id="an object in it"),
        pytest.param(
            '{"url": "https://a", "url": "https://b"}', ["https://a", "https://b"], id="two keys"
        ),
        pytest.param('{"image_url": "https://a"}', [], id="a key that ends so"),
        pytest.param('{"urls": ["https://a"]}', [], id="a key that starts so"),
        pytest.param('{"urls": "https://a"}', [], id="a plural"),
        pytest.param('{"URL": "https://a"}', [], id="capitals"),
        pytest.param('{" url": "https://a"}', [], id="a space in the key"),
        pytest.param('{"a\\"url": "https://a"}', [], id="a key with a quote in it"),
        pytest.param('["https://a", "url", "https://b"]', [], id="bare strings"),
        pytest.param('{"key": "url", "value": "https://a"}', [], id="the word as a value"),
        pytest.param('"https://a"', [], id="a string alone"),
        pytest.param('{"url": ["https://a"]}', [], id="a list in it"),
        pytest.param('{"url": null, "a": "https://a"}', [], id="null"),
        pytest.param('{"url": "a https://a"}', [], id="words before"),
        pytest.param('{"url": "/files/a"}', [], id="a path"),
        pytest.param('{"url": "data:image/png;base64,https://a"}', [], id="a data URI"),
        pytest.param('{"url": ""}', [], id="an empty string"),
        pytest.param('{"url": "https:', [], id="cut off"),
        pytest.param('{"url": "https://a\n"}', [], id="a line's end in a string, which is no JSON"),
        pytest.param('{"url": "https://a\\x"}', [], id="an escape that JSON does not have"),
        pytest.param("", [], id="nothing"),
        pytest.param('"url"', [], id="the key alone"),
        pytest.param('data: {"url": "https://a"}', ["https://a"], id="a line of an event stream"),
        pytest.param(
            'event: x\ndata: {"url": "https://a"}\n\ndata: {"url": "https://b"}\n\n',
            ["https://a", "https://b"],
            id="several events",
        ),
    ],
)
def test_links_are_found_with_their_offsets(document: str, found: list[str]) -> None:
    assert urls_in(document.encode()) == found


@pytest.mark.parametrize(
    "inner",
    [
        pytest.param({"url": FAL}, id="an object"),
        pytest.param([{"a": {"url": FAL}}], id="deep"),
        pytest.param({"a": 'x"url'}, id="a quote before the key's word"),
        pytest.param(json.dumps({"url": FAL}), id="JSON in JSON in JSON"),
    ],
)
def test_json_inside_a_string_is_a_string(inner: object) -> None:
    document = json.dumps({"log": json.dumps(inner), "image": {"url": FAL}}).encode()
    assert urls_in(document) == [FAL]
    assert json.loads(replace_links(document, {FAL: KEPT})) == {
        "log": json.dumps(inner),
        "image": {"url": KEPT},
    }


@pytest.mark.parametrize(
    "spelled",
    [
        pytest.param(FAL, id="plain"),
        pytest.param(FAL.replace("/", r"\/"), id="slashes as PHP writes them"),
        pytest.param(FAL.replace("v3", r"\u00763"), id="a letter"),
        pytest.param(FAL.replace(".", r"\u002E"), id="dots"),
    ],
)
def test_escapes_in_urls_are_decoded(spelled: str) -> None:
    document = b'{"url": "%s"}' % spelled.encode()
    if "\\u0076" not in spelled:
        assert document.count(b"https:") == 1
    assert urls_in(document) == [FAL]
    assert replace_links(document, {FAL: KEPT}) == b'{"url": "%s"}' % KEPT.encode()


def test_an_escaped_ampersand_is_decoded() -> None:
    assert urls_in(rb'{"url": "https://a/?b=c\u0026d=\"\\"}') == ['https://a/?b=c&d="\\']


def test_the_offsets_of_a_link_include_the_quotes() -> None:
    document = b'{"a": 1, "url": "https://a/b", "c": 2}'
    (link,) = find_links(document)
    assert document[link.start : link.stop] == b'"https://a/b"'


def test_invalid_utf_8_is_no_url() -> None:
    document = b'{"url": "https://a/\xff"}, {"url": "https://b"}'
    assert urls_in(document) == ["https://b"]


# Replacement


@pytest.mark.parametrize(
    "around",
    [
        pytest.param('{"a": 1.0, "b": 1e5, "c": -0, "d": 1E+400, %s}', id="numbers as written"),
        pytest.param('{"seed": 123456789012345678901234567890, %s}', id="a huge integer"),
        pytest.param('{"a": 1, "a": 2, %s, "a": 3}', id="a key more than once"),
        pytest.param('\ufeff {\r\n\t"a" :  [ ] ,\n%s\n}\n\n', id="white space"),
        pytest.param('{"é": "日本 🎨", %s}', id="letters of other alphabets"),
        pytest.param(r'{"\u00e9": "\ud83c\udfa8\/\u0022\n", %s}', id="escapes"),
        pytest.param(r'{"a": "\ud800", %s}', id="half a character"),
        pytest.param('{"a": NaN, %s}', id="values of Python's parser that JSON does not have"),
        pytest.param('{"image_url": "https://v3.fal.media/files/a/b.png", %s}', id="another key"),
        pytest.param('data: {"n": 1}\n\ndata: {%s}\n\n: ping\n\n', id="an event stream"),
        pytest.param("no JSON at all: %s", id="no JSON at all"),
    ],
)
def test_every_other_byte_stays_as_it_was(around: str) -> None:
    given = (around % f'"url" :  "{FAL}"').encode()
    assert replace_links(given, {FAL: KEPT}) == (around % f'"url" :  "{KEPT}"').encode()
    assert replace_links(given, {}) == given
    assert replace_links(given, {FAL: FAL}) == given


def test_only_urls_in_the_mapping_are_replaced() -> None:
    document = b'[{"url": "https://a"}, {"url": "https://b"}, {"url": "https://a"}]'
    replaced = replace_links(document, {"https://a": "https://c", "https://x": "https://y"})
    assert replaced == b'[{"url": "https://c"}, {"url": "https://b"}, {"url": "https://c"}]'


def test_a_replaced_url_is_encoded_as_json() -> None:
    odd = 'https://kept.example/"\\\né'
    document = replace_links(b'{"url": "https://a"}', {"https://a": odd})
    assert document.isascii()
    assert json.loads(document) == {"url": odd}


def test_a_replaced_url_is_not_replaced_again() -> None:
    urls = {"https://a": "https://b", "https://b": "https://a"}
    document = b'[{"url": "https://a"}, {"url": "https://b"}]'
    assert replace_links(document, urls) == b'[{"url": "https://b"}, {"url": "https://a"}]'


TEXTS = st.sampled_from(["url", "https://a", "https://b", '"url": "https://a"', "\\", '"', "é\n"])
ADDRESSES = st.sampled_from(["https://a", "https://b", 'https://c/é?\\"'])
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | TEXTS | ADDRESSES
DOCUMENTS = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.just("url") | TEXTS | st.text(max_size=3), inner, max_size=4)
    ),
    max_leaves=20,
)
LAYOUTS = st.fixed_dictionaries(
    {
        "indent": st.sampled_from([None, 0, 3, "\t"]),
        "separators": st.sampled_from([(",", ":"), (", ", ": "), (" , ", " : ")]),
        "ensure_ascii": st.booleans(),
    }
)
OTHERS = {"https://a": "https://kept/1", 'https://c/é?\\"': 'https://kept/"\\é'}


def replaced(value: object) -> object:
    """Return the document with URLs replaced in the parsed JSON."""
    if isinstance(value, list):
        return [replaced(item) for item in value]
    if not isinstance(value, dict):
        return value
    return {
        key: OTHERS.get(item, item) if key == "url" and isinstance(item, str) else replaced(item)
        for key, item in value.items()
    }


@given(value=DOCUMENTS, layout=LAYOUTS)
def test_links_are_those_that_a_json_parser_finds(value: object, layout: dict[str, object]) -> None:
    document = json.dumps(value, **layout).encode("utf-8", "surrogatepass")  # type: ignore[arg-type]
    try:
        read = json.loads(document)
    except ValueError:  # half a character, which is no UTF-8
        return
    result = replace_links(document, OTHERS)
    assert json.dumps(json.loads(result)) == json.dumps(replaced(read))
    assert replace_links(document, {}) is document


@given(document=st.binary() | st.text(alphabet='"url:htps\\{} \n').map(str.encode))
def test_no_bytes_raise_an_exception(document: bytes) -> None:
    assert replace_links(document, {}) == document
    for link in find_links(document):
        assert document[link.start : link.stop].startswith(b'"http')


# Time


def seconds_for(document: bytes) -> float:
    started = time.perf_counter()
    replace_links(document, {FAL: KEPT})
    return time.perf_counter() - started


@pytest.mark.timed
@pytest.mark.parametrize(
    "document",
    [
        pytest.param(
            b'{"images": [{"url": "data:image/png;base64,%s"}, {"url": "%s"}]}'
            % (b"iVBORw0KGgo" * 1_400_000, FAL.encode()),
            id="a data URI of 15 MB",
        ),
        pytest.param(b'{"log": "%s", "url": "https://a"}' % (b'\\"url\\": ' * 1_000_000), id="log"),
        pytest.param(b'{"url": "https:%s"}' % (b"\\/" * 1_000_000), id="an address of escapes"),
        pytest.param(b'"url"' * 500_000, id="keys without values"),
        pytest.param(b'{"url":%s' % (b" " * 8_000_000), id="white space without an end"),
    ],
)
def test_large_documents_are_searched_quickly(document: bytes) -> None:
    assert seconds_for(document) < 2


@pytest.mark.timed
@pytest.mark.parametrize(
    "document",
    [
        pytest.param(b'{"url": "https:%s' % (b"a" * 25), id="a string without an end"),
        pytest.param(b'{"url": "https:%s\n"}' % (b"a" * 25), id="a line's end within a string"),
    ],
)
def test_truncated_documents_are_searched_quickly(document: bytes) -> None:
    assert seconds_for(document) < 0.5
