"""What a file is by its first bytes, whatever its name or its sender says.

What a browser could run (HTML, SVG, PDF, text of any kind) is not told apart from what nobody
knows: both are bytes, so that they are saved and not shown.
"""

import re
from collections.abc import Mapping
from typing import NamedTuple

from falproxy.fal.image_formats import Format
from falproxy.media.image_format import HEAD, sniff


class Media(NamedTuple):
    """extension: without a dot, in lower case; each has one type."""

    extension: str
    content_type: str


BYTES = Media("bin", "application/octet-stream")
PICTURES: Mapping[Format, Media] = {
    Format.JPEG: Media("jpg", "image/jpeg"),
    Format.PNG: Media("png", "image/png"),
    Format.WEBP: Media("webp", "image/webp"),
    Format.GIF: Media("gif", "image/gif"),
    Format.AVIF: Media("avif", "image/avif"),
    Format.HEIC: Media("heic", "image/heic"),
}
MP4 = Media("mp4", "video/mp4")
MP3 = Media("mp3", "audio/mpeg")
OGG = Media("ogg", "audio/ogg")
# Major brands of ISO 14496-12 files, as registered at mp4ra.org.
BRANDS: Mapping[bytes, Media] = {
    b"qt  ": Media("mov", "video/quicktime"),
    **dict.fromkeys((b"M4A ", b"M4B "), Media("m4a", "audio/mp4")),
    **dict.fromkeys((b"mp41", b"mp42", b"avc1", b"hvc1", b"M4V ", b"MSNV", b"dash", b"cmfc"), MP4),
    **dict.fromkeys((b"isom", *(b"iso%d" % version for version in range(2, 10))), MP4),
}
FTYP = re.compile(rb"....ftyp(....)", re.DOTALL)
# The first packet of an Ogg file begins after a header of 28 bytes (RFC 3533) and tells the codec.
SIGNATURES = (
    # An EBML head names its DocType (0x4282), with its length in one byte or in eight.
    (rb"\x1aE\xdf\xa3.{1,64}?B\x82(\x84|\x01\0{6}\x04)webm", Media("webm", "video/webm")),
    (rb"\x1aE\xdf\xa3.{1,64}?B\x82(\x88|\x01\0{6}\x08)matroska", Media("mkv", "video/x-matroska")),
    (rb"RIFF....AVI ", Media("avi", "video/x-msvideo")),
    (rb"OggS\0.{23}\x80theora", Media("ogv", "video/ogg")),
    (rb"OggS\0.{23}(OpusHead|\x01vorbis|\x7fFLAC|Speex   )", OGG),
    (rb"(RIFF|RF64)....WAVE", Media("wav", "audio/wav")),
    (rb"fLaC", Media("flac", "audio/flac")),
    (rb"ID3[\x02-\x04]", MP3),
    # Without a tag they begin with a frame: MPEG audio of layer III, where no bitrate is 0 or 15
    # (ISO 11172-3), and AAC in ADTS (ISO 13818-7).
    (rb"\xff[\xe2\xe3\xf2\xf3\xfa\xfb][\x10-\xef]", MP3),
    (rb"\xff[\xf0\xf1\xf8\xf9]", Media("aac", "audio/aac")),
    (rb"glTF[\x01\x02]\0\0\0", Media("glb", "model/gltf-binary")),
    (rb"PK\x03\x04|PK\x05\x06", Media("zip", "application/zip")),
    # Trained weights: the length of a JSON head, in eight bytes of which few are needed.
    (rb'.{4}\0{4}\{"', Media("safetensors", BYTES.content_type)),
)
COMPILED = tuple((re.compile(pattern, re.DOTALL), media) for pattern, media in SIGNATURES)
# Every extension that `media_of` gives, and its type.
TYPES: Mapping[str, str] = dict(
    (BYTES, *PICTURES.values(), *BRANDS.values(), *(media for _, media in SIGNATURES))
)


def media_of(head: bytes) -> Media:
    """What a file is whose first bytes these are; more than HEAD of them make no difference."""
    head = head[:HEAD]
    if known := sniff(head):
        return PICTURES[known]
    if box := FTYP.match(head):
        return BRANDS.get(box[1], BYTES)
    for signature, media in COMPILED:
        if signature.match(head):
            return media
    return BYTES
