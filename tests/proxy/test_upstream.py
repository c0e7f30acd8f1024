"""Upstream: TLS, the backup hosts, and the circuit breaker."""

import asyncio
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field

import pytest
import trustme
from aiohttp import web
from aiohttp.abc import AbstractResolver, ResolveResult
from aiohttp.pytest_plugin import AiohttpServer
from multidict import CIMultiDict, CIMultiDictProxy

from falproxy.errors import ProxyError
from falproxy.fal.keys import KeyPool
from falproxy.fal.target import parse_target
from falproxy.proxy.call import Call
from falproxy.proxy.upstream import COOLDOWN_SECONDS, Upstream, open_transport
from tests.support.fake_fal import FakeFal
from tests.support.key_search import CANARY
from tests.support.tcp_servers import stay_silent, tcp_server

pytestmark = [pytest.mark.both_event_loops, pytest.mark.both_transports]

RUN = "https://fal.run/fal-ai/flux/dev"
UNUSED_PORT = 9  # the discard port, where nothing listens


@dataclass
class HostMap(AbstractResolver):
    """A resolver that maps host names to ports on loopback."""

    ports: dict[str, int] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    now: float = 1000.0

    async def resolve(self, host: str, port: int = 0, family: int = 0) -> list[ResolveResult]:
        self.asked.append(host)
        if host not in self.ports:
            raise OSError(f"no such host: {host}")
        return [
            ResolveResult(
                hostname=host,
                host="127.0.0.1",
                port=self.ports[host],
                family=2,
                proto=0,
                flags=0,
            )
        ]

    async def close(self) -> None: ...


ServeAs = Callable[..., Awaitable[FakeFal]]


@pytest.fixture
def hosts() -> HostMap:
    return HostMap()


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
async def upstream(hosts: HostMap, authority: trustme.CA, is_fast: bool) -> AsyncIterator[Upstream]:
    trust = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    authority.configure_trust(trust)
    kind = "pool" if is_fast else "aiohttp"
    async with open_transport((4.0, 8.0), kind=kind, ssl_context=trust, resolver=hosts) as way:
        key = KeyPool([CANARY], lambda: hosts.now).next_key()
        yield Upstream(way, key, clock=lambda: hosts.now)


@pytest.fixture
async def serve_as(hosts: HostMap, authority: trustme.CA, aiohttp_server: AiohttpServer) -> ServeAs:
    """Return a function that starts a fake fal for a host name, with a certificate for a name."""

    async def serve(host: str, certificate_for: str | None = None) -> FakeFal:
        fake = FakeFal()
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", fake.handle)
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        authority.issue_cert(certificate_for or host).configure_cert(context)
        server = await aiohttp_server(app, ssl=context)
        assert server.port is not None
        hosts.ports[host] = server.port
        return fake

    return serve


async def chunks(*parts: bytes) -> AsyncIterator[bytes]:
    for part in parts:
        yield part


def call(url: str = RUN, method: str = "POST", body: AsyncIterator[bytes] | None = None) -> Call:
    headers = CIMultiDict({"Content-Type": "application/json", "x-fal-runner-hint": "h"})
    return Call(method, parse_target(url), CIMultiDictProxy(headers), body)


async def test_fal_is_called_over_tls_with_the_key(upstream: Upstream, serve_as: ServeAs) -> None:
    fal = await serve_as("queue.fal.run")
    response = await upstream.send(call("https://queue.fal.run/a/b", body=chunks(b"{", b"}")))
    assert response.status == 200
    (seen,) = fal.seen
    assert (seen.header("host"), seen.body) == ("queue.fal.run", b"{}")
    assert seen.header("authorization") == f"Key {CANARY}"


async def test_a_certificate_for_another_name_gets_no_key(
    upstream: Upstream, serve_as: ServeAs
) -> None:
    fal = await serve_as("rest.fal.ai", certificate_for="evil.tld")
    with pytest.raises(ProxyError) as error:
        await upstream.send(call("https://rest.fal.ai/tokens/"))
    assert (error.value.status, error.value.code) == (502, "upstream_unreachable")
    assert fal.seen == []


