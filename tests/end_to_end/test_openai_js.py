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
from tests.support.openai_images import (
    DEV,
    HERON,
    KEY,
    KONTEXT,
    SCHNELL,
    SMALL,
    Studio,
    open_studio,
    picture,
)


@pytest.fixture
async def studio(tmp_path: Path) -> AsyncIterator[Studio]:
    """A proxy that wants an access key."""
    async with open_studio(tmp_path, access_key=KEY) as opened:
        yield opened


async def play(studio: Studio, scenario: str, key: str = KEY, **options: Any) -> Any:
    need(Path("node"), JS / "node_modules" / "openai")
    output = await run(
        "node", str(JS / "openai.mjs"), scenario,
        given=json.dumps(options), GATEWAY=studio.origin, ACCESS_KEY=key,
    )  # fmt: skip
    return json.loads(output.splitlines()[-1])


def encoded(content: bytes) -> str:
    return base64.b64encode(content).decode()


async def test_pictures_have_addresses(studio: Studio) -> None:
    played = await play(
        studio, "generate", model="flux-dev", prompt=HERON, size=SMALL, n=3, guidance_scale=4
    )
    addresses = [made["url"] for made in played["result"]["data"]]
    assert [(await studio.download(url)).size for url in addresses] == [(256, 256)] * 3
    (inputs,) = studio.inputs
    assert (inputs["num_images"], inputs["guidance_scale"]) == (3, 4)


async def test_ten_pictures_come_in_base64(studio: Studio) -> None:
    played = await play(
        studio, "generate", model=SCHNELL, prompt=HERON, size=SMALL, n=10,
        response_format="b64_json",
    )  # fmt: skip
    pictures = [picture(made["b64_json"]).tobytes() for made in played["result"]["data"]]
    assert (len(pictures), len(set(pictures))) == (10, 10)
    assert studio.submits == 3


async def test_a_file_is_edited(studio: Studio) -> None:
    played = await play(studio, "edit", model=KONTEXT, prompt="winter", image=encoded(png()))
    (made,) = played["result"]["data"]
    assert (await studio.download(made["url"])).width > 0
    assert studio.inputs[0]["image_url"] == f"data:image/png;base64,{encoded(png())}"


async def test_several_files_are_edited(studio: Studio) -> None:
    files = [encoded(png("red")), encoded(png("blue"))]
    played = await play(studio, "edit", model="kontext-multi", prompt="both", image=files, n=1)
    assert len(played["result"]["data"]) == 1
    sent = [url.partition(",")[2] for url in studio.inputs[0]["image_urls"]]
    assert sent == files


async def test_models_are_listed_and_found(studio: Studio) -> None:
    listed = await play(studio, "models")
    assert {"flux-dev", "kontext"} <= {model["id"] for model in listed["result"]}
    found = await play(studio, "model", id=DEV)
    assert found["result"]["id"] == DEV


async def test_a_stream_shows_the_picture_before_it_is_finished(studio: Studio) -> None:
    played = await play(studio, "stream", model=SCHNELL, prompt=HERON, size=SMALL, partial_images=2)
    kinds = [event["type"].rpartition(".")[2] for event in played["result"]]
    assert kinds == ["partial_image", "partial_image", "completed"]
    assert all(picture(event["b64_json"]).size == (256, 256) for event in played["result"])


async def test_an_edit_streams_too(studio: Studio) -> None:
    played = await play(studio, "streamEdit", model=KONTEXT, prompt=HERON, image=encoded(png()))
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
async def test_a_failure_is_the_right_exception_and_is_bought_once(
    studio: Studio, options: dict[str, str], key: str, name: str, code: str, submits: int
) -> None:
    played = await play(studio, "generate", key, **{"model": DEV, "prompt": HERON} | options)
    error = played["error"]
    assert (error["name"], error["code"]) == (name, code)
    assert error["requestID"]
    assert studio.submits == submits
    assert studio.sandbox.jobs == 0
