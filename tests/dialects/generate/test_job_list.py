"""`/api/images/jobs`: pages of a caller's jobs, positions in fal's queue, and cancellation."""

import asyncio
from collections.abc import AsyncIterator
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from tests.support.fake_fal import FakeFal
from tests.support.sandbox_proxy import ASYNC, SandboxProxy, open_sandbox_proxy
from tests.support.waiting import wait_until

JOBS = "/api/images/jobs"
QUICK = {"prompt": "!delay 0 a heron", "image_size": {"width": 32, "height": 32}}
ENDLESS = {"prompt": "!delay 60 a heron"}
CANCELLED = {"code": "cancelled", "message": "The job was cancelled."}


@pytest.fixture
async def proxy(tmp_path: Path) -> AsyncIterator[SandboxProxy]:
    async with open_sandbox_proxy(tmp_path, drain=0.2) as opened:
        yield opened


async def list_jobs(proxy: SandboxProxy, query: str = "", headers: Any = None) -> Any:
    reply = await proxy.request("GET", JOBS + query, headers=headers)
    assert (reply.status, {*reply.document}) == (200, {"jobs", "nextCursor"}), reply
    return reply.document


async def start_endless(proxy: SandboxProxy, **more: Any) -> str:
    """Start a job that does not end, and return its id."""
    reply = await proxy.generate("flux-dev", ENDLESS, ASYNC, **more)
    assert reply.status == 202
    return str(reply.document["jobId"])


class TestList:
    async def test_is_empty_at_first(self, proxy: SandboxProxy) -> None:
        assert await list_jobs(proxy) == {"jobs": [], "nextCursor": None}
        assert proxy.sandbox.seen == []

    async def test_has_the_newest_job_first_as_it_is_read_alone(self, proxy: SandboxProxy) -> None:
        for seed in range(3):
            await proxy.generate("flux-schnell", {**QUICK, "seed": seed}, userId=f"user-{seed}")
        jobs = (await list_jobs(proxy))["jobs"]
        assert [job["userId"] for job in jobs] == ["user-2", "user-1", "user-0"]
        for job in jobs:
            assert (await proxy.job(job["jobId"])).document == job

    async def test_is_paged(self, proxy: SandboxProxy) -> None:
        ids = []
        for seed in range(5):
            reply = await proxy.generate("flux-schnell", {**QUICK, "seed": seed})
            ids.append(reply.document["jobId"])
        pages: list[list[str]] = []
        query = "?limit=2"
        while True:
            document = await list_jobs(proxy, query)
            pages.append([job["jobId"] for job in document["jobs"]])
            if document["nextCursor"] is None:
                break
            query = f"?limit=2&cursor={document['nextCursor']}"
        assert [len(page) for page in pages] == [2, 2, 1]
        assert [*chain.from_iterable(pages)] == ids[::-1]

    async def test_has_failed_and_running_jobs(self, proxy: SandboxProxy) -> None:
        await proxy.generate("flux-dev", {"prompt": "!error 422 content_policy_violation"})
        await start_endless(proxy)
        jobs = (await list_jobs(proxy))["jobs"]
        assert [job["status"] for job in jobs] == ["running", "failed"]

    async def test_has_own_jobs_only(self, tmp_path: Path) -> None:
        keys = (("ann", "s3cret-ann"), ("ben", "s3cret-ben"))
        ann, ben = ({"x-falproxy-key": secret} for _, secret in keys)
        async with open_sandbox_proxy(tmp_path, access_keys=keys) as proxy:
            await proxy.generate("flux-schnell", QUICK, ann)
            assert len((await list_jobs(proxy, headers=ann))["jobs"]) == 1
            assert (await list_jobs(proxy, headers=ben))["jobs"] == []

    @pytest.mark.parametrize(
        "query",
        ["?limit=0", "?limit=101", "?limit=-1", "?limit=x", "?limit=٣", "?limit=", "?cursor=x",
         "?cursor=1", "?cursor=1-", "?cursor=1-'", "?cursor=99999999999999999-a"],
    )  # fmt: skip
    async def test_an_invalid_page_is_a_400(self, proxy: SandboxProxy, query: str) -> None:
        reply = await proxy.request("GET", JOBS + query)
        assert reply.error == (400, "invalid_request")

    async def test_without_a_ledger_is_a_503(self, tmp_path: Path) -> None:
        url = "postgresql://u@127.0.0.1:9/x"
        async with open_sandbox_proxy(tmp_path, database_url=url, drain=1.0) as proxy:
            assert (await proxy.request("GET", JOBS)).error == (503, "ledger_unavailable")


