"""The OpenAI images API, called by OpenAI's Python client: generations, edits, models, errors."""

import base64
import gzip
import json
import time
from pathlib import Path
from typing import Any

import openai
import pytest
from aiohttp import web

from falproxy.proxy.model_schemas import SchemaClient
from falproxy.sandbox.model_metadata import openapi_document
from falproxy.sandbox.models import MODELS
from falproxy.stores.schema_files import SchemaFiles
from tests.support.fake_fal import FakeFal
from tests.support.offline_fal import png
from tests.support.openai_proxy import (
    DEV,
    HERON,
    KEY,
    KONTEXT,
    NANO,
    SCHNELL,
    SDXL,
    SEED,
    SKETCH,
    SMALL,
    OpenAIProxy,
    decode_image,
    open_openai_proxy,
)
from tests.support.urls import PROXY
from tests.support.waiting import wait_until


class TestGenerations:
    async def test_an_image_has_a_url(self, proxy: OpenAIProxy) -> None:
        response = await proxy.client.images.generate(model="flux-dev", prompt=HERON, size=SMALL)
        assert response.data is not None
        (image,) = response.data
        assert (await proxy.download(image.url)).size == (256, 256)
        assert image.b64_json is None
        assert image.revised_prompt is None
        assert abs(response.created - time.time()) < 60
        assert response.size == SMALL
        assert response._request_id
        assert proxy.inputs == [{"prompt": HERON, "image_size": {"width": 256, "height": 256}}]
        assert proxy.sandbox.jobs_by_endpoint == {DEV: 1}

    async def test_an_image_is_returned_in_base64(self, proxy: OpenAIProxy) -> None:
        response = await proxy.client.images.generate(
            model=DEV, prompt=HERON, size=SMALL, response_format="b64_json", output_format="png"
        )
        assert response.data is not None
        (image,) = response.data
        assert image.url is None
        decoded = decode_image(image.b64_json)
        assert (decoded.size, decoded.format) == ((256, 256), "PNG")
        assert response.output_format == "png"

    async def test_data_uris_in_the_result_are_decoded(self, proxy: OpenAIProxy) -> None:
        response = await proxy.client.images.generate(
            model=DEV, prompt=HERON, size=SMALL, response_format="b64_json",
            extra_body={"sync_mode": True},
        )  # fmt: skip
        assert response.data is not None
        assert decode_image(response.data[0].b64_json).size == (256, 256)

    async def test_the_first_model_is_the_default(self, proxy: OpenAIProxy) -> None:
        await proxy.client.images.generate(prompt=HERON, size=SMALL)
        assert proxy.sandbox.jobs_by_endpoint == {DEV: 1}

    async def test_parameters_are_translated_to_inputs_of_the_model(
        self, proxy: OpenAIProxy
    ) -> None:
        await proxy.client.images.generate(
            model=SDXL, prompt=HERON, size="1792x1024", output_format="png", user="ada",
            quality="hd", style="vivid", extra_body={"guidance_scale": 3, "loras": [], **SEED},
        )  # fmt: skip
        assert proxy.inputs == [
            {
                "prompt": HERON, "image_size": {"width": 1792, "height": 1024}, "format": "png",
                "seed": 7, "guidance_scale": 3, "loras": [],
            }
        ]  # fmt: skip

    async def test_a_size_becomes_the_nearest_ratio(self, proxy: OpenAIProxy) -> None:
        await proxy.client.images.generate(model=NANO, prompt=HERON, size="1536x1024")
        assert proxy.inputs == [{"prompt": HERON, "aspect_ratio": "3:2"}]

    async def test_parameters_that_a_model_does_not_have_are_not_sent(
        self, proxy: OpenAIProxy
    ) -> None:
        response = await proxy.client.images.with_raw_response.generate(
            model=DEV, prompt=HERON, size="auto", background="opaque", quality="high",
            extra_body={"negative_prompt": "people"},
        )  # fmt: skip
        assert proxy.inputs == [{"prompt": HERON}]
        names = response.headers["x-falproxy-ignored"].split(", ")
        assert sorted(names) == ["background", "negative_prompt", "quality"]

    @pytest.mark.parametrize(
        ("params", "param"),
        [
            pytest.param({"output_format": "webp"}, "output_format", id="a format"),
            pytest.param({"background": "transparent"}, "background", id="a background"),
            pytest.param({"model": "fal-ai/flux/dev/image-to-image", "size": "640x480",
                          "image_url": SKETCH}, "size", id="a size"),
            pytest.param({"image_url": SKETCH}, "image_url", id="an image"),
            pytest.param({"image": SKETCH}, "image", id="an image by OpenAI's name"),
            pytest.param({"images": [{"image_url": SKETCH}]}, "image", id="images"),
            pytest.param({"image_urls": [SKETCH]}, "image_urls", id="images by fal's name"),
            pytest.param({"mask_url": SKETCH}, "mask_url", id="a mask"),
            pytest.param({"mask": SKETCH}, "mask", id="a mask by OpenAI's name"),
            pytest.param({"init_image": SKETCH}, "init_image", id="an image by any name"),
            pytest.param({"loras": [{"path": "a/b"}]}, "loras", id="a LoRA"),
        ],
    )  # fmt: skip
    async def test_what_a_model_cannot_do_is_refused(
        self, proxy: OpenAIProxy, params: dict[str, object], param: str
    ) -> None:
        body = {"model": DEV, "prompt": HERON} | params
        url = f"{proxy.origin}/v1/images/generations"
        async with proxy.session.post(url, json=body) as response:
            error = (await response.json())["error"]
            assert (response.status, error["param"]) == (400, param), error
        assert error["type"] == "invalid_request_error"
        assert proxy.submits == 0

    @pytest.mark.parametrize(
        ("name", "response_format", "key"),
        [
            pytest.param("gpt-image-1", None, "b64_json", id="a GPT image model"),
            pytest.param("chatgpt-image-latest", None, "b64_json", id="ChatGPT's"),
            pytest.param("gpt-image-1", "url", "url", id="a URL is asked for"),
            pytest.param("my-gpt-image", None, "url", id="another name"),
            pytest.param(DEV, None, "url", id="an endpoint"),
        ],
    )
    async def test_the_name_of_the_model_determines_the_default_format(
        self, tmp_path: Path, name: str, response_format: Any, key: str
    ) -> None:
        models = ((name, DEV),) if "/" not in name else ()
        async with open_openai_proxy(tmp_path, {"models": models}) as proxy:
            options = {} if response_format is None else {"response_format": response_format}
            response = await proxy.client.images.generate(
                model=name, prompt=HERON, size=SMALL, **options
            )
            assert response.data is not None
            assert getattr(response.data[0], key)
            assert getattr(response.data[0], "url" if key != "url" else "b64_json") is None


