"""`/api/images` and `/api/templates`, through the complete proxy to the sandbox."""

import asyncio
import json
import sqlite3
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from falproxy import Settings, setup
from falproxy.fal.registry import read_registry
from falproxy.stores.ledger import JobRow, Lease
from falproxy.stores.ledger.writer import LEDGER_WRITER
from tests.support.fake_fal import FakeFal
from tests.support.fake_supabase import FakeSupabase
from tests.support.key_search import CANARY
from tests.support.offline_fal import png
from tests.support.sandbox_proxy import (
    ASYNC,
    GENERATE,
    Reply,
    SandboxProxy,
    data_uri,
    open_sandbox_proxy,
)
from tests.support.settings import make_settings
from tests.support.waiting import SOON, wait_until

SHIPPED = read_registry()
HERON = "!delay 0 a heron at dawn"
SLOW = "!delay 0.4 a heron at dawn"
ENDLESS = "!delay 60 a heron at dawn"
SIZE = {"width": 64, "height": 48}
DRAW = {"prompt": HERON, **SIZE}
SENT = {"prompt": HERON, "image_size": SIZE}
LORA = {"lora_url": "https://loras.example/ink.safetensors", "lora_scale": 0.7}
LORAS = [{"path": "https://loras.example/ink.safetensors", "scale": 0.7}]
FILE = "FILE"  # stands for the URL of an image at fal
EDIT = {"prompt": HERON, "image_url": FILE}
JOB = {"jobId", "status", "model", "imageUrl", "images", "cost", "userId", "error"}

# For each model: its inputs, and the inputs that fal gets if these differ.
MODELS: dict[str, tuple[dict[str, Any], dict[str, Any] | None]] = {
    "flux-pro": (DRAW | {"safety_tolerance": "3"}, SENT | {"safety_tolerance": "3"}),
    "flux-dev": (DRAW | {"seed": 7}, SENT | {"seed": 7}),
    "flux-schnell": (DRAW | {"num_inference_steps": 2}, SENT | {"num_inference_steps": 2}),
    "flux-lora": (DRAW | LORA, SENT | {"loras": LORAS}),
    "image-to-image": (EDIT | {"strength": 0.5}, None),
    "face-swap": (
        {"image_url": data_uri(), "target_image_url": FILE},
        {"base_image_url": data_uri(), "swap_image_url": FILE},
    ),
    "kontext": (EDIT | {"aspect_ratio": "1:1"}, None),
    "kontext-max": (EDIT | {"output_format": "png"}, None),
    "kontext-multi": ({"prompt": HERON, "image_urls": [data_uri(), FILE]}, None),
    "kontext-text-to-image": ({"prompt": HERON, "seed": 0}, None),
    "kontext-dev": (EDIT | {"resolution_mode": "1:1"}, None),
    "kontext-lora": (EDIT | LORA, EDIT | {"loras": LORAS}),
    "fast-sdxl": (
        DRAW | LORA | {"output_format": "png", "negative_prompt": "people"},
        SENT | {"loras": LORAS, "format": "png", "negative_prompt": "people"},
    ),
    "fast-lightning-sdxl": (DRAW | {"output_format": "png"}, SENT | {"format": "png"}),
    "nano-banana": ({"prompt": HERON, "aspect_ratio": "3:2"}, None),
    "nano-banana-edit": ({"prompt": HERON, "image_urls": [FILE]}, None),
}
# The same of models that make videos and sounds.
MEDIA_MODELS: dict[str, dict[str, Any]] = {
    "kling-video": {"prompt": HERON, "duration": "5", "aspect_ratio": "1:1"},
    "hailuo-video": {"prompt": HERON, "prompt_optimizer": False},
    "veo-video": {"prompt": HERON, "duration": "4s", "generate_audio": False},
    "ltx-video": {"prompt": HERON, "seed": 7},
    "kokoro-speech": {"prompt": HERON, "voice": "am_adam"},
    "minimax-speech": {"text": HERON, "voice_setting": {"speed": 1.5}},
    "elevenlabs-speech": {"text": HERON, "voice": "Aria"},
    "stable-audio": {"prompt": HERON, "seconds_total": 2},
    "stable-audio-open": {"prompt": HERON, "seconds_total": 2},
    "ace-step-music": {"prompt": HERON, "duration": 5},
}


@pytest.fixture
async def proxy(tmp_path: Path) -> AsyncIterator[SandboxProxy]:
    async with open_sandbox_proxy(tmp_path) as opened:
        yield opened


@pytest.fixture
async def uncached(tmp_path: Path) -> AsyncIterator[SandboxProxy]:
    async with open_sandbox_proxy(tmp_path, cache=False) as opened:
        yield opened


def insert_file_url(value: Any, url: str) -> Any:
    """Replace FILE by a URL, at any depth."""
    if isinstance(value, dict):
        return {name: insert_file_url(each, url) for name, each in value.items()}
    if isinstance(value, list):
        return [insert_file_url(each, url) for each in value]
    return url if value == FILE else value


def finished(reply: Reply) -> Any:
    """Return the document of a completed job."""
    assert reply.status == 200, reply
    assert set(reply.document) == JOB
    assert reply.document["status"] == "completed"
    assert reply.document["error"] is None
    assert reply.document["imageUrl"] == reply.document["images"][0]["url"]
    return reply.document


def finished_media(reply: Reply, kind: str) -> Any:
    """Return the document of a completed job, whose file is a video or a sound."""
    assert reply.status == 200, reply
    assert (reply.document["status"], reply.document["error"]) == ("completed", None)
    assert (reply.document["images"], reply.document["imageUrl"]) == ([], None)
    url = reply.document[f"{kind}Url"]
    assert {"url": url, "kind": kind} in reply.document["files"]
    return reply.document


def failed(reply: Reply) -> tuple[int, str, str]:
    """Return status, code and message of a failed job."""
    assert set(reply.document) == JOB
    assert (reply.document["status"], reply.document["images"]) == ("failed", [])
    error = reply.document["error"]
    assert set(error) == {"code", "message"}
    return reply.status, error["code"], error["message"]


async def disconnect(
    proxy: SandboxProxy, model: str, inputs: dict[str, object], reached: str
) -> None:
    """Make a call, and disconnect as soon as fal got a request whose path ends with `reached`."""
    call = asyncio.ensure_future(proxy.generate(model, inputs))
    await wait_until(lambda: any(seen.path.endswith(reached) for seen in proxy.model_requests))
    call.cancel()
    await asyncio.gather(call, return_exceptions=True)


