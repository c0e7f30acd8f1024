"""`/api/images` and `/api/templates`, from the wire in to the offline fal and back."""

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
from tests.support.generate_house import ASYNC, GENERATE, SOON, House, Reply, open_house, until, uri
from tests.support.key_search import CANARY
from tests.support.offline_fal import png
from tests.support.settings import make_settings

SHIPPED = read_registry()
HERON = "!delay 0 a heron at dawn"
SLOW = "!delay 0.4 a heron at dawn"
ENDLESS = "!delay 60 a heron at dawn"
SIZE = {"width": 64, "height": 48}
DRAW = {"prompt": HERON, **SIZE}
SENT = {"prompt": HERON, "image_size": SIZE}
LORA = {"lora_url": "https://loras.example/ink.safetensors", "lora_scale": 0.7}
LORAS = [{"path": "https://loras.example/ink.safetensors", "scale": 0.7}]
FILE = "FILE"  # stands for the address of a picture that fal keeps
EDIT = {"prompt": HERON, "image_url": FILE}
JOB = {"jobId", "status", "model", "imageUrl", "images", "cost", "userId", "error"}

# For each model: its inputs, and what fal gets of them, where that is something else.
MODELS: dict[str, tuple[dict[str, Any], dict[str, Any] | None]] = {
    "flux-pro": (DRAW | {"safety_tolerance": "3"}, SENT | {"safety_tolerance": "3"}),
    "flux-dev": (DRAW | {"seed": 7}, SENT | {"seed": 7}),
    "flux-schnell": (DRAW | {"num_inference_steps": 2}, SENT | {"num_inference_steps": 2}),
    "flux-lora": (DRAW | LORA, SENT | {"loras": LORAS}),
    "image-to-image": (EDIT | {"strength": 0.5}, None),
    "face-swap": (
        {"source_image_url": uri(), "target_image_url": FILE},
        {"swap_image_url": uri(), "base_image_url": FILE},
    ),
    "kontext": (EDIT | {"aspect_ratio": "1:1"}, None),
    "kontext-max": (EDIT | {"output_format": "png"}, None),
    "kontext-multi": ({"prompt": HERON, "image_urls": [uri(), FILE]}, None),
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


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[House]:
    async with open_house(tmp_path) as opened:
        yield opened


@pytest.fixture
async def uncached(tmp_path: Path) -> AsyncIterator[House]:
    async with open_house(tmp_path, cache=False) as opened:
        yield opened


def put(value: Any, url: str) -> Any:
    """The same with the file's address where one is meant."""
    if isinstance(value, dict):
        return {name: put(each, url) for name, each in value.items()}
    if isinstance(value, list):
        return [put(each, url) for each in value]
    return url if value == FILE else value


def finished(reply: Reply) -> Any:
    """The document of a job that went well."""
    assert reply.status == 200, reply
    assert set(reply.document) == JOB
    assert reply.document["status"] == "completed"
    assert reply.document["error"] is None
    assert reply.document["imageUrl"] == reply.document["images"][0]["url"]
    return reply.document


def failed(reply: Reply) -> tuple[int, str, str]:
    """Status, code and message of a job that did not."""
    assert set(reply.document) == JOB
    assert (reply.document["status"], reply.document["images"]) == ("failed", [])
    error = reply.document["error"]
    assert set(error) == {"code", "message"}
    return reply.status, error["code"], error["message"]


async def leave(house: House, model: str, inputs: dict[str, object], reached: str) -> None:
    """Asks, and hangs up once fal was asked about the job so far."""
    asking = asyncio.ensure_future(house.generate(model, inputs))
    await until(lambda: any(seen.path.endswith(reached) for seen in house.sent))
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)


