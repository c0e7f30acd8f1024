"""Requests and `.env` files of the systems that falproxy replaces, as their users have them."""

import base64
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import ClientSession

from tests.support.cli_process import CliProcess, run_server, start_command
from tests.support.key_search import CANARY
from tests.support.offline_fal import png
from tests.support.ports import free_port
from tests.support.postgres_server import postgres_server
from tests.support.sandbox_proxy import GENERATE, SandboxProxy, open_sandbox_proxy

KEY = "custom-access-key"
BEARER = {"Authorization": f"Bearer {KEY}"}
IMAGE = "IMAGE"  # stands for the URL of an image
FILE_URL, LORA_URL = "https://files.example/reference.jpg", "https://files.example/a.safetensors"
JOB = {"jobId", "status", "model", "imageUrl", "images", "cost", "userId", "error"}
ALL_OPTIONS = {
    "seed": 7, "guidance_scale": 3.5, "num_images": 1, "output_format": "png",
    "enhance_prompt": False, "safety_tolerance": 2, "aspect_ratio": "1:1",
    "num_inference_steps": 28, "enable_safety_checker": True, "acceleration": "none",
    "resolution_mode": "match_input",
}  # fmt: skip


@pytest.fixture
async def proxy(tmp_path: Path) -> AsyncIterator[SandboxProxy]:
    async with open_sandbox_proxy(tmp_path) as opened:
        yield opened


@pytest.fixture
async def locked(tmp_path: Path) -> AsyncIterator[SandboxProxy]:
    models = (("flux-dev", "fal-ai/flux/dev"), ("sdxl", "fal-ai/stable-diffusion-xl"))
    settings: dict[str, Any] = {"access_key": KEY, "models": models, "allowed_origins": ("*",)}
    async with open_sandbox_proxy(tmp_path, **settings) as opened:
        yield opened


KONTEXT_REQUESTS: list[tuple[str, dict[str, Any], int, dict[str, Any]]] = [
    ("/kontext", {"image_url": IMAGE, "prompt": "transform into a cartoon style"}, 1, {}),
    ("/kontext", {"image_data": base64.b64encode(png()).decode(),
                  "prompt": "make it look like a painting", "num_images": 2,
                  "output_format": "png"}, 2, {"num_images": 2, "output_format": "png"}),
    ("/kontext", {"image_url": IMAGE, "prompt": "professional headshot style", "seed": 12345,
                  "guidance_scale": 8.0, "num_inference_steps": 50, "enable_safety_checker": True,
                  "aspect_ratio": "1:1"}, 1,
     {"seed": 12345, "guidance_scale": 8.0, "aspect_ratio": "1:1"}),
    ("/kontext/max", {"image_url": IMAGE, "prompt": "cyberpunk neon style", "num_images": 2,
                      "seed": 42, "guidance_scale": 7.5}, 2,
     {"num_images": 2, "seed": 42, "guidance_scale": 7.5}),
    ("/kontext/dev", {"image_url": IMAGE, "prompt": "change to daytime",
                      "num_inference_steps": 35, "acceleration": "regular"}, 1,
     {"num_inference_steps": 35, "acceleration": "regular"}),
    *((path, {"image_url": IMAGE, "prompt": "everything at once", **ALL_OPTIONS}, 1,
       {"seed": 7, "guidance_scale": 3.5, "output_format": "png"})
      for path in ("/kontext", "/kontext/max", "/kontext/dev")),
]  # fmt: skip


