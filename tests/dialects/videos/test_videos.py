"""`/v1/videos`, through the complete proxy to the sandbox, with OpenAI's client for Python."""

import asyncio
import io
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import openai
import pytest
from aiohttp import FormData, web

from tests.support.fake_fal import FakeFal
from tests.support.fake_queue import FakeQueue
from tests.support.gateway import Gateway, MakeGateway
from tests.support.limits import HOUR, LONG
from tests.support.offline_fal import png
from tests.support.sandbox_proxy import SandboxProxy, data_uri, open_sandbox_proxy
from tests.support.videos import (
    ENDLESS,
    HERON,
    KLING_I2V,
    KLING_T2V,
    VEO,
    VIDEOS,
    error_of,
    open_client,
    wait_video,
)
from tests.support.waiting import SOON, wait_until

pytestmark = pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")


@pytest.fixture
async def proxy(tmp_path: Path) -> AsyncIterator[SandboxProxy]:
    async with open_sandbox_proxy(tmp_path) as opened:
        yield opened


@pytest.fixture
async def client(proxy: SandboxProxy) -> AsyncIterator[openai.AsyncOpenAI]:
    async with open_client(proxy) as opened:
        yield opened


class TestClient:
    async def test_a_video_is_created_polled_and_downloaded(
        self, proxy: SandboxProxy, client: openai.AsyncOpenAI
    ) -> None:
        video = await client.videos.create_and_poll(
            model="kling-video", prompt=HERON, size="1280x720",
            seconds="10",  # type: ignore[arg-type]
            poll_interval_ms=20,
        )  # fmt: skip
        assert (video.status, video.progress, video.error) == ("completed", 100, None)
        assert (video.object, video.model, video.prompt) == ("video", "kling-video", HERON)
        assert (video.seconds, video.size) == ("10", "1280x720")
        assert video.completed_at is not None
        assert video.created_at <= video.completed_at
        content = await (await client.videos.download_content(video.id)).aread()
        assert content[4:8] == b"ftyp"
        assert proxy.inputs == [{"prompt": HERON, "duration": "10", "aspect_ratio": "16:9"}]
        assert proxy.sandbox.jobs_by_endpoint == {KLING_T2V: 1}
        assert (await client.videos.retrieve(video.id)).to_dict() == video.to_dict()

    async def test_a_file_is_the_beginning_of_the_video(
        self, proxy: SandboxProxy, client: openai.AsyncOpenAI
    ) -> None:
        video = await client.videos.create(
            model="kling-video", prompt=HERON, input_reference=("heron.png", png("blue"))
        )
        assert (await wait_video(client, video.id)).status == "completed"
        (inputs,) = proxy.inputs
        assert inputs == {"prompt": HERON, "image_url": data_uri(png("blue"))}
        assert proxy.sandbox.jobs_by_endpoint == {KLING_I2V: 1}

    async def test_an_address_is_the_beginning_of_the_video(
        self, proxy: SandboxProxy, client: openai.AsyncOpenAI
    ) -> None:
        url = proxy.add_file(png("blue"))
        video = await client.videos.create(
            model=VEO + "/image-to-video", prompt=HERON, size="720x1280",
            extra_body={
                "input_reference": {"image_url": url}, "generate_audio": False, "seed": 7,
            },
        )  # fmt: skip
        assert (await wait_video(client, video.id)).status == "completed"
        assert proxy.inputs == [
            {
                "prompt": HERON,
                "image_url": url,
                "aspect_ratio": "9:16",
                "resolution": "720p",
                "generate_audio": False,
                "seed": 7,
            }
        ]

    async def test_videos_are_listed_in_pages(self, client: openai.AsyncOpenAI) -> None:
        ids = [(await client.videos.create(prompt=HERON)).id for _ in range(3)]
        page = await client.videos.list(limit=2)
        assert len(page.data) == 2
        assert page.has_more is True
        assert {video.id async for video in client.videos.list(limit=2)} == {*ids}
        ascending = [video.created_at async for video in client.videos.list(order="asc")]
        assert ascending == sorted(ascending)

    async def test_a_deleted_video_is_gone(self, client: openai.AsyncOpenAI) -> None:
        video = await client.videos.create(prompt=HERON)
        await wait_video(client, video.id)
        deleted = await client.videos.delete(video.id)
        assert (deleted.id, deleted.deleted, deleted.object) == (video.id, True, "video.deleted")
        with pytest.raises(openai.NotFoundError):
            await client.videos.retrieve(video.id)
        with pytest.raises(openai.NotFoundError):
            await client.videos.delete(video.id)
        assert [each async for each in client.videos.list()] == []

    async def test_a_refused_prompt_is_a_failed_video(self, client: openai.AsyncOpenAI) -> None:
        video = await client.videos.create(prompt="!error 422 content_policy_violation")
        failed = await wait_video(client, video.id)
        assert failed.status == "failed"
        assert failed.error is not None
        assert failed.error.code == "content_policy_violation"
        assert failed.error.message
        with pytest.raises(openai.NotFoundError) as raised:
            await client.videos.download_content(video.id)
        assert raised.value.code == "content_policy_violation"


