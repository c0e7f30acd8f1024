"""Several fal keys, the file that remembers which request went out with which."""

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


async def play_queue(request: web.Request) -> web.StreamResponse:
    return web.json_response({"request_id": str(uuid4())})


def key_of(fal: FakeFal) -> str | None:
    return fal.seen[-1].header("authorization")


@pytest.fixture
async def many(make_gateway: MakeGateway, fal: FakeFal) -> Gateway:
    fal.answer = play_queue
    return await make_gateway(fal.origin, ai_keys=AI_KEYS)


@pytest.mark.parametrize("target", [RUN, SUBMIT])
async def test_keys_take_turns(many: Gateway, fal: FakeFal, target: str) -> None:
    for _ in range(6):
        assert (await many.call(target, json={})).status == 200
    used = [seen.header("authorization") for seen in fal.seen]
    assert used[:3] == used[3:]
    assert {*used} == {f"Key {key}" for key in AI_KEYS}


async def test_a_request_stays_with_the_key_that_submitted_it(
    many: Gateway, fal: FakeFal, make_gateway: MakeGateway
) -> None:
    submitted = {}
    for _ in range(5):
        response = await many.call(SUBMIT, json={})
        submitted[(await response.json())["request_id"]] = key_of(fal)
    # After a restart with the keys in another order it is still the same key.
    again = await make_gateway(fal.origin, ai_keys=AI_KEYS[::-1])
    for gateway in (many, again):
        for request_id, key in submitted.items():
            for method, verb in (("GET", "/status"), ("GET", ""), ("PUT", "/cancel")):
                await gateway.call(f"{QUEUE}{request_id}{verb}", method)
                assert key_of(fal) == key


@pytest.mark.parametrize(
    ("status", "body"),
    [
        pytest.param(401, {"detail": "No user found for Key ID and Secret"}, id="wrong"),
        pytest.param(403, {"detail": "User is locked. Reason: Exhausted balance."}, id="locked"),
    ],
)
async def test_a_key_that_fal_refuses_is_left_alone(
    many: Gateway,
    fal: FakeFal,
    caplog: pytest.LogCaptureFixture,
    status: int,
    body: dict[str, str],
) -> None:
    async def refuse_two(request: web.Request) -> web.StreamResponse:
        if request.headers["Authorization"] == "Key two:b":
            return web.json_response(body, status=status)
        return await play_queue(request)

    fal.answer = refuse_two
    answers = [await many.call(SUBMIT, json={}) for _ in range(9)]
    refused = [answer for answer in answers if answer.status != 200]
    assert [(answer.status, await answer.json()) for answer in refused] == [(status, body)]
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert [text for text in warnings if "position 2" in text]
    assert "two:b" not in caplog.text


async def test_a_403_that_is_about_the_call_says_nothing_about_the_key(
    many: Gateway, fal: FakeFal
) -> None:
    async def refuse(request: web.Request) -> web.StreamResponse:
        return web.json_response({"detail": "Forbidden"}, status=403)

    fal.answer = refuse
    for _ in range(6):
        assert await (await many.call(SUBMIT, json={})).json() == {"detail": "Forbidden"}
    assert len({seen.header("authorization") for seen in fal.seen}) == 3


async def test_one_key_and_no_list_leave_the_answer_to_a_submit_alone(
    make_gateway: MakeGateway, fal: FakeFal, tmp_path: Path
) -> None:
    gateway = await make_gateway(fal.origin)
    await gateway.call(SUBMIT, json={}, headers=[("Accept-Encoding", "gzip")])
    assert fal.seen[0].header("accept-encoding") == "gzip"
    assert not list(tmp_path.glob("submissions*"))
