"""Errors on demand: every row of fal's error pages, by run and through the queue."""

import json
from typing import Any

import pytest
from aiohttp.pytest_plugin import AiohttpClient

from falproxy.sandbox.faults import TABLE, Fault, Order, Shape, read_delay, read_order
from tests.support.offline_fal import DEV, KEY, SMALL, OfflineFal, offline_fal

ROWS = [pytest.param(row, id=f"{row.status} {row.kind}") for row in TABLE]


@pytest.fixture
async def fal(aiohttp_client: AiohttpClient) -> OfflineFal:
    return await offline_fal(aiohttp_client)


def body_of(prompt: str) -> dict[str, object]:
    return {"prompt": prompt, "image_size": SMALL}


def check_shape(row: Fault, text: str, headers: Any) -> None:
    """The body and the headers are those of the row's shape."""
    if row.shape is Shape.HTML:
        assert "nginx" in text
        assert headers["Content-Type"].startswith("text/html")
        assert "x-fal-request-id" not in headers
        return
    document = json.loads(text)
    assert headers["x-fal-request-id"]
    if row.shape is Shape.MODEL:
        [entry] = document["detail"]
        assert (entry["type"], entry["msg"]) == (row.kind, row.text)
        assert entry["url"] == f"https://docs.fal.ai/errors/#{row.kind}"
        assert entry.get("ctx") == row.ctx
        assert headers["X-Fal-Retryable"] == ("true" if row.is_retryable else "false")
    if row.shape is Shape.REQUEST:
        assert document == {"detail": row.text, "error_type": row.kind}
        assert headers["X-Fal-Error-Type"] == row.kind
    if row.shape is Shape.PLAIN:
        assert document == {"detail": row.text}
    if row.shape is Shape.STATUS:
        assert document == {"status": row.text}
    assert {name: headers[name] for name in row.headers} == dict(row.headers)


@pytest.mark.parametrize("row", ROWS)
async def test_a_run_fails_as_asked(fal: OfflineFal, row: Fault) -> None:
    response = await fal.run(DEV, body_of(f"!error {row.status} {row.kind}"))
    assert response.status == row.status
    check_shape(row, await response.text(), response.headers)
    assert fal.sandbox.jobs == 0


@pytest.mark.parametrize("row", ROWS)
async def test_a_job_fails_as_asked(fal: OfflineFal, row: Fault) -> None:
    request_id = await fal.submit(DEV, body_of(f"!error {row.status} {row.kind}"))
    status = await fal.wait(request_id)
    response = await fal.ask(request_id)
    assert status["error"]
    assert status["error_type"]
    if row.shape in (Shape.MODEL, Shape.REQUEST):
        assert (status["error"], status["error_type"]) == (row.text, row.kind)
    assert response.status == row.status
    check_shape(row, await response.text(), response.headers)
    assert fal.sandbox.jobs == 0


SUBMIT_ROWS = [row for row in TABLE if row.status in (401, 403, 429, 502, 503)]


@pytest.mark.parametrize(
    "row", [pytest.param(row, id=f"{row.status} {row.kind}") for row in SUBMIT_ROWS]
)
async def test_a_submit_fails_as_asked(fal: OfflineFal, row: Fault) -> None:
    body = body_of(f"!error {row.status} {row.kind} at=submit")
    response = await fal.client.post(f"/queue.fal.run/{DEV}", json=body, headers=KEY)
    assert response.status == row.status
    check_shape(row, await response.text(), response.headers)


@pytest.mark.parametrize(("at", "verb"), [("status", "/status"), ("result", "")])
async def test_a_locked_account_cannot_even_look(fal: OfflineFal, at: str, verb: str) -> None:
    request_id = await fal.submit(DEV, body_of(f"!error 403 locked at={at}"))
    response = await fal.ask(request_id, verb)
    assert response.status == 403
    assert "User is locked" in (await response.json())["detail"]


async def test_a_cancel_fails_as_asked(fal: OfflineFal) -> None:
    request_id = await fal.submit(DEV, body_of("!delay 30 !error 503 at=cancel"))
    assert (await fal.cancel(request_id)).status == 503


async def test_only_the_first_calls_fail(fal: OfflineFal) -> None:
    statuses = [
        (await fal.run(DEV, body_of("!error 503 runner_connection_error times=2"))).status
        for _ in range(4)
    ]
    assert statuses == [503, 503, 200, 200]
    assert fal.sandbox.jobs == 2


async def test_each_prompt_has_its_own_count(fal: OfflineFal) -> None:
    prompts = [f"!error 503 times=1 {name}" for name in ("a", "b", "a", "b")]
    statuses = [(await fal.run(DEV, body_of(prompt))).status for prompt in prompts]
    assert statuses == [503, 503, 200, 200]


async def test_only_the_first_submits_fail(fal: OfflineFal) -> None:
    body = body_of("!error 429 concurrent_requests_limit at=submit times=1")
    first = await fal.client.post(f"/queue.fal.run/{DEV}", json=body, headers=KEY)
    second = await fal.client.post(f"/queue.fal.run/{DEV}", json=body, headers=KEY)
    assert (first.status, second.status) == (429, 200)
    assert first.headers["X-Fal-needs-retry"] == "1"


async def test_an_error_that_fal_does_not_have_is_explained(fal: OfflineFal) -> None:
    response = await fal.run(DEV, body_of("!error 418 teapot"))
    assert response.status == 400
    assert "422 content_policy_violation" in (await response.json())["detail"]


@pytest.mark.parametrize(
    ("prompt", "order"),
    [
        pytest.param("a cat", None, id="none"),
        pytest.param("!error 500", Order(500, "", None, "job"), id="status alone"),
        pytest.param("!error 502 nginx", Order(502, "nginx", None, "job"), id="with a kind"),
        pytest.param("!error 429 at=submit", Order(429, "", None, "submit"), id="no kind, at"),
        pytest.param(
            "!error 503 nginx times=2 at=submit a cat", Order(503, "nginx", 2, "submit"), id="all"
        ),
        pytest.param("a cat !error 500", Order(500, "", None, "job"), id="at the end"),
        pytest.param("!error 503 times=x", Order(503, "", None, "job"), id="no number"),
    ],
)
def test_orders_are_read(prompt: str, order: Order | None) -> None:
    assert read_order(prompt) == order


@pytest.mark.parametrize(
    ("prompt", "seconds"), [("a cat", None), ("!delay 3", 3.0), ("x !delay 0.5 y", 0.5)]
)
def test_delays_are_read(prompt: str, seconds: float | None) -> None:
    assert read_delay(prompt) == seconds


@pytest.mark.parametrize(
    ("prompt", "kind"),
    [
        pytest.param("!error 500", "unhandled", id="500"),
        pytest.param("!error 502", "nginx", id="502"),
        pytest.param("!error 422", "content_policy_violation", id="422"),
        pytest.param("!error 403", "locked", id="403"),
    ],
)
async def test_a_bare_status_has_a_usual_kind(fal: OfflineFal, prompt: str, kind: str) -> None:
    [row] = [row for row in TABLE if row.kind == kind and str(row.status) in prompt]
    response = await fal.run(DEV, body_of(prompt))
    check_shape(row, await response.text(), response.headers)
