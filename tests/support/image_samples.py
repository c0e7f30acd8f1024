"""Images of every format, and files that are no images."""

import io
import struct
from zlib import crc32

import pytest
from PIL import Image

from falproxy.fal.image_formats import Format

JPEG, PNG, WEBP, GIF, AVIF, HEIC = Format
WIDTH, HEIGHT = SIZE = (123, 45)


def encode_image(format: str, mode: str = "RGB", **options: object) -> bytes:
    file = io.BytesIO()
    drawn = Image.radial_gradient("L").resize(SIZE).convert(mode)
    drawn.save(file, format, **options)
    return file.getvalue()


def frames(format: str, mode: str) -> bytes:
    others = [Image.new(mode, SIZE, color) for color in ("red", "blue")]
    return encode_image(format, mode, save_all=True, append_images=others)


def exif(thumbnail: bytes) -> Image.Exif:
    known = Image.Exif()
    known[0x0112] = 6  # turned by a quarter
    known[0x927C] = thumbnail
    return known


BASELINE, PIXELS = encode_image("JPEG"), encode_image("PNG")


def jpeg_segment(code: int, content: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, code, len(content) + 2) + content


def jpeg_with(*segments: bytes) -> bytes:
    return BASELINE[:2] + b"".join(segments) + BASELINE[2:]


