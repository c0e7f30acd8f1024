"""Endpoint ids outside the registry as models of `/api/images/generate` and `/v1/images`."""

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from falproxy.fal.registry import read_registry
from tests.support.fake_fal import FakeFal
from tests.support.offline_fal import png
from tests.support.sandbox_proxy import SandboxProxy, data_uri, open_sandbox_proxy

PROMPT = "!delay 0 a heron"
SIZE = {"width": 512, "height": 256}
TEXT = {"prompt": PROMPT}
FILE = data_uri(png("blue"))
LORA = {"lora_url": "https://loras.example/ink.safetensors", "lora_scale": 0.7}
LORAS = [{"path": "https://loras.example/ink.safetensors", "scale": 0.7}]

# Endpoint → inputs and options of a call, and the inputs that fal gets.
CALLS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "fal-ai/recraft/v3/text-to-image": (
        TEXT | {"style": "vector_illustration"}, SIZE,
        {"style": "vector_illustration", "image_size": SIZE},
    ),
    "fal-ai/ideogram/v3": (
        TEXT | {"rendering_speed": "TURBO", "expand_prompt": False}, {"num_images": 2, "seed": 3},
        {"rendering_speed": "TURBO", "expand_prompt": False, "num_images": 2, "seed": 3},
    ),
    "fal-ai/imagen4/preview": (
        TEXT | {"resolution": "2K"}, {"width": 1280, "height": 720, "output_format": "webp"},
        {"resolution": "2K", "aspect_ratio": "16:9", "output_format": "webp"},
    ),
    "fal-ai/bytedance/seedream/v4/text-to-image": (
        TEXT, {"width": 768}, {"image_size": {"width": 768, "height": 1024}},
    ),
    "fal-ai/qwen-image": (
        TEXT | LORA | {"guidance_scale": 4}, {"output_format": "jpg"},
        {"loras": LORAS, "guidance_scale": 4, "output_format": "jpeg"},
    ),
    "fal-ai/stable-diffusion-v35-large": (
        TEXT | {"negative_prompt": "people"}, {"num_images": 1, "sync_mode": False},
        {"negative_prompt": "people", "num_images": 1, "sync_mode": False},
    ),
    "fal-ai/hidream-i1-full": (TEXT, {"seed": None}, {}),
    "fal-ai/nano-banana-pro": (
        TEXT | {"safety_tolerance": 6}, {"aspect_ratio": "3:2"},
        {"safety_tolerance": "6", "aspect_ratio": "3:2"},
    ),
    "fal-ai/birefnet": (
        {"image_url": FILE}, {"num_images": 1, "output_format": "webp"},
        {"image_url": FILE, "output_format": "webp"},
    ),
    "fal-ai/clarity-upscaler": (
        {"image_urls": [FILE], "upscale_factor": 1.5}, {},
        {"image_url": FILE, "upscale_factor": 1.5},
    ),
    "fal-ai/flux-pro/v1/fill": (
        TEXT | {"image_url": FILE, "mask_image_url": FILE}, {},
        {"image_url": FILE, "mask_url": FILE},
    ),
    "fal-ai/flux-pro/kontext/max/multi": (
        TEXT | {"image_url": FILE}, {}, {"image_urls": [FILE]},
    ),
}  # fmt: skip
# Endpoint → wrong inputs, the input that the message names, and accepted values in it.
WRONG: list[tuple[str, dict[str, Any], str, str]] = [
    ("fal-ai/recraft/v3/text-to-image", TEXT | {"style": "ink"}, "style", "'realistic_image'"),
    ("fal-ai/recraft/v3/text-to-image", TEXT | {"seed": 7}, "seed", "prompt, style"),
    ("fal-ai/recraft/v3/text-to-image", TEXT | {"image_url": FILE}, "image_url", "There are"),
    ("fal-ai/ideogram/v3", TEXT | {"num_images": 9}, "num_images", "a whole number from 1 to 8"),
    ("fal-ai/ideogram/v3", TEXT | {"expand_prompt": "yes"}, "expand_prompt", "true or false"),
    ("fal-ai/imagen4/preview", TEXT | {"aspect_ratio": "2:1"}, "aspect_ratio", "'16:9'"),
    ("fal-ai/imagen4/preview", TEXT | {"aspect_ratio": "1:1", "width": 5}, "aspect_ratio",
     "not both"),
    ("fal-ai/bytedance/seedream/v4/text-to-image", {}, "prompt", "is missing"),
    ("fal-ai/bytedance/seedream/v4/text-to-image", {"prompt": ["x"]}, "prompt", "a text"),
    ("fal-ai/qwen-image", TEXT | {"loras": [{"pfad": "x"}]}, "loras[0].pfad", "path, scale"),
    ("fal-ai/qwen-image", TEXT | {"lora_scale": 1}, "lora_scale", "lora_url"),
    ("fal-ai/qwen-image", TEXT | {"output_format": "webp"}, "output_format", "'jpeg', 'png'"),
    ("fal-ai/stable-diffusion-v35-large", TEXT | {"num_inference_steps": "28"},
     "num_inference_steps", "a whole number from 1 to 50"),
    ("fal-ai/stable-diffusion-v35-large", TEXT | {"sync_mode": True}, "sync_mode", "URLs"),
    ("fal-ai/hidream-i1-full", TEXT | {"seed": 1.5}, "seed", "a whole number"),
    ("fal-ai/hidream-i1-full", TEXT | {"width": "512"}, "width", "a whole number"),
    ("fal-ai/hidream-i1-full", TEXT | {"image_size": {"width": 9, "hight": 9}}, "image_size.hight",
     "height, width"),
    ("fal-ai/nano-banana-pro", TEXT | {"resolution": "8K"}, "resolution", "'1K', '2K', '4K'"),
    ("fal-ai/birefnet", {"image_url": FILE, "prompt": "x"}, "prompt", "image_url"),
    ("fal-ai/birefnet", {"image_url": "s3://bucket/a.png"}, "image_url", "cannot read s3://"),
    ("fal-ai/birefnet", {"image_url": FILE, "width": 64}, "width", "cannot be set"),
    ("fal-ai/clarity-upscaler", {"image_urls": [FILE, FILE]}, "image_urls", "There are"),
    ("fal-ai/flux-pro/kontext/max/multi", TEXT | {"image_url": FILE, "image_urls": [FILE]},
     "image_urls", "given twice"),
    ("fal-ai/flux/dev", TEXT | {"image_url": FILE}, "image_url", "image_size"),
]  # fmt: skip


