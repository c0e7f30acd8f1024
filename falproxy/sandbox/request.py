"""One request to the offline fal, with the fal host and the path that it is meant for."""

import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

from aiohttp import web

from falproxy.sandbox.state import Sandbox

RUN, QUEUE, REST = "fal.run", "queue.fal.run", "rest.fal.ai"
SITE, PLATFORM, CDN, LOCAL = "fal.ai", "api.fal.ai", "cdn", "local"
HOSTS: Mapping[str, str] = {
    "fal.run": RUN,
    "falrun.com": RUN,
    "queue.fal.run": QUEUE,
    "queue.falrun.com": QUEUE,
    "rest.fal.ai": REST,
    "rest.alpha.fal.ai": REST,
    "fal.ai": SITE,
    "api.fal.ai": PLATFORM,
    "v3.fal.media": CDN,
    "v3b.fal.media": CDN,
    "fal.media": CDN,
}
CDN_PATH = re.compile(r"/(?:files|upload)/")


@dataclass(frozen=True, slots=True)
class Address:
    """Where a request goes: `host` as it was named, `service` the host it stands for (`cdn` and
    `local` among them), `path` without the host, `query` as sent, without the question mark."""

    host: str
    service: str
    path: str
    query: str


@dataclass(frozen=True, slots=True)
class Visit:
    """A request with all that its handler needs.

    named: the parts of the path that the route names. request_id: of the call, if it becomes one.
    account: whose key came with it.
    """

    sandbox: Sandbox
    request: web.Request
    address: Address
    named: Mapping[str, str]
    request_id: str
    account: str = ""


Handler = Callable[[Visit], Awaitable[web.StreamResponse]]


def locate(target: str, host: str) -> Address:
    """The fal host by the Host header, else by the first segment of the path, else the part
    that has no fal host: the CDN's own paths and the sandbox's pages.

    target: path and query as sent; host: the Host header.
    """
    path, _, query = target.partition("?")
    name = host.lower().partition(":")[0]
    if name in HOSTS:
        return Address(name, HOSTS[name], path, query)
    first, _, rest = path.lstrip("/").partition("/")
    if first.lower() in HOSTS:
        return Address(first.lower(), HOSTS[first.lower()], f"/{rest}", query)
    return Address(host, CDN if CDN_PATH.match(path) else LOCAL, path, query)
