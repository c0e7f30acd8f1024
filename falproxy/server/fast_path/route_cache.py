"""The cached routes of the fast path, and the rules for the requests that may use them."""

import logging
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from itertools import count

from aiohttp import hdrs, web

from falproxy.fal.image_fields import may_contain_images
from falproxy.fal.target import Operation
from falproxy.ids import IdGenerator
from falproxy.metrics import Metrics
from falproxy.middleware.access_log import CallIds, CallLabels, client_request_id, valid_request_id
from falproxy.middleware.accounting import RECORD_TEMPLATE
from falproxy.middleware.image_inputs import INSPECTED_INPUT, NOT_CACHEABLE
from falproxy.middleware.job_ends import RESULT_ACCOUNTING
from falproxy.proxy.call import (
    CACHE_OUTCOME,
    CALL,
    CONNECTION_BOUND,
    GRANT,
    PRINCIPAL,
    USER,
    USES_ROTATION,
    Call,
)
from falproxy.proxy.client_address import FORWARDED_FOR, TRUSTED_PROXIES
from falproxy.proxy.forward import DirectWrite, RelayedResponse
from falproxy.proxy.head_only import (
    ADDRESS_CHECK,
    ID_CHECKS,
    NEEDS_EVERY_ID,
    NEEDS_EVERY_REQUEST,
    takes_any_id,
)
from falproxy.proxy.prices import COST_HEADER, SAVED_HEADER
from falproxy.proxy.transport import UpstreamRequest
from falproxy.proxy.transport.pool import Pool
from falproxy.proxy.upstream import UPSTREAM, Upstream
from falproxy.server.fast_path import (
    READ_TAG,
    CachedRoute,
    PollHead,
    RouteKey,
    Tags,
    split_poll,
    split_request,
    split_tags,
)
from falproxy.server.fast_path.in_flight import ClientConnection, InFlightRequest
from falproxy.server.fast_path.untagged_keys import UntaggedKeys, is_same_poll, length_of
from falproxy.trusted_proxies import TrustedProxies

logger = logging.getLogger(__name__)

ROUTES_MAX = 4096
ROUTES_MAX_BYTES = 16 * 2**20
ENTRY_BYTES = 2048  # of a cached route, beside four times its head: key, request, headers as text
TTL_SECONDS = 60.0
HEAD_MAX = 3072  # bytes; a token has some 1000, the headers of a browser as many
# Added headers that differ between calls with the same head.
CALL_HEADERS = (COST_HEADER, SAVED_HEADER)
BODY_MAX = 16 * 2**10  # bytes

# A route with its key, the head as a poll, and the tags that were left out of it.
FoundRoute = tuple[RouteKey, CachedRoute, PollHead | None, Tags | None]

ELIGIBLE_STATUSES = (web.HTTPOk.status_code, web.HTTPAccepted.status_code)


