"""falproxy.client: every method of fal_client through the proxy, with its oldest and newest 1.x.

One process cannot import two versions, so tests/fal_clients/scenarios.py runs in a process for each
version. The assertions are here.
"""

import asyncio
import io
import json
import re
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.support.fal_client_world import (
    OLDEST,
    ROOT,
    ClientWorld,
    RunScenario,
    ScenarioProcess,
    clean_environment,
    open_world,
    photo,
    scenario_runner,
)
from tests.support.js_world import DEV, KONTEXT
from tests.support.key_search import CANARY
from tests.support.urls import PROXY
from tests.support.waiting import wait_until

ACCESS_KEY = "the-key-of-a-friend"


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[ClientWorld]:
    async with open_world(data_dir=tmp_path) as world:
        yield world


@pytest.fixture
async def locked_world(tmp_path: Path) -> AsyncIterator[ClientWorld]:
    """A world whose proxy requires an access key."""
    keys = (("friend", ACCESS_KEY), ("other", "another-key"))
    async with open_world(access_keys=keys, data_dir=tmp_path) as world:
        yield world


@pytest.fixture
def run_scenario(
    world: ClientWorld, scenario_process: ScenarioProcess, client_kind: str
) -> RunScenario:
    return scenario_runner(scenario_process, client_kind, world.gateway)


HERON = {"prompt": "a heron at dawn", "seed": 7, "image_size": "square"}


class TestModels:
    async def test_run_returns_the_image_that_fal_makes(
        self, world: ClientWorld, run_scenario: RunScenario
    ) -> None:
        result = await run_scenario("run")
        assert world.sandbox.jobs == 1
        assert world.sandbox.keys_seen == {f"Key {CANARY}"}
        image = await world.result_image(result)
        assert image == await world.made_directly(DEV, **HERON)
        assert image != await world.made_directly(DEV, **{**HERON, "seed": 8})

    async def test_subscribe_returns_updates_logs_and_result(
        self, world: ClientWorld, run_scenario: RunScenario
    ) -> None:
        result = await run_scenario("subscribe")
        assert world.sandbox.jobs == 1
        (request_id,) = result["enqueued"]
        assert any(request_id in seen.path for seen in world.sandbox.seen)
        statuses = list(dict.fromkeys(status for status, _ in result["updates"]))
        assert statuses[-2:] == ["InProgress", "Completed"]
        assert result["updates"][-1][1] > 0
        assert await world.result_image(result["data"]) == await world.made_directly(
            DEV, prompt="!delay 0.4 a paper boat on a river", seed=11
        )

    @pytest.mark.timed  # the client asks for the status while the job runs
    async def test_a_handle_returns_status_events_and_result(
        self, world: ClientWorld, run_scenario: RunScenario
    ) -> None:
        result = await run_scenario("handle")
        assert world.sandbox.jobs == 1
        assert result["status_url"].startswith("https://queue.fal.run/")
        assert result["first"] in ("Queued", "InProgress")
        assert len(result["events"]) > 2
        assert result["events"][-1] == "Completed"
        assert result["logs"]
        assert result["seconds"] > 0
        assert result["data"]["seed"] == 3

    async def test_a_request_can_be_queried_by_its_id(
        self, world: ClientWorld, run_scenario: RunScenario
    ) -> None:
        result = await run_scenario("handle")
        assert result["status"] == "Completed"
        assert result["result"] == result["data"]
        assert (await run_scenario("get_handle"))["seed"] == 3

    async def test_a_target_arrives_byte_for_byte(
        self, world: ClientWorld, run_scenario: RunScenario
    ) -> None:
        hook = "https://app.example/hook?job=1&next=%2Fa%20b"
        await run_scenario("webhook", url=hook)
        submit = world.proxy_requests[0]
        query = "fal_webhook=https%3A%2F%2Fapp.example%2Fhook%3Fjob%3D1%26next%3D%252Fa%2520b"
        assert submit.headers["x-fal-target-url"] == f"https://queue.fal.run/{DEV}?{query}"
        assert submit.headers["x-fal-queue-priority"] == "low"
        assert world.sandbox.seen[0].query == query
        assert world.sandbox.seen[0].headers["x-fal-runner-hint"] == "h"

    @pytest.mark.timed
    @pytest.mark.parametrize("by_id", [False, True], ids=["by its handle", "by its id"])
    async def test_a_running_job_can_be_cancelled(
        self, world: ClientWorld, run_scenario: RunScenario, by_id: bool
    ) -> None:
        result = await run_scenario("cancel_running", by_id=by_id)
        assert result["seconds"] < 3  # the job itself would take five
        assert (result["error"]["name"], result["error"]["status"]) == ("FalClientHTTPError", 499)
        assert world.sandbox.jobs == 0

    async def test_cancelling_a_completed_job_is_an_error(self, run_scenario: RunScenario) -> None:
        error = await run_scenario("cancel_too_late")
        assert (error["name"], error["status"]) == ("FalClientHTTPError", 400)
        assert json.loads(error["body"]) == {"status": "ALREADY_COMPLETED"}

    async def test_events_of_a_stream_arrive_while_it_runs(
        self, world: ClientWorld, run_scenario: RunScenario
    ) -> None:
        result = await run_scenario("stream")
        arrivals = result["arrivals"]
        assert len(arrivals) > 2
        # Buffered anywhere, they would all arrive together at the end.
        assert arrivals[-1] - arrivals[0] > 0.2
        assert (await world.result_image(result["data"])).size == (1024, 768)
        assert world.sandbox.jobs == 1

    async def test_parallel_calls_each_return_their_own_image(
        self, world: ClientWorld, run_scenario: RunScenario
    ) -> None:
        results = await run_scenario("parallel_calls")
        assert [result["seed"] for result in results] == list(range(10))
        assert world.sandbox.jobs == 10

    async def test_a_client_can_be_used_in_a_second_event_loop(
        self, world: ClientWorld, run_scenario: RunScenario
    ) -> None:
        await run_scenario("run", loops=2)
        assert world.sandbox.jobs == 2


