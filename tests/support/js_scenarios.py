"""What must hold wherever @fal-ai/client runs: in Node, and in Chromium."""

import pytest

from tests.support.js_world import DEV, KONTEXT, Play, World, large, photo
from tests.support.key_search import CANARY
from tests.support.waiting import wait_until


class Scenarios:
    """The contract of @fal-ai/client in every environment."""

    async def test_a_run_returns_the_image_that_fal_generates(
        self, world: World, play: Play
    ) -> None:
        result = await play("run")
        assert world.sandbox.jobs == 1
        assert world.sandbox.keys_seen == {f"Key {CANARY}"}
        assert result["requestId"]
        image = await world.result_image(result["data"])
        assert image.size == (512, 512)
        inputs = {"prompt": "a heron at dawn", "seed": 7, "image_size": "square"}
        assert image == await world.made_directly(DEV, **inputs)
        assert image != await world.made_directly(DEV, **{**inputs, "seed": 8})

    @pytest.mark.parametrize("scenario", ["subscribeByPolling", "subscribeByStreaming"])
    async def test_a_subscription_receives_queue_status_logs_and_result(
        self, world: World, play: Play, scenario: str
    ) -> None:
        result = await play(scenario)
        assert world.sandbox.jobs == 1
        assert result["enqueued"]
        updates = result["updates"]
        statuses = list(dict.fromkeys(update["status"] for update in updates))
        assert statuses[-2:] == ["IN_PROGRESS", "COMPLETED"]
        assert statuses[:-2] in ([], ["IN_QUEUE"])  # a runner may be free before the first poll
        assert updates[-1]["logs"]
        image = await world.result_image(result["data"])
        assert image == await world.made_directly(
            DEV, prompt="!delay 0.4 a paper boat on a river", seed=11
        )

    async def test_submit_status_and_result_are_three_calls_for_one_job(
        self, world: World, play: Play
    ) -> None:
        result = await play("submitStatusResult")
        assert world.sandbox.jobs == 1
        request_id = result["submitted"]["request_id"]
        # The header route returns fal's own URLs: the client uses none of them.
        assert result["submitted"]["status_url"].startswith("https://queue.fal.run/")
        assert result["last"]["request_id"] == request_id
        assert result["result"]["requestId"] == request_id
        assert result["result"]["data"]["seed"] == 3

    @pytest.mark.timed
    async def test_a_running_job_can_be_cancelled(self, world: World, play: Play) -> None:
        result = await play("cancelRunning")
        assert result["milliseconds"] < 2000  # the job itself would take five seconds
        assert result["error"]["name"] == "ApiError"
        assert result["error"]["status"] == 499
        assert world.sandbox.jobs == 0

    async def test_a_cancel_after_completion_is_a_400(self, play: Play) -> None:
        error = await play("cancelTooLate")
        assert (error["status"], error["body"]) == (400, {"status": "ALREADY_COMPLETED"})

    async def test_events_of_a_stream_arrive_while_it_runs(self, world: World, play: Play) -> None:
        result = await play("stream")
        arrivals = result["arrivals"]
        assert len(arrivals) > 2
        # If a buffer held them back, they would all arrive at the end.
        assert arrivals[-1] - arrivals[0] > 200  # milliseconds
        assert (await world.result_image(result["data"])).size == (1024, 768)
        assert world.sandbox.jobs == 1

    async def test_an_error_response_to_a_stream_is_raised(self, play: Play) -> None:
        error = await play("streamedError")
        assert (error["name"], error["status"]) == ("ValidationError", 422)

    async def test_an_upload_arrives_unchanged(self, world: World, play: Play) -> None:
        assert await world.download(await play("uploadPhoto")) == photo()

    async def test_a_large_upload_in_parts_arrives_unchanged(
        self, world: World, play: Play
    ) -> None:
        assert await world.download(await play("uploadInParts")) == large()

    async def test_an_uploaded_image_can_be_edited(self, world: World, play: Play) -> None:
        result = await play("editUpload")
        assert world.sandbox.jobs == 1
        inputs = {"prompt": "make it winter", "image_url": result["imageUrl"], "seed": 21}
        image = await world.result_image(result["data"])
        assert image == await world.made_directly(KONTEXT, **inputs)
        assert image != await world.made_directly(KONTEXT, **{**inputs, "seed": 22})

    async def test_a_blob_as_input_is_uploaded_by_the_client(
        self, world: World, play: Play
    ) -> None:
        result = await play("editBlob")
        assert world.sandbox.jobs == 1
        assert (await world.result_image(result["data"])).width > 0

    async def test_realtime_works_with_a_token_from_the_proxy(
        self, world: World, play: Play
    ) -> None:
        result = await play("realtime")
        assert len(result["images"]) == 1
        assert result["seed"] == 9

    async def test_a_wrong_input_names_its_field(self, world: World, play: Play) -> None:
        error = await play("invalidField")
        assert (error["name"], error["status"]) == ("ValidationError", 422)
        (field_error,) = error["fieldErrors"]
        assert field_error["loc"] == ["body", "guidance_scale"]
        assert field_error["type"] == "less_than_equal"
        assert world.sandbox.jobs == 0

    @pytest.mark.parametrize("scenario", ["contentPolicy", "contentPolicyInQueue"])
    async def test_a_refused_prompt_is_a_validation_error(self, play: Play, scenario: str) -> None:
        error = await play(scenario)
        assert (error["name"], error["status"]) == ("ValidationError", 422)
        assert error["fieldErrors"][0]["type"] == "content_policy_violation"

    @pytest.mark.parametrize(
        ("scenario", "statuses"),
        [
            pytest.param("retryOf429", [429, 200], id="one 429"),
            pytest.param("retryOf503", [503, 503, 200], id="two 503"),
        ],
    )
    async def test_temporary_errors_of_fal_are_retried_by_the_client(
        self, world: World, play: Play, scenario: str, statuses: list[int]
    ) -> None:
        result = await play(scenario)
        assert result["statuses"] == statuses
        assert world.sandbox.jobs == 1
        assert (await world.result_image(result["data"])).size == (1024, 768)

    @pytest.mark.timed
    async def test_an_aborted_run_ends_at_once(self, world: World, play: Play) -> None:
        result = await play("abort")
        assert result["error"]["name"] == "AbortError"
        assert result["milliseconds"] < 2000
        # The request to fal is aborted as well.
        await wait_until(lambda: [seen.status for seen in world.sandbox.seen] == [499], seconds=90)
        assert world.sandbox.jobs == 0

    async def test_fifty_concurrent_requests_each_get_their_own_image(
        self, world: World, play: Play
    ) -> None:
        played = await play("fiftyAtOnce")
        results = played["results"]
        assert world.sandbox.jobs == 50
        assert played["longestWait"] > 0
        assert [result["data"]["seed"] for result in results] == list(range(1000, 1050))
        images = [await world.result_image(result["data"]) for result in results]
        assert len({image.tobytes() for image in images}) == 50
        assert images[17] == await world.made_directly(
            DEV, prompt="image number 1017", seed=1017, image_size="square"
        )

    async def test_a_lookalike_of_fals_host_is_refused_with_a_message(
        self, world: World, play: Play
    ) -> None:
        error = await play("lookalikeHost")
        assert (error["name"], error["status"]) == ("ApiError", 412)
        assert error["body"]["type"] == "target_not_fal"
        assert error["message"] == error["body"]["detail"]
        assert world.sandbox.seen == []
