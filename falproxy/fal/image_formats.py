"""Image formats, and the ones that fal's models accept."""

from enum import StrEnum


class Format(StrEnum):
    JPEG = "jpeg"
    PNG = "png"
    WEBP = "webp"
    GIF = "gif"
    AVIF = "avif"
    HEIC = "heic"


# What fal's models take (docs.fal.ai/errors, unsupported_image_format).
FAL_FORMATS = (Format.JPEG, Format.PNG, Format.WEBP, Format.GIF, Format.AVIF)
FORMAT_NAMES = {**{str(known): known for known in Format}, "jpg": Format.JPEG}
