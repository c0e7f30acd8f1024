"""Renders output images that depend on every input of the call.

Equal calls give equal images, different calls give different ones. An edit keeps its input image
visible. The digest of the call is drawn into the upper left corner as black and white cells.
"""

import base64
import colorsys
import hashlib
import io
import json
import math
from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw, ImageFilter, ImageFont, ImageOps

from falproxy.sandbox.models import MODELS, SIZE_PRESETS, InputType, ModelInput

Size = tuple[int, int]
MEGAPIXEL = 1024 * 1024  # fal's own 1024x1024 presets count as one
SIDE_MIN, RENDERED_SIDE_MAX = 64, 4096
EDIT_MIN, EDIT_MAX = 512, 1440  # limits for the longest side of an edited image
DIGEST_CELLS, DIGEST_CELL_MAX = 16, 4  # cells on a side, maximum pixels of a cell
CONTENT_TYPES = {"jpeg": "image/jpeg", "png": "image/png", "webp": "image/webp"}


def render_image(
    endpoint: str, inputs: Mapping[str, object], images: Sequence[Image.Image], index: int
) -> Image.Image:
    """Return one output image. The same arguments give the same pixels.

    inputs: every input of the model with its value.
    images: the decoded input images.
    index: position in the output.
    """
    digest = image_digest(endpoint, inputs, images, index)
    size = output_size(inputs, images)
    canvas = render_edit(images, size, digest) if images else render_gradient(size, digest)
    draw_caption(canvas, f"SANDBOX {endpoint}  {inputs.get('prompt', '')}")
    draw_digest(canvas, digest)
    return canvas


def image_digest(
    endpoint: str, inputs: Mapping[str, object], images: Sequence[Image.Image], index: int
) -> bytes:
    """Return 32 bytes over everything that determines the image.

    Input images contribute their pixels and not their URLs, so that the same image gives the same
    digest as a URL, a data URI or an upload.
    """
    specs = MODELS[endpoint].inputs
    values = {name: value for name, value in inputs.items() if not is_image(specs.get(name))}
    digest = hashlib.sha256(json.dumps([endpoint, values, index], sort_keys=True).encode())
    for image in images:
        digest.update(repr(image.size).encode())
        digest.update(image.tobytes())
    return digest.digest()


def is_image(spec: ModelInput | None) -> bool:
    return spec is not None and spec.type in (InputType.IMAGE, InputType.IMAGES)


def output_size(inputs: Mapping[str, object], images: Sequence[Image.Image]) -> Size:
    """Return the requested width and height, by default those of the first input image."""
    size = inputs.get("image_size")
    if isinstance(size, dict):
        return limit_size((int(size["width"]), int(size["height"])), RENDERED_SIDE_MAX)
    if isinstance(size, str):
        return SIZE_PRESETS[size]
    ratio = inputs.get("aspect_ratio") or inputs.get("resolution_mode")
    if isinstance(ratio, str) and ":" in ratio:
        return megapixel_size(ratio)
    return edit_size(images[0].size) if images else (1024, 1024)


def megapixel_size(ratio: str) -> Size:
    """Return a size of about one megapixel, in steps of 16 pixels, for a ratio such as `16:9`."""
    horizontal, vertical = (int(part) for part in ratio.split(":"))
    width = math.sqrt(MEGAPIXEL * horizontal / vertical)
    return round(width / 16) * 16, round(width * vertical / horizontal / 16) * 16


def edit_size(size: Size) -> Size:
    """Return the input's size, scaled to a longest side of EDIT_MIN to EDIT_MAX pixels."""
    longest = max(size)
    scale = EDIT_MIN / longest if longest < EDIT_MIN else min(1.0, EDIT_MAX / longest)
    width, height = (max(SIDE_MIN, round(side * scale)) for side in size)
    return width, height