class TestKontextService:
    @pytest.mark.parametrize(("path", "body", "count", "sent"), KONTEXT_REQUESTS)
    async def test_a_request_works_as_it_stands(
        self, proxy: SandboxProxy, path: str, body: dict[str, Any], count: int, sent: dict[str, Any]
    ) -> None:
        url = proxy.add_file(png("blue"))
        body = {name: url if value == IMAGE else value for name, value in body.items()}
        reply = await proxy.request("POST", path, json=body)
        assert reply.status == 200, reply
        assert {*reply.document} == {"images", "prompt"}
        assert reply.document["prompt"] == body["prompt"]
        assert len(reply.document["images"]) == count
        for image in reply.document["images"]:
            assert {*image} == {"url", "width", "height"}
            assert image["width"] > 0
            async with proxy.session.get(image["url"]) as response:
                assert response.status == 200
        (inputs,) = proxy.inputs
        assert {name: inputs.get(name) for name in sent} == sent

    @pytest.mark.parametrize(
        ("body", "status"),
        [
            ({"prompt": "x"}, 400),
            ({"image_url": IMAGE}, 400),
            ({"image_url": IMAGE, "prompt": "!error 500 internal_server_error"}, 500),
            ({"image_url": IMAGE, "prompt": "!error 403 locked at=submit"}, 503),
        ],
    )
    async def test_an_error_has_the_status_that_it_had(
        self, proxy: SandboxProxy, body: dict[str, Any], status: int
    ) -> None:
        url = proxy.add_file(png("blue"))
        body = {name: url if value == IMAGE else value for name, value in body.items()}
        assert (await proxy.request("POST", "/kontext", json=body)).status == status

    @pytest.mark.parametrize("path", ["/", "/docs", "/health"])
    async def test_its_pages_are_there(self, proxy: SandboxProxy, path: str) -> None:
        assert (await proxy.request("GET", path)).status == 200


class TestOpenAIProxy:
    async def test_a_generation_works_as_it_stands(self, locked: SandboxProxy) -> None:
        body = {"prompt": "A majestic dragon", "model": "flux-dev", "size": "1024x1024", "n": 1}
        reply = await locked.request("POST", "/v1/images/generations", json=body, headers=BEARER)
        assert reply.status == 200, reply
        assert isinstance(reply.document["created"], int)
        (image,) = reply.document["data"]
        async with locked.session.get(image["url"]) as response:
            assert response.status == 200
        (inputs,) = locked.inputs
        assert inputs["image_size"] == {"width": 1024, "height": 1024}

    async def test_the_models_are_listed(self, locked: SandboxProxy) -> None:
        reply = await locked.request("GET", "/v1/models", headers=BEARER)
        assert reply.document["object"] == "list"
        assert [model["id"] for model in reply.document["data"]] == ["flux-dev", "sdxl"]
        assert (await locked.request("GET", "/v1/models")).status == 401

    async def test_health_needs_no_key(self, locked: SandboxProxy) -> None:
        reply = await locked.request("GET", "/health")
        assert (reply.status, reply.document) == (200, {"status": "ok"})

    async def test_pages_of_all_origins_may_call(self, locked: SandboxProxy) -> None:
        headers = {**BEARER, "Origin": "https://any.example"}
        reply = await locked.request("GET", "/v1/models", headers=headers)
        origin = reply.headers["Access-Control-Allow-Origin"]
        assert (reply.status, origin in ("*", "https://any.example")) == (200, True)


USER_REQUESTS: list[dict[str, Any]] = [
    {"model": "flux-pro", "inputs": {"prompt": "A professional headshot"}, "userId": "user123"},
    {"model": "flux-lora", "inputs": {"prompt": "Professional headshot of jf in a suit",
     "image_url": FILE_URL, "lora_url": LORA_URL, "lora_scale": 0.8},
     "options": {"width": 1024, "height": 1024}, "userId": "user123"},
    {"model": "face-swap", "inputs": {"image_url": FILE_URL, "target_image_url": FILE_URL},
     "userId": "user123"},
    {"model": "image-to-image", "inputs": {"prompt": "x", "image_url": FILE_URL, "strength": 0.7,
     "guidance_scale": 3.5}, "userId": "user123"},
    {"model": "flux-dev", "inputs": {"prompt": "x", "image_url": FILE_URL, "strength": 0.5},
     "options": {"num_images": 2, "seed": 5}, "userId": "user123"},
    {"model": "flux-dev", "inputs": {"prompt": "x", "lora_url": LORA_URL}, "userId": "user123"},
    {"model": "flux-dev", "inputs": {"prompt": "x"}, "options": {"height": 512},
     "userId": "user123"},
]  # fmt: skip


