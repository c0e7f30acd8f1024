"""Request ids of ours, and fal's own that are shared: status, result and cancel."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import replace

from aiohttp import hdrs, web
from aiohttp.typedefs import Handler, Middleware

from falproxy.errors import ProxyError
from falproxy.fal.keys import KeyRing
from falproxy.fal.policy import REQUEST_METHODS
from falproxy.fal.target import Operation, Target
from falproxy.middleware.cache_policy import Terms
from falproxy.proxy.call import CACHE, CALL, OWNER, Call
from falproxy.proxy.forward import UpstreamResponse
from falproxy.proxy.head_only import head_only
from falproxy.proxy.line_rewriter import at_once
from falproxy.proxy.local_responses import (
    CANCELLED,
    LOST,
    REQUEST_ID,
    OwnEvents,
    addresses,
    mark_hit,
    own_document,
    retold,
    told,
)
from falproxy.stores.cache import Claim, Failure, Job, Result, StoreError
from falproxy.stores.cache.eligibility import Reuse, is_good
from falproxy.stores.cache.result_cache import Shelf
from falproxy.stores.cache.virtual_ids import is_own

# Operations that are rare enough to ask the store whether one of fal's own ids is shared.
RARE = (Operation.RESULT, Operation.CANCEL)
LOOK = 1.0  # seconds between two looks at a direct call that somebody else makes
TAKEOVER = 3.0  # seconds that others have to go on with a call whose leader died
RETRY = {"Retry-After": "1"}
ERROR_TYPES = {499: "client_cancelled", 503: "runner_disconnected"}


def answer_claims(reuse: Reuse, shelf: Shelf, ring: KeyRing, terms: Terms) -> Middleware:
    """Middleware: what is asked about an id of ours is answered here, or by fal under the id of
    the job that it shares. A poll for any other id passes by."""

    @head_only
    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        call = request[CALL]
        if (request_id := call.target.request_id) is None:
            return await handler(request)
        if is_own(request_id) or call.target.operation in RARE:
            claim = await find_claim(call, request_id, reuse, shelf)
        else:  # a poll of fal's own id, which nobody is asked about
            claim = given_up(shelf.claims.peek(request_id))
        if claim is None:
            return await handler(request)
        if REQUEST_METHODS.get(call.target.operation) != call.method:
            raise not_allowed(REQUEST_METHODS.get(call.target.operation, "GET"))
        if claim.owner != request.get(OWNER, ""):
            raise no_such_request()
        return await Question(request, handler, shelf, ring, terms, request_id, claim).answer()

    return middleware


async def find_claim(call: Call, request_id: str, reuse: Reuse, shelf: Shelf) -> Claim | None:
    """What an id stands for; None for one of fal's that is nobody's business but fal's.

    Raises: ProxyError 404 for an id of ours that stands for nothing, 503 when that cannot be
    found out.
    """
    if is_own(request_id):
        try:
            claim = await shelf.claims.get(request_id)
        except StoreError as error:
            raise ProxyError(
                503, "cache_unavailable", "The request cannot be looked up now.", RETRY
            ) from error
        if claim is None:
            raise no_such_request()
        return claim
    if not reuse.covers_app(call.target):
        return None
    try:
        return await shelf.claims.get(request_id)
    except StoreError:
        return None


def given_up(claim: Claim | None) -> Claim | None:
    return claim if claim is not None and claim.is_cancelled else None


def not_allowed(method: str) -> ProxyError:
    return ProxyError(405, "method_not_allowed", f"Use {method} here.", {hdrs.ALLOW: method})


def no_such_request() -> ProxyError:
    return ProxyError(404, "request_not_found", "There is no such request.")


class Question:
    """A question about a request id that stands for something here."""

    def __init__(
        self,
        request: web.Request,
        handler: Handler,
        shelf: Shelf,
        ring: KeyRing,
        terms: Terms,
        request_id: str,
        claim: Claim,
    ) -> None:
        self.request = request
        self.call = request[CALL]
        self.handler = handler
        self.shelf = shelf
        self.ring = ring
        self.terms = terms
        self.request_id = request_id
        self.claim = claim

    async def answer(self) -> web.StreamResponse:
        operation = self.call.target.operation
        if operation is Operation.CANCEL:
            return await self._cancel()
        if self.claim.job is not None and not self.claim.is_cancelled:
            return await self._forward()
        if operation is Operation.STATUS:
            return self._status(await self._ending())
        if operation is Operation.STATUS_STREAM:
            ending = await self._ending()
            return self._say(OwnEvents(self._events(ending)), ending)
        if operation is Operation.RESULT:
            return self._result(await self._ending())
        raise no_such_request()

    async def _ending(self) -> Result | Failure | None:
        """How the request ended; None while it is under way."""
        claim = self.claim
        if claim.is_cancelled:
            return CANCELLED
        if known := claim.failure or self.shelf.claims.at_hand(self.request_id):
            return known
        flight = self.shelf.flights.find(claim.key)
        if flight is not None and self.request_id in flight.waiting and not flight.landed.done():
            return None
        try:
            found = await self.shelf.guard.ask(self.shelf.guard.store.get(claim.key))
        except StoreError as error:
            raise ProxyError(
                503, "cache_unavailable", "The result cannot be read now.", RETRY
            ) from error
        if found.result is not None:
            return found.result
        if found.flight is not None and found.flight.lease_left > -TAKEOVER:
            return None
        return await self._told() or LOST

    async def _told(self) -> Result | Failure | None:
        """What was said of this id since the question was asked."""
        with suppress(StoreError):
            self.claim = await self.shelf.claims.get(self.request_id) or self.claim
        known = self.shelf.claims.peek(self.request_id) or self.claim
        return known.failure or self.shelf.claims.at_hand(self.request_id)

    def _status(self, ending: Result | Failure | None) -> web.StreamResponse:
        status = 202 if ending is None else 200
        response = own_document(self._status_document(ending), self.request_id, status)
        return self._say(response, ending)

    def _status_document(self, ending: Result | Failure | None) -> dict[str, object]:
        """As fal tells a status (fal-api.md, 2.2)."""
        wants_logs = self.call.target.query in ("?logs=1", "?logs=true")
        document: dict[str, object] = {
            "status": "IN_PROGRESS" if ending is None else "COMPLETED",
            "request_id": self.request_id,
            **addresses(self.claim.app, self.request_id),
            "logs": [] if wants_logs else None,
        }
        if ending is not None:
            document["metrics"] = {"inference_time": None}
        if isinstance(ending, Failure) and ending.status != web.HTTPOk.status_code:
            document["error"] = f"The request ended with {ending.status}."
            document["error_type"] = ERROR_TYPES.get(ending.status, "internal_error")
        return document

    async def _events(self, ending: Result | Failure | None) -> AsyncIterator[bytes]:
        """The statuses until the end. What waits for a direct call waits for it here."""
        if ending is None:
            yield encode(self._status_document(None))
        while ending is None:
            await self._next()
            with suppress(ProxyError, StoreError):  # the store may be back at the next look
                self.claim = await self.shelf.claims.get(self.request_id) or self.claim
                ending = await self._ending()
        yield encode(self._status_document(ending))

    async def _next(self) -> None:
        """Returns when the direct call has ended, or it is time to look."""
        if (flight := self.shelf.flights.find(self.claim.key)) is not None:
            await asyncio.wait({flight.landed}, timeout=LOOK)
        else:
            await asyncio.sleep(LOOK)

    def _result(self, ending: Result | Failure | None) -> web.StreamResponse:
        if ending is None:
            document = {"detail": "Request is still in progress"}
            return own_document(document, self.request_id, 400)
        if isinstance(ending, Failure):
            response = retold(ending, self.request_id)
            response.headers[REQUEST_ID] = self.request_id
            return self._say(response, ending)
        return self._say(told(ending, self.request_id), ending)

    def _say(
        self, response: web.StreamResponse, ending: Result | Failure | None
    ) -> web.StreamResponse:
        self.request[CACHE] = "hit" if isinstance(ending, Result) else "collapsed"
        return mark_hit(response, ending) if isinstance(ending, Result) else response

    async def _cancel(self) -> web.StreamResponse:
        """fal hears of it when nobody else holds the job; else this id alone is let go."""
        claim = self.claim
        if claim.is_cancelled or (claim.job is None and await self._ending() is not None):
            return own_document({"status": "ALREADY_COMPLETED"}, self.request_id, 400)
        if claim.job is not None and await self._is_last(claim.job):
            return await self._forward()
        if (flight := self.shelf.flights.find(claim.key)) is not None:
            flight.waiting.discard(self.request_id)
        await self.shelf.claims.put(self.request_id, replace(claim, is_cancelled=True))
        return own_document({"status": "CANCELLATION_REQUESTED"}, self.request_id, 202)

    async def _is_last(self, job: Job) -> bool:
        """Raises: ProxyError 503, nobody can say who else holds the job."""
        try:
            return await self.shelf.release_hold(self.claim.key, job, self.request_id)
        except StoreError as error:
            message = "The request cannot be cancelled now."
            raise ProxyError(503, "cache_unavailable", message, RETRY) from error

    async def _forward(self) -> web.StreamResponse:
        """fal's answer about the job, told of this id."""
        job, call = self.claim.job, self.call
        assert job is not None
        target = call.target
        verb = target.path.partition(f"/requests/{self.request_id}")[2]
        path = f"/{job.app}/requests/{job.request_id}{verb}"
        self.request[CALL] = replace(
            call,
            target=Target(target.host, path, target.query),
            key=self.ring.find(job.key_mark) or call.key,
            is_document=True,
        )
        response = await self.handler(self.request)
        if isinstance(response, UpstreamResponse):
            if target.operation is Operation.RESULT:
                await self._keep(response)
            if job.request_id != self.request_id:
                await self._rename(response, job.request_id)
        return response

    async def _keep(self, response: UpstreamResponse) -> None:
        """Keeps a result that its leader did not: his process may have died."""
        store, guard, claim = self.shelf.guard.store, self.shelf.guard, self.claim
        with suppress(StoreError):
            found = await guard.ask(store.get(claim.key))
            if found.result is not None or found.flight is None or found.flight.job != claim.job:
                return
            body = await response.document(self.terms.max_entry)
            if body is not None and is_good(response.status, body):
                result = self.terms.result(body, response.headers[hdrs.CONTENT_TYPE])
                await guard.ask(store.finish(claim.key, found.flight.token, result))
                self.shelf.see_to(self.terms.rehost(guard, claim.key, result))

    async def _rename(self, response: UpstreamResponse, known_as: str) -> None:
        """The answer with this id where it speaks of the job's."""
        if REQUEST_ID in response.headers:
            response.headers[REQUEST_ID] = self.request_id
        old, new = known_as.encode(), self.request_id.encode()
        operation = self.call.target.operation
        if operation is Operation.STATUS_STREAM:
            response.rewrite_lines(at_once(lambda lines: lines.replace(old, new)))
        elif operation is Operation.STATUS and (body := await response.document()) is not None:
            response.replace_document(body.replace(old, new))


def encode(document: dict[str, object]) -> bytes:
    return json.dumps(document).encode()
