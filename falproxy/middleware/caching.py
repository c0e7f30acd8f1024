"""Results that are reused: of equal calls one is made, and its result serves them all."""

import asyncio
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from uuid import uuid4

from aiohttp import hdrs, web
from aiohttp.typedefs import Handler, Middleware

from falproxy.errors import ProxyError
from falproxy.fal.keys import KeyRing
from falproxy.fal.policy import app_of, plain_path
from falproxy.fal.target import Operation
from falproxy.middleware.cache_policy import KEPT_RESULT, Terms, name_result
from falproxy.middleware.image_inputs import INPUT, UNREAD, Input
from falproxy.proxy.call import CACHE, CALL, IS_KEPT, LATE, OWNER, Call
from falproxy.proxy.forward import UpstreamResponse
from falproxy.proxy.head_only import head_only
from falproxy.proxy.local_responses import (
    CACHE_STATUS,
    OwnDocument,
    failure_of,
    mark_hit,
    retold,
    submitted,
    told,
)
from falproxy.proxy.queue_job import Queued
from falproxy.proxy.upstream import UPSTREAM, timed_out
from falproxy.stores.cache import Claim, Job, Result, StoreError
from falproxy.stores.cache.eligibility import Reuse, is_good, parse_directives, submitted_request
from falproxy.stores.cache.result_cache import Shelf
from falproxy.stores.cache.single_flight import Errand, Landing, SharedCall
from falproxy.stores.cache.virtual_ids import new_id

NOT_CACHED = {CACHE_STATUS: "falproxy; detail=not-cached"}
START_TIMEOUT, TIMEOUT_TYPE = "x-fal-request-timeout", "x-fal-request-timeout-type"
SUBMITTED_MAX = 2**20  # bytes of an answer to a submit
AGAIN = 60.0  # seconds in which clients make a call again that failed


def reuse_results(reuse: Reuse, shelf: Shelf, ring: KeyRing, terms: Terms) -> Middleware:
    """Middleware: a model call whose result is there, or on its way, is not sent to fal."""

    @head_only
    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        call = request[CALL]
        if not reuse.covers(call.method, call.target):
            return await handler(request)
        try:
            return await Passage(request, handler, shelf, ring, terms).answer(request[INPUT])
        except ProxyError as error:
            error.headers = {CACHE_STATUS: "falproxy; fwd=miss", **error.headers}
            raise

    return middleware