class TestRequests:
    @pytest.mark.parametrize("seconds", ["5", 5, 5.0])
    async def test_json_bodies_are_accepted(self, proxy: SandboxProxy, seconds: object) -> None:
        body = {"prompt": HERON, "seconds": seconds, "size": "auto", "model": KLING_T2V}
        reply = await proxy.request("POST", VIDEOS, json=body)
        assert reply.status == 200, reply
        assert reply.document["status"] in ("queued", "in_progress")
        assert reply.document["object"] == "video"
        await wait_until(lambda: proxy.inputs)
        assert proxy.inputs == [{"prompt": HERON, "duration": "5"}]

    @pytest.mark.parametrize("name", ["image_url", "tail_image_url"])
    async def test_fal_s_names_of_images_choose_the_endpoint(
        self, proxy: SandboxProxy, name: str
    ) -> None:
        sent = {"image_url": proxy.add_file(png("blue")), name: proxy.add_file(png("red"))}
        reply = await proxy.request("POST", VIDEOS, json={"prompt": HERON, **sent})
        assert reply.status == 200, reply
        await wait_until(lambda: proxy.inputs)
        assert proxy.inputs == [{"prompt": HERON, **sent}]
        assert proxy.jobs()[0]["endpoint"] == KLING_I2V

    @pytest.mark.parametrize("name", ["input_reference", "image_url"])
    async def test_errors_of_images_have_the_name_of_the_parameter(
        self, proxy: SandboxProxy, name: str
    ) -> None:
        for url in ("http://127.0.0.1/x.png", "data:text/html,hello"):
            reply = await proxy.request("POST", VIDEOS, json={"prompt": HERON, name: url})
            assert error_of(reply, 400)["param"] == name
        assert proxy.submits == 0

    @pytest.mark.parametrize("reference", ["url", {"image_url": "url"}, ["url"]])
    async def test_json_bodies_have_addresses(self, proxy: SandboxProxy, reference: Any) -> None:
        url = proxy.add_file(png("blue"))
        value = {"image_url": url} if isinstance(reference, dict) else url
        body = {"prompt": HERON, "input_reference": [value] if reference == ["url"] else value}
        reply = await proxy.request("POST", VIDEOS, json=body)
        assert reply.status == 200, reply
        await wait_until(lambda: proxy.inputs)
        assert proxy.inputs == [{"prompt": HERON, "image_url": url}]

    @pytest.mark.parametrize(
        ("body", "param"),
        [
            pytest.param({"seconds": "7"}, "seconds", id="a length that the model has not"),
            pytest.param({"seconds": "-5"}, "seconds", id="a negative length"),
            pytest.param({"seconds": "five"}, "seconds", id="a length in words"),
            pytest.param({"seconds": True}, "seconds", id="a length that is no number"),
            pytest.param({"seconds": "0"}, "seconds", id="no length"),
            pytest.param({"size": "1000x300"}, "size", id="a shape that the model has not"),
            pytest.param({"size": "huge"}, "size", id="a size in words"),
            pytest.param({"size": "1024x1024", "model": VEO}, "size", id="square"),
            pytest.param({"size": "640x360", "model": VEO}, "size", id="a resolution too low"),
            pytest.param({"size": "1280x720", "model": "ltx-video"}, "size", id="a fixed size"),
            pytest.param({"seconds": "4", "model": "ltx-video"}, "seconds", id="a fixed length"),
            pytest.param({"colour": "red"}, "colour", id="an unknown parameter"),
            pytest.param({"cfg_scale": 7}, "cfg_scale", id="an input out of its bounds"),
            pytest.param({"cfg_scale": "much"}, "cfg_scale", id="an input of another type"),
            pytest.param({"seconds": "5", "duration": "10"}, "duration", id="two lengths"),
            pytest.param({"size": "1:1", "aspect_ratio": "1:1"}, "aspect_ratio", id="two shapes"),
            pytest.param(
                {"input_reference": data_uri(), "model": KLING_T2V}, "input_reference",
                id="an image for a model without one",
            ),
            pytest.param(
                {"input_reference": [data_uri(), data_uri()]}, "input_reference", id="two images",
            ),
            pytest.param(
                {"input_reference": {"file_id": "file-1"}}, "input_reference", id="a file id",
            ),
            pytest.param({"input_reference": "heron.png"}, "input_reference", id="no address"),
            pytest.param({"input_reference": {}}, "input_reference", id="an empty object"),
            pytest.param({"model": KLING_I2V}, "input_reference", id="a missing image"),
            pytest.param({"model": "flux-dev"}, "model", id="a model of images"),
            pytest.param({"model": "fal-ai/flux/dev"}, "model", id="an endpoint of images"),
            pytest.param({"model": "kokoro-speech"}, "model", id="a model of speech"),
            pytest.param({"prompt": ""}, "prompt", id="no prompt"),
            pytest.param({"prompt": None}, "prompt", id="null as the prompt"),
        ],
    )  # fmt: skip
    async def test_what_cannot_be_mapped_is_refused(
        self, proxy: SandboxProxy, body: dict[str, Any], param: str
    ) -> None:
        body = {"prompt": HERON, **body}
        replies = [await proxy.request("POST", VIDEOS, json=body)]
        if all(isinstance(value, str) for value in body.values()):  # a form has texts only
            replies.append(await proxy.request("POST", VIDEOS, data=form_of(body)))
        for reply in replies:
            error = error_of(reply, 400)
            assert (error["param"], error["type"]) == (param, "invalid_request_error")
        assert proxy.submits == 0
        assert proxy.jobs() == []

    async def test_unknown_models_are_not_found(self, proxy: SandboxProxy) -> None:
        for model in ("sora-2", "fal-ai/no-such/model"):
            reply = await proxy.request("POST", VIDEOS, json={"prompt": HERON, "model": model})
            assert error_of(reply, 404)["code"] == "model_not_found"
        assert proxy.submits == 0

    async def test_a_file_that_is_no_image_is_refused(self, proxy: SandboxProxy) -> None:
        form = FormData({"prompt": HERON})
        form.add_field("input_reference", io.BytesIO(b"hello"), filename="a.txt")
        reply = await proxy.request("POST", VIDEOS, data=form)
        assert error_of(reply, 400)["param"] == "input_reference"
        assert proxy.submits == 0

    async def test_inputs_in_a_form_are_converted(self, proxy: SandboxProxy) -> None:
        form = form_of({"prompt": HERON, "model": "kling-video", "cfg_scale": "0.25"})
        reply = await proxy.request("POST", VIDEOS, data=form)
        assert reply.status == 200, reply
        await wait_until(lambda: proxy.inputs)
        assert proxy.inputs == [{"prompt": HERON, "cfg_scale": 0.25}]

    @pytest.mark.parametrize(
        ("method", "path", "allow"),
        [
            ("PUT", VIDEOS, "POST, GET"),
            ("POST", f"{VIDEOS}/video_1", "GET, DELETE"),
            ("DELETE", f"{VIDEOS}/video_1/content", "GET"),
        ],
    )
    async def test_other_methods_are_refused(
        self, proxy: SandboxProxy, method: str, path: str, allow: str
    ) -> None:
        reply = await proxy.request(method, path)
        assert error_of(reply, 405)["code"] == "method_not_allowed"
        assert reply.headers["Allow"] == allow

    @pytest.mark.parametrize(
        "query", ["limit=0", "limit=101", "limit=many", "order=up", "after=video_1"]
    )
    async def test_invalid_pages_are_refused(self, proxy: SandboxProxy, query: str) -> None:
        reply = await proxy.request("GET", f"{VIDEOS}?{query}")
        assert error_of(reply, 400)["param"] == query.partition("=")[0]


