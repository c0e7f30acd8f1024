"""Rules for image inputs: their locations in a call, decoding of data URIs, and limits."""

from binascii import a2b_base64
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from itertools import chain
from math import isqrt
from urllib.parse import unquote_to_bytes

from falproxy.errors import ProxyError
from falproxy.fal.image_fields import is_image_key
from falproxy.fal.image_formats import FAL_FORMATS, Format
from falproxy.fal.input_json import DEPTH_MAX, Loc, LongString
from falproxy.media.image_format import WHITESPACE, Size, describe_bytes, dimensions, sniff

# Default and minimum number of characters of a data URI that are decoded at once.
DECODE_CHUNK, DECODE_CHUNK_MIN = 2**18, 2**10
BASE64_FLAG = b";base64"
BASE64_ALPHABET = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
LINE_ENDS = b"\t\n\r"
URL_SAFE_TO_STANDARD = bytes.maketrans(b"-_", b"+/")

ERROR_DOCS_URL = "https://docs.fal.ai/errors/#"
# Names of the formats in fal's `supported_formats`.
SUFFIXES: Mapping[Format, tuple[str, ...]] = {
    Format.JPEG: (".jpg", ".jpeg"),
    Format.PNG: (".png",),
    Format.WEBP: (".webp",),
    Format.GIF: (".gif",),
    Format.AVIF: (".avif",),
    Format.HEIC: (".heic",),
}


class InputKind(StrEnum):
    """The kind of an image input's text."""

    DATA = "data"  # a data URI
    REMOTE = "remote"  # an http or https URL
    OTHER = "other"  # only fal knows its meaning


# White space before a scheme makes it invalid: browsers skip it, but fal's readers do not.
SCHEMES = (("data:", InputKind.DATA), ("http://", InputKind.REMOTE), ("https://", InputKind.REMOTE))


@dataclass(frozen=True, slots=True)
class ImageInput:
    """An image in a call's input. loc: the path of keys and indexes to it."""

    loc: Loc
    value: str | LongString


@dataclass(frozen=True, slots=True)
class ImageLimits:
    """Limits for images. max_pixels: width times height."""

    formats: tuple[Format, ...] = FAL_FORMATS
    max_bytes: int = 100 * 2**20
    max_pixels: int = 50_000_000

    def intersection(self, other: "ImageLimits | None") -> "ImageLimits":
        """Return the limits for images that satisfy both."""
        if other is None:
            return self
        return ImageLimits(
            tuple(name for name in self.formats if name in other.formats),
            min(self.max_bytes, other.max_bytes),
            min(self.max_pixels, other.max_pixels),
        )


class InputRefused(ProxyError):
    """An invalid input, as an error in fal's format: 422 with the location in the input.

    code: fal's error type.
    ctx: machine-readable values, such as limits.
    detail: the list in fal's format.
    """

    def __init__(
        self, code: str, message: str, loc: Loc, ctx: Mapping[str, object] | None = None
    ) -> None:
        super().__init__(422, code, message)
        self._loc: list[str | int] = ["body", *loc]
        entry: dict[str, object] = {"loc": self._loc, "msg": message, "type": code}
        self.detail = [
            {**entry, "url": ERROR_DOCS_URL + code, **({"ctx": dict(ctx)} if ctx else {})}
        ]

    def move_to_query(self) -> None:
        """Report the input as one of the query."""
        self._loc[0] = "query"


def image_load_error(message: str, loc: Loc) -> InputRefused:
    """Return the error for an image that cannot be read. message: a sentence with the reason."""
    return InputRefused("image_load_error", message, loc)


