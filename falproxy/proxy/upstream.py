"""The only module that talks to fal: the key, the backup hosts, and what failures mean."""

import logging
import ssl
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import lru_cache
from http import HTTPStatus

from aiohttp import web
from aiohttp.abc import AbstractResolver
from yarl import URL

from falproxy.circuit_breaker import CircuitBreaker
from falproxy.errors import ProxyError
from falproxy.fal.keys import FalKey
from falproxy.fal.target import MODEL_CALLS
from falproxy.proxy.call import Call
from falproxy.proxy.headers import request_headers
from falproxy.proxy.transport import (
    ConnectError,
    ConnectionLostError,
    Origin,
    Transport,
    TransportResponse,
    UpstreamRequest,
)
from falproxy.proxy.transport.parser import is_supported
from falproxy.proxy.transport.wire import serialize_request_head

logger = logging.getLogger(__name__)

HTTPS_PORT = 443
MEMOIZED_HEADERS_MAX = 24
CACHE_SIZE = 1024  # calls without a body that clients repeat, as they go out
# fal's own fallback when the first host cannot be reached (fal_client 1.0.3).
BACKUP_HOSTS = {"fal.run": "falrun.com", "queue.fal.run": "queue.falrun.com"}
# How long a host that could not be reached is left alone before one call tries it again.
COOLDOWN_SECONDS = 30.0
# The clients do not send a call again after a time-out that carries this header. Ours may come
# after fal took the job, so a retry could buy it twice.
NO_RETRY_HEADERS = {"x-fal-request-timeout-type": "user"}


class UpstreamUnreachable(ProxyError):
    """No connection to fal came about, so that not a byte of the call has left."""

    def __init__(self) -> None:
        super().__init__(502, "upstream_unreachable", "fal.ai could not be reached.")


