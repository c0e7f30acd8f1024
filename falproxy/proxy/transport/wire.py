"""The head of a request in bytes. Pure."""

from falproxy.proxy.response_head import HEAD_END, is_well_formed
from falproxy.proxy.transport import UpstreamRequest

BODY_METHODS = ("POST", "PUT", "PATCH")
LAST_CHUNK = b"0\r\n\r\n"
EMPTY_BODY_END = (
    b"content-length: 0\r\n\r\n"  # how the head of a request ends that could have a body
)


def serialize_request_head(request: UpstreamRequest) -> bytes:
    """The request line and the headers. Raises: ValueError, a header cannot be sent."""
    lines = [f"{request.method} {request.path} HTTP/1.1"]
    lines += [f"{name}: {value}" for name, value in request.headers]
    if request.body is None:
        if request.method in BODY_METHODS:
            lines.append("content-length: 0")
    elif request.length is None:
        lines.append("transfer-encoding: chunked")
    else:
        lines.append(f"content-length: {request.length}")
    return encode_lines(lines)


def append_body(head: bytes, body: bytes) -> bytes:
    """The request whose head `serialize_request_head` made for one like it that has no body."""
    return b"%bcontent-length: %d\r\n\r\n%b" % (head.removesuffix(EMPTY_BODY_END), len(body), body)


def encode_lines(lines: list[str]) -> bytes:
    """The lines of a head as bytes. What came undecodable goes out as it came. Raises: ValueError,
    one of them would be read as two, or as none."""
    head = "\r\n".join(lines).encode("utf-8", "surrogateescape")
    if not is_well_formed(head, len(lines)):
        raise ValueError("A header holds a control character.")
    return head + HEAD_END


def encode_chunk(data: bytes) -> bytes:
    """A piece of a body in the chunked transfer coding. An empty one would end the body."""
    return b"%x\r\n%b\r\n" % (len(data), data) if data else b""
