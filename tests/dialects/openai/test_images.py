"""OpenAI's Python client against `/v1`: pictures made and edited, models, refusals."""

import base64
import gzip
import io
import json
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest
from aiohttp import ClientSession, web
from aiohttp.test_utils import TestServer
from PIL import Image
from tenacity import wait_none

from falproxy import Settings
from falproxy.app import HANDLER_ARGS, open_rehosting, open_result_cache
from falproxy.app.components import create_fetcher
from falproxy.app.pipeline import authentication, authorization, call_pipeline, compose
from falproxy.background import Background, background_context
from falproxy.dialects import default_error, dialect_route, handle_errors, method_check_middleware
from falproxy.dialects.openai import ImagesDeps, images_routes, local_file_reader
from falproxy.dialects.queue_client import WaitPolicy
from falproxy.dialects.transparent import BodyLimits, transparent_dialect
from falproxy.fal.keys import KeyPool
from falproxy.fal.policy import Globs
from falproxy.media.fetch import fetcher_context
from falproxy.metrics import Metrics
from falproxy.middleware.access_log import access_log, add_timing_headers
from falproxy.middleware.cors import check_origin
from falproxy.proxy.upstream import connect_upstream
from falproxy.sandbox import Sandbox
from falproxy.sandbox import create_app as create_sandbox
from falproxy.sandbox.model_metadata import openapi_document
from falproxy.sandbox.models import MODELS
from falproxy.stores.files.disk import DiskStorage
from tests.end_to_end.test_js_node import until
from tests.support.fake_fal import FakeFal
from tests.support.key_search import CANARY
from tests.support.offline_fal import png
from tests.support.settings import make_settings
from tests.support.urls import PROXY

DEV = "fal-ai/flux/dev"
SCHNELL = "fal-ai/flux/schnell"
KONTEXT = "fal-ai/flux-pro/kontext"
SDXL = "fal-ai/fast-sdxl"
NANO = "fal-ai/nano-banana"
HERON = "a heron at dawn"
SMALL = "256x256"
SEED = {"seed": 7}
KEY = "s3cret"
SKETCH = f"data:image/png;base64,{base64.b64encode(png()).decode()}"
# How long the tests wait for a job that is not meant to end.
WAIT = 20.0


def proxy_app(settings: Settings, **rules: Any) -> web.Application:
    """The order of `app.add_proxy`, with the paths of this API and the header route."""
    app = web.Application(handler_args=HANDLER_ARGS, middlewares=[handle_errors(default_error)])
    ring = KeyPool(settings.fal_keys, time.monotonic)
    timeouts = (settings.upstream.connect_timeout, settings.upstream.timeout)
    app.cleanup_ctx.append(
        connect_upstream(ring.next_key(), origin=settings.upstream.origin, timeouts=timeouts)
    )
    fetcher = create_fetcher(settings)
    app.cleanup_ctx.append(fetcher_context(fetcher))
    rehosting = open_rehosting(app, settings, fetcher, "")
    shelf = open_result_cache(app, settings)
    known = authentication(settings, None)
    allowed = authorization(app, settings, ring, shelf, is_locked=bool(known))
    around = call_pipeline(settings, ring, shelf, fetcher, rehosting)
    goodbyes = Background()
    app.cleanup_ctx.append(background_context(goodbyes, 5.0))
    if rehosting is not None and isinstance(rehosting.rehoster.storage, DiskStorage):
        rules["read_local"] = local_file_reader(rehosting.rehoster.storage, rehosting.base_url)
    rules.setdefault("endpoints", Globs(settings.auth.allowed_endpoints))
    images = ImagesDeps(
        body_limits=BodyLimits(settings.server.max_body, allow_encoded=True), **rules
    )
    patience = WaitPolicy(total=settings.dialects.wait, background=goodbyes, retry_wait=wait_none())
    ways = images_routes(images, fetcher, patience)
    ways[PROXY] = dialect_route(transparent_dialect(images.body_limits))
    for path, way in ways.items():
        order = [
            access_log(Metrics()),
            handle_errors(way.refuse),
            method_check_middleware(way.check),
            check_origin(settings.auth.allowed_origins),
            *known,
            way.middleware,
            *allowed,
        ]
        app.router.add_route("*", path, compose(order, around))
    app.on_response_prepare.append(add_timing_headers)
    return app


@dataclass(frozen=True, slots=True)
class Studio:
    """The proxy with the sandbox behind it, and OpenAI's client before it."""

    origin: str
    fal: str
    sandbox: Sandbox
    client: openai.AsyncOpenAI
    session: ClientSession

    @property
    def submits(self) -> int:
        """How often a job was asked of fal, whatever became of it."""
        return sum(
            seen.method == "POST" and seen.host in ("queue.fal.run", "fal.run")
            for seen in self.sandbox.seen
        )

    @property
    def inputs(self) -> list[Mapping[str, Any]]:
        """What fal was paid for, in its order."""
        return [paid.input for paid in self.sandbox.paid]  # type: ignore[misc]  # always objects

    async def download(self, url: str | None) -> Image.Image:
        assert url is not None
        async with self.session.get(url) as response:
            assert response.status == 200
            return Image.open(io.BytesIO(await response.read()))


