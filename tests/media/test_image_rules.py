"""Image formats and sizes by bytes, all spellings of data URIs, and refusals."""

import base64
import io
import json
import struct
import time
import tracemalloc
from collections.abc import Iterator
from itertools import pairwise
from urllib.parse import quote, unquote_to_bytes

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, features

from falproxy.fal.image_fields import may_contain_images
from falproxy.fal.image_formats import FAL_FORMATS, Format
from falproxy.fal.input_json import CHUNK_SIZE, DEPTH_MAX, LongString, parse_input
from falproxy.media.image_format import SNIFF_BYTES, describe_bytes, dimensions, sniff
from falproxy.media.image_rules import (
    ImageInput,
    ImageLimits,
    InputKind,
    InputRefused,
    check_image,
    decode_data_uri,
    find_images,
    fit_to_pixels,
    image_load_error,
    input_kind,
    leading_bytes,
)
from falproxy.parsers import parse_formats
from tests.support.image_samples import (
    AVIF,
    BASELINE,
    GIF,
    HEIC,
    IMAGES,
    JPEG,
    NON_IMAGES,
    PIXELS,
    PNG,
    SIZE,
    WEBP,
    box,
    encode_image,
    frames,
    ftyp,
    jpeg_segment,
    png_header,
)

LOC = ("image_url",)
RULES = ImageLimits()


# Real images


if features.check("avif"):
    IMAGES += [
        pytest.param(encode_image("AVIF"), AVIF, id="avif"),
        pytest.param(encode_image("AVIF", "RGBA"), AVIF, id="avif, alpha"),
        pytest.param(frames("AVIF", "RGB"), AVIF, id="avif, animated"),
    ]


@pytest.mark.parametrize(("content", "known"), IMAGES)
def test_a_real_image_is_recognized_by_its_first_bytes(content: bytes, known: Format) -> None:
    head = content[:SNIFF_BYTES]
    assert sniff(head) is known
    assert dimensions(head, known) == SIZE
    check_image(head, len(content), ImageLimits(formats=(known,)), LOC)


@pytest.mark.parametrize(("content", "known"), IMAGES)
def test_a_truncated_image_shows_its_size_or_none(content: bytes, known: Format) -> None:
    seen = {dimensions(content[:end], known) for end in range(1000)}
    assert seen <= {None, SIZE}


@pytest.mark.parametrize("size", [(1, 1), (1, 255), (256, 2), (16383, 1), (3, 16383)], ids=str)
@pytest.mark.parametrize("format", ["JPEG", "PNG", "GIF", "WEBP", "WEBP, lossless"])
def test_extreme_sizes_are_read(format: str, size: tuple[int, int]) -> None:
    file = io.BytesIO()
    name, _, lossless = format.partition(", ")
    Image.new("RGB", size, "red").save(file, name, lossless=bool(lossless))
    assert dimensions(file.getvalue(), Format(name.lower())) == size


def test_a_gif_is_as_large_as_its_first_frame() -> None:
    content = bytearray(encode_image("GIF", "P"))
    content[6:10] = struct.pack("<HH", 1, 1)
    assert dimensions(bytes(content), GIF) == SIZE
    assert Image.open(io.BytesIO(content)).size == SIZE


def test_a_gif_with_garbage_before_its_first_frame_is_no_smaller() -> None:
    content = encode_image("GIF", "L")
    frame = content.index(b",\0\0\0\0")
    content = content[:6] + b"\1\0\1\0" + content[10:frame] + b"\0\0x" + content[frame:]
    assert dimensions(content, GIF) == SIZE
    assert Image.open(io.BytesIO(content)).size == SIZE


# Boxes of AVIF and HEIC


def large_box(kind: bytes, content: bytes, size: int | None = None) -> bytes:
    length = 16 + len(content) if size is None else size
    return struct.pack(">I4sQ", 1, kind, length) + content


def ispe(width: int, height: int) -> bytes:
    return box(b"ispe", struct.pack(">III", 0, width, height))


def track(width: int, height: int, version: int = 0) -> bytes:
    times = b"\0" * (72 + 12 * version)
    tkhd = bytes((version, 0, 0, 7)) + times + struct.pack(">II", width << 16, height << 16)
    return box(b"trak", box(b"tkhd", tkhd))


def meta(properties: bytes) -> bytes:
    return box(b"meta", b"\0\0\0\0" + box(b"hdlr", b"x") + box(b"iprp", box(b"ipco", properties)))


