"""Re-hosted outputs with fal's own clients: @fal-ai/client and fal_client 1.x."""

import asyncio
import hashlib
import json
import re
import socket
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from aiohttp import ClientSession, web
from aiohttp.test_utils import TestServer

import falproxy
from falproxy.sandbox import Sandbox
from falproxy.sandbox import create_app as create_sandbox
from tests.support.chromium import Chromium
from tests.support.empty_ledger import with_empty_ledger
from tests.support.fake_supabase import FakeSupabase
from tests.support.fake_supabase.faults import delay
from tests.support.fal_client_world import (
    ClientWorld,
    ScenarioProcess,
    check_credentials,
    photo,
    scenario_runner,
)
from tests.support.js_world import DEV, KONTEXT, Play, origin_of
from tests.support.key_search import CANARY
from tests.support.settings import make_settings
from tests.support.storages import files_in
from tests.support.waiting import wait_until

SCHNELL = "fal-ai/flux/schnell"
FROM_WORDS = f"{KONTEXT}/text-to-image"  # its results are reused
HERON = {"prompt": "a heron at dawn", "seed": 7, "image_size": "square"}
BUCKET = "fal_images"
UNSTORED = "The result's files could not be stored."
# The direct calls after which clients call fal again, by client.
DIRECT = {"run": DEV, "stream": f"{SCHNELL}/stream"}
# These differ between equal calls: the duration, and the random names of fal's files.
VOLATILE = ("timings", "file_name")
# The gateway's own origin, and another one for browsers; the port is inserted later.
HERE, ELSEWHERE = "http://127.0.0.1:{port}", "http://localhost:{port}"
CLIENTS = ("javascript", "oldest sync", "oldest async", "newest sync", "newest async")
# One of each kind, for tests in which the client's version makes no difference.
FEW = pytest.mark.parametrize("play", ["javascript", "oldest sync", "newest async"], indirect=True)
TWO = pytest.mark.parametrize("play", ["javascript", "newest async"], indirect=True)


@dataclass(frozen=True, slots=True)
class RehostingWorld(ClientWorld):
    """A proxy that re-hosts outputs, with a fal and clients.

    kept: prefix of the URLs of stored files.
    names: Returns the names of all stored files.
    order: parameters of the next scenario in Node.
    statuses: of the responses of the proxy.
    """

    kept: str = ""
    names: Callable[[], list[str]] = list
    order: dict[str, Any] = field(default_factory=dict)
    statuses: list[int] = field(default_factory=list)

    def downloads(self, image: Mapping[str, Any]) -> list[str]:
        """Return fal's URL of an image, once for each request for the file."""
        paths = [seen.path for seen in self.sandbox.seen if seen.method == "GET"]
        return [self.fal + path for path in paths if path.endswith(f"/{image['file_name']}")]

    def source(self, image: Mapping[str, Any]) -> bytes:
        """Return fal's original of a stored image."""
        file = self.sandbox.files.find_by_url(self.downloads(image)[0])
        assert file is not None
        return file.read_bytes()

    def recorded(self, request_id: str) -> Any:
        """Return fal's result of a queued request."""
        job = self.sandbox.queue.get(request_id)
        assert job is not None
        assert job.response is not None
        return job.response.body

    async def directly(self, path: str) -> Any:
        """Return fal's result for a prompt without the proxy."""
        headers = {"Authorization": f"Key {CANARY}"}
        url = f"{self.fal}/fal.run/{path}"
        async with self.session.post(url, json=HERON, headers=headers) as response:
            assert response.status == 200
            return json.loads((await response.text()).rpartition("data: ")[2])

    async def check_stored(self, data: Mapping[str, Any]) -> None:
        """Check that every image is at its new URL with fal's bytes, named by their digest."""
        for image in data["images"]:
            source = self.source(image)
            digest = hashlib.sha256(source).hexdigest()
            assert image["url"] == f"{self.kept}{digest}.jpg"
            async with self.session.get(image["url"]) as response:
                assert response.status == 200
                assert response.headers["Content-Type"] == "image/jpeg" == image["content_type"]
                assert await response.read() == source


