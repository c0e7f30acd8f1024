"""The only module that talks to fal: the session, the key, the backup hosts."""

import errno
import logging
import time
from collections.abc import AsyncIterator, Callable
from functools import partial
from http import HTTPStatus

from aiohttp import (
    ClientConnectorError,
    ClientError,
    ClientOSError,
    ClientResponse,
    ClientSession,
    ClientTimeout,
    ConnectionTimeoutError,
    DummyCookieJar,
    ServerDisconnectedError,
    TCPConnector,
    web,
)
from aiohttp.client_reqrep import ConnectionKey
from aiohttp.connector import Connection
from aiohttp.tracing import Trace
from yarl import URL

from falproxy.call import Call
from falproxy.errors import ProxyError
from falproxy.headers import headers_up
from falproxy.keys import FalKey
from falproxy.target import MODEL_CALLS, Target

logger = logging.getLogger(__name__)

# fal's own fallback when the first host cannot be reached (fal_client 1.0.3).
BACKUP_HOSTS = {"fal.run": "falrun.com", "queue.fal.run": "queue.falrun.com"}
# How long a host that could not be reached is left alone before one call tries it again.
CIRCUIT_SECONDS = 30.0
# fal keeps all response headers together below 16 KiB, which one field may fill; aiohttp's own
# limit for a field is 8190 bytes.
MAX_HEADER_FIELD = 32 * 1024
MAX_HEADERS = 512
# Idle connections are dropped before fal's side is likely to do so: what is written into a
# connection that just closed may or may not have arrived.
IDLE_SECONDS = 15.0
# The clients do not send a call again after a time-out that carries this header. Ours may come
# after fal took the job, so a retry could buy it twice.
NO_RETRY = {"x-fal-request-timeout-type": "user"}


class Unreachable(ProxyError):
    """No connection to fal came about, so that not a byte of the call has left."""

    def __init__(self) -> None:
        super().__init__(502, "upstream_unreachable", "fal.ai could not be reached.")


class Circuit:
    """Whether one host is left alone for now, because no connection to it came about.

    Shared by all calls: the first caller pays for the connect time-out, the next ones do not,
    and after a while a single one of them finds out whether the host is back.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._retry_at: float | None = None

    def is_open(self) -> bool:
        """Whether the caller should leave the host alone; a no may be this caller's to try."""
        if self._retry_at is None:
            return False
        now = self._clock()
        if now < self._retry_at:
            return True
        self._retry_at = now + CIRCUIT_SECONDS
        return False

    def open(self) -> None:
        self._retry_at = self._clock() + CIRCUIT_SECONDS

    def close(self) -> None:
        self._retry_at = None


