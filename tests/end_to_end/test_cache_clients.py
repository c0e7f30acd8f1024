"""Results that are reused, as fal's own clients meet them: @fal-ai/client and fal_client 1.x."""

import asyncio
import base64
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from falproxy.sandbox.state import SeenRequest
from falproxy.stores.cache.virtual_ids import is_virtual_id
from tests.support.cache_world import open_world
from tests.support.fal_client_world import (
    ClientWorld,
    ScenarioProcess,
    photo,
    scenario_runner,
)
from tests.support.js_world import KONTEXT, Play, until

EDIT = {"prompt": "make it winter", "seed": 21}
SLOW = {"prompt": "!delay 1.2 make it winter", "seed": 21}
SUBMITTED = ("status", "request_id", "queue_position")
COMPLETED = ("status", "request_id", "logs", "metrics")
ADDRESSES = ("status_url", "response_url", "cancel_url")
PAGE = b"<!doctype html><title>Not Found</title>"
INSIDE = "http://127.0.0.1:9/photo.png"
# fal's words for them (docs.fal.ai/errors).
REFUSALS = {"page": "unsupported_image_format", "inside": "image_load_error"}
BOTH_PLACES = pytest.mark.parametrize(
    "which", ["TheFirst", "ALaterOne"], ids=["who leads", "who follows"]
)