class TestSeveralImages:
    async def test_three_images_are_one_call_of_a_model_with_a_maximum_of_four(
        self, proxy: OpenAIProxy
    ) -> None:
        response = await proxy.client.images.generate(
            model=SCHNELL, prompt=HERON, n=3, size=SMALL, extra_body=SEED
        )
        assert response.data is not None
        images = [await proxy.download(image.url) for image in response.data]
        assert len({image.tobytes() for image in images}) == 3
        (inputs,) = proxy.inputs
        assert (inputs["num_images"], inputs["seed"]) == (3, 7)

    async def test_an_integer_may_be_written_as_a_float(self, proxy: OpenAIProxy) -> None:
        url = f"{proxy.origin}/v1/images/generations"
        body = b'{"model": "flux-dev", "prompt": "x", "size": "64x64", "n": 2.0}'
        headers = {"Content-Type": "application/json"}
        async with proxy.session.post(url, data=body, headers=headers) as response:
            assert len((await response.json())["data"]) == 2

    async def test_ten_images_are_three_calls_with_different_seeds(
        self, proxy: OpenAIProxy
    ) -> None:
        response = await proxy.client.images.generate(
            model=SCHNELL,
            prompt=HERON,
            n=10,
            size=SMALL,
            extra_body=SEED,
            response_format="b64_json",
        )
        assert response.data is not None
        images = [decode_image(image.b64_json).tobytes() for image in response.data]
        assert (len(images), len(set(images))) == (10, 10)
        calls = sorted((inputs["seed"], inputs["num_images"]) for inputs in proxy.inputs)
        assert calls == [(7, 4), (11, 4), (15, 2)]

    async def test_calls_of_a_cached_model_do_not_share_an_image(self, proxy: OpenAIProxy) -> None:
        edit = proxy.client.images.edit
        response = await edit(
            model=KONTEXT, prompt=HERON, image=("a.png", png()), n=9, response_format="url"
        )
        assert response.data is not None
        assert len({image.url for image in response.data}) == 9
        assert proxy.submits == 3
        seeds = [inputs.get("seed") for inputs in proxy.inputs]
        assert len(set(seeds)) == 3

    async def test_all_calls_are_submitted_before_a_result_is_awaited(
        self, proxy: OpenAIProxy
    ) -> None:
        await proxy.client.images.generate(
            model=SCHNELL, prompt="!delay 0.1 a heron", n=10, size=SMALL, extra_body=SEED
        )
        methods = [seen.method for seen in proxy.sandbox.seen if seen.host == "queue.fal.run"]
        assert methods[:3] == ["POST"] * 3
        assert methods.count("POST") == 3

    async def test_no_image_is_returned_if_one_call_fails(self, proxy: OpenAIProxy) -> None:
        prompt = "!error 500 internal_server_error times=1"
        with pytest.raises(openai.InternalServerError):
            await proxy.client.images.generate(model=SCHNELL, prompt=prompt, n=10, size=SMALL)
        assert proxy.submits == 3


