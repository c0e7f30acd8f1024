"""Image formats, and the ones that fal's models accept."""

from enum import StrEnum


class Format(StrEnum):
    JPEG = "jpeg"
    PNG = "png"
    WEBP = "webp"
    GIF = "gif"
    AVIF = "avif"
    HEIC = "heic"


# Formats that fal's models accept (docs.fal.ai/errors, unsupported_image_format).
FAL_FORMATS = (Format.JPEG, Format.PNG, Format.WEBP, Format.GIF, Format.AVIF)
FORMAT_NAMES = {**{str(name): name for name in Format}, "jpg": Format.JPEG}
