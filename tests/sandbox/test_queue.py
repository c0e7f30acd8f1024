"""The sandbox's queue.fal.run: submit, status, status stream, result, cancel."""

import asyncio
import json
import uuid

import pytest
from aiohttp.pytest_plugin import AiohttpClient

from tests.support.offline_fal import (
    DEV,
    KEY,
    KONTEXT,
    SMALL,
    OfflineFal,
    offline_fal,
    result_image,
)

BODY = {"prompt": "a cat", "image_size": SMALL}
SLOW = {"prompt": "!delay 30", "image_size": SMALL}
UNKNOWN = "7e2f0b8a-0001-4000-8000-000000000000"
ROOT = "https://queue.fal.run/fal-ai/flux/requests"


@pytest.fixture
async def fal(aiohttp_client: AiohttpClient) -> OfflineFal:
    return await offline_fal(aiohttp_client)


async def wait_running(fal: OfflineFal, request_id: str) -> None:
    async with asyncio.timeout(5):
        events = await fal.get(request_id, "/status/stream")
        while b"IN_PROGRESS" not in await events.content.readuntil(b"\n\n"):
            pass
        events.close()


async def test_a_submit_returns_immediately(fal: OfflineFal) -> None:
    response = await fal.client.post(f"/queue.fal.run/{DEV}", json=SLOW, headers=KEY)
    document = await response.json()
    request_id = document["request_id"]
    assert response.status == 200
    assert uuid.UUID(request_id).version == 4
    assert response.headers["x-fal-request-id"] == request_id
    assert document == {
        "status": "IN_QUEUE",
        "request_id": request_id,
        "gateway_request_id": request_id,
        "response_url": f"{ROOT}/{request_id}",
        "status_url": f"{ROOT}/{request_id}/status",
        "cancel_url": f"{ROOT}/{request_id}/cancel",
        "queue_position": 0,
    }


async def test_a_job_ends_with_its_result(fal: OfflineFal) -> None:
    request_id = await fal.submit(DEV, BODY)
    status = await fal.wait_completed(request_id)
    response = await fal.get(request_id)
    assert status["metrics"]["inference_time"] > 0
    assert "error" not in status
    assert response.headers["x-fal-request-id"] == request_id
    assert response.headers["X-Fal-Billable-Units"] == "1"
    assert (await result_image(fal, response)).size == (64, 64)
    assert [paid.request_id for paid in fal.sandbox.paid] == [request_id]


async def test_a_result_can_be_read_again(fal: OfflineFal) -> None:
    request_id = await fal.submit(DEV, BODY)
    await fal.wait_completed(request_id)
    documents = [await (await fal.get(request_id, path)).json() for path in ("", "/response", "")]
    assert documents[0] == documents[1] == documents[2]
    assert fal.sandbox.jobs == 1


async def test_a_job_is_found_under_its_endpoint_id_too(fal: OfflineFal) -> None:
    request_id = await fal.submit(DEV, BODY)
    assert (await fal.wait_completed(request_id, app=DEV))["request_id"] == request_id


@pytest.mark.parametrize("path", ["", "/status", "/status/stream", "/response"])
async def test_an_unknown_id_is_not_found(fal: OfflineFal, path: str) -> None:
    response = await fal.get(UNKNOWN, path)
    assert (response.status, await response.json()) == (404, {"status": "NOT_FOUND"})


async def test_an_id_of_another_app_is_not_found(fal: OfflineFal) -> None:
    request_id = await fal.submit(DEV, SLOW)
    assert (await fal.get(request_id, "/status", app="fal-ai/flux-pro")).status == 404


async def test_an_id_of_another_key_is_not_found(fal: OfflineFal) -> None:
    request_id = await fal.submit(DEV, SLOW)
    url = f"/queue.fal.run/{DEV}/requests/{request_id}/status"
    response = await fal.client.get(url, headers={"Authorization": "Key other:secret"})
    assert response.status == 404


async def test_an_unknown_id_without_a_key_is_not_found(fal: OfflineFal) -> None:
    response = await fal.client.get(f"/queue.fal.run/{DEV}/requests/{UNKNOWN}/status")
    assert response.status == 404


async def test_a_known_id_without_a_key_is_refused(fal: OfflineFal) -> None:
    request_id = await fal.submit(DEV, SLOW)
    response = await fal.client.get(f"/queue.fal.run/{DEV}/requests/{request_id}/status")
    assert response.status == 401


async def test_a_running_job_is_in_progress(fal: OfflineFal) -> None:
    request_id = await fal.submit(DEV, SLOW)
    await wait_running(fal, request_id)
    response = await fal.get(request_id, "/status")
    document = await response.json()
    assert response.status == 202
    assert (document["status"], document["logs"]) == ("IN_PROGRESS", None)
    assert document["status_url"] == f"{ROOT}/{request_id}/status"