class TestEdits:
    async def test_a_file_is_edited(self, proxy: OpenAIProxy) -> None:
        response = await proxy.client.images.edit(
            model="kontext",
            prompt="make it winter",
            image=("in.png", png("teal")),
            extra_body={"seed": 21},
        )
        assert response.data is not None
        assert response.data[0].url is None
        assert decode_image(response.data[0].b64_json).width > 0
        (inputs,) = proxy.inputs
        encoded = base64.b64encode(png("teal")).decode()
        assert inputs == {
            "prompt": "make it winter",
            "image_url": f"data:image/png;base64,{encoded}",
            "seed": 21,
        }

    async def test_the_first_model_for_edits_is_the_default(self, proxy: OpenAIProxy) -> None:
        await proxy.client.images.edit(prompt="make it winter", image=png())
        assert proxy.sandbox.jobs_by_endpoint == {KONTEXT: 1}

    async def test_several_files_are_sent_to_a_model_that_supports_them(
        self, proxy: OpenAIProxy
    ) -> None:
        files = [png("red"), png("blue"), png("green")]
        await proxy.client.images.edit(
            model="kontext-multi", prompt="put them together", image=files, size="1024x1024"
        )
        (inputs,) = proxy.inputs
        sent = [base64.b64decode(url.partition(",")[2]) for url in inputs["image_urls"]]
        assert sent == files
        assert inputs["aspect_ratio"] == "1:1"

    async def test_a_list_of_masks_is_a_mask(self, proxy: OpenAIProxy) -> None:
        masks: Any = [("mask.png", png("white"))]
        response = await proxy.client.images.edit(
            model="fal-ai/flux-lora/inpainting", prompt=HERON, image=[("a.png", png("teal"))],
            mask=masks,
        )  # fmt: skip
        assert response.data is not None
        assert decode_image(response.data[0].b64_json).width > 0
        sent = {name: base64.b64decode(url.partition(",")[2]) for name, url in
                proxy.inputs[0].items() if name.endswith("_url")}  # fmt: skip
        assert sent == {"image_url": png("teal"), "mask_url": png("white")}

    async def test_a_list_of_masks_is_refused_by_a_model_without_masks(
        self, proxy: OpenAIProxy
    ) -> None:
        masks: Any = [("mask.png", png("white"))]
        with pytest.raises(openai.BadRequestError) as caught:
            await proxy.client.images.edit(
                model=KONTEXT, prompt=HERON, image=("a.png", png()), mask=masks
            )
        assert caught.value.param == "mask"
        assert proxy.submits == 0

    async def test_equal_edits_share_a_job(self, proxy: OpenAIProxy) -> None:
        edit = proxy.client.images.with_raw_response.edit
        first = await edit(model=KONTEXT, prompt=HERON, image=png())
        second = await edit(model=KONTEXT, prompt=HERON, image=png())
        assert proxy.sandbox.jobs == 1
        assert "fwd=miss" in first.headers["Cache-Status"]
        assert "; hit; ttl=" in second.headers["Cache-Status"]
        assert int(second.headers["Age"]) >= 0

    async def test_an_edit_shares_the_job_of_an_equal_call_by_the_header_route(
        self, proxy: OpenAIProxy
    ) -> None:
        inputs = {"prompt": HERON, "image_url": SKETCH}
        headers = {"x-fal-target-url": f"https://fal.run/{KONTEXT}"}
        async with proxy.session.post(
            proxy.origin + PROXY, json=inputs, headers=headers
        ) as response:
            url = (await response.json())["images"][0]["url"]
        edited = await proxy.client.images.edit(
            model="kontext", prompt=HERON, image=png(), response_format="url"
        )
        assert edited.data is not None
        assert edited.data[0].url == url
        assert proxy.sandbox.jobs == 1

    async def test_numbers_in_a_form_are_sent_as_numbers(self, proxy: OpenAIProxy) -> None:
        await proxy.client.images.edit(
            model=KONTEXT, prompt=HERON, image=png(), n=2,
            extra_body={"guidance_scale": 4.5, "enhance_prompt": True, "safety_tolerance": "3"},
        )  # fmt: skip
        (inputs,) = proxy.inputs
        assert inputs["guidance_scale"] == 4.5
        assert inputs["enhance_prompt"] is True
        assert inputs["safety_tolerance"] == "3"
        assert inputs["num_images"] == 2

    async def test_an_image_may_be_sent_by_url(self, proxy: OpenAIProxy) -> None:
        generated = await proxy.client.images.generate(model=DEV, prompt=HERON, size=SMALL)
        assert generated.data is not None
        await proxy.client.images.generate(
            model=KONTEXT, prompt="make it winter", extra_body={"image_url": generated.data[0].url}
        )
        assert proxy.sandbox.jobs_by_endpoint == {DEV: 1, KONTEXT: 1}

    async def test_a_large_file_is_sent_completely(self, proxy: OpenAIProxy) -> None:
        large = png() + bytes(3 * 2**20 + 1)
        await proxy.client.images.edit(model=KONTEXT, prompt=HERON, image=large)
        (inputs,) = proxy.inputs
        assert base64.b64decode(inputs["image_url"].partition(",")[2]) == large