def respond_queued(fal: FakeFal, position: object) -> None:
    async def respond(request: web.Request) -> web.StreamResponse:
        if request.method == "POST":
            return web.json_response({"request_id": "1", "status": "IN_QUEUE"})
        return web.json_response({"status": "IN_QUEUE", "queue_position": position})

    fal.respond = respond


class TestPosition:
    @pytest.mark.parametrize(("position", "status"), [(0, "queued"), (17, "queued")])
    async def test_is_there_while_the_job_waits(
        self, tmp_path: Path, fal: FakeFal, position: int, status: str
    ) -> None:
        respond_queued(fal, position)
        async with open_sandbox_proxy(tmp_path, upstream_origin=fal.origin, drain=0.2) as proxy:
            job_id = (await proxy.generate("flux-dev", QUICK, ASYNC)).document["jobId"]
            job = (await proxy.job(job_id)).document
            assert (job["status"], job["position"]) == (status, position)

    @pytest.mark.parametrize("position", [None, "3", True])
    async def test_is_left_out_if_fal_does_not_report_it(
        self, tmp_path: Path, fal: FakeFal, position: object
    ) -> None:
        respond_queued(fal, position)
        async with open_sandbox_proxy(tmp_path, upstream_origin=fal.origin, drain=0.2) as proxy:
            job_id = (await proxy.generate("flux-dev", QUICK, ASYNC)).document["jobId"]
            assert "position" not in (await proxy.job(job_id)).document

    async def test_is_left_out_when_the_job_runs(self, proxy: SandboxProxy) -> None:
        job_id = await start_endless(proxy)
        async with asyncio.timeout(5):
            while (job := (await proxy.job(job_id)).document)["status"] != "running":
                assert isinstance(job["position"], int)
                await asyncio.sleep(0.01)
        assert "position" not in job


