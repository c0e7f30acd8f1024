"""PriceBook: the registry's prices come first; fal is asked once a day, by one request for all, and
its last price is used while it cannot be asked."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path

import pytest
from aiohttp import web

from falproxy.fal.estimates import estimate_cost
from falproxy.fal.keys import KeyPool
from falproxy.fal.pricing import Price, Unit
from falproxy.proxy.prices import (
    NO_PRICE_TTL,
    PRICE_TTL,
    RETRY_AFTER,
    Estimate,
    PriceBook,
    PricedModel,
    PriceUnavailable,
    Quote,
    make_estimate,
)
from falproxy.proxy.upstream import Upstream, open_transport
from falproxy.stores.price_file import ListedPrice, PriceFile
from tests.support.fake_fal import FakeFal
from tests.support.key_search import CANARY

LISTED, VIDEO = "fal-ai/flux/dev", "fal-ai/some/video"
DEV_PRICE = Price(Decimal("0.025"), "megapixels")
VIDEO_PRICE = Price(Decimal("0.05"), "seconds")
DAY = 1_700_000_000.0

Respond = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass(slots=True)
class World:
    """A price book with its fake fal. time: of both clocks, in seconds."""

    fal: FakeFal
    upstream: Upstream
    prices: dict[str, dict[str, object]]
    schemas: dict[str, object]
    data_dir: Path
    time: float = DAY
    status: int = 200
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    books: list[PriceBook] = field(default_factory=list)

    def open_book(self, *, has_file: bool = True) -> PriceBook:
        book = PriceBook(
            lambda: {LISTED: PricedModel(DEV_PRICE, {}), "fal-ai/mine": PricedModel(None, {})},
            file=PriceFile(self.data_dir / "prices.json") if has_file else None,
            clock=lambda: self.time,
            wall_clock=lambda: self.time,
        )
        book.wait_timeout = 0.3
        book.open(self.upstream)
        self.books.append(book)
        return book

    @property
    def questions(self) -> list[str]:
        """The targets of the requests for prices."""
        return [seen.target for seen in self.fal.seen if "pricing" in seen.target]

    async def respond(self, request: web.Request) -> web.StreamResponse:
        endpoint = request.query["endpoint_id"]
        if request.path != "/v1/models/pricing":
            document = self.schemas.get(endpoint)
            return web.json_response(document, status=200 if document else 404)
        assert request.headers["Authorization"] == f"Key {CANARY}"
        await self.gate.wait()
        if self.status != 200:
            return web.json_response({"error": {"type": "x"}}, status=self.status)
        if endpoint not in self.prices:
            return web.json_response({"error": {"type": "not_found"}}, status=404)
        entry = {"endpoint_id": endpoint, "currency": "USD", **self.prices[endpoint]}
        entries = [entry] if self.prices[endpoint] else []
        return web.json_response({"prices": entries, "next_cursor": None, "has_more": False})


@pytest.fixture
async def world(fal: FakeFal, tmp_path: Path) -> AsyncIterator[World]:
    key = KeyPool((CANARY,), lambda: 0.0).next_key()
    async with open_transport((1.0, 5.0)) as transport:
        upstream = Upstream(transport, key, origin=fal.origin)
        prices: dict[str, dict[str, object]] = {VIDEO: {"unit_price": 0.05, "unit": "seconds"}}
        opened = World(fal, upstream, prices, {}, tmp_path)
        fal.respond = opened.respond
        opened.gate.set()
        yield opened
        for book in opened.books:
            await book.close()


def schema(endpoint: str, **defaults: object) -> dict[str, object]:
    properties = {name: {"type": "string", "default": value} for name, value in defaults.items()}
    body = {"content": {"application/json": {"schema": {"properties": properties}}}}
    return {"paths": {f"/{endpoint}": {"post": {"requestBody": body}}}}


async def settled(book: PriceBook) -> None:
    while len(book._refreshes):
        await asyncio.sleep(0.005)


async def test_a_price_of_the_registry_is_known_and_fal_is_not_asked(world: World) -> None:
    book = world.open_book()
    assert book.known(LISTED) == DEV_PRICE
    assert await book.get(LISTED) == DEV_PRICE
    assert await book.estimate(LISTED, {"num_images": 2}) == Estimate(DEV_PRICE, Decimal(2), 50_000)
    assert world.questions == []


async def test_concurrent_callers_share_one_question(world: World) -> None:
    world.gate.clear()
    book = world.open_book()
    asked = [asyncio.create_task(book.get(VIDEO)) for _ in range(20)]
    while not world.questions:
        await asyncio.sleep(0.005)
    world.gate.set()
    assert await asyncio.gather(*asked) == [VIDEO_PRICE] * 20
    assert world.questions == ["/v1/models/pricing?endpoint_id=fal-ai%2Fsome%2Fvideo"]


async def test_a_price_is_known_without_asking_once_fal_has_sent_it(world: World) -> None:
    book = world.open_book()
    assert book.known(VIDEO) is None
    assert book.known_estimate(VIDEO, {"duration": 5}) == Estimate()
    await book.get(VIDEO)
    assert book.known(VIDEO) == VIDEO_PRICE
    assert book.known_estimate(VIDEO, {"duration": 5}).cost == 250_000
    assert len(world.questions) == 1


async def test_a_price_is_asked_for_once_a_day_and_served_meanwhile(world: World) -> None:
    book = world.open_book()
    await book.get(VIDEO)
    world.time += PRICE_TTL - 1
    await book.get(VIDEO)
    assert len(world.questions) == 1
    world.time += 2
    world.prices[VIDEO] = {"unit_price": 0.10, "unit": "seconds"}
    assert await book.get(VIDEO) == VIDEO_PRICE
    await settled(book)
    assert await book.get(VIDEO) == Price(Decimal("0.1"), "seconds")
    assert len(world.questions) == 2


@pytest.mark.parametrize("status", [401, 403, 429, 500, 503])
async def test_the_last_price_is_served_while_fal_cannot_be_asked(
    world: World, status: int
) -> None:
    book = world.open_book()
    await book.get(VIDEO)
    world.time += 30 * PRICE_TTL
    world.status = status
    for _ in range(3):
        assert await book.get(VIDEO) == VIDEO_PRICE
        await settled(book)
    assert len(world.questions) == 2  # it is left alone for a while after a failure


@pytest.mark.parametrize("status", [401, 403, 429, 500, 503])
async def test_without_a_price_it_is_unavailable_and_fal_is_left_alone_for_a_while(
    world: World, status: int
) -> None:
    book, world.status = world.open_book(), status
    for _ in range(3):
        with pytest.raises(PriceUnavailable) as caught:
            await book.get(VIDEO)
        assert (caught.value.status, caught.value.code) == (503, "price_unavailable")
    assert len(world.questions) == 1
    world.time, world.status = world.time + RETRY_AFTER + 1, 200
    assert await book.get(VIDEO) == VIDEO_PRICE


async def test_a_slow_response_is_not_waited_for_but_used_later(world: World) -> None:
    world.gate.clear()
    book = world.open_book()
    with pytest.raises(PriceUnavailable):
        await book.estimate(VIDEO, {"duration": 5})
    world.gate.set()
    await settled(book)
    assert book.known(VIDEO) == VIDEO_PRICE
    assert len(world.questions) == 1


@pytest.mark.parametrize(
    ("entry", "is_found"),
    [
        pytest.param(None, False, id="an endpoint that fal does not know"),
        pytest.param({}, True, id="no entry"),
        pytest.param({"unit_price": 1, "unit": "moons"}, True, id="an unknown unit"),
        pytest.param({"unit_price": -1, "unit": "images"}, True, id="a negative price"),
        pytest.param({"unit_price": "1", "unit": "images"}, True, id="a text"),
        pytest.param({"unit_price": True, "unit": "images"}, True, id="a boolean"),
        pytest.param({"unit_price": None, "unit": "images"}, True, id="null"),
        pytest.param({"unit_price": 1, "unit": None}, True, id="no unit"),
        pytest.param({"unit_price": 1, "unit": "images", "currency": "EUR"}, True, id="euros"),
    ],
)
async def test_no_price_is_remembered_for_a_shorter_time(
    world: World, entry: dict[str, object] | None, is_found: bool
) -> None:
    world.prices.clear()
    if entry is not None:
        world.prices[VIDEO] = entry
    book = world.open_book()
    for _ in range(3):
        assert await book.get(VIDEO) is None
        assert (await book.find(VIDEO)).is_found is is_found
    assert len(world.questions) == 1
    world.prices[VIDEO] = {"unit_price": 0.05, "unit": "seconds"}
    world.time += NO_PRICE_TTL + 1
    assert await book.get(VIDEO) == VIDEO_PRICE


@pytest.mark.parametrize(
    "document",
    [b"", b"[]", b"{", b'{"prices": 1}', b'{"prices": [1]}', b"[" * 100_000, b" " * 2**21],
    ids=["empty", "list", "broken", "number", "numbers", "deep", "large"],
)
async def test_what_is_no_price_list_is_not_used(world: World, document: bytes) -> None:
    async def respond(request: web.Request) -> web.StreamResponse:
        return web.Response(body=document, content_type="application/json")

    world.fal.respond = respond
    with pytest.raises(PriceUnavailable):
        await world.open_book().get(VIDEO)


async def test_a_price_has_no_rounding_error(world: World) -> None:
    world.prices[VIDEO] = {"unit_price": 0.1, "unit": "second"}
    book = world.open_book()
    assert await book.get(VIDEO) == Price(Decimal("0.1"), "seconds")
    assert (await book.estimate(VIDEO, {"duration": 3})).cost == 300_000


async def test_the_model_s_own_defaults_fill_in_missing_inputs(world: World) -> None:
    world.schemas[VIDEO] = schema(VIDEO, duration="8s", prompt="x" * 10, num_images=2)
    book = world.open_book()
    assert (await book.estimate(VIDEO, {})).units == 16
    assert (await book.estimate(VIDEO, {"duration": 5})).units == 10
    assert (await book.estimate(VIDEO, {"duration": None, "num_images": 1})).units == 8


async def test_without_a_schema_the_duration_of_a_video_is_unknown(world: World) -> None:
    estimate = await world.open_book().estimate(VIDEO, {})
    assert estimate == Estimate(VIDEO_PRICE, None, None)


async def test_inputs_that_could_not_be_read_have_no_cost(world: World) -> None:
    assert await world.open_book().estimate(LISTED, None) == Estimate(DEV_PRICE, None, None)


async def test_a_model_of_the_registry_without_a_price_has_fal_s(world: World) -> None:
    world.prices["fal-ai/mine"] = {"unit_price": 0.5, "unit": "image"}
    assert await world.open_book().get("fal-ai/mine") == Price(Decimal("0.5"))


@pytest.mark.parametrize("endpoint", ["", "x", "a/requests/b", "a/" + "b" * 300, "a b/c"])
async def test_fal_is_not_asked_about_what_is_no_endpoint(world: World, endpoint: str) -> None:
    book = world.open_book()
    assert await book.get(endpoint) is None
    book.refresh_soon(endpoint)
    assert world.questions == []


async def test_prices_and_defaults_outlive_a_restart(world: World) -> None:
    world.schemas[VIDEO] = schema(VIDEO, duration="5")
    first = world.open_book()
    await first.get(VIDEO)
    await settled(first)
    world.time += 60
    again = world.open_book()
    assert (await again.estimate(VIDEO, {})).cost == 250_000
    assert len(world.questions) == 1


async def test_a_book_without_connections_has_what_is_stored(world: World) -> None:
    first = world.open_book()
    await first.get(VIDEO)
    await settled(first)
    world.time += 2 * PRICE_TTL
    offline = PriceBook(dict, file=PriceFile(world.data_dir / "prices.json"))
    await offline.load()
    assert await offline.get(VIDEO) == VIDEO_PRICE
    with pytest.raises(PriceUnavailable):
        await offline.get("fal-ai/other/model")


async def test_a_price_that_arrives_is_reported_once(world: World) -> None:
    book, reports = world.open_book(), list[str]()
    book.refresh_soon(VIDEO, lambda: reports.append("first"))
    book.refresh_soon(VIDEO, lambda: reports.append("second"))
    await settled(book)
    await asyncio.sleep(0)
    assert reports == ["first", "second"]
    book.refresh_soon(VIDEO, lambda: reports.append("third"))
    book.refresh_soon("fal-ai/none/model", lambda: reports.append("no price"))
    await settled(book)
    assert reports == ["first", "second"]


class TestPriceFile:
    def test_of_another_server_is_not_read(self, tmp_path: Path) -> None:
        PriceFile(tmp_path / "p").save({VIDEO: ListedPrice(VIDEO_PRICE, 5.0)})
        assert PriceFile(tmp_path / "p", "http://sandbox").load() == {}
        assert PriceFile(tmp_path / "p").load() == {VIDEO: ListedPrice(VIDEO_PRICE, 5.0)}

    def test_has_the_prices_of_all_processes(self, tmp_path: Path) -> None:
        first, second = PriceFile(tmp_path / "p"), PriceFile(tmp_path / "p")
        first.save({VIDEO: ListedPrice(VIDEO_PRICE, 5.0, defaults={"duration": "5"})})
        second.save({"a/b": ListedPrice(None, 6.0, is_found=False)})
        assert set(first.load()) == {VIDEO, "a/b"}
        assert (tmp_path / "p").stat().st_mode & 0o777 == 0o600

    def test_keeps_the_newest_prices(self, tmp_path: Path) -> None:
        file = PriceFile(tmp_path / "p")
        file.save({f"a/{number}": ListedPrice(None, float(number)) for number in range(1200)})
        assert set(file.load()) == {f"a/{number}" for number in range(200, 1200)}

    @pytest.mark.parametrize(
        "content",
        ["", "{", "[]", '{"format": 2}', '{"format": 1, "origin": "", "prices": 1}',
         '{"format": 1, "origin": "", "prices": {"a/b": {"usd": "x"}}}'],
    )  # fmt: skip
    def test_that_is_damaged_is_ignored_and_replaced(self, tmp_path: Path, content: str) -> None:
        (tmp_path / "p").write_text(content)
        file = PriceFile(tmp_path / "p")
        assert file.load() == {}
        file.save({VIDEO: ListedPrice(VIDEO_PRICE, 5.0)})
        assert json.loads((tmp_path / "p").read_text())["format"] == 1
        assert set(file.load()) == {VIDEO}

    def test_in_a_folder_that_cannot_be_made_is_ignored(self, tmp_path: Path) -> None:
        (tmp_path / "x").write_text("")
        file = PriceFile(tmp_path / "x" / "p")
        file.save({VIDEO: ListedPrice(VIDEO_PRICE, 5.0)})
        assert file.load() == {}


@pytest.mark.parametrize("unit", ["images", "megapixels", "seconds", "characters"])
@pytest.mark.parametrize(
    "inputs",
    [
        {"num_images": 2},
        {"num_images": True},
        {"num_images": 1.0},
        {"num_images": 2.5},
        {"num_images": "2"},
        {"num_images": [2, 3]},
        {"num_images": 2, "prompt": "abc"},
        {"num_images": 2, "prompt": "abcdef" * 1000},
        {"image_size": "square"},
        {"image_size": {"width": 2048, "height": 1024}},
        {"image_size": "9" * 100},
        {"duration": 5},
        {"duration": "5s"},
        {"duration": float("nan")},
        {"width": Decimal(4096)},
    ],
    ids=str,
)
def test_a_repeated_estimate_is_the_same(unit: Unit, inputs: dict[str, object]) -> None:
    """Estimates of equal inputs are remembered; 1 and True are equal, and no equal inputs."""
    price = Price(Decimal("0.025"), unit)
    for _ in range(2):
        for other in ({"num_images": 1}, {"num_images": True}, inputs):
            assert make_estimate(Quote(price), other).cost == estimate_cost(price, other, {})