class TestModels:
    async def test_the_named_models_are_listed(self, proxy: OpenAIProxy) -> None:
        models = [model async for model in proxy.client.models.list()]
        assert {model.object for model in models} == {"model"}
        by_id = {model.id: model for model in models}
        assert by_id["flux-dev"].owned_by == "fal-ai"
        assert by_id["flux-dev"].endpoint == DEV  # type: ignore[attr-defined]  # not in OpenAI's API

    async def test_a_setting_defines_the_names(self, tmp_path: Path) -> None:
        deps = {"models": (("dall-e-3", DEV),)}
        async with open_openai_proxy(tmp_path, deps) as proxy:
            assert [model.id async for model in proxy.client.models.list()] == ["dall-e-3"]
            await proxy.client.images.generate(model="dall-e-3", prompt=HERON, size=SMALL)
            assert proxy.sandbox.jobs_by_endpoint == {DEV: 1}

    @pytest.mark.parametrize("name", ["flux-dev", DEV, KONTEXT])
    async def test_a_model_is_retrieved_by_name_or_endpoint_id(
        self, proxy: OpenAIProxy, name: str
    ) -> None:
        assert (await proxy.client.models.retrieve(name)).id == name

    async def test_slashes_in_the_path_need_no_escaping(self, proxy: OpenAIProxy) -> None:
        async with proxy.session.get(f"{proxy.origin}/v1/models/{DEV}") as response:
            assert (await response.json())["id"] == DEV

    @pytest.mark.parametrize(
        "name",
        [
            pytest.param("gpt-image-1", id="an unknown name"),
            pytest.param("fal-ai/flux/nope", id="an id unknown to fal"),
            pytest.param("fal-ai/flux/../../x", id="an invalid id"),
            pytest.param("fal-ai/flux/requests/1", id="a request of the queue"),
        ],
    )
    async def test_an_unknown_model_is_not_found(self, proxy: OpenAIProxy, name: str) -> None:
        for request in (
            proxy.client.models.retrieve(name),
            proxy.client.images.generate(model=name, prompt=HERON),
        ):
            with pytest.raises(openai.NotFoundError) as caught:
                await request
            assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
            assert "GET /v1/models lists the names" in caught.value.message
        assert proxy.submits == 0

    @pytest.mark.parametrize("endpoint", ["fal-ai/ltx-video", "fal-ai/kokoro/american-english"])
    async def test_a_model_of_videos_or_sound_is_refused_before_it_is_called(
        self, proxy: OpenAIProxy, endpoint: str
    ) -> None:
        with pytest.raises(openai.BadRequestError) as caught:
            await proxy.client.images.generate(model=endpoint, prompt=HERON)
        assert (caught.value.code, caught.value.param) == ("model_not_supported", "model")
        assert proxy.submits == 0

    async def test_an_endpoint_that_is_not_allowed_is_not_found(self, tmp_path: Path) -> None:
        async with open_openai_proxy(tmp_path, allowed_endpoints=("fal-ai/flux/**",)) as proxy:
            names = [model.id async for model in proxy.client.models.list()]
            assert names == ["flux-dev", "flux-schnell"]
            with pytest.raises(openai.NotFoundError) as caught:
                await proxy.client.images.generate(model=SDXL, prompt=HERON)
            assert caught.value.code == "model_not_found"
            assert proxy.submits == 0
            await proxy.client.images.generate(model=SCHNELL, prompt=HERON, size=SMALL)