class TestModels:
    def test_all_have_an_example(self) -> None:
        assert {*MODELS, *MEDIA_MODELS} == {*SHIPPED.models}

    @pytest.mark.parametrize("name", MODELS)
    async def test_returns_an_image_for_its_inputs(self, proxy: SandboxProxy, name: str) -> None:
        inputs, sent = MODELS[name]
        url = proxy.add_file(png("blue"))
        job = finished(await proxy.generate(name, insert_file_url(inputs, url)))
        assert proxy.inputs == [insert_file_url(sent or inputs, url)]
        assert proxy.sandbox.jobs_by_endpoint == {SHIPPED.models[name].endpoint: 1}
        assert job["model"] == name
        assert job["images"][0]["width"] > 0
        async with proxy.session.get(job["imageUrl"]) as image_response:
            assert image_response.status == 200
            assert image_response.content_type.startswith("image/")

    @pytest.mark.parametrize("name", MEDIA_MODELS)
    async def test_returns_a_video_or_sound(self, proxy: SandboxProxy, name: str) -> None:
        model = SHIPPED.models[name]
        job = finished_media(await proxy.generate(name, MEDIA_MODELS[name]), model.kind)
        assert proxy.inputs == [model.defaults | MEDIA_MODELS[name]]
        assert proxy.sandbox.jobs_by_endpoint == {model.endpoint: 1}
        assert model.price is None or job["cost"] == pytest.approx(float(proxy.sandbox.cost))
        async with proxy.session.get(job[f"{model.kind}Url"]) as file_response:
            assert file_response.status == 200
            assert file_response.content_type.startswith(f"{model.kind}/")

    async def test_a_video_begins_with_the_image_of_the_call(self, proxy: SandboxProxy) -> None:
        reply = await proxy.generate("kling-video", {**EDIT, "image_url": data_uri()})
        job = finished_media(reply, "video")
        assert proxy.sandbox.jobs_by_endpoint == {
            "fal-ai/kling-video/v2.5-turbo/pro/image-to-video": 1
        }
        assert job["cost"] == 0.35

    async def test_options_are_added_to_the_inputs(self, proxy: SandboxProxy) -> None:
        inputs = {"prompt": HERON}
        finished(await proxy.generate("flux-dev", inputs, options={**SIZE, "seed": 7}))
        assert proxy.inputs == [SENT | {"seed": 7}]

    async def test_null_inputs_are_left_out(self, proxy: SandboxProxy) -> None:
        finished(await proxy.generate("flux-dev", {**DRAW, "seed": None, "loras": None}))
        assert proxy.inputs == [SENT]

    async def test_several_images_are_one_job(self, proxy: SandboxProxy) -> None:
        job = finished(await proxy.generate("flux-schnell", DRAW, options={"num_images": 4}))
        assert len({image["url"] for image in job["images"]}) == 4
        assert [(image["width"], image["height"]) for image in job["images"]] == [(64, 48)] * 4
        assert (proxy.sandbox.jobs, job["cost"]) == (1, 0.012)

    async def test_the_user_id_is_recorded_and_returned(self, proxy: SandboxProxy) -> None:
        assert finished(await proxy.generate("flux-dev", DRAW, userId="ada"))["userId"] == "ada"
        (row,) = proxy.jobs()
        assert row["user_id"] == "ada"
        (entry,) = await proxy.records()
        assert entry.user_id is None  # users are believed from authenticated callers only

    async def test_are_listed_with_the_templates(self, proxy: SandboxProxy) -> None:
        reply = await proxy.request("GET", "/api/images/models")
        assert (reply.status, {*reply.document}) == (200, {"models", "templates"})
        models = {model["name"]: model for model in reply.document["models"]}
        assert list(models) == list(SHIPPED.models)
        assert models["face-swap"] == {
            "name": "face-swap",
            "endpoint": "fal-ai/face-swap",
            "kind": "image",
            "description": SHIPPED.models["face-swap"].description,
            "required": ["image_url", "target_image_url"],
            "optional": ["prompt"],
            "lora": False,
            "price": None,
            "unit": "image",
            "defaults": {},
        }
        assert (models["kontext"]["price"], models["kontext"]["unit"]) == (0.04, "image")
        templates = {template["name"]: template for template in reply.document["templates"]}
        assert list(templates) == ["billboard", "discount-banner", "product-shot"]
        shot = templates["product-shot"]
        assert (shot["model"], set(shot)) == (
            "flux-dev", {"name", "description", "model", "variables"},
        )  # fmt: skip
        product = {"name": "product", "description": "what is shown", "default": None}
        assert shot["variables"][0] == product
        assert proxy.sandbox.seen == []


MODELS_FILE = """
[models.house]
endpoint = "fal-ai/flux/schnell"
description = "Our own style."
required = ["text"]
optional = ["image_size", "seed"]
price = 0.5
defaults = { seed = 5 }
rename = { text = "prompt" }

[models.flux-dev]
endpoint = "fal-ai/flux/schnell"
required = ["prompt"]

[templates.greeting]
model = "house-of-prompts"
prompt = "!delay 0 hello, $who"
inputs = { image_size = { width = 64, height = 48 } }
[templates.greeting.variables]
who = { description = "who is greeted", default = "world" }

[models.house-of-prompts]
endpoint = "fal-ai/flux/schnell"
required = ["prompt"]
optional = ["image_size"]
"""


class TestModelsFile:
    @pytest.fixture
    async def proxy(self, tmp_path: Path) -> AsyncIterator[SandboxProxy]:
        own = tmp_path / "models.toml"
        own.write_text(MODELS_FILE)
        settings = Settings.from_env({"FAL_KEY": CANARY, "FALPROXY_MODELS": str(own)})
        assert settings.dialects.models_file == own
        async with open_sandbox_proxy(tmp_path, models_file=own) as opened:
            yield opened

    async def test_adds_a_model(self, proxy: SandboxProxy) -> None:
        job = finished(await proxy.generate("house", {"text": HERON, **SIZE}))
        assert proxy.inputs == [SENT | {"seed": 5}]
        assert job["cost"] == 0.5
        listed = await proxy.request("GET", "/api/images/models")
        assert "house" in [model["name"] for model in listed.document["models"]]

    async def test_replaces_a_model(self, proxy: SandboxProxy) -> None:
        job = finished(await proxy.generate("flux-dev", {"prompt": HERON}))
        assert proxy.sandbox.jobs_by_endpoint == {"fal-ai/flux/schnell": 1}
        assert job["cost"] == 0.5  # of another model with this endpoint

    async def test_adds_a_template(self, proxy: SandboxProxy) -> None:
        finished(await proxy.request("POST", "/api/templates/greeting", json={}))
        assert proxy.inputs == [{"prompt": "!delay 0 hello, world", "image_size": SIZE}]


