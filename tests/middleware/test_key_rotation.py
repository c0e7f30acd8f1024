"""Rotation of several fal keys; a queued request stays with its key."""

import logging
from pathlib import Path
from uuid import uuid4

import pytest
from aiohttp import web

from tests.support.fake_fal import FakeFal
from tests.support.gateway import Gateway, MakeGateway
from tests.support.urls import RUN, SUBMIT

QUEUE = "https://queue.fal.run/fal-ai/flux/requests/"
AI_KEYS = ("one:a", "two:b", "three:c")


async def accept_submit(request: web.Request) -> web.StreamResponse:
    return web.json_response({"request_id": str(uuid4())})


def last_key(fal: FakeFal) -> str | None:
    return fal.seen[-1].header("authorization")


@pytest.fixture
async def gateway(make_gateway: MakeGateway, fal: FakeFal) -> Gateway:
    fal.respond = accept_submit
    return await make_gateway(fal.origin, ai_keys=AI_KEYS)


@pytest.mark.parametrize("target", [RUN, SUBMIT])
async def test_calls_use_the_keys_in_turn(gateway: Gateway, fal: FakeFal, target: str) -> None:
    for _ in range(6):
        assert (await gateway.call(target, json={})).status == 200
    used = [seen.header("authorization") for seen in fal.seen]
    assert used[:3] == used[3:]
    assert {*used} == {f"Key {key}" for key in AI_KEYS}


async def check_restart(
    make_gateway: MakeGateway, fal: FakeFal, settings: dict[str, object]
) -> None:
    """Submit with several keys, and check the key of all further requests, also after a restart
    with the keys in another order."""
    fal.respond = accept_submit
    gateway = await make_gateway(fal.origin, ai_keys=AI_KEYS, **settings)
    submitted = {}
    for _ in range(5):
        response = await gateway.call(SUBMIT, json={})
        submitted[(await response.json())["request_id"]] = last_key(fal)
    restarted = await make_gateway(fal.origin, ai_keys=AI_KEYS[::-1], **settings)
    for process in (gateway, restarted):
        for request_id, key in submitted.items():
            for method, suffix in (("GET", "/status"), ("GET", ""), ("PUT", "/cancel")):
                await process.call(f"{QUEUE}{request_id}{suffix}", method)
                assert last_key(fal) == key


async def test_a_request_stays_with_the_key_that_submitted_it(
    make_gateway: MakeGateway, fal: FakeFal, store_settings: dict[str, object]
) -> None:
    await check_restart(make_gateway, fal, store_settings)


async def test_a_request_stays_with_its_key_without_the_result_cache(
    make_gateway: MakeGateway, fal: FakeFal, tmp_path: Path
) -> None:
    await check_restart(make_gateway, fal, {"cache": False})
    assert not list(tmp_path.glob("results*"))
    assert list(tmp_path.glob("submissions.sqlite"))


async def test_owners_of_the_local_store_are_the_same_without_the_result_cache(
    make_gateway: MakeGateway, fal: FakeFal
) -> None:
    fal.respond = accept_submit
    with_cache = await make_gateway(fal.origin, ai_keys=AI_KEYS)
    request_id = (await (await with_cache.call(SUBMIT, json={})).json())["request_id"]
    key = last_key(fal)
    without_cache = await make_gateway(fal.origin, ai_keys=AI_KEYS[::-1], cache=False)
    for _ in range(3):
        await without_cache.call(f"{QUEUE}{request_id}/status", "GET")
        assert last_key(fal) == key


async def test_a_file_of_owners_that_cannot_be_used_is_logged_at_the_start(
    make_gateway: MakeGateway, fal: FakeFal, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "submissions.sqlite").mkdir()
    await make_gateway(fal.origin, ai_keys=AI_KEYS)
    assert "request owners are lost at a restart" in caplog.text


OTHER_ACCOUNT = [401, 403, 404]


@pytest.mark.parametrize("other_status", OTHER_ACCOUNT)
@pytest.mark.parametrize(
    ("method", "suffix"), [("GET", "/status"), ("GET", ""), ("PUT", "/cancel")]
)
async def test_a_job_whose_key_is_unknown_is_requested_with_each_key(
    gateway: Gateway, fal: FakeFal, other_status: int, method: str, suffix: str
) -> None:
    async def know_with_key_three(request: web.Request) -> web.StreamResponse:
        known = request.headers["Authorization"] == "Key three:c"
        return web.json_response({"known": known}, status=200 if known else other_status)

    fal.respond = know_with_key_three
    url = f"{QUEUE}{uuid4()}{suffix}"
    assert await (await gateway.call(url, method)).json() == {"known": True}
    assert len(fal.seen) == 3
    fal.seen.clear()
    assert (await gateway.call(url, method)).status == 200
    assert [seen.header("authorization") for seen in fal.seen] == ["Key three:c"]


@pytest.mark.parametrize("other_status", [401, 403, 404])
async def test_a_job_is_requested_with_each_key_while_its_key_cannot_be_looked_up(
    make_gateway: MakeGateway, fal: FakeFal, tmp_path: Path, other_status: int
) -> None:
    async def know_with_key_three(request: web.Request) -> web.StreamResponse:
        known = request.headers["Authorization"] == "Key three:c"
        return web.json_response({"known": known}, status=200 if known else other_status)

    (tmp_path / "submissions.sqlite").mkdir()
    gateway = await make_gateway(fal.origin, ai_keys=AI_KEYS)
    fal.respond = know_with_key_three
    for _ in range(3):
        response = await gateway.call(f"{QUEUE}{uuid4()}/status", "GET")
        assert await response.json() == {"known": True}


