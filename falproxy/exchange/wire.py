"""The head of a request in bytes. Pure."""

from falproxy.exchange import Ask

# What no line of a head may hold: it would end the line, or the head, for somebody.
FORBIDDEN = bytes({*range(0x20), 0x7F} - {0x09, 0x0A, 0x0D})
WITH_BODY = ("POST", "PUT", "PATCH")
LAST_CHUNK = b"0\r\n\r\n"


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


def checked(lines: list[str]) -> bytes:
    """The lines of a head as bytes. What came undecodable goes out as it came. Raises: ValueError,
    one of them would be read as two, or as none."""
    head = "\r\n".join(lines).encode("utf-8", "surrogateescape")
    ends = len(lines) - 1
    is_odd = head.count(b"\n") != ends or head.count(b"\r") != ends
    if is_odd or len(head.translate(None, FORBIDDEN)) != len(head):
        raise ValueError("A header holds a control character.")
    return head + b"\r\n\r\n"


def chunked(piece: bytes) -> bytes:
    """A piece of a body in the chunked transfer coding. An empty one would end the body."""
    return b"%x\r\n%b\r\n" % (len(piece), piece) if piece else b""