@pytest.mark.parametrize(
    ("head", "known"),
    [
        pytest.param(ftyp(b"avif", b"mif1", b"miaf"), AVIF, id="avif"),
        pytest.param(ftyp(b"avis", b"msf1"), AVIF, id="avif, a sequence"),
        pytest.param(ftyp(b"mif1", b"miaf", b"avif"), AVIF, id="avif, named second"),
        pytest.param(ftyp(b"heic", b"mif1"), HEIC, id="heic"),
        pytest.param(ftyp(b"hevc", b"msf1"), HEIC, id="heic, a sequence"),
        pytest.param(ftyp(b"mif1", b"heic"), HEIC, id="heic, named second"),
        pytest.param(ftyp(b"heic", b"avif"), HEIC, id="the major brand comes first"),
        pytest.param(ftyp(b"mif1"), HEIC, id="any codec"),
        pytest.param(large_box(b"ftyp", b"avif\0\0\0\0"), AVIF, id="64-bit size"),
        pytest.param(box(b"ftyp", b"avif\0\0\0\0mif1", 0), AVIF, id="up to the end"),
        pytest.param(box(b"ftyp", b"avif\0\0\0\0mif1", 2**31), AVIF, id="cut"),
        pytest.param(ftyp(b"isom", b"mp42"), None, id="a video"),
        pytest.param(ftyp(b"crx ", b"isom"), None, id="a raw image"),
        pytest.param(box(b"ftyp", b"avif"), None, id="too short"),
        pytest.param(box(b"ftyp", b"avif\0\0\0\0", 7), None, id="smaller than its header"),
        pytest.param(large_box(b"ftyp", b"avif\0\0\0\0", 15), None, id="64-bit, smaller"),
        pytest.param(box(b"free") + ftyp(b"avif"), None, id="not the first box"),
        pytest.param(ftyp(b"isom", *[b"free"] * 9999, b"avif"), None, id="after very many"),
        pytest.param(box(b"ftyp", b"isom\0\0\0\0avi"), None, id="half a brand"),
    ],
)
def test_brands_distinguish_avif_from_heic(head: bytes, known: Format | None) -> None:
    assert sniff(head) is known


@pytest.mark.parametrize(
    ("content", "size"),
    [
        pytest.param(meta(ispe(*SIZE)), SIZE, id="one"),
        pytest.param(meta(ispe(5, 5) + ispe(*SIZE) + ispe(9, 9)), SIZE, id="the largest"),
        pytest.param(box(b"mdat", b"x" * 99) + meta(ispe(*SIZE)), SIZE, id="after the data"),
        pytest.param(large_box(b"free", b"x") + meta(ispe(*SIZE)), SIZE, id="a 64-bit size before"),
        pytest.param(box(b"moov", track(*SIZE)), SIZE, id="a track's"),
        pytest.param(box(b"moov", track(9, 9) + track(*SIZE, 1)), SIZE, id="a later track's"),
        pytest.param(meta(ispe(9, 9)) + box(b"moov", track(*SIZE)), SIZE, id="a track's, larger"),
        pytest.param(box(b"moov", track(*SIZE)[:-1]), None, id="a track's, cut"),
        pytest.param(box(b"moov", box(b"trak", box(b"tkhd"))), None, id="a track without any"),
        pytest.param(box(b"meta", b"\0\0\0\0" + meta(b"")), None, id="nested in itself"),
        pytest.param(box(b"mdat", b"", 2**32 - 1) + meta(ispe(*SIZE)), None, id="data beyond"),
        pytest.param(large_box(b"mdat", b"", 2**64 - 1) + meta(ispe(*SIZE)), None, id="64-bit"),
        pytest.param(box(b"free", b"", 0) + meta(ispe(*SIZE)), None, id="size 0 before"),
        pytest.param(box(b"free", b"", 1) + meta(ispe(*SIZE)), None, id="size 1 before"),
        pytest.param(box(b"free", b"", 7) + meta(ispe(*SIZE)), None, id="size 7 before"),
        pytest.param(large_box(b"free", b"", 0) + meta(ispe(*SIZE)), None, id="64-bit size 0"),
        pytest.param(box(b"meta", meta(ispe(*SIZE)), 0)[:30], None, id="cut"),
        pytest.param(meta(ispe(0, 45)), None, id="no width"),
        pytest.param(meta(box(b"ispe", b"\0" * 11)), None, id="too short"),
        pytest.param(meta(ispe(*SIZE)[:4] + b"ispf" + ispe(*SIZE)[8:]), None, id="other box"),
        pytest.param(
            box(b"meta", b"\0\0\0\0" + box(b"iprp", box(b"ipco", ispe(*SIZE), 2**31), 0), 2**30),
            SIZE,
            id="children larger than their parents",
        ),
    ],
)
def test_the_boxes_show_the_size(content: bytes, size: tuple[int, int] | None) -> None:
    assert dimensions(ftyp(b"heic") + content, HEIC) == size


# Hostile files


def jpeg_header(width: int, height: int) -> bytes:
    return b"\xff\xd8" + jpeg_segment(0xC0, struct.pack(">BHHB", 8, height, width, 3) + b"\0" * 9)


