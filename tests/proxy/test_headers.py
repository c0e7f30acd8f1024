"""Which header fields are sent to fal, and which are relayed to the client."""

import pytest
from multidict import CIMultiDict, CIMultiDictProxy

from falproxy.proxy.headers import (
    CLIENT_PROXY,
    HEADER_LINES,
    NAME_LENGTH_MAX,
    NAMES_MAX,
    REQUEST_NAMES,
    RESPONSE_DENIED,
    RESPONSE_NAMES,
    NameCache,
    clean_reason,
    encode_lines,
    encode_value,
    is_identity,
    request_headers,
    response_headers,
)

KEY = "Key a:b"


def filtered_request(*pairs: tuple[str, str]) -> list[tuple[str, str]]:
    return list(request_headers(CIMultiDictProxy(CIMultiDict(pairs)), KEY).items())


ADDED_BY_PROXY = [("authorization", KEY), ("x-fal-client-proxy", CLIENT_PROXY)]


@pytest.mark.parametrize(
    "name",
    [
        "accept",
        "Accept-Encoding",
        "content-type",
        "content-encoding",
        "User-Agent",
        "traceparent",
        "tracestate",
        "x-fal-queue-priority",
        "X-Fal-Request-Timeout",
        "X-Fal-Object-Lifecycle-Preference",
        "x-app-fal-disable-fallback",
    ],
)
def test_a_field_that_fal_reads_is_sent(name: str) -> None:
    assert filtered_request((name, "v")) == [(name.lower(), "v"), *ADDED_BY_PROXY]


@pytest.mark.parametrize(
    "name",
    [
        "authorization",
        "Cookie",
        "origin",
        "referer",
        "forwarded",
        "x-forwarded-for",
        "x-real-ip",
        "via",
        "x-api-key",
        "x-falproxy-key",
        "host",
        "content-length",
        "transfer-encoding",
        "te",
        "upgrade",
        "proxy-authorization",
        "x-fal-target-url",
        "X-Fal-CDN-Token",
        "x-app-fal-can-disable-filter",
        "x-fal-client-proxy",
        "x-request-id",
        "if-none-match",
        "range",
    ],
)
def test_other_fields_are_not_sent(name: str) -> None:
    assert filtered_request((name, "v")) == ADDED_BY_PROXY


def test_repeated_fields_are_sent_in_order() -> None:
    pairs = (("accept", "application/json"), ("x-fal-a", "1"), ("Accept", "text/event-stream"))
    assert filtered_request(*pairs) == [
        *((name.lower(), value) for name, value in pairs),
        *ADDED_BY_PROXY,
    ]


def test_fields_named_by_connection_are_not_sent() -> None:
    assert (
        filtered_request(
            ("connection", "keep-alive, X-Fal-Hint"),
            ("Connection", "x-fal-tags"),
            ("x-fal-hint", "a"),
            ("x-fal-tags", "b"),
        )
        == ADDED_BY_PROXY
    )


def test_a_connection_header_cannot_remove_the_key() -> None:
    assert filtered_request(("connection", "authorization, x-fal-client-proxy")) == ADDED_BY_PROXY


def test_response_fields_stay_in_order_with_repeats() -> None:
    raw = [(b"X-A", b"1"), (b"link", b"a"), (b"x-a", b"2"), (b"Link", b"b")]
    assert list(response_headers(raw).items()) == [(n.decode(), v.decode()) for n, v in raw]


@pytest.mark.parametrize(
    "name",
    [
        "Connection",
        "Keep-Alive",
        "Proxy-Authenticate",
        "Proxy-Connection",
        "TE",
        "Trailer",
        "Transfer-Encoding",
        "Upgrade",
        "Alt-Svc",
        "Access-Control-Allow-Origin",
        "access-control-expose-headers",
        "x-fal-cdn-token",
    ],
)
def test_fields_about_fal_s_connection_or_origin_are_not_relayed(name: str) -> None:
    assert list(response_headers([(name.encode(), b"v"), (b"x-fal-request-id", b"1")])) == [
        "x-fal-request-id"
    ]


def test_response_fields_named_by_connection_are_not_relayed() -> None:
    raw = [(b"Connection", b"close, X-Secret"), (b"x-secret", b"1"), (b"x-public", b"2")]
    assert list(response_headers(raw)) == ["x-public"]


@pytest.mark.parametrize(
    "name", ["content-length", "content-encoding", "content-type", "vary", "location", "date"]
)
def test_representation_fields_are_relayed(name: str) -> None:
    assert list(response_headers([(name.encode(), b"v")])) == [name]


@pytest.mark.parametrize("encoding", ["ascii", "utf-8", "latin-1"])
def test_a_value_keeps_its_bytes(encoding: str) -> None:
    value = ("name" if encoding == "ascii" else "pr\u00e9nom").encode(encoding)
    decoded = response_headers([(b"x-name", value)])["x-name"]
    assert encode_value(decoded) == value
    assert encode_lines([f"x-name: {decoded}"]) == b"x-name: " + value + b"\r\n\r\n"


@pytest.mark.parametrize("name", sorted(RESPONSE_DENIED))
def test_fields_for_fal_s_origin_are_not_relayed(name: str) -> None:
    spellings = [(name.encode(), b"v"), (name.title().encode(), b"v"), (name.upper().encode(), b"")]
    assert not response_headers(spellings)


@pytest.mark.parametrize(
    "name",
    [
        "X-Accel-Redirect",
        "x-accel-expires",
        "X-Sendfile",
        "X-Sendfile2",
        "X-LIGHTTPD-send-file",
        "X-LiteSpeed-Location",
        "X-LiteSpeed-Purge",
        "X-Reproxy-URL",
    ],
)
def test_fields_for_servers_in_front_of_the_proxy_are_not_relayed(name: str) -> None:
    assert not response_headers([(name.encode(), b"/etc/passwd")])


@pytest.mark.parametrize("function_cache", [REQUEST_NAMES, RESPONSE_NAMES, HEADER_LINES])
def test_the_cache_of_header_names_is_bounded_in_bytes(function_cache: NameCache) -> None:  # type: ignore[type-arg]
    is_text = function_cache is REQUEST_NAMES
    for number in range(NAMES_MAX + 100):
        name = f"x-fal-{number}"
        function_cache[name if is_text else name.encode()]
        function_cache[("a" * 30_000 + name) if is_text else b"a" * 30_000 + name.encode()]
    assert len(function_cache) <= NAMES_MAX
    assert sum(map(len, function_cache)) <= NAMES_MAX * NAME_LENGTH_MAX


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ((), True),
        (("",), True),
        (("Identity",), True),
        (("identity", "identity, "), True),
        (("gzip",), False),
        (("identity", "gzip"), False),
        (("gzip", "identity"), False),
        (("identity, br",), False),
    ],
)
def test_all_lines_of_a_content_encoding_count(lines: tuple[str, ...], expected: bool) -> None:
    headers = CIMultiDict(("Content-Encoding", line) for line in lines)
    assert is_identity(headers) is expected


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"OK", "OK"),
        (b"", ""),
        (b"a\tb", "a\tb"),
        (b"a\x01b", ""),
        (b"a\x7fb", ""),
        (b"a\rb", ""),
        (b"a\nb", ""),
    ],
)
def test_a_reason_with_control_characters_is_dropped(raw: bytes, reason: str) -> None:
    assert clean_reason(raw) == reason