class TestErrors:
    @pytest.mark.parametrize(
        ("prompt", "exception", "status", "code", "submits"),
        [
            pytest.param("!error 422 content_policy_violation", openai.BadRequestError, 400,
                         "content_policy_violation", 1, id="a refused prompt"),
            pytest.param("!error 422 one_of", openai.BadRequestError, 400, "one_of", 1,
                         id="an invalid value"),
            pytest.param("!error 500 internal_server_error", openai.InternalServerError, 500,
                         "internal_server_error", 1, id="a job that failed"),
            pytest.param("!error 400 downstream_service_error", openai.InternalServerError, 500,
                         "downstream_service_error", 1, id="a 400 that the client did not cause"),
            pytest.param("!error 504 generation_timeout", openai.InternalServerError, 504,
                         "generation_timeout", 1, id="a job that took too long"),
            pytest.param("!error 503 runner_disconnected at=submit", openai.InternalServerError,
                         503, "runner_disconnected", 1, id="a submit that fal may have accepted"),
            pytest.param("!error 502 nginx at=submit", openai.InternalServerError, 502,
                         "upstream_failed", 1, id="a submit without a response of fal"),
            pytest.param("!error 403 locked at=submit", openai.RateLimitError, 429,
                         "insufficient_quota", 1, id="an account without balance"),
            pytest.param("!error 401 unknown_key at=submit", openai.InternalServerError, 500,
                         "upstream_unauthenticated", 1, id="a key that fal does not accept"),
            pytest.param("!error 429 queue_full at=submit", openai.RateLimitError, 429,
                         "rate_limit_exceeded", 9, id="a full queue, after which retries are free"),
        ],
    )  # fmt: skip
    async def test_an_error_has_the_right_exception_and_is_not_repeated(
        self,
        proxy: OpenAIProxy,
        prompt: str,
        exception: type[openai.APIStatusError],
        status: int,
        code: str,
        submits: int,
    ) -> None:
        with pytest.raises(exception) as caught:
            await proxy.client.images.generate(model=DEV, prompt=prompt)
        assert (caught.value.status_code, caught.value.code) == (status, code)
        assert caught.value.request_id
        assert isinstance(caught.value.body, dict)
        assert {"message", "type", "param", "code"} == caught.value.body.keys()
        assert proxy.submits == submits
        assert proxy.sandbox.jobs == 0

    async def test_an_unknown_access_key_is_an_authentication_error(self, tmp_path: Path) -> None:
        async with open_openai_proxy(tmp_path, access_keys=(("ada", "another"),)) as proxy:
            with pytest.raises(openai.AuthenticationError) as caught:
                await proxy.client.models.list()
            assert caught.value.code == "invalid_api_key"
            with pytest.raises(openai.AuthenticationError):
                await proxy.client.images.generate(model=DEV, prompt=HERON)
            assert proxy.sandbox.seen == []

    async def test_a_valid_access_key_is_accepted(self, tmp_path: Path) -> None:
        async with open_openai_proxy(tmp_path, access_key=KEY) as proxy:
            await proxy.client.images.generate(model=DEV, prompt=HERON, size=SMALL)
            assert proxy.sandbox.jobs == 1

    async def test_the_client_may_retry_while_fal_is_unreachable(self, tmp_path: Path) -> None:
        async with open_openai_proxy(tmp_path, upstream_origin="http://127.0.0.1:9") as proxy:
            with pytest.raises(openai.InternalServerError) as caught:
                await proxy.client.images.generate(model=DEV, prompt=HERON, timeout=30)
            assert caught.value.code == "upstream_unreachable"
            assert "x-should-retry" not in caught.value.response.headers

    async def test_a_job_that_exceeds_the_time_limit_is_cancelled_and_not_repeated(
        self, tmp_path: Path
    ) -> None:
        async with open_openai_proxy(tmp_path, wait=0.5) as proxy:
            with pytest.raises(openai.InternalServerError) as caught:
                await proxy.client.images.generate(model=DEV, prompt="!delay 30 a heron")
            assert (caught.value.status_code, caught.value.code) == (504, "upstream_timeout")
            assert "timed out after 0.5 s" in caught.value.message
            assert proxy.submits == 1
        assert [seen.method for seen in proxy.sandbox.seen][-1] == "PUT"

    @pytest.mark.parametrize(
        ("params", "param", "code"),
        [
            pytest.param({"n": 0}, "n", "integer_below_min_value", id="no images"),
            pytest.param({"n": 11}, "n", "integer_above_max_value", id="too many images"),
            pytest.param({"size": "huge"}, "size", "invalid_value", id="an invalid size"),
            pytest.param({"size": "0x0"}, "size", "invalid_value", id="an empty size"),
            pytest.param({"prompt": ""}, "prompt", "empty_string", id="an empty prompt"),
            pytest.param({"response_format": "gif"}, "response_format", "invalid_value",
                         id="an invalid response format"),
            pytest.param({"extra_body": {"seed": "x"}}, "seed", "invalid_value", id="a bad seed"),
            pytest.param({"extra_body": {"num_images": 2}}, "num_images", "invalid_value",
                         id="the input of fal for n"),
            pytest.param({"model": KONTEXT}, "image", "missing_required_parameter",
                         id="a model for edits"),
        ],
    )  # fmt: skip
    async def test_an_error_names_the_invalid_parameter(
        self, proxy: OpenAIProxy, params: dict[str, Any], param: str, code: str
    ) -> None:
        with pytest.raises(openai.BadRequestError) as caught:
            await proxy.client.images.generate(**{"prompt": HERON, "model": DEV} | params)
        assert (caught.value.param, caught.value.code) == (param, code)
        assert caught.value.type == "invalid_request_error"
        assert proxy.submits == 0

    async def test_an_error_of_fal_names_the_parameter_of_the_client(
        self, proxy: OpenAIProxy
    ) -> None:
        with pytest.raises(openai.BadRequestError) as caught:
            await proxy.client.images.generate(model=DEV, prompt=HERON, size="99999x64")
        assert (caught.value.param, caught.value.code) == ("size", "less_than_equal")
        with pytest.raises(openai.BadRequestError) as caught:
            await proxy.client.images.generate(
                model=DEV, prompt=HERON, extra_body={"guidance_scale": 99}
            )
        assert caught.value.param == "guidance_scale"

    @pytest.mark.parametrize(
        ("body", "content_type", "status"),
        [
            pytest.param(b"{", "application/json", 400, id="not JSON"),
            pytest.param(b"[]", "application/json", 400, id="not an object"),
            pytest.param(b"[" * 100_000, "application/json", 400, id="nested too deeply"),
            pytest.param(b"{}", "application/json", 400, id="no prompt"),
            pytest.param(b'{"prompt": "x", "n": "3"}', "application/json", 400, id="not a number"),
            pytest.param(b'{"prompt": "x", "n": true}', "application/json", 400, id="a boolean"),
            pytest.param(b'{"prompt": "x", "cfg": NaN}', "application/json", 400, id="NaN"),
            pytest.param(
                b'{"prompt": "x", "cfg": 1e999}',
                "application/json",
                400,
                id="an infinity",
            ),
            pytest.param(
                b'{"prompt": "\\ud800"}', "application/json", 400, id="a single surrogate"
            ),
            pytest.param(b"{}", "text/plain", 415, id="another content type"),
        ],
    )
    async def test_an_invalid_body_is_refused_in_the_format_of_openai(
        self, proxy: OpenAIProxy, body: bytes, content_type: str, status: int
    ) -> None:
        url = f"{proxy.origin}/v1/images/generations"
        headers = {"Content-Type": content_type}
        async with proxy.session.post(url, data=body, headers=headers) as response:
            assert response.status == status
            document = await response.json()
        assert document["error"]["type"] == "invalid_request_error"
        assert proxy.sandbox.seen == []

    @pytest.mark.parametrize("path", ["generations", "edits"])
    async def test_a_compressed_body_is_refused(self, proxy: OpenAIProxy, path: str) -> None:
        headers = {"Content-Encoding": "gzip", "Content-Type": "application/json"}
        url = f"{proxy.origin}/v1/images/{path}"
        body = gzip.compress(b'{"prompt": "x"}')
        async with proxy.session.post(url, data=body, headers=headers) as response:
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
        self, proxy: OpenAIProxy, method: str, path: str, allow: str
    ) -> None:
        async with proxy.session.request(method, proxy.origin + path) as response:
            assert (response.status, response.headers["Allow"]) == (405, allow)
            assert (await response.json())["error"]["code"] == "method_not_allowed"


