"""Reads the input images of a call offline: data URIs, files of the sandbox, placeholders.

The sandbox never opens a connection to a URL in a request. An image elsewhere on the web is
replaced by a placeholder that is rendered from a digest of its URL, the same for the same URL.
"""

import binascii
import hashlib
import io
import re
from collections.abc import Iterator, Mapping
from typing import BinaryIO
from urllib.parse import unquote_to_bytes, urlsplit

from PIL import Image, ImageOps

from falproxy.sandbox.faults import FAULTS_BY_KEY
from falproxy.sandbox.files import FileStore
from falproxy.sandbox.models import SIDE_MAX, InputType, Model
from falproxy.sandbox.rendering import EDIT_MAX, draw_caption, render_gradient
from falproxy.sandbox.responses import FalError, error_detail, model_error

PIXELS_MAX = 50_000_000
PLACEHOLDER_SIZE = (1024, 768)
DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombWarning)
LINE_ENDS = str.maketrans("", "", "\t\n\r")
WHITESPACE = b" \t\n\f\r"
BASE64_FLAG = re.compile(r"; *base64[ \f]*\Z", re.IGNORECASE)
BASE64 = re.compile(rb"[A-Za-z0-9+/]*")
Location = tuple[str, ...]


def read_input_images(
    model: Model, values: Mapping[str, object], files: FileStore, public_url: str
) -> list[Image.Image]:
    """Return the input images in the order of the model's inputs. Blocks: call it in a thread.

    public_url: URL of the sandbox. Its files must exist, they have no placeholders.

    Raises:
        FalError: 422 about the input that cannot be loaded or decoded.
    """
    reader = ImageReader(files, public_url)
    return [reader.read(url, loc) for url, loc in image_urls(model, values)]


def image_urls(model: Model, values: Mapping[str, object]) -> Iterator[tuple[str, Location]]:
    """Yield each image URL with the location of its input."""
    for name, spec in model.inputs.items():
        value = values.get(name)
        if spec.type is InputType.IMAGE and isinstance(value, str):
            yield value, ("body", name)
        if spec.type is InputType.IMAGES and isinstance(value, list):
            yield from ((str(url), ("body", name)) for url in value)


class ImageReader:
    def __init__(self, files: FileStore, public_url: str) -> None:
        self._files = files
        self._local_prefix = f"{public_url.rstrip('/')}/files/"

    def read(self, url: str, loc: Location) -> Image.Image:
        if url[:5].lower() == "data:":
            return decode_image(io.BytesIO(decode_data_uri(url, loc)), url, loc)
        try:
            parts = urlsplit(url)
            path = self._files.find_by_url(url)
            is_web_url = parts.scheme in ("http", "https") and bool(parts.hostname)
        except ValueError:
            raise image_error("file_download_error", url, loc) from None
        if path is not None:
            with path.open("rb") as content:
                return decode_image(content, url, loc)
        if not is_web_url or url.startswith(self._local_prefix):
            raise image_error("file_download_error", url, loc)
        return render_placeholder(url)


def decode_data_uri(uri: str, loc: Location) -> bytes:
    """Return the content of a data URI, as browsers read it (RFC 2397, and the `data:` URL
    processor of the Fetch standard)."""
    text = uri.translate(LINE_ENDS).partition("#")[0]
    header, comma, content = text.partition(",")
    raw = unquote_to_bytes(content)
    if BASE64_FLAG.search(header) is None:
        return raw if comma else b""
    encoded = raw.translate(None, WHITESPACE)
    if len(encoded) % 4 == 0:
        encoded = encoded.removesuffix(b"=").removesuffix(b"=")
    if len(encoded) % 4 == 1 or not BASE64.fullmatch(encoded):
        raise image_error("image_load_error", uri, loc)
    return binascii.a2b_base64(encoded + b"==")


def decode_image(content: BinaryIO, url: str, loc: Location) -> Image.Image:
    """Return the image upright, on a white background, scaled down to the limit for edits."""
    try:
        with Image.open(content) as source:
            width, height = source.size
            if max(width, height) > SIDE_MAX or width * height > PIXELS_MAX:
                raise image_error("image_too_large", url, loc)
            source.draft("RGB", (EDIT_MAX, EDIT_MAX))
            image = ImageOps.exif_transpose(source).convert("RGBA")
    except Image.DecompressionBombError:
        raise image_error("image_too_large", url, loc) from None
    except DECODE_ERRORS:
        raise image_error("image_load_error", url, loc) from None
    background = Image.new("RGBA", image.size, "white")
    flat = Image.alpha_composite(background, image).convert("RGB")
    flat.thumbnail((EDIT_MAX, EDIT_MAX))
    return flat


def render_placeholder(url: str) -> Image.Image:
    """Return an image for a web URL that the sandbox does not fetch."""
    image = render_gradient(PLACEHOLDER_SIZE, hashlib.sha256(url.encode()).digest())
    draw_caption(image, f"stand-in for {url}")
    return image


def image_error(error_type: str, url: str, loc: Location) -> FalError:
    fault = FAULTS_BY_KEY[422, error_type]
    return model_error([error_detail(error_type, fault.message, loc, fault.ctx, url)])
