"""Content types from bytes: outputs of fal's models, and types that browsers would execute."""

import io
import struct
import wave
import zipfile

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, features

from falproxy.media.content_type import CONTENT_TYPES, OCTET_STREAM, sniff_content_type
from falproxy.media.image_format import SNIFF_BYTES

NEEDS_AVIF = pytest.mark.skipif(not features.check("avif"), reason="Pillow was built without AVIF")
JPEG_HEAD = b"\xff\xd8\xff\xe0\x00\x10JFIF\0"
SVG = b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>'


def encode_image(format: str) -> bytes:
    file = io.BytesIO()
    Image.radial_gradient("L").save(file, format)
    return file.getvalue()


def sound() -> bytes:
    file = io.BytesIO()
    with wave.open(file, "wb") as wav:
        wav.setnchannels(1)
        wav.setsampwidth(2)
        wav.setframerate(8000)
        wav.writeframes(bytes(1000))
    return file.getvalue()


def archive(**files: str) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as zipped:
        for name, text in files.items():
            zipped.writestr(name, text)
    return file.getvalue()


def box(major: bytes, *compatible: bytes) -> bytes:
    content = major + bytes(4) + b"".join(compatible)
    return struct.pack(">I4s", 8 + len(content), b"ftyp") + content + b"\0\0\0\x08free"


def ebml(doctype: bytes, *, is_long: bool = False) -> bytes:
    """Return the header that ffmpeg writes. Other programs write all lengths in eight bytes."""
    length = struct.pack(">Q", len(doctype) | 1 << 56) if is_long else bytes([0x80 | len(doctype)])
    content = b"B\x86\x81\x01B\xf7\x81\x01B\xf2\x81\x04B\xf3\x81\x08B\x82" + length + doctype
    return b"\x1aE\xdf\xa3" + struct.pack(">Q", len(content) | 1 << 56) + content + b"B\x87\x81\x04"


def ogg(packet: bytes) -> bytes:
    return struct.pack("<4sBBqIIIB", b"OggS", 0, 2, 0, 7, 0, 0, 1) + bytes([len(packet)]) + packet


def riff(kind: bytes) -> bytes:
    return b"RIFF" + struct.pack("<I", 1000) + kind + b"LIST"


WEIGHTS = b'{"__metadata__":{"format":"pt"}}'


@pytest.mark.parametrize(
    ("head", "extension", "content_type"),
    [
        pytest.param(encode_image("JPEG"), "jpg", "image/jpeg", id="JPEG"),
        pytest.param(encode_image("PNG"), "png", "image/png", id="PNG"),
        pytest.param(encode_image("WEBP"), "webp", "image/webp", id="WebP"),
        pytest.param(encode_image("GIF"), "gif", "image/gif", id="GIF"),
        pytest.param(box(b"avif", b"mif1"), "avif", "image/avif", id="AVIF"),
        pytest.param(box(b"heic", b"mif1"), "heic", "image/heic", id="HEIC"),
        pytest.param(box(b"isom", b"iso2", b"avc1"), "mp4", "video/mp4", id="MP4 of ffmpeg"),
        pytest.param(box(b"mp42", b"isom"), "mp4", "video/mp4", id="MP4, version 2"),
        pytest.param(box(b"iso6", b"dash"), "mp4", "video/mp4", id="MP4 in fragments"),
        pytest.param(box(b"qt  "), "mov", "video/quicktime", id="QuickTime"),
        pytest.param(box(b"M4A ", b"isom"), "m4a", "audio/mp4", id="sound in MP4"),
        pytest.param(ebml(b"webm"), "webm", "video/webm", id="WebM"),
        pytest.param(ebml(b"webm", is_long=True), "webm", "video/webm", id="WebM, long lengths"),
        pytest.param(ebml(b"matroska"), "mkv", "video/x-matroska", id="Matroska"),
        pytest.param(riff(b"AVI "), "avi", "video/x-msvideo", id="AVI"),
        pytest.param(ogg(b"\x80theora\x03\x02"), "ogv", "video/ogg", id="Theora"),
        pytest.param(ogg(b"OpusHead\x01"), "ogg", "audio/ogg", id="Opus"),
        pytest.param(ogg(b"\x01vorbis"), "ogg", "audio/ogg", id="Vorbis"),
        pytest.param(sound(), "wav", "audio/wav", id="WAV"),
        pytest.param(b"RF64\xff\xff\xff\xffWAVEds64", "wav", "audio/wav", id="WAV beyond 4 GB"),
        pytest.param(b"fLaC\0\0\0\x22", "flac", "audio/flac", id="FLAC"),
        pytest.param(b"ID3\x04\0\0\0\0\x02\x01", "mp3", "audio/mpeg", id="MP3 with a tag"),
        pytest.param(b"\xff\xfb\x90\x64\0", "mp3", "audio/mpeg", id="MP3 without a tag"),
        pytest.param(b"\xff\xf3\x48\xc4\0", "mp3", "audio/mpeg", id="MP3 at half the rate"),
        pytest.param(b"\xff\xf1\x50\x80\x02", "aac", "audio/aac", id="AAC"),
        pytest.param(b"glTF\x02\0\0\0\x10\0\0\0", "glb", "model/gltf-binary", id="glTF"),
        pytest.param(archive(a="1"), "zip", "application/zip", id="ZIP"),
        pytest.param(archive(), "zip", "application/zip", id="ZIP with nothing in it"),
        pytest.param(
            struct.pack("<Q", len(WEIGHTS)) + WEIGHTS,
            "safetensors",
            "application/octet-stream",
            id="trained weights",
        ),
    ],
)
def test_formats_are_recognized_by_their_bytes(
    head: bytes, extension: str, content_type: str
) -> None:
    assert sniff_content_type(head) == (extension, content_type)
    assert CONTENT_TYPES[extension] == content_type


