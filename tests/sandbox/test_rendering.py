"""The sandbox's pictures: real, repeatable, and never equal for unequal calls."""

import base64
import io
from functools import cache
from typing import Any

import pytest
from aiohttp.pytest_plugin import AiohttpClient
from PIL import Image, ImageStat

from falproxy.sandbox.errors import FalError
from falproxy.sandbox.files import FileStore
from falproxy.sandbox.inputs import check_inputs
from falproxy.sandbox.models import MODELS, Input, Kind
from falproxy.sandbox.pictures import read_pictures
from falproxy.sandbox.pixels import digest_of, encode, render, size_of, sketch
from tests.support.offline_fal import KONTEXT, OfflineFal, offline_fal, png

URL = "https://example.com/cat.png"
OWN = "http://sandbox.test"
SMALL = {"width": 64, "height": 64}


def data_uri(content: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


RED, BLUE = data_uri(png("red")), data_uri(png("blue"))
FIRST = {Kind.TEXT: "a cat", Kind.IMAGE: RED, Kind.IMAGES: [RED], Kind.SIZE: SMALL}
OTHER = {
    Kind.TEXT: "a dog",
    Kind.IMAGE: BLUE,
    Kind.IMAGES: [BLUE],
    Kind.SIZE: {"width": 64, "height": 65},
    Kind.LORAS: [{"path": "https://example.com/lora"}],
}


def first_body(endpoint: str) -> dict[str, Any]:
    """A full input with a fixed seed, small where it can be."""
    inputs = MODELS[endpoint].inputs
    body = {name: FIRST[known.kind] for name, known in inputs.items() if known.kind in FIRST}
    return {**body, **({"seed": 1} if "seed" in inputs else {})}


def other_value(name: str, known: Input, now: object) -> object:
    """A value that fits the input and is not the one it has now."""
    if known.kind in OTHER:
        return OTHER[known.kind]
    if known.kind is Kind.CHOICE:
        return next(choice for choice in known.choices if choice != now)
    if known.kind is Kind.FLAG:
        return not now
    return 2 if name == "seed" else known.high


def draw(endpoint: str, body: dict[str, Any], index: int = 0) -> Image.Image:
    model = MODELS[endpoint]
    values = check_inputs(model, body)
    return render(endpoint, values, read_pictures(model, values, FileStore(), OWN), index)


@cache
def first_picture(endpoint: str) -> bytes:
    return draw(endpoint, first_body(endpoint)).tobytes()


EVERY_INPUT = [
    pytest.param(endpoint, name, id=f"{endpoint} {name}")
    for endpoint, model in MODELS.items()
    for name in model.inputs
]


@pytest.mark.parametrize(("endpoint", "name"), EVERY_INPUT)
def test_every_parameter_changes_the_picture(endpoint: str, name: str) -> None:
    body, known = first_body(endpoint), MODELS[endpoint].inputs[name]
    body[name] = other_value(name, known, body.get(name, known.default))
    assert draw(endpoint, body).tobytes() != first_picture(endpoint)


@pytest.mark.parametrize("endpoint", MODELS)
def test_the_same_input_gives_the_same_picture(endpoint: str) -> None:
    assert draw(endpoint, first_body(endpoint)).tobytes() == first_picture(endpoint)


@pytest.mark.parametrize("endpoint", MODELS)
def test_every_picture_of_a_call_is_another(endpoint: str) -> None:
    assert draw(endpoint, first_body(endpoint), index=1).tobytes() != first_picture(endpoint)


def test_no_two_models_draw_alike() -> None:
    drawn = [draw(endpoint, {"prompt": "x", "image_url": RED, "image_urls": [RED],
                             "base_image_url": RED, "swap_image_url": RED, "seed": 1,
                             "image_size": SMALL}).tobytes()
             for endpoint in MODELS]  # fmt: skip
    assert len(set(drawn)) == len(MODELS)


def read_mark(picture: Image.Image) -> bytes:
    """The digest that a picture carries in its corner."""
    grey = picture.convert("L")
    bits = [
        int.from_bytes(grey.crop((x * 4 + 2, y * 4 + 2, x * 4 + 3, y * 4 + 3)).tobytes()) > 127
        for y in range(16)
        for x in range(16)
    ]
    return bytes(sum(bits[at * 8 + bit] << bit for bit in range(8)) for at in range(32))


@pytest.mark.parametrize("output_format", ["jpeg", "png", "webp"])
def test_the_mark_outlives_the_format(output_format: str) -> None:
    values = check_inputs(MODELS["fal-ai/flux/dev"], {"prompt": "x", "seed": 1})
    picture = render("fal-ai/flux/dev", values, [], 0)
    written = Image.open(io.BytesIO(encode(picture, output_format)))
    assert read_mark(written) == digest_of("fal-ai/flux/dev", values, [], 0)


def test_an_edit_keeps_its_input_visible() -> None:
    picture = Image.new("RGB", (600, 400), "black")
    picture.paste("white", (300, 0, 600, 400))
    body = {"prompt": "x", "seed": 1, "image_url": data_uri(encode(picture, "png"))}
    edited = draw(KONTEXT, body)
    left = ImageStat.Stat(edited.crop((70, 100, 290, 300)).convert("L")).mean[0]
    right = ImageStat.Stat(edited.crop((310, 100, 590, 300)).convert("L")).mean[0]
    assert edited.size == (600, 400)
    assert right - left > 80


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        pytest.param((800, 600), (800, 600), id="its own"),
        pytest.param((4000, 1000), (1440, 360), id="no larger than 1440"),
        pytest.param((8, 8), (512, 512), id="no smaller than 512"),
        pytest.param((2000, 10), (1440, 64), id="no side below 64"),
    ],
)
def test_the_size_of_an_edit(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert size_of({}, [Image.new("RGB", size)]) == expected


@pytest.mark.parametrize(
    ("inputs", "expected"),
    [
        pytest.param({"image_size": "portrait_16_9"}, (576, 1024), id="preset"),
        pytest.param({"image_size": {"width": 300, "height": 200}}, (300, 200), id="pixels"),
        pytest.param(
            {"image_size": {"width": 14142, "height": 14142}}, (4096, 4096), id="huge is shrunk"
        ),
        pytest.param({"aspect_ratio": "1:1"}, (1024, 1024), id="ratio"),
        pytest.param({"aspect_ratio": "16:9"}, (1360, 768), id="wide"),
        pytest.param({"aspect_ratio": "9:21"}, (672, 1568), id="tall"),
        pytest.param({"resolution_mode": "3:2"}, (1248, 832), id="resolution mode"),
        pytest.param({}, (1024, 1024), id="nothing said"),
    ],
)
def test_the_size_of_a_new_picture(inputs: dict[str, object], expected: tuple[int, int]) -> None:
    assert size_of(inputs, []) == expected


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16"])
def test_any_kind_of_picture_can_be_read(mode: str) -> None:
    file = io.BytesIO()
    Image.new(mode, (20, 20)).save(file, "tiff")
    assert draw(KONTEXT, {"prompt": "x", "image_url": data_uri(file.getvalue())}).size == (512, 512)


def test_the_smallest_picture_can_be_drawn() -> None:
    size = {"width": 1, "height": 1}
    assert draw("fal-ai/flux/dev", {"prompt": "x", "image_size": size}).size == (1, 1)


def test_a_sketch_becomes_sharper() -> None:
    picture = Image.effect_noise((200, 200), 80)
    contrasts = [ImageStat.Stat(sketch(picture, share)).stddev[0] for share in (0.25, 0.75, 1)]
    assert contrasts == sorted(contrasts)


# What a picture input may be.


def pictures_of(url: str, files: FileStore | None = None) -> list[Image.Image]:
    model = MODELS[KONTEXT]
    values = check_inputs(model, {"prompt": "x", "image_url": url})
    return read_pictures(model, values, files or FileStore(), OWN)


BOMB = Image.new("1", (14143, 20))


def bomb() -> bytes:
    file = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(file, "png")
    return file.getvalue()


@pytest.mark.parametrize(
    ("url", "kind"),
    [
        pytest.param(f"{OWN}/files/b/x/none.png", "file_download_error", id="own, not there"),
        pytest.param("cat.png", "file_download_error", id="no URL"),
        pytest.param("", "file_download_error", id="empty"),
        pytest.param("ftp://example.com/cat.png", "file_download_error", id="another scheme"),
        pytest.param("file:///etc/passwd", "file_download_error", id="a local file"),
        pytest.param("http://[::1", "file_download_error", id="cannot be parsed"),
        pytest.param("https:///cat.png", "file_download_error", id="no host"),
        pytest.param("data:image/png;base64,AAAA", "image_load_error", id="no picture"),
        pytest.param("data:image/png;base64,A", "image_load_error", id="no base64"),
        pytest.param("data:,", "image_load_error", id="empty data"),
        pytest.param(data_uri(png()[:60]), "image_load_error", id="cut off"),
        pytest.param(data_uri(b"<svg/>"), "image_load_error", id="SVG"),
        pytest.param(data_uri(encode(BOMB.convert("L"), "png")), "image_too_large", id="too wide"),
        pytest.param(data_uri(bomb()), "image_too_large", id="decompression bomb"),
    ],
)
def test_a_picture_that_cannot_be_had_is_refused(url: str, kind: str) -> None:
    with pytest.raises(FalError) as caught:
        pictures_of(url)
    assert caught.value.answer.status == 422
    assert caught.value.answer.error_type == kind


def test_a_refusal_names_the_input() -> None:
    model = MODELS["fal-ai/face-swap"]
    values = {"base_image_url": RED, "swap_image_url": "x"}
    with pytest.raises(FalError) as caught:
        read_pictures(model, values, FileStore(), OWN)
    body: Any = caught.value.answer.body
    assert body["detail"][0]["loc"] == ["body", "swap_image_url"]


def test_a_picture_on_the_web_has_a_stand_in() -> None:
    [one], [again], [other] = pictures_of(URL), pictures_of(URL), pictures_of(f"{URL}?2")
    assert one.tobytes() == again.tobytes() != other.tobytes()


@pytest.mark.parametrize(
    "root", [pytest.param(OWN, id="own address"), pytest.param("https://v3.fal.media", id="fal's")]
)
def test_a_file_of_the_cdn_is_read(root: str) -> None:
    files = FileStore()
    files.open()
    key = files.new_key("cat.png")
    files.put(key, io.BytesIO(png(size=(33, 22))), "image/png")
    [picture] = pictures_of(f"{root}/files/b/{key}", files)
    files.close()
    assert picture.size == (33, 22)


def test_one_picture_is_itself_however_it_comes() -> None:
    files = FileStore()
    files.open()
    key = files.new_key("cat.png")
    files.put(key, io.BytesIO(png()), "image/png")
    values = check_inputs(MODELS[KONTEXT], {"prompt": "x", "image_url": RED, "seed": 1})
    stored = {**values, "image_url": f"{OWN}/files/b/{key}"}
    one = render(KONTEXT, values, pictures_of(RED), 0)
    other = render(KONTEXT, stored, pictures_of(str(stored["image_url"]), files), 0)
    files.close()
    assert one.tobytes() == other.tobytes()


def test_a_picture_is_turned_upright() -> None:
    file = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # taken with the camera on its side
    Image.new("RGB", (40, 20)).save(file, "jpeg", exif=exif)
    [picture] = pictures_of(data_uri(file.getvalue()))
    assert picture.size == (20, 40)


async def test_a_picture_on_the_web_is_never_fetched(aiohttp_client: AiohttpClient) -> None:
    fal: OfflineFal = await offline_fal(aiohttp_client)
    url = f"{fal.sandbox.public_url}/elsewhere.png"
    response = await fal.run(KONTEXT, {"prompt": "x", "image_url": url})
    assert response.status == 200
    assert [seen.path for seen in fal.sandbox.seen] == [f"/{KONTEXT}"]