class TestTemplates:
    @pytest.mark.parametrize(
        ("name", "variables", "size"),
        [
            pytest.param(
                "billboard", {"product": "tea", "headline": "Slow down"}, "landscape_16_9"
            ),
            pytest.param("discount-banner", {"shop": "a bakery", "discount": 30}, "landscape_16_9"),
            pytest.param("product-shot", {"product": "a bar of soap"}, "square_hd"),
        ],
    )
    async def test_fills_the_prompt_for_its_model(
        self, proxy: SandboxProxy, name: str, variables: dict[str, object], size: str
    ) -> None:
        reply = await proxy.request("POST", f"/api/templates/{name}", json={"variables": variables})
        assert finished(reply)["model"] == "flux-dev"
        prompt = SHIPPED.templates[name].fill(variables)
        assert proxy.inputs == [{"prompt": prompt, "image_size": size}]

    @pytest.mark.parametrize(
        ("more", "sent"),
        [
            pytest.param({"options": {"seed": 3, **SIZE}}, {"seed": 3, "image_size": SIZE},
                         id="a size"),
            pytest.param({"inputs": {"image_size": "square"}}, {"image_size": "square"},
                         id="a preset"),
            pytest.param({"model": "flux-schnell"}, {"image_size": "square_hd"}, id="a model"),
            pytest.param({"model": "nano-banana"}, {}, id="a model without the template's size"),
            pytest.param({"model": "kontext", "inputs": {"image_url": data_uri()}},
                         {"image_url": data_uri()}, id="a model that requires an image"),
        ],
    )  # fmt: skip
    async def test_inputs_options_and_model_can_be_overridden(
        self, proxy: SandboxProxy, more: dict[str, object], sent: dict[str, object]
    ) -> None:
        variables = {"product": "!delay 0 a bar of soap"}
        body = {"variables": variables, "userId": "ada", **more}
        reply = await proxy.request("POST", "/api/templates/product-shot", json=body)
        assert finished(reply)["userId"] == "ada"
        prompt = SHIPPED.templates["product-shot"].fill(variables)
        assert proxy.inputs == [{"prompt": prompt, **sent}]

    @pytest.mark.parametrize(
        ("name", "body", "status", "code", "expected"),
        [
            pytest.param("poster", {}, 404, "template_not_found",
                         "There are billboard, discount-banner, product-shot", id="unknown"),
            pytest.param("product-shot", {}, 400, "invalid_input", "'product'", id="a variable"),
            pytest.param("product-shot", {"variables": {"produkt": "x"}}, 400, "invalid_input",
                         "no variable 'produkt'", id="misspelt"),
            pytest.param("product-shot", {"variables": {"product": "x"}, "inputs": {"prompt": "x"}},
                         400, "invalid_input", "'prompt' is given twice", id="prompt as input"),
            pytest.param("product-shot", {"variables": {"product": "x"}, "inputs": {"sed": 3}},
                         400, "invalid_input", "takes no 'sed'", id="an input"),
            pytest.param("product-shot", {"variables": {"product": "x"}, "model": "dall-e"},
                         400, "model_not_found", "'dall-e'", id="a model"),
            pytest.param("product-shot", {"variables": [1]}, 400, "invalid_request", "variables",
                         id="a list"),
            pytest.param("product-shot", {"variables": {"product": "x"}, "template": "billboard"},
                         400, "invalid_request", "not 'billboard'", id="another template"),
        ],
    )  # fmt: skip
    async def test_invalid_requests_are_rejected_with_a_reason(
        self, proxy: SandboxProxy, name: str, body: object, status: int, code: str, expected: str
    ) -> None:
        reply = await proxy.request("POST", f"/api/templates/{name}", json=body)
        assert reply.error == (status, code)
        assert expected in reply.message
        assert proxy.sandbox.seen == []


IMAGE_URL, LORA_URL = "https://files.example/a.jpg", "https://files.example/b.safetensors"


class TestSourceRequests:
    """Requests of a system with one endpoint for all models, as its clients send them."""

    @pytest.mark.parametrize(
        ("request_body", "endpoint", "sent"),
        [
            pytest.param(
                {"model": "flux-pro", "inputs": {"prompt": "A professional headshot"},
                 "userId": "user123"},
                "fal-ai/flux-pro/v1.1", {}, id="a text",
            ),
            pytest.param(
                {"model": "flux-pro", "inputs": {"prompt": "x", "image_url": IMAGE_URL,
                                                 "strength": 0.7}},
                "fal-ai/flux-pro/v1.1-ultra",
                {"image_url": IMAGE_URL, "image_prompt_strength": 0.3}, id="an image for pro",
            ),
            pytest.param(
                {"model": "flux-dev", "inputs": {"prompt": "x", "image_url": IMAGE_URL,
                                                 "strength": 0.7}},
                "fal-ai/flux/dev/image-to-image", {"image_url": IMAGE_URL, "strength": 0.7},
                id="an image for dev",
            ),
            pytest.param(
                {"model": "flux-lora",
                 "inputs": {"prompt": "Professional headshot of jf in a suit",
                            "image_url": IMAGE_URL, "lora_url": LORA_URL, "lora_scale": 0.8},
                 "options": {"width": 1024, "height": 1024}, "userId": "user123"},
                "fal-ai/flux-lora/image-to-image",
                {"image_url": IMAGE_URL, "image_size": {"width": 1024, "height": 1024},
                 "loras": [{"path": LORA_URL, "scale": 0.8}]}, id="a style and an image",
            ),
            pytest.param(
                {"model": "face-swap",
                 "inputs": {"image_url": IMAGE_URL, "target_image_url": "https://files.example/f"},
                 "userId": "user123"},
                "fal-ai/face-swap",
                {"base_image_url": IMAGE_URL, "swap_image_url": "https://files.example/f"},
                id="two images",
            ),
            pytest.param(
                {"model": "face-swap", "inputs": {"base_image_url": IMAGE_URL,
                                                  "swap_image_url": "https://files.example/f"}},
                "fal-ai/face-swap",
                {"base_image_url": IMAGE_URL, "swap_image_url": "https://files.example/f"},
                id="two images by fal's names",
            ),
            pytest.param(
                {"model": "image-to-image",
                 "inputs": {"prompt": "x", "image_url": IMAGE_URL, "strength": 0.7,
                            "guidance_scale": 3.5}, "userId": "user123"},
                "fal-ai/flux/dev/image-to-image",
                {"image_url": IMAGE_URL, "strength": 0.7, "guidance_scale": 3.5}, id="an edit",
            ),
        ],
    )  # fmt: skip
    async def test_works_as_it_stands(
        self,
        proxy: SandboxProxy,
        request_body: dict[str, Any],
        endpoint: str,
        sent: dict[str, object],
    ) -> None:
        job = finished(await proxy.request("POST", GENERATE, json=request_body))
        assert job["model"] == request_body["model"]
        assert proxy.sandbox.jobs_by_endpoint == {endpoint: 1}
        (inputs,) = proxy.inputs
        assert {name: inputs[name] for name in inputs if name != "prompt"} == sent
        (row,) = proxy.jobs()
        assert (row["endpoint"], row["user_id"]) == (endpoint, request_body.get("userId"))
        assert job["cost"] or endpoint == "fal-ai/face-swap"  # its price arrives later

    @pytest.mark.parametrize("name", SHIPPED.templates)
    async def test_a_template_works_as_it_stands(self, proxy: SandboxProxy, name: str) -> None:
        variables = {"headline": "Winter Sale", "background_style": "snowy"}
        request_body = {"template": name, "variables": variables | {"avatar_lora": LORA_URL}}
        reply = await proxy.request("POST", f"/api/templates/{name}", json=request_body)
        assert finished(reply)["model"] == "flux-dev"
        assert proxy.sandbox.jobs_by_endpoint == {"fal-ai/flux-lora": 1}
        (inputs,) = proxy.inputs
        assert inputs["loras"] == [{"path": LORA_URL, "scale": 1.0}]
        assert "Winter Sale" in inputs["prompt"]
        assert "snowy" in inputs["prompt"]

    async def test_a_width_alone_is_a_size(self, proxy: SandboxProxy) -> None:
        request_body = {"model": "flux-dev", "inputs": {"prompt": "x"}, "options": {"width": 512}}
        finished(await proxy.request("POST", GENERATE, json=request_body))
        assert proxy.inputs[0]["image_size"] == {"width": 512, "height": 1024}