@pytest.fixture
async def proxy(tmp_path: Path) -> AsyncIterator[SandboxProxy]:
    async with open_sandbox_proxy(tmp_path) as opened:
        yield opened


def test_the_endpoints_are_not_in_the_registry() -> None:
    endpoints = {model.endpoint for model in read_registry().models.values()}
    assert len({*CALLS} - endpoints) >= 10


@pytest.mark.parametrize("endpoint", CALLS)
async def test_an_endpoint_is_a_model(proxy: SandboxProxy, endpoint: str) -> None:
    inputs, options, sent = CALLS[endpoint]
    reply = await proxy.generate(endpoint, inputs, options=options, userId="ada")
    assert reply.status == 200, reply
    job = reply.document
    assert (job["status"], job["model"], job["userId"]) == ("completed", endpoint, "ada")
    assert job["imageUrl"] == job["images"][0]["url"]
    assert job["cost"] > 0
    (received,) = proxy.inputs
    prompt = {"prompt": PROMPT} if "prompt" in inputs else {}
    assert received == prompt | sent
    assert proxy.sandbox.jobs_by_endpoint == {endpoint: 1}
    (row,) = proxy.jobs()
    assert (row["model"], row["endpoint"]) == (endpoint, endpoint)
    assert row["settled"] == round(job["cost"] * 1e6)
    async with proxy.session.get(job["imageUrl"]) as response:
        assert response.status == 200


