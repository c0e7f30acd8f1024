"""The head of a request in bytes. Pure."""

from falproxy.proxy.response_head import HEAD_END, has_lines
from falproxy.proxy.transport import Ask

WITH_BODY = ("POST", "PUT", "PATCH")
LAST_CHUNK = b"0\r\n\r\n"
NO_LENGTH = b"content-length: 0\r\n\r\n"  # how the head of a request ends that could have a body


def head_of(ask: Ask) -> bytes:
    """The request line and the headers. Raises: ValueError, a header cannot be sent."""
    lines = [f"{ask.method} {ask.path} HTTP/1.1"]
    lines += [f"{name}: {value}" for name, value in ask.headers]
    if ask.body is None:
        if ask.method in WITH_BODY:
            lines.append("content-length: 0")
    elif ask.length is None:
        lines.append("transfer-encoding: chunked")
    else:
        lines.append(f"content-length: {ask.length}")
    return checked(lines)


def with_body(head: bytes, body: bytes) -> bytes:
    """The request whose head `head_of` made for one like it that has no body."""
    return b"%bcontent-length: %d\r\n\r\n%b" % (head.removesuffix(NO_LENGTH), len(body), body)


def checked(lines: list[str]) -> bytes:
    """The lines of a head as bytes. What came undecodable goes out as it came. Raises: ValueError,
    one of them would be read as two, or as none."""
    head = "\r\n".join(lines).encode("utf-8", "surrogateescape")
    if not has_lines(head, len(lines)):
        raise ValueError("A header holds a control character.")
    return head + HEAD_END


def chunked(piece: bytes) -> bytes:
    """A piece of a body in the chunked transfer coding. An empty one would end the body."""
    return b"%x\r\n%b\r\n" % (len(piece), piece) if piece else b""