def form_of(fields: dict[str, Any]) -> FormData:
    form = FormData(default_to_multipart=True)
    for name, value in fields.items():
        form.add_field(name, value)
    return form


class TestState:
    async def test_queued_and_running_videos_have_no_content(self, tmp_path: Path) -> None:
        async with open_sandbox_proxy(tmp_path, speed=1) as proxy, open_client(proxy) as client:
            video = await client.videos.create(prompt=ENDLESS)
            assert (video.status, video.progress) == ("queued", 0)
            await wait_until(lambda: proxy.jobs()[0]["request_id"])
            reply = await proxy.request("GET", f"{VIDEOS}/{video.id}/content")
            assert error_of(reply, 404)["code"] == "video_not_ready"
            async with asyncio.timeout(SOON):
                while (await client.videos.retrieve(video.id)).status == "queued":
                    await asyncio.sleep(0.02)
            await client.videos.delete(video.id)
            assert proxy.cancels == [202]
            assert proxy.jobs() == []

    async def test_the_list_has_the_state_of_videos_that_are_not_polled(
        self, proxy: SandboxProxy, client: openai.AsyncOpenAI
    ) -> None:
        video = await client.videos.create(prompt=HERON)
        await wait_until(lambda: proxy.jobs()[0]["status"] == "completed")
        (listed,) = [each async for each in client.videos.list()]
        assert (listed.id, listed.status, listed.progress) == (video.id, "completed", 100)

    async def test_costs_are_reported(self, proxy: SandboxProxy) -> None:
        created = await proxy.request("POST", VIDEOS, json={"prompt": HERON, "seconds": "10"})
        assert created.headers["x-falproxy-cost"] == "0.70"
        await wait_until(lambda: proxy.jobs()[0]["status"] == "completed")
        shown = await proxy.request("GET", f"{VIDEOS}/{created.document['id']}")
        assert shown.headers["x-falproxy-cost"] == "0.70"
        assert proxy.jobs()[0]["settled"] == 700_000

    @pytest.mark.parametrize(
        ("prompt", "is_done", "cost"), [(ENDLESS, False, 0), (HERON, True, 350_000)]
    )
    async def test_a_deleted_video_has_its_actual_cost_in_the_ledger(
        self, tmp_path: Path, prompt: str, is_done: bool, cost: int
    ) -> None:
        async with open_sandbox_proxy(tmp_path, speed=1) as proxy, open_client(proxy) as client:
            video = await client.videos.create(prompt=prompt)
            await wait_until(lambda: proxy.jobs()[0]["request_id"])
            await wait_until(lambda: not is_done or proxy.sandbox.jobs)  # counted at their end
            await client.videos.delete(video.id)
            assert await proxy.wait_settled() == [cost]
            assert proxy.jobs() == []

    async def test_the_user_is_recorded(self, tmp_path: Path) -> None:
        async with open_sandbox_proxy(tmp_path, access_key="s3cret") as proxy:
            headers = {"Authorization": "Bearer s3cret"}
            body = {"prompt": HERON, "user": "ada"}
            reply = await proxy.request("POST", VIDEOS, json=body, headers=headers)
            assert reply.status == 200
            assert proxy.jobs()[0]["user_id"] == "ada"
            assert [record.user_id for record in await proxy.records()] == ["ada"]

    async def test_a_video_belongs_to_its_caller(self, tmp_path: Path) -> None:
        keys = (("ann", "ann-key"), ("ben", "ben-key"))
        async with open_sandbox_proxy(tmp_path, access_keys=keys) as proxy:
            ann, ben = ({"Authorization": f"Bearer {key}"} for _, key in keys)
            body = {"prompt": HERON}
            created = await proxy.request("POST", VIDEOS, json=body, headers=ann)
            assert created.status == 200, created
            path = f"{VIDEOS}/{created.document['id']}"
            for method, suffix in (("GET", ""), ("GET", "/content"), ("DELETE", "")):
                reply = await proxy.request(method, path + suffix, headers=ben)
                assert error_of(reply, 404)["code"] == "video_not_found"
            listed = await proxy.request("GET", VIDEOS, headers=ben)
            assert listed.document["data"] == []
            assert (await proxy.request("GET", path, headers=ann)).status == 200

    async def test_a_repeated_request_with_a_key_is_one_video(self, proxy: SandboxProxy) -> None:
        headers, body = {"Idempotency-Key": "k-1"}, {"prompt": HERON}
        first, second = [
            await proxy.request("POST", VIDEOS, json=body, headers=headers) for _ in range(2)
        ]
        assert first.document["id"] == second.document["id"]
        assert proxy.submits == 1
        assert len(proxy.jobs()) == 1
        other = await proxy.request("POST", VIDEOS, json={"prompt": "x"}, headers=headers)
        assert error_of(other, 422)["code"] == "idempotency_key_reused"
        assert len(proxy.jobs()) == 1

    async def test_a_video_is_no_job_of_the_generate_api(self, proxy: SandboxProxy) -> None:
        created = await proxy.request("POST", VIDEOS, json={"prompt": HERON})
        assert (await proxy.job(created.document["id"])).status == 404


