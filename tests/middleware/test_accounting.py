"""The ledger's middleware: every model call by every way is written down once, and nothing of it
that is nobody's business."""

import asyncio
import io
from collections.abc import AsyncIterator
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from aiohttp import FormData, web

from falproxy.stores.ledger import CallRecord
from falproxy.stores.ledger.writer import LEDGER_WRITER
from tests.support.fake_fal import FakeFal
from tests.support.generate_house import ASYNC, PNG, House, Reply, open_house, rows_of, until, uri
from tests.support.key_search import SECRET
from tests.support.urls import PROXY

DEV, SCHNELL = "fal-ai/flux/dev", "fal-ai/flux/schnell"
KONTEXT, TEXT = "fal-ai/flux-pro/kontext", "fal-ai/flux-pro/kontext/text-to-image"
HERON = "!delay 0 a heron at dawn"
DRAW = {"prompt": HERON, "image_size": {"width": 64, "height": 48}}
SLOW = DRAW | {"prompt": "!delay 0.4 a heron at dawn"}
ENDLESS = DRAW | {"prompt": "!delay 60 a heron at dawn"}
ANN = {"x-falproxy-key": "s3cret-of-ann"}


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[House]:
    async with open_house(tmp_path) as opened:
        yield opened


async def submit(house: House, endpoint: str, body: object) -> str:
    reply = await house.through(f"https://queue.fal.run/{endpoint}", body)
    assert reply.status == 200, reply
    return str(reply.document["request_id"])


async def ask(house: House, request_id: str, verb: str = "", app: str = "fal-ai/flux") -> Reply:
    return await house.through(f"https://queue.fal.run/{app}/requests/{request_id}{verb}")


async def fetch(house: House, request_id: str, app: str = "fal-ai/flux") -> Reply:
    """A job's result, once it has ended."""
    while (await ask(house, request_id, "/status", app)).document["status"] != "COMPLETED":
        await asyncio.sleep(0.01)
    return await ask(house, request_id, "", app)


async def only(house: House) -> CallRecord:
    (entry,) = await house.entries()
    return entry


def outcomes(house: House) -> list[dict[str, Any]]:
    return rows_of(house.data_dir, "SELECT * FROM falproxy_outcomes")


def form(**fields: str) -> FormData:
    data = FormData(fields)
    data.add_field("image", PNG, filename="in.png", content_type="image/png")
    return data


@dataclass(frozen=True, slots=True)
class Row:
    """A way to make a call, and what of it is to be read in the ledger."""

    path: str
    body: Any
    route: str
    operation: str
    endpoint: str
    target: str | None = None
    user_id: str | None = None
    units: int | None = 1
    settled: int | None = 25_000
    cache: str | None = None