def picture(b64: str | None) -> Image.Image:
    assert b64 is not None
    return Image.open(io.BytesIO(base64.b64decode(b64)))


@asynccontextmanager
async def open_studio(
    data_dir: Path, rules: Mapping[str, Any] | None = None, speed: float = 1000, **given: Any
) -> AsyncIterator[Studio]:
    sandbox = Sandbox(speed=speed)
    async with TestServer(create_sandbox(sandbox)) as fal, ClientSession() as session:
        fal_origin = sandbox.public_url = f"http://127.0.0.1:{fal.port}"
        given = {"upstream_origin": fal_origin, "wait": WAIT, **given}
        settings = make_settings(fal_key=CANARY, data_dir=data_dir, **given)
        async with TestServer(proxy_app(settings, **(rules or {}))) as proxy:
            origin = f"http://127.0.0.1:{proxy.port}"
            async with openai.AsyncOpenAI(base_url=f"{origin}/v1", api_key=KEY) as client:
                yield Studio(origin, fal_origin, sandbox, client, session)
    for seen in sandbox.seen:
        is_file = seen.host.startswith("127.0.0.1")
        keys = seen.headers.getall("Authorization", [])
        assert keys == ([] if is_file else [f"Key {CANARY}"]), seen.path
        assert KEY not in str(seen.headers)


@pytest.fixture
async def studio(tmp_path: Path) -> AsyncIterator[Studio]:
    async with open_studio(tmp_path) as opened:
        yield opened


class TestGenerations:
    async def test_a_picture_has_an_address(self, studio: Studio) -> None:
        response = await studio.client.images.generate(model="flux-dev", prompt=HERON, size=SMALL)
        assert response.data is not None
        (made,) = response.data
        assert (await studio.download(made.url)).size == (256, 256)
        assert made.b64_json is None
        assert made.revised_prompt is None
        assert abs(response.created - time.time()) < 60
        assert response.size == SMALL
        assert response._request_id
        assert studio.inputs == [{"prompt": HERON, "image_size": {"width": 256, "height": 256}}]
        assert studio.sandbox.jobs_by_endpoint == {DEV: 1}

    async def test_a_picture_comes_in_base64(self, studio: Studio) -> None:
        response = await studio.client.images.generate(
            model=DEV, prompt=HERON, size=SMALL, response_format="b64_json", output_format="png"
        )
        assert response.data is not None
        (made,) = response.data
        assert made.url is None
        shown = picture(made.b64_json)
        assert (shown.size, shown.format) == ((256, 256), "PNG")
        assert response.output_format == "png"

    async def test_pictures_inline_in_the_result_are_decoded(self, studio: Studio) -> None:
        response = await studio.client.images.generate(
            model=DEV, prompt=HERON, size=SMALL, response_format="b64_json",
            extra_body={"sync_mode": True},
        )  # fmt: skip
        assert response.data is not None
        assert picture(response.data[0].b64_json).size == (256, 256)

    async def test_the_first_model_is_taken_where_none_is_named(self, studio: Studio) -> None:
        await studio.client.images.generate(prompt=HERON, size=SMALL)
        assert studio.sandbox.jobs_by_endpoint == {DEV: 1}

    async def test_what_a_model_knows_by_other_names_reaches_it(self, studio: Studio) -> None:
        await studio.client.images.generate(
            model=SDXL, prompt=HERON, size="1792x1024", output_format="png", user="ada",
            quality="hd", style="vivid", extra_body={"guidance_scale": 3, "loras": [], **SEED},
        )  # fmt: skip
        assert studio.inputs == [
            {
                "prompt": HERON, "image_size": {"width": 1792, "height": 1024}, "format": "png",
                "seed": 7, "guidance_scale": 3, "loras": [],
            }
        ]  # fmt: skip

    async def test_a_size_becomes_the_nearest_ratio(self, studio: Studio) -> None:
        await studio.client.images.generate(model=NANO, prompt=HERON, size="1536x1024")
        assert studio.inputs == [{"prompt": HERON, "aspect_ratio": "3:2"}]

    async def test_what_a_model_does_not_take_is_left_out(self, studio: Studio) -> None:
        await studio.client.images.generate(
            model=DEV, prompt=HERON, size="auto", output_format="webp", background="transparent",
            extra_body={"negative_prompt": "people"},
        )  # fmt: skip
        assert studio.inputs == [{"prompt": HERON}]


