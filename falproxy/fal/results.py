"""The pictures that a result of fal's names, for those who need no more of it."""

import json
from collections.abc import Iterable
from dataclasses import dataclass

from falproxy.fal.pricing import Size

# Where models put their pictures (fal-api.md, 3.6).
IMAGES_KEY, IMAGE_KEY = "images", "image"


@dataclass(frozen=True, slots=True)
class FalImage:
    """An output of a job. width, height: None where fal does not say."""

    url: str
    width: int | None = None
    height: int | None = None


def parse_result_images(document: bytes) -> tuple[FalImage, ...]:
    """Those under `images`, or the one under `image`; none where the document is not of the
    form."""
    try:
        result = json.loads(document)
    except (ValueError, RecursionError):
        return ()
    if not isinstance(result, dict):
        return ()
    found = result.get(IMAGES_KEY) or [result.get(IMAGE_KEY)]
    pictures = []
    for image in found if isinstance(found, list) else []:
        if isinstance(image, dict) and isinstance(url := image.get("url"), str):
            pictures.append(
                FalImage(
                    url, parse_dimension(image.get("width")), parse_dimension(image.get("height"))
                )
            )
    return tuple(pictures)


def parse_dimension(value: object) -> int | None:
    """Pixels, where fal says them."""
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def image_sizes(images: Iterable[FalImage]) -> list[Size | None]:
    return [(each.width, each.height) if each.width and each.height else None for each in images]
