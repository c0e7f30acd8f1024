"""Videos and sounds of the sandbox: real files, different for every input, bounded."""

import io
import subprocess
import sys
import wave
from decimal import Decimal
from functools import cache
from typing import Any

import av
import pytest
from aiohttp.pytest_plugin import AiohttpClient
from PIL import Image

from falproxy.media.content_type import sniff_content_type
from falproxy.sandbox.files import FileStore
from falproxy.sandbox.input_images import read_input_images
from falproxy.sandbox.input_validation import InputValues, validate_inputs
from falproxy.sandbox.media_encoding import MediaFile
from falproxy.sandbox.media_output import (
    SOUND_SECONDS_MAX,
    VIDEO_SECONDS_MAX,
    media_of_equal_calls,
    output_seconds,
    render_media,
    render_video,
)
from falproxy.sandbox.models import MODELS, InputType, Model, ModelInput
from falproxy.sandbox.moving_image import FRAME_RATE
from tests.support.offline_fal import OfflineFal, offline_fal

VIDEOS = [endpoint for endpoint, model in MODELS.items() if model.kind == "video"]
SOUNDS = [endpoint for endpoint, model in MODELS.items() if model.kind == "audio"]
MEDIA = VIDEOS + SOUNDS
KLING = "fal-ai/kling-video/v2.5-turbo/pro/text-to-video"
KLING_IMAGE = "fal-ai/kling-video/v2.5-turbo/pro/image-to-video"
VEO = "fal-ai/veo3.1/fast"
LTX = "fal-ai/ltx-video"
KOKORO = "fal-ai/kokoro/american-english"
MINIMAX = "fal-ai/minimax/speech-02-turbo"
STABLE_AUDIO = "fal-ai/stable-audio-25/text-to-audio"
ACE_STEP = "fal-ai/ace-step/prompt-to-audio"
RED = "https://example.com/red.png"
# Small files, so that each is made in a moment.
SMALLEST = {"duration", "seconds_total", "resolution"}
DEFAULT_VALUES = {InputType.STRING: "a cat that sings", InputType.IMAGE: RED}
OTHER_VALUES: dict[InputType, object] = {
    InputType.STRING: "a dog that sings",
    InputType.IMAGE: f"{RED}?2",
    InputType.OBJECT: {"speed": 1.5, "format": "flac"},
}


@pytest.fixture
async def fal(aiohttp_client: AiohttpClient) -> OfflineFal:
    return await offline_fal(aiohttp_client)


def smallest(spec: ModelInput) -> object:
    return spec.choices[0] if spec.choices else spec.minimum


def default_body(endpoint: str) -> dict[str, Any]:
    """Return a complete body with a fixed seed, for a short file."""
    inputs = MODELS[endpoint].inputs
    body = {
        name: smallest(spec) if name in SMALLEST else DEFAULT_VALUES[spec.type]
        for name, spec in inputs.items()
        if name in SMALLEST or spec.type in DEFAULT_VALUES
    }
    return {**body, **({"seed": 1} if "seed" in inputs else {})}


def other_value(name: str, spec: ModelInput, current: object) -> object:
    """Return a valid value that differs from the current one."""
    if spec.type is InputType.CHOICE:
        return next(choice for choice in spec.choices if choice != current)
    if spec.type is InputType.BOOLEAN:
        return not current
    if spec.type in OTHER_VALUES:
        return OTHER_VALUES[spec.type]
    if name in SMALLEST:
        return (spec.minimum or 0) + 1
    if name == "seed":
        return 2
    return spec.minimum if current == spec.maximum else spec.maximum


def render(endpoint: str, body: dict[str, Any]) -> MediaFile:
    return render_media(*prepare(endpoint, body))


def prepare(endpoint: str, body: dict[str, Any]) -> tuple[Model, InputValues, list[Image.Image]]:
    model = MODELS[endpoint]
    values = validate_inputs(model, body)
    images = read_input_images(model, values, FileStore(), "http://sandbox.test")
    return model, values, images


def first_part(endpoint: str, body: dict[str, Any]) -> bytes:
    """Return a sound, or the first frame of a video."""
    if MODELS[endpoint].kind == "audio":
        return render(endpoint, body).content
    return next(render_video(*prepare(endpoint, body))).tobytes()


@cache
def default_part(endpoint: str) -> bytes:
    return first_part(endpoint, default_body(endpoint))


def decoded_seconds(content: bytes, kind: str) -> float:
    """Return the length of all decoded frames of a video or sound."""
    with av.open(io.BytesIO(content), "r") as container:
        if kind == "video":
            rate = container.streams.video[0].average_rate
            assert rate is not None
            return float(len([*container.decode(video=0)]) / rate)
        counts = [frame.samples for frame in container.decode(audio=0)]
        return float(sum(counts) / container.streams.audio[0].sample_rate)


