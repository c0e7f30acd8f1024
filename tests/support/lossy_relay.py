"""A relay in front of a proxy that loses responses."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass


@dataclass(slots=True)
class LossyRelay:
    """losses: the first responses, of which no byte arrives. attempts: connections so far."""

    port: int
    losses: int
    attempts: int = 0
    origin: str = ""

    async def relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.attempts += 1
        is_lost = self.attempts <= self.losses
        from_proxy, to_proxy = await asyncio.open_connection("127.0.0.1", self.port)

        async def relay_requests() -> None:
            while data := await reader.read(2**16):
                to_proxy.write(data)

        relaying = asyncio.ensure_future(relay_requests())
        with suppress(ConnectionError):
            while data := await from_proxy.read(2**16):
                if is_lost:
                    writer.transport.abort()
                    break
                writer.write(data)
        relaying.cancel()
        to_proxy.close()
        writer.close()


@asynccontextmanager
async def lossy_relay(origin: str, losses: int = 1) -> AsyncIterator[LossyRelay]:
    """Context: a relay to the proxy at `origin`."""
    relay = LossyRelay(int(origin.rpartition(":")[2]), losses)
    server = await asyncio.start_server(relay.relay, "127.0.0.1", 0)
    relay.origin = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with server:
        yield relay
