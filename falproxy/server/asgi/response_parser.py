"""Parses the response of the HTTP server into ASGI messages."""

from collections import deque
from collections.abc import MutableMapping
from typing import Any

from aiohttp import hdrs
from httptools import HttpResponseParser

Message = MutableMapping[str, Any]

# Headers of the connection in memory.
CONNECTION_HEADERS = frozenset({b"connection", b"keep-alive", b"transfer-encoding", b"upgrade"})


class MessageParser:
    """Parses one response. The methods `on_...` are httptools' callbacks.

    messages: the ASGI messages of the response that were not taken yet.
    size: bytes of all bodies in them.
    is_complete: whether the response has been parsed to its end.
    """

    __slots__ = ("_headers", "_method", "_parser", "is_complete", "messages", "size")

    def __init__(self, method: str) -> None:
        self.messages: deque[Message] = deque()
        self.size = 0
        self.is_complete = False
        self._method = method
        self._headers: list[tuple[bytes, bytes]] = []
        self._parser: HttpResponseParser | None = HttpResponseParser(self)

    def feed_data(self, data: bytes) -> None:
        """Raises: HttpParserError, the bytes are no response."""
        if self._parser is not None and not self.is_complete:
            self._parser.feed_data(data)

    def take(self) -> Message:
        """Return the next message, and remove it."""
        message = self.messages.popleft()
        self.size -= len(message.get("body", b""))
        return message

    def drop(self) -> None:
        """Remove all messages."""
        self.messages.clear()
        self.size = 0

    def close(self) -> None:
        """Remove all messages, ignore further data, and drop the reference that forms a cycle."""
        self.drop()
        self._parser = None

    def on_header(self, name: bytes, value: bytes) -> None:
        lower = name.lower()  # as the ASGI specification requires
        if lower not in CONNECTION_HEADERS:
            self._headers.append((lower, value.rstrip()))

    def on_headers_complete(self) -> None:
        assert self._parser is not None
        status = self._parser.get_status_code()
        start: Message = {"type": "http.response.start", "status": status, "headers": self._headers}
        self.messages.append(start)
        if self._method == hdrs.METH_HEAD:
            self.on_message_complete()  # it may have the length of a body, but it has no body

    def on_body(self, piece: bytes) -> None:
        if not self.is_complete:
            self._add_body(piece, more_body=True)

    def on_message_complete(self) -> None:
        if self.is_complete:
            return
        self.is_complete = True
        if self.messages and self.messages[-1].get("more_body"):
            self.messages[-1]["more_body"] = False
        else:
            self._add_body(b"", more_body=False)

    def _add_body(self, body: bytes, *, more_body: bool) -> None:
        self.size += len(body)
        self.messages.append({"type": "http.response.body", "body": body, "more_body": more_body})