@pytest.mark.parametrize(
    ("head", "size"),
    [
        pytest.param(png_header(16384, 16384), (16384, 16384), id="png of 268 megapixels"),
        pytest.param(png_header(65535, 65535, 1), (65535, 65535), id="png of 1 bit"),
        pytest.param(png_header(2**32 - 1, 2**32 - 1), (2**32 - 1, 2**32 - 1), id="png, all ones"),
        pytest.param(jpeg_header(65535, 65535), (65535, 65535), id="jpeg"),
        pytest.param(jpeg_header(9643, 10328), (9643, 10328), id="jpeg of 99 megapixels"),
        pytest.param(
            b"\xff\xd8\xff\xd9" + jpeg_header(65535, 65535),
            (65535, 65535),
            id="jpeg, after one without an image",
        ),
        pytest.param(
            b"\xff\xd8\xff\xe0\0\1" + jpeg_header(65535, 65535),
            (65535, 65535),
            id="jpeg, after a segment of length 1",
        ),
        pytest.param(b"GIF89a" + b"\xff" * 4 + b"\0" * 20, (65535, 65535), id="gif"),
        pytest.param(
            b"RIFF\0\0\0\0WEBPVP8X" + struct.pack("<II", 10, 2) + b"\xff\x3f\0" * 2,
            (16384, 16384),
            id="webp",
        ),
        pytest.param(ftyp(b"avif") + meta(ispe(65536, 65536)), (65536, 65536), id="avif"),
        pytest.param(png_header(50_000_001, 1), (50_000_001, 1), id="a line"),
        pytest.param(png_header(1, 2**32 - 1), (1, 2**32 - 1), id="a column"),
    ],
)
def test_a_decompression_bomb_is_refused_by_its_header(head: bytes, size: tuple[int, int]) -> None:
    with pytest.raises(InputRefused) as refused:
        check_image(head, len(head), RULES, LOC)
    ctx = context(refused.value)
    assert refused.value.code == "image_too_large"
    assert (ctx["width"], ctx["height"], ctx["max_pixels"]) == (*size, 50_000_000)