class TestCancellation:
    @pytest.mark.parametrize("cache", [True, False])
    async def test_ends_the_job_at_fal(self, tmp_path: Path, cache: bool) -> None:
        async with open_sandbox_proxy(tmp_path, cache=cache) as proxy:
            job_id = await start_endless(proxy, userId="ada")
            reply = await proxy.request("DELETE", f"{JOBS}/{job_id}")
            assert reply.status == 200
            document = reply.document
            assert (document["status"], document["error"]) == ("failed", CANCELLED)
            assert (document["jobId"], document["userId"]) == (job_id, "ada")
            assert proxy.cancels == [202]
            assert (await proxy.job(job_id)).document == document
            assert proxy.sandbox.paid == []

    async def test_ends_the_request_that_waits_for_the_job(self, proxy: SandboxProxy) -> None:
        waiting = asyncio.ensure_future(proxy.generate("flux-dev", ENDLESS))
        await wait_until(
            lambda: any(seen.path.endswith("/status") for seen in proxy.model_requests)
        )
        (job,) = (await list_jobs(proxy))["jobs"]
        assert (await proxy.request("DELETE", f"{JOBS}/{job['jobId']}")).status == 200
        reply = await waiting
        assert (reply.status >= 400, reply.document["status"]) == (True, "failed")
        assert (await proxy.job(job["jobId"])).document["error"] == CANCELLED

    async def test_of_a_shared_job_works(self, proxy: SandboxProxy) -> None:
        reply = await proxy.generate("kontext-text-to-image", ENDLESS, ASYNC)
        path = f"{JOBS}/{reply.document['jobId']}"
        reply = await proxy.request("DELETE", path)
        assert (reply.status, reply.document["error"]) == (200, CANCELLED)
        await wait_until(lambda: proxy.cancels == [202])

    async def test_of_one_of_two_equal_jobs_leaves_the_other(self, proxy: SandboxProxy) -> None:
        inputs = {"prompt": "!delay 0.4 a heron", "seed": 1}
        first, second = [
            (await proxy.generate("kontext-text-to-image", inputs, ASYNC)).document["jobId"]
            for _ in range(2)
        ]
        assert (await proxy.request("DELETE", f"{JOBS}/{first}")).status == 200
        assert (await proxy.wait_finished(second))["status"] == "completed"
        assert (proxy.sandbox.jobs, proxy.cancels) == (1, [])

    @pytest.mark.parametrize("prompt", ["!delay 0 x", "!error 422 content_policy_violation"])
    async def test_of_a_finished_job_is_a_409(self, proxy: SandboxProxy, prompt: str) -> None:
        job_id = (await proxy.generate("flux-dev", {"prompt": prompt})).document["jobId"]
        before = (await proxy.job(job_id)).document
        reply = await proxy.request("DELETE", f"{JOBS}/{job_id}")
        assert reply.error == (409, "job_finished")
        assert (await proxy.job(job_id)).document == before
        assert proxy.cancels == []

    async def test_that_comes_too_late_returns_the_result(
        self, tmp_path: Path, fal: FakeFal
    ) -> None:
        is_done = False

        async def respond(request: web.Request) -> web.StreamResponse:
            nonlocal is_done
            if request.method == "POST":
                return web.json_response({"request_id": "1", "status": "IN_QUEUE"})
            if request.method == "PUT":
                is_done = True
                return web.json_response({"status": "ALREADY_COMPLETED"}, status=400)
            if request.path.endswith("/status"):
                return web.json_response({"status": "COMPLETED" if is_done else "IN_PROGRESS"})
            return web.json_response({"images": [{"url": "https://a.example/b.png"}]})

        fal.respond = respond
        async with open_sandbox_proxy(tmp_path, upstream_origin=fal.origin, drain=0.2) as proxy:
            job_id = (await proxy.generate("flux-dev", QUICK, ASYNC)).document["jobId"]
            reply = await proxy.request("DELETE", f"{JOBS}/{job_id}")
            assert (reply.status, reply.document["status"]) == (200, "completed")
            assert reply.document["imageUrl"] == "https://a.example/b.png"

    async def test_is_for_the_owner_only(self, tmp_path: Path) -> None:
        keys = (("ann", "s3cret-ann"), ("ben", "s3cret-ben"))
        ann, ben = ({"x-falproxy-key": secret} for _, secret in keys)
        async with open_sandbox_proxy(tmp_path, access_keys=keys) as proxy:
            reply = await proxy.generate("flux-dev", ENDLESS, ASYNC | ann)
            path = f"{JOBS}/{reply.document['jobId']}"
            assert (await proxy.request("DELETE", path, headers=ben)).error[0] == 404
            assert (await proxy.request("DELETE", path)).error[0] == 401
            assert proxy.cancels == []
            assert (await proxy.request("DELETE", path, headers=ann)).status == 200

    async def test_of_an_unknown_job_is_a_404(self, proxy: SandboxProxy) -> None:
        reply = await proxy.request("DELETE", f"{JOBS}/{'0' * 32}")
        assert reply.error == (404, "job_not_found")

    @pytest.mark.parametrize(
        ("status", "body"),
        [(200, {"status": "OK"}), (200, {"success": True}), (202, {"status": "x"})],
    )
    async def test_takes_every_response_of_fal_s_for_a_cancelled_job(
        self, tmp_path: Path, fal: FakeFal, status: int, body: dict[str, object]
    ) -> None:
        async def respond(request: web.Request) -> web.StreamResponse:
            if request.method == "POST":
                return web.json_response({"request_id": "1", "status": "IN_QUEUE"})
            if request.method == "PUT":
                return web.json_response(body, status=status)
            return web.json_response({"status": "IN_QUEUE"}, status=202)

        fal.respond = respond
        async with open_sandbox_proxy(tmp_path, upstream_origin=fal.origin, drain=0.2) as proxy:
            job_id = (await proxy.generate("flux-dev", QUICK, ASYNC)).document["jobId"]
            reply = await proxy.request("DELETE", f"{JOBS}/{job_id}")
            assert (reply.status, reply.document["error"]) == (200, CANCELLED)

    async def test_while_fal_is_away_leaves_the_job(self, tmp_path: Path, fal: FakeFal) -> None:
        async def respond(request: web.Request) -> web.StreamResponse:
            if request.method == "POST":
                return web.json_response({"request_id": "1", "status": "IN_QUEUE"})
            if request.method == "PUT":
                return web.json_response({"detail": "x"}, status=500)
            return web.json_response({"status": "IN_PROGRESS"})

        fal.respond = respond
        async with open_sandbox_proxy(tmp_path, upstream_origin=fal.origin, drain=0.2) as proxy:
            job_id = (await proxy.generate("flux-dev", QUICK, ASYNC)).document["jobId"]
            reply = await proxy.request("DELETE", f"{JOBS}/{job_id}")
            assert reply.error == (502, "job_not_cancelled")
            assert (await proxy.job(job_id)).document["status"] == "running"
