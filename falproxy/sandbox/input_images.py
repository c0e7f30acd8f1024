"""The pictures a call brings, read offline: data URIs, files of the sandbox, stand-ins for others.

The sandbox never opens a connection to a URL it was given. A picture that lives elsewhere on the
web is replaced by one drawn from a digest of its address: always the same for the same URL.
"""

import binascii
import hashlib
import io
from collections.abc import Iterator, Mapping
from typing import BinaryIO
from urllib.parse import unquote_to_bytes, urlsplit

from PIL import Image, ImageOps

from falproxy.sandbox.faults import CATALOGUE
from falproxy.sandbox.files import FileStore
from falproxy.sandbox.models import SIDE_MAX, Kind, Model
from falproxy.sandbox.rendering import EDIT_MAX, invent, write_caption
from falproxy.sandbox.responses import FalError, field_error, model_error

PIXELS_MAX = 50_000_000
STAND_IN = (1024, 768)
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombWarning)


def read_pictures(
    model: Model, values: Mapping[str, object], files: FileStore, public_url: str
) -> list[Image.Image]:
    """The model's image inputs, in the order of its table. Blocks: call it in a thread.

    Raises:
        FalError: 422 naming the input that cannot be had or read.
    """
    shelf = Shelf(files, public_url)
    return [shelf.read(url, loc) for url, loc in image_urls(model, values)]


def image_urls(model: Model, values: Mapping[str, object]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Each image URL with the place of its input."""
    for name, expected in model.inputs.items():
        value = values.get(name)
        if expected.kind is Kind.IMAGE and isinstance(value, str):
            yield value, ("body", name)
        if expected.kind is Kind.IMAGES and isinstance(value, list):
            yield from ((str(url), ("body", name)) for url in value)


class Shelf:
    """Where pictures are looked up."""

    def __init__(self, files: FileStore, public_url: str) -> None:
        self._files = files
        self._own = f"{public_url.rstrip('/')}/files/"

    def read(self, url: str, loc: tuple[str, ...]) -> Image.Image:
        if url.startswith("data:"):
            return decode(io.BytesIO(data_of(url, loc)), url, loc)
        try:
            parts = urlsplit(url)
            file = self._files.find(url)
            is_web = parts.scheme in ("http", "https") and bool(parts.hostname)
        except ValueError:
            raise trouble("file_download_error", url, loc) from None
        if file is not None:
            with file.open("rb") as content:
                return decode(content, url, loc)
        if not is_web or url.startswith(self._own):
            raise trouble("file_download_error", url, loc)
        return stand_in(url)


def data_of(uri: str, loc: tuple[str, ...]) -> bytes:
    """The bytes of a data URI (RFC 2397)."""
    head, _, content = uri.partition(",")
    try:
        raw = unquote_to_bytes(content)
        return binascii.a2b_base64(raw) if head.endswith(";base64") else raw
    except ValueError:
        raise trouble("image_load_error", uri, loc) from None


def decode(content: BinaryIO, url: str, loc: tuple[str, ...]) -> Image.Image:
    """The picture upright, without transparency, no larger than an edit needs it."""
    try:
        with Image.open(content) as image:
            width, height = image.size
            if max(width, height) > SIDE_MAX or width * height > PIXELS_MAX:
                raise trouble("image_too_large", url, loc)
            image.draft("RGB", (EDIT_MAX, EDIT_MAX))
            picture = ImageOps.exif_transpose(image).convert("RGBA")
    except Image.DecompressionBombError:
        raise trouble("image_too_large", url, loc) from None
    except UNREADABLE:
        raise trouble("image_load_error", url, loc) from None
    ground = Image.new("RGBA", picture.size, "white")
    flat = Image.alpha_composite(ground, picture).convert("RGB")
    flat.thumbnail((EDIT_MAX, EDIT_MAX))
    return flat


def stand_in(url: str) -> Image.Image:
    """A picture for an address on the web that an offline fal cannot see."""
    picture = invent(STAND_IN, hashlib.sha256(url.encode()).digest())
    write_caption(picture, f"stand-in for {url}")
    return picture


def trouble(kind: str, url: str, loc: tuple[str, ...]) -> FalError:
    row = CATALOGUE[422, kind]
    return model_error([field_error(kind, row.text, loc, row.ctx, url)])
