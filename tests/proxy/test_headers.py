"""Which header fields go up and which come back down."""

import pytest
from multidict import CIMultiDict, CIMultiDictProxy

from falproxy.proxy.headers import CLIENT_PROXY, request_headers, response_headers

KEY = "Key a:b"


def up(*pairs: tuple[str, str]) -> list[tuple[str, str]]:
    return list(request_headers(CIMultiDictProxy(CIMultiDict(pairs)), KEY).items())


OURS = [("authorization", KEY), ("x-fal-client-proxy", CLIENT_PROXY)]


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
def test_a_field_that_fal_reads_goes_up(name: str) -> None:
    assert up((name, "v")) == [(name.lower(), "v"), *OURS]


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
def test_a_field_that_is_not_fal_s_business_stays_here(name: str) -> None:
    assert up((name, "v")) == OURS


def test_repeated_fields_go_up_in_their_order() -> None:
    pairs = (("accept", "application/json"), ("x-fal-a", "1"), ("Accept", "text/event-stream"))
    assert up(*pairs) == [*((name.lower(), value) for name, value in pairs), *OURS]


def test_what_any_connection_line_names_stays_here() -> None:
    assert (
        up(
            ("connection", "keep-alive, X-Fal-Hint"),
            ("Connection", "x-fal-tags"),
            ("x-fal-hint", "a"),
            ("x-fal-tags", "b"),
        )
        == OURS
    )


def test_a_connection_line_cannot_take_our_key_out() -> None:
    assert up(("connection", "authorization, x-fal-client-proxy")) == OURS


def test_answers_keep_their_fields_in_order_with_repeats() -> None:
    raw = [(b"X-A", b"1"), (b"set-cookie", b"a=1"), (b"x-a", b"2"), (b"Set-Cookie", b"b=2")]
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
def test_what_speaks_for_fal_s_connection_or_origin_does_not_come_down(name: str) -> None:
    assert list(response_headers([(name.encode(), b"v"), (b"x-fal-request-id", b"1")])) == [
        "x-fal-request-id"
    ]


def test_what_fal_s_connection_lines_name_does_not_come_down() -> None:
    raw = [(b"Connection", b"close, X-Secret"), (b"x-secret", b"1"), (b"x-public", b"2")]
    assert list(response_headers(raw)) == ["x-public"]


@pytest.mark.parametrize(
    "name", ["content-length", "content-encoding", "content-type", "vary", "location", "date"]
)
def test_what_describes_the_document_comes_down(name: str) -> None:
    assert list(response_headers([(name.encode(), b"v")])) == [name]


@pytest.mark.parametrize("encoding", ["ascii", "utf-8", "latin-1"])
def test_a_value_keeps_its_characters(encoding: str) -> None:
    value = "name" if encoding == "ascii" else "pr\u00e9nom"
    assert response_headers([(b"x-name", value.encode(encoding))])["x-name"] == value
