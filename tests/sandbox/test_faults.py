"""Faults on demand: every error that fal documents, by direct call and through the queue."""

import json
from typing import Any

import pytest
from aiohttp.pytest_plugin import AiohttpClient

from falproxy.sandbox.faults import (
    FAULTS,
    BodyShape,
    Fault,
    FaultDirective,
    parse_delay_directive,
    parse_fault_directive,
)
from tests.support.offline_fal import DEV, KEY, SMALL, OfflineFal, offline_fal

FAULT_PARAMS = [pytest.param(fault, id=f"{fault.status} {fault.name}") for fault in FAULTS]


@pytest.fixture
async def fal(aiohttp_client: AiohttpClient) -> OfflineFal:
    return await offline_fal(aiohttp_client)


def body_with(prompt: str) -> dict[str, object]:
    return {"prompt": prompt, "image_size": SMALL}


def check_shape(fault: Fault, text: str, headers: Any) -> None:
    """Assert that body and headers have the fault's shape."""
    if fault.shape is BodyShape.HTML:
        assert "nginx" in text
        assert headers["Content-Type"].startswith("text/html")
        assert "x-fal-request-id" not in headers
        return
    document = json.loads(text)
    assert headers["x-fal-request-id"]
    if fault.shape is BodyShape.MODEL:
        [entry] = document["detail"]
        assert (entry["type"], entry["msg"]) == (fault.name, fault.message)
        assert entry["url"] == f"https://docs.fal.ai/errors/#{fault.name}"
        assert entry.get("ctx") == fault.ctx
        assert headers["X-Fal-Retryable"] == ("true" if fault.is_retryable else "false")
    if fault.shape is BodyShape.REQUEST:
        assert document == {"detail": fault.message, "error_type": fault.name}
        assert headers["X-Fal-Error-Type"] == fault.name
    if fault.shape is BodyShape.DETAIL:
        assert document == {"detail": fault.message}
    if fault.shape is BodyShape.STATUS:
        assert document == {"status": fault.message}
    assert {name: headers[name] for name in fault.headers} == dict(fault.headers)


@pytest.mark.parametrize("fault", FAULT_PARAMS)
async def test_a_direct_call_fails_with_the_requested_fault(fal: OfflineFal, fault: Fault) -> None:
    response = await fal.run(DEV, body_with(f"!error {fault.status} {fault.name}"))
    assert response.status == fault.status
    check_shape(fault, await response.text(), response.headers)
    assert fal.sandbox.jobs == 0


@pytest.mark.parametrize("fault", FAULT_PARAMS)
async def test_a_job_fails_with_the_requested_fault(fal: OfflineFal, fault: Fault) -> None:
    request_id = await fal.submit(DEV, body_with(f"!error {fault.status} {fault.name}"))
    status = await fal.wait_completed(request_id)
    response = await fal.get(request_id)
    assert status["error"]
    assert status["error_type"]
    if fault.shape in (BodyShape.MODEL, BodyShape.REQUEST):
        assert (status["error"], status["error_type"]) == (fault.message, fault.name)
    assert response.status == fault.status
    check_shape(fault, await response.text(), response.headers)
    assert fal.sandbox.jobs == 0


SUBMIT_STATUSES = (401, 403, 429, 502, 503)


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(fault, id=f"{fault.status} {fault.name}")
        for fault in FAULTS
        if fault.status in SUBMIT_STATUSES
    ],
)
async def test_a_submit_fails_with_the_requested_fault(fal: OfflineFal, fault: Fault) -> None:
    body = body_with(f"!error {fault.status} {fault.name} at=submit")
    response = await fal.client.post(f"/queue.fal.run/{DEV}", json=body, headers=KEY)
    assert response.status == fault.status
    check_shape(fault, await response.text(), response.headers)