class TestSeveral:
    async def test_three_pictures_are_one_call_of_a_model_that_makes_four(
        self, studio: Studio
    ) -> None:
        response = await studio.client.images.generate(
            model=SCHNELL, prompt=HERON, n=3, size=SMALL, extra_body=SEED
        )
        assert response.data is not None
        pictures = [await studio.download(made.url) for made in response.data]
        assert len({shown.tobytes() for shown in pictures}) == 3
        (inputs,) = studio.inputs
        assert (inputs["num_images"], inputs["seed"]) == (3, 7)

    async def test_a_whole_number_may_be_written_as_any(self, studio: Studio) -> None:
        url = f"{studio.origin}/v1/images/generations"
        body = b'{"model": "flux-dev", "prompt": "x", "size": "64x64", "n": 2.0}'
        headers = {"Content-Type": "application/json"}
        async with studio.session.post(url, data=body, headers=headers) as response:
            assert len((await response.json())["data"]) == 2

    async def test_ten_pictures_are_three_calls_with_seeds_of_their_own(
        self, studio: Studio
    ) -> None:
        response = await studio.client.images.generate(
            model=SCHNELL,
            prompt=HERON,
            n=10,
            size=SMALL,
            extra_body=SEED,
            response_format="b64_json",
        )
        assert response.data is not None
        pictures = [picture(made.b64_json).tobytes() for made in response.data]
        assert (len(pictures), len(set(pictures))) == (10, 10)
        asked = sorted((inputs["seed"], inputs["num_images"]) for inputs in studio.inputs)
        assert asked == [(7, 4), (11, 4), (15, 2)]

    async def test_calls_of_a_cached_model_do_not_share_a_picture(self, studio: Studio) -> None:
        edit = studio.client.images.edit
        response = await edit(model=KONTEXT, prompt=HERON, image=("a.png", png()), n=9)
        assert response.data is not None
        assert len({made.url for made in response.data}) == 9
        assert studio.submits == 3
        seeds = [inputs.get("seed") for inputs in studio.inputs]
        assert len(set(seeds)) == 3

    async def test_all_calls_are_submitted_before_the_first_is_waited_for(
        self, studio: Studio
    ) -> None:
        await studio.client.images.generate(
            model=SCHNELL, prompt="!delay 0.1 a heron", n=10, size=SMALL, extra_body=SEED
        )
        methods = [seen.method for seen in studio.sandbox.seen if seen.host == "queue.fal.run"]
        assert methods[:3] == ["POST"] * 3
        assert methods.count("POST") == 3

    async def test_no_picture_is_given_out_when_one_call_fails(self, studio: Studio) -> None:
        prompt = "!error 500 internal_server_error times=1"
        with pytest.raises(openai.InternalServerError):
            await studio.client.images.generate(model=SCHNELL, prompt=prompt, n=10, size=SMALL)
        assert studio.submits == 3


class TestEdits:
    async def test_a_file_is_edited(self, studio: Studio) -> None:
        response = await studio.client.images.edit(
            model="kontext",
            prompt="make it winter",
            image=("in.png", png("teal")),
            extra_body={"seed": 21},
        )
        assert response.data is not None
        assert (await studio.download(response.data[0].url)).width > 0
        (inputs,) = studio.inputs
        encoded = base64.b64encode(png("teal")).decode()
        assert inputs == {
            "prompt": "make it winter",
            "image_url": f"data:image/png;base64,{encoded}",
            "seed": 21,
        }

    async def test_a_model_for_edits_is_taken_where_none_is_named(self, studio: Studio) -> None:
        await studio.client.images.edit(prompt="make it winter", image=png())
        assert studio.sandbox.jobs_by_endpoint == {KONTEXT: 1}

    async def test_several_files_go_to_a_model_that_takes_them(self, studio: Studio) -> None:
        files = [png("red"), png("blue"), png("green")]
        await studio.client.images.edit(
            model="kontext-multi", prompt="put them together", image=files, size="1024x1024"
        )
        (inputs,) = studio.inputs
        sent = [base64.b64decode(url.partition(",")[2]) for url in inputs["image_urls"]]
        assert sent == files
        assert inputs["aspect_ratio"] == "1:1"

    async def test_the_same_edit_is_bought_once(self, studio: Studio) -> None:
        edit = studio.client.images.with_raw_response.edit
        first = await edit(model=KONTEXT, prompt=HERON, image=png())
        second = await edit(model=KONTEXT, prompt=HERON, image=png())
        assert studio.sandbox.jobs == 1
        assert "fwd=miss" in first.headers["Cache-Status"]
        assert "; hit; ttl=" in second.headers["Cache-Status"]
        assert int(second.headers["Age"]) >= 0

    async def test_an_edit_that_fal_s_own_client_bought_is_not_bought_again(
        self, studio: Studio
    ) -> None:
        inputs = {"prompt": HERON, "image_url": SKETCH}
        headers = {"x-fal-target-url": f"https://fal.run/{KONTEXT}"}
        async with studio.session.post(
            studio.origin + PROXY, json=inputs, headers=headers
        ) as response:
            bought = (await response.json())["images"][0]["url"]
        made = await studio.client.images.edit(model="kontext", prompt=HERON, image=png())
        assert made.data is not None
        assert made.data[0].url == bought
        assert studio.sandbox.jobs == 1

    async def test_numbers_of_a_form_are_numbers_for_the_model(self, studio: Studio) -> None:
        await studio.client.images.edit(
            model=KONTEXT, prompt=HERON, image=png(), n=2,
            extra_body={"guidance_scale": 4.5, "enhance_prompt": True, "safety_tolerance": "3"},
        )  # fmt: skip
        (inputs,) = studio.inputs
        assert inputs["guidance_scale"] == 4.5
        assert inputs["enhance_prompt"] is True
        assert inputs["safety_tolerance"] == "3"
        assert inputs["num_images"] == 2

    async def test_an_address_is_as_good_as_a_file(self, studio: Studio) -> None:
        made = await studio.client.images.generate(model=DEV, prompt=HERON, size=SMALL)
        assert made.data is not None
        await studio.client.images.generate(
            model=KONTEXT, prompt="make it winter", extra_body={"image_url": made.data[0].url}
        )
        assert studio.sandbox.jobs_by_endpoint == {DEV: 1, KONTEXT: 1}

    async def test_a_large_file_arrives_whole(self, studio: Studio) -> None:
        large = png() + bytes(3 * 2**20 + 1)
        await studio.client.images.edit(model=KONTEXT, prompt=HERON, image=large)
        (inputs,) = studio.inputs
        assert base64.b64decode(inputs["image_url"].partition(",")[2]) == large


