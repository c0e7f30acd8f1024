"""Real pictures from real inputs: an edit keeps its input visible, and no two calls look equal.

Every picture carries the digest of all that made it, as a black and white patch in its corner.
"""

import base64
import colorsys
import hashlib
import io
import json
import math
from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw, ImageFilter, ImageFont, ImageOps

from falproxy.sandbox.models import MODELS, PRESETS, Input, Kind

Size = tuple[int, int]
MEGAPIXEL = 1024 * 1024  # what fal's own 1024x1024 presets are one of
SIDE_MIN, DRAWN_MAX = 64, 4096
EDIT_MIN, EDIT_MAX = 512, 1440  # the longest side of an edited picture
MARK_CELLS, MARK_CELL_MAX = 16, 4
FORMATS = {"jpeg": "image/jpeg", "png": "image/png", "webp": "image/webp"}


def render(
    endpoint: str, inputs: Mapping[str, object], pictures: Sequence[Image.Image], index: int
) -> Image.Image:
    """The picture number `index` of a call; the same arguments give the same pixels.

    inputs: every input of the model with its value. pictures: the images among them, read.
    """
    digest = digest_of(endpoint, inputs, pictures, index)
    size = size_of(inputs, pictures)
    canvas = edit(pictures, size, digest) if pictures else invent(size, digest)
    write_caption(canvas, f"SANDBOX {endpoint}  {inputs.get('prompt', '')}")
    draw_mark(canvas, digest)
    return canvas


def digest_of(
    endpoint: str, inputs: Mapping[str, object], pictures: Sequence[Image.Image], index: int
) -> bytes:
    """32 bytes over everything that may change the picture; images count by their pixels, so
    that one picture is itself by URL, as a data URI or uploaded."""
    kinds = MODELS[endpoint].inputs
    plain = {name: value for name, value in inputs.items() if not is_image(kinds.get(name))}
    digest = hashlib.sha256(json.dumps([endpoint, plain, index], sort_keys=True).encode())
    for picture in pictures:
        digest.update(repr(picture.size).encode())
        digest.update(picture.tobytes())
    return digest.digest()


def is_image(expected: Input | None) -> bool:
    return expected is not None and expected.kind in (Kind.IMAGE, Kind.IMAGES)


def size_of(inputs: Mapping[str, object], pictures: Sequence[Image.Image]) -> Size:
    """Width and height of the output: as asked, else the input picture's own shape."""
    size = inputs.get("image_size")
    if isinstance(size, dict):
        return shrink((int(size["width"]), int(size["height"])), DRAWN_MAX)
    if isinstance(size, str):
        return PRESETS[size]
    ratio = inputs.get("aspect_ratio") or inputs.get("resolution_mode")
    if isinstance(ratio, str) and ":" in ratio:
        return megapixel_of(ratio)
    return edit_size(pictures[0].size) if pictures else (1024, 1024)


def megapixel_of(ratio: str) -> Size:
    """The size of about one megapixel, in steps of 16 pixels, for a ratio such as `16:9`."""
    width, height = (int(part) for part in ratio.split(":"))
    long = math.sqrt(MEGAPIXEL * width / height)
    return round(long / 16) * 16, round(long * height / width / 16) * 16


def edit_size(size: Size) -> Size:
    """The input's own size, brought to a longest side of EDIT_MIN to EDIT_MAX pixels."""
    longest = max(size)
    scale = EDIT_MIN / longest if longest < EDIT_MIN else min(1.0, EDIT_MAX / longest)
    width, height = (max(SIDE_MIN, round(side * scale)) for side in size)
    return width, height


def shrink(size: Size, longest: int) -> Size:
    """The same shape with no side longer than `longest`: the sandbox draws nothing huge."""
    scale = min(1.0, longest / max(size))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def colour(byte: int, lightness: float = 0.55) -> tuple[int, int, int]:
    red, green, blue = colorsys.hls_to_rgb(byte / 256, lightness, 0.6)
    return round(red * 255), round(green * 255), round(blue * 255)


def invent(size: Size, digest: bytes) -> Image.Image:
    """A picture from nothing: a gradient between four colours, with discs of light on it."""
    corners = Image.new("RGB", (2, 2))
    for place, byte in zip(((0, 0), (1, 0), (0, 1), (1, 1)), digest, strict=False):
        corners.putpixel(place, colour(byte))
    canvas = corners.resize(size, Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(canvas, "RGBA")
    for x, y, radius, tint in zip(*[iter(digest[4:])] * 4, strict=True):
        centre = size[0] * x / 255, size[1] * y / 255
        reach = min(size) * (0.05 + radius / 1100)
        draw.circle(centre, reach, fill=(*colour(tint, 0.7), 110))
    return canvas


def edit(pictures: Sequence[Image.Image], size: Size, digest: bytes) -> Image.Image:
    """The first picture, tinted and framed by the digest; the others stand on it in miniature."""
    canvas = ImageOps.fit(pictures[0], size)
    canvas = Image.blend(canvas, Image.new("RGB", size, colour(digest[0])), 0.25)
    draw = ImageDraw.Draw(canvas, "RGBA")
    band = size[0] * digest[1] / 300
    draw.rectangle((band, 0, band + size[0] / 8, size[1]), fill=(*colour(digest[2]), 70))
    edge = max(2, min(size) // 60)
    draw.rectangle((0, 0, size[0] - 1, size[1] - 1), outline=colour(digest[3]), width=edge)
    side = max(8, min(size) // 4)
    for place, other in enumerate(pictures[1:]):
        miniature = ImageOps.fit(other, (side, side))
        canvas.paste(miniature, (size[0] - side * (place + 1) - edge, size[1] // 3))
    return canvas


def write_caption(canvas: Image.Image, text: str) -> None:
    """A dark strip along the lower edge that says what this is."""
    width, height = canvas.size
    strip = max(1, min(28, height // 8))
    draw = ImageDraw.Draw(canvas, "RGBA")
    draw.rectangle((0, height - strip, width, height), fill=(0, 0, 0, 215))
    if strip >= 10:
        line = " ".join(text.split())[:300]
        font = ImageFont.load_default(strip * 0.55)
        draw.text((6, height - strip * 0.85), line, font=font, fill=(255, 255, 255, 255))


def draw_mark(canvas: Image.Image, digest: bytes) -> None:
    """The digest's 256 bits as a square of black and white cells in the upper left corner,
    each wide enough to outlive JPEG where the picture has room."""
    bits = bytes(255 * (byte >> bit & 1) for byte in digest for bit in range(8))
    mark = Image.frombytes("L", (MARK_CELLS, MARK_CELLS), bits)
    cell = max(1, min(MARK_CELL_MAX, min(canvas.size) // MARK_CELLS))
    side = MARK_CELLS * cell
    canvas.paste(mark.resize((side, side), Image.Resampling.NEAREST).convert("RGB"))


def sketch(picture: Image.Image, share: float) -> Image.Image:
    """How the picture looks when `share` (0 to 1) of its steps are done: still unsharp."""
    return picture.filter(ImageFilter.BoxBlur(max(picture.size) * (1 - share) / 16))


def encode(picture: Image.Image, output_format: str) -> bytes:
    """The picture as a file: `jpeg`, `png` or `webp`."""
    file = io.BytesIO()
    settings = {"quality": 90, "subsampling": 0} if output_format == "jpeg" else {}
    picture.save(file, output_format, **settings)
    return file.getvalue()


def data_uri(content: bytes, content_type: str) -> str:
    return f"data:{content_type};base64,{base64.b64encode(content).decode()}"