def without(document: Any, *keys: str) -> Any:
    """Return JSON without some keys, at any depth."""
    if isinstance(document, dict):
        return {key: without(value, *keys) for key, value in document.items() if key not in keys}
    if isinstance(document, list):
        return [without(value, *keys) for value in document]
    return document


def urls_of(data: Mapping[str, Any]) -> list[str]:
    return [image["url"] for image in data["images"]]


@dataclass(frozen=True, slots=True)
class Gateway:
    """An application around the proxy, with the pages that its clients need."""

    statuses: list[int] = field(default_factory=list)
    order: dict[str, Any] = field(default_factory=dict)

    def app(self, pages: Mapping[str, Path]) -> web.Application:
        @web.middleware
        async def record(request: web.Request, handler: Any) -> Any:
            response = await handler(request)
            self.statuses.append(response.status)
            return response

        async def send_order(request: web.Request) -> web.Response:
            return web.json_response(self.order)

        async def fixture(request: web.Request) -> web.Response:
            return web.Response(body=photo(), content_type="image/png")

        app = web.Application(middlewares=[record], handler_args={"handler_cancellation": True})
        app.router.add_get("/fixtures/order.json", send_order)
        app.router.add_get("/fixtures/photo.png", fixture)
        for path, directory in pages.items():
            app.router.add_static(path, directory)
        return app


def place_of(supabase: FakeSupabase | None, here: str) -> tuple[str, dict[str, Any]]:
    """Return the prefix of the URLs of stored files, and the settings. None: the proxy's disk."""
    if supabase is None:
        return f"{here}/files/", {"rehost": "disk"}
    given = {"supabase_url": supabase.url, "supabase_key": supabase.service_key}
    return f"{supabase.url}/storage/v1/object/public/{BUCKET}/", given


def names_in(supabase: FakeSupabase | None, data_dir: Path) -> list[str]:
    if supabase is None:
        return [file.name for file in files_in(data_dir / "files")]
    return [*supabase.objects(BUCKET)] if BUCKET in supabase.buckets else []


@asynccontextmanager
async def open_world(
    data_dir: Path, supabase: FakeSupabase | None, pages: Mapping[str, Path], **options: str
) -> AsyncIterator[RehostingWorld]:
    """The sandbox behind a proxy that stores outputs in Supabase or on its disk. At the end, every
    scenario is checked: fal was called with the proxy's key only.

    pages: directories that the application serves as well.
    """
    sandbox, gateway = Sandbox(speed=500), Gateway()
    app = gateway.app(pages)
    # The proxy's settings have its port in them.
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        here = HERE.format(port=port)
        given: dict[str, Any] = {name: value.format(port=port) for name, value in options.items()}
        stored, place = place_of(supabase, given.get("public_url", here))
        async with TestServer(create_sandbox(sandbox)) as server, ClientSession() as session:
            fal = sandbox.public_url = origin_of(server)
            place |= {"fal_key": CANARY, "upstream_origin": fal, "data_dir": data_dir}
            falproxy.setup(app, with_empty_ledger(make_settings(**place, **given)))
            async with TestServer(app, socket_factory=lambda *_: listening):
                yield RehostingWorld(
                    here,
                    fal,
                    sandbox,
                    session,
                    kept=stored,
                    names=partial(names_in, supabase, data_dir),
                    order=gateway.order,
                    statuses=gateway.statuses,
                )
    for call in sandbox.seen:
        check_credentials(call)


