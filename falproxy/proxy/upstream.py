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

from falproxy.errors import ProxyError
from falproxy.fal.keys import FalKey
from falproxy.fal.target import MODEL_CALLS
from falproxy.proxy.call import Call
from falproxy.proxy.headers import headers_up
from falproxy.proxy.transport import Answer, Ask, BrokenError, NotConnectedError, Origin, Way
from falproxy.proxy.transport.parser import is_usable
from falproxy.proxy.transport.wire import head_of

logger = logging.getLogger(__name__)

HTTPS_PORT = 443
HEADERS_MAX = 24
REMEMBERED = 1024  # calls without a body that clients repeat, as they go out
# fal's own fallback when the first host cannot be reached (fal_client 1.0.3).
BACKUP_HOSTS = {"fal.run": "falrun.com", "queue.fal.run": "queue.falrun.com"}
# How long a host that could not be reached is left alone before one call tries it again.
CIRCUIT_SECONDS = 30.0
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

    @property
    def is_closed(self) -> bool:
        """Whether nothing is wrong with the host."""
        return self._retry_at is None

    def allow_request(self) -> bool:
        """Return whether to try the host. False while the breaker is open; after
        `CIRCUIT_SECONDS` one caller gets True and acts as the probe."""
        if self._retry_at is None:
            return True
        now = self._clock()
        if now < self._retry_at:
            return False
        self._retry_at = now + CIRCUIT_SECONDS
        return True

    def trip(self) -> None:
        self._retry_at = self._clock() + CIRCUIT_SECONDS

    def reset(self) -> None:
        self._retry_at = None