class TestModels:
    async def test_the_models_with_names_are_listed(self, studio: Studio) -> None:
        models = [model async for model in studio.client.models.list()]
        assert {model.object for model in models} == {"model"}
        by_id = {model.id: model for model in models}
        assert by_id["flux-dev"].owned_by == "fal-ai"
        assert by_id["flux-dev"].endpoint == DEV  # type: ignore[attr-defined]  # ours beside theirs

    async def test_a_setting_names_them(self, tmp_path: Path) -> None:
        rules = {"models": (("dall-e-3", DEV),)}
        async with open_studio(tmp_path, rules) as studio:
            assert [model.id async for model in studio.client.models.list()] == ["dall-e-3"]
            await studio.client.images.generate(model="dall-e-3", prompt=HERON, size=SMALL)
            assert studio.sandbox.jobs_by_endpoint == {DEV: 1}

    @pytest.mark.parametrize("name", ["flux-dev", DEV, KONTEXT])
    async def test_a_model_is_found_by_name_or_id(self, studio: Studio, name: str) -> None:
        assert (await studio.client.models.retrieve(name)).id == name

    async def test_slashes_may_stand_as_they_are(self, studio: Studio) -> None:
        async with studio.session.get(f"{studio.origin}/v1/models/{DEV}") as response:
            assert (await response.json())["id"] == DEV

    @pytest.mark.parametrize(
        "name",
        [
            pytest.param("gpt-image-1", id="a name that nobody gave"),
            pytest.param("fal-ai/flux/nope", id="an id that fal does not know"),
            pytest.param("fal-ai/flux/../../x", id="no id at all"),
            pytest.param("fal-ai/flux/requests/1", id="a request of the queue"),
        ],
    )
    async def test_what_is_no_model_is_not_found(self, studio: Studio, name: str) -> None:
        for asked in (
            studio.client.models.retrieve(name),
            studio.client.images.generate(model=name, prompt=HERON),
        ):
            with pytest.raises(openai.NotFoundError) as caught:
                await asked
            assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
        assert studio.submits == 0

    async def test_a_model_outside_the_policy_is_not_found(self, tmp_path: Path) -> None:
        async with open_studio(tmp_path, allowed_endpoints=("fal-ai/flux/**",)) as studio:
            names = [model.id async for model in studio.client.models.list()]
            assert names == ["flux-dev", "flux-schnell"]
            with pytest.raises(openai.NotFoundError) as caught:
                await studio.client.images.generate(model=SDXL, prompt=HERON)
            assert caught.value.code == "model_not_found"
            assert studio.submits == 0
            await studio.client.images.generate(model=SCHNELL, prompt=HERON, size=SMALL)