@pytest.fixture(params=["disk", "supabase"])
def place(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def options() -> dict[str, str]:
    """Settings of the proxy; classes override the fixture."""
    return {}


@pytest.fixture
async def fake() -> AsyncIterator[FakeSupabase]:
    async with FakeSupabase() as running:
        yield running


@pytest.fixture
async def world(
    tmp_path: Path, place: str, fake: FakeSupabase, options: dict[str, str]
) -> AsyncIterator[RehostingWorld]:
    supabase = fake if place == "supabase" else None
    async with open_world(tmp_path, supabase, {}, **options) as opened:
        yield opened


@pytest.fixture(params=CLIENTS)
def play(request: pytest.FixtureRequest, world: RehostingWorld) -> Play:
    """Run a scenario in every client. Names of scenarios in Node are in camel case."""
    if request.param == "javascript":
        return in_node(request.getfixturevalue("play_js"), world)
    version, kind = request.param.split()
    players: tuple[ScenarioProcess, ScenarioProcess] = request.getfixturevalue("both")
    return scenario_runner(players[version == "newest"], kind, world.gateway)


def in_node(play_js: Play, world: RehostingWorld) -> Play:
    async def play(scenario: str, /, **order: Any) -> Any:
        world.order.clear()
        world.order.update(order)
        return await play_js(re.sub(r"_(\w)", lambda match: match[1].upper(), scenario))

    return play


class TestAResult:
    async def test_differs_from_fals_own_in_its_urls_only(
        self, world: RehostingWorld, play: Play
    ) -> None:
        for made in await play("make_in_all_ways"):
            way, data = made["way"], made["data"]
            if way in DIRECT:  # the result is not cached: fal is called again
                unlike = {"url", *VOLATILE}
                fals = await world.directly(DIRECT[way])
                assert [entry.keys() for entry in data["images"]] == [fals["images"][0].keys()]
                assert data["timings"].keys() == fals["timings"].keys()
            else:
                unlike = {"url"}
                fals = world.recorded(made["id"])
            assert without(data, *unlike) == without(fals, *unlike), way
            assert list(data) == list(fals), way
            assert urls_of(fals)[0].startswith(world.fal)
            assert urls_of(data)[0].startswith(world.kept), way

    @FEW
    async def test_names_a_file_with_the_bytes_and_the_type_of_fals(
        self, world: RehostingWorld, play: Play
    ) -> None:
        for made in await play("make_in_all_ways"):
            await world.check_stored(made["data"])

    @FEW
    async def test_that_equals_another_is_the_same_file(
        self, world: RehostingWorld, play: Play
    ) -> None:
        made = await play("make_in_all_ways")
        *images, end_of_stream = [urls_of(one["data"])[0] for one in made]
        assert world.sandbox.jobs_by_endpoint[DEV] == len(made) - 2  # one result is requested twice
        assert len(set(images)) == 1
        names = {images[0].rpartition("/")[2], end_of_stream.rpartition("/")[2]}
        assert sorted(world.names()) == sorted(names)
        assert len(names) == 2

    @FEW
    async def test_of_four_images_names_four_files_in_order(
        self, world: RehostingWorld, play: Play
    ) -> None:
        made = await play("make_by_queue", endpoint=DEV, num_images=4, **HERON)
        fals = world.recorded(made["id"])
        assert without(made["data"], "url") == without(fals, "url")
        await world.check_stored(made["data"])
        urls = urls_of(made["data"])
        assert sorted(world.names()) == sorted(url.rpartition("/")[2] for url in urls)
        assert len(set(urls)) == 4
        for stored, own in zip(urls, urls_of(fals), strict=True):
            assert await world.download(stored) == await world.download(own)


async def test_a_result_of_fifty_concurrent_requests_is_fetched_and_stored_once(
    world: RehostingWorld, play: Play, fake: FakeSupabase, place: str
) -> None:
    fake.fail(delay(0.3), method="POST", path=f"/object/{BUCKET}/")  # so that they meet
    results = await play("result_fifty_times")
    assert len(results) == 50
    assert all(result == results[0] for result in results)
    await world.check_stored(results[0])
    assert len(world.downloads(results[0]["images"][0])) == 1
    assert len(world.names()) == 1
    assert fake.count("POST", f"/object/{BUCKET}/") == (place == "supabase")
    assert world.sandbox.jobs == 1


@FEW
async def test_a_repeated_edit_names_the_stored_file(
    world: RehostingWorld, play: Play, image_path: Path
) -> None:
    edits = await play("edit_in_all_ways", path=str(image_path), seed=21)
    assert len(edits) in (9, 12)
    assert world.sandbox.jobs == 1
    await world.check_stored(edits[0]["data"])
    for edit in edits:
        assert edit["data"] == edits[0]["data"], f"{edit['way']} with the {edit['form']}"
    assert len(world.downloads(edits[0]["data"]["images"][0])) == 1
    assert len(world.names()) == 1  # uploads of clients stay with fal


async def test_clients_of_every_language_get_the_same_url(
    world: RehostingWorld, play_js: Play, both: tuple[ScenarioProcess, ScenarioProcess]
) -> None:
    plays = [
        in_node(play_js, world),
        *(scenario_runner(one, "sync", world.gateway) for one in both),
    ]
    made = [await play("make_by_queue", endpoint=FROM_WORDS, **HERON) for play in plays]
    assert world.sandbox.jobs == 1
    await world.check_stored(made[0]["data"])
    assert [one["data"] for one in made] == [made[0]["data"]] * 3


class TestAKeptFile:
    @pytest.fixture
    def options(self) -> dict[str, str]:
        return {"public_url": HERE}

    async def test_is_the_input_of_the_next_call(self, world: RehostingWorld, play: Play) -> None:
        played = await play("edit_what_was_made")
        (url,) = urls_of(played["made"])
        paid = world.sandbox.paid[-1]
        assert paid.endpoint == KONTEXT
        assert isinstance(paid.input, dict)
        assert paid.input["image_url"] == url
        assert url.startswith(world.kept)
        await world.check_stored(played["edited"])
        assert played["again"] == played["edited"]
        assert world.sandbox.jobs == 2
        assert len(world.names()) == 2


class TestWhileSupabaseIsAway:
    @pytest.fixture
    def place(self) -> str:
        return "supabase"

    @TWO
    async def test_a_result_has_fals_url_and_the_next_one_the_stored_file_s(
        self, world: RehostingWorld, play: Play, fake: FakeSupabase
    ) -> None:
        await fake.stop()
        made = await play("make_by_queue", endpoint=DEV, **HERON)
        assert made["data"] == world.recorded(made["id"])
        assert urls_of(made["data"])[0].startswith(world.fal)
        await fake.start()
        found = await play("result_of", endpoint=DEV, request_id=made["id"])
        await world.check_stored(found)
        assert without(found, "url") == without(made["data"], "url")
        assert world.sandbox.jobs == 1

    @TWO
    async def test_a_cached_result_names_the_stored_file_afterwards(
        self,
        world: RehostingWorld,
        play: Play,
        fake: FakeSupabase,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        await fake.stop()
        made = await play("make_by_queue", endpoint=FROM_WORDS, **HERON)
        assert urls_of(made["data"])[0].startswith(world.fal)
        # It may be tried still when the result is given out.
        await wait_until(lambda: "An output was not stored" in caplog.text, seconds=90)
        await fake.start()
        again = await play("make_by_queue", endpoint=FROM_WORDS, **HERON)
        await world.check_stored(again["data"])
        assert without(again["data"], "url") == without(made["data"], "url")
        assert world.sandbox.jobs == 1


class TestTheStrictPolicy:
    @pytest.fixture
    def place(self) -> str:
        return "supabase"

    @pytest.fixture
    def options(self) -> dict[str, str]:
        return {"rehost_on_error": "error"}

    @TWO
    async def test_sends_results_with_stored_files(self, world: RehostingWorld, play: Play) -> None:
        for made in await play("make_in_all_ways"):
            await world.check_stored(made["data"])

    @FEW
    async def test_refuses_a_queued_result_with_a_message_and_loses_none(
        self, world: RehostingWorld, play: Play, fake: FakeSupabase
    ) -> None:
        await fake.stop()
        error = await play("result_error", endpoint=DEV, **HERON)
        assert error["status"] == 502
        # Both clients repeat the request for the result.
        failures = [status for status in world.statuses if status >= 400]
        assert len(failures) > 1
        assert {*failures} == {502}
        body = error["body"] if isinstance(error["body"], dict) else json.loads(error["body"])
        assert body["type"] == "rehost_failed"
        assert error["message"] == body["detail"] == UNSTORED
        assert world.fal not in json.dumps(error)

        await fake.start()
        found = await play("result_of", endpoint=DEV, request_id=error["id"])
        await world.check_stored(found)
        assert world.sandbox.jobs == 1

    async def test_has_node_s_client_retry_until_the_result_is_stored(
        self, world: RehostingWorld, play_js: Play, fake: FakeSupabase
    ) -> None:
        await fake.stop()
        play = in_node(play_js, world)
        async with asyncio.TaskGroup() as group:
            playing = group.create_task(play("make_by_queue", endpoint=DEV, **HERON))
            await wait_until(lambda: 502 in world.statuses, seconds=90)
            await fake.start()
        await world.check_stored(playing.result()["data"])
        assert world.sandbox.jobs == 1

    async def test_has_node_s_client_retry_a_run_whose_result_is_cached(
        self, world: RehostingWorld, play_js: Play, fake: FakeSupabase
    ) -> None:
        await fake.stop()
        play = in_node(play_js, world)
        async with asyncio.TaskGroup() as group:
            playing = group.create_task(play("make_by_run", endpoint=FROM_WORDS, **HERON))
            await wait_until(lambda: 502 in world.statuses, seconds=90)
            await fake.start()
        await world.check_stored(playing.result())
        assert world.sandbox.jobs == 1

    @FEW
    async def test_pays_for_one_job_if_the_result_of_a_run_is_lost(
        self, world: RehostingWorld, play: Play, fake: FakeSupabase
    ) -> None:
        await fake.stop()
        error = await play("run_error", endpoint=DEV, **HERON)
        assert error["status"] == 504
        assert error["message"] == UNSTORED
        assert world.sandbox.jobs == 1
        assert [seen.path for seen in world.sandbox.seen if seen.host == "fal.run"] == [f"/{DEV}"]
        assert [status for status in world.statuses if status != 200] == [504]

    @TWO
    async def test_closes_a_stream_before_an_event_with_fals_url(
        self, world: RehostingWorld, play: Play, fake: FakeSupabase
    ) -> None:
        await fake.stop()
        error = await play("endless_stream", **HERON)
        assert error["name"] in ("ApiError", "ReadError", "RemoteProtocolError")
        assert error["events"] == 3  # of four
        assert world.sandbox.jobs == 1


@pytest.mark.parametrize(
    ("place", "options", "is_foreign"),
    [
        pytest.param("disk", {}, False, id="from its own origin"),
        pytest.param("disk", {"public_url": ELSEWHERE}, True, id="from another origin"),
        pytest.param("supabase", {}, True, id="from Supabase"),
    ],
)
async def test_a_page_shows_the_stored_image(
    place: str,
    options: dict[str, str],
    is_foreign: bool,
    fake: FakeSupabase,
    bundle: Path,
    chromium: Chromium,
    tmp_path: Path,
) -> None:
    supabase = fake if place == "supabase" else None
    async with open_world(tmp_path, supabase, {"/scenarios": bundle}, **options) as world:
        shown = await chromium.play(scenario="showImage", gateway=world.gateway, sandbox=world.fal)
        await world.check_stored(shown["data"])
    assert (shown["width"], shown["height"]) == (512, 512)
    assert (not world.kept.startswith(f"{shown['page']}/")) is is_foreign