class TestModels:
    def test_all_are_tried(self) -> None:
        assert {*MODELS} == {*SHIPPED.models}

    @pytest.mark.parametrize("name", MODELS)
    async def test_makes_a_picture_of_what_it_is_asked(self, house: House, name: str) -> None:
        inputs, sent = MODELS[name]
        url = house.file(png("blue"))
        job = finished(await house.generate(name, put(inputs, url)))
        assert house.inputs == [put(sent or inputs, url)]
        assert house.sandbox.jobs_by_endpoint == {SHIPPED.models[name].endpoint: 1}
        assert job["model"] == name
        assert job["images"][0]["width"] > 0
        async with house.session.get(job["imageUrl"]) as picture:
            assert picture.status == 200
            assert picture.content_type.startswith("image/")

    async def test_options_are_inputs_too(self, house: House) -> None:
        inputs = {"prompt": HERON}
        finished(await house.generate("flux-dev", inputs, options={**SIZE, "seed": 7}))
        assert house.inputs == [SENT | {"seed": 7}]

    async def test_what_is_null_is_left_out(self, house: House) -> None:
        finished(await house.generate("flux-dev", {**DRAW, "seed": None, "loras": None}))
        assert house.inputs == [SENT]

    async def test_several_pictures_are_one_job(self, house: House) -> None:
        job = finished(await house.generate("flux-schnell", DRAW, options={"num_images": 4}))
        assert len({image["url"] for image in job["images"]}) == 4
        assert [(image["width"], image["height"]) for image in job["images"]] == [(64, 48)] * 4
        assert (house.sandbox.jobs, job["cost"]) == (1, 0.012)

    async def test_a_user_is_named(self, house: House) -> None:
        assert finished(await house.generate("flux-dev", DRAW, userId="ada"))["userId"] == "ada"
        (row,) = house.jobs()
        assert row["user_id"] == "ada"
        (entry,) = await house.entries()
        assert entry.user_id == "ada"

    async def test_are_told(self, house: House) -> None:
        reply = await house.ask("GET", "/api/images/models")
        assert (reply.status, {*reply.document}) == (200, {"models", "templates"})
        models = {model["name"]: model for model in reply.document["models"]}
        assert list(models) == list(SHIPPED.models)
        assert models["face-swap"] == {
            "name": "face-swap",
            "endpoint": "fal-ai/face-swap",
            "description": SHIPPED.models["face-swap"].description,
            "required": ["source_image_url", "target_image_url"],
            "optional": [],
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
        assert house.sandbox.seen == []


OWN = """
[models.house]
endpoint = "fal-ai/flux/schnell"
description = "Our house style."
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


class TestAFileOfOnesOwn:
    @pytest.fixture
    async def house(self, tmp_path: Path) -> AsyncIterator[House]:
        own = tmp_path / "models.toml"
        own.write_text(OWN)
        settings = Settings.from_env({"FAL_KEY": CANARY, "FALPROXY_MODELS": str(own)})
        assert settings.dialects.models_file == own
        async with open_house(tmp_path, models_file=own) as opened:
            yield opened

    async def test_adds_a_model(self, house: House) -> None:
        job = finished(await house.generate("house", {"text": HERON, **SIZE}))
        assert house.inputs == [SENT | {"seed": 5}]
        assert job["cost"] == 0.5
        told = await house.ask("GET", "/api/images/models")
        assert "house" in [model["name"] for model in told.document["models"]]

    async def test_replaces_one(self, house: House) -> None:
        job = finished(await house.generate("flux-dev", {"prompt": HERON}))
        assert house.sandbox.jobs_by_endpoint == {"fal-ai/flux/schnell": 1}
        assert job["cost"] is None

    async def test_adds_a_template(self, house: House) -> None:
        finished(await house.ask("POST", "/api/templates/greeting", json={}))
        assert house.inputs == [{"prompt": "!delay 0 hello, world", "image_size": SIZE}]


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
    async def test_is_a_prompt_for_its_model(
        self, house: House, name: str, variables: dict[str, object], size: str
    ) -> None:
        reply = await house.ask("POST", f"/api/templates/{name}", json={"variables": variables})
        assert finished(reply)["model"] == "flux-dev"
        prompt = SHIPPED.templates[name].fill(variables)
        assert house.inputs == [{"prompt": prompt, "image_size": size}]

    @pytest.mark.parametrize(
        ("more", "sent"),
        [
            pytest.param({"options": {"seed": 3, **SIZE}}, {"seed": 3, "image_size": SIZE},
                         id="a size"),
            pytest.param({"inputs": {"image_size": "square"}}, {"image_size": "square"},
                         id="a preset"),
            pytest.param({"model": "flux-schnell"}, {"image_size": "square_hd"}, id="a model"),
            pytest.param({"model": "nano-banana"}, {}, id="a model that has no such size"),
            pytest.param({"model": "kontext", "inputs": {"image_url": uri()}},
                         {"image_url": uri()}, id="a model that needs a picture"),
        ],
    )  # fmt: skip
    async def test_may_be_changed(
        self, house: House, more: dict[str, object], sent: dict[str, object]
    ) -> None:
        variables = {"product": "!delay 0 a bar of soap"}
        body = {"variables": variables, "userId": "ada", **more}
        reply = await house.ask("POST", "/api/templates/product-shot", json=body)
        assert finished(reply)["userId"] == "ada"
        prompt = SHIPPED.templates["product-shot"].fill(variables)
        assert house.inputs == [{"prompt": prompt, **sent}]

    @pytest.mark.parametrize(
        ("name", "body", "status", "code", "said"),
        [
            pytest.param("poster", {}, 404, "template_not_found",
                         "There are billboard, discount-banner, product-shot", id="unknown"),
            pytest.param("product-shot", {}, 400, "invalid_input", "'product'", id="a variable"),
            pytest.param("product-shot", {"variables": {"produkt": "x"}}, 400, "invalid_input",
                         "no variable 'produkt'", id="misspelt"),
            pytest.param("product-shot", {"variables": {"product": "x"}, "inputs": {"prompt": "x"}},
                         400, "invalid_input", "'prompt' is given twice", id="its own prompt"),
            pytest.param("product-shot", {"variables": {"product": "x"}, "inputs": {"sed": 3}},
                         400, "invalid_input", "takes no 'sed'", id="an input"),
            pytest.param("product-shot", {"variables": {"product": "x"}, "model": "dall-e"},
                         400, "model_not_found", "'dall-e'", id="a model"),
            pytest.param("product-shot", {"variables": [1]}, 400, "invalid_request", "variables",
                         id="a list"),
        ],
    )  # fmt: skip
    async def test_says_what_is_wrong(
        self, house: House, name: str, body: object, status: int, code: str, said: str
    ) -> None:
        reply = await house.ask("POST", f"/api/templates/{name}", json=body)
        assert reply.refusal == (status, code)
        assert said in reply.message
        assert house.sandbox.seen == []


def body(inputs: object = None, model: object = "flux-dev", **more: object) -> bytes:
    named = DRAW if inputs is None else inputs
    return json.dumps({"model": model, "inputs": named, **more}).encode()


class TestRefusals:
    @pytest.mark.parametrize(
        ("content", "code", "said"),
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
                         id="said twice"),
            pytest.param(body({"prompt": "x", "width": 64}), "invalid_input", "go together",
                         id="half a size"),
            pytest.param(body({"prompt": "x", "lora_url": "y"}), "invalid_input", "'lora_url'",
                         id="a LoRA for a model that takes none"),
            pytest.param(body({"prompt": "x"}, model="image-to-image"), "invalid_input",
                         "needs 'image_url'", id="missing picture"),
            pytest.param(body({"prompt": "x", "image_urls": []}, model="kontext-multi"),
                         "invalid_input", "needs 'image_urls'", id="no pictures"),
            pytest.param(body(model=5), "invalid_request", "model:", id="model of a wrong type"),
            pytest.param(body(model=""), "invalid_request", "model:", id="empty model"),
            pytest.param(b'{"inputs": {}}', "invalid_request", "model: Field required",
                         id="no model"),
            pytest.param(body([1]), "invalid_request", "inputs:", id="inputs of a wrong type"),
            pytest.param(body(options=[]), "invalid_request", "options:", id="options too"),
            pytest.param(body(userId=5), "invalid_request", "userId:", id="user of a wrong type"),
            pytest.param(body(userId="x" * 201), "invalid_request", "userId:", id="a long user"),
            pytest.param(body(seed=5), "invalid_request", "seed:", id="unknown field"),
            pytest.param(b"[]", "invalid_request", "object", id="a list"),
            pytest.param(b"{", "invalid_request", "Invalid JSON", id="no JSON"),
            pytest.param(b"\xff", "invalid_request", "Invalid JSON", id="no UTF-8"),
            pytest.param(b'{"model": "flux-dev", "inputs": {"prompt": "\\ud800"}}',
                         "invalid_request", "Invalid JSON", id="half a character"),
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
    async def test_a_request_that_is_wrong_is_a_400_that_says_what(
        self, house: House, content: bytes, code: str, said: str
    ) -> None:
        headers = {"Content-Type": "application/json"}
        reply = await house.ask("POST", GENERATE, data=content, headers=headers)
        assert reply.refusal == (400, code)
        assert said in reply.message
        assert house.sandbox.seen == []
        assert house.jobs() == []

    @pytest.mark.parametrize(
        ("headers", "content"),
        [
            pytest.param({"Content-Type": "text/plain"}, body(), id="another type"),
            pytest.param({"Content-Type": "multipart/form-data"}, body(), id="a form"),
            pytest.param({"Content-Type": "application/json"}, b"", id="nothing"),
            pytest.param({"Content-Type": "application/json", "Content-Encoding": "gzip"}, body(),
                         id="a coding"),
        ],
    )  # fmt: skip
    async def test_what_is_no_json_is_a_415(
        self, house: House, headers: dict[str, str], content: bytes
    ) -> None:
        reply = await house.ask("POST", GENERATE, data=content, headers=headers)
        assert reply.status == 415
        assert reply.refusal[0] == 415
        assert house.sandbox.seen == []

    @pytest.mark.parametrize("is_chunked", [False, True])
    async def test_too_large_a_body_is_a_413(self, tmp_path: Path, is_chunked: bool) -> None:
        async def chunks() -> AsyncIterator[bytes]:
            for _ in range(20):
                yield b" " * 100

        async with open_house(tmp_path, max_body=1000) as house:
            data = chunks() if is_chunked else b" " * 2000
            headers = {"Content-Type": "application/json"}
            reply = await house.ask("POST", GENERATE, data=data, headers=headers)
            assert reply.refusal == (413, "body_too_large")
            assert house.sandbox.seen == []

    @pytest.mark.parametrize(
        ("method", "path", "allowed"),
        [
            pytest.param("GET", GENERATE, "POST", id="generate"),
            pytest.param("PUT", "/api/templates/billboard", "POST", id="a template"),
            pytest.param("POST", "/api/images/models", "GET", id="models"),
            pytest.param("DELETE", "/api/images/jobs/1", "GET", id="a job"),
        ],
    )
    async def test_another_method_is_a_405(
        self, house: House, method: str, path: str, allowed: str
    ) -> None:
        reply = await house.ask(method, path)
        assert reply.refusal == (405, "method_not_allowed")
        assert reply.headers["Allow"] == allowed

    async def test_head_is_as_get(self, house: House) -> None:
        assert (await house.ask("HEAD", "/api/images/models")).status == 200

    async def test_a_job_that_nobody_has_is_a_404(self, house: House) -> None:
        assert (await house.job("0" * 32)).refusal == (404, "job_not_found")

    @pytest.mark.parametrize("path", [GENERATE, "/api/images/models", "/api/images/jobs/1"])
    async def test_without_an_access_key_it_is_a_401(self, tmp_path: Path, path: str) -> None:
        async with open_house(tmp_path, access_keys=(("ann", "s3cret"),)) as house:
            method = "POST" if path == GENERATE else "GET"
            assert (await house.ask(method, path)).refusal == (401, "unauthenticated")
            assert house.sandbox.seen == []

    async def test_an_endpoint_outside_the_list_is_a_403(self, tmp_path: Path) -> None:
        async with open_house(tmp_path, allowed_endpoints=("fal-ai/flux/dev",)) as house:
            reply = await house.generate("flux-schnell", DRAW)
            assert reply.refusal == (403, "target_forbidden")
            assert house.sandbox.seen == []
            finished(await house.generate("flux-dev", DRAW))
            listed = (await house.ask("GET", "/api/images/models")).document
            assert [model["name"] for model in listed["models"]] == ["flux-dev"]
            assert {template["model"] for template in listed["templates"]} == {"flux-dev"}

    @pytest.mark.parametrize(
        ("model", "inputs", "code"),
        [
            pytest.param("kontext", {"prompt": "x", "image_url": uri(b"%PDF-1.4")},
                         "unsupported_image_format", id="a document"),
            pytest.param("face-swap", {"source_image_url": uri(), "target_image_url": uri(b"x")},
                         "unsupported_image_format", id="under another name"),
            pytest.param("kontext-multi", {"prompt": "x", "image_urls": [uri(), uri(b"x")]},
                         "unsupported_image_format", id="the second"),
            pytest.param("kontext", {"prompt": "x", "image_url": "http://127.0.0.1:9/a.png"},
                         "image_load_error", id="an address inside"),
        ],
    )  # fmt: skip
    async def test_what_is_no_picture_is_refused_before_fal_hears_of_it(
        self, house: House, model: str, inputs: dict[str, object], code: str
    ) -> None:
        reply = await house.generate(model, inputs)
        assert reply.refusal == (422, code)
        assert house.sent == []
        (row,) = house.jobs()
        assert (row["status"], row["error"]) == ("failed", code)


class TestFailures:
    @pytest.mark.parametrize(
        ("order", "status", "code"),
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
    async def test_of_fal_s_are_told(
        self, house: House, model: str, order: str, status: int, code: str
    ) -> None:
        reply = await house.generate(model, {"prompt": f"!error {order}"})
        assert failed(reply)[:2] == (status, code)
        assert ("Retry-After" in reply.headers) is (status == 503)
        told = await house.job(reply.document["jobId"])
        assert (told.status, told.document) == (200, reply.document)
        assert house.submits == 1
        assert house.sandbox.jobs == 0

    @pytest.mark.parametrize(
        ("model", "inputs", "said"),
        [
            pytest.param("flux-dev", {"prompt": 5}, "prompt", id="a type"),
            pytest.param("flux-dev", {"prompt": "x", "image_size": "huge"}, "image_size",
                         id="a choice"),
            pytest.param("flux-dev", {"prompt": "x", "num_images": 5}, "num_images", id="a number"),
            pytest.param("fast-sdxl", {"prompt": "x", "output_format": "gif"}, "output_format",
                         id="by our name"),
            pytest.param("flux-lora", {"prompt": "x", "loras": [{}]}, "loras", id="inside"),
            pytest.param("face-swap", {"source_image_url": uri(), "target_image_url": 5},
                         "target_image_url", id="by our name too"),
        ],
    )  # fmt: skip
    async def test_an_input_that_fal_refuses_is_named(
        self, house: House, model: str, inputs: dict[str, object], said: str
    ) -> None:
        reply = await house.generate(model, inputs)
        assert failed(reply) == (400, "input_refused", f"fal.ai does not accept {said}.")
        assert house.sandbox.jobs == 0

    @pytest.mark.parametrize(
        "result", [{}, [], {"images": []}, {"images": "x"}, {"image": {"url": 5}}], ids=json.dumps
    )
    async def test_a_result_without_pictures_is_a_500(
        self, tmp_path: Path, fal: FakeFal, result: object
    ) -> None:
        async def answer(request: web.Request) -> web.StreamResponse:
            if request.method == "POST":
                return web.json_response({"request_id": "1", "status": "IN_QUEUE"})
            is_status = request.path.endswith("/status")
            return web.json_response({"status": "COMPLETED"} if is_status else result)

        fal.answer = answer
        async with open_house(tmp_path, upstream_origin=fal.origin) as house:
            reply = await house.generate("flux-dev", DRAW)
            assert failed(reply)[:2] == (500, "upstream_unreadable")

    async def test_an_answer_to_a_submit_that_is_lost_is_told_and_not_bought_again(
        self, tmp_path: Path, fal: FakeFal
    ) -> None:
        async def answer(request: web.Request) -> web.StreamResponse:
            assert request.transport is not None
            request.transport.abort()
            return web.Response()

        fal.answer = answer
        async with open_house(tmp_path, upstream_origin=fal.origin) as house:
            reply = await house.generate("flux-dev", DRAW)
            assert reply.refusal == (504, "upstream_broken")
            (row,) = house.jobs()
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
            pytest.param("fast-sdxl", DRAW, None, id="nobody knows"),
        ],
    )  # fmt: skip
    async def test_are_what_fal_charges(
        self, house: House, model: str, inputs: dict[str, object], cost: float | None
    ) -> None:
        job = finished(await house.generate(model, inputs))
        assert job["cost"] == cost
        assert (await house.job(job["jobId"])).document == job
        (entry,) = await house.entries()
        assert entry.settled == (None if cost is None else round(cost * 1_000_000))

    async def test_are_nothing_for_what_is_kept(self, house: House) -> None:
        inputs = {"prompt": HERON, "seed": 1}
        first = await house.generate("kontext-text-to-image", inputs)
        second = await house.generate("kontext-text-to-image", inputs)
        assert [finished(reply)["cost"] for reply in (first, second)] == [0.04, 0]
        assert first.document["images"] == second.document["images"]
        assert first.document["jobId"] != second.document["jobId"]
        assert second.headers["Cache-Status"].startswith("falproxy; hit; ttl=")
        assert int(second.headers["Age"]) < 10
        assert house.sandbox.jobs == 1
        assert [row["settled"] for row in house.jobs()] == [40_000, 0]

    async def test_are_borne_by_one_of_equal_calls(self, house: House) -> None:
        asking = (house.generate("kontext-text-to-image", {"prompt": SLOW}) for _ in range(5))
        jobs = [finished(reply) for reply in await asyncio.gather(*asking)]
        assert sorted(job["cost"] for job in jobs) == [0, 0, 0, 0, 0.04]
        assert len({job["imageUrl"] for job in jobs}) == 1
        assert house.sandbox.jobs == 1


class TestJobs:
    async def test_a_client_that_asks_so_is_answered_at_once(self, house: House) -> None:
        reply = await house.generate("flux-dev", DRAW | {"prompt": SLOW}, ASYNC, userId="ada")
        assert (reply.status, {*reply.document}) == (202, JOB)
        job_id = reply.document["jobId"]
        assert reply.document["status"] == "running"
        assert (reply.document["images"], reply.document["cost"]) == ([], None)
        assert reply.headers["Preference-Applied"] == "respond-async"
        assert reply.headers["Location"] == f"/api/images/jobs/{job_id}"
        told = await house.ask("GET", reply.headers["Location"])
        assert (told.status, told.document) == (200, reply.document)
        job = await house.ended(job_id)
        assert finished(Reply(200, job, told.headers))["cost"] == 0.025
        assert (job["userId"], house.sandbox.jobs) == ("ada", 1)

    @pytest.mark.parametrize(
        ("wishes", "status"),
        [
            pytest.param(["respond-async"], 202, id="the wish"),
            pytest.param(["wait=10, Respond-Async"], 202, id="one of two"),
            pytest.param(["wait=10", "respond-async"], 202, id="in two lines"),
            pytest.param(["respond-asynchronously"], 200, id="another"),
        ],
    )
    async def test_the_wish_is_read_as_the_rfc_has_it(
        self, house: House, wishes: list[str], status: int
    ) -> None:
        headers = [("Prefer", wish) for wish in wishes]
        reply = await house.generate("flux-dev", DRAW, headers)
        assert reply.status == status
        assert ("Preference-Applied" in reply.headers) is (status == 202)

    async def test_a_template_too(self, house: House) -> None:
        content = {"variables": {"product": HERON}, "options": SIZE}
        reply = await house.ask("POST", "/api/templates/product-shot", json=content, headers=ASYNC)
        assert reply.status == 202
        assert (await house.ended(reply.document["jobId"]))["status"] == "completed"

    async def test_a_kept_result_is_there_soon(self, house: House) -> None:
        inputs = {"prompt": HERON, "seed": 1}
        first = finished(await house.generate("kontext-text-to-image", inputs))
        reply = await house.generate("kontext-text-to-image", inputs, ASYNC)
        job = await house.ended(reply.document["jobId"])
        assert (job["images"], job["cost"]) == (first["images"], 0)
        assert house.sandbox.jobs == 1

    async def test_a_failure_of_later_is_told_of_the_job(self, house: House) -> None:
        reply = await house.generate(
            "flux-dev", {"prompt": "!error 422 content_policy_violation"}, ASYNC
        )
        assert reply.status == 202
        job = await house.ended(reply.document["jobId"])
        assert (job["status"], job["images"]) == ("failed", [])
        assert job["error"]["code"] == "content_policy_violation"

    async def test_a_refusal_of_now_is_an_answer(self, house: House) -> None:
        reply = await house.generate("flux-dev", {"prompt": "!error 403 locked at=submit"}, ASYNC)
        assert failed(reply)[:2] == (503, "upstream_locked")
        assert house.jobs()[0]["status"] == "failed"

    async def test_are_their_owners(self, tmp_path: Path) -> None:
        keys = (("ann", "s3cret-ann"), ("ben", "s3cret-ben"))
        ann, ben = ({"x-falproxy-key": secret} for _, secret in keys)
        async with open_house(tmp_path, access_keys=keys) as house:
            reply = await house.generate("flux-dev", DRAW, ASYNC | ann)
            job_id = reply.document["jobId"]
            assert (await house.job(job_id, ben)).refusal == (404, "job_not_found")
            assert (await house.ended(job_id, ann))["status"] == "completed"
            assert (await house.job(job_id, ben)).refusal == (404, "job_not_found")
            assert (await house.entries())[0].principal == "ann"

    @pytest.mark.parametrize("cache", [True, False])
    async def test_time_that_runs_out_ends_the_waiting_and_not_the_job(
        self, tmp_path: Path, cache: bool
    ) -> None:
        async with open_house(tmp_path, wait=0.2, cache=cache) as house:
            reply = await house.generate("kontext-text-to-image", {"prompt": SLOW})
            assert (reply.status, reply.document["status"]) == (202, "running")
            assert "Preference-Applied" not in reply.headers
            told = await house.ask("GET", reply.headers["Location"])
            assert told.document["status"] == "running"
            job = await house.ended(reply.document["jobId"])
            assert (job["status"], job["cost"]) == ("completed", 0.04)
            assert (house.sandbox.jobs, house.cancels) == (1, [])

    @pytest.mark.parametrize("headers", [{}, ASYNC], ids=["waiting", "asking later"])
    async def test_nobody_waits_longer_for_a_submit_either(
        self, tmp_path: Path, fal: FakeFal, headers: dict[str, str]
    ) -> None:
        is_open = asyncio.Event()

        async def answer(request: web.Request) -> web.StreamResponse:
            if request.method == "POST":
                await is_open.wait()
            return web.json_response({"request_id": "1", "status": "IN_QUEUE"})

        fal.answer = answer
        async with open_house(tmp_path, upstream_origin=fal.origin, wait=0.2) as house:
            reply = await house.generate("flux-dev", DRAW, headers)
            assert reply.refusal == (504, "upstream_timeout")
            assert reply.message == "fal.ai timed out after 0.2 s."
            is_open.set()
            await until(lambda: [seen.method for seen in fal.seen] == ["POST", "PUT"])
            await until(lambda: house.jobs()[0]["status"] == "failed")
            assert house.jobs()[0]["error"] == "upstream_timeout"

    async def test_that_fal_may_never_have_got_are_given_up_after_a_while(
        self, house: House
    ) -> None:
        ledger = house.app[LEDGER_WRITER].ledger
        row = JobRow(owner="", model="flux-dev", endpoint="fal-ai/flux/dev")
        await ledger.add_job(row, Lease("a process that died", 30.0))
        assert (await house.job(row.id)).document["status"] == "queued"
        with closing(sqlite3.connect(house.data_dir / "ledger.sqlite")) as file, file:
            file.execute("UPDATE falproxy_jobs SET created_at = created_at - 301000")
        job = (await house.job(row.id)).document
        assert (job["status"], job["error"]["code"]) == ("failed", "job_lost")
        assert (await house.job(row.id)).document == job
        assert house.sandbox.seen == []

    async def test_that_fal_has_are_not_lost_when_it_cannot_be_asked(
        self, tmp_path: Path, fal: FakeFal
    ) -> None:
        is_back = asyncio.Event()

        async def answer(request: web.Request) -> web.StreamResponse:
            if request.method == "POST":
                return web.json_response({"request_id": "1", "status": "IN_QUEUE"})
            if not is_back.is_set():
                return web.Response(body=b"not what it says", headers={"Content-Encoding": "gzip"})
            is_status = request.path.endswith("/status")
            result: object = {"images": [{"url": "https://a.example/b.png"}]}
            return web.json_response({"status": "COMPLETED"} if is_status else result)

        fal.answer = answer
        async with open_house(tmp_path, upstream_origin=fal.origin) as house:
            reply = await house.generate("flux-dev", DRAW)
            assert (reply.status, reply.document["status"]) == (202, "running")
            told = await house.job(reply.document["jobId"])
            assert (told.status, told.document["status"]) == (200, "running")
            is_back.set()
            assert (await house.ended(reply.document["jobId"]))["status"] == "completed"
            assert [seen.method for seen in fal.seen].count("POST") == 1
            assert "PUT" not in [seen.method for seen in fal.seen]

    @pytest.mark.parametrize("headers", [{}, ASYNC], ids=["waiting", "asking later"])
    async def test_have_pictures_that_are_kept(
        self, tmp_path: Path, headers: dict[str, str]
    ) -> None:
        async with open_house(tmp_path, rehost="disk") as house:
            reply = await house.generate("flux-dev", DRAW, headers)
            job = await house.ended(reply.document["jobId"])
            assert job["imageUrl"].startswith(f"{house.origin}/files/")
            async with house.session.get(job["imageUrl"]) as picture:
                assert picture.status == 200

    async def test_a_client_that_leaves_takes_its_job_with_it(self, uncached: House) -> None:
        await leave(uncached, "flux-dev", {"prompt": ENDLESS}, "/status")
        await until(lambda: uncached.cancels == [202])
        await until(lambda: uncached.jobs()[0]["status"] == "failed")
        assert uncached.jobs()[0]["error"] == "client_left"
        assert uncached.sandbox.jobs == 0

    async def test_a_job_whose_result_is_kept_goes_on_without_its_client(
        self, house: House
    ) -> None:
        await leave(house, "kontext-text-to-image", {"prompt": SLOW}, "/status")
        await until(lambda: house.jobs()[0]["status"] == "completed")
        assert (house.sandbox.jobs, house.cancels) == (1, [])
        assert house.jobs()[0]["settled"] == 40_000

    async def test_a_client_that_leaves_while_fal_takes_the_job_takes_it_too(
        self, tmp_path: Path, fal: FakeFal, caplog: pytest.LogCaptureFixture
    ) -> None:
        is_open = asyncio.Event()

        async def answer(request: web.Request) -> web.StreamResponse:
            if request.method == "POST":
                await is_open.wait()
            return web.json_response({"request_id": "1", "status": "IN_QUEUE"})

        fal.answer = answer
        async with open_house(tmp_path, upstream_origin=fal.origin) as house:
            asking = asyncio.ensure_future(house.generate("flux-dev", DRAW))
            await until(lambda: fal.seen)
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
            await until(lambda: "falproxy.calls" in [record.name for record in caplog.records])
            is_open.set()
            await until(lambda: [seen.method for seen in fal.seen] == ["POST", "PUT"])
            assert fal.seen[1].target == "/fal-ai/flux/requests/1/cancel"
            await until(lambda: house.jobs()[0]["status"] == "failed")
            assert house.jobs()[0]["error"] == "client_left"


class TestALedgerThatIsDown:
    @pytest.fixture
    async def house(self, tmp_path: Path) -> AsyncIterator[House]:
        async with open_house(tmp_path, database_url="postgresql://u@127.0.0.1:9/x") as opened:
            yield opened

    async def test_keeps_nobody_from_a_picture(self, house: House) -> None:
        assert finished(await house.generate("flux-dev", DRAW))["cost"] == 0.025
        assert house.sandbox.jobs == 1

    async def test_buys_nothing_that_nobody_could_ask_for(self, house: House) -> None:
        reply = await house.generate("flux-dev", DRAW, ASYNC)
        assert reply.refusal == (503, "ledger_unavailable")
        assert reply.headers["Retry-After"] == "5"
        assert (house.sandbox.jobs, house.sandbox.seen) == (0, [])

    async def test_cannot_be_asked_for_a_job(self, house: House) -> None:
        reply = await house.job("0" * 32)
        assert reply.refusal == (503, "ledger_unavailable")


@pytest.mark.parametrize("prefix", ["", "/ai", "/api/ai"])
@pytest.mark.parametrize("is_nested", [True, False])
async def test_a_job_is_where_the_answer_says(
    house: House, tmp_path: Path, prefix: str, is_nested: bool
) -> None:
    app = web.Application(handler_args={"handler_cancellation": True})
    inner = web.Application() if is_nested else app
    data_dir = tmp_path / "other"
    settings = make_settings(fal_key=CANARY, upstream_origin=house.fal, data_dir=data_dir)
    setup(inner, settings, prefix=prefix)
    if is_nested:
        app.add_subapp("/inside", inner)
    async with TestServer(app) as server, asyncio.timeout(SOON):
        origin = f"http://127.0.0.1:{server.port}"
        start = f"{'/inside' if is_nested else ''}{prefix}"
        content = {"model": "flux-dev", "inputs": DRAW | {"prompt": SLOW}}
        url = f"{origin}{start}{GENERATE}"
        async with house.session.post(url, json=content, headers=ASYNC) as response:
            job_id = (await response.json())["jobId"]
            place = response.headers["Location"]
        assert place == f"{start}/api/images/jobs/{job_id}"
        await until(lambda: house.sandbox.jobs)
        while True:
            async with house.session.get(origin + place) as response:
                job = await response.json()
            if job["status"] != "running":
                break
            await asyncio.sleep(0.02)
    assert job["status"] == "completed"


async def test_a_job_s_pictures_have_addresses_that_are_good_when_it_is_asked_for(
    tmp_path: Path,
) -> None:
    async with FakeSupabase() as fake:
        project: dict[str, Any] = {"supabase_url": fake.url, "supabase_key": fake.service_key}
        async with open_house(tmp_path, **project, supabase_signed_urls=2.0) as house:
            made = finished(await house.generate("flux-dev", DRAW))
            first = made["imageUrl"]
            fake.elapse(3)
            async with house.session.get(first) as gone:
                assert gone.status == 400
            await asyncio.sleep(1.1)  # by our own clock, half of its time
            told = (await house.job(made["jobId"])).document
            assert told["imageUrl"] != first
            async with house.session.get(told["imageUrl"]) as picture:
                assert picture.status == 200


async def test_a_ledger_that_is_slow_holds_no_call_up_for_long(tmp_path: Path) -> None:
    async with open_house(tmp_path) as house:
        finished(await house.generate("flux-dev", DRAW))
        with closing(sqlite3.connect(house.data_dir / "ledger.sqlite")) as other:
            other.execute("BEGIN IMMEDIATE")  # and nobody else may write
            started = asyncio.get_running_loop().time()
            finished(await house.generate("flux-dev", DRAW | {"seed": 2}))
            assert asyncio.get_running_loop().time() - started < 5
            other.rollback()