class TestLimits:
    async def test_a_rate_is_exact(self, tmp_path: Path) -> None:
        async with open_sandbox_proxy(tmp_path, rate=(2, HOUR)) as proxy:
            replies = [
                await proxy.request("POST", VIDEOS, json={"prompt": HERON}) for _ in range(3)
            ]
            assert [reply.status for reply in replies] == [200, 200, 429]
            error = error_of(replies[-1], 429)
            assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limit_exceeded")
            assert replies[0].headers["x-ratelimit-remaining-requests"] == "1"
            assert (proxy.submits, len(proxy.jobs())) == (2, 2)

    async def test_a_budget_is_exact(self, tmp_path: Path) -> None:
        async with open_sandbox_proxy(tmp_path, budget=(700_000, LONG)) as proxy:
            body = {"prompt": HERON, "seconds": "5"}
            replies = [await proxy.request("POST", VIDEOS, json=body) for _ in range(3)]
            assert [reply.status for reply in replies] == [200, 200, 429]
            assert error_of(replies[-1], 429)["code"] == "insufficient_quota"
            assert (proxy.submits, len(proxy.jobs())) == (2, 2)

    async def test_a_finished_video_makes_a_place(self, tmp_path: Path) -> None:
        async with open_sandbox_proxy(tmp_path, concurrency=1) as proxy:
            for _ in range(3):
                reply = await proxy.request("POST", VIDEOS, json={"prompt": HERON})
                assert reply.status == 200, reply
                path = f"{VIDEOS}/{reply.document['id']}"
                async with asyncio.timeout(SOON):
                    while (await proxy.request("GET", path)).document["status"] != "completed":
                        await asyncio.sleep(0.02)