NAMED = {"model": DEV, "prompt": HERON, "size": "64x64"}
GENERATE = "/api/images/generate"
OPENAI = "/v1/images/generations"
TEMPLATE = "/api/templates/product-shot"
WAYS = {
    "header, run": Row(PROXY, DRAW, PROXY, "run", DEV, f"https://fal.run/{DEV}"),
    "header, kept": Row(
        PROXY, {"prompt": HERON}, PROXY, "run", TEXT, f"https://fal.run/{TEXT}",
        settled=40_000, cache="miss",
    ),
    "header, submit": Row(
        PROXY, DRAW, PROXY, "submit", DEV, f"https://queue.fal.run/{DEV}", units=None, settled=None
    ),
    "header, stream": Row(
        PROXY, DRAW, PROXY, "stream", SCHNELL, f"https://fal.run/{SCHNELL}/stream",
        units=None, settled=None,
    ),
    "header, nobody knows the price": Row(
        PROXY, DRAW, PROXY, "run", "fal-ai/fast-sdxl", "https://fal.run/fal-ai/fast-sdxl",
        settled=None,
    ),
    "mount, run": Row(f"/api/fal/run/{DEV}", DRAW, "/api/fal/run/{path}", "run", DEV),
    "mount, submit": Row(
        f"/api/fal/queue/{DEV}", DRAW, "/api/fal/queue/{path}", "submit", DEV,
        units=None, settled=None,
    ),
    "mount, stream": Row(
        f"/api/fal/run/{SCHNELL}/stream", DRAW, "/api/fal/run/{path}", "stream", SCHNELL,
        units=None, settled=None,
    ),
    "kontext": Row(
        "/kontext", {"prompt": HERON, "image_url": uri()}, "/kontext", "submit", KONTEXT,
        settled=40_000, cache="miss",
    ),
    "openai": Row(OPENAI, NAMED | {"user": "ada"}, OPENAI, "submit", DEV, user_id="ada"),
    "openai, stream": Row(
        OPENAI, NAMED | {"model": SCHNELL, "stream": True, "partial_images": 2, "n": 1},
        OPENAI, "stream", SCHNELL, units=None, settled=None,
    ),
    "openai, edit": Row(
        "/v1/images/edits", {"model": "kontext", "prompt": HERON, "user": "ada"},
        "/v1/images/edits", "submit", KONTEXT, user_id="ada", settled=40_000, cache="miss",
    ),
    "generate": Row(
        GENERATE, {"model": "flux-dev", "inputs": DRAW, "userId": "ada"}, GENERATE,
        "submit", DEV, user_id="ada",
    ),
    "template": Row(
        TEMPLATE, {"variables": {"product": HERON}, "userId": "ada"}, "/api/templates/{name}",
        "submit", DEV, user_id="ada",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WAYS)
async def test_a_call_is_written_down_whatever_way_it_came(tmp_path: Path, name: str) -> None:
    row = WAYS[name]
    async with open_house(tmp_path, access_keys=(("ann", ANN["x-falproxy-key"]),)) as house:
        target = {"x-fal-target-url": row.target} if row.target else {}
        headers = ANN | target
        sent = {"data": form(**row.body)} if "edits" in row.path else {"json": row.body}
        reply = await house.ask("POST", row.path, headers=headers, **sent)
        assert reply.status == 200, reply
        entry = await only(house)
        request_id = entry.request_id
    assert (entry.route, entry.operation, entry.endpoint) == (
        row.route, row.operation, row.endpoint,
    )  # fmt: skip
    assert (entry.principal, entry.user_id) == ("ann", row.user_id)
    assert (entry.status, entry.error, entry.cache) == (200, None, row.cache)
    assert request_id
    assert entry.units == (None if row.units is None else Decimal(row.units))
    assert (entry.estimated, entry.settled) == (None, row.settled)
    assert 0 < entry.upstream_seconds <= entry.seconds


async def test_an_open_proxy_knows_no_names(house: House) -> None:
    await house.through(f"https://fal.run/{DEV}", DRAW)
    entry = await only(house)
    assert (entry.principal, entry.user_id) == (None, None)


async def test_every_call_of_one_request_is_an_entry(house: House) -> None:
    await house.ask("POST", OPENAI, json=NAMED | {"n": 10})
    assert [(each.endpoint, each.units) for each in await house.entries()] == [
        (DEV, Decimal(2)), (DEV, Decimal(4)), (DEV, Decimal(4)),
    ]  # fmt: skip


class TestQueuedJobs:
    async def test_are_settled_when_their_results_are_fetched(self, house: House) -> None:
        request_id = await submit(house, DEV, DRAW | {"num_images": 3})
        await fetch(house, request_id)
        entry = await only(house)
        assert entry.request_id == request_id
        assert (entry.status, entry.units, entry.settled) == (200, Decimal(3), 75_000)

    async def test_are_settled_by_a_mount_too(self, house: House) -> None:
        reply = await house.ask("POST", f"/api/fal/queue/{DEV}", json=DRAW)
        place = f"/api/fal/queue/fal-ai/flux/requests/{reply.document['request_id']}"
        while (await house.ask("GET", f"{place}/status")).document["status"] != "COMPLETED":
            await asyncio.sleep(0.01)
        assert (await house.ask("GET", place)).status == 200
        assert (await only(house)).settled == 25_000

    @pytest.mark.parametrize(
        ("order", "status"),
        [("422 content_policy_violation", 422), ("500", 500), ("400 downstream_service_error", 400),
         ("504 startup_timeout", 504)],
    )  # fmt: skip
    async def test_that_fail_cost_nothing(self, house: House, order: str, status: int) -> None:
        request_id = await submit(house, DEV, {"prompt": f"!error {order}"})
        assert (await fetch(house, request_id)).status == status
        entry = await only(house)
        assert (entry.status, entry.settled) == (status, 0)

    async def test_that_are_cancelled_have_failed(self, house: House) -> None:
        request_id = await submit(house, DEV, ENDLESS)
        target = f"https://queue.fal.run/fal-ai/flux/requests/{request_id}/cancel"
        assert (await house.through(target, method="PUT")).status == 202
        await fetch(house, request_id)
        assert (await only(house)).status == 499

    async def test_are_as_they_were_while_they_are_asked_about(self, house: House) -> None:
        request_id = await submit(house, DEV, ENDLESS)
        before = await only(house)
        for verb in ("/status", "/status?logs=1", "", "/response"):
            assert (await ask(house, request_id, verb)).status in (202, 400)
        assert await only(house) == before
        assert outcomes(house) == []

    @pytest.mark.parametrize(
        "order", ["429 at=result", "403 locked at=result", "401 at=result", "502 nginx at=result"]
    )
    async def test_are_as_they_were_when_nobody_tells_how_they_ended(
        self, house: House, order: str
    ) -> None:
        request_id = await submit(house, DEV, DRAW | {"prompt": f"!delay 0 !error {order} times=1"})
        assert (await fetch(house, request_id)).status >= 400
        assert (await only(house)).status == 200
        assert outcomes(house) == []
        assert (await ask(house, request_id)).status == 200
        assert (await only(house)).settled == 25_000

    async def test_that_nobody_has_leave_nothing_behind(self, house: House) -> None:
        for verb in ("", "/status"):
            assert (await ask(house, "7e2f0b8a-0001-4000-8000-000000000000", verb)).status == 404
        assert await house.entries() == []
        assert outcomes(house) == []


class TestKeptResults:
    async def test_cost_nothing_and_save_their_price(self, house: House) -> None:
        body = {"prompt": HERON, "seed": 1}
        await house.through(f"https://fal.run/{TEXT}", body)
        await house.through(f"https://fal.run/{TEXT}", body)
        await fetch(house, await submit(house, TEXT, body), "fal-ai/flux-pro")
        await house.generate("kontext-text-to-image", body)
        *hits, miss = await house.entries()
        assert (miss.cache, miss.estimated, miss.settled) == ("miss", None, 40_000)
        assert [(hit.cache, hit.estimated, hit.settled) for hit in hits] == [("hit", 40_000, 0)] * 3
        assert len({entry.request_id for entry in [*hits, miss]}) == 4
        assert house.sandbox.jobs == 1

    async def test_that_are_shared_cost_one_of_them(self, house: House) -> None:
        body = {"prompt": SLOW["prompt"], "seed": 1}
        calls = (house.through(f"https://fal.run/{TEXT}", body) for _ in range(3))
        assert {reply.status for reply in await asyncio.gather(*calls)} == {200}
        entries = await house.entries()
        assert sorted((each.cache, each.settled) for each in entries) == [
            ("collapsed", 0), ("collapsed", 0), ("miss", 40_000),
        ]  # fmt: skip

    async def test_that_are_shared_in_the_queue_too(self, house: House) -> None:
        body = {"prompt": SLOW["prompt"], "seed": 1}
        ids = [await submit(house, TEXT, body) for _ in range(3)]
        for request_id in ids:
            assert (await fetch(house, request_id, "fal-ai/flux-pro")).status == 200
        entries = await house.entries()
        assert [(each.cache, each.settled) for each in entries] == [
            ("collapsed", 0), ("collapsed", 0), ("miss", 40_000),
        ]  # fmt: skip

    async def test_that_are_refused_are_as_any_other(self, house: House) -> None:
        for _ in range(2):
            await house.through(f"https://fal.run/{TEXT}", {"prompt": "x", "num_images": 9})
        assert [(each.status, each.cache, each.settled) for each in await house.entries()] == [
            (422, "miss", 0)
        ] * 2


class TestRefusalsAndFailures:
    @pytest.mark.parametrize(
        ("path", "body", "code"),
        [
            pytest.param(f"/api/fal/run/{KONTEXT}", {"prompt": "x", "image_url": uri(b"%PDF")},
                         "unsupported_image_format", id="a mount"),
            pytest.param("/kontext", {"prompt": "x", "image_url": "http://127.0.0.1:9/a.png"},
                         "image_load_error", id="kontext"),
            pytest.param(GENERATE, {"model": "kontext",
                                    "inputs": {"prompt": "x", "image_url": uri(b"%PDF")}},
                         "unsupported_image_format", id="generate"),
        ],
    )  # fmt: skip
    async def test_an_image_that_is_none_is_an_entry_with_its_code(
        self, house: House, path: str, body: object, code: str
    ) -> None:
        reply = await house.ask("POST", path, json=body)
        assert 400 <= reply.status < 500
        entry = await only(house)
        assert (entry.status, entry.error) == (422, code)
        assert (entry.endpoint, entry.request_id, entry.settled) == (KONTEXT, None, 0)
        assert house.sent == []

    async def test_what_is_no_call_of_a_model_is_no_entry(self, tmp_path: Path) -> None:
        async with open_house(tmp_path, allowed_endpoints=(DEV,)) as house:
            replies = [
                await house.through(f"https://fal.run/{SCHNELL}", DRAW),
                await house.through("https://example.com/", DRAW),
                await house.ask("POST", GENERATE, json={"model": "dall-e"}),
                await house.ask("GET", "/api/images/models"),
                await house.ask("GET", "/v1/models"),
                await house.ask("GET", "/health/live"),
            ]
            assert [reply.status for reply in replies] == [403, 412, 400, 200, 200, 200]
            assert await house.entries() == []

    @pytest.mark.parametrize(
        ("order", "status", "settled"),
        [
            pytest.param("422 content_policy_violation", 422, 0, id="refused, with its units"),
            pytest.param("500 unhandled", 500, 0, id="failed"),
            pytest.param("403 locked", 403, None, id="locked"),
        ],
    )
    async def test_a_failure_of_fal_s_is_written_as_it_came(
        self, house: House, order: str, status: int, settled: int | None
    ) -> None:
        await house.through(f"https://fal.run/{DEV}", {"prompt": f"!error {order}"})
        entry = await only(house)
        assert (entry.status, entry.error, entry.settled) == (status, None, settled)

    async def test_a_job_that_may_be_paid_costs_nobody_knows_what(
        self, tmp_path: Path, fal: FakeFal
    ) -> None:
        async def hang_up(request: web.Request) -> web.StreamResponse:
            assert request.transport is not None
            request.transport.abort()
            return web.Response()

        fal.answer = hang_up
        async with open_house(tmp_path, upstream_origin=fal.origin) as house:
            assert (await house.through(f"https://fal.run/{DEV}", DRAW)).status == 504
            entry = await only(house)
        assert (entry.status, entry.error) == (504, "upstream_broken")
        assert entry.settled is None

    async def test_a_job_that_never_left_costs_nothing(
        self, tmp_path: Path, unused_tcp_port: int
    ) -> None:
        nowhere = f"http://127.0.0.1:{unused_tcp_port}"
        async with open_house(tmp_path, upstream_origin=nowhere) as house:
            assert (await house.through(f"https://fal.run/{DEV}", DRAW)).status == 502
            entry = await only(house)
        assert (entry.error, entry.settled) == ("upstream_unreachable", 0)

    async def test_a_client_that_leaves_is_an_entry(self, tmp_path: Path, fal: FakeFal) -> None:
        async def say_nothing(request: web.Request) -> web.StreamResponse:
            await asyncio.Event().wait()
            return web.Response()

        fal.answer = say_nothing
        async with open_house(tmp_path, upstream_origin=fal.origin) as house:
            asking = asyncio.ensure_future(house.through(f"https://fal.run/{DEV}", DRAW))
            await until(lambda: fal.seen)
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
            await until(lambda: house.app[LEDGER_WRITER].pending_rows)
            entry = await only(house)
        assert (entry.status, entry.error, entry.settled) == (499, "client_left", None)


async def test_a_call_that_goes_on_without_its_client_costs_what_it_costs(
    tmp_path: Path, fal: FakeFal
) -> None:
    is_open = asyncio.Event()

    async def answer(request: web.Request) -> web.StreamResponse:
        await is_open.wait()
        result = {"images": [{"url": "https://a.example/b.png"}]}
        headers = {"X-Fal-Billable-Units": "1", "x-fal-request-id": "1"}
        return web.json_response(result, headers=headers)

    fal.answer = answer
    async with open_house(tmp_path, upstream_origin=fal.origin) as house:
        asking = asyncio.ensure_future(house.through(f"https://fal.run/{TEXT}", DRAW))
        await until(lambda: fal.seen)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        await until(lambda: house.app[LEDGER_WRITER].pending_rows)
        is_open.set()
        # This one is served by the same job, or by what is kept of it.
        assert (await house.through(f"https://fal.run/{TEXT}", DRAW)).status == 200
        assert len(fal.seen) == 1
        assert sorted(each.settled or 0 for each in await house.entries()) == [0, 40_000]


# What must not be found in the ledger, wherever it stood.
CANARIES = {
    "prompt": "canary-in-the-prompt",
    "url": "canary-in-a-url",
    "query": "canary-in-the-query",
    "header": "canary-in-a-header",
    "access": "canary-access-key",
    "fal key": SECRET,
    "input": "canary-in-an-input",
}


async def test_nothing_that_is_nobody_s_business_is_in_the_ledger(tmp_path: Path) -> None:
    keys = (("ann", CANARIES["access"]),)
    headers = {
        "Authorization": f"Bearer {CANARIES['access']}",
        "User-Agent": CANARIES["header"],
        "x-fal-runner-hint": CANARIES["header"],
    }
    async with open_house(tmp_path, access_keys=keys) as house:
        key = house.sandbox.files.new_key(f"{CANARIES['url']}.png")
        house.sandbox.files.put(key, io.BytesIO(PNG), "image/png")
        url = house.sandbox.file_url(key)
        edit = {"prompt": f"!delay 0 {CANARIES['prompt']}", "image_url": url}
        bad = edit | {"prompt": f"!error 422 {CANARIES['prompt']}", "seed": CANARIES["input"]}
        for body in (edit, edit, bad):
            inputs = {"model": "kontext", "inputs": body}
            for more in ({}, ASYNC):
                await house.ask("POST", GENERATE, json=inputs, headers=headers | more)
            await house.ask("POST", "/kontext", json=body, headers=headers)
            await house.ask("POST", f"/api/fal/run/{KONTEXT}", json=body, headers=headers)
            query = f"?fal_webhook=https://a.example/{CANARIES['query']}"
            await house.through(f"https://queue.fal.run/{KONTEXT}{query}", body, headers=headers)
        named = {"model": "kontext", "prompt": edit["prompt"]}
        await house.ask("POST", "/v1/images/edits", data=form(**named), headers=headers)
        bought = {
            "prompt": CANARIES["prompt"],
            "image_url": f"http://127.0.0.1:9/{CANARIES['url']}",
        }
        inputs = {"model": "kontext", "inputs": bought}
        assert (await house.ask("POST", GENERATE, json=inputs, headers=headers)).status == 422
        entries = await house.entries()
        assert len(entries) >= 15
        assert {entry.principal for entry in entries} == {"ann"}
        await until(lambda: all(job["finished_at"] for job in house.jobs()))
        assert len(house.jobs()) == 7
    kept = {path.name: path.read_bytes() for path in tmp_path.glob("ledger.sqlite*")}
    assert b"fal-ai/flux-pro/kontext" in kept["ledger.sqlite"]
    for what, canary in CANARIES.items():
        found = [name for name, content in kept.items() if canary.encode() in content]
        assert found == [], what