EVERY_INPUT = [
    pytest.param(endpoint, name, id=f"{endpoint} {name}")
    for endpoint in MEDIA
    for name in MODELS[endpoint].inputs
]


class TestFiles:
    @pytest.mark.parametrize(("endpoint", "name"), EVERY_INPUT)
    def test_every_input_changes_the_file(self, endpoint: str, name: str) -> None:
        body, spec = default_body(endpoint), MODELS[endpoint].inputs[name]
        body[name] = other_value(name, spec, body.get(name, spec.default))
        assert first_part(endpoint, body) != default_part(endpoint)

    @pytest.mark.parametrize("endpoint", MEDIA)
    def test_the_same_input_gives_the_same_frames(self, endpoint: str) -> None:
        assert first_part(endpoint, default_body(endpoint)) == default_part(endpoint)

    @pytest.mark.parametrize("endpoint", [VEO, *SOUNDS])
    def test_the_same_input_gives_the_same_file(self, endpoint: str) -> None:
        body = default_body(endpoint)
        assert render(endpoint, body) == render(endpoint, body)

    def test_no_two_models_give_the_same_file(self) -> None:
        assert len({default_part(endpoint) for endpoint in MEDIA}) == len(MEDIA)

    def test_a_video_moves(self) -> None:
        frames = [frame.tobytes() for frame in render_video(*prepare(LTX, {"prompt": "x"}))]
        assert len({*frames}) == len(frames)

    @pytest.mark.parametrize(
        ("body", "size"),
        [
            pytest.param({}, (1280, 720), id="the default"),
            pytest.param({"aspect_ratio": "9:16"}, (720, 1280), id="upright"),
            pytest.param({"aspect_ratio": "1:1"}, (720, 720), id="square"),
        ],
    )
    def test_a_video_has_the_aspect_ratio(
        self, body: dict[str, object], size: tuple[int, int]
    ) -> None:
        with av.open(io.BytesIO(render(KLING, {"prompt": "x", **body}).content)) as container:
            stream = container.streams.video[0]
            assert (stream.codec_context.name, stream.width, stream.height) == ("h264", *size)
            assert not container.streams.audio

    def test_a_video_begins_with_its_image(self) -> None:
        body = {"prompt": "x", "image_url": RED}
        with av.open(io.BytesIO(render(KLING_IMAGE, body).content)) as container:
            stream = container.streams.video[0]
            assert (stream.width, stream.height) == (960, 720)  # that of the placeholder, 4:3

    @pytest.mark.parametrize("generate_audio", [True, False])
    def test_a_video_has_sound_if_asked_for(self, generate_audio: bool) -> None:
        body = {"prompt": "x", "seed": 1, "duration": "4s", "generate_audio": generate_audio}
        with av.open(io.BytesIO(render(VEO, body).content)) as container:
            codecs = [stream.codec_context.name for stream in container.streams.audio]
        assert codecs == (["aac"] if generate_audio else [])

    @pytest.mark.parametrize(
        ("settings", "extension"),
        [({}, "mp3"), ({"format": "flac"}, "flac"), ({"format": "pcm"}, "pcm")],
    )
    def test_speech_has_the_format_asked_for(
        self, settings: dict[str, object], extension: str
    ) -> None:
        file = render(MINIMAX, {"text": "hello", "audio_setting": settings})
        assert file.extension == extension

    def test_speech_has_the_sample_rate_asked_for(self) -> None:
        body = {"text": "hello", "audio_setting": {"sample_rate": "8000"}}
        with av.open(io.BytesIO(render(MINIMAX, body).content)) as container:
            assert container.streams.audio[0].sample_rate == 8000

    def test_longer_texts_and_slower_voices_take_longer(self) -> None:
        def seconds(**inputs: object) -> float:
            return output_seconds(MODELS[KOKORO], inputs)

        assert seconds(prompt="x" * 150) == 10
        assert seconds(prompt="x" * 150, speed=2.0) == 5
        assert 0 < seconds(prompt="x") < 1

    def test_a_long_video_is_cut(self) -> None:
        values = {"prompt": "x", "duration": "100000", "resolution": "480p"}
        count = sum(1 for _ in render_video(MODELS[LTX], values, []))
        assert count == VIDEO_SECONDS_MAX * FRAME_RATE

    def test_a_long_text_is_cut(self) -> None:
        file = render_media(MODELS[KOKORO], {"prompt": "x" * 10**6}, [])
        assert decoded_seconds(file.content, "audio") == SOUND_SECONDS_MAX


