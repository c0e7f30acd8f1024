"""Image inputs: where a call names pictures, the bytes of data URIs, and what is refused."""

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

DECODE_CHUNK, DECODE_CHUNK_MIN = (
    2**18,
    2**10,
)  # characters of a text that are decoded at once, and the fewest
BASE64_FLAG = b";base64"
BASE64_ALPHABET = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
URL_SAFE_TO_STANDARD = bytes.maketrans(b"-_", b"+/")

ERROR_DOCS_URL = "https://docs.fal.ai/errors/#"
# As fal names them in `supported_formats`.
SUFFIXES: Mapping[Format, tuple[str, ...]] = {
    Format.JPEG: (".jpg", ".jpeg"),
    Format.PNG: (".png",),
    Format.WEBP: (".webp",),
    Format.GIF: (".gif",),
    Format.AVIF: (".avif",),
    Format.HEIC: (".heic",),
}


class InputKind(StrEnum):
    """What an image input's text is: the picture itself, a URL that it is read from, or what
    only fal can tell."""

    DATA = "data"
    REMOTE = "remote"
    OTHER = "other"


# A browser skips white space before a scheme, fal's own readers do not: with it, it is no scheme.
SCHEMES = (("data:", InputKind.DATA), ("http://", InputKind.REMOTE), ("https://", InputKind.REMOTE))


@dataclass(frozen=True, slots=True)
class ImageInput:
    """A place in a call's input that names a picture. loc: the keys that lead there."""

    loc: Loc
    value: str | LongString


@dataclass(frozen=True, slots=True)
class ImageLimits:
    """Which pictures are let through. max_pixels: width times height."""

    formats: tuple[Format, ...] = FAL_FORMATS
    max_bytes: int = 100 * 2**20
    max_pixels: int = 50_000_000

    def intersection(self, other: "ImageLimits | None") -> "ImageLimits":
        """What both let through."""
        if other is None:
            return self
        return ImageLimits(
            tuple(known for known in self.formats if known in other.formats),
            min(self.max_bytes, other.max_bytes),
            min(self.max_pixels, other.max_pixels),
        )


class InputRefused(ProxyError):
    """A refused input, in fal's own words: 422 with an entry for the place in the input.

    code: fal's error type. ctx: what programs may read of it. detail: fal's form of all this.
    """

    def __init__(
        self, code: str, message: str, loc: Loc, ctx: Mapping[str, object] | None = None
    ) -> None:
        super().__init__(422, code, message)
        entry: dict[str, object] = {"loc": ["body", *loc], "msg": message, "type": code}
        self.detail = [
            {**entry, "url": ERROR_DOCS_URL + code, **({"ctx": dict(ctx)} if ctx else {})}
        ]


def image_load_error(message: str, loc: Loc) -> InputRefused:
    """The refusal of a picture that cannot be read. message: the sentence that says why."""
    return InputRefused("image_load_error", message, loc)


def find_images(tree: object) -> list[ImageInput]:
    """The image inputs of a call's JSON, in its order. Without those that are empty: they name
    no picture, and fal says what is missing."""
    found: list[ImageInput] = []
    # Nodes to go through, and whether the last key on the way there says that a picture follows.
    rest: list[tuple[object, Loc, bool]] = [(tree, (), False)]
    while rest:
        node, loc, is_named = rest.pop()
        if isinstance(node, str | LongString):
            if is_named and not is_empty(node):
                found.append(ImageInput(loc, node))
        elif len(loc) == DEPTH_MAX:
            continue
        elif isinstance(node, dict):
            rest += [
                (child, (*loc, key), is_image_key(key) or (is_named and key == "url"))
                for key, child in reversed(node.items())
            ]
        elif isinstance(node, list):
            rest += [(node[index], (*loc, index), is_named) for index in reversed(range(len(node)))]
    return found


def is_empty(value: str | LongString) -> bool:
    """Whether an input is `""` or a data URI of nothing, such as `data:,`."""
    if not isinstance(value, str):  # it is long
        return False
    if input_kind(value) is not InputKind.DATA:
        return not value
    pieces = decode_data_uri(value)
    return next(pieces, None) is None and pieces.is_complete


def input_kind(value: str | LongString) -> InputKind:
    start = (value if isinstance(value, str) else value.prefix)[:8].lower()
    return next((known for scheme, known in SCHEMES if start.startswith(scheme)), InputKind.OTHER)


