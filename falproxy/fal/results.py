"""The images and other files of a model's result."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from falproxy.fal.pricing import Size
from falproxy.json_object import parse_object

# Keys under which models return their images (fal-api.md, 3.6).
IMAGES_KEY, IMAGE_KEY = "images", "image"
# Keys of videos and sounds, for which some models have a list.
MEDIA_KEYS = ("video", "videos", "audio", "audios", "audio_file", "audio_url", "music", "speech")
NESTING_MAX = 8


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


def parse_result_files(document: bytes) -> tuple[FalImage, ...]:
    """Return the images of a result; of one without images, its videos and sounds, otherwise all of
    its files, at any depth."""
    if images := parse_result_images(document):
        return images
    result = parse_object(document) or {}
    entries = [result[key] for key in MEDIA_KEYS if key in result]
    urls = [*find_urls(entries)] or [*find_urls(result)]
    return tuple(FalImage(url) for url in dict.fromkeys(urls))


def find_urls(value: object, nesting: int = 0) -> Iterator[str]:
    """Yield the URLs of all file objects (fal-api.md, 3.6)."""
    if nesting > NESTING_MAX:
        return
    if isinstance(value, dict) and isinstance(url := value.get("url"), str):
        yield url
        return
    if isinstance(value, dict | list):
        for member in value.values() if isinstance(value, dict) else value:
            yield from find_urls(member, nesting + 1)


def parse_dimension(value: object) -> int | None:
    """Return a number of pixels, or None for anything else."""
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def image_sizes(images: Iterable[FalImage]) -> list[Size | None]:
    return [
        (image.width, image.height) if image.width and image.height else None for image in images
    ]
