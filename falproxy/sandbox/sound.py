"""Synthesizes sounds that depend on every input of a call."""

import math
import sys
from array import array
from functools import lru_cache

SAMPLE_RATE = 16_000
NOTE_SECONDS = 0.25
FREQUENCY_MIN, FREQUENCY_STEP = 160.0, 4.0  # Hz of the note of byte 0, and between two bytes
AMPLITUDE, DIGEST_AMPLITUDE = 9000, 2000
NOTES_MAX = 256  # that are kept, of at most 24 kB


def render_sound(digest: bytes, seconds: float, rate: int = SAMPLE_RATE) -> bytes:
    """Return samples of 16 bits in one channel. The same arguments give the same samples.

    Each byte of the digest is a note; a sound that is longer than all notes repeats them. The bits
    of the digest are the first samples, so that the shortest sounds of two calls differ, too.
    """
    count = max(1, round(seconds * rate))
    notes = array("h")
    for byte in digest:
        if len(notes) < count:
            notes.extend(render_note(byte, rate))
    samples = notes * -(-count // len(notes))
    del samples[count:]
    bits = (byte >> bit & 1 for byte in digest for bit in range(8))
    for position, bit in zip(range(count), bits, strict=False):
        samples[position] = DIGEST_AMPLITUDE if bit else -DIGEST_AMPLITUDE
    if sys.byteorder == "big":
        samples.byteswap()
    return samples.tobytes()


@lru_cache(NOTES_MAX)
def render_note(byte: int, rate: int) -> "array[int]":
    """Return the samples of a note that fades out."""
    step = 2 * math.pi * (FREQUENCY_MIN + FREQUENCY_STEP * byte) / rate
    count = round(NOTE_SECONDS * rate)
    sin, fall = math.sin, AMPLITUDE / count
    return array("h", [round((AMPLITUDE - fall * at) * sin(step * at)) for at in range(count)])