def leading_bytes(value: str | LongString, count: int) -> bytes:
    """The first bytes of a data URI; no more is decoded than it takes."""
    found = bytearray()
    pieces = DataUriDecoder(value, max(DECODE_CHUNK_MIN, min(DECODE_CHUNK, 2 * count)))
    for piece in pieces:
        found += piece
        if len(found) >= count:
            break
    pieces.close()
    return bytes(found[:count])


class DataUriDecoder(Iterator[bytes]):
    """The bytes of a data URI (RFC 2397) in pieces, the same for every spelling of them: base64
    of either alphabet, padded or not, with white space and %-escapes.

    is_whole: at the end, whether all was read. What follows a character that is no base64 was
    not, so two unequal texts may have equal bytes: such bytes do not stand for their text.
    is_plain: whether every reader gets the same bytes. Many drop the letters of the other alphabet
    and the signs of escapes, and get another picture.
    """

    def __init__(self, value: str | LongString, chunk_size: int = DECODE_CHUNK) -> None:
        self.is_complete = False
        self.is_canonical = True
        self._generator = self._decode(_text_chunks(value, chunk_size))
        self._chunks = filter(None, self._generator)

    def __next__(self) -> bytes:
        return next(self._chunks)

    def close(self) -> None:
        """Lets go of the text, for whoever stops before its end. They refer to each other, and a
        held body would stay on the disk until the garbage collector comes."""
        self._generator.close()

    def _decode(self, chunks: Iterator[bytes]) -> Generator[bytes]:
        flag = b""
        for piece in chunks:
            header, comma, payload = piece.partition(b",")
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
        for piece in chunks:
            self.is_canonical &= not any(sign in piece for sign in (b"-", b"_", b"%"))
            yield piece

    def _decode_base64(self, chunks: Iterator[bytes]) -> Iterator[bytes]:
        rest, is_whole = b"", True
        for piece in chunks:
            text = rest + piece.translate(URL_SAFE_TO_STANDARD, WHITESPACE)
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
        self.is_complete = is_whole and len(rest) != 1  # a single letter is no byte


def decode_data_uri(value: str | LongString) -> DataUriDecoder:
    """All bytes of a data URI, in pieces of at most 1 MiB. None when it has no comma."""
    return DataUriDecoder(value)


def _text_chunks(value: str | LongString, chunk_size: int) -> Iterator[bytes]:
    if not isinstance(value, str):
        yield from value.chunks(chunk_size)
        return
    for start in range(0, len(value), chunk_size):
        yield value[start : start + chunk_size].encode(errors="surrogatepass")


def _unescape(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """Percent-decoded, with the escapes that a piece's end cuts put together."""
    rest = b""
    for piece in chunks:
        text = rest + piece
        cut = text.rfind(b"%", max(0, len(text) - 2))
        text, rest = (text, b"") if cut < 0 else (text[:cut], text[cut:])
        yield unquote_to_bytes(text)
    yield rest


def _is_padding(text: bytes) -> bool:
    return not text.translate(None, WHITESPACE + b"=")


def check_image(head: bytes, size: int | None, limits: ImageLimits, loc: Loc) -> None:
    """Lets a picture pass by its first bytes. size: of all of it, None when that is not known.

    Raises: InputRefused.
    """
    known = sniff(head)
    if known is None or known not in limits.formats:
        raise _unsupported_format(head, limits, loc)
    if size is not None and size > limits.max_bytes:
        raise file_too_large(limits, loc)
    shape = dimensions(head, known)
    if shape is not None and shape[0] * shape[1] > limits.max_pixels:
        raise _too_many_pixels(shape, limits, loc)


def file_too_large(limits: ImageLimits, loc: Loc) -> InputRefused:
    """The refusal of a file with too many bytes, also for whom stops reading at the limit."""
    message = f"File size exceeds the maximum allowed size of {limits.max_bytes} bytes."
    return InputRefused("file_too_large", message, loc, {"max_size": limits.max_bytes})


def _unsupported_format(head: bytes, limits: ImageLimits, loc: Loc) -> InputRefused:
    names = [name for known in limits.formats for name in SUFFIXES[known]]
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
    """The largest width and height of the same aspect ratio that have at most so many pixels."""
    width, height = size
    max_height = max(1, isqrt(max_pixels * height // width))
    max_width = max(1, min(isqrt(max_pixels * width // height), max_pixels // max_height))
    return max_width, min(max_height, max_pixels // max_width)