@pytest.mark.parametrize(("endpoint", "inputs", "name", "expected"), WRONG)
async def test_wrong_inputs_are_refused_before_a_job_is_bought(
    proxy: SandboxProxy, endpoint: str, inputs: dict[str, Any], name: str, expected: str
) -> None:
    reply = await proxy.generate(endpoint, inputs)
    assert reply.error == (400, "invalid_input"), reply
    assert repr(name) in reply.message
    assert expected in reply.message
    assert (proxy.model_requests, proxy.jobs()) == ([], [])


@pytest.mark.parametrize("endpoint", [each for each in CALLS if "prompt" in CALLS[each][0]])
async def test_an_endpoint_is_a_model_of_the_openai_api(proxy: SandboxProxy, endpoint: str) -> None:
    inputs, _, _ = CALLS[endpoint]
    needs_image = {*inputs} & {"image_url", "image_urls"}
    body: dict[str, Any] = {"model": endpoint, "prompt": PROMPT, "response_format": "url"}
    path = "/v1/images/generations"
    if needs_image:
        path = "/v1/images/edits"
        body["images"] = [{"image_url": FILE}]
        body |= {"mask": {"image_url": FILE}} if "mask_image_url" in inputs else {}
    reply = await proxy.request("POST", path, json=body)
    assert reply.status == 200, reply
    assert len(reply.document["data"]) == 1
    assert proxy.sandbox.jobs_by_endpoint == {endpoint: 1}


@pytest.mark.parametrize(
    ("endpoint", "more", "name"),
    [
        ("fal-ai/recraft/v3/text-to-image", {"enable_safety_checker": "no"},
         "enable_safety_checker"),
        ("fal-ai/ideogram/v3", {"rendering_speed": "FAST"}, "rendering_speed"),
        ("fal-ai/ideogram/v3", {"expand_prompt": "yes"}, "expand_prompt"),
        ("fal-ai/imagen4/preview", {"resolution": "8K"}, "resolution"),
        ("fal-ai/imagen4/preview", {"output_format": "webp", "aspect_ratio": "7:1"},
         "aspect_ratio"),
        ("fal-ai/qwen-image", {"guidance_scale": "high"}, "guidance_scale"),
        ("fal-ai/qwen-image", {"output_format": "webp"}, "output_format"),
        ("fal-ai/stable-diffusion-v35-large", {"num_inference_steps": 500}, "num_inference_steps"),
        ("fal-ai/hidream-i1-full", {"image_url": FILE}, "image_url"),
        ("fal-ai/nano-banana-pro", {"enable_web_search": 5}, "enable_web_search"),
        ("fal-ai/flux/schnell", {"loras": LORAS}, "loras"),
        ("fal-ai/flux-pro/kontext/text-to-image", {"safety_tolerance": 9}, "safety_tolerance"),
    ],
)  # fmt: skip
async def test_wrong_inputs_of_the_openai_api_are_refused_before_a_job_is_bought(
    proxy: SandboxProxy, endpoint: str, more: dict[str, Any], name: str
) -> None:
    body = {"model": endpoint, "prompt": PROMPT, **more}
    reply = await proxy.request("POST", "/v1/images/generations", json=body)
    assert reply.status == 400, reply
    assert reply.document["error"]["param"] == name
    assert name in reply.document["error"]["message"]
    assert proxy.model_requests == []


async def test_a_template_may_use_an_endpoint(proxy: SandboxProxy) -> None:
    body = {
        "model": "fal-ai/imagen4/preview",
        "variables": {"product": PROMPT},
        "options": {"seed": 5},
    }
    reply = await proxy.request("POST", "/api/templates/product-shot", json=body)
    assert reply.status == 200, reply
    assert (proxy.inputs[0]["seed"], {*proxy.inputs[0]}) == (5, {"prompt", "seed"})