async def test_a_job_that_no_key_knows_is_a_404(gateway: Gateway, fal: FakeFal) -> None:
    async def know_nothing(request: web.Request) -> web.StreamResponse:
        status = 401 if request.headers["Authorization"] == "Key three:c" else 404
        return web.json_response({"detail": "Not found"}, status=status)

    fal.respond = know_nothing
    response = await gateway.call(f"{QUEUE}{uuid4()}/status", "GET")
    assert (response.status, await response.json()) == (404, {"detail": "Not found"})
    assert len(fal.seen) == 3


async def test_a_post_is_not_sent_with_each_key(gateway: Gateway, fal: FakeFal) -> None:
    async def know_nothing(request: web.Request) -> web.StreamResponse:
        return web.json_response({}, status=404)

    fal.respond = know_nothing
    assert (await gateway.call(f"{QUEUE}{uuid4()}", json={})).status == 404
    assert len(fal.seen) == 1


@pytest.mark.parametrize(
    ("status", "body"),
    [
        pytest.param(401, {"detail": "No user found for Key ID and Secret"}, id="wrong"),
        pytest.param(403, {"detail": "User is locked. Reason: Exhausted balance."}, id="locked"),
    ],
)
async def test_a_rejected_key_is_not_used_during_its_cooldown(
    gateway: Gateway,
    fal: FakeFal,
    caplog: pytest.LogCaptureFixture,
    status: int,
    body: dict[str, str],
) -> None:
    async def reject_key_two(request: web.Request) -> web.StreamResponse:
        if request.headers["Authorization"] == "Key two:b":
            return web.json_response(body, status=status)
        return await accept_submit(request)

    fal.respond = reject_key_two
    responses = [await gateway.call(SUBMIT, json={}) for _ in range(9)]
    rejected = [response for response in responses if response.status != 200]
    assert [(response.status, await response.json()) for response in rejected] == [(status, body)]
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert [text for text in warnings if "position 2" in text]
    assert "two:b" not in caplog.text


WRONG_KEY = {"detail": "No user found for Key ID and Secret"}
NO_ACCESS = {
    "detail": 'Cannot access application "fal-ai/flux". Authentication is required to access this '
    "application."
}
FROM_MODEL = {"x-fal-request-id": "7e2f0b8a-0001-4000-8000-000000000001"}


@pytest.mark.parametrize("target", [RUN, SUBMIT, f"{QUEUE}00000000-0000-4000-8000-000000000001"])
@pytest.mark.parametrize(
    ("status", "body", "headers", "is_rejection"),
    [
        pytest.param(401, WRONG_KEY, {}, True, id="a wrong key"),
        pytest.param(401, NO_ACCESS, {}, True, id="a wrong key at fal.run"),
        pytest.param(401, {"error": "missing Authorization header"}, {}, True, id="live video"),
        pytest.param(401, {"error": {"type": "authorization_error"}}, {}, True, id="the platform"),
        pytest.param(401, WRONG_KEY, FROM_MODEL, False, id="a model that itself calls fal"),
        pytest.param(401, {"detail": "Log in first"}, FROM_MODEL, False, id="a model's own word"),
        pytest.param(401, {"detail": [{"msg": "?"}]}, {}, False, id="a model's error format"),
        pytest.param(401, {"images": []}, {}, False, id="no error at all"),
        pytest.param(401, ["?"], {}, False, id="no object"),
        pytest.param(403, {"detail": "User is locked. Reason: TOP_UP."}, {}, True, id="locked"),
        pytest.param(403, {"detail": "Forbidden"}, {}, False, id="a 403 about the call"),
        pytest.param(403, {"detail": "Seen: User is locked"}, {}, False, id="a quote"),
        pytest.param(403, {"detail": [{"msg": "User is locked"}]}, {}, False, id="a model's list"),
        pytest.param(402, WRONG_KEY, {}, False, id="a 402"),
        pytest.param(423, WRONG_KEY, {}, False, id="a 423"),
        pytest.param(429, {"detail": "User is locked"}, {}, False, id="a rate limit"),
        pytest.param(503, WRONG_KEY, {}, False, id="a failure"),
    ],
)
async def test_only_the_gateway_s_own_word_takes_a_key_out_of_the_rotation(
    gateway: Gateway,
    fal: FakeFal,
    target: str,
    status: int,
    body: object,
    headers: dict[str, str],
    is_rejection: bool,
) -> None:
    async def refuse(request: web.Request) -> web.StreamResponse:
        return web.json_response(body, status=status, headers=headers)

    fal.respond = refuse
    method = "GET" if "/requests/" in target else "POST"
    response = await gateway.call(target, method)
    assert (response.status, await response.json()) == (status, body)
    refused = last_key(fal)
    fal.respond = accept_submit
    fal.seen.clear()
    for _ in range(2 * len(AI_KEYS)):
        await gateway.call(SUBMIT, json={})
    used = {seen.header("authorization") for seen in fal.seen}
    assert (refused not in used) is is_rejection


async def test_a_403_about_the_call_does_not_reject_the_key(gateway: Gateway, fal: FakeFal) -> None:
    async def forbid(request: web.Request) -> web.StreamResponse:
        return web.json_response({"detail": "Forbidden"}, status=403)

    fal.respond = forbid
    for _ in range(6):
        assert await (await gateway.call(SUBMIT, json={})).json() == {"detail": "Forbidden"}
    assert len({seen.header("authorization") for seen in fal.seen}) == 3


async def test_an_open_proxy_with_one_key_does_not_read_submit_responses(
    make_gateway: MakeGateway, fal: FakeFal, tmp_path: Path
) -> None:
    gateway = await make_gateway(fal.origin)
    await gateway.call(SUBMIT, json={}, headers=[("Accept-Encoding", "gzip")])
    assert fal.seen[0].header("accept-encoding") == "gzip"
    assert not list(tmp_path.glob("submissions*"))
