"""OpenAI's client for JavaScript against `/v1`, in Node."""

import base64
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.ai_sdk import run
from tests.support.js_world import JS, need
from tests.support.offline_fal import png
from tests.support.openai_proxy import (
    DEV,
    HERON,
    KEY,
    KONTEXT,
    SCHNELL,
    SMALL,
    OpenAIProxy,
    decode_image,
    open_openai_proxy,
)


@pytest.fixture
async def proxy(tmp_path: Path) -> AsyncIterator[OpenAIProxy]:
    """A proxy that requires an access key."""
    async with open_openai_proxy(tmp_path, access_key=KEY) as openai_proxy:
        yield openai_proxy


async def play(proxy: OpenAIProxy, scenario: str, key: str = KEY, **options: Any) -> Any:
    need(Path("node"), JS / "node_modules" / "openai")
    output = await run(
        "node", str(JS / "openai.mjs"), scenario,
        given=json.dumps(options), GATEWAY=proxy.origin, ACCESS_KEY=key,
    )  # fmt: skip
    return json.loads(output.splitlines()[-1])


def encoded(content: bytes) -> str:
    return base64.b64encode(content).decode()


async def test_images_have_urls(proxy: OpenAIProxy) -> None:
    played = await play(
        proxy, "generate", model="flux-dev", prompt=HERON, size=SMALL, n=3, guidance_scale=4
    )
    urls = [image["url"] for image in played["result"]["data"]]
    assert [(await proxy.download(url)).size for url in urls] == [(256, 256)] * 3
    (inputs,) = proxy.inputs
    assert (inputs["num_images"], inputs["guidance_scale"]) == (3, 4)


async def test_ten_images_are_returned_in_base64(proxy: OpenAIProxy) -> None:
    played = await play(
        proxy, "generate", model=SCHNELL, prompt=HERON, size=SMALL, n=10,
        response_format="b64_json",
    )  # fmt: skip
    images = [decode_image(image["b64_json"]).tobytes() for image in played["result"]["data"]]
    assert (len(images), len(set(images))) == (10, 10)
    assert proxy.submits == 3


async def test_a_file_is_edited(proxy: OpenAIProxy) -> None:
    played = await play(proxy, "edit", model=KONTEXT, prompt="winter", image=encoded(png()))
    (image,) = played["result"]["data"]
    assert decode_image(image["b64_json"]).width > 0
    assert proxy.inputs[0]["image_url"] == f"data:image/png;base64,{encoded(png())}"


async def test_several_files_are_edited(proxy: OpenAIProxy) -> None:
    files = [encoded(png("red")), encoded(png("blue"))]
    played = await play(proxy, "edit", model="kontext-multi", prompt="both", image=files, n=1)
    assert len(played["result"]["data"]) == 1
    sent = [url.partition(",")[2] for url in proxy.inputs[0]["image_urls"]]
    assert sent == files


async def test_models_are_listed_and_retrieved(proxy: OpenAIProxy) -> None:
    listed = await play(proxy, "models")
    assert {"flux-dev", "kontext"} <= {model["id"] for model in listed["result"]}
    model = await play(proxy, "model", id=DEV)
    assert model["result"]["id"] == DEV


async def test_a_stream_has_unfinished_images(proxy: OpenAIProxy) -> None:
    played = await play(proxy, "stream", model=SCHNELL, prompt=HERON, size=SMALL, partial_images=2)
    types = [event["type"].rpartition(".")[2] for event in played["result"]]
    assert types == ["partial_image", "partial_image", "completed"]
    assert all(decode_image(event["b64_json"]).size == (256, 256) for event in played["result"])


async def test_an_edit_is_streamed(proxy: OpenAIProxy) -> None:
    played = await play(proxy, "streamEdit", model=KONTEXT, prompt=HERON, image=encoded(png()))
    assert [event["type"] for event in played["result"]] == ["image_edit.completed"]


@pytest.mark.parametrize(
    ("options", "key", "name", "code", "submits"),
    [
        pytest.param({}, "wrong", "AuthenticationError", "invalid_api_key", 0, id="401"),
        pytest.param({"model": "dall-e-3"}, KEY, "NotFoundError", "model_not_found", 0, id="404"),
        pytest.param({"size": "huge"}, KEY, "BadRequestError", "invalid_value", 0, id="400"),
        pytest.param({"prompt": "!error 422 content_policy_violation"}, KEY, "BadRequestError",
                     "content_policy_violation", 1, id="a refused prompt"),
        pytest.param({"prompt": "!error 403 locked at=submit"}, KEY, "RateLimitError",
                     "insufficient_quota", 1, id="429"),
        pytest.param({"prompt": "!error 500 internal_server_error"}, KEY, "InternalServerError",
                     "internal_server_error", 1, id="500"),
    ],
)  # fmt: skip
async def test_an_error_has_the_right_exception_and_is_not_repeated(
    proxy: OpenAIProxy, options: dict[str, str], key: str, name: str, code: str, submits: int
) -> None:
    played = await play(proxy, "generate", key, **{"model": DEV, "prompt": HERON} | options)
    error = played["error"]
    assert (error["name"], error["code"]) == (name, code)
    assert error["requestID"]
    assert proxy.submits == submits
    assert proxy.sandbox.jobs == 0
