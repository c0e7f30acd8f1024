"""Several fal keys, the file that remembers which request went out with which."""

import asyncio
import logging
from collections.abc import AsyncIterator
from pathlib import Path
from uuid import uuid4

import pytest
from aiohttp import web

from falproxy.stores.ownership import (
    RETENTION_SECONDS,
    RETRY_INTERVAL,
    LocalOwnership,
    RequestOwner,
)
from tests.support.fake_fal import FakeFal
from tests.support.gateway import Gateway, MakeGateway
from tests.support.urls import RUN, SUBMIT

QUEUE = "https://queue.fal.run/fal-ai/flux/requests/"
AI_KEYS = ("one:a", "two:b", "three:c")
ANN = RequestOwner("ann", "mark")


class Clock:
    now = 1e9

    def __call__(self) -> float:
        return self.now


@pytest.fixture
async def submissions(tmp_path: Path) -> AsyncIterator[LocalOwnership]:
    store = LocalOwnership(tmp_path / "below" / "submissions.sqlite")
    await store.open()
    yield store
    await store.close()


async def test_what_was_added_is_there(submissions: LocalOwnership) -> None:
    await submissions.add("1", ANN)
    assert await submissions.get("1") == ANN
    assert await submissions.get("2") is None


async def test_another_process_sees_it_at_once(submissions: LocalOwnership, tmp_path: Path) -> None:
    other = LocalOwnership(tmp_path / "below" / "submissions.sqlite")
    await other.open()
    await submissions.add("1", ANN)
    assert await other.get("1") == ANN
    await other.close()


async def test_the_first_word_stands(submissions: LocalOwnership, tmp_path: Path) -> None:
    other = LocalOwnership(tmp_path / "below" / "submissions.sqlite")
    await other.open()
    await submissions.add("1", ANN)
    for store in (submissions, other):
        await store.add("1", RequestOwner("bob", "mark"))
        assert await store.get("1") == ANN
    again = LocalOwnership(tmp_path / "below" / "submissions.sqlite")
    await again.open()
    assert await submissions.get("1") == await again.get("1") == ANN
    for store in (other, again):
        await store.close()


async def test_many_at_once_are_all_kept(submissions: LocalOwnership, tmp_path: Path) -> None:
    other = LocalOwnership(tmp_path / "below" / "submissions.sqlite")
    await other.open()
    stores = (submissions, other)
    await asyncio.gather(*(stores[n % 2].add(str(n), ANN) for n in range(200)))
    assert [await stores[(n + 1) % 2].get(str(n)) for n in range(200)] == [ANN] * 200
    await other.close()


async def test_a_poll_reads_the_file_once_at_most(
    submissions: LocalOwnership, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await submissions.add("1", ANN)
    again = LocalOwnership(tmp_path / "below" / "submissions.sqlite")
    await again.open()
    await again.get("1")
    (tmp_path / "below" / "submissions.sqlite").write_bytes(b"")
    assert [await again.get("1") for _ in range(3)] == [ANN] * 3
    await again.close()


async def test_what_fal_has_forgotten_is_forgotten(tmp_path: Path) -> None:
    clock = Clock()
    for age, found in ((0, ANN), (RETENTION_SECONDS - 1, ANN), (2, None)):
        clock.now += age
        store = LocalOwnership(tmp_path / "s.sqlite", clock)
        await store.open()
        if age == 0:
            await store.add("1", ANN)
        assert await store.get("1") == found
        await store.close()


@pytest.mark.parametrize("content", [b"no database" * 100, None], ids=["another file", "a folder"])
async def test_a_file_that_cannot_be_used_is_said_and_done_without(
    tmp_path: Path, content: bytes | None, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "s.sqlite"
    file.write_bytes(content) if content else file.mkdir()
    store = LocalOwnership(file)
    await store.open()
    await store.add("1", ANN)
    assert await store.get("1") == ANN
    assert await store.get("2") is None
    await store.close()
    assert "requests are forgotten at a restart" in caplog.text


async def test_a_file_that_was_not_to_be_had_at_the_start_is_used_later(tmp_path: Path) -> None:
    clock, folder = Clock(), tmp_path / "folder"
    folder.touch()  # where a folder is meant to be
    store = LocalOwnership(folder / "s.sqlite", clock)
    await store.open()
    folder.unlink()
    clock.now += RETRY_INTERVAL
    await store.add("1", ANN)
    await store.close()
    again = LocalOwnership(folder / "s.sqlite", clock)
    await again.open()
    assert await again.get("1") == ANN
    await again.close()


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
