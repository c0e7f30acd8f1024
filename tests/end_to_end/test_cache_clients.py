"""Result cache with fal's own clients: @fal-ai/client and fal_client 1.x."""

import asyncio
import base64
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from falproxy.sandbox.state import SeenRequest
from falproxy.stores.cache.virtual_requests import is_virtual_id
from tests.support.cache_world import open_world
from tests.support.fal_client_world import (
    ClientWorld,
    ScenarioProcess,
    photo,
    scenario_runner,
)
from tests.support.js_world import KONTEXT, Play
from tests.support.waiting import wait_until

EDIT = {"prompt": "make it winter", "seed": 21}
SLOW = {"prompt": "!delay 1.2 make it winter", "seed": 21}
SUBMITTED = ("status", "request_id", "queue_position")
COMPLETED = ("status", "request_id", "logs", "metrics")
URLS = ("status_url", "response_url", "cancel_url")
HTML = b"<!doctype html><title>Not Found</title>"
PRIVATE_URL = "http://127.0.0.1:9/photo.png"
# Error types of fal (docs.fal.ai/errors).
ERROR_TYPES = {"page": "unsupported_image_format", "inside": "image_load_error"}
BOTH_POSITIONS = pytest.mark.parametrize(
    "which", ["TheFirst", "ALaterOne"], ids=["leader", "follower"]
)