class Upstream:
    """fal, with our key. One for all calls of a process.

    origin: where calls are sent instead of to the target's own host, which is then named by the
    Host header only: the sandbox, or a test's fake.
    """

    def __init__(
        self,
        way: Way,
        key: FalKey,
        *,
        origin: str | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.way = way
        self._key = key
        self._origin = None if origin is None else parse_origin(origin)
        self._ask_again = lru_cache(REMEMBERED)(self.ask)
        self._circuits = {} if origin else {host: Circuit(clock) for host in BACKUP_HOSTS}

    async def send(self, call: Call) -> Answer:
        """fal's answer, its body still to be read: whatever its status, it is an answer.

        Raises: ProxyError 502 `upstream_unreachable` or `upstream_broken`, 504
        `upstream_timeout`, and whatever the call's body raises while it is read.
        """
        host = call.target.host
        circuit = self._circuits.get(host)
        if circuit is None:
            return await self._exchange(call, host)
        if not circuit.allow_request():
            return await self._exchange_with_backup(call, circuit)
        try:
            answer = await self._exchange(call, host)
        except Unreachable:
            logger.warning("%s cannot be reached: its backup is asked", host)
            circuit.trip()
            return await self._exchange_with_backup(call, circuit)
        circuit.reset()
        return answer

    async def _exchange_with_backup(self, call: Call, circuit: Circuit) -> Answer:
        try:
            return await self._exchange(call, BACKUP_HOSTS[call.target.host])
        except Unreachable:
            circuit.reset()  # neither answers: the next call starts with the first again
            raise

    async def _exchange(self, call: Call, host: str) -> Answer:
        ask = (self._ask_again if is_remembered(call) else self.ask)(call, host)
        try:
            try:
                answer = await self.way.send(ask)
            except BrokenError:
                if not is_repeatable(call):
                    raise
                answer = await self.way.send(ask)
        except (NotConnectedError, BrokenError, TimeoutError) as error:
            raise translate(error, call.method, call.target.host) from error
        return usable(answer)

    def circuit(self, host: str) -> Circuit | None:
        """Whether a host is left alone; None for one that has no backup."""
        return self._circuits.get(host)

    def ask(self, call: Call, host: str) -> Ask:
        """The request that a call is to fal."""
        headers = headers_up(call.headers, (call.key or self._key).authorization)
        if call.is_document:
            headers["accept-encoding"] = "identity"
        ask = Ask(
            self._origin or Origin(host, HTTPS_PORT, True),
            call.method,
            call.target.path + call.target.query,
            [("host", host), *headers.items()],
            call.body,
            call.length,
        )
        return ask._replace(head=head_of(ask))


def is_remembered(call: Call) -> bool:
    """Whether the same call is likely to come again: a poll that was remembered itself."""
    return call.body is None and len(call.headers) <= HEADERS_MAX


def parse_origin(origin: str) -> Origin:
    url = URL(origin)
    return Origin(url.host or "", url.port or HTTPS_PORT, url.scheme == "https")


def is_repeatable(call: Call) -> bool:
    """Whether fal may get the call twice: a kept connection may have closed just now. What makes
    a job, by whatever method, is never sent again once fal may have it."""
    is_read = call.body is None and call.method != "POST"
    return is_read and call.target.operation not in MODEL_CALLS


def usable(answer: Answer) -> Answer:
    """Raises: ProxyError 502, 504, it speaks of something else than HTTP from now on."""
    if answer.status == HTTPStatus.SWITCHING_PROTOCOLS:
        answer.close()
        raise broken(answer.method)
    return answer


def translate(error: Exception, method: str, host: str) -> ProxyError:
    """What a failed exchange means to the client. Its text may be fal's, and is not told."""
    logger.warning("No answer from %s: %s", host, error)
    if isinstance(error, NotConnectedError):
        return Unreachable()
    return timed_out(method) if isinstance(error, TimeoutError) else broken(method)


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


@dataclass(slots=True, eq=False)
class InHand:
    """What came of a request that went to fal before the layers had it. method, host: the
    request's. started: by the clock of `time.perf_counter`. seconds: until fal's status line was
    here, or was not going to come. is_taken: whether the layers have it now."""

    outcome: Answer | Exception
    method: str
    host: str
    started: float
    seconds: float
    is_taken: bool = False

    def answer(self) -> Answer:
        """Raises: ProxyError 502, 504, as `Upstream.send`."""
        if isinstance(self.outcome, Exception):
            raise translate(self.outcome, self.method, self.host) from self.outcome
        return usable(self.outcome)


IN_HAND = web.RequestKey("falproxy.in_hand", InHand)


def connect_upstream(
    key: FalKey, *, origin: str | None, timeouts: tuple[float, float], fast: bool = True
) -> Callable[[web.Application], AsyncIterator[None]]:
    """Cleanup context: kept connections, alive exactly as long as the application."""

    async def context(app: web.Application) -> AsyncIterator[None]:
        async with open_way(timeouts, fast=fast) as way:
            app[UPSTREAM] = Upstream(way, key, origin=origin)
            yield

    return context


@asynccontextmanager
async def open_way(
    timeouts: tuple[float, float],
    *,
    fast: bool = True,
    trust: ssl.SSLContext | None = None,
    resolver: AbstractResolver | None = None,
) -> AsyncIterator[Way]:
    """A way to fal: our own connections, or aiohttp's client where it is wanted or where this
    aiohttp has not what they stand on. timeouts: as both of them have it."""
    if fast and is_usable():
        from falproxy.proxy.transport.pool import Pool

        pool = Pool(timeouts, trust=trust, resolver=resolver)
        try:
            yield pool
        finally:
            await pool.close()
        return
    if fast:
        logger.warning("This aiohttp has another parser: calls are slower, and right all the same")
    from falproxy.proxy.transport.aiohttp_transport import SessionWay, open_session

    async with open_session(trust, resolver) as session:
        yield SessionWay(session, timeouts)


async def read_chunk(answer: Answer) -> bytes:
    """The next bytes of an answer as they arrived, empty at its end.

    Raises: ProxyError 502 `upstream_broken`, 504 `upstream_timeout`.
    """
    try:
        return await answer.read()
    except TimeoutError as error:
        raise timed_out(answer.method) from error
    except BrokenError as error:
        raise broken(answer.method) from error
