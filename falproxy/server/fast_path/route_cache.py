"""What is known of requests that may take the lane."""

import logging
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace

from aiohttp import hdrs, web

from falproxy.fal.image_fields import may_name_images
from falproxy.fal.target import Operation
from falproxy.ids import Names
from falproxy.metrics import Metrics
from falproxy.middleware.access_log import Kind, given_name
from falproxy.middleware.accounting import PAGE
from falproxy.middleware.image_inputs import INPUT, NOT_COVERED
from falproxy.proxy.call import CACHE, CALL, IN_TURN, PRINCIPAL, Call
from falproxy.proxy.direct_write import ShortCut
from falproxy.proxy.forward import UpstreamResponse
from falproxy.proxy.head_only import NEEDS_EVERY_REQUEST
from falproxy.proxy.transport.pool import Pool
from falproxy.proxy.upstream import UPSTREAM, Upstream
from falproxy.server.fast_path import Pass, parted
from falproxy.server.fast_path.in_flight import Client, Errand

logger = logging.getLogger(__name__)

# How many passes there are at most, for how many seconds each, and for requests of which size.
PASSES_MAX = 4096
SECONDS = 60.0
HEAD_MAX = 2048
BODY_MAX = 16 * 2**10
PLAIN = (web.HTTPOk.status_code, web.HTTPAccepted.status_code)

IsClaimed = Callable[[str], bool]


class Passes:
    """max_body: bytes that a request's body may have. is_claimed: whether the layers have
    something to say about a request of fal's queue, about which they may have had nothing to say
    before."""

    def __init__(
        self, metrics: Metrics, short_cut: ShortCut, max_body: int, is_claimed: IsClaimed
    ) -> None:
        self.most, self.seconds = PASSES_MAX, SECONDS
        self.taken = 0  # requests that took the lane
        self._metrics = metrics
        self._short_cut = short_cut
        self._max_body = min(max_body, BODY_MAX)
        self._is_claimed = is_claimed
        self._passes: dict[bytes, Pass] = {}
        self._names = Names()
        self._logged: set[str] = set()  # middleware that kept requests off the fast path
        self._upstream: Upstream | None = None
        self._pool: Pool | None = None

    async def context(self, app: web.Application) -> AsyncIterator[None]:
        """Cleanup context: there is a lane as long as there are connections of our own."""
        self._upstream = app[UPSTREAM]
        if isinstance(self._upstream.way, Pool):
            self._pool = self._upstream.way
        yield
        self._pool = None

    def begin(self, client: Client, data: bytes) -> Errand | None:
        """A request on its way to fal. None: it has no pass, or there is no connection for it."""
        key, body = parted(data)
        found = self._passes.get(key)
        if found is None or self._pool is None or not self._may_pass(key, body, found):
            return None
        connection = self._pool.kept(found.ask.origin)
        if connection is None:
            return None
        errand = Errand(client, data, found, self._metrics, found.name or self._names.next())
        if not errand.begin(connection, body):
            return None
        self.taken += 1
        return errand

    def _may_pass(self, key: bytes, body: bytes, found: Pass) -> bool:
        if found.until < time.monotonic():
            del self._passes[key]
            return False
        is_away = found.circuit is not None and not found.circuit.is_closed
        if is_away or not self._short_cut.enabled:
            return False
        if found.request_id is None:
            return len(body) <= self._max_body and not may_name_images(body)
        return not self._is_claimed(found.request_id)

    def add(self, data: bytes, request: web.Request, response: web.StreamResponse) -> None:
        """Remembers a request that has just been answered, if it may take the lane."""
        if self._pool is None or self._upstream is None or CACHE in request or IN_TURN in request:
            return
        if (name := request.get(NEEDS_EVERY_REQUEST)) is not None:
            self._log_once(name)
            return
        if not isinstance(response, UpstreamResponse) or not response.was_plain:
            return
        call, (key, _) = request[CALL], parted(data)
        if not key or len(key) > HEAD_MAX or response.status not in PLAIN:
            return
        if not (is_poll(call) or is_plain_submit(call, request)):
            return
        method, principal, target = call.method, request.get(PRINCIPAL), call.target
        self._passes.pop(key, None)
        if len(self._passes) >= self.most:  # the oldest gives way
            del self._passes[next(iter(self._passes))]
        self._passes[key] = Pass(
            ask=self._upstream.ask(replace(call, body=None, length=None), target.host),
            circuit=self._upstream.circuit(target.host),
            request_id=target.request_id,
            until=time.monotonic() + self.seconds,
            name=given_name(request),
            added=response.added,
            kinds={
                status: Kind(method, principal, target.operation, target.endpoint, status)
                for status in PLAIN
            },
            page=request.get(PAGE),
        )

    def _log_once(self, name: str) -> None:
        if name not in self._logged:
            self._logged.add(name)
            logger.debug("The fast path is closed: the middleware %s needs every request", name)


def is_poll(call: Call) -> bool:
    target = call.target
    is_status = target.operation is Operation.STATUS and target.request_id is not None
    return is_status and call.method == hdrs.METH_GET and call.body is None


def is_plain_submit(call: Call, request: web.Request) -> bool:
    """Whether it is an order that nobody but the ledger has to do with: its result is shared with
    nobody, its body is looked at for pictures only, and the next one goes out with the same key."""
    if call.target.operation is not Operation.SUBMIT or call.method != hdrs.METH_POST:
        return False
    if call.key is not None or PAGE not in request:
        return False
    seen = request.get(INPUT)
    return seen is not None and seen.objection == NOT_COVERED
