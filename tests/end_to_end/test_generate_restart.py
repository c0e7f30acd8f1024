"""Jobs of `/api/images` over real processes: one is killed, and another one continues its jobs."""

import asyncio
import signal
import sqlite3
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from aiohttp import ClientSession
from aiohttp.pytest_plugin import AiohttpServer

from falproxy.stores.cache.virtual_requests import is_virtual_id
from tests.support.cache_processes import Fal, open_client, open_fal, serving
from tests.support.cli_process import CliProcess
from tests.support.key_search import CANARY
from tests.support.sandbox_proxy import ASYNC, GENERATE, select_rows
from tests.support.waiting import wait_until

JOB_SECONDS = 1.5  # duration of a job: longer than the start of a process
SLOW = f"!delay {JOB_SECONDS} a heron at dawn"
TEXT = "kontext-text-to-image"


@pytest.fixture
async def fal(aiohttp_server: AiohttpServer) -> Fal:
    return await open_fal(aiohttp_server)


@pytest.fixture
async def client() -> AsyncIterator[ClientSession]:
    async with open_client() as session:
        yield session


@pytest.fixture
def env(fal: Fal, tmp_path: Path) -> dict[str, str]:
    return {
        "FAL_KEY": CANARY,
        "FALPROXY_UPSTREAM_ORIGIN": fal.origin,
        "FALPROXY_DATA_DIR": str(tmp_path),
    }


async def generate(
    client: ClientSession, proxy: CliProcess, model: str, **inputs: object
) -> tuple[int, Any]:
    body = {"model": model, "inputs": inputs, "userId": "ada"}
    async with client.post(proxy.origin + GENERATE, json=body, headers=ASYNC) as response:
        return response.status, await response.json()


async def get_job(client: ClientSession, proxy: CliProcess, job_id: str) -> Any:
    async with client.get(f"{proxy.origin}/api/images/jobs/{job_id}") as response:
        assert response.status == 200, await response.text()
        return await response.json()


async def wait_finished(client: ClientSession, proxy: CliProcess, job_id: str) -> Any:
    while (job := await get_job(client, proxy, job_id))["status"] == "running":
        await asyncio.sleep(0.02)
    return job


def job_rows(data_dir: Path) -> list[dict[str, Any]]:
    return select_rows(data_dir, "SELECT * FROM falproxy_jobs")


def expire_leases(data_dir: Path) -> None:
    with closing(sqlite3.connect(data_dir / "ledger.sqlite")) as file, file:
        file.execute("UPDATE falproxy_jobs SET followed_until = 0")


def submits(fal: Fal) -> int:
    return sum(seen.method == "POST" for seen in fal.sandbox.seen)


async def test_a_job_survives_the_death_of_its_process(
    fal: Fal, client: ClientSession, env: dict[str, str]
) -> None:
    async with serving(**env) as first:
        status, job = await generate(client, first, "flux-dev", prompt=SLOW)
        assert (status, job["status"]) == (202, "running")
        await first.stop(signal.SIGKILL)
    async with serving(**env) as second:
        assert (await get_job(client, second, job["jobId"]))["status"] in ("running", "completed")
        finished = await wait_finished(client, second, job["jobId"])
        assert (finished["status"], finished["userId"], finished["cost"]) == (
            "completed",
            "ada",
            0.025,
        )
        assert finished["imageUrl"].startswith(fal.origin)
        assert (submits(fal), fal.sandbox.jobs) == (1, 1)
        requests = len(fal.sandbox.seen)
        assert await get_job(client, second, job["jobId"]) == finished
        assert len(fal.sandbox.seen) == requests


async def test_a_job_of_a_dead_process_is_taken_over_without_a_request_for_it(
    fal: Fal, client: ClientSession, env: dict[str, str], tmp_path: Path
) -> None:
    async with serving(**env) as first:
        _, job = await generate(client, first, "flux-dev", prompt=SLOW)
        await first.stop(signal.SIGKILL)
    expire_leases(tmp_path)
    async with serving(**env) as second:
        async with client.get(f"{second.origin}/api/images/jobs/unknown") as response:
            assert response.status == 404
        await wait_until(lambda: job_rows(tmp_path)[0]["status"] == "completed", seconds=20)
    (row,) = job_rows(tmp_path)
    assert (row["id"], row["settled"]) == (job["jobId"], 25_000)
    assert (submits(fal), fal.sandbox.jobs) == (1, 1)