class RouteCache:
    """Cached routes by request head.

    max_body: bytes of a request body.
    """

    def __init__(self, metrics: Metrics, direct_write: DirectWrite, max_body: int) -> None:
        self.max_routes, self.ttl = ROUTES_MAX, TTL_SECONDS
        self.hits = 0  # requests sent on the fast path
        self._metrics = metrics
        self._direct_write = direct_write
        self._max_body = min(max_body, BODY_MAX)
        self._routes: dict[RouteKey, CachedRoute] = {}
        self._size = 0  # bytes of all routes
        self._untagged = UntaggedKeys()
        self._ids = IdGenerator()
        self.next_connection = count().__next__
        self._logged: set[str] = set()  # middleware that kept requests off the fast path
        self._trusted_proxies = TrustedProxies()
        # The middleware of the application decides for all request ids, and all tags.
        self._takes_any_id = False
        self._upstream: Upstream | None = None
        self._pool: Pool | None = None

    def __repr__(self) -> str:
        return f"<RouteCache {len(self._routes)} routes, {self.hits} hits>"

    async def cleanup_context(self, app: web.Application) -> AsyncIterator[None]:
        """Cleanup context: enable the fast path for as long as the transport is a `Pool`."""
        self._takes_any_id = all(map(takes_any_id, app.middlewares))
        self._upstream = app[UPSTREAM]
        self._trusted_proxies = app[TRUSTED_PROXIES]
        if isinstance(self._upstream.transport, Pool):
            self._pool = self._upstream.transport
        yield
        self._pool = None

    def start(self, client: ClientConnection, data: bytes) -> InFlightRequest | None:
        """Send a request to fal on the fast path. None if it needs the normal path: it has no
        cached route, is not eligible now, or there is no idle connection."""
        head, body = split_request(data)
        found = self._find(client, head, split_poll(head))
        if found is None:
            return None
        key, route, poll, tags = found
        request_id = polled_id(route, poll)
        if self._pool is None or not self._is_eligible(key, body, route, request_id):
            return None
        forwarded_for = route.forwarded_for if tags is None else tags.forwarded_for
        address = self._trusted_proxies.client_address(client.peer, forwarded_for)
        if route.address_check is not None and not route.address_check(address):
            return None
        connection = self._pool.acquire_idle(route.request.origin)
        if connection is None:
            return None
        ids = CallIds(
            (tags and valid_request_id(tags.request_id or ""))
            or route.client_request_id
            or self._ids.next_id(),
            request_id,
            address,
        )
        in_flight = InFlightRequest(client, data, route, self._metrics, ids)
        if not in_flight.start(connection, body):
            return None
        self.hits += 1
        return in_flight

    def _find(
        self, client: ClientConnection, head: bytes, poll: PollHead | None
    ) -> FoundRoute | None:
        key = head if poll is None else poll[1]
        if (route := self._routes.get(key)) is not None:
            return key, route, poll, None
        if (known := self._untagged.find(key)) is not None:
            untagged_key, tags = known
            if (route := self._routes.get(untagged_key)) is not None:
                return untagged_key, route, poll, tags
        for own_key in (head, (client.number, head)):
            if (route := self._routes.get(own_key)) is not None:
                return own_key, route, poll, None
        return self._find_untagged(key, head, poll) if self._takes_any_id else None

    def _find_untagged(
        self, tagged_key: RouteKey, head: bytes, poll: PollHead | None
    ) -> FoundRoute | None:
        """Return the route of a head without its tags, and remember its key."""
        untagged, tags = split_tags(head)
        without = split_poll(untagged)
        key = untagged if without is None else without[1]
        if (route := self._routes.get(key)) is not None:
            if tags is not None and is_same_poll(head, poll, without):
                self._untagged.add(tagged_key, key, tags)
            return key, route, without, tags
        own_route = self._routes.get(untagged)
        return None if own_route is None else (untagged, own_route, without, tags)

    def _is_eligible(
        self, key: RouteKey, body: bytes, route: CachedRoute, request_id: str | None
    ) -> bool:
        is_expired = route.expires_at < time.monotonic()
        if is_expired or (route.grant is not None and not route.grant.use()):
            self._remove(key)
            return False
        is_broken = route.breaker is not None and not route.breaker.is_closed
        if is_broken or not self._direct_write.enabled:
            return False
        if request_id is None:
            return len(body) <= self._max_body and not may_contain_images(body)
        return route.admits(request_id)

    def add(
        self,
        client: ClientConnection,
        data: bytes,
        request: web.Request,
        response: web.StreamResponse,
    ) -> None:
        """Cache the route of a request that was just completed on the normal path, if it is
        eligible. If the proxy has refused it, or has to see every such request, the route that its
        head had before ends."""
        head, _ = split_request(data)
        untagged = split_tags(head)[0] if self._takes_any_id else head
        if NEEDS_EVERY_REQUEST in request or not isinstance(response, RelayedResponse):
            for each in {head, untagged}:
                self._remove_if_admitted(client, each)
            self._log_once(request.get(NEEDS_EVERY_REQUEST))
            return
        if ignores_tags := self._takes_any_id and NEEDS_EVERY_ID not in request:
            if READ_TAG.search(untagged) is not None:
                return
            head = untagged
        poll = split_poll(head)
        if self._upstream is None or not self._may_be_cached(head, request, response):
            return
        call, grant = request[CALL], request.get(GRANT)
        target = call.target
        bodiless = call if call.body is None else replace(call, body=None, length=None)
        upstream_request = self._upstream.request_of(bodiless, target.host)
        parts = None
        key: RouteKey = (client.number, head) if CONNECTION_BOUND in request else head
        if poll is not None and self._takes_any_id and decides_for_any_id(request, response):
            parts = split_at_id(poll, call, head, upstream_request)
            key = key if parts is None else poll[1]
        labels = CallLabels(
            call.method,
            request.get(PRINCIPAL),
            target.operation,
            target.endpoint,
            response.status,
            user=request.get(USER),
        )
        self._remove(key)
        while self._routes and (
            len(self._routes) >= self.max_routes or self._size > ROUTES_MAX_BYTES
        ):  # evict the oldest
            self._remove(next(iter(self._routes)))
        self._size += size_of(key)
        self._routes[key] = CachedRoute(
            request=upstream_request,
            parts=parts,
            breaker=self._upstream.breaker(target.host),
            request_id=target.request_id,
            id_checks=request.get(ID_CHECKS, ()),
            expires_at=time.monotonic() + self.ttl,
            client_request_id=None if ignores_tags else client_request_id(request),
            forwarded_for=() if ignores_tags else tuple(request.headers.getall(FORWARDED_FOR, ())),
            address_check=request.get(ADDRESS_CHECK),
            extra_headers=tuple(
                header for header in response.extra_headers if header[0] not in CALL_HEADERS
            ),
            labels_by_status={
                status: labels._replace(status=status) for status in ELIGIBLE_STATUSES
            },
            record_template=request.get(RECORD_TEMPLATE),
            results=request.get(RESULT_ACCOUNTING),
            grant=grant,
        )

    def _may_be_cached(self, head: bytes, request: web.Request, response: RelayedResponse) -> bool:
        if self._pool is None or CACHE_OUTCOME in request or USES_ROTATION in request:
            return False
        if not head or len(head) > HEAD_MAX or response.status not in ELIGIBLE_STATUSES:
            return False
        call, grant = request[CALL], request.get(GRANT)
        if not response.was_sent_directly or not (grant is None or grant.use()):
            return False
        is_result = RESULT_ACCOUNTING in request
        return is_poll(call, is_result=is_result) or is_eligible_submit(call, request)

    def _remove_if_admitted(self, client: ClientConnection, head: bytes) -> None:
        """End the routes of a head, except those for other request ids only."""
        poll = split_poll(head)
        for key in route_keys(client, head, poll):
            route = self._routes.get(key)
            if route is not None and route.admits(polled_id(route, poll)):
                self._remove(key)

    def _remove(self, key: RouteKey) -> None:
        if self._routes.pop(key, None) is not None:
            self._size -= size_of(key)

    def _log_once(self, name: str | None) -> None:
        if name is not None and name not in self._logged:
            self._logged.add(name)
            logger.debug("The fast path is not used for requests through %s (not head_only)", name)


