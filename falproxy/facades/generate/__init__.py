"""`/api/images` and `/api/templates`: one endpoint for every model, with jobs that can be asked
for again."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from functools import partial

from aiohttp import hdrs, web
from aiohttp.typedefs import Handler, Middleware

from falproxy.call import CACHE, OWNER
from falproxy.errors import ProxyError
from falproxy.facades import Way, refuse_plainly
from falproxy.facades.generate.answers import answer_of, failure_in, outcome_of
from falproxy.facades.generate.models import (
    ModelAnswer,
    ModelsAnswer,
    TemplateAnswer,
    VariableAnswer,
)
from falproxy.facades.generate.orders import Order, check_method, read_generate, read_template
from falproxy.facades.waiting import Answer, Patience, Ticket, Waiting, call_of
from falproxy.ledger import REUSED, UNFINISHED, JobRow, Jobs, Lease, LedgerError
from falproxy.registry import Registry

logger = logging.getLogger(__name__)

PASSED_DOWN = (hdrs.AGE, "Cache-Status", "x-fal-request-id", "x-falproxy-rehost")
# Seconds after which a job that fal never got is given up: whoever was to send it has died.
SENDING_MAX = 300.0
JOBS_PATH = "/api/images/jobs/"
AWAY = "Jobs cannot be kept for now; try again soon, or without Prefer: respond-async."

Read = Callable[[web.Request, Registry, int], Awaitable[Order]]


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateRules:
    """jobs: where they are kept. lease: this process, as one that sees to jobs."""

    registry: Registry
    jobs: Jobs
    lease: Lease
    patience: Patience
    max_body: int


def generate_ways(rules: GenerateRules) -> dict[str, Way]:
    """Each path with how it is served."""
    post, get = (partial(check_method, method=method) for method in ("POST", "GET"))
    return {
        "/api/images/generate": Way(post, make(rules, read_generate), refuse_plainly),
        "/api/templates/{name}": Way(post, make(rules, read_template), refuse_plainly),
        "/api/images/jobs/{id}": Way(get, tell_job(rules), refuse_plainly),
        "/api/images/models": Way(get, tell_models(rules.registry), refuse_plainly),
    }


def tell_models(registry: Registry) -> Middleware:
    """Middleware: all that can be asked for. It asks nobody."""
    body = models_of(registry).model_dump_json()

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        return web.json_response(text=body)

    return middleware


def models_of(registry: Registry) -> ModelsAnswer:
    models = [
        ModelAnswer(
            price=None if model.price is None else float(model.price),
            **model.model_dump(exclude={"price", "rename"}),
        )
        for model in registry.models.values()
    ]
    templates = [
        TemplateAnswer(
            name=template.name,
            description=template.description,
            model=template.model,
            variables=[
                VariableAnswer(name=name, **variable.model_dump())
                for name, variable in template.variables.items()
            ],
        )
        for template in registry.templates.values()
    ]
    return ModelsAnswer(models=models, templates=templates)


def make(rules: GenerateRules, read: Read) -> Middleware:
    """Middleware: an order becomes a job, and its result the answer."""

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        order = await read(request, rules.registry, rules.max_body)
        row = JobRow(
            owner=request.get(OWNER, ""),
            user_id=order.user_id,
            model=order.model.name,
            endpoint=order.model.endpoint,
        )
        return await Making(request, handler, rules, order).answer(row)

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
            waiting = Waiting(request, handler, rules.patience)
            row = await look_after(row, waiting, rules)
        return web.json_response(text=answer_of(row).model_dump_json(by_alias=True))

    return middleware


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
    model = rules.registry.models.get(row.model)
    outcome = outcome_of(row, await waiting.result(ticket), model.rate if model else None)
    return await save(outcome, rules)


async def save(row: JobRow, rules: GenerateRules) -> JobRow:
    """Whether or not it can be kept, it is what it is."""
    try:
        await rules.jobs.save_job(row)
    except LedgerError as error:
        logger.warning("A job was not saved: %s", error)
    return row


def unavailable() -> ProxyError:
    return ProxyError(503, "ledger_unavailable", AWAY, {hdrs.RETRY_AFTER: "5"})


class Making:
    """One order on its way. It is in the ledger before fal hears of it, and fal's id before the
    client does: what was accepted is never bought again."""

    def __init__(
        self, request: web.Request, handler: Handler, rules: GenerateRules, order: Order
    ) -> None:
        self._request = request
        self._rules = rules
        self._order = order
        self._waiting = Waiting(request, handler, rules.patience)

    async def answer(self, row: JobRow) -> web.Response:
        """Raises: ProxyError."""
        row = await self._add(row)
        ticket = await self._submit(row)
        if isinstance(ticket, Answer):
            return say(await self._finish(row, ticket), ticket)
        row = await save(
            replace(row, app=ticket.app, request_id=ticket.request_id, status="running"),
            self._rules,
        )
        if self._order.is_async:
            return self._leave(row, ticket, {"Preference-Applied": "respond-async"})
        return await self._wait(row, ticket)

    async def _add(self, row: JobRow) -> JobRow:
        try:
            return await self._rules.jobs.add_job(row, self._rules.lease)
        except LedgerError as error:
            if self._order.is_async:  # nobody could ask for it
                raise unavailable() from error
            logger.warning("A job was not saved: %s", error)
            return row

    async def _submit(self, row: JobRow) -> Ticket | Answer:
        """fal's job, or its refusal."""
        call = call_of(self._order.model.endpoint, self._order.body, self._request.headers)
        try:
            return await self._waiting.submit(call)
        except ProxyError as error:
            failed = replace(row, status="failed", error=error.code, error_message=error.message)
            await save(failed, self._rules)
            raise

    async def _wait(self, row: JobRow, ticket: Ticket) -> web.Response:
        """The result, or after a while where it can be had."""
        try:
            async with asyncio.timeout(self._rules.patience.total):
                answer = await self._waiting.result(ticket)
        except TimeoutError:
            return self._leave(row, ticket, {})
        except BaseException:
            self._waiting.give_up([ticket])
            raise
        return say(await self._finish(row, answer), answer)

    def _leave(self, row: JobRow, ticket: Ticket, headers: dict[str, str]) -> web.Response:
        """202: the job goes on, and is asked for by its id."""
        self._rules.patience.goodbyes.see_to(self._follow(row, ticket))
        place = f"{self._request.path.partition('/api/')[0]}{JOBS_PATH}{row.id}"
        text = answer_of(row).model_dump_json(by_alias=True)
        return web.json_response(text=text, status=202, headers=headers | {"Location": place})

    async def _follow(self, row: JobRow, ticket: Ticket) -> None:
        self._waiting.stay()
        try:
            await self._finish(row, await self._waiting.result(ticket))
        except ProxyError as error:  # whoever asks for the job asks fal
            logger.warning("A job was not followed to its end: %s", error.code)

    async def _finish(self, row: JobRow, answer: Answer) -> JobRow:
        outcome = outcome_of(row, answer, self._order.model.rate)
        if self._request.get(CACHE) in REUSED:
            outcome = replace(outcome, settled=0)
        return await save(outcome, self._rules)


def say(row: JobRow, answer: Answer) -> web.Response:
    """A job that has ended. Its error is where all errors of the proxy are."""
    failure = failure_in(answer)
    return web.json_response(
        text=answer_of(row).model_dump_json(by_alias=True),
        status=200 if failure is None else failure.status,
        headers={name: answer.headers[name] for name in PASSED_DOWN if name in answer.headers},
    )