class TestStreams:
    async def test_unfinished_images_are_sent_before_the_finished_one(
        self, proxy: OpenAIProxy
    ) -> None:
        stream = await proxy.client.images.generate(
            model=SCHNELL, prompt=HERON, size=SMALL, stream=True, partial_images=2
        )
        events: list[Any] = [event async for event in stream]
        types = [event.type.rpartition(".")[2] for event in events]
        assert types == ["partial_image", "partial_image", "completed"]
        assert [event.partial_image_index for event in events[:2]] == [0, 1]
        assert all(decode_image(event.b64_json).size == (256, 256) for event in events)
        assert {event.type.partition(".")[0] for event in events} == {"image_generation"}
        assert (events[2].size, events[2].output_format) == (SMALL, "jpeg")
        assert proxy.sandbox.jobs == proxy.submits == 1

    async def test_unfinished_images_are_sent_while_the_model_runs(self, tmp_path: Path) -> None:
        async with open_openai_proxy(tmp_path) as proxy:
            stream = await proxy.client.images.generate(
                model=SCHNELL, prompt="!delay 0.8 a heron", stream=True, partial_images=3
            )
            arrivals = [time.monotonic() async for _ in stream]
            assert arrivals[-1] - arrivals[0] > 0.3

    @pytest.mark.parametrize(
        ("model", "params"),
        [
            pytest.param(DEV, {"partial_images": 3}, id="a model without unfinished images"),
            pytest.param(SCHNELL, {"partial_images": 0}, id="a client that requests none"),
            pytest.param(SCHNELL, {}, id="the default"),
            pytest.param(SCHNELL, {"partial_images": 1, "n": 2}, id="several images"),
        ],
    )
    async def test_otherwise_only_finished_images_are_sent(
        self, proxy: OpenAIProxy, model: str, params: dict[str, Any]
    ) -> None:
        stream = await proxy.client.images.generate(
            model=model, prompt=HERON, size=SMALL, stream=True, **params
        )
        events: list[Any] = [event async for event in stream]
        assert [event.type for event in events] == ["image_generation.completed"] * len(events)
        assert len(events) == params.get("n", 1)
        assert {seen.host for seen in proxy.sandbox.seen} >= {"queue.fal.run"}
        assert proxy.submits == 1

    async def test_the_events_of_an_edit_have_their_own_type(self, proxy: OpenAIProxy) -> None:
        stream = await proxy.client.images.edit(
            model=KONTEXT, prompt=HERON, image=png(), stream=True, partial_images=1
        )
        assert [event.type async for event in stream] == ["image_edit.completed"]

    @pytest.mark.parametrize("model", [DEV, SCHNELL])
    async def test_a_failure_before_the_stream_has_a_status(
        self, proxy: OpenAIProxy, model: str
    ) -> None:
        with pytest.raises(openai.BadRequestError) as caught:
            await proxy.client.images.generate(
                model=model, prompt="!error 422 content_policy_violation", stream=True,
                partial_images=1,
            )  # fmt: skip
        assert caught.value.code == "content_policy_violation"
        assert proxy.submits == 1

    async def test_a_call_is_queued_if_the_concurrency_limit_prevents_streaming(
        self, proxy: OpenAIProxy
    ) -> None:
        prompt = "!error 429 concurrent_requests_limit times=1"
        stream = await proxy.client.images.generate(
            model=SCHNELL, prompt=prompt, size=SMALL, stream=True, partial_images=1
        )
        assert [event.type async for event in stream] == ["image_generation.completed"]
        assert proxy.sandbox.jobs == 1