@pytest.mark.timed
@pytest.mark.parametrize(
    "head",
    [
        pytest.param(b"\xff\xd8\xff", id="jpeg, nothing but the signature"),
        pytest.param(BASELINE[:100], id="jpeg, truncated"),
        pytest.param(
            b"\xff\xd8" + b"\xff\xe0\0\0" * (SNIFF_BYTES // 4), id="jpeg, segments of length 0"
        ),
        pytest.param(b"\xff\xd8\xff\xe0\xff\xff" + b"x" * 99, id="jpeg, segment beyond the end"),
        pytest.param(b"\xff\xd8\xff\xda\0\4xx" + jpeg_header(*SIZE), id="jpeg, scan first"),
        pytest.param(jpeg_header(123, 0), id="jpeg, height comes later"),
        pytest.param(jpeg_header(*SIZE)[:8], id="jpeg, cut in the frame"),
        pytest.param(b"\xff\xd8" + b"\xff" * SNIFF_BYTES, id="jpeg, only fill"),
        pytest.param(
            b"\xff\xd8\xff\xd0" + b"\xff\0" * (SNIFF_BYTES // 2), id="jpeg, only stuffing"
        ),
        pytest.param(b"\xff\xd8" + b"\xff\xd0" * (SNIFF_BYTES // 2), id="jpeg, only restarts"),
        pytest.param(b"\xff\xd8" + b"\xff\xe0\0\2" * (SNIFF_BYTES // 4), id="jpeg, empty segments"),
        pytest.param(b"\x89PNG\r\n\x1a\n", id="png, nothing but the signature"),
        pytest.param(png_header(0, 45), id="png, no width"),
        pytest.param(png_header(*SIZE)[:20], id="png, cut in the header"),
        pytest.param(png_header(*SIZE).replace(b"IHDR", b"IDAT"), id="png, no header"),
        pytest.param(b"GIF89a", id="gif, nothing but the signature"),
        pytest.param(
            b"GIF89a" + b"\0" * 7 + b"!\xf9" + b"\1x" * SNIFF_BYTES, id="gif, endless block"
        ),
        pytest.param(b"GIF89a" + b"\0" * 7 + b"!\xf9\0" * SNIFF_BYTES, id="gif, endless blocks"),
        pytest.param(b"RIFF\0\0\0\0WEBP", id="webp, nothing but the signature"),
        pytest.param(b"RIFF\0\0\0\0WEBPVP8 " + b"\0" * 40, id="webp, no start code"),
        pytest.param(b"RIFF\0\0\0\0WEBPVP8L" + b"\0" * 40, id="webp, lossless without signature"),
        pytest.param(b"RIFF\0\0\0\0WEBPJUNK" + b"\0" * 40, id="webp, another chunk"),
        pytest.param(ftyp(b"avif"), id="avif, no boxes"),
        pytest.param(ftyp(b"avif") + box(b"free") * (SNIFF_BYTES // 8), id="avif, very many boxes"),
        pytest.param(ftyp(b"avif") + box(b"meta") * (SNIFF_BYTES // 8), id="avif, empty boxes"),
        pytest.param(
            ftyp(b"avif") + box(b"meta", b"", 0) * (SNIFF_BYTES // 8), id="avif, open boxes"
        ),
    ],
)
def test_a_header_without_a_size_is_accepted(head: bytes) -> None:
    started = time.perf_counter()
    known = sniff(head)
    assert known is not None
    assert dimensions(head, known) is None
    check_image(head, len(head), RULES, LOC)
    assert time.perf_counter() - started < 5


@pytest.mark.parametrize(("head", "words"), NON_IMAGES)
def test_other_formats_are_refused_and_named(head: bytes, words: str) -> None:
    assert sniff(head) is None
    with pytest.raises(InputRefused) as refused:
        check_image(head, len(head), ImageLimits(formats=tuple(Format)), LOC)
    assert refused.value.code == "unsupported_image_format"
    assert f"the bytes are {words}. " in refused.value.message


def test_a_known_format_that_is_not_accepted_is_named() -> None:
    assert describe_bytes(ftyp(b"heic")) == "a HEIC image"
    with pytest.raises(InputRefused, match=r"the bytes are a HEIC image\. "):
        check_image(ftyp(b"heic"), None, RULES, LOC)


@given(st.one_of(st.binary(), *(st.binary().map(known.__add__) for known in (
    b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", b"GIF89a", b"RIFFxxxxWEBPVP8 ",
    b"RIFFxxxxWEBPVP8X", b"RIFFxxxxWEBPVP8L", ftyp(b"avif"), ftyp(b"heic") + b"\0\0\0\0meta",
))))  # fmt: skip
def test_the_check_raises_refusals_only(head: bytes) -> None:
    sniff(head)
    describe_bytes(head)
    for known in Format:
        size = dimensions(head, known)
        assert size is None or min(size) > 0


# Refusals


def context(refused: InputRefused) -> dict[str, object]:
    ctx = refused.detail[0]["ctx"]
    assert isinstance(ctx, dict)
    return ctx


def test_a_refusal_has_fal_s_format() -> None:
    with pytest.raises(InputRefused) as refused:
        check_image(b"%PDF-1.7", 8, RULES, ("images", 0, "url"))
    error = refused.value
    assert (error.status, error.code) == (422, "unsupported_image_format")
    assert error.message == (
        "Unsupported image format: the bytes are a PDF document. "
        "Supported formats are .jpg, .jpeg, .png, .webp, .gif, .avif."
    )
    assert error.detail == [
        {
            "loc": ["body", "images", 0, "url"],
            "msg": error.message,
            "type": "unsupported_image_format",
            "url": "https://docs.fal.ai/errors/#unsupported_image_format",
            "ctx": {"supported_formats": [".jpg", ".jpeg", ".png", ".webp", ".gif", ".avif"]},
        }
    ]
    json.dumps(error.detail)


def test_too_many_bytes_are_refused() -> None:
    rules = ImageLimits(max_bytes=1000)
    check_image(PIXELS, 1000, rules, LOC)
    check_image(PIXELS, None, rules, LOC)
    with pytest.raises(InputRefused) as refused:
        check_image(PIXELS, 1001, rules, LOC)
    assert refused.value.code == "file_too_large"
    assert context(refused.value) == {"max_size": 1000}


def test_the_maximum_of_pixels_is_accepted() -> None:
    check_image(png_header(10_000, 5_000), None, RULES, LOC)
    with pytest.raises(InputRefused, match="7071x7071"):
        check_image(png_header(16384, 16384), None, RULES, LOC)


@given(st.integers(1, 2**32), st.integers(1, 2**32), st.integers(1, 10**9))
def test_the_size_that_fits_does_fit(width: int, height: int, most: int) -> None:
    max_width, max_height = fit_to_pixels((width, height), most)
    assert min(max_width, max_height) >= 1
    assert max_width * max_height <= most


def test_an_unreadable_image_has_a_message() -> None:
    refused = image_load_error("The host is on a private network.", ("mask_url",))
    assert refused.detail == [
        {
            "loc": ["body", "mask_url"],
            "msg": "The host is on a private network.",
            "type": "image_load_error",
            "url": "https://docs.fal.ai/errors/#image_load_error",
        }
    ]


@given(st.binary(min_size=4))
def test_no_refusal_quotes_bytes_of_the_image(noise: bytes) -> None:
    def message(head: bytes) -> str:
        with pytest.raises(InputRefused) as refused:
            check_image(head, None, ImageLimits(formats=()), LOC)
        return refused.value.message

    known = {message(case.values[0]) for case in (*IMAGES, *NON_IMAGES) if case.values[0]}  # type: ignore[arg-type]  # a row's first value is its bytes
    assert message(noise) in {*known, message(b"\xff\x0a"), message(b"8BPS"), message(b"MM\0*")}


# The setting


@pytest.mark.parametrize(
    ("value", "formats"),
    [
        pytest.param("jpeg,png", (JPEG, PNG), id="two"),
        pytest.param(" JPG , WebP ", (JPEG, WEBP), id="capitals, spaces and the short name"),
        pytest.param("png,jpg,jpeg,png", (PNG, JPEG), id="each once"),
        pytest.param("jpeg,png,webp,gif,avif", FAL_FORMATS, id="fal's"),
        pytest.param("heic", (HEIC,), id="heic"),
    ],
)
def test_formats_are_parsed(value: str, formats: tuple[Format, ...]) -> None:
    assert parse_formats(value) == formats


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        pytest.param("png,bmp", "some of jpeg, png, webp, gif, avif, heic", id="other"),
        pytest.param("", "must name at least one", id="empty"),
        pytest.param(".jpg", "must be some of", id="a suffix"),
        pytest.param("image/png", "must be some of", id="a type"),
    ],
)
def test_unknown_formats_are_errors(value: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        parse_formats(value)


# Long strings


class Bytes:
    """A source in memory."""

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.size = len(content)

    def read(self, start: int, length: int) -> bytes:
        return self.content[start : start + length]


def in_pieces(text: str, *borders: int) -> LongString:
    """A long string that is read in given chunks."""
    raw = text.encode()

    class Cut(LongString):
        def chunks(self, size: int = CHUNK_SIZE) -> Iterator[bytes]:
            for start, end in pairwise((0, *borders, len(raw))):
                yield raw[start:end]

    return Cut(Bytes(raw), 0, len(raw))


def every(text: str, size: int) -> LongString:
    return in_pieces(text, *range(size, len(text), size))


# Locations of images

URL, DATA = "https://example.com/a.png", "data:,x"
LONG = in_pieces("data:image/png;base64," + "A" * 99)


@pytest.mark.parametrize(
    ("tree", "found"),
    [
        pytest.param({"image_url": URL}, [("image_url",)], id="a URL"),
        pytest.param({"image_url": DATA}, [("image_url",)], id="a data URI"),
        pytest.param({"image_url": LONG}, [("image_url",)], id="a long string"),
        pytest.param({"image_urls": [LONG]}, [("image_urls", 0)], id="a long string in a list"),
        pytest.param({"image": URL, "mask": URL}, [("image",), ("mask",)], id="bare names"),
        pytest.param({"image": "no URL"}, [("image",)], id="whatever the text is"),
        pytest.param({"mask_url": URL}, [("mask_url",)], id="a mask"),
        pytest.param(
            {"image_urls": [URL, DATA]}, [("image_urls", 0), ("image_urls", 1)], id="a list"
        ),
        pytest.param({"mask_urls": [URL]}, [("mask_urls", 0)], id="masks"),
        pytest.param({"images": [{"url": URL}]}, [("images", 0, "url")], id="files"),
        pytest.param({"image": {"url": URL}}, [("image", "url")], id="a file"),
        pytest.param({"images": [URL, {"url": URL}]}, [("images", 0), ("images", 1, "url")],
                     id="strings and files"),
        pytest.param({"swap_image_url": URL}, [("swap_image_url",)], id="a name that ends so"),
        pytest.param({"reference_images": [URL]}, [("reference_images", 0)], id="images of a kind"),
        pytest.param({"end_image_urls": [URL]}, [("end_image_urls", 0)], id="URLs of a kind"),
        pytest.param({"a": {"image_url": URL}}, [("a", "image_url")], id="in an object"),
        pytest.param({"a": [1, {"image_url": URL}]}, [("a", 1, "image_url")], id="in a list"),
        pytest.param({"image": {"mask_url": URL}}, [("image", "mask_url")], id="in an image"),
        pytest.param([{"image_url": URL}], [(0, "image_url")], id="a list at the top"),
        pytest.param({"image_url": None}, [], id="null"),
        pytest.param({"image_url": 1, "mask": True, "images": 1.5}, [], id="no strings"),
        pytest.param({"images": [None, 1, [], {}]}, [], id="a list of nothing"),
        pytest.param({"image_url": {"href": URL}}, [], id="an object without url"),
        pytest.param({"image_url": {"url": None}}, [], id="a url of nothing"),
        pytest.param({"image_url": ""}, [], id="an empty string"),
        pytest.param({"images": ["", DATA]}, [("images", 1)], id="an empty string in a list"),
        pytest.param({"image_url": "data:,"}, [], id="an empty data URI"),
        pytest.param({"image_url": "DATA:image/png;base64,"}, [], id="an empty one in base64"),
        pytest.param({"image_url": "data:;base64, \n=="}, [], id="an empty one with padding"),
        pytest.param({"image_url": "data:"}, [("image_url",)], id="a data URI without comma"),
        pytest.param({"image_url": "data:;base64,!"}, [("image_url",)], id="one that is broken"),
        pytest.param({"url": URL, "prompt": URL}, [], id="other names"),
        pytest.param({"a": {"url": URL}}, [], id="a url of something else"),
        pytest.param({"My_image_url": URL}, [("My_image_url",)], id="an end in lower case"),
        pytest.param({"Image": URL, "IMAGE_URL": URL, "imageUrl": URL}, [], id="capitals"),
        pytest.param({"image_urls_count": URL, "image_size": URL}, [], id="a name that goes on"),
        pytest.param({"background_image": URL, "unmask": URL}, [], id="names that end in image"),
        pytest.param({}, [], id="nothing"),
        pytest.param("https://example.com/image_url", [], id="a string"),
        pytest.param(None, [], id="null at the top"),
    ],
)  # fmt: skip
def test_images_are_found_by_their_keys(tree: object, found: list[tuple[str | int, ...]]) -> None:
    assert [image.loc for image in find_images(tree)] == found
    for indent in (None, 3):
        body = json.dumps(tree, indent=indent, default=lambda text: "long").encode()
        assert may_contain_images(body) or not found


@pytest.mark.parametrize(
    ("body", "may"),
    [
        pytest.param(b'{"prompt": "an image", "num_images": 4}', False, id="how many"),
        pytest.param(b'{"image_size": "square_hd"}', False, id="how large"),
        pytest.param(b'{"image_size": {"width": 5}, "images": null}', False, id="none"),
        pytest.param(b'{"prompt": "a\\n\\"mask\\" of b"}', False, id="a word in a text"),
        pytest.param(b'{"imageimage_url": "x"}', True, id="a word before it"),
        pytest.param(b'{"mask_urls"\r\n :\t["x"]}', True, id="white space"),
        pytest.param(b'{"images":[', True, id="the rest is missing"),
        pytest.param(b'{"im\\u0061ge": "x"}', True, id="an escape in the name"),
        pytest.param(b'{"prompt": "' + b"image " * 100 + b'"}', True, id="too often to look"),
        pytest.param(b"", False, id="nothing"),
    ],
)
def test_a_body_that_may_name_images(body: bytes, may: bool) -> None:
    assert may_contain_images(body) is may


def test_an_image_is_found_with_its_value() -> None:
    assert find_images({"images": [{"url": URL}, LONG]}) == [
        ImageInput(("images", 0, "url"), URL),
        ImageInput(("images", 1), LONG),
    ]


def nested(depth: int) -> object:
    """Return an image nested in `depth` keys."""
    tree: object = URL
    for at in range(depth):
        tree = {"image_url": tree} if at == 0 else {"a": tree}
    return tree


def test_images_are_found_as_deep_as_inputs_are_read() -> None:
    assert len(find_images(nested(DEPTH_MAX))) == 1


def test_deeper_images_are_ignored() -> None:
    assert find_images(nested(900)) == []
    assert find_images(json.loads("[" * 900 + "]" * 900)) == []


@given(st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda child: st.lists(child) | st.dictionaries(
        st.sampled_from(["image", "images", "image_url", "url", "a"]), child),
    max_leaves=20,
))  # fmt: skip
def test_every_location_leads_to_its_value(tree: object) -> None:
    for image in find_images(tree):
        value = tree
        for step in image.loc:
            value = value[step]  # type: ignore[index]  # a step is a key of its container
        assert value == image.value


# Kinds of values


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        pytest.param("data:,", InputKind.DATA, id="data"),
        pytest.param("DaTa:image/png;base64,AA", InputKind.DATA, id="data in capitals"),
        pytest.param("http://example.com", InputKind.REMOTE, id="http"),
        pytest.param("https://example.com", InputKind.REMOTE, id="https"),
        pytest.param("HTTPS://EXAMPLE.COM", InputKind.REMOTE, id="https in capitals"),
        pytest.param(" data:,x", InputKind.OTHER, id="white space before data"),
        pytest.param("\thttps://example.com", InputKind.OTHER, id="white space before https"),
        pytest.param("data", InputKind.OTHER, id="no colon"),
        pytest.param("d\u0430ta:,x", InputKind.OTHER, id="a Cyrillic letter"),
        pytest.param("https:example.com", InputKind.OTHER, id="no slashes"),
        pytest.param("//example.com/a.png", InputKind.OTHER, id="no scheme"),
        pytest.param("file:///etc/passwd", InputKind.OTHER, id="a file"),
        pytest.param("javascript:alert(1)", InputKind.OTHER, id="a script"),
        pytest.param("iVBORw0KGgo", InputKind.OTHER, id="bare base64"),
        pytest.param("", InputKind.OTHER, id="nothing"),
        pytest.param(LONG, InputKind.DATA, id="a long data URI"),
        pytest.param(
            in_pieces("https://example.com/?" + "a" * 99), InputKind.REMOTE, id="a long URL"
        ),
    ],
)
def test_the_kind_of_a_value_depends_on_its_scheme(
    value: str | LongString, expected: InputKind
) -> None:
    assert input_kind(value) is expected


# Data URIs


def everything(value: str | LongString) -> bytes:
    return b"".join(decode_data_uri(value))


CONTENT = bytes(range(256)) * 3 + b"\xfb\xff\xfe"  # + and / are in its base64
PLAIN = base64.b64encode(CONTENT + b"x").decode()  # one = of two
SPELLINGS = [
    pytest.param(f"data:image/png;base64,{PLAIN}", id="as it should be"),
    pytest.param(f"DATA:IMAGE/PNG;BASE64,{PLAIN}", id="capitals"),
    pytest.param(f"data:;base64,{PLAIN}", id="no type"),
    pytest.param(f"data:image/png;charset=utf-8;name=a.png;base64,{PLAIN}", id="parameters"),
    pytest.param(f"data:image/png ; base64 ,{PLAIN}", id="white space around the flag"),
    pytest.param(f"data:image/png;x={'y' * 9999};base64,{PLAIN}", id="a long parameter"),
    pytest.param(f"data:application/pdf;base64,{PLAIN}", id="a lying type"),
    pytest.param(f"data:image/png;base64,{PLAIN.rstrip('=')}", id="no padding"),
    pytest.param(f"data:image/png;base64,{PLAIN}===", id="too much padding"),
    pytest.param(f"data:image/png;base64,{PLAIN}\r\n", id="a line end"),
    pytest.param(f"data:image/png;base64,{PLAIN[:-1]} =", id="white space in the padding"),
    pytest.param(
        "data:image/png;base64," + base64.encodebytes(CONTENT + b"x").decode(), id="in lines"
    ),
    pytest.param("data:image/png;base64," + "\t ".join(PLAIN), id="white space everywhere"),
    pytest.param(
        "data:image/png;base64," + PLAIN.replace("+", "-").replace("/", "_"), id="url-safe"
    ),
    pytest.param("data:image/png;base64," + quote(PLAIN, safe=""), id="escaped"),
    pytest.param("data:image/png;base64," + PLAIN.replace("+", "%2b").replace("/", "%2f"),
                 id="escaped in lower case"),
    pytest.param("data:image/png;base64," + "".join(f"%{ord(letter):02X}" for letter in PLAIN),
                 id="all escaped"),
    pytest.param(f"data:image/png;base64,{PLAIN[:76]}%0D%0A{PLAIN[76:]}", id="escaped lines"),
    pytest.param("data:image/png," + quote(CONTENT + b"x"), id="no base64"),
]  # fmt: skip


@pytest.mark.parametrize("uri", SPELLINGS)
def test_every_spelling_is_the_same_bytes(uri: str) -> None:
    chunks = decode_data_uri(uri)
    assert b"".join(chunks) == CONTENT + b"x"
    assert chunks.is_complete


@pytest.mark.parametrize("uri", SPELLINGS)
@pytest.mark.parametrize("size", [1, 2, 3, 5, 64])
def test_chunks_of_any_size_are_the_same_bytes(uri: str, size: int) -> None:
    chunks = decode_data_uri(every(uri, size))
    assert b"".join(chunks) == CONTENT + b"x"
    assert chunks.is_complete


@pytest.mark.parametrize("uri", [uri for uri in SPELLINGS if "long" not in str(uri.id)])
def test_the_position_of_a_chunk_border_changes_nothing(uri: str) -> None:
    for border in range(1, len(uri)):
        assert everything(in_pieces(uri, border)) == CONTENT + b"x", border


def test_a_long_string_of_php_s_is_the_same_bytes() -> None:
    content = BASELINE * 20
    uri = "data:image/jpeg;base64," + base64.b64encode(content).decode()
    body = json.dumps({"image_url": uri}).replace("/", r"\/").encode()
    tree = parse_input(Bytes(body), "nonce")
    [image] = find_images(tree)
    assert isinstance(image.value, LongString)
    assert everything(image.value) == content == everything(uri)


@pytest.mark.parametrize(
    ("uri", "content"),
    [
        pytest.param("data:", b"", id="no comma"),
        pytest.param("data:image/png;base64", b"", id="no comma after the flag"),
        pytest.param("data:;base64,QUJD!REVG", b"ABC", id="a bad character"),
        pytest.param("data:;base64,QUI!REVG", b"AB", id="a bad character within four"),
        pytest.param("data:;base64,!QUJD", b"", id="a bad character at once"),
        pytest.param("data:;base64,QUJDRä", b"ABC", id="a letter of another alphabet"),
        pytest.param("data:;base64,QUJD\ud800", b"ABC", id="half a character"),
        pytest.param("data:;base64,QQ==QUJD", b"A", id="more after the padding"),
        pytest.param("data:;base64,QUJDR", b"ABC", id="a letter that is no byte"),
        pytest.param("data:;base64,QUJD%", b"ABC", id="half an escape"),
        pytest.param("data:;base64,QUJD%4", b"ABC", id="two thirds of an escape"),
        pytest.param("data:;base64,QUJD#x", b"ABC", id="a fragment"),
        pytest.param("data:;base64,data:;base64,QUJD", b"u\xabZ", id="a data URI in itself"),
    ],
)
def test_invalid_text_is_left_out_and_reported(uri: str, content: bytes) -> None:
    chunks = decode_data_uri(uri)
    assert b"".join(chunks) == content
    assert not chunks.is_complete


@pytest.mark.parametrize(
    ("uri", "content"),
    [
        pytest.param("data:,a%20b+c", b"a b+c", id="escapes, a plus stays"),
        pytest.param("data:,100%", b"100%", id="a lone percent sign"),
        pytest.param("data:,%zz%4", b"%zz%4", id="no escapes"),
        pytest.param("data:,a,b", b"a,b", id="a second comma"),
        pytest.param("data:,ä", "ä".encode(), id="letters are UTF-8"),
        pytest.param("data:base64,QUJD", b"QUJD", id="a flag without semicolon"),
        pytest.param("data:;base64;x=y,QUJD", b"QUJD", id="a flag that is not the last"),
        pytest.param("data:;xbase64,QUJD", b"QUJD", id="a flag that is longer"),
        pytest.param("data:;base64,QUJD", b"ABC", id="base64"),
        pytest.param("data:;base64,QR==", b"A", id="bits that are left over"),
    ],
)
def test_a_data_uri_is_its_bytes(uri: str, content: bytes) -> None:
    for value in (uri, every(uri, 1) if uri.isascii() else uri):
        chunks = decode_data_uri(value)
        assert b"".join(chunks) == content
        assert chunks.is_complete


@given(st.binary(), st.integers(1, 20))
def test_base64_is_decoded(content: bytes, size: int) -> None:
    for encode in (base64.b64encode, base64.urlsafe_b64encode):
        uri = "data:image/png;base64," + encode(content).decode()
        assert everything(uri) == content
        assert everything(every(uri, size)) == content


@given(st.text(), st.integers(1, 9))
def test_percent_escapes_are_decoded_like_python_s(text: str, size: int) -> None:
    raw = text.encode(errors="surrogatepass")
    assert everything("data:," + text) == unquote_to_bytes(raw)
    escaped = quote(raw) + "%"
    assert everything(every("data:," + escaped, size)) == raw + b"%"


@given(st.text() | st.text().map("data:".__add__) | st.text().map("data:;base64,".__add__)
       | st.text("Ab+/-_=%2 ,;\n").map("data:;base64,".__add__))  # fmt: skip
def test_no_text_raises_an_exception(text: str) -> None:
    input_kind(text)
    find_images({"image_url": text})
    content = everything(text)
    for count in (0, 1, 7, SNIFF_BYTES):
        assert leading_bytes(text, count) == content[:count]


@given(st.text("Ab+/-_=%25 \n"), st.integers(1, 5))
def test_malformed_base64_is_the_same_bytes_in_chunks(payload: str, size: int) -> None:
    uri = "data:;base64," + payload
    whole, cut = decode_data_uri(uri), decode_data_uri(every(uri, size))
    assert b"".join(whole) == b"".join(cut)
    assert whole.is_complete is cut.is_complete


def test_the_first_bytes_need_only_their_chunks() -> None:
    read: list[int] = []

    class Watched(LongString):
        def chunks(self, size: int = CHUNK_SIZE) -> Iterator[bytes]:
            for index in range(100):
                read.append(index)
                yield b"data:image/png;base64," if index == 0 else b"AAAA" * 1000

    value = Watched(Bytes(b""), 0, 0)
    assert leading_bytes(value, 2000) == b"\0" * 2000
    assert read == [0, 1]


@pytest.mark.parametrize("header", ["data:;base64,", "data:,", "data:"])
def test_a_long_data_uri_is_never_held_completely(header: str) -> None:
    class Long(LongString):
        def chunks(self, size: int = CHUNK_SIZE) -> Iterator[bytes]:
            yield header.encode()
            yield from [b"A" * 2**20] * 64

    value = Long(Bytes(b""), 0, 0)
    tracemalloc.start()
    total = sum(map(len, decode_data_uri(value)))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert total == {"data:;base64,": 48, "data:,": 64, "data:": 0}[header] * 2**20
    assert peak < 8 * 2**20


@pytest.mark.parametrize("size", [1, 7, 2**18])
def test_browsers_leave_out_tabs_and_line_ends(size: int) -> None:
    escaped = "".join(f"%{byte:02X}\r\n\t" for byte in BASELINE)
    uri = f"data:image/jpeg,\n{escaped}"
    for value in (uri, every(uri, size)):
        head = leading_bytes(value, SNIFF_BYTES, without_line_ends=True)
        assert head == BASELINE[:SNIFF_BYTES]


@pytest.mark.parametrize("declared", ["image/png", "text/html", "application/pdf", ""])
def test_the_declared_type_is_ignored(declared: str) -> None:
    encoded = base64.b64encode(BASELINE).decode()
    head = leading_bytes(f"data:{declared};base64,{encoded}", SNIFF_BYTES)
    assert sniff(head) is JPEG
    check_image(head, None, RULES, LOC)
    page = leading_bytes(f"data:{declared},<html><p>hello", SNIFF_BYTES)
    with pytest.raises(InputRefused, match="an HTML page"):
        check_image(page, None, RULES, LOC)
