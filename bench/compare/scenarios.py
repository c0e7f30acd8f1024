"""The scenarios: who takes part, what is asked, slices of all of them in turns."""

import json
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import quantiles

from compare import calls
from compare.calls import Call
from compare.connection import BrokenError, ask_once
from compare.contestants import TWO_WORKERS, Contestant, Started, has_workers, started
from compare.latency import direct_line, line_to, times
from compare.load import Sample, transfers_slice, wrk_slice
from compare.results import DIRECT, Latency, Results
from compare.start import start
from compare.streams import streams_slice
from compare.upstream import Upstream

STARTS = 7
JOBS = 200  # that are polled in turn
STREAM_REPEATS = 3
WARM_UP_SECONDS = 1
FAILURES = (BrokenError, TimeoutError, OSError, RuntimeError)


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run does. seconds: of a slice."""

    contestants: tuple[Contestant, ...]
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
class Entrant:
    """A contestant that has shown that it can do a scenario, and the call it is asked for."""

    it: Started
    call: Call

    @property
    def name(self) -> str:
        return self.it.contestant.name


MakeCall = Callable[[str], Call]
Work = Callable[[Entrant], Awaitable[None]]


async def submitted(it: Started) -> str:
    """The id of a request that was submitted through a proxy: it is asked about there only."""
    call = calls.submit().with_headers(it.contestant.headers)
    answer, body = await ask_once(it.port, call.wire(it.port))
    if answer.status != 200:
        raise BrokenError(f"a submit is answered with {answer.status}")
    return str(json.loads(body)["request_id"])


async def entrant(it: Started, call: Call) -> Entrant:
    """Raises: BrokenError, the call is not answered as it has to be."""
    call = call.with_headers(it.contestant.headers)
    answer, body = await ask_once(it.port, call.wire(it.port))
    if answer.status != 200:
        raise BrokenError(f"the call is answered with {answer.status}")
    if call.length is None:
        call = replace(call, length=len(body))
    elif len(body) != call.length:
        raise BrokenError(f"the answer has {len(body)} bytes, not {call.length}")
    return Entrant(it, call)


@asynccontextmanager
async def entrants(
    plan: Plan, scenario: str, contestants: Sequence[Contestant], make: MakeCall
) -> AsyncIterator[list[Entrant]]:
    """All that can do the scenario, running; of the others it is noted why not."""
    async with AsyncExitStack() as stack:
        able = []
        for contestant in contestants:
            try:
                it = await stack.enter_async_context(started(contestant, plan.folder))
                jobs = [await submitted(it) for _ in range(JOBS)]
                call = replace(make(jobs[0]), jobs=tuple(jobs))
                plan.results.at_rest[scenario, contestant.name] = it.tree.rss()
                able.append(await entrant(it, call))
            except FAILURES as error:
                plan.note(scenario, contestant.name, error)
            else:
                it.tree.forget_peak()
        yield able


async def in_turns(
    plan: Plan, scenario: str, able: list[Entrant], repeats: int, work: Work
) -> None:
    """Every other repeat goes the other way round. Who fails is out of the scenario."""
    for repeat in range(repeats):
        plan.say(f"{scenario} {repeat + 1}/{repeats}")
        for one in list(able) if repeat % 2 == 0 else able[::-1]:
            try:
                await work(one)
            except FAILURES as error:
                plan.note(scenario.partition(",")[0], one.name, error)
                able.remove(one)


async def loads(
    plan: Plan,
    scenario: str,
    make: MakeCall,
    slice_of: Callable[[Entrant, int], Awaitable[Sample]],
    contestants: Sequence[Contestant] | None = None,
) -> None:
    kept = plan.results.loads.setdefault(scenario, {})

    async def work(one: Entrant) -> None:
        sample = await slice_of(one, plan.seconds)
        kept.setdefault(one.name, []).append(sample)
        plan.say(
            f"  {one.name:14}{sample.rate:10.1f} per CPU s {sample.requests / sample.wall:10.1f}/s"
            f" {sample.cpu / sample.wall:6.0%} of a core, peak {sample.peak:.0f} MiB"
        )

    async def warm_up(one: Entrant) -> None:
        await slice_of(one, WARM_UP_SECONDS)
        one.it.tree.forget_peak()

    async with entrants(plan, scenario, contestants or plan.contestants, make) as able:
        await in_turns(plan, f"{scenario}, warm-up", able, 1, warm_up)
        await in_turns(plan, scenario, able, plan.repeats, work)


async def by_wrk(upstream: Upstream, one: Entrant, seconds: int) -> Sample:
    return await wrk_slice(one.it, one.call, upstream, seconds)


async def by_transfers(one: Entrant, seconds: int) -> Sample:
    return await transfers_slice(one.it, one.call, seconds)


async def polls(plan: Plan) -> None:
    await loads(plan, "polls", calls.poll, partial(by_wrk, plan.upstream))


async def submits(plan: Plan) -> None:
    await loads(plan, "submits", lambda _: calls.submit(), partial(by_wrk, plan.upstream))


async def answers(plan: Plan) -> None:
    await loads(plan, "answers", calls.answer, by_transfers)


async def uploads(plan: Plan) -> None:
    call = calls.upload()
    await loads(plan, "uploads", lambda _: call, by_transfers)


async def workers(plan: Plan) -> None:
    """Two workers beside one, with both cores for the two."""
    if not has_workers():
        plan.say("  this falproxy has no --workers")
        return
    one = tuple(known for known in plan.contestants if known.name == "falproxy")
    await loads(
        plan,
        "workers",
        calls.poll,
        partial(by_wrk, plan.upstream),
        (*one, TWO_WORKERS),
    )


async def streams(plan: Plan) -> None:
    async def work(one: Entrant) -> None:
        sample = await streams_slice(one.it, plan.results.at_rest["streams", one.name])
        plan.results.streams.setdefault(one.name, []).append(sample)
        plan.say(
            f"  {one.name:14}lost {sample.lost}, p50 {sample.p50:.2f} p99 {sample.p99:.2f} ms, "
            f"{sample.size:.0f} KB a stream, {sample.cpu:.2f} CPU s"
        )

    repeats = min(plan.repeats, STREAM_REPEATS)
    async with entrants(plan, "streams", plan.contestants, calls.poll) as able:
        await in_turns(plan, "streams", able, repeats, work)


async def latency(plan: Plan) -> None:
    kept = plan.results.latencies

    def keep(name: str, taken: list[float]) -> None:
        cuts = quantiles(taken, n=100)
        kept.setdefault(name, []).append(Latency(cuts[49], cuts[98]))
        plan.say(f"  {name:14}p50 {cuts[49] * 1000:.0f} us, p99 {cuts[98] * 1000:.0f} us")

    async def work(one: Entrant) -> None:
        port = one.it.port
        with line_to(port) as line:
            keep(one.name, times(line, one.call.wire(port), one.call.length))
        if one is able[0]:
            with direct_line("queue.fal.run", plan.folder / "ca.pem") as line:
                keep(DIRECT, times(line, one.call.direct(), one.call.length))

    async with entrants(plan, "latency", plan.contestants, calls.poll) as able:
        await in_turns(plan, "latency", able, plan.repeats, work)


async def starts(plan: Plan) -> None:
    kept = plan.results.starts
    for number in range(STARTS):
        plan.say(f"starts {number + 1}/{STARTS}")
        for contestant in plan.contestants:
            if ("starts", contestant.name) in plan.results.notes:
                continue
            try:
                it = await start(contestant, plan.folder, is_watched=number < 2)
            except FAILURES as error:
                plan.note("starts", contestant.name, error)
                continue
            kept.setdefault(contestant.name, []).append(it)
            idle = "" if it.idle is None else f", idle {it.idle:.0f} MiB"
            plan.say(f"  {contestant.name:14}{it.seconds * 1000:.0f} ms{idle}")


SCENARIOS: dict[str, Callable[[Plan], Awaitable[None]]] = {
    "polls": polls,
    "submits": submits,
    "answers": answers,
    "uploads": uploads,
    "streams": streams,
    "latency": latency,
    "starts": starts,
    "workers": workers,
}
