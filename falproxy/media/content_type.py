"""Content types from the first bytes of a file, regardless of its name and declared type.

Formats that browsers could execute (HTML, SVG, PDF, any text) and unknown formats are all
`application/octet-stream`, so that browsers save them instead of showing them.
"""

import re
from collections.abc import Mapping
from typing import NamedTuple

from falproxy.fal.image_formats import Format
from falproxy.media.image_format import SNIFF_BYTES, sniff


class MediaType(NamedTuple):
    """A content type and its file extension: lower case, without the dot."""

    extension: str
    content_type: str


OCTET_STREAM = MediaType("bin", "application/octet-stream")
IMAGE_TYPES: Mapping[Format, MediaType] = {
    Format.JPEG: MediaType("jpg", "image/jpeg"),
    Format.PNG: MediaType("png", "image/png"),
    Format.WEBP: MediaType("webp", "image/webp"),
    Format.GIF: MediaType("gif", "image/gif"),
    Format.AVIF: MediaType("avif", "image/avif"),
    Format.HEIC: MediaType("heic", "image/heic"),
}
MP4 = MediaType("mp4", "video/mp4")
MP3 = MediaType("mp3", "audio/mpeg")
OGG = MediaType("ogg", "audio/ogg")
# Major brands of ISO 14496-12 files, as registered at mp4ra.org.
BRANDS: Mapping[bytes, MediaType] = {
    b"qt  ": MediaType("mov", "video/quicktime"),
    **dict.fromkeys((b"M4A ", b"M4B "), MediaType("m4a", "audio/mp4")),
    **dict.fromkeys((b"mp41", b"mp42", b"avc1", b"hvc1", b"M4V ", b"MSNV", b"dash", b"cmfc"), MP4),
    **dict.fromkeys((b"isom", *(b"iso%d" % version for version in range(2, 10))), MP4),
}
FTYP = re.compile(rb"....ftyp(....)", re.DOTALL)
# The first packet of an Ogg file begins after a header of 28 bytes (RFC 3533) and names the codec.
SIGNATURES = (
    # An EBML head names its DocType (0x4282), with its length in one byte or in eight.
    (rb"\x1aE\xdf\xa3.{1,64}?B\x82(\x84|\x01\0{6}\x04)webm", MediaType("webm", "video/webm")),
    (
        rb"\x1aE\xdf\xa3.{1,64}?B\x82(\x88|\x01\0{6}\x08)matroska",
        MediaType("mkv", "video/x-matroska"),
    ),
    (rb"RIFF....AVI ", MediaType("avi", "video/x-msvideo")),
    (rb"OggS\0.{23}\x80theora", MediaType("ogv", "video/ogg")),
    (rb"OggS\0.{23}(OpusHead|\x01vorbis|\x7fFLAC|Speex   )", OGG),
    (rb"(RIFF|RF64)....WAVE", MediaType("wav", "audio/wav")),
    (rb"fLaC", MediaType("flac", "audio/flac")),
    (rb"ID3[\x02-\x04]", MP3),
    # Files without a tag begin with a frame: MPEG audio of layer III, where no bitrate is 0 or 15
    # (ISO 11172-3), and AAC in ADTS (ISO 13818-7).
    (rb"\xff[\xe2\xe3\xf2\xf3\xfa\xfb][\x10-\xef]", MP3),
    (rb"\xff[\xf0\xf1\xf8\xf9]", MediaType("aac", "audio/aac")),
    (rb"glTF[\x01\x02]\0\0\0", MediaType("glb", "model/gltf-binary")),
    (rb"PK\x03\x04|PK\x05\x06", MediaType("zip", "application/zip")),
    # Trained weights: the length of a JSON header in eight bytes, of which the last four are zero.
    (rb'.{4}\0{4}\{"', MediaType("safetensors", OCTET_STREAM.content_type)),
)
COMPILED_SIGNATURES = tuple(
    (re.compile(pattern, re.DOTALL), media) for pattern, media in SIGNATURES
)
# Every extension that `sniff_content_type` returns, and its type.
CONTENT_TYPES: Mapping[str, str] = dict(
    (OCTET_STREAM, *IMAGE_TYPES.values(), *BRANDS.values(), *(media for _, media in SIGNATURES))
)


def sniff_content_type(head: bytes) -> MediaType:
    """Return the type of a file by its first bytes; only SNIFF_BYTES of them are used."""
    head = head[:SNIFF_BYTES]
    if image_format := sniff(head):
        return IMAGE_TYPES[image_format]
    if box := FTYP.match(head):
        return BRANDS.get(box[1], OCTET_STREAM)
    for signature, media in COMPILED_SIGNATURES:
        if signature.match(head):
            return media
    return OCTET_STREAM
