"""The table of URLs of fal, and of URLs that only look like them."""

import posixpath
from urllib.parse import unquote, urlsplit

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from yarl import URL

from falproxy.errors import ProxyError
from falproxy.fal.target import FAL_HOSTS, Operation, host_matches, parse_target

ID = "7e2f0b8a-0001-4000-8000-000000000000"

FAL_URLS = [
    pytest.param("https://fal.run/fal-ai/flux/dev", "fal.run", "/fal-ai/flux/dev", "", id="run"),
    pytest.param("https://queue.fal.run/fal-ai/flux", "queue.fal.run", "/fal-ai/flux", "", id="q"),
    pytest.param("https://rest.fal.ai/tokens/", "rest.fal.ai", "/tokens/", "", id="last slash"),
    pytest.param("https://a.b.c.fal.ai/x", "a.b.c.fal.ai", "/x", "", id="labels below labels"),
    pytest.param("https://fal.ai", "fal.ai", "/", "", id="no path is the root"),
    pytest.param("https://fal.run?x", "fal.run", "/", "?x", id="a query without a path"),
    pytest.param("https://fal.run/x?", "fal.run", "/x", "?", id="a lone question mark stays"),
    pytest.param("https://fal.run/x?a=b?c", "fal.run", "/x", "?a=b?c", id="two question marks"),
    pytest.param("HTTPS://FAL.RUN/X", "fal.run", "/X", "", id="capitals in scheme and host"),
    pytest.param("https://fal.run:443/x", "fal.run", "/x", "", id="https's own port"),
    pytest.param(
        "https://queue.fal.run/a/b?fal_webhook=https%3A%2F%2Fa.b%2Fc%3Fd%3De&x=%20",
        "queue.fal.run",
        "/a/b",
        "?fal_webhook=https%3A%2F%2Fa.b%2Fc%3Fd%3De&x=%20",
        id="escapes in the query stay",
    ),
    pytest.param("https://fal.run/a/%C3%A9%20b", "fal.run", "/a/%C3%A9%20b", "", id="escapes stay"),
    pytest.param("https://fal.run/a/b..c/...", "fal.run", "/a/b..c/...", "", id="dots in names"),
]


@pytest.mark.parametrize(("url", "host", "path", "query"), FAL_URLS)
def test_a_fal_url_is_parsed_without_changes(url: str, host: str, path: str, query: str) -> None:
    target = parse_target(url)
    assert (target.host, target.path, target.query) == (host, path, query)


