"""Renders the frames of videos that depend on every input of a call."""

import math
from collections.abc import Iterator, Mapping, Sequence

from PIL import Image, ImageDraw

from falproxy.sandbox.rendering import (
    draw_caption,
    draw_digest,
    hue_color,
    render_edit,
    render_gradient,
)

FRAME_RATE = 12
# Lengths of the shorter side in pixels, by the input `resolution`.
RESOLUTIONS = {"480p": 480, "512P": 512, "720p": 720, "768P": 768, "1080p": 1080}
DEFAULT_RESOLUTION = 720
RATIO_MAX = 3.0
PROGRESS_HEIGHT = 8  # pixels

Size = tuple[int, int]


def video_size(values: Mapping[str, object], images: Sequence[Image.Image]) -> Size:
    """Return the width and height in pixels, by the resolution and the aspect ratio, or that of the
    first input image. Both are even, as H.264 requires."""
    shorter = RESOLUTIONS.get(str(values.get("resolution")), DEFAULT_RESOLUTION)
    ratio = aspect_ratio(values, images)
    longer = round(shorter * max(ratio, 1 / ratio) / 2) * 2
    return (longer, shorter) if ratio >= 1 else (shorter, longer)


def aspect_ratio(values: Mapping[str, object], images: Sequence[Image.Image]) -> float:
    """Return width divided by height."""
    text = str(values.get("aspect_ratio", ""))
    if ":" in text:
        width, height = (int(part) for part in text.split(":"))
    else:
        width, height = images[0].size if images else (16, 9)
    return min(max(width / height, 1 / RATIO_MAX), RATIO_MAX)


def render_frames(
    caption: str, size: Size, images: Sequence[Image.Image], digest: bytes, count: int
) -> Iterator[Image.Image]:
    """Yield frames in which a disc moves and a bar at the upper edge grows. The digest is in the
    corner of each frame."""
    background = render_edit(images, size, digest) if images else render_gradient(size, digest)
    draw_caption(background, caption)
    width, height = size
    radius = min(size) // 8
    for index in range(count):
        frame = background.copy()
        draw = ImageDraw.Draw(frame)
        turn = 2 * math.pi * (digest[0] / 256 + index / count)
        center = width * (0.5 + 0.35 * math.cos(turn)), height * (0.5 + 0.3 * math.sin(2 * turn))
        draw.circle(center, radius, fill=hue_color(digest[1], 0.8), outline="black", width=3)
        done = width * (index + 1) // count
        draw.rectangle((0, 0, done, PROGRESS_HEIGHT), fill=hue_color(digest[2], 0.4))
        draw_digest(frame, digest)
        yield frame