def body(inputs: object = None, model: object = "flux-dev", **more: object) -> bytes:
    named = DRAW if inputs is None else inputs
    return json.dumps({"model": model, "inputs": named, **more}).encode()


class TestInvalidRequests:
    @pytest.mark.parametrize(
        ("content", "code", "expected"),
        [
            pytest.param(body(model="dall-e"), "model_not_found",
                         "no model 'dall-e'. There are flux-pro,", id="unknown model"),
            pytest.param(body({}), "invalid_input", "flux-dev needs 'prompt'. It needs prompt, and",
                         id="missing input"),
            pytest.param(body({"prompt": ""}), "invalid_input", "needs 'prompt'", id="empty input"),
            pytest.param(body({"prompt": "x", "sed": 1}), "invalid_input", "takes no 'sed'",
                         id="unknown input"),
            pytest.param(body({"prompt": "x", "model": "y"}), "invalid_input", "takes no 'model'",
                         id="an input called model"),
            pytest.param(body(options={"style": 1}), "invalid_input", "takes no 'style'",
                         id="unknown option"),
            pytest.param(body(options={"prompt": "x"}), "invalid_input", "'prompt' is given twice",
                         id="given twice"),
            pytest.param(body({"prompt": "x", "width": 64.5}), "invalid_input", "whole number",
                         id="half a pixel"),
            pytest.param(body({"prompt": "x", "lora_url": "y"}, model="flux-schnell"),
                         "invalid_input", "'lora_url'", id="a LoRA for a model that takes none"),
            pytest.param(body({"prompt": "x", "image_url": data_uri()}, model="flux-schnell"),
                         "invalid_input", "'image_url'", id="an image for a model without any"),
            pytest.param(body({"prompt": "x", "image_url": "s3://a/b"}), "invalid_input",
                         "cannot read s3://", id="a URL that fal cannot read"),
            pytest.param(body({"prompt": "x", "aspect_ratio": "1:1"}), "invalid_input",
                         "'aspect_ratio'", id="a ratio for a model with sizes"),
            pytest.param(body({"prompt": "x"}, model="image-to-image"), "invalid_input",
                         "needs 'image_url'", id="missing image"),
            pytest.param(body({"prompt": "x", "image_urls": []}, model="kontext-multi"),
                         "invalid_input", "needs 'image_urls'", id="no images"),
            pytest.param(body(model=5), "invalid_request", "model:", id="model of a wrong type"),
            pytest.param(body(model=""), "invalid_request", "model:", id="empty model"),
            pytest.param(b'{"inputs": {}}', "invalid_request", "model: Field required",
                         id="no model"),
            pytest.param(body([1]), "invalid_request", "inputs:", id="inputs of a wrong type"),
            pytest.param(body(options=[]), "invalid_request", "options:", id="options, wrong type"),
            pytest.param(body(userId=5), "invalid_request", "userId:", id="user of a wrong type"),
            pytest.param(body(userId="x" * 129), "user_invalid", "userId has", id="a long user"),
            pytest.param(body(seed=5), "invalid_request", "seed:", id="unknown field"),
            pytest.param(b"[]", "invalid_request", "object", id="a list"),
            pytest.param(b"{", "invalid_request", "Invalid JSON", id="no JSON"),
            pytest.param(b"\xff", "invalid_request", "Invalid JSON", id="no UTF-8"),
            pytest.param(b'{"model": "flux-dev", "inputs": {"prompt": "\\ud800"}}',
                         "invalid_request", "Invalid JSON", id="a lone surrogate"),
            pytest.param(b'{"model": "flux-dev", "inputs": {"prompt": "x", "seed": NaN}}',
                         "invalid_request", "number", id="NaN"),
            pytest.param(b'{"model": "flux-dev", "inputs": {"prompt": "x", "seed": -Infinity}}',
                         "invalid_request", "number", id="infinity"),
            pytest.param(b'{"model": "flux-dev", "inputs": {"prompt": "x", "seed": 1e999}}',
                         "invalid_request", "number", id="too large a number"),
            pytest.param(b'{"inputs":{"x":' + b"[" * 5000 + b"]" * 5000 + b"}}",
                         "invalid_request", "", id="nested too deeply"),
        ],
    )  # fmt: skip
    async def test_an_invalid_body_is_a_400_with_the_reason(
        self, proxy: SandboxProxy, content: bytes, code: str, expected: str
    ) -> None:
        headers = {"Content-Type": "application/json"}
        reply = await proxy.request("POST", GENERATE, data=content, headers=headers)
        assert reply.error == (400, code)
        assert expected in reply.message
        assert proxy.sandbox.seen == []
        assert proxy.jobs() == []

    @pytest.mark.parametrize(
        ("headers", "content"),
        [
            pytest.param({"Content-Type": "text/plain"}, body(), id="another type"),
            pytest.param({"Content-Type": "multipart/form-data"}, body(), id="a form"),
            pytest.param({"Content-Type": "application/json"}, b"", id="nothing"),
            pytest.param({"Content-Type": "application/json", "Content-Encoding": "gzip"}, body(),
                         id="a content encoding"),
        ],
    )  # fmt: skip
    async def test_another_content_type_is_a_415(
        self, proxy: SandboxProxy, headers: dict[str, str], content: bytes
    ) -> None:
        reply = await proxy.request("POST", GENERATE, data=content, headers=headers)
        assert reply.status == 415
        assert reply.error[0] == 415
        assert proxy.sandbox.seen == []

    @pytest.mark.parametrize("is_chunked", [False, True])
    async def test_too_large_a_body_is_a_413(self, tmp_path: Path, is_chunked: bool) -> None:
        async def chunks() -> AsyncIterator[bytes]:
            for _ in range(20):
                yield b" " * 100

        async with open_sandbox_proxy(tmp_path, max_body=1000) as proxy:
            data = chunks() if is_chunked else b" " * 2000
            headers = {"Content-Type": "application/json"}
            reply = await proxy.request("POST", GENERATE, data=data, headers=headers)
            assert reply.error == (413, "body_too_large")
            assert proxy.sandbox.seen == []

    @pytest.mark.parametrize(
        ("method", "path", "allowed"),
        [
            pytest.param("GET", GENERATE, "POST", id="generate"),
            pytest.param("PUT", "/api/templates/billboard", "POST", id="a template"),
            pytest.param("POST", "/api/images/models", "GET", id="models"),
            pytest.param("POST", "/api/images/jobs", "GET", id="jobs"),
            pytest.param("PUT", "/api/images/jobs/1", "GET, DELETE", id="a job"),
            pytest.param("DELETE", "/api/images/jobs", "GET", id="all jobs"),
            pytest.param("POST", "/api/templates", "GET", id="templates"),
        ],
    )
    async def test_another_method_is_a_405(
        self, proxy: SandboxProxy, method: str, path: str, allowed: str
    ) -> None:
        reply = await proxy.request(method, path)
        assert reply.error == (405, "method_not_allowed")
        assert reply.headers["Allow"] == allowed

    async def test_head_is_allowed_where_get_is(self, proxy: SandboxProxy) -> None:
        assert (await proxy.request("HEAD", "/api/images/models")).status == 200

    async def test_an_unknown_job_is_a_404(self, proxy: SandboxProxy) -> None:
        assert (await proxy.job("0" * 32)).error == (404, "job_not_found")

    @pytest.mark.parametrize(
        "path",
        [
            GENERATE,
            "/api/images/models",
            "/api/images/jobs/1",
            "/api/images/jobs",
            "/api/templates",
        ],
    )
    async def test_a_missing_access_key_is_a_401(self, tmp_path: Path, path: str) -> None:
        async with open_sandbox_proxy(tmp_path, access_keys=(("ann", "s3cret"),)) as proxy:
            method = "POST" if path == GENERATE else "GET"
            assert (await proxy.request(method, path)).error == (401, "unauthenticated")
            assert proxy.sandbox.seen == []

    async def test_an_endpoint_that_is_not_allowed_is_a_403(self, tmp_path: Path) -> None:
        async with open_sandbox_proxy(tmp_path, allowed_endpoints=("fal-ai/flux/dev",)) as proxy:
            reply = await proxy.generate("flux-schnell", DRAW)
            assert reply.error == (403, "target_forbidden")
            assert proxy.sandbox.seen == []
            finished(await proxy.generate("flux-dev", DRAW))
            listed = (await proxy.request("GET", "/api/images/models")).document
            assert [model["name"] for model in listed["models"]] == ["flux-dev"]
            assert {template["model"] for template in listed["templates"]} == {"flux-dev"}

    @pytest.mark.parametrize(
        ("model", "inputs", "code"),
        [
            pytest.param("kontext", {"prompt": "x", "image_url": data_uri(b"%PDF-1.4")},
                         "unsupported_image_format", id="a document"),
            pytest.param("face-swap",
                         {"image_url": data_uri(), "target_image_url": data_uri(b"x")},
                         "unsupported_image_format", id="a renamed input"),
            pytest.param("kontext-multi",
                         {"prompt": "x", "image_urls": [data_uri(), data_uri(b"x")]},
                         "unsupported_image_format", id="the second image"),
            pytest.param("kontext", {"prompt": "x", "image_url": "http://127.0.0.1:9/a.png"},
                         "image_load_error", id="a private address"),
        ],
    )  # fmt: skip
    async def test_an_invalid_image_is_rejected_before_a_call_to_fal(
        self, proxy: SandboxProxy, model: str, inputs: dict[str, object], code: str
    ) -> None:
        reply = await proxy.generate(model, inputs)
        assert reply.error == (422, code)
        assert proxy.model_requests == []
        (row,) = proxy.jobs()
        assert (row["status"], row["error"]) == ("failed", code)


