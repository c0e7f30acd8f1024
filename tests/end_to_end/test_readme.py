"""The examples of the README run unchanged."""

import asyncio
import json
import os
import re
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from aiohttp import ClientSession

from falproxy.fal.registry import read_registry
from tests.support.cli_process import run_command
from tests.support.js_world import JS, need
from tests.support.offline_fal import png

PORT = "http://localhost:8080"


def examples(root: Path, language: str) -> list[str]:
    text = (root / "README.md").read_text()
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def example(root: Path, language: str, mark: str) -> str:
    """Return the only example of a language that contains a text."""
    (text,) = [text for text in examples(root, language) if mark in text]
    return text


@pytest.fixture
async def origin(tmp_path: Path) -> AsyncIterator[str]:
    """A proxy with the sandbox, as `make run` starts it."""
    async with run_command("serve", "--sandbox", "auto", CWD=str(tmp_path)) as proxy:
        yield proxy.origin


async def run(*command: str, stdin: str = "", cwd: Path | None = None) -> str:
    process = await asyncio.create_subprocess_exec(
        *command,
        cwd=cwd,
        env={name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ},
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(60):
        out, err = await process.communicate(stdin.encode())
    assert process.returncode == 0, err.decode()
    return out.decode()


async def test_the_first_curl_generates_an_image_that_opens(root: Path, origin: str) -> None:
    command = example(root, "sh", "fal.run/fal-ai/flux/dev").replace(PORT, origin)
    document = json.loads(await run("sh", "-c", command))
    async with (
        ClientSession() as session,
        session.get(document["images"][0]["url"]) as image,
    ):
        assert (image.status, image.content_type) == (200, "image/jpeg")


async def test_the_curl_for_live_video_gets_the_servers(root: Path, origin: str) -> None:
    command = example(root, "sh", "wma.fal.run").replace(PORT, origin)
    assert json.loads(await run("sh", "-c", command)) == {"ice_servers": []}


async def test_the_curl_for_base_urls_returns_urls_of_the_proxy(root: Path, origin: str) -> None:
    command = example(root, "sh", "/api/fal/queue").replace(PORT, origin)
    document = json.loads(await run("sh", "-c", command))
    assert document["status_url"].startswith(f"{origin}/api/fal/queue/fal-ai/flux/requests/")


async def test_the_example_for_browsers_generates_an_image(root: Path, origin: str) -> None:
    need(Path("node"), JS / "node_modules")
    source = example(root, "js", "fal.subscribe").replace(
        '"/api/fal/proxy"', json.dumps({"url": f"{origin}/api/fal/proxy", "when": "always"})
    )
    file = f"new Blob([new Uint8Array({[*png()]})], {{ type: 'image/png' }})"
    script = f"const file = {file};\n{source}\nconsole.log('made ' + data.images[0].url);"
    out = await run("node", "--input-type=module", stdin=script, cwd=JS)
    assert "COMPLETED" in out
    assert f"made {origin}/files/" in out


async def test_the_example_for_the_ai_sdk_sends_all_calls_to_the_proxy(
    root: Path, origin: str
) -> None:
    """Images are generated. The sandbox has no model for speech, and the proxy returns its 404."""
    need(Path("node"), JS / "node_modules" / "@ai-sdk" / "fal")
    source = example(root, "js", "createFal").replace(PORT, origin)
    script = """
      import { experimental_generateSpeech, generateImage } from "ai";
      const prompt = "a heron";
      const { image } = await generateImage({ model: fal.image("fal-ai/flux/schnell"), prompt });
      console.log(image.mediaType);
      const model = fal.speech("fal-ai/no-speech");
      await experimental_generateSpeech({ model, text: prompt, maxRetries: 0 })
        .catch((error) => console.log(error.statusCode, error.responseHeaders["x-request-id"]));
    """
    out = await run("node", "--input-type=module", stdin=f"{source}\n{script}", cwd=JS)
    media_type, status = re.fullmatch(r"(\S+)\n(\d+) \w{32}\n", out).groups()  # type: ignore[union-attr]
    assert (media_type, status) == ("image/jpeg", "404")


@pytest.mark.parametrize(
    ("mark", "path"),
    [
        pytest.param("/kontext -H", ("images", 0, "url"), id="Kontext"),
        pytest.param("/api/images/generate", ("imageUrl",), id="any model"),
    ],
)
async def test_a_dialect_s_curl_generates_an_image_that_opens(
    root: Path, origin: str, mark: str, path: tuple[str | int, ...]
) -> None:
    command = example(root, "sh", mark).replace(PORT, origin)
    url = json.loads(await run("sh", "-c", command))
    for name in path:
        url = url[name]
    async with ClientSession() as session, session.get(url) as image:
        assert (image.status, image.content_type) == (200, "image/jpeg")


async def test_the_example_for_openai_generates_an_image(root: Path, origin: str) -> None:
    source = example(root, "python", "from openai import").replace(PORT, origin)
    out = await run(sys.executable, "-c", source)
    assert out.startswith(f"{origin}/files/")


async def test_the_example_of_a_model_file_is_valid(root: Path, tmp_path: Path) -> None:
    own = tmp_path / "my-models.toml"
    own.write_text(example(root, "toml", "[models.house-style]"))
    model = read_registry(own).model("house-style")
    assert model.build_body({"prompt": "a cat", "lora_url": "https://a.example/b"})["loras"]