def event(*urls: str) -> bytes:
    return b"data: " + json.dumps({"images": [{"url": url} for url in urls]}).encode()


class TestBrokenStreams:
    """Streams that end in ways that the sandbox does not emulate."""

    async def events(self, tmp_path: Path, fal: FakeFal, *sent: bytes, ends: bool = True) -> Any:
        async def respond(request: web.Request) -> web.StreamResponse:
            if request.method == "GET":
                return web.json_response(openapi_document(MODELS[SCHNELL]))
            response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
            await response.prepare(request)
            for chunk in sent:
                await response.write(chunk)
            if not ends:
                assert request.transport is not None
                request.transport.abort()
            return response

        fal.respond = respond
        async with open_openai_proxy(tmp_path, upstream_origin=fal.origin, wait=2.0) as proxy:
            body = {"model": SCHNELL, "prompt": HERON, "stream": True, "partial_images": 1}
            url = f"{proxy.origin}/v1/images/generations"
            async with proxy.session.post(url, json=body) as response:
                assert response.status == 200
                assert response.content_type == "text/event-stream"
                lines = (await response.read()).splitlines()
        assert sum(seen.method == "POST" for seen in fal.seen) == 1
        return [json.loads(line.removeprefix(b"data: ")) for line in lines if line]

    async def test_a_data_uri_in_the_last_event_is_the_finished_image(
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
            pytest.param([event(SKETCH), b"\n\n"], False, "upstream_broken", id="broken off"),
            pytest.param([], True, "no_picture", id="an empty stream"),
            pytest.param([event(SKETCH) + b"\n\n", b'data: {"detail": "x"}\n\n'], True,
                         "no_picture", id="a last event without an image"),
            pytest.param([b"data: {\n\n"], True, "no_picture", id="an event that is not JSON"),
            pytest.param([event("http://10.0.0.1/a.png") + b"\n\n"], True, "picture_unreadable",
                         id="a URL with a private address"),
        ],
    )  # fmt: skip
    async def test_a_stream_that_fails_ends_with_an_error(
        self, tmp_path: Path, fal: FakeFal, sent: list[bytes], ends: bool, code: str
    ) -> None:
        *_, last = await self.events(tmp_path, fal, *sent, ends=ends)
        assert last["error"]["code"] == code
        assert last["error"]["type"] == "server_error"

    async def test_the_client_raises_the_error_of_a_stream(
        self, tmp_path: Path, fal: FakeFal
    ) -> None:
        async def respond(request: web.Request) -> web.StreamResponse:
            if request.method == "GET":
                return web.json_response(openapi_document(MODELS[SCHNELL]))
            return web.Response(body=b"data: {}\n\n", content_type="text/event-stream")

        fal.respond = respond
        async with open_openai_proxy(tmp_path, upstream_origin=fal.origin) as proxy:
            stream = await proxy.client.images.generate(
                model=SCHNELL, prompt=HERON, stream=True, partial_images=1
            )
            with pytest.raises(openai.APIError, match="no image"):
                await anext(aiter(stream))