class TestFailures:
    @pytest.mark.parametrize(
        ("error", "status", "code"),
        [
            ("422 content_policy_violation", 400, "content_policy_violation"),
            ("422 image_too_small", 400, "image_too_small"),
            ("422 no_media_generated", 400, "no_media_generated"),
            ("403 locked at=submit", 503, "upstream_locked"),
            ("401 at=submit", 503, "upstream_locked"),
            ("503 runner_disconnected", 503, "upstream_unavailable"),
            ("500 internal_server_error", 500, "upstream_failed"),
            ("500 unhandled at=submit", 500, "upstream_failed"),
            ("400 downstream_service_error", 500, "upstream_failed"),
        ],
    )
    @pytest.mark.parametrize("model", ["flux-dev", "kontext-text-to-image"])
    async def test_of_fal_are_errors_of_the_job(
        self, proxy: SandboxProxy, model: str, error: str, status: int, code: str
    ) -> None:
        reply = await proxy.generate(model, {"prompt": f"!error {error}"})
        assert failed(reply)[:2] == (status, code)
        assert ("Retry-After" in reply.headers) is (status == 503)
        job_reply = await proxy.job(reply.document["jobId"])
        assert (job_reply.status, job_reply.document) == (200, reply.document)
        assert proxy.submits == 1
        assert proxy.sandbox.jobs == 0

    @pytest.mark.parametrize(
        ("model", "inputs", "expected"),
        [
            pytest.param("flux-dev", {"prompt": 5}, "prompt", id="a type"),
            pytest.param("flux-dev", {"prompt": "x", "image_size": "huge"}, "image_size",
                         id="a choice"),
            pytest.param("flux-dev", {"prompt": "x", "num_images": 5}, "num_images", id="a number"),
            pytest.param("fast-sdxl", {"prompt": "x", "output_format": "gif"}, "output_format",
                         id="by the registry's name"),
            pytest.param("flux-lora", {"prompt": "x", "loras": [{}]}, "loras", id="inside"),
            pytest.param("face-swap", {"image_url": data_uri(), "target_image_url": 5},
                         "target_image_url", id="a renamed image input"),
        ],
    )  # fmt: skip
    async def test_an_input_that_fal_rejects_is_named(
        self, proxy: SandboxProxy, model: str, inputs: dict[str, object], expected: str
    ) -> None:
        reply = await proxy.generate(model, inputs)
        assert failed(reply) == (400, "input_refused", f"fal.ai does not accept {expected}.")
        assert proxy.sandbox.jobs == 0

    @pytest.mark.parametrize(
        "result", [{}, [], {"images": []}, {"images": "x"}, {"image": {"url": 5}}], ids=json.dumps
    )
    async def test_a_result_without_images_is_a_500(
        self, tmp_path: Path, fal: FakeFal, result: object
    ) -> None:
        async def respond(request: web.Request) -> web.StreamResponse:
            if request.method == "POST":
                return web.json_response({"request_id": "1", "status": "IN_QUEUE"})
            is_status = request.path.endswith("/status")
            return web.json_response({"status": "COMPLETED"} if is_status else result)

        fal.respond = respond
        async with open_sandbox_proxy(tmp_path, upstream_origin=fal.origin) as proxy:
            reply = await proxy.generate("flux-dev", DRAW)
            assert failed(reply)[:2] == (500, "upstream_unreadable")

    async def test_a_submit_with_a_lost_response_is_not_repeated(
        self, tmp_path: Path, fal: FakeFal
    ) -> None:
        async def respond(request: web.Request) -> web.StreamResponse:
            assert request.transport is not None
            request.transport.abort()
            return web.Response()

        fal.respond = respond
        async with open_sandbox_proxy(tmp_path, upstream_origin=fal.origin) as proxy:
            reply = await proxy.generate("flux-dev", DRAW)
            assert reply.error == (504, "upstream_broken")
            (row,) = proxy.jobs()
            assert (row["status"], row["error"]) == ("failed", "upstream_broken")
            assert len(fal.seen) == 1