class TestRegistryService:
    @pytest.mark.parametrize("body", USER_REQUESTS)
    async def test_a_request_is_a_completed_job_with_its_cost(
        self, locked: SandboxProxy, body: dict[str, Any]
    ) -> None:
        reply = await locked.request("POST", GENERATE, json=body, headers=BEARER)
        assert reply.status == 200, reply
        assert {*reply.document} == JOB
        assert (reply.document["status"], reply.document["userId"]) == ("completed", "user123")
        assert reply.document["cost"] > 0
        async with locked.session.get(reply.document["imageUrl"]) as response:
            assert response.status == 200
        listed = await locked.request("GET", "/api/images/jobs", headers=BEARER)
        assert listed.document["jobs"] == [reply.document]
        await locked.records()
        usage = await locked.request("GET", "/api/usage?by=user", headers=BEARER)
        assert "user123" in str(usage.document)

    @pytest.mark.parametrize("name", ["billboard", "discount-banner", "product-shot"])
    async def test_a_template_is_a_completed_job(self, locked: SandboxProxy, name: str) -> None:
        variables = {"headline": "Winter Sale", "background_style": "snowy"}
        body = {"template": name, "variables": {**variables, "avatar_lora": LORA_URL}}
        reply = await locked.request("POST", f"/api/templates/{name}", json=body, headers=BEARER)
        assert (reply.status, {*reply.document}) == (200, JOB), reply
        assert (reply.document["status"], reply.document["cost"] > 0) == ("completed", True)

    async def test_a_lora_in_s3_is_a_400_that_gives_the_reason(self, locked: SandboxProxy) -> None:
        body = {"model": "flux-lora", "inputs": {"prompt": "x", "lora_url": "s3://bucket/a"}}
        reply = await locked.request("POST", GENERATE, json=body, headers=BEARER)
        assert (reply.error, "s3://" in reply.message) == ((400, "invalid_input"), True)
        assert locked.model_requests == []


KONTEXT_ENV = """
FAL_KEY={key}
SUPABASE_URL=https://abcdefgh.supabase.co
SUPABASE_KEY=sb_secret_abc
REDIS_URL="rediss://default:s3cret@127.0.0.1:9"
DATABASE_URL="{database}"
PORT={port}
"""
OPENAI_ENV = """
CUSTOM_ACCESS_KEY=custom-access-key
AI_KEYS={key},{key}2
SUPPORTED_MODELS="flux-dev:fal-ai/flux/dev,sdxl:fal-ai/stable-diffusion-xl"
PORT={port}
DEBUG_MODE=true
"""
AWAY = "postgresql://neondb_owner:s3cret@127.0.0.1:9/neondb?sslmode=require&channel_binding=require"


def check_levels(process: CliProcess, *, has_debug: bool) -> None:
    assert ("debug" in {str(line["level"]).lower() for line in process.log}) is has_debug


@pytest.mark.parametrize(
    ("text", "has_debug"),
    [
        pytest.param(KONTEXT_ENV, False, id="Kontext service"),
        pytest.param(OPENAI_ENV, True, id="OpenAI proxy"),
    ],
)
async def test_an_env_file_starts_the_proxy_unchanged(
    tmp_path: Path, text: str, has_debug: bool
) -> None:
    port = free_port()
    (tmp_path / ".env").write_text(text.format(key=CANARY, port=port, database=AWAY))
    start = start_command("serve", CWD=str(tmp_path), FALPROXY_DRAIN="1")
    async with run_server(start) as process, ClientSession() as session:
        assert process.origin == f"http://127.0.0.1:{port}"
        async with session.get(f"{process.origin}/health") as response:
            assert (response.status, await response.json()) == (200, {"status": "ok"})
        check_levels(process, has_debug=has_debug)
        assert await process.stop() == 0
    assert "s3cret" not in str(process.log)


@pytest.mark.parametrize("options", ["sslmode=require", "sslmode=require&channel_binding=require"])
async def test_the_ledger_is_written_to_postgresql_over_tls(tmp_path: Path, options: str) -> None:
    with postgres_server(has_tls=True) as server:
        url = f"{server.url}?{options}"
        async with open_sandbox_proxy(tmp_path, database_url=url) as proxy:
            body = {"model": "flux-dev", "inputs": {"prompt": "!delay 0 x"}}
            reply = await proxy.request("POST", GENERATE, json=body)
            assert reply.status == 200
            listed = await proxy.request("GET", "/api/images/jobs")
            assert listed.document["jobs"] == [reply.document]
            assert server.sql("SELECT bool_and(ssl) FROM pg_stat_ssl JOIN pg_stat_activity"
                              " USING (pid) WHERE query LIKE '%falproxy%'"
                              " AND pid <> pg_backend_pid()") == "t"  # fmt: skip
