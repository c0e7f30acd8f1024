"""`/v1/audio/speech`, through the complete proxy to the sandbox, with OpenAI's client."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import openai
import pytest

from falproxy.media.content_type import sniff_content_type
from tests.support.sandbox_proxy import SandboxProxy, open_sandbox_proxy
from tests.support.videos import error_of, open_client

SPEECH = "/v1/audio/speech"
TEXT = "!delay 0 The heron takes off at dawn."
KOKORO, MINIMAX, ELEVENLABS = "kokoro-speech", "minimax-speech", "elevenlabs-speech"


@pytest.fixture
async def proxy(tmp_path: Path) -> AsyncIterator[SandboxProxy]:
    async with open_sandbox_proxy(tmp_path) as opened:
        yield opened


@pytest.fixture
async def client(proxy: SandboxProxy) -> AsyncIterator[openai.AsyncOpenAI]:
    async with open_client(proxy) as opened:
        yield opened


async def speak(proxy: SandboxProxy, **body: object) -> Any:
    return await proxy.request("POST", SPEECH, json={"input": TEXT, **body})


async def test_a_text_is_read_aloud(proxy: SandboxProxy, client: openai.AsyncOpenAI) -> None:
    response = await client.audio.speech.create(
        model=KOKORO, input=TEXT, voice="am_puck", speed=1.5
    )
    sound = await response.aread()
    assert sniff_content_type(sound).content_type == "audio/wav"
    assert response.response.headers["content-type"] == "audio/wav"
    assert float(response.response.headers["x-falproxy-cost"]) > 0
    assert proxy.inputs == [{"prompt": TEXT, "voice": "am_puck", "speed": 1.5}]


async def test_a_response_is_streamed_to_a_file(client: openai.AsyncOpenAI, tmp_path: Path) -> None:
    path = tmp_path / "heron.mp3"
    async with client.audio.speech.with_streaming_response.create(
        model=ELEVENLABS, input=TEXT, voice="Rachel"
    ) as response:
        await response.stream_to_file(path)
    assert sniff_content_type(path.read_bytes()).content_type == "audio/mpeg"


@pytest.mark.parametrize(
    ("audio_format", "content_type"),
    [
        ("mp3", "audio/mpeg"),
        ("opus", "audio/ogg"),
        ("aac", "audio/aac"),
        ("flac", "audio/flac"),
        ("wav", "audio/wav"),
        ("pcm", "audio/pcm"),
    ],
)
@pytest.mark.parametrize("model", [KOKORO, MINIMAX, ELEVENLABS])
async def test_the_sound_has_the_requested_format(
    proxy: SandboxProxy, client: openai.AsyncOpenAI, model: str, audio_format: Any,
    content_type: str,
) -> None:  # fmt: skip
    response = await client.audio.speech.create(
        model=model, input=TEXT, voice="auto", response_format=audio_format
    )
    sound = await response.aread()
    assert response.response.headers["content-type"] == content_type
    expected = "application/octet-stream" if audio_format == "pcm" else content_type
    assert sniff_content_type(sound).content_type == expected
    assert len(sound) > 100
    assert proxy.submits == 1


async def test_inputs_may_be_in_objects(proxy: SandboxProxy) -> None:
    url = f"{proxy.origin}{SPEECH}"
    body = {
        "model": MINIMAX,
        "input": TEXT,
        "voice": {"id": "Calm_Woman"},
        "speed": 2,
        "response_format": "flac",
        "language_boost": "English",
    }
    async with proxy.session.post(url, json=body) as response:
        assert response.status == 200, await response.text()
    assert proxy.inputs == [
        {
            "text": TEXT,
            "voice_setting": {"voice_id": "Calm_Woman", "speed": 2},
            "audio_setting": {"format": "flac"},
            "output_format": "url",
            "language_boost": "English",
        }
    ]


@pytest.mark.parametrize(
    ("voice", "sent"), [("alloy", "af_alloy"), ("onyx", "am_onyx"), ("AF_Heart", "af_heart")]
)
async def test_voices_have_short_names(proxy: SandboxProxy, voice: str, sent: str) -> None:
    url, body = f"{proxy.origin}{SPEECH}", {"model": KOKORO, "input": TEXT, "voice": voice}
    async with proxy.session.post(url, json=body) as response:
        assert response.status == 200, await response.text()
    assert proxy.inputs[0]["voice"] == sent


@pytest.mark.parametrize(
    ("body", "param"),
    [
        pytest.param({"voice": "no such voice"}, "voice", id="a voice that the model has not"),
        pytest.param({"voice": "Rachel", "model": "stable-audio"}, "voice", id="no voices"),
        pytest.param({"speed": 0.1}, "speed", id="too slow for the API"),
        pytest.param({"speed": 4, "model": ELEVENLABS}, "speed", id="too fast for the model"),
        pytest.param({"speed": 2, "model": "stable-audio"}, "speed", id="one speed"),
        pytest.param({"instructions": "calmly"}, "instructions", id="instructions"),
        pytest.param({"response_format": "midi"}, "response_format", id="an unknown format"),
        pytest.param({"stream_format": "sse"}, "stream_format", id="events"),
        pytest.param({"colour": "red"}, "colour", id="an unknown parameter"),
        pytest.param({"input": ""}, "input", id="no text"),
        pytest.param({"model": "flux-dev"}, "model", id="a model of images"),
        pytest.param({"model": "kling-video"}, "model", id="a model of videos"),
        pytest.param({"voice": "af_heart", "prompt": "x"}, "prompt", id="two texts"),
    ],
)
async def test_what_the_model_cannot_follow_is_refused(
    proxy: SandboxProxy, body: dict[str, Any], param: str
) -> None:
    error = error_of(await speak(proxy, **body), 400)
    assert (error["param"], error["type"]) == (param, "invalid_request_error")
    assert proxy.submits == 0


async def test_a_refused_text_is_an_error(proxy: SandboxProxy) -> None:
    reply = await speak(proxy, input="!error 422 content_policy_violation")
    assert error_of(reply, 400)["code"] == "content_policy_violation"


async def test_a_repeated_request_with_a_key_is_bought_once(proxy: SandboxProxy) -> None:
    url, headers = f"{proxy.origin}{SPEECH}", {"Idempotency-Key": "k-1"}
    sounds = []
    for _ in range(2):
        async with proxy.session.post(url, json={"input": TEXT}, headers=headers) as response:
            assert response.status == 200
            sounds.append(await response.read())
    assert sounds[0] == sounds[1]
    assert proxy.submits == 1


async def test_other_methods_and_types_are_refused(proxy: SandboxProxy) -> None:
    assert error_of(await proxy.request("GET", SPEECH), 405)["code"] == "method_not_allowed"
    reply = await proxy.request("POST", SPEECH, data={"input": TEXT})
    assert error_of(reply, 415)["code"] == "unsupported_media_type"


async def test_stored_sounds_are_sent(tmp_path: Path) -> None:
    async with (
        open_sandbox_proxy(tmp_path, rehost="disk") as proxy,
        proxy.session.post(f"{proxy.origin}{SPEECH}", json={"input": TEXT}) as response,
    ):
        assert response.headers["x-falproxy-rehost"].startswith("stored")
        assert sniff_content_type(await response.read()).content_type == "audio/wav"
