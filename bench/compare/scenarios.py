"""The scenarios: the candidates, their calls, and slices of all candidates in turns."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import quantiles

from compare import calls
from compare.calls import Call
from compare.candidates import (
    LIMITED,
    SECRET,
    TWO_WORKERS,
    Candidate,
    Started,
    has_workers,
    started,
)
from compare.connection import BadResponseError, request_once
from compare.latency import connect, connect_directly, times
from compare.load import Sample, transfers_slice, wrk_slice
from compare.results import DIRECT, Latency, Results
from compare.start import start
from compare.streams import streams_slice
from compare.upstream import Upstream

STARTS = 7
JOBS = 1024  # polled in turn
SUBMITS_AT_ONCE = 32
STREAM_REPEATS = 3
WARM_UP_SECONDS = 1
FAILURES = (BadResponseError, TimeoutError, OSError, RuntimeError)


@dataclass(frozen=True, slots=True)
class Plan:
    """The parameters of a run.

    seconds: of a slice.
    """

    candidates: tuple[Candidate, ...]
    repeats: int
    seconds: int
    folder: Path
    upstream: Upstream
    results: Results
    say: Callable[[str], None]

    def note(self, scenario: str, name: str, error: Exception) -> None:
        text = str(error) or type(error).__name__
        self.results.leave_out(scenario, name, text)
        self.say(f"  {name}: {text}")


@dataclass(frozen=True, slots=True)
class Participant:
    """A running candidate that passed a trial of the scenario, and its call."""

    it: Started
    call: Call

    @property
    def name(self) -> str:
        return self.it.candidate.name


MakeCall = Callable[[str], Call]
Work = Callable[[Participant], Awaitable[None]]


async def submitted(it: Started) -> str:
    """Submit a request through a proxy and return its id, which is polled there only."""
    call = calls.submit().with_headers(it.candidate.headers)
    response, body = await request_once(it.port, call.wire(it.port))
    if response.status != 200:
        raise BadResponseError(f"status {response.status} for a submit")
    return str(json.loads(body)["request_id"])


async def submitted_jobs(it: Started) -> list[str]:
    jobs: list[str] = []
    while len(jobs) < JOBS:
        jobs += await asyncio.gather(*(submitted(it) for _ in range(SUBMITS_AT_ONCE)))
    return jobs


async def participant(it: Started, call: Call) -> Participant:
    """Try the call once. Raises: BadResponseError, the response is wrong."""
    call = call.with_headers(it.candidate.headers)
    trial = replace(call, body=b"") if call.method == "GET" else call
    response, body = await request_once(it.port, trial.wire(it.port))
    if response.status != 200:
        raise BadResponseError(f"status {response.status}")
    if call.length is None:
        call = replace(call, length=len(body))
    elif len(body) != call.length:
        raise BadResponseError(f"the response has {len(body)} bytes, not {call.length}")
    return Participant(it, call)


@asynccontextmanager
async def participants(
    plan: Plan, scenario: str, candidates: Sequence[Candidate], make: MakeCall
) -> AsyncIterator[list[Participant]]:
    """Context manager: start the candidates that can do the scenario; note why others cannot."""
    async with AsyncExitStack() as stack:
        ready = []
        for candidate in candidates:
            try:
                it = await stack.enter_async_context(started(candidate, plan.folder))
                jobs = await submitted_jobs(it)
                call = replace(make(jobs[0]), jobs=tuple(jobs))
                plan.results.at_rest[scenario, candidate.name] = it.tree.rss()
                ready.append(await participant(it, call))
            except FAILURES as error:
                plan.note(scenario, candidate.name, error)
            else:
                it.tree.reset_peak()
        yield ready


async def in_turns(
    plan: Plan, scenario: str, ready: list[Participant], repeats: int, work: Work
) -> None:
    """Measure all participants in turns, every other repeat in reverse order. A participant that
    fails leaves the scenario."""
    for repeat in range(repeats):
        plan.say(f"{scenario} {repeat + 1}/{repeats}")
        for one in list(ready) if repeat % 2 == 0 else ready[::-1]:
            try:
                await work(one)
            except FAILURES as error:
                plan.note(scenario.partition(",")[0], one.name, error)
                ready.remove(one)


async def loads(
    plan: Plan,
    scenario: str,
    make: MakeCall,
    slice_of: Callable[[Participant, int], Awaitable[Sample]],
    candidates: Sequence[Candidate] | None = None,
) -> None:
    samples = plan.results.loads.setdefault(scenario, {})

    async def work(one: Participant) -> None:
        sample = await slice_of(one, plan.seconds)
        samples.setdefault(one.name, []).append(sample)
        plan.say(
            f"  {one.name:14}{sample.rate:10.1f} per CPU s {sample.requests / sample.wall:10.1f}/s"
            f" {sample.cpu / sample.wall:6.0%} of a core, peak {sample.peak:.0f} MiB"
        )

    async def warm_up(one: Participant) -> None:
        await slice_of(one, WARM_UP_SECONDS)
        one.it.tree.reset_peak()

    async with participants(plan, scenario, candidates or plan.candidates, make) as ready:
        await in_turns(plan, f"{scenario}, warm-up", ready, 1, warm_up)
        await in_turns(plan, scenario, ready, plan.repeats, work)


async def by_wrk(upstream: Upstream, one: Participant, seconds: int) -> Sample:
    return await wrk_slice(one.it, one.call, upstream, seconds)


async def by_transfers(one: Participant, seconds: int) -> Sample:
    return await transfers_slice(one.it, one.call, seconds)


async def polls(plan: Plan) -> None:
    await loads(plan, "polls", calls.poll, partial(by_wrk, plan.upstream))


async def tokens(plan: Plan) -> None:
    """Polls by the user of a Supabase project. falproxy verifies the token, others ignore it."""
    headers = {"authorization": f"Bearer {calls.token(SECRET)}"}
    candidates = tuple(
        replace(
            each,
            env=each.env | {"FALPROXY_JWT_SECRET": SECRET},
            headers={name: each.headers[name] for name in each.headers if name == "origin"}
            | headers,
        )
        for each in plan.candidates
    )
    await loads(plan, "tokens", calls.poll, partial(by_wrk, plan.upstream), candidates)


async def new_heads(plan: Plan) -> None:
    """Polls of which each names another job. Owners are not checked: nobody submitted the jobs."""
    make = partial(calls.poll, plan="new")
    await loads(plan, "new", make, partial(by_wrk, plan.upstream), without_owners(plan))


async def strangers(plan: Plan) -> None:
    """Polls of which each names another job and comes from another browser."""
    make = partial(calls.poll, plan="strangers")
    await loads(plan, "strangers", make, partial(by_wrk, plan.upstream), without_owners(plan))


async def mixed(plan: Plan) -> None:
    """Submits, 12 polls of each job, and results."""
    await loads(plan, "mixed", calls.mixed, partial(by_wrk, plan.upstream), without_owners(plan))


def without_owners(plan: Plan) -> list[Candidate]:
    return [each for each in plan.candidates if each.name != "falproxy-all"]


async def limited(plan: Plan) -> None:
    """Submits of callers with keys, limits and budgets, whose jobs are their own."""
    candidates = [
        replace(each, env=each.env | LIMITED, headers=each.headers | {"x-falproxy-key": SECRET})
        for each in without_owners(plan)
    ]
    work = partial(by_wrk, plan.upstream)
    await loads(plan, "limited", lambda _: calls.submit(), work, candidates)


async def submits(plan: Plan) -> None:
    await loads(plan, "submits", lambda _: calls.submit(), partial(by_wrk, plan.upstream))


async def responses(plan: Plan) -> None:
    await loads(plan, "responses", calls.result, by_transfers)


async def uploads(plan: Plan) -> None:
    call = calls.upload()
    await loads(plan, "uploads", lambda _: call, by_transfers)


async def workers(plan: Plan) -> None:
    """Two workers on two cores beside one worker on one core."""
    if not has_workers():
        plan.say("  this falproxy has no --workers")
        return
    one = tuple(known for known in plan.candidates if known.name == "falproxy")
    await loads(
        plan,
        "workers",
        calls.poll,
        partial(by_wrk, plan.upstream),
        (*one, TWO_WORKERS),
    )


async def streams(plan: Plan) -> None:
    async def work(one: Participant) -> None:
        sample = await streams_slice(one.it, plan.results.at_rest["streams", one.name])
        plan.results.streams.setdefault(one.name, []).append(sample)
        plan.say(
            f"  {one.name:14}lost {sample.lost}, p50 {sample.p50:.2f} p99 {sample.p99:.2f} ms, "
            f"{sample.size:.0f} KB a stream, {sample.cpu:.2f} CPU s"
        )

    repeats = min(plan.repeats, STREAM_REPEATS)
    async with participants(plan, "streams", plan.candidates, calls.poll) as ready:
        await in_turns(plan, "streams", ready, repeats, work)


async def latency(plan: Plan) -> None:
    samples = plan.results.latencies

    def add(name: str, milliseconds: list[float]) -> None:
        cuts = quantiles(milliseconds, n=100)
        samples.setdefault(name, []).append(Latency(cuts[49], cuts[98]))
        plan.say(f"  {name:14}p50 {cuts[49] * 1000:.0f} us, p99 {cuts[98] * 1000:.0f} us")

    async def work(one: Participant) -> None:
        port = one.it.port
        with connect(port) as connection:
            add(one.name, times(connection, one.call.wire(port), one.call.length))
        if one is ready[0]:
            with connect_directly("queue.fal.run", plan.folder / "ca.pem") as connection:
                add(DIRECT, times(connection, one.call.direct(), one.call.length))

    async with participants(plan, "latency", plan.candidates, calls.poll) as ready:
        await in_turns(plan, "latency", ready, plan.repeats, work)


async def starts(plan: Plan) -> None:
    samples = plan.results.starts
    for number in range(STARTS):
        plan.say(f"starts {number + 1}/{STARTS}")
        for candidate in plan.candidates:
            if ("starts", candidate.name) in plan.results.notes:
                continue
            try:
                it = await start(candidate, plan.folder, is_watched=number < 2)
            except FAILURES as error:
                plan.note("starts", candidate.name, error)
                continue
            samples.setdefault(candidate.name, []).append(it)
            idle = "" if it.idle is None else f", idle {it.idle:.0f} MiB"
            plan.say(f"  {candidate.name:14}{it.seconds * 1000:.0f} ms{idle}")


SCENARIOS: dict[str, Callable[[Plan], Awaitable[None]]] = {
    "polls": polls,
    "new": new_heads,
    "strangers": strangers,
    "tokens": tokens,
    "submits": submits,
    "limited": limited,
    "mixed": mixed,
    "responses": responses,
    "uploads": uploads,
    "streams": streams,
    "latency": latency,
    "starts": starts,
    "workers": workers,
}