def limit_size(size: Size, longest: int) -> Size:
    """Return the size, scaled down until no side is longer than `longest` pixels."""
    scale = min(1.0, longest / max(size))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def hue_color(byte: int, lightness: float = 0.55) -> tuple[int, int, int]:
    red, green, blue = colorsys.hls_to_rgb(byte / 256, lightness, 0.6)
    return round(red * 255), round(green * 255), round(blue * 255)


def render_gradient(size: Size, digest: bytes) -> Image.Image:
    """Return a gradient between four colors with translucent discs, all taken from the digest."""
    corners = Image.new("RGB", (2, 2))
    for position, byte in zip(((0, 0), (1, 0), (0, 1), (1, 1)), digest, strict=False):
        corners.putpixel(position, hue_color(byte))
    canvas = corners.resize(size, Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(canvas, "RGBA")
    for x, y, radius_byte, hue in zip(*[iter(digest[4:])] * 4, strict=True):
        center = size[0] * x / 255, size[1] * y / 255
        radius = min(size) * (0.05 + radius_byte / 1100)
        draw.circle(center, radius, fill=(*hue_color(hue, 0.7), 110))
    return canvas


def render_edit(images: Sequence[Image.Image], size: Size, digest: bytes) -> Image.Image:
    """Return the first image, tinted and framed by the digest, with thumbnails of the others."""
    canvas = ImageOps.fit(images[0], size)
    canvas = Image.blend(canvas, Image.new("RGB", size, hue_color(digest[0])), 0.25)
    draw = ImageDraw.Draw(canvas, "RGBA")
    stripe = size[0] * digest[1] / 300
    draw.rectangle((stripe, 0, stripe + size[0] / 8, size[1]), fill=(*hue_color(digest[2]), 70))
    frame = max(2, min(size) // 60)
    draw.rectangle((0, 0, size[0] - 1, size[1] - 1), outline=hue_color(digest[3]), width=frame)
    side = max(8, min(size) // 4)
    for position, image in enumerate(images[1:]):
        thumbnail = ImageOps.fit(image, (side, side))
        canvas.paste(thumbnail, (size[0] - side * (position + 1) - frame, size[1] // 3))
    return canvas


def draw_caption(canvas: Image.Image, text: str) -> None:
    """Draw the text on a dark strip along the lower edge. A very low strip has no text."""
    width, height = canvas.size
    strip = max(1, min(28, height // 8))
    draw = ImageDraw.Draw(canvas, "RGBA")
    draw.rectangle((0, height - strip, width, height), fill=(0, 0, 0, 215))
    if strip >= 10:
        line = " ".join(text.split())[:300]
        font = ImageFont.load_default(strip * 0.55)
        draw.text((6, height - strip * 0.85), line, font=font, fill=(255, 255, 255, 255))


def draw_digest(canvas: Image.Image, digest: bytes) -> None:
    """Draw the 256 bits of the digest as a square of black and white cells.

    The cells are large enough to survive JPEG compression, unless the image is too small.
    """
    bits = bytes(255 * (byte >> bit & 1) for byte in digest for bit in range(8))
    cells = Image.frombytes("L", (DIGEST_CELLS, DIGEST_CELLS), bits)
    cell = max(1, min(DIGEST_CELL_MAX, min(canvas.size) // DIGEST_CELLS))
    side = DIGEST_CELLS * cell
    canvas.paste(cells.resize((side, side), Image.Resampling.NEAREST).convert("RGB"))


def render_preview(image: Image.Image, progress: float) -> Image.Image:
    """Return a blurred image, sharper with more progress (0 to 1)."""
    return image.filter(ImageFilter.BoxBlur(max(image.size) * (1 - progress) / 16))


def encode_image(image: Image.Image, output_format: str) -> bytes:
    """Return the image as a `jpeg`, `png` or `webp` file."""
    file = io.BytesIO()
    options = {"quality": 90, "subsampling": 0} if output_format == "jpeg" else {}
    image.save(file, output_format, **options)
    return file.getvalue()


def data_uri(content: bytes, content_type: str) -> str:
    return f"data:{content_type};base64,{base64.b64encode(content).decode()}"