@pytest.fixture
async def world(tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[ClientWorld]:
    """Its parameters are settings of the proxy."""
    async with open_world(tmp_path, **getattr(request, "param", {})) as opened:
        yield opened


@pytest.fixture
def play_py(world: ClientWorld, scenario_process: ScenarioProcess, client_kind: str) -> Play:
    return scenario_runner(scenario_process, client_kind, world.gateway)


def model_calls(world: ClientWorld) -> list[SeenRequest]:
    """What fal was asked about models, by whomever."""
    return [seen for seen in world.sandbox.seen if seen.host in ("fal.run", "queue.fal.run")]


def asked(world: ClientWorld, prefix: str) -> list[str]:
    """The targets below a URL that the proxy was asked for."""
    targets = [request.headers.get("x-fal-target-url", "") for request in world.proxy_requests]
    return [target for target in targets if target.startswith(prefix)]


def sent(world: ClientWorld) -> int:
    """How many calls of models came to fal, whatever became of them."""
    return sum(seen.method == "POST" for seen in model_calls(world))


def cancels(world: ClientWorld) -> list[int]:
    return [seen.status for seen in world.sandbox.seen if seen.path.endswith("/cancel")]


def data_uri(content: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


async def test_a_picture_is_itself_in_every_form_and_language(
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
    made = await world.result_image(output)
    assert made == await world.made_directly(KONTEXT, **EDIT, image_url=image_url)
    assert made != await world.result_image(another)


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
    @pytest.mark.parametrize(
        "world", [{}, {"cache": False}], ids=["a hit", "fal itself"], indirect=True
    )
    async def test_is_told_as_fal_tells_an_edit(self, play_js: Play) -> None:
        played = await play_js("askAboutAnEdit")
        assert played["submitted"].keys() - {"gateway_request_id"} == {*SUBMITTED, *ADDRESSES}
        for status in (played["status"], played["statusWithLogs"], played["events"][-1]):
            assert status.keys() == {*COMPLETED, *ADDRESSES}
        assert played["status"]["logs"] is None
        assert isinstance(played["statusWithLogs"]["logs"], list)
        assert played["cancel"]["body"] == {"status": "ALREADY_COMPLETED"}
        # Two statuses, their stream, the result, a cancel, the result once more.
        assert played["statuses"] == [200, 200, 200, 200, 400, 200]

    async def test_costs_fal_nothing_whatever_is_asked_about_it(
        self, world: ClientWorld, play_js: Play
    ) -> None:
        played = await play_js("askAboutAnEdit")
        first = played["first"]
        for way in ("polled", "streamed", "result", "resultAfterwards"):
            assert played[way]["data"] == first["data"], way
        asked = [seen.path for seen in model_calls(world)]
        assert world.sandbox.jobs == 1
        assert not [path for path in asked if first["requestId"] not in path][1:]

    @pytest.mark.parametrize("way", ["polled", "streamed"])
    async def test_has_updates_for_a_subscription(self, play_js: Play, way: str) -> None:
        edit = (await play_js("askAboutAnEdit"))[way]
        assert edit["enqueued"] == edit["requestId"]
        assert [update["status"] for update in edit["updates"]] == ["COMPLETED"]
        assert edit["updates"][0]["request_id"] == edit["requestId"]
        assert edit["updates"][0]["logs"] == []

    async def test_answers_for_its_id(self, play_js: Play) -> None:
        played = await play_js("askAboutAnEdit")
        request_id = played["submitted"]["request_id"]
        assert is_virtual_id(request_id)
        url = f"https://queue.fal.run/fal-ai/flux-pro/requests/{request_id}"
        assert played["submitted"]["status"] == "IN_QUEUE"
        assert played["submitted"]["response_url"] == url
        assert played["submitted"]["status_url"] == f"{url}/status"
        assert played["submitted"]["cancel_url"] == f"{url}/cancel"
        assert played["status"]["status"] == "COMPLETED"
        assert played["status"]["logs"] is None
        assert played["statusWithLogs"]["logs"] == []
        assert [event["status"] for event in played["events"]] == ["COMPLETED"]
        assert played["events"][0]["request_id"] == request_id
        assert played["result"]["requestId"] == request_id
        assert played["cancel"]["name"] == "ApiError"
        assert played["cancel"]["status"] == 400
        assert played["cancel"]["body"] == {"status": "ALREADY_COMPLETED"}
        assert played["cancel"]["requestId"] == request_id


class TestAHitInPython:
    async def test_answers_for_its_id(
        self, world: ClientWorld, play_py: Play, image_path: Path
    ) -> None:
        played = await play_py("ask_about_an_edit", path=str(image_path))
        assert world.sandbox.jobs == 1
        job, first = played["job"], played["first"]
        url = f"https://queue.fal.run/fal-ai/flux-pro/requests/{job['id']}"
        assert is_virtual_id(job["id"])
        assert job["urls"] == [f"{url}/status", url, f"{url}/cancel"]
        assert played["status"]["is"] == "Completed"
        assert played["status"]["logs"] is None
        assert played["status_with_logs"]["logs"] == []
        assert [event["is"] for event in played["events"]] == ["Completed"]
        assert played["data"] == first
        assert (played["cancel"]["name"], played["cancel"]["status"]) == ("FalClientHTTPError", 400)
        assert json.loads(played["cancel"]["body"]) == {"status": "ALREADY_COMPLETED"}
        assert played["by_id"]["status"]["is"] == "Completed"
        assert played["by_id"]["data"] == first
        assert played["by_id"]["cancel"]["status"] == 400

    async def test_has_updates_for_a_subscription(
        self, world: ClientWorld, play_py: Play, image_path: Path
    ) -> None:
        played = await play_py("ask_about_an_edit", path=str(image_path))
        subscribed = played["subscribed"]
        assert subscribed["id"] != played["job"]["id"]
        assert [update["is"] for update in subscribed["updates"]] == ["Completed"]
        assert subscribed["updates"][0]["logs"] == []
        assert isinstance(subscribed["updates"][0]["metrics"], dict)
        assert subscribed["data"] == played["first"]


class TestASharedJob:
    @pytest.mark.parametrize(
        ("scenario", "has_logs"),
        [
            pytest.param("editInAllWaysAtOnce", True, id="through the queue"),
            # A direct call has no logs that anybody could ask for.
            pytest.param("editByRunFirst", False, id="a direct call"),
        ],
    )
    async def test_serves_every_way_to_call(
        self, world: ClientWorld, play_js: Play, scenario: str, has_logs: bool
    ) -> None:
        edits = await play_js(scenario)
        assert world.sandbox.jobs == 1
        assert sent(world) == 1
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

    async def test_that_is_a_direct_call_does_not_hear_of_a_cancel(
        self, world: ClientWorld, play_js: Play
    ) -> None:
        played = await play_js("cancelWhatWaitsForARun")
        assert sent(world) == 1
        assert cancels(world) == []
        assert played["before"]["status"] == "IN_PROGRESS"
        assert played["last"]["status"] == "COMPLETED"
        assert (played["error"]["name"], played["error"]["status"]) == ("ApiError", 499)
        assert (await world.result_image(played["run"]["data"])).size == (512, 384)

    @pytest.mark.parametrize(
        "scenario",
        [
            pytest.param("shareAndCancelTheFirst", id="who has it from fal cancels"),
            pytest.param("shareAndCancelTheSecond", id="who joined cancels"),
        ],
    )
    async def test_goes_on_for_the_other_when_one_cancels(
        self, world: ClientWorld, play_js: Play, scenario: str
    ) -> None:
        played = await play_js(scenario)
        request_id, cancelled, kept = (played[name] for name in ("requestId", "cancelled", "kept"))
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

    async def test_is_cancelled_at_fal_by_the_last_who_has_it(
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
            await until(lambda: bool(asked(world, "https://queue.fal.run/")))
            leaver = group.create_task(oldest("edit_by_submit", is_cancelled=True, **inputs))
            stayer = group.create_task(newest("edit_by_submit", is_cancelled=False, **inputs))
        edit, left, kept = in_js.result(), leaver.result(), stayer.result()
        assert world.sandbox.jobs == 1
        assert cancels(world) == []
        assert kept["data"] == edit["data"]
        assert len({edit["requestId"], left["id"], kept["id"]}) == 3
        assert {update["request_id"] for update in edit["updates"]} == {edit["requestId"]}
        assert edit["updates"][-1]["logs"]
        assert (left["last"]["is"], left["error"]["status"]) == ("Completed", 499)
        assert left["error"]["name"] == "FalClientHTTPError"


class TestAnAbortedCall:
    @BOTH_PLACES
    @pytest.mark.parametrize("way", ["Runs", "Subscriptions"])
    async def test_leaves_equal_ones_alone(
        self, world: ClientWorld, play_js: Play, which: str, way: str
    ) -> None:
        played = await play_js(f"abort{which}OfEqual{way}")
        assert played["error"]["name"] == "AbortError"
        assert world.sandbox.jobs == 1
        one, other = played["others"]
        assert one["data"] == other["data"]
        assert one["requestId"] != other["requestId"]
        assert sent(world) == 1
        assert 499 not in [seen.status for seen in world.sandbox.seen]
        assert cancels(world) == []
        assert (await world.result_image(one["data"])).size == (512, 384)

    async def test_is_not_paid_for_again(self, world: ClientWorld, play_js: Play) -> None:
        played = await play_js("abortAndEditAgain")
        assert played["error"]["name"] == "AbortError"
        assert (await world.result_image(played["again"]["data"])).size == (512, 384)
        assert world.sandbox.jobs == 1

    async def test_leaves_those_in_python_alone(
        self, world: ClientWorld, play_js: Play, both: tuple[ScenarioProcess, ScenarioProcess]
    ) -> None:
        inputs = {**SLOW, "image_url": data_uri(photo())}
        oldest = scenario_runner(both[0], "sync", world.gateway)
        newest = scenario_runner(both[1], "async", world.gateway)
        async with asyncio.TaskGroup() as group:
            in_js = group.create_task(play_js("abortAndEditAgain"))
            await until(lambda: bool(asked(world, "https://fal.run/")))
            submits = [
                group.create_task(play("edit_by_submit", is_cancelled=False, **inputs))
                for play in (oldest, newest)
            ]
        assert world.sandbox.jobs == 1
        for submit in submits:
            assert submit.result()["data"] == in_js.result()["again"]["data"]


class TestWhatIsNoPicture:
    async def test_is_a_validation_error_in_javascript(
        self, world: ClientWorld, play_js: Play
    ) -> None:
        failures = await play_js("editInvalidImages")
        assert len(failures) == 8
        for failed in failures:
            assert (failed["name"], failed["status"]) == ("ValidationError", 422), failed
            (entry,) = failed["fieldErrors"]
            assert entry["loc"] == ["body", "image_url"]
            assert entry["type"] == REFUSALS[failed["form"]]
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
            pytest.param(data_uri(PAGE), REFUSALS["page"], id="a page"),
            pytest.param(INSIDE, REFUSALS["inside"], id="an address inside"),
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
        path.write_bytes(PAGE)
        error = await play_py("edit_an_upload", path=str(path))
        assert (error["name"], error["status"]) == ("FalClientHTTPError", 422)
        assert error["message"][0]["loc"] == ["body", "image_url"]
        assert model_calls(world) == []