async def test_a_job_that_failed_meanwhile_is_reported_as_failed(
    fal: Fal, client: ClientSession, env: dict[str, str]
) -> None:
    async with serving(**env) as first:
        prompt = "!delay 1 !error 422 content_policy_violation"
        _, job = await generate(client, first, "flux-dev", prompt=prompt)
        await first.stop(signal.SIGKILL)
    async with serving(**env) as second:
        finished = await wait_finished(client, second, job["jobId"])
        assert (finished["status"], finished["images"]) == ("failed", [])
        assert finished["error"]["code"] == "content_policy_violation"
        assert (submits(fal), fal.sandbox.jobs) == (1, 0)


async def test_jobs_that_share_one_of_fal_survive_as_well(
    fal: Fal, client: ClientSession, env: dict[str, str], tmp_path: Path
) -> None:
    async with serving(**env) as first:
        jobs = [(await generate(client, first, TEXT, prompt=SLOW))[1] for _ in range(3)]
        assert {job["status"] for job in jobs} == {"running"}
        await first.stop(signal.SIGKILL)
    ids = [row["request_id"] for row in select_rows(tmp_path, "SELECT * FROM falproxy_jobs")]
    assert sorted(map(is_virtual_id, ids)) == [False, True, True]
    async with serving(**env) as second:
        finished = [await wait_finished(client, second, job["jobId"]) for job in jobs]
        assert {job["status"] for job in finished} == {"completed"}
        assert len({job["imageUrl"] for job in finished}) == 1
        assert sorted(job["cost"] for job in finished) == [0, 0, 0.04]
        assert (submits(fal), fal.sandbox.jobs) == (1, 1)


async def test_a_job_with_a_cached_result_survives_as_well(
    fal: Fal, client: ClientSession, env: dict[str, str]
) -> None:
    async with serving(**env) as first:
        _, bought = await generate(client, first, TEXT, prompt="a heron", seed=1)
        assert (await wait_finished(client, first, bought["jobId"]))["cost"] == 0.04
        await wait_until(lambda: fal.delivered.is_set(), seconds=20)
        _, kept = await generate(client, first, TEXT, prompt="a heron", seed=1)
        await first.stop(signal.SIGKILL)
    async with serving(**env) as second:
        jobs = [await wait_finished(client, second, job["jobId"]) for job in (bought, kept)]
        assert [job["cost"] for job in jobs] == [0.04, 0]
        assert jobs[0]["images"] == jobs[1]["images"]
        assert (submits(fal), fal.sandbox.jobs) == (1, 1)


async def test_a_job_survives_an_orderly_shutdown(
    fal: Fal, client: ClientSession, env: dict[str, str]
) -> None:
    async with serving(**env | {"FALPROXY_DRAIN": "0.2"}) as first:
        _, job = await generate(client, first, "flux-dev", prompt=SLOW)
        assert await first.stop() == 0
    async with serving(**env) as second:
        assert (await wait_finished(client, second, job["jobId"]))["status"] == "completed"
        assert (submits(fal), fal.sandbox.jobs) == (1, 1)


async def test_jobs_are_polled_with_the_fal_key_of_their_submit(
    fal: Fal, client: ClientSession, env: dict[str, str]
) -> None:
    env["AI_KEYS"] = "one:secret,two:secret"
    async with serving(**env) as first:
        prompts = [f"{SLOW}, {place}" for place in range(2)]
        jobs = [(await generate(client, first, "flux-dev", prompt=each))[1] for each in prompts]
        await first.stop(signal.SIGKILL)
    async with serving(**env) as second:
        finished = [await wait_finished(client, second, job["jobId"]) for job in jobs]
        assert [job["status"] for job in finished] == ["completed"] * 2
    assert fal.sandbox.keys_seen == {"Key one:secret", "Key two:secret"}
    assert (submits(fal), fal.sandbox.jobs) == (2, 2)
