"""The bodies of live video calls, in every spelling."""

import pytest

from falproxy.errors import ProxyError
from falproxy.fal.live import is_over, opened_session_id, read_app, read_session_id
from falproxy.fal.policy import live_app_of

APP = "minimax/h3-max/director"


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        pytest.param(f'{{"app_id": "{APP}"}}', APP, id="plain"),
        pytest.param(f' {{ "app_id" :\n"{APP}" , "sdp": "x"}} ', APP, id="with white space"),
        pytest.param(r'{"app_id": "minimax\/h3-max\/director"}', APP, id="escaped slashes"),
        pytest.param(f'{{"x": {{"app_id": "a/b"}}, "app_id": "{APP}"}}', APP, id="nested besides"),
        pytest.param(f'{{"sdp": "\\"app_id\\":", "app_id": "{APP}"}}', APP, id="in a text besides"),
        pytest.param("{}", None, id="none"),
        pytest.param('{"app_id": null}', None, id="null"),
        pytest.param('{"x": {"app_id": "a/b"}}', None, id="nested only"),
    ],
)
def test_the_endpoint_of_a_call_is_read(body: str, expected: str | None) -> None:
    assert read_app(body.encode()) == expected


@pytest.mark.parametrize(
    "body",
    [
        pytest.param('{"app_id": "a/b", "app_id": "c/d"}', id="twice"),
        pytest.param('{"app_id": "a/b", "app_id": "a/b"}', id="twice the same"),
        pytest.param(r'{"app_id": "a/b", "app\u005fid": "c/d"}', id="once in an escape"),
        pytest.param(r'{"\u0061pp_id": "c/d", "app_id": "a/b"}', id="the escape first"),
        pytest.param(r'{"app\u005Fid": "a/b"}', id="only in an escape"),
        pytest.param('{"app_id": "a/b", "APP_ID": "c/d"}', id="in capitals"),
        pytest.param('{"App_Id": "a/b"}', id="only in capitals"),
        pytest.param('{"app_id": "a/b", "appId": "c/d"}', id="in camel case"),
        pytest.param('{"app_id": "a/b", "app-id": "c/d"}', id="with a hyphen"),
        pytest.param('{"app_id": null, "app_id": "c/d"}', id="null first"),
        pytest.param('{"app_id": ["a/b"]}', id="a list"),
        pytest.param('{"app_id": {"id": "a/b"}}', id="an object"),
        pytest.param('{"app_id": 1}', id="a number"),
        pytest.param('{"app_id": ""}', id="empty"),
        pytest.param('{"app_id": "director"}', id="one segment"),
        pytest.param('{"app_id": "a/../b"}', id="dot segments"),
        pytest.param('{"app_id": "a/b/"}', id="a last slash"),
        pytest.param('{"app_id": " a/b"}', id="a space"),
        pytest.param('{"app_id": "a%2Fb/c"}', id="a percent-escape"),
        pytest.param(r'{"app_id": "a/b\u0000"}', id="a null character"),
        pytest.param('{"app_id": "a/b?x=1"}', id="a query"),
        pytest.param(f'{{"app_id": "a/{"b" * 300}"}}', id="longer than any endpoint"),
    ],
)
def test_an_ambiguous_endpoint_is_refused(body: str) -> None:
    with pytest.raises(ProxyError) as refused:
        read_app(body.encode())
    assert (refused.value.status, refused.value.code) == (403, "target_forbidden")


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"[]", id="a list"),
        pytest.param(b'[["app_id", "a/b"]]', id="a list of pairs"),
        pytest.param(b'"app_id"', id="a string"),
        pytest.param(b'{"app_id": "a/b"', id="cut off"),
        pytest.param(b'{"app_id": "a/b"} x', id="text after it"),
        pytest.param(b'\xef\xbb\xbf{"app_id": "a/b"}', id="a byte order mark"),
        pytest.param('{"app_id": "a/b"}'.encode("utf-16"), id="another encoding"),
        pytest.param(b'{"app_id": "a/b\xff"}', id="no UTF-8"),
        pytest.param(b'{"x": ' + b"[" * 100_000, id="nested too deeply"),
    ],
)
def test_a_body_that_cannot_be_read_is_refused(body: bytes) -> None:
    with pytest.raises(ProxyError) as refused:
        read_app(body)
    assert (refused.value.status, refused.value.code) == (400, "input_unreadable")


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b'{"session_id": "live-1"}', "live-1"),
        (b"{}", None),
        (b'{"session_id": 1}', None),
        (b'{"session_id": "a b"}', None),
        (b'{"session_id": "' + b"x" * 300 + b'"}', None),
    ],
)
def test_the_session_of_a_heartbeat_is_read(body: bytes, expected: str | None) -> None:
    assert read_session_id(body) == expected


@pytest.mark.parametrize(
    "body",
    [
        b'{"session_id": "a", "session_id": "b"}',
        rb'{"session_id": "a", "session\u005fid": "b"}',
        rb'{"session\u005fid": "b"}',
        b'{"session_id": "a", "sessionId": "b"}',
    ],
)
def test_an_ambiguous_session_is_refused(body: bytes) -> None:
    with pytest.raises(ProxyError) as refused:
        read_session_id(body)
    assert refused.value.status == 403


def test_documents_of_fal_are_read() -> None:
    assert opened_session_id(b'{"session_id": "live-1", "sdp": "v=0"}') == "live-1"
    assert opened_session_id(b'{"sdp": "v=0"}') is None
    assert opened_session_id(b"[]") is None
    assert is_over(b'{"alive": false}')
    assert not is_over(b'{"alive": true}')
    assert not is_over(b"{}")
    assert not is_over(None)


@pytest.mark.parametrize(
    ("path", "app"),
    [
        (f"{APP}/ice", APP),
        ("owner/alias/ice", "owner/alias"),
        ("owner/ice", None),
        ("workflows/owner/alias/ice", "workflows/owner/alias"),
        ("workflows/owner/ice", None),
        ("owner/alias/ICE", None),
        ("owner/alias/ice/more", None),
        ("owner/alias/device", None),
    ],
)
def test_the_app_of_a_path_for_servers(path: str, app: str | None) -> None:
    assert live_app_of(path) == app