class TestErrors:
    @pytest.mark.parametrize(
        ("prompt", "kind", "status", "code", "submits"),
        [
            pytest.param("!error 422 content_policy_violation", openai.BadRequestError, 400,
                         "content_policy_violation", 1, id="a refused prompt"),
            pytest.param("!error 422 one_of", openai.BadRequestError, 400, "one_of", 1,
                         id="a value that the model does not take"),
            pytest.param("!error 500 internal_server_error", openai.InternalServerError, 500,
                         "internal_server_error", 1, id="a job that failed"),
            pytest.param("!error 400 downstream_service_error", openai.InternalServerError, 500,
                         "downstream_service_error", 1, id="a 400 that is not the client's"),
            pytest.param("!error 504 generation_timeout", openai.InternalServerError, 504,
                         "generation_timeout", 1, id="a job that took too long"),
            pytest.param("!error 503 runner_disconnected at=submit", openai.InternalServerError,
                         503, "runner_disconnected", 1, id="a submit that may have been taken"),
            pytest.param("!error 502 nginx at=submit", openai.InternalServerError, 502,
                         "upstream_failed", 1, id="a submit that nobody knows of"),
            pytest.param("!error 403 locked at=submit", openai.RateLimitError, 429,
                         "insufficient_quota", 1, id="an account without money"),
            pytest.param("!error 401 unknown_key at=submit", openai.InternalServerError, 500,
                         "upstream_unauthenticated", 1, id="a key of ours that fal refuses"),
            pytest.param("!error 429 queue_full at=submit", openai.RateLimitError, 429,
                         "rate_limit_exceeded", 9, id="a full queue, where asking again is free"),
        ],
    )  # fmt: skip
    async def test_a_failure_is_the_right_exception_and_is_bought_once(
        self,
        studio: Studio,
        prompt: str,
        kind: type[openai.APIStatusError],
        status: int,
        code: str,
        submits: int,
    ) -> None:
        with pytest.raises(kind) as caught:
            await studio.client.images.generate(model=DEV, prompt=prompt)
        assert (caught.value.status_code, caught.value.code) == (status, code)
        assert caught.value.request_id
        assert isinstance(caught.value.body, dict)
        assert {"message", "type", "param", "code"} == caught.value.body.keys()
        assert studio.submits == submits
        assert studio.sandbox.jobs == 0

    async def test_a_key_of_nobody_is_an_authentication_error(self, tmp_path: Path) -> None:
        async with open_studio(tmp_path, access_keys=(("ada", "another"),)) as studio:
            with pytest.raises(openai.AuthenticationError) as caught:
                await studio.client.models.list()
            assert caught.value.code == "invalid_api_key"
            with pytest.raises(openai.AuthenticationError):
                await studio.client.images.generate(model=DEV, prompt=HERON)
            assert studio.sandbox.seen == []

    async def test_the_holder_of_a_key_is_let_in(self, tmp_path: Path) -> None:
        async with open_studio(tmp_path, access_key=KEY) as studio:
            await studio.client.images.generate(model=DEV, prompt=HERON, size=SMALL)
            assert studio.sandbox.jobs == 1

    async def test_fal_away_is_asked_for_again_by_the_client(self, tmp_path: Path) -> None:
        async with open_studio(tmp_path, upstream_origin="http://127.0.0.1:9") as studio:
            with pytest.raises(openai.InternalServerError) as caught:
                await studio.client.images.generate(model=DEV, prompt=HERON, timeout=30)
            assert caught.value.code == "upstream_unreachable"
            assert "x-should-retry" not in caught.value.response.headers

    async def test_a_job_without_end_is_cancelled_and_not_bought_again(
        self, tmp_path: Path
    ) -> None:
        async with open_studio(tmp_path, wait=0.5) as studio:
            with pytest.raises(openai.InternalServerError) as caught:
                await studio.client.images.generate(model=DEV, prompt="!delay 30 a heron")
            assert (caught.value.status_code, caught.value.code) == (504, "upstream_timeout")
            assert "timed out after 0.5 s" in caught.value.message
            assert studio.submits == 1
        assert [seen.method for seen in studio.sandbox.seen][-1] == "PUT"

    @pytest.mark.parametrize(
        ("given", "param", "code"),
        [
            pytest.param({"n": 0}, "n", "integer_below_min_value", id="no pictures"),
            pytest.param({"n": 11}, "n", "integer_above_max_value", id="too many pictures"),
            pytest.param({"size": "huge"}, "size", "invalid_value", id="no size"),
            pytest.param({"size": "0x0"}, "size", "invalid_value", id="a size of nothing"),
            pytest.param({"prompt": ""}, "prompt", "empty_string", id="an empty prompt"),
            pytest.param({"response_format": "gif"}, "response_format", "invalid_value",
                         id="no response format"),
            pytest.param({"extra_body": {"seed": "x"}}, "seed", "invalid_value", id="no seed"),
            pytest.param({"extra_body": {"num_images": 2}}, "num_images", "invalid_value",
                         id="fal's word for n"),
            pytest.param({"model": KONTEXT}, "image", "missing_required_parameter",
                         id="a model for edits"),
        ],
    )  # fmt: skip
    async def test_a_wrong_parameter_is_named(
        self, studio: Studio, given: dict[str, Any], param: str, code: str
    ) -> None:
        with pytest.raises(openai.BadRequestError) as caught:
            await studio.client.images.generate(**{"prompt": HERON, "model": DEV} | given)
        assert (caught.value.param, caught.value.code) == (param, code)
        assert caught.value.type == "invalid_request_error"
        assert studio.submits == 0

    async def test_what_fal_refuses_is_named_as_the_client_says_it(self, studio: Studio) -> None:
        with pytest.raises(openai.BadRequestError) as caught:
            await studio.client.images.generate(model=DEV, prompt=HERON, size="99999x64")
        assert (caught.value.param, caught.value.code) == ("size", "less_than_equal")
        with pytest.raises(openai.BadRequestError) as caught:
            await studio.client.images.generate(
                model=DEV, prompt=HERON, extra_body={"guidance_scale": 99}
            )
        assert caught.value.param == "guidance_scale"

    @pytest.mark.parametrize(
        ("body", "content_type", "status"),
        [
            pytest.param(b"{", "application/json", 400, id="no JSON"),
            pytest.param(b"[]", "application/json", 400, id="no object"),
            pytest.param(b"[" * 100_000, "application/json", 400, id="too deep"),
            pytest.param(b"{}", "application/json", 400, id="no prompt"),
            pytest.param(b'{"prompt": "x", "n": "3"}', "application/json", 400, id="no number"),
            pytest.param(b'{"prompt": "x", "n": true}', "application/json", 400, id="a truth"),
            pytest.param(b'{"prompt": "x", "cfg": NaN}', "application/json", 400, id="NaN"),
            pytest.param(b'{"prompt": "x", "cfg": 1e999}', "application/json", 400, id="too far"),
            pytest.param(b'{"prompt": "\\ud800"}', "application/json", 400, id="half a character"),
            pytest.param(b"{}", "text/plain", 415, id="no JSON by its own word"),
        ],
    )
    async def test_a_body_that_is_no_request_is_refused_in_openai_s_shape(
        self, studio: Studio, body: bytes, content_type: str, status: int
    ) -> None:
        url = f"{studio.origin}/v1/images/generations"
        headers = {"Content-Type": content_type}
        async with studio.session.post(url, data=body, headers=headers) as response:
            assert response.status == status
            document = await response.json()
        assert document["error"]["type"] == "invalid_request_error"
        assert studio.sandbox.seen == []

    @pytest.mark.parametrize("path", ["generations", "edits"])
    async def test_a_compressed_body_is_refused(self, studio: Studio, path: str) -> None:
        headers = {"Content-Encoding": "gzip", "Content-Type": "application/json"}
        url = f"{studio.origin}/v1/images/{path}"
        body = gzip.compress(b'{"prompt": "x"}')
        async with studio.session.post(url, data=body, headers=headers) as response:
            assert response.status == 415
            assert (await response.json())["error"]["code"] == "unsupported_content_encoding"

    @pytest.mark.parametrize(
        ("method", "path", "allow"),
        [
            ("GET", "/v1/images/generations", "POST"),
            ("PUT", "/v1/images/edits", "POST"),
            ("POST", "/v1/models", "GET"),
            ("DELETE", "/v1/models/flux-dev", "GET"),
        ],
    )
    async def test_other_methods_are_a_405(
        self, studio: Studio, method: str, path: str, allow: str
    ) -> None:
        async with studio.session.request(method, studio.origin + path) as response:
            assert (response.status, response.headers["Allow"]) == (405, allow)
            assert (await response.json())["error"]["code"] == "method_not_allowed"