class TestCosts:
    @pytest.mark.parametrize(
        ("model", "inputs", "cost"),
        [
            pytest.param("kontext-text-to-image", {"prompt": HERON}, 0.04, id="an image"),
            pytest.param("kontext-text-to-image", {"prompt": HERON, "num_images": 4}, 0.16,
                         id="four images"),
            pytest.param("flux-schnell", DRAW, 0.003, id="less than a megapixel"),
            pytest.param("flux-schnell", {"prompt": HERON, "width": 1024, "height": 1032}, 0.006,
                         id="a little more than one"),
            pytest.param("fast-sdxl", DRAW, 0.005, id="the price is fal's"),
        ],
    )  # fmt: skip
    async def test_are_those_of_the_billable_units(
        self, proxy: SandboxProxy, model: str, inputs: dict[str, object], cost: float
    ) -> None:
        await proxy.request("POST", "/api/estimate", json={"endpoint": "fal-ai/fast-sdxl"})
        job = finished(await proxy.generate(model, inputs))
        assert job["cost"] == cost
        assert (await proxy.job(job["jobId"])).document == job
        (entry,) = await proxy.records()
        assert entry.settled == round(cost * 1_000_000)

    async def test_are_zero_for_a_cached_result(self, proxy: SandboxProxy) -> None:
        inputs = {"prompt": HERON, "seed": 1}
        first = await proxy.generate("kontext-text-to-image", inputs)
        second = await proxy.generate("kontext-text-to-image", inputs)
        assert [finished(reply)["cost"] for reply in (first, second)] == [0.04, 0]
        assert first.document["images"] == second.document["images"]
        assert first.document["jobId"] != second.document["jobId"]
        assert second.headers["Cache-Status"].startswith("falproxy; hit; ttl=")
        assert int(second.headers["Age"]) < 10
        assert proxy.sandbox.jobs == 1
        assert [row["settled"] for row in proxy.jobs()] == [40_000, 0]

    async def test_are_paid_by_one_of_identical_concurrent_calls(self, proxy: SandboxProxy) -> None:
        calls = (proxy.generate("kontext-text-to-image", {"prompt": SLOW}) for _ in range(5))
        jobs = [finished(reply) for reply in await asyncio.gather(*calls)]
        assert sorted(job["cost"] for job in jobs) == [0, 0, 0, 0, 0.04]
        assert len({job["imageUrl"] for job in jobs}) == 1
        assert proxy.sandbox.jobs == 1


