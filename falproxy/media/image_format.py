"""What a picture is by its bytes: its format and its size, read from the first of them.

Nothing is decoded, and no input raises: every walk only goes forward, and ends with the bytes.
"""

import re
from codecs import getincrementaldecoder
from collections.abc import Callable, Iterator, Mapping
from itertools import chain, islice

from falproxy.fal.image_formats import Format

# How many of a file's first bytes are looked at. Cameras put thumbnails and profiles of 100 kB
# and more before a JPEG's size.
SNIFF_BYTES = 256 * 2**10
Size = tuple[int, int]


SIGNATURES = (
    (re.compile(rb"\xff\xd8\xff"), Format.JPEG),
    (re.compile(rb"\x89PNG\r\n\x1a\n"), Format.PNG),
    (re.compile(rb"GIF8[79]a"), Format.GIF),
    (re.compile(rb"RIFF....WEBP", re.DOTALL), Format.WEBP),
)
# Brands of ISO 14496-12 files: ISO 23008-12 annex B (HEIF), and the AVIF specification, section 6.
BRANDS = {
    **dict.fromkeys((b"avif", b"avis"), Format.AVIF),
    **dict.fromkeys((b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx"), Format.HEIC),
}
# Any codec's: another brand of the same file says which.
GENERAL_BRANDS = (b"mif1", b"msf1")
BRANDS_MAX = 64
# Segments, blocks or boxes that are gone through: no picture has so many before its size.
STEPS_MAX = 1000
# Where boxes of sizes are found: an image's, and that of a track of an animation.
IMAGE_BOX_PATH = (b"meta", b"iprp", b"ipco", b"ispe")
TRACK_BOX_PATH = (b"moov", b"trak", b"tkhd")
FULL_BOXES = (b"meta", b"ispe", b"tkhd")  # which begin with a version and flags

GIF_BLOCK = re.compile(rb"[!,;]")  # an extension, a frame, the end; decoders skip all else
JPEG_MARKER = re.compile(rb"\xff[^\xff\x00]")  # what precedes it is fill, or garbage that all skip
JPEG_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # without DHT, JPG and DAC
# TEM, RSTn, SOI, EOI: no length follows. After an EOI, libjpeg reads on: it may have ended tables.
JPEG_STANDALONE = frozenset((0x01, *range(0xD0, 0xDA)))
JPEG_START_OF_SCAN = 0xDA  # the size comes before the first

WHITESPACE = b" \t\n\r\f\v"
TEXT_SNIFF_BYTES = 1024
UTF8 = getincrementaldecoder("utf-8")
CONTROL_CHARACTERS = re.compile(rb"[\x00-\x08\x0e-\x1a\x1c-\x1f\x7f]")
MARKUP = re.compile(rb"<(?:!doctype\s+)?(html|head|body|script|svg)\b", re.IGNORECASE)
# What is sent instead of pictures, in words that follow "the bytes are".
OTHER_SIGNATURES = (
    (re.compile(rb"%PDF-"), "a PDF document"),
    (re.compile(rb"BM.{4}\0\0\0\0", re.DOTALL), "a BMP picture"),
    (re.compile(rb"II[*+]\0|MM\0[*+]"), "a TIFF picture"),
    (re.compile(rb"\xff\x0a|\0\0\0\x0cJXL "), "a JPEG XL picture"),
    (re.compile(rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51"), "a JPEG 2000 picture"),
    (re.compile(rb"\x00\x00\x01\x00"), "an icon"),
    (re.compile(rb"8BPS"), "a Photoshop document"),
    (re.compile(rb"PK\x03\x04|PK\x05\x06"), "a ZIP archive"),
    (re.compile(rb"\x1f\x8b"), "compressed with gzip"),
    (re.compile(rb"....ftyp|\x1aE\xdf\xa3|RIFF....AVI ", re.DOTALL), "a video"),
)


def sniff(head: bytes) -> Format | None:
    """The format that a file's first bytes are of. None: none that is known."""
    for signature, known in SIGNATURES:
        if signature.match(head):
            return known
    brands = list(_brands(head))
    for brand in brands:
        if brand in BRANDS:
            return BRANDS[brand]
    return Format.HEIC if any(brand in GENERAL_BRANDS for brand in brands) else None


def describe_bytes(head: bytes) -> str:
    """What a file's first bytes are, in words for a person; nothing of them is repeated."""
    if known := sniff(head):
        return f"a {known.upper()} picture"
    for signature, words in OTHER_SIGNATURES:
        if signature.match(head):
            return words
    text = head[:TEXT_SNIFF_BYTES].removeprefix(b"\xef\xbb\xbf").lstrip(WHITESPACE)
    if text.startswith(b"<") and (tag := MARKUP.search(text)):
        return "an SVG drawing" if tag[1].lower() == b"svg" else "an HTML page"
    if text and not CONTROL_CHARACTERS.search(text) and _is_utf8(text):
        return "text"
    return "no picture that is known here" if head else "missing"


def _jpeg_size(head: bytes) -> Size | None:
    at = 2
    for _ in range(STEPS_MAX):
        if (marker := JPEG_MARKER.search(head, at)) is None:
            return None
        at, code = marker.end(), marker[0][1]
        if code == JPEG_START_OF_SCAN:
            return None
        if code in JPEG_FRAMES and len(head) >= at + 7:
            return _big_endian(head, at + 5, 2), _big_endian(head, at + 3, 2)
        if code not in JPEG_STANDALONE:
            at += max(
                2, _big_endian(head, at, 2)
            )  # decoders forgive a length that leaves itself out
    return None


def _png_size(head: bytes) -> Size | None:
    if head[12:16] != b"IHDR" or len(head) < 24:
        return None
    return _big_endian(head, 16, 4), _big_endian(head, 20, 4)


def _gif_size(head: bytes) -> Size | None:
    """The screen, or more where the first frame reaches beyond it, as decoders give it room."""
    if len(head) < 13:
        return None
    width, height = _little_endian(head, 6, 2), _little_endian(head, 8, 2)
    at = _skip_color_table(head, 13, head[10])
    block = GIF_BLOCK.search(head, at)
    for _ in range(STEPS_MAX):
        if block is None or block[0] != b"!":
            break
        block = GIF_BLOCK.search(head, _skip_sub_blocks(head, block.end() + 1))
    if block and block[0] == b"," and len(head) >= block.end() + 8:
        left, top, across, down = (
            _little_endian(head, block.end() + step, 2) for step in (0, 2, 4, 6)
        )
        width, height = max(width, left + across), max(height, top + down)
    return width, height


def _skip_color_table(head: bytes, offset: int, flags: int) -> int:
    return offset + 3 * 2 ** ((flags & 7) + 1) if flags & 0x80 else offset


def _skip_sub_blocks(head: bytes, offset: int) -> int:
    for _ in range(STEPS_MAX):
        if offset >= len(head) or not head[offset]:
            return offset + 1
        offset += 1 + head[offset]
    return len(head)


def _webp_size(head: bytes) -> Size | None:
    """From the first chunk (RFC 9649): of a canvas, a lossless or a lossy picture."""
    chunk = head[12:16]
    if chunk == b"VP8L" and len(head) >= 25 and head[20] == 0x2F:
        bits = _little_endian(head, 21, 4)
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if len(head) < 30:
        return None
    if chunk == b"VP8X":
        return _little_endian(head, 24, 3) + 1, _little_endian(head, 27, 3) + 1
    if chunk == b"VP8 " and head[23:26] == b"\x9d\x01\x2a":
        return _little_endian(head, 26, 2) & 0x3FFF, _little_endian(head, 28, 2) & 0x3FFF
    return None


def _bmff_size(head: bytes) -> Size | None:
    """The largest of a file's images and tracks: others are its tiles, thumbnails and alpha."""
    sizes = [
        (_big_endian(head, start, 4), _big_endian(head, start + 4, 4))
        for start, end in _box_contents(head, IMAGE_BOX_PATH)
        if end - start >= 8
    ]
    for start, end in _box_contents(head, TRACK_BOX_PATH):
        at = start + (72 if head[start - 4] == 0 else 84)  # version 1 has longer times
        if end - at >= 8:
            sizes.append((_big_endian(head, at, 2), _big_endian(head, at + 4, 2)))  # of 16.16 bits
    return max(sizes, key=lambda size: size[0] * size[1], default=None)


def _box_contents(head: bytes, path: tuple[bytes, ...]) -> list[tuple[int, int]]:
    """Where the contents of all boxes with this path start and end."""
    spans = [(0, len(head))]
    for name in path:
        skipped = 4 if name in FULL_BOXES else 0
        boxes = chain.from_iterable(_boxes(head, *span) for span in spans)
        spans = [
            (start + skipped, end)
            for kind, start, end in islice(boxes, STEPS_MAX)
            if kind == name and start + skipped <= end
        ]
    return spans


def _boxes(head: bytes, start: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """The boxes of a span as (type, start and end of the content), cut where the span ends."""
    while start + 8 <= end:
        size, kind, header = _big_endian(head, start, 4), head[start + 4 : start + 8], 8
        if size == 1:
            size, header = _big_endian(head, start + 8, 8), 16
        elif size == 0:
            size = end - start
        if size < header or start + header > end:
            return
        yield kind, start + header, min(start + size, end)
        start += size


def _brands(head: bytes) -> Iterator[bytes]:
    """The major brand and then the compatible ones. Between them stands a version."""
    for kind, start, end in _boxes(head, 0, len(head)):
        if kind == b"ftyp" and end - start >= 8:
            yield head[start : start + 4]
            for at in range(start + 8, min(end - 3, start + 4 * BRANDS_MAX), 4):
                yield head[at : at + 4]
        return


def _is_utf8(text: bytes) -> bool:
    """Whether it may be: the end can be cut within a character."""
    try:
        UTF8().decode(text)
    except UnicodeDecodeError:
        return False
    return True


def _big_endian(head: bytes, offset: int, count: int) -> int:
    return int.from_bytes(head[offset : offset + count], "big")


def _little_endian(head: bytes, offset: int, count: int) -> int:
    return int.from_bytes(head[offset : offset + count], "little")


SIZE_READERS: Mapping[Format, Callable[[bytes], Size | None]] = {
    Format.JPEG: _jpeg_size,
    Format.PNG: _png_size,
    Format.WEBP: _webp_size,
    Format.GIF: _gif_size,
    Format.AVIF: _bmff_size,
    Format.HEIC: _bmff_size,
}


def dimensions(head: bytes, image_format: Format) -> Size | None:
    """Width and height as a file's header says, before any rotation. None: the head does not
    show them, which says nothing about the rest."""
    size = SIZE_READERS[image_format](head)
    return size if size is not None and all(size) else None