class TestContent:
    @pytest.fixture(params=["disk", "off"])
    async def stored(
        self, request: pytest.FixtureRequest, tmp_path: Path
    ) -> AsyncIterator[SandboxProxy]:
        """A proxy that stores outputs, and one that does not."""
        async with open_sandbox_proxy(tmp_path, rehost=request.param) as opened:
            yield opened

    async def test_ranges_of_a_video_are_sent(self, stored: SandboxProxy) -> None:
        created = await stored.request("POST", VIDEOS, json={"prompt": HERON})
        path = f"{VIDEOS}/{created.document['id']}"
        await wait_until(lambda: stored.jobs()[0]["status"] == "completed")
        url = f"{stored.origin}{path}/content"
        async with stored.session.get(url) as response:
            whole = await response.read()
            assert response.status == 200, whole
            assert response.content_type == "video/mp4"
            assert response.headers["X-Content-Type-Options"] == "nosniff"
            assert "private" in response.headers["Cache-Control"]
        for header, start, stop in (
            ("bytes=0-99", 0, 100),
            ("bytes=100-", 100, len(whole)),
            ("bytes=-10", len(whole) - 10, len(whole)),
        ):
            async with stored.session.get(url, headers={"Range": header}) as response:
                assert response.status == 206
                assert await response.read() == whole[start:stop]
                expected = f"bytes {start}-{stop - 1}/{len(whole)}"
                assert response.headers["Content-Range"] == expected
        reply = await stored.request(
            "GET", f"{path}/content", headers={"Range": f"bytes={len(whole)}-"}
        )
        assert error_of(reply, 416)["code"] == "range_not_satisfiable"

    async def test_variants(self, proxy: SandboxProxy) -> None:
        created = await proxy.request("POST", VIDEOS, json={"prompt": HERON})
        path = f"{VIDEOS}/{created.document['id']}/content"
        await wait_until(lambda: proxy.jobs()[0]["status"] == "completed")
        async with proxy.session.get(f"{proxy.origin}{path}?variant=video") as response:
            assert (response.status, response.content_type) == (200, "video/mp4")
        for variant in ("thumbnail", "spritesheet"):
            reply = await proxy.request("GET", f"{path}?variant={variant}")
            assert error_of(reply, 404)["code"] == "variant_not_found"
        reply = await proxy.request("GET", f"{path}?variant=gif")
        assert error_of(reply, 400)["param"] == "variant"


