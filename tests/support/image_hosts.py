"""Servers of input images on loopback, and data URIs."""

import base64
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from aiohttp import ClientResponse
from tenacity import wait_none

from falproxy.media.fetch import Fetcher, FetchTimeouts
from tests.support.fake_hosts import NAME, PUBLIC, Host, Names, open_hosts, reply
from tests.support.image_samples import png_header

KONTEXT = "https://fal.run/fal-ai/flux-pro/kontext"
PNG = png_header(64, 48) + bytes(100)
NOT_AN_IMAGE = b"%PDF-1.7 and more"


def uri(content: bytes, declared: str = "image/png") -> str:
    return f"data:{declared};base64,{base64.b64encode(content).decode()}"


@dataclass
class Internet:
    """A public server and a private one, on the same port.

    names: the resolver.
    """

    public: Host
    private: Host
    port: int
    names: Names

    def url(self, path: str = "/a.png", host: str = NAME) -> str:
        return f"http://{host}:{self.port}{path}"

    def reset(self) -> None:
        """Forget the requests, and respond as at the start."""
        for host in (self.public, self.private):
            host.reset()
            host.responses["/a.png"] = reply(body=PNG)
        self.names.asked.clear()

    def fetcher(self, **options: object) -> Fetcher:
        settings = {
            "resolver": self.names,
            "is_allowed": lambda address: address == PUBLIC,
            "ports": (self.port,),
            "timeouts": FetchTimeouts(per_attempt=5.0, idle=0.1, overall=5.0, backoff=wait_none()),
        }
        return Fetcher(**{**settings, **options})  # type: ignore[arg-type]


@asynccontextmanager
async def open_internet() -> AsyncIterator[Internet]:
    public, private = Host(), Host()
    async with open_hosts(public, private) as port:
        public.responses["/a.png"] = private.responses["/a.png"] = reply(body=PNG)
        yield Internet(public, private, port, Names({NAME: [[PUBLIC]]}))
        await public.close()
        await private.close()


async def image_refusal(response: ClientResponse) -> dict[str, object]:
    """Return the only entry of `detail` in a 422."""
    body = await response.json()
    assert response.status == 422, body
    assert set(body) == {"message", "detail", "type", "request_id"}
    (entry,) = body["detail"]
    assert (entry["msg"], entry["type"]) == (body["message"], body["type"])
    assert entry["url"] == f"https://docs.fal.ai/errors/#{entry['type']}"
    return dict(entry)