class TestFiles:
    async def test_uploads_arrive_complete(
        self, world: ClientWorld, run_scenario: RunScenario, image_path: Path
    ) -> None:
        urls = await run_scenario("upload", path=str(image_path))
        assert await world.download(urls["bytes"]) == photo()
        assert await world.download(urls["file"]) == photo()
        assert await world.download(urls["storage"]) == photo()
        uploaded = Image.open(io.BytesIO(await world.download(urls["image"])))
        assert uploaded.convert("RGB") == Image.open(image_path).convert("RGB")

    async def test_files_go_to_the_cdn_with_one_token_obtained_through_the_proxy(
        self, world: ClientWorld, run_scenario: RunScenario, image_path: Path
    ) -> None:
        await run_scenario("upload", path=str(image_path), key=ACCESS_KEY)
        targets = [request.headers["x-fal-target-url"] for request in world.proxy_requests]
        assert targets == [
            "https://rest.fal.ai/storage/auth/token?storage_type=fal-cdn-v3",
            "https://rest.fal.ai/storage/upload/initiate?storage_type=gcs",
        ]
        uploads = [seen for seen in world.sandbox.seen if seen.path == "/files/upload"]
        assert len(uploads) == 3
        assert all(seen.headers["Authorization"].startswith("Bearer ") for seen in uploads)

    @pytest.mark.parametrize("as_bytes", [False, True], ids=["a file", "bytes"])
    async def test_a_large_upload_is_sent_in_parts_and_arrives_complete(
        self,
        world: ClientWorld,
        run_scenario: RunScenario,
        client_kind: str,
        image_path: Path,
        as_bytes: bool,
    ) -> None:
        if (
            as_bytes
            and client_kind == "sync"
            and (await run_scenario("version"))["version"] == OLDEST
        ):
            pytest.skip("fal_client 1.0.0 and 1.0.1 send only the first part of bytes")
        url = await run_scenario("upload_in_parts", path=str(image_path), as_bytes=as_bytes)
        assert await world.download(url) == photo()
        parts = [seen for seen in world.sandbox.seen if "/multipart/" in seen.path]
        assert len(parts) == 7  # six parts, and the completion

    async def test_an_uploaded_image_can_be_edited(
        self, world: ClientWorld, run_scenario: RunScenario, image_path: Path
    ) -> None:
        result = await run_scenario("edit", path=str(image_path))
        inputs = {"prompt": "make it winter", "image_url": result["image_url"], "seed": 21}
        image = await world.result_image(result["data"])
        assert image == await world.made_directly(KONTEXT, **inputs)
        assert image != await world.made_directly(KONTEXT, **{**inputs, "seed": 22})