@pytest.mark.parametrize(
    ("host", "backup"), [("fal.run", "falrun.com"), ("queue.fal.run", "queue.falrun.com")]
)
async def test_the_backup_host_is_used_when_the_first_cannot_be_reached(
    upstream: Upstream,
    hosts: HostMap,
    serve_as: ServeAs,
    host: str,
    backup: str,
) -> None:
    hosts.ports[host] = UNUSED_PORT
    fal = await serve_as(backup)
    response = await upstream.send(call(f"https://{host}/a/b?c=d", body=chunks(b"{", b"}")))
    assert response.status == 200
    (seen,) = fal.seen
    assert (seen.header("host"), seen.target, seen.body) == (backup, "/a/b?c=d", b"{}")
    assert seen.header("authorization") == f"Key {CANARY}"
    assert seen.header("x-fal-runner-hint") == "h"


async def test_a_name_that_does_not_resolve_counts_as_unreachable(
    upstream: Upstream,
    serve_as: ServeAs,
) -> None:
    fal = await serve_as("falrun.com")
    assert (await upstream.send(call())).status == 200
    assert len(fal.seen) == 1


async def test_a_connect_time_out_counts_as_unreachable(
    upstream: Upstream,
    hosts: HostMap,
    serve_as: ServeAs,
) -> None:
    """The server accepts and never starts the TLS handshake."""
    async with tcp_server(stay_silent) as port:
        hosts.ports["fal.run"] = port
        fal = await serve_as("falrun.com")
        assert (await upstream.send(call())).status == 200
        assert len(fal.seen) == 1


async def test_only_the_first_caller_waits_for_the_failed_connection(
    upstream: Upstream,
    hosts: HostMap,
    serve_as: ServeAs,
) -> None:
    await serve_as("falrun.com")
    for _ in range(10):
        (await upstream.send(call())).close()
    assert hosts.asked.count("fal.run") == 1


async def test_after_the_cooldown_one_call_probes_the_host(
    upstream: Upstream,
    hosts: HostMap,
    serve_as: ServeAs,
) -> None:
    await serve_as("falrun.com")
    (await upstream.send(call())).close()
    fal = await serve_as("fal.run")
    hosts.now += COOLDOWN_SECONDS - 1
    (await upstream.send(call())).close()
    assert fal.seen == []
    hosts.now += 1
    (await upstream.send(call())).close()
    (await upstream.send(call())).close()
    assert len(fal.seen) == 2


async def test_other_calls_use_the_backup_during_a_probe(
    upstream: Upstream,
    hosts: HostMap,
    serve_as: ServeAs,
) -> None:
    await serve_as("falrun.com")
    (await upstream.send(call())).close()
    hosts.now += COOLDOWN_SECONDS
    for response in await asyncio.gather(*(upstream.send(call()) for _ in range(20))):
        response.close()
    assert hosts.asked.count("fal.run") == 2


async def test_two_unreachable_hosts_are_a_502_and_reset_the_breaker(
    upstream: Upstream,
    hosts: HostMap,
    serve_as: ServeAs,
) -> None:
    for _ in range(2):
        with pytest.raises(ProxyError) as error:
            await upstream.send(call())
        assert error.value.code == "upstream_unreachable"
    fal = await serve_as("fal.run")
    assert (await upstream.send(call())).status == 200
    assert len(fal.seen) == 1


@pytest.mark.parametrize("host", ["rest.fal.ai", "api.fal.ai", "ws.fal.run"])
async def test_other_hosts_have_no_backup(upstream: Upstream, hosts: HostMap, host: str) -> None:
    with pytest.raises(ProxyError) as error:
        await upstream.send(call(f"https://{host}/x"))
    assert error.value.code == "upstream_unreachable"
    assert hosts.asked == [host]


async def test_a_call_that_was_sent_is_never_sent_to_the_backup(
    upstream: Upstream,
    hosts: HostMap,
    authority: trustme.CA,
    serve_as: ServeAs,
) -> None:
    async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.close()

    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("fal.run").configure_cert(context)
    server = await asyncio.start_server(hang_up, "127.0.0.1", 0, ssl=context)
    hosts.ports["fal.run"] = server.sockets[0].getsockname()[1]
    backup = await serve_as("falrun.com")
    with pytest.raises(ProxyError) as error:
        await upstream.send(call(body=chunks(b"{}")))
    assert error.value.code == "upstream_broken"
    assert backup.seen == []
    server.close()