@NEEDS_AVIF
def test_a_real_avif_is_recognized() -> None:
    assert sniff_content_type(encode_image("AVIF")).extension == "avif"


@pytest.mark.parametrize(
    "head",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(b"\0", id="a byte"),
        pytest.param(b"<!doctype html><script>alert(1)</script>", id="HTML"),
        pytest.param(b"\xef\xbb\xbf\n <html><body onload=alert(1)>", id="HTML after a BOM"),
        pytest.param("<html>".encode("utf-16"), id="HTML in UTF-16"),
        pytest.param(SVG, id="SVG"),
        pytest.param(b'<?xml version="1.0"?>' + SVG, id="SVG after a declaration"),
        pytest.param(b"<!-- \x89PNG\r\n\x1a\n -->" + SVG, id="SVG with an image's signature in it"),
        pytest.param(b'<?xml-stylesheet href="x.xsl"?><a/>', id="XML"),
        pytest.param(b"alert(1)//", id="JavaScript"),
        pytest.param(b"body{background:url(//evil)}", id="CSS"),
        pytest.param(b"%PDF-1.7\n", id="PDF"),
        pytest.param(b'{"images": []}', id="JSON"),
        pytest.param(b"plain words", id="text"),
        pytest.param(b"\0asm\x01\0\0\0", id="WebAssembly"),
        pytest.param(b"\x1f\x8b\x08\0", id="gzip, of unknown content"),
        pytest.param(b"CWS\x0a", id="Flash"),
        pytest.param(b"MZ\x90\0", id="a program for Windows"),
        pytest.param(b"\x7fELF\x02", id="a program for Linux"),
        pytest.param(box(b"evil", b"isom"), id="an unknown brand"),
        pytest.param(ebml(b"webx"), id="EBML of another kind"),
        pytest.param(ebml(b"webm")[:20], id="EBML that ends too early"),
        pytest.param(ogg(b"fishead\0"), id="Ogg of another kind"),
        pytest.param(riff(b"ACON"), id="RIFF of another kind"),
        pytest.param(b"\xff\xfb\xf0\0", id="MP3 with a bitrate that is none"),
    ],
)
def test_anything_else_is_bytes(head: bytes) -> None:
    assert sniff_content_type(head) == OCTET_STREAM == ("bin", "application/octet-stream")


@pytest.mark.parametrize(
    ("head", "extension"),
    [
        pytest.param(JPEG_HEAD + b"<html><script>alert(1)</script>", "jpg", id="JPEG and HTML"),
        pytest.param(b"GIF89a/*" + b"\0" * 9 + b"*/=1;alert(1)//", "gif", id="GIF and JavaScript"),
        pytest.param(encode_image("PNG") + archive(a="1"), "png", id="PNG and ZIP"),
        pytest.param(encode_image("PNG") + SVG, "png", id="PNG and SVG"),
        pytest.param(b"%PDF-1.4\n" + encode_image("JPEG"), "bin", id="PDF and JPEG"),
        pytest.param(SVG + encode_image("PNG"), "bin", id="SVG and PNG"),
    ],
)
def test_the_first_bytes_decide_for_polyglots(head: bytes, extension: str) -> None:
    assert sniff_content_type(head).extension == extension


def test_no_type_is_executed_by_browsers() -> None:
    kinds = {content_type.partition("/")[0] for content_type in CONTENT_TYPES.values()}
    assert kinds == {"image", "video", "audio", "model", "application"}
    assert not any(
        "xml" in each or "html" in each or "script" in each for each in CONTENT_TYPES.values()
    )


def test_an_extension_is_letters_and_digits_only() -> None:
    assert all(extension.isalnum() and extension.islower() for extension in CONTENT_TYPES)


MAGIC = st.sampled_from(
    [encode_image("PNG"), JPEG_HEAD, box(b"isom"), ebml(b"webm"), ogg(b"OpusHead"), riff(b"WAVE")]
)


@given(st.one_of(st.binary(max_size=300), st.builds(bytes.__add__, MAGIC, st.binary(max_size=50))))
def test_no_bytes_raise_an_exception(head: bytes) -> None:
    media = sniff_content_type(head)
    assert CONTENT_TYPES[media.extension] == media.content_type


@given(MAGIC, st.integers(0, 60))
def test_a_truncated_file_does_not_raise(head: bytes, end: int) -> None:
    assert sniff_content_type(head[:end]).extension in CONTENT_TYPES


def test_bytes_after_the_sniffed_ones_make_no_difference() -> None:
    head = encode_image("PNG") + bytes(SNIFF_BYTES)
    assert sniff_content_type(head) == sniff_content_type(head[:SNIFF_BYTES])