class TestSockets:
    @pytest.mark.parametrize("scenario", ["realtime", "ws_connect"])
    @pytest.mark.parametrize(
        "options", [{}, {"use_jwt": False}], ids=["default", "use_jwt is false"]
    )
    async def test_a_socket_opens_with_a_token_from_the_proxy(
        self, world: ClientWorld, run_scenario: RunScenario, scenario: str, options: dict[str, Any]
    ) -> None:
        fal_run = f"{world.fal.replace('http', 'ws', 1)}/fal.run/"
        result = await run_scenario(scenario, fal_run=fal_run, **options)
        assert result["seed"] == 9
        assert result["sizes"][0] > 1000
        token, socket = sorted(world.sandbox.seen, key=lambda seen: seen.method, reverse=True)
        assert (token.host, token.path) == ("rest.fal.ai", "/tokens/")
        assert (socket.host, socket.path) == ("fal.run", "/fal-ai/fast-lightning-sdxl/realtime")


class TestErrors:
    @pytest.mark.parametrize("scenario", ["run_error", "queue_error", "stream_error"])
    async def test_an_input_error_names_its_field(
        self, world: ClientWorld, run_scenario: RunScenario, scenario: str
    ) -> None:
        error = await run_scenario(scenario, prompt="a vase", guidance_scale=99)
        assert (error["name"], error["status"]) == ("FalClientHTTPError", 422)
        (detail,) = error["message"]
        assert detail["loc"] == ["body", "guidance_scale"]
        assert detail["type"] == "less_than_equal"
        assert world.sandbox.jobs == 0

    @pytest.mark.parametrize("scenario", ["run_error", "queue_error", "stream_error"])
    async def test_an_error_of_fal_has_its_message_and_type(
        self, run_scenario: RunScenario, scenario: str
    ) -> None:
        error = await run_scenario(scenario, prompt="!error 500 internal_error")
        assert (error["name"], error["status"]) == ("FalClientHTTPError", 500)
        assert (error["message"], error["type"]) == ("Internal error", "internal_error")

    async def test_an_error_of_the_proxy_has_its_message(
        self, world: ClientWorld, run_scenario: RunScenario
    ) -> None:
        error = await run_scenario("run_error", endpoint=f"{DEV}?fal_jwt_token=mine")
        assert (error["name"], error["status"]) == ("FalClientHTTPError", 412)
        assert error["message"] == json.loads(error["body"])["detail"]
        assert "carries a token of its own" in error["message"]
        assert world.sandbox.seen == []

    @pytest.mark.parametrize(
        ("prompt", "calls"),
        [
            pytest.param("!error 429 concurrent_requests_limit times=2", 3, id="two 429"),
            pytest.param("!error 503 nginx times=1", 2, id="a 503 of fal's ingress"),
        ],
    )
    async def test_fal_client_still_retries_retryable_errors(
        self, world: ClientWorld, run_scenario: RunScenario, prompt: str, calls: int
    ) -> None:
        with pytest.raises(AssertionError, match="nothing was raised"):
            await run_scenario("run_error", prompt=prompt)
        assert len(world.proxy_requests) == len(world.sandbox.seen) == calls
        assert world.sandbox.jobs == 1

    async def test_a_failed_post_is_not_retried(
        self, world: ClientWorld, run_scenario: RunScenario
    ) -> None:
        error = await run_scenario("run_error", prompt="!error 503 runner_connection_error times=1")
        assert (error["status"], error["type"]) == (503, "runner_connection_error")
        assert len(world.proxy_requests) == len(world.sandbox.seen) == 1

    async def test_run_supports_a_timeout(
        self, world: ClientWorld, run_scenario: RunScenario
    ) -> None:
        options = {"timeout": 0.5, "start_timeout": 30}
        error = await run_scenario("run_error", prompt="!delay 5 a slow train", options=options)
        assert error["name"] == "ReadTimeout"
        await wait_until(lambda: [seen.status for seen in world.sandbox.seen] == [499], seconds=90)
        assert world.sandbox.jobs == 0

    @pytest.mark.timed
    async def test_subscribe_cancels_the_job_on_a_client_timeout(
        self, world: ClientWorld, run_scenario: RunScenario
    ) -> None:
        result = await run_scenario("client_timeout")
        assert result["error"]["name"] == "FalClientTimeoutError"
        assert result["error"]["request_id"]
        assert result["seconds"] < 3
        assert "PUT" in {seen.method for seen in world.sandbox.seen}
        assert world.sandbox.jobs == 0

    @pytest.mark.parametrize("scenario", ["upload_error", "realtime_error"])
    async def test_a_refused_token_request_has_the_message_of_fal(
        self, world: ClientWorld, run_scenario: RunScenario, scenario: str
    ) -> None:
        world.sandbox.key = "another:key"
        error = await run_scenario(scenario)
        assert (error["name"], error["status"]) == ("FalClientHTTPError", 401)
        assert error["message"] == "No user found for Key ID and Secret"

    async def test_an_unreachable_proxy_is_named(
        self, run_scenario: RunScenario, unused_tcp_port: int
    ) -> None:
        error = await run_scenario("unreachable", proxy=f"http://127.0.0.1:{unused_tcp_port}")
        assert error["name"] == "ConnectError"
        url = f"http://127.0.0.1:{unused_tcp_port}{PROXY}"
        assert error["message"].startswith(f"The proxy at {url} cannot be reached: ")


