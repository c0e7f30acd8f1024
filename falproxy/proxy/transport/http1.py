"""HTTP/1.1 framing: request heads as bytes, and the parser of responses, on httptools."""

from httptools import HttpParserError, HttpParserUpgrade, HttpResponseParser

from falproxy.parse_digits import DIGITS_MAX
from falproxy.proxy.headers import HEAD_END, NO_BODY_STATUSES, REASONS, encode_lines
from falproxy.proxy.transport import (
    MAX_HEADER_FIELD,
    MAX_HEADERS,
    ConnectionLostError,
    UpstreamRequest,
    describe_error,
)
from falproxy.proxy.transport.response import BodyBuffer, ReadFlow, ResponseHead

BODY_METHODS = ("POST", "PUT", "PATCH")
LAST_CHUNK = b"0\r\n\r\n"
# The end of a request head without a body, for a method that may have one.
EMPTY_BODY_END = b"content-length: 0\r\n\r\n"

CONTENT_LENGTH = b"content-length"
CONTENT_LENGTH_SIZE = len(CONTENT_LENGTH)
TRANSFER_ENCODING = b"transfer-encoding"
TRANSFER_ENCODING_SIZE = len(TRANSFER_ENCODING)
# Bytes of an incomplete head, or of chunk extensions or trailer fields: httptools has no limit.
MAX_HEAD = 4 * MAX_HEADER_FIELD
SWITCHING_PROTOCOLS = 101
OK = 200

ParsedResponse = tuple[ResponseHead, BodyBuffer]


def serialize_request_head(request: UpstreamRequest) -> bytes:
    """Return the request line and the headers as bytes.

    Raises: ValueError, a header contains a control character.
    """
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
    """Return a request with a body, from the head of a request without one."""
    return b"%bcontent-length: %d\r\n\r\n%b" % (head.removesuffix(EMPTY_BODY_END), len(body), body)


def encode_chunk(data: bytes) -> bytes:
    """Return data in the chunked transfer coding. Empty data gives no chunk: it would end the
    body."""
    return b"%x\r\n%b\r\n" % (len(data), data) if data else b""


class ResponseParser:
    """Parses the responses on one connection. The methods `on_...` are httptools' callbacks.

    flow: the connection; reading from it pauses while too much of a body is unread.
    """

    __slots__ = (
        "_body",
        "_flow",
        "_head",
        "_headers",
        "_is_between_responses",
        "_parser",
        "_reason",
        "_responses",
        "_size_without_body",
    )  # fmt: skip

    def __init__(self, flow: ReadFlow) -> None:
        self._flow = flow
        self.reset()

    def reset(self) -> None:
        """Expect the beginning of a response next."""
        self._parser = HttpResponseParser(self)
        self._responses: list[ParsedResponse] = []
        self._headers: list[tuple[bytes, bytes]] = []
        self._reason = b""
        self._head: ResponseHead | None = None
        self._body: BodyBuffer | None = None
        self._is_between_responses = True
        self._size_without_body = 0  # bytes fed since the last piece of a body, or more

    def feed_data(self, data: bytes) -> tuple[list[ParsedResponse], bool]:
        """Parse the next bytes of the connection.

        Returns: the responses whose heads end in these bytes, informational ones included, and
            whether the connection has switched to another protocol.

        Raises: ConnectionLostError, the bytes are malformed or a head is too large.
        """
        responses = self._responses = []
        self._size_without_body += len(data)
        is_upgraded = False
        try:
            self._parser.feed_data(data)
        except HttpParserUpgrade:
            is_upgraded = True
        except HttpParserError as error:
            raise ConnectionLostError(describe_error(error)) from error
        if self._is_between_responses:
            self._size_without_body = 0
        elif self._size_without_body > MAX_HEAD:
            raise ConnectionLostError("the head of the response is too large")
        return responses, is_upgraded

    def feed_eof(self) -> None:
        """Process the end of the connection: it ends a body of unknown length."""
        head, body = self._head, self._body
        if head is not None and body is not None and head.length is None and not head.is_chunked:
            body.feed_eof()

    def close(self) -> None:
        """Drop the references that form a cycle with the connection: those to the parser, to the
        connection and to the body of its last response."""
        del self._parser, self._flow
        self._responses, self._head, self._body = [], None, None

    def on_message_begin(self) -> None:
        self._is_between_responses = False
        self._headers = []
        self._reason = b""

    def on_status(self, part: bytes) -> None:
        self._reason += part

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers.append((name, value.rstrip()))

    def on_headers_complete(self) -> None:
        headers = self._headers
        if self._size_without_body > MAX_HEADER_FIELD or len(headers) > MAX_HEADERS:
            self._check_limits()
        length, is_chunked = None, False
        for name, value in headers:
            size = len(name)  # compared first: most names have another length
            if size == CONTENT_LENGTH_SIZE and name.lower() == CONTENT_LENGTH:
                if not value.isdigit() or len(value) > DIGITS_MAX:
                    raise HttpParserError("The length is not a number")
                length = int(value)
            elif size == TRANSFER_ENCODING_SIZE and name.lower() == TRANSFER_ENCODING:
                is_chunked = True
        parser = self._parser
        head = self._head = ResponseHead(
            parser.get_status_code(),
            REASONS[self._reason],
            tuple(headers),
            length,
            is_chunked,
            not parser.should_keep_alive(),
        )
        body = self._body = BodyBuffer(self._flow)
        self._responses.append((head, body))

    def on_body(self, piece: bytes) -> None:
        self._size_without_body = 0
        if self._body is not None:
            self._body.feed_data(piece)

    def on_message_complete(self) -> None:
        head, body = self._head, self._body
        self._is_between_responses = True
        self._head = self._body = None
        if head is not None and head.is_chunked:
            self._check_limits()  # of the trailer fields
        if body is not None:
            body.feed_eof()

    def _check_limits(self) -> None:
        if (
            len(self._headers) > MAX_HEADERS
            or len(self._reason) > MAX_HEADER_FIELD
            or any(len(name) + len(value) > MAX_HEADER_FIELD for name, value in self._headers)
        ):
            raise HttpParserError("Too many or too large header fields")


def is_informational(head: ResponseHead) -> bool:
    return head.status < OK and head.status != SWITCHING_PROTOCOLS


def response_size(head: ResponseHead, data: bytes) -> int | None:
    """Return the size in bytes of the response that begins in `data`, head and body together.

    -1: the size is unknown. None: the body is chunked.
    """
    if head.is_chunked:
        return None
    length = 0 if head.status in NO_BODY_STATUSES else head.length
    end = data.find(HEAD_END)
    return -1 if length is None or end < 0 else end + len(HEAD_END) + length
