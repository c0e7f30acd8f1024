"""Conversion of sounds between formats, with PyAV if it is installed."""

import io
import wave
from collections.abc import Mapping
from importlib.util import find_spec
from typing import NamedTuple

PCM, WAV = "pcm", "wav"
PCM_RATE = 24_000  # samples of 16 bits in a second, as in OpenAI's API
SAMPLES_MAX = 24_000 * 3600  # of a sound


class Encoding(NamedTuple):
    """A container and a codec of FFmpeg, and the rate of its samples."""

    container: str
    codec: str
    rate: int


ENCODINGS: Mapping[str, Encoding] = {
    "mp3": Encoding("mp3", "libmp3lame", 44_100),
    "opus": Encoding("ogg", "libopus", 48_000),
    "aac": Encoding("adts", "aac", 44_100),
    "flac": Encoding("flac", "flac", 44_100),
}


class ConversionError(Exception):
    """A sound cannot be converted."""


def can_convert() -> bool:
    """Return whether PyAV is installed."""
    return find_spec("av") is not None


def convert(content: bytes, audio_format: str) -> bytes:
    """Convert a sound to a format: mp3, opus, aac, flac, wav, or pcm. Blocks. Raises:
    ConversionError."""
    import av

    encoding = ENCODINGS.get(audio_format, Encoding("", "", PCM_RATE))
    try:
        if audio_format in (PCM, WAV):
            samples = decode_samples(content)
            return samples if audio_format == PCM else wave_file(samples)
        return encode(content, encoding)
    except (av.FFmpegError, ValueError, OSError) as error:
        raise ConversionError(type(error).__name__) from error


def decode_samples(content: bytes) -> bytes:
    """Return the samples of a sound, in one channel. Raises: ValueError, av.FFmpegError."""
    import av

    resampler = av.AudioResampler(format="s16", layout="mono", rate=PCM_RATE)
    samples = bytearray()
    with av.open(io.BytesIO(content), "r") as source:
        for frame in [*source.decode(audio=0), None]:
            for part in resampler.resample(frame):
                samples += bytes(part.planes[0])[: 2 * part.samples]  # without the padding
                if len(samples) > 2 * SAMPLES_MAX:
                    raise ValueError("the sound is too long")
    return bytes(samples)


def encode(content: bytes, encoding: Encoding) -> bytes:
    """Raises: av.FFmpegError."""
    import av

    output = io.BytesIO()
    with (
        av.open(io.BytesIO(content), "r") as source,
        av.open(output, "w", format=encoding.container) as target,
    ):
        stream = target.add_stream(encoding.codec, rate=encoding.rate)
        assert isinstance(stream, av.AudioStream)
        for frame in source.decode(audio=0):
            frame.pts = None
            target.mux(stream.encode(frame))
        target.mux(stream.encode(None))
    return output.getvalue()


def wave_file(samples: bytes) -> bytes:
    output = io.BytesIO()
    with wave.open(output, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(PCM_RATE)
        file.writeframes(samples)
    return output.getvalue()
