"""Heads of ASGI requests in HTTP/1.1: one request stays one request."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from falproxy.server.asgi.request_head import (
    InvalidRequestError,
    content_length,
    has_unknown_length,
    serialize_request,
    split_path,
)
from tests.support.asgi_client import http_scope

HOST = (b"host", b"localhost")


def head_of(**parts: object) -> bytes:
    scope = http_scope(**{"headers": (HOST,), **parts})  # type: ignore[arg-type]
    _, path = split_path(scope, "") or ("", b"")
    return serialize_request(scope, path, [])


@pytest.mark.parametrize(
    "parts",
    [
        pytest.param({"method": "GET / HTTP/1.1\r\nx: y\r\n\r\nGET"}, id="a request in the method"),
        pytest.param({"method": "GE T"}, id="a space in the method"),
        pytest.param({"method": ""}, id="no method"),
        pytest.param({"method": "G\u00c9T"}, id="a method that is not ASCII"),
        pytest.param({"raw_path": b"/a b"}, id="a space in the path"),
        pytest.param({"raw_path": b"/a\r\nx: y"}, id="a line break in the path"),
        pytest.param({"raw_path": b"http://evil.tld/"}, id="an absolute form"),
        pytest.param({"raw_path": b"*"}, id="an asterisk"),
        pytest.param({"query_string": b"a=1 HTTP/1.1\r\nx: y"}, id="a line break in the query"),
        pytest.param({"query_string": b"\0"}, id="a NUL in the query"),
        *(
            pytest.param({"headers": (HOST, field)}, id=repr(field))
            for field in (
                (b"x-a", b"1\r\nx-b: 2"),
                (b"x-a", b"1\nx-b: 2"),
                (b"x-a", b"1\rx-b: 2"),
                (b"x-a", b"1\0"),
                (b"x-a: 1\r\nx-b", b"2"),
                (b"x a", b"1"),
                (b"x-a ", b"1"),
                (b"x-a:", b"1"),
                (b":path", b"/"),
                (b"", b"1"),
                (b"x-\xff", b"1"),
                (b"connection", b"x\r\ny: z"),
            )
        ),
    ],
)
def test_what_cannot_be_part_of_a_head_is_refused(parts: dict[str, object]) -> None:
    with pytest.raises(InvalidRequestError):
        head_of(**parts)


@given(
    st.text(max_size=8),
    st.binary(max_size=12),
    st.binary(max_size=12),
    st.lists(st.tuples(st.binary(max_size=8), st.binary(max_size=12)), max_size=3),
)
def test_a_head_has_as_many_lines_as_the_request_has_fields(
    method: str, path: bytes, query: bytes, headers: list[tuple[bytes, bytes]]
) -> None:
    scope = http_scope(method, headers=headers, query_string=query)
    try:
        head = serialize_request(scope, path, [])
    except (InvalidRequestError, UnicodeEncodeError):
        return
    assert head.endswith(b"\r\n\r\n")
    assert head.count(b"\n") == head.count(b"\r") == head.count(b"\r\n")
    line, *fields = head.removesuffix(b"\r\n\r\n").split(b"\r\n")
    assert re.fullmatch(rb"[^\s]+ /[^\s\0]* HTTP/1\.1", line)
    assert len(fields) <= len(headers) + 1
    assert fields[-1].startswith(b"connection: close")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (b"keep-alive", b"close"),
        (b"Upgrade, HTTP2-Settings", b"close, HTTP2-Settings"),
        (b"close, x-fal-a", b"close, x-fal-a"),
    ],
)
def test_headers_of_the_connection_are_replaced(value: bytes, expected: bytes) -> None:
    headers = [
        HOST,
        (b"Connection", value),
        (b"Transfer-Encoding", b"chunked"),
        (b"content-length", b"7"),
        (b"expect", b"100-continue"),
        (b"upgrade", b"websocket"),
    ]
    lines = head_of(headers=headers).split(b"\r\n")
    assert lines[1:] == [b"host: localhost", b"connection: " + expected, b"", b""]


@pytest.mark.parametrize(
    ("headers", "length"),
    [
        ((), None),
        (((b"content-length", b"0"),), 0),
        (((b"Content-Length", b" 17 "),), 17),
        (((b"transfer-encoding", b"chunked"),), None),
    ],
)
def test_the_length_of_a_body(headers: list[tuple[bytes, bytes]], length: int | None) -> None:
    assert content_length(http_scope(headers=headers)) == length


@pytest.mark.parametrize(
    "values", [("+1",), ("-1",), ("1_0",), ("",), ("1, 1",), ("1", "1"), ("9" * 30,)]
)
def test_an_ambiguous_length_is_refused(values: tuple[str, ...]) -> None:
    headers = [(b"content-length", value.encode()) for value in values]
    with pytest.raises(InvalidRequestError):
        content_length(http_scope(headers=headers))


@pytest.mark.parametrize("version", ["1.0", "1.1", "2"])
def test_a_length_beside_a_transfer_coding_is_refused(version: str) -> None:
    headers = [(b"content-length", b"1"), (b"transfer-encoding", b"chunked")]
    with pytest.raises(InvalidRequestError):
        content_length(http_scope(headers=headers, http_version=version))


@pytest.mark.parametrize(
    ("version", "headers", "is_unknown"),
    [
        ("1.1", [], False),
        ("1.1", [(b"transfer-encoding", b"chunked")], True),
        ("2", [], True),
        ("3", [(b"content-length", b"5")], False),
    ],
)
def test_when_the_first_message_shows_whether_there_is_a_body(
    version: str, headers: list[tuple[bytes, bytes]], is_unknown: bool
) -> None:
    assert has_unknown_length(http_scope(headers=headers, http_version=version)) is is_unknown


@pytest.mark.parametrize(
    ("path", "root_path", "prefix", "expected"),
    [
        pytest.param("/api/x", "", "", ("", b"/api/x"), id="at the root"),
        pytest.param("/fal/api/x", "/fal", "", ("/fal", b"/api/x"), id="mounted"),
        pytest.param("/fal", "/fal", "", ("/fal", b""), id="the path of the mount"),
        pytest.param("/fal/", "/fal/", "", ("/fal", b"/"), id="a final slash"),
        pytest.param("/fal/api/x", "", "/fal", ("/fal", b"/api/x"), id="a prefix"),
        pytest.param("/a/fal/x", "/a", "/fal", ("/a/fal", b"/x"), id="a prefix in a mount"),
        pytest.param("/falx/api", "", "/fal", None, id="not below the prefix"),
        pytest.param("/api/x", "", "/fal", None, id="another path"),
        pytest.param("/fal/x", "/outer/fal", "", ("/outer/fal", b"/x"), id="an outer proxy's path"),
        pytest.param("/x", "/outer", "", ("/outer", b"/x"), id="a stripped path"),
        pytest.param("/f%61l/a%2Fb", "/fal", "", ("/fal", b"/a%2Fb"), id="another spelling"),
        pytest.param("/caf%C3%A9/x", "/caf\u00e9", "", ("/caf%C3%A9", b"/x"), id="not ASCII"),
        pytest.param("/a%20b/x", "/a b", "", ("/a%20b", b"/x"), id="a space"),
        pytest.param("/fal%2Fx/y", "/fal", "", ("/fal", b"/fal%2Fx/y"), id="an encoded slash"),
    ],
)
def test_the_path_of_the_mount_is_split_off(
    path: str, root_path: str, prefix: str, expected: tuple[str, bytes] | None
) -> None:
    scope = http_scope(raw_path=path.encode(), root_path=root_path)
    assert split_path(scope, prefix) == expected


def test_a_server_may_leave_out_the_raw_path() -> None:
    scope = http_scope(path="/fal/a b/\u00e9", root_path="/fal")
    del scope["raw_path"]
    assert split_path(scope, "") == ("/fal", b"/a%20b/%C3%A9")
