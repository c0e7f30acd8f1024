"""Takeover of jobs whose lease has expired, by a proxy that gets other requests of the API."""

import sqlite3
import time
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from falproxy.dialects.generate.takeover import FOLLOWED_MAX
from falproxy.stores.ledger import JobRow, Lease
from falproxy.stores.ledger.writer import LEDGER_WRITER
from tests.support.generate_house import House, open_house, until

ENDPOINT, APP = "fal-ai/flux/dev", "fal-ai/flux"
EXPIRED = Lease("dead", 0.0)
QUICK, ENDLESS = "!delay 0 a heron", "!delay 60 a heron"
KEYS = (("ann", "secret-of-ann"), ("ben", "secret-of-ben"))
ANN, BEN = {"x-falproxy-key": "secret-of-ann"}, {"x-falproxy-key": "secret-of-ben"}


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[House]:
    async with open_house(tmp_path) as opened:
        yield opened


async def submit(house: House, prompt: str, headers: dict[str, str] | None = None) -> str:
    """Submit a job to fal without the API. Return fal's id."""
    body = {"prompt": prompt, "image_size": {"width": 64, "height": 48}}
    target = f"https://queue.fal.run/{ENDPOINT}"
    reply = await house.through(target, body, headers=headers or {})
    assert reply.status == 200, reply
    return str(reply.document["request_id"])


async def add_job(
    house: House, request_id: str | None, lease: Lease = EXPIRED, owner: str = ""
) -> None:
    row = JobRow(
        owner=owner,
        model="flux-dev",
        endpoint=ENDPOINT,
        app=APP if request_id else "",
        request_id=request_id,
        status="running" if request_id else "queued",
    )
    await house.app[LEDGER_WRITER].ledger.add_job(row, lease)


async def use_api(house: House, headers: dict[str, str] | None = None) -> None:
    assert (await house.job("unknown", headers)).status == 404


def statuses(house: House) -> dict[str, Any]:
    """The status of each job by fal's id."""
    return {row["request_id"]: row["status"] for row in house.jobs()}


def polls(house: House, request_id: str) -> int:
    return sum(request_id in seen.path for seen in house.sent)


async def test_a_job_with_an_expired_lease_is_followed_to_its_result(house: House) -> None:
    request_id = await submit(house, QUICK)
    await add_job(house, request_id)
    await use_api(house)
    await until(lambda: statuses(house) == {request_id: "completed"})
    (row,) = house.jobs()
    assert row["settled"] == 25_000
    assert row["follower"] != EXPIRED.owner
    assert (house.submits, house.sandbox.jobs) == (1, 1)
    (record,) = await house.entries()
    assert record.settled == 25_000


async def test_a_failed_job_is_recorded_with_its_error(house: House) -> None:
    request_id = await submit(house, "!delay 0 !error 422 content_policy_violation")
    await add_job(house, request_id)
    await use_api(house)
    await until(lambda: statuses(house) == {request_id: "failed"})
    assert house.jobs()[0]["error"] == "content_policy_violation"


async def test_outputs_are_stored_under_the_url_of_the_first_request(tmp_path: Path) -> None:
    async with open_house(tmp_path, rehost="disk") as house:
        request_id = await submit(house, QUICK)
        await add_job(house, request_id)
        await use_api(house)
        await until(lambda: statuses(house) == {request_id: "completed"})
        assert f'"{house.origin}/files/' in house.jobs()[0]["images"]


async def test_a_job_that_fal_never_accepted_is_failed_and_not_submitted(house: House) -> None:
    await add_job(house, None)
    with closing(sqlite3.connect(house.data_dir / "ledger.sqlite")) as file, file:
        file.execute("UPDATE falproxy_jobs SET created_at = created_at - 301000")
    await use_api(house)
    await until(lambda: statuses(house) == {None: "failed"})
    assert house.jobs()[0]["error"] == "job_lost"
    assert house.sandbox.seen == []


async def test_a_job_with_a_valid_lease_is_left_to_its_process(house: House) -> None:
    leased, expired = await submit(house, QUICK), await submit(house, QUICK)
    await add_job(house, leased, Lease("alive", 30.0))
    await add_job(house, expired)
    await use_api(house)
    await until(lambda: statuses(house)[expired] == "completed")
    assert statuses(house)[leased] == "running"
    assert polls(house, leased) == 0


async def test_without_a_request_of_the_api_nothing_is_taken_over(house: House) -> None:
    await add_job(house, await submit(house, QUICK))
    await submit(house, QUICK)
    assert {row["follower"] for row in house.jobs()} == {EXPIRED.owner}


async def test_a_job_is_polled_with_the_access_of_its_owner(tmp_path: Path) -> None:
    async with open_house(tmp_path, access_keys=KEYS) as house:
        request_id = await submit(house, QUICK, ANN)
        await add_job(house, request_id, owner="key:ann")
        await use_api(house, BEN)
        await until(lambda: statuses(house) == {request_id: "completed"})


async def test_a_job_that_its_owner_may_not_poll_is_given_up(tmp_path: Path) -> None:
    async with open_house(tmp_path, access_keys=KEYS) as house:
        foreign, own = await submit(house, QUICK, BEN), await submit(house, QUICK, ANN)
        await add_job(house, foreign, owner="key:ann")
        await add_job(house, own, owner="key:ann")
        await use_api(house, BEN)
        await until(lambda: statuses(house)[own] == "completed")
        assert statuses(house)[foreign] == "running"
        assert polls(house, foreign) == 0


async def test_the_number_of_followed_jobs_is_bounded(tmp_path: Path) -> None:
    async with open_house(tmp_path, speed=1) as house:
        request_id = await submit(house, ENDLESS)
        for _ in range(FOLLOWED_MAX + 5):
            await add_job(house, request_id)
        await use_api(house)
        await until(lambda: polls(house, request_id) >= FOLLOWED_MAX)
        followers = [row["follower"] for row in house.jobs()]
        assert followers.count(EXPIRED.owner) == 5
        assert house.submits == 1


@pytest.mark.timed
async def test_followed_jobs_do_not_delay_the_shutdown(tmp_path: Path) -> None:
    async with open_house(tmp_path, speed=1) as house:
        request_id = await submit(house, ENDLESS)
        await add_job(house, request_id)
        await use_api(house)
        await until(lambda: polls(house, request_id) > 0)
        started = time.monotonic()
    assert time.monotonic() - started < 5
    assert statuses(house) == {request_id: "running"}
    assert house.cancels == []