class TestJobs:
    async def test_respond_async_returns_the_job_at_once(self, proxy: SandboxProxy) -> None:
        reply = await proxy.generate("flux-dev", DRAW | {"prompt": SLOW}, ASYNC, userId="ada")
        assert (reply.status, {*reply.document}) == (202, JOB)
        job_id = reply.document["jobId"]
        assert reply.document["status"] == "running"
        assert (reply.document["images"], reply.document["cost"]) == ([], None)
        assert reply.headers["Preference-Applied"] == "respond-async"
        assert reply.headers["Location"] == f"/api/images/jobs/{job_id}"
        job_reply = await proxy.request("GET", reply.headers["Location"])
        assert (job_reply.status, job_reply.document) == (200, reply.document)
        job = await proxy.wait_finished(job_id)
        assert finished(Reply(200, job, job_reply.headers))["cost"] == 0.025
        assert (job["userId"], proxy.sandbox.jobs) == ("ada", 1)

    @pytest.mark.parametrize(
        ("preferences", "status"),
        [
            pytest.param(["respond-async"], 202, id="one preference"),
            pytest.param(["wait=10, Respond-Async"], 202, id="one of two"),
            pytest.param(["wait=10", "respond-async"], 202, id="in two lines"),
            pytest.param(["respond-asynchronously"], 200, id="another preference"),
        ],
    )
    async def test_the_prefer_header_is_parsed_as_in_rfc_7240(
        self, proxy: SandboxProxy, preferences: list[str], status: int
    ) -> None:
        headers = [("Prefer", preference) for preference in preferences]
        reply = await proxy.generate("flux-dev", DRAW, headers)
        assert reply.status == status
        assert ("Preference-Applied" in reply.headers) is (status == 202)

    async def test_respond_async_works_for_templates(self, proxy: SandboxProxy) -> None:
        content = {"variables": {"product": HERON}, "options": SIZE}
        reply = await proxy.request(
            "POST", "/api/templates/product-shot", json=content, headers=ASYNC
        )
        assert reply.status == 202
        assert (await proxy.wait_finished(reply.document["jobId"]))["status"] == "completed"

    async def test_respond_async_works_for_a_cached_result(self, proxy: SandboxProxy) -> None:
        inputs = {"prompt": HERON, "seed": 1}
        first = finished(await proxy.generate("kontext-text-to-image", inputs))
        reply = await proxy.generate("kontext-text-to-image", inputs, ASYNC)
        job = await proxy.wait_finished(reply.document["jobId"])
        assert (job["images"], job["cost"]) == (first["images"], 0)
        assert proxy.sandbox.jobs == 1

    async def test_a_failure_after_the_response_is_in_the_job(self, proxy: SandboxProxy) -> None:
        reply = await proxy.generate(
            "flux-dev", {"prompt": "!error 422 content_policy_violation"}, ASYNC
        )
        assert reply.status == 202
        job = await proxy.wait_finished(reply.document["jobId"])
        assert (job["status"], job["images"]) == ("failed", [])
        assert job["error"]["code"] == "content_policy_violation"

    async def test_a_rejected_submit_is_an_immediate_error(self, proxy: SandboxProxy) -> None:
        reply = await proxy.generate("flux-dev", {"prompt": "!error 403 locked at=submit"}, ASYNC)
        assert failed(reply)[:2] == (503, "upstream_locked")
        assert proxy.jobs()[0]["status"] == "failed"

    async def test_are_only_visible_to_their_owner(self, tmp_path: Path) -> None:
        keys = (("ann", "s3cret-ann"), ("ben", "s3cret-ben"))
        ann, ben = ({"x-falproxy-key": secret} for _, secret in keys)
        async with open_sandbox_proxy(tmp_path, access_keys=keys) as proxy:
            reply = await proxy.generate("flux-dev", DRAW, ASYNC | ann)
            job_id = reply.document["jobId"]
            assert (await proxy.job(job_id, ben)).error == (404, "job_not_found")
            assert (await proxy.wait_finished(job_id, ann))["status"] == "completed"
            assert (await proxy.job(job_id, ben)).error == (404, "job_not_found")
            assert (await proxy.records())[0].principal == "ann"

    @pytest.mark.parametrize("cache", [True, False])
    async def test_a_timeout_returns_the_running_job(self, tmp_path: Path, cache: bool) -> None:
        async with open_sandbox_proxy(tmp_path, wait=1.0, cache=cache) as proxy:
            prompt = "!delay 2 a heron at dawn"
            reply = await proxy.generate("kontext-text-to-image", {"prompt": prompt})
            assert (reply.status, reply.document["status"]) == (202, "running")
            assert "Preference-Applied" not in reply.headers
            job_reply = await proxy.request("GET", reply.headers["Location"])
            assert job_reply.document["status"] == "running"
            job = await proxy.wait_finished(reply.document["jobId"])
            assert (job["status"], job["cost"]) == ("completed", 0.04)
            assert (proxy.sandbox.jobs, proxy.cancels) == (1, [])

    @pytest.mark.parametrize("headers", [{}, ASYNC], ids=["waiting", "asynchronous"])
    async def test_a_submit_is_limited_by_the_timeout(
        self, tmp_path: Path, fal: FakeFal, headers: dict[str, str]
    ) -> None:
        released = asyncio.Event()

        async def respond(request: web.Request) -> web.StreamResponse:
            if request.method == "POST":
                await released.wait()
            return web.json_response({"request_id": "1", "status": "IN_QUEUE"})

        fal.respond = respond
        async with open_sandbox_proxy(tmp_path, upstream_origin=fal.origin, wait=0.2) as proxy:
            reply = await proxy.generate("flux-dev", DRAW, headers)
            assert reply.error == (504, "upstream_timeout")
            assert reply.message == "fal.ai timed out after 0.2 s."
            released.set()
            await wait_until(lambda: [seen.method for seen in fal.seen] == ["POST", "PUT"])
            await wait_until(lambda: proxy.jobs()[0]["status"] == "failed")
            assert proxy.jobs()[0]["error"] == "upstream_timeout"

    async def test_without_a_fal_id_are_lost_after_the_submit_timeout(
        self, proxy: SandboxProxy
    ) -> None:
        ledger = proxy.app[LEDGER_WRITER].ledger
        row = JobRow(owner="", model="flux-dev", endpoint="fal-ai/flux/dev")
        await ledger.add_job(row, Lease("a process that died", 30.0))
        assert (await proxy.job(row.id)).document["status"] == "queued"
        with closing(sqlite3.connect(proxy.data_dir / "ledger.sqlite")) as file, file:
            file.execute("UPDATE falproxy_jobs SET created_at = created_at - 301000")
        job = (await proxy.job(row.id)).document
        assert (job["status"], job["error"]["code"]) == ("failed", "job_lost")
        assert (await proxy.job(row.id)).document == job
        assert proxy.sandbox.seen == []

    async def test_remain_running_while_fal_is_unavailable(
        self, tmp_path: Path, fal: FakeFal
    ) -> None:
        available = asyncio.Event()

        async def respond(request: web.Request) -> web.StreamResponse:
            if request.method == "POST":
                return web.json_response({"request_id": "1", "status": "IN_QUEUE"})
            if not available.is_set():
                return web.Response(body=b"not gzip", headers={"Content-Encoding": "gzip"})
            is_status = request.path.endswith("/status")
            result: object = {"images": [{"url": "https://a.example/b.png"}]}
            return web.json_response({"status": "COMPLETED"} if is_status else result)

        fal.respond = respond
        async with open_sandbox_proxy(tmp_path, upstream_origin=fal.origin) as proxy:
            reply = await proxy.generate("flux-dev", DRAW)
            assert (reply.status, reply.document["status"]) == (202, "running")
            job_reply = await proxy.job(reply.document["jobId"])
            assert (job_reply.status, job_reply.document["status"]) == (200, "running")
            available.set()
            assert (await proxy.wait_finished(reply.document["jobId"]))["status"] == "completed"
            assert [seen.method for seen in fal.seen].count("POST") == 1
            assert "PUT" not in [seen.method for seen in fal.seen]

    @pytest.mark.parametrize("headers", [{}, ASYNC], ids=["waiting", "asynchronous"])
    async def test_have_rehosted_images(self, tmp_path: Path, headers: dict[str, str]) -> None:
        async with open_sandbox_proxy(tmp_path, rehost="disk") as proxy:
            reply = await proxy.generate("flux-dev", DRAW, headers)
            job = await proxy.wait_finished(reply.document["jobId"])
            assert job["imageUrl"].startswith(f"{proxy.origin}/files/")
            async with proxy.session.get(job["imageUrl"]) as image_response:
                assert image_response.status == 200

    async def test_the_job_of_a_client_that_disconnects_is_cancelled(
        self, uncached: SandboxProxy
    ) -> None:
        await disconnect(uncached, "flux-dev", {"prompt": ENDLESS}, "/status")
        await wait_until(lambda: uncached.cancels == [202])
        await wait_until(lambda: uncached.jobs()[0]["status"] == "failed")
        assert uncached.jobs()[0]["error"] == "client_left"
        assert uncached.sandbox.jobs == 0
        assert await uncached.wait_settled() == [0]

    async def test_a_cacheable_job_continues_without_its_client(self, proxy: SandboxProxy) -> None:
        await disconnect(proxy, "kontext-text-to-image", {"prompt": SLOW}, "/status")
        await wait_until(lambda: proxy.jobs()[0]["status"] == "completed")
        assert (proxy.sandbox.jobs, proxy.cancels) == (1, [])
        assert proxy.jobs()[0]["settled"] == 40_000

    async def test_a_job_is_cancelled_if_its_client_disconnects_during_the_submit(
        self, tmp_path: Path, fal: FakeFal, caplog: pytest.LogCaptureFixture
    ) -> None:
        released = asyncio.Event()

        async def respond(request: web.Request) -> web.StreamResponse:
            if request.method == "POST":
                await released.wait()
            return web.json_response({"request_id": "1", "status": "IN_QUEUE"})

        fal.respond = respond
        async with open_sandbox_proxy(tmp_path, upstream_origin=fal.origin) as proxy:
            call = asyncio.ensure_future(proxy.generate("flux-dev", DRAW))
            await wait_until(lambda: fal.seen)
            call.cancel()
            await asyncio.gather(call, return_exceptions=True)
            await wait_until(lambda: "falproxy.calls" in [record.name for record in caplog.records])
            released.set()
            await wait_until(lambda: [seen.method for seen in fal.seen] == ["POST", "PUT"])
            assert fal.seen[1].target == "/fal-ai/flux/requests/1/cancel"
            await wait_until(lambda: proxy.jobs()[0]["status"] == "failed")
            assert proxy.jobs()[0]["error"] == "client_left"