def find_images(tree: object) -> list[ImageInput]:
    """Return the image inputs of a call's JSON, in document order. Empty ones are left out: fal
    reports a missing image."""
    images: list[ImageInput] = []
    # Nodes to visit, and whether the last key on their path is that of an image.
    pending: list[tuple[object, Loc, bool]] = [(tree, (), False)]
    while pending:
        node, loc, is_image = pending.pop()
        if isinstance(node, str | LongString):
            if is_image and not is_empty(node):
                images.append(ImageInput(loc, node))
        elif len(loc) == DEPTH_MAX:
            continue
        elif isinstance(node, dict):
            pending += [
                (child, (*loc, key), is_image_key(key) or (is_image and key == "url"))
                for key, child in reversed(node.items())
            ]
        elif isinstance(node, list):
            pending += [
                (node[index], (*loc, index), is_image) for index in reversed(range(len(node)))
            ]
    return images


def is_empty(value: str | LongString) -> bool:
    """Return whether an input is `""` or a data URI without bytes, such as `data:,`."""
    if not isinstance(value, str):  # a LongString is never empty
        return False
    if input_kind(value) is not InputKind.DATA:
        return not value
    chunks = decode_data_uri(value)
    return next(chunks, None) is None and chunks.is_complete


def input_kind(value: str | LongString) -> InputKind:
    start = (value if isinstance(value, str) else value.prefix)[:8].lower()
    return next((kind for scheme, kind in SCHEMES if start.startswith(scheme)), InputKind.OTHER)


def leading_bytes(value: str | LongString, count: int, *, without_line_ends: bool = False) -> bytes:
    """Return the first bytes of a data URI, without decoding much more.

    without_line_ends: leave out tabs and line ends in the text, as browsers do with each URL
        (WHATWG URL, 4.4). They matter in data without base64 only.
    """
    head = bytearray()
    chunk_size = max(DECODE_CHUNK_MIN, min(DECODE_CHUNK, 2 * count))
    chunks = DataUriDecoder(value, chunk_size, without_line_ends=without_line_ends)
    for chunk in chunks:
        head += chunk
        if len(head) >= count:
            break
    chunks.close()
    return bytes(head[:count])


class DataUriDecoder(Iterator[bytes]):
    """Iterator over the bytes of a data URI (RFC 2397), which are the same for every spelling:
    base64 of either alphabet, padded or not, with white space and %-escapes.

    is_complete: at the end, whether all text was decoded. Decoding stops at a character that is not
        base64, so that different texts may have the same bytes, and these do not identify a text.
    is_canonical: whether all decoders return the same bytes. Many ignore characters of the other
        base64 alphabet and of escapes, and return another image.
    """

    def __init__(
        self,
        value: str | LongString,
        chunk_size: int = DECODE_CHUNK,
        *,
        without_line_ends: bool = False,
    ) -> None:
        self.is_complete = False
        self.is_canonical = True
        text = _text_chunks(value, chunk_size)
        if without_line_ends:
            text = (chunk.translate(None, LINE_ENDS) for chunk in text)
        self._generator = self._decode(text)
        self._chunks = filter(None, self._generator)

    def __next__(self) -> bytes:
        return next(self._chunks)

    def close(self) -> None:
        """Release the text before the end. Without this, a reference cycle would keep the spool
        with the text until the next garbage collection."""
        self._generator.close()

    def _decode(self, chunks: Iterator[bytes]) -> Generator[bytes]:
        flag = b""
        for chunk in chunks:
            header, comma, payload = chunk.partition(b",")
            flag = (flag + header.translate(None, WHITESPACE))[-len(BASE64_FLAG) :]
            if comma:
                break
        else:
            return
        unescaped = _unescape(self._track_canonical(chain((payload,), chunks)))
        if flag.lower() == BASE64_FLAG:
            yield from self._decode_base64(unescaped)
        else:
            yield from unescaped
            self.is_complete = True

    def _track_canonical(self, chunks: Iterator[bytes]) -> Iterator[bytes]:
        for chunk in chunks:
            self.is_canonical &= not any(escape in chunk for escape in (b"-", b"_", b"%"))
            yield chunk

    def _decode_base64(self, chunks: Iterator[bytes]) -> Iterator[bytes]:
        rest, is_whole = b"", True
        for chunk in chunks:
            text = rest + chunk.translate(URL_SAFE_TO_STANDARD, WHITESPACE)
            stray = text.translate(None, BASE64_ALPHABET)
            end = text.index(stray[:1]) if stray else len(text)
            cut = end - end % 4
            yield a2b_base64(text[:cut])
            rest = text[cut:end]
            if stray:
                is_whole = _is_padding(text[end:]) and all(map(_is_padding, chunks))
                break
        if len(rest) > 1:
            yield a2b_base64(rest + b"==")
        self.is_complete = is_whole and len(rest) != 1  # a single character is less than a byte