class Upstream:
    """fal, with our key. One for all calls of a process.

    origin: where calls are sent instead of to the target's own host, which is then named by the
    Host header only: the sandbox, or a test's fake.
    """

    def __init__(
        self,
        transport: Transport,
        key: FalKey,
        *,
        origin: str | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.transport = transport
        self._key = key
        self._origin = None if origin is None else parse_origin(origin)
        self._build_request_cached = lru_cache(CACHE_SIZE)(self.build_request)
        self._breakers = (
            {}
            if origin
            else {host: CircuitBreaker(COOLDOWN_SECONDS, clock) for host in BACKUP_HOSTS}
        )

    async def send(self, call: Call) -> TransportResponse:
        """fal's answer, its body still to be read: whatever its status, it is an answer.

        Raises: ProxyError 502 `upstream_unreachable` or `upstream_broken`, 504
        `upstream_timeout`, and whatever the call's body raises while it is read.
        """
        host = call.target.host
        circuit = self._breakers.get(host)
        if circuit is None:
            return await self._exchange(call, host)
        if not circuit.allow_request():
            return await self._exchange_with_backup(call, circuit)
        try:
            answer = await self._exchange(call, host)
        except UpstreamUnreachable:
            logger.warning("%s cannot be reached: its backup is asked", host)
            circuit.trip()
            return await self._exchange_with_backup(call, circuit)
        circuit.reset()
        return answer

    async def _exchange_with_backup(self, call: Call, breaker: CircuitBreaker) -> TransportResponse:
        try:
            return await self._exchange(call, BACKUP_HOSTS[call.target.host])
        except UpstreamUnreachable:
            breaker.reset()  # neither answers: the next call starts with the first again
            raise

    async def _exchange(self, call: Call, host: str) -> TransportResponse:
        ask = (self._build_request_cached if is_memoizable(call) else self.build_request)(
            call, host
        )
        try:
            try:
                answer = await self.transport.send(ask)
            except ConnectionLostError:
                if not is_replayable(call):
                    raise
                answer = await self.transport.send(ask)
        except (ConnectError, ConnectionLostError, TimeoutError) as error:
            raise map_transport_error(error, call.method, call.target.host) from error
        return reject_upgrade(answer)

    def breaker(self, host: str) -> CircuitBreaker | None:
        """Whether a host is left alone; None for one that has no backup."""
        return self._breakers.get(host)

    def build_request(self, call: Call, host: str) -> UpstreamRequest:
        """The request that a call is to fal."""
        headers = request_headers(call.headers, (call.key or self._key).authorization)
        if call.needs_identity:
            headers["accept-encoding"] = "identity"
        ask = UpstreamRequest(
            self._origin or Origin(host, HTTPS_PORT, True),
            call.method,
            call.target.path + call.target.query,
            [("host", host), *headers.items()],
            call.body,
            call.length,
        )
        return ask._replace(head=serialize_request_head(ask))


def is_memoizable(call: Call) -> bool:
    """Whether the same call is likely to come again: a poll that was remembered itself."""
    return call.body is None and len(call.headers) <= MEMOIZED_HEADERS_MAX


def parse_origin(origin: str) -> Origin:
    url = URL(origin)
    return Origin(url.host or "", url.port or HTTPS_PORT, url.scheme == "https")


def is_replayable(call: Call) -> bool:
    """Whether fal may get the call twice: a kept connection may have closed just now. What makes
    a job, by whatever method, is never sent again once fal may have it."""
    is_read = call.body is None and call.method != "POST"
    return is_read and call.target.operation not in MODEL_CALLS


def reject_upgrade(response: TransportResponse) -> TransportResponse:
    """Raises: ProxyError 502, 504, it speaks of something else than HTTP from now on."""
    if response.status == HTTPStatus.SWITCHING_PROTOCOLS:
        response.close()
        raise connection_lost(response.method)
    return response


def map_transport_error(error: Exception, method: str, host: str) -> ProxyError:
    """What a failed exchange means to the client. Its text may be fal's, and is not told."""
    logger.warning("No answer from %s: %s", host, error)
    if isinstance(error, ConnectError):
        return UpstreamUnreachable()
    return timed_out(method) if isinstance(error, TimeoutError) else connection_lost(method)


def timed_out(method: str) -> ProxyError:
    headers = NO_RETRY_HEADERS if method == "POST" else {}
    return ProxyError(504, "upstream_timeout", "fal.ai did not answer in time.", headers)


def connection_lost(method: str) -> ProxyError:
    """502, which fal's clients send again. Not so for a POST, where fal may have taken the job:
    only a 504 with the header keeps them from buying it a second time."""
    message = "fal.ai broke off in the middle of its answer."
    if method == "POST":
        return ProxyError(504, "upstream_broken", message, NO_RETRY_HEADERS)
    return ProxyError(502, "upstream_broken", message)


UPSTREAM = web.AppKey("falproxy.upstream", Upstream)


@dataclass(slots=True, eq=False)
class PrefetchedResponse:
    """What came of a request that went to fal before the layers had it. method, host: the
    request's. started: by the clock of `time.perf_counter`. seconds: until fal's status line was
    here, or was not going to come. is_taken: whether the layers have it now."""

    outcome: TransportResponse | Exception
    method: str
    host: str
    started: float
    upstream_seconds: float
    is_consumed: bool = False

    def response(self) -> TransportResponse:
        """Raises: ProxyError 502, 504, as `Upstream.send`."""
        if isinstance(self.outcome, Exception):
            raise map_transport_error(self.outcome, self.method, self.host) from self.outcome
        return reject_upgrade(self.outcome)


PREFETCHED = web.RequestKey("falproxy.in_hand", PrefetchedResponse)


def connect_upstream(
    key: FalKey, *, origin: str | None, timeouts: tuple[float, float], transport: str = "pool"
) -> Callable[[web.Application], AsyncIterator[None]]:
    """Return a cleanup context: a transport to fal, open exactly as long as the application."""

    async def upstream_context(app: web.Application) -> AsyncIterator[None]:
        async with open_transport(timeouts, kind=transport) as opened:
            app[UPSTREAM] = Upstream(opened, key, origin=origin)
            yield

    return upstream_context


@asynccontextmanager
async def open_transport(
    timeouts: tuple[float, float],
    *,
    kind: str = "pool",
    ssl_context: ssl.SSLContext | None = None,
    resolver: AbstractResolver | None = None,
) -> AsyncIterator[Transport]:
    """Open the transport to fal.

    timeouts: seconds to connect, and seconds without a byte of the response.
    kind: "pool", falproxy's own connections, or "aiohttp", its client. The client is also used when
    this release of aiohttp lacks the parser that the pool needs.
    """
    if kind == "pool" and is_supported():
        from falproxy.proxy.transport.pool import Pool

        pool = Pool(timeouts, ssl_context=ssl_context, resolver=resolver)
        try:
            yield pool
        finally:
            await pool.close()
        return
    if kind == "pool":
        logger.warning("This aiohttp has another parser: its client is used, which is slower")
    from falproxy.proxy.transport.aiohttp_transport import AiohttpTransport, open_session

    async with open_session(ssl_context, resolver) as session:
        yield AiohttpTransport(session, timeouts)


async def read_chunk(response: TransportResponse) -> bytes:
    """The next bytes of an answer as they arrived, empty at its end.

    Raises: ProxyError 502 `upstream_broken`, 504 `upstream_timeout`.
    """
    try:
        return await response.read()
    except TimeoutError as error:
        raise timed_out(response.method) from error
    except ConnectionLostError as error:
        raise connection_lost(response.method) from error