@pytest.fixture
async def world(tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[ClientWorld]:
    """A world. The parameter of the fixture: settings of the proxy."""
    async with open_world(tmp_path, **getattr(request, "param", {})) as opened:
        yield opened


@pytest.fixture
def play_py(world: ClientWorld, scenario_process: ScenarioProcess, client_kind: str) -> Play:
    return scenario_runner(scenario_process, client_kind, world.gateway)


def model_calls(world: ClientWorld) -> list[SeenRequest]:
    """Return the requests to the model hosts of fal."""
    return [seen for seen in world.sandbox.seen if seen.host in ("fal.run", "queue.fal.run")]


def proxied_targets(world: ClientWorld, prefix: str) -> list[str]:
    """Return the targets of proxied requests that start with a prefix."""
    targets = [request.headers.get("x-fal-target-url", "") for request in world.proxy_requests]
    return [target for target in targets if target.startswith(prefix)]


def sent_calls(world: ClientWorld) -> int:
    """Return the number of model calls that reached fal."""
    return sum(seen.method == "POST" for seen in model_calls(world))


def cancels(world: ClientWorld) -> list[int]:
    return [seen.status for seen in world.sandbox.seen if seen.path.endswith("/cancel")]


def data_uri(content: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


async def test_an_image_is_the_same_in_every_form_and_language(
    world: ClientWorld,
    play_js: Play,
    both: tuple[ScenarioProcess, ScenarioProcess],
    image_path: Path,
) -> None:
    oldest = scenario_runner(both[0], "sync", world.gateway)
    newest = scenario_runner(both[1], "async", world.gateway)
    edits = await oldest("edit_in_all_ways", path=str(image_path), seed=21)
    edits += await play_js("editInAllWays")
    edits += await newest("edit_in_all_ways", path=str(image_path), seed=21)
    assert world.sandbox.jobs == 1
    assert len(edits) == 9 + 12 + 9
    output = edits[0]["data"]
    for edit in edits:
        assert edit["data"] == output, f"{edit['way']} with the {edit['form']}"

    another = (await play_js("editWithAnotherSeed"))["data"]
    others = await newest("edit_in_all_ways", path=str(image_path), seed=22)
    assert world.sandbox.jobs == 2
    assert all(other["data"] == another for other in others)

    image_url = data_uri(photo())
    rendered = await world.result_image(output)
    assert rendered == await world.made_directly(KONTEXT, **EDIT, image_url=image_url)
    assert rendered != await world.result_image(another)


async def test_every_call_has_a_request_id_of_its_own(
    world: ClientWorld, play_js: Play, play_py: Play, image_path: Path
) -> None:
    edits = await play_js("editInAllWays")
    ids = [edit["requestId"] for edit in edits]
    assert [edit["requestId"] for edit in edits if "enqueued" in edit] == [
        edit["enqueued"] for edit in edits if "enqueued" in edit
    ]
    for edit in await play_py("edit_in_all_ways", path=str(image_path), seed=21):
        ids += [edit["id"]] if edit["way"] != "run" else []
    assert all(ids)
    assert len(set(ids)) == len(ids) == 12 + 6


class TestAHitInJavaScript:
    @pytest.mark.parametrize("world", [{}, {"cache": False}], ids=["hit", "fal"], indirect=True)
    async def test_has_the_documents_of_fal(self, play_js: Play) -> None:
        outcome = await play_js("askAboutAnEdit")
        assert outcome["submitted"].keys() - {"gateway_request_id"} == {*SUBMITTED, *URLS}
        for status in (outcome["status"], outcome["statusWithLogs"], outcome["events"][-1]):
            assert status.keys() == {*COMPLETED, *URLS}
        assert outcome["status"]["logs"] is None
        assert isinstance(outcome["statusWithLogs"]["logs"], list)
        assert outcome["cancel"]["body"] == {"status": "ALREADY_COMPLETED"}
        # Two statuses, their stream, the result, a cancel, the result once more.
        assert outcome["statuses"] == [200, 200, 200, 200, 400, 200]

    async def test_sends_nothing_to_fal(self, world: ClientWorld, play_js: Play) -> None:
        outcome = await play_js("askAboutAnEdit")
        first = outcome["first"]
        for way in ("polled", "streamed", "result", "resultAfterwards"):
            assert outcome[way]["data"] == first["data"], way
        paths = [seen.path for seen in model_calls(world)]
        assert world.sandbox.jobs == 1
        assert not [path for path in paths if first["requestId"] not in path][1:]

    @pytest.mark.parametrize("way", ["polled", "streamed"])
    async def test_has_updates_for_a_subscription(self, play_js: Play, way: str) -> None:
        edit = (await play_js("askAboutAnEdit"))[way]
        assert edit["enqueued"] == edit["requestId"]
        assert [update["status"] for update in edit["updates"]] == ["COMPLETED"]
        assert edit["updates"][0]["request_id"] == edit["requestId"]
        assert edit["updates"][0]["logs"] == []

    async def test_responds_to_requests_about_its_id(self, play_js: Play) -> None:
        outcome = await play_js("askAboutAnEdit")
        request_id = outcome["submitted"]["request_id"]
        assert is_virtual_id(request_id)
        url = f"https://queue.fal.run/fal-ai/flux-pro/requests/{request_id}"
        assert outcome["submitted"]["status"] == "IN_QUEUE"
        assert outcome["submitted"]["response_url"] == url
        assert outcome["submitted"]["status_url"] == f"{url}/status"
        assert outcome["submitted"]["cancel_url"] == f"{url}/cancel"
        assert outcome["status"]["status"] == "COMPLETED"
        assert outcome["status"]["logs"] is None
        assert outcome["statusWithLogs"]["logs"] == []
        assert [event["status"] for event in outcome["events"]] == ["COMPLETED"]
        assert outcome["events"][0]["request_id"] == request_id
        assert outcome["result"]["requestId"] == request_id
        assert outcome["cancel"]["name"] == "ApiError"
        assert outcome["cancel"]["status"] == 400
        assert outcome["cancel"]["body"] == {"status": "ALREADY_COMPLETED"}
        assert outcome["cancel"]["requestId"] == request_id


class TestAHitInPython:
    async def test_responds_to_requests_about_its_id(
        self, world: ClientWorld, play_py: Play, image_path: Path
    ) -> None:
        outcome = await play_py("ask_about_an_edit", path=str(image_path))
        assert world.sandbox.jobs == 1
        job, first = outcome["job"], outcome["first"]
        url = f"https://queue.fal.run/fal-ai/flux-pro/requests/{job['id']}"
        assert is_virtual_id(job["id"])
        assert job["urls"] == [f"{url}/status", url, f"{url}/cancel"]
        assert outcome["status"]["is"] == "Completed"
        assert outcome["status"]["logs"] is None
        assert outcome["status_with_logs"]["logs"] == []
        assert [event["is"] for event in outcome["events"]] == ["Completed"]
        assert outcome["data"] == first
        assert (outcome["cancel"]["name"], outcome["cancel"]["status"]) == (
            "FalClientHTTPError",
            400,
        )
        assert json.loads(outcome["cancel"]["body"]) == {"status": "ALREADY_COMPLETED"}
        assert outcome["by_id"]["status"]["is"] == "Completed"
        assert outcome["by_id"]["data"] == first
        assert outcome["by_id"]["cancel"]["status"] == 400

    async def test_has_updates_for_a_subscription(
        self, world: ClientWorld, play_py: Play, image_path: Path
    ) -> None:
        outcome = await play_py("ask_about_an_edit", path=str(image_path))
        subscribed = outcome["subscribed"]
        assert subscribed["id"] != outcome["job"]["id"]
        assert [update["is"] for update in subscribed["updates"]] == ["Completed"]
        assert subscribed["updates"][0]["logs"] == []
        assert isinstance(subscribed["updates"][0]["metrics"], dict)
        assert subscribed["data"] == outcome["first"]


class TestASharedJob:
    @pytest.mark.parametrize(
        ("scenario", "has_logs"),
        [
            pytest.param("editInAllWaysAtOnce", True, id="queue"),
            # A direct call has no logs.
            pytest.param("editByRunFirst", False, id="direct call"),
        ],
    )
    async def test_serves_every_way_to_call(
        self, world: ClientWorld, play_js: Play, scenario: str, has_logs: bool
    ) -> None:
        edits = await play_js(scenario)
        assert world.sandbox.jobs == 1
        assert sent_calls(world) == 1
        assert all(edit["data"] == edits[0]["data"] for edit in edits)
        assert len({edit["requestId"] for edit in edits}) == 4
        watched = [edit for edit in edits if "updates" in edit]
        assert len(watched) == 2
        for edit in watched:
            assert {update["request_id"] for update in edit["updates"]} == {edit["requestId"]}
            assert edit["enqueued"] == edit["requestId"]
            statuses = list(dict.fromkeys(update["status"] for update in edit["updates"]))
            assert statuses[-2:] == ["IN_PROGRESS", "COMPLETED"]
            assert bool(edit["updates"][-1]["logs"]) is has_logs

    async def test_that_is_a_direct_call_is_not_cancelled(
        self, world: ClientWorld, play_js: Play
    ) -> None:
        outcome = await play_js("cancelWhatWaitsForARun")
        assert sent_calls(world) == 1
        assert cancels(world) == []
        assert outcome["before"]["status"] == "IN_PROGRESS"
        assert outcome["last"]["status"] == "COMPLETED"
        assert (outcome["error"]["name"], outcome["error"]["status"]) == ("ApiError", 499)
        assert (await world.result_image(outcome["run"]["data"])).size == (512, 384)

    @pytest.mark.parametrize(
        "scenario",
        [
            pytest.param("shareAndCancelTheFirst", id="leader cancels"),
            pytest.param("shareAndCancelTheSecond", id="follower cancels"),
        ],
    )
    async def test_goes_on_for_the_other_when_one_cancels(
        self, world: ClientWorld, play_js: Play, scenario: str
    ) -> None:
        outcome = await play_js(scenario)
        request_id, cancelled, kept = (outcome[name] for name in ("requestId", "cancelled", "kept"))
        assert world.sandbox.jobs == 1
        assert cancels(world) == []
        assert kept["requestId"] not in ("", request_id)
        assert kept["last"]["request_id"] == kept["requestId"]
        assert (await world.result_image(kept["data"])).size == (512, 384)
        assert cancelled["last"]["status"] == "COMPLETED"
        assert cancelled["last"]["error_type"] == "client_cancelled"
        assert cancelled["last"]["request_id"] == request_id
        assert [event["status"] for event in cancelled["events"]] == ["COMPLETED"]
        assert (cancelled["error"]["name"], cancelled["error"]["status"]) == ("ApiError", 499)
        assert cancelled["error"]["requestId"] == request_id
        assert cancelled["again"]["body"] == {"status": "ALREADY_COMPLETED"}

    async def test_is_cancelled_at_fal_by_its_last_holder(
        self, world: ClientWorld, play_js: Play
    ) -> None:
        ends = await play_js("shareAndCancelBoth")
        assert cancels(world) == [202]
        assert world.sandbox.jobs == 0
        for end in ends:
            assert end["last"]["status"] == "COMPLETED"
            assert (end["error"]["name"], end["error"]["status"]) == ("ApiError", 499)

    async def test_serves_clients_of_every_language(
        self, world: ClientWorld, play_js: Play, both: tuple[ScenarioProcess, ScenarioProcess]
    ) -> None:
        inputs = {**SLOW, "image_url": data_uri(photo())}
        oldest = scenario_runner(both[0], "sync", world.gateway)
        newest = scenario_runner(both[1], "async", world.gateway)
        async with asyncio.TaskGroup() as group:
            in_js = group.create_task(play_js("editSlowly"))
            await wait_until(
                lambda: bool(proxied_targets(world, "https://queue.fal.run/")), seconds=90
            )
            cancelling = group.create_task(oldest("edit_by_submit", is_cancelled=True, **inputs))
            waiting = group.create_task(newest("edit_by_submit", is_cancelled=False, **inputs))
        edit, left, kept = in_js.result(), cancelling.result(), waiting.result()
        assert world.sandbox.jobs == 1
        assert cancels(world) == []
        assert kept["data"] == edit["data"]
        assert len({edit["requestId"], left["id"], kept["id"]}) == 3
        assert {update["request_id"] for update in edit["updates"]} == {edit["requestId"]}
        assert edit["updates"][-1]["logs"]
        assert (left["last"]["is"], left["error"]["status"]) == ("Completed", 499)
        assert left["error"]["name"] == "FalClientHTTPError"


class TestAnAbortedCall:
    @BOTH_POSITIONS
    @pytest.mark.parametrize("way", ["Runs", "Subscriptions"])
    async def test_does_not_end_equal_calls(
        self, world: ClientWorld, play_js: Play, which: str, way: str
    ) -> None:
        outcome = await play_js(f"abort{which}OfEqual{way}")
        assert outcome["error"]["name"] == "AbortError"
        assert world.sandbox.jobs == 1
        one, other = outcome["others"]
        assert one["data"] == other["data"]
        assert one["requestId"] != other["requestId"]
        assert sent_calls(world) == 1
        assert 499 not in [seen.status for seen in world.sandbox.seen]
        assert cancels(world) == []
        assert (await world.result_image(one["data"])).size == (512, 384)

    async def test_is_not_paid_for_again(self, world: ClientWorld, play_js: Play) -> None:
        outcome = await play_js("abortAndEditAgain")
        assert outcome["error"]["name"] == "AbortError"
        assert (await world.result_image(outcome["again"]["data"])).size == (512, 384)
        assert world.sandbox.jobs == 1

    async def test_does_not_end_equal_calls_in_python(
        self, world: ClientWorld, play_js: Play, both: tuple[ScenarioProcess, ScenarioProcess]
    ) -> None:
        inputs = {**SLOW, "image_url": data_uri(photo())}
        oldest = scenario_runner(both[0], "sync", world.gateway)
        newest = scenario_runner(both[1], "async", world.gateway)
        async with asyncio.TaskGroup() as group:
            in_js = group.create_task(play_js("abortAndEditAgain"))
            await wait_until(lambda: bool(proxied_targets(world, "https://fal.run/")), seconds=90)
            submits = [
                group.create_task(play("edit_by_submit", is_cancelled=False, **inputs))
                for play in (oldest, newest)
            ]
        assert world.sandbox.jobs == 1
        for submit in submits:
            assert submit.result()["data"] == in_js.result()["again"]["data"]


class TestAnInvalidImage:
    async def test_is_a_validation_error_in_javascript(
        self, world: ClientWorld, play_js: Play
    ) -> None:
        failures = await play_js("editInvalidImages")
        assert len(failures) == 8
        for failed in failures:
            assert (failed["name"], failed["status"]) == ("ValidationError", 422), failed
            (entry,) = failed["fieldErrors"]
            assert entry["loc"] == ["body", "image_url"]
            assert entry["type"] == ERROR_TYPES[failed["form"]]
            assert entry["msg"]
        assert world.sandbox.seen == []

    async def test_is_a_validation_error_in_javascript_when_it_was_uploaded(
        self, world: ClientWorld, play_js: Play
    ) -> None:
        failed = await play_js("editAnUploadedPage")
        assert (failed["name"], failed["status"]) == ("ValidationError", 422)
        assert failed["fieldErrors"][0]["loc"] == ["body", "image_url"]
        assert model_calls(world) == []

    @pytest.mark.parametrize(
        ("url", "refusal"),
        [
            pytest.param(data_uri(HTML), ERROR_TYPES["page"], id="HTML"),
            pytest.param(PRIVATE_URL, ERROR_TYPES["inside"], id="private address"),
        ],
    )
    @pytest.mark.parametrize("scenario", ["run_error", "submit_error"])
    async def test_is_a_422_in_python(
        self, world: ClientWorld, play_py: Play, scenario: str, url: str, refusal: str
    ) -> None:
        error = await play_py(scenario, endpoint=KONTEXT, image_url=url, **EDIT)
        assert (error["name"], error["status"]) == ("FalClientHTTPError", 422)
        (entry,) = error["message"]
        assert entry["loc"] == ["body", "image_url"]
        assert entry["type"] == refusal
        assert json.loads(error["body"])["detail"] == [entry]
        assert world.sandbox.seen == []

    async def test_is_a_422_in_python_when_it_was_uploaded(
        self, world: ClientWorld, play_py: Play, tmp_path: Path
    ) -> None:
        path = tmp_path / "photo.png"
        path.write_bytes(HTML)
        error = await play_py("edit_an_upload", path=str(path))
        assert (error["name"], error["status"]) == ("FalClientHTTPError", 422)
        assert error["message"][0]["loc"] == ["body", "image_url"]
        assert model_calls(world) == []
