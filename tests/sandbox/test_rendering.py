"""Images of the sandbox: rendering, output sizes and input images."""

import base64
import io
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
from aiohttp.pytest_plugin import AiohttpClient
from PIL import Image, ImageStat

from falproxy.sandbox.files import FileStore
from falproxy.sandbox.input_images import read_input_images
from falproxy.sandbox.input_validation import validate_inputs
from falproxy.sandbox.models import MODELS, InputType, ModelInput
from falproxy.sandbox.rendering import (
    encode_image,
    image_digest,
    output_size,
    render_image,
    render_preview,
)
from falproxy.sandbox.responses import FalError
from tests.support.offline_fal import KONTEXT, OfflineFal, offline_fal, png

URL = "https://example.com/cat.png"
SANDBOX_URL = "http://sandbox.test"
SMALL = {"width": 64, "height": 64}


def data_uri(content: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


RED, BLUE = data_uri(png("red")), data_uri(png("blue"))
DEFAULT_VALUES = {
    InputType.STRING: "a cat",
    InputType.IMAGE: RED,
    InputType.IMAGES: [RED],
    InputType.IMAGE_SIZE: SMALL,
}
OTHER_VALUES = {
    InputType.STRING: "a dog",
    InputType.IMAGE: BLUE,
    InputType.IMAGES: [BLUE],
    InputType.IMAGE_SIZE: {"width": 64, "height": 65},
    InputType.LORAS: [{"path": "https://example.com/lora"}],
}


IMAGE_MODELS = {endpoint: model for endpoint, model in MODELS.items() if model.kind == "image"}


def default_body(endpoint: str) -> dict[str, Any]:
    """Return a complete body with a fixed seed and a small image size."""
    inputs = MODELS[endpoint].inputs
    body = {
        name: DEFAULT_VALUES[spec.type]
        for name, spec in inputs.items()
        if spec.type in DEFAULT_VALUES
    }
    return {**body, **({"seed": 1} if "seed" in inputs else {})}


def other_value(name: str, spec: ModelInput, current: object) -> object:
    """Return a valid value that differs from the current one."""
    if spec.type in OTHER_VALUES:
        return OTHER_VALUES[spec.type]
    if spec.type is InputType.CHOICE:
        return next(choice for choice in spec.choices if choice != current)
    if spec.type is InputType.BOOLEAN:
        return not current
    return 2 if name == "seed" else spec.maximum


def render(endpoint: str, body: dict[str, Any], index: int = 0) -> Image.Image:
    model = MODELS[endpoint]
    values = validate_inputs(model, body)
    return render_image(
        endpoint, values, read_input_images(model, values, FileStore(), SANDBOX_URL), index
    )


@cache
def default_pixels(endpoint: str) -> bytes:
    return render(endpoint, default_body(endpoint)).tobytes()


EVERY_INPUT = [
    pytest.param(endpoint, name, id=f"{endpoint} {name}")
    for endpoint, model in IMAGE_MODELS.items()
    for name in model.inputs
]


@pytest.mark.parametrize(("endpoint", "name"), EVERY_INPUT)
def test_every_input_changes_the_image(endpoint: str, name: str) -> None:
    body, spec = default_body(endpoint), MODELS[endpoint].inputs[name]
    body[name] = other_value(name, spec, body.get(name, spec.default))
    assert render(endpoint, body).tobytes() != default_pixels(endpoint)


@pytest.mark.parametrize("endpoint", IMAGE_MODELS)
def test_the_same_input_gives_the_same_image(endpoint: str) -> None:
    assert render(endpoint, default_body(endpoint)).tobytes() == default_pixels(endpoint)


@pytest.mark.parametrize("endpoint", IMAGE_MODELS)
def test_the_images_of_one_call_differ(endpoint: str) -> None:
    assert render(endpoint, default_body(endpoint), index=1).tobytes() != default_pixels(endpoint)


def test_no_two_models_give_the_same_image() -> None:
    rendered = [render(endpoint, {"prompt": "x", "image_url": RED, "image_urls": [RED],
                             "base_image_url": RED, "swap_image_url": RED, "mask_url": RED,
                             "seed": 1, "image_size": SMALL}).tobytes()
             for endpoint in IMAGE_MODELS]  # fmt: skip
    assert len(set(rendered)) == len(IMAGE_MODELS)


def read_digest(image: Image.Image) -> bytes:
    """Return the digest in the corner of an image."""
    gray = image.convert("L")
    bits = [
        int.from_bytes(gray.crop((x * 4 + 2, y * 4 + 2, x * 4 + 3, y * 4 + 3)).tobytes()) > 127
        for y in range(16)
        for x in range(16)
    ]
    return bytes(sum(bits[at * 8 + bit] << bit for bit in range(8)) for at in range(32))


@pytest.mark.parametrize("output_format", ["jpeg", "png", "webp"])
def test_the_digest_survives_encoding(output_format: str) -> None:
    values = validate_inputs(MODELS["fal-ai/flux/dev"], {"prompt": "x", "seed": 1})
    image = render_image("fal-ai/flux/dev", values, [], 0)
    decoded = Image.open(io.BytesIO(encode_image(image, output_format)))
    assert read_digest(decoded) == image_digest("fal-ai/flux/dev", values, [], 0)


def test_an_edit_keeps_its_input_visible() -> None:
    image = Image.new("RGB", (600, 400), "black")
    image.paste("white", (300, 0, 600, 400))
    body = {"prompt": "x", "seed": 1, "image_url": data_uri(encode_image(image, "png"))}
    edited = render(KONTEXT, body)
    left = ImageStat.Stat(edited.crop((70, 100, 290, 300)).convert("L")).mean[0]
    right = ImageStat.Stat(edited.crop((310, 100, 590, 300)).convert("L")).mean[0]
    assert edited.size == (600, 400)
    assert right - left > 80


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        pytest.param((800, 600), (800, 600), id="unchanged"),
        pytest.param((4000, 1000), (1440, 360), id="no larger than 1440"),
        pytest.param((8, 8), (512, 512), id="no smaller than 512"),
        pytest.param((2000, 10), (1440, 64), id="no side below 64"),
    ],
)
def test_the_output_size_of_an_edit(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert output_size({}, [Image.new("RGB", size)]) == expected


@pytest.mark.parametrize(
    ("inputs", "expected"),
    [
        pytest.param({"image_size": "portrait_16_9"}, (576, 1024), id="preset"),
        pytest.param({"image_size": {"width": 300, "height": 200}}, (300, 200), id="pixels"),
        pytest.param(
            {"image_size": {"width": 14142, "height": 14142}}, (4096, 4096), id="limited to 4096"
        ),
        pytest.param({"aspect_ratio": "1:1"}, (1024, 1024), id="ratio"),
        pytest.param({"aspect_ratio": "16:9"}, (1360, 768), id="wide"),
        pytest.param({"aspect_ratio": "9:21"}, (672, 1568), id="tall"),
        pytest.param({"resolution_mode": "3:2"}, (1248, 832), id="resolution mode"),
        pytest.param({}, (1024, 1024), id="default"),
    ],
)
def test_the_output_size_without_an_input_image(
    inputs: dict[str, object], expected: tuple[int, int]
) -> None:
    assert output_size(inputs, []) == expected


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16"])
def test_images_of_every_mode_can_be_read(mode: str) -> None:
    file = io.BytesIO()
    Image.new(mode, (20, 20)).save(file, "tiff")
    assert render(KONTEXT, {"prompt": "x", "image_url": data_uri(file.getvalue())}).size == (
        512,
        512,
    )


def test_the_smallest_image_can_be_rendered() -> None:
    size = {"width": 1, "height": 1}
    assert render("fal-ai/flux/dev", {"prompt": "x", "image_size": size}).size == (1, 1)


def test_previews_become_sharper() -> None:
    image = Image.effect_noise((200, 200), 80)
    contrasts = [
        ImageStat.Stat(render_preview(image, progress)).stddev[0] for progress in (0.25, 0.75, 1)
    ]
    assert contrasts == sorted(contrasts)


# Input images


def read_images(url: str, files: FileStore | None = None) -> list[Image.Image]:
    model = MODELS[KONTEXT]
    values = validate_inputs(model, {"prompt": "x", "image_url": url})
    return read_input_images(model, values, files or FileStore(), SANDBOX_URL)


TOO_WIDE = Image.new("1", (14143, 20))


def decompression_bomb() -> str:
    file = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(file, "png")
    return data_uri(file.getvalue())


@pytest.mark.parametrize(
    ("url", "error_type"),
    [
        pytest.param(
            f"{SANDBOX_URL}/files/b/x/none.png",
            "file_download_error",
            id="missing file of the sandbox",
        ),
        pytest.param("cat.png", "file_download_error", id="not a URL"),
        pytest.param("", "file_download_error", id="empty"),
        pytest.param("ftp://example.com/cat.png", "file_download_error", id="another scheme"),
        pytest.param("file:///etc/passwd", "file_download_error", id="a local file"),
        pytest.param("http://[::1", "file_download_error", id="cannot be parsed"),
        pytest.param("https:///cat.png", "file_download_error", id="no host"),
        pytest.param("data:image/png;base64,AAAA", "image_load_error", id="not an image"),
        pytest.param("data:image/png;base64,A", "image_load_error", id="not base64"),
        pytest.param("data:,", "image_load_error", id="empty data"),
        pytest.param(data_uri(png()[:60]), "image_load_error", id="truncated"),
        pytest.param(data_uri(b"<svg/>"), "image_load_error", id="SVG"),
        pytest.param(
            data_uri(encode_image(TOO_WIDE.convert("L"), "png")), "image_too_large", id="too wide"
        ),
        pytest.param(decompression_bomb, "image_too_large", id="decompression bomb"),
    ],
)
def test_an_image_that_cannot_be_loaded_is_a_422(
    url: str | Callable[[], str], error_type: str
) -> None:
    with pytest.raises(FalError) as caught:
        read_images(url if isinstance(url, str) else url())
    assert caught.value.response.status == 422
    assert caught.value.response.error_type == error_type


def test_an_image_error_names_the_input() -> None:
    model = MODELS["fal-ai/face-swap"]
    values = {"base_image_url": RED, "swap_image_url": "x"}
    with pytest.raises(FalError) as caught:
        read_input_images(model, values, FileStore(), SANDBOX_URL)
    body: Any = caught.value.response.body
    assert body["detail"][0]["loc"] == ["body", "swap_image_url"]


def test_an_image_on_the_web_has_a_placeholder() -> None:
    [one], [again], [other] = read_images(URL), read_images(URL), read_images(f"{URL}?2")
    assert one.tobytes() == again.tobytes() != other.tobytes()


@pytest.mark.parametrize(
    "root",
    [
        pytest.param(SANDBOX_URL, id="the sandbox's URL"),
        pytest.param("https://v3.fal.media", id="fal's"),
    ],
)
def test_an_uploaded_image_is_read_from_the_file_store(root: str) -> None:
    files = FileStore()
    files.open()
    key = files.new_key("cat.png")
    files.put(key, io.BytesIO(png(size=(33, 22))), "image/png")
    [image] = read_images(f"{root}/files/b/{key}", files)
    files.close()
    assert image.size == (33, 22)


def test_an_image_gives_the_same_result_as_data_uri_and_as_upload() -> None:
    files = FileStore()
    files.open()
    key = files.new_key("cat.png")
    files.put(key, io.BytesIO(png()), "image/png")
    values = validate_inputs(MODELS[KONTEXT], {"prompt": "x", "image_url": RED, "seed": 1})
    stored = {**values, "image_url": f"{SANDBOX_URL}/files/b/{key}"}
    one = render_image(KONTEXT, values, read_images(RED), 0)
    other = render_image(KONTEXT, stored, read_images(str(stored["image_url"]), files), 0)
    files.close()
    assert one.tobytes() == other.tobytes()


def test_an_image_is_rotated_upright() -> None:
    file = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    Image.new("RGB", (40, 20)).save(file, "jpeg", exif=exif)
    [image] = read_images(data_uri(file.getvalue()))
    assert image.size == (20, 40)


async def test_an_image_on_the_web_is_never_fetched(aiohttp_client: AiohttpClient) -> None:
    fal: OfflineFal = await offline_fal(aiohttp_client)
    url = f"{fal.sandbox.public_url}/elsewhere.png"
    response = await fal.run(KONTEXT, {"prompt": "x", "image_url": url})
    assert response.status == 200
    assert [seen.path for seen in fal.sandbox.seen] == [f"/{KONTEXT}"]
