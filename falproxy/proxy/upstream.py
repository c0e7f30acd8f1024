"""The only module that sends requests to fal: adds the key, falls back to the backup hosts, and
maps transport errors to `ProxyError`."""

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
from falproxy.errors import ProxyError, TemporaryError
from falproxy.fal.keys import FalKey
from falproxy.fal.policy import is_model_call, needs_key
from falproxy.fal.tags import TAGS_HEADER
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
from falproxy.proxy.transport.http1 import serialize_request_head

logger = logging.getLogger(__name__)

HTTPS_PORT = 443
CACHE_SIZE = 1024  # serialized requests of memoized calls, whose heads are small
# The fallback of fal's own client when the first host cannot be reached (fal_client 1.0.3).
BACKUP_HOSTS = {"fal.run": "falrun.com", "queue.fal.run": "queue.falrun.com"}
COOLDOWN_SECONDS = 30.0  # for a host that could not be reached
# fal's clients do not retry after a time-out with this header. Here fal may have accepted the job
# before the time-out, so that a retry could be charged twice.
NO_RETRY_HEADERS = {"x-fal-request-timeout-type": "user"}


class UpstreamUnreachable(TemporaryError):
    """No connection to fal could be opened. No byte of the call has been sent."""

    def __init__(self) -> None:
        super().__init__(502, "upstream_unreachable", "fal.ai could not be reached.")


class Upstream:
    """Sends calls to fal. One instance serves all calls of a process.

    key: sent with calls that have no key of their own.
    origin: the server for all calls instead of the target's host, such as the sandbox. The host is
        then named in the Host header only.
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

    def __repr__(self) -> str:
        return f"<Upstream by {self.transport!r}, breakers {self._breakers}>"

    async def send(self, call: Call) -> TransportResponse:
        """Return fal's response, of any status. Its body is still to be read.

        Raises: ProxyError 502 `upstream_unreachable` or `upstream_broken`, 504 `upstream_timeout`,
            and the exceptions of the call's body.
        """
        host = call.target.host
        breaker = self._breakers.get(host)
        if breaker is None:
            return await self._exchange(call, host)
        if not breaker.allow_request():
            return await self._exchange_with_backup(call, breaker)
        try:
            response = await self._exchange(call, host)
        except UpstreamUnreachable:
            logger.warning("%s cannot be reached: its backup host is used", host)
            breaker.trip()
            return await self._exchange_with_backup(call, breaker)
        breaker.reset()
        return response

    async def _exchange_with_backup(self, call: Call, breaker: CircuitBreaker) -> TransportResponse:
        try:
            return await self._exchange(call, BACKUP_HOSTS[call.target.host])
        except UpstreamUnreachable:
            breaker.reset()  # neither host is reachable: the next call tries the first one again
            raise

    async def _exchange(self, call: Call, host: str) -> TransportResponse:
        request = self.request_of(call, host)
        try:
            try:
                response = await self.transport.send(request)
            except ConnectionLostError:
                if not is_replayable(call):
                    raise
                response = await self.transport.send(request)
        except (ConnectError, ConnectionLostError, TimeoutError) as error:
            raise map_transport_error(
                error, call.target.host, is_repeatable=is_repeatable(call)
            ) from error
        return reject_upgrade(response, is_repeatable=is_repeatable(call))

    def breaker(self, host: str) -> CircuitBreaker | None:
        """Return the circuit breaker of a host, None for a host without a backup."""
        return self._breakers.get(host)

    def request_of(self, call: Call, host: str) -> UpstreamRequest:
        """Return the request of a call. That of a memoized call is made once."""
        is_repeated = call.is_memoized and call.body is None
        build = self._build_request_cached if is_repeated else self.build_request
        return build(call, host)

    def build_request(self, call: Call, host: str) -> UpstreamRequest:
        key = (call.key or self._key) if needs_key(call.method, call.target) else None
        headers = request_headers(call.headers, None if key is None else key.authorization)
        if call.needs_identity:
            headers["accept-encoding"] = "identity"
        if call.tags is not None:
            headers[TAGS_HEADER] = call.tags
        request = UpstreamRequest(
            self._origin or Origin(host, HTTPS_PORT, True),
            call.method,
            call.target.path + call.target.query,
            [("host", host), *headers.items()],
            call.body,
            call.length,
        )
        return request._replace(head=serialize_request_head(request))


def parse_origin(origin: str) -> Origin:
    url = URL(origin)
    return Origin(url.host or "", url.port or HTTPS_PORT, url.scheme == "https")


def is_replayable(call: Call) -> bool:
    """Return whether the call may be sent again after its connection was lost, which a pooled
    connection may be at any moment."""
    return call.body is None and is_repeatable(call)


def is_repeatable(call: Call) -> bool:
    """Return whether nothing is made or paid twice if the call arrives twice. A call of a model is
    never repeatable, by whatever method."""
    return call.method != "POST" and not is_model_call(call.method, call.target)


def reject_upgrade(response: TransportResponse, *, is_repeatable: bool) -> TransportResponse:
    """Return the response. Raises: ProxyError 502, 504, it switches to another protocol."""
    if response.status == HTTPStatus.SWITCHING_PROTOCOLS:
        response.close()
        raise connection_lost(is_repeatable=is_repeatable)
    return response


def map_transport_error(error: Exception, host: str, *, is_repeatable: bool) -> ProxyError:
    """Return the error for the client. The text of the transport error is only logged: it may be
    fal's."""
    logger.warning("No response from %s: %s", host, error)
    if isinstance(error, ConnectError):
        return UpstreamUnreachable()
    if isinstance(error, TimeoutError):
        return timed_out(is_repeatable=is_repeatable)
    return connection_lost(is_repeatable=is_repeatable)