class TestKeys:
    """Access keys of the proxy.

    `check_credentials` and `check_request` search for the client's fal key after every test.
    """

    @pytest.mark.parametrize("key", [None, ACCESS_KEY], ids=["no key", "a key"])
    async def test_the_access_key_is_sent_to_the_proxy(
        self, world: ClientWorld, run_scenario: RunScenario, image_path: Path, key: str | None
    ) -> None:
        await run_scenario("edit", path=str(image_path), key=key)
        assert len(world.proxy_requests) > 3
        for request in world.proxy_requests:
            assert request.headers.get("x-falproxy-key") == key

    async def test_everything_works_with_an_access_key(
        self,
        locked_world: ClientWorld,
        scenario_process: ScenarioProcess,
        client_kind: str,
        image_path: Path,
    ) -> None:
        run_scenario = scenario_runner(
            scenario_process, client_kind, locked_world.gateway, ACCESS_KEY
        )
        fal_run = f"{locked_world.fal.replace('http', 'ws', 1)}/fal.run/"
        assert (await run_scenario("run"))["seed"] == 7
        assert (await run_scenario("handle"))["result"]["seed"] == 3
        assert (await run_scenario("cancel_running", by_id=False))["error"]["status"] == 499
        assert len((await run_scenario("stream"))["arrivals"]) > 2
        assert (await run_scenario("edit", path=str(image_path)))["data"]["seed"] == 21
        assert (await run_scenario("realtime", fal_run=fal_run))["seed"] == 9

    @pytest.mark.parametrize("scenario", ["run_error", "stream_error", "upload_error"])
    async def test_a_wrong_access_key_is_the_proxy_s_401(
        self,
        locked_world: ClientWorld,
        scenario_process: ScenarioProcess,
        client_kind: str,
        scenario: str,
    ) -> None:
        error = await scenario_runner(
            scenario_process, client_kind, locked_world.gateway, "guessed"
        )(scenario)
        assert (error["name"], error["status"]) == ("FalClientHTTPError", 401)
        assert error["message"] == json.loads(error["body"])["detail"]
        assert "access key" in error["message"]
        assert locked_world.sandbox.seen == []

    async def test_url_and_key_are_read_from_the_environment(
        self, world: ClientWorld, run_scenario: RunScenario
    ) -> None:
        env = {"FALPROXY_URL": world.gateway, "FALPROXY_KEY": ACCESS_KEY}
        assert (await run_scenario("run", proxy=None, env=env))["seed"] == 7
        assert [request.headers["x-falproxy-key"] for request in world.proxy_requests] == [
            ACCESS_KEY
        ]

    async def test_an_empty_key_sends_no_key(
        self, world: ClientWorld, run_scenario: RunScenario
    ) -> None:
        await run_scenario("run", key="", env={"FALPROXY_KEY": ACCESS_KEY})
        assert "x-falproxy-key" not in world.proxy_requests[0].headers

    async def test_the_repr_of_a_client_does_not_contain_its_key(
        self, world: ClientWorld, run_scenario: RunScenario
    ) -> None:
        assert ACCESS_KEY not in await run_scenario("client_repr", key=ACCESS_KEY)

    @pytest.mark.parametrize("version", ["oldest", "newest"])
    async def test_no_fal_key_is_needed(
        self, world: ClientWorld, version: str, image_path: Path, tmp_path: Path
    ) -> None:
        process = ScenarioProcess.start(version, tmp_path)
        try:
            for kind in ("sync", "async"):
                run_scenario = scenario_runner(process, kind, world.gateway)
                await run_scenario("run")
                await run_scenario("upload", path=str(image_path))
                await run_scenario(
                    "realtime", fal_run=f"{world.fal.replace('http', 'ws', 1)}/fal.run/"
                )
        finally:
            process.stop()