class TestStreams:
    async def test_partial_pictures_come_before_the_finished_one(self, studio: Studio) -> None:
        stream = await studio.client.images.generate(
            model=SCHNELL, prompt=HERON, size=SMALL, stream=True, partial_images=2
        )
        events: list[Any] = [event async for event in stream]
        kinds = [event.type.rpartition(".")[2] for event in events]
        assert kinds == ["partial_image", "partial_image", "completed"]
        assert [event.partial_image_index for event in events[:2]] == [0, 1]
        assert all(picture(event.b64_json).size == (256, 256) for event in events)
        assert {event.type.partition(".")[0] for event in events} == {"image_generation"}
        assert (events[2].size, events[2].output_format) == (SMALL, "jpeg")
        assert studio.sandbox.jobs == studio.submits == 1

    async def test_partial_pictures_come_while_the_model_draws(self, tmp_path: Path) -> None:
        async with open_studio(tmp_path) as studio:
            stream = await studio.client.images.generate(
                model=SCHNELL, prompt="!delay 0.8 a heron", stream=True, partial_images=3
            )
            arrivals = [time.monotonic() async for _ in stream]
            assert arrivals[-1] - arrivals[0] > 0.3

    @pytest.mark.parametrize(
        ("model", "more"),
        [
            pytest.param(DEV, {"partial_images": 3}, id="a model that shows nothing before"),
            pytest.param(SCHNELL, {"partial_images": 0}, id="a client that wants nothing before"),
            pytest.param(SCHNELL, {}, id="a client that says nothing"),
            pytest.param(SCHNELL, {"partial_images": 1, "n": 2}, id="several pictures"),
        ],
    )
    async def test_only_finished_pictures_come_otherwise(
        self, studio: Studio, model: str, more: dict[str, Any]
    ) -> None:
        stream = await studio.client.images.generate(
            model=model, prompt=HERON, size=SMALL, stream=True, **more
        )
        events: list[Any] = [event async for event in stream]
        assert [event.type for event in events] == ["image_generation.completed"] * len(events)
        assert len(events) == more.get("n", 1)
        assert {seen.host for seen in studio.sandbox.seen} >= {"queue.fal.run"}
        assert studio.submits == 1

    async def test_an_edit_s_events_say_that_it_is_one(self, studio: Studio) -> None:
        stream = await studio.client.images.edit(
            model=KONTEXT, prompt=HERON, image=png(), stream=True, partial_images=1
        )
        assert [event.type async for event in stream] == ["image_edit.completed"]

    @pytest.mark.parametrize("model", [DEV, SCHNELL])
    async def test_a_failure_before_the_stream_has_a_status(
        self, studio: Studio, model: str
    ) -> None:
        with pytest.raises(openai.BadRequestError) as caught:
            await studio.client.images.generate(
                model=model, prompt="!error 422 content_policy_violation", stream=True,
                partial_images=1,
            )  # fmt: skip
        assert caught.value.code == "content_policy_violation"
        assert studio.submits == 1

    async def test_a_busy_account_queues_where_it_would_have_streamed(self, studio: Studio) -> None:
        prompt = "!error 429 concurrent_requests_limit times=1"
        stream = await studio.client.images.generate(
            model=SCHNELL, prompt=prompt, size=SMALL, stream=True, partial_images=1
        )
        assert [event.type async for event in stream] == ["image_generation.completed"]
        assert studio.sandbox.jobs == 1


