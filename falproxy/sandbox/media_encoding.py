"""Encodes sounds and videos as files: WAV with Python alone, the other formats with PyAV.

PyAV is imported on first use. Where it is not installed, sounds are WAV files, and there are no
videos.
"""

import io
import wave
from collections.abc import Iterable, Mapping
from fractions import Fraction
from typing import TYPE_CHECKING, Final, Literal, NamedTuple

from PIL import Image

if TYPE_CHECKING:
    from av.audio.stream import AudioStream
    from av.container import OutputContainer

SAMPLE_BYTES = 2
SOUND_CODECS: Mapping[str, Literal["mp3", "flac"]] = {"mp3": "mp3", "flac": "flac"}
VIDEO_CODEC: Final = "h264"
VIDEO_SOUND_CODEC: Final = "aac"
# One thread, and no frames that wait in the encoder: little memory, and the same bytes for the same
# frames.
VIDEO_OPTIONS = {"preset": "ultrafast", "tune": "zerolatency", "crf": "28", "threads": "1"}
CONTENT_TYPES = {
    "flac": "audio/flac",
    "mp3": "audio/mpeg",
    "mp4": "video/mp4",
    "pcm": "audio/pcm",
    "wav": "audio/wav",
}


class PyAVMissingError(Exception):
    """PyAV is needed, and not installed."""


class MediaFile(NamedTuple):
    """An encoded file. extension: a key of CONTENT_TYPES."""

    content: bytes
    extension: str


class Sound(NamedTuple):
    """Samples of 16 bits in one channel. rate: samples of a second."""

    samples: bytes
    rate: int


def encode_sound(sound: Sound, audio_format: str) -> MediaFile:
    """Return a file of a format: wav, mp3, flac, or pcm for the samples alone."""
    if audio_format == "pcm":
        return MediaFile(sound.samples, audio_format)
    if audio_format not in SOUND_CODECS or not has_pyav():
        return MediaFile(encode_wave(sound), "wav")
    import av

    file = io.BytesIO()
    with av.open(file, "w", format=audio_format) as container:
        stream = container.add_stream(SOUND_CODECS[audio_format], rate=sound.rate, layout="mono")
        write_sound(container, stream, sound)
    return MediaFile(file.getvalue(), audio_format)


def encode_video(
    frames: Iterable[Image.Image], size: tuple[int, int], rate: int, sound: Sound | None
) -> MediaFile:
    """Return an MP4 file with H.264, and AAC if there is a sound. rate: frames of a second.

    Raises:
        PyAVMissingError
    """
    if not has_pyav():
        raise PyAVMissingError
    import av

    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream(VIDEO_CODEC, rate=rate, options=dict(VIDEO_OPTIONS))
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
        if sound is not None:
            track = container.add_stream(VIDEO_SOUND_CODEC, rate=sound.rate, layout="mono")
            write_sound(container, track, sound)
        for index, image in enumerate(frames):
            frame = av.VideoFrame.from_image(image)
            frame.pts, frame.time_base = index, Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return MediaFile(file.getvalue(), "mp4")


def has_pyav() -> bool:
    try:
        import av  # noqa: F401 # the first import takes 0.1 s
    except ImportError:
        return False
    return True


def write_sound(container: "OutputContainer", stream: "AudioStream", sound: Sound) -> None:
    """Write a sound second by second."""
    import av

    chunk = sound.rate * SAMPLE_BYTES
    for start in range(0, len(sound.samples), chunk):
        samples = sound.samples[start : start + chunk]
        frame = av.AudioFrame("s16", "mono", len(samples) // SAMPLE_BYTES, align=True)
        frame.planes[0].update(samples)
        frame.sample_rate, frame.pts = sound.rate, start // SAMPLE_BYTES
        container.mux(stream.encode(frame))
    container.mux(stream.encode(None))


def encode_wave(sound: Sound) -> bytes:
    file = io.BytesIO()
    with wave.open(file, "wb") as writer:
        writer.setnchannels(1)
        writer.setsampwidth(SAMPLE_BYTES)
        writer.setframerate(sound.rate)
        writer.writeframes(sound.samples)
    return file.getvalue()
