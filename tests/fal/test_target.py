"""The table of URLs of fal, and of URLs that only look like them."""

import posixpath
from urllib.parse import unquote, urlsplit

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from yarl import URL

from falproxy.errors import ProxyError
from falproxy.fal.target import FAL_HOSTS, Operation, host_matches, parse_target
from tests.support.fal_urls import FAL_URLS, NOT_FAL

ID = "7e2f0b8a-0001-4000-8000-000000000000"


@pytest.mark.parametrize(("url", "host", "path", "query"), FAL_URLS)
def test_a_fal_url_is_parsed_without_changes(url: str, host: str, path: str, query: str) -> None:
    target = parse_target(url)
    assert (target.host, target.path, target.query) == (host, path, query)


@pytest.mark.parametrize("url", NOT_FAL)
def test_other_urls_are_refused(url: str) -> None:
    with pytest.raises(ProxyError) as refusal:
        parse_target(url)
    assert (refusal.value.status, refusal.value.code) == (412, "target_not_fal")


@pytest.mark.parametrize(
    ("host", "allowed"),
    [
        pytest.param("queue.fal.run", True, id="a name below the wildcard"),
        pytest.param("fal.run", True, id="the synchronous host, listed by itself"),
        pytest.param("notfal.run", False, id="same letters without the dot"),
        pytest.param("run", False, id="the suffix's own suffix"),
    ],
)
def test_host_matches(host: str, allowed: bool) -> None:
    assert host_matches(host, FAL_HOSTS) is allowed


QUEUE = "https://queue.fal.run/fal-ai/flux-pro"


@pytest.mark.parametrize(
    ("url", "operation", "endpoint"),
    [
        ("https://fal.run/fal-ai/flux-pro/kontext", Operation.RUN, "fal-ai/flux-pro/kontext"),
        ("https://fal.run/fal-ai/flux/dev/stream", Operation.STREAM, "fal-ai/flux/dev"),
        (f"{QUEUE}/kontext/max", Operation.SUBMIT, "fal-ai/flux-pro/kontext/max"),
        (f"{QUEUE}/requests/{ID}", Operation.RESULT, "fal-ai/flux-pro"),
        (f"{QUEUE}/requests/{ID}/response", Operation.RESULT, "fal-ai/flux-pro"),
        (f"{QUEUE}/requests/{ID}/status?logs=1", Operation.STATUS, "fal-ai/flux-pro"),
        (f"{QUEUE}/kontext/requests/{ID}/status", Operation.STATUS, "fal-ai/flux-pro/kontext"),
        (f"{QUEUE}/requests/{ID}/status/stream", Operation.STATUS_STREAM, "fal-ai/flux-pro"),
        (f"{QUEUE}/requests/{ID}/cancel", Operation.CANCEL, "fal-ai/flux-pro"),
        ("https://queue.fal.run/workflows/me/w/requests/1", Operation.RESULT, "workflows/me/w"),
        (f"{QUEUE}/requests/{ID}/other", Operation.OTHER, "fal-ai/flux-pro"),
        ("https://rest.fal.ai/tokens/", Operation.OTHER, None),
    ],
)
def test_the_operation_of_a_target(url: str, operation: Operation, endpoint: str | None) -> None:
    target = parse_target(url)
    assert (target.operation, target.endpoint) == (operation, endpoint)


# Parts of URLs, which the test combines.
PIECES = st.sampled_from(
    [
        *(
            "https",
            "http",
            "HTTPS",
            ":",
            "/",
            "//",
            "\\",
            "@",
            "#",
            "?",
            "&",
            "=",
            ";",
            "%",
            ".",
            "..",
        ),
        *("fal.run", "fal.ai", "queue.fal.run", "evil.tld", "FAL.RUN", ":443", ":444", "[::1]"),
        *("%2e", "%2f", "%5c", "%00", "\t", "\n", " ", "\u0430", "\uff0e", "fal_jwt_token", "x"),
    ]
)
URLS = st.one_of(
    st.lists(PIECES, max_size=10).map("".join),
    st.lists(PIECES, max_size=8).map(lambda pieces: "https://" + "".join(pieces)),
    st.lists(PIECES, max_size=8).map(lambda pieces: "https://fal.run" + "".join(pieces)),
)


@pytest.mark.slow
@settings(max_examples=2000, deadline=None)
@given(url=URLS)
def test_accepted_urls_are_fal_s_for_other_parsers_as_well(url: str) -> None:
    """Other parsers must read the same host, so that the key is sent to fal only."""
    try:
        target = parse_target(url)
    except ProxyError:
        return
    standard, whatwg = urlsplit(url), URL(url)
    assert standard.hostname == whatwg.host == target.host
    assert (standard.port or 443) == (whatwg.port or 443) == 443
    assert f".{target.host}".endswith((".fal.run", ".fal.ai"))
    assert target.path == (standard.path or "/")
    plain = unquote(target.path)
    assert posixpath.normpath(plain) == (plain.rstrip("/") or "/")


@pytest.mark.parametrize("path", ["/a%2Fb", "/a/../b", "/%61", "/a//b", "/a;b"])
def test_an_unusual_path_passes_if_it_is_listed_as_it_stands(path: str) -> None:
    url = f"https://rest.fal.ai{path}"
    for listed in ((), ("rest.fal.ai/**",), (f"rest.fal.ai{path}x",)):
        with pytest.raises(ProxyError) as refusal:
            parse_target(url, listed)
        assert refusal.value.status == 412
    target = parse_target(url, (f"rest.fal.ai{path}",))
    assert (target.host, target.path) == ("rest.fal.ai", path)