def event(*urls: str) -> bytes:
    return b"data: " + json.dumps({"images": [{"url": url} for url in urls]}).encode()


class TestBrokenStreams:
    """What fal's sandbox does not do: streams that end in other ways."""

    async def events(self, tmp_path: Path, fal: FakeFal, *sent: bytes, ends: bool = True) -> Any:
        async def answer(request: web.Request) -> web.StreamResponse:
            if request.method == "GET":
                return web.json_response(openapi_document(MODELS[SCHNELL]))
            response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
            await response.prepare(request)
            for piece in sent:
                await response.write(piece)
            if not ends:
                assert request.transport is not None
                request.transport.abort()
            return response

        fal.answer = answer
        async with open_studio(tmp_path, upstream_origin=fal.origin, wait=2.0) as studio:
            body = {"model": SCHNELL, "prompt": HERON, "stream": True, "partial_images": 1}
            url = f"{studio.origin}/v1/images/generations"
            async with studio.session.post(url, json=body) as response:
                assert response.status == 200
                assert response.content_type == "text/event-stream"
                lines = (await response.read()).splitlines()
        assert sum(seen.method == "POST" for seen in fal.seen) == 1
        return [json.loads(line.removeprefix(b"data: ")) for line in lines if line]

    async def test_a_picture_inline_in_the_last_event_is_finished_too(
        self, tmp_path: Path, fal: FakeFal
    ) -> None:
        events = await self.events(tmp_path, fal, event(SKETCH) + b"\n\n", event(SKETCH))
        assert [event["type"].rpartition(".")[2] for event in events] == [
            "partial_image",
            "completed",
        ]

    @pytest.mark.parametrize(
        ("sent", "ends", "code"),
        [
            pytest.param([event(SKETCH), b"\n\n"], False, "upstream_broken", id="it breaks off"),
            pytest.param([], True, "no_picture", id="it is empty"),
            pytest.param([event(SKETCH) + b"\n\n", b'data: {"detail": "x"}\n\n'], True,
                         "no_picture", id="it ends with something else"),
            pytest.param([b"data: {\n\n"], True, "no_picture", id="it is no JSON"),
            pytest.param([event("http://10.0.0.1/a.png") + b"\n\n"], True, "picture_unreadable",
                         id="it names an address inside"),
        ],
    )  # fmt: skip
    async def test_a_stream_that_fails_ends_with_an_error(
        self, tmp_path: Path, fal: FakeFal, sent: list[bytes], ends: bool, code: str
    ) -> None:
        *_, last = await self.events(tmp_path, fal, *sent, ends=ends)
        assert last["error"]["code"] == code
        assert last["error"]["type"] == "server_error"

    async def test_the_client_raises_what_a_stream_ends_with(
        self, tmp_path: Path, fal: FakeFal
    ) -> None:
        async def answer(request: web.Request) -> web.StreamResponse:
            if request.method == "GET":
                return web.json_response(openapi_document(MODELS[SCHNELL]))
            return web.Response(body=b"data: {}\n\n", content_type="text/event-stream")

        fal.answer = answer
        async with open_studio(tmp_path, upstream_origin=fal.origin) as studio:
            stream = await studio.client.images.generate(
                model=SCHNELL, prompt=HERON, stream=True, partial_images=1
            )
            with pytest.raises(openai.APIError, match="no image"):
                await anext(aiter(stream))


