"""The images of a model's result."""

from collections.abc import Iterable
from dataclasses import dataclass

from falproxy.fal.pricing import Size
from falproxy.json_object import parse_object

# Keys under which models return their images (fal-api.md, 3.6).
IMAGES_KEY, IMAGE_KEY = "images", "image"


@dataclass(frozen=True, slots=True)
class FalImage:
    """An image of a result, or another file of it.

    width, height: pixels; None if the result does not contain them.
    kind: `image`, `video`, `audio`, or `file` for others.
    """

    url: str
    width: int | None = None
    height: int | None = None
    kind: str = "image"


def parse_result_images(document: bytes) -> tuple[FalImage, ...]:
    """Return the images under `images`, or the one under `image`; none if the document has another
    form."""
    result = parse_object(document)
    if result is None:
        return ()
    entries = result.get(IMAGES_KEY) or [result.get(IMAGE_KEY)]
    images = []
    for entry in entries if isinstance(entries, list) else []:
        if isinstance(entry, dict) and isinstance(url := entry.get("url"), str):
            width, height = entry.get("width"), entry.get("height")
            images.append(FalImage(url, parse_dimension(width), parse_dimension(height)))
    return tuple(images)


def parse_dimension(value: object) -> int | None:
    """Return a number of pixels, or None for anything else."""
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def image_sizes(images: Iterable[FalImage]) -> list[Size | None]:
    return [
        (image.width, image.height) if image.width and image.height else None for image in images
    ]