@pytest.mark.parametrize(("operation", "path"), [("status", "/status"), ("result", "")])
async def test_a_locked_account_can_read_neither_status_nor_result(
    fal: OfflineFal, operation: str, path: str
) -> None:
    request_id = await fal.submit(DEV, body_with(f"!error 403 locked at={operation}"))
    response = await fal.get(request_id, path)
    assert response.status == 403
    assert "User is locked" in (await response.json())["detail"]


async def test_a_cancel_fails_with_the_requested_fault(fal: OfflineFal) -> None:
    request_id = await fal.submit(DEV, body_with("!delay 30 !error 503 at=cancel"))
    assert (await fal.cancel(request_id)).status == 503


async def test_only_the_first_calls_fail(fal: OfflineFal) -> None:
    statuses = [
        (await fal.run(DEV, body_with("!error 503 runner_connection_error times=2"))).status
        for _ in range(4)
    ]
    assert statuses == [503, 503, 200, 200]
    assert fal.sandbox.jobs == 2


async def test_failures_are_counted_by_prompt(fal: OfflineFal) -> None:
    prompts = [f"!error 503 times=1 {name}" for name in ("a", "b", "a", "b")]
    statuses = [(await fal.run(DEV, body_with(prompt))).status for prompt in prompts]
    assert statuses == [503, 503, 200, 200]


async def test_only_the_first_submits_fail(fal: OfflineFal) -> None:
    body = body_with("!error 429 concurrent_requests_limit at=submit times=1")
    first = await fal.client.post(f"/queue.fal.run/{DEV}", json=body, headers=KEY)
    second = await fal.client.post(f"/queue.fal.run/{DEV}", json=body, headers=KEY)
    assert (first.status, second.status) == (429, 200)
    assert first.headers["X-Fal-needs-retry"] == "1"


async def test_an_unknown_fault_is_a_400_that_lists_the_faults(fal: OfflineFal) -> None:
    response = await fal.run(DEV, body_with("!error 418 teapot"))
    assert response.status == 400
    assert "422 content_policy_violation" in (await response.json())["detail"]


@pytest.mark.parametrize(
    ("prompt", "directive"),
    [
        pytest.param("a cat", None, id="none"),
        pytest.param("!error 500", FaultDirective(500, "", None, "job"), id="status alone"),
        pytest.param(
            "!error 502 nginx", FaultDirective(502, "nginx", None, "job"), id="with a name"
        ),
        pytest.param(
            "!error 429 at=submit", FaultDirective(429, "", None, "submit"), id="no name, at"
        ),
        pytest.param(
            "!error 503 nginx times=2 at=submit a cat",
            FaultDirective(503, "nginx", 2, "submit"),
            id="all",
        ),
        pytest.param("a cat !error 500", FaultDirective(500, "", None, "job"), id="at the end"),
        pytest.param("!error 503 times=x", FaultDirective(503, "", None, "job"), id="no number"),
    ],
)
def test_fault_directives_are_parsed(prompt: str, directive: FaultDirective | None) -> None:
    assert parse_fault_directive(prompt) == directive


@pytest.mark.parametrize(
    ("prompt", "seconds"), [("a cat", None), ("!delay 3", 3.0), ("x !delay 0.5 y", 0.5)]
)
def test_delay_directives_are_parsed(prompt: str, seconds: float | None) -> None:
    assert parse_delay_directive(prompt) == seconds


@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        pytest.param("!error 500", "unhandled", id="500"),
        pytest.param("!error 502", "nginx", id="502"),
        pytest.param("!error 422", "content_policy_violation", id="422"),
        pytest.param("!error 403", "locked", id="403"),
    ],
)
async def test_a_status_without_a_name_has_a_default_fault(
    fal: OfflineFal, prompt: str, name: str
) -> None:
    [fault] = [fault for fault in FAULTS if fault.name == name and str(fault.status) in prompt]
    response = await fal.run(DEV, body_with(prompt))
    check_shape(fault, await response.text(), response.headers)