class TestResults:
    @pytest.mark.parametrize("endpoint", MEDIA)
    async def test_every_model_returns_a_real_file(self, fal: OfflineFal, endpoint: str) -> None:
        model, body = MODELS[endpoint], default_body(endpoint)
        response = await fal.run(endpoint, body)
        document = await response.json()
        assert response.status == 200, document
        assert {*document} == {model.output, *model.extra_fields}
        file = document[model.output]
        assert {*file} == {"url", "content_type", "file_name", "file_size"}
        async with fal.client.session.get(file["url"]) as served:
            content = await served.read()
            assert served.headers["Content-Type"] == file["content_type"]
        assert len(content) == file["file_size"]
        assert sniff_content_type(content).content_type == file["content_type"]
        seconds = output_seconds(model, validate_inputs(model, body))
        assert decoded_seconds(content, model.kind) == pytest.approx(seconds, abs=0.1)

    @pytest.mark.parametrize(
        ("endpoint", "body", "units"),
        [
            pytest.param(KLING, {"prompt": "x"}, "5", id="default seconds"),
            pytest.param(KLING, {"prompt": "x", "duration": "10"}, "10", id="seconds as text"),
            pytest.param(VEO, {"prompt": "x", "duration": "4s"}, "4", id="seconds with a unit"),
            pytest.param(LTX, {"prompt": "x"}, "1", id="a video"),
            pytest.param(KOKORO, {"prompt": "x" * 50}, "0.05", id="characters"),
            pytest.param(MINIMAX, {"text": "x" * 50}, "0.05", id="characters of a text"),
            pytest.param(STABLE_AUDIO, {"prompt": "x", "seconds_total": 2}, "1", id="a sound"),
            pytest.param(ACE_STEP, {"prompt": "x", "duration": 7.5}, "7.5", id="seconds of sound"),
        ],
    )
    async def test_a_call_is_billed_in_the_units_of_its_model(
        self, fal: OfflineFal, endpoint: str, body: dict[str, object], units: str
    ) -> None:
        response = await fal.run(endpoint, body)
        assert response.headers["X-Fal-Billable-Units"] == units
        assert fal.sandbox.cost == MODELS[endpoint].price * Decimal(units)

    async def test_a_sound_can_be_a_data_uri(self, fal: OfflineFal) -> None:
        body = {"prompt": "x", "seconds_total": 1, "sync_mode": True}
        document = await (await fal.run(STABLE_AUDIO, body)).json()
        assert document["audio"]["url"].startswith("data:audio/wav;base64,")

    async def test_speech_reports_its_length(self, fal: OfflineFal) -> None:
        document = await (await fal.run(MINIMAX, {"text": "x" * 45})).json()
        assert document["duration_ms"] == 3000

    async def test_a_text_can_trigger_a_failure(self, fal: OfflineFal) -> None:
        response = await fal.run(MINIMAX, {"text": "!error 422 content_policy_violation"})
        assert response.status == 422

    @pytest.mark.parametrize(
        ("body", "location"),
        [
            ({"voice_setting": "Rachel"}, ["body", "voice_setting"]),
            ({"voice_setting": {"speed": 9}}, ["body", "voice_setting", "speed"]),
            ({"audio_setting": {"format": "ogg"}}, ["body", "audio_setting", "format"]),
        ],
    )
    async def test_inputs_of_an_object_are_validated(
        self, fal: OfflineFal, body: dict[str, object], location: list[str]
    ) -> None:
        response = await fal.run(MINIMAX, {"text": "x", **body})
        assert response.status == 422
        assert (await response.json())["detail"][0]["loc"] == location


class TestWithoutPyAV:
    @pytest.fixture(autouse=True)
    def pyav_is_missing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "av", None)
        cache = media_of_equal_calls.cache
        assert cache is not None
        cache.clear()

    async def test_a_sound_is_a_wave_file(self, fal: OfflineFal) -> None:
        response = await fal.run(MINIMAX, {"text": "hello"})
        file = (await response.json())["audio"]
        assert file["content_type"] == "audio/wav"
        async with fal.client.session.get(file["url"]) as served:
            with wave.open(io.BytesIO(await served.read())) as sound:
                assert sound.getnframes() > 0

    async def test_a_video_is_an_error_that_names_the_package(self, fal: OfflineFal) -> None:
        response = await fal.run(KLING, {"prompt": "x"})
        assert response.status == 501
        assert "falproxy[sandbox]" in (await response.json())["detail"]
        assert (response.headers["X-Fal-Billable-Units"], fal.sandbox.jobs) == ("0", 0)


def test_pyav_is_imported_on_first_use() -> None:
    script = "import falproxy.sandbox.server, sys; sys.exit('av' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)