class TestUnavailableLedger:
    @pytest.fixture
    async def proxy(self, tmp_path: Path) -> AsyncIterator[SandboxProxy]:
        async with open_sandbox_proxy(
            tmp_path, database_url="postgresql://u@127.0.0.1:9/x", drain=1.0
        ) as opened:
            yield opened

    async def test_does_not_prevent_a_blocking_call(self, proxy: SandboxProxy) -> None:
        assert finished(await proxy.generate("flux-dev", DRAW))["cost"] == 0.025
        assert proxy.sandbox.jobs == 1

    async def test_rejects_respond_async_before_a_call_to_fal(self, proxy: SandboxProxy) -> None:
        reply = await proxy.generate("flux-dev", DRAW, ASYNC)
        assert reply.error == (503, "ledger_unavailable")
        assert reply.headers["Retry-After"] == "5"
        assert (proxy.sandbox.jobs, proxy.sandbox.seen) == (0, [])

    async def test_makes_reading_a_job_a_503(self, proxy: SandboxProxy) -> None:
        reply = await proxy.job("0" * 32)
        assert reply.error == (503, "ledger_unavailable")


@pytest.mark.parametrize("prefix", ["", "/ai", "/api/ai"])
@pytest.mark.parametrize("is_nested", [True, False])
async def test_the_location_header_leads_to_the_job(
    proxy: SandboxProxy, tmp_path: Path, prefix: str, is_nested: bool
) -> None:
    app = web.Application(handler_args={"handler_cancellation": True})
    inner = web.Application() if is_nested else app
    data_dir = tmp_path / "other"
    settings = make_settings(fal_key=CANARY, upstream_origin=proxy.fal_origin, data_dir=data_dir)
    setup(inner, settings, prefix=prefix)
    if is_nested:
        app.add_subapp("/inside", inner)
    async with TestServer(app) as server, asyncio.timeout(SOON):
        origin = f"http://127.0.0.1:{server.port}"
        start = f"{'/inside' if is_nested else ''}{prefix}"
        content = {"model": "flux-dev", "inputs": DRAW | {"prompt": SLOW}}
        url = f"{origin}{start}{GENERATE}"
        async with proxy.session.post(url, json=content, headers=ASYNC) as response:
            job_id = (await response.json())["jobId"]
            location = response.headers["Location"]
        assert location == f"{start}/api/images/jobs/{job_id}"
        await wait_until(lambda: proxy.sandbox.jobs)
        while True:
            async with proxy.session.get(origin + location) as response:
                job = await response.json()
            if job["status"] != "running":
                break
            await asyncio.sleep(0.02)
    assert job["status"] == "completed"


async def test_signed_urls_of_a_job_are_renewed_when_it_is_read(
    tmp_path: Path,
) -> None:
    async with FakeSupabase() as fake:
        project: dict[str, Any] = {"supabase_url": fake.url, "supabase_key": fake.service_key}
        async with open_sandbox_proxy(tmp_path, **project, supabase_signed_urls=2.0) as proxy:
            made = finished(await proxy.generate("flux-dev", DRAW))
            first = made["imageUrl"]
            fake.elapse(3)
            async with proxy.session.get(first) as gone:
                assert gone.status == 400
            await asyncio.sleep(1.1)  # half of the validity of the URL
            job_reply = (await proxy.job(made["jobId"])).document
            assert job_reply["imageUrl"] != first
            async with proxy.session.get(job_reply["imageUrl"]) as image_response:
                assert image_response.status == 200


async def test_a_slow_ledger_delays_calls_only_briefly(tmp_path: Path) -> None:
    async with open_sandbox_proxy(tmp_path) as proxy:
        finished(await proxy.generate("flux-dev", DRAW))
        with closing(sqlite3.connect(proxy.data_dir / "ledger.sqlite")) as other:
            other.execute("BEGIN IMMEDIATE")  # blocks all writes
            started = asyncio.get_running_loop().time()
            finished(await proxy.generate("flux-dev", DRAW | {"seed": 2}))
            assert asyncio.get_running_loop().time() - started < 5
            other.rollback()