class TestWithoutSchemas:
    async def test_a_model_is_called_while_its_schema_cannot_be_had(
        self, tmp_path: Path, fal: FakeFal
    ) -> None:
        """fal's queue is there, and fal's pages are not."""
        sent: list[Any] = []

        async def answer(request: web.Request) -> web.StreamResponse:
            if request.host == "fal.ai":
                return web.Response(status=503)
            if request.method == "POST":
                sent.append(await request.json())
                return web.json_response({"request_id": f"id-{len(sent)}", "status": "IN_QUEUE"})
            if request.path.endswith("/status"):
                return web.json_response({"status": "COMPLETED"})
            return web.json_response({"images": [{"url": SKETCH}, {"url": SKETCH}]})

        fal.answer = answer
        async with open_studio(tmp_path, upstream_origin=fal.origin) as studio:
            response = await studio.client.images.generate(
                model="fal-ai/some/model", prompt=HERON, n=2, size=SMALL, extra_body=SEED
            )
            assert response.data is not None
            assert len(response.data) == 2
            await studio.client.images.edit(prompt=HERON, image=png(), size=SMALL)
            assert sent[:2] == [{"prompt": HERON, "seed": 7}, {"prompt": HERON, "seed": 8}]
            assert sent[2].keys() == {"prompt", "image_url"}
            assert fal.seen[-1].target.startswith(f"/{KONTEXT.rpartition('/')[0]}")
            sent.clear()
            await studio.client.images.edit(model=KONTEXT, prompt="again", image=png(), n=2)
            assert len(sent) == 2, "equal calls are two all the same"
        asked = [seen.target for seen in fal.seen if "openapi" in seen.target]
        assert len(asked) == len(set(asked))


class TestLeaving:
    async def test_a_client_that_leaves_takes_its_jobs_along(self, studio: Studio) -> None:
        with pytest.raises(openai.APITimeoutError):
            await studio.client.with_options(max_retries=0).images.generate(
                model=SCHNELL, prompt="!delay 30 a heron", n=5, timeout=0.5
            )
        await until(lambda: [seen.method for seen in studio.sandbox.seen].count("PUT") == 2)
        assert studio.sandbox.jobs == 0

    async def test_a_client_that_leaves_a_stream_ends_it(self, studio: Studio) -> None:
        stream = await studio.client.images.generate(
            model=SCHNELL, prompt="!delay 6 a heron", size=SMALL, stream=True, partial_images=3
        )
        await anext(aiter(stream))
        await stream.close()
        await until(lambda: 499 in [seen.status for seen in studio.sandbox.seen])
        assert studio.sandbox.jobs == 0


class TestKeptOutputs:
    async def test_pictures_of_several_calls_are_read_from_there_too(self, tmp_path: Path) -> None:
        async with open_studio(tmp_path, rehost="disk") as studio:
            answer = await studio.client.images.edit(
                model=KONTEXT, prompt=HERON, image=png(), n=6, response_format="b64_json"
            )
            assert answer.data is not None
            assert len({made.b64_json for made in answer.data}) == 6

    async def test_pictures_on_our_own_disk_are_read_from_there(self, tmp_path: Path) -> None:
        async with open_studio(tmp_path, rehost="disk") as studio:
            generate = studio.client.images.with_raw_response.generate
            by_url = await generate(model=DEV, prompt=HERON, size=SMALL)
            assert "stored" in by_url.headers["x-falproxy-rehost"]
            data = by_url.parse().data
            assert data is not None
            assert str(data[0].url).startswith(f"{studio.origin}/files/")
            response = await studio.client.images.generate(
                model=DEV, prompt=HERON, size=SMALL, response_format="b64_json"
            )
            assert response.data is not None
            assert picture(response.data[0].b64_json).size == (256, 256)
            stream = await studio.client.images.generate(
                model=SCHNELL, prompt=HERON, size=SMALL, stream=True, partial_images=1
            )
            assert len([event async for event in stream]) == 2

    async def test_a_picture_that_cannot_be_read_is_not_bought_again(self, tmp_path: Path) -> None:
        async with open_studio(tmp_path) as studio:
            studio.sandbox.public_url = "http://127.0.0.1:9"
            with pytest.raises(openai.InternalServerError) as caught:
                await studio.client.images.generate(
                    model=DEV, prompt=HERON, size=SMALL, response_format="b64_json"
                )
            assert (caught.value.status_code, caught.value.code) == (502, "picture_unreadable")
            assert studio.submits == 1
