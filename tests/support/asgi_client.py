"""An ASGI server in the test itself, which sends any messages."""

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from falproxy.server.asgi.bridge import Receive, Send
from falproxy.server.asgi.response_parser import Message
from tests.support.urls import PROXY, RUN

Fields = Sequence[tuple[bytes, bytes]]

LOCAL = ((b"host", b"localhost"), (b"x-fal-target-url", RUN.encode()))
JSON = ((b"content-type", b"application/json"),)
END: Message = {"type": "http.request", "body": b"", "more_body": False}
DISCONNECT: Message = {"type": "http.disconnect"}


def http_scope(
    method: str = "POST", path: str = PROXY, headers: Fields = (*LOCAL, *JSON), **others: object
) -> dict[str, Any]:
    return {
        "type": "http",
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [*headers],
        "client": ("192.0.2.7", 1234),
        "server": ("127.0.0.1", 80),
        **others,
    }


def body_part(body: bytes, *, more_body: bool = True) -> Message:
    return {"type": "http.request", "body": body, "more_body": more_body}


class AsgiCall:
    """One request to an ASGI application, in a task.

    sent: the messages of the response.
    received: the number of messages that the application has taken.
    can_send: clear it to be a client that reads nothing.
    """

    def __init__(self, app: Any, scope: Mapping[str, Any], messages: Sequence[Message] = (END,)):
        self.sent: list[Message] = []
        self.received = 0
        self.can_send = asyncio.Event()
        self.can_send.set()
        self._messages: asyncio.Queue[Message] = asyncio.Queue()
        self._progress = asyncio.Condition()
        for message in messages:
            self._messages.put_nowait(message)
        receive: Receive = self._receive
        send: Send = self._send
        self.task = asyncio.create_task(app(scope, receive, send))

    def feed(self, *messages: Message) -> None:
        for message in messages:
            self._messages.put_nowait(message)

    async def _receive(self) -> Message:
        message = await self._messages.get()
        async with self._progress:
            self.received += 1
            self._progress.notify_all()
        return message

    async def _send(self, message: Message) -> None:
        await self.can_send.wait()
        async with self._progress:
            self.sent.append(message)
            self._progress.notify_all()

    async def until_sent(self, count: int) -> None:
        """Wait until the response has so many messages."""
        async with asyncio.timeout(10), self._progress:
            await self._progress.wait_for(lambda: len(self.sent) >= count)

    async def until_received(self, count: int) -> None:
        async with asyncio.timeout(10), self._progress:
            await self._progress.wait_for(lambda: self.received >= count)

    async def finish(self) -> "AsgiCall":
        async with asyncio.timeout(10):
            await self.task
        return self

    @property
    def status(self) -> int:
        return int(self.sent[0]["status"])

    @property
    def headers(self) -> dict[bytes, bytes]:
        return dict(self.sent[0]["headers"])

    @property
    def body(self) -> bytes:
        return b"".join(message["body"] for message in self.sent[1:])

    @property
    def is_complete(self) -> bool:
        return bool(self.sent) and self.sent[-1].get("more_body") is False


async def call_asgi(
    app: Any, scope: Mapping[str, Any], messages: Sequence[Message] = (END,)
) -> AsgiCall:
    """Send a request, and return it when the application has returned."""
    return await AsgiCall(app, scope, messages).finish()