@pytest.mark.parametrize(
    ("image_size", "sent"),
    [
        pytest.param({"type": "string", "enum": ["auto", "1024x1024"]}, {}, id="other presets"),
        pytest.param({"type": "string", "enum": ["auto", "square_hd"]},
                     {"image_size": "square_hd"}, id="the preset of the template"),
    ],
)  # fmt: skip
async def test_a_size_of_a_template_is_sent_to_endpoints_that_have_it(
    tmp_path: Path, fal: FakeFal, image_size: object, sent: dict[str, object]
) -> None:
    respond_with(fal, {}, {"images": [{"url": PNG_URL}]}, image_size=image_size)
    async with open_sandbox_proxy(tmp_path, upstream_origin=fal.origin) as proxy:
        body = {"model": "a/b", "variables": {"product": "tea"}}
        reply = await proxy.request("POST", "/api/templates/product-shot", json=body)
        assert reply.status == 200, reply
        (submit,) = [seen for seen in fal.seen if seen.method == "POST"]
        inputs = json.loads(submit.body)
        assert inputs.pop("prompt").startswith("A professional studio photograph of tea")
        assert inputs == sent


@pytest.mark.parametrize("name", ["fal-ai/there/is/none", "someone/private-app"])
async def test_an_endpoint_that_fal_does_not_know_is_a_400(proxy: SandboxProxy, name: str) -> None:
    reply = await proxy.generate(name, TEXT)
    assert reply.error == (400, "model_not_found")
    assert repr(name) in reply.message
    assert (proxy.model_requests, proxy.jobs()) == ([], [])


async def test_an_endpoint_that_is_not_allowed_is_a_403(tmp_path: Path) -> None:
    allowed = ("fal-ai/imagen4/**",)
    async with open_sandbox_proxy(tmp_path, allowed_endpoints=allowed) as proxy:
        assert (await proxy.generate("fal-ai/qwen-image", TEXT)).error == (403, "target_forbidden")
        assert proxy.sandbox.seen == []
        assert (await proxy.generate("fal-ai/imagen4/preview", TEXT)).status == 200


async def test_without_fal_s_description_nothing_is_bought(tmp_path: Path, fal: FakeFal) -> None:
    async def respond(request: web.Request) -> web.StreamResponse:
        return web.Response(status=503)

    fal.respond = respond
    async with open_sandbox_proxy(tmp_path, upstream_origin=fal.origin) as proxy:
        reply = await proxy.generate("fal-ai/qwen-image", TEXT)
        assert reply.error == (503, "schema_unavailable")
        assert reply.headers["Retry-After"] == "5"
        assert "POST" not in [seen.method for seen in fal.seen]


async def test_a_stored_description_is_used_while_fal_cannot_be_asked(tmp_path: Path) -> None:
    async with open_sandbox_proxy(tmp_path) as first:
        assert (await first.generate("fal-ai/qwen-image", TEXT)).status == 200
    async with open_sandbox_proxy(tmp_path, upstream_origin=first.fal_origin) as proxy:
        reply = await proxy.generate("fal-ai/qwen-image", TEXT | {"sed": 1})
        assert reply.error == (400, "invalid_input")


def document_of(output: object, inputs: dict[str, object]) -> dict[str, Any]:
    body = {"type": "object", "properties": {"prompt": {"type": "string"}, **inputs}}
    content = {"application/json": {"schema": body}}
    response = {"200": {"content": {"application/json": {"schema": output}}}}
    return {
        "paths": {
            "/a/b": {"post": {"requestBody": {"content": content}}},
            "/a/b/requests/{request_id}": {"get": {"responses": response}},
        }
    }


