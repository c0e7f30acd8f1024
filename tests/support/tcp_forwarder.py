"""A TCP address in front of a server. It can be moved to another server, and delay replies."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

# Each with the time of the event loop at which it is sent; an empty one is the end.
Pieces = asyncio.Queue[tuple[float, bytes]]


class TcpForwarder:
    """A forwarder to the port of a server. Connections that are open when the address moves still
    lead to the old server.

    target: port of the server that new connections lead to.
    reply_delay: seconds after its arrival at which each piece of a reply is sent on.
    """

    def __init__(self, target: int) -> None:
        self.target = target
        self.port = 0
        self.accepted = 0
        self.reply_delay = 0.0
        self._tasks: set[asyncio.Task[None]] = set()
        self._writers: list[asyncio.StreamWriter] = []

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    @asynccontextmanager
    async def running(self) -> AsyncIterator["TcpForwarder"]:
        listener = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = listener.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            listener.close()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            await asyncio.gather(*map(closed, self._writers), return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        try:
            from_server, to_server = await asyncio.open_connection("127.0.0.1", self.target)
        except OSError:
            writer.close()
            return
        self._writers += writer, to_server
        for source, sink, is_reply in ((reader, to_server, False), (from_server, writer, True)):
            task = asyncio.ensure_future(self._forward(source, sink, is_reply=is_reply))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _forward(
        self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, *, is_reply: bool
    ) -> None:
        pieces: Pieces = asyncio.Queue()
        await asyncio.gather(self._read(source, pieces, is_reply), send_when_due(pieces, sink))
        sink.close()

    async def _read(self, source: asyncio.StreamReader, pieces: Pieces, is_reply: bool) -> None:
        loop = asyncio.get_running_loop()
        with suppress(OSError):  # the other side has closed its connection
            while data := await source.read(65536):
                pieces.put_nowait((loop.time() + self.reply_delay * is_reply, data))
        pieces.put_nowait((loop.time(), b""))


async def send_when_due(pieces: Pieces, sink: asyncio.StreamWriter) -> None:
    """Send pieces until an empty one. The delay of one does not add to that of the next."""
    while True:
        due_at, data = await pieces.get()
        await asyncio.sleep(due_at - asyncio.get_running_loop().time())
        if not data or sink.is_closing():
            return
        sink.write(data)


async def closed(writer: asyncio.StreamWriter) -> None:
    writer.close()
    await writer.wait_closed()