# pitfalls: every line is something that a gateway somewhere has taken for its upstream.
NOT_FAL = [
    pytest.param("https://fal.run.evil.tld/x", id="fal.run as a sub-domain"),
    pytest.param("https://evilfal.run/x", id="same letters without the dot"),
    pytest.param("https://notfal.ai/x", id="same letters without the dot, fal.ai"),
    pytest.param("https://evil-fal.run/x", id="same letters after a hyphen"),
    pytest.param("https://fal.run@evil.tld/x", id="fal.run as user info"),
    pytest.param("https://user:pass@fal.run/x", id="user info before fal.run"),
    pytest.param("https://@fal.run/x", id="empty user info"),
    pytest.param("https://evil.tld#fal.run", id="fal.run as a fragment"),
    pytest.param("https://evil.tld?fal.run", id="fal.run as a query"),
    pytest.param("https://evil.tld/fal.run", id="fal.run as a path"),
    pytest.param("https://fal.run/x#fragment", id="a fragment"),
    pytest.param("https://fal.run./x", id="trailing dot"),
    pytest.param("https://.fal.run/x", id="leading dot"),
    pytest.param("https://a..fal.run/x", id="empty label"),
    pytest.param("https://-a.fal.run/x", id="label with a leading hyphen"),
    pytest.param("https://a_b.fal.run/x", id="underscore in a label"),
    pytest.param("https://f\u0430l.run/x", id="a Cyrillic letter"),
    pytest.param("https://xn--fl-7kc.run/x", id="the same in punycode"),
    pytest.param("https://fal\uff0erun/x", id="full-width dot"),
    pytest.param("https://fal\u3002run/x", id="ideographic full stop"),
    pytest.param("https://fal.run%2eevil.tld/x", id="an escaped dot in the host"),
    pytest.param("https://fal%2erun/x", id="fal.run with an escaped dot"),
    pytest.param("https://fal.run%00.evil.tld/x", id="an escaped NUL in the host"),
    pytest.param("https://fal.run:444/x", id="another port"),
    pytest.param("https://fal.run:0443/x", id="443 in an odd spelling"),
    pytest.param("https://fal.run:/x", id="an empty port"),
    pytest.param("https://fal.run:443:443/x", id="two ports"),
    pytest.param("https://fal.run:80/x", id="http's port"),
    pytest.param("https://[::1]/x", id="IPv6 literal"),
    pytest.param("https://127.0.0.1/x", id="IPv4 literal"),
    pytest.param("https://2130706433/x", id="IPv4 as one number"),
    pytest.param("https://localhost/x", id="localhost"),
    pytest.param("https://falrun.com/x", id="the backup host is never a target"),
    pytest.param("https://queue.falrun.com/x", id="the queue's backup host is never a target"),
    pytest.param("https://v3.fal.media/x", id="the CDN takes no key"),
    pytest.param("http://fal.run/x", id="no TLS"),
    pytest.param("wss://fal.run/x", id="a socket"),
    pytest.param("ftp://fal.run/x", id="another scheme"),
    pytest.param("javascript://fal.run/x", id="a script"),
    pytest.param("https:\\\\fal.run\\x", id="backslashes for slashes"),
    pytest.param("https://fal.run\\@evil.tld/x", id="a backslash before the at"),
    pytest.param("https://evil.tld\\.fal.run/x", id="a backslash in the host"),
    pytest.param("//fal.run/x", id="no scheme"),
    pytest.param("fal.run/x", id="a bare host"),
    pytest.param("/fal-ai/flux", id="a path"),
    pytest.param("https:/fal.run/x", id="one slash"),
    pytest.param("https:///fal.run/x", id="three slashes"),
    pytest.param("https:fal.run/x", id="no slash"),
    pytest.param("https://", id="no host"),
    pytest.param(" https://fal.run/x", id="leading space"),
    pytest.param("https://fal.run/x ", id="trailing space"),
    pytest.param("\x01https://fal.run/x", id="leading control character"),
    pytest.param("https://fal.run/a\tb", id="a tab inside"),
    pytest.param("https://fal.run/a\nb", id="a newline inside"),
    pytest.param("https://fal.run/a\r\nx-evil: 1", id="a header inside"),
    pytest.param("https://fal.run/a\x00b", id="a NUL inside"),
    pytest.param("https://fal.run/a b", id="a space inside"),
    pytest.param("https://fal.run/\u00e9", id="a letter that needs escaping"),
    pytest.param("https://fal.run/\udce9", id="a byte that is not UTF-8"),
    pytest.param("https://fal.run/%zz", id="a broken escape"),
    pytest.param("https://fal.run/x?a=%2", id="an escape cut short"),
    pytest.param("https://fal.run/fal-ai/flux/../../other", id="dot segments"),
    pytest.param("https://fal.run/fal-ai/./flux", id="a single dot"),
    pytest.param("https://fal.run/fal-ai/%2e%2e/other", id="escaped dots"),
    pytest.param("https://fal.run/fal-ai/.%2E/other", id="half escaped dots"),
    pytest.param("https://fal.run/fal-ai/..;/other", id="dots with parameters"),
    pytest.param("https://fal.run/fal-ai/flux;a=b", id="path parameters"),
    pytest.param("https://fal.run/fal-ai//flux", id="an empty segment"),
    pytest.param("https://fal.run//fal-ai/flux", id="two leading slashes"),
    pytest.param("https://fal.run/fal-ai%2Fflux", id="an escaped slash"),
    pytest.param("https://fal.run/fal-ai%5cflux", id="an escaped backslash"),
    pytest.param("https://fal.run/fal-ai%252fflux", id="a slash escaped twice"),
    pytest.param("https://fal.run/fal-ai%3Fx", id="an escaped question mark"),
    pytest.param("https://fal.run/fal-ai%23x", id="an escaped hash"),
    pytest.param("https://fal.run/fal-ai%0d%0ax", id="an escaped line end"),
    pytest.param("https://fal.run/x?fal_jwt_token=abc", id="a token of the visitor's"),
    pytest.param("https://fal.run/x?a=b&fal_jwt_token", id="the token's name alone"),
    pytest.param("https://fal.run/x?fal%5Fjwt%5ftoken=abc", id="the token's name escaped"),
]


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