def respond_with(fal: FakeFal, output: object, result: object, **inputs: object) -> None:
    """Make a fake fal serve one model.

    output: the schema of its results.
    inputs: the schemas of its inputs beside the prompt.
    """

    async def respond(request: web.Request) -> web.StreamResponse:
        if "openapi" in request.path:
            return web.json_response(document_of(output, inputs))
        if request.method == "POST":
            return web.json_response({"request_id": "1", "status": "IN_QUEUE"})
        if request.path.endswith("/status"):
            return web.json_response({"status": "COMPLETED"})
        return web.json_response(result if "/requests/" in request.path else {"prices": []})

    fal.respond = respond


async def test_a_model_without_files_is_refused_before_a_job_is_bought(
    tmp_path: Path, fal: FakeFal
) -> None:
    output = {"type": "object", "properties": {"output": {"type": "string"}}}
    respond_with(fal, output, {"output": "x"})
    async with open_sandbox_proxy(tmp_path, upstream_origin=fal.origin) as proxy:
        reply = await proxy.generate("a/b", TEXT)
        assert reply.error == (400, "model_unsupported")
        assert "POST" not in [seen.method for seen in fal.seen]


MP4, MP3 = "https://v3.fal.media/files/a/b.mp4", "https://v3.fal.media/files/a/b.mp3"
PNG_URL = "https://v3.fal.media/files/a/b.png"


@pytest.mark.parametrize(
    ("result", "expected"),
    [
        pytest.param({"video": {"url": MP4, "content_type": "video/mp4"}, "seed": 1},
                     {"videoUrl": MP4, "files": [{"url": MP4, "kind": "video"}]}, id="a video"),
        pytest.param({"audio": {"url": MP3}}, {"audioUrl": MP3,
                     "files": [{"url": MP3, "kind": "audio"}]}, id="audio by its extension"),
        pytest.param({"audio_file": {"url": "https://a.example/b"}},
                     {"audioUrl": "https://a.example/b",
                      "files": [{"url": "https://a.example/b", "kind": "audio"}]},
                     id="audio by its name"),
        pytest.param({"videos": [{"url": MP4}, {"url": MP4 + "?2"}]},
                     {"videoUrl": MP4, "files": [{"url": MP4, "kind": "video"},
                                                 {"url": MP4 + "?2", "kind": "video"}]},
                     id="several"),
        pytest.param({"output": {"clip": {"video": {"url": MP4}}}},
                     {"videoUrl": MP4, "files": [{"url": MP4, "kind": "video"}]}, id="nested"),
        pytest.param({"model_mesh": {"url": "https://a.example/b.glb"}},
                     {"files": [{"url": "https://a.example/b.glb", "kind": "file"}]},
                     id="another kind of file"),
        pytest.param({"video_url": MP4}, {"videoUrl": MP4,
                     "files": [{"url": MP4, "kind": "video"}]}, id="a URL alone"),
        pytest.param({"image": {"url": PNG_URL}, "mask_image": {"url": PNG_URL + "?m"}},
                     {"imageUrl": PNG_URL}, id="two images"),
        pytest.param({"thumbnail": {"url": PNG_URL}, "video": {"url": MP4}},
                     {"imageUrl": PNG_URL, "videoUrl": MP4}, id="a video with an image"),
    ],
)  # fmt: skip
async def test_a_result_has_its_files(
    tmp_path: Path, fal: FakeFal, result: object, expected: dict[str, object]
) -> None:
    respond_with(fal, {"type": "object"}, result)
    async with open_sandbox_proxy(tmp_path, upstream_origin=fal.origin) as proxy:
        reply = await proxy.generate("a/b", TEXT)
        assert reply.status == 200, reply
        document = reply.document
        assert {name: document.get(name) for name in expected} == expected
        assert (await proxy.job(document["jobId"])).document == document
        keys = {"jobId", "status", "model", "imageUrl", "images", "cost", "userId", "error"}
        assert keys <= {*document} <= keys | {"videoUrl", "audioUrl", "files"}