# Like a camera's: 90 kB of thumbnails, complete JPEGs with their own sizes, before the frame.
THUMBNAILS = [
    jpeg_segment(0xE1, b"Exif\0\0" + BASELINE * (60_000 // len(BASELINE))),
    jpeg_segment(0xE2, b"MPF\0" + BASELINE * (30_000 // len(BASELINE))),
]

IMAGES = [
    pytest.param(BASELINE, JPEG, id="jpeg, baseline"),
    pytest.param(encode_image("JPEG", progressive=True), JPEG, id="jpeg, progressive"),
    pytest.param(encode_image("JPEG", "L"), JPEG, id="jpeg, grey"),
    pytest.param(encode_image("JPEG", "CMYK"), JPEG, id="jpeg, CMYK"),
    pytest.param(encode_image("JPEG", exif=exif(BASELINE * 20)), JPEG, id="jpeg, turned by EXIF"),
    pytest.param(jpeg_with(*THUMBNAILS), JPEG, id="jpeg, thumbnails of 90 kB"),
    pytest.param(jpeg_with(b"\xff" * 50), JPEG, id="jpeg, fill bytes"),
    pytest.param(jpeg_with(b"\xff\x01\xff\xd3"), JPEG, id="jpeg, markers that stand alone"),
    pytest.param(
        jpeg_with(jpeg_segment(0xE1, b"") + b"\0\1\xff\0"),
        JPEG,
        id="jpeg, garbage that decoders skip",
    ),
    pytest.param(
        jpeg_with(jpeg_segment(0xC4, b"\0" * 17), jpeg_segment(0xCC, b"\0\0")),
        JPEG,
        id="jpeg, tables numbered like frames",
    ),
    pytest.param(BASELINE + b"PK\3\4 and an archive", JPEG, id="jpeg, then a ZIP"),
    pytest.param(PIXELS, PNG, id="png"),
    pytest.param(encode_image("PNG", "RGBA"), PNG, id="png, alpha"),
    pytest.param(encode_image("PNG", "1"), PNG, id="png, 1 bit"),
    pytest.param(frames("PNG", "RGB"), PNG, id="png, animated"),
    pytest.param(PIXELS + b"<html><script>alert(1)</script>", PNG, id="png, then HTML"),
    pytest.param(encode_image("WEBP"), WEBP, id="webp, lossy"),
    pytest.param(encode_image("WEBP", lossless=True), WEBP, id="webp, lossless"),
    pytest.param(encode_image("WEBP", "RGBA", exif=exif(b"x")), WEBP, id="webp, extended"),
    pytest.param(frames("WEBP", "RGBA"), WEBP, id="webp, animated"),
    pytest.param(encode_image("GIF", "P"), GIF, id="gif"),
    pytest.param(encode_image("GIF", "P", comment=b"x" * 700), GIF, id="gif, comment"),
    pytest.param(frames("GIF", "P"), GIF, id="gif, animated"),
]


def box(kind: bytes, content: bytes = b"", size: int | None = None) -> bytes:
    return struct.pack(">I", 8 + len(content) if size is None else size) + kind + content


def ftyp(major: bytes, *others: bytes) -> bytes:
    return box(b"ftyp", major + b"\0\0\0\0" + b"".join(others))


def png_header(width: int, height: int, depth: int = 8) -> bytes:
    ihdr = b"IHDR" + struct.pack(">IIBBBBB", width, height, depth, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + ihdr + struct.pack(">I", crc32(ihdr))


SVG = b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>'
ENTITY_BOMB = b'<?xml version="1.0"?><!DOCTYPE svg [<!ENTITY a "' + b"a" * 2000 + b'">]><svg/>'

NON_IMAGES = [
    pytest.param(b"", "missing", id="nothing"),
    pytest.param(b"\xff", "no known image format", id="1 byte of a jpeg"),
    pytest.param(b"\x89PNG\r\n\x1a", "no known image format", id="7 bytes of a png"),
    pytest.param(b"\0" * 99, "no known image format", id="zeros"),
    pytest.param(b"RIFF\0\0\0\0WAVE", "no known image format", id="a sound"),
    pytest.param(SVG, "an SVG drawing", id="svg with a script"),
    pytest.param(b"<?xml version='1.0'?>\n" + SVG, "an SVG drawing", id="svg after xml"),
    pytest.param(b"\xef\xbb\xbf \n" + SVG, "an SVG drawing", id="svg after a byte order mark"),
    pytest.param(ENTITY_BOMB, "an SVG drawing", id="svg, entity bomb"),
    pytest.param(b"<!DOCTYPE html><p>404", "an HTML page", id="html"),
    pytest.param(b"\n<HTML><body>" + PIXELS, "an HTML page", id="html, then a png"),
    pytest.param(b"%PDF-1.7\n" + BASELINE, "a PDF document", id="pdf, then a jpeg"),
    pytest.param(encode_image("BMP"), "a BMP image", id="bmp"),
    pytest.param(encode_image("TIFF"), "a TIFF image", id="tiff"),
    pytest.param(b"MM\0*\0\0\0\x08", "a TIFF image", id="tiff, big-endian"),
    pytest.param(b"\xff\x0a\xfa\x7f", "a JPEG XL image", id="jpeg xl"),
    pytest.param(b"\0\0\0\x0cJXL \r\n\x87\n", "a JPEG XL image", id="jpeg xl in boxes"),
    pytest.param(encode_image("JPEG2000"), "a JPEG 2000 image", id="jpeg 2000"),
    pytest.param(encode_image("ICO"), "an icon", id="ico"),
    pytest.param(b"PK\3\4" + BASELINE, "a ZIP archive", id="zip, then a jpeg"),
    pytest.param(b"\x1f\x8b\x08" + PIXELS, "compressed with gzip", id="gzip"),
    pytest.param(ftyp(b"isom", b"mp42"), "a video", id="video"),
    pytest.param(b"GIF88a=1;alert(1)", "text", id="script that begins like a gif"),
    pytest.param(b" " + PIXELS, "no known image format", id="a space before a png"),
    pytest.param(b'{"error": "no such image"}', "text", id="json"),
    pytest.param("päivää".encode() * 300, "text", id="text, cut within a letter"),
    pytest.param(b"iVBORw0KGgo=", "text", id="base64 that was not decoded"),
    pytest.param(b"\xe9\xff text", "no known image format", id="bytes that are no text"),
]