class Passage:
    """One call on its way through the cache. response: fal's, if it was this one that was sent."""

    def __init__(
        self, request: web.Request, handler: Handler, shelf: Shelf, ring: KeyRing, terms: Terms
    ) -> None:
        self.request = request
        self.call: Call = request[CALL]
        self.handler = handler
        self.shelf = shelf
        self.ring = ring
        self.terms = terms
        self.owner = request.get(OWNER, "")
        self.is_run = self.call.target.operation is Operation.RUN
        self.response: web.StreamResponse | None = None
        self.is_left = False
        self.newer_than = 0.0

    async def answer(self, seen: Input) -> web.StreamResponse:
        directives = parse_directives(self.call.headers.getall(hdrs.CACHE_CONTROL, ()))
        if seen.objection is not None:
            if directives.only_if_cached:
                raise not_kept()
            return self.say(await self.handler(self.request), "bypass", f"detail={seen.objection}")
        if directives.max_age is not None:
            self.newer_than = time.time() - directives.max_age
        named = partial(name_result, self.call, seen, self.terms, self.owner)
        common, own = await asyncio.to_thread(named) if seen.is_large else named()
        if own != common and (result := await self._kept(common)):
            return await self._hit(common, result)
        if directives.only_if_cached:
            if (result := await self._kept(own)) is None:
                raise not_kept()
            return await self._hit(own, result)
        while (response := await self._fly(own)) is None:
            pass  # the flight ended before it began
        return response

    async def _kept(self, key: str) -> Result | None:
        """A result that will do, without taking part in any flight."""
        try:
            found = await self.shelf.guard.ask(self.shelf.guard.store.get(key))
        except StoreError:
            return None
        result = found.result
        if result is None or result.expires_at <= time.time():
            return None
        return result if result.stored_at > self.newer_than else None

    async def _fly(self, key: str) -> web.StreamResponse | None:
        """The answer, by the key's flight. None: it was over before this call got anything."""
        errand = Errand(self._send, self._follow, self.is_run, self.newer_than)
        known = self.shelf.flights.find(key)
        is_refresh = known is not None and known.errand.newer_than > self.newer_than
        if is_refresh and (result := await self._kept(key)):
            return await self._hit(key, result)  # somebody else asked for a new one
        shared = self.shared = self.shelf.flights.board(key, errand)
        async with shared.aboard():
            try:
                job = await asyncio.shield(shared.under_way)
                if self.is_run and not await self._wait(shared, job):
                    return None
            except asyncio.CancelledError:
                self._leave(shared)
                raise
            return await self._arrive(shared)

    async def _wait(self, shared: SharedCall, job: Job | None) -> bool:
        """Waits for the end of a flight. False: it is not going to have one for this call."""
        if job is None:
            await asyncio.shield(shared.landed)
            return True
        holder = uuid4().hex
        try:
            if not await self.shelf.hold(shared, job, holder):
                return False
            await asyncio.shield(shared.landed)
        except asyncio.CancelledError:
            self.shelf.see_to(self._let_go(shared, job, holder))
            raise
        return True

    async def _let_go(self, shared: SharedCall, job: Job, holder: str) -> None:
        """One who waited left. When all the others have cancelled, nobody wants the job."""
        with suppress(StoreError):
            if await self.shelf.release_hold(shared.key, job, holder):
                await self._queued(job).cancel()

    async def _arrive(self, shared: SharedCall) -> web.StreamResponse | None:
        job = shared.under_way.result()
        landing = shared.landed.result() if shared.landed.done() else None
        if self.response is not None and job is not None:
            claim = Claim(shared.key, self.owner, job.app, job)
            await self.shelf.claims.put(job.request_id, claim)
            return self.say(self.response, "miss")
        if landing is None:
            return await self._join(shared, job)
        if landing.error is not None:
            raise landing.error
        self._mark_kept(landing.result if landing.is_kept else None)
        if self.response is not None:
            return self.say(self.response, "miss", "stored" if landing.is_kept else "")
        return await self._landed(shared.key, landing)

    async def _landed(self, key: str, landing: Landing) -> web.StreamResponse | None:
        """What a flight's end is for a call that did not make it."""
        if landing.failure is not None:
            return self.say(retold(landing.failure, new_id()), "miss", "collapsed")
        if landing.result is None:
            if not landing.was_sent:
                return None
            return self.say(await self.handler(self.request), "miss", "detail=not-shareable")
        if landing.was_sent:
            response = await self._give(key, landing.result)
            return self.say(response, "miss", "collapsed")
        if landing.result.stored_at <= self.newer_than:
            return None
        return await self._hit(key, landing.result)

    async def _hit(self, key: str, result: Result) -> web.StreamResponse:
        self.request[CACHE] = "hit"
        self._mark_kept(result)
        return mark_hit(await self._give(key, result), result)

    def _mark_kept(self, result: Result | None) -> None:
        """Whether the call can be made again for nothing: what it takes is kept for a while."""
        left = 0.0 if result is None or self.newer_than else result.expires_at - time.time()
        if left > AGAIN:
            self.request[IS_KEPT] = True

    async def _give(self, key: str, result: Result) -> OwnDocument:
        """A result for a direct call; for a submit, an id that stands for it."""
        request_id = new_id()
        self.request[KEPT_RESULT] = result
        if self.is_run:
            return told(result, request_id)
        claim = Claim(key, self.owner, self._app)
        await self.shelf.claims.put(request_id, claim, result)
        return submitted(claim.app, request_id)

    async def _join(self, shared: SharedCall, job: Job | None) -> web.StreamResponse | None:
        """An id of its own for a submit that shares fal's job, or waits for a direct call."""
        request_id = new_id()
        claim = Claim(shared.key, self.owner, job.app if job else self._app, job)
        if job is None:
            shared.waiting.add(request_id)
            await self.shelf.claims.put(request_id, claim)
            self.shelf.settle(shared, request_id, claim)
            return self.say(submitted(claim.app, request_id), "miss", "collapsed")
        try:
            if not await self.shelf.hold(shared, job, request_id):
                return None
            await self.shelf.claims.put(request_id, claim)
        except asyncio.CancelledError:
            self.shelf.see_to(self._let_go(shared, job, request_id))
            raise
        if shared.is_orphan:  # nobody knows fal's own id, so that it could never be given up
            shared.is_orphan = False
            with suppress(StoreError):
                await self.shelf.release_hold(shared.key, job, job.request_id)
        return self.say(submitted(claim.app, request_id), "miss", "collapsed")

    @property
    def _app(self) -> str:
        return app_of(plain_path(self.call.target).strip("/"))

    async def _send(self) -> Job | Landing:
        """Makes the call itself. Whoever asked for it may have left: it goes on for the others."""
        try:
            return await self._make()
        finally:
            # The job may take hours, and nobody sends this again: its body is let go.
            self.call = replace(self.call, body=None)
            self.request[CALL] = replace(self.request[CALL], body=None)
            self.request[INPUT] = UNREAD

    async def _make(self) -> Job | Landing:
        self.request[CALL] = replace(self.call, is_document=True)
        response = self.response = await self.handler(self.request)
        if not isinstance(response, UpstreamResponse):
            return Landing()
        body = await response.read(self.terms.max_entry if self.is_run else SUBMITTED_MAX)
        if body is None:
            if self.is_left:
                response.drop()
            return Landing()
        if START_TIMEOUT in self.call.headers and TIMEOUT_TYPE in response.headers:
            return Landing(was_sent=False)  # this caller was in a hurry, others may not be
        if self.is_run or response.status != web.HTTPOk.status_code:
            return self._landing(response.status, response.headers, body)
        if (request := submitted_request(body)) is None:
            return Landing()
        mark = self.call.key.mark if self.call.key else ""
        return Job(request[0], request[1] or self._app, mark)

    async def _follow(self, job: Job) -> Landing:
        try:
            ending = await self._queued(job).ending(self.terms.max_entry)
        except TimeoutError as error:
            raise timed_out(hdrs.METH_POST) from error
        if ending.body is None:
            return Landing()
        return self._landing(ending.status, ending.headers, ending.body)

    def _queued(self, job: Job) -> Queued:
        upstream, key = self.request.app[UPSTREAM], self.ring.find(job.key_mark)
        return Queued(upstream, job.app, job.request_id, key, self.shelf.streams)

    def _landing(self, status: int, headers: Mapping[str, str], body: bytes) -> Landing:
        if self.is_left and (late := self.request.get(LATE)) is not None:
            late.tell(status, headers)
        if not is_good(status, body):
            return Landing(failure=failure_of(status, headers, body))
        result = self.terms.result(body, headers.get(hdrs.CONTENT_TYPE, "application/json"))
        self.shelf.see_to(self._rehost(result))
        return Landing(result)

    async def _rehost(self, result: Result) -> None:
        if (await asyncio.shield(self.shared.landed)).is_kept:
            await self.terms.rehost(self.shelf.guard, self.shared.key, result)

    def _leave(self, shared: SharedCall) -> None:
        """The client left. An answer that nobody reads any more must not keep a connection."""
        self.is_left = True
        shared.is_orphan |= shared.errand.send == self._send and not self.is_run
        if shared.landed.done() and isinstance(self.response, UpstreamResponse):
            self.response.drop()

    def say(self, response: web.StreamResponse, outcome: str, *more: str) -> web.StreamResponse:
        """Puts on the answer what became of the call (RFC 9211), and into the log."""
        forwarded = "request" if self.newer_than else outcome
        said = [f"falproxy; fwd={forwarded}", *(word for word in more if word)]
        response.headers.add(CACHE_STATUS, "; ".join(said))
        self.request[CACHE] = "collapsed" if "collapsed" in more else outcome
        return response


def not_kept() -> ProxyError:
    return ProxyError(504, "not_cached", "There is no result of this call.", NOT_CACHED)