def decode_data_uri(value: str | LongString) -> DataUriDecoder:
    """Return an iterator over the bytes of a data URI, in chunks of at most 1 MiB. It is empty if
    the URI has no comma."""
    return DataUriDecoder(value)


def _text_chunks(value: str | LongString, chunk_size: int) -> Iterator[bytes]:
    if not isinstance(value, str):
        yield from value.chunks(chunk_size)
        return
    for start in range(0, len(value), chunk_size):
        yield value[start : start + chunk_size].encode(errors="surrogatepass")


def _unescape(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """Decode percent escapes, also those that are split between two chunks."""
    rest = b""
    for chunk in chunks:
        text = rest + chunk
        cut = text.rfind(b"%", max(0, len(text) - 2))
        text, rest = (text, b"") if cut < 0 else (text[:cut], text[cut:])
        yield unquote_to_bytes(text)
    yield rest


def _is_padding(text: bytes) -> bool:
    return not text.translate(None, WHITESPACE + b"=")


def check_image(head: bytes, size: int | None, limits: ImageLimits, loc: Loc) -> None:
    """Check an image by its first bytes.

    size: bytes of the whole image, or None if unknown.
    Raises: InputRefused.
    """
    image_format = sniff(head)
    if image_format is None or image_format not in limits.formats:
        raise _unsupported_format(head, limits, loc)
    if size is not None and size > limits.max_bytes:
        raise file_too_large(limits, loc)
    image_size = dimensions(head, image_format)
    if image_size is not None and image_size[0] * image_size[1] > limits.max_pixels:
        raise _too_many_pixels(image_size, limits, loc)


def file_too_large(limits: ImageLimits, loc: Loc) -> InputRefused:
    message = f"File size exceeds the maximum allowed size of {limits.max_bytes} bytes."
    return InputRefused("file_too_large", message, loc, {"max_size": limits.max_bytes})


def _unsupported_format(head: bytes, limits: ImageLimits, loc: Loc) -> InputRefused:
    names = [name for image_format in limits.formats for name in SUFFIXES[image_format]]
    message = (
        f"Unsupported image format: the bytes are {describe_bytes(head)}. "
        f"Supported formats are {', '.join(names)}."
    )
    return InputRefused("unsupported_image_format", message, loc, {"supported_formats": names})


def _too_many_pixels(size: Size, limits: ImageLimits, loc: Loc) -> InputRefused:
    width, height = size
    max_width, max_height = fit_to_pixels(size, limits.max_pixels)
    message = (
        f"Image dimensions are too large. At most {limits.max_pixels} pixels are allowed, "
        f"{max_width}x{max_height} for this aspect ratio."
    )
    ctx = {
        "max_width": max_width,
        "max_height": max_height,
        "max_pixels": limits.max_pixels,
        "width": width,
        "height": height,
    }
    return InputRefused("image_too_large", message, loc, ctx)


def fit_to_pixels(size: Size, max_pixels: int) -> Size:
    """Return the largest width and height of the same aspect ratio with at most `max_pixels`."""
    width, height = size
    max_height = max(1, isqrt(max_pixels * height // width))
    max_width = max(1, min(isqrt(max_pixels * width // height), max_pixels // max_height))
    return max_width, min(max_height, max_pixels // max_width)