@pytest.fixture(params=["functions", "async functions"])
def run_functions(
    request: pytest.FixtureRequest, world: ClientWorld, scenario_process: ScenarioProcess
) -> RunScenario:
    """Return a function that runs scenarios with the module functions after `install`."""
    return scenario_runner(scenario_process, str(request.param), world.gateway)


class TestFunctions:
    async def test_module_functions_use_the_proxy(
        self, world: ClientWorld, run_functions: RunScenario
    ) -> None:
        image = await world.result_image(await run_functions("run"))
        assert image == await world.made_directly(DEV, **HERON)
        assert len(world.proxy_requests) == 1

    async def test_all_module_functions_work(
        self, world: ClientWorld, run_functions: RunScenario, image_path: Path
    ) -> None:
        fal_run = f"{world.fal.replace('http', 'ws', 1)}/fal.run/"
        assert (await run_functions("subscribe"))["updates"][-1][0] == "Completed"
        assert (await run_functions("handle"))["result"]["seed"] == 3
        assert (await run_functions("cancel_running", by_id=True))["error"]["status"] == 499
        assert len((await run_functions("stream"))["arrivals"]) > 2
        urls = await run_functions("upload", path=str(image_path))
        assert await world.download(urls["file"]) == photo()
        for options in ({}, {"use_jwt": False}):
            assert (await run_functions("realtime", fal_run=fal_run, **options))["seed"] == 9
            assert (await run_functions("ws_connect", fal_run=fal_run, **options))["seed"] == 9

    async def test_functions_imported_before_install_use_the_proxy(
        self, world: ClientWorld, run_functions: RunScenario
    ) -> None:
        image = await world.result_image(await run_functions("early_import"))
        assert image == await world.made_directly(DEV, **HERON)
        assert len(world.proxy_requests) == 1

    async def test_install_reads_the_environment(
        self, world: ClientWorld, run_functions: RunScenario
    ) -> None:
        await run_functions(
            "run", proxy=None, env={"FALPROXY_URL": world.gateway, "FALPROXY_KEY": ACCESS_KEY}
        )
        assert [request.headers["x-falproxy-key"] for request in world.proxy_requests] == [
            ACCESS_KEY
        ]

    async def test_a_second_install_replaces_the_first(
        self, world: ClientWorld, run_functions: RunScenario
    ) -> None:
        await run_functions("install_again", proxy="http://127.0.0.1:1", second=world.gateway)
        assert len(world.proxy_requests) == 1

    async def test_uninstall_restores_the_module_functions(
        self, run_scenario: RunScenario, run_functions: RunScenario
    ) -> None:
        before = await run_scenario("defaults")
        assert before == {"classes": ["fal_client.client"], "is_falproxy": False, "is_bound": True}
        installed = await run_functions("defaults")
        assert installed == {
            "classes": ["falproxy.client.clients"],
            "is_falproxy": True,
            "is_bound": True,
        }
        assert await run_scenario("defaults") == before


async def test_the_examples_of_the_guide_work(
    world: ClientWorld, root: Path, tmp_path: Path
) -> None:
    section = (
        (root / "docs" / "getting-started.md").read_text().partition("\n## Python client\n")[2]
    )
    examples = re.findall(r"```python\n(.*?)```", section.partition("\n## ")[0], re.DOTALL)
    assert len(examples) == 3
    (tmp_path / "photo.png").write_bytes(photo())
    for example in examples:
        completed = await asyncio.to_thread(
            subprocess.run,
            [sys.executable, "-c", example.replace("http://localhost:8080", world.gateway)],
            cwd=tmp_path,
            env={**clean_environment(), "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert completed.returncode == 0, completed.stderr
        assert completed.stdout.startswith(world.fal)
    assert world.sandbox.jobs == len(examples)
