"""`/api/images` and `/api/templates`: one endpoint for every model, with jobs that can be asked
for again."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial

from aiohttp import hdrs, web
from aiohttp.typedefs import Handler, Middleware

from falproxy.dialects import Way, refuse_plainly
from falproxy.dialects.generate.model_list import tell_models
from falproxy.dialects.generate.requests import (
    RESPOND_ASYNC,
    Order,
    check_method,
    read_generate,
    read_template,
)
from falproxy.dialects.generate.responses import answer_of, failure_in, outcome_of
from falproxy.dialects.queue_client import Answer, Patience, Ticket, Waiting, call_of
from falproxy.errors import ProxyError
from falproxy.fal.policy import Globs
from falproxy.fal.registry import Model, Registry
from falproxy.proxy.call import CACHE, OWNER, UPSTREAM_SECONDS, USER_ID
from falproxy.stores.ledger import REUSED, UNFINISHED, JobRow, Jobs, Lease, LedgerError

logger = logging.getLogger(__name__)

PASSED_DOWN = (hdrs.AGE, "Cache-Status", "x-fal-request-id", "x-falproxy-rehost")
# Seconds after which a job that fal never got is given up: whoever was to send it has died.
SENDING_MAX = 300.0
SAVING = 1.0  # seconds that a call waits for the ledger at a time
FOLLOWED = 4 * 3600.0  # seconds after which a job is not followed any more
JOBS_PATH = "/api/images/jobs/"
CLIENT_LEFT = ProxyError(499, "client_left", "The client left before the job had ended.")
AWAY = "Jobs cannot be kept for now; try again soon, or without Prefer: respond-async."

Renew = Callable[[Iterable[str]], Awaitable[dict[str, str]]]
Read = Callable[[web.Request, Registry, int], Awaitable[Order]]
Taking = asyncio.Task[Ticket | Answer]


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateRules:
    """jobs: where they are kept. lease: this process, as one that sees to jobs. endpoints: the
    only ones that may be called, none for all. renew: good addresses for those of kept files that
    pass."""

    registered: Registry
    jobs: Jobs
    lease: Lease
    patience: Patience
    max_body: int
    endpoints: Globs = field(default_factory=partial(Globs, ()))
    renew: Renew | None = None


def generate_ways(rules: GenerateRules) -> dict[str, Way]:
    """Each path with how it is served."""
    post, get = (partial(check_method, method=method) for method in ("POST", "GET"))
    listed = tell_models(rules.registered, rules.endpoints)
    return {
        "/api/images/generate": Way(post, make(rules, read_generate), refuse_plainly),
        "/api/templates/{name}": Way(post, make(rules, read_template), refuse_plainly),
        "/api/images/jobs/{id}": Way(get, tell_job(rules), refuse_plainly),
        "/api/images/models": Way(get, listed, refuse_plainly),
    }


def make(rules: GenerateRules, read: Read) -> Middleware:
    """Middleware: an order becomes a job, and its result the answer."""

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        order = await read(request, rules.registered, rules.max_body)
        if order.user_id is not None:
            request[USER_ID] = order.user_id
        row = JobRow(
            owner=request.get(OWNER, ""),
            user_id=order.user_id,
            model=order.model.name,
            endpoint=order.model.endpoint,
        )
        return await Making(request, handler, rules, order, row).answer()

    return middleware


def tell_job(rules: GenerateRules) -> Middleware:
    """Middleware: a job as it is now. One that nobody follows any more, since the process that
    took it has died, is asked about at fal."""

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            row = await rules.jobs.get_job(request.match_info["id"], request.get(OWNER, ""))
        except LedgerError as error:
            raise unavailable() from error
        if row is None:
            raise ProxyError(404, "job_not_found", "There is no such job.")
        if row.status in UNFINISHED:
            row = await ask_fal(row, Waiting(request, handler, rules.patience), rules)
        if row.images and rules.renew is not None:
            urls = await rules.renew([image.url for image in row.images])
            images = (replace(image, url=urls.get(image.url, image.url)) for image in row.images)
            row = replace(row, images=tuple(images))
        return web.json_response(text=answer_of(row).model_dump_json(by_alias=True))

    return middleware


async def ask_fal(row: JobRow, waiting: Waiting, rules: GenerateRules) -> JobRow:
    """The job as fal knows it, or as it was known when fal does not say. Raises: ProxyError."""
    try:
        async with asyncio.timeout(rules.patience.total):
            return await look_after(row, waiting, rules)
    except TimeoutError:
        logger.warning("A job could not be asked about: fal does not answer")
    except ProxyError as error:
        if error.status < web.HTTPInternalServerError.status_code:
            raise
        logger.warning("A job could not be asked about: %s", error.code)
    return row


async def look_after(row: JobRow, waiting: Waiting, rules: GenerateRules) -> JobRow:
    """The job as fal knows it. Raises: ProxyError."""
    if row.request_id is None:
        if time.time() - row.created_at < SENDING_MAX:
            return row
        message = "The job was lost before fal.ai confirmed it."
        return await save(
            replace(row, status="failed", error="job_lost", error_message=message), rules
        )
    ticket = Ticket(row.app, row.request_id, is_kept=True)
    if not await waiting.is_over(ticket):
        return row
    answer = await waiting.result(ticket)
    return await save(outcome_of(row, answer, rules.registered.models.get(row.model)), rules)


async def save(row: JobRow, rules: GenerateRules) -> JobRow:
    """Whether or not it can be kept, it is what it is, and nobody waits long for a ledger."""
    try:
        async with asyncio.timeout(SAVING):
            await rules.jobs.save_job(row)
    except (LedgerError, TimeoutError) as error:
        logger.warning("A job was not saved: %s", str(error) or "the ledger is slow")
    return row


def unavailable() -> ProxyError:
    return ProxyError(503, "ledger_unavailable", AWAY, {hdrs.RETRY_AFTER: "5"})


class Making:
    """One order on its way. It is in the ledger before fal hears of it, and fal's id before the
    client does: what was accepted is never bought again."""

    def __init__(
        self,
        request: web.Request,
        handler: Handler,
        rules: GenerateRules,
        order: Order,
        row: JobRow,
    ) -> None:
        self._request = request
        self._rules = rules
        self._order = order
        self._row = row
        self._waiting = Waiting(request, handler, rules.patience)

    async def answer(self) -> web.Response:
        """The result, or after a while where it can be had. Raises: ProxyError."""
        await self._add()
        started = time.perf_counter()
        taking = asyncio.get_running_loop().create_task(self._take())
        try:
            taken = await self._wait(taking)
            if isinstance(taken, Ticket):
                return self._leave(taking)
            await self._finish(taken)
        except asyncio.CancelledError:
            self._rules.patience.goodbyes.see_to(self._end(taking, CLIENT_LEFT))
            raise
        except ProxyError as error:
            self._rules.patience.goodbyes.see_to(self._end(taking, error))
            raise
        finally:
            self._request[UPSTREAM_SECONDS] = time.perf_counter() - started
        return say(self._row, taken, self._order.model)

    async def _wait(self, taking: Taking) -> Ticket | Answer:
        """What came of the job; the job itself where that is not waited for any longer.

        Raises: ProxyError 504, and what the way raises.
        """
        total = self._rules.patience.total
        try:
            async with asyncio.timeout(total):
                taken = await asyncio.shield(taking)
                if isinstance(taken, Answer) or self._order.is_async:
                    return taken
                return await self._waiting.result(taken)
        except TimeoutError:
            if taking.done():
                return taking.result()
            message = f"fal.ai timed out after {total:g} s."
            raise ProxyError(504, "upstream_timeout", message) from None
        except ProxyError:
            if taking.exception() is not None:
                raise
            return taking.result()  # fal has the job, whatever keeps us from asking about it

    async def _add(self) -> None:
        try:
            async with asyncio.timeout(None if self._order.is_async else SAVING):
                self._row = await self._rules.jobs.add_job(self._row, self._rules.lease)
        except (LedgerError, TimeoutError) as error:
            if self._order.is_async:  # nobody could ask for it
                raise unavailable() from error
            logger.warning("A job was not saved: %s", error)

    async def _take(self) -> Ticket | Answer:
        """fal's job, or its refusal."""
        call = call_of(self._order.model.endpoint, self._order.body, self._request.headers)
        try:
            taken = await self._waiting.submit(call)
        except ProxyError as error:
            await self._fail(error)
            raise
        if isinstance(taken, Ticket):
            running = replace(self._row, app=taken.app, request_id=taken.request_id)
            self._row = await save(replace(running, status="running"), self._rules)
        return taken

    def _leave(self, taking: Taking) -> web.Response:
        """202: the job goes on, and is asked for by its id."""
        self._rules.patience.goodbyes.see_to(self._follow(taking))
        place = f"{self._request.path.rpartition('/api/')[0]}{JOBS_PATH}{self._row.id}"
        applied = {"Preference-Applied": RESPOND_ASYNC} if self._order.is_async else {}
        text = answer_of(self._row).model_dump_json(by_alias=True)
        return web.json_response(text=text, status=202, headers={**applied, "Location": place})

    async def _follow(self, taking: Taking) -> None:
        self._waiting.stay()
        try:
            async with asyncio.timeout(FOLLOWED):
                taken = await taking
                if isinstance(taken, Ticket):
                    taken = await self._waiting.result(taken)
            await self._finish(taken)
        except (ProxyError, TimeoutError) as error:  # whoever asks for the job asks fal
            logger.warning("A job was not followed to its end: %s", type(error).__name__)

    async def _end(self, taking: Taking, why: ProxyError) -> None:
        """Nobody waits for the job any more, and nobody can ask for it. One that is there, or is
        kept for others, is seen to its end. fal may be taking it only now."""
        self._waiting.stay()
        try:
            taken = await taking
        except ProxyError:
            return  # there is no job
        if isinstance(taken, Answer) or taken.is_kept or taken.is_over:
            await self._follow(taking)
            return
        self._waiting.give_up([taken])
        await self._fail(why)

    async def _fail(self, why: ProxyError) -> None:
        failed = replace(self._row, status="failed", error=why.code, error_message=why.message)
        self._row = await save(failed, self._rules)

    async def _finish(self, answer: Answer) -> None:
        outcome = outcome_of(self._row, answer, self._order.model)
        if self._request.get(CACHE) in REUSED:
            outcome = replace(outcome, settled=0)
        self._row = await save(outcome, self._rules)


def say(row: JobRow, answer: Answer, model: Model) -> web.Response:
    """A job that has ended. Its error is where all errors of the proxy are."""
    failure = failure_in(answer, model)
    told = {name: answer.headers[name] for name in PASSED_DOWN if name in answer.headers}
    return web.json_response(
        text=answer_of(row).model_dump_json(by_alias=True),
        status=200 if failure is None else failure.status,
        headers=told if failure is None else {**told, **failure.headers},
    )
