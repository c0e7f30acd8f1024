"""Makes the file of a video or audio model: a real one, short, from the inputs of the call."""

from collections.abc import Iterator, Mapping, Sequence
from threading import Lock

from cachetools import LRUCache, cached
from PIL import Image

from falproxy.sandbox.media_encoding import (
    MediaFile,
    PyAVMissingError,
    Sound,
    encode_sound,
    encode_video,
)
from falproxy.sandbox.model_inputs import Model
from falproxy.sandbox.moving_image import FRAME_RATE, render_frames, video_size
from falproxy.sandbox.rendering import image_digest
from falproxy.sandbox.responses import FalError, detail_error
from falproxy.sandbox.sound import SAMPLE_RATE, render_sound

# Seconds of the longest video and sound. Longer ones are billed in full, and cut.
VIDEO_SECONDS_MAX, SOUND_SECONDS_MAX = 20.0, 240.0
MEDIA_CACHE_BYTES = 16 * 2**20
SECONDS_INPUTS = ("duration", "seconds_total")
CHARACTERS_PER_SECOND = 15  # of speech
SPEECH_SECONDS_MIN = 0.5
TEXT_INPUTS = ("text", "prompt")
NO_PYAV = "The sandbox needs PyAV to make videos: pip install 'falproxy[sandbox]'"


def render_media(
    model: Model, values: Mapping[str, object], images: Sequence[Image.Image]
) -> MediaFile:
    """Return the output of a call. The same arguments give the same bytes. Blocks.

    Raises:
        FalError: 501 if the sandbox cannot make videos.
    """
    digest = image_digest(model.endpoint, values, images, 0)
    seconds = output_seconds(model, values)
    if model.kind == "audio":
        settings = audio_settings(values)
        rate = int(str(settings.get("sample_rate", SAMPLE_RATE)))
        sound = Sound(render_sound(digest, min(seconds, SOUND_SECONDS_MAX), rate), rate)
        return encode_sound(sound, str(settings.get("format", model.audio_format)))
    track = None
    if values.get("generate_audio"):
        track = Sound(render_sound(digest, min(seconds, VIDEO_SECONDS_MAX)), SAMPLE_RATE)
    try:
        return encode_video(
            render_video(model, values, images), video_size(values, images), FRAME_RATE, track
        )
    except PyAVMissingError as error:
        raise missing_pyav() from error


def media_key(model: Model, values: Mapping[str, object], images: Sequence[Image.Image]) -> bytes:
    return image_digest(model.endpoint, values, images, 0)


# As `render_media`, without the work of an equal call before.
media_of_equal_calls = cached(
    LRUCache(MEDIA_CACHE_BYTES, lambda file: len(file.content)), media_key, Lock()
)(render_media)


def render_video(
    model: Model, values: Mapping[str, object], images: Sequence[Image.Image]
) -> Iterator[Image.Image]:
    """Return the frames of a video."""
    digest = image_digest(model.endpoint, values, images, 0)
    caption = f"SANDBOX {model.endpoint}  {get_text(values)}"
    seconds = min(output_seconds(model, values), VIDEO_SECONDS_MAX)
    count = round(seconds * FRAME_RATE)
    return render_frames(caption, video_size(values, images), images, digest, count)


def audio_settings(values: Mapping[str, object]) -> Mapping[str, object]:
    settings = values.get("audio_setting")
    return settings if isinstance(settings, dict) else {}


def missing_pyav() -> FalError:
    return detail_error(501, NO_PYAV, {"X-Fal-Billable-Units": "0"})


def output_seconds(model: Model, values: Mapping[str, object]) -> float:
    """Return the length of a video or sound: as asked for, or as long as its text takes."""
    for name in SECONDS_INPUTS:
        if (value := values.get(name)) is not None:
            return float(str(value).removesuffix("s"))
    if not model.is_speech:
        return model.default_seconds
    seconds = len(get_text(values)) / CHARACTERS_PER_SECOND / speech_speed(values)
    return max(SPEECH_SECONDS_MIN, round(seconds, 2))


def speech_speed(values: Mapping[str, object]) -> float:
    voice = values.get("voice_setting")
    speed = values.get("speed", voice.get("speed") if isinstance(voice, dict) else None)
    return speed if isinstance(speed, int | float) else 1.0


def get_text(values: Mapping[str, object]) -> str:
    """Return the text that a model reads aloud, or its prompt."""
    return next((str(values[name]) for name in TEXT_INPUTS if values.get(name)), "")
