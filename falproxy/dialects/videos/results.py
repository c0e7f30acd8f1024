"""The files of a model's result, and what it reports about the video."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from falproxy.dialects.openai.models import KIND_OUTPUTS
from falproxy.fal.estimates import parse_seconds
from falproxy.fal.results import parse_dimension
from falproxy.json_object import parse_object

VIDEO: Final = "video"
# Fields with the variants of a video, in a result or in its video.
VARIANT_FIELDS: Mapping[str, tuple[str, ...]] = {
    VIDEO: KIND_OUTPUTS[VIDEO],
    "thumbnail": ("thumbnail", "thumbnail_url", "preview_image", "cover_image", "poster"),
    "spritesheet": ("spritesheet", "spritesheet_url", "sprite_sheet"),
}


@dataclass(frozen=True, slots=True)
class VideoResult:
    """The result of a model.

    urls: of the video and its variants, by variant.
    seconds, size: of the video; None if the result does not have them.
    """

    urls: Mapping[str, str]
    seconds: str | None = None
    size: str | None = None


def parse_video_result(document: bytes) -> VideoResult:
    result = parse_object(document) or {}
    video = next((found for name in KIND_OUTPUTS[VIDEO] if (found := result.get(name))), None)
    video = video[0] if isinstance(video, list) else video
    facts = {**result, **video} if isinstance(video, dict) else result
    urls = {}
    for variant, names in VARIANT_FIELDS.items():
        value = video if variant == VIDEO else next((facts[n] for n in names if n in facts), None)
        if (url := url_of(value)) is not None:
            urls[variant] = url
    seconds = parse_seconds(facts.get("duration"))
    width, height = parse_dimension(facts.get("width")), parse_dimension(facts.get("height"))
    return VideoResult(
        urls,
        None if not seconds else f"{seconds:f}",
        f"{width}x{height}" if width and height else None,
    )


def url_of(value: object) -> str | None:
    """Return the URL of a file: a text, or in an object."""
    url = value.get("url") if isinstance(value, Mapping) else value
    return url if isinstance(url, str) and url else None