def size_of(key: RouteKey) -> int:
    """Return the bytes that the route of a request head takes."""
    return ENTRY_BYTES + 4 * length_of(key)


def route_keys(
    client: ClientConnection, head: bytes, poll: PollHead | None
) -> tuple[RouteKey, ...]:
    """Return the keys that the route of a head may have."""
    keys: tuple[RouteKey, ...] = (head, (client.number, head))
    return keys if poll is None else (poll[1], *keys)


def polled_id(route: CachedRoute, poll: PollHead | None) -> str | None:
    """Return the request id of a request that has this route."""
    if route.parts is None or poll is None:
        return route.request_id
    return poll[0].decode()


def decides_for_any_id(request: web.Request, response: RelayedResponse) -> bool:
    """Return whether the route of a request is for all request ids that its checks let through."""
    if CONNECTION_BOUND in request or NEEDS_EVERY_ID in request:
        return False
    request_id = request[CALL].target.request_id or ""
    return not any(request_id in value for _, value in response.extra_headers)


def split_at_id(
    poll: PollHead, call: Call, head: bytes, sent: UpstreamRequest
) -> tuple[bytes, bytes] | None:
    """Return the head that is sent to fal before and behind the request id. None if the id is not
    the job's, or occurs more than once."""
    request_id, _ = poll
    is_the_job = request_id.decode() == call.target.request_id
    if not is_the_job or (head.count(request_id), sent.head.count(request_id)) != (1, 1):
        return None
    before, _, behind = sent.head.partition(request_id)
    return before, behind


def is_poll(call: Call, *, is_result: bool) -> bool:
    """Return whether a request reads the status of a job, or its result, which is recorded."""
    target = call.target
    is_read = target.operation is (Operation.RESULT if is_result else Operation.STATUS)
    is_about_job = is_read and target.request_id is not None
    return is_about_job and call.method == hdrs.METH_GET and call.body is None


def is_eligible_submit(call: Call, request: web.Request) -> bool:
    """Return whether a submit depends on its head alone: the result is not cached or shared, the
    body is checked for images only, and all submits use the same fal key."""
    if call.target.operation is not Operation.SUBMIT or call.method != hdrs.METH_POST:
        return False
    if call.key is not None or RECORD_TEMPLATE not in request:
        return False
    inspected = request.get(INSPECTED_INPUT)
    return inspected is not None and inspected.bypass_reason == NOT_CACHEABLE