def timed_out(*, is_repeatable: bool) -> ProxyError:
    message = "fal.ai did not respond in time."
    if not is_repeatable:
        return ProxyError(504, "upstream_timeout", message, NO_RETRY_HEADERS)
    return TemporaryError(504, "upstream_timeout", message)


def connection_lost(*, is_repeatable: bool) -> ProxyError:
    """Return a 502, after which fal's clients retry; or a 504 with the header that keeps them from
    it, since fal may have accepted the job."""
    message = "fal.ai closed the connection in the middle of its response."
    if not is_repeatable:
        return ProxyError(504, "upstream_broken", message, NO_RETRY_HEADERS)
    return TemporaryError(502, "upstream_broken", message)


UPSTREAM = web.AppKey("falproxy.upstream", Upstream)


@dataclass(slots=True, eq=False)
class PrefetchedResponse:
    """The outcome of a request that the fast path sent and the normal path continues.

    outcome: fal's response, or the transport error.
    method, host: of the request. The fast path sends polls by GET and submits by POST only.
    started: by `time.perf_counter`.
    upstream_seconds: until fal's response head arrived, or the request failed.
    is_consumed: the middleware pipeline has taken over the outcome.
    """

    outcome: TransportResponse | Exception
    method: str
    host: str
    started: float
    upstream_seconds: float
    is_consumed: bool = False

    def response(self) -> TransportResponse:
        """Return fal's response. Raises: ProxyError 502, 504, as `Upstream.send`."""
        if isinstance(self.outcome, Exception):
            raise map_transport_error(
                self.outcome, self.host, is_repeatable=self.method != "POST"
            ) from self.outcome
        return reject_upgrade(self.outcome, is_repeatable=self.method != "POST")

    def close(self) -> None:
        """Discard fal's response, which may be incomplete."""
        if not isinstance(self.outcome, Exception):
            self.outcome.close()


# Set by the fast path when it gives a request back that it has sent already.
PREFETCHED = web.RequestKey("falproxy.prefetched", PrefetchedResponse)


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
    kind: "pool", falproxy's own connections, or "aiohttp", its client.
    """
    if kind == "pool":
        from falproxy.proxy.transport.pool import Pool

        pool = Pool(timeouts, ssl_context=ssl_context, resolver=resolver)
        try:
            yield pool
        finally:
            await pool.close()
        return
    from falproxy.proxy.transport.aiohttp_transport import AiohttpTransport, open_session

    async with open_session(ssl_context, resolver) as session:
        yield AiohttpTransport(session, timeouts)


async def read_chunk(response: TransportResponse, *, is_repeatable: bool | None = None) -> bytes:
    """Return the next bytes of a body as they arrive, empty at its end.

    is_repeatable: as of the response's call; None decides by the method.
    Raises: ProxyError 502 `upstream_broken`, 504 `upstream_timeout`.
    """
    try:
        return await response.read()
    except (TimeoutError, ConnectionLostError) as error:
        if is_repeatable is None:
            is_repeatable = response.method != "POST"
        create = timed_out if isinstance(error, TimeoutError) else connection_lost
        raise create(is_repeatable=is_repeatable) from error