class TestWithoutSchemas:
    async def test_a_model_is_called_while_its_schema_is_unavailable(
        self, tmp_path: Path, fal: FakeFal
    ) -> None:
        """fal's queue is available, its documentation is not."""
        sent: list[Any] = []

        async def respond(request: web.Request) -> web.StreamResponse:
            if request.host == "fal.ai":
                return web.Response(status=503)
            if request.method == "POST":
                sent.append(await request.json())
                return web.json_response({"request_id": f"id-{len(sent)}", "status": "IN_QUEUE"})
            if request.path.endswith("/status"):
                return web.json_response({"status": "COMPLETED"})
            return web.json_response({"images": [{"url": SKETCH}, {"url": SKETCH}]})

        fal.respond = respond
        async with open_openai_proxy(tmp_path, upstream_origin=fal.origin) as proxy:
            response = await proxy.client.images.generate(
                model="fal-ai/some/model", prompt=HERON, n=2, extra_body=SEED
            )
            assert response.data is not None
            assert len(response.data) == 2
            await proxy.client.images.edit(prompt=HERON, image=png())
            assert sent[:2] == [{"prompt": HERON, "seed": 7}, {"prompt": HERON, "seed": 8}]
            assert sent[2].keys() == {"prompt", "image_url"}
            assert fal.seen[-1].target.startswith(f"/{KONTEXT.rpartition('/')[0]}")
            sent.clear()
            await proxy.client.images.edit(model=KONTEXT, prompt="again", image=png(), n=2)
            assert len(sent) == 2, "equal calls of one request do not share a job"
        schema_requests = [seen.target for seen in fal.seen if "openapi" in seen.target]
        assert len(schema_requests) == len(set(schema_requests))

    @pytest.mark.parametrize(
        "params",
        [
            pytest.param({"size": SMALL}, id="a size"),
            pytest.param({"output_format": "png"}, id="a format"),
            pytest.param({"extra_body": {"image_url": SKETCH}}, id="an image"),
        ],
    )
    async def test_a_request_that_needs_the_schema_is_a_503_that_clients_repeat(
        self, tmp_path: Path, fal: FakeFal, params: dict[str, Any]
    ) -> None:
        async def respond(request: web.Request) -> web.StreamResponse:
            return web.Response(status=503)

        fal.respond = respond
        async with open_openai_proxy(tmp_path, upstream_origin=fal.origin) as proxy:
            client = proxy.client.with_options(max_retries=0)
            with pytest.raises(openai.InternalServerError) as caught:
                await client.images.generate(model="fal-ai/some/model", prompt=HERON, **params)
            assert (caught.value.status_code, caught.value.code) == (503, "schema_unavailable")
            assert caught.value.response.headers["Retry-After"] == "5"
            assert "x-should-retry" not in caught.value.response.headers
        assert {seen.method for seen in fal.seen} == {"GET"}

    async def test_a_schema_outlives_a_restart(self, tmp_path: Path, fal: FakeFal) -> None:
        files = SchemaFiles(tmp_path / "schemas")
        async with open_openai_proxy(tmp_path, {"schemas": SchemaClient(files=files)}) as proxy:
            await proxy.client.images.generate(model=NANO, prompt=HERON, size="1536x1024")

        async def respond(request: web.Request) -> web.StreamResponse:
            if request.host == "fal.ai":
                return web.Response(status=503)
            return web.json_response({"detail": "no"}, status=422)

        fal.respond = respond
        deps = {"schemas": SchemaClient(files=files)}
        async with open_openai_proxy(tmp_path, deps, upstream_origin=fal.origin) as proxy:
            with pytest.raises(openai.BadRequestError):
                await proxy.client.images.generate(model=NANO, prompt=HERON, size="1536x1024")
        (submit,) = [seen for seen in fal.seen if seen.method == "POST"]
        assert json.loads(submit.body) == {"prompt": HERON, "aspect_ratio": "3:2"}


class TestDisconnectedClients:
    async def test_the_jobs_of_a_disconnected_client_are_cancelled(
        self, proxy: OpenAIProxy
    ) -> None:
        with pytest.raises(openai.APITimeoutError):
            await proxy.client.with_options(max_retries=0).images.generate(
                model=SCHNELL, prompt="!delay 30 a heron", n=5, timeout=0.5
            )
        await wait_until(
            lambda: [seen.method for seen in proxy.sandbox.seen].count("PUT") == 2, seconds=90
        )
        assert proxy.sandbox.jobs == 0

    async def test_a_client_that_disconnects_ends_the_stream(self, proxy: OpenAIProxy) -> None:
        stream = await proxy.client.images.generate(
            model=SCHNELL, prompt="!delay 6 a heron", size=SMALL, stream=True, partial_images=3
        )
        await anext(aiter(stream))
        await stream.close()
        await wait_until(lambda: 499 in [seen.status for seen in proxy.sandbox.seen], seconds=90)
        assert proxy.sandbox.jobs == 0


class TestStoredOutputs:
    async def test_stored_images_of_several_calls_are_read_from_the_disk(
        self, tmp_path: Path
    ) -> None:
        async with open_openai_proxy(tmp_path, rehost="disk") as proxy:
            response = await proxy.client.images.edit(
                model=KONTEXT, prompt=HERON, image=png(), n=6, response_format="b64_json"
            )
            assert response.data is not None
            assert len({image.b64_json for image in response.data}) == 6

    async def test_stored_images_are_read_from_the_disk(self, tmp_path: Path) -> None:
        async with open_openai_proxy(tmp_path, rehost="disk") as proxy:
            generate = proxy.client.images.with_raw_response.generate
            by_url = await generate(model=DEV, prompt=HERON, size=SMALL)
            assert "stored" in by_url.headers["x-falproxy-rehost"]
            data = by_url.parse().data
            assert data is not None
            assert str(data[0].url).startswith(f"{proxy.origin}/files/")
            response = await proxy.client.images.generate(
                model=DEV, prompt=HERON, size=SMALL, response_format="b64_json"
            )
            assert response.data is not None
            assert decode_image(response.data[0].b64_json).size == (256, 256)
            stream = await proxy.client.images.generate(
                model=SCHNELL, prompt=HERON, size=SMALL, stream=True, partial_images=1
            )
            assert len([event async for event in stream]) == 2

    async def test_an_unreadable_image_is_not_generated_again(self, tmp_path: Path) -> None:
        async with open_openai_proxy(tmp_path) as proxy:
            proxy.sandbox.public_url = "http://127.0.0.1:9"
            with pytest.raises(openai.InternalServerError) as caught:
                await proxy.client.images.generate(
                    model=DEV, prompt=HERON, size=SMALL, response_format="b64_json"
                )
            assert (caught.value.status_code, caught.value.code) == (502, "picture_unreadable")
            assert proxy.submits == 1