async def test_the_result_of_a_running_job_is_a_400(fal: OfflineFal) -> None:
    request_id = await fal.submit(DEV, SLOW)
    response = await fal.get(request_id)
    assert response.headers["x-fal-request-id"] == request_id
    assert response.status == 400
    assert await response.json() == {"detail": "Request is still in progress"}


@pytest.mark.parametrize(
    ("query", "has_logs"),
    [
        pytest.param("?logs=1", True, id="JavaScript"),
        pytest.param("?logs=true", True, id="Python"),
        pytest.param("?logs=0", False, id="JavaScript, no logs"),
        pytest.param("?logs=false", False, id="Python, no logs"),
        pytest.param("", False, id="no parameter"),
    ],
)
async def test_logs_are_included_on_request(fal: OfflineFal, query: str, has_logs: bool) -> None:
    request_id = await fal.submit(DEV, BODY)
    await fal.wait_completed(request_id)
    document = await (await fal.get(request_id, f"/status{query}")).json()
    assert (document["logs"] is not None) is has_logs
    if has_logs:
        assert set(document["logs"][0]) == {"message", "timestamp", "level", "source"}


async def test_the_queue_position_decreases(aiohttp_client: AiohttpClient) -> None:
    fal = await offline_fal(aiohttp_client, runners=1)
    running = await fal.submit(DEV, SLOW)
    await wait_running(fal, running)
    second, third = await fal.submit(DEV, SLOW), await fal.submit(DEV, SLOW)
    before = [await (await fal.get(job, "/status")).json() for job in (second, third)]
    await fal.cancel(second)
    after = await (await fal.get(third, "/status")).json()
    assert [document["queue_position"] for document in before] == [0, 1]
    assert (after["status"], after["queue_position"]) == ("IN_QUEUE", 0)


async def test_as_many_jobs_run_in_parallel_as_there_are_runners(
    aiohttp_client: AiohttpClient,
) -> None:
    fal = await offline_fal(aiohttp_client, runners=2)
    first, second, third = [await fal.submit(DEV, SLOW) for _ in range(3)]
    await wait_running(fal, first)
    await wait_running(fal, second)
    assert (await (await fal.get(third, "/status")).json())["status"] == "IN_QUEUE"
    await fal.cancel(first)
    await wait_running(fal, third)


@pytest.fixture
async def slow_fal(aiohttp_client: AiohttpClient) -> OfflineFal:
    """A sandbox that is slow enough to open a stream while the job is still queued."""
    return await offline_fal(aiohttp_client, speed=10)


async def test_the_stream_has_one_event_for_each_change(slow_fal: OfflineFal) -> None:
    fal = slow_fal
    request_id = await fal.submit(DEV, BODY)
    response = await fal.get(request_id, "/status/stream?logs=1")
    text = await response.text()
    events = [json.loads(line.removeprefix("data: ")) for line in text.strip().split("\n\n")]
    assert response.headers["Content-Type"].startswith("text/event-stream")
    statuses = [event["status"] for event in events]
    assert statuses == ["IN_QUEUE", *["IN_PROGRESS"] * 5, "COMPLETED"]
    assert [len(event["logs"]) for event in events[1:]] == [0, 1, 1, 1, 1, 0]


async def test_without_logs_a_new_log_line_sends_no_event(slow_fal: OfflineFal) -> None:
    fal = slow_fal
    request_id = await fal.submit(DEV, BODY)
    text = await (await fal.get(request_id, "/status/stream")).text()
    assert text.count("data: ") == 3
    assert '"logs":null' in text


async def test_the_stream_of_an_ended_job_has_one_event(fal: OfflineFal) -> None:
    request_id = await fal.submit(DEV, BODY)
    await fal.wait_completed(request_id)
    text = await (await fal.get(request_id, "/status/stream")).text()
    assert text.count("data: ") == 1


async def test_events_are_sent_immediately(fal: OfflineFal) -> None:
    request_id = await fal.submit(DEV, SLOW)
    await wait_running(fal, request_id)
    assert fal.sandbox.jobs == 0


@pytest.mark.parametrize(
    ("endpoint", "body", "app", "status", "error_type"),
    [
        pytest.param(KONTEXT, {"prompt": "x"}, "fal-ai/flux-pro", 422, "missing", id="bad input"),
        pytest.param("fal-ai/flux/x", BODY, "fal-ai/flux", 404, "bad_request", id="unknown path"),
        pytest.param(DEV, [], "fal-ai/flux", 422, "model_attributes_type", id="not an object"),
    ],
)
async def test_an_invalid_submit_is_accepted_and_fails_as_a_job(
    fal: OfflineFal, endpoint: str, body: object, app: str, status: int, error_type: str
) -> None:
    request_id = await fal.submit(endpoint, body)
    document = await fal.wait_completed(request_id, app)
    assert document["error"]
    assert document["error_type"] == error_type
    assert (await fal.get(request_id, app=app)).status == status
    assert fal.sandbox.jobs == 0