class TestFailures:
    """With a fake queue, which can be held."""

    @pytest.fixture
    def queue(self, fal: FakeFal) -> FakeQueue:
        return FakeQueue(fal)

    @staticmethod
    async def create(gateway: Gateway, **headers: str) -> tuple[int, Any, Any]:
        body = {"prompt": HERON}
        async with gateway.client.post(VIDEOS, json=body, headers=headers) as response:
            return response.status, await response.json(), response.headers

    @staticmethod
    async def get(gateway: Gateway, path: str) -> tuple[int, Any]:
        async with gateway.client.get(path) as response:
            return response.status, await response.json()

    async def test_progress_is_that_of_the_log(self, gateway: Gateway, queue: FakeQueue) -> None:
        queue.hold()
        status, video, _ = await self.create(gateway)
        assert (status, video["status"], video["progress"]) == (200, "queued", 0)
        status, video = await self.get(gateway, f"{VIDEOS}/{video['id']}")
        assert (status, video["status"], video["progress"]) == (200, "in_progress", 50)
        await self.delete(gateway, video["id"])
        assert len(queue.cancels) == 1

    @staticmethod
    async def delete(gateway: Gateway, video_id: str, status: int = 200) -> None:
        async with gateway.client.delete(f"{VIDEOS}/{video_id}") as response:
            assert response.status == status, await response.text()

    async def test_a_result_without_a_video_is_a_failed_video(
        self, gateway: Gateway, queue: FakeQueue
    ) -> None:
        _, video, _ = await self.create(gateway)
        _, video = await self.get(gateway, f"{VIDEOS}/{video['id']}")
        assert (video["status"], video["error"]["code"]) == ("failed", "no_video")

    async def test_a_refused_submit_is_no_video(self, gateway: Gateway, queue: FakeQueue) -> None:
        detail = [{"loc": ["body", "prompt"], "msg": "No.", "type": "content_policy_violation"}]
        queue.refusal = lambda: web.json_response({"detail": detail}, status=422)
        status, document, _ = await self.create(gateway)
        assert (status, document["error"]["code"]) == (400, "content_policy_violation")
        assert (await self.get(gateway, VIDEOS))[1]["data"] == []

    async def test_a_lost_submit_is_not_repeated(self, gateway: Gateway, queue: FakeQueue) -> None:
        queue.refusal = lambda: web.Response(status=500)
        status, document, headers = await self.create(gateway)
        assert (status, document["error"]["type"]) == (500, "server_error")
        assert headers["x-should-retry"] == "false"
        assert queue.posts == 1

    async def test_a_video_whose_client_left_is_cancelled(
        self, gateway: Gateway, queue: FakeQueue
    ) -> None:
        queue.hold()
        queue.accepting.clear()
        call = asyncio.ensure_future(self.create(gateway))
        await wait_until(lambda: queue.posts, seconds=30)
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
        await asyncio.sleep(0)
        queue.accepting.set()
        await wait_until(lambda: queue.cancels, seconds=30)
        assert queue.posts == 1

    async def test_a_video_keeps_its_state_while_fal_is_away(
        self, gateway: Gateway, queue: FakeQueue, fal: FakeFal
    ) -> None:
        queue.hold()
        _, created, _ = await self.create(gateway)

        async def refuse(request: web.Request) -> web.StreamResponse:
            return web.Response(status=400)

        fal.respond = refuse
        status, video = await self.get(gateway, f"{VIDEOS}/{created['id']}")
        assert (status, video["id"]) == (200, created["id"])
        assert video["status"] in ("queued", "in_progress")

    async def test_without_the_ledger_nothing_is_bought(
        self, make_gateway: MakeGateway, queue: FakeQueue, fal: FakeFal, tmp_path: Path
    ) -> None:
        (tmp_path / "ledger.sqlite").mkdir()
        gateway = await make_gateway(fal.origin)
        status, document, headers = await self.create(gateway)
        assert (status, document["error"]["code"]) == (503, "ledger_unavailable")
        assert headers["Retry-After"]
        assert queue.posts == 0
        for path in (VIDEOS, f"{VIDEOS}/video_1"):
            status, document = await self.get(gateway, path)
            assert (status, document["error"]["code"]) == (503, "ledger_unavailable")

    async def test_a_model_without_a_description_gets_a_prompt_only(
        self, gateway: Gateway, queue: FakeQueue, fal: FakeFal
    ) -> None:
        body = {"prompt": HERON, "seconds": "5"}
        async with gateway.client.post(VIDEOS, json=body) as response:
            document = await response.json()
            assert (response.status, document["error"]["code"]) == (503, "schema_unavailable")
        assert queue.posts == 0
        assert (await self.create(gateway))[0] == 200