class Upstream:
    """fal, with our key. One for all calls of a process.

    origin: where calls are sent instead of to the target's own host, which is then named by the
    Host header only: the sandbox, or a test's fake. timeouts: seconds until a connection must
    stand, and seconds that fal may stay silent.
    """

    def __init__(
        self,
        session: ClientSession,
        key: FalKey,
        *,
        origin: str | None = None,
        timeouts: tuple[float, float] = (5.0, 3600.0),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._session = session
        self._key = key
        self._origin = None if origin is None else URL(origin)
        connect, silence = timeouts
        self._timeout = ClientTimeout(
            total=None, connect=connect, sock_connect=connect, sock_read=silence
        )
        self._circuits = {} if origin else {host: Circuit(clock) for host in BACKUP_HOSTS}

    async def send(self, call: Call) -> ClientResponse:
        """fal's answer, its body still to be read: whatever its status, it is an answer.

        Raises: ProxyError 502 `upstream_unreachable` or `upstream_broken`, 504
        `upstream_timeout`, and whatever the call's body raises while it is read.
        """
        host = call.target.host
        circuit = self._circuits.get(host)
        if circuit is None:
            return await self._exchange(call, host)
        if circuit.is_open():
            return await self._exchange_with_backup(call, circuit)
        try:
            response = await self._exchange(call, host)
        except Unreachable:
            logger.warning("%s cannot be reached: its backup is asked", host)
            circuit.open()
            return await self._exchange_with_backup(call, circuit)
        circuit.close()
        return response

    async def _exchange_with_backup(self, call: Call, circuit: Circuit) -> ClientResponse:
        try:
            return await self._exchange(call, BACKUP_HOSTS[call.target.host])
        except Unreachable:
            circuit.close()  # neither answers: the next call starts with the first again
            raise

    async def _exchange(self, call: Call, host: str) -> ClientResponse:
        headers = headers_up(call.headers, (call.key or self._key).authorization)
        if call.is_document:
            headers["accept-encoding"] = "identity"
        if self._origin is not None:
            headers["Host"] = host
        if call.length is not None:
            headers["Content-Length"] = str(call.length)
        request = partial(
            self._session.request,
            call.method,
            self._url(host, call.target),
            headers=headers,
            data=call.body,
            allow_redirects=False,
            timeout=self._timeout,
        )
        try:
            try:
                response = await request()
            except (ServerDisconnectedError, ClientOSError) as error:
                if isinstance(error, ClientConnectorError) or not is_repeatable(call):
                    raise
                response = await request()
        except (ClientError, TimeoutError) as error:
            raise translate(error, call) from error
        if response.status == HTTPStatus.SWITCHING_PROTOCOLS:
            response.close()
            raise broken(call.method)
        return response

    def _url(self, host: str, target: Target) -> URL:
        # yarl splits a URL to put it together again and loses a lone "?" on the way. What stands
        # in the path is left alone, so path and query go there as one.
        path = target.path + target.query
        if self._origin is None:
            return URL.build(scheme="https", host=host, path=path, encoded=True)
        return URL.build(
            scheme=self._origin.scheme,
            authority=self._origin.raw_authority,
            path=path,
            encoded=True,
        )


def is_repeatable(call: Call) -> bool:
    """Whether fal may get the call twice: a kept connection may have closed just now. What makes
    a job, by whatever method, is never sent again once fal may have it."""
    is_read = call.body is None and call.method != "POST"
    return is_read and call.target.operation not in MODEL_CALLS


def translate(error: Exception, call: Call) -> ProxyError:
    """What a failed exchange means to the client."""
    # aiohttp wraps what the body raises while it is sent: a refusal of ours is inside.
    if isinstance(error.__cause__, ProxyError):
        return error.__cause__
    logger.warning("No answer from %s: %s", call.target.host, describe(error))
    if isinstance(error, ClientConnectorError | ConnectionTimeoutError):
        return Unreachable()
    return timed_out(call.method) if isinstance(error, TimeoutError) else broken(call.method)


def describe(error: BaseException) -> str:
    """The kind of a failure, and the system's word for it. Never its text, which may be fal's."""
    number = getattr(error, "errno", None)
    return f"{type(error).__name__} {errno.errorcode.get(number or 0, '')}".strip()


def timed_out(method: str) -> ProxyError:
    headers = NO_RETRY if method == "POST" else {}
    return ProxyError(504, "upstream_timeout", "fal.ai did not answer in time.", headers)


def broken(method: str) -> ProxyError:
    """502, which fal's clients send again. Not so for a POST, where fal may have taken the job:
    only a 504 with the header keeps them from buying it a second time."""
    message = "fal.ai broke off in the middle of its answer."
    if method == "POST":
        return ProxyError(504, "upstream_broken", message, NO_RETRY)
    return ProxyError(502, "upstream_broken", message)


UPSTREAM = web.AppKey("falproxy.upstream", Upstream)


def connect_upstream(
    key: FalKey, *, origin: str | None, timeouts: tuple[float, float]
) -> Callable[[web.Application], AsyncIterator[None]]:
    """Cleanup context: one pooled session, alive exactly as long as the application."""

    async def context(app: web.Application) -> AsyncIterator[None]:
        async with open_session() as session:
            app[UPSTREAM] = Upstream(session, key, origin=origin, timeouts=timeouts)
            yield

    return context


class CleanConnector(TCPConnector):
    """A pool that gives out no connection on which something came that nobody asked for: it would
    be taken for the answer to the next call, which may be another client's."""

    async def _get(self, key: ConnectionKey, traces: list[Trace]) -> Connection | None:
        # Not documented by aiohttp, which looks only whether a kept connection still stands. A
        # test of what nobody asked for (test_relay.py) fails when this is no longer called.
        while (connection := await super()._get(key, traces)) is not None:
            if connection.protocol is not None and not connection.protocol.should_close:
                return connection
            connection.close()
        return None


def open_session(connector: TCPConnector | None = None) -> ClientSession:
    """A session that changes nothing: no cookies kept, no bodies decoded, no headers of its own,
    no proxy from the environment, and no limit on connections that would be a hidden queue."""
    session = ClientSession(
        connector=connector or CleanConnector(limit=0, keepalive_timeout=IDLE_SECONDS),
        cookie_jar=DummyCookieJar(),
        auto_decompress=False,
        skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding", "Content-Type"),
        max_field_size=MAX_HEADER_FIELD,
        max_line_size=MAX_HEADER_FIELD,
        max_headers=MAX_HEADERS,
    )
    # It would send GET and PUT again by itself, and a GET can be a run: is_repeatable says what
    # may be, and tests of both (test_relay.py) fail when this switch is gone.
    session._retry_connection = False
    return session


async def read_chunk(response: ClientResponse) -> bytes:
    """The next bytes of an answer as they arrived, empty at its end.

    Raises: ProxyError 502 `upstream_broken`, 504 `upstream_timeout`.
    """
    try:
        return await response.content.readany()
    except TimeoutError as error:
        raise timed_out(response.method) from error
    except ClientError as error:
        raise broken(response.method) from error