@pytest.mark.parametrize("is_running", [True, False], ids=["running", "waiting"])
async def test_a_cancelled_job_is_not_billed(
    aiohttp_client: AiohttpClient, is_running: bool
) -> None:
    fal = await offline_fal(aiohttp_client, runners=1)
    first, second = await fal.submit(DEV, SLOW), await fal.submit(DEV, SLOW)
    await wait_running(fal, first)
    request_id = first if is_running else second
    response = await fal.cancel(request_id)
    assert (response.status, await response.json()) == (202, {"status": "CANCELLATION_REQUESTED"})
    assert (await fal.wait_completed(request_id))["error_type"] == "client_cancelled"
    assert (await fal.get(request_id)).status == 499
    assert fal.sandbox.jobs == 0


async def test_cancelling_ends_the_status_stream(fal: OfflineFal) -> None:
    request_id = await fal.submit(DEV, SLOW)
    stream = await fal.get(request_id, "/status/stream")
    await fal.cancel(request_id)
    async with asyncio.timeout(2):
        assert '"COMPLETED"' in (await stream.text()).split("data: ")[-1]


async def test_an_ended_job_cannot_be_cancelled(fal: OfflineFal) -> None:
    request_id = await fal.submit(DEV, BODY)
    await fal.wait_completed(request_id)
    for _ in range(2):
        response = await fal.cancel(request_id)
        assert (response.status, await response.json()) == (400, {"status": "ALREADY_COMPLETED"})


async def test_an_unknown_job_cannot_be_cancelled(fal: OfflineFal) -> None:
    response = await fal.cancel(UNKNOWN)
    assert (response.status, await response.json()) == (404, {"status": "NOT_FOUND"})


async def test_a_job_continues_after_its_client_has_disconnected(fal: OfflineFal) -> None:
    request_id = await fal.submit(DEV, {**BODY, "prompt": "!delay 0.2"})
    (await fal.get(request_id, "/status/stream")).close()
    assert "error" not in await fal.wait_completed(request_id)


async def test_a_queue_longer_than_the_caller_s_limit_is_a_429(
    aiohttp_client: AiohttpClient,
) -> None:
    fal = await offline_fal(aiohttp_client, runners=1)
    await wait_running(fal, await fal.submit(DEV, SLOW))
    for _ in range(2):
        await fal.submit(DEV, SLOW)
    url = f"/queue.fal.run/{DEV}?fal_max_queue_length=1"
    response = await fal.client.post(url, json=BODY, headers=KEY)
    assert response.status == 429
    await fal.submit(DEV, BODY, "?fal_max_queue_length=2")


async def test_a_job_that_cannot_start_in_time_is_a_504(aiohttp_client: AiohttpClient) -> None:
    fal = await offline_fal(aiohttp_client, runners=1)
    await wait_running(fal, await fal.submit(DEV, SLOW))
    request_id = await fal.submit(DEV, BODY, **{"X-Fal-Request-Timeout": "0.05"})
    assert (await fal.wait_completed(request_id))["error_type"] == "request_timeout"
    response = await fal.get(request_id)
    assert response.status == 504
    assert response.headers["X-Fal-Request-Timeout-Type"] == "user"


async def test_the_start_timeout_does_not_limit_inference(fal: OfflineFal) -> None:
    body = {**BODY, "prompt": "!delay 0.3"}
    request_id = await fal.submit(DEV, body, **{"X-Fal-Request-Timeout": "0.2"})
    assert "error" not in await fal.wait_completed(request_id)


async def test_an_internal_error_ends_the_job_with_a_500(
    fal: OfflineFal, caplog: pytest.LogCaptureFixture
) -> None:
    fal.sandbox.files.close()
    request_id = await fal.submit(DEV, BODY)
    await fal.wait_completed(request_id)
    fal.sandbox.files.open()
    assert (await fal.get(request_id)).status == 500
    assert "failed with an unexpected error" in caplog.text


async def test_the_repr_of_a_job_has_its_state(aiohttp_client: AiohttpClient) -> None:
    fal = await offline_fal(aiohttp_client, runners=1)
    first, second = await fal.submit(DEV, SLOW), await fal.submit(DEV, SLOW)
    await wait_running(fal, first)
    queue = fal.sandbox.queue
    assert repr(queue.get(first)) == f"<Job {first} {DEV} running>"
    assert repr(queue.get(second)) == f"<Job {second} {DEV} queued>"
    assert repr(queue) == "<JobQueue waiting=1 running=1>"
    await fal.cancel(first)
    assert repr(queue.get(first)) == f"<Job {first} {DEV} ended with 499>"


async def test_jobs_are_cancelled_at_shutdown(fal: OfflineFal) -> None:
    await wait_running(fal, await fal.submit(DEV, SLOW))
    async with asyncio.timeout(5):
        await fal.client.close()
    names = {task.get_coro().__qualname__ for task in asyncio.all_tasks()}  # type: ignore[union-attr] # every task has one
    assert not [name for name in names if "JobQueue._process" in name]
