"""Image formats and dimensions from the first bytes of a file.

Nothing is decoded, and no input raises an exception: every loop moves forward and ends with the
bytes.
"""

import re
from codecs import getincrementaldecoder
from collections.abc import Callable, Iterator, Mapping
from itertools import chain, islice

from falproxy.fal.image_formats import Format

# Bytes at the start of a file that are inspected. Cameras put thumbnails and profiles of 100 kB and
# more before the dimensions of a JPEG.
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
# Brands for any codec: another brand of the same file names it.
GENERAL_BRANDS = (b"mif1", b"msf1")
BRANDS_MAX = 64
# Segments, blocks or boxes that are visited: no image has so many before its dimensions.
STEPS_MAX = 1000
# Paths of boxes with dimensions: of an image, and of a track of an animation.
IMAGE_BOX_PATH = (b"meta", b"iprp", b"ipco", b"ispe")
TRACK_BOX_PATH = (b"moov", b"trak", b"tkhd")
FULL_BOXES = (b"meta", b"ispe", b"tkhd")  # their content begins with a version and flags

GIF_BLOCK = re.compile(rb"[!,;]")  # an extension, a frame, the end; decoders skip all else
JPEG_MARKER = re.compile(rb"\xff[^\xff\x00]")  # bytes before it are padding or skipped garbage
JPEG_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # without DHT, JPG and DAC
# TEM, RSTn, SOI, EOI: no length follows. libjpeg reads on after an EOI, which may end tables only.
JPEG_STANDALONE = frozenset((0x01, *range(0xD0, 0xDA)))
JPEG_START_OF_SCAN = 0xDA  # the dimensions precede the first one

WHITESPACE = b" \t\n\r\f\v"
TEXT_SNIFF_BYTES = 1024
UTF8 = getincrementaldecoder("utf-8")
CONTROL_CHARACTERS = re.compile(rb"[\x00-\x08\x0e-\x1a\x1c-\x1f\x7f]")
MARKUP = re.compile(rb"<(?:!doctype\s+)?(html|head|body|script|svg)\b", re.IGNORECASE)
# Formats that are sent in place of images, as a phrase after "the bytes are".
OTHER_SIGNATURES = (
    (re.compile(rb"%PDF-"), "a PDF document"),
    (re.compile(rb"BM.{4}\0\0\0\0", re.DOTALL), "a BMP image"),
    (re.compile(rb"II[*+]\0|MM\0[*+]"), "a TIFF image"),
    (re.compile(rb"\xff\x0a|\0\0\0\x0cJXL "), "a JPEG XL image"),
    (re.compile(rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51"), "a JPEG 2000 image"),
    (re.compile(rb"\x00\x00\x01\x00"), "an icon"),
    (re.compile(rb"8BPS"), "a Photoshop document"),
    (re.compile(rb"PK\x03\x04|PK\x05\x06"), "a ZIP archive"),
    (re.compile(rb"\x1f\x8b"), "compressed with gzip"),
    (re.compile(rb"....ftyp|\x1aE\xdf\xa3|RIFF....AVI ", re.DOTALL), "a video"),
)


def sniff(head: bytes) -> Format | None:
    """Return the image format of a file by its first bytes, or None."""
    for signature, image_format in SIGNATURES:
        if signature.match(head):
            return image_format
    brands = list(_brands(head))
    for brand in brands:
        if brand in BRANDS:
            return BRANDS[brand]
    return Format.HEIC if any(brand in GENERAL_BRANDS for brand in brands) else None


def describe_bytes(head: bytes) -> str:
    """Describe a file by its first bytes, for users. The text quotes none of the bytes."""
    if image_format := sniff(head):
        return f"a {image_format.upper()} image"
    for signature, description in OTHER_SIGNATURES:
        if signature.match(head):
            return description
    text = head[:TEXT_SNIFF_BYTES].removeprefix(b"\xef\xbb\xbf").lstrip(WHITESPACE)
    if text.startswith(b"<") and (tag := MARKUP.search(text)):
        return "an SVG drawing" if tag[1].lower() == b"svg" else "an HTML page"
    if text and not CONTROL_CHARACTERS.search(text) and _is_utf8(text):
        return "text"
    return "no known image format" if head else "missing"


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
            # Decoders accept a length that does not include its own two bytes.
            at += max(2, _big_endian(head, at, 2))
    return None


def _png_size(head: bytes) -> Size | None:
    if head[12:16] != b"IHDR" or len(head) < 24:
        return None
    return _big_endian(head, 16, 4), _big_endian(head, 20, 4)


def _gif_size(head: bytes) -> Size | None:
    """Return the size of the logical screen, enlarged if the first frame exceeds it, as decoders
    do."""
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
    """Return the size in the first chunk (RFC 9649): a canvas, a lossless or a lossy image."""
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
    """Return the size of the largest image or track. The others are tiles, thumbnails and alpha
    channels."""
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
    """Return the start and end of the contents of all boxes with a path."""
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
    """Iterate over the boxes between two offsets, as (type, start, end) of the contents. The last
    one is cut at the end."""
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
    """Iterate over the major brand and, after the version, the compatible brands."""
    for kind, start, end in _boxes(head, 0, len(head)):
        if kind == b"ftyp" and end - start >= 8:
            yield head[start : start + 4]
            for at in range(start + 8, min(end - 3, start + 4 * BRANDS_MAX), 4):
                yield head[at : at + 4]
        return


def _is_utf8(text: bytes) -> bool:
    """Return whether text is valid UTF-8, apart from a truncated character at the end."""
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
    """Return the width and height in a file's header, before any rotation, or None if the first
    bytes do not contain them."""
    size = SIZE_READERS[image_format](head)
    return size if size is not None and all(size) else None
